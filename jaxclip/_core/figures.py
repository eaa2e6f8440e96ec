"""Figures of matplotlib that a notebook shows, without pyplot and whatever the backend."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that knows how to become a picture; a plain one needs `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
