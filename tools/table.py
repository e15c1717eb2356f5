"""Rebuilds the tables of README.md, ablations.md and exercises.md from the files in docs/results.

python docs/tables.py            checks that the texts agree with the files; status 1 if not
python docs/tables.py --write    writes the tables into the texts
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ladd import mean_and_deviation, sweep_table  # noqa: E402

START, END = "<!-- results: docs/tables.py -->", "<!-- end of results -->"
COLUMNS = (("alignment", 3), ("frechet", 1), ("precision", 2), ("recall", 2))


def cell(runs, i, key, digits):
    """mean ± standard deviation over the runs of one row's value."""
    return mean_and_deviation([run["rows"][i][key] for run in runs], digits)


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
    took = {}  # threads -> minutes of every run
    for run in runs:
        took.setdefault(run["threads"], []).append(sum(run["seconds"].values()) / 60)
    minutes = ", ".join(
        f"{statistics.fmean(own):.1f} minutes on {n} thread{'s' * (n > 1)}"
        for n, own in sorted(took.items(), reverse=True)
    )
    commits = ", ".join(sorted({run["commit"][:9] for run in runs}))
    first = runs[0]
    kept = f"docs/results/{name}-*.json"
    several = len(runs) > 1
    lines += [
        "",
        f"Seed{'s' if several else ''} {seeds}{', mean ± standard deviation' if several else ''}; "
        f"`{first['command']}`; {minutes}, {first['gpu'] or first['processor']}, "
        f"torch {first['torch']}; commit {commits}; {kept}.",
    ]
    return "\n".join(lines)


def results():
    parts = [
        table("nano-shapes", "`nano`, built-in shapes"),
        table("nano-pure", "`nano`, built-in shapes, LADD without the distillation loss"),
        table("nano-cifar10", "`nano`, CIFAR-10 photographs at 16×16"),
    ]
    return "\n\n".join(part for part in parts if part)


def ablation(name):
    """The table of a sweep kept in docs/results/ablations, with its command and machine."""
    result = json.loads((ROOT / "docs/results/ablations" / f"{name}.json").read_text("utf-8"))
    commits = sorted({run["commit"] for member in result["members"] for run in member["runs"]})
    dirty = any(run["dirty"] for member in result["members"] for run in member["runs"])
    seeds = ", ".join(map(str, result["seeds"]))
    lines = ["```", result["command"], "```", "", sweep_table(result), ""]
    lines += [
        f"Seeds {seeds}, mean ± standard deviation; commit {', '.join(c[:9] for c in commits)}"
        f"{' with uncommitted changes' * dirty}, torch {result['torch']}, "
        f"{result['gpu'] or result['processor']}, {result['threads']} thread"
        f"{'s' * (result['threads'] > 1)}; docs/results/ablations/{name}.json."
    ]
    return "\n".join(lines)


def filled(text):
    """A document with the table of results and every `<!-- sweep: NAME -->` made anew."""
    block = f"{START}\n{results()}\n{END}"
    text = re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: block, text, flags=re.S)
    return re.sub(
        r"(<!-- sweep: (\S+) -->).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{ablation(m[2])}\n{m[3]}",
        text,
        flags=re.S,
    )


def main():
    status = 0
    for name in ("README.md", "docs/ablations.md", "docs/exercises.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = filled(text)
        if "--write" in sys.argv:
            path.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            print(f"{name} does not agree with docs/results: run python docs/tables.py --write")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
