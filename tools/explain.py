"""Follows one batch through an iteration of LADD: every quantity, and who receives gradient.

    python ladd.py --preset nano --explain

Of the run's finished teacher, if there is one; the student is before its first update. x_0 are real
images here, not yet the teacher's samples. Nothing is written.
"""

import copy

import torch

import data
import ladd
from lib.checkpoints import same_network
from lib.errors import UsageError
from lib.run import Run
from mmdit import MMDiT
from sample import add_noise
from tools.train import given_heads, given_settings, open_data, run_program


def show(symbol, value, what):
    value = value.detach().float()
    shape = "×".join(map(str, value.shape)) or "scalar"
    low, high, mean = (f"{v:8.2f}" for v in (value.min(), value.max(), value.mean()))
    symbol += " " * (15 - len(symbol.replace("\u0302", "")))  # a hat takes no room
    print(f"{symbol}{shape:18}{low}{high}{mean}  {what}")


def show_gradients(loss, symbol, networks):
    loss.backward(retain_graph=True)
    for name, network in networks.items():
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        told = f"norm {norm:.3g}" if gradients else "none"
        print(f"    gradient of {symbol} to the {name}: {told}")
        network.zero_grad(set_to_none=True)


def explain(s, watch, given):
    s, dataset, _ = open_data(s, given)
    if not dataset.channels:
        raise UsageError(f"--explain follows images, and --data {s.data} has prompts alone.")
    run = Run(s, dataset, data.text_features(dataset, s.text_dim, s.text_length), watch)
    taught = run.path("teacher").exists()
    if not taught and (s.teacher or s.source):
        raise UsageError(f"--explain reads no teacher but {run.path('teacher')}, a finished run's.")
    teacher = run.make(MMDiT, **s.model())
    if taught:
        wanted, teacher = teacher.config, ladd.load(run, "teacher")
        same_network("--out", run.path("teacher"), teacher.config, wanted)
    student = run.adapted(teacher) if s.lora else copy.deepcopy(teacher).requires_grad_(True)
    if s.discriminator:
        given_heads(s)
    heads, _ = ladd.start_heads(run)
    networks = dict(student=student, teacher=teacher.requires_grad_(False), heads=heads)
    images = ladd.Samples(run.dataset, run.text_encoder.ids(run.dataset.captions), None)
    step = s.heads_warmup + s.level_warmup  # the first that is like most
    b = ladd.draw_batch(run, images, step, s.heads_warmup)
    with run.autocast():
        x0_hat, real, fake = ladd.features_of_both(student, teacher, b, s)
        loss_d, on_real, on_fake = ladd.heads_loss(heads, real, fake, b, s)
        targets, weights = ladd.held_to(student, teacher, x0_hat, real, b, s)
        loss_g, distill = ladd.student_losses(heads, targets, weights, fake, b, s)

    print(f"{'quantity':15}{'shape':18}{'from':>8}{'to':>8}{'mean':>8}  what it is")
    show("x_0", b.x0, "images")
    show("c", b.text.context, "the captions' features, one row a token")
    show("y", b.text.pooled, "the captions' pooled features")
    show("t", b.t, f"the student's noise levels, of {s.levels}")
    show("x_t", add_noise(b.x0, b.noise, b.t), "1  what the student sees: (1 - t)·x_0 + t·ε")
    show("x̂_0", x0_hat, "2  what it makes of it: x_t - t·v")
    law = f"logit-normal({s.t_hat_mean:g}, {s.t_hat_std})"
    show("t̂", b.t_hat, f"3  the level of the re-noising, {law}")
    show("x̂_t̂", add_noise(x0_hat, b.noise_hat, b.t_hat), "   what the frozen teacher sees")
    for block, r, f in zip(s.tapped, real, fake, strict=True):
        show(f"f, block {block}", f, "4  image tokens of the fakes after this block")
        show(f"r, block {block}", r, "   and of the real ones")
    show("D(r)", on_real, "5  logits: one a head and position")
    show("D(sg f)", on_fake, "   and those of the fakes")
    show("L_D", loss_d, "   hinge loss of the heads; 2 is chance")
    show_gradients(loss_d, "L_D", networks)
    show("L_G", loss_g, "6  -mean logit: the student's loss")
    show_gradients(loss_g, "L_G", networks)
    show("(LN f - LN r')²", distill, f"   added {s.distill_weight:g} times")
    if not taught:
        print(f"The networks are untrained: {run.path('teacher')} is not there yet.")


def main(argv):
    def parse(argv, program):
        return given_settings([word for word in argv if word != "--explain"], program)

    return run_program(argv, "ladd.py", parse, explain)
