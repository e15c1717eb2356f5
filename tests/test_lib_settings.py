"""The command line, the bounds of every setting, and what a run folder is bound to."""

import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
import torch

import ladd
from lib.checkpoints import check_settings
from lib.errors import DataError, UsageError
from lib.settings import (
    HowToRun,
    bound,
    check_fields,
    command_of,
    flag_of,
    make_parser,
    open_folder,
    setting,
    text_of,
)
from mmdit import MMDiT
from tools.score import MOST
from tools.train import base_of, given_settings

FIELDS = dataclasses.fields(ladd.Settings)


@dataclasses.dataclass(frozen=True)
class Own(HowToRun):
    """Settings of another program, one of every kind."""

    seed: int = setting(0, "of all randomness")
    side: int = setting(4, "at least 1", low=1)
    decay: float = setting(0.5, "from 0 to below 1", low=0, below=1)
    rates: tuple = setting((0.1, 0.2), "above 0", above=0, kind=float)
    names: tuple = setting((), "words", kind=str)
    colour: str = setting("red", "of three", choices=("red", "green", "blue"))
    mean: float = setting(0.0, "of any sign")
    pair: tuple = setting((1, 2), "read by its own function", parse=tuple)
    source: str = setting("", "another folder", flag="--from", free=True)

    def __post_init__(self):
        check_fields(self)


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------

VALUES = dict(
    preset="tiny", data="photos", size=(20, 12), patch=4, attention_heads=2, width=132, text_dim=66,
    levels=(1.0, 0.8, 0.6, 0.2), level_p=(0.1, 0.2, 0.3, 0.4), level_warmup_p=(0.4, 0.3, 0.2, 0.1),
    targets="real", taps=(0, 2), out="elsewhere", data_dir="there", device="cpu", head_width=32,
    precision="fp32", stage="report", teacher="there.pt", steps_scale=0.5, drop=0.2,
    teacher_ema=0.5, student_ema=0.6, beta1=0.7, t_hat_mean=-0.5, discriminator="heads.pt",
    aspects=("1:1", "3:2"), source="runs/other", pooled_dim=64, judge_width=36, compile="no",
)  # fmt: skip


def another(field):
    """A value of the field that is allowed and not its default."""
    if field.name in VALUES:
        return VALUES[field.name]
    return not field.default if isinstance(field.default, bool) else field.default + 1


def words(field, value):
    flag = flag_of(field)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, text_of(value)]


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_setting_has_a_flag_that_sets_it(field):
    """The flag's value arrives in its field, with its type, and in no field of the same kind."""
    value = another(field)
    assert value != field.default
    beside = ["--shard"] if field.name == "offload" else []  # which is a part of it
    settings, _ = given_settings([*words(field, value), *beside])
    got = getattr(settings, field.name)
    assert got == value and type(got) is type(value)
    if field.name not in ("preset", "smoke", "steps_scale"):  # these change others by design
        want = dataclasses.asdict(given_settings([])[0]) | {field.name: value}
        want |= dict(out=settings.out, shard=settings.shard if beside else want["shard"])
        if field.name == "levels":
            want["level_p"] = settings.level_p
        if field.name in ("size", "downscale", "channels"):  # the levels follow the values of x_0
            want["levels"] = settings.levels
        assert dataclasses.asdict(settings) == want


def test_a_flag_that_is_not_given_leaves_no_trace():
    """So that a preset's value stands."""
    parser = make_parser(Own, "own", "A program.")
    assert vars(parser.parse_args([])) == {}
    words = ["--from", "x", "--no-shard", "--rates", "3,.5", "--pair", "ab", "--mean=-1"]
    given = vars(parser.parse_args(words))
    assert given == dict(source="x", shard=False, rates=(3.0, 0.5), pair=("a", "b"), mean=-1.0)


def test_help_has_every_flag_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        ladd.main(["--help"])
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        assert flag_of(field) in told and field.metadata["help"] in told


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------


def refused(kind, **values):
    """The message of settings that are refused."""
    with pytest.raises(UsageError) as error:
        kind(**values)
    return str(error.value)


BOUNDS = [  # field, a value that is refused, the nearest that is not, why
    ("side", 0, 1, "must be at least 1"),
    ("decay", -0.1, 0.0, "must be at least 0"),
    ("decay", 1.0, 0.999, "must be below 1"),
    ("decay", float("nan"), 0.5, "must be finite"),
    ("decay", float("inf"), 0.5, "must be finite"),
    ("rates", (0.1, 0.0), (0.1, 1e-9), "must be above 0"),
    ("rates", (0.1, float("-inf")), (), "must be finite"),
    ("colour", "pink", "blue", "must be one of red, green, blue"),
    ("mean", float("nan"), -1e9, "must be finite"),
    ("accumulate", 0, 1, "must be at least 1"),
    ("save_minutes", -1.0, 0.0, "must be at least 0"),
]


@pytest.mark.parametrize(("name", "bad", "good", "why"), BOUNDS)
def test_a_value_outside_its_bounds_is_refused_with_flag_value_and_reason(name, bad, good, why):
    flag = "--" + name.replace("_", "-")
    assert refused(Own, **{name: bad}) == f"{flag} {text_of(bad)}: {why}"
    assert getattr(Own(**{name: good}), name) == good


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_setting_keeps_its_bounds(field):
    """Of every field its own: the value at the bound, or just beyond it, is refused."""
    rule, bad = field.metadata, {}
    if rule["low"] is not None:
        bad[rule["low"] - 1] = f"must be at least {rule['low']}"
    if rule["above"] is not None:
        bad[rule["above"]] = f"must be above {rule['above']}"
    if rule["high"] is not None:
        bad[rule["high"] + 1] = f"must be at most {rule['high']}"
    if rule["below"] is not None:
        bad[rule["below"]] = f"must be below {rule['below']}"
    if rule["choices"]:
        bad["toast"] = f"must be one of {', '.join(rule['choices'])}"
    if isinstance(field.default, float) or rule["kind"] is float:
        bad |= {float("nan"): "must be finite", float("inf"): "must be finite"}
    if type(field.default) in (int, float):
        bad[type(field.default)(2**63)] = "must be "
    for value, why in bad.items():
        value = (value,) if isinstance(field.default, tuple) else value
        message = refused(ladd.Settings, **{field.name: value})
        assert message.startswith(f"{flag_of(field)} {text_of(value)}: {why}")


def test_settings_at_their_highest_can_be_read_again_from_a_checkpoint():
    """What a later stage or another program would refuse is refused before anything is trained."""
    highest = {f.name: f.metadata["high"] for f in FIELDS if f.metadata["high"] is not None}
    s = dataclasses.replace(ladd.Settings(), **highest | dict(steps_scale=1.0))
    with torch.device("meta"):
        model = MMDiT(**s.model() | dict(depth=1))
    check_settings(s, model.config)
    assert all(highest[name] <= most for name, most in MOST.items())
    for name in ("text_length", "teacher_steps"):
        with pytest.raises(ValueError, match=name):
            vast = SimpleNamespace(**dataclasses.asdict(s) | {name: highest[name] + 1})
            check_settings(vast, model.config)


def test_settings_that_are_made_of_others_are_checked_too():
    with pytest.raises(UsageError, match="--side 0"):
        dataclasses.replace(Own(), side=0)


# What is wrong: the flags, and what the message must name.
BAD = {
    "unknown preset": ("--preset huge", "huge"),
    "unknown flag": ("--bogus 1", "--bogus"),
    "abbreviation": ("--iter 3", "--iter"),
    "a word for a number": ("--seed x", "--seed"),
    "words for numbers": ("--levels a,b", "--levels"),
    "a word for a size": ("--size big", "--size: invalid size value: 'big'"),
    "three sides": ("--size 8x8x8", "--size"),
    "indivisible size": ("--size 15", "--size"),
    "one indivisible side": ("--size 16x15", "--size"),
    "enormous size": ("--size 80", "--size"),
    "no patch": ("--patch 0", "--patch"),
    "no channels": ("--channels 0", "--channels"),
    "odd width": ("--width 130", "--width"),
    "width for other heads": ("--attention-heads 3", "--attention-heads"),
    "no heads": ("--attention-heads 0", "--attention-heads"),
    "no blocks": ("--depth 0", "--depth"),
    "odd text": ("--text-dim 7", "--text-dim"),
    "no words": ("--text-length 0", "--text-length"),
    "ungroupable heads": ("--head-width 56", "--head-width"),
    "a head of one channel": ("--head-width 1", "--head-width"),  # of one token: no norm
    "an aspect ratio beyond all numbers": ("--aspects 1" + "0" * 400 + ":1", "--aspects"),
    "levels without probabilities": ("--levels 1,0.5 --level-p 1", "--level-p"),
    "rising levels": ("--levels 0.5,0.75,0.25,0.1", "--levels"),
    "no level of noise alone": ("--levels 0.9,0.75,0.25,0.1", "--levels"),
    "no levels": ("--levels ,", "--levels"),
    "a level of 0": ("--levels 1,0.75,0.5,0", "--levels"),
    "a level above 1": ("--levels 1.5,0.75,0.5,0.25", "--levels"),
    "negative probability": ("--level-p=-1,1,1,1", "--level-p"),
    "no probability": ("--level-p 0,0,0,0", "--level-p"),
    "no warm-up probability": ("--level-warmup-p 0,0,0,0 --level-warmup 5", "--level-warmup-p"),
    "unknown targets": ("--targets fake", "--targets"),
    "unknown stage": ("--stage sleep", "--stage"),
    "unknown precision": ("--precision fp8", "--precision"),
    "unknown device": ("--device toaster", "--device"),
    "a tap too deep": ("--taps 4", "--taps"),
    "falling taps": ("--taps 2,1", "--taps"),
    "a tap twice": ("--taps 1,1", "--taps"),
    "no updates": ("--iterations 0", "--iterations"),
    "no teacher updates": ("--teacher-iterations 0", "--teacher-iterations"),
    "a student that never learns": ("--iterations 40 --heads-warmup 40", "--heads-warmup"),
    "no batch": ("--batch 0", "--batch"),
    "no samples": ("--synthetic 0", "--synthetic"),
    "no synthetic steps": ("--synthetic-steps 0", "--synthetic-steps"),
    "no teacher steps": ("--teacher-steps 0", "--teacher-steps"),
    "no judge": ("--judge-steps 0", "--judge-steps"),
    "an evaluation of 3": ("--evaluation 3", "--evaluation"),
    "no scale": ("--steps-scale 0", "--steps-scale"),
    "no learning rate": ("--student-lr 0", "--student-lr"),
    "more than all captions dropped": ("--drop 1.5", "--drop"),
    "an average that explodes": ("--student-ema 1.5", "--student-ema"),
    "no log": ("--log-every 0", "--log-every"),
    "no samples to see": ("--sample-every 0", "--sample-every"),
    "offload without shard": ("--offload", "--offload True: is a part of --shard"),
    "a judge that can't be grouped": ("--judge-width 6", "--judge-width"),
    "pooled features of another width": ("--pooled-dim 32", "--pooled-dim"),
    "an unset variable for data": ("--data=", "--data: is empty; give it a value, or leave it out"),
    "an unset variable for a teacher": ("--teacher=", "--teacher: is empty"),
    "an unset variable for a run": ("--from=", "--from: is empty"),
    "a file for a folder": (f"--data-dir {__file__}", "--data-dir"),
    "a run among its own images": ("--data . --out run", "--out run: is inside --data ."),
    "a shift whose schedule is infinite": ("--shift 1e-17", "--shift"),
    "an ε that float32 takes for 0": ("--adam-eps 1e-50", "--adam-eps"),
    "more steps than are read again": ("--teacher-steps 10001", "--teacher-steps"),
    "a seed of 70 bits": ("--seed 999999999999999999999", "--seed"),
    "guidance that is no number": ("--cfg nan", "--cfg"),
    "guidance beyond all numbers": ("--synthetic-cfg 1e300", "--synthetic-cfg"),
    "a scale beyond all updates": ("--steps-scale 1e308", "--steps-scale"),
    "parts that don't divide": (
        "--accumulate 3", "--batch 32: its images can't be divided equally among 1 processes"),
    "a compiled gradient of a gradient": ("--compile yes --r1 1", "--compile"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "named"), BAD.values(), ids=BAD)
def test_bad_settings_are_one_clear_line_and_status_2(capsys, monkeypatch, tmp_path, flags, named):
    """Refused before anything is made, by one line that names the flag."""
    monkeypatch.chdir(tmp_path)
    try:
        status = ladd.main(flags.split())
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert message.startswith("ladd.py: ") and message.count("\n") == 1
    assert named in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# The command that makes a run again
# ---------------------------------------------------------------------------------------------

COMMANDS = ["", "--smoke", "--steps-scale 0.5", "--preset tiny --no-qk-norm --data shapes"]
COMMANDS += ["--taps 0,2 --t-hat-mean -1 --r1 1e-05 --teacher it.pt", "--data 'my photos'"]
COMMANDS += ["--size 24x40 --aspects 1:1,3:2 --deterministic", "--taps="]


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_reported_command_gives_the_same_settings_again(flags):
    """Pasted into a shell it makes the same run, its seed and folder apart."""
    settings, _ = given_settings([*shlex.split(flags), "--seed", "7"])
    base = base_of(settings)
    command = command_of(settings, base, ["python", "ladd.py", "--preset", settings.preset])
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "ladd.py") and "--seed" not in words
    flags = [word for word in words if word[:2] == "--"]
    assert len(flags) == len(set(flags))
    again, _ = given_settings([*words, "--out", settings.out, "--seed", "7"])
    # A scale may stand in the command as the numbers that it gave.
    assert dataclasses.replace(again, steps_scale=settings.steps_scale) == settings


def test_a_command_has_what_differs_and_nothing_else():
    settings = Own(seed=3, names=("a b", "c"), decay=0.25, out="x", mean=-1.0, deterministic=True)
    want = ["own", "--deterministic", "--decay", "0.25", "--names", "a b,c", "--mean", "-1.0"]
    assert shlex.split(command_of(settings, Own(), ["own"])) == want
    with_seed = command_of(settings, Own(deterministic=True), ["own"], without=("names", "mean"))
    assert with_seed == "own --seed 3 --decay 0.25"
    assert command_of(Own(), settings, [], without=("names", "mean", "seed")) == (
        "--no-deterministic --decay 0.5"
    )


# ---------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------


def test_a_folder_is_bound_to_the_settings_that_change_results():
    """As JSON has them; those that say how to run are free, but precision and deterministic."""
    values = bound(Own(seed=3, out="x", names=("a",)))
    assert values == dict(
        precision="auto", deterministic=False, smoke=False, seed=3, side=4, decay=0.5,
        rates=[0.1, 0.2], names=["a"], colour="red", mean=0.0, pair=[1, 2],
    )  # fmt: skip
    assert json.loads(json.dumps(values)) == values


def test_an_empty_folder_is_signed_and_the_same_settings_open_it_again(tmp_path):
    mine, defaults = dict(seed=3, rates=[1, 2]), dict(seed=0, rates=[1, 2])
    open_folder(tmp_path, mine, defaults)
    signed = (tmp_path / "config.json").read_text()
    assert json.loads(signed) == mine
    open_folder(tmp_path, mine, defaults)
    with pytest.raises(UsageError, match="seed 3 → 0"):
        open_folder(tmp_path, defaults, defaults)
    assert (tmp_path / "config.json").read_text() == signed


def test_a_folder_older_than_a_setting_has_its_default(tmp_path):
    open_folder(tmp_path, dict(seed=3), {})
    open_folder(tmp_path, dict(seed=3, new=1), dict(seed=0, new=1))
    with pytest.raises(UsageError, match="new 1 → 2"):
        open_folder(tmp_path, dict(seed=3, new=2), dict(seed=0, new=1))


def test_a_folder_with_a_setting_that_is_gone_is_another_runs(tmp_path):
    open_folder(tmp_path, dict(seed=3, gone=1), {})
    with pytest.raises(UsageError, match="gone 1 → None"):
        open_folder(tmp_path, dict(seed=3), dict(seed=0))


def test_strange_and_damaged_folders_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("It was a dark and stormy night.")
    with pytest.raises(UsageError, match=r"has thesis\.txt and no config\.json"):
        open_folder(tmp_path, {}, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        open_folder(tmp_path, {}, {})


@dataclasses.dataclass(frozen=True)
class Work(HowToRun):
    updates: int = setting(10, "of the network", scales=True, smoke=2)
    warmup: int = setting(0, "of them", scales=True)
    side: int = setting(4, "of a picture")


def test_a_field_says_what_steps_scale_and_smoke_make_of_it():
    """Work that there is stays at least 1, none stays none, and what does not scale stays."""
    half, little = (Work(steps_scale=x).scaled() for x in (0.5, 0.01))
    assert (half.updates, half.warmup, half.side) == (5, 0, 4) and little.updates == 1
    smoke = Work(steps_scale=0.5, smoke=True).scaled()
    assert (smoke.updates, smoke.log_every, smoke.side) == (2, 1, 4)
