"""Whole runs: what they leave, what they refuse, what happens where something can't be had."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FEW, SMALL, folder, lines, plain, same, saved, snapshot, weights, zipped
from PIL import Image

import ladd
import lib.cifar10
import sample
from lib.errors import NotFetched
from lib.log import Log
from lib.settings import locked

# ---------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, cache):
    """`python ladd.py --preset nano --smoke`, as a user would try it."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    words = ["--preset", "nano", "--smoke", "--out", str(out), "--data-dir", str(cache)]
    assert ladd.main(words) == 0
    return out


def test_a_run_leaves_every_promised_file(smoke):
    """Checkpoints, synthetic set, grids, table and report, and no half-written or stale one."""
    assert set(snapshot(smoke)) == {
        "config.json", "log.jsonl", "teacher.pt", "student.pt", "heads.pt", "synthetic/00000.pt",
        "samples/teacher-000002.png", "samples/student-000002.png", "samples.png",
        "metrics.json", "report.md", "curves.png", "student.gif", "words.txt",
    }  # fmt: skip


def test_a_run_says_which_words_it_knows_and_prompts_with_others_are_told(smoke, tmp_path, capsys):
    """Of a checkpoint file, too; each strange word once, and none that is not read."""
    words = (smoke / "words.txt").read_text().split()
    assert words == sorted(words) and {"a", "red", "circle", "striped", "on"} <= set(words)
    strange = "a Red dragon and a dragon a red circle on a red background unread"
    for run, prompt, told in (
        (smoke, strange, "never seen: and, dragon; "),
        (smoke / "student.pt", strange, "never seen: and, dragon; "),
        (smoke, "a red circle", None),
    ):
        out = str(tmp_path / "a.png")
        assert sample.main([str(run), "--prompt", prompt, "--out", out, "--device", "cpu"]) == 0
        said = capsys.readouterr().err
        assert (
            told in said and str(smoke / "words.txt") in said if told else "never seen" not in said
        )


def test_the_logs_first_row_says_what_ran_where(smoke):
    """All settings, the commit, the versions; then the updates, then the seconds of each stage."""
    first, *rest = lines(smoke)
    assert set(first["settings"]) == {f.name for f in dataclasses.fields(ladd.Settings)}
    assert first["settings"]["preset"] == "nano" and first["settings"]["iterations"] == 2
    assert first["torch"] == torch.__version__ and first["method"] == "ladd"
    assert {"commit", "dirty", "python", "numpy", "processor", "threads", "gpu"} <= set(first)
    updates = [(row["stage"], row["step"]) for row in rest if "images_per_s" in row]
    assert updates == [(stage, i) for stage in ("teacher", "distillation") for i in (1, 2)]
    assert [row["stage"] for row in rest if row.get("finished")] == list(ladd.STAGES)
    health = {"loss_d", "loss_g", "loss_distill", "d_real", "d_fake", "ranked", "diversity"}
    assert health | {"grad_norm", "grad_norm_heads", "images_per_s"} <= set(rest[-4])
    assert {"alignment", "frechet"} <= set(rest[-3])


def test_the_report_holds_the_student_against_the_untrained_one(smoke):
    """metrics.json and report.md have the same rows, the student before distillation among them."""
    metrics, report = json.loads((smoke / "metrics.json").read_text()), (smoke / "report.md")
    names = [row["name"] for row in metrics["rows"]]
    for kind in ("untrained", "student"):
        assert {f"{kind}, 4 steps", f"{kind}, 2 steps", f"{kind}, 1 step"} <= set(names)
    text = report.read_text()
    assert all(f"| {name} |" in text for name in names)
    assert metrics["seed"] == 0 and metrics["judge_accuracy"].keys() == {
        "size", "colour", "shape", "background", "pattern",
    }  # fmt: skip
    assert "![samples](samples.png)" in text
    assert "![curves.png](curves.png)" in text and "![student.gif](student.gif)" in text


def test_the_report_has_a_verdict_on_every_stage(smoke):
    report = (smoke / "report.md").read_text()
    assert all(f"\n- {stage}: " in report for stage in ladd.STAGES)
    assert "- teacher: not judged: 2 rows" in report and "- synthesis: healthy" in report


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_checkpoint_is_data_alone_and_rebuilds_its_model(smoke, kind):
    """Loaded without running code, by sample.py, which knows nothing of the trainer."""
    checkpoint = torch.load(smoke / f"{kind}.pt", weights_only=True)
    generator = sample.load_generator(smoke, kind == "teacher", "cpu")
    assert generator.kind == kind == checkpoint["kind"]
    state = generator.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in checkpoint["weights"].items())
    assert checkpoint["step"] == 2


def test_the_students_average_moves_away_from_the_teacher(smoke):
    """The EMA that is saved starts as the teacher; it was updated, in most tensors. (After two
    updates adaLN's gates are all but closed: what lies behind them may stand still.)"""
    before, after = weights(smoke / "teacher.pt"), weights(smoke / "student.pt")
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert len(moved) > 0.6 * len(before)
    assert {"x_embedder.proj.weight", "final_layer.linear.weight"} <= set(moved)


def test_the_synthetic_set_is_the_teachers_samples_for_its_captions(smoke):
    """Sample i, made again from its caption and number by the finished teacher."""
    file = torch.load(smoke / "synthetic" / "00000.pt", weights_only=True)
    s = torch.load(smoke / "teacher.pt", weights_only=True)["settings"]
    assert len(file["captions"]) == len(file["x0"]) == s["synthetic"] == 32
    again = sample.load_generator(smoke, teacher=True, device="cpu").sample(
        file["captions"][3:5], [3, 4], seed=file["seed"], stream="synthesis",
        steps=s["synthetic_steps"], cfg=s["synthetic_cfg"],
    )  # fmt: skip
    torch.testing.assert_close(file["x0"][3:5].float(), again, rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------
# The same folder again
# ---------------------------------------------------------------------------------------------


def rerun(smoke, cache, *extra):
    """The same command again."""
    words = ["--preset", "nano", "--smoke", "--out", str(smoke), "--data-dir", str(cache)]
    return ladd.main([*words, *extra])


def test_the_same_command_again_does_nothing(smoke, cache, capsys):
    """Every stage is skipped; no file changes but the log, which is only added to."""
    before = snapshot(smoke)
    assert rerun(smoke, cache) == 0
    after = snapshot(smoke)
    old, new = before.pop("log.jsonl")[0], after.pop("log.jsonl")[0]
    assert after == before
    assert new.startswith(old)
    assert capsys.readouterr().out.count("done before") == len(ladd.STAGES)


def test_how_a_run_is_logged_may_change_between_two_commands(smoke, cache):
    """Settings that change no result need no new folder."""
    assert rerun(smoke, cache, "--save-every", "7", "--device", "cpu") == 0


def test_a_folder_of_other_settings_is_refused_and_kept(smoke, cache, capsys):
    """The differing fields are named, and the way out; not even the log changes."""
    before = snapshot(smoke)
    assert rerun(smoke, cache, "--seed", "9", "--r1", "0.5") == 2
    message = capsys.readouterr().err
    assert "seed 0 → 9" in message and "r1 0.0 → 0.5" in message and "--out" in message
    assert "depth" not in message
    assert snapshot(smoke) == before


def test_a_strangers_folder_is_refused_and_kept(launch, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was a dark and stormy night.")
    before = snapshot(tmp_path)
    assert launch("thesis", FEW) == 2
    assert "thesis" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_damaged_run_folder_is_refused_and_kept(launch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    assert launch("run", FEW) == 2
    assert "config.json" in capsys.readouterr().err
    assert list(snapshot(tmp_path)) == ["run/config.json"]


@pytest.mark.parametrize(
    "flags",
    ["--from {run} --width 32", "--from {run}/gone", "--stage report"],
)
def test_a_refused_command_leaves_no_folder_that_refuses_the_corrected_one(
    launch, whole, tmp_path, flags
):
    assert launch("new", f"{FEW} {flags.format(run=whole)}") == 2
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_is_taken_over_is_there_and_finite(launch, whole, tmp_path, capsys):
    """Before the folder is made, not after the synthesis."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(whole / "config.json", source)
    assert launch("new", f"{FEW} --from source") == 2
    assert "teacher.pt: no such file" in capsys.readouterr().err
    checkpoint = torch.load(whole / "teacher.pt", weights_only=True)
    checkpoint["weights"]["pos_embed"][0, 0, 0] = float("nan")
    torch.save(checkpoint, source / "teacher.pt")
    assert launch("new", f"{FEW} --from source") == 2
    assert "--from source: pos_embed of its teacher" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_teacher_of_another_run_is_not_taken_for_the_given_one(launch, whole, tmp_path, capsys):
    """--from beside --teacher: the samples of that run are of its own teacher."""
    checkpoint = torch.load(whole / "teacher.pt", weights_only=True)
    checkpoint["weights"]["pos_embed"][0, 0, 0] += 1
    torch.save(checkpoint, tmp_path / "other.pt")
    assert launch("new", f"{FEW} --from {whole} --teacher other.pt") == 2
    assert "its teacher is not that of --teacher" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    flags = f"{FEW} --from {whole} --teacher {whole / 'teacher.pt'} --stage teacher"
    assert launch("new", flags) == 0


def test_of_a_run_cut_in_its_synthesis_the_teacher_alone_is_taken(launch, whole, monkeypatch):
    """The rest would be made by the seed of this run."""
    monkeypatch.setattr(ladd, "FILE", 3)
    shutil.copytree(whole, "source")
    shutil.rmtree("source/synthetic")
    assert launch("source", f"{FEW} --stage synthesis") == 0
    Path("source/synthetic/00001.pt").unlink()
    assert launch("new", f"{FEW} --from source --seed 1 --stage synthesis") == 0
    assert same("new/teacher.pt", whole / "teacher.pt")
    made = [torch.load(path, weights_only=True) for path in Path("new/synthetic").iterdir()]
    assert [file["seed"] for file in made] == [1, 1, 1]


def test_a_stray_file_beside_the_samples_stops_no_stage(launch, whole):
    shutil.copytree(whole, "run")
    Path("run/student.pt").unlink()
    shutil.copy("run/synthetic/00000.pt", "run/synthetic/00000 (conflicted copy).pt")
    assert launch("run", f"{FEW} --stage distillation") == 0
    assert same("run/student.pt", whole / "student.pt")


@pytest.mark.parametrize(
    "name", ["curves.png", "samples.png", "student.gif", "samples/student-000250.png", "samples"]
)
def test_a_strangers_picture_in_a_run_folder_is_refused_before_anything_is_trained(
    launch, whole, tmp_path, capsys, name
):
    """Not at the next grid, when the training since the last state would be lost."""
    folder(tmp_path / "run", {"config.json": (whole / "config.json").read_bytes(), name: plain(1)})
    before = snapshot(tmp_path)
    assert launch("run", FEW) == 2
    message = capsys.readouterr().err
    assert f"run/{name}" in message and message.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_finished_run_does_not_mind_what_became_of_its_pictures(smoke, cache, tmp_path):
    shutil.copytree(smoke, tmp_path / "run")
    (tmp_path / "run" / "samples.png").write_bytes(plain(1))
    assert rerun(tmp_path / "run", cache) == 0


def test_a_checkpoint_says_nothing_of_where_it_was_made(smoke):
    """No path of the machine is in what may be published."""
    for kind in ("teacher", "student", "heads"):
        settings = torch.load(smoke / f"{kind}.pt", weights_only=True)["settings"]
        assert not {"out", "data_dir", "device", "source"} & settings.keys()


def test_a_run_folder_that_is_a_file_is_one_line(launch, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert launch("run", FEW) in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "run" in message
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_folder_in_use_is_refused(launch, tmp_path, capsys):
    """Status 2, one line; the lock goes with the process that holds it."""
    with locked(Path("run")):
        assert launch("run", FEW) == 2
        message = capsys.readouterr().err
        assert "run: another process is at work" in message and message.count("\n") == 1
        assert snapshot(Path("run")) == {}
    assert launch("run", f"{FEW} --stage teacher") == 0


def test_a_report_of_other_checkpoints_is_refused(smoke, cache, tmp_path, capsys):
    """A student that was put there later has not been scored."""
    run = shutil.copytree(smoke, tmp_path / "run")
    assert rerun(run, cache) == 0
    shutil.copy(run / "teacher.pt", run / "student.pt")
    assert rerun(run, cache) == 2
    message = capsys.readouterr().err
    assert "metrics.json: not made from" in message and message.count("\n") == 1


@pytest.mark.parametrize("stage", ["synthesis", "distillation", "report"])
def test_a_stage_before_its_turn_names_what_is_missing(launch, capsys, stage):
    assert launch("run", f"{FEW} --stage {stage}") == 2
    assert "needs the stage teacher first" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["teacher.pt", "synthetic/00000.pt"])
def test_a_damaged_result_of_an_earlier_stage_is_named(launch, train, capsys, name):
    """Never trained on: the student's stage ends with one line."""
    path = train("run", stages=("teacher", "synthesis")) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    capsys.readouterr()
    assert launch("run", f"{FEW} --stage distillation") in (1, 2)
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train, whole):
    """Two identical runs are identical bit for bit, whatever this process drew in between."""
    torch.rand(17)
    again, other = train("again"), train("other", "--seed 1")
    for kind in ("teacher", "student"):
        assert same(whole / f"{kind}.pt", again / f"{kind}.pt")
        assert not same(whole / f"{kind}.pt", other / f"{kind}.pt")


def test_a_run_leaves_the_callers_random_numbers_alone(launch):
    """All randomness comes from the seed: the global generator is not consumed."""
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert launch("run", FEW + " --stage teacher") == 0
    assert torch.equal(torch.rand(2), want)


def test_a_new_run_may_log_for_tensorboard(launch, tmp_path):
    pytest.importorskip("tensorboard")
    assert launch("run", f"{FEW} --stage teacher --tensorboard") == 0
    assert list(tmp_path.glob("run/tensorboard/events*"))


def test_tensorboard_has_every_number_at_once_and_passes_over_what_is_none(tmp_path):
    """Its thread writes late, and not at all where a process ends; a skipped update has names."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, tensorboard=True)
    log.write(stage="teacher", step=3, loss=0.5)
    log.write(stage="teacher", step=4, skipped=1, not_finite=["a.weight"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["teacher/loss", "teacher/skipped"]
    assert [(e.step, e.value) for e in events.Scalars("teacher/loss")] == [(3, 0.5)]


def test_deterministic_kernels_are_asked_for_by_the_run_that_wants_them_alone(
    launch, whole, monkeypatch
):
    """On a CPU they are the same bits as ever."""
    loss, asked = ladd.teacher_loss, set()

    def look(*arguments):
        asked.add(torch.are_deterministic_algorithms_enabled())
        return loss(*arguments)

    monkeypatch.setattr(ladd, "teacher_loss", look)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which would outlive the run
    assert launch("run", f"{FEW} --deterministic --stage teacher") == 0
    assert asked == {True}
    assert launch("other", f"{FEW} --stage teacher") == 0
    assert asked == {True, False} and not torch.are_deterministic_algorithms_enabled()
    assert same("run/teacher.pt", whole / "teacher.pt")


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def test_data_that_does_not_exist_is_one_line_and_status_2(launch, tmp_path, capsys):
    assert launch("run", FEW + " --data nowhere") == 2
    message = capsys.readouterr().err
    assert "nowhere" in message and message.count("\n") == 1
    assert snapshot(tmp_path) == {} and not (tmp_path / "run").exists()


def test_a_network_for_grey_images_is_refused_as_the_data_are_coloured(launch, tmp_path, capsys):
    assert launch("run", FEW + " --channels 1") == 2
    message = capsys.readouterr().err
    assert "1 channels" in message and "images of 3" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_student_of_two_levels_gets_its_report(launch, tmp_path):
    """The table and the pictures have as many steps as there are levels."""
    levels = "--levels 1,0.5 --level-p 0.6,0.4 --level-warmup-p 0.5,0.5"
    assert launch("run", f"{SMALL} {levels} --smoke") == 0
    names = [r["name"] for r in json.loads((tmp_path / "run/metrics.json").read_text())["rows"]]
    assert names[-2:] == ["student, 2 steps", "student, 1 step"]


@pytest.mark.parametrize("images", [3, 50, 90])
def test_a_folder_of_images_runs_through(launch, tmp_path, capsys, images):
    """Two classes, from decoding to the report; too few images are refused before any work."""
    for i in range(images):
        path = tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 11), (i, 2 * i, 255 - i)).save(path)
    if launch("run", f"{SMALL} --smoke --data pets") == 0:
        assert (tmp_path / "run" / "report.md").exists()
    else:
        assert images < 90 and "pets" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise NotFetched("CIFAR-10 can't be had (no network).")

    monkeypatch.setattr(lib.cifar10, "read_cifar10", refuse)


def test_a_preset_whose_data_cannot_be_had_takes_shapes_and_says_so(
    launch, offline, tmp_path, capsys
):
    """Said on stderr, in the log, the metrics and the report; the same command goes on later."""
    flags = f"--preset tiny {SMALL} --smoke"
    assert launch("run", flags) == 0
    out, message = tmp_path / "run", capsys.readouterr().err
    assert "!!! cifar10 can't be had, so this run uses the built-in shapes" in message
    assert "built-in shapes" in (out / "report.md").read_text()
    assert "tiny on shapes" in (out / "report.md").read_text()
    assert "built-in shapes" in json.loads((out / "metrics.json").read_text())["notes"][0]
    assert "built-in shapes" in lines(out)[0]["note"]
    assert json.loads((out / "config.json").read_text())["data"] == "shapes"
    assert launch("run", flags) == 0


def test_the_shapes_that_take_the_place_of_data_must_fit_the_settings(
    launch, offline, tmp_path, capsys
):
    assert launch("run", f"--preset tiny {SMALL} --smoke --channels 1") == 2
    assert "latents of 1 channels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_that_was_asked_for_is_never_replaced(launch, offline, tmp_path, capsys):
    """--data cifar10 without a network: status 2, nothing made."""
    assert launch("run", f"--preset tiny {SMALL} --smoke --data cifar10") == 2
    message = capsys.readouterr().err
    assert "CIFAR-10 can't be had" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_captions_that_are_cut_are_told_at_the_start_and_in_the_log(launch, tmp_path, capsys):
    flags = f"{SMALL} --smoke --text-length 3 --stage"
    assert launch("run", f"{flags} teacher") == 0
    told = "1792 of 1792 captions have more than 3 words; --text-length 9 reads all."
    assert told in capsys.readouterr().err
    assert told in lines(tmp_path / "run")[0]["note"]


# ---------------------------------------------------------------------------------------------
# A run and its data
# ---------------------------------------------------------------------------------------------

PETS = {f"{'cat' if k % 3 else 'dog'}/{k:02}.png": plain(k) for k in range(90)}


@pytest.fixture(scope="module")
def of_pets(tmp_path_factory, cache):
    """A run on a folder of images beside it, whose teacher is finished."""
    place = tmp_path_factory.mktemp("pets")
    words = [*FEW.split(), "--data", f"{folder(place / 'set', PETS)}", "--out", f"{place / 'run'}"]
    assert ladd.main([*words, "--stage", "teacher"]) == 0
    return place


WHERE = {
    "by another spelling": (lambda place: None, "set/../set/"),
    "by its whole path": (lambda place: None, "{place}/set"),
    "moved": (lambda place: (place / "set").rename(place / "moved"), "moved"),
    "as a link": (lambda place: (place / "link").symlink_to("set"), "link"),
    "as a zip": (lambda place: zipped(place / "set.zip", PETS), "set.zip"),
    "beside other files": (lambda place: folder(place, {"set/notes.txt": b""}), "set"),
}


@pytest.mark.parametrize("case", WHERE)
def test_the_same_data_may_lie_anywhere(launch, tmp_path, of_pets, capsys, case):
    change, path = WHERE[case]
    shutil.copytree(of_pets, tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    flags = f"{FEW} --stage teacher --data {path.format(place=tmp_path)}"
    assert launch("run", flags) == 0
    assert launch("next", f"{flags} --from run") == 0
    assert capsys.readouterr().out.count("teacher: done before") == 2


CHANGES = {
    "an image is gone": lambda place: (place / "cat/01.png").unlink(),
    "an image is new": lambda place: folder(place, {"cat/99.png": plain(99)}),
    "an image has another name": lambda place: (place / "cat/01.png").rename(place / "cat/1.png"),
    "an image has another content": lambda place: folder(place, {"cat/01.png": plain(99)}),
    "a class has another name": lambda place: (place / "cat").rename(place / "cow"),
    "an image cannot be read": lambda place: (
        (place / "cat/01.png").unlink() or (place / "cat/01.png").symlink_to("gone")
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_data_is_noticed(launch, tmp_path, of_pets, capsys, case):
    """Other images would be held out then, among them some that were trained on."""
    shutil.copytree(of_pets, tmp_path, dirs_exist_ok=True)
    CHANGES[case](tmp_path / "set")
    before = snapshot(tmp_path / "run")
    for name, more in (("run", ""), ("next", "--from run")):
        assert launch(name, f"{FEW} --data set --stage teacher {more}") == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "made with other settings (dataset 90 images, 2 captions" in told
    assert snapshot(tmp_path / "run") == before


def test_changed_data_is_not_scored_by(launch, tmp_path, of_pets, capsys):
    """sample.py --evaluate keeps its table where the run's data lies elsewhere, not where they are
    other data."""
    shutil.copytree(of_pets, tmp_path, dirs_exist_ok=True)
    made = torch.load(tmp_path / "run/teacher.pt", weights_only=True)
    made["settings"] |= dict(data="set", evaluation=8, judge_steps=2)
    for kind in ("teacher", "student"):
        (tmp_path / f"run/{kind}.pt").write_bytes(saved(made | dict(kind=kind)))
    words = ["run", "--evaluate", "--device", "cpu", "--precision", "fp32", "--data-dir", "data"]
    (tmp_path / "set").rename(tmp_path / "moved")
    assert sample.main([*words, "--data", "moved"]) == 0
    assert "Not kept" not in capsys.readouterr().out and (tmp_path / "run/metrics.json").exists()
    (tmp_path / "moved").rename(tmp_path / "set")
    (tmp_path / "set/cat/01.png").unlink()
    before = snapshot(tmp_path)
    assert sample.main(words) == 2
    assert "run was made from other images or captions" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_run_of_an_older_version_goes_on(launch, tmp_path, of_pets, capsys):
    shutil.copytree(of_pets, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["dataset"]
    config |= dict(data="set", heads=config.pop("attention_heads"))
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert launch("run", f"{FEW} --data set --stage teacher") == 0
    assert launch("other", f"{FEW} --data set --from {tmp_path / 'run'} --stage teacher") == 0
    assert launch("run", f"{FEW} --data set/ --stage teacher") == 2
