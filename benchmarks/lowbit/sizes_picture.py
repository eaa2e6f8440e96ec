"""The picture of `sizes.py`: bits a weight against error, and what a network makes of it."""

import matplotlib.figure

STYLES = {
    "jaxclip": ("#D55E00", "s", "jaxclip, fixed width"),
    "gguf": ("#009E73", "^", "llama.cpp"),
    "auto-round": ("#E69F00", "o", "auto-round"),
    "llmcompressor": ("#CC79A7", "D", "llm-compressor"),
    "hqq": ("#56B4E9", "v", "HQQ"),
    "torchao": ("#888888", "P", "torchao"),
    "qwix": ("#000000", "X", "Qwix"),
}
TITLES = {
    "minilm": "MiniLM, a transformer, 10.6 M weights",
    "voices": "Resemblyzer, an LSTM, 1.4 M weights",
    "crepe": "CREPE, a convolutional net, every fourth row",
}


def of_equal_error(rows):
    """Our files that were measured beside those of others, as rows of their own."""
    for r in rows:
        sizes = min(r["ours"][:2]), r["ours"][2]
        for kind, bits, error in zip(("plain", "chosen"), sizes, r["reached"], strict=True):
            if error < 1.01 * r["error"]:
                own = {"setting": kind, "package": "jaxclip coded", "weights": r["weights"]}
                yield {**own, "bits": bits, "error": error}


def draw_panel(axes, rows, key):
    """Lower is better: `key` of each row against its bits."""
    shown = [r for r in rows if 1.3 < r["bits"] < 4.8 and key(r) is not None]
    for kind, line in (("plain", ":"), ("chosen", "-")):
        curve = sorted((r["bits"], key(r)) for r in shown if r["setting"] == kind)
        axes.plot([x for x, _ in curve], [y for _, y in curve], "#0072B2", ls=line, lw=2)
    for package, (color, marker, _) in STYLES.items():
        points = [(r["bits"], key(r)) for r in shown if r["package"] == package]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=34, zorder=3)
    axes.set(yscale="log", xlim=(1.3, 4.8))
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.12)  # room for the words at the top
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def name_kinds(axes, rows, key):
    """The names of llama.cpp's types beside their points."""
    for r in rows:
        if r["package"] == "gguf" and r["bits"] < 4.8 and key(r) is not None:
            name = r["setting"].split(", ")[1]
            is_left = name in ("IQ3_XXS", "Q2_K")  # others are at the right
            above = {"Q4_0": 4, "IQ3_S": 4, "IQ4_XS": -13}.get(name, -3)
            axes.annotate(
                name,
                (r["bits"], key(r)),
                xytext=(-5, -9) if is_left else (-10 if name == "IQ4_XS" else 5, above),
                textcoords="offset points",
                ha="right" if is_left else "left",
                fontsize=7,
                color=STYLES["gguf"][0],
            )


def draw(rows, file):
    """Writes the picture of the rows that `sizes.py` measured."""
    figure = matplotlib.figure.Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)

    def error(row):
        return row["error"]

    def distance(row):
        return 1 - row["cosine"] if "cosine" in row else None

    rows = [*rows, *of_equal_error([r for r in rows if "ours" in r])]
    of = {name: [r for r in rows if r["weights"] == name] for name in TITLES}
    places = {"minilm": panels[0, 0], "crepe": panels[1, 0], "voices": panels[1, 1]}
    for name, axes in places.items():
        if of[name]:
            draw_panel(axes, of[name], error)
            name_kinds(axes, of[name], error)
        axes.set(title=TITLES[name], ylabel="relative squared error of the weights")
    draw_panel(panels[0, 1], of["minilm"], distance)
    name_kinds(panels[0, 1], of["minilm"], distance)
    panels[0, 1].set(
        title="MiniLM: embeddings of 300 sentences", ylabel="1 - mean cosine to the original"
    )
    for axes in panels[1]:
        axes.set_xlabel("bits a weight in the file, all included")
    legend = panels[0, 0]
    for i, (color, marker, label) in enumerate(STYLES.values()):
        y = 0.42 - 0.058 * i
        legend.plot(0.04, y, color=color, marker=marker, transform=legend.transAxes)
        legend.text(0.07, y - 0.014, label, color=color, transform=legend.transAxes, fontsize=9)
    figure.suptitle("Down and to the left is better")
    for axes in panels.flat:
        axes.text(
            0.98,
            0.97,
            "blue: jaxclip, entropy coded\ndotted: plain, line: codes chosen for their cost",
            color="#0072B2",
            ha="right",
            va="top",
            fontsize=8.5,
            fontweight="bold",
            transform=axes.transAxes,
        )
    figure.savefig(file, dpi=120)
