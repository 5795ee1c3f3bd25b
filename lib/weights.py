"""From a model on disk to one in memory: which reader it takes, adapters merged into their base,
rows filled.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lib import formats
from lib.checkpoints import checkpoint_folder
from lib.configs import config_from_hugging_face, read_adapter_config
from lib.errors import BadInput
from lib.identity import first_rows_sha256, weights_sha256
from lib.lora import TARGETS, adapters
from lib.naming import Named, check_finite, readable
from lib.nf4 import from_nf4, to_nf4
from lib.peft import Adapter, read_peft
from lib.rows import local_rows


def read_config(path: str | Path, config_class: type):
    """The config of the model at path, a config_class (model.ModelConfig).

    Raises ValueError like model.load.
    """
    path = checkpoint_folder(Path(path))
    with readable(path):
        config, _ = open_model(path, config_class)
        return config


def load_weights(model: nn.Module, path: str | Path):
    """Fill a model of the right shape from path, as model.load does, only the rows that this
    process holds."""
    path = checkpoint_folder(Path(path))
    with readable(path):
        _, tensors = open_model(path, type(model.config))
        fill(model, tensors, path)


def open_model(path: Path, config_class: type) -> tuple:
    """The config of a model and its tensors, which come one at a time."""
    if path.is_file():
        return formats.read_llama2c(path, config_class)
    if (path / "adapter_config.json").exists():
        return _read_adapted(path, config_class)
    if (path / ".metadata").exists():
        return formats.open_checkpoint(path, config_class)
    if (path / "params.json").exists():
        return formats.read_meta_release(path, config_class)
    if (path / "config.json").exists() and any(path.glob("model*.safetensors*")):
        return formats.read_hugging_face(path, config_class)
    looked_for = "config.json with safetensors, params.json, a checkpoint"
    raise BadInput(f"{path}: no model here (looked for {looked_for})")


@torch.no_grad()
def fill(model: nn.Module, tensors: Named, path: Path | None):
    """Set a model's weights to these tensors, but not those of adapters.

    Raises ValueError naming what does not fit.
    """
    missing = dict(model.named_parameters())
    for name in adapters(model):
        del missing[name]
    for name, tensor in _quantized(model, tensors, path):
        shape = tuple(tensor.shape)
        if name not in missing:
            raise BadInput(f"{path}: tensor {name} {shape} has no place in this model")
        target = missing.pop(name)
        wanted = tuple(target.shape)
        if wanted != shape:
            raise BadInput(f"{path}: tensor {name} should be {wanted} and is {shape}")
        first, local = local_rows(target)
        here = tensor[first : first + len(local)]
        if here.is_floating_point():  # the codes of NF4 are none
            check_finite(here, name, path)
        local.copy_(here)
    if missing:
        name, target = next(iter(missing.items()))
        raise BadInput(f"{path}: tensor {name} {tuple(target.shape)} is missing")


def _quantized(model: nn.Module, tensors: Named, path: Path) -> Named:
    """The tensors, but of matrices that the model keeps in NF4 the three parts.

    They are made on the model's device, which is faster.
    """
    devices = {}
    for name, module in model.named_modules():
        if getattr(module, "nf4", False):
            devices[name] = module.codes.device
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if module not in devices:
            yield name, tensor
        else:
            check_finite(tensor, name, path)
            matrix = tensor.to(devices[module])
            for part, packed in to_nf4(matrix).items():
                yield f"{module}.{part}", packed


def fingerprint(
    path: str | Path, config_class: type, hash_of: Callable[[Named], str] = weights_sha256
) -> str:
    """The SHA-256 of all weights of the model at path, to know it again by, or what else hash_of
    makes of its tensors.

    It is computed once as long as the files stay the same, for it reads all of them. Raises
    ValueError like model.load.
    """
    path = checkpoint_folder(Path(path))
    with readable(path):
        if path.is_file():
            files = [path]
        else:
            files = sorted(file for file in path.iterdir() if file.is_file())
        states = [(file.name, file.stat()) for file in files]
        known = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
        return _fingerprint(path.resolve(), config_class, hash_of, known)


@functools.cache
def _fingerprint(
    path: Path, config_class: type, hash_of: Callable[[Named], str], files: tuple
) -> str:
    _, tensors = open_model(path, config_class)
    return hash_of(tensors)


def is_known(path: str | Path, known: str, config_class: type) -> bool:
    """Whether the model at path has the weights that a run wrote down, or an older run: of its
    first rows alone."""
    if known == fingerprint(path, config_class):
        return True
    return known == fingerprint(path, config_class, first_rows_sha256)


def find_base(settings: dict, path: Path, config_class: type) -> Path:
    """The folder of the model that the adapter at path changes.

    Raises ValueError if it is gone or another one.
    """
    base = Path(settings["base_model_name_or_path"])
    where = f"{path}: its base model {base}"
    if not base.exists():
        said = "base_model_name_or_path in its adapter_config.json says where it is"
        raise BadInput(f"{where} is not there; {said}")
    known = settings.get("base_sha256")
    if known and not is_known(base, known, config_class):
        raise BadInput(f"{where} holds other weights than those it was trained on")
    return checkpoint_folder(base)


def read_adapter(path: str | Path, config_class: type) -> Adapter:
    """The adapter of a run or of a PEFT folder.

    Raises ValueError where there is none, and for what LoRA has not.
    """
    path = checkpoint_folder(Path(path))
    with readable(path):
        if not (path / "adapter_config.json").exists():
            raise BadInput(f"{path}: no adapter here (looked for adapter_config.json)")
        settings = read_adapter_config(path / "adapter_config.json")
        named = formats.read_checkpoint(path) if (path / ".metadata").exists() else read_peft(path)
        tensors = dict(named)
        if not tensors:
            raise BadInput(f"{path}: an adapter without a tensor")
        for name, tensor in tensors.items():
            check_finite(tensor, name, path)
        return Adapter(find_base(settings, path, config_class), settings, tensors)


def whole_adapter(path: str | Path, config_class: type) -> Adapter:
    """As `read_adapter`. Raises ValueError also where a run changed more of its base than that."""
    adapter = read_adapter(path, config_class)
    if read_config(path, config_class) != read_config(adapter.base, config_class):
        more = "differs from its base in more than an adapter can say"
        raise BadInput(f"{path} {more}; use --export")
    return adapter


def _read_adapted(path: Path, config_class: type) -> tuple:
    """The base model with the adapter at path merged into it: W + (alpha / rank) B A, where W is in
    NF4 if it was so in training."""
    base, settings, learned = read_adapter(path, config_class)
    config, tensors = open_model(base, config_class)
    if (path / "config.json").exists():  # a run may have changed its context window
        own = config_from_hugging_face(config_class, path)
        window = dict(max_seq_len=config.max_seq_len, rope_scale=config.rope_scale)
        if replace(own, **window) != config:
            raise BadInput(f"{path}: config.json is of another model than the base, {base}")
        config = own
    in_nf4 = settings.get("quantize") == "nf4"

    def merged() -> Named:
        for name, tensor in tensors:
            check_finite(tensor, name, base)
            module = name.removesuffix(".weight")
            if in_nf4 and module.rpartition(".")[2] in TARGETS:
                tensor = from_nf4(**to_nf4(tensor), dtype=torch.float32)
            if f"{module}.lora_A" in learned:
                a, b = (learned.pop(f"{module}.{part}") for part in ("lora_A", "lora_B"))
                same_rank = a.size(0) == b.size(1) == settings["r"]
                if (b.size(0), a.size(1)) != tensor.shape or not same_rank:
                    adapter = f"{module}'s adapter {tuple(a.shape)}"
                    raise BadInput(f"{path}: {adapter} does not fit {tuple(tensor.shape)}")
                tensor = tensor.float() + settings["lora_alpha"] / settings["r"] * (b @ a)
            yield name, tensor
        if learned:
            raise BadInput(f"{path}: tensor {next(iter(learned))} has no place in this model")

    return config, merged()
