"""States from which a cut stage goes on, bit for bit: weights and moments, by
torch.distributed.checkpoint, for one process and for many.

A state is a folder STAGE-state-STEP. Each process writes what it holds of every tensor; then rank 0
writes state.pt with the checksums of all files. A state without it is unfinished; one that differs
from its checksums is damaged, is named, and the one before it is used. Any number of processes goes
on from a state, divided as they like. Randomness and data are functions of the step, and a state is
saved where nothing has been added up for the log: so it holds no more than this.
"""

import dataclasses
import enum
import pickle
import shutil
import sys
import warnings
from pathlib import PurePath

import torch
import torch.distributed as dist

from lib.errors import CheckpointError, RunError, first_cause, pass_on, reason
from lib.files import read, save, sha256
from lib.lora import own_state
from lib.parallel import barrier, gather, my_share, rank

KEPT = 2  # states of a stage
STAGES = ("teacher", "tuning", "distillation")  # those that have states
STEP = 8 * "[0-9]"
TEMPORARY = ".*." + 8 * "[0-9a-f]" + ".tmp"  # what lib/files.py writes before it is whole
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.9's own writer uses it


def state_folders(out, stage):
    """The finished states of a stage in a run folder, the newest last."""
    return [path.parent for path in sorted(out.glob(f"{stage}-state-{STEP}/state.pt"))]


def newest_state(out, stage):
    """The newest sound state of a stage: its folder, and what was saved as `facts`; None if it has
    no state. RunError: all are damaged."""
    folders = state_folders(out, stage)
    for folder in reversed(folders):
        try:
            facts = read(folder / "state.pt")
            check_files(folder, facts["files"])
            return folder, facts
        except CheckpointError as error:
            print(f"{error} Trying the state before it.", file=sys.stderr)
    if folders:
        told = ", ".join(map(str, folders))
        raise RunError(f"no state of the {stage} can be read. To begin it afresh, delete {told}")
    return None


def check_files(folder, files):
    """CheckpointError in all processes where one finds a damaged file of a state, or where its list
    of tensors would run code: PyTorch reads that without care.

    files: {name: SHA-256}, of which each process reads its share."""
    bad = []
    for name in my_share(sorted(files)):
        path = folder / name
        if not path.is_file() or sha256(path) != files[name]:
            bad.append(path)
    bad = [path for found in gather(bad) for path in found]
    if bad:
        raise CheckpointError(f"{bad[0]}: missing or damaged, its checksum differs.")
    try:
        with open(folder / ".metadata", "rb") as file:
            TensorList(file).load()
    except Exception as error:
        pass_on(error, folder)
        raise CheckpointError(f"{folder}/.metadata: can't be read ({reason(error)}).") from None


class TensorList(pickle.Unpickler):
    """Reads .metadata, a pickle: records, enums, dtypes and paths, and nothing that runs."""

    def find_class(self, module, name):
        known = module in ("torch", "torch.serialization") or module.startswith("pathlib")
        known = known or module.startswith("torch.distributed.checkpoint.")
        if known and "." not in name and name != "BytesStorageMetadata":  # which holds a pickle
            found = super().find_class(module, name)
            record = isinstance(found, torch.dtype) or dataclasses.is_dataclass(found)
            word = isinstance(found, type) and issubclass(found, (enum.Enum, PurePath))
            if record or word or found in (torch.Size, torch.serialization._get_layout):
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def delete(folder):
    """Deletes a state, if it is there; what a cut leaves of it is unfinished."""
    (folder / "state.pt").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def forget_states(out, stage, keep=()):
    """Deletes the states of a stage but those to keep; also what is unfinished."""
    if rank() == 0:
        for folder in out.glob(f"{stage}-state-{STEP}/"):
            if folder not in keep:
                delete(folder)


def forget_unfinished(out):
    """Deletes what a cut left: half-written files and states. What else is there is the user's."""
    for folder in ("", "samples", "synthetic", "pairs"):
        for file in (out / folder).glob(TEMPORARY):
            file.unlink()
    for stage in STAGES:
        forget_states(out, stage, keep=state_folders(out, stage))


def tensors_of(networks, optimizers):
    """{name: tensor} of all that a state holds, each on its device, divided or not."""
    tensors = {}
    for name, network in networks.items():
        for key, tensor in own_state(network).items():
            tensors[f"{name}/{key}"] = tensor
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            for key, tensor in moments.items():
                tensors[f"optimizer/{i}/{j}/{key}"] = tensor
    return tensors


class Saver:
    """Writes the states of one stage into a run folder, and keeps the last two."""

    def __init__(self, out, stage, device, divided):
        self.out, self.stage = out, stage
        # On a CPU a copy to write from would cost as much as the writing.
        self.beside_training = divided and device.type == "cuda"
        self.group = None
        self.pending = None  # of a save that was begun: folder, facts, what ends the writing

    def save(self, step, networks, optimizers, facts, wait):
        """facts: a dict of plain values for `newest_state`. Without `wait` a divided state may be
        written while the training goes on: it counts from the next save on, or from the end."""
        from torch.distributed import checkpoint as dcp

        self.complete()
        folder = self.out / f"{self.stage}-state-{step:08d}"
        if rank() == 0:
            delete(folder)  # a damaged one, where the stage goes on from the one before it
        barrier()
        tensors = tensors_of(networks, optimizers)
        if self.beside_training and not wait:
            self.group = self.group or dist.new_group(backend="gloo")  # beside the training's own
            writing = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group)
            self.pending = folder, facts, writing.result
        else:
            self.pending = folder, facts, lambda: dcp.save(tensors, checkpoint_id=folder)
            self.complete()

    def complete(self):
        """Ends a save that was begun: once all of its files are there, the state counts."""
        if self.pending is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        (folder, facts, write), self.pending = self.pending, None
        try:
            write()
        except CheckpointException as error:
            why = first_cause(next(iter(error.failures.values()))[0])
            raise RunError(f"{folder}: the state can't be written ({why}).") from None
        mine = list(folder.glob(f"__{rank()}_*"))
        if rank() == 0:
            mine.append(folder / ".metadata")
        files = {}
        for own in gather({path.name: sha256(path) for path in mine}):
            files |= own
        if rank() == 0:
            save(facts | dict(files=files), folder / "state.pt")
            forget_states(self.out, self.stage, keep=state_folders(self.out, self.stage)[-KEPT:])
        barrier()


def load_state(folder, networks, optimizers):
    """Fills networks and optimisers from a state, whichever processes wrote it."""
    from torch.distributed import checkpoint as dcp

    wanted = tensors_of(networks, [])  # filled in place
    moments = [{} for _ in optimizers]
    for name, saved in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        kind, *where = name.split("/")
        if kind != "optimizer":
            continue
        i, j, key = int(where[0]), int(where[1]), where[2]
        parameters = [p for group in optimizers[i].param_groups for p in group["params"]]
        like = parameters[j].detach()
        if saved.size != like.shape:  # a number of updates, the same in all processes
            like = torch.zeros(saved.size, device=like.device)
        wanted[name] = moments[i].setdefault(j, {})[key] = torch.zeros_like(like)
    dcp.load(wanted, checkpoint_id=folder)
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
