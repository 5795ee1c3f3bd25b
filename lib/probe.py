"""What the code of a model computes, in a few numbers that a run remembers, so that no other code
goes on with it.

The probe is some logits of a tiny model of the same kind. Code that is renamed, moved or made
faster gives the same ones; another activation, attention, norm or position does not. A change of
the tiny model or of its weights would make every run that there is one of other code.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.checkpoints import checkpoint_folder
from lib.configs import config_from_hugging_face
from lib.errors import BadInput
from lib.naming import HF_NAMES, readable, translate
from lib.records import checked, parse_json

FILE = "probe.json"  # in every checkpoint
TOLERANCE = 1e-3     # of the largest logit; processors differ by 1e-6, other code by above 1e-2
WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")  # to the residual stream


@torch.no_grad()
def probe(transformer: Callable, config) -> list[float]:
    """16 logits of a tiny model: as many key/value heads a query head, tied or not, with the rotary
    angles and the epsilon of config. They do not depend on PyTorch's random numbers, nor change
    these.

    transformer makes a model of a config. The weights are chosen by a parameter's name in Hugging
    Face folders, so that neither its name in the code nor the order of the parameters matters.
    """
    kv_heads = {1: 1, config.num_heads: 4}.get(config.num_kv_heads, 2)
    tiny = dataclasses.replace(
        config,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        ffn_dim=48,
        vocab_size=64,
        max_seq_len=64,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformer(tiny).eval()
    for name, weight in model.named_parameters():
        hf_name = translate(name, HF_NAMES)
        weight.copy_(_weights(hf_name, weight.shape))
    ids = [(7 * place * place + 3) % 64 for place in range(24)]
    logits = model(torch.tensor([ids]))[0, -1, :16]
    return [float(f"{logit:.6g}") for logit in logits.tolist()]


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers from the hash of a name, scaled so that every part of the model is felt.

    The residual stream is so small that its mean square is near the usual epsilons of norms, 1e-5
    and 1e-6, and queries and keys are so large that attention is far from even.
    """
    data = hashlib.shake_256(name.encode()).digest(2 * shape.numel())
    minus_one_to_one = np.frombuffer(data, "<u2") / 2**15 - 1
    uniform = torch.from_numpy(minus_one_to_one).float().view(shape)
    if len(shape) == 1:
        return 1 + 0.3 * uniform
    spread = 4e-3 if name.endswith(WRITERS) else 1.5
    width = 1 if name.endswith(WRITERS[0]) else shape[-1]
    return uniform * spread * (3 / width) ** 0.5  # of a uniform number the mean square is 1/3


def difference(mine: list[float], theirs: list[float]) -> float:
    """The largest difference of two probes as a share of the largest logit; infinite where they
    cannot be compared."""
    if len(mine) != len(theirs):
        return float("inf")
    found = np.abs(np.subtract(mine, theirs)).max() / np.abs(mine).max()
    return float(found) if np.isfinite(found) else float("inf")


def number(found: list[float] | None, kinds: list[list[float] | None]) -> int:
    """The place of a probe among those of other codes; a new one is added at the end."""
    for place, other in enumerate(kinds):
        if found is other:
            return place
        if found and other and difference(found, other) <= TOLERANCE:
            return place
    kinds.append(found)
    return len(kinds) - 1


def read(folder: Path) -> list[float] | None:
    """The probe in a checkpoint's folder; None where there is none, as in those of older runs.

    Raises ValueError for a file that is not a list of numbers.
    """
    path = folder / FILE
    if not path.exists():
        return None
    return checked(parse_json(path.read_bytes(), path), list[float], path)


def write(folder: Path, found: list[float]):
    (folder / FILE).write_text(json.dumps(found))


def check_code(config_class: type, path: str | Path, anyway: bool):
    """Raise ValueError where path is a run or checkpoint that was trained by code that computes
    something else.

    With anyway that is only said, on stderr. Other models do not say by what code they were
    trained.
    """
    folder = checkpoint_folder(Path(path))
    theirs = read(folder)
    if theirs is not None:
        with readable(folder):
            config = config_from_hugging_face(config_class, folder)
        check(folder, theirs, probe(type(config).build, config), anyway)


def check(folder: Path, theirs: list[float], mine: list[float], anyway: bool):
    """Raise ValueError where theirs, the checkpoint's probe, is of other code than mine.

    With anyway that is only said, on stderr.
    """
    found = difference(mine, theirs)
    if found <= TOLERANCE:
        return
    what = f"{folder} was trained by other code than this: of a tiny model, its probe, the logits"
    what += f" differ by {found:.2g} of the largest"
    if not anyway:
        remedy = "go back to that code, or use --anyway of train.py, sample.py or eval.py"
        raise BadInput(f"{what}; {remedy}")
    if os.environ.get("RANK", "0") == "0":  # under torchrun once
        print(f"{what}; going on, as --anyway says", file=sys.stderr)
