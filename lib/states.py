"""States from which a cut stage goes on, bit for bit: weights and moments, by
torch.distributed.checkpoint, for one process and for many.

A state is a folder STAGE-state-STEP. Each process writes what it holds of every tensor; then rank 0
writes state.pt with the checksums of all files. A state without it is unfinished; one that differs
from its checksums is damaged, is named, and the one before it is used. Any number of processes goes
on from a state, divided as they like. Randomness and data are functions of the step, and a state is
saved where nothing has been added up for the log: so it holds no more than this.
"""

import shutil
import sys
import warnings

import torch
import torch.distributed as dist

from lib.errors import CheckpointError, RunError
from lib.files import read, save, sha256
from lib.parallel import barrier, gather, highest, my_share, rank

KEPT = 2  # states of a stage


def state_folders(out, stage):
    """The finished states of a stage in a run folder, the newest last."""
    return [path.parent for path in sorted(out.glob(f"{stage}-state-*/state.pt"))]


def newest_state(out, stage):
    """The newest sound state of a stage: its folder, and what was saved as `facts`; or None.

    RunError where there are states and all of them are damaged."""
    folders = state_folders(out, stage)
    for folder in reversed(folders):
        try:
            facts = read(folder / "state.pt")
            check_files(folder, facts["files"])
            return folder, facts
        except CheckpointError as error:
            print(f"{error} Trying the state before it.", file=sys.stderr)
    if folders:
        raise RunError(
            f"no state of the {stage} can be read. To begin this stage afresh, delete "
            + ", ".join(map(str, folders))
        )
    return None


def check_files(folder, files):
    """Raises CheckpointError in all processes where one finds a damaged file of a state.
    files: {name: SHA-256}, of which each process reads its share."""
    bad = 0
    names = sorted(files)
    for i in my_share(range(len(names))):
        path = folder / names[i]
        if not path.is_file() or sha256(path) != files[names[i]]:
            bad = i + 1
    if bad := highest(bad):
        path = folder / names[bad - 1]
        raise CheckpointError(f"{path}: missing or damaged, its checksum differs.")


def forget_states(out, stage, keep=()):
    """Deletes a stage's states but those to keep, and what a cut left unfinished."""
    if rank() > 0:
        return
    for folder in out.glob(f"{stage}-state-*/"):
        if folder not in keep:
            (folder / "state.pt").unlink(missing_ok=True)  # first: what is left is unfinished
            shutil.rmtree(folder, ignore_errors=True)


def forget_unfinished(out):
    """Deletes what a cut left: half-written files and states."""
    if rank() > 0:
        return
    for file in out.rglob(".*.tmp"):
        file.unlink()
    for folder in out.glob("*-state-*/"):
        if not (folder / "state.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)


def tensors_of(networks, optimizers):
    """{name: tensor} of all that a state holds, each on its device, divided or not.

    networks: {name: module}, optimizers: a list"""
    tensors = {}
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
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
        self.pending = None  # folder, facts, a function that waits for the files

    def save(self, step, networks, optimizers, facts, wait):
        """facts: a dict of plain values for `newest_state`.

        Without `wait` a divided state may be written while the training goes on: it counts once it
        is complete, at the next save or at the end."""
        from torch.distributed import checkpoint as dcp

        self.complete()
        folder = self.out / f"{self.stage}-state-{step:08d}"
        tensors = tensors_of(networks, optimizers)
        if self.beside_training and not wait:
            self.group = self.group or dist.new_group(backend="gloo")  # beside the training's own
            writing = dcp.async_save(tensors, checkpoint_id=folder, process_group=self.group)
            self.pending = folder, facts, writing.result
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that one process is one
            self.pending = folder, facts, lambda: None
            self.guarded(lambda: dcp.save(tensors, checkpoint_id=folder))
        self.complete()

    def guarded(self, write):
        """Calls what writes files; RunError says what is wrong with the disk."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            write()
        except CheckpointException as error:
            why = next(iter(error.failures.values()))[0]
            folder, self.pending = self.pending[0], None
            raise RunError(f"{folder}: the state can't be written ({why}).") from None

    def complete(self):
        """Ends a save: the state is there once its state.pt is."""
        if self.pending is None:
            return
        self.guarded(self.pending[2])
        (folder, facts, _), self.pending = self.pending, None
        mine = [f"__{rank()}_*", *([".metadata"] if rank() == 0 else [])]
        digests = {path.name: sha256(path) for name in mine for path in folder.glob(name)}
        files = {name: digest for own in gather(digests) for name, digest in own.items()}
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that one process is one
        dcp.load(wanted, checkpoint_id=folder)
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
