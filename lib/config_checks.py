"""What the numbers of a model.ModelConfig have to be."""

from dataclasses import fields

from lib.errors import BadInput


def check_config(config):
    """Raise ValueError, naming the field, for numbers of which no model can be made."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not value > 0 and value != field.default:
            raise BadInput(f"{field.name} {value} must be above 0")
    pairs = 2 * config.num_heads  # rotary ones, of channels
    if not config.head_size and config.dim % pairs:
        raise BadInput(f"dim {config.dim} must be a multiple of 2 * num_heads = {pairs}")
    if config.head_size % 2:
        raise BadInput(f"head_size {config.head_size} must be even, for pairs of channels")
    if config.num_heads % config.num_kv_heads:
        groups = f"num_kv_heads {config.num_kv_heads}"
        raise BadInput(f"num_heads {config.num_heads} must be a multiple of {groups}")
