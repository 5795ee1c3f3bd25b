"""Test and measure on this machine's GPU, and write down what came out: about twenty minutes.

    python tests/gpu/results.py                                   # writes tests/gpu/RESULTS.md
    python tests/gpu/results.py --small --out /tmp/RESULTS.md     # tiny sizes on any machine, to try this script

Each part runs in a process of its own, with a limit of time; one that fails is written down as failed, and the others
go on. The file is written anew after each part, so that what is done stays when this is interrupted.
"""

import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import tyro

from lib.cli import git_commit

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = "-rfEP --tb short --show-capture stdout --color no"  # what tests print comes with -rP
QUICK = "--steps 5 --warmup 2 --repeats 2"
TRAIN = "bench.py --compile on --size"
PARTS = {  # title: (seconds at most, what follows python); the first ones matter most
    "Tests": (280, f"-m pytest tests/gpu -q {SHOWN}"),
    "7B": (100, f"{TRAIN} 7B --seq_len 4096 --micro_batch 1 {QUICK}"),
    "7B, writing": (60, "bench.py --decode --size 7B --dtype bf16 --repeats 3"),
    "1.1B beside transformers": (200, f"{TRAIN} 1.1B --seq_len 2048 --micro_batch 8 --peer hf {QUICK}"),
    "1.1B, packed documents against whole rows": (80, f"{TRAIN} 1.1B --seq_len 2048 --micro_batch 8 --pack {QUICK}"),
    "7B, writing beside transformers": (300, "bench.py --decode --size 7B --dtype bf16 --peer hf --repeats 2"),
    "7B beside transformers": (400, f"{TRAIN} 7B --seq_len 4096 --micro_batch 1 --peer hf {QUICK}"),
    "7B, the fastest setting": (
        240, f"{TRAIN} 7B --seq_len 4096 --micro_batch 4 --sweep --steps 3 --warmup 1 --repeats 1"),
}  # fmt: skip
TINY = "--size 260K --seq_len 32 --micro_batch 2 --compile off --dtype fp32 --steps 2 --warmup 1 --repeats 1"
SMALL = {
    "Tests": (100, f"-m pytest tests/gpu -q {SHOWN}"),
    "7B": (60, f"bench.py {TINY}"),
    "7B, writing beside transformers": (60, "bench.py --decode --size 260K --dtype fp32 --peer hf --repeats 1"),
    "1.1B beside transformers": (60, f"bench.py {TINY} --peer hf"),
    "1.1B, packed documents against whole rows": (60, f"bench.py {TINY} --pack"),
    "7B, the fastest setting": (60, f"bench.py {TINY} --sweep"),
}


@dataclass
class Config:
    """Test and measure on this machine's GPU, and write down what came out."""

    out: str = str(Path(__file__).with_name("RESULTS.md"))  # the file to write
    small: bool = False  # tiny sizes, for any machine
    minutes: float = 25  # for all parts together; what does not fit in is left out


def run(words: list[str], limit: float) -> tuple[str, str]:
    """(what became of it, its output) of a command that gets so many seconds and is then ended with its children."""
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open as long as a child does
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            outcome = "" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: not done after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return outcome, output.read().replace(f"{ROOT}/", "").replace(sys.prefix, "…")


def essence(title: str, outcome: str, output: str) -> list[str]:
    """The lines to keep: a benchmark's table, or of pytest the measurements, the failures and the last line."""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]
    lines = [line for line in lines if line.strip()]
    if title == "Tests" and "not done" not in outcome:
        kept = ("memory:", "checkpoint:", "FAILED", "ERROR", "E  ", "SKIPPED")
        return [line for line in lines[:-1] if line.startswith(kept)] + lines[-1:]
    return lines[-30:] if outcome else lines


def machine() -> list[str]:
    names = ["torch", "triton", "transformers", "numpy"]
    versions = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    device = f"no GPU; {platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
        device = f"{torch.cuda.device_count()} × {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        versions += [f"CUDA {torch.version.cuda}", f"driver {driver.splitlines()[0] if driver else 'unknown'}"]
    now = datetime.datetime.now(datetime.UTC)
    return [
        f"- date: {now:%Y-%m-%d %H:%M} UTC",
        f"- device: {device}",
        f"- versions: {', '.join(versions)}",
        f"- commit: {git_commit() or 'unknown'}",
    ]


def main(config: Config):
    command = f"python tests/gpu/results.py{' --small' * config.small}"
    text = ["# Results on a GPU", "", f"Made by `{command}`.", "", *machine()]
    end = time.monotonic() + 60 * config.minutes
    failed = 0
    for title, (limit, words) in (SMALL if config.small else PARTS).items():
        limit = min(limit, end - time.monotonic())
        print(f"{title}: python {words}", flush=True)
        started = time.monotonic()
        outcome, output = run([sys.executable, *shlex.split(words)], limit) if limit >= 1 else ("left out: no time", "")
        failed += bool(outcome)
        seconds = f"{time.monotonic() - started:.0f} s"
        text += ["", f"## {title}", "", f"`python {words}`: {outcome or 'done'}, {seconds}", ""]
        text += ["```", *essence(title, outcome, output), "```"]
        Path(config.out).write_text("\n".join(text) + "\n")
        print(f"    {outcome or 'done'}, {seconds}", flush=True)
    print(f"wrote {config.out}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
