"""Many processes, as torchrun starts them; where there is one, all of this does nothing.

Every process draws a batch's randomness as one process would and takes its share of it, so results
do not depend on their number. Small networks are copied to all, and their gradients averaged;
`shard` divides large ones by FSDP2. Rank 0 alone writes and speaks. What this takes of PyTorch is
imported where it is used: importing it takes longer than all the rest.
"""

import contextlib
import datetime
import functools
import os
import signal
import sys

import torch
import torch.distributed as dist

from lib.errors import RunError, Stop, UsageError, exit_status, reason

TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets beside WORLD_SIZE


def number_of(variable, otherwise):
    """What torchrun says in an environment variable; one that is no number says nothing."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else otherwise


def rank():
    """Which process this is; the first for one alone, whatever RANK was left over, and for one that
    `check_rank` refuses."""
    mine = number_of("RANK", 0)
    return mine if mine < world() else 0


def world():
    return max(1, number_of("WORLD_SIZE", 1))


def check_rank():
    """For processes that don't meet: UsageError where one of many is not told which it is."""
    if world() > 1 and number_of("RANK", world()) >= world():
        raise UsageError(f"WORLD_SIZE is {world()}: it needs a RANK from 0 to {world() - 1}.")


def my_share(batch):
    """This process's rows of a batch that all have drawn alike."""
    return batch[rank() :: world()]


@contextlib.contextmanager
def processes(device, program):
    """Joins the processes, and has all but rank 0 be quiet. The first to fail tells why."""
    if world() == 1:
        yield
        return
    if lacking := [name for name in TORCHRUN if not os.environ.get(name)]:
        what = f"WORLD_SIZE is {world()}, without {', '.join(lacking)}"
        raise UsageError(f"{what}: start many processes by torchrun, or unset WORLD_SIZE.")
    check_rank()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # without it, old addresses
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = datetime.timedelta(minutes=10)  # until all have met
    work = datetime.timedelta(hours=2)  # of rank 0 alone, which reads folders and writes files
    # While C++ waits no handler of Python's runs: by the system's own Ctrl-C ends it at once.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        meeting = next(dist.rendezvous("env://", timeout=patience))[0]
        store = dist.PrefixStore(f"attempt {attempt}", meeting)
        store.set(f"process {rank()}", "is there")
        store.wait([f"process {other}" for other in range(world())])
        store.set_timeout(work)
        options = dict(rank=rank(), world_size=world(), timeout=work)
        dist.init_process_group(backend, store=store, **options)
    except (ValueError, RuntimeError) as error:  # no such address, a port in use, nobody there
        where = ":".join(map(os.environ.get, TORCHRUN[1:]))
        why = f"process {rank()} of {world()} finds no others at {where} ({reason(error)})."
        raise RunError(why) from None
    finally:
        signal.signal(signal.SIGINT, handler)
    out, err = sys.stdout, sys.stderr
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
        stop_processes()
    except Stop:
        stop_processes()
        raise
    except Exception as error:
        sys.stdout, sys.stderr = out, err
        status, first, kept = 1, False, os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C++ complains where rank 0 has gone
        with contextlib.suppress(RuntimeError):
            first = store.add("failed", 1) == 1
        os.dup2(kept, 2)
        if first:
            status = exit_status(program, lost_process(error))
        sys.stderr.flush()
        os._exit(status)  # without waiting for the others
    finally:
        sys.stdout, sys.stderr = out, err


def lost_process(error):
    """An error of the connection as one for people; any other as it is."""
    lost = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if lost or isinstance(error, dist.DistError):
        return RunError(f"process {rank()} of {world()} has lost another ({reason(error)}).")
    return error


def stop_processes():
    """Ends the common work; after this each process is alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(status):
    """Ends the process; one of many without its destructors, in which gloo's threads may abort.

    Under torchrun what --stop-after ended is no failure: with 75 it would start it again."""
    if status == 75 and "TORCHELASTIC_RUN_ID" in os.environ:
        status = 0
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(value):
    """Every process's value, in all of them. -> a list"""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """Rank 0's value, in all processes."""
    return gather(value)[0]


def average(tensors):
    """Makes every tensor its mean over the processes. FSDP has done it for those it divides."""
    tensors = [t for t in tensors if not is_sharded(t)]
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= world()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


@functools.cache
def mesh(device_type, replicas, group):
    """The processes of a group, in rows that hold all of a network each."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device_type, (world(),), mesh_dim_names=("shard",))
    shape = (replicas, world() // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(network, device, dtype, replicas, offload):
    """Divides a network by FSDP2: a process holds a part of every tensor, in float32, and gathers
    it block by block in `dtype`; gradients are added up in float32.

    replicas: how many times the parts are held. offload: they wait in CPU memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh(device.type, replicas, dist.group.WORLD), mp_policy=policy)
    options["reshard_after_forward"] = True
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    place = torch.device("cpu") if offload else device
    for module in (*getattr(network, "joint_blocks", ()), network):
        fully_shard(module, **options)
    if next(network.parameters()).is_meta:
        network.to_empty(device=place)
    for name, buffer in network.named_buffers():  # all of them are the network's own
        setattr(network, name, buffer.to(device))
    return network if offload else network.to(place)


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor):
    """A sharded tensor put together, in all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_rank0(value):
    """A full tensor in rank 0's CPU memory; in the others, which help, nothing."""
    if not torch.is_tensor(value):
        return value
    value = full_tensor(value.detach())
    return value.cpu() if rank() == 0 else None


def shard_as(tensor, other):
    """This process's part of a full tensor that stands for `other`, if that is sharded."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def fill(network, weights):
    """Loads a state dict of full tensors into a network, sharded or not."""
    own = network.state_dict()
    network.load_state_dict({k: shard_as(v, own.get(k)) for k, v in weights.items()})
