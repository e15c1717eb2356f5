"""Adversarial diffusion distillation (ADD, arXiv 2311.17042), the method before LADD: the same
heads, on the features of a frozen network of clean pixels. One update:

    1  x̂_0  = the student's prediction, as in LADD
    2  f, r = maps of x̂_0 and x_0 in a classifier, without noise; the teacher has no part
    3  L_D  = the hinge loss of the heads on every map, each map counting alike
    4  L_G  = -E[D(f)] + λ·E[(LN(f) - LN(r))²] where t < 1, as in LADD

ADD reads DINO's features; here the classifier of methods/classifier.py stands in for it.

    python -m methods.add --preset nano --from runs/nano
"""

import math

import torch
from torch import nn

import ladd
from discriminator import Discriminator, hinge_d, hinge_g
from ladd import distillation_loss, draw_batch, student_predict
from lib.health import separation
from lib.optim import make_optimizers, step_all, update_ema
from lib.parallel import leave
from methods.classifier import classifier_of, features, widths

UNITS = 5  # forwards of the network, an update: student 1 + 2, and at nano 2 of the heads


def logits_of(heads, tokens, sizes, b):
    """Of every map, (B, 1, h, w)."""
    clean = torch.zeros_like(b.t)
    maps = zip(heads, tokens, sizes, strict=True)
    return [head([own], clean, b.text.pooled, *size) for head, own, size in maps]


def distil(run):
    s = run.settings
    judge = classifier_of(run)
    student, ema, student_optimizers = ladd.start_student(run)
    arguments = [s.head_sizes() | dict(width=width, taps=(0,)) for width in widths(judge)]
    heads = nn.ModuleList(run.make(Discriminator, **own) for own in arguments)
    heads_optimizers = make_optimizers(heads, s.heads_lr, s.beta1, s.adam_eps)
    samples = ladd.distillation_samples(run)
    networks = dict(student=student, ema=ema, heads=heads)
    loop = run.loop("distillation", s.iterations, s.batch, networks,
                    student_optimizers + heads_optimizers, shown=("loss_d", "loss_g"))  # fmt: skip
    for step in loop:
        learning = step >= s.heads_warmup
        b = draw_batch(run, samples, step, s.heads_warmup)
        with run.autocast():
            with torch.set_grad_enabled(learning):
                x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)  # line 1
                fake, sizes = features(judge, x0_hat)  # line 2
                real, _ = features(judge, b.x0)
            on_real = logits_of(heads, real, sizes, b)
            on_fake = logits_of(heads, [f.detach() for f in fake], sizes, b)
            loss_d = sum(map(hinge_d, on_real, on_fake)) / len(heads)  # line 3
            heads.requires_grad_(False)
            loss_g = sum(map(hinge_g, logits_of(heads, fake, sizes, b))) / len(heads)  # line 4
            heads.requires_grad_(True)
            distill = distillation_loss(real, fake, b.paired)
        (loss_d + loss_g + s.distill_weight * distill).backward()
        heads_rate = min(1.0, (step + 1) / 40)  # rises over 40 updates
        (norm_d,) = step_all((heads_optimizers, heads, math.inf, heads_rate))
        means = [x.detach().float().flatten(1).mean(1) for x in (*on_real, *on_fake)]
        on_real, on_fake = torch.stack(means, dim=1).chunk(2, dim=1)
        loop.add(loss_d=loss_d, **separation(on_real, on_fake))
        if learning:
            rate = ladd.student_rate(s, step, s.heads_warmup)
            (norm_g,) = step_all((student_optimizers, student, s.clip, rate), after=[norm_d])
            update_ema(ema, student, s.student_ema, step - s.heads_warmup)
            loop.add(loss_g=loss_g, loss_distill=distill, grad_norm=norm_g)
        loop.log(grad_norm_heads=norm_d)
    run.save("student", ema, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="add"))
