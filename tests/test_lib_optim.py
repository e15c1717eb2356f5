"""Optimisers, their step, learning rates and the average of the weights, against closed forms."""

import math
from typing import NamedTuple

import pytest
import torch
from conftest import randn

from lib.optim import Muon, learning_rate, make_optimizers, split, step_all, update_ema
from mmdit import MMDiT


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    """A straight line to 1 in 40 updates, 1, and a straight line towards 0 in the last 30 %."""
    rates = [learning_rate(step, 1000, 0.3) for step in range(1000)]
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
        update_ema(ema, model, 0.3, k)
        decays.append(min(0.3, (k + 1) / (k + 10)))
    want = start * math.prod(decays)
    for k, value in enumerate(values):
        want = want + value * (1 - decays[k]) * math.prod(decays[k + 1 :])
    torch.testing.assert_close(ema.weight.detach(), want, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


def player(weight=1.0, lr=0.1):
    """A network of one row of three equal weights, and its optimisers."""
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.data.fill_(weight)
    return model, make_optimizers(model, lr, 0.9)


def learn(model, factor=1.0):
    """Leaves the gradient of factor·‖w‖² in the network."""
    (factor * model.weight.square().sum()).backward()


def test_a_step_follows_the_gradient_and_forgets_it():
    """AdamW's first step is the learning rate, at any gradient; the norm is the unclipped one."""
    model, optimizers = player()
    learn(model)
    (norm,) = step_all((optimizers, model, 1.0, 1.0))
    assert norm.item() == pytest.approx(12**0.5)  # ‖2·w‖, before it is clipped
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.9))
    assert model.weight.grad is None


def test_the_gradients_of_parts_add_up_and_those_of_the_last_update_do_not():
    """Two backwards before a step are one of their sum; a step begins afresh."""
    model, optimizers = player()
    for count in (2, 1):
        model.weight.data.fill_(1.0)
        for _ in range(count):
            learn(model)
        (norm,) = step_all((optimizers, model, math.inf, 1.0))
        assert norm.item() == pytest.approx(count * 12**0.5)


def test_the_gradient_is_clipped_to_its_norm():
    """Seen in AdamW's first moment: a tenth of the gradient."""
    for clip, length in ((0.5, 0.5), (math.inf, 12**0.5)):
        model, optimizers = player()
        learn(model)
        step_all((optimizers, model, clip, 1.0))
        moment = optimizers[0].state[model.weight]["exp_avg"]
        assert moment.norm().item() == pytest.approx(0.1 * length, rel=1e-4)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.0])
def test_the_rate_is_a_factor_of_every_optimisers_own(rate):
    model, optimizers = player(lr=0.2)
    for _ in range(2):  # and not of the last update's
        model.weight.data.fill_(1.0)
        learn(model)
        step_all((optimizers, model, 1.0, rate))
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 1 - 0.2 * rate))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loser", [0, 1])
def test_a_gradient_that_is_not_finite_in_one_player_moves_neither(bad, loser):
    """Nor their optimisers; both gradients are forgotten, and the next update is applied."""
    players = [player(1.0), player(2.0)]
    for i, (model, _) in enumerate(players):
        learn(model, bad if i == loser else 1.0)
    games = [(optimizers, model, 1.0, 1.0) for model, optimizers in players]
    assert all(norm.isnan() for norm in step_all(*games))
    for (model, (optimizer,)), weight in zip(players, (1.0, 2.0), strict=True):
        assert (model.weight == weight).all() and model.weight.grad is None
        assert not optimizer.state
        learn(model)
    assert all(norm.isfinite() for norm in step_all(*games))
    for (model, _), weight in zip(players, (0.9, 1.9), strict=True):
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), weight))


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_every_weight_has_exactly_one_optimiser(muon_lr):
    """Muon gets the matrices of the blocks and nothing else."""
    shape = dict(depth=3, width=16, heads=2, patch=2, channels=3, pos_size=8)
    model = MMDiT(**shape, context_dim=10, pooled_dim=10, qk_norm=False)
    optimizers = make_optimizers(model, 1e-3, 0.9, muon_lr=muon_lr)
    trained = [[id(p) for group in o.param_groups for p in group["params"]] for o in optimizers]
    assert sorted(i for own in trained for i in own) == sorted(id(p) for p in model.parameters())
    assert len(optimizers) == (2 if muon_lr else 1)
    if muon_lr:
        blocks = {id(p) for p in model.joint_blocks.parameters() if p.ndim == 2}
        assert set(trained[1]) == blocks


def test_muon_of_all_matrices_of_a_shape_is_torchs_of_each():
    """To what bf16 resolves; wide, tall and square ones, three steps."""
    shapes = [(8, 24), (24, 8), (8, 8)] * 2
    starts = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    networks = [[torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2)]
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.0, adjust_lr_fn="original")
    optimizers = [torch.optim.Muon(networks[0], **options), Muon(networks[1], **options)]
    for step in range(3):
        for network, optimizer in zip(networks, optimizers, strict=True):
            for i, parameter in enumerate(network):
                parameter.grad = randn(*parameter.shape, seed=100 * step + i)
            optimizer.step()
    for theirs, ours in zip(*networks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.005)


# ---------------------------------------------------------------------------------------------
# Parts of a batch
# ---------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: torch.Tensor
    y: tuple


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_batch_is_split_into_equal_parts_of_all_its_tensors(n):
    """In order, without gaps; each part is of the batch's own kind."""
    batch = Pair(torch.arange(6), (torch.arange(12).view(6, 2),))
    parts = split(batch, n)
    assert [len(part.x) for part in parts] == [6 // n] * n
    assert all(isinstance(part, Pair) for part in parts)
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert torch.equal(torch.cat([part.y[0] for part in parts]), batch.y[0])
