"""The method: who receives gradient, what an iteration costs, what the stages learn from.

What stages do is seen in real runs, in this process, of a network of a few thousand weights.
"""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    COLLAPSES,
    FEW,
    MAKING,
    Constant,
    alike,
    flops,
    lines,
    randn,
    run_of,
    same,
    seeded,
    update_cost,
    updates,
    weights,
)

import data
import ladd
import sample
from discriminator import Discriminator
from lib.health import separation
from lib.loop import Loop
from lib.streams import rng
from mmdit import MMDiT
from tools.train import given_settings

EXACT = dict(rtol=1e-10, atol=1e-12)


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

    def __init__(self, width=16, r1=0.0):
        shape = dict(depth=3, width=width, heads=2, patch=2, channels=C, pos_size=8)
        shape |= dict(context_dim=D_C, pooled_dim=D_C, qk_norm=False)
        self.teacher = randomise(MMDiT(**shape), 1).double().requires_grad_(False)
        self.student = randomise(MMDiT(**shape), 2).double()
        heads = Discriminator(width=width, taps=TAPS, pooled_dim=D_C, hidden=8, cond_dim=12)
        self.heads = randomise(heads, 3).double()
        # The sinusoids of t̂ are float32 by design.
        self.heads.embed_t.register_forward_pre_hook(lambda _, x: (x[0].double(),))
        self.x0, self.noise = randn(B, C, H, W, seed=4), randn(B, C, H, W, seed=5)
        self.noise_hat = randn(B, C, H, W, seed=6)
        self.text = data.Text(randn(B, M, D_C, seed=8), randn(B, D_C, seed=9))
        levels = torch.tensor([[0.75, 1, 0.25, 0.5], [0.3, 0.6, 0.1, 0.8]])
        self.t, self.t_hat = levels.double()
        self.paired = torch.tensor([True, False, True, True])
        self.settings = SimpleNamespace(patch=2, tapped=TAPS, r1=r1, distill_weight=1.0)
        self.settings.levels, self.settings.level_p = (1.0, 0.6), (0.25, 0.75)

    def batch(self):
        drawn = self.t, self.noise, self.paired, self.t_hat, self.noise_hat
        return ladd.Batch(self.x0, self.text, *drawn, torch.arange(B), self.t == 1)

    def losses(self, learning=True):
        """What both players learn from, of one pass of the fakes."""
        b, s = self.batch(), self.settings
        with torch.set_grad_enabled(learning):
            x0_hat, real, fake = ladd.features_of_both(self.student, self.teacher, b, s)
        d, on_real, on_fake = ladd.heads_loss(self.heads, real, fake, b, s)
        targets, weights = ladd.held_to(self.student, self.teacher, x0_hat, real, b, s)
        g, distill = ladd.student_losses(self.heads, targets, weights, fake, b, s)
        return SimpleNamespace(d=d, g=g, distill=distill, on_real=on_real, on_fake=on_fake)

    def fake(self, x0_hat):
        return ladd.teacher_features(
            self.teacher, x0_hat, self.text, self.t_hat, self.noise_hat, TAPS
        )

    @torch.no_grad()
    def real(self):
        return ladd.teacher_features(
            self.teacher, self.x0, self.text, self.t_hat, self.noise_hat, TAPS
        )

    def loss_d(self, real, fake, gamma=0.0):
        s = SimpleNamespace(patch=2, r1=gamma)
        return ladd.heads_loss(self.heads, real, fake, self.batch(), s)[0]

    def loss_g(self, fake):
        b = self.batch()
        return ladd.student_losses(self.heads, fake, b.paired, fake, b, self.settings)[0]


class Plain(Setting):
    """The same weights and batch, with the iteration written out: every pass on its own."""

    def logits(self, features):
        return self.heads(features, self.t_hat, self.text.pooled, *GRID)

    def predict(self):
        t = self.t.view(-1, 1, 1, 1)
        xt = (1 - t) * self.x0 + t * self.noise
        v = self.student(xt, self.t, *self.text)[0].float()  # the prediction is kept in float32
        return xt - t * v

    def features(self, x0, noise):
        t_hat = self.t_hat.view(-1, 1, 1, 1)
        xt = (1 - t_hat) * x0 + t_hat * noise
        return self.teacher(xt, self.t_hat, *self.text, taps=TAPS)[1]

    def d(self):
        with torch.no_grad():
            real = self.features(self.x0, self.noise_hat)
            fake = self.features(self.predict(), self.noise_hat)
        return F.relu(1 - self.logits(real)).mean() + F.relu(1 + self.logits(fake)).mean()

    def g(self):
        return -self.logits(self.features(self.predict(), self.noise_hat)).mean()

    def target(self):
        """x_0; of the second sample, which is pure noise, its next picture, at t = 0.6."""
        with torch.no_grad():
            xt = 0.4 * self.predict() + 0.6 * self.noise
            t = torch.full((B,), 0.6, dtype=torch.float64)
            own = xt - 0.6 * self.student(xt, t, *self.text)[0].float()
        return torch.cat([self.x0[:1], own[1:2], self.x0[2:]])

    def distill(self):
        both = (self.features(x0, self.noise_hat) for x0 in (self.target(), self.predict()))
        real, fake = (torch.stack(fs) for fs in both)  # (taps, B, N, D)
        real, fake = (
            (f - f.mean(3, True)) / (f.var(3, False, True) + 1e-5).sqrt() for f in (real, fake)
        )
        each = (fake - real.detach()).square().mean(dim=(0, 2, 3))
        return (each[0] + 0.3 * each[1] + each[2] + each[3]) / 4


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_close(got, want, relative=1e-10):
    """Lists of gradients that are the same but for rounding, and not nothing."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= relative * b.norm() + 1e-15
        assert b.norm() > 0 or b.dim() == 1  # L_D moves no offset that reals and fakes share


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
    xt = (1 - t_hat) * s.x0 + t_hat * s.noise_hat
    _, want = s.teacher(xt, s.t_hat, *s.text, taps=TAPS)
    torch.testing.assert_close(s.fake(s.x0), want, **EXACT)


def test_the_generators_gradient_reaches_the_student_and_stays_nowhere_else():
    """Through heads and teacher into every weight of the student; none is left in either."""
    s = Setting()
    s.losses().g.backward()
    assert all(g is not None and g.abs().max() > 0 for g in gradients(s.student))
    assert all(g is None for g in gradients(s.teacher) + gradients(s.heads))
    assert all(p.requires_grad for p in s.heads.parameters())  # and the heads can go on learning


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_the_discriminators_gradient_stays_in_the_heads(gamma):
    """In every matrix of the heads; not in the student, though the fakes carry its graph."""
    s = Setting(r1=gamma)
    s.losses().d.backward()
    assert all(p.grad.abs().max() > 0 for p in s.heads.parameters() if p.dim() > 1)
    assert all(g is None for g in gradients(s.teacher) + gradients(s.student))


def test_the_losses_of_one_pass_are_those_of_passes_of_their_own():
    """Also the logits, which the log tells the players apart by."""
    got, p = Setting().losses(), Plain()
    for name in ("d", "g", "distill"):
        want = getattr(p, name)()
        assert getattr(got, name).item() == pytest.approx(want.item(), rel=1e-6), name
    real, fake = p.features(p.x0, p.noise_hat), p.features(p.predict(), p.noise_hat)
    torch.testing.assert_close(got.on_real, p.logits(real).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.on_fake, p.logits(fake).float(), rtol=1e-5, atol=1e-5)
    assert not got.on_real.requires_grad and not got.on_fake.requires_grad


@pytest.mark.parametrize(("weight", "relative"), [(0.0, 1e-10), (2.5, 2e-7)])
def test_both_gradients_of_one_pass_are_those_of_separate_backwards(weight, relative):
    """One backward of L_D + L_G + λ·L_distill: in the heads the gradient of L_D alone, in the
    student that of the rest alone, as from passes and backwards of their own.

    (The losses are means in float32 by design: exact, as they have 128 = 2⁷ terms. So is the
    prediction, at which the gradients of two losses add up: that is rounded.)"""
    s = Setting()
    losses = s.losses()
    (losses.d + losses.g + weight * losses.distill).backward()
    p = Plain()
    p.d().backward()
    heads = [g.clone() for g in gradients(p.heads)]
    assert all(g is None for g in gradients(p.student))
    p.g().backward()
    (weight * p.distill()).backward()
    assert_close(gradients(s.student), gradients(p.student), relative)
    assert_close(gradients(s.heads), heads)
    assert all(g is None for g in gradients(s.teacher))


def test_while_the_heads_learn_alone_the_student_has_no_graph_and_no_gradient():
    """And the heads learn what they would learn beside it."""
    alone, beside = Setting(), Setting()
    losses = alone.losses(learning=False)
    assert not losses.g.requires_grad and not losses.distill.requires_grad
    (losses.d + losses.g + losses.distill).backward()
    beside.losses().d.backward()
    assert all(g is None for g in gradients(alone.student) + gradients(alone.teacher))
    assert_close(gradients(alone.heads), gradients(beside.heads))


def test_the_discriminators_loss_is_the_hinge_on_both_kinds():
    """L_D = E[relu(1 - D(r))] + E[relu(1 + D(f))]: not the other way round."""
    s = Setting()
    real, fake = s.real(), s.fake(s.x0.flip(0))
    pooled = s.text.pooled
    loss, on_real, on_fake = ladd.heads_loss(s.heads, real, fake, s.batch(), s.settings)
    want_real = s.heads(real, s.t_hat, pooled, *GRID)
    want_fake = s.heads(fake, s.t_hat, pooled, *GRID)
    torch.testing.assert_close(on_real.double(), want_real, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_fake.double(), want_fake, rtol=1e-5, atol=1e-5)
    want = F.relu(1 - want_real).mean() + F.relu(1 + want_fake).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_r1_adds_the_squared_gradient_on_the_real_features():
    """L_D + γ·E‖∇_r D(r)‖², averaged over the taps."""
    s, gamma = Setting(), 0.7
    real, fake = s.real(), s.fake(s.x0.flip(0))
    leaves = [f.clone().requires_grad_() for f in real]
    logits = s.heads(leaves, s.t_hat, s.text.pooled, *GRID)
    slopes = torch.autograd.grad(logits.sum(), leaves)
    want = sum(g.square().sum(dim=(1, 2)).mean() for g in slopes) / len(slopes)
    more = s.loss_d(real, fake, gamma) - s.loss_d(real, fake)
    assert more.item() == pytest.approx(gamma * want.item(), rel=1e-4)
    assert want > 1e-3


def test_the_distillation_loss_is_the_distance_of_normalised_tokens_where_the_target_is_known():
    """Tokens (1, -1) and (-1, 1) differ by 2 in each value: 4, and of opposite tokens in one of two
    taps, for one of two samples, a quarter. Scale and offset of a token say nothing."""
    same, other = torch.tensor([[[5.0, 3.0]]] * 2), torch.tensor([[[-1.0, 1.0]]] * 2)  # (B, 1, 2)
    real = [torch.tensor([[[1.0, -1.0]]] * 2)] * 2
    loss = ladd.distillation_loss(real, [same, other], torch.tensor([True, False]))
    assert loss.item() == pytest.approx(4 / 2 / 2, abs=1e-4)


def test_at_pure_noise_the_target_is_what_the_student_draws_in_one_step_more():
    """The picture of `renoise` with two levels, which the student is held to without gradient, and
    less; elsewhere the target is the sample's own features."""
    s = Setting()
    b, real = s.batch(), s.real()
    x0_hat = ladd.student_predict(s.student, s.x0, s.text, s.t, s.noise)
    targets, weights = ladd.held_to(s.student, s.teacher, x0_hat, real, b, s.settings)
    levels = s.settings.levels
    *_, own = sample.renoise(s.student, s.noise, levels, s.text, None)
    own = s.fake(own)
    assert weights.tolist() == [1, ladd.OWN, 1, 1]
    assert not any(target.requires_grad for target in targets)
    for target, r, f in zip(targets, real, own, strict=True):
        assert torch.equal(target[[0, 2, 3]], r[[0, 2, 3]])
        torch.testing.assert_close(target[1], f[1], rtol=1e-5, atol=1e-6)  # v is float32
        assert not torch.allclose(f[1], r[1], rtol=0.1)


def test_without_pure_noise_the_targets_are_the_samples_and_the_passes_are_made():
    """Of a network that is divided among processes, all must make as many."""
    s = Setting()
    s.t, passes = s.t.clamp(max=0.9), []
    for network in (s.student, s.teacher):
        network.register_forward_hook(lambda *_: passes.append(1))
    real = s.real()
    targets, weights = ladd.held_to(s.student, s.teacher, s.x0, real, s.batch(), s.settings)
    assert len(passes) == 3 and weights.tolist() == [1] * B
    assert all(map(torch.equal, targets, real))


@pytest.mark.parametrize("change", [dict(distill_weight=0.0), dict(levels=(1.0,))])
def test_without_a_weight_or_a_second_level_nothing_is_drawn_to_be_held_to(change):
    s, real = Setting(), object()
    vars(s.settings).update(change)
    assert ladd.held_to(None, None, None, real, s.batch(), s.settings) == (real, s.paired)


def test_without_its_weight_the_distillation_loss_keeps_no_graph():
    """At full size the graph of a loss that is only logged would be gigabytes."""
    s = Setting()
    s.settings.distill_weight = 0.0
    assert not s.losses().distill.requires_grad


def test_what_is_logged_of_the_heads_is_means_and_the_share_of_pairs_in_the_right_order():
    """A pair is ranked by its mean over heads and positions."""
    real = torch.tensor([[1.0, 3.0], [0.0, 2.0], [5.0, -9.0], [0.0, 0.0]]).view(4, 1, 1, 2)
    fake = torch.tensor([[1.0, 1.0], [0.0, 3.0], [0.0, -9.0], [-1.0, 0.0]]).view(4, 1, 1, 2)
    told = {name: value.item() for name, value in separation(real, fake).items()}
    assert told == dict(d_real=0.25, d_fake=-0.625, ranked=0.75)


def test_logits_of_bf16_are_ranked_without_its_rounding():
    """Means that differ by less than bf16 resolves are no ties."""
    fake = torch.ones(3, 2, 8, 8, dtype=torch.bfloat16)
    real = fake.clone()
    real[:, 0, 0, 0] = 1.0078125  # the next number of bf16
    assert separation(real, fake)["ranked"] == 1
    assert separation(fake, real)["ranked"] == 0


@pytest.mark.parametrize(("weight", "most"), [(0.0, 6.05), (1.0, 6.55)])
def test_one_iteration_costs_six_forwards_and_two_of_those_that_start_from_pure_noise(weight, most):
    """Student 1 + 2, teacher on fakes 1 + 1 (activations only), on reals 1; the heads apart. With
    the distillation loss both see their share of the samples, here a quarter, once more."""
    s = Setting(width=96)
    s.settings.distill_weight = weight
    forward = flops(lambda: s.teacher(s.x0, s.t, *s.text))

    def heads_alone():
        real = [randn(B, math.prod(GRID), 96) for _ in TAPS]
        s.loss_d(real, real).backward()
        s.loss_g([f.requires_grad_() for f in real]).backward()

    def iteration():
        losses = s.losses()
        (losses.d + losses.g + losses.distill).backward()

    units = (flops(iteration) - flops(heads_alone)) / forward
    assert most - 0.55 < units <= most


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_trainers_update_costs_six_forwards_and_nine_in_parts(train, teacher, parts):
    """The loop itself, heads taken off; in several parts the fakes pass for each player."""
    flags = f"--heads-warmup 0 --taps 0,1,2 --accumulate {parts} --teacher-batch {parts}"
    flags += " --distill-weight 0"
    cost, forward = update_cost(train, teacher, flags)
    heads, t = Discriminator(width=16, taps=(0, 1, 2), pooled_dim=10, hidden=8), torch.rand(4)
    b = SimpleNamespace(x0=torch.zeros(4, 3, 12, 12), t_hat=t, paired=t < 1)
    b.text, s = SimpleNamespace(pooled=torch.randn(4, 10)), SimpleNamespace(patch=2, r1=0.0)
    s.distill_weight = 0.0
    tokens = [torch.randn(4, 36, 16) for _ in range(3)]

    def heads_alone():
        ladd.heads_loss(heads, tokens, tokens, b, s)[0].backward()
        fake = [f.clone().requires_grad_() for f in tokens]
        ladd.student_losses(heads, tokens, b.paired, fake, b, s)[0].backward()

    # A narrow network spends much in attention, whose backward costs 2 and not 1 for activations:
    # two products of 2·L²·D in three blocks of the teacher, for 4 fakes of L = 36 + 8 tokens.
    attention = 3 * 2 * (2 * 44**2 * 16) * 4
    units = (cost - flops(heads_alone) - attention) / forward
    more = 0 if parts == 1 else 3
    assert 5.5 + more < units <= 6.05 + more


# ---------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ladd.PRESETS)
def test_a_preset_sets_its_row_and_a_flag_replaces_one_field(preset):
    row = ladd.PRESETS[preset]
    settings, _ = given_settings(["--preset", preset, "--batch", "77"])
    for name, value in {**row, "batch": 77, "preset": preset}.items():
        assert getattr(settings, name) == value
    assert settings.out == f"runs/{preset}"


def test_the_run_folder_is_named_after_preset_and_data():
    assert given_settings(["--data", "my/photos.zip"])[0].out == "runs/nano-photos"
    assert given_settings(["--data", "my/photos.zip", "--out", "there"])[0].out == "there"


def test_the_default_probabilities_are_as_many_as_the_levels():
    for levels in ((1.0,), (1.0, 0.5), (1.0, 0.7, 0.4, 0.2)):
        p = ladd.Settings(levels=levels).scaled().level_p
        assert len(p) == len(levels) and p[0] == 0.4
        assert p[1:] == pytest.approx([0.6 / max(1, len(levels) - 1)] * (len(levels) - 1))


def test_steps_scale_multiplies_the_work_of_every_stage():
    """Updates of teacher and student, the synthetic set, the evaluation."""
    half, _ = given_settings(["--steps-scale", "0.5"])
    whole, _ = given_settings([])
    for name in ("teacher_iterations", "heads_warmup", "iterations", "synthetic", "evaluation"):
        assert getattr(half, name) == round(getattr(whole, name) / 2)


def test_no_scale_leaves_less_than_a_field_takes():
    """Eight samples are the least that a row of scores has."""
    assert given_settings(["--steps-scale", "0.0001"])[0].evaluation == 8


def test_no_warm_up_of_the_heads_stays_none_at_any_scale():
    assert given_settings(["--heads-warmup", "0", "--steps-scale", "0.5"])[0].heads_warmup == 0


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------

STUDENT_ONLY = ["--targets real", "--distill-weight 1", "--r1 0.1", "--taps 0,2", "--beta1 0"]
STUDENT_ONLY += ["--t-hat-mean 0", "--t-hat-std 0.1", "--levels 1,0.9,0.8,0.7", "--batch 3"]
STUDENT_ONLY += ["--level-p 0,0,0,1", "--level-warmup 4", "--head-width 16", "--clip 1e-9"]
STUDENT_ONLY += ["--level-warmup 4 --level-warmup-p 0,0,0,1", "--student-lr 1e-3"]
STUDENT_ONLY += ["--heads-warmup 3", "--heads-lr 1", "--student-ema 0.1", "--iterations 5"]
STUDENT_ONLY += ["--synthetic 6", "--synthetic-cfg 9", "--synthetic-steps 4", "--shift 3"]
STUDENT_ONLY += ["--steps-scale 0.5 --evaluation 16"]
TEACHER_ONLY = ["--teacher-lr 1e-3", "--muon-lr 0", "--muon-lr 0.01", "--t-mean 1", "--t-std 0.3"]
TEACHER_ONLY += ["--drop 0.9", "--teacher-ema 0.1", "--teacher-batch 4"]
TEACHER_ONLY += ["--text-length 3", "--no-qk-norm", "--clip 1e-3"]


@pytest.fixture(scope="session")
def student(tmp_path_factory, cache, teacher):
    """The student of the small runs, all options at their defaults."""
    out = tmp_path_factory.mktemp("student") / "run"
    for stage in ("synthesis", "distillation"):
        words = ["--teacher", f"{teacher}", "--stage", stage]
        where = ["--out", f"{out}", "--data-dir", f"{cache}"]
        assert ladd.main([*FEW.split(), *words, *where]) == 0
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


def test_the_student_stands_still_while_the_heads_warm_up(train, teacher, monkeypatch):
    """For 3 updates the heads alone learn; then the student moves, from the teacher's weights."""
    checkpoint, start, still = Loop.checkpoint, weights(teacher), []

    def look(loop):
        for name in ("student", "ema", "heads"):
            now = loop.networks[name].state_dict()
            before = start if name != "heads" else look.heads
            still.append(all(torch.equal(now[k], v) for k, v in before.items()))
        look.heads = {k: v.clone() for k, v in now.items()}
        checkpoint(loop)

    look.heads = {"embed_t.weight": torch.zeros(64, 256)}
    monkeypatch.setattr(Loop, "checkpoint", look)
    out = train("run", f"--teacher {teacher} --heads-warmup 3", ["synthesis", "distillation"])
    assert still == [True, True, False] * 3 + [False] * 9
    losses = [row.keys() for row in updates(out) if "loss_d" in row]
    assert len(losses) == 6
    for name in ("loss_g", "loss_distill", "grad_norm"):
        assert [name in row for row in losses] == [False] * 3 + [True] * 3


def test_the_adversarial_loss_is_logged_without_the_distillation_loss(train, teacher, monkeypatch):
    """Side by side, each by itself: loss_g is -E[D(f)], whatever the weight λ of the other."""
    told = []

    def watch(*arguments, losses=ladd.student_losses):
        told.append(losses(*arguments))
        return told[-1]

    monkeypatch.setattr(ladd, "student_losses", watch)
    flags = f"--teacher {teacher} --heads-warmup 0 --distill-weight 99"
    rows = [row for row in updates(train("run", flags, MAKING[1:])) if "loss_d" in row]
    for row, (loss_g, distill) in zip(rows, told, strict=True):
        assert row["loss_g"] == loss_g.item()
        assert row["loss_g"] == pytest.approx(-row["d_fake"], abs=0.05)  # of heads a step older
        assert row["loss_distill"] == distill.item()


def test_the_distillation_loss_counts_by_its_weight(train, teacher):
    """Beside the adversarial loss, not in name alone: another weight, another student."""
    students = [
        train(f"run{w}", f"--teacher {teacher} --distill-weight {w}", MAKING[1:]) / "student.pt"
        for w in (1, 50)
    ]
    assert not same(*students)


# ---------------------------------------------------------------------------------------------
# What an update starts from
# ---------------------------------------------------------------------------------------------


def draws(settings, step, n=20_000):
    drawn = ladd.draw_levels(settings, n, step, rng(0, "test", step))
    counts = Counter(drawn.tolist())
    return {level: counts[level] / n for level in settings.levels}


def test_levels_are_drawn_with_their_probabilities():
    """First the warm-up's, from update `level_warmup` on the others."""
    settings = ladd.Settings(
        levels=(1.0, 0.75, 0.5, 0.25), level_p=(0.7, 0.1, 0.15, 0.05),
        level_warmup_p=(0.0, 0.0, 0.2, 0.8), level_warmup=3,
    )  # fmt: skip
    first, later = settings.level_warmup_p, settings.level_p
    for step, p in ((0, first), (2, first), (3, later)):
        want = dict(zip(settings.levels, p, strict=True))
        assert draws(settings, step) == pytest.approx(want, abs=0.014)  # four standard errors


def test_a_sample_comes_with_the_noise_it_was_made_from(train, teacher):
    """The teacher, sent from that noise along its Euler path, arrives at that sample again."""
    flags = f"--teacher {teacher} --levels 1"
    train("run", flags, ["synthesis"])
    run = run_of([*flags.split(), "--out", "run"])
    s = run.settings
    b = ladd.draw_batch(run, ladd.distillation_samples(run), 0, own_noise="all")
    times = sample.euler_times(s.synthetic_steps, s.shift)
    with torch.no_grad():
        model, uncond = ladd.load(run, "teacher"), run.text_encoder([""])
        *_, again = sample.euler(model, b.noise, times, b.text, uncond, s.synthetic_cfg)
    torch.testing.assert_close(again, b.x0, rtol=1e-2, atol=1e-2)  # kept in half precision


@pytest.mark.parametrize("targets", ["synthetic", "real"])
def test_lower_levels_have_the_teachers_own_noise_and_pure_noise_is_fresh(
    train, teacher, monkeypatch, targets
):
    """At t < 1 the student is shown the noise that its target was made from, and is held to that
    target; at pure noise it is shown new noise, and is not. Real targets have no such noise."""
    shown, losses = [], ladd.student_losses

    def watch(heads, targets, weights, fake, b, s):
        shown.append(b)
        return losses(heads, targets, weights, fake, b, s)

    monkeypatch.setattr(ladd, "student_losses", watch)
    flags = f"--teacher {teacher} --distill-weight 1 --targets {targets} --batch 7"
    out = train("run", flags, MAKING[1:] if targets == "synthetic" else MAKING[2:])
    assert len(shown) == 5  # the first update is of the heads alone
    for b in shown:
        assert torch.equal(b.paired, b.t < 1)
        if targets == "real":
            continue
        file = torch.load(out / "synthetic" / "00000.pt", weights_only=True)
        made = sample.noise_of(file["seed"], "synthesis", file["index"], b.x0.shape[1:])
        for image, level, own in zip(b.x0, b.t, b.noise, strict=True):
            row = (file["x0"].float() - image).abs().flatten(1).sum(1).argmin()
            assert torch.equal(own, made[row]) == (level < 1)


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


def test_every_update_has_images_of_its_own(train, seen):
    """6 updates of 5 see images 0 to 29; of the synthetic set 6 updates of 4 see 0 to 23."""
    train("run")
    assert [i for i in seen[data.Shapes] if i < data.SYNTHETIC_INDEX] == list(range(30))
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


# ---------------------------------------------------------------------------------------------
# A given teacher
# ---------------------------------------------------------------------------------------------


def test_a_given_teacher_is_used_as_it_is(teacher, student):
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


def test_another_runs_teacher_and_samples_are_taken_over(launch, whole, capsys):
    """--from: linked, not made again; refused, with the field, where they would be others."""
    for stage in ("teacher", "synthesis"):
        assert launch("run", f"{FEW} --from {whole} --heads-lr 1 --stage {stage}") == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert launch("run", f"{FEW} --from {whole} --heads-lr 1 --stage distillation") == 0
    assert not same("run/student.pt", whole / "student.pt")
    for name in ("teacher.pt", "synthetic/00000.pt"):
        with open(f"run/{name}", "rb") as mine, open(whole / name, "rb") as theirs:
            assert mine.read() == theirs.read()
    assert launch("other", f"{FEW} --from {whole} --synthetic-cfg 2") == 2
    assert "synthetic_cfg 4.0 → 2.0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Diversity
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", COLLAPSES)
def test_the_probe_sees_a_collapse_of_a_run_in_the_teachers_features(whole, monkeypatch, case):
    """Its captions come again, which those of a batch need not; equal images count once; no
    randomness is used up. The fakes are put in the student's place."""
    collapse, low, high = COLLAPSES[case]
    run = run_of(["--batch", "32", "--out", whole])
    order = torch.randperm(32, generator=seeded(0))
    teacher, asked = ladd.load(run, "teacher"), []

    def batch(run, samples, step):
        """Every fourth batch has the captions that repeat; the fifth is the first once more."""
        repeated = [f"caption {k}" for k in range(16) for _ in range(2)]
        captions = [f"another {step} {i}" for i in range(32)] if step % 4 else repeated
        x0 = alike(100 if step == 4 else 100 + step, 16)[order]
        text, t = run.text_encoder([captions[i] for i in order]), torch.full((32,), 0.5)
        noises = torch.randn(2, *x0.shape, generator=seeded(step))
        return ladd.Batch(x0, text, t, noises[0], t < 1, t, noises[1], order, t == 1)

    def predict(student, x0, text, t, noise):
        asked.append((x0, text.pooled, t))
        pick = text.pooled.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
        fakes = torch.empty_like(x0)
        fakes[pick] = collapse((x0 + 0.5 * noise)[pick])
        return fakes

    monkeypatch.setattr(ladd, "draw_batch", batch)
    monkeypatch.setattr(ladd, "student_predict", predict)
    before = torch.get_rng_state()
    probe = ladd.diversity_probe(run, teacher, None)
    values = [probe("a student").item() for _ in "12"]
    assert torch.equal(torch.get_rng_state(), before) and values[0] == values[1]
    x0, pooled, t = asked[0]
    counts = pooled.unique(dim=0, return_counts=True)[1]
    assert counts.tolist() == [4] * 8 and len(x0.flatten(1).unique(dim=0)) == 32
    assert set(t.tolist()) == {run.settings.levels[0]}
    assert low - 0.1 <= values[0] <= high + (0.3 if high > 0.01 else 0)
