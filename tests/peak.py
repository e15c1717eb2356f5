"""Of tests that hold the plan of memory to real updates."""

import numpy as np
import torch


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
