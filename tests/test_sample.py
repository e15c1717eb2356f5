"""Rectified flow, the samplers, the generator, and the command line of sample.py.

The mathematics is compared with closed forms: a single data point, whose velocity field is known
and straight, and Gaussian data, whose field is known and curved. The command line runs in this
process on a folder that `ladd.py --smoke` made and whose weights are then drawn at random, so that
every option shows in the pixels.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, MAKING, PICTURE, everything, folder, randn, run_folder, seeded
from PIL import Image

import ladd
import sample
from lib.errors import CheckpointError
from mmdit import MMDiT

EXACT = dict(rtol=1e-10, atol=1e-10)
SINGLE = dict(rtol=1e-5, atol=1e-5)  # for what is computed in float32


def randomise(model, seed=0):
    """Weights N(0, 1/fan_in), biases a tenth: outputs of size one that hang on every input."""
    generator = seeded(seed)
    for p in model.parameters():
        scale = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


class Field:
    """A stand-in for the network: a velocity v(x, t), and a record of what it was asked."""

    def __init__(self, velocity, channels=3):
        self.velocity, self.asked, self.config = velocity, [], dict(channels=channels)

    def __call__(self, x, t, *text):
        assert t.shape == x.shape[:1]
        self.asked.append((x, t, text))
        return self.velocity(x, sample.per_sample(t.double(), x)), []

    @property
    def levels(self):
        """The noise level of every call, which must be one for the whole batch."""
        assert all((t == t[0]).all() for _, t, _ in self.asked)
        return [t[0].item() for _, t, _ in self.asked]


# ---------------------------------------------------------------------------------------------
# Rectified flow
# ---------------------------------------------------------------------------------------------


def test_x0_comes_back_from_xt_and_the_velocity():
    """x_t - t·(ε - x_0) = x_0 for every t, one t per sample. Dyadic numbers: exact in float32."""
    x0 = torch.randint(-8, 9, (5, 3, 2, 4), generator=seeded(1)) / 8
    noise = torch.randint(-8, 9, (5, 3, 2, 4), generator=seeded(2)) / 8
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    xt = sample.add_noise(x0, noise, t)
    assert torch.equal(sample.predict_x0(xt, noise - x0, t), x0)


def test_noising_goes_from_the_data_at_0_to_the_noise_at_1():
    """x_0 at t = 0, ε at t = 1, and a quarter of the noise at t = 1/4."""
    x0, noise = randn(3, 2, 4, 5, seed=1), randn(3, 2, 4, 5, seed=2)
    t = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    want = torch.stack([x0[0], noise[1], 0.75 * x0[2] + 0.25 * noise[2]])
    torch.testing.assert_close(sample.add_noise(x0, noise, t), want, **EXACT)


def test_the_velocity_is_the_derivative_of_xt_by_t():
    """dx_t/dt = ε - x_0, by automatic differentiation."""
    x0, noise = randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(
        lambda t: sample.add_noise(x0, noise, t), t, torch.ones_like(t)
    )
    torch.testing.assert_close(derivative, noise - x0, **EXACT)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-2.0, 0.5)])
def test_logit_normal_has_its_quantiles(mean, std):
    """P(t < sigmoid(m + s·Φ⁻¹(q))) = q; the median is sigmoid(m)."""
    t = sample.logit_normal(100_000, mean, std, np.random.default_rng(0))
    q = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    bounds = torch.sigmoid(mean + std * torch.special.ndtri(q))
    share = (t[:, None] < bounds).double().mean(dim=0)
    torch.testing.assert_close(share, q, rtol=0, atol=0.006)  # four standard errors


def test_the_shift_keeps_0_and_1():
    for alpha in (0.5, 1.0, 3.0):
        ends = sample.shift_t(torch.tensor([0.0, 1.0], dtype=torch.float64), alpha)
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), **EXACT)


def test_the_shift_multiplies_the_odds_by_alpha():
    """t'/(1 - t') = α·t/(1 - t)."""
    t = torch.linspace(0.02, 0.98, 17, dtype=torch.float64)
    shifted = sample.shift_t(t, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t), **EXACT)


def test_two_shifts_are_one_by_the_product():
    """shift(a)∘shift(b) = shift(a·b)."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    twice = sample.shift_t(sample.shift_t(t, 0.7), 5.0)
    torch.testing.assert_close(twice, sample.shift_t(t, 3.5), **EXACT)


def test_a_shifted_logit_normal_is_the_logit_normal_moved_by_ln_alpha():
    """shift_α of logit-normal(0, 1) is logit-normal(ln α, 1), draw by draw."""
    shifted = sample.shift_t(sample.logit_normal(1000, 0.0, 1.0, np.random.default_rng(0)), 3.0)
    moved = sample.logit_normal(1000, math.log(3.0), 1.0, np.random.default_rng(0))
    torch.testing.assert_close(shifted, moved, **SINGLE)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_times_fall_from_exactly_1_to_exactly_0(steps, alpha):
    """The classic off-by-one ends above 0 and leaves noise in every sample."""
    times = sample.euler_times(steps, alpha)
    assert len(times) == steps + 1
    assert times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()


def test_euler_times_are_the_shifted_even_grid():
    """{1, 3/4, 1/2, 1/4, 0} shifted by 3 is {1, .9, .75, .5, 0}."""
    want = torch.tensor([1, 0.9, 0.75, 0.5, 0])
    torch.testing.assert_close(sample.euler_times(4, 3.0), want)


@pytest.mark.parametrize(
    ("steps", "want"),
    [(1, [1.0]), (2, [1.0, 0.5]), (3, [1.0, 0.75, 0.5]), (4, [1.0, 0.75, 0.5, 0.25])],
)
def test_fewer_steps_visit_a_part_of_the_trained_levels(steps, want):
    """Always from 1; 2 steps of {1, .75, .5, .25} are {1, .5}."""
    assert sample.student_levels((1.0, 0.75, 0.5, 0.25), steps) == want


@pytest.mark.parametrize("steps", [0, 5, -1])
def test_a_student_refuses_steps_that_it_was_not_trained_for(steps):
    with pytest.raises(ValueError, match=f"1 to 4 steps, not {steps}"):
        sample.student_levels((1.0, 0.75, 0.5, 0.25), steps)


# ---------------------------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------------------------


def last(path):
    *_, x0 = path
    return x0


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_lands_exactly_on_a_single_data_point(steps):
    """All data at x*: v(x, t) = (x - x*)/t, a straight line that any number of steps follows."""
    point = randn(2, 3, 4, 5, seed=1, dtype=torch.float32)
    field = Field(lambda x, t: (x - point) / t)
    noise = randn(2, 3, 4, 5, seed=2, dtype=torch.float32)
    for x0 in sample.euler(field, noise, sample.euler_times(steps), ()):
        torch.testing.assert_close(x0, point, **SINGLE)
    assert len(field.asked) == steps


def gaussian_field(mean, std):
    """E[ε - x_0 | x_t] of data N(μ, s²): its flow takes z to μ + s·z.

    x_t ~ N((1-t)·μ, σ_t²), σ_t² = (1-t)²·s² + t²;  v = -μ + (t - (1-t)·s²)/σ_t² · (x - (1-t)·μ)"""
    variance = lambda t: (1 - t) ** 2 * std**2 + t**2  # noqa: E731
    slope = lambda t: (t - (1 - t) * std**2) / variance(t)  # noqa: E731
    return Field(lambda x, t: -mean + slope(t) * (x - (1 - t) * mean))


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_euler_converges_to_a_gaussian_at_first_order(alpha):
    """The error at x = μ + s·z halves when the steps double."""
    z = randn(3, 1, 4, 5)
    errors = []
    for steps in (64, 128, 256):
        times = sample.euler_times(steps, alpha)
        x0 = last(sample.euler(gaussian_field(0.7, 0.3), z, times, ()))
        errors.append((x0 - (0.7 + 0.3 * z)).abs().max().item())
    assert errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_euler_starts_where_its_times_start():
    """From x_t at t = 0.4 of a Gaussian's path the same end is reached as from its noise."""
    z, t = randn(2, 1, 3, 5), 0.4
    std = ((1 - t) ** 2 * 0.3**2 + t**2) ** 0.5
    times = sample.euler_times(256) * t
    x0 = last(sample.euler(gaussian_field(0.7, 0.3), (1 - t) * 0.7 + std * z, times, ()))
    torch.testing.assert_close(x0, 0.7 + 0.3 * z, rtol=0, atol=0.01)


def text_field():
    """A network that answers with its pooled text: the velocity tells which caption it saw."""

    def velocity(x, t):
        pooled = field.asked[-1][2][1]
        return pooled[:, :1, None, None].expand_as(x)

    field = Field(velocity)
    return field


def text_pair(B, M=3):
    """Captions of B samples, and one empty caption, told apart by their pooled vectors."""
    text = (torch.zeros(B, M, 6), torch.arange(1.0, B + 1)[:, None].expand(B, 2))
    return text, (torch.zeros(1, M, 6), torch.full((1, 2), -4.0))


@pytest.mark.parametrize("scale", [0.0, 3.0, -0.5])
def test_guidance_goes_from_the_unconditional_velocity_through_the_conditional_one(scale):
    """v = v_uncond + w·(v_cond - v_uncond), for every sample with its own caption."""
    text, uncond = text_pair(B=3)
    v = sample.guided_velocity(
        text_field(), randn(3, 2, 4, 5), torch.tensor(0.5), text, uncond, scale
    )
    want = -4 + scale * (torch.arange(1.0, 4) + 4)
    assert torch.equal(v[:, 0, 0, 0], want)


def test_guidance_takes_one_forward_of_a_doubled_batch():
    """Both halves see the same x_t and t."""
    text, uncond = text_pair(B=3)
    x, field = randn(3, 2, 4, 5), text_field()
    sample.guided_velocity(field, x, torch.tensor(0.5), text, uncond, 2.0)
    ((asked_x, asked_t, asked_text),) = field.asked
    assert torch.equal(asked_x, torch.cat([x, x]))
    assert asked_t.tolist() == [0.5] * 6
    assert [len(part) for part in asked_text] == [6, 6]


def test_without_guidance_there_is_no_second_half():
    """At w = 1 the unconditional velocity cancels out, and must cost nothing."""
    text, uncond = text_pair(B=3)
    field = text_field()
    v = sample.guided_velocity(field, randn(3, 2, 4, 5), torch.tensor(0.5), text, uncond, 1)
    assert [len(x) for x, _, _ in field.asked] == [3]
    assert v[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_renoising_is_written_out_by_hand(eta):
    """x̂_0 = x - t·v at every level; to the next one x = (1 - t)·x̂_0 + t·ε, where ε is mixed from
    the predicted noise x̂_0 + v and a fresh one: √(1 - η²) of the one and η of the other."""
    levels, asked_for = [1.0, 0.75, 0.25], []
    fresh = {i: randn(2, 3, 4, 5, seed=10 + i, dtype=torch.float32) for i in (1, 2)}
    x = randn(2, 3, 4, 5, seed=1, dtype=torch.float32)
    field = Field(lambda x, t: torch.sin(3 * x))

    def noise(i):
        asked_for.append(i)
        return fresh[i]

    got = list(sample.renoise(field, x, levels, (), noise, eta))
    want, t = [], 1.0
    for i, t_next in enumerate([0.75, 0.25, 0.0], 1):
        v = torch.sin(3 * x)
        want.append(x - t * v)
        if i < 3:
            mixed = (1 - eta**2) ** 0.5 * (want[-1] + v) + eta * fresh[i]
            x, t = (1 - t_next) * want[-1] + t_next * mixed, t_next
    torch.testing.assert_close(got, want, **SINGLE)
    assert field.levels == levels  # these and no others
    assert asked_for == ([1, 2] if eta else [])  # fresh at every step, none after the last x̂_0


def test_without_fresh_noise_renoising_is_eulers_method_on_the_levels():
    """x_t' = x̂_0·(1 - t') + ε̂·t' = x_t + (t' - t)·v: 0 fresh noise follows the velocity."""
    x = randn(2, 3, 4, 5, seed=1, dtype=torch.float32)
    field = Field(lambda x, t: torch.sin(3 * x) + t)
    few = list(sample.renoise(field, x, [1.0, 0.6, 0.1], (), None, 0.0))
    euler = list(sample.euler(field, x, torch.tensor([1.0, 0.6, 0.1, 0.0]), ()))
    torch.testing.assert_close(few, euler, **SINGLE)


def test_diffusers_euler_scheduler_with_the_levels_as_sigmas_makes_the_same_sample():
    """What an exported student needs: FlowMatchEulerDiscreteScheduler, no shift of its own."""
    diffusers = pytest.importorskip("diffusers")
    levels = [1.0, 0.55, 0.3, 0.1]
    x = randn(2, 3, 4, 5, seed=1, dtype=torch.float32)
    field = Field(lambda x, t: torch.sin(3 * x) + t)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=levels)
    there = x
    for t in scheduler.timesteps:
        v, _ = field(there, (t / 1000).expand(2))
        there = scheduler.step(v.float(), t, there).prev_sample
    here = last(sample.renoise(field, x, levels, (), None, 0.0))
    torch.testing.assert_close(here, there, **SINGLE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_renoising_a_single_data_point_gives_that_point_at_every_step(eta):
    """A perfect prediction comes out clean: nothing is added to the last x̂_0."""
    point = randn(1, 3, 4, 5, seed=1, dtype=torch.float32)
    field = Field(lambda x, t: (x - point) / t)
    noise = randn(2, 3, 4, 5, seed=2, dtype=torch.float32)
    for x0 in sample.renoise(field, noise, [1.0, 0.5], (), lambda i: noise.flip(0), eta):
        torch.testing.assert_close(x0, point.expand(2, -1, -1, -1), **SINGLE)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_mix_of_noises_keeps_the_variance_of_noise(eta):
    """Data at 0 of a perfect student: x_t = t·ε has variance t² whatever η is."""
    field = Field(lambda x, t: x / t)
    noise = [randn(20_000, 1, 1, 1, seed=i, dtype=torch.float32) for i in range(2)]
    list(sample.renoise(field, noise[0], [1.0, 0.5], (), noise.__getitem__, eta))
    x, _, _ = field.asked[1]
    assert x.var().item() == pytest.approx(0.25, rel=0.04)


# ---------------------------------------------------------------------------------------------
# The generator
# ---------------------------------------------------------------------------------------------


SETTINGS = dict(
    text_dim=6, text_length=4, levels=(1.0, 0.75, 0.5, 0.25), teacher_steps=5, cfg=3.0, shift=2.0,
    size=(8, 8), patch=2, pos_size=8, downscale=1, aspects=(), data="shapes", seed=0, eta=0.0,
)  # fmt: skip
NETWORK = dict(depth=2, width=16, heads=2, patch=2, channels=3, context_dim=6, pooled_dim=6)
CAPTIONS = ["a red circle", "a blue cross", "", "a large square", "green"]


def network(seed=0):
    return randomise(MMDiT(**NETWORK, pos_size=8, qk_norm=False), seed).requires_grad_(False)


def settings(**changes):
    return SimpleNamespace(**SETTINGS | changes)


def generator(kind="student", model=None):
    return sample.Generator(model or network(), settings(), kind, precision="fp32")


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_an_image_is_the_same_in_any_batch_size(kind):
    """Batches of 1, 3 and all: the same noise, the same caption, the same image."""
    made = generator(kind)
    together = made.sample(CAPTIONS, seed=3, batch=256)
    assert together.shape == (5, 3, 8, 8)
    for batch in (1, 3):
        part = made.sample(CAPTIONS, seed=3, batch=batch)
        torch.testing.assert_close(part, together, rtol=1e-4, atol=1e-4)
    assert together.std(dim=0).mean() > 0.1  # and the images differ from each other


def test_images_are_numbered_so_that_shards_agree_with_the_whole():
    """Images 3 and 4, made alone under their numbers, are those of the whole batch."""
    made = generator()
    whole = made.sample(CAPTIONS, seed=3)
    shard = made.sample(CAPTIONS[3:], np.arange(3, 5), seed=3)
    torch.testing.assert_close(shard, whole[3:], rtol=1e-4, atol=1e-4)


def test_a_student_renoises_on_its_levels_with_noise_of_every_images_own():
    """With v = 0 is x̂_0 = x_t: every step's noise can be read off the samples."""
    field = Field(lambda x, t: torch.zeros_like(x))
    steps = list(generator("student", field).trajectory(["", ""], [7, 4], seed=3, eta=1.0))
    noise = [sample.noise_of(3, "sampling", [7, 4], (3, 8, 8), step) for step in range(4)]
    want = [noise[0]]
    for t, fresh in zip((0.75, 0.5, 0.25), noise[1:], strict=True):
        want.append((1 - t) * want[-1] + t * fresh)
    torch.testing.assert_close(steps, want, **SINGLE)
    assert field.levels == [1.0, 0.75, 0.5, 0.25]


def test_a_teacher_takes_shifted_euler_steps_with_its_own_guidance():
    """Five calls on doubled batches, at the levels of euler_times(5, α = 2)."""
    field = Field(lambda x, t: torch.zeros_like(x))
    list(generator("teacher", field).trajectory(["", ""], [7, 4]))
    assert [len(x) for x, _, _ in field.asked] == [4] * 5
    assert field.levels == pytest.approx(sample.euler_times(5, 2.0)[:-1].tolist())


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_a_start_image_is_noised_to_its_strength_and_no_further(sampler):
    """The first x_t is (1 - s)·x_0 + s·ε at level s, and all later levels lie below s."""
    field = Field(lambda x, t: torch.zeros_like(x))
    start = randn(1, 3, 8, 8, seed=9, dtype=torch.float32)
    options = dict(sampler=sampler, cfg=1.0, steps=2, start=(start, 0.4), seed=3)
    list(generator("teacher", field).trajectory(["", ""], [0, 1], **options))
    first = 0.6 * start + 0.4 * sample.noise_of(3, "sampling", [0, 1], (3, 8, 8))
    torch.testing.assert_close(field.asked[0][0], first, **SINGLE)
    assert field.levels[0] == pytest.approx(0.4)
    assert field.levels[1] < 0.4


def test_a_sampler_that_does_not_exist_is_an_error_and_no_other_is_taken():
    with pytest.raises(ValueError, match=r"'heun'.*renoise, euler"):
        generator().sample(["a"], sampler="heun", steps=2)


def test_other_sizes_than_the_trained_one_can_be_sampled():
    """Height before width."""
    assert generator().sample(["a"], size=(6, 10)).shape == (1, 3, 6, 10)


def test_a_generator_leaves_the_callers_arithmetic_alone():
    """Between two steps of a trajectory the caller's own code must not run under autocast."""
    made = sample.Generator(network(), settings(), "student", precision="bf16")
    for _ in made.trajectory(["a"], [0]):
        assert not torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def checkpoint_of(model):
    return dict(
        format="ladd-1", kind="student", model=model.config, weights=model.state_dict(),
        settings=SETTINGS, step=1,
    )  # fmt: skip


def test_a_checkpoint_rebuilds_its_network(tmp_path):
    """What is read back predicts the same, bit for bit; nothing but the file is needed."""
    model = network(seed=3)
    torch.save(checkpoint_of(model), tmp_path / "student.pt")
    for where in (tmp_path, tmp_path / "student.pt"):
        again = sample.load_generator(where, device="cpu", precision="fp32")
        assert again.kind == "student" and not again.model.training
        same = generator("student", model).sample(CAPTIONS)
        assert torch.equal(again.sample(CAPTIONS), same)


def foreign_files(folder):
    """Files that are no checkpoint, each with a word of the message that it deserves."""
    torch.save({"weights": {}}, folder / "other.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    (folder / "garbage.pt").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.pt").write_bytes(b"")
    for name, value in dict(eta=5.0, aspects=("wide",)).items():
        odd = checkpoint_of(network())
        torch.save(odd | dict(settings=SETTINGS | {name: value}), folder / f"{name}.pt")
    odd["weights"]["pos_embed"] = odd["weights"]["pos_embed"].to(torch.int8)
    torch.save(odd, folder / "whole.pt")
    torch.save(checkpoint_of(network()), folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:-3000])
    return {
        "missing.pt": "no such file",
        "garbage.pt": "can't be read",
        "empty.pt": "can't be read",
        "cut.pt": "can't be read",
        "whole.pt": "torch.int8, not of fp32, bf16 or fp16",
        "eta.pt": "levels or eta",
        "aspects.pt": "aspects",
        "other.pt": "not a checkpoint of this program",
        "list.pt": "not a checkpoint of this program",
    }


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    """Missing, damaged, cut short, or somebody else's: one line that names the file."""
    for name, reason in foreign_files(tmp_path).items():
        with pytest.raises(CheckpointError) as refusal:
            sample.read_checkpoint(tmp_path / name)
        assert reason in str(refusal.value) and name in str(refusal.value)
        assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------
# Command line, on a run folder
# ---------------------------------------------------------------------------------------------

SMALL = ["--size", "12", "--width", "32", "--depth", "3", "--attention-heads", "1"]
SMALL += ["--text-dim", "16", "--head-width", "16", *CPU]
PROMPT = "a large red circle on a striped blue background"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of 12 × 12 images, finished but for its report, with weights drawn at random."""
    folder = tmp_path_factory.mktemp("sample") / "run"
    for stage in MAKING:
        assert ladd.main(["--out", str(folder), *SMALL, "--smoke", "--stage", stage]) == 0
    for seed, kind in enumerate(("teacher", "student")):
        checkpoint = torch.load(folder / f"{kind}.pt", weights_only=True)
        checkpoint["weights"] = randomise(MMDiT(**checkpoint["model"]), seed).state_dict()
        torch.save(checkpoint, folder / f"{kind}.pt")
    return folder


def call(*words):
    """The exit status of a command line, in this process."""
    try:
        return sample.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def cpu(*words):
    return call(*words, *CPU)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def notes(path):
    with Image.open(path) as picture:
        return picture.info


def drawn(run, folder, *words):
    """The single image that a command line draws, unenlarged."""
    assert cpu(run, "--prompt", PROMPT, "--out", folder, *words) == 0
    return pixels(folder / "00000.png")


def test_prompts_become_a_grid_that_says_how_it_was_made(run, tmp_path, capsys):
    """Three prompts of 12 × 12: 2 columns, 2 rows, borders, 5 times enlarged."""
    out = tmp_path / "a.png"
    prompts = [word for text in ("red", "green", "blue") for word in ("--prompt", text)]
    assert cpu(run, *prompts, "--seed", 5, "--out", out) == 0
    assert pixels(out).shape == (2 * 14 * 5, 2 * 14 * 5, 3)
    wanted = dict(prompt="red; green; blue", seed="5", steps="4", model=f"student of {run}")
    assert {k: notes(out)[k] for k in wanted} == wanted
    assert str(out) in capsys.readouterr().out


def test_a_folder_gets_one_png_per_image_with_its_own_prompt(run, tmp_path):
    """--num goes round the prompts of the file."""
    (tmp_path / "prompts.txt").write_text("red\n\n  green  \n", encoding="utf-8")
    out = tmp_path / "out"
    assert cpu(run, "--prompts", tmp_path / "prompts.txt", "--num", 3, "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert [notes(p)["prompt"] for p in sorted(out.iterdir())] == ["red", "green", "red"]
    first, _, third = (pixels(p) for p in sorted(out.iterdir()))
    assert first.shape == (12, 12, 3)
    assert np.abs(first - third).mean() > 5  # the same prompt with another noise


def test_every_line_of_a_file_of_prompts_is_an_image_repeated_ones_too(tmp_path):
    made, out = run_folder(tmp_path / "made"), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("red\n\nred\nblue\n")
    assert cpu(made, "--prompts", tmp_path / "prompts.txt", "--out", out) == 0
    assert [notes(p)["prompt"] for p in sorted(out.iterdir())] == ["red", "red", "blue"]


def test_odd_prompts_are_drawn_as_clean_lines(tmp_path, capsys):
    path, made = tmp_path / "prompts.txt", run_folder(tmp_path / "made")
    path.write_bytes(b"\xef\xbb\xbfa \x1b[31mcat\0\r\n" + b"very " * 100_000 + b"long\n")
    assert cpu(made, "--prompts", path, "--out", tmp_path / "out") == 0
    assert notes(tmp_path / "out" / "00000.png")["prompt"] == "a  [31mcat"
    said = capsys.readouterr().err
    assert "only the first 4 words" in said and len(said) < 1000


def test_captions_of_the_data_are_prompts_too(run, tmp_path):
    out = tmp_path / "out"
    assert cpu(run, "--prompts", "@captions", "--num", 2, "--out", out) == 0
    assert [notes(p)["prompt"][:2] for p in sorted(out.iterdir())] == ["a ", "a "]


def test_the_same_seed_draws_the_same_pixels(run, tmp_path):
    """And another seed others."""
    first = drawn(run, tmp_path / "a", "--seed", 3)
    assert (drawn(run, tmp_path / "b", "--seed", 3) == first).all()
    assert np.abs(drawn(run, tmp_path / "c", "--seed", 4) - first).mean() > 5


def test_the_batch_size_changes_no_image(run, tmp_path):
    """At most the last bit of a pixel, by the order of float32 sums."""
    for batch in (1, 3):
        out = tmp_path / str(batch)
        assert cpu(run, "--prompt", PROMPT, "--num", 4, "--batch", batch, "--out", out) == 0
    for a, b in zip(*(sorted((tmp_path / name).iterdir()) for name in "13"), strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "1"],
        ["--eta", "0.5"],
        ["--teacher"],
        ["--sampler", "euler", "--steps", "7"],
        ["--sampler", "euler", "--cfg", "3"],
        ["--teacher", "--steps", "7"],
        ["--teacher", "--cfg", "1"],
        ["--teacher", "--sampler", "renoise"],
    ],
    ids=" ".join,
)
def test_every_way_of_sampling_draws_another_image(run, tmp_path, words):
    """Each option against the same command without its last word or two."""
    less = words[:-1] if words[-1].startswith("--") else words[:-2]
    with_it, without = drawn(run, tmp_path / "a", *words), drawn(run, tmp_path / "b", *less)
    assert np.abs(with_it - without).mean() > 1


@pytest.mark.parametrize("words", [["--cfg", "3"], ["--teacher", "--sampler", "renoise"]])
def test_guidance_is_never_claimed_and_left_out(run, tmp_path, words):
    """The few-step sampler has no guidance: a scale is refused, or the notes must not name one."""
    if cpu(run, "--prompt", PROMPT, "--out", tmp_path / "out", *words) == 0:
        assert float(notes(tmp_path / "out" / "00000.png")["cfg"]) == 1
    else:
        assert not (tmp_path / "out").exists()


def test_the_notes_name_teacher_steps_and_guidance(run, tmp_path):
    drawn(run, tmp_path, "--teacher", "--steps", 3, "--cfg", 2.5)
    wanted = dict(steps="3", cfg="2.5", seed="0", model=f"teacher of {run}", prompt=PROMPT)
    assert {k: notes(tmp_path / "00000.png")[k] for k in wanted} == wanted


def test_sizes_are_height_times_width(run, tmp_path):
    """Larger, smaller and longer than it was trained at."""
    assert drawn(run, tmp_path, "--size", "8x20").shape == (8, 20, 3)


@pytest.mark.parametrize(("kind", "words"), [("student", []), ("teacher", ["--teacher"])])
def test_a_checkpoint_can_be_named_instead_of_its_folder(run, tmp_path, kind, words):
    """A file knows whether it is a student or a teacher, and is sampled as such."""
    same = drawn(run / f"{kind}.pt", tmp_path / "a")
    assert (same == drawn(run, tmp_path / "b", *words)).all()


@pytest.mark.parametrize(("words", "frames"), [([], 4), (["--teacher", "--steps", "6"], 6)])
def test_a_trajectory_has_one_frame_per_step(run, tmp_path, words, frames):
    """And its last frame is the sample (GIF has 256 colours: nearly)."""
    gif = tmp_path / "a.gif"
    words = [*words, "--trajectory", gif, "--out", tmp_path / "a.png"]
    assert cpu(run, "--prompt", PROMPT, *words) == 0
    with Image.open(gif) as film:
        assert film.n_frames == frames
        film.seek(frames - 1)
        shown = np.asarray(film.convert("RGB")).astype(int)
    final = pixels(tmp_path / "a.png")
    assert shown.shape == final.shape
    assert np.abs(shown - final).mean() < 20


def test_a_trajectory_says_so_where_it_shows_a_part_of_the_images(tmp_path, capsys):
    made, gif = run_folder(tmp_path / "made"), tmp_path / "a.gif"
    for number, told in ((64, "2 frames: "), (65, "2 frames of the first 64 images: ")):
        words = ["--prompt", "x", "--num", number, "--steps", 2, "--out", tmp_path / "a.png"]
        assert cpu(made, *words, "--trajectory", gif) == 0
        assert f"{told}{gif}\n" in capsys.readouterr().out


def test_little_strength_stays_near_the_image(run, tmp_path):
    """At 0.01 a hundredth of noise is all there is to see; at 1 the image is forgotten."""
    source = np.add.outer(np.arange(12) * 12, np.arange(12) * 8)
    source = np.stack([source, source.T, 240 - source], axis=2).astype(np.uint8)
    Image.fromarray(source).save(tmp_path / "start.png")
    distance = {}
    for strength in (0.01, 1.0):
        words = ["--init-image", tmp_path / "start.png", "--strength", strength]
        image = drawn(run, tmp_path / str(strength), *words)
        distance[strength] = np.abs(image - source).mean()
    assert distance[0.01] < 8
    assert distance[1.0] > 40
    forgotten = pixels(tmp_path / "1.0" / "00000.png")
    assert (forgotten == drawn(run, tmp_path / "none")).all()


def test_samples_that_are_not_finite_are_no_picture(tmp_path, capsys):
    """A black picture would say that all went well."""
    made = run_folder(tmp_path / "made")
    broken = torch.load(made / "student.pt")
    broken["weights"] = {k: torch.full_like(w, math.nan) for k, w in broken["weights"].items()}
    torch.save(broken, made / "student.pt")
    assert cpu(made, "--prompt", PROMPT, "--out", tmp_path / "a.png") == 1
    assert "not finite; nor is its pos_embed" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_ctrl_c_is_one_line_and_status_130(tmp_path, monkeypatch, capsys):
    made = run_folder(tmp_path / "made")

    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Generator, "batches", interrupted)
    assert cpu(made, "--prompt", "x", "--out", tmp_path / "a.png") == 130
    assert capsys.readouterr().err == "sample.py: interrupted\n"
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("name", ["photo.png", "text"])
def test_a_file_that_is_in_the_way_is_refused_before_anything_is_drawn(
    tmp_path, refused, monkeypatch, name
):
    made = run_folder(tmp_path / "made")
    folder(tmp_path, {"photo.png": PICTURE, "text": b"mine"})
    monkeypatch.setattr(sample.Generator, "batches", None)
    refused(sample, [made, "--prompt", "x", "--out", name, *CPU], 2, name, "choose another")


def test_a_prompt_without_a_word_is_told(run, tmp_path, capsys):
    assert cpu(run, "--prompt", "🐱 !", "--out", tmp_path / "a.png") == 0
    assert "no word that can be read is in: '🐱 !'" in capsys.readouterr().err


PATHS = ["prompts", "out", "trajectory", "init-image", "mask", "decode", "export", "adapter"]


@pytest.mark.parametrize("flag", [*PATHS, "data", "data-dir"])
def test_an_empty_path_is_not_taken_for_one_that_was_left_out(refused, flag):
    refused(sample, ["run", "--prompt", "x", f"--{flag}", ""], 2, f"--{flag}: is empty")
    refused(sample, ["", "--prompt", "x"], 2, "the run: is empty")


# What is wrong: the command line, and what the message must name.
BAD = {
    "missing run": ("{dir}/gone --prompt x", "gone"),
    "no checkpoint": ("{dir} --prompt x", "student.pt"),
    "foreign file": ("{dir}/text.jpg --prompt x", "text.jpg"),
    "missing prompts": ("{run} --prompts {dir}/gone.txt", "gone.txt"),
    "unreadable prompts": ("{run} --prompts {dir}/latin.txt", "latin.txt"),
    "empty prompts": ("{run} --prompts {dir}/empty.txt", "no prompt"),
    "no prompt": ("{run}", "no prompt"),
    "indivisible size": ("{run} --prompt x --size 8x13", "8x13"),
    "half a size": ("{run} --prompt x --size 8x", "--size"),
    "enormous size": ("{run} --prompt x --size 8x800", "8x800"),
    "no size": ("{run} --prompt x --size 0x8", "0x8"),
    "too many steps": ("{run} --prompt x --steps 5", "1 to 4 steps"),
    "no steps": ("{run} --prompt x --steps 0", "--steps"),
    "no images": ("{run} --prompt x --num 0", "--num"),
    "more images than memory": ("{run} --prompt x --num 10000000000000", "--num"),
    "a strength of nothing": ("{run} --prompt x --strength 0.5", "--strength"),
    "a type of nothing": ("{run} --prompt x --dtype bf16", "--dtype"),
    "a prompt for weights": ("{run} --export {dir}/a.safetensors --prompt x", "--prompt"),
    "data that nothing reads": ("{run} --prompt x --data {dir}/gone", "--data"),
    "a student's file for a teacher": ("{run}/student.pt --prompt x --teacher", "holds student"),
    "the same, exported": (
        "{run}/student.pt --teacher --export {dir}/a.safetensors",
        "holds student",
    ),
    "no strength": ("{run} --prompt x --strength 0", "--strength"),
    "missing image": ("{run} --prompt x --init-image {dir}/gone.png", "gone.png"),
    "foreign image": ("{run} --prompt x --init-image {dir}/text.jpg", "text.jpg"),
    "stranger's file": ("{run} --prompt x --out {dir}/photo.png", "photo.png"),
    "stranger's film": ("{run} --prompt x --trajectory {dir}/photo.gif", "photo.gif"),
    "abbreviation": ("{run} --prompt x --tea", "--tea"),
    "no scale": ("{run} --prompt x --teacher --cfg nan", "--cfg"),
    "another kind of picture": ("{run} --prompt x --out {dir}/b.jpg", ".png"),
    "a picture that Pillow does not know": ("{run} --prompt x --out {dir}/b.heic", ".png"),
    "another kind of film": ("{run} --prompt x --trajectory {dir}/b.mp4", ".gif"),
    "another kind of weights": ("{run} --export {dir}/b.pt", ".safetensors"),
    "no share": ("{run} --prompt x --eta 1.5", "--eta"),
    "fresh noise of Euler": ("{run} --prompt x --eta 0.5 --sampler euler", "--eta"),
    "unknown sampler": ("{run} --prompt x --sampler heun", "heun"),
}


@pytest.mark.parametrize(("words", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_and_status_2(run, tmp_path, capsys, monkeypatch, words, named):
    """After argparse's usage one line that names what is wrong; nothing is written or changed."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (3, 2)).save(tmp_path / "photo.png")
    Image.new("RGB", (3, 2)).save(tmp_path / "photo.gif")
    monkeypatch.chdir(tmp_path)  # where the default samples.png would go
    before = everything(tmp_path) | everything(run)
    assert call(*words.format(run=run, dir=tmp_path).split()) == 2
    usage, message = capsys.readouterr().err.rsplit("sample.py: ", 1)
    assert named in message and message.count("\n") == 1
    assert "Traceback" not in usage and "sample.py: " not in usage
    assert everything(tmp_path) | everything(run) == before
