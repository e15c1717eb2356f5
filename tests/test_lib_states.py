"""States: cut runs go on bit for bit, damage is found and named, nothing is lost on a full disk.

A process that dies is a real one: a driver forks runs and lets each send itself SIGKILL at its
moment, also in the middle of a file or of a line of the log. All the rest runs in this process.
"""

import json
import os
import pickle
import random
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FEW, MAKING, Bomb, cut_at, folder, same, snapshot, updates

import ladd
import lib.run
import lib.samples
import lib.states
from lib.errors import RunError
from lib.files import read, save, sha256
from lib.optim import make_optimizers, step_all
from lib.states import Saver, forget_states, forget_unfinished, load_state, newest_state

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def equal(a, b):
    """Whether two nests of tensors and numbers are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 16
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------
# What a state holds
# ---------------------------------------------------------------------------------------------


class Stage:
    """Two networks, one with matrices for Muon, and their optimisers; `saved` into a folder."""

    def __init__(self, out, seed=0):
        torch.manual_seed(seed)
        self.out = out
        blocks = torch.nn.ModuleDict(dict(blocks=torch.nn.Linear(4, 4), end=torch.nn.Linear(4, 1)))
        self.networks = dict(model=blocks, heads=torch.nn.Linear(4, 2))
        self.optimizers = make_optimizers(blocks, 0.01, 0.9, muon_lr=0.02)
        self.optimizers += make_optimizers(self.networks["heads"], 0.1, 0.5)
        self.saver = Saver(out, "teacher", CPU, divided=False)

    def update(self):
        model, heads = self.networks.values()
        x = model["blocks"](torch.ones(3, 4))
        (model["end"](x).square().sum() + heads(x.detach()).square().sum()).backward()
        step_all((self.optimizers[:2], model, 1.0, 0.5), (self.optimizers[2:], heads, 9.0, 0.7))

    def save(self, step):
        facts = dict(step=step, seconds=1.5)
        self.saver.save(step, self.networks, self.optimizers, facts, wait=True)

    def content(self):
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return dict(networks=networks, optimizers=[o.state_dict() for o in self.optimizers])


def states_of(out):
    return sorted(path.name for path in out.glob("*-state-*"))


def test_a_state_gives_back_every_weight_and_moment_bit_for_bit(tmp_path):
    """By one process, without any process group; and the next update is the same, too."""
    assert not dist.is_initialized()
    stage, fresh = Stage(tmp_path), Stage(tmp_path, seed=1)
    for _ in range(3):
        stage.update()
    stage.save(3)
    folder, facts = newest_state(tmp_path, "teacher")
    assert (folder.name, facts["step"], facts["seconds"]) == ("teacher-state-00000003", 3, 1.5)
    fresh.update()
    assert not equal(fresh.content(), stage.content())
    load_state(folder, fresh.networks, fresh.optimizers)
    assert equal(fresh.content(), stage.content())
    stage.update()
    fresh.update()
    assert equal(fresh.content(), stage.content())


def test_a_state_from_before_the_first_update_has_no_moments(tmp_path):
    stage, fresh = Stage(tmp_path), Stage(tmp_path, seed=1)
    stage.save(0)
    load_state(newest_state(tmp_path, "teacher")[0], fresh.networks, fresh.optimizers)
    assert equal(fresh.content(), stage.content()) and not fresh.optimizers[0].state


def test_the_learning_rates_are_the_programs_not_the_states(tmp_path):
    stage, fresh = Stage(tmp_path), Stage(tmp_path)
    stage.update()
    stage.save(1)
    for group in fresh.optimizers[0].param_groups:
        group["base_lr"] = group["lr"] = 7.0
    load_state(newest_state(tmp_path, "teacher")[0], fresh.networks, fresh.optimizers)
    assert fresh.optimizers[0].param_groups[0]["base_lr"] == 7.0
    assert fresh.optimizers[0].param_groups[0]["lr"] == 7.0


def test_the_last_two_states_of_a_stage_are_kept_and_of_no_other(tmp_path):
    stage = Stage(tmp_path)
    (tmp_path / "distillation-state-00000009").mkdir()
    for step in range(1, 5):
        stage.save(step)
        kept = [f"teacher-state-{k:08d}" for k in range(max(1, step - 1), step + 1)]
        assert states_of(tmp_path) == ["distillation-state-00000009", *kept]
    forget_states(tmp_path, "teacher")
    assert states_of(tmp_path) == ["distillation-state-00000009"]


def test_a_state_counts_once_its_last_file_is_there(tmp_path, monkeypatch):
    """A cut before that leaves the one before; what is left is cleared away, states are not."""
    stage = Stage(tmp_path)
    stage.save(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def cut(value, path):
            assert {p.name for p in path.parent.iterdir()} == {".metadata", "__0_0.distcp"}
            raise KeyboardInterrupt

        patch.setattr(lib.states, "save", cut)
        stage.save(2)
    assert states_of(tmp_path) == ["teacher-state-00000001", "teacher-state-00000002"]
    assert newest_state(tmp_path, "teacher")[1]["step"] == 1
    forget_unfinished(tmp_path)
    assert states_of(tmp_path) == ["teacher-state-00000001"]
    assert newest_state(tmp_path, "teacher")[1]["step"] == 1


def test_what_a_cut_left_is_cleared_away_and_nothing_of_the_users(tmp_path):
    mine = ["before-state-of-my-notes/a.txt", "my-state-00000001/a.txt", "keep/.report.md.tmp"]
    mine += [".report.md.tmp", "teacher-state-final/a.txt", "keep/.a.pt.0123abcd.tmp"]
    left = [".teacher.pt.0123abcd.tmp", "synthetic/.00001.pt.89efabcd.tmp"]
    left += ["tuning-state-00000001/.metadata.tmp"]
    folder(tmp_path, dict.fromkeys([*mine, *left], b""))
    forget_unfinished(tmp_path)
    assert sorted(snapshot(tmp_path)) == sorted(mine)


def test_a_state_takes_the_place_of_a_damaged_one_of_the_same_update(tmp_path):
    """Of which nothing is left, such as the files of more processes than write now."""
    stage, folder = Stage(tmp_path), tmp_path / "teacher-state-00000002"
    stage.save(2)
    whole = snapshot(folder).keys()
    flip(folder / ".metadata")
    (folder / "__7_0.distcp").write_bytes(b"of process 7")
    stage.save(2)
    assert snapshot(folder).keys() == whole
    assert newest_state(tmp_path, "teacher")[1]["step"] == 2


def test_a_folder_without_states_has_none(tmp_path):
    assert newest_state(tmp_path, "teacher") is None


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------

FILES = ("__0_0.distcp", ".metadata", "state.pt")


@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_in_any_file_of_a_state_is_named_and_the_one_before_is_used(
    tmp_path, capsys, file, at
):
    stage = Stage(tmp_path)
    for step in (1, 2):
        stage.save(step)
    flip(tmp_path / "teacher-state-00000002" / file, at)
    assert newest_state(tmp_path, "teacher")[1]["step"] == 1
    said = capsys.readouterr().err
    assert f"teacher-state-00000002/{file}" in said and "the state before it" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("harm", [truncate, os.unlink])
@pytest.mark.parametrize("file", FILES[:2])
def test_a_file_that_was_cut_or_is_gone_is_named(tmp_path, capsys, file, harm):
    stage = Stage(tmp_path)
    for step in (1, 2):
        stage.save(step)
    harm(tmp_path / "teacher-state-00000002" / file)
    assert newest_state(tmp_path, "teacher")[1]["step"] == 1
    assert f"teacher-state-00000002/{file}" in capsys.readouterr().err


def test_code_in_a_strangers_state_is_not_run(tmp_path, capsys):
    """Its checksums are right: whoever made it has made those, too."""
    Stage(tmp_path / "run").save(1)
    state, mark = tmp_path / "run" / "teacher-state-00000001", tmp_path / "mark"
    (state / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    facts = read(state / "state.pt")
    facts["files"][".metadata"] = sha256(state / ".metadata")
    save(facts, state / "state.pt")
    with pytest.raises(RunError, match=r"no state of the teacher can be read"):
        newest_state(tmp_path / "run", "teacher")
    assert ".metadata: can't be read" in capsys.readouterr().err
    assert not mark.exists()
    pickle.loads((state / ".metadata").read_bytes())  # it is live
    assert mark.exists()


@pytest.mark.parametrize(("damage", "stage"), [(truncate, "teacher"), (flip, "distillation")])
def test_a_run_goes_on_from_the_state_before_a_damaged_one(
    launch, train_and_show, whole, monkeypatch, capsys, damage, stage
):
    flags = "--save-every 1"
    out = cut(launch, train_and_show, monkeypatch, stage, 5, flags)
    older, newer = sorted(out.glob("*state*"))
    damage(newer / "__0_0.distcp")
    capsys.readouterr()
    assert launch("cut", f"{FEW} {flags} --stage {stage}") == 0
    said = capsys.readouterr()
    assert newer.name in said.err and older.name not in said.err
    assert f"{stage}: going on from update 4 of 6" in said.out
    name = dict(teacher="teacher.pt", distillation="student.pt")[stage]
    assert same(out / name, whole / name)
    assert updates(out) == [r for r in updates(whole) if stage in (r["stage"], "distillation")]


def test_with_all_states_damaged_nothing_is_touched(launch, train, monkeypatch, capsys):
    """Status 1; both are named, with what to do."""
    out = cut(launch, train, monkeypatch, "teacher", 5, "--save-every 1")
    older, newer = sorted(out.glob("*state*"))
    truncate(older / "state.pt")
    flip(newer / ".metadata")
    before = snapshot(out)
    capsys.readouterr()
    assert launch("cut", FEW) == 1
    message = capsys.readouterr().err
    assert older.name in message and newer.name in message and "delete" in message
    after = snapshot(out)
    assert before.pop("log.jsonl")[0].splitlines() == after.pop("log.jsonl")[0].splitlines()[:-1]
    assert after == before


# ---------------------------------------------------------------------------------------------
# Cut runs
# ---------------------------------------------------------------------------------------------


def cut(launch, train, monkeypatch, stage, update, flags):
    """A run that ends after so many updates of a stage; -> its folder."""
    out = train("cut", flags, MAKING[: MAKING.index(stage)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, stage, update)
        launch("cut", f"{FEW} {flags} --stage {stage}")
    return out


@pytest.mark.parametrize("stage", ["teacher", "distillation"])
@pytest.mark.parametrize(
    ("every", "update"),
    [(1, 4), (3, 5), (5, 2)],
    ids=["at a state", "between states", "before the first state"],
)
def test_a_cut_run_goes_on_as_if_nothing_had_happened(
    launch, train_and_show, whole, monkeypatch, capsys, stage, every, update
):
    """Weights, averages, optimisers, data and noise go on: the end is the same bit for bit."""
    flags = f"--save-every {every}"
    out = cut(launch, train_and_show, monkeypatch, stage, update, flags)
    assert not (out / ("teacher.pt" if stage == "teacher" else "student.pt")).exists()
    capsys.readouterr()
    train_and_show("cut", flags)
    state = update // every * every
    assert (f"going on from update {state} of 6" in capsys.readouterr().out) == (state > 0)
    for kind in ("teacher", "student"):
        assert same(out / f"{kind}.pt", whole / f"{kind}.pt")
    assert updates(out) == updates(whole)
    assert not list(out.glob("*state*"))


@pytest.mark.parametrize("stage", ["teacher", "distillation"])
@pytest.mark.parametrize(("log", "every", "state"), [(2, 1, 4), (2, 3, 4), (4, 1, 4), (3, 5, 0)])
def test_a_state_is_saved_on_the_log_line_after_it_is_due(
    launch, train, monkeypatch, capsys, stage, log, every, state
):
    """Then nothing is added up for the log, and its rows, too, are those of an uncut run."""
    flags = f"--save-every {every} --log-every {log}"
    want = train("want", flags)
    out = cut(launch, train, monkeypatch, stage, 5, flags)
    assert max([int(p.name[-8:]) for p in out.glob("*-state-*")], default=0) == state
    capsys.readouterr()
    train("cut", flags)
    assert (f"going on from update {state} of 6" in capsys.readouterr().out) == (state > 0)
    assert updates(out) == updates(want)
    assert all(same(out / f"{kind}.pt", want / f"{kind}.pt") for kind in ("teacher", "student"))


def test_a_run_cut_in_the_synthesis_makes_only_the_missing_samples(
    launch, train, whole, monkeypatch
):
    """Files of 3, 3 and 1: the first stays as it is, and all together are the whole set."""
    monkeypatch.setattr(ladd, "FILE", 3)
    out, write = train("cut", stages=["teacher"]), lib.samples.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(value, path):
            if path.name == "00001.pt":
                raise KeyboardInterrupt
            write(value, path)

        patch.setattr(lib.samples, "save", interrupted)
        launch("cut", f"{FEW} --stage synthesis")
    first = snapshot(out / "synthetic")
    assert list(first) == ["00000.pt"]
    train("cut", stages=["synthesis"])
    assert snapshot(out / "synthetic")["00000.pt"] == first["00000.pt"]
    files = [torch.load(p, weights_only=True) for p in sorted((out / "synthetic").iterdir())]
    (want,) = (torch.load(p, weights_only=True) for p in (whole / "synthetic").iterdir())
    assert [len(file["x0"]) for file in files] == [3, 3, 1]
    assert [c for file in files for c in file["captions"]] == want["captions"]
    made = torch.cat([file["x0"] for file in files])
    torch.testing.assert_close(made, want["x0"], rtol=1e-2, atol=1e-2)  # kept in half precision


@pytest.mark.parametrize("name", ["synthetic/00000.pt", "teacher.pt"])
def test_what_is_made_again_costs_a_cut_distillation_nothing(
    launch, train_and_show, whole, monkeypatch, capsys, name
):
    """The advice for a damaged file: delete it and give the command again. It is the same bits."""
    out = cut(launch, train_and_show, monkeypatch, "distillation", 5, "--save-every 1")
    (out / name).unlink()
    for stage in MAKING:
        assert launch("cut", f"{FEW} --stage {stage}") == 0
    assert "distillation: going on from update" in capsys.readouterr().out
    assert same(out / "student.pt", whole / "student.pt") and not states_of(out)


# ---------------------------------------------------------------------------------------------
# Full disks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_no_work_is_lost_when_the_final_checkpoint_cannot_be_written(
    launch, train, whole, monkeypatch, capsys, kind
):
    """A full disk at the very end: the last state must still be there to go on from."""
    stage = "teacher" if kind == "teacher" else "distillation"
    out, write = train("cut", "--save-every 5", MAKING[: MAKING.index(stage)]), lib.run.save
    with monkeypatch.context() as patch:

        def full(value, path):
            if path.name == f"{kind}.pt":
                raise OSError("No space left on device")
            write(value, path)

        patch.setattr(lib.run, "save", full)
        assert launch("cut", f"{FEW} --save-every 5 --stage {stage}") == 1
    assert "No space left" in capsys.readouterr().err
    train("cut", "--save-every 5", [stage])
    assert "going on from update 5 of 6" in capsys.readouterr().out
    assert same(out / f"{kind}.pt", whole / f"{kind}.pt")


@pytest.mark.parametrize("limit", [3_000, 40_000])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(launch, whole, capsys, limit):
    """Files end at so many bytes, by the system: a checkpoint does not fit, or no state does."""
    flags = f"{FEW} --save-every 2 --sample-every 2 --stage teacher"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = launch("run", flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert status == 1 and message.count("\n") == 1
    assert "File too large" in message
    assert any(f"run/{file}" in message for file in ("teacher", "samples", "curves.png"))
    assert not [p for p in Path("run").rglob("*") if p.suffix in (".pt", ".tmp")]
    assert launch("run", flags) == 0
    assert same("run/teacher.pt", whole / "teacher.pt")
    assert not list(Path("run").glob("*-state-*"))


FULL = """
set -e
mount -t tmpfs -o size={size}k none {disk}
head -c {filler}k /dev/zero > {disk}/filler
cd {disk}
{command} --stage teacher && exit 3 || echo "status $?"
find run -name '*.pt' -o -name '*.tmp'
rm filler
{command} --stage teacher
cp run/teacher.pt {kept}
"""


def test_a_disk_that_is_really_full_costs_nothing_once_there_is_room(killed, tmp_path):
    """A small tmpfs: status 1, the file named, nothing half written; then the same command."""
    (tmp_path / "disk").mkdir()
    command = shlex.join([sys.executable, str(ROOT / "ladd.py"), *ALL.split(), "--out", "run"])
    names = dict(disk=tmp_path / "disk", kept=tmp_path / "teacher.pt", command=command)
    script = FULL.format(size=8000, filler=7980, **names)
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root may mount")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "status 1" and ".pt\n" not in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 1 and "No space left on device" in said[0] and "run/" in said[0]
    assert same(tmp_path / "teacher.pt", killed[0] / "whole" / "teacher.pt")


# ---------------------------------------------------------------------------------------------
# Killed processes
# ---------------------------------------------------------------------------------------------

ALL = FEW + " --save-every 2 --sample-every 2 --log-every 2 --evaluation 16 --judge-steps 5"

DRIVER = '''
"""Runs ladd.py in children that kill themselves. Arguments: flags, plan of (stage, kind, nth)."""

import builtins, contextlib, json, os, signal, sys
import ladd, lib.files, lib.log, lib.scores, sample
from tools import report
import torch._dynamo  # which every child would import for its optimisers
from torch.distributed.checkpoint.filesystem import FileSystem

flags, plan = sys.argv[1].split(), json.loads(sys.argv[2])
ladd.FILE = 3
now = {"stage": "", "counts": {}}


def moment(kind, before=lambda: None):
    """Dies if this is the moment of the plan, or if its stage is over."""
    counts = now["counts"]
    key = (now["stage"], kind)
    counts[key] = counts.get(key, 0) + 1
    over = now["stage"] and ladd.STAGES.index(now["stage"]) > ladd.STAGES.index(target[0])
    if over or (key == (target[0], target[1]) and counts[key] > target[2]):
        before()
        with builtins.open("kills", "a") as file:
            file.write(f"{now['stage']} {kind}\\n")
        os.kill(os.getpid(), signal.SIGKILL)


class HalfFile:
    """A file that is written in two halves."""

    def __init__(self, *arguments, **options):
        self.file = builtins.open(*arguments, **options)

    def write(self, content):
        half = len(content) // 2
        self.file.write(content[:half])
        moment("half", self.file.flush)
        self.file.write(content[half:])
        return len(content)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *reason):
        return self.file.__exit__(*reason)

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def half_stream(self, path, mode):
    """The files of a state."""
    with HalfFile(path, mode) as stream:
        yield stream


def before(module, name, kind):
    function = getattr(module, name)

    def wrapped(*arguments, **options):
        moment(kind)
        return function(*arguments, **options)

    setattr(module, name, wrapped)


def enter(module, name, stage):
    function = getattr(module, name)

    def wrapped(run):
        now["stage"] = stage
        function(run)

    setattr(module, name, wrapped)


def child(target_, words):
    global target
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    target = target_
    if target:
        works = (ladd, "step_all"), (sample.Generator, "sample"), (lib.scores, "score")
        for module, name in works:
            before(module, name, "work")
        before(os, "replace", "rename")
        before(os, "unlink", "unlink")
        lib.files.open = lib.log.open = HalfFile  # shadows the builtin there
        FileSystem.create_stream = half_stream
        for name, stage in zip(("train_teacher", "synthesise", "distil"), ladd.STAGES):
            enter(ladd, name, stage)
        enter(report, "report", "report")
    os._exit(ladd.main(words, distil=ladd.distil))


codes = [child(None, [*flags, "--out", "whole", "--data-dir", "data"])]
again = [*flags, "--out", "cut", "--data-dir", "cut-data"]
codes += [child(moment_, again) for moment_ in plan]
codes += [child(None, again)]


def twice(*arguments):
    for _ in "12":
        os.kill(os.getpid(), signal.SIGINT)


ladd.step_all = twice
codes += [child(None, [*flags, "--out", "twice", "--data-dir", "data"])]
print(json.dumps(codes))
'''


def make_killed(folder):
    """The run `whole` and the run `cut`, killed 12 times; codes.json: all exit statuses."""
    rng, plan = random.Random(7), []
    for stage in ladd.STAGES:  # the first late enough that a state is there to go on from
        most = dict(teacher=(4, 8), distillation=(9, 13)).get(stage, (0, 2))
        plan += [(stage, kind, rng.randrange(*most)) for kind in ("work", "half")]
        plan += [(stage, rng.choice(["rename", "half", "work"]), rng.randrange(2))]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    answer = subprocess.run(
        [sys.executable, "-c", DRIVER, ALL, json.dumps(plan)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    (folder / "said").write_text(answer.stdout)
    (folder / "codes.json").write_text(answer.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def killed(beside):
    """Its folder, and all exit statuses."""
    folder = beside(make_killed)
    return folder, json.loads((folder / "codes.json").read_text())


def test_a_run_killed_twelve_times_is_bit_for_bit_the_run_that_was_not(killed):
    """SIGKILL in every stage, half of them in the middle of a file: weights, samples, pictures,
    scores and rows of the log are the same, but for seconds and speeds."""
    folder, codes = killed
    assert codes[:14] == [0, *[-signal.SIGKILL] * 12, 0]
    kills = [line.split() for line in (folder / "kills").read_text().splitlines()]
    assert {stage for stage, _ in kills} == set(ladd.STAGES)
    assert [kind for _, kind in kills].count("half") >= 4
    for stage in ("teacher", "distillation"):
        assert f"{stage}: going on from update" in (folder / "said").read_text()
    whole, cut = folder / "whole", folder / "cut"
    files = set(snapshot(whole))
    assert set(snapshot(cut)) == files
    for name in files:
        if name.endswith(".png") or name.startswith("synthetic") or name == "config.json":
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    for kind in ("teacher", "student"):
        assert same(cut / f"{kind}.pt", whole / f"{kind}.pt")
    assert updates(cut) == updates(whole)
    first, second = (json.loads((out / "metrics.json").read_text()) for out in (whole, cut))
    for row in first["rows"] + second["rows"]:
        row.pop("seconds", None)
    assert first["rows"] == second["rows"]
    assert first["judge_accuracy"] == second["judge_accuracy"]
    assert first["verdicts"] == second["verdicts"]


def test_a_second_signal_ends_the_process_at_once(killed):
    assert killed[1][14] == -signal.SIGINT
