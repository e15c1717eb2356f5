"""Runs of several aspect ratios, and of a size that is no square."""

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image

import data
import ladd
import sample
from lib import pictures
from lib.run import Run
from lib.scores import Judge
from tools import report
from tools.train import given_settings

SMALL = "--width 32 --depth 2 --attention-heads 2 --taps 0,1 --precision fp32 --device cpu --smoke "
SMALL += "--judge-width 8 --judge-steps 2"


def parse(words):
    return given_settings(words.split())[0]


def test_at_full_size_the_sides_are_multiples_of_64_pixels():
    """3:2 of 1024²: 832 × 1280 pixels, latents of 104 × 160."""
    s = parse("--preset sd3-8b --aspects 1:1,3:2,2:3")
    assert s.sizes == [(128, 128), (104, 160), (160, 104)]


def test_the_shift_follows_the_number_of_tokens():
    """SD3: α = √(n / n_square) moves a logit by ln α, for t, for t̂ and in the sampler."""
    s = parse("--aspects 1:1,3:2 --t-hat-mean 0.3")
    assert s.logit_shift((16, 16)) == 0
    u, size = torch.linspace(-2, 2, 9, dtype=torch.float64), (12, 20)
    alpha = math.sqrt(12 * 20 / 16**2)
    want = sample.shift_t(torch.sigmoid(u), alpha)
    torch.testing.assert_close(torch.sigmoid(u + s.logit_shift(size)), want)

    levels = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = dict(channels=3)

        def forward(self, x, t, *text):
            levels.append(t[0].item())
            return torch.zeros_like(x), []

    settings = dataclasses.replace(s, shift=3.0)
    generator = sample.Generator(Network(), settings, "teacher", precision="fp32")
    for shape, factor in ((None, 1), ((12, 20), alpha), ((32, 32), 2)):
        levels.clear()
        generator.sample(["a"], steps=5, cfg=1.0, size=shape)
        assert levels == pytest.approx(sample.euler_times(5, 3 * factor)[:-1].tolist())


REFUSED = [("--aspects", word) for word in ("3x2", "0:1", "1:100", "2:1,b")]
REFUSED += [("--size", word) for word in ("0x16", "16x15", "16x66", "16x16x16", "x", "1e1")]


@pytest.mark.parametrize(("flag", "word"), REFUSED)
def test_what_cant_be_had_is_refused_in_one_line(flag, word, capsys):
    try:
        status = ladd.main([flag, word])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and flag in said and said.count("\n") == 1


def test_without_aspects_there_is_one_size():
    assert parse("--size 16x24").sizes == parse("--size 16x24 --aspects=").sizes == [(16, 24)]


def test_a_run_of_an_oblong_size_makes_pictures_of_that_size(tmp_path, capsys):
    """--size 16x24, height × width: in every stage, and without a word about it in sample.py."""
    out = tmp_path / "run"
    words = f"{SMALL} --size 16x24 --out {out} --data-dir {tmp_path}"
    assert ladd.main(words.split()) == 0, capsys.readouterr().err
    (made,) = (out / "synthetic").glob("*.pt")
    assert torch.load(made, weights_only=True)["x0"].shape == (32, 3, 16, 24)
    assert json.loads((out / "config.json").read_text())["size"] == [16, 24]
    assert "student, 1 step" in (out / "report.md").read_text()
    for flags, size in (([], (24, 16)), (["--teacher"], (24, 16)), (["--size", "32x8"], (8, 32))):
        folder = tmp_path / f"pictures{len(flags)}"
        own = ["--prompt", "a red circle on a striped background", "--out", str(folder), *flags]
        assert sample.main([str(out), *own, "--device", "cpu"]) == 0, capsys.readouterr().err
        with Image.open(folder / "00000.png") as picture:
            assert picture.size == size  # width × height


def test_a_run_of_mixed_aspects_makes_and_scores_all_of_them(tmp_path, capsys, monkeypatch):
    """Files of samples hold one shape each; batches, the grids and the table have all shapes."""
    out, shown, read = tmp_path / "run", [], set()
    grid, score = pictures.grid, Judge.read

    def watch_grid(images, *rest):
        shown.append({tuple(image.shape[1:]) for image in images})
        return grid(images, *rest)

    def watch_read(judge, images, *rest):
        read.add(tuple(images.shape[2:]))
        return score(judge, images, *rest)

    for module in (pictures, report):
        monkeypatch.setattr(module, "grid", watch_grid)
    monkeypatch.setattr(Judge, "read", watch_read)
    words = f"{SMALL} --aspects 1:1,3:2,2:3 --out {out} --data-dir {tmp_path}"
    assert ladd.main(words.split()) == 0, capsys.readouterr().err
    sizes = {(16, 16), (12, 20), (20, 12)}
    shards = [torch.load(p, weights_only=True) for p in sorted((out / "synthetic").glob("*.pt"))]
    assert {tuple(shard["x0"].shape[2:]) for shard in shards} == sizes
    assert [i for shard in shards for i in shard["index"]] == list(range(32))
    assert shown and all(shapes == sizes for shapes in shown) and read == sizes
    assert sample.main([str(out), "--evaluate", "--data-dir", str(tmp_path)]) == 0
    assert "student, 1 step" in capsys.readouterr().out

    settings = parse(words)
    dataset = data.load("shapes", settings.sizes)
    run = Run(settings, dataset, data.text_features(dataset, 64, 8), watch=None)
    samples = ladd.distillation_samples(run)
    shapes = Counter()
    for step in range(12):
        batch, again = ladd.draw_batch(run, samples, step), ladd.draw_batch(run, samples, step)
        assert (
            batch.x0.shape == batch.noise.shape and len(batch.x0) == len(batch.text.context) == 16
        )
        shapes[tuple(batch.x0.shape[2:])] += 1
        assert torch.equal(batch.x0, again.x0) and torch.equal(batch.noise, again.noise)
    assert set(shapes) == sizes
