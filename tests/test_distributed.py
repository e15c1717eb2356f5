"""Many processes: what runs on one runs on N, whole or divided, with the same results."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import ladd

RUN = "--size 8 --width 16 --depth 2 --heads 2 --text-dim 8 --text-length 4 --pos-size 6 --taps 0,1"
RUN += " --head-width 8 --teacher-batch 8 --batch 8 --teacher-iterations 20 --iterations 20"
RUN += " --heads-warmup 3 --synthetic 22 --synthetic-steps 2 --teacher-steps 2 --save-every 8"
RUN += " --precision fp32 --device cpu --log-every 1 --aspects 1:1,2:1 --muon-lr 0"
DIVIDED, HYBRID = "--shard --checkpointing", "--shard --replicas 2"
PARTS = "--accumulate 2 --shard --offload --log-every 3"
SHORT = "--teacher-iterations 2 --iterations 2 --heads-warmup 0 --aspects 1:1 --shard"

# Command lines by one process of many; what stands before a `|` happens in the last, at an update.
WORK = """
import json, os, resource, sys
import torch
import ladd

ladd.report = lambda run: None
checkpoint, compiled = ladd.Loop.checkpoint, torch.nn.Module.compile
torch.nn.Module.compile = lambda module: compiled(module, backend="eager")  # traced, in seconds

def work(commands, ports):
    for i, words in enumerate(commands):
        event, _, words = words.rpartition("|")

        def after_update(loop):
            what, step = event.split() if event else ("", "0")
            if ladd.rank() == ladd.world() - 1 and loop.step + 1 == int(step):
                if what == "stop":
                    loop.run.watch.status = 75
                if what == "fail":
                    raise OSError("no such luck")
                if what == "full":  # no file can grow beyond this
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
                if what == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), 9)
            checkpoint(loop)

        ladd.Loop.checkpoint = after_update
        ladd.Loop.asynchronous = "--shard" in words and ladd.world() == 2  # as on a GPU
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
if "--shard" in sys.argv[1]:
    import torch.distributed.checkpoint, torch.distributed.fsdp

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
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [f"{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(n, commands, folder):
    """ladd.py with each of the command lines, by n processes. -> [exit status], [standard error]"""
    folder.mkdir()
    task = json.dumps([commands, *free_ports(len(commands))])
    env = os.environ | dict(WORLD_SIZE=f"{n}", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    env |= dict(PYTHONPATH=str(Path(ladd.__file__).parent))
    words = [sys.executable, "-c", WORK + FORK, task, str(folder)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    errors = [(folder / f"{rank}").read_text() for rank in range(n)]
    return json.loads(done.stdout.splitlines()[-1]), errors


def taught(source, out):
    """A run folder that has all but the distillation of another."""
    shutil.copytree(source, out)
    for name in ("student.pt", "heads.pt"):
        (out / name).unlink()
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: "one" by one process, others by more; "4-2-1", "1-4-2": cut and gone on with."""
    root = tmp_path_factory.mktemp("runs")
    command = lambda out, more="": f"{RUN} --out {root / out} {more}"  # noqa: E731
    cut = lambda step, out, more="": f"stop {step}|{command(out, more)}"  # noqa: E731

    def by(n, *commands):
        status, errors = launch(n, commands, root / f"errors-{n}")
        assert status == [0] * n, errors
        assert not any(errors[1:]), errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladd, "report", lambda run: None)
        assert ladd.main(command("one").split()) == 0
        for name in ("4-2-1", "1-4-2", "dead"):
            taught(root / "one", root / name)
        due = lambda self: 75 * bool(self.patient)  # noqa: E731
        with patch.context() as cutting:
            cutting.setattr(ladd.Watch, "due", due)
            cutting.setattr(ladd.Watch, "check", lambda self: None)
            assert ladd.main(command("1-4-2").split()) == 75
        resumed = [cut(6, "4-2-1", HYBRID), cut(11, "1-4-2", "--shard")]
        by(4, command("four"), command("four-hybrid", HYBRID), *resumed)
        resumed = [cut(13, "4-2-1", "--shard"), command("1-4-2")]
        cuts = [cut(6, "two-cut", "--stage teacher"), command("two-cut", "--stage synthesis")]
        cuts = [cuts[0], command("two-cut", "--stage teacher"), cuts[1]]
        cuts += [cut(11, "two-cut"), command("two-cut")]
        divided = [f"{PARTS} --stage {stage}" for stage in ("teacher", "synthesis", "distillation")]
        cuts += [cut(13, "two-parts", divided[0]), *(command("two-parts", d) for d in divided[:2])]
        cuts += [cut(11, "two-parts", divided[2]), command("two-parts", divided[2])]
        commands = [command("two"), command("two-divided", DIVIDED)]
        commands += [command("short", SHORT), command("compiled", f"{SHORT} --compile")]
        by(2, *commands, *cuts, command("two-parts-whole", PARTS), *resumed)
        newest = root / "4-2-1" / "distillation-state-00000013"
        part = sorted(newest.glob("__1_*"))[0]
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert ladd.main(command("4-2-1").split()) == 0
        assert str(part) in said.getvalue()  # named, and the state before it is used
    return root


MANY = ("two", "two-divided", "two-parts", "four", "four-hybrid", "4-2-1", "1-4-2")


def worst(a, b, name, key):
    a, b = (torch.load(run / name)[key] for run in (a, b))
    pairs = [(a[k], b[k]) for k in a] if key == "weights" else [(a, b)]
    return max((x.float() - y.float()).abs().max().item() for x, y in pairs)


def rows(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in lines if "step" in row]


@pytest.mark.parametrize("name", MANY)
def test_weights_are_those_of_one_process(runs, name):
    """After 20 updates of each stage, also where it was cut and went on with other processes."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / "one", runs / name, file, "weights") < 1e-5


def test_compiled_blocks_give_the_weights_of_plain_ones(runs):
    """Divided in two; traced, and run by PyTorch as it stands."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / "short", runs / "compiled", file, "weights") < 1e-5


@pytest.mark.parametrize("name", [n for n in MANY if n != "two-parts"])  # it logs less often
def test_losses_are_those_of_one_process(runs, name):
    one, many = rows(runs / "one"), rows(runs / name)
    assert [(r["stage"], r["step"]) for r in many] == [(r["stage"], r["step"]) for r in one]
    for a, b in zip(one, many, strict=True):
        for key in {"loss", "loss_d", "loss_g", "grad_norm", "ranked", "d_real"} & a.keys():
            assert abs(a[key] - b[key]) < 1e-5


@pytest.mark.parametrize(("cut", "whole"), [("two-cut", "two"), ("two-parts", "two-parts-whole")])
def test_as_many_processes_go_on_bit_for_bit(runs, cut, whole):
    """Both stages cut and gone on with by two processes: whole networks, and divided ones whose
    states are written while the training goes on, in parts, waiting in CPU memory."""
    for file in ("teacher.pt", "heads.pt", "student.pt"):
        assert worst(runs / whole, runs / cut, file, "weights") == 0
    logged = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(runs / name)]
              for name in (cut, whole)]  # fmt: skip
    assert logged[0] == logged[1]


@pytest.mark.parametrize("name", MANY[:5])
def test_synthesis_leaves_no_gaps_and_makes_nothing_twice(runs, name):
    files = [sorted((runs / run / "synthetic").iterdir()) for run in ("one", name)]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    index = [i for path in files[1] for i in torch.load(path)["index"]]
    assert index == list(range(22))
    for path in files[0]:
        assert worst(runs / "one", runs / name, f"synthetic/{path.name}", "x0") < 1e-3  # float16


def test_a_cut_of_divided_networks_leaves_nothing_behind(runs):
    for name in (*MANY[-2:], "two-cut", "two-parts"):
        assert not list((runs / name).glob("*state*"))


def test_the_process_that_fails_tells_why_once_and_all_end(runs, tmp_path):
    """One line by the process that it happened to; every status but 0."""
    command = f"fail 3|{RUN} --out {taught(runs / 'one', tmp_path / 'run')}"
    status, errors = launch(2, [command], tmp_path / "errors")
    assert status == [1, 1] and errors == ["", "ladd.py: no such luck\n"]


def test_a_full_disk_ends_all_and_leaves_the_state_before(runs, tmp_path):
    """Of divided networks: the second state can't be written by one process. One line that names
    its folder; the first state is whole, and the run goes on from it."""
    run = taught(runs / "two-divided", tmp_path / "run")
    flags = f"{RUN} --shard --save-every 4 --out {run}"
    status, errors = launch(2, [f"full 6|{flags}"], tmp_path / "errors")
    assert status == [1, 1]
    (line,) = [e for e in errors if e]
    assert line.startswith(
        f"ladd.py: {run}/distillation-state-00000008: the state can't be written"
    )
    assert line.count("\n") == 1
    assert [p.name for p in run.glob("*-state-*.pt")] == ["distillation-state-00000004.pt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladd, "report", lambda run: None)
        assert ladd.main(flags.split()) == 0
    assert worst(runs / "one", run, "student.pt", "weights") < 1e-5
    assert not list(run.glob("*state*"))


def test_a_killed_process_ends_the_run_and_torchrun_goes_on_from_the_last_state(runs):
    """Killed after update 12 of 20, states every 8: the result is that of one process."""
    run, words = runs / "dead", [sys.executable, "-m", "torch.distributed.run"]
    worker = run.parent / "worker.py"
    worker.write_text(WORK + "work(commands, ports)\nladd.leave(0)")
    words += ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", *free_ports(1)]
    words += [str(worker), json.dumps([[f"die 12|{RUN} --out {run}"]])]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(ladd.__file__).parent))
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "distillation: going on from update 8 of 20" in done.stdout
    assert worst(runs / "one", run, "student.pt", "weights") < 1e-5


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
        with pytest.raises(SystemExit) as end:
            ladd.main([*words.split(), "--out", str(tmp_path / "run")])
        told = capsys.readouterr().err
        assert end.value.code == 2 and (line in told and told.count("\n") == 1) == (rank == 0)
    assert not (tmp_path / "run").exists()


# One run of nano, whose process keeps the most bytes that PyTorch's allocator held in `distil`.
MEASURE = """
import json, os, sys
import numpy as np
import torch
import ladd

distil = ladd.distil

def measured(run):
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        distil(run)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    (run.out / f"held-{ladd.rank()}").write_text(str(held.max()))

def work(commands, ports):
    os.environ["MASTER_PORT"] = ports[0]
    ladd.distil, ladd.report = measured, lambda run: None
    sys.exit(ladd.main(commands[0].split()))

commands, *ports = json.loads(sys.argv[1])
"""


def test_the_plan_of_memory_agrees_with_two_processes(tmp_path, monkeypatch):
    """nano, divided in two: what either process holds at the most, within 10 %."""
    words = "--iterations 2 --heads-warmup 0 --synthetic 64 --device cpu --precision fp32 --shard"
    words += " --muon-lr 0 --teacher-iterations 1 --teacher-batch 2 --synthetic-steps 1"
    words += " --sample-every 1000"
    monkeypatch.setattr(sys.modules[__name__], "WORK", MEASURE)
    status, _ = launch(2, [f"{words} --out {tmp_path / 'run'}"], tmp_path / "errors")
    assert status == [0, 0]
    plan = ladd.plan(ladd.parse(f"{words} --gpus 2".split())[0])["ways"][False]["total"]
    for process in range(2):
        held = int((tmp_path / "run" / f"held-{process}").read_text())
        assert plan == pytest.approx(held, rel=0.1)


def test_a_plan_of_parts_has_the_memory_of_one_part_and_eight_forwards():
    """Of a batch in two parts: the activations of half of it, less those of the heads' own turn,
    for which the students' graph is not kept; 8 forward units instead of 6."""
    words = "--preset sd3-8b --depth 2 --batch 4"
    whole, half, parts = (
        ladd.plan(ladd.parse(f"{words} {more}".split())[0])
        for more in ("", "--batch 2", "--accumulate 2")
    )
    kept = parts["ways"][False]["activations"] / half["ways"][False]["activations"]
    assert 0.93 < kept < 1
    assert parts["forward"] == whole["forward"]
    more = (parts["ways"][False]["flops"] - whole["ways"][False]["flops"]) / whole["forward"]
    assert more == pytest.approx(2, rel=0.03)


def test_under_torchrun_a_run_that_was_asked_to_stop_has_not_failed(monkeypatch):
    """What --stop-after ends has status 75, which torchrun would take for a failure."""
    for variable, status in (("", 75), ("TORCHELASTIC_RUN_ID", 0)):
        if variable:
            monkeypatch.setenv(variable, "1")
        with pytest.raises(SystemExit) as end:
            ladd.leave(75)
        assert end.value.code == status


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--offload", "--offload True: is a part of --shard"),
        ("--accumulate 3", "--batch 32: its images can't be divided equally among 1 processes"),
        ("--accumulate 2 --method dmd", "--accumulate 2: is for LADD alone"),
        ("--shard --method dmd", "--shard True: only for LADD"),
    ],
)
def test_what_does_not_go_together_is_refused(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        ladd.main(words.split())
    assert end.value.code == 2 and line in capsys.readouterr().err


def test_a_plan_divides_by_the_processes_that_share_a_network():
    """8 GPUs in 2 replicas: a quarter each; without --shard all of it, and gradients to swap."""
    words = "--preset sd3-8b --depth 2 --batch 8 --gpus 8"
    whole, hybrid, copies = (
        ladd.plan(ladd.parse(f"{words} {more}".split())[0])
        for more in ("", "--replicas 2", "--no-shard")
    )
    for name in ("weights", "gradients", "optimiser"):
        assert hybrid["share"][name] == pytest.approx(2 * whole["share"][name])
        assert copies["share"][name] == pytest.approx(8 * whole["share"][name])
    assert copies["share"]["gathered"] == 0
    assert copies["traffic"] == pytest.approx(8 * copies["parameters"]["student"] * 7 / 8)


def test_a_damaged_teacher_is_not_trained_on(runs, tmp_path):
    """Divided networks read it memory-mapped; its checksum is looked at all the same."""
    run = taught(runs / "two-divided", tmp_path / "run")
    content = bytearray((run / "teacher.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "teacher.pt").write_bytes(content)
    status, errors = launch(2, [f"{RUN} --shard --out {run}"], tmp_path / "errors")
    assert 0 not in status
    assert any("teacher.pt" in e and "checksum" in e and e.count("\n") == 1 for e in errors), errors


def test_more_processes_than_prompts_are_refused_by_one_line(tmp_path, monkeypatch, capsys):
    shards = data.Shards.__new__(data.Shards)
    shards.sets, shards.channels = [type("Bucket", (), dict(train_size=2))()], 3
    shards.expect, shards.to = lambda *_: None, lambda device: shards
    monkeypatch.setattr(data, "load", lambda *_, **__: shards)
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings, given = ladd.parse(["--batch", "9", "--teacher-batch", "9", "--data", "there"])
    with pytest.raises(data.DataError, match="2 prompts are fewer than the 3 processes"):
        ladd.load_data(settings, True)
