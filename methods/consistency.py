"""Latent consistency distillation (LCM, arXiv 2310.04378): every point of the teacher's way from
noise to data gives the same x̂_0. One update, on 32 levels t > t':

    1  x_t   = (1 - t)·x_0 + t·ε
    2  x_t'  = x_t + (t' - t)·v_cfg(x_t, t, c)        one guided Euler step of the teacher
    3  L     = pseudo_huber(x̂_0(x_t; θ), sg x̂_0(x_t'; θ⁻))     θ⁻: the student's average

Ours: the average that is the target is the result, too.

    python -m methods.consistency --preset nano --from runs/nano
"""

from functools import partial

import torch

import ladd
from ladd import draw_batch
from lib.machine import moved
from lib.optim import step_all, update_ema
from lib.parallel import leave, my_share
from lib.streams import rng
from sample import add_noise, euler_times, guided_velocity, per_sample, predict_x0

UNITS = 6  # forwards of the network, an update: student 1 + 2, teacher with guidance 2, average 1
LEVELS = 32


def consistency_loss(student, ema, velocity, b, t, t_next, end=0.0):
    """Lines 1 to 3; velocity(x_t, t) -> v is the guided teacher's. t' < t (B,) -> scalar

    end: s ≤ t', for a prediction of x_s, which is x_t - (t - s)·v, in place of x̂_0."""
    xt = add_noise(b.x0, b.noise, t)
    with torch.no_grad():
        x_next = xt + per_sample(t_next - t, xt) * velocity(xt, t)
        target = predict_x0(x_next, ema(x_next, t_next, *b.text)[0], t_next - end)
    x0_hat = predict_x0(xt, student(xt, t, *b.text)[0], t - end)
    return (((x0_hat - target).square() + 1e-6).sqrt() - 1e-3).mean()


def draw_times(run, step):
    """Which of the levels are t, the next one being t'. -> (B,)"""
    i = rng(run.settings.seed, "consistency", step).integers(LEVELS, size=run.settings.batch)
    return moved(torch.from_numpy(my_share(i)), run.device)


def distil(run):
    s = run.settings
    times = euler_times(LEVELS, s.shift).to(run.device)
    teacher, uncond = ladd.load(run, "teacher", frozen=True), run.text_encoder([""])
    student, ema, optimizers = ladd.start_student(run, teacher)
    samples = ladd.distillation_samples(run)
    networks = dict(student=student, ema=ema)
    loop = run.loop("distillation", s.iterations, s.batch, networks, optimizers)
    for step in loop:
        b = draw_batch(run, samples, step, own_noise="none")
        i = draw_times(run, step)
        guided = partial(guided_velocity, teacher, text=b.text, uncond=uncond, cfg=s.synthetic_cfg)
        with run.autocast():
            loss = consistency_loss(student, ema, guided, b, times[i], times[i + 1])
        loss.backward()
        rate = ladd.student_rate(s, step)
        (norm,) = step_all((optimizers, student, s.clip, rate))
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, grad_norm=norm)
    run.save("student", ema, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="consistency"))
