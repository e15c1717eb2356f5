"""What some methods learn from beside the teacher: a classifier of clean images, frozen.

It is like the judge that scores (lib/scores.py), but has other weights and wider convolutions:
nobody is scored by what it has learned to please. ADD reads its maps, where the paper has DINO's;
Hyper-SD and DPO read its answers, where their papers have the taste of people.
"""

import torch
import torch.nn.functional as F
from torch import nn

import sample


def classifier_of(run):
    s, own = run.settings, dict(seed=1, kernel=5)
    judge = sample.judge_of(run.dataset, s, run.device, s.data_dir, s.precision, **own)
    return judge.requires_grad_(False)


def features(judge, x0):
    """The maps after its convolutions. -> tokens [(B, h·w, C)], sizes [(h, w)]"""
    tokens, sizes, x = [], [], x0
    for layer in judge.body:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            tokens.append(x.flatten(2).transpose(1, 2))
            sizes.append(x.shape[2:])
    return tokens, sizes


def widths(judge):
    """The channels of these maps."""
    return [layer.out_channels for layer in judge.body if isinstance(layer, nn.Conv2d)]


def labels_of(run, samples):
    """What the samples' captions say, as answers to its questions. -> (n, A)"""
    ids = run.text_encoder.ids(run.dataset.captions).tolist()
    known = dict(zip(map(tuple, ids), run.dataset.labels, strict=True))
    return torch.stack([known[tuple(own)] for own in samples.token_ids.tolist()])


def log_p(judge, x0, labels):
    """How probable it finds all that the captions say, as a logarithm.

    x0 (B, 3, H, W), labels (B, A) -> (B,)"""
    _, answers = judge(x0)
    return -sum(
        F.cross_entropy(answer.float(), labels[:, k], reduction="none")
        for k, answer in enumerate(answers)
    )
