"""Rebuilds the tables of the documents from the files in docs/results.

python -m tools.table            checks that the texts agree with the files; status 1 if not
python -m tools.table --write    writes the tables into the texts
"""

import itertools
import json
import re
import statistics
import sys
from pathlib import Path

from lib.errors import Parser, plural
from lib.report import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENTS = ("../README.md", "results.md", "ablations.md", "exercises.md")
TITLES = dict(frechet="Fréchet")  # of the others the name is the title
FAR = dict(inside=1, outside=1)  # the digits of what pictures that are filled or edited have, too
STEPS = (1, 2, 4, 8)  # of a sweep's students, those that there are


def mean_and_deviation(values, digits):
    """Of the values that are known: not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def origin(runs, times, file):
    """The line below a table. times: how long on how many threads; file: what it is made from."""
    seeds = sorted({run["seed"] for run in runs})
    which = "Seeds {}, mean ± standard deviation" if len(seeds) > 1 else "Seed {}"
    commits = ", ".join(sorted({run["commit"][:9] for run in runs}))
    dirty = " with uncommitted changes" if any(run["dirty"] for run in runs) else ""
    return (
        f"{which.format(', '.join(map(str, seeds)))}; commit {commits}{dirty}, torch "
        f"{runs[0]['torch']}, {runs[0]['gpu'] or runs[0]['processor']}, {times}; {file}."
    )


def run_table(name, short):
    """The scores of all runs docs/results/NAME-*.json, which differ in the seed."""
    paths = sorted((DOCS / "results").glob(f"{name}-*.json"))
    runs = [json.loads(path.read_text("utf-8")) for path in paths]
    digits = dict(alignment=3, frechet=1, precision=2, recall=2)
    if short:
        del digits["precision"]
    if "inside" in runs[0]["rows"][-1]:
        digits |= FAR
    rows = [["samples", *(TITLES.get(key, key) for key in digits), "evaluations"]]
    for same in zip(*(run["rows"] for run in runs), strict=True):
        title = same[0]["name"]
        if not short or title.startswith("teacher") or title.endswith(("4 steps", "1 step")):
            cells = [title]
            for key, n in digits.items():
                cells.append(mean_and_deviation([row.get(key) for row in same], n))
            rows.append([*cells, same[0].get("evaluations", "–")])
    times = []
    for n in sorted({run["threads"] for run in runs}, reverse=True):
        minutes = [sum(run["seconds"].values()) / 60 for run in runs if run["threads"] == n]
        times.append(f"{statistics.fmean(minutes):.1f} minutes on {plural(n, 'thread')}")
    source = origin(runs, ", ".join(times), f"docs/results/{name}-*.json")
    return f"{markdown(rows)}\n\n`{runs[0]['command']}`. {source}"


def sweep_table(result):
    """A sweep.json's content as a table: mean ± standard deviation over its seeds. A method that
    learns in parts has a row after each."""
    names = list(result["members"][0]["values"])
    digits = dict(alignment=2, frechet=1, recall=2)
    if "inside" in result["reference"][-1]:
        digits |= FAR
    scored = {row["name"] for own in result["members"] for row in own["runs"][0]["rows"]}
    steps = [n for n in STEPS if f"student, {plural(n, 'step')}" in scored]

    def scores(who, tables):
        for key, n in itertools.product(digits, steps):
            name = f"{who}, {plural(n, 'step')}"
            found = [row[key] for table in tables for row in table if row["name"] == name]
            yield mean_and_deviation(found, digits[key])

    columns = [f"{TITLES.get(key, key)}, {n}" for key, n in itertools.product(digits, steps)]
    rows = [[*names, *columns, "s"]]
    blank = [""] * (len(names) - 1)
    rows.append(["*untrained*", *blank, *scores("untrained", [result["reference"]]), ""])
    for own in result["members"]:
        seconds = mean_and_deviation([run["seconds"]["distillation"] for run in own["runs"]], 0)
        tables = [run["rows"] for run in own["runs"]]
        first, *values = own["values"].values()
        found = {row["name"].split(",")[0] for row in tables[0]}
        for who in sorted(name for name in found if name.startswith("student-")):
            part = who.removeprefix("student-")
            rows.append([f"{first}, {part}", *values, *scores(who, tables), ""])
        rows.append([first, *values, *scores("student", tables), seconds])
    return markdown(rows)


def kept_sweep(name):
    """The table of docs/results/ablations/NAME.json, with its command and machine."""
    result = json.loads((DOCS / "results/ablations" / f"{name}.json").read_text("utf-8"))
    runs = [run for member in result["members"] for run in member["runs"]]
    times = plural(result["threads"], "thread")
    source = origin(runs, times, f"docs/results/ablations/{name}.json")
    return f"```\n{result['command']}\n```\n\n{sweep_table(result)}\n\n{source}"


def filled(text):
    """A document whose tables are made anew, of sweeps and of runs: `<!-- sweep: NAME -->`,
    `<!-- results: NAME -->`, or in short `<!-- results: NAME, five rows -->`."""

    def table(match):
        start, kind, name, short, end = match.groups()
        made = kept_sweep(name) if kind == "sweep" else run_table(name, short)
        return f"{start}\n{made}\n{end}"

    pattern = r"(<!-- (sweep|results): ([\w-]+)(, five rows)? -->).*?(<!-- end -->)"
    return re.sub(pattern, table, text, flags=re.S)


def main(argv=None):
    parser = Parser("tools/table.py", "Rebuilds the tables of the documents from docs/results.")
    parser.add_argument("--write", action="store_true", help="write the tables into the texts")
    write, stale = parser.parse_args(argv).write, 0
    for path in (DOCS / name for name in DOCUMENTS):
        text = path.read_text("utf-8")
        if write:
            path.write_text(filled(text), "utf-8")
        elif filled(text) != text:
            print(f"{path.name} is not what docs/results says: run python -m tools.table --write")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
