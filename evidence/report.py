"""Prints the tables of results/*.jsonl, and draws score against bytes, task by task.

    python evidence/report.py [--pictures docs]

Means come with the half-width of a 95 % interval over seeds (Student's t). A claim that one recipe
is better than another is judged by the interval of their paired differences, seed by seed, at each
budget: it holds if the interval is above 0, it does not if it is below, else nothing is shown.
"""

import argparse
import json
import pathlib

import numpy as np
from recipes import RECIPES
from scipy import stats
from tasks import TASKS

from jaxclip import plots

RESULTS = pathlib.Path(__file__).parent / "results"
# The claims: the first recipe is better than the second. All but the last four were named before
# the runs.
CLAIMS = {
    "A box makes nets trained by sign steps compressible": ("Lion in a box", "Lion"),
    "It does more than weight decay 1/t": ("Lion in a box", "Lion, decay 1/t"),
    "A box helps Adam": ("Adam in a box", "AdamW"),
    "Sign steps in a box beat AdamW": ("Lion in a box", "AdamW"),
    "Pruning while training helps": ("AdamW, pruned", "AdamW"),
    "Half the width helps": ("AdamW, narrower", "AdamW"),
    "A coded file beats a narrower net at 4 bits": ("AdamW", "AdamW, narrower, 4 bits"),
    "It beats a pruned net at 4 bits": ("AdamW", "AdamW, pruned, 4 bits"),
    "It beats training on a grid": ("AdamW", "AdamW on a grid"),
    "Pruned, it beats training on a grid": ("AdamW, pruned", "AdamW on a grid"),
    "A box helps Adam on a grid": ("Adam in a box, on a grid", "AdamW on a grid"),
    "Sign steps in a box help on a grid": ("Lion in a box, on a grid", "AdamW on a grid"),
    "A net in a box must be trained on the grid, too": (
        "Lion in a box, on a grid",
        "Lion in a box, rounded",
    ),
    "A penalty on the kurtosis helps": ("AdamW, kurtosis", "AdamW"),
    "A penalty on ranges helps": ("AdamW, ranges", "AdamW"),
    "A coded file beats NNCodec's": ("AdamW", "AdamW, NNCodec"),
    "The same for a narrower net": ("AdamW, narrower", "AdamW, narrower, NNCodec"),
    "A narrower net, coded, beats training on a grid": ("AdamW, narrower", "AdamW on a grid"),
    "It beats sign steps in a box": ("AdamW, narrower", "Lion in a box"),
    "An average of the weights helps AdamW": ("AdamW, averaged", "AdamW"),
    "It helps sign steps more than a box": ("Lion, averaged", "Lion in a box"),
}
BEST = "AdamW, narrower"
SHOWN = (
    "AdamW",
    "AdamW, narrower",
    "AdamW, pruned",
    "AdamW on a grid",
    "Lion",
    "Lion in a box",
    "Lion in a box, on a grid",
    "AdamW, narrower, 4 bits",
    "AdamW, pruned, 4 bits",
    "AdamW, narrower, NNCodec",
)


def read(task):
    """The rows of a task, in the order of the recipes."""
    file = RESULTS / f"{task}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    order = [*RECIPES, "AdamW, NNCodec", "AdamW, narrower, NNCodec"]
    return sorted(rows, key=lambda row: (order.index(row["recipe"]), -row["budget"]))


def interval(values):
    """Mean and half-width of its 95 % interval."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("nan")
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)


def apart(values, others):
    """How far two means of other seeds are apart, and half of Welch's 95 % interval."""
    found = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    return (found.high + found.low) / 2, (found.high - found.low) / 2


def differences(rows, better, worse, budget, is_better_high):
    """How much better one recipe is than another, seed by seed; None if one is missing."""
    found = [
        row["test"]
        for name in (better, worse)
        for row in rows
        if (row["recipe"], row["budget"]) == (name, budget)
    ]
    if len(found) < 2:
        return None
    return (1 if is_better_high else -1) * (np.asarray(found[0]) - np.asarray(found[1]))


def verdict(values):
    """Yes, no or open: where the interval of paired differences lies."""
    mean, half = interval(values)
    if mean - half > 0:
        return "yes"
    return "no" if mean + half < 0 else "open"


def markdown(header, lines):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def table(task, rows):
    """A line for each recipe: scores at each budget and in float32, and what was chosen."""
    places = 2 if task.is_better_high else 4
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        cells = []
        for row in mine:
            mean, half = interval(row["test"])
            over = np.mean(row["bytes"]) / row["budget"] - 1
            size = f" ({over:+.0%})" if abs(over) > 0.03 else ""
            cells.append(f"{mean:.{places}f} ± {half:.{places}f}{size}")
        whole, half = interval(mine[0]["whole_test"])
        adapted = name in RECIPES and RECIPES[name].adapts is not None
        cells.append("" if adapted else f"{whole:.{places}f} ± {half:.{places}f}")
        knob = "" if mine[0]["knob"] is None else str(mine[0]["knob"])
        widths = ", ".join(f"{row['width']:.2g}" for row in mine) if adapted else ""
        lines.append([name, *cells, f"{mine[0]['step_size']:.2g}", knob, widths])
    budgets = [f"{budget:,} B" for budget in task.budgets]
    return markdown(["recipe", *budgets, "float32", "step size", "knob", "widths"], lines)


def claims_of(task, rows):
    """A line for each claim that was run: differences at each budget, intervals and verdicts."""
    places = 2 if task.is_better_high else 4
    lines = []
    for claim, (better, worse) in CLAIMS.items():
        cells = []
        for budget in task.budgets:
            values = differences(rows, better, worse, budget, task.is_better_high)
            if values is not None:
                mean, half = interval(values)
                cells.append(f"{mean:+.{places}f} ± {half:.{places}f}, {verdict(values)}")
        if cells:
            lines.append([claim, *cells])
    return markdown(["claim", *(f"{budget:,} B" for budget in task.budgets)], lines)


def all_claims(found):
    """A line for each claim, a column for each task: the verdicts from the largest budget on."""
    lines = []
    for claim, (better, worse) in CLAIMS.items():
        cells = []
        for task, rows in found.values():
            verdicts = []
            for budget in task.budgets:
                values = differences(rows, better, worse, budget, task.is_better_high)
                verdicts.append("not run" if values is None else verdict(values))
            cells.append(verdicts[0] if len(set(verdicts)) == 1 else ", ".join(verdicts))
        lines.append([claim, *cells])
    return markdown(["claim", *found], lines)


def ahead_of(best, task, rows):
    """The recipes that are shown to be ahead of another, with the budget."""
    return [
        f"{name} at {budget:,} B"
        for name in dict.fromkeys(row["recipe"] for row in rows if row["recipe"] != best)
        for budget in task.budgets
        for values in [differences(rows, name, best, budget, task.is_better_high)]
        if values is not None and verdict(values) == "yes"
    ]


def draw(task, rows, file):
    curves = {}
    for name in SHOWN:
        mine = [row for row in rows if row["recipe"] == name]
        points = [
            (f"{row['budget']:,} B", np.mean(row["bytes"]), *interval(row["test"])) for row in mine
        ]
        if points:
            curves[name] = points
    plots.tradeoff(curves, file, metric=task.metric, title=task.title)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for the pictures")
    options = parser.parse_args()
    found = {name: (make(), read(name)) for name, make in TASKS.items() if read(name)}
    print("## All claims\n\n" + all_claims(found))
    for name, (task, rows) in found.items():
        print(f"\n## {task.title}: {task.metric}, {rows[0]['steps']} steps, ", end="")
        print(f"{len(rows[0]['test'])} seeds\n\n{table(task, rows)}\n\n{claims_of(task, rows)}")
        print(f"\nShown to be ahead of {BEST}: {', '.join(ahead_of(BEST, task, rows)) or 'none'}.")
        if options.pictures:
            draw(task, rows, options.pictures / f"evidence_{name}.png")


if __name__ == "__main__":
    main()
