"""A run's checkpoints, written beside the training and read again before they count."""

import contextlib
import functools
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from lib import probe, variants
from lib.checkpoint_index import Reader
from lib.checkpoints import HASHES, forget_best_after, has_checkpoint, hashes, remove, remove_old, write_best
from lib.configs import config_to_hugging_face
from lib.errors import BadInput
from lib.files import sync, write_whole
from lib.guard import Guard
from lib.lora import adapters
from lib.naming import is_finite
from lib.restoring import flat, read_newest, transfer
from lib.timing import wait
from lib.world import all_agree, local, my_share, on_all, on_first_rank


@dataclass
class Flags:
    save_every: int | str = 500         # steps, or `0.5epoch`; the last step is always saved
    keep: int = 2                       # newest checkpoints to keep
    keep_every: int = 0                 # steps; a checkpoint of a multiple of this is kept for good


class Checkpoints:
    """Saves a run in the background: training waits only until its tensors are copied to the host's memory.

    A checkpoint is written aside by all ranks, read again, synced, renamed, and only then pointed to by `last`; a kill
    at any moment leaves the one before. It holds tensors alone: weights, moments, and the state of the guard.
    """

    def __init__(self, config, model: nn.Module, optimizers: list, guard: Guard, probed: list[float], record: dict):
        """probed is the probe of the code, record that of the run; with LoRA it has the adapter's settings."""
        self.folder, self.config, self.model, self.guard = Path(config.out), config, model, guard
        self.tensors = checkpoint_tensors(model, optimizers, guard)
        self.probe, self.adapter = probed, record.get("adapter")
        self.rollbacks: Counter[int] = Counter()  # how often there was one to a step
        self.device = model.norm.weight.device
        self.stager = StateDictStager(pin_memory=self.device.type == "cuda")  # PyTorch 2.11's DefaultStager works once
        self.group = dist.new_group(backend="gloo")  # what it says to other ranks must not mix with the training's
        self.saving, self.newest = None, -1

    def begin(self, step: int, loss: float | None = None):
        """Begin to save, nothing else being saved any more; loss is that of validation at this step, if it is known."""
        staged = self.stager.stage(detached(self.tensors), non_blocking=self.device.type == "cuda")
        wait(self.device)
        thread = ThreadPoolExecutor(1)  # anew each time, so that its OpenMP threads end with it
        self.saving = step, thread.submit(self._write, step, staged, loss)
        thread.shutdown(wait=False)

    def finish(self) -> ValueError | None:
        """Wait until nothing is being saved any more. Returns, on all ranks, what went wrong; nothing else is lost."""
        if not self.saving:
            return None
        (step, future), self.saving = self.saving, None
        try:
            future.result()
            self.newest = step
        except BaseException as error:  # the exceptions of torch's checkpoints are no Exceptions
            if isinstance(error, (KeyboardInterrupt, MemoryError)):
                raise
            space = f"{shutil.disk_usage(self.folder).free / 1e9:,.1f} GB free there"
            before = f"the last one is that of step {self.newest}" if self.newest >= 0 else "there is none yet"
            return BadInput(f"{self.folder}: no checkpoint of step {step} ({reason(error)}; {space}); {before}")
        return None

    def save(self, step: int, ends: bool, report):
        """Begin a checkpoint. One that failed is reported and the run goes on, but at its end that is an error."""
        if problem := self.finish():
            report.say(f"{problem}; the run goes on")
        self.begin(step, report.validated.get(step))
        report.draw(ends)
        if ends:
            if problem := self.finish():
                raise problem
            report.say(f"{self.config.out}: checkpoint of step {step}, log.jsonl, loss.png")

    def restore(self) -> int:
        """Read the last checkpoint that is whole and return its step; -1 where there is none.

        Raises ValueError where none is, and for one of another size, or of code that computes something else.
        """
        if not has_checkpoint(self.folder):
            return -1
        self.newest = read_newest(self.folder, self.model.config, self.tensors)
        checkpoint = self.folder / f"step_{self.newest:08d}"
        on_first_rank(functools.partial(forget_best_after, self.folder, checkpoint.name))
        if (theirs := probe.read(checkpoint)) is not None:
            probe.check(checkpoint, theirs, self.probe, self.config.anyway)
        return self.newest

    def roll_back(self, spike: int, report) -> int:
        """Return to the last checkpoint, to go on past the data between it and the spike (PaLM, section 5.1)."""
        self.finish()
        passed_over, most = int(self.guard.passed_over), self.config.max_bad_steps
        step = read_newest(self.folder, self.model.config, self.tensors)
        self.rollbacks[step] += 1
        if self.rollbacks[step] > most:
            what = f"a spike at step {spike} again after going back to step {step} {most} times"
            raise BadInput(f"{what}; a lower --learning_rate usually helps, or a higher --spike")
        self.guard.passed_over.fill_(passed_over + spike - step)
        on_first_rank(functools.partial(forget_best_after, self.folder, f"step_{step:08d}"))
        report.rolled_back(step, spike)
        return step

    def _write(self, step: int, staged: dict, loss: float | None):
        name = f"step_{step:08d}"
        aside = self.folder / f"{name}.tmp"
        try:
            on_first_rank(functools.partial(self._begin, aside, self.folder / name), self.group)
            transfer(dcp.save, staged, aside, self.group)
            # raises for a missing or misshapen tensor
            transfer(dcp.load, staged, aside, self.group, storage_reader=Reader(aside))
            finite = all(is_finite(local(t)) for t in flat(staged))
            if not all_agree(finite, self.group):
                raise BadInput("it holds numbers that are not finite")
            parts = on_all(functools.partial(hashes, aside, my_share()), self.group)
            written = {name: digest for part in parts for name, digest in part.items()}
            on_first_rank(functools.partial(self._finish, aside, name, written, loss), self.group)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # room for the next one
            raise

    def _begin(self, aside: Path, final: Path):
        for old in (aside, final):  # left by a kill, the second one before `last` pointed to it
            remove(old)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(config_to_hugging_face(self.model.config), indent=2))
        variants.write(type(self.model.config), aside)
        probe.write(aside, self.probe)
        if self.adapter:
            (aside / "adapter_config.json").write_text(json.dumps(self.adapter, indent=2))

    def _finish(self, aside: Path, name: str, written: dict[str, str], loss: float | None):
        (aside / HASHES).write_text(json.dumps(written, indent=2))
        for path in aside.iterdir():
            sync(path)
        os.rename(aside, self.folder / name)
        write_whole(self.folder / "last", name)
        if loss is not None:
            write_best(self.folder, name, loss)
        remove_old(self.folder, name, self.config.keep, self.config.keep_every)


def reason(error: BaseException) -> str:
    """Why a checkpoint failed, in a line; a full disk, say, stands behind the first error that torch reports."""
    first = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
    cause = first
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__context__
    return (str(first).strip().splitlines() or [type(first).__name__])[-1]


def checkpoint_tensors(model: nn.Module, optimizers: list, guard: Guard) -> dict:
    """What a checkpoint holds; a tied matrix once, and beside adapters no frozen weights.

    Learning rate, order of the data and so on follow from the flags. It is asked for once, before the first step: while
    FSDP has a layer's weights gathered, the model names others than the optimizer.
    """
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: moments for optimizer in optimizers for p, moments in optimizer.state.items()}
    weights = adapters(model) or dict(model.named_parameters())
    return {"model": weights, "optimizer": state, "guard": guard.state()}


def detached(tensors: dict) -> dict:
    return {key: detached(t) if isinstance(t, dict) else t.detach() for key, t in tensors.items()}


@contextlib.contextmanager
def undisturbed(checkpoints: Checkpoints, report) -> Iterator[None]:
    """Inside, Python's garbage collector works at the pauses of training instead of anywhere, and a run that fails does
    not lose the checkpoint that is under way; Ctrl-C does not wait for it."""
    gc.disable()
    try:
        yield
    except Exception:
        if problem := checkpoints.finish():
            report.say(str(problem))
        raise
    finally:
        gc.enable()
