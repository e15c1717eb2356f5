"""DPO-LoRA: an adapter of the teacher learns preferences, for the teacher and for its student.

Diffusion-DPO is arXiv 2311.12908; the paper of LADD (2403.12015) has it in low-rank adapters. One
update of the adapter:

    1  w, l     = two samples of one caption, of which w is the better
    2  w_t, l_t = both noised to the same level t, with the same noise ε
    3  e(x)     = mean‖v(x_t, t, c) - (ε - x)‖²       e_θ with the adapter, e_ref without
    4  Δ        = (e_θ(w) - e_θ(l)) - (e_ref(w) - e_ref(l))
    5  L        = -log σ(-½·β·Δ)

Then LADD from the tuned teacher, then the same adapter once more, on the student. Ours: t as the
teacher was trained; the pairs (methods/dpo_pairs.py); all numbers.

    python -m methods.dpo --preset nano --from runs/nano
    python -m methods.dpo --preset nano --from runs/nano --pairs FOLDER      your own preferences
"""

import dataclasses

import torch
import torch.nn.functional as F

import ladd
import sample
from lib.optim import learning_rate, make_optimizers, step_all, update_ema
from lib.parallel import average, barrier, leave
from lib.run import Run
from lib.settings import setting
from lib.states import forget_states
from methods.dpo_pairs import take_pairs
from mmdit import MMDiT
from sample import add_noise


@dataclasses.dataclass(frozen=True)
class Settings(ladd.Settings):
    lora: int = setting(16, "rank of the adapter that learns preferences", low=1)
    pairs: str = setting("", "a folder of your pairs; its pairs.jsonl names winners and losers")
    candidates: int = setting(4, "samples of a caption; the best and the worst are a pair", low=2)
    tie: float = setting(0.5, "pairs as near in reward as this are left out", low=0, smoke=0.0)
    beta: float = setting(230.0, "β: the smaller, the farther the adapter may go", above=0)
    tuning_iterations: int = setting(100, "updates of the adapter", low=1, scales=True, smoke=2)
    tuning_lr: float = setting(1e-4, "AdamW, the adapter", above=0)
    adapter_scale: float = setting(1.0, "times that the student gets it, too", low=-1e3, high=1e3)


def errors(network, winner, loser, text, t, noise):
    """Lines 2 and 3, of winners and losers in one forward. -> e(w), e(l), (B,) each"""
    x0, noise, t = torch.cat([winner, loser]), torch.cat([noise, noise]), torch.cat([t, t])
    text = [torch.cat([features, features]) for features in text]
    v, _ = network(add_noise(x0, noise, t), t, *text)
    return (v.float() - (noise - x0)).square().mean((1, 2, 3)).chunk(2)


def difference(network, reference, *pairs):
    """Line 4; a pair is ranked right where it is negative. -> Δ (B,)"""
    e_winner, e_loser = errors(network, *pairs)
    with torch.no_grad():
        ref_winner, ref_loser = errors(reference, *pairs)
    return (e_winner - e_loser) - (ref_winner - ref_loser)


def preference_loss(delta, beta):
    """Line 5. Δ (B,) -> scalar"""
    return -F.logsigmoid(-0.5 * beta * delta).mean()


def tune(run, draw):
    """The teacher learns the preferences: adapter.pt."""
    s = run.settings
    teacher = ladd.load(run, "teacher", frozen=True)
    tuned, ema = run.adapted(teacher), run.adapted(teacher).requires_grad_(False)
    optimizers = make_optimizers(tuned, s.tuning_lr, 0.9, s.adam_eps)
    networks = dict(tuned=tuned, ema=ema)
    loop = run.loop("tuning", s.tuning_iterations, s.batch, networks, optimizers)
    for step in loop:
        with run.autocast():
            delta = difference(tuned, teacher, *draw(step))
        loss = preference_loss(delta, s.beta)
        loss.backward()
        rate = learning_rate(step, loop.total, decay=0.3)
        (norm,) = step_all((optimizers, tuned, s.clip, rate))
        update_ema(ema, tuned, s.student_ema, step)
        loop.log(loss=loss, ranked=(delta < 0).float().mean(), grad_norm=norm)
    run.save("adapter", ema, loop.total)


@torch.no_grad()
def share_ranked_right(network, teacher, draw):
    """Of 16 batches, in all processes."""
    found = [difference(network, teacher, *draw(step)) for step in range(16)]
    share = (torch.cat(found) < 0).float().mean()
    average([share])
    return share.item()


def distil(run):
    s = run.settings
    learned, held_out = take_pairs(run)
    if not run.path("adapter").exists():
        tune(run, learned)
    own = {field.name: getattr(s, field.name) for field in dataclasses.fields(ladd.Settings)}
    own |= dict(lora=0, out=str(run.out / "tuned"))
    # a run in a folder of its own
    inner = Run(ladd.Settings(**own), run.dataset, run.text_encoder, run.watch)
    adapter = run.path("adapter")
    with inner.opened(None):
        if not inner.path("teacher").exists():
            tuned = sample.read_network(run.out, teacher=True, adapter=adapter)
            inner.save("teacher", run.load(tuned, MMDiT), s.tuning_iterations)
        if not inner.path("student").exists():
            if s.targets == "synthetic":
                ladd.synthesise(inner)
            barrier()
            ladd.distil(inner)
        forget_states(inner.out, "distillation")
    student = sample.read_network(inner.out, adapter=adapter, scale=s.adapter_scale)
    again, teacher = run.load(student, MMDiT), ladd.load(run, "teacher")
    tuned, plain = ladd.load(inner, "teacher"), ladd.load(inner, "student")
    networks = {"tuned teacher": tuned, "LADD student": plain, "with the adapter again": again}
    shares = {name: share_ranked_right(x, teacher, held_out) for name, x in networks.items()}
    run.log.write(stage="distillation", ranked_right=shares)
    run.save("student", again, s.iterations)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="dpo", kind=Settings))
