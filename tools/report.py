"""Stage 4: the report on a finished run, in scores and in pictures."""

import time

from PIL import Image

import data
import ladd
import sample
from lib.curves import save_curves
from lib.files import write_text
from lib.pictures import panels, save_gif, save_png
from lib.report import write_report
from lib.scores import held_out, judge_accuracy


def report(run):
    """Scores everything; writes samples.png (same noise for all), metrics.json and report.md."""
    s, start = run.settings, time.perf_counter()
    run = run.alone()
    run.dataset = s.told(run.dataset)
    if s.is_latent:
        from sd3.weights import export  # its packages are optional

        out = run.out / ("lora.safetensors" if s.lora else "student.safetensors")
        if not out.exists():
            export(sample.read_checkpoint(run.path("student")), out)
        command = f"`python sample.py {run.out} --decode SD3_DIR --prompt TEXT`"
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
            images = who.sample_parts(parts, seed=s.seed, stream="pictures", **options)
            titled.append((title, ladd.pictures_of(images)))
    titled.sort(key=lambda pair: pair[0].startswith("untrained"))  # it stands last
    if getattr(run.dataset, "condition", None):
        index = range(24)
        given = run.dataset.condition(index, held_out=True)[:, : s.channels]
        images, _ = run.dataset.batch(index, held_out=True)
        titled = [("given", list(data.to_picture(given))), ("the truth", list(images)), *titled]
    captions = "; ".join(caption for own, _ in parts for caption in own)
    save_png(panels(titled, 4), run.out / "samples.png", captions=captions)
    grids = sorted((run.out / "samples").glob("student-*.png"))
    if grids:
        save_gif([Image.open(path).convert("RGB") for path in grids], run.out / "student.gif")
    save_curves(run)
    write_report(run, rows, accuracy, time.perf_counter() - start)
