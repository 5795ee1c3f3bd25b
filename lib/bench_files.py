"""The results of bench.py as files: what was measured and where, and a picture beside it."""

import dataclasses
import datetime
import importlib.metadata
import io
import json
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lib import world
from lib.bench_plots import draw_growth, draw_writing
from lib.cli import git_commit
from lib.plots import draw_speeds
from lib.results import write_all


def describe(config, parameters: int, device: torch.device) -> dict:
    """What is measured, where and with what; config is a bench.Config."""
    packages = ["torch", "transformers"] if config.peer == "hf" else ["torch"]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "device": world.device_name(device),
        "processes": dist.get_world_size(),
        "versions": {"python": platform.python_version()} | versions,
        "git_commit": git_commit(),
        "command": " ".join(sys.argv),
        "settings": dataclasses.asdict(config),
        "parameters": parameters,
    }


def write_results(results: dict, config):
    """Write --out and the picture beside it."""
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    if config.grow:
        draw_growth(results["rows"], f"training on {results['device']}", picture)
    elif config.decode:
        draw_writing(results["rows"], f"{config.size} writes on {results['device']}", picture)
    else:
        draw_speeds(results, f"{config.size} on {results['device']}", picture)
    text = json.dumps(results, indent=2)
    write_all({out: text, out.with_suffix(".png"): picture.getvalue()})
