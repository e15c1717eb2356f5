"""lib/checks.py: what is not there is told by its flag. Its other checks are tested in place."""

import pytest
from conftest import FEW

import lib.checks
from methods import hyper_sd
from tools.train import base_of, given_settings


@pytest.mark.parametrize("source", ["a.pt", "gone"])
def test_a_run_to_start_from_that_is_no_folder_is_refused_with_its_flag(
    launch, tmp_path, capsys, source
):
    (tmp_path / "a.pt").touch()
    assert launch("out", f"{FEW} --from {source}") == 2
    said = capsys.readouterr().err
    assert f"--from {source}: is no folder of a run" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_presets_own_values_need_not_fit_what_was_given(monkeypatch):
    """They are for names and defaults: 128 processes divide no teacher's batch of 64 images, and
    the eight levels of Hyper-SD have other probabilities than SD3's four."""
    monkeypatch.setattr(lib.checks, "world", lambda: 128)
    s, _ = given_settings(
        ["--preset", "sd3-8b", "--teacher", "sd3.5_large.safetensors", "--data", "shards"]
    )
    assert base_of(s).teacher_batch % 128 and base_of(s).batch == s.batch
    monkeypatch.undo()
    words = "--preset sd3-2b --data shards --shares 1,1,1,1,0,1 --levels 1,0.75,0.5,0.25"
    assert base_of(given_settings(words.split(), kind=hyper_sd.Settings)[0]).preset == "sd3-2b"
