"""tools/score.py: the table of a finished run, and which of them is kept."""

import json
import shutil

import pytest
import torch
from conftest import CPU, NETWORK, SETTINGS, checkpoint, run_folder, seeded, snapshot

import data
import sample
from lib.errors import CheckpointError
from lib.files import save
from lib.report import fingerprints, read_metrics
from lib.scores import held_out
from lib.streams import RULE
from mmdit import MMDiT

SCORED = SETTINGS | dict(evaluation=32, teacher_steps=4, cfg=4.0, precision="fp32")


def random_weights(seed):
    """N(0, 1/fan_in), biases a tenth: every way of sampling gives other pictures."""
    model, generator = MMDiT(**NETWORK), seeded(seed)
    for p in model.parameters():
        scale = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model.state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without a report; data is its --data-dir."""
    folder = run_folder(tmp_path_factory.mktemp("score") / "run")
    for seed, kind in enumerate(("teacher", "student")):
        made = checkpoint(kind, weights=random_weights(seed), settings=SCORED)
        torch.save(made, folder / f"{kind}.pt")
    return folder


def evaluate(run, *words, folder=None):
    """The exit status of sample.py --evaluate, in this process."""
    words = [folder or run, "--evaluate", "--data-dir", run.parent / "data", *CPU, *words]
    try:
        return sample.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def test_evaluate_prints_the_table_and_keeps_it(run, capsys):
    """One row per way of sampling, in metrics.json beside what is there; the real images first."""
    path = run / "metrics.json"
    made_from = fingerprints(run)
    path.write_text(json.dumps(dict(rows=[], preset="x", checkpoints=made_from)))
    assert evaluate(run) == 0
    metrics, printed = json.loads(path.read_text()), capsys.readouterr().out
    names = [row["name"] for row in metrics["rows"]]
    assert names == [
        "real, held out", "teacher, 4 steps, CFG 4",
        "untrained, 4 steps", "untrained, 2 steps", "untrained, 1 step",
        "student, 4 steps", "student, 2 steps", "student, 1 step",
    ]  # fmt: skip
    assert all(f"| {name} |" in printed for name in names)
    assert [row.get("evaluations") for row in metrics["rows"]] == [None, 8, 4, 2, 1, 4, 2, 1]
    for row in metrics["rows"]:
        assert 0 <= row["alignment"] <= 1 and 0 <= row["precision"] <= 1 and row["frechet"] > 0
    assert metrics["preset"] == "x"  # the report's other facts stay
    assert metrics["samples"] == 32 and metrics["checkpoints"] == made_from


@pytest.mark.parametrize(
    "flags",
    [
        ["--num", 16],
        ["--seed", 5],
        ["--steps", 2],
        ["--cfg", 1.5],
        ["--other-judge"],
        ["--precision", "bf16"],
    ],
)
def test_a_table_of_other_samples_than_the_runs_own_is_printed_and_not_kept(
    run, tmp_path, capsys, flags
):
    folder = shutil.copytree(run, tmp_path / "run")
    before = snapshot(folder)
    assert evaluate(run, *flags, folder=folder) == 0
    assert "| student, 1 step |" in (printed := capsys.readouterr().out)
    assert "Not kept" in printed and snapshot(folder) == before
    name, value = [*flags, None][:2]
    steps, cfg = value if name == "--steps" else 4, value if name == "--cfg" else 4
    assert f"| teacher, {steps} steps, CFG {cfg} |" in printed


def test_to_samples_compares_with_what_the_student_learned_from(run, tmp_path, capsys):
    """With samples that are the very images of the table, all scores are those of the table."""
    folder = shutil.copytree(run, tmp_path / "run")
    for path in (folder / "synthetic").glob("*"):
        path.unlink()
    assert evaluate(run, "--to-samples", folder=folder) == 2
    assert "run has no samples of a teacher" in capsys.readouterr().err
    (part,) = held_out(data.shares(data.load("shapes", [(8, 8)]), 32))
    x0 = data.to_float(part.reference).half()
    content = dict(x0=x0, captions=["x"] * len(x0), index=list(range(len(x0))), seed=0, noise=RULE)
    (folder / "synthetic").mkdir(exist_ok=True)
    save(content, folder / "synthetic" / "00000.pt")
    tables = []
    for flags in ([], ["--to-samples"]):
        assert evaluate(run, *flags, folder=folder) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append([line.split("|")[:5] for line in lines if line.startswith("|")])
    assert len(tables[0]) == 10 and tables[0] == tables[1]
    few = {
        name: value[:7] for name, value in content.items() if name in ("x0", "captions", "index")
    }
    wide = dict(x0=x0.repeat(1, 1, 1, 2))
    whole = dict(x0=x0.long())
    for change, status, why in (
        (few, 2, "fewer than 8"),
        (wide, 2, "no samples of the data's sizes"),
        (whole, 1, "is damaged"),
    ):
        save(content | change, folder / "synthetic" / "00000.pt")
        assert evaluate(run, "--to-samples", folder=folder) == status
        assert why in (said := capsys.readouterr().err) and said.count("\n") == 1
    save(content, folder / "tuned" / "synthetic" / "00000.pt")  # of methods.dpo
    assert evaluate(run, "--to-samples", folder=folder) == 0
    assert tables[0][-1][3] in capsys.readouterr().out
    shutil.rmtree(folder / "tuned")
    save(content | dict(x0=-x0), folder / "synthetic" / "00000.pt")
    assert evaluate(run, "--to-samples", folder=folder) == 0
    assert tables[0][-1][3] not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_metrics_of_another_checkpoint_are_refused_and_kept(run, tmp_path, capsys, kind):
    """Their table, command and commit tell nothing of the weights that lie beside them."""
    folder = shutil.copytree(run, tmp_path / "run")
    made_from = fingerprints(folder) | {kind: "0" * 64}
    (folder / "metrics.json").write_text(json.dumps(dict(rows=[], checkpoints=made_from)))
    before = snapshot(folder)
    assert evaluate(run, folder=folder) == 2
    message = capsys.readouterr().err
    assert "metrics.json: not made from" in message and message.count("\n") == 1
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_checkpoint_of_the_metrics_that_is_gone_is_named_with_the_way_out(run, tmp_path, kind):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "metrics.json").write_text(json.dumps(dict(checkpoints=fingerprints(folder))))
    (folder / f"{kind}.pt").unlink()
    with pytest.raises(CheckpointError, match=f"{kind}.pt that is gone: put it back"):
        read_metrics(folder)


@pytest.mark.parametrize("own", [{}, dict(levels=(1.0, 0.3), eta=1.0, cfg=2.0, teacher_steps=3)])
def test_the_untrained_rows_are_the_student_before_distillation(run, tmp_path, own):
    """A student with the teacher's weights has the very scores of the untrained rows; also where
    the teacher is another run's (--from) and brings `own` settings of that one."""
    folder = shutil.copytree(run, tmp_path / "run")
    teacher = torch.load(folder / "teacher.pt", weights_only=True)
    torch.save(teacher | dict(kind="student"), folder / "student.pt")
    torch.save(teacher | dict(settings=teacher["settings"] | own), folder / "teacher.pt")
    (folder / "metrics.json").unlink(missing_ok=True)
    assert evaluate(run, folder=folder) == 0
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    for row in rows:
        row.pop("seconds", None)
    score = {row.pop("name"): row for row in rows}
    assert "teacher, 4 steps, CFG 4" in score
    for steps in ("4 steps", "2 steps", "1 step"):
        assert score[f"student, {steps}"] == score[f"untrained, {steps}"]
    assert score["student, 4 steps"] != score["student, 1 step"]


def test_latents_are_not_scored(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    for kind in ("teacher", "student"):
        made = checkpoint(kind, settings=SCORED | dict(downscale=8, size=64))
        torch.save(made, folder / f"{kind}.pt")
    (folder / "metrics.json").unlink(missing_ok=True)
    assert evaluate(run, folder=folder) == 2
    assert "latents" in capsys.readouterr().err


# What is wrong: the command line, and what the message must name.
BAD = {
    "foreign data": ("{run} --data {dir}/gone", "gone"),
    "too few to score": ("{run} --num 3", "--num"),
    "no steps": ("{run} --steps 0", "--steps"),
    "a way to score": ("{run} --sampler euler", "--sampler"),
    "whom to score": ("{run} --teacher", "--teacher"),
    "what to draw": ("{run} --prompt x", "--prompt"),
    "another size": ("{run} --size 8x8", "--size"),
    "a decoder": ("{run} --decode {dir}", "--decode"),
    "an export": ("{run} --export {dir}/a.safetensors", "--export"),
    "no run to score": ("{run}/student.pt", "run folder"),
}


@pytest.mark.parametrize(("words", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_and_status_2(run, tmp_path, capsys, words, named):
    """One line that names what is wrong; nothing is written or changed."""
    before = snapshot(tmp_path) | snapshot(run)
    folder, *words = words.format(run=run, dir=tmp_path).split()
    assert evaluate(run, *words, folder=folder) == 2
    usage, message = capsys.readouterr().err.rsplit("sample.py: ", 1)
    assert named in message and message.count("\n") == 1
    assert "Traceback" not in usage and "sample.py: " not in usage
    assert snapshot(tmp_path) | snapshot(run) == before
