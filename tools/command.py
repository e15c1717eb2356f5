"""The command line of ladd.py and of every method: the settings that it asks for, and the tool.

A preset's row, with every flag replacing a field; then --smoke and --steps-scale are worked in.
"""

import dataclasses
import importlib
from functools import partial
from pathlib import Path

import ladd
from lib.settings import parse_settings

SMOKE = dict(
    teacher_iterations=2, teacher_batch=16, synthetic=32, synthetic_steps=4, heads_warmup=0,
    tune_iterations=2, iterations=2, batch=16, evaluation=32, teacher_steps=4, judge_steps=20,
    log_every=1, sample_every=2,
)  # fmt: skip
SCALED = (
    "teacher_iterations", "heads_warmup", "iterations", "synthetic", "evaluation", "tune_iterations"
)  # fmt: skip
TOOLS = {"--explain": "explain", "--dry-run": "plan", "--sweep": "sweep"}
EPILOG = "Also: --explain, --dry-run and --sweep, which are tools/explain.py, plan.py and sweep.py."


def scaled(s):
    """The settings with the levels' probabilities, --smoke and --steps-scale worked in."""
    others = len(s.levels) - 1
    changes = dict(level_p=s.level_p or (0.4, *[round(0.6 / max(1, others), 4)] * others))
    if s.steps_scale != 1:
        for name in filter(partial(hasattr, s), SCALED):  # some are a method's own
            value = getattr(s, name)
            changes[name] = min(value, 1) and max(1, round(value * s.steps_scale))
    if s.smoke:
        changes |= {name: value for name, value in SMOKE.items() if hasattr(s, name)}
    return dataclasses.replace(s, **changes)


def base_of(s):
    """The settings of the preset alone."""
    return scaled(type(s)(**ladd.PRESETS[s.preset]))


def settings_of(argv, program="ladd.py", kind=ladd.Settings):
    """The command line -> settings of that kind, and whether --data was given."""
    about = ladd.__doc__.splitlines()[0]
    s, given = parse_settings(kind, ladd.PRESETS, argv, program, about, EPILOG)
    out = f"runs/{s.preset}"
    if program.startswith("-m methods."):
        out += "-" + program.split(".")[-1]
    if s.data != ladd.PRESETS[s.preset].get("data", "shapes"):
        out += "-" + Path(s.data).stem
    return scaled(dataclasses.replace(s, out=s.out or out)), "data" in given


def main(argv, *options):
    """Runs the tool that a flag names, or trains. options: of tools/train.py"""
    for flag, tool in TOOLS.items():
        if any(word.split("=")[0] == flag for word in argv):
            return importlib.import_module(f"tools.{tool}").main(argv)
    return importlib.import_module("tools.train").main(argv, *options)
