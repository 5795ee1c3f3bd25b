"""The shape of a run's model, from its flags or from the model that it begins with."""

import dataclasses
from pathlib import Path

from lib import variants
from lib.checkpoints import checkpoint_folder
from lib.errors import BadInput
from lib.tokenizer import Tokenizer, find_tokenizer
from lib.weights import read_config


def model_config(config, sizes: dict, vocab_size: int | None = None, config_class: type | None = None):
    """The shape (a model.ModelConfig) that --size and the flags beside it describe. Raises ValueError."""
    if config.size not in sizes:
        raise BadInput(f"--size {config.size} is not one of {', '.join(sizes)}")
    names = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "rope_scale")
    changes = {name: getattr(config, name) for name in names if getattr(config, name)}
    if "num_heads" in changes:
        changes.setdefault("num_kv_heads", changes["num_heads"])
    if vocab_size:
        changes["vocab_size"] = vocab_size
    size = sizes[config.size]
    changes |= {"max_seq_len": config.seq_len} | _flags_of_variant(config, config_class)
    return (config_class or type(size))(**dataclasses.asdict(size) | changes)


def _flags_of_variant(config, config_class: type | None) -> dict:
    """What the flags of a run say of the fields that its variant adds to a shape."""
    variant = variants.variant_of(config_class)
    names = variant.fields if variant else ()
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def planned_config(config, sizes: dict):
    """The shape of a model that is planned, whose data need not be there yet."""
    config_class = config.config_class
    if config.variant:
        config_class = variants.load(Path(config.variant), config_class)
    if config.init_from:
        return read_config(config.init_from, config_class)
    return model_config(config, sizes, None, config_class)


def first_config(config, meta: dict, sizes: dict, config_class: type):
    """The shape of a new run's model. Raises ValueError where --init_from does not fit the other flags or the data."""
    if not config.init_from:
        if config.lora_rank:
            raise BadInput(f"--lora_rank {config.lora_rank} needs --init_from, the model to adapt")
        return model_config(config, sizes, meta["vocab_size"], config_class)
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"):
        if getattr(config, name):
            raise BadInput(f"--{name} {getattr(config, name)} does not go with --init_from, which brings its shape")
    if config.size != type(config).size:
        raise BadInput(f"--size {config.size} does not go with --init_from, which brings its shape")
    shape = read_config(config.init_from, config_class)
    if type(shape) is not config_class:
        file = checkpoint_folder(Path(config.init_from)) / variants.FILE
        raise BadInput(f"--init_from {config.init_from} is of a variant: add --variant {file}")
    shape = dataclasses.replace(shape, **_flags_of_variant(config, config_class))
    theirs = find_tokenizer(config.init_from)
    if theirs and Tokenizer(theirs).sha256 != meta["tokenizer"]["sha256"]:
        hint = f"make it with --tokenizer {theirs}"
        raise BadInput(f"--data {config.data[0]} was made with another tokenizer than {theirs}; {hint}")
    if shape.vocab_size < meta["vocab_size"]:
        sizes = f"{meta['vocab_size']}, larger than the model's {shape.vocab_size}"
        raise BadInput(f"--data {config.data[0]} has a vocabulary of {sizes}")
    if config.rope_scale:
        shape = dataclasses.replace(shape, rope_scale=config.rope_scale, max_seq_len=config.seq_len)
    if config.seq_len > shape.max_seq_len:
        raise BadInput(f"--seq_len {config.seq_len} exceeds the model's context window of {shape.max_seq_len}")
    return shape
