"""What a run leaves to be read: metrics.json and report.md."""

from pathlib import Path

from lib.errors import CheckpointError
from lib.files import read_object, sha256, write_json, write_text
from lib.health import judge_stages
from lib.machine import facts, made_on
from lib.settings import command_of

# What is a bad sign in a row of log.jsonl, beside the first row: number, test, meaning.
SIGNS = {
    "teacher": [("loss", lambda r, first: r["loss"] > 0.9 * first["loss"], "no progress")],
    "distillation": [
        ("loss_d", lambda r, _: r["loss_d"] < 0.3, "the heads have won outright"),
        ("grad_norm", lambda r, first: r["grad_norm"] < 0.01 * first["grad_norm"],
         "the student's gradient has vanished"),
        ("diversity", lambda r, _: r["diversity"] < 0.7, "the student's samples are alike"),
    ],
}  # fmt: skip
# Heads near chance are a bad sign only where the student is far off: by the table of scores.
BLIND = ("loss_d", lambda r, _: r["loss_d"] > 1.95 and r["ranked"] < 0.53, "the heads see nothing")

COLUMNS = (
    ("alignment", "alignment", ".3f"), ("frechet", "Fréchet", ".2f"),
    ("precision", "precision", ".2f"), ("recall", "recall", ".2f"),
    ("inside", "inside", ".1f"), ("outside", "outside", ".1f"),
    ("evaluations", "evaluations", "d"), ("seconds", "s / image", ".4f"),
)  # fmt: skip


def markdown(rows):
    """Rows of cells, the head first, as a table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def markdown_table(rows):
    plain = ("inside", "outside")  # where the network is told of the image alone
    columns = [c for c in COLUMNS if c[0] not in plain or any(c[0] in row for row in rows)]
    table = [["samples", *(title for _, title, _ in columns)]]
    for row in rows:
        cells = ("–" if row.get(key) is None else format(row[key], f) for key, _, f in columns)
        table.append([row["name"], *cells])
    return markdown(table)


def accuracy_line(accuracy):
    if not accuracy:
        return "Captions have no words that tell images apart, so alignment is not measured"
    told = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
    return f"The judge reads held-out images right: {told}"


def fingerprints(folder):
    """The SHA-256 of a run's checkpoints, which say what a metrics.json was made from."""
    return {kind: sha256(Path(folder) / f"{kind}.pt") for kind in ("teacher", "student")}


def read_metrics(folder):
    """A run's metrics.json, {} if there is none. CheckpointError: not of its checkpoints."""
    path = Path(folder) / "metrics.json"
    if not path.exists():
        return {}
    metrics, advice = read_object(path), "Delete it and report.md to have both made again."
    for name in ("teacher.pt", "student.pt"):
        if not path.with_name(name).exists():
            raise CheckpointError(f"{path} tells of a {name} that is gone: put it back. {advice}")
    if metrics.get("checkpoints") != fingerprints(folder):
        raise CheckpointError(f"{path}: not made from the teacher.pt and student.pt here. {advice}")
    return metrics


def write_metrics(run, rows, seconds, **more):
    """metrics.json: the scores, and what they are of. -> its content"""
    s = run.settings
    program = "ladd.py" if run.method == "ladd" else f"-m methods.{run.method}"
    command = command_of(s, run.base, ["python", *program.split(), "--preset", s.preset])
    metrics = dict(rows=rows, seconds=seconds, seed=s.seed, data=s.data, samples=s.evaluation)
    metrics |= dict(method=run.method, checkpoints=fingerprints(run.out), **more)
    metrics |= dict(preset=s.preset, notes=run.notes, command=command, **facts())
    write_json(metrics, run.out / "metrics.json")
    return metrics


def verdicts(run, table):
    """{stage: healthy, suspicious or failed, and why}, from the log and the table of scores."""
    frechet, real = {row["name"]: row["frechet"] for row in table}, table[0]["alignment"]
    after, before = frechet["student, 1 step"], frechet["untrained, 1 step"]
    goal = table[1]["frechet"]  # the teacher's
    signs = dict(SIGNS)
    if after > (before + goal) / 2:
        signs["distillation"] = [*SIGNS["distillation"], BLIND]
    more = dict(teacher=[], synthesis=[], distillation=[], report=[])
    if not after < before:  # also where one is no number
        figure = f"Fréchet {after:.3g} in 1 step, {before:.3g} before"
        what = "the student is no better than untrained"
        more["distillation"].append(("suspicious", what, figure))
    if real is not None and real < 0.5:
        what = "the judge misreads real images"
        more["report"].append(("suspicious", what, f"{real:.2f} right"))
    found = judge_stages(list(run.log.rows()), signs, more)
    if run.settings.teacher:
        found["teacher"] = "not trained here but given"
    return found


def write_report(run, rows, accuracy, report_seconds):
    """metrics.json and report.md, and prints the table."""
    s, seconds, verdict = run.settings, {}, verdicts(run, rows)
    for row in run.log.rows():
        if row.get("finished") and isinstance(row.get("seconds"), float):
            seconds[row["stage"]] = row["seconds"]
    seconds["report"] = report_seconds
    where = write_metrics(run, rows, seconds, judge_accuracy=accuracy, verdicts=verdict)
    table, judged = markdown_table(rows), accuracy_line(accuracy)
    drawn = ("curves.png", "student.gif")  # the numbers and the student's grids over the updates
    took = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    paragraphs = [
        f"# {s.preset} on {s.data}, seed {s.seed}",
        *run.notes,
        "![samples](samples.png)",
        *(f"![{name}]({name})" for name in drawn if (run.out / name).exists()),
        table,
        f"{s.evaluation} samples per row, captions of held-out images. Fréchet distance, "
        "precision and recall in the judge's features. *untrained* is the student before "
        "distillation: the teacher, sampled as the student is.",
        f"{judged}.",
        "\n".join(f"- {stage}: {text}" for stage, text in verdict.items()),
        f"Time: {took}. Commit {made_on(where)}.",
    ]
    write_text("\n\n".join(paragraphs) + "\n", run.out / "report.md")
    print(f"{table}\n{judged}", flush=True)
