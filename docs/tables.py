"""Rebuilds the README's table of results from the metrics.json files kept in docs/results.

python docs/tables.py            checks that the README agrees with the files; status 1 if not
python docs/tables.py --write    writes the table into the README
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results: docs/tables.py -->", "<!-- end of results -->"
COLUMNS = (("alignment", 3), ("frechet", 1), ("precision", 2), ("recall", 2))


def cell(runs, i, key, digits):
    """mean ± standard deviation over the runs of one row's value."""
    values = [run["rows"][i][key] for run in runs]
    if any(value is None for value in values):
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(name, title):
    runs = [
        json.loads(p.read_text()) for p in sorted((ROOT / "docs/results").glob(f"{name}-*.json"))
    ]
    if not runs:
        return ""
    head = (
        "| | " + " | ".join(("alignment", "Fréchet", "precision", "recall", "evaluations")) + " |"
    )
    lines = [f"**{title}**", "", head, "|---" * 6 + "|"]
    for i, row in enumerate(runs[0]["rows"]):
        cells = [row["name"], *(cell(runs, i, key, digits) for key, digits in COLUMNS)]
        lines.append("| " + " | ".join([*cells, str(row.get("evaluations", "–"))]) + " |")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = statistics.fmean(sum(run["seconds"].values()) for run in runs) / 60
    commits = ", ".join(sorted({run["commit"][:9] for run in runs}))
    first = runs[0]
    kept = f"docs/results/{name}-*.json"
    several = len(runs) > 1
    lines += [
        "",
        f"Seed{'s' if several else ''} {seeds}{', mean ± standard deviation' if several else ''}; "
        f"`{first['command']}`; {minutes:.1f} minutes on {first['gpu'] or first['processor']}, "
        f"{first['threads']} threads, torch {first['torch']}; commit {commits}; {kept}.",
    ]
    return "\n".join(lines)


def results():
    parts = [
        table("nano-shapes", "`nano`, built-in shapes"),
        table("nano-pure", "`nano`, built-in shapes, LADD without the distillation loss"),
        table("nano-cifar10", "`nano`, CIFAR-10 photographs at 16×16"),
    ]
    return "\n\n".join(part for part in parts if part)


def main():
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    block = f"{START}\n{results()}\n{END}"
    wanted = re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: block, text, flags=re.S)
    if "--write" in sys.argv:
        path.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        print("README.md does not agree with docs/results: run python docs/tables.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
