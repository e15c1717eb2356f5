"""The methods that LADD is compared with: their mathematics, and that they train.

All of them start from the same teacher and samples, which are those of the fixture `whole`.
"""

import importlib
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, MAKING, Constant, cut_at, randn, same, update_cost, updates

import data
import ladd
import sample
from methods.consistency import consistency_loss
from methods.dmd import matching_gradient, matching_loss

METHODS = ["regression", "consistency", "add", "dmd"]
X0, NOISE = randn(4, 3, 4, 16, seed=4), randn(4, 3, 4, 16, seed=5)


def module_of(name):
    return ladd if name == "ladd" else importlib.import_module(f"methods.{name}")


def how(name):
    """ladd.main's arguments for a method."""
    return dict(distil=module_of(name).distil, method=name)


@pytest.mark.parametrize(
    ("name", "named"), [("hyper_sd", "the fifth must be 0"), ("dpo", "--pairs")]
)
def test_captions_that_ask_nothing_are_refused_before_anything_is_trained(
    launch, monkeypatch, tmp_path, capsys, name, named
):
    """Where a method learns from the answers, as of captions that have no word in common."""
    (dataset := data.load("shapes", [(12, 12)])).attributes = {}
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    assert launch("out", FEW, **how(name), kind=module_of(name).Settings) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--sweep=t_hat_mean=0", "--explain", "--dry-run"])
def test_a_tool_of_ladds_is_refused_and_not_named_by_another_methods_program(
    launch, tmp_path, capsys, flag
):
    assert launch("out", f"{FEW} {flag}", **how("dmd")) == 2
    said = capsys.readouterr().err
    assert "python ladd.py … --sweep method=dmd" in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())
    assert launch("out", "--help", **how("dmd")) == 0
    assert flag.split("=")[0] not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Consistency
# ---------------------------------------------------------------------------------------------


def test_a_consistent_student_has_no_consistency_loss():
    """On straight paths of one velocity v every x_t leads to the same x̂_0 = x_t - t·v; a student
    that is off by d in v is off by t·d, its average that is off by e by t'·e."""
    v = randn(4, 3, 4, 16, seed=1)
    b = SimpleNamespace(x0=X0, noise=NOISE, text=())
    t, t_next = torch.tensor([0.8, 0.5, 0.3, 1.0]), torch.tensor([0.6, 0.4, 0.0, 0.9])
    true, student, average = Constant(v), Constant(v + 3), Constant(v + 1)
    teacher, seen = lambda x, t: seen.append((x, t)) or v, []
    assert consistency_loss(true, true, teacher, b, t, t_next).abs() < 1e-9
    loss = consistency_loss(student, average, teacher, b, t, t_next)
    assert loss.item() == pytest.approx((3 * t - t_next).abs().mean().item(), abs=2e-3)
    xt = sample.add_noise(X0, NOISE, t)
    assert torch.equal(student.x, xt) and torch.equal(student.t, t)
    assert torch.equal(seen[-1][0], xt) and torch.equal(seen[-1][1], t)
    x_next = xt + (t_next - t).view(-1, 1, 1, 1) * v  # one Euler step of the teacher
    torch.testing.assert_close(average.x, x_next)
    assert torch.equal(average.t, t_next)


def test_the_consistent_students_levels_go_down_to_the_image(train, monkeypatch, whole):
    """Each to the next lower one of 32, the last to 0."""
    steps = set()

    def watched(student, ema, velocity, b, t, t_next):
        steps.update(zip((32 * t).tolist(), (32 * t_next).tolist(), strict=True))
        return consistency_loss(student, ema, velocity, b, t, t_next)

    monkeypatch.setattr("methods.consistency.consistency_loss", watched)
    train("out", f"--from {whole} --iterations 20", MAKING[2:], **how("consistency"))
    assert len(steps) > 20 and all(a == pytest.approx(b + 1, abs=1e-4) for a, b in steps)
    assert min(b for _, b in steps) == 0


# ---------------------------------------------------------------------------------------------
# Distribution matching
# ---------------------------------------------------------------------------------------------


def test_matching_stops_where_the_two_scores_agree():
    """The gradient is zero where the fakes' score is the teacher's, and points from the teacher's
    prediction to the other one: (t·(v - s)) / mean|x̂_0 - (x_t - t·v)|."""
    t = torch.tensor([0.8, 0.5, 0.3, 0.9], dtype=torch.float64)
    v, other = randn(4, 3, 4, 16, seed=1), randn(4, 3, 4, 16, seed=2)
    teacher = lambda x, t: v  # noqa: E731
    assert matching_gradient(X0, NOISE, t, teacher, teacher).abs().max() == 0
    got = matching_gradient(X0, NOISE, t, teacher, lambda x, t: other)
    far = t.view(-1, 1, 1, 1) * (NOISE - X0 - v)  # x̂_0 - real = -t·(ε - x̂_0 - v)
    want = t.view(-1, 1, 1, 1) * (v - other) / far.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_step_on_the_matching_loss_goes_where_the_gradient_says():
    """Away from the fakes' prediction, towards the teacher's: against fake - real."""
    x0_hat = randn(4, 3, 4, 16, seed=1).requires_grad_()
    gradient = randn(4, 3, 4, 16, seed=2)
    matching_loss(x0_hat, gradient).backward()
    torch.testing.assert_close(x0_hat.grad, gradient / gradient.numel())


# ---------------------------------------------------------------------------------------------
# Regression, ADD
# ---------------------------------------------------------------------------------------------


def test_regression_comes_nearer_to_the_teachers_samples(train, whole):
    flags = f"--from {whole} --iterations 60"
    flags += " --levels 1 --student-lr 2e-3"  # always from pure noise, so that losses compare
    out = train("out", flags, MAKING[2:], **how("regression"))
    losses = [row["loss"] for row in updates(out) if row["stage"] == "distillation"]
    assert statistics.fmean(losses[-10:]) < 0.8 * statistics.fmean(losses[:10])


def test_regression_to_real_images_is_refused(launch, teacher, capsys):
    """They have no noise that they were made of."""
    flags = f"--smoke --precision fp32 --teacher {teacher} --targets real --stage distillation"
    flags += " --size 12 --width 16 --depth 3 --attention-heads 2 --text-dim 10 --device cpu"
    assert launch("out", flags, **how("regression")) == 2
    assert "--targets real" in capsys.readouterr().err


def test_adds_heads_learn_to_tell_and_its_student_to_please_them(train, whole):
    """Heads alone rank real above fake mostly; to heads that stay as they are the
    student's samples look more and more real."""
    flags = f"--from {whole} --judge-steps 5 --iterations 60 --distill-weight 0"
    learning, rows = dict(heads="--heads-warmup 59 --heads-lr 1e-2", student="--heads-lr 1e-9"), {}
    for name, own in learning.items():
        rows[name] = updates(train(name, f"{flags} {own}", MAKING[2:], **how("add")))[-60:]
    assert statistics.fmean(row["ranked"] for row in rows["heads"][-45:]) > 0.7
    early, late = rows["student"][5:15], rows["student"][-10:]
    assert statistics.fmean(r["d_fake"] for r in late) > statistics.fmean(
        r["d_fake"] for r in early
    )


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "paired"), [("ladd", 0), ("add", 0), ("regression", 1),
                                                ("consistency", 0), ("dmd", 0)])  # fmt: skip
def test_at_pure_noise_regression_alone_is_shown_the_samples_own(
    train, monkeypatch, whole, method, paired
):
    """There only its own noise tells a sample, and what is held to it becomes the mean of all."""
    module, drawn = module_of(method), []
    draw = module.draw_batch

    def watched(*arguments, **options):
        drawn.append(draw(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(module, "draw_batch", watched)
    flags = f"--from {whole} --levels 1 --iterations 2 --judge-steps 5"
    train("out", flags, MAKING[2:], **how(method))
    assert bool(drawn[-1].paired.all()) == bool(drawn[-1].paired.any()) == bool(paired)


@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_trains_the_student_and_goes_on_where_it_was_cut(
    launch, train, monkeypatch, whole, method
):
    """From the same teacher and samples as LADD; bit for bit also after a cut."""
    flags, stage = f"--from {whole} --save-every 2 --judge-steps 5", MAKING[2:]
    want = train("want", flags, stage, **how(method))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, "distillation", 4)
        train("cut", flags, stage, **how(method))
    cut = train("cut", flags, stage, **how(method))
    assert same(want / "student.pt", cut / "student.pt")
    assert not same(want / "student.pt", whole / "student.pt")
    assert not same(want / "student.pt", whole / "teacher.pt")
    assert updates(want) == updates(cut)
    assert not list(cut.glob("*state*"))


def test_a_folder_of_another_method_is_refused(train, launch, whole, capsys):
    flags = f"--from {whole} --iterations 2"
    out = train("out", flags, MAKING[2:], **how("regression"))
    with pytest.raises(AssertionError):
        train("out", flags, MAKING[2:])
    assert f"{out.name} was made with other settings (method" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["regression", "consistency", "dmd"])
def test_a_baselines_update_costs_its_units(train, whole, method):
    """The loop itself, in forwards of the network."""
    cost, forward = update_cost(train, whole / "teacher.pt", "--heads-warmup 0", **how(method))
    units = cost / forward
    assert module_of(method).UNITS - 0.5 < units <= module_of(method).UNITS + 0.05
