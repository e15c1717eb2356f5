"""The network: MMDiT, the multimodal diffusion transformer of Stable Diffusion 3.

"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.

An image (or latent) is cut into patches, a caption into tokens. Both walk through the same blocks
as two streams with separate weights, and meet in every block in one joint attention over all
tokens. What the block does to a stream is modulated by a vector made of the noise level and the
pooled caption (adaLN-Zero). The output is the velocity v of rectified flow.

    letter   meaning                     symbol  variable    shape
    B        batch                       x_t     x           (B, C, H, W)  noisy latent
    C, H, W  channels, height, width     t       t           (B,)          0 is data, 1 is noise
    p        patch size                  c       context     (B, M, D_c)   text features per token
    h, w     H/p, W/p: grid of patches   y       pooled      (B, D_p)      text features, pooled
    N, M     tokens: of image h·w, text  v       (returned)  (B, C, H, W)  velocity ε - x_0
    D        width; A heads of d = D/A   -       features    [(B, N, D)]   tokens after taps

Parameters carry the names and shapes of the released checkpoints, so SD3-medium, SD3.5-medium and
SD3.5-large load as they are (sd3/weights.py). Taps are ours: LADD's discriminator reads the image
tokens after some blocks, so forward returns them, without hooks.
"""

import math
import re
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------
# Embeddings: noise level, position, patches
# ---------------------------------------------------------------------------------------------


def timestep_sinusoid(t, dim=256, max_period=10_000):
    """Sinusoids of 1000·t, cosines first. t (B,) in [0, 1] -> (B, dim), float32."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angle = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_table(width, size):
    """Two-dimensional sin-cos positions of a size × size grid -> (1, size², width).

    The first half of the channels encodes the column, the second the row, each sines first."""
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(size, dtype=torch.float64)[:, None] * omega  # (size, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (size, width/2)
    columns = axis[None, :, :].expand(size, size, -1)
    rows = axis[:, None, :].expand(size, size, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, size * size, width)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): every p × p patch becomes one token."""

    def __init__(self, in_channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, x):
        # A strided convolution over disjoint patches is one matrix product: written so, because the
        # product is several times faster on a CPU than the convolution it equals.
        B, C, H, W = x.shape
        p = self.proj.kernel_size[0]
        x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
        return F.linear(x.reshape(B, -1, C * p * p), self.proj.weight.flatten(1), self.proj.bias)


class VectorEmbed(nn.Module):
    """A two-layer perceptron from a vector to the conditioning width. (B, D_in) -> (B, D)."""

    def __init__(self, dim, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


# ---------------------------------------------------------------------------------------------
# The block: two streams, one attention
# ---------------------------------------------------------------------------------------------


def layer_norm(x):
    """LayerNorm without parameters, eps 1e-6; adaLN supplies shift and scale. In x's dtype: a GPU's
    autocast would return float32, which doubles the time of each operation up to a product."""
    with torch.autocast("cuda", enabled=False) if x.is_cuda else nullcontext():
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    """x·(1 + scale) + shift. x (B, L, D); shift, scale (B, 1, D), one of each per sample."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q, k, v):
    """softmax(q kᵀ / √d) v. q, k, v (B, A, L, d) -> the same."""
    short = 512 if q.dtype == torch.bfloat16 else 128
    if q.device.type in ("cpu", "meta") and q.shape[2] <= short:
        # PyTorch's CPU flash attention has a slow backward at short lengths, in bf16 eight times
        # this one's at 72 tokens. The plain matrix form gives the same numbers.
        weights = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3)
        return weights @ v
    if q.device.type == "meta":  # a plan of a GPU's memory, which never holds the L × L matrix
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v)


def rms_norm(x, weight):
    """RMSNorm over the last dimension, eps 1e-6, in x's dtype (a float32 weight is not fused)."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps=1e-6)


class Attention(nn.Module):
    """One stream's projections; with `qk_norm` an RMSNorm on every head's q and k."""

    def __init__(self, width, heads, qk_norm, pre_only=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = None if pre_only else nn.Linear(width, width)
        self.ln_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None
        self.ln_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None

    def project(self, x):
        """x (B, L, D) -> q, k, v, each (B, A, L, d)."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.ln_q is not None:
            q, k = rms_norm(q, self.ln_q.weight), rms_norm(k, self.ln_k.weight)
        return q, k, v

    def merge(self, attended):
        """What every attention head read, (B, A, L, d), side by side and projected -> (B, L, D)"""
        return self.proj(attended.transpose(1, 2).flatten(2))


def gelu(x):
    """GELU by tanh, as in SD3. In bf16 on a CPU the exact GELU, which is several times faster and
    within 5e-4: bf16 does not resolve that near 1."""
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class Stream(nn.Module):
    """One stream's half of a joint block: everything but the attention that both streams share.

    `pre_only` (the context of the last block, whose output nobody reads) gives only q, k, v.
    `attn2` (first image blocks of SD3.5-medium) adds a second attention of the image to itself."""

    def __init__(self, width, heads, qk_norm, pre_only=False, attn2=False):
        super().__init__()
        self.attn = Attention(width, heads, qk_norm, pre_only)
        self.attn2 = Attention(width, heads, qk_norm) if attn2 else None
        self.mlp = None if pre_only else Mlp(width)
        self.chunks = 2 if pre_only else 9 if attn2 else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, cond):
        """cond (B, D) -> 2, 6 or 9 tensors (B, 1, D): shift, scale, gate of the attention, of the
        MLP, of attn2, as far as the stream has them."""
        return self.adaLN_modulation(cond)[:, None, :].chunk(self.chunks, dim=2)

    def project(self, x, mod):
        """The stream's q, k, v for the joint attention, each (B, A, L, d)."""
        shift, scale = mod[:2]
        return self.attn.project(modulate(layer_norm(x), shift, scale))

    def update(self, x, attended, mod):
        """Adds what attn2 reads, if there is one, what the joint attention read, (B, A, L, d), and
        the MLP, each through its gate."""
        gate, mlp_shift, mlp_scale, mlp_gate = mod[2:6]
        if self.attn2 is not None:
            shift2, scale2, gate2 = mod[6:]
            own = attention(*self.attn2.project(modulate(layer_norm(x), shift2, scale2)))
            x = torch.addcmul(x, gate2, self.attn2.merge(own))
        x = torch.addcmul(x, gate, self.attn.merge(attended))
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(layer_norm(x), mlp_shift, mlp_scale)))


class JointBlock(nn.Module):
    """Both streams project, attend to each other in one attention, and update themselves."""

    def __init__(self, width, heads, qk_norm, pre_only=False, attn2=False):
        super().__init__()
        self.context_block = Stream(width, heads, qk_norm, pre_only=pre_only)
        self.x_block = Stream(width, heads, qk_norm, attn2=attn2)

    def forward(self, context, x, cond):
        """context (B, M, D), x (B, N, D), cond (B, D) -> context or None, x."""
        M, N = context.shape[1], x.shape[1]
        context_mod, x_mod = self.context_block.modulation(cond), self.x_block.modulation(cond)
        context_qkv = self.context_block.project(context, context_mod)
        x_qkv = self.x_block.project(x, x_mod)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(context_qkv, x_qkv, strict=True))
        # split before `merge` lays the attention heads side by side: one copy fewer of each stream
        from_context, from_x = attention(q, k, v).split([M, N], dim=2)
        x = self.x_block.update(x, from_x, x_mod)
        if self.context_block.mlp is None:  # the last block: nothing after it reads the context
            return None, x
        return self.context_block.update(context, from_context, context_mod), x


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, out)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond)[:, None, :].chunk(2, dim=2)
        return self.linear(modulate(layer_norm(x), shift, scale))


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


class MMDiT(nn.Module):
    """The velocity field v_θ(x_t, t, c, y).

    Arguments default to SD3's rule: width 64·depth, heads = depth, patch 2, 16 latent channels.
    `pos_size` is the side of the position table: the largest h or w the network can take.
    `attn2_blocks` is the number of first blocks with a second image attention (13 in SD3.5-medium).
    `condition_channels` are inputs beside x_t, such as a picture to edit: their patch embedding,
    which starts at zero, is added to that of x_t.
    With the attribute `checkpointing` a backward computes every block again instead of keeping it.
    """

    def __init__(
        self,
        *,
        depth,
        width=None,
        heads=None,
        patch=2,
        channels=16,
        context_dim=4096,
        pooled_dim=2048,
        pos_size=192,
        qk_norm=True,
        attn2_blocks=0,
        condition_channels=0,
    ):
        super().__init__()
        width, heads = width or 64 * depth, heads or depth
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        self.config = dict(depth=depth, width=width, heads=heads, patch=patch, channels=channels)
        self.config |= dict(context_dim=context_dim, pooled_dim=pooled_dim, pos_size=pos_size)
        self.config |= dict(qk_norm=qk_norm, attn2_blocks=attn2_blocks)

        self.x_embedder = PatchEmbed(channels, width, patch)
        if condition_channels:  # else the config and the weights are those of SD3
            self.config["condition_channels"] = condition_channels
            self.condition_embedder = PatchEmbed(condition_channels, width, patch)
        self.t_embedder = VectorEmbed(256, width)
        self.y_embedder = VectorEmbed(pooled_dim, width)
        self.context_embedder = nn.Linear(context_dim, width)
        self.register_buffer("pos_embed", position_table(width, pos_size))
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm, pre_only=i == depth - 1, attn2=i < attn2_blocks)
            for i in range(depth)
        )
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.checkpointing = False
        self.init_weights()

    def init_weights(self):
        """Xavier for matrices, zero biases; modulation and output start at zero (adaLN-Zero), and
        so does what a condition adds."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedder in (self.t_embedder, self.y_embedder):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for name, parameter in self.named_parameters():
            if re.search("adaLN_modulation|final_layer.linear|condition_embedder", name):
                nn.init.zeros_(parameter)

    def positions(self, h, w):
        """The h × w window at the centre of the position table. -> (1, N, D)"""
        size = self.config["pos_size"]
        if h > size or w > size:
            raise ValueError(f"{h}×{w} patches are more than the position table's {size}×{size}")
        top, left = (size - h) // 2, (size - w) // 2
        table = self.pos_embed.view(size, size, -1)
        return table[top : top + h, left : left + w].reshape(1, h * w, -1)

    def unpatchify(self, tokens, h, w):
        """(B, N, p·p·C) -> (B, C, H, W); within a token the order is (row, column, channel)."""
        p, C = self.config["patch"], self.config["channels"]
        x = tokens.view(-1, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, h * p, w * p)

    def forward(self, x, t, context, pooled, condition=None, *, taps=(), features_only=False):
        """The velocity, and the image tokens after the blocks named in `taps`.

        x (B, C, H, W), t (B,), context (B, M, D_c), pooled (B, D_p), condition (B, C', H, W)
        -> v (B, C, H, W), features: list of (B, N, D), one per tap in ascending order.
        With `features_only` and a tap nothing runs after the last tapped block, and v is None."""
        B, C, H, W = x.shape
        p = self.config["patch"]
        if H % p or W % p:
            raise ValueError(f"a latent of {H}×{W} can't be cut into patches of {p}×{p}")
        h, w = H // p, W // p
        x = self.x_embedder(x)
        if condition is not None:
            x = x + self.condition_embedder(condition)
        x = x + self.positions(h, w).to(x.dtype)  # (B, N, D), in autocast's dtype from here on
        cond = self.t_embedder(timestep_sinusoid(t).to(x.dtype)) + self.y_embedder(pooled)  # (B, D)
        context = self.context_embedder(context)  # (B, M, D)

        features, last_tap = [], max(taps, default=-1)
        again = self.checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.joint_blocks):
            if again:
                context, x = checkpoint(block, context, x, cond, use_reentrant=False)
            else:
                context, x = block(context, x, cond)
            if i in taps:
                features.append(x)
            if features_only and i == last_tap:
                return None, features
        return self.unpatchify(self.final_layer(x, cond), h, w), features
