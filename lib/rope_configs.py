"""How config.json and Meta's params.json say what rotary embedding a model has."""

import sys
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from lib.errors import BadInput

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
LLAMA3_TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # model.rope_table has them


class Rope(TypedDict, total=False):
    rope_type: str | None
    type: str | None  # what transformers called it first
    factor: Positive | None
    rope_theta: Positive | None
    # of Llama 3
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    original_max_position_embeddings: Size | None


def rope_from_hugging_face(values: dict, path: Path) -> dict:
    """The fields of a model.ModelConfig that config.json calls rope_parameters or rope_scaling.

    Raises ValueError for a kind, or a field of one, that is not known here.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        problem = "is not supported (default, linear and llama3 are)"
        raise BadInput(f"{path}: rope_type {kind} {problem}")
    for name in sorted(rope.keys() - Rope.__annotations__.keys()):
        if rope[name] is True or rope[name] not in (None, False, 1):
            raise BadInput(f"{path}: {name} {rope[name]} of its rope_type {kind} is not LLaMA's")
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
    found = {"rope_theta": theta}
    if kind == "default":
        return found
    needed = ["factor"]
    if kind == "llama3":
        needed += ["original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]
    for name in needed:
        if not rope.get(name):
            raise BadInput(f"{path}: config.json has rope_type {kind}, but no {name}")
    found["rope_scale"] = rope["factor"]
    if kind == "llama3":
        found["rope_window"] = rope["original_max_position_embeddings"]
        for name, value in LLAMA3_TURNS.items():
            if rope[name] != value:
                raise BadInput(f"{path}: {name} {rope[name]} is not Llama 3's, {value}")
    return found


def rope_from_params(params: dict) -> dict:
    """The same of Meta's params.json, which leaves out what its code knew.

    That of Llama 3.1 scales by 8, that of 3.2, whose models are smaller, by 32; both were made of
    models with a window of 8,192 (llama-models; transformers' converter).
    """
    found = {"rope_theta": params.get("rope_theta") or 10_000.0, "max_seq_len": 4096}
    if found["rope_theta"] == 500_000:
        found["max_seq_len"] = 8192
    if params.get("use_scaled_rope"):
        small = 32.0 if params["dim"] < 4096 else 8.0
        found["rope_scale"] = params.get("rope_scaling_factor") or small
        found |= {"rope_window": 8192, "max_seq_len": 131_072}
    return found


def rope_to_hugging_face(config) -> dict | None:
    """What config.json calls rope_scaling."""
    if config.rope_window:
        window = {"original_max_position_embeddings": config.rope_window}
        return {"rope_type": "llama3", "factor": config.rope_scale} | window | LLAMA3_TURNS
    return None if config.rope_scale == 1 else {"rope_type": "linear", "factor": config.rope_scale}
