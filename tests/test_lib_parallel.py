"""Many processes: what runs on one runs on N, whole or divided, with the same results."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lines, updates

import ladd
from lib.errors import UsageError
from lib.loop import Watch
from lib.parallel import average, barrier, broadcast, check_rank, gather, leave, my_share
from tools import report

ROOT = Path(ladd.__file__).parent
HANGS = 3600  # seconds: not how long it may take, but when it has stopped for good

RUN = "--size 8 --width 16 --depth 2 --attention-heads 2 --text-dim 8 --text-length 9"
RUN += " --pos-size 6 --taps 0,1 --head-width 8 --teacher-batch 8 --batch 8"
RUN += " --teacher-iterations 10 --iterations 10 --heads-warmup 2"
RUN += " --synthetic 22 --synthetic-steps 2 --teacher-steps 2"
RUN += " --precision fp32 --device cpu --log-every 1 --aspects 1:1,2:1 --muon-lr 0"
RUN += " --evaluation 8 --judge-steps 2 --judge-width 8"
DIVIDED, HYBRID = "--shard --checkpointing", "--shard --replicas 2"
PARTS = "--accumulate 2 --shard --offload --log-every 3 --save-every 4"
SHORT = "--teacher-iterations 2 --iterations 2 --heads-warmup 0 --aspects 1:1 --shard"

# Command lines by one process of many; what stands before a `|` happens in the last, at an update.
WORK = """
import json, os, resource, sys
import torch
import ladd
from lib import loop, parallel, states
from tools import report, train

report.report = lambda run: None
train.check_compiler = lambda device: None  # nothing is compiled here
checkpoint, compiled = loop.Loop.checkpoint, torch.nn.Module.compile
torch.nn.Module.compile = lambda module: compiled(module, backend="eager")  # traced, in seconds

def work(commands, ports):
    for i, words in enumerate(commands):
        event, _, words = words.rpartition("|")
        asynchronous = "--shard" in words and parallel.world() == 2

        def after_update(own):
            what, step = event.split() if event else ("", "0")
            own.saver.beside_training = asynchronous  # as on a GPU
            if parallel.rank() == parallel.world() - 1 and own.step + 1 == int(step):
                if what == "stop":
                    own.run.watch.status = 75
                if what == "fail":
                    raise OSError("no such luck")
                if what == "full":  # no file can grow beyond this
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
                if what == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), 9)
            checkpoint(own)

        loop.Loop.checkpoint = after_update
        if ports:
            os.environ["MASTER_PORT"] = ports[i]
        status = ladd.main(words.split())
        if status not in (0, 75):
            sys.exit(status)

commands, *ports = json.loads(sys.argv[1])
"""

# Processes begin as forks of one that has imported what takes long.
FORK = """
import traceback
import torch._dynamo
import torch.distributed.checkpoint
if "--shard" in sys.argv[1]:
    import torch.distributed.fsdp

children, n = [], int(os.environ["WORLD_SIZE"])
for rank in range(n):
    if child := os.fork():
        children.append(child)
        continue
    os.environ["RANK"], status = str(rank), 0
    os.dup2(os.open(f"{sys.argv[2]}/{rank}", os.O_CREAT | os.O_WRONLY), 2)
    try:
        work(commands, ports)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def free_ports(n):
    """Below those that a system gives to whoever asks for any (32768 on Linux): gloo asks for many
    while these wait for their turn, and where a port is taken the other process waits for ever."""
    sockets = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 500):
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", port)))
        if len(sockets) == n:
            break
    ports = [f"{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(n, commands, folder, work=WORK):
    """ladd.py with each of the command lines, by n processes. -> [exit status], [standard error],
    which the folder has, too: see `ended`."""
    folder.mkdir()
    task = json.dumps([commands, *free_ports(len(commands))])
    env = os.environ | dict(WORLD_SIZE=f"{n}", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    env |= dict(PYTHONPATH=str(ROOT))
    words = [sys.executable, "-c", work + FORK, task, str(folder)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    (folder / "status.json").write_text(done.stdout.splitlines()[-1])
    return ended(folder)


def ended(folder):
    """How processes ended that wrote into this folder. -> [exit status], [standard error]"""
    status = json.loads((folder / "status.json").read_text())
    return status, [(folder / f"{rank}").read_text() for rank in range(len(status))]


def alone(command, status=0, step=None):
    """The same in this process; cut by a request to stop after an update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report", lambda run: None)
        if step is not None:
            patch.setattr(Watch, "due", lambda self: 75 if self.patient else 0)
            patch.setattr(Watch, "check", lambda self: None)
            command += f" --log-every {step}"
        assert ladd.main(command.split()) == status


def taught(source, out):
    """A run folder that has all but the distillation of another."""
    shutil.copytree(source, out)
    for name in ("student.pt", "heads.pt"):
        (out / name).unlink()
    return out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAILURES = dict(
    failed=("fail 3", ""), full=("full 6", "--shard --save-every 4"), damaged=("", "--shard")
)


def make_runs(root):
    """Run folders: "one" by one process, others by more; "4-2-1", "1-4-2": cut and gone on with
    by other numbers of processes; "state": cut; "failed", "full", "damaged", "dead": see Failures,
    each with a folder "errors-…" that says how it ended."""

    def command(out, more=""):
        return f"{RUN} --out {root / out} {more}"

    def cut(step, out, more=""):
        return f"stop {step}|{command(out, more)}"

    def by(n, name, *commands):
        status, errors = launch(n, commands, root / f"errors-{name}")
        assert status == [0] * n, errors
        assert not any(errors[1:]), errors

    alone(command("one"))
    for name in ("4-2-1", "1-4-2", "dead", "state", "failed"):
        taught(root / "one", root / name)
    alone(command("1-4-2"), status=75, step=1)
    resumed = [cut(3, "4-2-1", HYBRID), cut(5, "1-4-2", "--shard")]
    by(4, "4", command("four"), command("four-hybrid", HYBRID), *resumed)

    resumed = [cut(7, "4-2-1", "--shard"), command("1-4-2")]
    cuts = [cut(3, "two-cut", "--stage teacher"), command("two-cut", "--stage teacher")]
    cuts += [command("two-cut", "--stage synthesis"), cut(5, "two-cut"), command("two-cut")]
    divided = [f"{PARTS} --stage {stage}" for stage in ("teacher", "synthesis", "distillation")]
    cuts += [cut(7, "two-parts", divided[0]), *(command("two-parts", d) for d in divided[:2])]
    cuts += [cut(5, "two-parts", divided[2]), command("two-parts", divided[2])]
    cuts += [cut(5, "state", "--shard --stage distillation")]
    commands = [command("two"), command("two-divided", DIVIDED)]
    commands += [command("short", SHORT), command("compiled", f"{SHORT} --compile yes")]
    by(2, "2", *commands, *cuts, command("two-parts-whole", PARTS), *resumed)

    part = root / "4-2-1" / "distillation-state-00000007" / "__1_0.distcp"
    flip(part)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        alone(command("4-2-1"))
    assert str(part) in said.getvalue()  # named, and the state before it is used

    for name in ("full", "damaged"):
        taught(root / "two-divided", root / name)
    flip(root / "damaged" / "teacher.pt")
    for name, (event, more) in FAILURES.items():
        launch(2, [f"{event}|{command(name, more)}"], root / f"errors-{name}")
    (root / "errors-dead").mkdir()
    under_torchrun(f"die 6|{command('dead')} --save-every 4", root / "errors-dead")


def under_torchrun(command, folder):
    """By two processes that torchrun starts, and starts again once where one is lost; writes what
    it said, and its exit status, into a folder."""
    (folder / "worker.py").write_text(WORK + "work(commands, ports)\nparallel.leave(0)")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--max-restarts", "1", "--master-port", *free_ports(1)]
    words += [str(folder / "worker.py"), json.dumps([[command]])]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=HANGS)
    (folder / "out").write_text(done.stdout)
    (folder / "0").write_text(done.stderr)
    (folder / "status.json").write_text(json.dumps([done.returncode]))


@pytest.fixture(scope="module")
def runs(beside):
    return beside(make_runs)


MANY = ("two", "two-divided", "two-parts", "four", "four-hybrid", "4-2-1", "1-4-2")


def worst(a, b, name, key):
    a, b = (torch.load(run / name, weights_only=True)[key] for run in (a, b))
    pairs = [(a[k], b[k]) for k in a] if key == "weights" else [(a, b)]
    return max((x.float() - y.float()).abs().max().item() for x, y in pairs)


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_weights_are_those_of_one_process(runs, name):
    """After 10 updates of each stage, also where it was cut and went on with other processes."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / "one", runs / name, file, "weights") < 1e-5


def test_compiled_blocks_give_the_weights_of_plain_ones(runs):
    """Divided in two; traced, and run by PyTorch as it stands."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / "short", runs / "compiled", file, "weights") < 1e-5


@pytest.mark.parametrize("name", [n for n in MANY if n != "two-parts"])
def test_losses_are_those_of_one_process(runs, name):
    """(Of parts there are fewer lines.)"""
    one, many = updates(runs / "one"), updates(runs / name)
    assert [(r["stage"], r["step"]) for r in many] == [(r["stage"], r["step"]) for r in one]
    for a, b in zip(one, many, strict=True):
        for key in {"loss", "loss_d", "loss_g", "grad_norm", "d_real"} & a.keys():
            assert abs(a[key] - b[key]) < 1e-5
        # under the same noise the logits of one of the 8 pairs can be as near as rounding
        assert abs(a.get("ranked", 0) - b.get("ranked", 0)) <= 1 / 8


@pytest.mark.parametrize(("cut", "whole"), [("two-cut", "two"), ("two-parts", "two-parts-whole")])
def test_as_many_processes_go_on_bit_for_bit(runs, cut, whole):
    """Both stages cut and gone on with by two processes: whole networks, and divided ones whose
    states are written while the training goes on, in parts, waiting in CPU memory."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / whole, runs / cut, file, "weights") == 0
    assert updates(runs / cut) == updates(runs / whole)


def test_a_state_is_written_by_all_processes_each_its_part(runs):
    """Neither has nearly all of divided networks; that it goes on with others, see `runs`."""
    state = runs / "state" / "distillation-state-00000005"
    names = {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"}
    assert {path.name for path in state.iterdir()} == names
    sizes = [(state / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 0.75 * sum(sizes)
    assert set(torch.load(state / "state.pt", weights_only=True)["files"]) == names - {"state.pt"}


@pytest.mark.parametrize("name", MANY[:5])
def test_synthesis_leaves_no_gaps_and_makes_nothing_twice(runs, name):
    files = [sorted((runs / run / "synthetic").iterdir()) for run in ("one", name)]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    index = [i for path in files[1] for i in torch.load(path, weights_only=True)["index"]]
    assert index == list(range(22))
    for path in files[0]:
        assert worst(runs / "one", runs / name, f"synthetic/{path.name}", "x0") < 1e-3  # float16


def test_a_cut_of_divided_networks_leaves_nothing_behind(runs):
    for name in (*MANY[-2:], "two-cut", "two-parts"):
        assert not list((runs / name).glob("*state*"))


def test_only_rank_0_logs(runs):
    """One first row, and one row an update."""
    for name in ("two", "four"):
        assert len([row for row in lines(runs / name) if "settings" in row]) == 1


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


def test_the_process_that_fails_tells_why_once_and_all_end(runs):
    """One line by the process that it happened to; every status but 0."""
    status, errors = ended(runs / "errors-failed")
    assert status == [1, 1] and errors == ["", "ladd.py: no such luck\n"]


def test_a_full_disk_ends_all_and_leaves_the_state_before(runs, tmp_path):
    """Of divided networks: the second state can't be written by one process. One line that names
    its folder; the first state is whole, and the run goes on from it."""
    status, errors = ended(runs / "errors-full")
    assert status == [1, 1]
    (line,) = [e for e in errors if e]
    state = runs / "full" / "distillation-state-00000008"
    assert line.startswith(f"ladd.py: {state}: the state can't be written")
    assert line.count("\n") == 1
    run = shutil.copytree(runs / "full", tmp_path / "run")
    assert [p.parent.name for p in run.glob("*/state.pt")] == ["distillation-state-00000004"]
    alone(f"{RUN} --shard --save-every 4 --out {run}")
    assert worst(runs / "one", run, "student.pt", "weights") < 1e-5
    assert not list(run.glob("*state*"))


def test_a_killed_process_ends_the_run_and_torchrun_goes_on_from_the_last_state(runs):
    """Killed after update 6 of 10, states every 4: the result is that of one process."""
    status, errors = ended(runs / "errors-dead")
    assert status == [0], errors
    out = (runs / "errors-dead" / "out").read_text()
    assert "distillation: going on from update 4 of 10" in out
    assert worst(runs / "one", runs / "dead", "student.pt", "weights") < 1e-5


def test_a_damaged_teacher_is_not_trained_on(runs):
    """Divided networks read it memory-mapped; its checksum is looked at all the same."""
    status, errors = ended(runs / "errors-damaged")
    assert 0 not in status
    assert any("teacher.pt" in e and "checksum" in e and e.count("\n") == 1 for e in errors), errors


def test_under_torchrun_a_run_that_was_asked_to_stop_has_not_failed(monkeypatch):
    """What --stop-after ends has status 75, which torchrun would take for a failure."""
    for variable, status in (("", 75), ("TORCHELASTIC_RUN_ID", 0)):
        if variable:
            monkeypatch.setenv(variable, "1")
        with pytest.raises(SystemExit) as end:
            leave(75)
        assert end.value.code == status


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--batch 8", "ladd.py: --batch 8: its images can't be divided equally among 3 processes"),
        ("--batch 9 --teacher-batch 8", "ladd.py: --teacher-batch 8: its images can't be"),
        ("--batch 9 --teacher-batch 9 --synthetic 2", "--synthetic 2: fewer than the 3 processes"),
        ("--batch 9 --teacher-batch 9 --replicas 2", "--replicas 2: must divide the 3 processes"),
        ("--batch 9 --teacher-batch 9 --shard", "--muon-lr 0.02: Muon needs whole matrices"),
    ],
)
def test_what_can_not_be_divided_is_refused_by_all_and_told_by_one(
    words, line, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", f"{rank}")
        status = ladd.main([*words.split(), "--out", str(tmp_path / "run")])
        told = capsys.readouterr().err
        assert status == 2 and (line in told and told.count("\n") == 1) == (rank == 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--accumulate 2", "--accumulate 2: is for LADD alone"),
        ("--shard", "--shard True: is for LADD alone"),
    ],
)
def test_what_other_methods_do_not_know_is_refused(words, line, tmp_path, capsys):
    out = tmp_path / "run"
    assert ladd.main([*words.split(), "--device", "cpu", "--out", str(out)], method="dmd") == 2
    assert line in capsys.readouterr().err and not out.exists()


# ---------------------------------------------------------------------------------------------
# On one process all of this does nothing
# ---------------------------------------------------------------------------------------------


def test_one_process_has_all_of_everything():
    barrier()
    assert broadcast([1, "a"]) == [1, "a"] and gather("a") == ["a"]
    assert list(my_share(range(5))) == [0, 1, 2, 3, 4]
    average([tensor := torch.arange(3.0)])
    assert tensor.tolist() == [0, 1, 2]


def test_a_rank_that_was_left_over_takes_no_rows_from_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert list(my_share(range(3))) == [0, 1, 2]


@pytest.mark.parametrize("rank", ["", "2", "one"])
def test_one_of_many_that_is_not_told_which_it_is_is_refused(monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2: it needs a RANK from 0 to 1"):
        check_rank()
    monkeypatch.setenv("RANK", "1")
    check_rank()


def test_the_processes_shares_are_all_of_a_batch(monkeypatch):
    """As equal as can be, without overlap."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", f"{rank}")
        shares.append(my_share(torch.arange(8)).tolist())
    assert sorted(row for share in shares for row in share) == list(range(8))
    assert [len(share) for share in shares] == [3, 3, 2]


@pytest.mark.parametrize("given", [{}, dict(RANK="0"), dict(RANK="0", MASTER_ADDR="127.0.0.1")])
def test_a_number_of_processes_alone_is_refused_with_what_lacks(
    launch, monkeypatch, capsys, tmp_path, given
):
    """As where a cluster or a shell has left WORLD_SIZE behind."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(WORLD_SIZE="2", **given).items():
        monkeypatch.setenv(name, value)
    assert launch("run", "--smoke --device cpu") == 2
    said = capsys.readouterr().err
    lacking = ", ".join({"RANK", "MASTER_ADDR", "MASTER_PORT"} - given.keys())
    assert said.startswith("ladd.py: WORLD_SIZE is 2, without ") and said.count("\n") == 1
    assert all(name in said for name in lacking.split(", "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["-1", "2", "x"])
def test_a_rank_that_none_of_the_processes_has_is_refused_and_waits_for_nobody(
    launch, monkeypatch, capsys, rank
):
    nowhere = dict(WORLD_SIZE="2", RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    assert launch("run", "--smoke --device cpu") == 2
    assert capsys.readouterr().err == "ladd.py: WORLD_SIZE is 2: it needs a RANK from 0 to 1.\n"


def test_ctrl_c_ends_a_process_that_waits_for_the_others():
    """PyTorch waits in C++, where Python hears no signal."""
    work = "import torch; from lib.parallel import processes; print('here', flush=True)\n"
    work += "with processes(torch.device('cpu'), 'it'): pass"
    env = os.environ | dict(WORLD_SIZE="2", RANK="0", PYTHONPATH=str(ROOT))
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_ports(1)[0])
    with subprocess.Popen([sys.executable, "-c", work], env=env, stdout=subprocess.PIPE) as one:
        assert one.stdout.readline() == b"here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            one.wait(3)  # for the other one, which never comes
        one.send_signal(signal.SIGINT)
        assert one.wait(HANGS) == -signal.SIGINT
