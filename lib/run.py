"""One run of a training program: its folder and what the stages share.

A run folder holds config.json (the settings it is bound to), log.jsonl, a KIND.pt for every
finished network, and the states of the stage at work.
"""

import contextlib
import copy
import dataclasses
import functools
import sys
import time
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from lib.files import checksum, save
from lib.log import Log
from lib.loop import Loop
from lib.lora import adapt, build, new_adapter, own_state
from lib.machine import arithmetic, autocast, deterministic, device_of, facts
from lib.parallel import barrier, fill, rank, shard, shard_as, stop_processes, to_rank0, world
from lib.settings import bound, lasting, locked, open_folder
from lib.states import forget_states, forget_unfinished
from lib.streams import key_of


def compile_blocks(network):
    """Has a network compiled block by block, as most are alike, once for every shape."""
    torch._dynamo.config.recompile_limit = 64
    for module in getattr(network, "joint_blocks", [network]):
        module.compile()


class Run:
    """settings: a HowToRun with a `seed`; dataset, text_encoder: what the stages read; watch: see
    Watch. method: the name of what is trained; base: the settings that it is named against, a
    preset's. show: a function run, kind, step, network that draws how far the training has come."""

    def __init__(self, settings, dataset, text_encoder, watch, method="ladd", base=None, show=None):
        self.settings, self.watch = settings, watch
        self.out = Path(settings.out)
        self.device = device_of(settings.device)
        self.dataset, self.text_encoder = dataset.to(self.device), text_encoder.to(self.device)
        self.method, self.base = method, base or settings
        self.show = functools.partial(show, self) if show else lambda *_: None
        self.divided = settings.shard and world() > 1
        self.log = Log(self.out, settings.tensorboard)
        self.notes = []  # lines that the report must repeat
        self.earlier = 0.0  # seconds that earlier processes worked at the stage

    def alone(self):
        """This run for one process, after the others have gone."""
        one = copy.copy(self)
        one.divided = False
        return one

    def autocast(self):
        return autocast(self.device, self.settings.precision)

    # networks

    def make(self, module, **arguments):
        """A fresh network, its weights drawn from the seed, on its device."""
        with self.seeded(f"weights, {module.__name__}"):
            return self.place(module(**arguments))

    @contextlib.contextmanager
    def seeded(self, stream):
        """What PyTorch draws inside is a function of the seed and the stream."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_of(self.settings.seed, stream) >> 32)  # of which it reads 32 bits
            yield

    def adapted(self, network):
        """Another network with the weights of this one, in the same memory, and with an adapter of
        its own, drawn from the seed, that learns: --lora."""
        weights = network.state_dict()
        with torch.device("meta"):
            other = type(network)(**network.config).to(next(network.parameters()).dtype)
            adapt(other, self.settings.lora)
        if self.divided:
            other = self.place(other, learns=False)
        with self.seeded("weights, adapter"):
            start = new_adapter(other)
        places = own_state(other)
        start = {k: shard_as(v.to(self.device), places[k]) for k, v in start.items()}
        other.load_state_dict(weights | start, assign=True)
        other.checkpointing = self.settings.checkpointing
        return other.eval()

    def place(self, network, learns=True):
        """The network on its device, or divided among the processes with --shard."""
        s = self.settings
        network.checkpointing = s.checkpointing
        if not self.divided:
            return network.to(self.device)
        dtype = arithmetic(self.device, s.precision)
        return shard(network, self.device, dtype, s.replicas, offload=s.offload and learns)

    def compile(self, network):
        """With --compile yes; tools/train.py has decided `auto`."""
        if self.settings.compile == "yes":
            compile_blocks(network)

    def path(self, kind):
        return self.out / f"{kind}.pt"

    def save(self, kind, network, step, optimizer=None, name=""):
        """Writes KIND.pt, or NAME.pt: weights, and what is needed to rebuild the network."""
        weights = dict(own_state(network))
        checkpoint = dict(format="ladd-1", kind=kind, model=network.config, weights=weights)
        if lora := getattr(network, "lora", 0):
            checkpoint |= dict(lora=lora, base=checksum(self.path("teacher")))
        checkpoint |= dict(settings=lasting(self.settings), step=step)
        if optimizer is not None:
            checkpoint["optimizer"] = optimizer.state_dict()
        checkpoint = tree_map(to_rank0, checkpoint)
        if rank() == 0:
            save(checkpoint, self.path(name or kind))
        barrier()  # so that all find it

    def load(self, checkpoint, module, frozen=False):
        """The network module(**arguments) of a checkpoint, without gradient; a `frozen` one in the
        precision of the arithmetic, to which autocast would cast its weights in every pass."""
        dtype = arithmetic(self.device, self.settings.precision) if frozen else torch.float32
        with torch.device("meta" if self.divided else "cpu"):
            network = build(module, checkpoint).to(dtype)
        network = self.place(network, learns=not frozen)
        fill(network, checkpoint["weights"])
        return network.eval().requires_grad_(False)

    # stages

    def signature(self):
        """The settings and the data that results depend on."""
        return bound(self.settings) | dict(dataset=self.dataset.name)

    @contextlib.contextmanager
    def opened(self, note):
        """The run folder, held for this run alone: signed with the settings and the method, or
        found made with the same. note: a line for the user."""
        s, mine = self.settings, self.signature() | dict(method=self.method)
        defaults = bound(self.base) | dict(method="ladd")
        deterministic(s.deterministic)
        with locked(self.out) if rank() == 0 else contextlib.nullcontext():
            if rank() == 0:
                open_folder(self.out, mine, defaults)
                forget_unfinished(self.out)
                self.log.forget()
            barrier()
            if note:
                self.notes.append(note)
                print(f"\n!!! {note}\n", file=sys.stderr, flush=True)
            where = facts() if rank() == 0 else {}
            self.log.write(settings=dataclasses.asdict(s), method=self.method, note=note, **where)
            yield
            if note:
                print(f"\n!!! {note}\n", file=sys.stderr, flush=True)

    def stages(self, work, done, wanted):
        """Goes through the stages in order, or through the one that is wanted; those that are done
        are skipped. work {name: function of the run}, done {name: bool}"""
        for stage in work:
            if wanted not in ("all", stage):
                continue
            if done[stage]:
                print(f"{stage}: done before", flush=True)
                continue
            last = stage == list(work)[-1]
            self.watch.patient = not last  # which saves nothing on its way
            self.watch.check()
            if last:
                stop_processes()
                if rank() > 0:
                    return
            start, self.earlier = time.perf_counter(), 0.0
            work[stage](self)
            barrier()
            forget_states(self.out, stage)  # its result is safe
            if stage == "distillation":
                forget_states(self.out, "tuning")  # the part of it that some methods begin with
            seconds = self.earlier + time.perf_counter() - start
            self.log.write(stage=stage, finished=True, seconds=seconds)
            print(f"{stage}: {seconds:.0f} s", flush=True)

    def loop(self, *arguments, **options):
        """The steps of a stage, from where a cut run goes on; see Loop."""
        return Loop(self, *arguments, **options)
