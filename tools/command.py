"""The command line of ladd.py and of every method: the settings that it asks for, and the tool.

A preset's row, with every flag replacing a field; then --smoke and --steps-scale are worked in.
"""

import dataclasses
import importlib
from pathlib import Path

import ladd
from lib.settings import parse_settings

TOOLS = {"--explain": "explain", "--dry-run": "plan", "--sweep": "sweep"}
EPILOG = "Also: --explain, --dry-run and --sweep, which are tools/explain.py, plan.py and sweep.py."


def base_of(s):
    """The settings of the preset alone."""
    return type(s)(**ladd.PRESETS[s.preset]).scaled()


def given_settings(argv, program="ladd.py", kind=ladd.Settings):
    """The command line -> settings of that kind, and whether --data was given."""
    about = ladd.__doc__.splitlines()[0]
    s, given = parse_settings(kind, ladd.PRESETS, argv, program, about, EPILOG)
    out = f"runs/{s.preset}"
    if program.startswith("-m methods."):
        out += "-" + program.split(".")[-1]
    if s.data != ladd.PRESETS[s.preset].get("data", "shapes"):
        out += "-" + Path(s.data).stem
    return dataclasses.replace(s, out=s.out or out).scaled(), "data" in given


def main(argv, *options):
    """Runs the tool that a flag names, or trains. options: of tools/train.py"""
    for flag, tool in TOOLS.items():
        if any(word.split("=")[0] == flag for word in argv):
            return importlib.import_module(f"tools.{tool}").main(argv)
    return importlib.import_module("tools.train").main(argv, *options)
