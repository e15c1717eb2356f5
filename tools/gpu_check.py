"""What only a machine with one CUDA GPU can show, in one command of at most 12 minutes: the tests
that need one, a tenth of `tiny`, speed and memory.

    bash tools/gpu_check.sh [cifar10-train.zip] [--parts tests benchmark]

Every part has its own time limit, and one that fails stops no other. The figures go into
gpu-check.json and gpu-check.md; what the parts say and make is in runs/gpu-check-TIME/.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lib.errors import Parser
from lib.files import write_json, write_text
from lib.machine import facts, made_on
from lib.report import markdown

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT.parent / "cifar10-train.zip"
MINUTES = 11.8


class Part(NamedTuple):
    name: str
    words: list  # of the command, after Python's own name
    limit: float  # seconds


def parts_of(data, out):
    """The parts in order; the benchmark, whose every row stands for itself, has what is left.

    The limits are for the H100 of docs/results/gpu-h100.txt, whose host is slow."""
    tiny = ["--preset", "tiny", "--data", data, "--steps-scale", "0.1", "--compile", "yes"]
    tiny += ["--judge-steps", "1000", "--evaluation", "20000"]
    return [
        Part("tests", ["-m", "pytest", "tests/test_gpu.py"], 190),
        Part("tiny", ["ladd.py", *tiny, "--device", "cuda", "--out", f"{out}/tiny"], 420),
        Part("benchmark", ["-m", "tools.benchmark", "--gpu"], 400),
    ]


def run_part(part, seconds, log):
    """Runs a part; after so many seconds it ends, with all that it has started. -> its status"""
    words = ["timeout", "--signal=KILL", f"{seconds}", sys.executable, "-u", *part.words]
    with open(log, "wb") as file:
        status = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file).returncode
    known = {0: "passed", 75: "stopped by --stop-after", -9: "out of time", 137: "out of time"}
    return known.get(status, f"failed: status {status}")


def check(parts, out, folder, minutes):
    """Runs the parts one after the other, and writes both files anew after each. -> [status]"""
    end = time.monotonic() + 60 * minutes
    result = dict(facts(), parts=[])
    for part in parts:
        start, log = time.monotonic(), out / f"{part.name}.txt"
        limit = max(1, round(min(part.limit, end - start)))
        print(f"{part.name}, at most {limit} s: see {log}", flush=True)
        status = run_part(part, limit, log)
        seconds, said = round(time.monotonic() - start), log.read_text("utf-8", "replace")
        for private in (f"{ROOT}/", f"{ROOT.parent}/"):  # folders of this machine
            said = said.replace(private, "")
        lines = said.splitlines()
        print(f"{part.name}: {status}, {seconds} s", flush=True)
        command = shlex.join(["python", *(Path(w).name if w[:1] == "/" else w for w in part.words)])
        row = dict(name=part.name, command=command, limit=limit, seconds=seconds, status=status)
        row |= dict(table=[line for line in lines if line[:1] == "|"], output=lines[-40:])
        result["parts"].append(row)
        write_json(result, folder / "gpu-check.json")
        write_text(page(result), folder / "gpu-check.md")
    return [row["status"] for row in result["parts"]]


def page(result):
    """What the JSON says, as Markdown."""
    where = f"Commit {made_on(result)}, Python {result['python']}."
    names, parts = ("name", "command", "limit", "seconds", "status"), result["parts"]
    table = markdown([names, *([row[name] for name in names] for row in parts)])
    lines = ["# GPU check", "", f"`bash tools/gpu_check.sh`. {where}", "", table]
    for row in parts:
        lines += ["", f"## {row['name']}", "", *row["table"]]
        if row["status"] != "passed":
            lines += ["", "```", *row["output"][-15:], "```"]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = Parser("gpu_check.py", "The tests, short runs and figures that need one CUDA GPU.")
    parser.add_argument("data", nargs="?", help="cifar10-train.zip, if not beside the checkout")
    parser.add_argument("--out", default=f"{ROOT}/docs/results", help="where both files go")
    names = [part.name for part in parts_of("", "")]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="these alone")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is here; on a CPU run: python -m pytest")
    data = Path(args.data or PHOTOGRAPHS).resolve()
    if args.data and not data.exists():
        parser.error(f"{args.data}: no such file")
    out = Path("runs", f"gpu-check-{time.strftime('%Y%m%d-%H%M%S')}")
    (ROOT / out).mkdir(parents=True)
    parts = parts_of(str(data) if data.exists() else "shapes", out)
    parts = [part for part in parts if part.name in args.parts]
    statuses = check(parts, ROOT / out, Path(args.out), MINUTES)
    print(f"{args.out}/gpu-check.md")
    return int(any(status.startswith(("failed", "out of")) for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
