"""Reading a run's last whole checkpoint, on any number of processes."""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lib.checkpoint_index import Reader
from lib.checkpoints import check_hashes, named_by_last, newest_first
from lib.configs import config_to_hugging_face
from lib.errors import BadInput
from lib.naming import is_finite, readable
from lib.records import read_json
from lib.world import all_agree, local, my_share, on_all


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


def flat(tensors: dict) -> Iterator[Tensor]:
    for t in tensors.values():
        yield from flat(t) if isinstance(t, dict) else [t]


def read_newest(folder: Path, shape, tensors: dict) -> int:
    """Read the last checkpoint of a run's folder and return its step.

    One that is damaged is passed over, with a word about it, for the one before. Raises ValueError when none is whole,
    and for a checkpoint of another size.
    """
    problem = None
    if not named_by_last(folder):
        problem = BadInput(f"{folder / 'last'} is missing or names no checkpoint")
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
        problem = problem or BadInput(f"{checkpoint} cannot be read by another process")
    raise problem


def _read_checkpoint(checkpoint: Path, shape, tensors: dict):
    reader = Reader(checkpoint)

    def check():
        with readable(checkpoint):
            found, expected = read_json(checkpoint / "config.json"), config_to_hugging_face(shape)
            for name in expected:
                if found.get(name) != expected[name]:
                    sizes = f"{name} {found.get(name)}, the run's is {expected[name]}"
                    raise BadInput(f"{checkpoint} is of another size: {sizes}")
            check_hashes(checkpoint, my_share())
            reader.read_metadata()

    on_all(check)  # before they read it together, and wait for each other
    with readable(checkpoint), torch.no_grad():
        transfer(dcp.load, tensors, checkpoint, storage_reader=reader)
        if not all(is_finite(local(t)) for t in flat(tensors)):
            raise BadInput(f"{checkpoint} holds numbers that are not finite")
