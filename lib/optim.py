"""Optimisers, their step, learning rates, and the average of the weights."""

import torch
from torch.utils._pytree import tree_map

from lib.parallel import average, full_tensor


def make_optimizers(model, lr, muon_lr, beta1, eps=1e-8):
    """[AdamW], or with muon_lr [AdamW, Muon], where Muon has the matrices of the blocks."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = muon_lr and parameter.ndim == 2 and "blocks" in name
        (matrices if inner else rest).append(parameter)
    fused = rest[0].device.type in ("cpu", "cuda")  # and not on the meta device of the plan
    adamw = dict(betas=(beta1, 0.99), eps=eps, weight_decay=0.0, fused=fused)
    optimizers = [torch.optim.AdamW(rest, lr, **adamw)]
    if matrices:
        muon = dict(momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
        optimizers.append(torch.optim.Muon(matrices, muon_lr, **muon))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate(step, total, decay, warmup=40):
    """A factor: linear warm-up, constant, linear to zero over the last `decay` of the updates."""
    return min(1.0, (step + 1) / warmup, (total - step) / (decay * total))


def step_all(*players):
    """One step of every player by the gradient in its network, which is then forgotten.

    players: (optimizers, network, largest gradient norm, factor of the learning rate) each. -> the
    gradients' norms before clipping. None for each, and no step of any, where one is not finite.
    (To know costs a wait for the backward pass; the queue of the device fills again at once.)"""
    norms = []
    for _, network, clip, _ in players:
        average([p.grad for p in network.parameters() if p.grad is not None])
        norms.append(full_tensor(torch.nn.utils.clip_grad_norm_(network.parameters(), clip)))
    finite = all(norm.isfinite() for norm in norms)  # one by one: --offload has its own on the CPU
    for optimizers, _, _, rate in players:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return norms if finite else [None] * len(norms)


def split(batch, n):
    """n equal parts of a batch: of every tensor in it."""
    return [tree_map(lambda x, i=i: x.chunk(n)[i], batch) for i in range(n)]


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema ← decay·ema + (1 - decay)·model; the decay starts small, to forget the start."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
