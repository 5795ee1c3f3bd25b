"""Commands run one after the other or several at a time, each writing to a file of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Job:
    name: str
    command: list[str]
    log: Path  # what it prints
    process: subprocess.Popen | None = None
    place: int = 0  # the slot that it runs in
    began: float = 0.0


def end_with_us():
    """Let the system kill a process once the one that started it is gone, even if that was killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def run_jobs(jobs: list[Job], slots: int, gpus: int, finished: Callable[[Job], None] | None = None):
    """Run all jobs, at most `slots` at once, each on a GPU of its own as long as there are any.

    finished(job) is called as each ends. On Ctrl-C the jobs that run, which get it too, are
    waited for.
    """
    waiting, running = list(reversed(jobs)), []
    free = list(range(slots))[::-1]
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop()
                job.place, job.began = free.pop(), time.monotonic()
                _start(job, slots, gpus)
                running.append(job)
            time.sleep(0.05)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.place)
                if finished:
                    finished(job)
    finally:
        for job in running:
            job.process.wait()


def _start(job: Job, slots: int, gpus: int):
    env = dict(os.environ)
    if slots > 1 and not gpus:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(job.place % gpus)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as output:
        job.process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, preexec_fn=end_with_us
        )


def last_line(path: Path) -> str:
    """The last line of what a job printed, which says why it failed."""
    lines = path.read_bytes().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].removeprefix("[rank0]: ") if lines else "it printed nothing"
