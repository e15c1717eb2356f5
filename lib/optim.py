"""Optimisers, their step, learning rates, and the average of the weights."""

import math

import torch
from torch.utils._pytree import tree_map

from lib.parallel import average, full_tensor


class Muon(torch.optim.Muon):
    """torch's, by https://kellerjordan.github.io/posts/muon/, for all matrices of a shape at once:
    one by one they are 2,700 small operations in an update of `tiny`, which a GPU waits for."""

    found_inf = None  # (): where it is 1 nothing changes, as in AdamW's kernel

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        learning = [p for p in group["params"] if p.grad is not None]
        for shape in dict.fromkeys(p.shape for p in learning):
            self.step_alike([p for p in learning if p.shape == shape], group)

    def step_alike(self, parameters, group):
        """The step of n matrices of one shape."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        before = torch.stack(buffers)  # (n, rows, columns)
        grads = torch.stack([parameter.grad for parameter in parameters])
        after = before.lerp(grads, 1 - group["momentum"])
        rows, columns = grads.shape[1:]
        change = orthogonal(grads.lerp(after, group["momentum"]), group["ns_coefficients"])
        change = change * (-group["lr"] * max(1, rows / columns) ** 0.5)
        if self.found_inf is not None:
            bad = self.found_inf > 0
            change, after = torch.where(bad, 0, change), torch.where(bad, before, after)
        torch._foreach_add_(parameters, list(change.unbind()))
        torch._foreach_copy_(buffers, list(after.unbind()))


def orthogonal(matrices, coefficients, steps=5):
    """The orthogonal matrix next to each (n, rows, columns), nearly: Newton and Schulz, in bf16."""
    a, b, c = coefficients
    x, tall = matrices.bfloat16(), matrices.shape[1] > matrices.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model, lr, beta1, eps=1e-8, muon_lr=0.0):
    """[AdamW], or with muon_lr [AdamW, Muon], where Muon has the matrices of the blocks."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = muon_lr and parameter.ndim == 2 and "blocks" in name
        if parameter.requires_grad:
            (matrices if inner else rest).append(parameter)
    fused = rest[0].device.type not in ("meta", "mps")
    adamw = dict(betas=(beta1, 0.99), eps=eps, weight_decay=0.0, fused=fused)
    optimizers = [torch.optim.AdamW([dict(params=rest, base_lr=lr)], lr, **adamw)]
    if matrices:
        muon = dict(momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
        optimizers.append(Muon([dict(params=matrices, base_lr=muon_lr)], muon_lr, **muon))
    return optimizers


def learning_rate(step, total, decay, warmup=40):
    """A factor: linear warm-up, constant, linear to zero over the last `decay` of the updates."""
    return min(1.0, (step + 1) / warmup, (total - step) / (decay * total))


def step_all(*players, after=()):
    """One step of every player by the gradient in its network, which is then forgotten.

    players: (optimizers, network, largest gradient norm, factor of the learning rate) each; after:
    norms of players that stepped before them. -> the gradients' norms before clipping. NaN for
    each, and no step of any, where one of these norms is not finite. The host does not look."""
    norms = []
    for _, network, clip, _ in players:
        average([p.grad for p in network.parameters() if p.grad is not None])
        norms.append(full_tensor(torch.nn.utils.clip_grad_norm_(network.parameters(), clip)))
    bad = ~sum([*norms, *after]).isfinite()
    for optimizers, _, _, rate in players:
        for optimizer in optimizers:
            (group,) = optimizer.param_groups
            group["lr"] = group["base_lr"] * rate
            device = group["params"][0].device
            if device.type not in ("cpu", "mps"):  # the GPU reads it, as for torch.amp's GradScaler
                optimizer.found_inf = bad.float().to(device)
                optimizer.step()
            elif not bad:
                optimizer.step()
            optimizer.zero_grad()
    return [torch.where(bad, math.nan, norm) for norm in norms]


def split(batch, n):
    """n equal parts of a batch: of every tensor in it."""
    return [tree_map(lambda x, i=i: x.chunk(n)[i], batch) for i in range(n)]


def take(batch, rows):
    """These rows of a batch: of every tensor in it."""
    return tree_map(lambda x: x.index_select(0, rows), batch)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema ← decay·ema + (1 - decay)·model; the decay starts small, to forget the start."""
    decay = min(decay, (step + 1) / (step + 10))
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averages, values = zip(*[pair for pair in pairs if pair[1].requires_grad], strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)
