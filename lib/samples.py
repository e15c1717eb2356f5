"""The teacher's samples on disk: files of one size each, memory-mapped when they are read."""

import torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from lib.errors import RunError, pass_on, reason
from lib.files import read, save
from lib.parallel import broadcast, my_share, rank, world
from lib.streams import RULE


class Joined(ConcatDataset):
    """Tensors of samples of one shape one after the other, as one tensor (n, …). Nothing is copied
    before rows are asked for: what is memory-mapped stays on disk."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.shape = (len(self), *tensors[0].shape[1:])
        self.nbytes = sum(t.nbytes for t in tensors)

    def to(self, device):
        """All of them, read into memory."""
        return torch.cat(self.datasets).to(device)

    def __getitem__(self, rows):
        one = super().__getitem__
        return torch.stack([one(row) for row in rows.tolist()])


def write_samples(run, plan, make, seed):
    """Makes the samples that are not there yet, the processes by turns. A cut run goes on.

    plan: the sample numbers of every file; make(file, index) -> x0 (n, C, H, W), n captions"""
    paths = [run.out / "synthetic" / f"{i:05d}.pt" for i in range(len(plan))]
    todo = broadcast([i for i, path in enumerate(paths) if not path.exists()])
    made_before = len(plan) - len(todo)
    with tqdm(desc="synthesis", total=len(plan), initial=made_before, disable=None) as bar:
        for turn in range(0, len(todo), world()):
            # Divided networks need all processes: those without a file of their own join in.
            file = todo[min(turn + rank(), len(todo) - 1)]
            x0, captions = make(file, plan[file])
            x0 = x0.half()
            if not x0.isfinite().all():
                where = f"{plan[file][0]} to {plan[file][-1]}"
                advice = "In another --out try --precision fp32, or a lower --teacher-lr."
                raise RunError(f"the teacher's samples {where} are not finite in fp16. {advice}")
            if turn + rank() < len(todo):
                made = dict(x0=x0, captions=captions, index=plan[file].tolist(), seed=seed)
                save(made | dict(noise=RULE), paths[file])
            bar.update(min(world(), len(todo) - turn))
            run.watch.check()


def read_file(path, channels, patch, check, first):
    """x0 (n, C, H, W) float16, n captions, the noise's seed. check: whether the checksums are;
    first: the number of its first sample."""
    try:
        content = read(path, check=check, mmap=True)
        x0, captions = content["x0"], [c + "" for c in content["captions"]]
        n, C, H, W = x0.shape
        wrong = x0.dtype != torch.float16 or H % patch or W % patch
        if (n, C) != (len(captions), channels) or wrong:
            raise ValueError("samples and captions don't match")
        if check and not x0.isfinite().all():
            raise ValueError("numbers that are not finite")
        if content.get("noise") != RULE:
            raise ValueError("from another version, which drew noise by another rule")
        if content["index"] != list(range(first, first + n)):
            raise ValueError(f"its samples are not those from number {first} on")
        return x0, captions, int(content["seed"])
    except Exception as error:  # a damaged file raises nearly anything
        pass_on(error, path)
        why = reason(error, 1000).removeprefix(f"{path}: ")
        advice = "Delete it and give the command again."
        if path.stat().st_nlink > 1:  # --from gives a file of another run a second name
            advice = "Delete it here and in --from's run; give that run's command, then this again."
        raise RunError(f"{path} is damaged ({why}). {advice}") from None


def read_samples(folder, channels, patch):
    """All samples of a folder, sorted by size, nothing of them in memory.

    -> [(x0 (n, C, H, W), caption (n,) rows of the captions)], captions, the seed of their noise"""
    paths = [path for path in folder.glob("*.pt") if path.stem.isdecimal()]
    paths.sort(key=lambda path: int(path.stem))
    mine = set(my_share(paths))  # the processes share the work of checking
    parts, texts, seeds = {}, [], set()
    for path in paths:
        x0, captions, seed = read_file(path, channels, patch, path in mine, len(texts))
        seeds.add(seed)
        rows = torch.arange(len(texts), len(texts) + len(captions))
        tensors, captions_of = parts.setdefault(x0.shape[1:], ([], []))
        tensors.append(x0)
        captions_of.append(rows)
        texts += captions
    if len(seeds) > 1:
        told = " and ".join(map(str, sorted(seeds)))
        raise RunError(f"{folder}: of the seeds {told}. Delete it and give the command again.")
    return [(Joined(x0), torch.cat(rows)) for x0, rows in parts.values()], texts, seed
