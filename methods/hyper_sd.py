"""Hyper-SD (arXiv 2404.13686): three parts, one after the other, all in one low-rank adapter, for
a student of 1 to 8 steps.

Segments. [0, 1] is cut into k equal segments, k = 8, 4, 2, 1, one k after the other. Of 32 levels
t > t' are neighbours in a segment, whose lower end is s:

    1  x_t  = (1 - t)·x_0 + t·ε
    2  x_t' = x_t + (t' - t)·v_cfg(x_t, t, c)               one guided Euler step of the teacher
    3  L    = pseudo_huber(x_s(x_t; θ), sg x_s(x_t'; θ⁻))   x_s(x_t) = x_t + (s - t)·v(x_t, t, c)

k = 1 is methods/consistency.py. Feedback, on the levels of the sampler:

    4  x̂_0  = the student's prediction, as in LADD
    5  L    = -E[log p(caption | x̂_0)] + λ·E[(x̂_0 - sg x̂_0(θ⁻))²]     p: a classifier

Score: the student and a network of its samples learn as in methods/dmd.py.

Ours: line 3 without the paper's adversarial loss, whose weight it does not give, and pseudo-Huber
in place of squares; p in place of people's taste, and the anchor λ to what the student's average
θ⁻ makes of the same noise; the score at all levels of the sampler, not in one step alone.

    python -m methods.hyper_sd --preset nano --from runs/nano
"""

import dataclasses
from functools import partial

import numpy as np
import torch

import ladd
from ladd import draw_batch, student_predict
from lib.machine import moved
from lib.optim import make_optimizers, step_all, update_ema
from lib.parallel import leave
from lib.settings import refuse, setting
from methods.classifier import classifier_of, labels_of, log_p
from methods.consistency import LEVELS, consistency_loss, draw_times
from methods.dmd import matching_losses
from sample import euler_times, guided_velocity

UNITS = 6  # forwards of the network, a mean update at nano: segments 6, feedback 4, score 8
SEGMENTS = (8, 4, 2, 1)
FEEDBACK, SCORE = len(SEGMENTS), len(SEGMENTS) + 1  # the numbers of the parts after them
EIGHTHS = tuple(1 - i / 8 for i in range(8))
SHARES = (0.1, 0.1, 0.1, 0.3, 0.2, 0.2)  # k = 1 is the slowest: a level learns from the next
KEPT = {FEEDBACK - 1: "student-segments", FEEDBACK: "student-segments+feedback"}


@dataclasses.dataclass(frozen=True)
class Settings(ladd.Settings):
    iterations: int = setting(2200, "updates of all parts", low=1, scales=True, smoke=10)
    levels: tuple = setting(EIGHTHS, "noise levels t of the student", above=0)
    lora: int = setting(16, "rank of the adapter that learns; 0: whole weights", low=0)
    student_lr: float = setting(1e-3, "AdamW: adapters take more than whole weights", above=0)
    student_ema: float = setting(0.98, "decay per update of its average", low=0, below=1)
    shares: tuple = setting(SHARES, "of the updates: 8, 4, 2, 1 segments, feedback, score", low=0)
    anchor: float = setting(10.0, "weight λ of the anchor of the feedback", low=0)

    def __post_init__(self):
        super().__post_init__()
        if len(self.shares) != SCORE + 1 or sum(self.shares) == 0:
            refuse(self, "shares", "must be six numbers, one of them above 0")
        if self.is_latent and self.shares[FEEDBACK]:
            refuse(self, "shares", "feedback reads pixels, not latents; the fifth must be 0")

    def part(self, step):
        """Which part an update belongs to: 0 to 3 segments, 4 feedback, 5 score."""
        ends = np.cumsum(self.shares) / sum(self.shares)
        return int(np.searchsorted(ends, (step + 0.5) / self.iterations, side="right"))


def segment(i, k):
    """i (B,): which level from 1 to 0 is t -> which are t, t' and s, with k segments. (3, B)"""
    length = LEVELS // k
    return torch.stack([i, i + 1, (i // length + 1) * length])


def distil(run):
    s = run.settings
    times = euler_times(LEVELS, s.shift).to(run.device)
    teacher, uncond = ladd.load(run, "teacher", frozen=True), run.text_encoder([""])
    student, ema, optimizers = ladd.start_student(run, teacher)
    fake_score = ladd.start_as_teacher(run, teacher)
    score_optimizers = make_optimizers(fake_score, s.student_lr, s.beta1, s.adam_eps)
    samples = ladd.distillation_samples(run)
    if s.shares[FEEDBACK]:
        judge, labels = classifier_of(run), labels_of(run, samples)
    networks = dict(student=student, ema=ema, score=fake_score)
    loop = run.loop("distillation", s.iterations, s.batch, networks, optimizers + score_optimizers)
    for step in loop:
        part = s.part(step)
        if step and part > s.part(step - 1):  # the moments are of gradients of another size
            optimizers[0].state.clear()
        b = draw_batch(run, samples, step, own_noise="none" if part < FEEDBACK else "low")
        players = [(optimizers, student, s.clip, ladd.student_rate(s, step))]
        guided = partial(guided_velocity, teacher, text=b.text, uncond=uncond, cfg=s.synthetic_cfg)
        with run.autocast():
            if part < FEEDBACK:
                t, t_next, end = times[segment(draw_times(run, step), SEGMENTS[part])]
                loss = consistency_loss(student, ema, guided, b, t, t_next, end)  # lines 1 to 3
            elif part == FEEDBACK:
                x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)  # line 4
                with torch.no_grad():
                    anchor = student_predict(ema, b.x0, b.text, b.t, b.noise)
                told = moved(labels[b.caption], run.device)
                reward = log_p(judge, x0_hat.clamp(-1, 1), told).mean() / told.shape[1]  # line 5
                loss = s.anchor * (x0_hat - anchor).square().mean() - reward
                loop.add(reward=reward)
            else:
                loss, loss_score = matching_losses(run, student, fake_score, b, guided, step)
                players.append((score_optimizers, fake_score, s.clip, 1.0))
                loop.add(loss_score=loss_score)
        (loss + loss_score if part == SCORE else loss).backward()
        norms = step_all(*players)
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, **dict(zip(("grad_norm", "grad_norm_score"), norms, strict=False)))
        if part in KEPT and s.part(step + 1) > part:
            run.save("student", ema, step + 1, name=KEPT[part])
    run.save("student", ema, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="hyper_sd", kind=Settings))
