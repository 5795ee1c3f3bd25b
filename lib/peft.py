"""Adapters on disk, as PEFT writes them."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lib.checkpoints import checkpoint_folder
from lib.disk import writing
from lib.files import new_folder
from lib.lora import TARGETS
from lib.naming import HF_NAMES, Named, translate

PEFT_PREFIX = "base_model.model."
OUR_SETTINGS = ("base_sha256", "quantize")  # in the adapter_config.json of a run; PEFT does not know them


class Adapter(NamedTuple):
    """What LoRA has learned: a checkpoint of train.py, or a folder as PEFT writes it."""

    base: Path       # the model that it changes
    settings: dict   # adapter_config.json
    tensors: dict[str, Tensor]  # by name, as blocks.0.attention.query.lora_A


def adapter_settings(
    base: str | Path, rank: int, alpha: float, targets: list[str], dropout: float = 0.0
) -> dict:
    """What PEFT needs to know about an adapter: adapter_config.json."""
    names = [HF_NAMES[f"{TARGETS[target]}.{target}"].rpartition(".")[2] for target in targets]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint_folder(Path(base)).resolve()),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": names,
        "inference_mode": True,
    }


def read_peft(folder: Path) -> Named:
    from safetensors.torch import load_file

    table = {theirs: ours for ours, theirs in HF_NAMES.items()}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
        yield f"{translate(f'{module}.weight', table).removesuffix('.weight')}.{part}", tensor.float()


def save_adapter(adapter: Adapter, folder: str | Path, tokenizer=None):
    """Write an adapter as PEFT does, in a folder with adapter_config.json and adapter_model.safetensors.

    Raises ValueError if the folder exists.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_folder(folder) as aside:
        tensors = {}
        for name, tensor in adapter.tensors.items():
            module, _, part = name.rpartition(".")
            theirs = translate(f"{module}.weight", HF_NAMES).removesuffix("weight")
            tensors[f"{PEFT_PREFIX}{theirs}{part}.weight"] = tensor.contiguous()
        with writing(aside / "adapter_model.safetensors", SafetensorError):
            save_file(tensors, aside / "adapter_model.safetensors", {"format": "pt"})
        (aside / "adapter_model.safetensors").chmod(0o644)
        settings = {name: value for name, value in adapter.settings.items() if name not in OUR_SETTINGS}
        with writing(aside / "adapter_config.json"):
            (aside / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        if tokenizer is not None:
            tokenizer.save(aside)
