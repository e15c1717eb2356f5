"""The discriminator: small heads on the frozen teacher's features.

"Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation" (LADD),
arXiv 2403.12015. The teacher itself is the discriminator's backbone: a latent is noised to a level
t̂ and sent through the frozen teacher, and the image tokens after some of its blocks (all of them,
in the paper) go to one independent convolutional head per block, which says for every position how
real it looks.

    letter  meaning                          | symbol  variable  shape
    B       batch                            | -       features  [(B, N, D)], one per tapped block
    K       heads, one per tapped block      | t̂       t_hat     (B,)        level of the re-noising
    N       image tokens h·w                 | y       pooled    (B, D_p)    pooled text features
    D, U    width of teacher, of the heads   | -       logits    (B, K, h, w) > 0 real, < 0 fake
    E, P    width of condition, projection   |

The heads follow the projection heads of StyleGAN-T and ADD (arXiv 2311.17042): a 1×1 convolution, a
residual block, then the inner product with a projection of the condition. Ours, because LADD's
authors published no code: LayerNorm of the tokens on the way in (their scale grows with depth),
group norm instead of batch norm (no state shared between real and fake, any batch size, the same on
any number of devices), 3×3 kernels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmdit import layer_norm, timestep_sinusoid


class PerToken(nn.Conv2d):
    """A 1×1 convolution of tokens, (B, N, D) -> (B, N, U): as a product, faster on a CPU."""

    def forward(self, tokens):
        return F.linear(tokens, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """Logits per position for the features of one block."""

    def __init__(self, width, hidden, cond_dim, proj_dim=64):
        super().__init__()
        groups = max(1, hidden // 16)
        self.reduce = PerToken(width, hidden, 1)
        self.norm1 = nn.GroupNorm(groups, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, hidden)
        self.project = PerToken(hidden, proj_dim, 1)
        self.condition = nn.Linear(cond_dim, proj_dim)  # of t̂ and caption, not MMDiT's condition

    def forward(self, tokens, cond, h, w):
        """tokens (B, N, D), cond (B, E) -> logits (B, h, w)"""
        x = self.reduce(layer_norm(tokens))  # (B, N, U)
        x = F.leaky_relu(self.norm1(x.transpose(1, 2).unflatten(2, (h, w))), 0.2)  # (B, U, h, w)
        x = (x + F.leaky_relu(self.norm2(self.conv(x)), 0.2)) * 0.5**0.5
        x = self.project(x.flatten(2).transpose(1, 2))  # (B, N, P)
        logits = torch.einsum("bnp,bp->bn", x, self.condition(cond)) * x.shape[2] ** -0.5
        return logits.unflatten(1, (h, w))


class Discriminator(nn.Module):
    """One head per tapped block, each conditioned on t̂ and the pooled text by projection."""

    def __init__(self, *, width, taps, pooled_dim, hidden=64, cond_dim=64):
        super().__init__()
        self.config = dict(width=width, taps=tuple(taps), pooled_dim=pooled_dim)
        self.config |= dict(hidden=hidden, cond_dim=cond_dim)
        self.taps = tuple(taps)
        self.embed_t = nn.Linear(256, cond_dim)
        self.embed_y = nn.Linear(pooled_dim, cond_dim)
        self.heads = nn.ModuleList(Head(width, hidden, cond_dim) for _ in taps)

    def forward(self, features, t_hat, pooled, h, w):
        """features: K tensors (B, N, D) -> logits (B, K, h, w)"""
        t = timestep_sinusoid(t_hat).to(pooled.dtype)
        cond = F.silu(self.embed_t(t) + self.embed_y(pooled))
        logits = [
            head(tokens, cond, h, w) for head, tokens in zip(self.heads, features, strict=True)
        ]
        return torch.stack(logits, dim=1)


def hinge_d(real, fake):
    """L_D = E[relu(1 - D(real))] + E[relu(1 + D(fake))] over all logits; 2 at chance."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g(fake):
    """L_G = -E[D(fake)]."""
    return -fake.float().mean()


def r1(logits, features):
    """R1 on the heads' inputs: E‖∇_f D(f)‖², as in ADD; no second backward through the teacher.
    D(f) is the sum of a sample's logits here, and the mean is over the taps.

    logits: of real samples; features: the tensors with requires_grad that they were made from."""
    grads = torch.autograd.grad(logits.float().sum(), features, create_graph=True)
    return sum(g.float().square().sum(dim=(1, 2)).mean() for g in grads) / len(features)
