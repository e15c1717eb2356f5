"""The network against closed forms, against `diffusers`, and against the released checkpoints.

Sizes differ from one another wherever they can, so that a swapped dimension is an error. Weights
are random everywhere: at its initialisation adaLN-Zero hides what the blocks compute.
"""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdit import JointBlock, MMDiT, PatchEmbed, attention, position_table, timestep_sinusoid
from sd3.weights import PREFIX, meta_sd3, own_names
from tools.plan import kept_by

TINY = dict(
    depth=3, width=24, heads=4, patch=2, channels=5, context_dim=7, pooled_dim=9, pos_size=8
)
EXACT = dict(rtol=1e-10, atol=1e-10)


def randomise(model, seed=0):
    """Every weight drawn so that signals keep their size: matrices N(0, 1/fan_in), norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        is_norm = p.dim() == 1 and name.endswith("weight")
        scale = 0.3 if p.dim() == 1 else p[0].numel() ** -0.5
        p.data.copy_(draw * scale + is_norm)
    return model


def tiny(seed=0, **changes):
    """A small network with random weights in float64."""
    return randomise(MMDiT(**TINY | changes), seed).double()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(config=TINY, H=6, W=10, B=2, M=3):
    """A noisy latent of H × W, noise levels, M text tokens and the pooled text."""
    return (
        randn(B, config["channels"], H, W, seed=1),
        torch.linspace(0.2, 0.9, B, dtype=torch.float64),
        randn(B, M, config["context_dim"], seed=2),
        randn(B, config["pooled_dim"], seed=3),
    )


# ---------------------------------------------------------------------------------------------
# The released sizes and names
# ---------------------------------------------------------------------------------------------

SD35_MEDIUM = dict(depth=24, qk_norm=True, attn2_blocks=13, pos_size=384)
PUBLISHED_PARAMETERS = [
    (dict(depth=12, qk_norm=False), 254_784_064),
    (dict(depth=15, qk_norm=False), 496_066_624),
    (dict(depth=18, qk_norm=False), 856_159_552),
    (dict(depth=21, qk_norm=False), 1_358_950_720),
    (dict(depth=24, qk_norm=False), 2_028_328_000),
    (dict(depth=30, qk_norm=False), 3_962_392_384),
    (dict(depth=38, qk_norm=False), 8_056_617_792),
    (dict(depth=38, qk_norm=True), 8_056_627_520),
    (SD35_MEDIUM, 2_243_171_520),
]
PUBLISHED_TENSORS = [
    (dict(depth=24, qk_norm=False), 491),
    (dict(depth=38, qk_norm=True), 923),
    (SD35_MEDIUM, 665),
]


def size_id(value):
    return "-".join(f"{k}{v:d}" for k, v in value.items()) if isinstance(value, dict) else None


def on_meta(config):
    with torch.device("meta"):
        model = MMDiT(**config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())  # no memory is taken
    return model


@pytest.mark.parametrize(("config", "count"), PUBLISHED_PARAMETERS, ids=size_id)
def test_parameter_counts_are_those_of_the_published_sizes(config, count):
    """Computed from the released shapes; the position table is a buffer and not counted."""
    assert sum(p.numel() for p in on_meta(config).parameters()) == count


@pytest.mark.parametrize(("config", "count"), PUBLISHED_TENSORS, ids=size_id)
def test_tensor_counts_are_those_of_the_released_files(config, count):
    """SD3-medium 491, SD3.5-large 923, SD3.5-medium 665 tensors, position table included."""
    assert len(on_meta(config).state_dict()) == count


def official_shapes(h, M, D_c, D_p, C, p):
    """Names and shapes of the released format at depth 2, with QK-norm, attn2 in block 0."""
    d = 6
    linears = {
        "t_embedder.mlp.0": (h, 256),
        "t_embedder.mlp.2": (h, h),
        "y_embedder.mlp.0": (h, D_p),
        "y_embedder.mlp.2": (h, h),
        "context_embedder": (h, D_c),
        "final_layer.linear": (p * p * C, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    shapes = {"pos_embed": (1, M * M, h)}
    shapes |= {"x_embedder.proj.weight": (h, C, p, p), "x_embedder.proj.bias": (h,)}
    for block, chunks in {
        "joint_blocks.0.context_block": 6,
        "joint_blocks.0.x_block": 9,
        "joint_blocks.1.context_block": 2,
        "joint_blocks.1.x_block": 6,
    }.items():
        linears[f"{block}.adaLN_modulation.1"] = (chunks * h, h)
        if chunks > 2:  # the last context block is pre-only: its tokens are not updated
            linears |= {f"{block}.mlp.fc1": (4 * h, h), f"{block}.mlp.fc2": (h, 4 * h)}
        for attn in ["attn", "attn2"] if chunks == 9 else ["attn"]:
            linears[f"{block}.{attn}.qkv"] = (3 * h, h)
            if chunks > 2:
                linears[f"{block}.{attn}.proj"] = (h, h)
            shapes |= {f"{block}.{attn}.ln_q.weight": (d,), f"{block}.{attn}.ln_k.weight": (d,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_every_tensor_has_its_official_name_and_shape():
    """The state dict is the released format; a last context block has only qkv, norms, 2·h."""
    model = MMDiT(**TINY | dict(depth=2, qk_norm=True, attn2_blocks=1))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == official_shapes(h=24, M=8, D_c=7, D_p=9, C=5, p=2)


def test_without_qk_norm_the_names_are_the_same_less_the_norms():
    """SD3-medium has no ln_q and ln_k."""
    with_norm = MMDiT(**TINY | dict(depth=2, qk_norm=True)).state_dict()
    without = MMDiT(**TINY | dict(depth=2, qk_norm=False)).state_dict()
    assert set(without) == {name for name in with_norm if ".ln_" not in name}


# ---------------------------------------------------------------------------------------------
# Agreement with diffusers on the three released architectures
# ---------------------------------------------------------------------------------------------

# variant: (qk_norm in diffusers, head dim, blocks with a second image attention)
VARIANTS = {
    "sd3-medium": (None, 64, ()),
    "sd3.5-large": ("rms_norm", 12, ()),
    "sd3.5-medium": ("rms_norm", 12, (0, 1)),
}


def official_state_dict(theirs, depth):
    """A state dict of SD3Transformer2DModel under the official names, qkv fused again."""
    used, out = set(), {}

    def take(name):
        used.add(name)
        return theirs[name]

    def copy(official, *names, swap=False):
        for part in ("weight", "bias"):
            tensor = torch.cat([take(f"{name}.{part}") for name in names])
            # diffusers keeps (scale, shift) where the official file has (shift, scale)
            out[f"{official}.{part}"] = tensor.roll(len(tensor) // 2, 0) if swap else tensor

    def norms(official, q, k):
        for ln, name in (("ln_q", q), ("ln_k", k)):
            if f"{name}.weight" in theirs:
                out[f"{official}.{ln}.weight"] = take(f"{name}.weight")

    out["pos_embed"] = take("pos_embed.pos_embed")
    copy("x_embedder.proj", "pos_embed.proj")
    copy("context_embedder", "context_embedder")
    copy("final_layer.linear", "proj_out")
    copy("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    for official, name in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        copy(f"{official}.mlp.0", f"time_text_embed.{name}.linear_1")
        copy(f"{official}.mlp.2", f"time_text_embed.{name}.linear_2")
    for i in range(depth):
        a, b = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        x, c, last = f"{a}.x_block", f"{a}.context_block", i == depth - 1
        copy(f"{x}.adaLN_modulation.1", f"{b}.norm1.linear")
        copy(f"{x}.attn.qkv", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v")
        copy(f"{x}.attn.proj", f"{b}.attn.to_out.0")
        norms(f"{x}.attn", f"{b}.attn.norm_q", f"{b}.attn.norm_k")
        copy(f"{x}.mlp.fc1", f"{b}.ff.net.0.proj")
        copy(f"{x}.mlp.fc2", f"{b}.ff.net.2")
        if f"{b}.attn2.to_q.weight" in theirs:
            copy(f"{x}.attn2.qkv", f"{b}.attn2.to_q", f"{b}.attn2.to_k", f"{b}.attn2.to_v")
            copy(f"{x}.attn2.proj", f"{b}.attn2.to_out.0")
            norms(f"{x}.attn2", f"{b}.attn2.norm_q", f"{b}.attn2.norm_k")
        copy(f"{c}.adaLN_modulation.1", f"{b}.norm1_context.linear", swap=last)
        added = [f"{b}.attn.add_{part}_proj" for part in "qkv"]
        copy(f"{c}.attn.qkv", *added)
        norms(f"{c}.attn", f"{b}.attn.norm_added_q", f"{b}.attn.norm_added_k")
        if not last:
            copy(f"{c}.attn.proj", f"{b}.attn.to_add_out")
            copy(f"{c}.mlp.fc1", f"{b}.ff_context.net.0.proj")
            copy(f"{c}.mlp.fc2", f"{b}.ff_context.net.2")
    assert used == set(theirs)  # nothing of theirs is left out of the comparison
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_equals_that_of_diffusers_on_the_same_weights(variant):
    """Our network, built by its shapes out of a single file with foreign tensors in it, and
    diffusers' SD3Transformer2DModel give the same velocity on a latent that is not square."""
    diffusers = pytest.importorskip("diffusers")
    qk_norm, head_dim, dual = VARIANTS[variant]
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=14,
        patch_size=2,
        in_channels=5,
        out_channels=5,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        caption_projection_dim=2 * head_dim,
        joint_attention_dim=7,
        pooled_projection_dim=9,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    )
    randomise(theirs).double()
    theirs.pos_embed.pos_embed = randn(1, 64, 2 * head_dim, seed=5)
    official = official_state_dict(theirs.state_dict(), depth=3)
    single_file = {PREFIX + name: tensor for name, tensor in official.items()}
    single_file["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)
    single_file["text_encoders.clip_l.logit_scale"] = torch.tensor(1.0)
    single_file["joint_blocks.7.x_block.attn.qkv.weight"] = torch.randn(3)
    ours = read_off(single_file)

    x, t, context, pooled = inputs(ours.config)
    t = t.float()  # both make the sinusoid in float32
    with torch.no_grad():
        v, _ = ours(x, t, context, pooled)
        expected = theirs(x, context, pooled, 1000 * t, return_dict=False)[0]
    assert expected.std() > 0.1
    # without QK-norm to float64 rounding; diffusers computes the mean square in float32
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5 if qk_norm else 1e-10)


# ---------------------------------------------------------------------------------------------
# The parts against closed forms
# ---------------------------------------------------------------------------------------------


def test_the_timestep_embedding_is_cosines_then_sines_of_1000_t():
    """cos(1000·t·10000^(-i/128)) for i = 0 … 127, then the sines."""
    t = torch.tensor([0.0, 0.003, 0.25, 1.0], dtype=torch.float64)
    angle = 1000 * t[:, None] * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    ours = timestep_sinusoid(t)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-4)  # angles reach 1000


def test_the_timestep_embedding_of_a_bf16_level_is_computed_in_float32():
    """bf16 has 8 bits: an angle of 1000·t rounded to them would be wrong by whole turns."""
    t = torch.tensor([0.123, 0.877]).bfloat16()
    assert torch.equal(timestep_sinusoid(t), timestep_sinusoid(t.float()))


def test_the_position_table_encodes_the_column_first_and_the_row_second_sines_before_cosines():
    """Channels: sin(col·ω), cos(col·ω), sin(row·ω), cos(row·ω), ω_j = 10000^(-j/(D/4))."""
    size, width = 5, 12
    table = position_table(width, size)
    assert table.shape == (1, size * size, width)
    omegas = [10_000 ** (-j / 3) for j in range(3)]
    for row in range(size):
        for col in range(size):
            expected = [f(a * o) for a in (col, row) for f in (math.sin, math.cos) for o in omegas]
            got = table[0, row * size + col]
            torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("h", "w"), [(3, 6), (8, 1), (5, 5), (8, 8)])
def test_positions_are_the_window_at_the_centre_of_the_table(h, w):
    """Row i of h is row (M - h)//2 + i of the table; the same for columns."""
    model = tiny(depth=1)
    number = torch.arange(64.0, dtype=torch.float64)
    model.pos_embed.copy_(number[None, :, None].expand(1, 64, 24))
    rows, cols = (8 - h) // 2 + torch.arange(h), (8 - w) // 2 + torch.arange(w)
    expected = (8 * rows[:, None] + cols).flatten().double()
    positions = model.positions(h, w)
    assert positions.shape == (1, h * w, 24)
    assert torch.equal(positions, expected[None, :, None].expand(1, -1, 24))


def test_patch_embedding_equals_the_strided_convolution():
    """One matrix product over cut patches = conv2d with stride p, rows before columns."""
    embed = randomise(PatchEmbed(in_channels=5, width=11, patch=3)).double()
    x = randn(2, 5, 6, 12)
    expected = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=3)
    torch.testing.assert_close(embed(x), expected.flatten(2).transpose(1, 2), **EXACT)


def test_unpatchify_inverts_the_order_row_column_channel():
    """Pixel (c, i·p + r, j·p + s) is entry (r·p + s)·C + c of token i·w + j."""
    p, C, h, w = 3, 5, 2, 4
    model = tiny(depth=1, patch=p, channels=C)
    image = randn(2, C, h * p, w * p)
    tokens = torch.empty(2, h * w, p * p * C, dtype=image.dtype)
    for i in range(h):
        for j in range(w):
            for r in range(p):
                for s in range(p):
                    entry = slice((r * p + s) * C, (r * p + s + 1) * C)
                    tokens[:, i * w + j, entry] = image[:, :, i * p + r, j * p + s]
    assert torch.equal(model.unpatchify(tokens, h, w), image)


@pytest.mark.parametrize("length", [7, 128, 129, 512, 513])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_equals_the_library_on_both_sides_of_its_switch(length, dtype):
    """softmax(q kᵀ / √d) v of every head; the matrix form up to 512 tokens in bf16, 128 else."""
    q, k, v = (randn(2, 3, length, 4, seed=i).to(dtype) for i in range(3))
    expected = F.scaled_dot_product_attention(*(a.double() for a in (q, k, v)))
    close = EXACT if dtype == torch.float64 else dict(rtol=0, atol=0.01)
    torch.testing.assert_close(attention(q, k, v).double(), expected, **close)


def formula_norm(x, shift, scale):
    """x ↦ (x - mean)/√(var + 1e-6) · (1 + scale) + shift."""
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * (1 + scale) + shift


def formula_qkv(attn, x, heads):
    """Per head q, k, v; q and k over their root mean square, times a learned weight."""
    q, k, v = (part.chunk(heads, -1) for part in attn.qkv(x).chunk(3, -1))
    if attn.ln_q is not None:
        q = [a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.ln_q.weight for a in q]
        k = [a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.ln_k.weight for a in k]
    return list(zip(q, k, v, strict=True))


def formula_attention(qkv):
    """softmax(q kᵀ / √d) v for every head, side by side."""
    return torch.cat([((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in qkv], -1)


def formula_update(stream, x, read, mod, heads):
    """x + gate·proj(read) [+ gate₂·attn2(x)], then + gate·MLP; modulations in official order."""
    y = x + mod[2] * stream.attn.proj(read)
    if len(mod) == 9:
        own = formula_attention(formula_qkv(stream.attn2, formula_norm(x, *mod[6:8]), heads))
        y = y + mod[8] * stream.attn2.proj(own)
    hidden = stream.mlp.fc1(formula_norm(y, *mod[3:5]))
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    return y + mod[5] * stream.mlp.fc2(hidden * (1 + inner.tanh()) / 2)


@pytest.mark.parametrize(
    ("qk_norm", "pre_only", "attn2"),
    [(False, False, False), (True, False, True), (True, True, False)],
    ids=["plain", "qk_norm-attn2", "qk_norm-pre_only"],
)
def test_a_joint_block_computes_the_formula_of_the_paper(qk_norm, pre_only, attn2):
    """Both streams attend over the text and image tokens together, each with its own weights."""
    B, M, N, D, A = 2, 3, 5, 24, 4
    block = randomise(JointBlock(D, A, qk_norm, pre_only, attn2)).double()
    context, x, cond = randn(B, M, D, seed=1), randn(B, N, D, seed=2), randn(B, D, seed=3)

    streams = (block.context_block, block.x_block)
    silu = cond * cond.sigmoid()
    mods = [s.adaLN_modulation[1](silu)[:, None].split(D, -1) for s in streams]
    assert [len(mod) for mod in mods] == [2 if pre_only else 6, 9 if attn2 else 6]
    per_stream = [
        formula_qkv(s.attn, formula_norm(tokens, *mod[:2]), A)
        for s, tokens, mod in zip(streams, (context, x), mods, strict=True)
    ]
    joint = [
        tuple(torch.cat(pair, 1) for pair in zip(*head, strict=True))
        for head in zip(*per_stream, strict=True)
    ]
    read = formula_attention(joint)

    new_context, new_x = block(context, x, cond)
    torch.testing.assert_close(
        new_x, formula_update(block.x_block, x, read[:, M:], mods[1], A), **EXACT
    )
    if pre_only:
        assert new_context is None
    else:
        expected = formula_update(block.context_block, context, read[:, :M], mods[0], A)
        torch.testing.assert_close(new_context, expected, **EXACT)


# ---------------------------------------------------------------------------------------------
# The whole network
# ---------------------------------------------------------------------------------------------


def test_a_fresh_network_outputs_zero_and_every_block_is_the_identity():
    """adaLN-Zero: gates and the output layer start at zero."""
    model = MMDiT(**TINY).double()
    x, t, context, pooled = inputs()
    v, features = model(x, t, context, pooled, taps=(0, 1, 2))
    assert torch.equal(v, torch.zeros_like(x))
    embedded = model.x_embedder(x) + model.positions(3, 5)
    assert embedded.std() > 0.1
    assert all(torch.equal(feature, embedded) for feature in features)


@pytest.mark.parametrize(("H", "W"), [(2, 2), (2, 14), (10, 6), (16, 16)])
def test_any_rectangle_that_patches_divide_gives_a_velocity_of_its_shape(H, W):
    """v has the shape of x_t, up to the whole position table (8 × 8 patches of 2 × 2)."""
    model = tiny()
    x, t, context, pooled = inputs(H=H, W=W)
    v, _ = model(x, t, context, pooled)
    assert v.shape == x.shape
    assert v.isfinite().all() and v.std() > 0.1


@pytest.mark.parametrize(("H", "W"), [(5, 6), (6, 5)])
def test_a_latent_that_patches_do_not_divide_is_refused(H, W):
    """The message names the latent and the patch."""
    with pytest.raises(ValueError, match=f"{H}×{W}.*2×2"):
        tiny(depth=1)(*inputs(H=H, W=W))


@pytest.mark.parametrize(("H", "W"), [(18, 4), (4, 18)])
def test_a_grid_larger_than_the_position_table_is_refused(H, W):
    """The message names the grid and the table."""
    with pytest.raises(ValueError, match=f"{H // 2}×{W // 2}.*8×8"):
        tiny(depth=1)(*inputs(H=H, W=W))


@pytest.mark.parametrize(("width", "heads"), [(20, 3), (18, 3)])
def test_a_width_that_heads_or_positions_can_not_divide_is_refused(width, heads):
    """width = heads · head dim, and the position table has four equal parts."""
    with pytest.raises(ValueError, match=f"width {width}"):
        MMDiT(**TINY | dict(width=width, heads=heads))


def test_every_argument_moves_the_velocity_of_its_own_sample_and_of_no_other():
    """v_θ(x_t, t, c, y): latent, level, text tokens, pooled text; samples do not mix."""
    model, arguments = tiny(), inputs()
    v, _ = model(*arguments)
    for i, argument in enumerate(arguments):
        changed = argument.clone()
        changed[1] += 0.1
        other, _ = model(*arguments[:i], changed, *arguments[i + 1 :])
        torch.testing.assert_close(other[0], v[0], **EXACT)
        assert (other[1] - v[1]).abs().max() > 1e-3


def test_the_text_is_a_set_of_tokens_without_order():
    """Text tokens carry no position here (the text encoder gave them one)."""
    model = tiny(qk_norm=True, attn2_blocks=1)
    x, t, context, pooled = inputs(M=4)
    shuffled = context[:, [2, 0, 3, 1]]
    torch.testing.assert_close(
        model(x, t, shuffled, pooled)[0], model(x, t, context, pooled)[0], **EXACT
    )


def test_the_image_is_not_a_set_positions_tell_equal_patches_apart():
    """A constant latent has equal patches; only the position table makes their velocity differ."""
    model = tiny()
    x, t, context, pooled = inputs()
    v, _ = model(torch.ones_like(x), t, context, pooled)
    patches = v.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h, w, p, p)
    assert (patches[:, :, :1, :1] - patches).abs().amax((0, 1, 4, 5)).flatten()[1:].min() > 1e-3


def test_features_are_the_image_tokens_after_the_named_blocks_in_ascending_order():
    """Feature i = x after joint block i, (B, N, D), whatever the order of the taps."""
    model = tiny(attn2_blocks=1)
    x, t, context, pooled = arguments = inputs()
    _, features = model(*arguments, taps=(2, 0))
    tokens = model.x_embedder(x) + model.positions(3, 5)
    cond = model.t_embedder(timestep_sinusoid(t).double()) + model.y_embedder(pooled)
    text, expected = model.context_embedder(context), []
    for block in model.joint_blocks:
        text, tokens = block(text, tokens, cond)
        expected.append(tokens)
    assert [tuple(feature.shape) for feature in features] == [(2, 15, 24)] * 2
    assert torch.equal(features[0], expected[0])
    assert torch.equal(features[1], expected[2])


def test_tapping_does_not_change_the_velocity():
    """Taps only read; without taps there are no features."""
    model, arguments = tiny(), inputs()
    v, nothing = model(*arguments)
    tapped, features = model(*arguments, taps=(0, 1, 2))
    assert torch.equal(tapped, v)
    assert nothing == [] and len(features) == 3


def flops_by_module(model, *arguments, **options):
    """Matrix-product operations of one forward, by module name."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments, **options)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("taps", [(0,), (0, 1), (2,), (3,)])
def test_features_only_computes_the_same_features_and_nothing_after_the_last_tap(taps):
    """Its operations are those of the embedders and of the blocks up to the last tap."""
    model, arguments = tiny(depth=4), inputs()
    v, expected = model(*arguments, taps=taps)
    no_velocity, features = model(*arguments, taps=taps, features_only=True)
    assert v is not None and no_velocity is None
    assert len(features) == len(taps)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))

    full = flops_by_module(model, *arguments)
    blocks = [full[f"MMDiT.joint_blocks.{i}"] for i in range(4)]
    embedders = full["MMDiT"] - sum(blocks) - full["MMDiT.final_layer"]
    assert min(*blocks, embedders) > 0
    only = flops_by_module(model, *arguments, taps=taps, features_only=True)
    assert 0 < only["MMDiT"] <= embedders + sum(blocks[: max(taps) + 1])
    assert "MMDiT.final_layer" not in only
    assert all(f"MMDiT.joint_blocks.{i}" not in only for i in range(max(taps) + 1, 4))


def test_gradient_reaches_every_parameter_but_the_queries_that_pre_only_drops():
    """The last context stream gives keys and values; its queries' answers are thrown away."""
    model = tiny(attn2_blocks=1, qk_norm=True)
    v, _ = model(*inputs())
    (v * randn(*v.shape, seed=7)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    last = "joint_blocks.2.context_block.attn"
    untouched = {n for n, g in grads.items() if g is None or g.abs().max() < 1e-12}
    assert untouched == {f"{last}.ln_q.weight"}
    queries, keys, values = grads[f"{last}.qkv.weight"].chunk(3)
    assert queries.abs().max() == 0
    assert min(keys.abs().max(), values.abs().max()) > 1e-6


def test_gradient_of_the_features_in_the_latent_is_that_of_finite_differences():
    """∂features/∂x_t, the generator's path through the teacher."""
    model = tiny(depth=2, qk_norm=True)
    x, t, context, pooled = inputs(H=2, W=4)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model(x, t, context, pooled, taps=(0,), features_only=True)[1], x, fast_mode=True
    )


def test_checkpointing_changes_no_velocity_feature_or_gradient():
    """Of the weights and of x, through the taps and through v; and it keeps less for backward."""
    model = tiny(qk_norm=True, attn2_blocks=1)
    _, *rest = inputs(H=4, W=12)
    results, kept = [], []
    for model.checkpointing in (False, True):
        model.zero_grad()
        x = randn(2, 5, 4, 12, seed=1).requires_grad_()
        (v, features), pieces = kept_by([model], lambda x=x: model(x, *rest, taps=(0, 2)))
        (v.square().sum() + sum(f.sin().sum() for f in features)).backward()
        grads = [p.grad for p in model.parameters()]
        results.append([v, *features, x.grad, *grads])
        kept.append(sum(pieces.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 3


def test_bf16_autocast_stays_close_to_float32():
    """bf16 has a relative step of 2⁻⁸ = 0.4 %; three blocks may add up to a few of them."""
    model = tiny(qk_norm=True).float()
    arguments = [argument.float() for argument in inputs()]
    with torch.no_grad():
        exact, (exact_feature,) = model(*arguments, taps=(1,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v, (feature,) = model(*arguments, taps=(1,))
    for rounded, reference in ((v, exact), (feature, exact_feature)):
        error = (rounded.float() - reference).norm() / reference.norm()
        assert 0 < error < 0.03


def test_frozen_weights_in_bf16_give_the_numbers_that_autocast_gives():
    """Features and their gradient in x, bit by bit: the frozen teacher is kept in bf16."""
    model = tiny(qk_norm=True, attn2_blocks=1).float().requires_grad_(False)
    x, *rest = (argument.float() for argument in inputs())
    results = []
    for network in (model, copy.deepcopy(model).bfloat16()):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = network(x, *rest, taps=(0, 2))[1]
        (grad,) = torch.autograd.grad(sum(f.float().square().sum() for f in features), x)
        results.append([*features, grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def read_off(state):
    """Our network of an official state dict, with its tensors."""
    own = {name: state[stored] for name, stored in own_names(state).items()}
    model = meta_sd3({name: tuple(tensor.shape) for name, tensor in own.items()})
    model.load_state_dict(own, assign=True)
    return model


BUILDS = {
    "plain": dict(width=128, heads=2, qk_norm=False),  # without QK-norm the head dim is 64
    "qk_norm": dict(qk_norm=True),
    "attn2": dict(qk_norm=True, attn2_blocks=2),
}


@pytest.mark.parametrize("build", BUILDS)
def test_the_whole_configuration_is_read_off_the_checkpoint(build):
    """Depth, width, heads, patch, dimensions, table, QK-norm, attn2: all are in the shapes."""
    model = tiny(**BUILDS[build])
    assert read_off(model.state_dict()).config == model.config


def test_a_model_is_rebuilt_from_its_config_and_state_dict():
    """What a checkpoint stores is enough; shown with a value other than the default for each."""
    changes = dict(patch=1, pos_size=11, qk_norm=False, attn2_blocks=1, condition_channels=2)
    model = tiny(**changes)
    defaults = inspect.signature(MMDiT).parameters
    assert set(model.config) == set(defaults)
    assert all(model.config[name] != defaults[name].default for name in defaults)
    copy = MMDiT(**model.config).double()
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy(*inputs())[0], model(*inputs())[0])


NAMED_IN_THE_ERROR = [
    "x_embedder.proj.weight",
    "context_embedder.weight",
    "y_embedder.mlp.0.weight",
    "pos_embed",
]


@pytest.mark.parametrize("missing", NAMED_IN_THE_ERROR)
def test_a_checkpoint_that_is_not_sd3_is_refused_by_the_name_of_a_missing_tensor(missing):
    """A file of another network gives a ValueError that says what it lacks."""
    other = {k: v for k, v in tiny().state_dict().items() if k != missing}
    with pytest.raises(ValueError, match=f"not an SD3 checkpoint.*{missing}"):
        read_off(other)
