"""Run folders that are broken or meant to harm: one line that names the file, and nothing else
happens. Every file is made here, by code.
"""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import (
    CPU,
    NETWORK,
    PICTURE,
    SETTINGS,
    TINY,
    Bomb,
    checkpoint,
    folder,
    plain,
    png,
    run_folder,
    run_on,
    saved,
)

import ladd
import sample

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------
# Checkpoints, judges, samples of the teacher
# ---------------------------------------------------------------------------------------------


def weights_with(**changes):
    return checkpoint()["weights"] | changes


POSITIONS = torch.zeros(1).expand(1, 10**10, 16)  # 640 GB of zeros, kept as one
HARMED = {
    "a list": saved([1, 2]),
    "of another program": saved(dict(format="other")),
    "no weights": saved(dict(format="ladd-1", model=NETWORK, settings=SETTINGS)),
    "weights of another kind": saved(checkpoint(weights=[1, 2])),
    "weights that are texts": saved(checkpoint(weights=weights_with(pos_embed="x"))),
    "a weight too few": saved(checkpoint(weights=dict(list(weights_with().items())[1:]))),
    "a weight too many": saved(checkpoint(weights=weights_with(more=torch.zeros(1)))),
    "a claim of 640 GB": saved(checkpoint(weights=weights_with(pos_embed=POSITIONS))),
    "weights without content": saved(
        checkpoint(weights=weights_with(pos_embed=torch.empty(1, 16, 16, device="meta")))
    ),
    "whole numbers": saved(
        checkpoint(weights={k: v.long() for k, v in checkpoint()["weights"].items()})
    ),
    "a network of another width": saved(checkpoint(model=NETWORK | dict(width=32))),
    "an enormous network": saved(checkpoint(model=NETWORK | dict(width=4 * 10**9))),
    "a million blocks": saved(checkpoint(model=NETWORK | dict(depth=10**6))),
    "no network": saved(checkpoint(model=None)),
    "an argument too many": saved(checkpoint(model=NETWORK | dict(more=1))),
    "no settings": saved(checkpoint(settings=None)),
    "few settings": saved(checkpoint(settings={})),
    "a size that is a text": saved(checkpoint(settings=SETTINGS | dict(size="8"))),
    "an enormous size": saved(checkpoint(settings=SETTINGS | dict(size=10**9))),
    "enormous captions": saved(checkpoint(settings=SETTINGS | dict(text_length=10**12))),
    "other captions": saved(checkpoint(settings=SETTINGS | dict(text_dim=8))),
    "endless sampling": saved(checkpoint(settings=SETTINGS | dict(teacher_steps=10**15))),
    "no levels": saved(checkpoint(settings=SETTINGS | dict(levels="high"))),
    "a level below 0": saved(checkpoint(settings=SETTINGS | dict(levels=(-1.0,)))),
    "an endless aspect": saved(checkpoint(settings=SETTINGS | dict(aspects=(f"1{'0' * 400}:1",)))),
    "guidance that is no number": saved(checkpoint(settings=SETTINGS | dict(cfg=float("nan")))),
    "in the old format": saved(checkpoint(), _use_new_zipfile_serialization=False),
    "text": b"hello",
}


@pytest.mark.parametrize("case", HARMED)
def test_a_harmed_checkpoint_is_refused_by_name(tmp_path, refused, case):
    made = run_folder(tmp_path / "made")
    (made / "student.pt").write_bytes(HARMED[case])
    refused(sample, [made, "--prompt", "x", "--out", "a.png", *CPU], 2, made / "student.pt")
    refused(ladd, run_on("shapes", "--teacher", made / "student.pt"), 2, made / "student.pt")


WIDER = torch.zeros(1, 16, 32)  # as where mmdit.py was changed since then
CHANGED = {
    "a weight more": (weights_with(more=torch.zeros(1)), "more"),
    "another shape": (weights_with(pos_embed=WIDER), "size mismatch for pos_embed"),
}


@pytest.mark.parametrize(("weights", "named"), CHANGED.values(), ids=CHANGED)
def test_a_checkpoint_of_another_network_names_a_weight(tmp_path, refused, weights, named):
    (tmp_path / "a.pt").write_bytes(saved(checkpoint(weights=weights)))
    refused(sample, ["a.pt", "--prompt", "x", *CPU], 2, "a.pt", named)


def test_a_student_is_no_teacher(tmp_path, refused):
    made = run_folder(tmp_path / "made")
    words = run_on("shapes", "--teacher", made / "student.pt")
    refused(ladd, words, 2, made / "student.pt", "holds student, not teacher")


@pytest.mark.parametrize(
    "settings", [dict(data=3), dict(evaluation=10**15), dict(judge_steps="x"), dict(seed=None)]
)
def test_settings_that_cannot_be_scored_by_are_refused(tmp_path, refused, settings):
    made = run_folder(tmp_path / "made")
    (made / "student.pt").write_bytes(saved(checkpoint(settings=SETTINGS | settings)))
    refused(sample, [made, "--evaluate", *CPU], 2, made, *settings)


def test_the_checkpoint_that_these_are_made_from_is_sound(tmp_path):
    made = run_folder(tmp_path / "made")
    assert sample.main([f"{made}", "--prompt", "x", "--out", f"{tmp_path}/a.png", *CPU]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a finished run and its judge, {path: content}."""
    path, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(path)
    try:
        assert ladd.main(run_again()) == 0
    finally:
        os.chdir(here)
    return {
        p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.*") if p.is_file()
    }


def damage(tmp_path, trained, name, content, without=()):
    """The run's files with one of them replaced, some left out."""
    files = {k: v for k, v in trained.items() if k not in without}
    folder(tmp_path, files | {name: content})
    return tmp_path / name


def run_again(*words):
    return [*TINY.split(), "--out", "run", *words]


SHARD = "run/synthetic/00000.pt"
BOMBED = {
    "teacher": ("run/teacher.pt", ["run/student.pt"]),
    "samples": (SHARD, ["run/student.pt"]),
    "judge": (None, ["run/report.md"]),
}


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
@pytest.mark.parametrize("case", BOMBED)
def test_code_in_a_file_is_never_run(tmp_path, trained, monkeypatch, capsys, case, protocol):
    """Whatever becomes of the run: no code of the file has run, and no traceback is shown."""
    mark, (name, without) = tmp_path / "mark", BOMBED[case]
    name = name or next(k for k in trained if k.startswith("data/judge"))
    bomb = dict(weights=Bomb(mark))
    content = saved(bomb) if protocol == "torch" else pickle.dumps(bomb, 2)
    damage(tmp_path, trained, name, content, without)
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) in (1, 2)
    said = capsys.readouterr().err
    assert Path(name).name in said and "Traceback" not in said
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))  # it is live
    assert mark.exists()


SHARDS = {
    "cut": lambda whole: saved(whole)[:2000],
    "a list": lambda whole: saved([1]),
    "no captions": lambda whole: saved(dict(x0=whole["x0"])),
    "captions that are numbers": lambda whole: saved(whole | dict(captions=[1] * 32)),
    "a caption too few": lambda whole: saved(whole | dict(captions=whole["captions"][1:])),
    "no pictures": lambda whole: saved(whole | dict(x0="x")),
    "of another rule of noise": lambda whole: saved(whole | dict(noise="Philox")),
    "pictures of another size": lambda whole: saved(whole | dict(x0=whole["x0"][..., 1:])),
    "pictures that are not finite": lambda whole: saved(whole | dict(x0=whole["x0"] / 0)),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_samples_of_the_teacher_are_refused_by_name(
    tmp_path, trained, monkeypatch, capsys, case
):
    whole = torch.load(io.BytesIO(trained[SHARD]), weights_only=True)
    damage(tmp_path, trained, SHARD, SHARDS[case](whole), ["run/student.pt"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ladd.py: {SHARD} is damaged") and said.count("\n") == 1
    assert said.endswith("Delete it and give the command again.\n")


def test_damaged_samples_of_the_run_that_from_names_are_to_be_deleted_in_both(
    tmp_path, trained, monkeypatch, capsys
):
    """They are one file with two names: the next command would take the damaged one again."""
    damage(tmp_path, trained, SHARD, b"cut", ["run/student.pt"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main([*run_again(), "--from=run", "--out=other"]) == 1
    said = capsys.readouterr().err
    assert "other/synthetic/00000.pt is damaged" in said and "in --from's run" in said


def not_finite(content):
    """A judge's file, with a weight that is no number."""
    judge = torch.load(io.BytesIO(content), weights_only=True)
    next(iter(judge["weights"].values())).view(-1)[0] = float("nan")
    return saved(judge)


JUDGES = [lambda _: b"", lambda _: b"cut", lambda _: saved([]), lambda _: saved(dict(weights={}))]


@pytest.mark.parametrize("content", [*JUDGES, not_finite])
def test_a_damaged_judge_is_refused_by_name(tmp_path, trained, monkeypatch, capsys, content):
    name = next(k for k in trained if k.startswith("data/judge"))
    damage(tmp_path, trained, name, content(trained[name]), ["run/report.md"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 2
    said = capsys.readouterr().err
    assert f"ladd.py: {name}: damaged. Delete it" in said and "Traceback" not in said


JSON = {
    "empty": b"",
    "cut": b'{"seed": ',
    "a list": b"[1, 2]",
    "a number": b"7",
    "not UTF-8": b'{"preset": "\xff"}',
    "nested": b'{"preset":' + b"[" * 100_000,
    "a picture": plain(1),
}


@pytest.mark.parametrize("case", JSON)
def test_a_damaged_config_is_refused_by_name(tmp_path, trained, refused, case):
    damage(tmp_path, trained, "run/config.json", JSON[case])
    refused(ladd, run_again(), 2, "run/config.json", "damaged")


@pytest.mark.parametrize("case", JSON)
def test_damaged_metrics_are_refused_by_name_before_anything_is_scored(
    tmp_path, trained, refused, case
):
    damage(tmp_path, trained, "run/metrics.json", JSON[case])
    refused(sample, ["run", "--evaluate", *CPU], 2, "run/metrics.json", "damaged")


def test_damaged_lines_of_a_log_are_passed_over(tmp_path, trained, monkeypatch):
    """The report still knows how long the stages took, and the log may be added to."""
    log = b"\n".join(JSON.values()) + b"\n" + trained["run/log.jsonl"] + JSON["cut"] + b"\n"
    damage(tmp_path, trained, "run/log.jsonl", log, ["run/report.md", "run/student.pt"])
    monkeypatch.chdir(tmp_path)
    assert ladd.main(run_again()) == 0
    seconds = json.loads(Path("run/metrics.json").read_text())["seconds"]
    assert set(seconds) == set(ladd.STAGES)


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------

NAME = '-two  words, übung 猫 it\'s "quoted" %s{x}\nnext line'


@pytest.mark.parametrize("name", [NAME, "caf\udce9"], ids=["odd", "not UTF-8"])
def test_any_path_serves_as_data_and_folder(tmp_path, monkeypatch, name):
    """Of the images, the downloads and the runs; a checkpoint made there can be sampled."""
    try:
        folder(tmp_path / name / "set", {f"a b/{k}.png": plain(k) for k in range(80)})
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    monkeypatch.chdir(tmp_path / name)
    pictures, out, cache = (f"{tmp_path / name}/{own}" for own in ("set", "run", "data"))
    words = ["--data", pictures, "--out", out, "--data-dir", cache]
    assert ladd.main([*TINY.split(), *words]) == 0
    assert Path("run/report.md").exists() and list(Path("data").glob("judge*"))
    words = [out, "--prompt", "x", "--out", f"{out}/a.png", *CPU]
    assert sample.main(words) == 0 and Path("run/a.png").exists()


def test_symbolic_links_are_followed_where_the_user_gives_them(tmp_path, monkeypatch):
    """To a folder of data or of runs, and to single pictures; a loop of folders ends nothing."""
    store = folder(tmp_path / "store", {f"{k}.png": plain(k) for k in range(80)})
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for picture in store.iterdir():
        (tmp_path / "set" / "cat" / picture.name).symlink_to(picture)
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    words = [*TINY.split(), "--data", f"{tmp_path}/link", "--out", f"{tmp_path}/runs/a"]
    assert ladd.main([*words, "--stage", "teacher"]) == 0
    assert (tmp_path / "disk" / "a" / "teacher.pt").exists()
    words = ["runs/a", "--teacher", "--prompt", "x", "--out", "runs/a.png", *CPU]
    monkeypatch.chdir(tmp_path)
    assert sample.main(words) == 0
    assert (tmp_path / "disk" / "a.png").exists()


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path, capsys):
    """Reading them might never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        assert sample.main([str(path), "--prompt", "x", "--out", str(tmp_path / "a.png")]) == 2
        assert str(path) in capsys.readouterr().err


READ_ONLY = """
import os, sys
sys.path.insert(0, {root!r})
import ladd, sample, tools.train
{first}  # imports all that there is to import
if os.getuid() == 0:  # who may write anywhere
    os.setuid(65534)
sys.exit({program}.main({words!r}))
"""


@pytest.mark.parametrize("program", ["ladd", "sample"])
def test_a_folder_that_may_only_be_read_is_named_and_stays_as_it_is(program):
    with tempfile.TemporaryDirectory() as base:  # pytest's own folders are closed to others
        os.chmod(base, 0o755)
        closed = Path(base) / "closed"
        closed.mkdir(mode=0o555)
        words = ["--smoke", "--out", f"{closed}/run", "--data-dir", f"{closed}/data"]
        first = ""
        if program == "sample":
            own = [f"{run_folder(Path(base) / 'run')}", "--prompt", "x", *CPU, "--out"]
            first, words = f"sample.main({[*own, base + '/a.png']})", [*own, f"{closed}/a.png"]
        code = READ_ONLY.format(root=str(ROOT), program=program, words=words, first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
        assert done.returncode == 1 and str(closed) in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not list(closed.iterdir())


def blocked(path):
    """A file where a folder should be: for root, who may write anywhere, a read-only folder."""
    path.write_text("in the way")
    return path / "below"


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, refused):
    path = blocked(tmp_path / "file")
    refused(ladd, [*TINY.split(), "--out", path], 1, tmp_path / "file")


def test_a_cache_that_cannot_be_made_is_refused_before_anything_is_trained(tmp_path, refused):
    path = blocked(tmp_path / "file")
    refused(ladd, [*TINY.split(), "--data-dir", path], 2, "--data-dir", tmp_path / "file", "folder")


@pytest.mark.parametrize("words", [["--out", "a.png"], ["--out", "folder"]])
def test_a_full_disk_is_one_line_and_leaves_no_picture(tmp_path, refused, words):
    """A limit of 200 bytes per file stands for the disk."""
    made, old = run_folder(tmp_path / "made"), resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "folder").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))
    try:
        refused(sample, [made, "--prompt", "x", *words, *CPU], 1, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_an_output_in_the_way_is_never_overwritten(tmp_path, refused):
    made = run_folder(tmp_path / "made")
    files = {"note.png": PICTURE, "text.png": b"hello", "huge.png": png(10**5, 10**5)}
    folder(tmp_path, files)
    (tmp_path / "dir.png").mkdir()
    for name in [*files, "dir.png"]:
        refused(sample, [made, "--prompt", "x", "--out", name, *CPU], 2, name, "choose another")
