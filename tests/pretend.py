"""A device that computes on the CPU and refuses what a GPU refuses: tensors of two devices in one
operation, numpy on its memory. `import pretend` makes it known to PyTorch.

WAITS counts what a host waits for on a GPU: reads of the device's memory, and copies to it that are
not `non_blocking`. REFUSED holds dtypes that it has not: Apple's has neither float64 nor bf16."""

import contextlib
import sys

import torch
from torch.utils import backend_registration

NAME = "pretend"
WAITS = []  # the operation of every wait
REFUSED = set()
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
READING |= {aten.unique_dim.default, aten._unique2.default}  # results whose shape is read


class Backend(backend_registration._DummyBackendModule):
    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def current_stream(self):
        return self

    def synchronize(self, *_):
        pass

    def stream(self, _):
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` is its memory, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, raw):
        if raw.dtype in REFUSED:
            raise TypeError(f"{NAME} has no {raw.dtype}")
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.size(), device=DEVICE, **layout)
        tensor.raw = raw
        return tensor

    def numpy(self, **_):
        raise TypeError(
            f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first."
        )

    __array__ = numpy

    def __repr__(self, **_):
        return f"OnDevice({self.raw})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, rows):
        if isinstance(rows, list):
            rows = torch.tensor(rows)
        return super().__getitem__(rows)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def wait(function):
    """Notes a wait by the place in the project that asks for it."""
    frame = sys._getframe()
    while "packages" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    WAITS.append(f"{function}, {frame.f_code.co_filename}:{frame.f_lineno}")


def each(function, value):
    """value with function(x) for every tensor x in it. (torch's tree_map takes several times as
    long, for any kind of value.)"""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([each(function, x) for x in value])
    if isinstance(value, dict):
        return {key: each(function, x) for key, x in value.items()}
    return value


def run(function, arguments, options):
    """Computes on the CPU what an operation asks of the device."""
    tensors = []
    each(tensors.append, (arguments, options))
    mine = [x for x in tensors if isinstance(x, OnDevice)]
    others = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
    to_device, target = bool(mine), options.get("device")
    if target is not None:
        to_device = torch.device(target).type == NAME
        options = options | dict(device=torch.device("cpu")) if to_device else options
    if function is aten.copy_.default:
        to_device = isinstance(arguments[0], OnDevice)
    if function in COPIES:
        source = arguments[function is aten.copy_.default]
        quiet = options.get("non_blocking") or True in arguments[2:]
        if isinstance(source, OnDevice) != to_device and not (to_device and quiet):
            wait(function)
    elif mine and others:
        if function not in INDEXING:
            raise RuntimeError(f"Expected all tensors to be on one device, not two ({function})")
        wait(function)  # it copies the indices
    if function in READING:
        wait(function)
    raw = each(lambda x: x.raw if isinstance(x, OnDevice) else x, (arguments, options))
    out = function(*raw[0], **raw[1])
    known = {id(x.raw): x for x in mine}  # what an operation changed in place, it returns

    def outside(x):
        return known[id(x)] if id(x) in known else OnDevice(x)

    return each(outside, out) if to_device else out


library = torch.library.Library("_", "IMPL")
library.fallback(lambda op, *arguments, **options: run(op, arguments, options), "PrivateUse1")
