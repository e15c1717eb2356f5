"""How much memory a computation takes: what autograd keeps of it."""

import math
import weakref

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


def in_bytes(n):
    """A number of bytes for people: 1.7 GB."""
    power = min(3, max(0, int(math.log10(max(n, 1)) / 3)))
    return f"{n / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"
