"""Captions as questions with few answers, which a judge can read back from a picture."""

import re
import unicodedata
from collections import Counter

import torch

from lib.errors import DataError
from lib.files import read_lines

MOST_WORDS = 4096  # of a caption: the highest --text-length
# Where a word may break or its letters join, and which picture of a character is meant.
UNSEEN = "\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069"
UNSEEN = re.compile(f"[{UNSEEN}\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")


def split_words(caption):
    """The words of a caption, in small letters. The same character is the same however it was
    composed, and however wide. Marks, as Hindi and Thai have them, belong to their word."""
    if caption.isascii():
        return re.findall(r"\w+", caption.lower())
    whole = unicodedata.normalize("NFKC", caption).lower()
    whole = UNSEEN.sub("", whole)
    inside = (c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" for c in whole)
    return "".join(c if kept else " " for c, kept in zip(whole, inside, strict=True)).split()


def known_words(captions, length):
    """The words of captions of which `length` are read, in order of the alphabet."""
    return sorted({word for caption in captions for word in split_words(caption)[:length]})


def strange_words(prompts, file, length):
    """Which words of the prompts are not among those of a run's words.txt, in one line, or None."""
    try:
        known = read_lines(file, "words of the run")
    except DataError:  # an older version made none, and it is for this hint alone
        return None
    strange = set(known_words(prompts, length)).difference(known)
    if not strange:
        return None
    some = ", ".join(sorted(strange)[:20])[:500]
    return f"words that the model has never seen: {some}; those it knows are in {file}"


def unread_words(captions, length):
    """What a reader of the first `length` words misses of the captions, in one line, or None."""
    words = [tuple(split_words(caption)) for caption in captions]
    longest = max(map(len, words), default=0)
    cut, alike = sum(len(w) > length for w in words), len(words) - len(set(words))
    found = []
    if cut:
        more = f"--text-length {longest} reads all" if longest <= MOST_WORDS else "shorten them"
        found.append(f"{cut} of {len(words)} captions have more than {length} words; {more}.")
    if () in words:
        found.append(f"{words.count(())} of {len(words)} captions have no word.")
    if alike:
        found.append(f"{alike} of {len(words)} captions have the same words as another one.")
    return " ".join(found) or None


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
        seen.update(dict.fromkeys(bag, n))
    telling = [w for w in seen if len(w) > 2 or unicodedata.category(w[0]) == "Lo"]  # 猫 is a word
    useful = [w for w in telling if 0.05 <= seen[w] / total <= 0.95]
    useful = sorted(useful, key=lambda w: (abs(seen[w] / total - 0.5), w))[:most]
    attributes = {word: ("no", "yes") for word in useful}
    labels = [[int(word in bag) for word in useful] for bag in bags]
    return attributes, torch.tensor(labels, dtype=torch.int64).reshape(len(captions), len(useful))
