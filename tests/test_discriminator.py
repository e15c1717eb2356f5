"""The heads and the losses of the discriminator against closed forms.

Sizes differ from one another, so that a swapped dimension is an error.
"""

import pytest
import torch

from discriminator import Discriminator, hinge_d, hinge_g, r1

B, D, HIDDEN, POOLED, h, w = 4, 12, 32, 5, 3, 7  # two norm groups of 16 channels
TAPS = (0, 2, 3)
EXACT = dict(rtol=1e-10, atol=1e-10)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(taps=TAPS, seed=0):
    """A discriminator whose every parameter is random, norms near 1."""
    model = Discriminator(width=D, taps=taps, pooled_dim=POOLED, hidden=HIDDEN, cond_dim=10)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() == 1 else p[0].numel() ** -0.5
        is_norm = "norm" in name and name.endswith("weight")
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale + is_norm)
    return model


def batch(size=B, count=3, grid=(h, w)):
    """Features of `count` blocks, the level of re-noising, pooled text, and the grid."""
    features = [randn(size, grid[0] * grid[1], D, seed=i) for i in range(count)]
    return features, torch.linspace(0.1, 0.9, size), randn(size, POOLED, seed=9), *grid


# ---------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------


def test_hinge_losses_equal_the_closed_form():
    """L_D = mean max(0, 1 - real) + mean max(0, 1 + fake), L_G = -mean fake."""
    real = torch.tensor([[2.0, 0.5, -1.0], [1.0, 0.0, 3.0]])
    fake = torch.tensor([[-2.0, 0.5], [-0.25, 1.0]])
    assert hinge_d(real, fake).item() == pytest.approx((0.5 + 2 + 1) / 6 + (1.5 + 0.75 + 2) / 4)
    assert hinge_g(fake).item() == pytest.approx(-(-2 + 0.5 - 0.25 + 1) / 4)


def test_hinge_is_2_for_undecided_heads_and_0_beyond_the_margin():
    """Chance level of the logged discriminator loss: logits 0 give 1 + 1."""
    zero, sure = torch.zeros(2, 3), torch.full((2, 3), 1.5)
    assert hinge_d(zero, zero).item() == 2
    assert hinge_d(sure, -sure).item() == 0
    assert hinge_d(-sure, sure).item() == 5


def test_hinge_gradients_pull_real_up_and_fake_down_only_within_the_margin():
    """∂L_D = -1[real < 1]/n on real, +1[fake > -1]/n on fake; ∂L_G = -1/n everywhere."""
    real = torch.tensor([2.0, 0.5, -3.0, 0.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.5, 3.0, 0.0], requires_grad=True)
    grad_real, grad_fake = torch.autograd.grad(hinge_d(real, fake), (real, fake))
    assert grad_real.tolist() == [0, -0.25, -0.25, -0.25]
    assert grad_fake.tolist() == [0, 0.25, 0.25, 0.25]
    (grad,) = torch.autograd.grad(hinge_g(fake), fake)
    assert grad.tolist() == [-0.25] * 4


def test_losses_of_bf16_logits_are_averaged_in_float32():
    """bf16 would round 1 - 0.0021 to 1 - 0.0039 or 1: the margin would lose the logit."""
    logits = torch.full((3, 5), 0.0021).bfloat16()
    value = logits[0, 0].item()
    assert hinge_g(logits).dtype == hinge_d(logits, logits).dtype == torch.float32
    assert hinge_d(logits, -logits).item() == pytest.approx(2 * (1 - value), rel=1e-6)


# ---------------------------------------------------------------------------------------------
# The heads
# ---------------------------------------------------------------------------------------------


def formula_group_norm(x, norm):
    """Per sample and group of channels, over channels and positions, eps 1e-5. x (B, N, F)."""
    groups = []
    for g in x.chunk(norm.num_groups, dim=2):
        centred = g - g.mean((1, 2), keepdim=True)
        groups.append(centred / (centred.square().mean((1, 2), keepdim=True) + 1e-5).sqrt())
    return torch.cat(groups, dim=2) * norm.weight + norm.bias


def formula_head(head, tokens, cond):
    """The head written with matrix products on tokens (B, N, D), positions in rows. -> (B, h, w)"""
    leaky = lambda a: torch.where(a > 0, a, 0.2 * a)  # noqa: E731
    centred = tokens - tokens.mean(2, keepdim=True)
    x = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    x = leaky(
        formula_group_norm(x @ head.reduce.weight[:, :, 0, 0].T + head.reduce.bias, head.norm1)
    )
    grid = x.new_zeros(len(x), h + 2, w + 2, HIDDEN)  # a border of zeros
    grid[:, 1:-1, 1:-1] = x.view(-1, h, w, HIDDEN)
    convolved = head.conv.bias.expand(len(x), h, w, HIDDEN)
    for i in range(3):
        for j in range(3):
            convolved = convolved + grid[:, i : i + h, j : j + w] @ head.conv.weight[:, :, i, j].T
    x = (x + leaky(formula_group_norm(convolved.flatten(1, 2), head.norm2))) / 2**0.5
    x = x @ head.project.weight[:, :, 0, 0].T + head.project.bias
    projection = cond @ head.condition.weight.T + head.condition.bias
    return ((x * projection[:, None]).sum(2) / x.shape[2] ** 0.5).view(-1, h, w)


def test_a_head_computes_its_formula_with_positions_row_by_row():
    """LayerNorm, 1×1, residual 3×3 over the grid, ⟨features, condition⟩/√P; token i·w + j."""
    head = small().heads[1].double()
    tokens, cond = randn(B, h * w, D, dtype=torch.float64), randn(B, 10, dtype=torch.float64)
    assert head.norm1.num_groups == 2
    logits = head(tokens, cond, h, w)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, formula_head(head, tokens, cond), **EXACT)


@pytest.mark.parametrize("size", [1, B])
@pytest.mark.parametrize("grid", [(h, w), (w, h), (1, 2)])
def test_logits_have_one_value_per_sample_head_and_position(size, grid):
    """(B, K, h, w), for grids that are not square and for a batch of one."""
    logits = small()(*batch(size=size, grid=grid))
    assert logits.shape == (size, len(TAPS), *grid)
    assert logits.isfinite().all() and logits.std() > 0.1


@pytest.mark.parametrize("k", range(len(TAPS)))
def test_every_head_reads_its_own_block_and_no_other(k):
    """Changing the features of block k changes the logits of head k only."""
    model, (features, *rest) = small(), batch()
    before = model(features, *rest)
    features[k] = features[k] + randn(*features[k].shape, seed=20)
    change = (model(features, *rest) - before).abs().amax((0, 2, 3))
    assert [bool(c > 1e-2) for c in change] == [i == k for i in range(len(TAPS))]
    assert change.sum() == change[k]


def test_no_two_heads_share_a_weight():
    """One independent head per tapped block: the same features give different logits."""
    model, (features, *rest) = small(), batch()
    logits = model([features[0]] * 3, *rest)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (logits[:, a] - logits[:, b]).abs().max() > 0.1


@pytest.mark.parametrize("count", [len(TAPS) - 1, len(TAPS) + 1])
def test_features_of_too_few_or_too_many_blocks_are_refused(count):
    """A head without features, or features without a head, is a wrong list of taps."""
    with pytest.raises(ValueError, match="zip"):
        small()(*batch(count=count))


@pytest.mark.parametrize("argument", ["t_hat", "pooled"])
def test_every_head_is_conditioned_on_the_noise_level_and_the_pooled_text(argument):
    """Another t̂, or another caption, changes the logits of its sample in every head."""
    model, (features, t_hat, pooled, *grid) = small(), batch()
    before = model(features, t_hat, pooled, *grid)
    changed = {"t_hat": t_hat.clone(), "pooled": pooled.clone()}
    changed[argument][1] += 0.05 if argument == "t_hat" else 1
    change = model(features, changed["t_hat"], changed["pooled"], *grid) - before
    assert change[1].abs().amax((1, 2)).min() > 1e-2
    assert change[[0, 2, 3]].abs().max() < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_of_a_sample_do_not_depend_on_the_rest_of_its_batch(training):
    """No batch statistics: alone, in a batch, in training and evaluation, the same numbers."""
    model = small().train(training)
    features, t_hat, pooled, *grid = batch()
    together = model(features, t_hat, pooled, *grid)
    for i in range(B):
        one = slice(i, i + 1)
        alone = model([f[one] for f in features], t_hat[one], pooled[one], *grid)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert not list(model.buffers())  # no running state that real and fake would share


def test_the_scale_and_offset_of_a_block_s_tokens_do_not_matter():
    """The norm of the image tokens grows with depth; LayerNorm on the way in takes it out."""
    model, (features, *rest) = small(), batch()
    scaled = [1000 * f + 50 for f in features]
    torch.testing.assert_close(model(scaled, *rest), model(features, *rest), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1, 1000])
def test_bf16_autocast_agrees_with_float32_and_stays_finite(scale):
    """Loosely: bf16 has steps of 0.4 %. Losses and their gradients are finite as well."""
    model, (features, *rest) = small(), batch()
    features = [(scale * f).requires_grad_() for f in features]
    exact = model(features, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(features, *rest)
        loss = hinge_d(logits, logits) + r1(logits, features)
    assert 0 < (logits.float() - exact).norm() / exact.norm() < 0.05
    loss.backward()
    assert loss.isfinite()
    grads = [p.grad for p in model.parameters()] + [f.grad for f in features]
    assert all(g.isfinite().all() for g in grads)


def test_the_generator_loss_reaches_every_sample_of_every_tapped_feature():
    """-E[D(fake)] must pull on the features, or no gradient arrives at the student."""
    model, (features, *rest) = small(), batch()
    features = [f.requires_grad_() for f in features]
    hinge_g(model(features, *rest)).backward()
    assert all(f.grad.abs().amax((1, 2)).min() > 1e-6 for f in features)


def test_the_discriminator_loss_reaches_every_parameter():
    """No head, norm or embedding is built and left unused."""
    model, (features, *rest) = small(), batch()
    hinge_d(model(features, *rest), model([f.flip(0) for f in features], *rest)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in model.parameters())


def test_a_discriminator_is_rebuilt_from_its_config_and_state_dict():
    """What a checkpoint stores is enough."""
    model = small()
    copy = Discriminator(**model.config)
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy(*batch()), model(*batch()))


# ---------------------------------------------------------------------------------------------
# R1
# ---------------------------------------------------------------------------------------------


def test_r1_of_a_linear_head_is_the_squared_norm_of_its_weights():
    """D(f) = Σ_k ⟨f_k, w_k⟩ has ∇ = w_k in every sample: R1 = mean over blocks of ‖w_k‖²."""
    weights = [randn(6, D, seed=5), randn(6, D, seed=6)]
    features = [randn(B, 6, D, seed=i).requires_grad_() for i in range(2)]
    pairs = zip(features, weights, strict=True)
    logits = torch.stack([(f * a).sum(2) for f, a in pairs], dim=1)  # (B, K, N)
    expected = sum(a.square().sum() for a in weights) / 2
    torch.testing.assert_close(r1(logits, features), expected)


def test_r1_averages_over_the_batch_and_sums_over_tokens_and_channels():
    """D(f) = ‖f‖²/2 has ∇ = f: R1 = mean over samples of ‖f‖²."""
    f = randn(B, 6, D).requires_grad_()
    logits = f.square().sum(2, keepdim=True) / 2
    torch.testing.assert_close(r1(logits, [f]), (f.square().sum() / B).detach())


def test_r1_trains_every_parameter_that_the_slope_of_the_logits_depends_on():
    """All but the biases after which the head is (piecewise) linear in the features."""
    model, (features, *rest) = small(), batch()
    features = [f.requires_grad_() for f in features]
    r1(model(features, *rest), features).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    untouched = {name for name, g in grads.items() if g is None or g.abs().max() == 0}
    flat = {
        f"heads.{k}.{bias}" for k in range(len(TAPS)) for bias in ("project.bias", "norm2.bias")
    }
    assert untouched == flat


def test_the_gradient_of_r1_is_the_second_derivative_of_the_head():
    """∂/∂weights of mean ‖∂D/∂f‖², against the head written out in matrix products."""
    head = small().heads[1].double()
    tokens = randn(B, h * w, D, dtype=torch.float64).requires_grad_()
    cond = randn(B, 10, dtype=torch.float64)
    weights = [head.reduce.weight, head.conv.weight, head.norm1.weight, head.condition.weight]

    (slope,) = torch.autograd.grad(
        formula_head(head, tokens, cond).sum(), tokens, create_graph=True
    )
    expected = torch.autograd.grad(slope.square().sum() / B, weights)
    penalty = r1(head(tokens, cond, h, w)[:, None], [tokens])
    for got, wanted in zip(torch.autograd.grad(penalty, weights), expected, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # r1 sums in float32


# ---------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------


def sample_pair(kind, generator, size=16):
    """Real and fake tokens (size, N, D) with their pooled text, told apart by one thing only."""

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    row, col = torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)
    direction = torch.eye(D)[0] * 2
    text = torch.eye(POOLED)[torch.randint(2, (size,), generator=generator)]
    real_text = fake_text = text
    if kind == "token":  # one channel has another mean
        real, fake = draw(size, h * w, D) + direction, draw(size, h * w, D)
    elif kind == "arrangement":  # stripes along rows or along columns, of the same two tokens
        stripes = torch.stack([1 - 2 * (axis % 2) for axis in (row, col)]).view(2, 1, h * w, 1)
        flip = 1 - 2 * torch.randint(2, (2, size, 1, 1), generator=generator)
        real, fake = draw(2, size, h * w, D) + flip * stripes * direction
    else:  # the same images, under their own or under the other caption
        shown = 1 - 2 * text[:, 1, None, None]
        real, fake = (draw(size, h * w, D) + shown * direction for _ in range(2))
        fake_text = text[:, [1, 0, 2, 3, 4]]
    return (real, real_text), (fake, fake_text)


@pytest.mark.parametrize("kind", ["token", "arrangement", "caption"])
def test_training_separates_what_differs_in_tokens_in_arrangement_or_in_caption(kind):
    """From undecided (hinge 2, half of the pairs ranked right) to nearly all pairs, unseen ones."""
    torch.manual_seed(0)
    model = Discriminator(width=D, taps=(0, 1), pooled_dim=POOLED, hidden=HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def logits(size=16):
        pair = sample_pair(kind, generator, size)
        return [model([f, f], torch.full((size,), 0.5), text, h, w) for f, text in pair]

    def ranked_right():
        real, fake = (out.mean((1, 2, 3)) for out in logits(200))
        return (real > fake).float().mean().item()

    before = hinge_d(*logits()).item()
    for _ in range(60):
        optimizer.zero_grad()
        hinge_d(*logits()).backward()
        optimizer.step()
    assert 1.7 < before < 2.3
    assert hinge_d(*logits(200)).item() < 0.7
    assert ranked_right() > 0.95
