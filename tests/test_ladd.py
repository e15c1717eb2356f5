"""The method and its trainer: who receives gradient, what an iteration costs, what a run leaves.

Runs are real ones, in this process, of a network of a few thousand weights and a few updates; what
they promise (the same seed gives the same weights, a cut run goes on as if nothing had happened)
is compared bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import shlex
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import ladd
import sample
from discriminator import Discriminator
from mmdit import MMDiT

EXACT = dict(rtol=1e-10, atol=1e-12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def randomise(model, seed=0):
    """Weights N(0, 1/fan_in), biases a tenth: at its start adaLN-Zero would hide the blocks."""
    generator = seeded(seed)
    for p in model.parameters():
        scale = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


# ---------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------

B, C, H, W, M, D_C = 4, 3, 4, 16, 5, 10  # batch, channels, height, width, tokens, text features
GRID, TAPS = (2, 8), (0, 2)


class Setting:
    """A teacher, a student that differs from it, heads, and one batch, all in float64."""

    def __init__(self, width=16):
        shape = dict(depth=3, width=width, heads=2, patch=2, channels=C, pos_size=8)
        shape |= dict(context_dim=D_C, pooled_dim=D_C, qk_norm=False)
        self.teacher = randomise(MMDiT(**shape), 1).double().requires_grad_(False)
        self.student = randomise(MMDiT(**shape), 2).double()
        heads = Discriminator(width=width, taps=TAPS, pooled_dim=D_C, hidden=8, cond_dim=12)
        self.heads = randomise(heads, 3).double()
        # The sinusoids of t̂ are float32 by design.
        self.heads.embed_t.register_forward_pre_hook(lambda _, x: (x[0].double(),))
        self.x0, self.noise = randn(B, C, H, W, seed=4), randn(B, C, H, W, seed=5)
        self.noise_fake, self.noise_real = randn(B, C, H, W, seed=6), randn(B, C, H, W, seed=7)
        self.text = (randn(B, M, D_C, seed=8), randn(B, D_C, seed=9))
        levels = torch.tensor([[0.75, 1, 0.25, 0.5], [0.3, 0.6, 0.1, 0.8]])
        self.t, self.t_hat = levels.double()

    def predict(self):
        return ladd.student_predict(self.student, self.x0, self.text, self.t, self.noise)

    def fake(self, x0_hat):
        return ladd.teacher_features(
            self.teacher, x0_hat, self.text, self.t_hat, self.noise_fake, TAPS
        )

    @torch.no_grad()
    def real(self):
        return ladd.teacher_features(
            self.teacher, self.x0, self.text, self.t_hat, self.noise_real, TAPS
        )

    def loss_d(self, real, fake, gamma=0.0):
        return ladd.discriminator_loss(
            self.heads, real, fake, self.t_hat, self.text[1], GRID, gamma
        )[0]

    def loss_g(self, fake):
        return ladd.generator_loss(self.heads, fake, self.t_hat, self.text[1], GRID)


def gradients(model):
    return [p.grad for p in model.parameters()]


class Constant:
    """A stand-in for a network: always the same velocity, and a record of its input."""

    def __init__(self, v):
        self.v = v

    def __call__(self, x, t, *text):
        self.x, self.t = x, t
        return self.v, []


def test_the_students_prediction_is_xt_minus_t_v():
    """x_t = (1 - t)·x_0 + t·ε, x̂_0 = x_t - t·v. Dyadic numbers: exact."""
    x0, noise, v = (
        torch.randint(-8, 9, (B, C, H, W), generator=seeded(i)).double() / 8 for i in range(3)
    )
    t = torch.tensor([0.25, 0.75, 1.0, 0.5], dtype=torch.float64)
    student = Constant(v)
    got = ladd.student_predict(student, x0, (), t, noise)
    for i, level in enumerate(t):
        xt = (1 - level) * x0[i] + level * noise[i]
        assert torch.equal(student.x[i], xt)
        assert torch.equal(got[i], xt - level * v[i])


def test_the_teacher_learns_the_velocity_from_data_to_noise():
    """E‖v - (ε - x_0)‖²: zero for that velocity, nine where every entry is off by three."""
    x0, noise = randn(B, C, H, W, seed=1), randn(B, C, H, W, seed=2)
    t = torch.tensor([0.2, 0.9, 0.0, 1.0], dtype=torch.float64)
    for offset in (0, 3):
        model = Constant(noise - x0 + offset)
        loss = ladd.teacher_loss(model, x0, (), t, noise)
        assert loss.item() == pytest.approx(offset**2, abs=1e-6)
    mixed = [0.8 * x0[0] + 0.2 * noise[0], 0.1 * x0[1] + 0.9 * noise[1], x0[2], noise[3]]
    torch.testing.assert_close(model.x, torch.stack(mixed), **EXACT)


def test_features_are_read_at_t_hat_with_the_given_noise():
    """The teacher's tokens after the tapped blocks, on (1 - t̂)·x_0 + t̂·ε."""
    s = Setting()
    t_hat = s.t_hat.view(-1, 1, 1, 1)
    xt = (1 - t_hat) * s.x0 + t_hat * s.noise_fake
    _, want = s.teacher(xt, s.t_hat, *s.text, taps=TAPS)
    torch.testing.assert_close(s.fake(s.x0), want, **EXACT)


def test_the_generators_gradient_reaches_the_student_and_stays_nowhere_else():
    """Through heads and teacher into every weight of the student; none is left in either."""
    s = Setting()
    s.loss_g(s.fake(s.predict())).backward()
    assert all(g is not None and g.abs().max() > 0 for g in gradients(s.student))
    assert all(g is None for g in gradients(s.teacher) + gradients(s.heads))
    assert all(p.requires_grad for p in s.heads.parameters())  # and the heads can go on learning


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_the_discriminators_gradient_stays_in_the_heads(gamma):
    """In every matrix of the heads; not in the student, though the fakes carry its graph."""
    s = Setting()
    s.loss_d(s.real(), s.fake(s.predict()), gamma).backward()
    assert all(p.grad.abs().max() > 0 for p in s.heads.parameters() if p.dim() > 1)
    assert all(g is None for g in gradients(s.teacher) + gradients(s.student))


def test_the_discriminators_loss_is_the_hinge_on_both_kinds():
    """L_D = E[relu(1 - D(r))] + E[relu(1 + D(f))]: not the other way round."""
    s = Setting()
    real, fake = s.real(), s.fake(s.x0.flip(0))
    loss, d_real, d_fake = ladd.discriminator_loss(
        s.heads, real, fake, s.t_hat, s.text[1], GRID, 0.0
    )
    want_real = s.heads(real, s.t_hat, s.text[1], *GRID)
    want_fake = s.heads(fake, s.t_hat, s.text[1], *GRID)
    torch.testing.assert_close(d_real.double(), want_real, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_fake.double(), want_fake, rtol=1e-5, atol=1e-5)
    want = F.relu(1 - want_real).mean() + F.relu(1 + want_fake).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_r1_adds_the_squared_gradient_on_the_real_features():
    """L_D + γ·E‖∇_r D(r)‖², averaged over the taps."""
    s, gamma = Setting(), 0.7
    real, fake = s.real(), s.fake(s.x0.flip(0))
    leaves = [f.clone().requires_grad_() for f in real]
    logits = s.heads(leaves, s.t_hat, s.text[1], *GRID)
    slopes = torch.autograd.grad(logits.sum(), leaves)
    want = sum(g.square().sum(dim=(1, 2)).mean() for g in slopes) / len(slopes)
    more = s.loss_d(real, fake, gamma) - s.loss_d(real, fake)
    assert more.item() == pytest.approx(gamma * want.item(), rel=1e-4)
    assert want > 1e-3


def test_one_pass_of_fakes_gives_the_gradient_of_two():
    """The fakes' features serve both players; the plain form sends the fakes through the teacher a
    second time with the same noise. The heads step in between, and the gradients are equal.

    (The losses are means in float32 by design: exact, as they have 128 = 2⁷ terms.)"""
    s = Setting()
    fake = s.fake(s.predict())
    s.loss_d(s.real(), fake).backward()
    torch.optim.SGD(s.heads.parameters(), 0.5).step()
    s.loss_g(fake).backward()
    shared = gradients(s.student)

    p = Setting()  # the same weights and batch, written out
    t, t_hat = p.t.view(-1, 1, 1, 1), p.t_hat.view(-1, 1, 1, 1)
    logits = lambda f: p.heads(f, p.t_hat, p.text[1], *GRID)  # noqa: E731

    def student():
        xt = (1 - t) * p.x0 + t * p.noise
        return xt - t * p.student(xt, p.t, *p.text)[0].float()  # the prediction is kept in float32

    def teacher(x0, noise):
        return p.teacher((1 - t_hat) * x0 + t_hat * noise, p.t_hat, *p.text, taps=TAPS)[1]

    with torch.no_grad():
        real, detached = teacher(p.x0, p.noise_real), teacher(student(), p.noise_fake)
    loss = F.relu(1 - logits(real)).mean() + F.relu(1 + logits(detached)).mean()
    loss.backward()
    torch.optim.SGD(p.heads.parameters(), 0.5).step()
    (-logits(teacher(student(), p.noise_fake)).mean()).backward()
    for got, want in zip(shared, gradients(p.student), strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm()
        assert want.norm() > 0


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_one_iteration_costs_six_forwards():
    """Student 1 + 2, teacher on fakes 1 + 1 (activations only), on reals 1; the heads apart."""
    s = Setting(width=96)
    forward = flops(lambda: s.teacher(s.x0, s.t, *s.text))

    def heads_alone():
        real = [randn(B, math.prod(GRID), 96) for _ in TAPS]
        s.loss_d(real, real).backward()
        s.loss_g([f.requires_grad_() for f in real]).backward()

    def iteration():
        fake = s.fake(s.predict())
        s.loss_d(s.real(), fake).backward()
        s.loss_g(fake).backward()

    units = (flops(iteration) - flops(heads_alone)) / forward
    assert 5.5 < units <= 6.05


def draws(settings, step, n=20_000):
    counts = Counter(ladd.draw_levels(settings, n, step, seeded(step)).tolist())
    return {level: counts[level] / n for level in settings.levels}


def test_levels_are_drawn_with_their_probabilities():
    """First the warm-up's, from update `warmup_iterations` on the others."""
    settings = ladd.Settings(
        levels=(1.0, 0.75, 0.5, 0.25), level_p=(0.7, 0.1, 0.15, 0.05),
        warmup_p=(0.0, 0.0, 0.2, 0.8), warmup_iterations=3,
    )  # fmt: skip
    for step, p in ((0, settings.warmup_p), (2, settings.warmup_p), (3, settings.level_p)):
        want = dict(zip(settings.levels, p, strict=True))
        assert draws(settings, step) == pytest.approx(want, abs=0.014)  # four standard errors


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    """A straight line to 1 in 40 updates, 1, and a straight line towards 0 in the last 30 %."""
    rates = [ladd.learning_rate(step, 1000, 0.3) for step in range(1000)]
    assert rates[:40] == pytest.approx([(i + 1) / 40 for i in range(40)])
    assert rates[40:700] == pytest.approx([1] * 660)
    assert rates[700:] == pytest.approx([1 - i / 300 for i in range(300)])


def test_the_average_is_the_weighted_mean_of_all_weights_so_far():
    """With weights m_k and decays d_k: Σ_k m_k·(1 - d_k)·Π_{j>k} d_j, plus the start's share.

    The decay of update k is (k + 1)/(k + 10), at most 0.3 here."""
    ema, model = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    values, decays = [randn(2, 3, seed=k) for k in range(6)], []
    start = ema.weight.detach().clone()
    for k, value in enumerate(values):
        model.weight.data.copy_(value)
        ladd.update_ema(ema, model, 0.3, k)
        decays.append(min(0.3, (k + 1) / (k + 10)))
    want = start * math.prod(decays)
    for k, value in enumerate(values):
        want = want + value * (1 - decays[k]) * math.prod(decays[k + 1 :])
    torch.testing.assert_close(ema.weight.detach(), want, rtol=1e-6, atol=1e-6)


def test_gradients_left_over_from_the_other_player_are_not_used():
    """An update forgets what stands in .grad; it follows its own loss alone."""
    weights = []
    for rubbish in (None, torch.full((1, 3), 1e6)):
        model = torch.nn.Linear(3, 1, bias=False)
        model.weight.data.fill_(1.0)
        model.weight.grad = rubbish
        optimizers = ladd.make_optimizers(model, 0.1, 0.0, 0.9)
        norm = ladd.update(optimizers, model.weight.square().sum(), model, 1.0, 1.0)
        assert norm.item() == pytest.approx(12**0.5)  # ‖2·w‖, before it is clipped
        weights.append(model.weight.detach())
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0], torch.full((1, 3), 0.9))  # AdamW's first step is the lr


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_every_weight_has_exactly_one_optimiser(muon_lr):
    """Muon gets the matrices of the blocks and nothing else."""
    model = Setting().student
    optimizers = ladd.make_optimizers(model, 1e-3, muon_lr, 0.9)
    trained = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
    assert sorted(i for own in trained for i in own) == sorted(id(p) for p in model.parameters())
    assert len(optimizers) == (2 if muon_lr else 1)
    if muon_lr:
        blocks = {id(p) for p in model.joint_blocks.parameters() if p.ndim == 2}
        assert set(trained[1]) == blocks


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

VALUES = dict(
    preset="tiny", data="photos", size=20, patch=4, heads=2, width=132, text_dim=66, head_width=32,
    levels=(1.0, 0.8, 0.6, 0.2), level_p=(0.1, 0.2, 0.3, 0.4), warmup_p=(0.4, 0.3, 0.2, 0.1),
    targets="real", taps=(0, 2), out="elsewhere", data_dir="there", device="cpu",
    precision="fp32", stage="report", teacher="there.pt", steps_scale=0.5, drop=0.2,
    teacher_ema=0.5, student_ema=0.6, beta1=0.7, t_hat_mean=-0.5, discriminator="heads.pt",
    aspects=("1:1", "3:2"), sweep=("batch=16,32",), seeds=(3, 4),
    method="dmd", student_init="scratch", units=6000.0,
)  # fmt: skip
FIXED = {"channels"}  # the data are RGB


def another(field):
    """A value of the field that is allowed and not its default."""
    if field.name in VALUES:
        return VALUES[field.name]
    return not field.default if isinstance(field.default, bool) else field.default + 1


def words(name, value):
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if name == "sweep":
        return [word for axis in value for word in (flag, axis)]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


@pytest.mark.parametrize("field", dataclasses.fields(ladd.Settings), ids=lambda f: f.name)
def test_every_setting_has_a_flag_that_sets_it(field):
    """The flag's value arrives in its field, with its type, and in no field of the same kind."""
    if field.name in FIXED:
        pytest.skip("has one possible value")
    value = another(field)
    assert value != field.default
    beside = ["--shard"] * (field.name == "offload")  # which is a part of it
    settings, _ = ladd.parse([*words(field.name, value), *beside])
    got = getattr(settings, field.name)
    assert got == value and type(got) is type(value)
    if field.name not in ("preset", "smoke", "steps_scale"):  # these change others by design
        want = dataclasses.asdict(ladd.parse([])[0]) | {field.name: value}
        want |= dict(out=settings.out, shard=settings.shard if beside else want["shard"])
        want["iterations"] = 1000 if field.name == "units" else want["iterations"]
        want["level_p"] = settings.level_p if field.name == "levels" else want["level_p"]
        if field.name in ("size", "downscale"):  # the levels follow the resolution
            want["levels"] = settings.levels
        assert dataclasses.asdict(settings) == want


@pytest.mark.parametrize("preset", ladd.PRESETS)
def test_a_preset_sets_its_row_and_a_flag_replaces_one_field(preset):
    row = ladd.PRESETS[preset]
    settings, _ = ladd.parse(["--preset", preset, "--batch", "77"])
    for name, value in {**row, "batch": 77, "preset": preset}.items():
        assert getattr(settings, name) == value
    assert settings.out == f"runs/{preset}"


def test_the_run_folder_is_named_after_preset_and_data():
    assert ladd.parse(["--data", "my/photos.zip"])[0].out == "runs/nano-photos"


def test_levels_and_renoising_follow_the_resolution():
    """The paper's for the 16·128·128 values of a 1024² latent. At an eighth of the side SD3's
    √(n / n') is 1/8: it moves m by ln 1/8, and a third of that halves the odds of the levels."""
    paper = ladd.Settings(size=1024, downscale=8, channels=16)
    assert paper.m == 1 and paper.scaled().levels == (1.0, 0.75, 0.5, 0.25)
    small = ladd.Settings(size=128, downscale=8, channels=16)
    assert small.m == pytest.approx(1 - math.log(8))
    assert small.scaled().levels == (1.0, 0.6, 0.3333, 0.1429)
    assert ladd.Settings(size=16).m == pytest.approx(-1.916, abs=1e-3)
    assert ladd.Settings(size=16).scaled().levels == (1.0, 0.5316, 0.2745, 0.112)
    assert ladd.Settings(t_hat_mean=0.0).m == 0
    assert ladd.Settings(levels=(1.0, 0.9)).scaled().levels == (1.0, 0.9)


COMMANDS = ["", "--smoke", "--steps-scale 0.5", "--preset tiny --no-qk-norm --data shapes"]
COMMANDS += ["--taps 0,2 --t-hat-mean -1 --r1 1e-05 --teacher it.pt", "--data 'my photos'"]


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_reported_command_gives_the_same_settings_again(flags):
    """Pasted into a shell it makes the same run, its seed and folder apart."""
    settings, _ = ladd.parse(shlex.split(flags))
    command = ladd.Run.command(types.SimpleNamespace(settings=settings))
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "ladd.py")
    again, _ = ladd.parse([*words, "--out", settings.out])
    # A scale may stand in the command as the numbers that it gave.
    assert dataclasses.replace(again, steps_scale=settings.steps_scale) == settings


def test_steps_scale_multiplies_the_work_of_every_stage():
    """Updates of teacher and student, the synthetic set, the evaluation."""
    half, _ = ladd.parse(["--steps-scale", "0.5"])
    whole, _ = ladd.parse([])
    for name in ("teacher_iterations", "heads_warmup", "iterations", "synthetic", "evaluation"):
        assert getattr(half, name) == round(getattr(whole, name) / 2)


def test_no_warm_up_of_the_heads_stays_none_at_any_scale():
    assert ladd.parse(["--heads-warmup", "0", "--steps-scale", "0.5"])[0].heads_warmup == 0


# What is wrong: the flags, and what the message must name.
BAD = {
    "unknown preset": ("--preset huge", "huge"),
    "unknown flag": ("--bogus 1", "--bogus"),
    "abbreviation": ("--iter 3", "--iter"),
    "a word for a number": ("--seed x", "--seed"),
    "words for numbers": ("--levels a,b", "--levels"),
    "indivisible size": ("--size 15", "--size"),
    "enormous size": ("--size 80", "--size"),
    "no patch": ("--patch 0", "--patch"),
    "grey images": ("--channels 1", "--channels"),
    "odd width": ("--width 130", "--width"),
    "width for other heads": ("--heads 3", "--heads"),
    "no heads": ("--heads 0", "--heads"),
    "no blocks": ("--depth 0", "--depth"),
    "odd text": ("--text-dim 7", "--text-dim"),
    "no words": ("--text-length 0", "--text-length"),
    "ungroupable heads": ("--head-width 56", "--head-width"),
    "levels without probabilities": ("--levels 1,0.5 --level-p 1", "--level-p"),
    "rising levels": ("--levels 0.5,0.75,0.25,0.1", "--levels"),
    "no level of noise alone": ("--levels 0.9,0.75,0.25,0.1", "--levels"),
    "a level of 0": ("--levels 1,0.75,0.5,0", "--levels"),
    "a level above 1": ("--levels 1.5,0.75,0.5,0.25", "--levels"),
    "negative probability": ("--level-p=-1,1,1,1", "--level-p"),
    "no probability": ("--level-p 0,0,0,0", "--level-p"),
    "no warm-up probability": ("--warmup-p 0,0,0,0 --warmup-iterations 5", "--warmup-p"),
    "unknown targets": ("--targets fake", "--targets"),
    "unknown stage": ("--stage sleep", "--stage"),
    "unknown precision": ("--precision fp8", "--precision"),
    "unknown device": ("--device toaster", "--device"),
    "a tap too deep": ("--taps 4", "--taps"),
    "falling taps": ("--taps 2,1", "--taps"),
    "a tap twice": ("--taps 1,1", "--taps"),
    "no updates": ("--iterations 0", "--iterations"),
    "no teacher updates": ("--teacher-iterations 0", "--teacher-iterations"),
    "a student that never learns": ("--iterations 40 --heads-warmup 40", "--heads-warmup"),
    "no batch": ("--batch 0", "--batch"),
    "no samples": ("--synthetic 0", "--synthetic"),
    "no synthetic steps": ("--synthetic-steps 0", "--synthetic-steps"),
    "no teacher steps": ("--teacher-steps 0", "--teacher-steps"),
    "no judge": ("--judge-steps 0", "--judge-steps"),
    "an evaluation of 3": ("--evaluation 3", "--evaluation"),
    "an evaluation scaled to 1": ("--steps-scale 0.001", "evaluation"),
    "no scale": ("--steps-scale 0", "--steps-scale"),
    "no learning rate": ("--student-lr 0", "--student-lr"),
    "more than all captions dropped": ("--drop 1.5", "--drop"),
    "an average that explodes": ("--student-ema 1.5", "--student-ema"),
    "no log": ("--log-every 0", "--log-every"),
    "no samples to see": ("--sample-every 0", "--sample-every"),
}


@pytest.mark.parametrize(("flags", "named"), BAD.values(), ids=BAD)
def test_bad_settings_are_one_clear_line_and_status_2(capsys, flags, named):
    """Refused before anything is made: after argparse's usage one line that names the flag."""
    with pytest.raises(SystemExit) as stop:
        ladd.parse(flags.split())
    assert stop.value.code == 2
    usage, message = capsys.readouterr().err.rsplit("ladd.py: ", 1)
    assert named in message and message.count("\n") == 1
    assert "Traceback" not in usage and "ladd.py: " not in usage


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

SMALL = "--size 12 --width 16 --depth 3 --heads 2 --text-dim 10 --head-width 8 --judge-width 8 "
SMALL += "--precision fp32 --device cpu "
FEW = SMALL + "--teacher-iterations 6 --teacher-batch 5 --iterations 6 --batch 4 --synthetic 7 "
FEW += "--teacher-steps 2 --synthetic-steps 3 --log-every 1 --heads-warmup 1"
MAKING = ("teacher", "synthesis", "distillation")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The --data-dir of all runs, so that a judge is trained once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def launch(cache, tmp_path, monkeypatch):
    """launch(name, flags) -> exit status of a run into the folder of that name."""
    monkeypatch.chdir(tmp_path)

    def launch(name, flags):
        try:
            return ladd.main([*flags.split(), "--out", name, "--data-dir", str(cache)])
        except SystemExit as stop:
            return stop.code

    return launch


@pytest.fixture
def train(launch, tmp_path):
    """train(name, flags) -> folder of a run of a few updates, without its report."""

    def train(name, flags="", stages=MAKING):
        for stage in stages:
            assert launch(name, f"{FEW} {flags} --stage {stage}") == 0
        return tmp_path / name

    return train


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, cache):
    """The checkpoint of a teacher of the small runs, for those that are about the student."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert ladd.main([*FEW.split(), "--stage", "teacher", "--out", f"{out}"]) == 0
    return out / "teacher.pt"


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same(a, b):
    """Whether two checkpoints hold the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def updates(folder):
    """What the log tells of every update, its speed apart."""
    rows = [row for row in lines(folder) if "step" in row]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def snapshot(folder):
    """Every file under a folder, with its content and the time of its last change."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, cache):
    """`python ladd.py --preset nano --smoke`, as a user would try it."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    words = ["--preset", "nano", "--smoke", "--out", str(out), "--data-dir", str(cache)]
    assert ladd.main(words) == 0
    return out


def test_a_run_leaves_every_promised_file(smoke):
    """Checkpoints, synthetic set, grids, table and report, and no half-written or stale one."""
    assert set(snapshot(smoke)) == {
        "config.json", "log.jsonl", "teacher.pt", "student.pt", "heads.pt", "synthetic/00000.pt",
        "samples/teacher-000002.png", "samples/student-000002.png", "samples.png",
        "metrics.json", "report.md",
    }  # fmt: skip


def test_the_logs_first_row_says_what_ran_where(smoke):
    """All settings, the commit, the versions; then the updates, then the seconds of each stage."""
    first, *rest = lines(smoke)
    assert set(first["settings"]) == {f.name for f in dataclasses.fields(ladd.Settings)}
    assert first["settings"]["preset"] == "nano" and first["settings"]["iterations"] == 2
    assert first["torch"] == torch.__version__
    assert {"commit", "dirty", "python", "numpy", "processor", "threads", "gpu"} <= set(first)
    updates = [(row["stage"], row["step"]) for row in rest if "step" in row]
    assert updates == [(stage, i) for stage in ("teacher", "distillation") for i in (1, 2)]
    assert [row["stage"] for row in rest if row.get("finished")] == list(ladd.STAGES)
    health = {"loss_d", "loss_g", "d_real", "d_fake", "ranked", "grad_norm", "grad_norm_heads"}
    assert health <= set(rest[-3])


def test_the_report_holds_the_student_against_the_untrained_one(smoke):
    """metrics.json and report.md have the same rows, the student before distillation among them."""
    metrics, report = json.loads((smoke / "metrics.json").read_text()), (smoke / "report.md")
    names = [row["name"] for row in metrics["rows"]]
    for kind in ("untrained", "student"):
        assert {f"{kind}, 4 steps", f"{kind}, 2 steps", f"{kind}, 1 step"} <= set(names)
    text = report.read_text()
    assert all(f"| {name} |" in text for name in names)
    assert metrics["seed"] == 0 and metrics["judge_accuracy"].keys() == {
        "size", "colour", "shape", "background",
    }  # fmt: skip
    assert "![samples](samples.png)" in text


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_checkpoint_is_data_alone_and_rebuilds_its_model(smoke, kind):
    """Loaded without running code, by sample.py, which knows nothing of the trainer."""
    checkpoint = torch.load(smoke / f"{kind}.pt", weights_only=True)
    generator = sample.load_generator(smoke, kind == "teacher", "cpu")
    assert generator.kind == kind == checkpoint["kind"]
    state = generator.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in checkpoint["weights"].items())
    assert checkpoint["step"] == 2


def test_the_students_average_moves_away_from_the_teacher(smoke):
    """The EMA that is saved starts as the teacher; it was updated, in most tensors. (After two
    updates adaLN's gates are all but closed: what lies behind them may stand still.)"""
    before, after = weights(smoke / "teacher.pt"), weights(smoke / "student.pt")
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert len(moved) > 0.6 * len(before)
    assert {"x_embedder.proj.weight", "final_layer.linear.weight"} <= set(moved)


def test_the_synthetic_set_is_the_teachers_samples_for_its_captions(smoke):
    """Sample i, made again from its caption and number by the finished teacher."""
    shard = torch.load(smoke / "synthetic" / "00000.pt", weights_only=True)
    s = torch.load(smoke / "teacher.pt", weights_only=True)["settings"]
    assert len(shard["captions"]) == len(shard["x0"]) == s["synthetic"] == 32
    again = sample.load_generator(smoke, teacher=True, device="cpu").sample(
        shard["captions"][3:5], [3, 4], seed=s["seed"] + 2, steps=s["synthetic_steps"],
        cfg=s["synthetic_cfg"],
    )  # fmt: skip
    torch.testing.assert_close(shard["x0"][3:5].float(), again, rtol=0, atol=0.05)


def rerun(smoke, cache, *extra):
    """The same command again."""
    words = ["--preset", "nano", "--smoke", "--out", str(smoke), "--data-dir", str(cache)]
    return ladd.main([*words, *extra])


def test_the_same_command_again_does_nothing(smoke, cache, capsys):
    """Every stage is skipped; no file changes but the log, which is only added to."""
    before = snapshot(smoke)
    assert rerun(smoke, cache) == 0
    after = snapshot(smoke)
    old, new = before.pop("log.jsonl")[0], after.pop("log.jsonl")[0]
    assert after == before
    assert new.startswith(old)
    assert capsys.readouterr().out.count("done before") == len(ladd.STAGES)


def test_how_a_run_is_logged_may_change_between_two_commands(smoke, cache):
    """Settings that change no result need no new folder."""
    assert rerun(smoke, cache, "--save-every", "7", "--device", "cpu", "--tensorboard") == 0


def test_a_folder_of_other_settings_is_refused_and_kept(smoke, cache, capsys):
    """The differing fields are named, and the way out; not even the log changes."""
    before = snapshot(smoke)
    assert rerun(smoke, cache, "--seed", "9", "--r1", "0.5") == 2
    message = capsys.readouterr().err
    assert "seed 0 → 9" in message and "r1 0.0 → 0.5" in message and "--out" in message
    assert "depth" not in message
    assert snapshot(smoke) == before


def test_a_strangers_folder_is_refused_and_kept(launch, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was a dark and stormy night.")
    before = snapshot(tmp_path)
    assert launch("thesis", FEW) == 2
    assert "thesis" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_damaged_run_folder_is_refused_and_kept(launch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    assert launch("run", FEW) == 2
    assert "config.json" in capsys.readouterr().err
    assert list(snapshot(tmp_path)) == ["run/config.json"]


def test_data_that_does_not_exist_is_one_line_and_status_2(launch, tmp_path, capsys):
    assert launch("run", FEW + " --data nowhere") == 2
    message = capsys.readouterr().err
    assert "nowhere" in message and message.count("\n") == 1
    assert snapshot(tmp_path) == {} and not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["synthesis", "distillation", "report"])
def test_a_stage_before_its_turn_names_what_is_missing(launch, capsys, stage):
    assert launch("run", f"{FEW} --stage {stage}") == 2
    assert "needs the stage teacher first" in capsys.readouterr().err


# seeds ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    """Two identical runs are identical bit for bit, whatever this process drew in between."""
    first = train("first")
    torch.rand(17)
    again, other = train("again"), train("other", "--seed 1")
    for kind in ("teacher", "student"):
        assert same(first / f"{kind}.pt", again / f"{kind}.pt")
        assert not same(first / f"{kind}.pt", other / f"{kind}.pt")


def test_a_run_leaves_the_callers_random_numbers_alone(launch):
    """All randomness comes from the seed: the global generator is not consumed."""
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert launch("run", FEW + " --stage teacher") == 0
    assert torch.equal(torch.rand(2), want)


# cut runs ------------------------------------------------------------------------------------


def cut_at(monkeypatch, stage, update):
    """Ctrl-C right after so many updates of a stage."""
    checkpoint = ladd.Loop.checkpoint

    def cut(self):
        checkpoint(self)
        if self.stage == stage and self.step + 1 == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(ladd.Loop, "checkpoint", cut)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    """A run that nobody cut."""
    out = tmp_path_factory.mktemp("whole") / "run"
    for stage in MAKING:
        assert ladd.main([*FEW.split(), "--stage", stage, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("stage", ["teacher", "distillation"])
@pytest.mark.parametrize(
    ("every", "update"),
    [(1, 4), (3, 5), (5, 2)],
    ids=["at a state", "between states", "before the first state"],
)
def test_a_cut_run_goes_on_as_if_nothing_had_happened(
    launch, train, whole, monkeypatch, capsys, stage, every, update
):
    """Weights, averages, optimisers, data and noise go on: the end is the same bit for bit."""
    flags = f"--save-every {every}"
    out = train("cut", flags, MAKING[: MAKING.index(stage)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, stage, update)
        launch("cut", f"{FEW} {flags} --stage {stage}")
    assert not (out / ("teacher.pt" if stage == "teacher" else "student.pt")).exists()
    capsys.readouterr()
    train("cut", flags)
    state = update // every * every
    assert (f"going on from update {state} of 6" in capsys.readouterr().out) == (state > 0)
    for kind in ("teacher", "student"):
        assert same(out / f"{kind}.pt", whole / f"{kind}.pt")
    assert updates(out) == updates(whole)
    assert not list(out.glob("*state*"))


def test_a_run_cut_in_the_synthesis_makes_only_the_missing_samples(
    launch, train, whole, monkeypatch
):
    """Shards of 3, 3 and 1: the first stays as it is, and all together are the whole set."""
    monkeypatch.setattr(ladd, "SHARD", 3)
    out, save = train("cut", stages=["teacher"]), ladd.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def cut(value, path):
            if path.name == "00001.pt":
                raise KeyboardInterrupt
            save(value, path)

        patch.setattr(ladd, "save", cut)
        launch("cut", f"{FEW} --stage synthesis")
    first = snapshot(out / "synthetic")
    assert list(first) == ["00000.pt"]
    train("cut", stages=["synthesis"])
    assert snapshot(out / "synthetic")["00000.pt"] == first["00000.pt"]
    shards = [torch.load(p, weights_only=True) for p in sorted((out / "synthetic").iterdir())]
    (want,) = (torch.load(p, weights_only=True) for p in (whole / "synthetic").iterdir())
    assert [len(shard["x0"]) for shard in shards] == [3, 3, 1]
    assert [c for shard in shards for c in shard["captions"]] == want["captions"]
    made = torch.cat([shard["x0"] for shard in shards])
    torch.testing.assert_close(made, want["x0"], rtol=1e-2, atol=1e-2)  # kept in half precision


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_no_work_is_lost_when_the_final_checkpoint_cannot_be_written(
    launch, train, whole, monkeypatch, capsys, kind
):
    """A full disk at the very end: the last state must still be there to go on from."""
    stage = "teacher" if kind == "teacher" else "distillation"
    out, save = train("cut", "--save-every 5", MAKING[: MAKING.index(stage)]), ladd.save
    with monkeypatch.context() as patch:

        def full(value, path):
            if path.name == f"{kind}.pt":
                raise OSError("No space left on device")
            save(value, path)

        patch.setattr(ladd, "save", full)
        assert launch("cut", f"{FEW} --save-every 5 --stage {stage}") == 1
    assert "No space left" in capsys.readouterr().err
    train("cut", "--save-every 5", [stage])
    assert "going on from update 5 of 6" in capsys.readouterr().out
    assert same(out / f"{kind}.pt", whole / f"{kind}.pt")


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    """Cut in the middle of writing, the old content is still there under the name."""
    path = tmp_path / "teacher.pt"
    ladd.save(dict(a=1), path)

    def half(value, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        ladd.save(dict(a=2), path)
    assert torch.load(path, weights_only=True) == dict(a=1)


def test_a_loss_that_is_not_finite_ends_the_run(launch, tmp_path, monkeypatch, capsys):
    """It is reported with its updates and never swallowed; no checkpoint is made of it."""
    loss = ladd.teacher_loss
    monkeypatch.setattr(ladd, "teacher_loss", lambda *a: loss(*a) * math.nan)
    assert launch("run", FEW + " --stage teacher") == 1
    message = capsys.readouterr().err
    assert "not finite at update 5 and the 4 before" in message and "Traceback" not in message
    assert not (tmp_path / "run" / "teacher.pt").exists()


# explanation ---------------------------------------------------------------------------------


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
    s, _ = ladd.parse(FEW.split())
    h = s.size // s.patch
    for symbol, *shape in (
        ("x_0", 4, 3, s.size, s.size),
        ("c", 4, s.text_length, s.text_dim),
        ("x̂_0", 4, 3, s.size, s.size),
        (f"f, block {s.tapped[0]}", 4, h * h, s.width),
        ("D(r)", 4, len(s.tapped), h, h),
    ):
        assert any(
            line.startswith(f"{symbol} ") and "×".join(map(str, shape)) in line.split()
            for line in said.splitlines()
        ), symbol
    assert "untrained" not in said and snapshot(tmp_path) == before


# options -------------------------------------------------------------------------------------

STUDENT_ONLY = ["--targets real", "--distill-weight 1", "--r1 0.1", "--taps 0,2", "--beta1 0"]
STUDENT_ONLY += ["--t-hat-mean 1", "--t-hat-std 0.1", "--levels 1,0.9,0.8,0.7", "--batch 3"]
STUDENT_ONLY += ["--level-p 0,0,0,1", "--warmup-iterations 4", "--head-width 16", "--clip 1e-9"]
STUDENT_ONLY += ["--warmup-iterations 4 --warmup-p 0,0,0,1", "--student-lr 1e-3"]
STUDENT_ONLY += [
    "--heads-warmup 3",
    "--heads-lr 1",
    "--student-ema 0.1",
    "--iterations 5",
    "--synthetic 6",
]
STUDENT_ONLY += ["--synthetic-cfg 9", "--synthetic-steps 4", "--steps-scale 0.5", "--shift 3"]
TEACHER_ONLY = ["--teacher-lr 1e-3", "--muon-lr 0", "--muon-lr 0.01", "--t-mean 1", "--t-std 0.3"]
TEACHER_ONLY += ["--drop 0.9", "--teacher-ema 0.1", "--teacher-batch 4"]
TEACHER_ONLY += ["--text-length 3", "--no-qk-norm", "--clip 1e-3"]


@pytest.fixture(scope="session")
def student(tmp_path_factory, cache, teacher):
    """The student of the small runs, all options at their defaults."""
    out = tmp_path_factory.mktemp("student") / "run"
    for stage in ("synthesis", "distillation"):
        words = [*FEW.split(), "--teacher", str(teacher), "--out", str(out), "--stage", stage]
        assert ladd.main(words) == 0
    return out / "student.pt"


@pytest.mark.parametrize("flags", STUDENT_ONLY)
def test_every_option_of_the_distillation_changes_the_student(train, teacher, student, flags):
    """No option is accepted and ignored: from the same teacher another student."""
    stages = ["distillation"] if "real" in flags else ["synthesis", "distillation"]
    out = train("run", f"--teacher {teacher} {flags}", stages)
    assert same(out / "teacher.pt", teacher)
    assert not same(out / "student.pt", student)


@pytest.mark.parametrize("flags", TEACHER_ONLY)
def test_every_option_of_the_teacher_changes_the_teacher(train, teacher, flags):
    out = train("run", flags, ["teacher"])
    assert not same(out / "teacher.pt", teacher)


def test_the_student_stands_still_while_the_heads_warm_up(launch, train, teacher, monkeypatch):
    """For 3 updates the heads alone learn; then the student moves, from the teacher's weights."""
    flags = f"--teacher {teacher} --heads-warmup 3 --save-every 1"
    out = train("run", flags, ["synthesis"])
    for update in (3, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, "distillation", update)
            launch("run", f"{FEW} {flags} --stage distillation")
        networks = torch.load(*out.glob(f"*-state-*{update}.pt"), weights_only=True)["networks"]
        for kind in ("student", "ema"):
            still = all(torch.equal(networks[kind][k], v) for k, v in weights(teacher).items())
            assert still == (update == 3)
    losses = [row.keys() for row in updates(out) if row["stage"] == "distillation"]
    assert ["loss_d" in row for row in losses] == [True] * 4
    assert ["loss_g" in row for row in losses] == [False] * 3 + [True]


def test_the_distillation_loss_counts_by_its_weight(train, teacher):
    """Beside the adversarial loss, not in name alone: another weight, another student."""
    students = [
        train(f"run{w}", f"--teacher {teacher} --distill-weight {w}", MAKING[1:]) / "student.pt"
        for w in (1, 50)
    ]
    assert not same(*students)


def test_the_distillation_loss_is_smooth_l1_where_the_target_can_be_known():
    """Mean of d²/2 below |d| = 1 and of |d| - 1/2 above: (1/8 + 3/2) / 2 for d = 1/2 and -2."""
    x0_hat, x0 = torch.tensor([[0.5, 1.0], [7.0, 8.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    x0_hat, x0 = x0_hat[:, None, None], x0[:, None, None]  # (B, C, H, W) = (2, 1, 1, 2)
    loss = ladd.distillation_loss(x0_hat, x0, torch.tensor([True, False]))
    assert loss.item() == pytest.approx((1 / 8 + 3 / 2) / 2 / 2)


def test_with_a_distillation_loss_a_sample_comes_with_the_noise_it_was_made_from(train, teacher):
    """The teacher, sent from that noise along its Euler path, arrives at that sample again."""
    flags = f"--teacher {teacher} --distill-weight 1"
    train("run", flags, ["synthesis"])
    s, _ = ladd.parse(f"{FEW} {flags} --out run".split())
    run = ladd.Run(s)
    x0, text, source = ladd.distillation_batches(run)(0)
    times = sample.euler_times(s.synthetic_steps, s.shift)
    with torch.no_grad():
        path = sample.euler(
            run.load("teacher"), source, times, text, run.text([""]), s.synthetic_cfg
        )
        *_, again = path
    torch.testing.assert_close(again, x0, rtol=1e-2, atol=1e-2)  # kept in half precision


@pytest.fixture
def without_probe(monkeypatch):
    """Runs do not measure diversity, which reads images and predicts for itself."""
    monkeypatch.setattr(ladd, "diversity_probe", lambda *_: lambda student: torch.tensor(1.0))


@pytest.mark.parametrize("targets", ["synthetic", "real"])
def test_pure_noise_is_the_teachers_own_and_lower_levels_are_fresh(
    train, teacher, monkeypatch, without_probe, targets
):
    """At the first level the student is shown the noise that its target was made from, and is
    held to that target; where no such noise is, as for real targets, it is not."""
    shown, known, predict = [], [], ladd.student_predict
    loss = ladd.distillation_loss
    flags = f"--teacher {teacher} --distill-weight 1 --targets {targets} --batch 7"

    def watch(student, x0, text, t, noise):
        if torch.is_grad_enabled():  # not while the heads learn alone, nor to look at the samples
            shown.append((x0, t, noise))
        return predict(student, x0, text, t, noise)

    def count(x0_hat, x0, mask):
        known.append(mask)
        return loss(x0_hat, x0, mask)

    monkeypatch.setattr(ladd, "student_predict", watch)
    monkeypatch.setattr(ladd, "distillation_loss", count)
    out = train("run", flags, MAKING[1:] if targets == "synthetic" else MAKING[2:])
    for (x0, t, noise), mask in zip(shown, known, strict=True):
        if targets == "real":
            assert torch.equal(mask, t < 1)
            continue
        assert mask.all()
        shard = torch.load(out / "synthetic" / "00000.pt", weights_only=True)
        made = sample.noise_of(2, shard["index"], x0.shape[1:])  # seed 0 + 2
        for image, level, own in zip(x0, t, noise, strict=True):
            row = (shard["x0"].float() - image).abs().flatten(1).sum(1).argmin()
            assert torch.equal(own, made[row]) == (level == 1)


@pytest.fixture
def seen(monkeypatch):
    """The numbers of all training images of shapes and of the synthetic set that are asked for."""
    numbers = {data.Shapes: [], data.ImageSet: []}
    for kind, found in numbers.items():

        def batch(self, index, held_out=False, batch=kind.batch, found=found):
            if not held_out:
                found += list(index)
            return batch(self, index, held_out)

        monkeypatch.setattr(kind, "batch", batch)
    return numbers


def test_every_update_has_images_of_its_own(train, seen, without_probe):
    """6 updates of 5 see images 0 to 29; of the synthetic set 6 updates of 4 see 0 to 23."""
    train("run")
    assert [i for i in seen[data.Shapes] if i < 1 << 34] == list(range(30))
    assert seen[data.ImageSet] == list(range(24))


@pytest.mark.parametrize(("drop", "share"), [("0", 0), ("0.5", 0.5), ("0.9", 0.9)])
def test_captions_are_dropped_in_their_share(train, monkeypatch, drop, share):
    """A dropped caption has no words: its row of ids is 0, as that of the empty caption."""
    features, dropped = data.HashedText.features, []

    def record(self, ids):
        if len(ids) == 40:  # a batch of the teacher's
            dropped.extend((ids == 0).all(dim=1).tolist())
        return features(self, ids)

    monkeypatch.setattr(data.HashedText, "features", record)
    train("run", f"--drop {drop} --teacher-batch 40", ["teacher"])
    assert len(dropped) == 240
    assert sum(dropped) / 240 == pytest.approx(share, abs=0.13)  # four standard errors
    assert share or not any(dropped)


def test_real_targets_need_no_synthetic_set(train, teacher):
    """--targets real goes from the teacher to the student at once."""
    out = train("run", f"--teacher {teacher} --targets real", ["distillation"])
    assert (out / "student.pt").exists() and not (out / "synthetic").exists()


def update_cost(train, teacher, flags):
    """FLOPs of an update of the loop itself, and of a forward of the network on as many images.

    Grids and diversity are made once in either run, so the difference has none of that."""
    flags, cost = f"--teacher {teacher} {flags} --sample-every 100 --log-every 100", {}
    for n in (1, 3):
        own = f"{flags} --iterations {n}"
        train(f"run{n}", own, ["synthesis"])
        cost[n] = flops(lambda n=n, own=own: train(f"run{n}", own, ["distillation"]))
    model = sample.build(sample.read_checkpoint(teacher))
    x, t = torch.randn(4, 3, 12, 12), torch.rand(4)
    forward = flops(lambda: model(x, t, torch.randn(4, 8, 10), torch.randn(4, 10)))
    return (cost[3] - cost[1]) / 2, forward


def test_a_trainers_iteration_costs_six_forwards(train, teacher, cache):
    """The loop itself, heads taken off."""
    cost, forward = update_cost(train, teacher, "--heads-warmup 0 --taps 0,1,2")
    t, pooled = torch.rand(4), torch.randn(4, 10)
    heads = Discriminator(width=16, taps=(0, 1, 2), pooled_dim=10, hidden=8)
    tokens = [torch.randn(4, 36, 16) for _ in range(3)]

    def heads_alone():
        arguments = (t, pooled, (6, 6))
        ladd.discriminator_loss(heads, tokens, tokens, *arguments, 0.0)[0].backward()
        fake = [f.clone().requires_grad_() for f in tokens]
        ladd.generator_loss(heads, fake, *arguments).backward()

    # A narrow network spends much in attention, whose backward costs 2 and not 1 for activations:
    # two products of 2·L²·D in three blocks of the teacher, for 4 fakes of L = 36 + 8 tokens.
    attention = 3 * 2 * (2 * 44**2 * 16) * 4
    units = (cost - flops(heads_alone) - attention) / forward
    assert 5.5 < units <= 6.05


def test_a_given_teacher_is_used_as_it_is(train, teacher, student):
    """--teacher FILE: no teacher is trained, and the student starts from that one."""
    assert same(student.parent / "teacher.pt", teacher)
    assert "teacher" not in {row.get("stage") for row in lines(student.parent)}
    first, second = weights(teacher), weights(student)
    assert max((first[k] - second[k]).abs().max() for k in first) < 0.01  # 6 updates of 1e-4


def test_a_teacher_of_another_shape_is_refused(launch, teacher, capsys):
    assert launch("run", f"{FEW} --teacher {teacher} --width 20") == 2
    assert "teacher.pt" in capsys.readouterr().err


def test_a_missing_teacher_leaves_no_folder_behind(launch, tmp_path, teacher, capsys):
    """A slip in the path is one line; the command can be given again with the right one."""
    assert launch("run", f"{FEW} --teacher gone.pt --stage synthesis") in (1, 2)
    assert not (tmp_path / "run").exists()
    message = capsys.readouterr().err
    assert "gone.pt" in message and message.count("\n") == 1
    assert launch("run", f"{FEW} --teacher {teacher} --stage synthesis") == 0


def test_a_student_that_serves_as_a_teacher_is_sampled_as_one(launch, tmp_path, student):
    """Refused, or from then on a teacher: many steps, with guidance."""
    if launch("run", f"{FEW} --teacher {student} --stage synthesis") == 0:
        assert sample.load_generator(tmp_path / "run", teacher=True).kind == "teacher"


def test_a_student_of_two_levels_gets_its_report(launch, tmp_path):
    """The table and the pictures have as many steps as there are levels."""
    levels = "--levels 1,0.5 --level-p 0.6,0.4 --warmup-p 0.5,0.5"
    assert launch("run", f"{SMALL} {levels} --smoke") == 0
    names = [r["name"] for r in json.loads((tmp_path / "run/metrics.json").read_text())["rows"]]
    assert names[-2:] == ["student, 2 steps", "student, 1 step"]


@pytest.mark.parametrize("images", [3, 50, 90])
def test_a_folder_of_images_runs_through(launch, tmp_path, capsys, images):
    """Two classes, from decoding to the report; too few images are refused before any work."""
    for i in range(images):
        path = tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 11), (i, 2 * i, 255 - i)).save(path)
    if launch("run", f"{SMALL} --smoke --data pets") == 0:
        assert (tmp_path / "run" / "report.md").exists()
    else:
        assert images < 90 and "pets" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# where the default data cannot be had --------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise data.DataError("CIFAR-10 can't be had (no network).")

    monkeypatch.setattr(data, "load_cifar10", refuse)


def test_a_preset_whose_data_cannot_be_had_takes_shapes_and_says_so(
    launch, offline, tmp_path, capsys
):
    """Said on stderr, in the log, the metrics and the report; the same command goes on later."""
    flags = f"--preset tiny {SMALL} --smoke"
    assert launch("run", flags) == 0
    out, message = tmp_path / "run", capsys.readouterr().err
    assert "!!! cifar10 can't be had, so this run uses the built-in shapes" in message
    assert "built-in shapes" in (out / "report.md").read_text()
    assert "tiny on shapes" in (out / "report.md").read_text()
    assert "built-in shapes" in json.loads((out / "metrics.json").read_text())["notes"][0]
    assert "built-in shapes" in lines(out)[0]["note"]
    assert json.loads((out / "config.json").read_text())["data"] == "shapes"
    assert launch("run", flags) == 0


def test_data_that_was_asked_for_is_never_replaced(launch, offline, tmp_path, capsys):
    """--data cifar10 without a network: status 2, nothing made."""
    assert launch("run", f"--preset tiny {SMALL} --smoke --data cifar10") == 2
    message = capsys.readouterr().err
    assert "CIFAR-10 can't be had" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_one_line(launch, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert launch("run", FEW) in (1, 2)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "run" in message
    assert (tmp_path / "run").read_text() == "mine"
