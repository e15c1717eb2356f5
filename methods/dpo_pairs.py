"""Where the pairs of methods/dpo.py come from: the teacher's own samples, ranked, or the user's.

A pair is two pictures of one caption; lib/pairs.py has their folder and how samples are ranked.
"""

import copy
import dataclasses
import sys

import numpy as np
import torch

import data
import ladd
from lib.captions import unread_words
from lib.errors import UsageError
from lib.pairs import LIST, best_and_worst, read_pairs, tensors_of, write_pairs
from lib.parallel import rank, world
from methods.classifier import classifier_of, log_p

PAIR_INDEX = 3 << 35  # from here on captions are drawn whose samples are ranked


@torch.no_grad()
def rewards(judge, images, labels, batch=500):
    """`log_p` of images (n, 3, H, W) uint8 with labels (n, A). -> (n,)"""
    device, found = next(judge.parameters()).device, []
    for x, right in zip(images.split(batch), labels.split(batch), strict=True):
        found.append(log_p(judge, data.to_float(x.to(device)), right.to(device)).cpu())
    return torch.cat(found)


def make_pairs(run):
    """Line 1: samples by the teacher, ranked. -> pairs as lib/pairs.py has them"""
    s, dataset, pairs = run.settings, run.dataset, []
    judge, teacher = classifier_of(run), ladd.generator(run, "teacher")
    options = dict(seed=s.seed, steps=s.synthetic_steps, cfg=s.synthetic_cfg)
    for bucket, n in data.shares(dataset, max(2, s.synthetic // s.candidates)):
        _, caption = bucket.batch(np.arange(n) + PAIR_INDEX)
        caption = caption.repeat_interleave(s.candidates)
        texts, stream = [dataset.captions[i] for i in caption], f"pairs of {bucket.size}"
        images = data.to_uint8(teacher.sample(texts, size=bucket.size, stream=stream, **options))
        reward = rewards(judge, images, dataset.labels[caption])
        found = best_and_worst(images, reward, s.candidates, s.tie)
        pairs += [(pair, texts[i]) for pair, i in found]
    if len(pairs) < 2:
        raise UsageError(f"--tie {s.tie:g}: leaves {len(pairs)} pairs of {s.synthetic} samples")
    return pairs


def take_pairs(run):
    """The pairs, kept in the run's folder. -> batches of those to learn from, and of a tenth that
    is held out"""
    s, folder = run.settings, run.out / "pairs"
    if rank() == 0 and not (folder / LIST).exists():
        run.watch.patient = world() > 1  # nothing is saved on the way, but all must end together
        write_pairs(read_pairs(s.pairs, s.sizes) if s.pairs else make_pairs(run), folder)
        run.watch.patient = True
    run.watch.check()  # which waits for rank 0
    pairs = read_pairs(folder, s.sizes)
    if told := unread_words({caption for _, caption in pairs}, s.text_length):
        print(f"--pairs: {told}", file=sys.stderr)
    learned = [pair for i, pair in enumerate(pairs) if i % 10]
    return batches(run, learned), batches(run, pairs[::10])


def batches(run, pairs):
    """A function step -> winner, loser, text, t, noise: what an update starts from, drawn as the
    teacher's batches are, of images that are the winner over the loser."""
    parts, captions = tensors_of(pairs)
    options = dict(captions=captions, seed=run.settings.seed, flip=False)
    other, token_ids = copy.copy(run), run.text_encoder.ids(captions)
    other.settings = dataclasses.replace(run.settings, teacher_batch=run.settings.batch)
    other.dataset = data.Buckets([data.ImageSet("pairs", own, **options) for own in parts])

    def draw(step):
        images, text, t, noise = ladd.draw_teacher_batch(other, step, token_ids)
        return *images.chunk(2, dim=1), text, t, noise.chunk(2, dim=1)[0]

    return draw
