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
    N, M     image tokens h·w, text      v       (returned)  (B, C, H, W)  velocity ε - x_0
    D        width; A heads of d = D/A   -       features    [(B, N, D)]   tokens after taps

Parameters carry the names and shapes of the released checkpoints, so SD3-medium, SD3.5-medium and
SD3.5-large load as they are: `open_sd3`. Taps are ours: LADD's discriminator reads the image tokens
after every block, so forward returns them; a frozen network needs no hooks.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PREFIX = "model.diffusion_model."  # of the network's tensors inside released single files


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
    if q.device.type == "meta":  # count what a GPU keeps, not the matrix that it never forms
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
        """What every head read, (B, A, L, d), side by side and projected -> (B, L, D)"""
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


def gelu(x):
    """GELU by tanh, as in SD3. In bf16 on a CPU the exact GELU: never more than 5e-4 away, which
    bf16 does not resolve near 1, and its kernel is several times faster."""
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


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
        """cond (B, D) -> tensors (B, 1, D): shift, scale, gate of attention, MLP, attn2."""
        return self.adaLN_modulation(cond)[:, None, :].chunk(self.chunks, dim=2)

    def project(self, x, mod):
        """The stream's q, k, v for the joint attention, each (B, A, L, d)."""
        return self.attn.project(modulate(layer_norm(x), mod[0], mod[1]))

    def update(self, x, attended, mod):
        """Adds what the heads read, (B, A, L, d), then the MLP, each through its gate."""
        if self.attn2 is not None:
            own = attention(*self.attn2.project(modulate(layer_norm(x), mod[6], mod[7])))
            x = torch.addcmul(x, mod[8], self.attn2.merge(own))
        x = torch.addcmul(x, mod[2], self.attn.merge(attended))
        return torch.addcmul(x, mod[5], self.mlp(modulate(layer_norm(x), mod[3], mod[4])))


def layer_norm(x):
    """LayerNorm without parameters, eps 1e-6; adaLN supplies shift and scale."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


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
        # split before the heads are laid side by side: one copy of each stream, forward and back
        from_context, from_x = attention(q, k, v).split([M, N], dim=2)
        x = self.x_block.update(x, from_x, x_mod)
        if self.context_block.mlp is None:  # pre-only: nothing after this reads the context
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
    ):
        super().__init__()
        width, heads = width or 64 * depth, heads or depth
        if width % heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of the {heads} heads")
        self.config = dict(depth=depth, width=width, heads=heads, patch=patch, channels=channels)
        self.config |= dict(context_dim=context_dim, pooled_dim=pooled_dim, pos_size=pos_size)
        self.config |= dict(qk_norm=qk_norm, attn2_blocks=attn2_blocks)

        self.x_embedder = PatchEmbed(channels, width, patch)
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
        """Xavier for matrices, zero biases; modulation and output start at zero (adaLN-Zero)."""
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
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)

    def positions(self, h, w):
        """The h × w window at the centre of the position table. -> (1, N, D)"""
        size = self.config["pos_size"]
        if h > size or w > size:
            raise ValueError(
                f"a grid of {h}×{w} patches exceeds the position table of {size}×{size}"
            )
        top, left = (size - h) // 2, (size - w) // 2
        table = self.pos_embed.view(size, size, -1)
        return table[top : top + h, left : left + w].reshape(1, h * w, -1)

    def unpatchify(self, tokens, h, w):
        """(B, N, p·p·C) -> (B, C, H, W); within a token the order is (row, column, channel)."""
        p, C = self.config["patch"], self.config["channels"]
        x = tokens.view(-1, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, h * p, w * p)

    def forward(self, x, t, context, pooled, *, taps=(), features_only=False):
        """The velocity, and the image tokens after the blocks named in `taps`.

        x (B, C, H, W), t (B,), context (B, M, D_c), pooled (B, D_p)
        -> v (B, C, H, W), features: list of (B, N, D), one per tap in ascending order.
        With `features_only` nothing runs after the last tapped block, and v is None."""
        B, C, H, W = x.shape
        p = self.config["patch"]
        if H % p or W % p:
            raise ValueError(f"a latent of {H}×{W} can't be cut into patches of {p}×{p}")
        h, w = H // p, W // p
        x = self.x_embedder(x)
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


# ---------------------------------------------------------------------------------------------
# Released weights
# ---------------------------------------------------------------------------------------------


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# The layers of diffusers' SD3Transformer2DModel and ours; some of ours are several of theirs.
DIFFUSERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    # after transformer_blocks.0. and joint_blocks.0.
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be used; the message says why."""


class Weights(Mapping):
    """The network's tensors in a file, {official name: tensor}; `ignored` others were beside them.

    Each is a view of the memory-mapped file, read where it is touched; what the file has in parts
    (diffusers' q, k, v) is joined at every access."""

    def __init__(self, parts, ignored=0):
        self.parts, self.ignored = parts, ignored
        self.shapes = {
            name: (sum(map(len, p)), *p[0].shape[1:]) if len(p) > 1 else tuple(p[0].shape)
            for name, p in parts.items()
        }

    def __getitem__(self, name):
        parts = self.parts[name]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)


def strip_prefix(state_dict):
    """The network's tensors of a released file, their prefix removed (all, if none has it)."""
    own = {k.removeprefix(PREFIX): v for k, v in state_dict.items() if k.startswith(PREFIX)}
    others = ("first_stage_model.", "text_encoders.")
    return own or {k: v for k, v in state_dict.items() if not k.startswith(others)}


def config_from_sd3(shapes, heads=None):
    """MMDiT's arguments, read off the names and shapes of an official state dict.

    Without QK-norm no shape tells the number of heads: it is `heads`, or one per 64 channels."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    ln_k = shapes.get("joint_blocks.0.x_block.attn.ln_k.weight")
    return dict(
        depth=len({k.split(".")[1] for k in shapes if k.startswith("joint_blocks.")}),
        width=width,
        heads=width // ln_k[0] if ln_k else heads or width // 64,
        patch=patch,
        channels=channels,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_size=math.isqrt(shapes["pos_embed"][1]),
        qk_norm=ln_k is not None,
        attn2_blocks=sum(".x_block.attn2.qkv.weight" in k for k in shapes),
    )


def meta_sd3(shapes, heads=None):
    """The network of these official names and shapes {name: (…)}, on the meta device.

    Raises CheckpointError that lists the tensors that are missing, surplus or misshapen."""
    try:
        config = config_from_sd3(shapes, heads)
        if config["depth"] > 100 or config["heads"] < 1:  # names alone could ask for a million
            raise ValueError(f"{config['depth']} blocks of {config['heads']} heads")
        with torch.device("meta"):
            model = MMDiT(**config)
    except KeyError as missing:
        raise CheckpointError(f"not an SD3 checkpoint: it has no tensor {missing}") from None
    except Exception as error:  # no network has such sizes
        raise CheckpointError(f"not an SD3 checkpoint: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    both = wanted.keys() & shapes.keys()
    wrong = dict(
        missing=[f"{k}" for k in wanted if k not in both],
        surplus=[f"{k!r:.90}" for k in shapes if k not in both],
        misshapen=[f"{k} {shapes[k]} for {wanted[k]}" for k in both if wanted[k] != shapes[k]],
    )
    told = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:12])}{', …' * (len(names) > 12)}"
        for kind, names in wrong.items()
        if names
    ]
    if told:
        raise CheckpointError(f"not an SD3 checkpoint: {'; '.join(told)}")
    return model


def from_sd3(state_dict):
    """The network of an official state dict: SD3-medium, SD3.5-medium, SD3.5-large.

    The tensors are used as they are: no second copy, their dtype and device kept."""
    state_dict = strip_prefix(state_dict)
    model = meta_sd3({name: tuple(tensor.shape) for name, tensor in state_dict.items()})
    model.load_state_dict(state_dict, assign=True)
    return model


def from_diffusers(tensors):
    """diffusers' {name: tensor} -> {official name: [parts to be joined]}; views, no copies."""
    places = {t: (o, i) for ts, o in DIFFUSERS.items() for i, t in enumerate(ts.split())}
    width, found = len(tensors.get("pos_embed.proj.bias", ())), {}
    for name, tensor in tensors.items():
        pattern = r"(transformer_blocks\.\d+\.)?(.*?)(\.weight|\.bias)?"
        block, layer, kind = re.fullmatch(pattern, name, re.DOTALL).groups("")
        official, place = places.get(layer, (layer, 0))
        official = block.replace("transformer", "joint") + official + kind
        parts = found.setdefault(official, {})
        if "adaLN" in official and len(tensor) == 2 * width:  # theirs is (scale, shift)
            parts.update(enumerate(tensor.chunk(2)[::-1]))
        else:
            parts[place] = tensor
    return {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}


def files_of(path):
    """The safetensors files of `path`, and the number of heads if the path says it."""
    if not path.is_dir():
        return [path], None
    heads = json.loads((path / "config.json").read_text("utf-8"))["num_attention_heads"]
    for pattern in ("*.index*.json", "*.safetensors"):  # the shortest name: no variant like .fp16
        found = sorted(path.glob(f"diffusion_pytorch_model{pattern}"), key=lambda p: len(p.name))
        if found and pattern.endswith("json"):
            shards = json.loads(found[0].read_text("utf-8"))["weight_map"].values()
            return [path / Path(shard).name for shard in sorted(set(shards))], heads
    return found[:1], heads


def open_sd3(path):
    """A released single file (.safetensors), or a folder with a transformer of diffusers.

    -> the network on the meta device, its Weights. `model.load_state_dict(weights, assign=True)`
    brings them together without a copy. CheckpointError names the path and what is wrong."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise CheckpointError(f"{path}: reading it needs: pip install safetensors") from None
    tensors, ignored = {}, 0
    try:
        files, heads = files_of(Path(path))
        for file in files:
            with safe_open(file, "pt") as opened:
                names = strip_prefix({name: name for name in opened.keys()})  # noqa: SIM118
                ignored += len(opened.keys()) - len(names)
                heads = heads or (opened.metadata() or {}).get("heads")
                for name, stored in names.items():
                    if (dtype := opened.get_slice(stored).get_dtype()) not in DTYPES:
                        raise ValueError(f"{name!r:.90} is {dtype}, not one of {', '.join(DTYPES)}")
                    tensors[name] = opened.get_tensor(stored)
        theirs = any(name.startswith("transformer_blocks.") for name in tensors)
        parts = from_diffusers(tensors) if theirs else {k: [v] for k, v in tensors.items()}
        weights = Weights(parts, ignored)
        return meta_sd3(weights.shapes, heads and int(heads)), weights
    except Exception as error:  # a damaged file or folder raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:4000]
        raise CheckpointError(f"{path}: can't be read as SD3 weights ({reason}).") from None


def write_sd3(file, weights, heads, dtype):
    """Writes {official name: tensor} to a binary file as safetensors, one tensor at a time.

    `dtype` is a key of DTYPES. ValueError if a number is not finite in it."""
    size = DTYPES[dtype].itemsize
    header, end = {"__metadata__": {"format": "pt", "heads": str(heads)}}, 0
    for name in sorted(weights):
        shape = weights[name].shape
        start, end = end, end + size * shape.numel()
        header[PREFIX + name] = dict(dtype=dtype, shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().to(DTYPES[dtype]).contiguous()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that {dtype} can't; choose a wider type")
        file.write(tensor.flatten().view(torch.uint8).numpy())
