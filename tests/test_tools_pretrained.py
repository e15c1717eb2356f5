"""pretrained/nano draws what its metrics.json says, and runs can start from it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lines
from PIL import Image

import data
import ladd
import sample
from lib.report import read_metrics
from tools import pretrained

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "pretrained" / "nano"
CPU = ["--device", "cpu", "--precision", "fp32"]
PROMPT = "a large red circle on a plain blue background"
KNOWN = dict(teacher_loss=0.1281, centre=[225, 44, 47], corner=[41, 82, 220])


def test_the_folder_is_small_and_its_scores_are_of_its_own_files():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    names = [row["name"] for row in read_metrics(FOLDER)["rows"]]
    assert "teacher, 32 steps, CFG 4" in names and "student, 1 step" in names


def test_its_teacher_has_its_loss():
    """Of 64 held-out images at even noise levels; rounding differs between machines."""
    teacher = sample.load_generator(FOLDER, True, "cpu", "fp32")
    dataset = data.load("shapes", sample.latent_sizes(teacher.settings))
    images, caption = dataset.batch(range(64), held_out=True)
    x0, text = data.to_float(images), teacher.text_encoder([dataset.captions[i] for i in caption])
    noise = sample.noise_of(0, "known numbers", range(64), x0.shape[1:])
    with torch.no_grad():
        loss = ladd.teacher_loss(teacher.model, x0, text, torch.linspace(0.01, 0.99, 64), noise)
    assert loss.item() == pytest.approx(KNOWN["teacher_loss"], rel=0.01)


def test_the_first_command_after_a_clone_draws_the_known_picture(tmp_path):
    """A red circle on blue, with the pixels that are known."""
    words = [f"{FOLDER}", "--prompt", PROMPT, "--out", f"{tmp_path}/out", *CPU]
    assert sample.main(words) == 0
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        image = np.asarray(picture).astype(int)
    (red, _, blue), corner = image[8, 8], image[0, 0]
    assert red > 150 > 100 > blue and corner[2] > 150 > 100 > corner[0]
    assert image[8, 8].tolist() == pytest.approx(KNOWN["centre"], abs=8)
    assert corner.tolist() == pytest.approx(KNOWN["corner"], abs=8)


@pytest.mark.parametrize("flag", ["--teacher", "--from"])
def test_a_run_that_starts_from_it_trains_no_teacher(launch, tmp_path, flag):
    """With its heads, too, which have no moments of an optimiser."""
    given = f"{FOLDER}/teacher.pt" if flag == "--teacher" else f"{FOLDER}"
    words = f"{flag} {given} --discriminator {FOLDER}/heads.pt --device cpu --log-every 1 "
    words += "--synthetic 8 --synthetic-steps 1 --batch 4 --iterations 2 --heads-warmup 0 "
    words += "--evaluation 8 --judge-steps 2 --judge-width 8"
    for stage in ("teacher", "synthesis", "distillation"):
        assert launch("run", f"{words} --stage {stage}") == 0
    stages = [row.get("stage") for row in lines(tmp_path / "run")]
    assert "distillation" in stages and "teacher" not in stages


def test_a_published_folder_has_rounded_weights_and_no_path_of_its_maker(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run, out = tmp_path / "run", tmp_path / "published"
    metrics = dict(checkpoints=pretrained.fingerprints(run), rows=[])
    (run / "metrics.json").write_text(json.dumps(metrics))
    pretrained.publish(run, out)
    for kind in ("teacher", "student", "heads"):
        assert (out / f"{kind}.pt").stat().st_size < 0.7 * (run / f"{kind}.pt").stat().st_size
        mine, theirs = (torch.load(f / f"{kind}.pt", weights_only=True) for f in (out, run))
        assert str(tmp_path) not in str(mine["settings"]) and "optimizer" not in mine
        for name, weight in theirs["weights"].items():
            assert torch.equal(mine["weights"][name], weight.bfloat16()), name
    assert read_metrics(out)["rows"] == []


@pytest.mark.parametrize("fault", ["heads.pt: no such file", "student.pt: holds teacher"])
def test_a_run_that_lacks_a_part_is_refused_before_anything_is_made(whole, tmp_path, capsys, fault):
    run, out = shutil.copytree(whole, tmp_path / "run"), tmp_path / "out"
    if fault == "heads.pt: no such file":
        (run / "heads.pt").unlink()
    else:
        shutil.copy(run / "teacher.pt", run / "student.pt")
    metrics = dict(checkpoints=pretrained.fingerprints(run), rows=[])
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert pretrained.main([f"{run}", f"{out}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and fault in said and not out.exists()


@pytest.mark.parametrize("fault", ["unfinished", "there already"])
def test_what_can_not_be_published_is_named_in_one_line(whole, tmp_path, capsys, fault):
    out = tmp_path / "out"
    if fault == "there already":
        shutil.copytree(whole, out)
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    assert pretrained.main([f"{whole}", f"{out}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("metrics.json" if fault == "unfinished" else str(out)) in said
    assert before == {path: path.read_bytes() for path in out.rglob("*.pt")}
