"""Prints the tables of results/*.jsonl, and draws metric against bytes, task by task.

python evidence/report.py [--pictures docs]
"""

import argparse
import json
import pathlib

import numpy as np
from tasks import TASKS

import jaxclip

RESULTS = pathlib.Path(__file__).parent / "results"
WIDTHS = ["float32", 4, 3, 2, "ternary", 1]
ACCURACIES = ("digits", "fashion", "fashion_long", "convolutions")
UNITS = dict.fromkeys(ACCURACIES, ("test accuracy, %", 1))
UNITS |= {"flights": ("bits per flight", -1), "language": ("bits per byte", -1)}
SHOWN = {
    "AdamW": ("AdamW, rounded", "mse_optimal"),
    "Lion": ("Lion without a box, rounded", "mse_optimal"),
    "Adam in a box": ("Adam in a box, rounded", "mse_optimal"),
    "Lion in a box": ("Lion in a box, rounded", "mse_optimal"),
    "Lion in a box, chosen at ternary": ("Lion in a box, step for ternary", "max_abs"),
}


def read(task, folder=RESULTS):
    file = folder / f"{task}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spread(values):
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return np.mean(values), error


def markdown(header, lines):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def by_width(rows, digits):
    """A line for each method and rule, a column for each width: mean +- standard error."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name and row["bits"] != "float16"]
        for rule in dict.fromkeys(row["rule"] for row in mine if row["rule"] != "-"):
            if name.endswith("learned") and not rule.endswith("learned"):
                continue  # the rows of the method without
            cells = []
            for width in WIDTHS:
                found = [r for r in mine if r["bits"] == width and r["rule"] in (rule, "-")]
                if not found:
                    cells.append("")
                    continue
                mean, error = spread(found[0]["test"])
                cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
            lines.append([name, rule, *cells])
    return lines


def of_ideas(rows, digits):
    """A line for each idea: float32, then ternary by each rule, then with its scales learned."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = []
        for bits, rule in (
            ("float32", "-"),
            ("ternary", "mse_optimal"),
            ("ternary", "max_abs"),
            ("ternary", "learned"),
        ):
            found = [r for r in mine if r["bits"] == bits and r["rule"].endswith(rule)]
            mean, error = spread(found[0]["test"]) if found else (np.nan, np.nan)
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}" if found else "")
        edge = " (end of the grid)" if mine[0]["is_edge"] else ""
        lines.append([name, str(len(mine[0]["test"])), f"{mine[0]['step_size']:g}{edge}", *cells])
    return lines


def about_methods(rows, sign, digits):
    """A line for each method: step size, time, box, and the gap of train and test."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        first = next(row for row in rows if row["method"] == name)
        whole = [r for r in rows if r["method"] == name and r["bits"] == "float32"]
        gap = ""
        if whole:
            gaps = sign * (np.asarray(whole[0]["train"]) - np.asarray(whole[0]["test"]))
            gap = "{:.{d}f} ± {:.{d}f}".format(*spread(gaps), d=digits)
        edge = " (end of the grid)" if first["is_edge"] else ""
        seconds, bound = f"{first['seconds']:.1f}", f"{first['on_bound']:.0%}"
        seeds = str(len(first["test"]))
        lines.append([name, seeds, f"{first['step_size']:g}{edge}", seconds, bound, gap])
    return lines


def by_size(rows, digits):
    """Sparse and low-bit files, smallest first."""
    lines = []
    for row in sorted(rows, key=lambda row: row["bytes"]):
        is_sparse = row["bits"] == "float16"
        if is_sparse or (row["method"] in SHOWN and row["rule"] in ("mse_optimal", "-")):
            mean, error = spread(row["test"])
            what = row["rule"] if is_sparse else str(row["bits"])
            cells = [f"{row['bytes']:,.0f}", f"{mean:.{digits}f} ± {error:.{digits}f}"]
            lines.append([row["method"], what, *cells])
    return lines


def draw(task, rows, file):
    curves = {}
    for name, (label, rule) in SHOWN.items():
        points = []
        for width in WIDTHS:
            found = [
                r
                for r in rows
                if r["method"] == name and r["bits"] == width and r["rule"] in (rule, "-")
            ]
            if found:
                title = width if isinstance(width, str) else f"{width} bit"
                points.append((title, found[0]["bytes"], *spread(found[0]["test"])))
        if points:
            curves[label] = points
    ended = [r for r in rows if " from 1/2 on" in r["method"] and r["rule"] == "max_abs"]
    if ended:
        points = [(str(r["bits"]), r["bytes"], *spread(r["test"])) for r in ended]
        curves["In a box, on the grid for the last half"] = points
    trained = [r for r in rows if "trained at" in r["method"]]
    if trained and curves:
        points = [(str(r["bits"]), r["bytes"], *spread(r["test"])) for r in trained]
        curves["AdamW with the grid in the loop"] = sorted(points, key=lambda p: -p[1])
    sparse = [r for r in rows if r["bits"] == "float16" and r["method"] == "AdamW"]
    if sparse:
        points = [(r["rule"], r["bytes"], *spread(r["test"])) for r in sparse]
        curves["AdamW, pruned"] = sorted(points, key=lambda p: -p[1])
    jaxclip.plots.tradeoff(curves, file, metric=UNITS[task][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for the pictures")
    options = parser.parse_args()
    for task in TASKS:
        rows = read(task)
        if not rows:
            continue
        metric, sign = UNITS[task]
        digits = 2 if sign == 1 else 3
        print(f"\n## {task}: {metric}, {rows[0]['steps']} steps\n")
        print(markdown(["method", "rule", *map(str, WIDTHS)], by_width(rows, digits)))
        titles = ["method", "seeds", "step size", "seconds a run", "on the bound"]
        titles += ["train-test gap, float32"]
        print("\n" + markdown(titles, about_methods(rows, sign, digits)))
        print("\n" + markdown(["method", "file", "bytes", metric], by_size(rows, digits)))
        ideas = read(task, RESULTS / "ideas")
        if ideas:
            titles = ["idea", "seeds", "step size", "float32", "ternary, mse_optimal"]
            titles += ["ternary, max_abs", "ternary, scales learned"]
            print("\n### Ideas\n\n" + markdown(titles, of_ideas(ideas, digits)))
        if options.pictures:
            draw(task, rows, options.pictures / f"evidence_{task}.png")


if __name__ == "__main__":
    main()
