"""LoRA, low-rank adapters (arXiv 2106.09685): a linear layer becomes y = W·x + b + B·(A·x).

W and b stay as they are. A (r, in) and B (out, r) learn, with a small rank r. A starts random and B
zero, so that a network with a new adapter is bit for bit the one without. Networks of the same W
share its memory: a frozen one without an adapter, and any number with their own. The scale of B·A,
which others write α/r, is 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

ENDS = (".lora_A", ".lora_B")  # of an adapter's names; before them stands the layer's


class Adapted(nn.Linear):
    """(…, in) -> (…, out), with the weights of a linear layer and an adapter."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapt(network, rank):
    """Gives the linear layers of a network's blocks an adapter of zeros, the only part of it that
    learns from now on. -> the network"""
    network.requires_grad_(False)
    for module in list(network.joint_blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child, rank))
    network.lora = rank
    return network


def build(module, checkpoint):
    """The network module(**arguments) of a checkpoint, with an adapter where that has one."""
    network = module(**checkpoint["model"])
    rank = checkpoint.get("lora")
    return adapt(network, rank) if rank else network


def adapter_of(weights):
    """The adapter among a network's {name: tensor}."""
    return {name: weights[name] for name in weights if name.endswith(ENDS)}


def own_state(network):
    """What is a network's own, {name: tensor}: its adapter alone, where it has one."""
    weights = network.state_dict()
    return adapter_of(weights) or weights


def new_adapter(network):
    """An adapter to start with, {name: tensor} on the CPU: A as PyTorch draws the weights of a
    linear layer, B zero."""
    start = {name: torch.zeros(tensor.shape) for name, tensor in own_state(network).items()}
    for name in start:
        if name.endswith("A"):
            nn.init.kaiming_uniform_(start[name], a=math.sqrt(5))
    return start


def added(weights, adapter, scale=1.0):
    """{name: tensor} with scale·B·A added to the weights W of an adapter's layers."""
    weights = dict(weights)
    for name in adapter:
        layer, kind = name.rsplit(".", 1)
        if kind == "lora_B":
            change = adapter[name].float() @ adapter[f"{layer}.lora_A"].float()
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].float() + scale * change
    return weights


def merged(checkpoint):
    """A checkpoint whose network has no adapter any more, and computes the same."""
    if not checkpoint.get("lora"):
        return checkpoint
    weights = added(checkpoint["weights"], adapter_of(checkpoint["weights"]))
    weights = {name: weights[name] for name in weights if not name.endswith(ENDS)}
    plain = {key: value for key, value in checkpoint.items() if key not in ("lora", "base")}
    return plain | dict(weights=weights)
