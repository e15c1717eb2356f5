"""tools/explain.py: what a reader is shown of one batch is what happens."""

import signal

import pytest
from conftest import FEW, TINY, encoded, shard_of, snapshot

import ladd
from tools import explain
from tools.train import given_settings


def test_explain_follows_a_batch_and_says_who_receives_gradient(train, tmp_path, capsys):
    """From the run's own teacher; L_D moves the heads alone, L_G the student alone."""
    out = train("run", "", ["teacher"])
    before, _ = snapshot(tmp_path), capsys.readouterr()
    assert ladd.main([*FEW.split(), "--out", str(out), "--explain"]) == 0
    said, told = capsys.readouterr().out, {}
    for line in said.splitlines():
        if line.startswith("    gradient of "):
            loss, _, _, network, *norm = line.split()[2:]
            told[loss, network.rstrip(":")] = float(norm[1]) if norm[0] == "norm" else None
    assert told.keys() == {(i, n) for i in ("L_D", "L_G") for n in ("student", "teacher", "heads")}
    assert [pair for pair, norm in told.items() if norm] == [("L_D", "heads"), ("L_G", "student")]
    s, _ = given_settings(FEW.split())
    h = s.size[0] // s.patch
    for symbol, *shape in (
        ("x_0", 4, 3, *s.size),
        ("c", 4, s.text_length, s.text_dim),
        ("x̂_0", 4, 3, *s.size),
        (f"f, block {s.tapped[0]}", 4, h * h, s.width),
        ("D(r)", 4, len(s.tapped), h, h),
    ):
        assert any(
            line.startswith(f"{symbol} ") and "×".join(map(str, shape)) in line.split()
            for line in said.splitlines()
        ), symbol
    assert "untrained" not in said and snapshot(tmp_path) == before


@pytest.mark.parametrize("flag", ["--width 32", "--text-dim 8", "--patch 4"])
def test_a_finished_run_of_another_network_is_refused_in_one_line(train, launch, capsys, flag):
    out = train("run", "", ["teacher"])
    capsys.readouterr()
    assert launch(str(out), f"{FEW} --explain {flag}") == 2
    said = capsys.readouterr().err
    assert f"{out}/teacher.pt: another network than the settings'" in said
    assert said.count("\n") == 1


def test_a_cut_explanation_goes_on_as_an_explanation(monkeypatch, tmp_path, capsys):
    """And is no command that would begin a training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explain, "open_data", lambda *_: signal.raise_signal(signal.SIGINT))
    assert ladd.main([*FEW.split(), "--explain"]) == 130
    assert capsys.readouterr().err.rstrip().endswith("--explain")


@pytest.mark.parametrize("flag", ["--teacher", "--from"])
def test_a_teacher_that_is_not_read_is_not_passed_over_in_silence(launch, capsys, flag, tmp_path):
    assert launch("out", f"{FEW} --explain {flag} {tmp_path}") == 2
    said = capsys.readouterr().err
    assert "--explain reads no teacher but out/teacher.pt" in said and said.count("\n") == 1


def test_prompts_alone_are_no_images_to_follow(tmp_path, launch, capsys):
    encoded(tmp_path / "prompts", **{"000001_pt": shard_of(["a", "b"])})
    words = f"{TINY} --downscale 8 --channels 16 --size 32 --data prompts --teacher made.pt"
    assert launch("out", f"{words} --explain") == 2
    assert "--data prompts has prompts alone" in capsys.readouterr().err
