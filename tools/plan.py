"""What a full-size run needs, reckoned by the same networks and losses without data (PyTorch's
meta device), on any machine, in half a minute. Nothing is read or written.

python ladd.py --preset sd3-8b --dry-run --gpus 128
"""

import dataclasses
import math
import sys
import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import ladd
from discriminator import Discriminator
from lib.errors import ENDS, Parser, exit_status
from lib.lora import adapt
from lib.settings import refuse
from mmdit import MMDiT
from tools.train import given_settings

NETWORK = 50e9  # bytes a second that one GPU exchanges with the others: 400 Gbit/s


def kept_by(networks, function, *arguments):
    """What autograd keeps of a call for a backward, but for what belongs to the networks.
    -> what the call returns, {piece of memory: bytes}"""
    own = [tensor for n in networks for tensor in (*n.parameters(), *n.buffers())]
    own = {tensor.untyped_storage()._cdata for tensor in own}
    kept = []

    def keep(tensor):
        tensor = tensor.detach()  # an object of its own: it goes with its part of the graph
        kept.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*arguments)
    storages = [tensor().untyped_storage() for tensor in kept if tensor() is not None]
    return result, {x._cdata: x.nbytes() for x in storages if x._cdata not in own}


def in_bytes(n):
    """A number of bytes for people: 1.7 GB."""
    power = min(3, max(0, int(math.log10(max(n, 1)) / 3)))
    return f"{n / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def meta_networks(s):
    """Student, frozen teacher and heads without data, and the precision that they compute in."""
    dtype = torch.float32 if s.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        student, teacher = MMDiT(**s.model()), MMDiT(**s.model()).requires_grad_(False)
        if s.lora:
            adapt(student, s.lora)
        return student, teacher, Discriminator(**s.head_sizes()), dtype


def random_batch(s, n, device):
    """A batch of n random images with random text, for what depends on sizes alone."""
    with torch.device(device):
        x0, noise, noise_hat = (torch.randn(n, s.channels, *s.sizes[0]) for _ in range(3))
        context = torch.randn(n, s.text_length, s.text_dim)
        text = ladd.Text(context, torch.randn(n, s.pooled_dim or s.text_dim))
        t = torch.rand(n)
        paired, caption = t < 1, torch.arange(n)
    first = torch.arange(n) < s.level_p[0] / sum(s.level_p) * n  # as many as in the mean
    return ladd.Batch(x0, text, t, noise, paired, t, noise_hat, caption, first)


def meta_iteration(s, n, checkpointing):
    """One update of n images without data -> the most bytes kept for the backward, FLOPs of one
    forward, and of all. Up to 512 tokens (float32: 128) attention is counted as on a CPU."""
    *networks, dtype = meta_networks(s)
    student, teacher, heads = networks
    student.checkpointing = teacher.checkpointing = checkpointing

    def cast(_, given):  # as autocast does, which knows no meta device
        return tree_map(lambda x: x.to(dtype) if torch.is_tensor(x) else x, given)

    for network in networks:
        network.to(dtype).register_forward_pre_hook(cast)
    b = random_batch(s, n, "meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        ladd.student_predict(student, b.x0, b.text, b.t, b.noise)
    with FlopCounterMode(display=False) as flops:
        (x0_hat, real, fake), passes = kept_by(
            networks, ladd.features_of_both, student, teacher, b, s
        )
        plain = dataclasses.replace(s, r1=0.0)  # a gradient of a gradient can't be counted here
        (loss_d, *_), by_d = kept_by(networks, ladd.heads_loss, heads, real, fake, b, plain)
        loss_d.backward()
        targets, weights = ladd.held_to(student, teacher, x0_hat, real, b, s)
        given = heads, targets, weights, fake, b, s
        (loss_g, distill), by_g = kept_by(networks, ladd.student_losses, *given)
        (loss_g + s.distill_weight * distill).backward()
        if s.accumulate > 1:  # all pass once more, for the heads alone
            with torch.no_grad():
                ladd.features_of_both(student, teacher, b, s)
    reals = sum(r.nbytes for r in {*real, *targets})
    most = reals + max(sum((passes | by_d).values()), sum((passes | by_g).values()))
    if checkpointing:  # the way back through the blocks holds one that it has computed again
        words = fake[0].new_empty(n, s.text_length, s.width)
        given = words, fake[0].detach(), words[:, 0]
        _, block = kept_by(networks, student.joint_blocks[0], *given)
        most = max(most, reals + sum(passes.values()) + sum(block.values()))
    return most, forward.get_total_flops(), flops.get_total_flops()


def numbers_of(network, frozen=False):
    """How many weights of a network learn; frozen: or not."""
    return sum(p.numel() for p in network.parameters() if frozen or p.requires_grad)


def plan(s, gpus=1, tflops=989.0, utilisation=0.4):
    """What so many GPUs need for LADD: bytes of one GPU, FLOPs of all, seconds of an update.

    tflops: 10¹² FLOPs a second of one GPU, of which the share `utilisation` is reached. What learns
    is float32, as are gradients (there all the time, as when they are accumulated), AdamW's two
    moments and the average; the teacher is as the arithmetic. With --lora the student has only its
    adapter, and the teacher's weights. FSDP's buffers are not counted."""
    if s.batch % (gpus * s.accumulate):
        equal = f"can't be divided equally among {gpus} GPUs with --accumulate {s.accumulate}"
        refuse(s, "batch", f"its images {equal}")
    if gpus > 1 and gpus % s.replicas:
        refuse(s, "replicas", f"must divide the {gpus} GPUs")
    student, teacher, heads, dtype = meta_networks(s)
    P, T, K = numbers_of(student), numbers_of(teacher, frozen=True), numbers_of(heads)
    block = max(numbers_of(b, frozen=True) for b in student.joint_blocks)
    learning = max(map(numbers_of, student.joint_blocks))
    width, images = dtype.itemsize, s.batch // gpus
    parts = max(1, gpus // s.replicas) if s.shard else 1  # that all but the heads is divided into
    each = dict(weights=4, gradients=4, optimiser=8)  # bytes, of a weight that learns
    share = {name: n * (P / parts + K) for name, n in each.items()}
    share["weights"] += (4 * P + width * T) / parts  # the average and the teacher
    copies = width if s.lora else 4 + 4 + width
    share["tables"] = tables = copies * student.pos_embed.numel()
    gather = 2 * width * block + 4 * learning  # two blocks, and the gradients of one in float32
    share["gathered"] = gather if parts > 1 else 0
    # The student is gathered twice and its gradients reduced in float32, the teacher is gathered
    # for fakes, for reals and for the way back; with --accumulate both once more for the fakes.
    # Traffic and arithmetic overlap.
    gathers = 7 if s.accumulate > 1 else 5
    traffic = (gathers * width * T + 4 * P) * (1 - 1 / parts) * s.accumulate
    rows = gpus // parts  # that hold the same, and have gradients to exchange
    traffic += 8 * P / parts * (1 - 1 / rows)
    ways, part = {}, images // s.accumulate
    for again in (False, True):
        kept, forward, flops = meta_iteration(s, part, again)
        seconds = max(flops * s.accumulate / (tflops * 1e12 * utilisation), traffic / NETWORK)
        way = dict(activations=kept, total=kept + sum(share.values()), seconds=seconds)
        way |= dict(flops=flops * s.accumulate * gpus, forwards=flops / forward)
        ways[again] = way | dict(hours=seconds * s.iterations / 3600)
    one_image = tables + gather + 16 * K + ways[True]["activations"] / part
    room = {gb: 0.9e9 * gb - one_image for gb in (80, 141)}  # a tenth for what is not counted
    smallest = {gb: math.ceil((20 * P + width * T) / r) for gb, r in room.items() if r > 0}
    text = s.text_length * s.text_dim + (s.pooled_dim or s.text_dim) if s.is_latent else 0
    disk = s.synthetic * 2 * (s.channels * s.positions + text)
    result = dict(parameters=dict(student=P, teacher=T, heads=K), images=images, share=share)
    return result | dict(ways=ways, smallest=smallest, traffic=traffic, disk=disk)


def plan_table(s, gpus, tflops, utilisation):
    p, (height, width) = plan(s, gpus, tflops, utilisation), s.sizes[0]

    def both(text_of):
        return " | ".join(text_of(way) for way in p["ways"].values())

    rows = {f"{s.preset}, {gpus} GPUs": f"{p['images']} × {s.channels}×{height}×{width} each"}
    rows |= {f"parameters, {name}": f"{n:,}" for name, n in p["parameters"].items()}
    rows |= {f"a GPU's {name}": in_bytes(n) for name, n in p["share"].items()}
    rows["(a | b: b is with --checkpointing)"] = ""
    rows["a GPU's activations"] = both(lambda w: in_bytes(w["activations"]))
    rows["a GPU's sum"] = both(lambda w: in_bytes(w["total"]))
    rows["FLOPs of an update"] = both(lambda w: f"{w['flops']:.3e} ({w['forwards']:.2f} forwards)")
    rows["a GPU's traffic, an update"] = in_bytes(p["traffic"])
    speed = f"{tflops:g} TFLOP/s × {utilisation:g}"
    rows[f"seconds, {speed}"] = both(lambda w: f"{w['seconds']:.3g}")
    rows[f"hours, {s.iterations:,} updates"] = both(lambda w: f"{w['hours']:.3g}")
    fits = ", ".join(f"{n} of {gb} GB" for gb, n in p["smallest"].items())
    rows["fewest GPUs, with --checkpointing"] = fits or "none of 80 or 141 GB"
    rows[f"{s.synthetic:,} samples on disk"] = in_bytes(p["disk"])
    return "\n".join(f"{name:36}{value}".rstrip() for name, value in rows.items())


def main(argv=None):
    parser = Parser("ladd.py", "What a run needs; takes all settings of ladd.py, too.")
    parser.add_argument("--dry-run", action="store_true", help="as ladd.py calls it")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=989.0, help="of one GPU, dense bf16: H100")
    parser.add_argument("--utilisation", type=float, default=0.4, help="the share of it reached")
    args, rest = parser.parse_known_args(argv)
    if args.gpus < 1 or not (0 < args.tflops < math.inf and 0 < args.utilisation < math.inf):
        parser.error("--gpus must be at least 1, --tflops and --utilisation above 0 and finite")
    try:
        s, _ = given_settings(rest, parser.prog)
        print(plan_table(s, args.gpus, args.tflops, args.utilisation), flush=True)
    except ENDS as error:
        return exit_status(parser.prog, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
