"""Captions as questions with few answers, which a judge can read back from a picture."""

import re
from collections import Counter

import torch


def split_words(caption):
    return re.findall(r"\w+", caption.lower())


def class_attributes(names):
    """The captions, the single attribute and the labels of a set of classes."""
    captions = [f"a photo of a {name}" for name in names]
    return captions, {"class": tuple(names)}, torch.arange(len(names))[:, None]


def word_attributes(captions, counts, most=16):
    """Attributes of free captions: does it hold this word? For the words that divide the set best.

    counts: how many images have each caption. -> attributes, labels"""
    total, seen = sum(counts), Counter()
    bags = [set(split_words(c)) for c in captions]
    for bag, n in zip(bags, counts, strict=True):
        for word in bag:
            seen[word] += n
    useful = [w for w, n in seen.items() if 0.05 <= n / total <= 0.95 and len(w) > 2]
    useful = sorted(useful, key=lambda w: (abs(seen[w] / total - 0.5), w))[:most]
    attributes = {word: ("no", "yes") for word in useful}
    labels = [[int(word in bag) for word in useful] for bag in bags]
    return attributes, torch.tensor(labels, dtype=torch.int64).reshape(len(captions), len(useful))
