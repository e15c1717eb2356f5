"""Verdicts on a stage of training from its log: healthy, suspicious or failed, and why; and
numbers of that log: how well the heads separate samples, and whether those of a caption differ."""

import math
from itertools import groupby

import torch
from torch.utils._pytree import tree_map


def symptoms(rows, signs, expected=None):
    """What is wrong with a stage by its rows of log.jsonl: [(verdict, what, figure)].

    signs: (number, test, meaning), where test(row, first row) is true of a bad row. A sign is
    suspicious when it stands for a tenth of the stage's rows without a break (of those `expected`
    at its end) and for ten, and a failure when it stands for half of them."""
    told = [r for r in rows if "loss" in r or "loss_g" in r]  # not while the heads learn alone
    expected, found = expected or len(told), []
    for number, test, what in signs:
        groups = groupby([r for r in told if number in r], lambda r, f=test: f(r, told[0]))
        longest = max((list(group) for bad, group in groups if bad), key=len, default=[])
        if len(longest) >= max(10, expected / 10):
            verdict = "failed" if len(longest) >= expected / 2 else "suspicious"
            mean = sum(row[number] for row in longest) / len(longest)
            span = f"updates {longest[0]['step']} to {longest[-1]['step']}"
            found.append((verdict, what, f"{number} {mean:.3g}, {span}"))
    skipped = [r["step"] for r in rows if "skipped" in r]
    if skipped:
        verdict = "failed" if 10 * len(skipped) > rows[-1]["step"] else "suspicious"
        figure = f"{len(skipped)} of {rows[-1]['step']}, the first was {skipped[0]}"
        found.append((verdict, "updates were not finite, so not applied", figure))
    return found


def judge_stages(log, signs, more):
    """{stage: the worst verdict of what was found, with all of it}. log: rows of log.jsonl; signs
    {stage: [(number, test, meaning)]}; more {stage: what was found otherwise}"""
    verdicts = {}
    for stage, found in more.items():
        rows = [r for r in log if r.get("stage") == stage and "step" in r]
        found = symptoms(rows, signs.get(stage, [])) + found
        told = "; ".join(f"{what} ({figure})" for _, what, figure in found)
        if found:  # failed comes before suspicious
            verdicts[stage] = f"{min(verdict for verdict, _, _ in found)}: {told}"
        elif stage in signs and len(rows) < 10:
            verdicts[stage] = f"not judged: {len(rows)} rows of log.jsonl are too few"
        else:
            verdicts[stage] = "healthy"
    return verdicts


def separation(real, fake):
    """How well the heads tell samples apart: real and fake logits (B, …) -> what is logged."""
    real, fake = (logits.float().flatten(1).mean(1) for logits in (real, fake))  # bf16 has ties
    return dict(d_real=real.mean(), d_fake=fake.mean(), ranked=(real > fake).float().mean())


def nearest_distance(features):
    """Mean distance of a sample's features to the nearest other one's. (n, …) -> scalar"""
    f = features.float().flatten(1)
    distances = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(math.inf).amin(dim=1).mean()


@torch.no_grad()
def diversity(real, fake):
    """Mean distance of a sample's features to the nearest other one's, of fakes over of reals.

    (n, …), of the same captions with repetitions. 1 for the reals' own variety, 0 where all are
    alike or every caption has one image, about 1/2 where half of them are alike."""
    if len(fake) < 2:
        return torch.tensor(1.0)
    return (nearest_distance(fake) + 1e-6) / (nearest_distance(real) + 1e-6)


def commonest(batches, most):
    """At most `most` samples of the batches: of the commonest captions first, four different ones
    each. batches: tuples of tensors with `x0` and `text.pooled`; those of the first one's size."""
    batches = [b for b in batches if b.x0.shape == batches[0].x0.shape]
    most = min(most, len(batches[0].x0))
    joined = tree_map(lambda *parts: torch.cat(parts), *batches)
    x0, pooled, rows = joined.x0, joined.text.pooled, []
    _, caption, count = pooled.unique(dim=0, return_inverse=True, return_counts=True)
    for common in count.argsort(descending=True, stable=True)[:most].tolist():
        own = []
        for row in (caption == common).nonzero()[:, 0].tolist():
            seen = any(torch.equal(x0[row], x0[other]) for other in own)  # in an earlier epoch
            if len(own) < 4 and not seen:
                own.append(row)
        rows += own
    return tree_map(lambda x: x[rows[:most]], joined)
