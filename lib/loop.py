"""The loop of a stage: its steps, and around them resuming, logging, progress, states, signals."""

import contextlib
import math
import os
import signal
import stat
import sys
import time

import torch
from tqdm import tqdm

from lib.errors import RunError, Stop, of_compiler
from lib.health import symptoms
from lib.machine import moved
from lib.parallel import average, gather
from lib.states import Saver, load_state, newest_state

# Windows has no SIGHUP, which comes when a terminal closes or a connection ends.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
HANGUP = getattr(signal, "SIGHUP", None)


def leave_terminal():
    """Drops what goes to a terminal: one that is gone would end the process."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class Watch:
    """Whether a run should end: SIGINT, SIGTERM or SIGHUP came, or --stop-after is over."""

    def __init__(self, minutes, program):
        self.end = time.perf_counter() + 60 * minutes if minutes else math.inf
        self.program = program
        self.status = 0
        self.patient = False  # whether a stage is at work that saves before it ends
        self.before, self.hook = {}, sys.unraisablehook

    def __enter__(self):
        for number in SIGNALS:
            if number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asked for this
            with contextlib.suppress(ValueError):  # in a thread, which hears none
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self.hook
        if self.status and of_compiler(error):  # a terminal's Ctrl-C ends the compiler, too
            raise Stop(self.status) from None

    def hear(self, number, frame):
        """The first signal waits for a `patient` stage to save; the second ends the process."""
        for each in self.before:  # a terminal that closes may send its own twice
            signal.signal(each, signal.SIG_IGN if each == HANGUP else signal.SIG_DFL)
        sys.unraisablehook = lambda _: None  # Python's word on one that came at the same moment
        if number == HANGUP:
            leave_terminal()
        self.status = 128 + number
        if not self.patient:
            raise Stop(self.status)
        message = f"\n{self.program}: one moment, saving; a second signal ends at once\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())

    def due(self):
        """The exit status to end with, or 0 to go on."""
        return self.status or (75 if time.perf_counter() > self.end else 0)

    def check(self):
        if end := max(gather(self.due())):
            raise Stop(end)


class Loop:
    """The steps of a stage, from where a cut run goes on: iterate over it, call `log` in each.

    networks {name: module} and optimizers are all that the stage changes; batch: images of an
    update. signs: see lib/health.py; shown: the numbers of the progress bar."""

    def __init__(self, run, stage, total, batch, networks, optimizers, signs=(), shown=("loss",)):
        self.run, self.stage, self.total, self.batch = run, stage, total, batch
        self.networks, self.optimizers, self.signs, self.shown = networks, optimizers, signs, shown
        self.saver = Saver(run.out, stage, run.device, run.divided)
        self.step = self.skipped = self.in_a_row = 0
        self.found, self.updates = [], []  # numbers of this update; of those since the last line
        if state := newest_state(run.out, stage):
            folder, facts = state
            load_state(folder, networks, optimizers)
            self.step, run.earlier = facts["step"], facts["seconds"]
            self.skipped, self.in_a_row = facts["skipped"], facts["in_a_row"]
            print(f"{stage}: going on from update {self.step} of {total}", flush=True)
        self.first = self.step
        run.log.forget(stage, self.step)
        self.rows = [row for row in run.log.rows() if row.get("stage") == stage]
        self.warned = {why for _, why, _ in self.symptoms()}

    def __iter__(self):
        self.start = self.last_line = self.saved = time.perf_counter()
        options = dict(total=self.total, initial=self.step, disable=None, dynamic_ncols=True)
        with tqdm(desc=self.stage, **options) as self.bar:
            while self.step < self.total:
                yield self.step
                self.checkpoint()
                self.step += 1
                self.bar.update()
        self.saver.complete()

    def due(self, every):
        """Whether something done every so many updates, and at the end, is due after this one."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.total

    # logging

    def add(self, **values):
        """Notes numbers of this update, or of a part of its batch: tensors on any device."""
        self.found += [(name, value.detach()) for name, value in values.items()]

    def log(self, **values):
        """Ends an update; at every log line reads the numbers of all updates since the last one."""
        self.add(**values)
        self.updates.append(self.found)
        self.found = []
        if self.step - self.first == 4:  # the first updates are slower
            self.warm = time.perf_counter()
        if self.step - self.first == 14:
            self.warn_if_hours()
        if self.due(self.run.settings.log_every):
            self.read()

    def read(self):
        """Writes the means of what was noted since the last log line. To read is to wait for the
        device, so it is done here alone, all at once. An update whose gradient's norm is not finite
        was not applied: it is counted instead, and five in a row end the run."""
        found = [value.float() for update in self.updates for _, value in update]
        found = [moved(value, self.run.device) for value in found]  # --offload has norms elsewhere
        found, numbers = iter(torch.stack(found).tolist()), {}
        for step, update in enumerate(self.updates, self.step + 2 - len(self.updates)):
            own = [(name, next(found)) for name, _ in update]
            bad = list(dict.fromkeys(name for name, x in own if not math.isfinite(x)))
            if any(name.startswith("grad_norm") for name in bad):
                self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
                self.write(step, skipped=self.skipped, not_finite=bad)
                continue
            self.in_a_row = 0
            for name, x in own:
                numbers.setdefault(name, []).append(x)
        self.updates = []
        if numbers:
            means = torch.tensor([sum(x) / len(x) for x in numbers.values()])
            average([means])
            self.tell(dict(zip(numbers, means.tolist(), strict=True)))
        if self.in_a_row >= 5:
            self.give_up(bad)

    def tell(self, means):
        """One row: to log.jsonl and the progress bar, with warnings of bad signs."""
        now = time.perf_counter()
        speed = (self.step + 1 - self.first) / (now - self.start)  # updates per second
        means["images_per_s"] = speed * self.batch
        self.write(self.step + 1, **means)
        for _, why, figure in self.symptoms():
            if why not in self.warned:
                self.warned.add(why)
                where = "docs/faults.md: If a run goes wrong"
                print(f"\n{self.stage}: {why} ({figure}). {where}", file=sys.stderr, flush=True)
        shown = {name: f"{means[name]:.3f}" for name in self.shown if name in means}
        images = f"{means['images_per_s']:.0f}"
        self.bar.set_postfix(shown | {"img/s": images})
        if self.bar.disable and (now - self.last_line > 15 or self.due(self.total)):
            self.last_line = now
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            left = (self.total - self.step - 1) / speed / 60
            place = f"{self.stage} {self.step + 1}/{self.total}"
            print(f"{place}: {line}, {images} images/s, {left:.1f} min left", flush=True)

    def write(self, step, **values):
        row = dict(stage=self.stage, step=step, **values)
        self.rows.append(row)
        self.run.log.write(**row)

    def symptoms(self):
        return symptoms(self.rows, self.signs, self.total // self.run.settings.log_every)

    def warn_if_hours(self):
        """After the first updates: on a CPU a preset made for a GPU takes days."""
        left = (self.total - self.step - 1) * (time.perf_counter() - self.warm) / 10
        if self.run.device.type == "cpu" and left > 3600:
            needs = f"The {self.stage} alone needs about {left / 3600:.0f} hours on this CPU."
            print(f"{needs} `--preset nano` is made for a CPU: minutes in all.", file=sys.stderr)

    def give_up(self, names):
        """Ends a run whose last updates were not applied; the next one goes on after them."""
        before, self.in_a_row = self.in_a_row - 1, 0
        self.save(wait=True)
        rate = "--teacher-lr" if self.stage == "teacher" else "--student-lr"
        raise RunError(
            f"{self.stage}: the loss or the gradient was not finite at update {self.step + 1} "
            f"and the {before} before it ({', '.join(names)}). None was applied, and the weights "
            "before them are saved. The same command tries the next batches; or train in another "
            f"--out, with --precision fp32 or a lower {rate}."
        )

    # states

    def checkpoint(self):
        """At a log line: saves a state every so many updates or minutes, and when the run is asked
        to end, which it then does."""
        s = self.run.settings
        if not self.due(s.log_every) or self.step + 1 == self.total:
            return  # between log lines there are sums that a state does not hold
        end = max(gather(self.run.watch.due()))
        late = s.save_minutes and time.perf_counter() - self.saved > 60 * s.save_minutes
        passed = (self.step + 1) % s.save_every < s.log_every
        if passed or any(gather(late)) or end:
            self.save(wait=bool(end))
        if end:
            raise Stop(end)

    def save(self, wait=False):
        self.run.log.sync()
        self.saved = time.perf_counter()
        seconds = self.run.earlier + self.saved - self.start
        facts = dict(stage=self.stage, step=self.step + 1, seconds=seconds)
        facts |= dict(skipped=self.skipped, in_a_row=self.in_a_row)
        self.saver.save(self.step + 1, self.networks, self.optimizers, facts, wait)
