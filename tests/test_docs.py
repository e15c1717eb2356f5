"""The documents say what the runs say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import data
import ladd
import sample

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_table_of_results_is_that_of_the_kept_metrics(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "docs" / "tables.py"), run_name="__main__")
    assert stop.value.code == 0


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}


def test_every_flag_that_the_readme_names_exists(capsys):
    for program in (ladd, sample, data):
        with pytest.raises(SystemExit):
            program.main(["--help"])
    known = set(FLAG.findall(capsys.readouterr().out)) | TORCHRUN
    named = set(FLAG.findall((ROOT / "README.md").read_text("utf-8")))
    assert named <= known, named - known
