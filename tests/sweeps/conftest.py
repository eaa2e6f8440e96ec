"""One sweep that many tests look at."""

import pytest

from oracles.small_sweeps import run


@pytest.fixture(scope="session")
def result():
    return run()
