"""Distribution matching distillation (DMD, arXiv 2311.18828), without its regression. Nor is it
DMD2, which updates the score five times for each of the student's and has a GAN loss, too.

The student follows the difference of two scores: the guided teacher's, and that of a network which
learns the student's own samples. One update:

    1  x̂_0  = the student's prediction, as in LADD
    2  x_t  = x̂_0 noised to t ~ U(.02, .98)
    3  g    = (x̂_0(x_t; fake score) - x̂_0(x_t; teacher)) / mean|x̂_0 - x̂_0(x_t; teacher)|
    4  the student steps along g, by a loss whose gradient it is
    5  the fake score learns the velocity of sg x̂_0, as the teacher learnt that of images

    python -m methods.dmd --preset nano --from runs/nano
"""

from functools import partial

import numpy as np
import torch

import ladd
from ladd import draw_batch, student_predict, teacher_loss
from lib.machine import moved
from lib.optim import make_optimizers, step_all, update_ema
from lib.parallel import leave, my_share
from lib.streams import rng
from sample import add_noise, guided_velocity, predict_x0

UNITS = 9  # forwards of the network, an update: student 1 + 2, teacher 2, fake score 1, and 1 + 2


@torch.no_grad()
def matching_gradient(x0_hat, noise, t, velocity, score):
    """Lines 2 and 3. velocity(x_t, t), the guided teacher's, and score(x_t, t) -> v. -> as x̂_0"""
    xt = add_noise(x0_hat, noise, t)
    real, fake = (predict_x0(xt, v(xt, t), t) for v in (velocity, score))
    far = (x0_hat - real).abs().mean((1, 2, 3), keepdim=True)
    return (fake - real) / far.clamp(min=1e-3)


def matching_loss(x0_hat, gradient):
    """Line 4: the scalar whose gradient by x̂_0 is the given one, over its number of values."""
    return 0.5 * (x0_hat - (x0_hat - gradient).detach()).square().mean()


def matching_losses(run, student, fake_score, b, velocity, step):
    """Lines 1 to 5. -> the student's loss, the fake score's"""
    n = run.settings.batch
    levels = rng(run.settings.seed, "dmd", step).uniform(0.02, 0.98, (n, 2)).astype(np.float32)
    t, t_score = moved(torch.from_numpy(my_share(levels)), run.device).unbind(dim=1)
    x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
    fakes = partial(guided_velocity, fake_score, text=b.text, uncond=None, cfg=1)
    gradient = matching_gradient(x0_hat, b.noise_hat, t, velocity, fakes)
    loss_score = teacher_loss(fake_score, x0_hat.detach(), b.text, t_score, b.noise_hat)
    return matching_loss(x0_hat, gradient), loss_score


def distil(run):
    s = run.settings
    teacher, uncond = ladd.load(run, "teacher", frozen=True), run.text_encoder([""])
    student, ema, optimizers = ladd.start_student(run, teacher)
    fake_score = ladd.start_as_teacher(run, teacher)
    score_optimizers = make_optimizers(fake_score, s.student_lr, s.beta1, s.adam_eps)
    samples = ladd.distillation_samples(run)
    networks = dict(student=student, ema=ema, score=fake_score)
    loop = run.loop("distillation", s.iterations, s.batch, networks, optimizers + score_optimizers)
    for step in loop:
        b = draw_batch(run, samples, step, own_noise="none")
        guided = partial(guided_velocity, teacher, text=b.text, uncond=uncond, cfg=s.synthetic_cfg)
        with run.autocast():
            loss, loss_score = matching_losses(run, student, fake_score, b, guided, step)
        (loss + loss_score).backward()
        norm, norm_score = step_all(
            (optimizers, student, s.clip, ladd.student_rate(s, step)),
            (score_optimizers, fake_score, s.clip, 1.0),
        )
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, grad_norm=norm, loss_score=loss_score, grad_norm_score=norm_score)
    run.save("student", ema, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="dmd"))
