"""What tools/benchmark.py compares: our network and diffusers', of the same sizes, precision and
optimiser, and the parts of a run of LADD.
"""

import copy
import math
import statistics
import time
from pathlib import Path

import torch

import data
import ladd
from discriminator import Discriminator
from lib.machine import arithmetic, autocast
from lib.optim import make_optimizers, step_all, update_ema
from lib.states import Saver
from mmdit import MMDiT


def rounds(contestants, n):
    """{name: function} -> {name: median seconds of n calls}. All run one after the other in every
    round, so that a machine whose speed drifts treats them alike; three rounds warm up."""
    times = {name: [] for name in contestants}
    for i in range(n + 3):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def settings(preset, *flags):
    return ladd.parse(["--preset", preset, "--data", "shapes", *flags])[0]


def awake(model):
    """adaLN-Zero starts at zero, and so would every gradient: small random weights instead."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def inputs(s, n, device):
    """x (n, C, H, W), t (n,), context (n, M, D_c), pooled (n, D_p), all random."""
    torch.manual_seed(0)
    x = torch.randn(n, s.channels, *s.sizes[0], device=device)
    context = torch.randn(n, s.text_length, s.text_dim, device=device)
    pooled = torch.randn(n, s.pooled_dim or s.text_dim, device=device)
    return x, torch.rand(n, device=device), context, pooled


def theirs(s):
    """diffusers' network of the same sizes."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=s.sizes[0][0], patch_size=s.patch, in_channels=s.channels,
        out_channels=s.channels, num_layers=s.depth, num_attention_heads=s.heads,
        attention_head_dim=s.width // s.heads, caption_projection_dim=s.width,
        joint_attention_dim=s.text_dim, pooled_projection_dim=s.pooled_dim or s.text_dim,
        pos_embed_max_size=s.pos_size, qk_norm="rms_norm" if s.qk_norm else None,
    )  # fmt: skip


def call_theirs(model, x, t, context, pooled):
    return model(x, context, pooled, 1000 * t, return_dict=False)


class Distillation:
    """Iterations of LADD on always the same batch, without data and logs."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        with torch.device(device):
            student, heads = awake(MMDiT(**s.model())), Discriminator(**s.head_sizes())
        self.teacher = copy.deepcopy(student).to(arithmetic(device, s.precision))
        self.teacher.eval().requires_grad_(False)
        ema = copy.deepcopy(student).requires_grad_(False)
        self.networks = dict(student=student, ema=ema, heads=heads)
        self.optimizers = make_optimizers(student, 1e-4, 0.0, s.beta1)
        self.heads_optimizers = make_optimizers(heads, 1e-4, 0.0, s.beta1)
        x0, t, *text = inputs(s, s.batch, device)
        noise = torch.randn(3, *x0.shape, device=device)
        self.batch = ladd.Batch(x0, data.Text(*text), t, noise[0], t < 1, t, *noise[1:])

    @torch.no_grad()
    def forward(self):
        """The unit: one forward of the whole network."""
        with autocast(self.device, self.s.precision):
            self.teacher(self.batch.x0, self.batch.t, *self.batch.text)

    def iteration(self):
        s, student, ema, heads = self.s, *self.networks.values()
        with autocast(self.device, s.precision):
            x0_hat, fake = ladd.make_fakes(student, self.teacher, self.batch, s)
            loss_d, *_ = ladd.heads_loss(self.teacher, heads, fake, self.batch, s)
        loss_d.backward()
        step_all((self.heads_optimizers, heads, math.inf, 1.0))
        with autocast(self.device, s.precision):
            loss_g, distill = ladd.student_losses(heads, x0_hat, fake, self.batch, s)
        (loss_g + s.distill_weight * distill).backward()
        step_all((self.optimizers, student, s.clip, 1.0))
        update_ema(ema, student, s.student_ema, step=10_000)

    def save(self, folder):
        """A state, as a run saves it every so many updates."""
        saver = Saver(Path(folder), "distillation", self.device, divided=False)
        saver.save(1, self.networks, self.optimizers + self.heads_optimizers, {}, wait=True)
