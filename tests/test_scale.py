"""Scale: buckets of aspect ratios, checkpointing, presets of SD3's size, the plan."""

import dataclasses
import math
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ladd
import sample
from mmdit import MMDiT

ASPECTS = ("1:1", "3:2", "2:3", "16:9", "9:16")


def parse(words):
    return ladd.parse(words.split())[0]


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


# ---------------------------------------------------------------------------------------------
# Buckets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "multiple"), [(128, 8), (64, 4), (16, 2)])
def test_buckets_have_equal_areas_and_sides_that_are_multiples(side, multiple):
    """Rounding one side to the unit u changes an area by u/2 of that side at the most."""
    sizes = data.bucket_sizes(side, multiple, ASPECTS)
    assert sizes[0] == (side, side) and len(sizes) == len(ASPECTS)
    for (height, width), aspect in zip(sizes, ASPECTS, strict=True):
        assert height % multiple == 0 and width % multiple == 0
        assert abs(height * width / side**2 - 1) <= multiple / 2 / min(height, width)
        w, h = map(int, aspect.split(":"))
        assert (w > h) == (width > height) and (w < h) == (width < height)
    assert {(w, h) for h, w in sizes} == set(sizes)  # on end as on its side


def test_at_full_size_the_sides_are_multiples_of_64_pixels():
    """3:2 of 1024²: 832 × 1280 pixels, latents of 104 × 160."""
    s = parse("--preset sd3-8b --aspects 1:1,3:2,2:3")
    assert s.sizes == [(128, 128), (104, 160), (160, 104)]


def test_ratios_that_come_out_the_same_are_one_bucket():
    """At 64 pixels and a unit of 8, 4:3 and 5:4 are both 56 × 72; 2:2 is 1:1."""
    assert data.bucket_sizes(64, 8, ("4:3", "5:4", "1:1", "2:2")) == [(56, 72), (64, 64)]


def striped(height, width):
    """A picture whose pixels tell how wide it was; its middle is green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 3 : -(height // 3), width // 3 : -(width // 3)] = (0, 255, 0)
    return Image.fromarray(pixels)


def test_every_image_goes_to_the_bucket_of_the_nearest_aspect_ratio(tmp_path):
    """Nothing is lost or doubled, and each bucket holds out a tenth of its own."""
    shapes = {"square": (40, 42, 30), "wide": (40, 63, 50), "tall": (60, 38, 20)}
    for name, (height, width, n) in shapes.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            striped(height, width).save(tmp_path / name / f"{i}.png")
    sizes = data.bucket_sizes(12, 2, ("1:1", "3:2", "2:3"))
    dataset = data.load(str(tmp_path), 12, 12, sizes=sizes)
    found = {bucket.size: bucket for bucket in dataset.sets}
    assert set(found) == set(sizes)
    for (_, _, n), size, word in zip(shapes.values(), sizes, shapes, strict=True):
        bucket = found[size]
        assert (bucket.train_size, len(bucket.held_out_images)) == (n - n // 10, n // 10)
        images, caption = bucket.batch(np.arange(n))
        assert images.shape == (n, 3, *size)
        assert {bucket.captions[i] for i in caption} == {f"a photo of a {word}"}
        assert (images[:, 1, size[0] // 2, size[1] // 2] == 255).all()
    assert dataset.captions == dataset.sets[0].captions == dataset.sets[2].captions


class Counted:
    def __init__(self, n):
        self.train_size = n


def test_a_batch_comes_from_a_bucket_in_proportion_to_its_images():
    """The draw is a function of (seed, stage, step): asked again, in any order, it is the same."""
    buckets = data.Buckets.__new__(data.Buckets)
    buckets.sets = sets = [Counted(600), Counted(300), Counted(100)]
    draw = lambda seed, stage, n=4000: [  # noqa: E731
        sets.index(data.draw_bucket(buckets, seed, stage, step)) for step in range(n)
    ]
    first = draw(3, 0)
    shares = [first.count(k) / len(first) for k in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)  # four standard errors
    assert sets.index(data.draw_bucket(buckets, 3, 0, 1234)) == first[1234]
    assert draw(3, 1, 100) != first[:100] != draw(4, 0, 100)
    for bucket in sets:
        bucket.train_size = None  # endless
    assert max(Counter(draw(3, 0)).values()) < 4000 / 3 + 120


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_shares_add_up(count):
    buckets = data.Buckets.__new__(data.Buckets)
    buckets.sets = [Counted(600), Counted(300), Counted(100)]
    given = {bucket.train_size: n for bucket, n in data.shares(buckets, count)}
    assert sum(given.values()) == count and min(given.values()) > 0
    assert all(abs(n - count * size / 1000) <= 1 for size, n in given.items())


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

    settings = dataclasses.asdict(s) | dict(shift=3.0)
    generator = sample.Generator(Network(), settings, "teacher", precision="fp32")
    for shape, factor in ((None, 1), ((12, 20), alpha), ((32, 32), 2)):
        levels.clear()
        generator.sample(["a"], steps=5, cfg=1.0, size=shape)
        assert levels == pytest.approx(sample.euler_times(5, 3 * factor)[:-1].tolist())


def test_a_grid_shows_images_of_mixed_sizes_each_in_the_middle_of_its_place():
    images = [torch.full((3, h, w), 10 + h, dtype=torch.uint8) for h, w in ((2, 6), (4, 4), (6, 2))]
    sheet = np.asarray(sample.grid(images, 3, scale=1))
    assert sheet.shape == (8, 24, 3)
    for i, image in enumerate(images):
        _, h, w = image.shape
        cell = sheet[:, 8 * i : 8 * i + 8]
        assert (cell != 255).any(2).sum() == h * w
        assert (cell[(8 - h) // 2 :][:h, (8 - w) // 2 :][:, :w] == 10 + h).all()


SMALL = "--width 32 --depth 2 --heads 2 --taps 0,1 --precision fp32 --device cpu --smoke"


def test_a_run_of_mixed_aspects_makes_and_scores_all_of_them(tmp_path, capsys, monkeypatch):
    """Shards hold one shape each; batches, the grids and the table have all shapes."""
    out, shown, read = tmp_path / "run", [], set()
    grid, score = sample.grid, sample.Judge.read

    def watch_grid(images, *rest):
        shown.append({tuple(image.shape[1:]) for image in images})
        return grid(images, *rest)

    def watch_read(judge, images, *rest):
        read.add(tuple(images.shape[2:]))
        return score(judge, images, *rest)

    monkeypatch.setattr(sample, "grid", watch_grid)
    monkeypatch.setattr(sample.Judge, "read", watch_read)
    words = f"{SMALL} --aspects 1:1,3:2,2:3 --out {out} --data-dir {tmp_path}"
    assert ladd.main(words.split()) == 0, capsys.readouterr().err
    sizes = {(16, 16), (12, 20), (20, 12)}
    shards = [torch.load(p, weights_only=True) for p in sorted((out / "synthetic").glob("*.pt"))]
    assert {tuple(shard["x0"].shape[2:]) for shard in shards} == sizes
    assert [i for shard in shards for i in shard["index"]] == list(range(32))
    assert shown and all(shapes == sizes for shapes in shown) and read == sizes
    assert sample.main([str(out), "--evaluate", "--data-dir", str(tmp_path)]) == 0
    assert "student, 1 step" in capsys.readouterr().out

    run = ladd.Run(parse(f"{words} --distill-weight 1"))
    batch = ladd.distillation_batches(run)
    shapes = Counter()
    for step in range(12):
        x0, text, source = batch(step)
        assert x0.shape == source.shape and len(x0) == len(text[0]) == 16
        shapes[tuple(x0.shape[2:])] += 1
        again = batch(step)
        assert torch.equal(x0, again[0]) and torch.equal(source, again[2])
    assert set(shapes) == sizes


@pytest.mark.parametrize("aspects", ["3x2", "0:1", "", "1:100", "2:1,b"])
def test_aspects_that_cant_be_had_are_refused_in_one_line(aspects, capsys):
    with pytest.raises(SystemExit) as stop:
        ladd.parse(["--aspects", aspects])
    assert stop.value.code == 2
    assert "aspects" in (line := capsys.readouterr().err) and line.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Checkpointing
# ---------------------------------------------------------------------------------------------

TINY = dict(depth=3, width=24, heads=2, patch=2, channels=3, context_dim=10, pooled_dim=6)
TINY |= dict(pos_size=8, qk_norm=True, attn2_blocks=1)


def test_checkpointing_changes_no_velocity_feature_or_gradient():
    """Of the weights and of x, through the taps and through v; and it keeps less for backward."""
    torch.manual_seed(0)
    model = MMDiT(**TINY).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * randn(*parameter.shape, dtype=torch.float64))
    text = randn(2, 5, 10, dtype=torch.float64), randn(2, 6, dtype=torch.float64)
    results, kept = [], []
    for model.checkpointing in (False, True):
        model.zero_grad()
        x = randn(2, 3, 4, 12, dtype=torch.float64).requires_grad_()
        size = []
        pack = lambda tensor, size=size: size.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            v, features = model(
                x, torch.tensor([0.3, 0.8], dtype=torch.float64), *text, taps=(0, 2)
            )
        (v.square().sum() + sum(f.sin().sum() for f in features)).backward()
        grads = [p.grad for p in model.parameters()]
        results.append([v, *features, x.grad, *grads])
        kept.append(sum(size))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 3


# ---------------------------------------------------------------------------------------------
# Presets of the real size
# ---------------------------------------------------------------------------------------------

SIZES = {  # of the released networks, position tables apart
    "--preset sd3-2b": 2_028_328_000,
    "--preset sd3-2b --qk-norm --attn2-blocks 13 --pos-size 384": 2_243_171_520,
    "--preset sd3-8b": 8_056_627_520,
}


@pytest.mark.parametrize("words", SIZES)
def test_the_presets_networks_have_the_released_ones_parameters(words):
    student, teacher, heads, _ = ladd.meta_networks(parse(words))
    for network in (student, teacher):
        assert sum(p.numel() for p in network.parameters()) == SIZES[words]
    assert len(heads.heads) == len(student.joint_blocks)


@pytest.mark.parametrize("preset", ["sd3-2b", "sd3-8b"])
def test_the_real_sizes_follow_what_is_known_of_them(preset):
    s = parse(f"--preset {preset}")
    assert s.m == 1 and s.logit_shift(s.sizes[0]) == 0
    assert ladd.Settings(**{**ladd.PRESETS[preset], "t_hat_mean": None}).m == 1  # by our rule too
    assert s.model()["context_dim"] == 4096 and s.model()["pooled_dim"] == 2048
    optimizer = ladd.make_optimizers(torch.nn.Linear(2, 2), 1e-5, 0.0, s.beta1, s.adam_eps)[0]
    assert optimizer.defaults["eps"] == 1e-15


def test_a_preset_of_latents_without_latents_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ladd.main(["--preset", "sd3-2b", "--device", "cpu"]) == 2
    assert "encoded" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------


def measured(words, out, monkeypatch):
    """Two real updates of `distil` -> the most bytes that PyTorch's allocator held at a time."""
    s = parse(f"{words} --iterations 2 --heads-warmup 0 --synthetic 64 --device cpu --out {out}")
    run = ladd.Run(s)
    monkeypatch.setattr(run, "show", lambda *_: None)
    run.save("teacher", run.seeded(MMDiT, **s.model()), 0)
    shard = dict(x0=randn(64, 3, 16, 16).half(), captions=run.dataset.captions[:64])
    ladd.save(shard | dict(index=list(range(64))), out / "synthetic" / "00000.pt")
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        ladd.distil(run)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return s, int(held.max())


@pytest.mark.parametrize("words", ["", "--taps 0,1,2,3 --batch 16"])
def test_the_plan_of_memory_agrees_with_real_updates(words, tmp_path, monkeypatch):
    """nano in float32: weights, gradients, optimiser and what is kept for backward, within 10 %."""
    s, real = measured(f"--precision fp32 {words}", tmp_path, monkeypatch)
    assert ladd.plan(s)["ways"][False]["total"] == pytest.approx(real, rel=0.1)


def test_the_plan_with_checkpointing_is_not_below_real_updates(tmp_path, monkeypatch):
    """It has the gradients all the time, as accumulation does: up to an eighth too much here."""
    s, real = measured("--precision fp32 --checkpointing", tmp_path, monkeypatch)
    plan = ladd.plan(s)
    assert real <= plan["ways"][True]["total"] < 1.13 * real
    assert plan["ways"][True]["activations"] < plan["ways"][False]["activations"] / 3


def test_the_plan_counts_the_state_of_every_weight():
    """float32: student, average, teacher, 1 + 1 + 1 copies; gradients 1; AdamW 2 of the trained."""
    p = ladd.plan(parse("--precision fp32 --width 32 --depth 2 --taps 0 --batch 2"))
    P, K, share = p["parameters"]["student"], p["parameters"]["heads"], p["share"]
    assert share["weights"] == 4 * (3 * P + K) and share["gradients"] == 4 * (P + K)
    assert share["optimiser"] == pytest.approx(8 * (P + K), rel=0.01)  # and its step counters
    assert share["tables"] == 3 * 4 * 32 * 32**2


# Two blocks of sd3-8b at its full width and length: what is checked is the same for 38.
SHORT = "--preset sd3-8b --depth 2"


def test_an_update_costs_six_forwards_and_eight_with_checkpointing():
    """Student 1 + 2, teacher on fakes 1 + 1, on reals 1; the way back of attention costs 2.5 times
    its forward, for the teacher too, so that with n = 4,250 tokens it is somewhat more."""
    p = ladd.plan(parse(SHORT))
    assert 5.9 < p["ways"][False]["flops"] / p["forward"] < 6.7
    assert 7.8 < p["ways"][True]["flops"] / p["forward"] < 8.8
    D, tokens = 2432, 128 * 128 // 4
    linear = 2 * (12 * D * D * tokens * 2 + (12 + 3) * D * D * 154)  # two blocks; last: pre-only
    attention = 2 * 4 * (tokens + 154) ** 2 * D
    assert p["forward"] / (p["images"]) == pytest.approx(linear + attention, rel=0.02)


def test_more_gpus_divide_state_and_arithmetic():
    one, eight = (ladd.plan(parse(f"{SHORT} --batch 8 --gpus {n}")) for n in (1, 8))
    for name in ("weights", "gradients", "optimiser"):
        assert eight["share"][name] == pytest.approx(one["share"][name] / 8)
    assert eight["share"]["tables"] == one["share"]["tables"]  # buffers are not divided
    assert (one["images"], eight["images"]) == (8, 1)
    assert one["ways"][False]["flops"] == pytest.approx(eight["ways"][False]["flops"], rel=1e-6)
    assert one["ways"][False]["activations"] == pytest.approx(
        8 * eight["ways"][False]["activations"], rel=0.01
    )
    assert one["traffic"] == 0 and one["share"]["gathered"] == 0
    # bf16 gathered 2 + 3 times, float32 gradients once, 7 of 8 parts from elsewhere
    assert eight["traffic"] == pytest.approx(one["parameters"]["student"] * 14 * 7 / 8)


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"{SHORT} --dry-run --gpus 4 --batch 4 --data nowhere"
    assert ladd.main(words.split()) == 0
    text = capsys.readouterr().out
    P = sum(p.numel() for p in ladd.meta_networks(parse(SHORT))[0].parameters())
    assert f"{P:,}" in text and "80 GB" in text and "141 GB" in text
    assert not list(tmp_path.iterdir())


UPDATES = """
import resource, torch, ladd
ladd.train = lambda *arguments: None
assert ladd.main(["--device", "cpu"]) == 0  # as if it had trained

def update():  # 128 MB in parts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 20) for _ in range(32)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(update() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told to")
def test_an_update_takes_the_memory_of_the_last_one_instead_of_asking_the_system_again():
    root = Path(ladd.__file__).parent
    out = subprocess.run([sys.executable, "-c", UPDATES], capture_output=True, text=True, cwd=root)
    first, *_, last = map(int, out.stdout.split())
    assert first > 32  # pages, or huge pages of 2 MB
    assert last < first / 10, out.stdout
