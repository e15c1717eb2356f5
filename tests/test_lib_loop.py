"""The loop of a stage: signals, minutes, the log, updates that are not finite, warnings."""

import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, MAKING, cut_at, lines, same, updates

import ladd
import lib.samples
import sample
from lib.errors import RunError
from lib.log import Log
from lib.loop import Loop, Watch
from lib.states import load_state, newest_state, state_folders

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------
# The loop alone
# ---------------------------------------------------------------------------------------------


def make_loop(out, total=6, watch=None, **options):
    """A loop of a stage that has one network and no optimiser."""
    settings = dict(log_every=1, save_every=99, save_minutes=0) | options
    run = SimpleNamespace(
        out=out, device=torch.device("cpu"), divided=False, log=Log(out), earlier=0.0
    )
    run.watch, run.settings = watch or Watch(0, "test"), SimpleNamespace(**settings)
    return Loop(run, "teacher", total, 4, dict(model=torch.nn.Linear(1, 1)), [])


def numbers(out):
    """The numbers of every row of the log, {step: {name: value}}."""
    apart = ("stage", "step", "images_per_s")
    return {
        row["step"]: {k: v for k, v in row.items() if k not in apart}
        for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
    }


def test_a_row_has_the_means_of_the_updates_since_the_last_one(tmp_path):
    """Every third update, and the last."""
    loop = make_loop(tmp_path, total=8, log_every=3)
    for step in loop:
        loop.log(loss=torch.tensor(float(step)))
    assert numbers(tmp_path) == {3: dict(loss=1.0), 6: dict(loss=4.0), 8: dict(loss=6.5)}


def test_the_numbers_of_parts_are_logged_as_their_mean(tmp_path):
    """Over all parts of all updates of a row; what is told once an update counts once."""
    loop = make_loop(tmp_path, total=2, log_every=2)
    for step in loop:
        for part in range(4):
            loop.add(loss=torch.tensor(float(10 * step + part)))
        loop.log(norm=torch.tensor(float(step)))
    assert numbers(tmp_path) == {2: dict(loss=6.5, norm=0.5)}


def test_a_number_that_not_every_update_has_is_the_mean_of_those_that_do(tmp_path):
    """As of a student that waits for its heads."""
    loop = make_loop(tmp_path, total=4, log_every=4)
    for step in loop:
        more = dict(loss_g=torch.tensor(float(step))) if step > 1 else {}
        loop.log(loss_d=torch.tensor(1.0), **more)
    assert numbers(tmp_path) == {4: dict(loss_d=1.0, loss_g=2.5)}


def test_the_numbers_of_an_update_that_was_not_applied_are_not_logged(tmp_path):
    """Not even those of its parts that were finite; its row names those that were not."""
    loop = make_loop(tmp_path, total=3, log_every=3)
    for step in loop:
        for part in range(2):
            bad = step == 1 and part == 1
            loop.add(loss=torch.tensor(math.nan if bad else float(step)), other=torch.tensor(1.0))
        loop.log(grad_norm=torch.tensor(math.nan if step == 1 else 5.0))
    assert numbers(tmp_path) == {
        2: dict(skipped=1, not_finite=["loss", "grad_norm"]),
        3: dict(loss=1.0, other=1.0, grad_norm=5.0),
    }


def test_a_log_line_without_any_applied_update_is_left_out(tmp_path):
    loop = make_loop(tmp_path, total=4, log_every=2)
    for step in loop:
        norm = torch.tensor(math.nan if step < 2 else 1.0)
        loop.log(loss=torch.tensor(float(step)), grad_norm=norm)
    assert list(numbers(tmp_path)) == [1, 2, 4]


def test_a_row_of_no_stage_is_passed_over(tmp_path):
    rows = [dict(settings={}), dict(finished=True, seconds=1.0), dict(step=1), dict(stage="a")]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*rows, 1])))
    assert [*Log(tmp_path).rows()] == [rows[0], rows[3]]


def test_a_row_is_told_at_once_and_the_speed_is_in_images(tmp_path, capsys):
    """Where standard error is no terminal, a line at the end of the stage, too."""
    loop = make_loop(tmp_path, total=2)
    for _ in loop:
        time.sleep(0.01)
        loop.log(loss=torch.tensor(0.25))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["images_per_s"] < 4 / 0.01 for row in rows)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("teacher 2/2: loss 0.250, ") and line.endswith("0.0 min left")


def test_a_number_is_due_every_so_often_and_at_the_end(tmp_path):
    loop = make_loop(tmp_path, total=8)
    assert [step + 1 for step in loop if loop.due(3)] == [3, 6, 8]


@pytest.mark.parametrize(
    ("log", "every", "states"),
    [(1, 1, [6, 7]), (1, 3, [3, 6]), (2, 3, [4, 6]), (3, 2, [3, 6]), (4, 3, [4]), (9, 1, [])],
)
def test_a_state_is_saved_on_the_first_log_line_from_which_it_is_due(tmp_path, log, every, states):
    """The last two are kept; none after the last update, which has its result."""
    loop = make_loop(tmp_path, total=8, log_every=log, save_every=every)
    for _ in loop:
        loop.log(loss=torch.tensor(1.0))
    assert [int(p.name[-8:]) for p in state_folders(tmp_path, "teacher")] == states


@pytest.mark.parametrize(("minutes", "states"), [(1e-9, [2, 4]), (0, []), (60, [])])
def test_states_are_also_saved_by_the_clock(tmp_path, minutes, states):
    """Every 10⁻⁹ minutes is every log line; 0 is never."""
    loop = make_loop(tmp_path, total=6, log_every=2, save_minutes=minutes)
    for _ in loop:
        loop.log(loss=torch.tensor(1.0))
    assert [int(p.name[-8:]) for p in state_folders(tmp_path, "teacher")] == states


def test_a_loop_goes_on_where_its_newest_state_was_and_forgets_later_rows(tmp_path, capsys):
    """With the count of skipped updates and the seconds that were worked before."""
    loop = make_loop(tmp_path, save_every=2)
    with torch.no_grad():
        loop.networks["model"].weight.fill_(7.0)
    for step in loop:
        norm = torch.tensor(math.nan if step == 1 else 1.0)
        loop.log(loss=torch.tensor(1.0), grad_norm=norm)
        if step == 4:
            break
    again = make_loop(tmp_path)
    assert "teacher: going on from update 4 of 6" in capsys.readouterr().out
    assert again.networks["model"].weight.item() == 7.0
    assert again.run.earlier > 0 and again.skipped == 1
    assert list(numbers(tmp_path)) == [1, 2, 3, 4]
    assert list(again) == [4, 5]


# ---------------------------------------------------------------------------------------------
# Signals, and --stop-after
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("teacher", signal.SIGINT),
        ("teacher", signal.SIGHUP),
        ("synthesis", signal.SIGTERM),
        ("distillation", signal.SIGTERM),
        ("report", signal.SIGINT),
    ],
)
def test_a_signal_ends_a_run_saved_with_the_command_to_go_on(
    launch, whole, monkeypatch, capsys, cache, stage, number
):
    """Status 143 or 130. The update or file in work is finished; the printed command does the
    rest, and the end is the same bit for bit. The caller's handlers are as they were."""
    monkeypatch.setattr(ladd, "FILE", 3)
    handler = signal.getsignal(number)
    places = dict(teacher=(ladd, "teacher_loss"), distillation=(ladd, "heads_loss"))
    places |= dict(synthesis=(lib.samples, "save"), report=(sample, "evaluate"))
    module, name = places[stage]
    function, calls = getattr(module, name), itertools.count()
    done = MAKING[: MAKING.index(stage)] if stage in MAKING else MAKING
    flags = FEW

    def interrupted(*arguments):
        if stage == "report" or next(calls) == 1:
            os.kill(os.getpid(), number)
        return function(*arguments)

    for before in done:
        assert launch("run", f"{flags} --stage {before}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert launch("run", flags) == 128 + number
    assert signal.getsignal(number) == handler
    made = dict(teacher="teacher-state-00000002", distillation="distillation-state-00000002")
    made |= dict(synthesis="synthetic/00001.pt", report="student.pt")
    assert (Path("run") / made[stage]).exists()
    assert not Path("run/synthetic/00002.pt").exists() or stage in ("distillation", "report")
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command == ["python", "ladd.py", *f"{flags} --out run --data-dir {cache}".split()]
    for last in MAKING[len(done) :]:
        assert launch("run", f"{flags} --stage {last}") == 0
    for kind in ("teacher", "student"):
        assert same(f"run/{kind}.pt", whole / f"{kind}.pt")
    assert updates(Path("run")) == updates(whole)


def test_a_program_can_train_in_a_thread_of_its_own():
    def train():
        with Watch(0, "test") as watch:
            heard.append(watch.due())

    heard = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert heard == [0]


def test_two_signals_at_the_same_moment_are_one_and_python_says_nothing_of_the_other(monkeypatch):
    """As a terminal or systemd sends them."""
    said, both = [], {signal.SIGINT, signal.SIGTERM}
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with Watch(0, "test") as watch:
        watch.patient = True
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:  # to this thread: another one, which blocks none, would take it at once
            signal.pthread_kill(threading.get_ident(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert watch.due() - 128 in both
    assert not said and sys.unraisablehook == said.append


@pytest.mark.parametrize(("number", "status"), [(None, 1), (signal.SIGINT, 130)])
def test_what_torch_compile_fails_of_is_one_line_and_a_signal_that_ended_it_is_no_failure(
    launch, monkeypatch, capsys, number, status
):
    """A terminal's Ctrl-C goes to the compiler, too."""
    kind = type("InductorError", (RuntimeError,), dict(__module__="torch._inductor.exc"))

    def failed(*_):
        if number:
            os.kill(os.getpid(), number)
        raise kind("ImportError: main.so: file too short\nand the command of the compiler")

    monkeypatch.setattr(ladd, "teacher_loss", failed)
    assert launch("run", FEW) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("To go on" in said) == bool(number)
    assert number or "ladd.py: --compile: ImportError: main.so: file too short; try" in said


def test_a_terminal_that_closes_may_say_so_twice_and_nohup_is_heard():
    """The second SIGHUP, of the shell, does not end what the first, of the system, has saved."""
    before = signal.getsignal(signal.SIGHUP)
    with Watch(0, "test") as watch:
        watch.patient = True
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.due() == 128 + signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with Watch(0, "test") as watch:
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.due() == 0
    signal.signal(signal.SIGHUP, before)


def test_between_two_log_lines_a_signal_waits_for_the_next_one(launch, whole, monkeypatch):
    """There is then nothing that a state does not hold."""
    loss, calls = ladd.teacher_loss, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ladd, "teacher_loss", interrupted)
        assert launch("run", f"{FEW} --log-every 4 --stage teacher") == 143
    assert [p.name for p in Path("run").glob("*-state-*")] == ["teacher-state-00000004"]
    assert launch("run", f"{FEW} --log-every 4 --stage teacher") == 0
    assert same("run/teacher.pt", whole / "teacher.pt")
    assert [row["step"] for row in updates(Path("run"))] == [4, 6]


def test_a_run_stops_after_its_minutes_with_status_75(launch, whole, monkeypatch, capsys):
    """Saved like after a signal, to be started again until the status is another."""
    assert Watch(1e-9, "").due() == 75 and Watch(5, "").due() == Watch(0, "").due() == 0
    loss, watches, enter = ladd.teacher_loss, [], Watch.__enter__

    def entered(watch):
        watches.append(watch)
        return enter(watch)

    def over(*arguments):
        watches[-1].end = 0
        return loss(*arguments)

    monkeypatch.setattr(Watch, "__enter__", entered)
    with monkeypatch.context() as patch:
        patch.setattr(ladd, "teacher_loss", over)
        for update in (1, 2):
            assert launch("run", f"{FEW} --stop-after 100 --stage teacher") == 75
            assert Path(f"run/teacher-state-{update:08d}/state.pt").exists()
    assert "--stop-after 100" in capsys.readouterr().err
    assert launch("run", f"{FEW} --stage teacher") == 0
    assert same("run/teacher.pt", whole / "teacher.pt")


# ---------------------------------------------------------------------------------------------
# Updates that are not finite
# ---------------------------------------------------------------------------------------------


def poison(monkeypatch, name, updates, value=math.nan):
    """The loss `name` is not finite in these of its calls, counted from 1."""
    function, calls = getattr(ladd, name), itertools.count(1)

    def poisoned(*arguments):
        loss = function(*arguments)
        bad = value if next(calls) in updates else 1.0
        return (loss[0] * bad, *loss[1:]) if isinstance(loss, tuple) else loss * bad

    monkeypatch.setattr(ladd, name, poisoned)


def contents(launch, monkeypatch, flags, stage):
    """What the states of a cut run hold: [{name: tensor}], the older first."""
    found = []

    def look(loop):
        for folder in state_folders(loop.run.out, stage):
            load_state(folder, loop.networks, loop.optimizers)
            content = {
                f"{name}/{key}": tensor.clone()
                for name, network in loop.networks.items()
                for key, tensor in network.state_dict().items()
            }
            for i, optimizer in enumerate(loop.optimizers):
                for j, moments in optimizer.state_dict()["state"].items():
                    for key, tensor in moments.items():
                        content[f"optimizer/{i}/{j}/{key}"] = tensor.clone()
            found.append(content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "__iter__", look)
        launch("run", flags)
    return found


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("teacher", "teacher_loss", math.inf),
        ("distillation", "heads_loss", math.nan),
        ("distillation", "student_losses", math.inf),
        ("distillation", "distillation_loss", math.nan),
    ],
)
def test_an_update_that_is_not_finite_is_not_applied_but_counted(
    launch, train, monkeypatch, stage, name, value
):
    """Who has the bad loss does not move, nor does its optimiser, nor does the student learn from
    heads that could not; the log has the update's number and its names."""
    out = train("run", "", MAKING[: MAKING.index(stage)])
    of_student = name in ("student_losses", "distillation_loss")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        poison(patch, name, {2} if of_student else {3}, value)  # the first is of the heads alone
        cut_at(patch, stage, 3)
        launch("run", f"{FEW} --save-every 1 --stage {stage}")
    facts = newest_state(out, stage)[1]
    assert (facts["step"], facts["skipped"], facts["in_a_row"]) == (3, 1, 1)
    before, after = contents(launch, monkeypatch, f"{FEW} --stage {stage}", stage)
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    # the average goes on towards its network, and the heads had stepped before the student's loss
    free = ("ema/", "heads/", "optimizer/1/") if of_student else ("ema/",)
    assert all(key.startswith(free) for key in moved)
    row = next(row for row in lines(out) if "skipped" in row)
    assert (row["stage"], row["step"], row["skipped"]) == (stage, 3, 1)
    logged = dict(teacher_loss="loss", heads_loss="loss_d", student_losses="loss_g")
    assert logged.get(name, "loss_distill") in row["not_finite"]
    norm = "grad_norm_heads" if name == "heads_loss" else "grad_norm"
    assert norm in row["not_finite"]
    assert not [r for r in updates(out) if (r["stage"], r["step"]) == (stage, 3) and r != row]
    assert launch("run", f"{FEW} --save-every 1 --stage {stage}") == 0
    kind = "teacher" if stage == "teacher" else "student"
    weights = torch.load(out / f"{kind}.pt", weights_only=True)["weights"]
    assert all(w.isfinite().all() for w in weights.values())


def test_one_bad_part_of_a_batch_spoils_all_of_it(train, monkeypatch):
    """Its finite parts are neither learned from nor logged: update 2 has parts 3 and 4."""
    poison(monkeypatch, "teacher_loss", {4})
    out = train("run", "--accumulate 2 --teacher-batch 4 --log-every 6", ["teacher"])
    skipped, row = updates(out)
    assert skipped["step"] == 2 and skipped["not_finite"] == ["loss", "grad_norm"]
    assert row["step"] == 6 and math.isfinite(row["loss"])


def test_after_five_bad_updates_the_run_stops_with_the_weights_before_them(
    launch, monkeypatch, capsys
):
    """Saved, with what to try; the same command goes on with the next batches."""
    flags, out = f"{FEW} --save-every 1 --teacher-iterations 8 --stage teacher", Path("run")
    with monkeypatch.context() as patch:
        poison(patch, "teacher_loss", set(range(2, 7)))
        assert launch("run", flags) == 1
    message = capsys.readouterr().err
    assert "not finite at update 6 and the 4 before" in message and "--teacher-lr" in message
    assert "Traceback" not in message and not (out / "teacher.pt").exists()
    assert [int(p.name[-8:]) for p in state_folders(out, "teacher")] == [5, 6]
    before, after = contents(launch, monkeypatch, flags, "teacher")
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert all(key.startswith("ema/") for key in moved)
    assert launch("run", flags) == 0
    assert [r["step"] for r in lines(out) if "skipped" in r] == [2, 3, 4, 5, 6]


CASES = [((3, 7), None), ((3, 8), 8), ((6, 12), 12), ((1, 6), None)]  # not applied: 4 to 7, …


@pytest.mark.parametrize(("bad", "ends"), CASES)
def test_a_run_ends_at_a_log_line_if_the_last_five_updates_were_not_applied(tmp_path, bad, ends):
    """Not where they were fewer, nor where the run has found back before the log line."""
    loop, told = make_loop(tmp_path, total=12, log_every=4, save_every=99), None
    for step in loop:
        norm = torch.tensor(math.nan if bad[0] < step + 1 <= bad[1] else 1.0)
        try:
            loop.log(grad_norm=norm)
        except RunError as error:
            told = step + 1
            assert f"at update {told} and the {bad[1] - bad[0] - 1} before it" in f"{error}"
            break
    assert told == ends
    assert (ends is not None) == bool(state_folders(tmp_path, "teacher"))


# ---------------------------------------------------------------------------------------------
# Warnings
# ---------------------------------------------------------------------------------------------


def test_a_bad_sign_is_one_warning_that_names_the_page_to_read(launch, monkeypatch, capsys):
    """Said once, in the run; and it is the verdict of report.md."""
    monkeypatch.setattr(ladd, "diversity", lambda real, fake: torch.tensor(0.25))
    flags = f"{FEW} --iterations 11 --log-every 1 --evaluation 16 --judge-steps 5"
    assert launch("run", flags) == 0
    message, report = capsys.readouterr().err, Path("run/report.md").read_text()
    assert message.count("diversity 0.25") == 1
    told = next(line for line in message.splitlines() if "diversity 0.25" in line)
    page, _, section = told.rpartition(". ")[2].partition(": ")
    assert f"## {section}\n" in (ROOT / page).read_text("utf-8")
    assert "- distillation: failed: the student's samples are alike (diversity 0.25" in report


def test_a_run_that_would_take_hours_on_a_cpu_says_so(tmp_path, capsys):
    """After 15 updates, by the last ten; a preset for a GPU is easily started on a CPU."""
    for total, said in ((16, False), (10_000_000, True)):
        loop = make_loop(tmp_path / str(total), total=total, log_every=100)
        for step in loop:
            time.sleep(0.001)
            loop.log(loss=torch.tensor(1.0))
            if step == 15:
                break
        assert ("hours on this CPU" in capsys.readouterr().err) == said
