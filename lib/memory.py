"""How much memory a computation takes: what autograd keeps of it."""

import math
import weakref

from torch.autograd.graph import saved_tensors_hooks


class Held:
    """A tensor in the graph of a computation; it goes with its part of the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_by(networks, function, *arguments):
    """What autograd keeps of a call for a backward, but for what belongs to the networks.
    -> what the call returns, {piece of memory: bytes}"""
    own = [tensor for n in networks for tensor in (*n.parameters(), *n.buffers())]
    own = {tensor.untyped_storage()._cdata for tensor in own}
    all_held = weakref.WeakSet()

    def keep(tensor):
        held = Held(tensor)
        all_held.add(held)
        return held

    with saved_tensors_hooks(keep, lambda held: held.tensor):
        result = function(*arguments)
    storages = [held.tensor.untyped_storage() for held in all_held]
    return result, {x._cdata: x.nbytes() for x in storages if x._cdata not in own}


def in_bytes(n):
    """A number of bytes for people: 1.7 GB."""
    power = min(3, max(0, int(math.log10(max(n, 1)) / 3)))
    return f"{n / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"
