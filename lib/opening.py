"""How a run begins: its folder locked, its data checked, its flags settled, its weights set.

What is called `data` here is a data.Mixture, a `config` the flags of train.py, a `shape` a
model.ModelConfig.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lib import probe, variant_flags
from lib.cli import ROOT
from lib.datasets import changed_file
from lib.errors import BadInput
from lib.lora import adapters, init_adapters
from lib.meta import read_meta
from lib.order import mixture_weights
from lib.planning import flops_of_a_step, in_steps
from lib.run_record import choose_run, describe_data, describe_run
from lib.runs import held
from lib.shapes import first_config
from lib.train_flags import check_flags
from lib.weights import find_base, is_known, load_weights
from lib.world import (
    from_first_rank,
    join_world,
    on_all,
    on_first_rank,
    settled_dtype,
    should_compile,
)


@contextlib.contextmanager
def entered(config) -> Iterator[torch.device]:
    """Join the processes of a run and lock its folder, until all of them have left."""
    device, lock = join_world(config.deterministic), contextlib.ExitStack()
    try:
        on_first_rank(lambda: lock.enter_context(held(Path(config.out))))
        yield device
    finally:
        dist.destroy_process_group()
        lock.close()


def find_record(config) -> dict | None:
    """The record of the run that config continues, None for a new one; the default's data are made.

    Raises ValueError where the flags are not those of the run, or out of range.
    """
    record = choose_run(config, variant_flags.chosen(config))
    check_flags(config, dist.get_world_size())
    is_default = config.data == type(config).data and not Path(config.data[0]).exists()
    if dist.get_rank() == 0 and is_default:
        prepare_default(config.data[0])
    dist.barrier()
    if record:  # before the data are opened, which may find something else wrong with other data
        variant_flags.check_unchanged(record, Path(config.out))
        folders, shares = mixture_weights(config.data)
        if record["dataset"] != describe_data([read_meta(folder) for folder in folders], shares):
            data = " ".join(config.data)
            raise BadInput(f"--data {data} is another dataset than when {config.out} began")
    return record


def prepare_default(folder: str):
    """Make the dataset that a run without flags trains on, by the command that anybody could type."""
    command = [sys.executable, str(ROOT / "data.py"), "--source", "stdlib", "--out", folder]
    print(f"first the data: python data.py --source stdlib --out {folder}", flush=True)
    if subprocess.run(command).returncode:
        raise BadInput(f"--data {folder} could not be prepared")


def check_data(config, data):
    """Raise ValueError where the data are not as they were made, or do not go with the flags."""
    check_files([(Path(part.folder), part.meta) for part in data.parts])
    for name in ("neftune", "label_smoothing", "z_loss"):
        if data.kind == "preference" and getattr(config, name):
            raise BadInput(f"--{name} {getattr(config, name)} does not go with preference pairs")


def check_files(sources: list[tuple[Path, dict]]):
    """Raise ValueError on all ranks where a file of these datasets, each a folder and its meta.json, has changed.

    All files are read once, also those for validation; the ranks of one machine share the work.
    """
    place = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, changed_file(sources, place, count))
    if any(problems):
        raise BadInput(max(problems))


class Settled(NamedTuple):
    """What is decided before a run builds its model."""

    config: Any         # with the type of the arithmetic, compiling, packing, and all lengths in steps
    shape: Any          # of the model
    record: dict        # run.json
    probe: list[float]  # of this code, which the run's checkpoints carry


def settle(config, record: dict | None, data, device: torch.device, sizes: dict) -> Settled:
    """Decide what the flags leave open.

    Raises ValueError where --init_from does not fit the other flags, the data or the code.
    """
    config_class = variant_flags.chosen(config)
    variant_flags.check_loss(config, config_class)
    if record:
        shape = config_class(**record["model"])
    else:
        shape = first_config(config, data.parts[0].meta, sizes, config_class)
        if config.init_from:
            probe.check_code(config_class, config.init_from, config.anyway)
    probed = probe.probe(config_class.build, shape)
    dtype = settled_dtype(record["config"]["dtype"] if record else config.dtype, device)
    typed = dataclasses.replace(config, dtype=dtype)
    if record is None:
        record = describe_run(typed, shape, probed, data, device)
    config = in_steps(typed, len(data) / config.batch_size)
    flops = flops_of_a_step(shape, config) * config.steps
    compiled = "on" if should_compile(config.compile, device, flops) else "off"
    config = dataclasses.replace(config, compile=compiled, pack=data.packed)
    return Settled(config, shape, record, probed)


def set_weights(run, record: dict, build: Callable, new: bool):
    """Set what no checkpoint of a run holds: in a new run all, later LoRA's base and a reference.

    build makes a model as train.build does, for the reference of an objective that has one.
    """
    model, config, objective = run.model, run.config, run.objective
    folder, adapter, kind = Path(config.out), record.get("adapter"), type(model.config)
    if adapter:
        base = from_first_rank(lambda: str(find_base(adapter, folder, kind)))
        first_weights(model, config.seed, base)
    if hasattr(objective, "reference"):
        objective.reference = model
        if not adapter:
            from_first_rank(lambda: check_reference(record, folder, kind))
            config = dataclasses.replace(config, freeze=())
            objective.reference = build(model.config, config, run.device, frozen=True)
            first_weights(objective.reference, config.seed, record["init_from"])
    if new:
        first_weights(model, config.seed, "" if adapter else record["init_from"])


def first_weights(model: nn.Module, seed: int, path: str):
    """The weights that a run begins with: those at path, or if it is empty random ones."""
    if path:
        on_all(functools.partial(load_weights, model, path))
    elif adapters(model):
        init_adapters(model, seed)
    else:
        model.init_weights(seed)


def check_reference(record: dict, folder: Path, config_class: type) -> str:
    """The model that the run in folder began with; ValueError if it is another by now."""
    first = record["init_from"]
    if first and not is_known(first, record["init_sha256"], config_class):
        raise BadInput(f"{first} holds other weights than when {folder} began")
    return first


def rehearse(run, evaluate: Callable):
    """Save, evaluate and sample before the first step: what would fail after days fails now."""
    run.checkpoints.begin(0)
    if problem := run.checkpoints.finish():
        raise problem
    scores = evaluate(run.model, run.val, run.config, run.device, run.objective)
    run.report.validation(0, scores)
    if run.sampler.ids:
        run.sampler.write(run.model, run.device, most=1)
