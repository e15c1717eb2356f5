"""The documents say what the runs say."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_table_of_results_is_that_of_the_kept_metrics(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "docs" / "tables.py"), run_name="__main__")
    assert stop.value.code == 0


def test_every_setting_that_the_readme_names_exists():
    import re

    import ladd

    fields = {f"--{name.replace('_', '-')}" for name in ladd.Settings.__dataclass_fields__}
    sampling = {"--prompt", "--prompts", "--steps", "--num", "--evaluate", "--trajectory", "--help"}
    sampling |= {"--export", "--dtype"}
    torchrun = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    sampling |= torchrun | {"--max-restarts"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / "README.md").read_text("utf-8")))
    assert named <= fields | sampling, named - fields - sampling
