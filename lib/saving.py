"""A run's checkpoints, written beside the training and read again before they count."""

import functools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lib import probe
from lib.checkpoint_index import Reader
from lib.checkpoints import (
    HASHES,
    check_hashes,
    has_checkpoint,
    hashes,
    named_by_last,
    newest_first,
    remove,
    remove_old,
)
from lib.configs import config_to_hugging_face
from lib.files import sync, write_whole
from lib.guard import Guard
from lib.lora import adapters
from lib.naming import is_finite, readable
from lib.records import read_json
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

    def __init__(self, folder: Path, config, model: nn.Module, tensors: dict, probed: list[float], adapter=None):
        """tensors are those of `checkpoint_tensors`, probed the probe of the code, adapter LoRA's settings."""
        self.folder, self.config, self.model = folder, config, model
        self.tensors, self.probe, self.adapter = tensors, probed, adapter
        cuda = model.norm.weight.device.type == "cuda"
        how = dict(use_pinned_memory=cuda, use_non_blocking_copy=cuda, use_shared_memory=False, use_async_staging=False)
        self.stager = DefaultStager(StagingOptions(**how))
        self.group = dist.new_group(backend="gloo")  # what it says to other ranks must not mix with the training's
        self.saving, self.newest = None, -1

    def begin(self, step: int):
        """Begin to save, nothing else being saved any more."""
        staged = self.stager.stage(detached(self.tensors))
        thread = ThreadPoolExecutor(1)  # anew each time, so that its OpenMP threads end with it
        self.saving = step, thread.submit(self._write, step, staged)
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
            return ValueError(f"{self.folder}: no checkpoint of step {step} ({reason(error)}; {space}); {before}")
        return None

    def _write(self, step: int, staged: dict):
        name = f"step_{step:08d}"
        aside = self.folder / f"{name}.tmp"
        try:
            on_first_rank(functools.partial(self._begin, aside, self.folder / name), self.group)
            transfer(dcp.save, staged, aside, self.group)
            # raises for a missing or misshapen tensor
            transfer(dcp.load, staged, aside, self.group, storage_reader=Reader(aside))
            finite = all(is_finite(local(t)) for t in flat(staged))
            if not all_agree(finite, self.group):
                raise ValueError("it holds numbers that are not finite")
            parts = on_all(functools.partial(hashes, aside, my_share()), self.group)
            written = {name: digest for part in parts for name, digest in part.items()}
            on_first_rank(functools.partial(self._finish, aside, name, written), self.group)
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)  # room for the next one
            raise

    def _begin(self, aside: Path, final: Path):
        for old in (aside, final):  # left by a kill, the second one before `last` pointed to it
            remove(old)
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(config_to_hugging_face(self.model.config), indent=2))
        probe.write(aside, self.probe)
        if self.adapter:
            (aside / "adapter_config.json").write_text(json.dumps(self.adapter, indent=2))

    def _finish(self, aside: Path, name: str, written: dict[str, str]):
        (aside / HASHES).write_text(json.dumps(written, indent=2))
        for path in aside.iterdir():
            sync(path)
        os.rename(aside, self.folder / name)
        write_whole(self.folder / "last", name)
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
    judged = {"level": guard.level, "passed_over": guard.passed_over}
    return {"model": adapters(model) or dict(model.named_parameters()), "optimizer": state, "guard": judged}


def transfer(
    action: Callable, tensors: dict, folder: Path, group: dist.ProcessGroup | None = None, **how
):
    """dcp.save of this rank's shards, or dcp.load with a Reader as its storage_reader.

    A single process is told that it is one: through gloo, the list of tensors would wake a second team of OpenMP
    threads, after which all training on a CPU is slower by 40 %.
    """
    with warnings.catch_warnings(action="ignore"):  # that it is a single process
        alone = dist.get_world_size() == 1
        action(tensors, checkpoint_id=folder, process_group=group, no_dist=alone, **how)


def detached(tensors: dict) -> dict:
    return {key: detached(t) if isinstance(t, dict) else t.detach() for key, t in tensors.items()}


def flat(tensors: dict) -> Iterator[Tensor]:
    for t in tensors.values():
        yield from flat(t) if isinstance(t, dict) else [t]


def restore(folder: Path, shape, tensors: dict) -> int:
    """Read the last checkpoint, on any number of ranks, and return its step; -1 where there is none.

    One that is damaged is passed over, with a word about it, for the one before. Raises ValueError when none is whole,
    and for a checkpoint of another size.
    """
    if not has_checkpoint(folder):
        return -1
    problem = None
    if not named_by_last(folder):
        problem = ValueError(f"{folder / 'last'} is missing or names no checkpoint")
    for checkpoint in newest_first(folder):
        if problem and dist.get_rank() == 0:
            print(f"{problem}; going back to {checkpoint}", file=sys.stderr)
        problem = None
        try:
            _read_checkpoint(checkpoint, shape, tensors)
        except ValueError as error:
            problem = error
        if all_agree(problem is None):
            return int(checkpoint.name.removeprefix("step_"))
        problem = problem or ValueError(f"{checkpoint} cannot be read by another process")
    raise problem


def _read_checkpoint(checkpoint: Path, shape, tensors: dict):
    reader = Reader(checkpoint)

    def check():
        with readable(checkpoint):
            found, expected = read_json(checkpoint / "config.json"), config_to_hugging_face(shape)
            for name in expected:
                if found.get(name) != expected[name]:
                    sizes = f"{name} {found.get(name)}, the run's is {expected[name]}"
                    raise ValueError(f"{checkpoint} is of another size: {sizes}")
            check_hashes(checkpoint, my_share())
            reader.read_metadata()

    on_all(check)  # before they read it together, and wait for each other
    with readable(checkpoint), torch.no_grad():
        transfer(dcp.load, tensors, checkpoint, storage_reader=reader)
        if not all(is_finite(local(t)) for t in flat(tensors)):
            raise ValueError(f"{checkpoint} holds numbers that are not finite")
