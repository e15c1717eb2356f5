"""Nothing lost, nothing misleading: cuts, damage, full disks, numbers that are not finite.

A process that dies is a real one: a driver forks runs and lets each send itself SIGKILL at its
moment, also in the middle of a file or of a line of the log. All the rest runs in this process.
"""

import itertools
import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ladd import FEW, cut_at, lines, same, snapshot, updates

import ladd
import sample

ROOT = Path(__file__).resolve().parent.parent
ALL = FEW + " --save-every 2 --sample-every 2 --log-every 6 --evaluation 16 --judge-steps 5"

DRIVER = '''
"""Runs ladd.py in children that kill themselves. Arguments: flags, plan of (stage, kind, nth)."""

import builtins, json, os, signal, sys
import data, ladd, sample
import torch._dynamo  # which every child would import for its optimisers

flags, plan = sys.argv[1].split(), json.loads(sys.argv[2])
ladd.SHARD = 3
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

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *reason):
        return self.file.__exit__(*reason)

    def __getattr__(self, name):
        return getattr(self.file, name)


def before(module, name, kind):
    function = getattr(module, name)

    def wrapped(*arguments, **options):
        moment(kind)
        return function(*arguments, **options)

    setattr(module, name, wrapped)


def enter(name, stage):
    function = getattr(ladd, name)

    def wrapped(run):
        now["stage"] = stage
        function(run)

    setattr(ladd, name, wrapped)


def child(target_, words):
    global target
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    target = target_
    if target:
        for module, name in ((ladd, "update"), (sample.Generator, "sample"), (sample, "score")):
            before(module, name, "work")
        before(os, "replace", "rename")
        before(os, "unlink", "unlink")
        ladd.open = data.open = HalfFile  # shadows the builtin there
        names = ("train_teacher", "synthesise", "distil", "report")
        for name, stage in zip(names, ladd.STAGES):
            enter(name, stage)
    os._exit(ladd.main(words))


codes = [child(None, [*flags, "--out", "whole", "--data-dir", "data"])]
again = [*flags, "--out", "cut", "--data-dir", "cut-data"]
codes += [child(moment_, again) for moment_ in plan]
codes += [child(None, again)]


def twice(*arguments):
    for _ in "12":
        os.kill(os.getpid(), signal.SIGINT)


ladd.update = twice
codes += [child(None, [*flags, "--out", "twice", "--data-dir", "data"])]
print(json.dumps(codes))
'''


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that are killed: more threads add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the run `whole` and the run `cut`, killed 12 times; and all exit statuses."""
    folder, rng, plan = tmp_path_factory.mktemp("killed"), random.Random(7), []
    for stage in ladd.STAGES:  # the first late enough that a state is there to go on from
        most = (4, 8) if stage in ("teacher", "distillation") else (0, 2)
        plan += [(stage, kind, rng.randrange(*most)) for kind in ("work", "half")]
        plan += [(stage, rng.choice(["rename", "half", "work"]), rng.randrange(2))]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    answer = subprocess.run(
        [sys.executable, "-c", DRIVER, ALL, json.dumps(plan)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    (folder / "said").write_text(answer.stdout)
    return folder, json.loads(answer.stdout.splitlines()[-1])


@pytest.fixture
def launch(killed, tmp_path, monkeypatch):
    """launch(flags) -> exit status of a run into the folder `run`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(killed[0] / "data", "data")  # a judge, trained
    return lambda flags="": ladd.main(words(flags))


def words(flags=""):
    return f"{ALL} {flags} --out run --data-dir data".split()


@pytest.fixture
def whole(killed):
    """The same run, uncut."""
    return killed[0] / "whole"


def cut(launch, monkeypatch, stage="teacher", update=5, flags="--save-every 1"):
    """A run that ends after so many updates of a stage; -> its folder."""
    for before in ladd.STAGES[: ladd.STAGES.index(stage)]:
        assert launch(f"{flags} --stage {before}") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, stage, update)
        launch(f"{flags} --stage {stage}")
    return Path("run")


# cuts ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("teacher", signal.SIGINT),
        ("synthesis", signal.SIGTERM),
        ("distillation", signal.SIGTERM),
        ("report", signal.SIGINT),
    ],
)
def test_a_signal_ends_a_run_saved_with_the_command_to_go_on(
    launch, whole, monkeypatch, capsys, stage, number
):
    """Status 143 or 130. The update or shard in work is finished; the printed command does the
    rest, and the end is the same bit for bit. The caller's handlers are as they were."""
    monkeypatch.setattr(ladd, "SHARD", 3)
    handler = signal.getsignal(number)
    name = dict(teacher="teacher_loss", distillation="generator_loss", synthesis="save")
    name, calls = name.get(stage, "sample.evaluate"), itertools.count()
    module, name = (sample, "evaluate") if stage == "report" else (ladd, name)
    function = getattr(module, name)

    def interrupted(*arguments):
        running = next(x for x in ladd.STAGES if x not in done)
        if stage == "report" or (running == stage and next(calls) == 1):
            os.kill(os.getpid(), number)
        return function(*arguments)

    done = []
    for before in ladd.STAGES[: ladd.STAGES.index(stage)]:
        assert launch(f"--stage {before}") == 0
        done.append(before)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert launch() == 128 + number
    assert signal.getsignal(number) == handler
    made = dict(teacher="teacher-state-00000002.pt", distillation="distillation-state-00000003.pt")
    made |= dict(synthesis="synthetic/00001.pt", report="student.pt")
    assert (Path("run") / made[stage]).exists()
    assert not Path("run/synthetic/00002.pt").exists() or stage in ("distillation", "report")
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command == ["python", "ladd.py", *words()]
    for last in ladd.STAGES[len(done) : 3]:  # the report is the killed run's business
        assert launch(f"--stage {last}") == 0
    for kind in ("teacher", "student"):
        assert same(f"run/{kind}.pt", whole / f"{kind}.pt")
    assert updates(Path("run")) == updates(whole)


def test_a_run_stops_after_its_minutes_with_status_75(launch, whole, monkeypatch, capsys):
    """Saved like after a signal, to be started again until the status is another."""
    assert ladd.Watch(1e-9).due() == 75 and ladd.Watch(5).due() == ladd.Watch(0).due() == 0
    loss, watches = ladd.teacher_loss, []
    watch = ladd.Watch.__enter__
    monkeypatch.setattr(ladd.Watch, "__enter__", lambda w: watches.append(w) or watch(w))
    with monkeypatch.context() as patch:
        over = lambda *a: setattr(watches[-1], "end", 0) or loss(*a)  # noqa: E731
        patch.setattr(ladd, "teacher_loss", over)
        for update in (1, 2):
            assert launch("--stop-after 100 --stage teacher") == 75
            assert Path(f"run/teacher-state-{update:08d}.pt").exists()
    assert "--stop-after 100" in capsys.readouterr().err
    assert launch("--stage teacher") == 0
    assert same("run/teacher.pt", whole / "teacher.pt")


@pytest.mark.parametrize(("minutes", "states"), [("1e-9", [4, 5]), ("0", []), ("60", [])])
def test_states_are_also_saved_by_the_clock(launch, monkeypatch, minutes, states):
    """Every 10⁻⁹ minutes is every update; 0 is never. The last two are kept."""
    out = cut(launch, monkeypatch, flags=f"--save-every 99 --save-minutes {minutes}")
    assert [p.name for p in sorted(out.glob("*state*"))] == [
        f"teacher-state-{update:08d}.pt" for update in states
    ]


def test_a_run_folder_in_use_is_refused(launch, capsys):
    """Status 2, one line; the lock goes with the process that holds it."""
    with ladd.locked(Path("run")):
        assert launch() == 2
        message = capsys.readouterr().err
        assert "run: another process is at work" in message and message.count("\n") == 1
        assert snapshot(Path("run")) == {}
    assert launch("--stage teacher") == 0


# damage --------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "stage"), [(truncate, "teacher"), (flip, "distillation")])
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    launch, whole, monkeypatch, capsys, damage, stage
):
    out = cut(launch, monkeypatch, stage)
    older, newer = sorted(out.glob("*state*"))
    damage(newer)
    capsys.readouterr()
    assert launch(f"--save-every 1 --stage {stage}") == 0
    said = capsys.readouterr()
    assert newer.name in said.err and older.name not in said.err
    assert f"{stage}: going on from update 4 of 6" in said.out
    name = dict(teacher="teacher.pt", distillation="student.pt")[stage]
    assert same(out / name, whole / name)
    assert updates(out) == [r for r in updates(whole) if stage in (r["stage"], "distillation")]


def test_with_all_states_damaged_nothing_is_touched(launch, monkeypatch, capsys):
    """Status 1; both are named, with what to do."""
    out = cut(launch, monkeypatch)
    older, newer = sorted(out.glob("*state*"))
    truncate(older)
    flip(newer)
    before = snapshot(out)
    capsys.readouterr()
    assert launch() == 1
    message = capsys.readouterr().err
    assert older.name in message and newer.name in message and "delete" in message
    assert snapshot(out) == before


def test_any_flipped_byte_is_found(tmp_path):
    """In 300 places, the checksum's own among them: refused by name, or read as it was written."""
    path, rng = tmp_path / "state.pt", random.Random(0)
    sample.save(dict(a=torch.arange(500)), path)
    content, refused = path.read_bytes(), 0
    for at in [*rng.sample(range(len(content)), 200), *range(len(content) - 100, len(content))]:
        path.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
        try:
            assert torch.equal(sample.read(path)["a"], torch.arange(500))
        except sample.CheckpointError as error:
            assert "state.pt" in str(error)
            refused += 1
    assert refused >= 264 + 200 - 100 - 73  # all but the mark between content and checksum


@pytest.mark.parametrize("name", ["teacher.pt", "synthetic/00000.pt"])
def test_a_damaged_result_of_an_earlier_stage_is_named(launch, capsys, name):
    """Never trained on: the student's stage ends with one line."""
    for stage in ladd.STAGES[:2]:
        assert launch(f"--stage {stage}") == 0
    flip(Path("run") / name)
    capsys.readouterr()
    assert launch("--stage distillation") in (1, 2)
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(launch, whole, capsys, limit):
    """Files end at so many bytes, by the system: a checkpoint does not fit, or no state does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = launch("--stage teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert status == 1 and message.count("\n") == 1
    assert "File too large" in message and ("run/teacher" in message or "run/samples" in message)
    assert not [p for p in Path("run").rglob("*") if p.suffix in (".pt", ".tmp")]
    assert launch("--stage teacher") == 0
    assert same("run/teacher.pt", whole / "teacher.pt")


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


def test_a_disk_that_is_really_full_costs_nothing_once_there_is_room(whole, tmp_path):
    """A small tmpfs: status 1, the file named, nothing half written; then the same command."""
    (tmp_path / "disk").mkdir()
    command = shlex.join([sys.executable, str(ROOT / "ladd.py"), *ALL.split(), "--out", "run"])
    names = dict(disk=tmp_path / "disk", kept=tmp_path / "teacher.pt", command=command)
    script = FULL.format(size=2000, filler=1980, **names)
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root may mount")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "status 1" and ".pt\n" not in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 1 and "No space left on device: 'run/" in said[0]
    assert same(tmp_path / "teacher.pt", whole / "teacher.pt")


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    """What a loss of power leaves is the old file or the new one: synced, renamed, synced."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("name") or replace(*names))
    sample.save(dict(a=1), tmp_path / "state.pt")
    assert done == ["file", "name", "folder"]


def test_a_folder_that_cannot_be_made_is_one_line(capsys):
    assert ladd.main([*FEW.split(), "--out", "/proc/ladd"]) == 1
    message = capsys.readouterr().err
    assert "/proc/ladd" in message and message.count("\n") == 1


# honest runs ---------------------------------------------------------------------------------


def poison(monkeypatch, name, updates, value=math.nan):
    """The loss `name` is not finite in these of its calls, counted from 1."""
    function, calls = getattr(ladd, name), itertools.count(1)

    def poisoned(*arguments):
        loss = function(*arguments)
        bad = value if next(calls) in updates else 1.0
        return (loss[0] * bad, *loss[1:]) if isinstance(loss, tuple) else loss * bad

    monkeypatch.setattr(ladd, name, poisoned)


def equal(a, b):
    """Whether two nests of tensors and numbers are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("teacher", "teacher_loss", math.inf),
        ("distillation", "discriminator_loss", math.nan),
        ("distillation", "generator_loss", math.inf),
    ],
)
def test_an_update_that_is_not_finite_is_not_applied_but_counted(
    launch, monkeypatch, stage, name, value
):
    """The networks and their optimisers stay as they were; the log has its number and its names."""
    poison(monkeypatch, name, {3}, value)
    update = 4 if name == "generator_loss" else 3  # the student waits for one update of the heads
    out = cut(launch, monkeypatch, stage, update)
    before, after = (torch.load(p, weights_only=True) for p in sorted(out.glob("*state*")))
    assert after["step"] == update and after["skipped"] == 1 and before["skipped"] == 0
    frozen = dict(teacher=["model"], distillation=["student"])[stage]
    frozen += ["heads"] if name == "discriminator_loss" else []
    for network in frozen:
        assert equal(before["networks"][network], after["networks"][network])
    stepped = 1 if name == "generator_loss" else 0  # the heads', which had learned before
    for old, new in zip(before["optimizers"], after["optimizers"], strict=True):
        stepped -= not equal(old["state"], new["state"])
    assert stepped == 0
    (row,) = (row for row in lines(out) if "skipped" in row)
    assert (row["stage"], row["step"], row["skipped"]) == (stage, update, 1)
    assert {"loss", "loss_d", "loss_g"} & set(row["not_finite"])
    assert launch(f"--save-every 1 --stage {stage}") == 0
    weights = torch.load(out / f"{'teacher' if stage == 'teacher' else 'student'}.pt")["weights"]
    assert all(w.isfinite().all() for w in weights.values())


def test_after_five_bad_updates_the_run_stops_with_the_weights_before_them(
    launch, monkeypatch, capsys
):
    """Saved, with what to try; the same command goes on with the next batches."""
    with monkeypatch.context() as patch:
        poison(patch, "teacher_loss", set(range(2, 7)))
        assert launch("--save-every 1 --teacher-iterations 8 --stage teacher") == 1
    message = capsys.readouterr().err
    assert "update 6 and the 4 before" in message and "--teacher-lr" in message
    before, after = (torch.load(p, weights_only=True) for p in sorted(Path("run").glob("*state*")))
    assert (before["step"], after["step"]) == (5, 6)
    assert equal(before["networks"]["model"], after["networks"]["model"])
    assert launch("--save-every 1 --teacher-iterations 8 --stage teacher") == 0
    assert [r["step"] for r in lines(Path("run")) if "skipped" in r] == [2, 3, 4, 5, 6]


def rows(n, **changes):
    """A healthy distillation's rows; the changes hold in those from `start` to `stop`."""
    start, stop = changes.pop("start", 0), changes.pop("stop", n)
    healthy = dict(loss_d=1.87, ranked=0.63, loss_g=0.1, grad_norm=12.0, diversity=1.0)
    return [
        dict(step=20 * (i + 1), **(healthy | changes if start <= i < stop else healthy))
        for i in range(n)
    ]


SICK = [dict(loss_d=2.0, ranked=0.5), dict(loss_d=0.1), dict(grad_norm=0.1), dict(diversity=0.6)]


@pytest.mark.parametrize("sign", SICK)
def test_a_sign_is_suspicious_for_a_tenth_of_a_stage_and_a_failure_for_half(sign):
    """Of 100 rows: 9 in a row are nothing, 10 are suspicious, 50 a failure; the figure is told."""
    for length, want in ((9, []), (10, ["suspicious"]), (49, ["suspicious"]), (50, ["failed"])):
        found = ladd.health("distillation", rows(100, start=30, stop=30 + length, **sign))
        assert [verdict for verdict, _, _ in found] == want
        for _, _, figure in found:
            number, value = next(iter(sign.items()))
            assert figure == f"{number} {value:.3g}, updates 620 to {620 + 20 * (length - 1)}"
    assert ladd.health("distillation", rows(100)) == []


def test_a_teacher_that_does_not_learn_has_failed():
    told = [dict(step=i, loss=1.0 - 0.8 * (i > 4)) for i in range(1, 60)]
    assert ladd.health("teacher", told) == []
    ((verdict, _, _),) = ladd.health("teacher", [dict(row, loss=1.0) for row in told])
    assert verdict == "failed"


def test_skipped_updates_are_part_of_the_verdict():
    """Any is suspicious, more than a tenth a failure."""
    for n, want in ((1, "suspicious"), (200, "suspicious"), (201, "failed")):
        skipped = [dict(step=i, skipped=i) for i in range(1, n + 1)]
        ((verdict, _, figure),) = ladd.health("distillation", skipped + rows(100))
        assert verdict == want and f"{n} of 2000" in figure


def test_a_bad_sign_is_one_warning_that_names_the_readmes_section(launch, monkeypatch, capsys):
    """Said once, in the run; and it is the verdict of report.md."""
    monkeypatch.setattr(ladd, "diversity", lambda fake, real: torch.tensor(0.25))
    assert launch("--iterations 11 --log-every 1") == 0
    message, report = capsys.readouterr().err, Path("run/report.md").read_text()
    assert message.count("diversity 0.25") == 1
    section = message[message.index("README: ") + 8 :].splitlines()[0]
    assert f"## {section}\n" in (ROOT / "README.md").read_text("utf-8")
    assert "- distillation: failed: the student's samples are alike (diversity 0.25" in report


def test_the_report_has_a_verdict_on_every_stage(whole):
    report = (whole / "report.md").read_text()
    assert all(f"\n- {stage}: " in report for stage in ladd.STAGES)
    assert "- teacher: not judged: 1 row" in report and "- synthesis: healthy" in report


COLLAPSES = {  # of 32 fakes, 8 captions four times each -> the diversity that is told
    "none": (lambda x: x, 0.85, 1.15),
    "all alike": (lambda x: x[:1].expand_as(x), 0, 0.01),
    "half of them alike": (lambda x: torch.cat([x[:1].expand_as(x)[:16], x[16:]]), 0.4, 0.7),
    "every caption alike": (lambda x: x[::4].repeat_interleave(4, 0), 0, 0.01),
    "every caption nearly alike": (
        lambda x: x[::4].repeat_interleave(4, 0) + 0.05 * x.roll(1, 0), 0.01, 0.2),
    "in pairs": (lambda x: x[::2].repeat_interleave(2, 0), 0, 0.01),
    "half the spread": (lambda x: x / 2, 0.4, 0.6),
}  # fmt: skip


def samples(seed, captions=8):
    """32 things: what those of a caption have in common, and what each has of its own."""
    common = torch.randn(captions, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return common.repeat_interleave(32 // captions, 0) + 0.5 * own


@pytest.mark.parametrize("case", COLLAPSES)
def test_diversity_is_one_in_health_and_falls_with_every_collapse(case):
    collapse, low, high = COLLAPSES[case]
    fake, real = (samples(seed).flatten(2) for seed in (1, 2))
    assert low <= ladd.diversity(collapse(fake), real).item() <= high


def test_a_batch_of_one_says_nothing_of_diversity():
    assert ladd.diversity(samples(0)[:1], samples(1)[:1]) == 1


@pytest.mark.parametrize("case", COLLAPSES)
def test_the_probe_sees_a_collapse_of_a_run_in_the_teachers_features(launch, monkeypatch, case):
    """Its captions come again, which those of a batch need not; equal images count once; no
    randomness is used up. The fakes are put in the student's place."""
    collapse, low, high = COLLAPSES[case]
    assert launch("--stage teacher") == 0
    run = ladd.Run(ladd.parse(words())[0])
    teacher, order, asked = run.load("teacher"), torch.randperm(32), []

    def batch(step):
        """Every fourth batch has the captions that repeat; the fifth is the first once more."""
        repeated = [f"caption {k}" for k in range(16) for _ in range(2)]
        captions = [f"another {step} {i}" for i in range(32)] if step % 4 else repeated
        x0 = samples(100 if step == 4 else 100 + step, 16)[order]
        return x0, run.text([captions[i] for i in order]), None

    def predict(student, x0, text, t, noise):
        asked.append((x0, text[1], t))
        pick = text[1].unique(dim=0, return_inverse=True)[1].argsort(stable=True)
        fakes = torch.empty_like(x0)
        fakes[pick] = collapse((x0 + 0.5 * noise)[pick])
        return fakes

    monkeypatch.setattr(ladd, "student_predict", predict)
    before = torch.get_rng_state()
    probe = ladd.diversity_probe(run, teacher, batch)
    values = [probe(None).item() for _ in "12"]
    assert torch.equal(torch.get_rng_state(), before) and values[0] == values[1]
    x0, pooled, t = asked[0]
    counts = pooled.unique(dim=0, return_counts=True)[1]
    assert counts.tolist() == [4] * 8 and len(x0.flatten(1).unique(dim=0)) == 32
    assert set(t.tolist()) == {run.settings.levels[0]}
    assert low - 0.1 <= values[0] <= high + (0.3 if high > 0.01 else 0)


def test_a_report_of_other_checkpoints_is_refused(whole, launch, capsys):
    """A student that was put there later has not been scored."""
    shutil.copytree(whole, "run")
    assert launch() == 0
    shutil.copy("run/teacher.pt", "run/student.pt")
    assert launch() == 2
    message = capsys.readouterr().err
    assert "metrics.json: not made from" in message and message.count("\n") == 1


def test_deterministic_kernels_are_asked_for_during_the_run_alone(launch, whole, monkeypatch):
    """On a CPU they are the same bits as ever."""
    loss, asked = ladd.teacher_loss, set()

    def look(*arguments):
        asked.add(torch.are_deterministic_algorithms_enabled())
        return loss(*arguments)

    monkeypatch.setattr(ladd, "teacher_loss", look)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which would outlive the run
    assert launch("--deterministic --stage teacher") == 0
    assert asked == {True} and not torch.are_deterministic_algorithms_enabled()
    assert same("run/teacher.pt", whole / "teacher.pt")
