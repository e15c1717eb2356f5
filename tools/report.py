"""Stage 4: the report on a finished run, in scores and in pictures; and the pictures before it."""

import time

from PIL import Image

import data
import ladd
import sample
from lib.curves import save_curves
from lib.files import write_text
from lib.parallel import rank
from lib.pictures import grid, panels, save_gif, save_png
from lib.report import write_report
from lib.scores import held_out, judge_accuracy, score_table


def glance(dataset, student, data_dir):
    """Alignment and Fréchet distance of a few samples of a student in 1 step: while it learns."""
    s, count = student.settings, min(250, student.settings.evaluation)
    judge = sample.judge_of(dataset, s, student.device, data_dir, student.precision)
    held, rows = held_out(data.shares(dataset, count)), sample.compared(None, student, few=(1,))
    _, row, *_ = score_table(held, dataset.labels, judge, rows, s.seed, data.to_uint8)
    return dict(alignment=row["alignment"], frechet=row["frechet"])


def pictures_of(generator, parts, seed, **options):
    """Pictures of captions, with the noise that all networks of a seed are shown from."""
    made = generator.sample_parts(parts, seed=seed, stream="pictures", **options)
    return [picture for x0 in made for picture in data.to_picture(x0)]


def given_and_truth(dataset, count):
    """Titled rows of what the network is told of held-out images, and of these; none if nothing."""
    if not getattr(dataset, "condition", None):
        return []
    given = dataset.condition(range(count), held_out=True)[:, : dataset.channels]
    images, _ = dataset.batch(range(count), held_out=True)
    return [("given", list(data.to_picture(given))), ("the truth", list(images))]


def show(run, kind, step, model):
    """Draws curves.png anew; a grid from fixed noise and captions into samples/, if of pixels."""
    s, who = run.settings, ladd.generator(run, kind, model)
    if kind == "student" and run.dataset.attributes and not s.is_latent:
        scores = glance(run.dataset, who, s.data_dir)
        run.log.write(stage="distillation", step=step, **scores)
    save_curves(run)
    if s.is_latent:
        return
    parts = data.held_out_captions(run.dataset, 32)
    made = pictures_of(who, parts, s.seed)
    path = run.out / "samples" / f"{kind}-{step:06d}.png"
    if rank() == 0:
        captions = "; ".join(caption for own, _ in parts for caption in own)
        save_png(grid(made, 8), path, step=step, captions=captions)


def report(run):
    """Scores everything; writes samples.png (same noise for all), metrics.json and report.md."""
    s, start = run.settings, time.perf_counter()
    run = run.alone()
    run.dataset = s.conditioned(run.dataset)
    if s.is_latent:
        from sd3.weights import export  # its packages are optional

        out = run.out / ("lora.safetensors" if s.lora else "student.safetensors")
        if not out.exists():
            export(sample.read_checkpoint(run.path("student")), out)
        command = f"`python sample.py {run.out} --decode SD3_DIR --prompt TEXT`"
        if not run.dataset.t5:
            command = f"{command[:-1]} --no-t5`"
        write_text(f"Latents are not scored. {command} makes pictures.\n", run.out / "report.md")
        return
    judge = sample.judge_of(run.dataset, s, run.device, s.data_dir, s.precision)
    teacher, student = ladd.generator(run, "teacher"), ladd.generator(run, "student")
    shown = held_out(data.shares(run.dataset, 2000))
    accuracy = judge_accuracy(shown, run.dataset.labels, run.dataset.attributes, judge)
    rows = sample.evaluate(run.dataset, judge, teacher, student, s.evaluation, s.seed)

    parts, titled = data.held_out_captions(run.dataset, 24), []
    for title, who, options in sample.compared(teacher, student):
        if title not in ("untrained, 4 steps", "untrained, 2 steps"):
            titled.append((title, pictures_of(who, parts, s.seed, **options)))
    titled.sort(key=lambda pair: pair[0].startswith("untrained"))  # it stands last
    titled = given_and_truth(run.dataset, 24) + titled
    captions = "; ".join(caption for own, _ in parts for caption in own)
    save_png(panels(titled, 4), run.out / "samples.png", captions=captions)
    grids = sorted((run.out / "samples").glob("student-*.png"))
    if grids:
        save_gif([Image.open(path).convert("RGB") for path in grids], run.out / "student.gif")
    save_curves(run)
    write_report(run, rows, accuracy, time.perf_counter() - start)
