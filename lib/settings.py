"""Settings: a frozen dataclass is the command line, the checks, and a run folder's config.json.

A field says all of itself: `size: int = setting(16, "side of the images", low=1)`. A preset is a
dict of fields. `free` fields may differ between two commands of the same run.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import operator
import os
import shlex
import sys

from lib.errors import Parser, UsageError
from lib.files import read_object, write_json
from lib.parallel import rank


def setting(
    default, help, *, low=None, high=None, above=None, below=None, choices=None, kind=None,
    parse=None, free=False, flag="", scales=False, smoke=None,
):  # fmt: skip
    """A field with its meaning and bounds, for every value of a tuple.

    low ≤ value ≤ high; above < value < below. kind: of a tuple's values. parse: text -> value, in
    place of kind. scales: with --steps-scale. smoke: the value for --smoke."""
    return dataclasses.field(default=default, metadata=locals())


def flag_of(field):
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def refuse(settings, name, why):
    """Raises the UsageError of a field."""
    (field,) = (f for f in dataclasses.fields(settings) if f.name == name)
    raise UsageError(f"{flag_of(field)} {text_of(getattr(settings, name))}: {why}")


def text_of(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


BOUNDS = dict(low=(operator.ge, "at least"), high=(operator.le, "at most"))
BOUNDS |= dict(above=(operator.gt, "above"), below=(operator.lt, "below"))


def fault(value, rule):
    """Why a value is outside the bounds of its field; None where it is not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    if isinstance(value, (int, float)) and abs(value) >= 2**63:
        return "must be below 2^63"  # what files and tensors hold
    if rule["choices"] and value not in rule["choices"]:
        return f"must be one of {', '.join(rule['choices'])}"
    for name, (holds, words) in BOUNDS.items():
        if rule[name] is not None and not holds(value, rule[name]):
            return f"must be {words} {rule[name]}"


def check_fields(settings):
    """Refuses values outside their own field's bounds, and numbers that no file or tensor holds."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if why := fault(each, field.metadata):
                refuse(settings, field.name, why)


free = functools.partial(setting, free=True)


@dataclasses.dataclass(frozen=True)
class HowToRun:
    """Settings of any training program; none of them changes a result on the same machine but
    `precision`, `deterministic`, and the last two, which change other fields."""

    out: str = free("", "run folder (default: runs/PRESET)")
    data_dir: str = free("data", "where downloads and judges are kept")
    device: str = free("auto", "cpu, cuda, …")
    precision: str = setting(
        "auto", "bf16, fp32, or auto: bf16 where the hardware has it",
        choices=("auto", "bf16", "fp32"),
    )  # fmt: skip
    deterministic: bool = setting(False, "only kernels that give the same bits every time")
    compile: str = free(
        "auto", "torch.compile the networks; auto: for long runs on one NVIDIA GPU",
        choices=("auto", "yes", "no"),
    )  # fmt: skip
    checkpointing: bool = free(False, "less memory: a backward computes the blocks again")
    accumulate: int = free(1, "parts that a process's share of a batch is worked through in", low=1)
    shard: bool = free(False, "of many processes each holds a part of the networks (FSDP)")
    offload: bool = free(False, "--shard: weights and moments of what learns wait on the CPU")
    replicas: int = free(1, "--shard: parts are held so many times (hybrid: once per node)", low=1)
    save_every: int = free(500, "updates between states from which a cut run goes on", low=1)
    save_minutes: float = free(10.0, "minutes after which a state is due anyway; 0: never", low=0)
    stop_after: float = free(0.0, "minutes after which to save and exit with 75; 0: never", low=0)
    sample_every: int = free(250, "updates between sample grids and curves", low=1, smoke=2)
    log_every: int = free(20, "updates between lines of log.jsonl", low=1, smoke=1)
    tensorboard: bool = free(False, "also write logs for tensorboard: pip install tensorboard")
    steps_scale: float = free(1.0, "factor of updates and samples", above=0, high=1e3)
    smoke: bool = setting(False, "two updates of every stage, to see that all of it runs")

    def scaled(self):
        """The settings with --steps-scale and --smoke worked in, as their fields say."""
        changes = {}
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata
            if rule["scales"] and value > 0:
                changes[field.name] = max(rule["low"] or 1, round(value * self.steps_scale))
            if self.smoke and rule["smoke"] is not None:
                changes[field.name] = rule["smoke"]
        return dataclasses.replace(self, **changes)


def divided_by_commas(kind):
    """A function that reads values of one kind. -> a tuple"""

    def values(text):
        return tuple(kind(part) for part in text.split(",") if part)

    return values


def make_parser(kind, program, description, **options):
    """A parser with a flag for every field of the dataclass `kind`."""
    parser = Parser(program, description, **options)
    for field in dataclasses.fields(kind):
        rule, default = field.metadata, field.default
        # an argument that was not given leaves no trace: the preset's value stands
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=rule["help"])
        if isinstance(default, bool):
            options |= dict(action=argparse.BooleanOptionalAction)
        elif rule["parse"]:
            options |= dict(type=rule["parse"], metavar="X")
        elif isinstance(default, tuple):
            options |= dict(type=divided_by_commas(rule["kind"] or float), metavar="A,B,…")
        else:
            options |= dict(type=type(default), metavar="X")
        parser.add_argument(flag_of(field), **options)
    if rank() > 0:  # rank 0 says it
        parser.error = lambda _: sys.exit(2)
    return parser


def parse_settings(kind, presets, argv, program, description, epilog=""):
    """The command line: a preset's row, with every given flag replacing a field.
    -> the dataclass `kind`, the names of the fields that were given"""
    parser = make_parser(kind, program, description, epilog=epilog)
    given = vars(parser.parse_args(argv))
    for field in dataclasses.fields(kind):
        if given.get(field.name) == "":  # of a shell's variable that is not set
            parser.error(f"{flag_of(field)}: is empty; give it a value, or leave it out")
    preset = given.get("preset", kind.preset)
    if preset not in presets:
        parser.error(f"--preset {preset}: must be one of {', '.join(presets)}")
    return kind(**presets[preset] | given), set(given)


def lasting(settings):
    """What tells of a result, as a dict: not where it lies, nor how the machine worked."""
    fields = dataclasses.fields(settings)
    return {f.name: getattr(settings, f.name) for f in fields if not f.metadata["free"]}


def bound(settings):
    """The settings that a run folder is bound to, as its config.json has them."""
    return json.loads(json.dumps(lasting(settings)))


def differences(theirs, mine, names):
    """Where two dicts differ, as text; empty if they are the same."""
    names = [name for name in names if theirs.get(name) != mine.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} → {mine.get(name)}" for name in names)


def check_same(flag, folder, theirs, mine, names):
    """UsageError where a folder was made with other settings of these names, or from other data;
    where the data lies is free."""
    names = [name for name in names if name not in ("data", "dataset")]
    names.append("dataset" if "dataset" in theirs else "data")  # an older version's has the path
    if different := differences(theirs, mine, names):
        raise UsageError(
            f"{flag} {folder} was made with other settings ({different}). Choose another folder "
            f"with {flag}, or give the same settings and data."
        )


def command_of(settings, base, words, without=("seed",)):
    """The words of a command line, then the flags by which `settings` differ from `base`."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), flag_of(field)
        if value == getattr(base, field.name) or field.metadata["free"] or field.name in without:
            continue
        if isinstance(value, bool):
            words = [*words, flag if value else "--no-" + flag[2:]]
        else:
            words = [*words, flag, shlex.quote(text_of(value))]
    return " ".join(words)


@contextlib.contextmanager
def locked(out):
    """Makes the run folder and holds it for this process alone, until it ends, however it ends."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            import fcntl

            handle = os.open(out, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another process is at work in this run folder.") from None
        except (ImportError, OSError):
            print(f"{out} can't be locked here: let one process alone use it", file=sys.stderr)
        yield


def read_config(path):
    """A folder's settings. What is attention_heads now was heads in older versions."""
    config = read_object(path)
    if "heads" in config:
        config["attention_heads"] = config.pop("heads")
    return config


def open_folder(out, mine, defaults, sign="config.json"):
    """Signs a folder, if it is empty, with what it is made of, or finds it made of the same.

    mine, defaults: dicts, for runs as `bound` makes them; a folder that is older than a setting has
    its default."""
    path = out / sign
    # .sign.: other processes that started with this one are signing; they may be done by now
    strangers = [p.name for p in out.iterdir() if not p.name.startswith(f".{sign}.")]
    if path.exists():
        theirs = defaults | read_config(path)
        check_same("--out", out, theirs, mine, theirs | mine)
    elif strangers:
        raise UsageError(f"{out} has {strangers[0]} and no {sign}: choose another with --out.")
    else:
        write_json(mine, path)
