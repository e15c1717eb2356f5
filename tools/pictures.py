"""Draws the pictures of docs/ that explain LADD: architecture.png, levels.png and health.png; and
prints the table of docs/passes.md.

python -m tools.pictures            with matplotlib
python -m tools.pictures docs/results/health-healthy.jsonl runs/nano/log.jsonl     your own log
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ladd
from lib.errors import Parser, UsageError, exit_status
from lib.report import markdown
from tools.architecture import draw_architecture, read_code
from tools.plan import meta_networks, random_batch
from tools.train import given_settings

NUMBERS = {"loss_d": (2.0, "chance"), "ranked": (0.5, "chance"), "diversity": (0.7, "too alike")}


def subplots(rows):
    """The axes of a figure, one above the other."""
    from matplotlib.figure import Figure  # optional

    figure = Figure(figsize=(8, 1.1 + 1.8 * rows), layout="constrained")
    return figure.subplots(rows, sharex=True, squeeze=False)[:, 0]


def draw_levels():
    """The density of t̂, and the student's levels as bars."""
    (axis,) = subplots(1)
    t = torch.linspace(0.001, 0.999, 999)
    for preset in ("sd3-8b", "nano"):
        s = given_settings(["--preset", preset])[0]
        normal = torch.distributions.Normal(s.t_hat_mean, s.t_hat_std)
        density = normal.log_prob(t.logit()).exp() / (t * (1 - t))  # du/dt of t = sigmoid(u)
        label = f"t̂ of {preset}: m = {s.t_hat_mean:g}, σ = {s.t_hat_std:g}"
        axis.fill_between(t, density / 4, alpha=0.4, label=label)
    bars = axis.bar(s.levels, s.level_p, 0.012, color="tab:red", label="t of the student")
    axis.bar_label(bars, [f"t = {level:.2g}" for level in s.levels])
    axis.set(ylabel="probability of t, density of t̂ / 4")
    axis.set_xlabel("noise level: 0 is data, 1 is pure noise")
    axis.legend(loc="upper left")
    return axis.figure


def flops(function, *arguments):
    """FLOPs of a pass, and of its backward if it has one."""
    with FlopCounterMode(display=False) as forward:
        out = sum(x.sum() for x in tree_leaves(function(*arguments)))
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.backward()
    return torch.tensor([forward.get_total_flops(), backward.get_total_flops()])


def pass_table():
    """The passes of an update of nano, in forwards of its whole network, as a Markdown table."""
    s = given_settings([])[0]
    student, teacher, heads, _ = meta_networks(s)  # what is computed is only counted
    b = random_batch(s, s.batch, "meta")
    at_t, at_t_hat = (b.text, b.t, b.noise), (b.text, b.t_hat, b.noise_hat, s.tapped)
    x0_hat = b.x0.clone().requires_grad_()
    real = ladd.teacher_features(teacher, b.x0, *at_t_hat)
    fake = [f.clone().requires_grad_() for f in real]
    held = student, teacher, x0_hat, real, b, s
    passes = [
        ("student on x_t | student | learn", ladd.student_predict, student, b.x0, *at_t),
        ("teacher on fakes | student | frozen", ladd.teacher_features, teacher, x0_hat, *at_t_hat),
        ("teacher on reals | nobody | frozen", ladd.teacher_features, teacher, b.x0, *at_t_hat),
        ("heads, for L_D | heads | learn", ladd.heads_loss, heads, real, fake, b, s),
        ("average and teacher, one level on | nobody | held", ladd.held_to, *held),
        ("heads, for L_G | student | held", ladd.student_losses, heads, real, b.paired, fake, b, s),
    ]
    whole, _ = flops(teacher, b.x0, b.t, *b.text)
    costs = {name: flops(*words) / whole for name, *words in passes}
    costs["all | |"] = sum(costs.values())
    rows = [["pass", "gradient to", "its weights", "forward", "backward"]]
    for name, (forward, backward) in costs.items():
        rows.append([name, f"{forward:.2f}", f"{backward:.2f}"])
    return markdown(rows)


def draw_health(logs):
    """The numbers of some runs, {label: log.jsonl}, with a line where each is a bad sign."""
    axes, runs = subplots(len(NUMBERS)), {}
    for label, path in logs.items():
        lines = Path(path).read_text("utf-8").splitlines()
        runs[label] = [json.loads(line) for line in lines if "loss_g" in line]
    for axis, (name, (bad, meaning)) in zip(axes, NUMBERS.items(), strict=True):
        for label, rows in runs.items():
            known = [row for row in rows if name in row]
            axis.plot([row["step"] for row in known], [row[name] for row in known], label=label)
        axis.axhline(bad, color="grey", linestyle="--", label=f"{bad:g}: {meaning}")
        axis.set_ylabel(name)
        axis.legend(ncols=3)
    axes[-1].set_xlabel("update")
    return axes[0].figure


def main(argv=None):
    parser = Parser("tools/pictures.py", "Draws the pictures that explain LADD.")
    for name in ("healthy", "broken"):
        kept = f"docs/results/health-{name}.jsonl"
        parser.add_argument(name, nargs="?", default=kept, help=f"log.jsonl of a {name} run")
    args = parser.parse_args(argv)
    print(pass_table())
    numbers = read_code()
    try:
        health = draw_health(vars(args))  # of files that may be wrong: before any is replaced
        picture = draw_architecture(numbers)
        picture.savefig("docs/architecture.png", metadata=dict(numbers=json.dumps(numbers)))
        draw_levels().savefig("docs/levels.png", dpi=110)
        health.savefig("docs/health.png", dpi=110)
    except ImportError:
        missing = UsageError("matplotlib is missing: pip install matplotlib")
        return exit_status("tools/pictures.py", missing)
    except OSError as error:
        return exit_status("tools/pictures.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
