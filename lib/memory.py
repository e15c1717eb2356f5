"""How much memory a computation takes: what autograd keeps, and what the allocator held."""

import math
import weakref

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks


def kept_by(networks, function, *arguments):
    """What autograd keeps of a call for a backward, but for what belongs to the networks.
    -> what the call returns, {piece of memory: bytes}"""
    own = [tensor for n in networks for tensor in (*n.parameters(), *n.buffers())]
    own = {tensor.untyped_storage()._cdata for tensor in own}
    kept = []

    def keep(tensor):
        tensor = tensor.detach()  # an object of its own: it goes with its part of the graph
        kept.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*arguments)
    storages = [tensor().untyped_storage() for tensor in kept if tensor() is not None]
    return result, {x._cdata: x.nbytes() for x in storages if x._cdata not in own}


def peak_bytes(work):
    """The most bytes that PyTorch's allocator held at a time on the CPU during work(), beyond
    those before it.

    Resident memory tells less: the C library keeps what was given back, as much of it as happened
    to lie together."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def in_bytes(n):
    """A number of bytes for people: 1.7 GB."""
    power = min(3, max(0, int(math.log10(max(n, 1)) / 3)))
    return f"{n / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"
