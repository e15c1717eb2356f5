"""methods/inpaint.py: what the network is told, masks, and runs that fill pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, FEW, NETWORK, PICTURE, SETTINGS, cut_at, everything, randn, same, updates
from PIL import Image
from test_sample import randomise

import ladd
import sample
from lib.conditions import hide, paste, random_masks
from lib.errors import UsageError
from lib.scores import distances
from methods import inpaint
from mmdit import MMDiT

METHOD = dict(distil=inpaint.distil, method="inpaint", kind=inpaint.Settings)
TUNE = "--tune-iterations 4"
LAST = ["distillation"]


def run_to(out, method, flags):
    """A run of a few updates into a folder, for a fixture of the session."""
    words = f"{FEW} {TUNE} {flags} --out {out}".split()
    assert ladd.main(words, **method) == 0
    return out


@pytest.fixture(scope="session")
def fills(tmp_path_factory, whole, cache):
    """A finished run with its report, nobody cut it."""
    out = tmp_path_factory.mktemp("fills") / "run"
    flags = f"--from {whole} --evaluation 20 --judge-steps 5 --sample-every 4 --data-dir {cache}"
    return run_to(out, METHOD, flags)


def picture(path, pixels):
    Image.fromarray(np.uint8(pixels)).save(path)
    return path


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_is_told_more_starts_bit_for_bit_as_the_plain_one(precision):
    """Whatever it is told: velocity and features; and then learns from it."""
    plain = randomise(MMDiT(**NETWORK))
    told = MMDiT(**NETWORK, condition_channels=4)
    missing, surplus = told.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"condition_embedder"} and not surplus
    x, t = randn(3, 3, 8, 8).float(), torch.rand(3)
    text, more = (randn(3, 4, 6).float(), randn(3, 6).float()), randn(3, 4, 8, 8, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        v, features = told(x, t, *text, more, taps=(0,))
        wanted, theirs = plain(x, t, *text, taps=(0,))
    assert torch.equal(v, wanted) and torch.equal(features[0], theirs[0])
    v.square().sum().backward()
    assert told.condition_embedder.proj.weight.grad.abs().min() > 0


def test_a_plain_network_has_the_released_weights_and_no_word_of_conditions():
    """So that checkpoints of before, and SD3's, are read as ever."""
    plain = MMDiT(**NETWORK)
    assert plain.config == NETWORK
    assert not any("condition" in name for name in plain.state_dict())


def test_a_condition_is_embedded_as_more_channels_of_the_latent():
    """One patch embedding of x_t and the condition, side by side."""
    told = randomise(MMDiT(**NETWORK, condition_channels=2))
    x, more = randn(2, 3, 8, 8).float(), randn(2, 2, 8, 8, seed=1).float()
    kernel = torch.cat([told.x_embedder.proj.weight, told.condition_embedder.proj.weight], dim=1)
    bias = told.x_embedder.proj.bias + told.condition_embedder.proj.bias
    both = torch.nn.functional.conv2d(torch.cat([x, more], dim=1), kernel, bias, stride=2)
    torch.testing.assert_close(
        told.x_embedder(x) + told.condition_embedder(more), both.flatten(2).transpose(1, 2)
    )


def test_guidance_takes_away_the_text_alone():
    """Both halves are told the same of every picture, in its own place."""
    asked, told = [], randn(3, 4, 8, 8).float()

    def network(x, t, context, pooled, condition):
        asked.append((context, condition))
        return x, []

    network.config = dict(channels=3, condition_channels=4)
    s = SimpleNamespace(**SETTINGS | dict(size=(8, 8), downscale=1, pooled_dim=0, aspects=()))
    own = dict(precision="fp32", condition=lambda index: told[list(index)])
    generator = sample.Generator(network, s, "teacher", **own)
    generator.sample(["red", "blue", "a"], batch=2, steps=1, cfg=3.0)
    for (context, condition), own in zip(asked, (told[:2], told[2:]), strict=True):
        assert torch.equal(condition, own.repeat(2, 1, 1, 1))
        assert context[: len(own)].any() and not context[len(own) :].any()


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (12, 40)])
def test_masks_cover_10_to_60_percent(size):
    masks = random_masks(0, "masks", range(200), size)
    assert masks.shape == (200, 1, *size)
    share = masks.double().mean(dim=(1, 2, 3))
    assert 0.1 <= share.min() < 0.2 and 0.45 < share.max() <= 0.6


def test_a_mask_is_a_function_of_seed_and_number_alone():
    """The same in any batch; another for another number, seed or stream."""
    three, one = random_masks(5, "a", [7, 8, 9], (16, 16)), random_masks(5, "a", [8], (16, 16))
    assert torch.equal(three[1], one[0]) and not torch.equal(three[0], three[1])
    others = random_masks(6, "a", [8], (16, 16)), random_masks(5, "b", [8], (16, 16))
    assert not any(torch.equal(one, other) for other in others)


def test_what_is_told_has_the_known_pixels_and_nothing_of_the_others():
    x0, mask = randn(5, 3, 16, 16), random_masks(0, "masks", range(5), (16, 16))
    told = hide(x0, mask)
    assert torch.equal(told, hide(torch.where(mask, 99, x0), mask))
    known = ~mask.expand(-1, 3, -1, -1)
    assert torch.equal(told[:, :3][known], x0[known])
    assert torch.equal(told[:, 3:], mask.double())


def test_pasting_keeps_known_pixels_exactly_and_all_that_was_made():
    x0, made = randn(5, 3, 16, 16), randn(5, 3, 16, 16, seed=1)
    mask = random_masks(0, "masks", range(5), (16, 16))
    made[0, 0, 0, 0] = torch.nan if not mask[0, 0, 0, 0] else 0
    assert torch.equal(paste(made, hide(x0, mask)), torch.where(mask, made, x0))


def test_distances_are_of_the_region_and_of_the_rest():
    truth, region = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([[[[1, 1], [0, 0]]]])
    images = truth.clone()
    images[0, :, 0, 0], images[0, 2, 1, 1] = 30, 12
    assert distances(images, truth, region.bool()) == dict(inside=15, outside=2)


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def test_student_and_frozen_teacher_are_told_the_same_of_real_images(train, whole, monkeypatch):
    """In LADD's own update: fakes and reals, x_0 with the pixels that are told."""
    seen, features = [], ladd.features_of_both
    monkeypatch.setattr(ladd, "features_of_both", lambda *a: seen.append(a) or features(*a))
    train("out", f"--from {whole} {TUNE}", LAST, **METHOD)
    student, teacher, b, s = seen[-1]
    assert s.targets == "real" and s.distill_weight > 0
    mask = b.text.condition[:, 3:].bool()
    assert torch.equal(b.text.condition, hide(b.x0, mask))
    for network in (student, teacher):
        assert network.condition_embedder.proj.weight.any()
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_tuned_from_the_given_one(fills, whole):
    """Its blocks learn, too, and what it was is left in the run that it came from."""
    before, after = (sample.read_checkpoint(run / "teacher.pt") for run in (whole, fills))
    assert "condition_channels" not in before["model"]
    assert after["model"]["condition_channels"] == 4
    moved = {k: (w - after["weights"][k]).abs().max() for k, w in before["weights"].items()}
    assert max(moved.values()) < 0.1 and moved["joint_blocks.0.x_block.attn.qkv.weight"] > 0
    assert [row["step"] for row in updates(fills) if row["stage"] == "tuning"] == [1, 2, 3, 4]
    assert {path.name for path in fills.glob("samples/*")} >= {"tuning-000004.png"}


def test_the_report_keeps_known_pixels_in_every_row(fills):
    """And tells how far the filled ones are from the truth; of what is given it is far."""
    rows = json.loads((fills / "metrics.json").read_text())["rows"]
    assert [row["outside"] for row in rows[1:]] == [0] * (len(rows) - 1)
    assert all(row["inside"] > 1 for row in rows[1:]) and "inside" not in rows[0]
    assert rows[-1]["name"] == "as given" and "| inside | outside |" in (
        fills / "report.md"
    ).read_text("utf-8")


def check_that_a_cut_run_goes_on(train, flags, monkeypatch, **method):
    """Cut after the second update of either stage: as the run that was not, and no state stays."""
    flags += f" {TUNE} --save-every 2"
    want = train("want", flags, LAST, **method)
    for stage in ("tuning", "distillation"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, stage, 2)
            train("cut", flags, LAST, **method)
    cut = train("cut", flags, LAST, **method)
    for kind in ("teacher", "student"):
        assert same(want / f"{kind}.pt", cut / f"{kind}.pt")
    assert updates(want) == updates(cut)
    assert not list(cut.glob("*state*"))


def test_a_run_that_was_cut_goes_on_bit_for_bit(train, whole, monkeypatch):
    check_that_a_cut_run_goes_on(train, f"--from {whole}", monkeypatch, **METHOD)


def test_another_seed_takes_the_tuned_teacher(train, fills):
    out = train("out", f"--from {fills} {TUNE} --seed 1", LAST, **METHOD)
    assert same(out / "teacher.pt", fills / "teacher.pt")
    assert not same(out / "student.pt", fills / "student.pt")
    assert not any(row["stage"] == "tuning" for row in updates(out))


def test_adapters_learn_on_the_tuned_teacher(train, fills):
    out = train("out", f"--from {fills} {TUNE} --lora 2", LAST, **METHOD)
    generator = sample.load_generator(out, device="cpu")
    assert generator.model.lora == 2 and generator.model.condition_embedder.proj.weight.any()


REFUSED = {
    "a tuned teacher for LADD": ({}, "--from {fills}", "tuned to what this method does not give"),
    "the same by its file": ({}, "--teacher {fills}/teacher.pt", "condition_channels 4"),
    "samples as targets": (METHOD, "--targets synthetic", "--targets synthetic: must be one of"),
    "sizes": (METHOD, "--aspects 1:1,2:1", "--aspects 1:1,2:1"),
    "latents": (METHOD, "--downscale 2", "--downscale 2"),
    "two pixels": (METHOD, "--size 2", "--size 2,2: too small"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_there_is_a_folder(
    launch, fills, tmp_path, capsys, case
):
    method, flags, named = REFUSED[case]
    words = f"{FEW} {flags.format(fills=fills)} --stage distillation"
    assert launch("out", words, **method) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# sample.py
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A picture, and masks for it."""
    random, half = np.random.default_rng(0), np.arange(12) < 6
    picture(tmp_path / "a.png", random.integers(0, 255, (12, 12, 3)))
    masks = dict(m=half[:, None] * 255, all=255, none=0, wide=np.zeros((12, 24)))
    for name, values in masks.items():
        values = values if name == "wide" else values + np.zeros((12, 12))
        picture(tmp_path / f"{name}.png", values)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "other.png").write_bytes(PICTURE)
    return tmp_path


def test_the_known_pixels_of_a_picture_come_back_exactly(fills, files):
    """In the PNG itself; white is what is filled."""
    words = [fills, "--init-image", files / "a.png", "--mask", files / "m.png", *CPU]
    words += ["--prompt", "a red circle", "--num", 3, "--out", files / "made"]
    assert sample.main([*map(str, words)]) == 0
    given = np.asarray(Image.open(files / "a.png"))
    made = [np.asarray(Image.open(path)) for path in sorted((files / "made").glob("*.png"))]
    assert len(made) == 3
    for image in made:
        assert (image[6:] == given[6:]).all() and (image[:6] != given[:6]).mean() > 0.5
    assert (made[0] != made[1]).any()  # each from its own noise


BAD = {
    "of another size": ("{run} --init-image a.png --mask wide.png", "12 × 24"),
    "all of it": ("{run} --init-image a.png --mask all.png", "all of it is white"),
    "nothing of it": ("{run} --init-image a.png --mask none.png", "none of it is white"),
    "no picture": ("{run} --init-image a.png --mask text.png", "--mask text.png: can't be read"),
    "no file": ("{run} --init-image a.png --mask gone.png", "--mask gone.png: can't be read"),
    "without an image": ("{run} --mask m.png", "--mask: is for --init-image"),
    "no mask": ("{run} --init-image a.png", "give one with --init-image, and --mask"),
    "neither": ("{run}", "give one with --init-image, and --mask"),
    "bad image": ("{run} --init-image text.png --mask m.png", "--init-image text.png"),
    "strength": ("{run} --init-image a.png --mask m.png --strength 0.5", "--strength 0.5"),
    "a plain run": ("{plain} --init-image a.png --mask m.png", "fills no pictures"),
    "scores": ("{run} --evaluate", "report.md"),
    "export": ("{run} --export a.safetensors", "--export a.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mask_or_picture_that_does_not_fit_is_one_line(fills, whole, files, refused, case):
    words, named = BAD[case]
    words = words.format(run=fills, plain=whole).split()
    if not {"--evaluate", "--export"} & set(words):
        words += ["--prompt", "red"]
    refused(sample, [*words, *CPU], 2, named)


def test_a_refused_picture_leaves_the_one_of_before(fills, files):
    (files / "samples.png").write_bytes(PICTURE)
    before = everything(files)
    words = [fills, "--init-image", files / "a.png", "--mask", files / "all.png", *CPU]
    assert sample.main([*map(str, words), "--prompt", "x"]) == 2
    assert everything(files) == before


def test_a_network_that_needs_to_be_told_says_so(fills):
    with pytest.raises(UsageError, match="--init-image"):
        sample.load_generator(fills, device="cpu").sample(["a"])
