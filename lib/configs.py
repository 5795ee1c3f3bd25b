"""What models depend on in config.json, in Meta's params.json and PEFT's adapter_config.json."""

import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from lib.records import checked, read_json

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]


class Rope(TypedDict, total=False):
    rope_type: str | None
    type: str | None  # what transformers called it first
    factor: Positive | None
    rope_theta: Positive | None


class _Needed(TypedDict):
    hidden_size: Size
    num_attention_heads: Size
    num_hidden_layers: Size
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive


class HuggingFace(_Needed, total=False):
    """config.json of a LLaMA, of transformers 4 or 5."""

    model_type: str
    hidden_act: str
    num_key_value_heads: Size | None
    head_dim: Size | None
    rope_theta: Positive | None
    rope_parameters: Rope | None
    rope_scaling: Rope | None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    quantization_config: Any


class _MetaNeeded(TypedDict):
    dim: Size
    n_layers: Size
    n_heads: Size
    norm_eps: Positive


class MetaParams(_MetaNeeded, total=False):
    """params.json of LLaMA and LLaMA-2, and of releases that differ from them in numbers alone."""

    n_kv_heads: Size | None
    rope_theta: Positive | None
    # The tensors tell these, or the code that Meta shipped needs them and the model does not.
    vocab_size: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    max_batch_size: int
    max_seq_len: int


def read_params(path: Path) -> MetaParams:
    """Meta's params.json. Raises ValueError for a field that is switched on and not known here."""
    values = read_json(path)
    for name in sorted(values.keys() - MetaParams.__annotations__.keys()):
        if values[name]:
            raise ValueError(f"{path}: {name} {values[name]} is not LLaMA-2's")
    return checked(values, MetaParams, path)


class _Adapter(TypedDict):
    r: Size
    lora_alpha: Finite
    base_model_name_or_path: str


class AdapterConfig(_Adapter, total=False):
    base_sha256: str
    quantize: str


UNCHANGING = {  # how an adapter was made, or where it is, but not what it computes
    *AdapterConfig.__annotations__, "peft_type", "task_type", "auto_mapping", "peft_version",
    "revision", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "bias", "init_lora_weights", "eva_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Ways to begin that leave the base's weights as they are. Others, as PiSSA's, change them whenever
# PEFT loads the adapter.
FIRST_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json, all of it. Raises ValueError, naming the field, for other than LoRA."""
    settings = read_json(path)
    plain = {
        "peft_type": (None, "LORA"),
        "bias": (None, "none"),
        "init_lora_weights": FIRST_WEIGHTS,
    }
    odd = {name for name in settings.keys() - UNCHANGING if settings[name]}
    odd |= {name for name, values in plain.items() if settings.get(name) not in values}
    for name in sorted(odd):
        raise ValueError(f"{path.parent}: an adapter with {name} {settings[name]} cannot be read")
    checked(settings, AdapterConfig, path)
    return settings
