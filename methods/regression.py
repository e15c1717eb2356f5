"""Regression to the teacher's samples, from the noise that they were made of.

The simplest distillation, and what LADD has to beat: where a picture is uncertain it gives the
mean. One update:

    1  x_t  = (1 - t)·x_0 + t·ε        ε is the noise that the teacher made x_0 from
    2  x̂_0  = x_t - t·v_θ(x_t, t, c)
    3  L    = smooth_l1(x̂_0, x_0)

    python -m methods.regression --preset nano --from runs/nano
"""

import torch.nn.functional as F

import ladd
from ladd import draw_batch, student_predict
from lib.optim import step_all, update_ema
from lib.parallel import leave

UNITS = 3  # forwards of the network, an update: student 1 + 2


def distil(run):
    s = run.settings
    student, ema, optimizers = ladd.start_student(run)
    samples = ladd.distillation_samples(run)
    networks = dict(student=student, ema=ema)
    loop = run.loop("distillation", s.iterations, s.batch, networks, optimizers)
    for step in loop:
        b = draw_batch(run, samples, step, own_noise="all")
        with run.autocast():
            x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)  # lines 1, 2
            loss = F.smooth_l1_loss(x0_hat, b.x0)  # line 3
        loss.backward()
        rate = ladd.student_rate(s, step)
        (norm,) = step_all((optimizers, student, s.clip, rate))
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, grad_norm=norm)
    run.save("student", ema, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="regression"))
