"""What models depend on in config.json, in Meta's params.json and PEFT's adapter_config.json."""

import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from lib import variants
from lib.errors import BadInput
from lib.records import checked, read_json
from lib.rope_configs import Positive, Rope, Size, rope_from_hugging_face, rope_to_hugging_face

VARIANT = "plainllama-variant"  # the model_type of what is LLaMA no more
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]


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
    sliding_window: Size | None  # of Mistral
    variant: Any  # of a variant of this project: what it adds to the shape


class _MetaNeeded(TypedDict):
    dim: Size
    n_layers: Size
    n_heads: Size
    norm_eps: Positive


class MetaParams(_MetaNeeded, total=False):
    """params.json of LLaMA 1 to 3, and of releases that differ from them in numbers alone."""

    n_kv_heads: Size | None
    rope_theta: Positive | None
    use_scaled_rope: bool
    rope_scaling_factor: Positive | None
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
            raise BadInput(f"{path}: {name} {values[name]} is not LLaMA-2's")
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
        raise BadInput(f"{path.parent}: an adapter with {name} {settings[name]} cannot be read")
    checked(settings, AdapterConfig, path)
    return settings


CHANGING = (  # what models of other families, or of no release, add to LLaMA's computation
    "quantization_config", "attention_bias", "mlp_bias", "partial_rotary_factor",
    "no_rope_layers", "num_local_experts", "num_experts", "n_routed_experts", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "use_qk_norm",
    "qk_norm", "qk_layernorm", "use_qkv_bias", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "scale_emb", "scale_depth", "dim_model_base",
    "clip_qkv", "parallel_attn", "alibi", "kv_lora_rank", "attention_window", "use_sliding_window",
)  # fmt: skip
FAMILIES = ("llama", "mistral")  # one computation under two names


def config_from_hugging_face(config_class: type, path: Path):
    """A model.ModelConfig from the config.json in a folder, as transformers 4 or 5 write it.

    Raises ValueError for what computes something else than LLaMA.
    """
    where = path / "config.json"
    everything, own = read_json(where), {}
    for name in _Needed.__annotations__:
        if not isinstance(everything.get(name), (int, float)):
            raise BadInput(f"{path}: config.json has no number {name}")
    values = checked(everything, HuggingFace, where)
    if values.get("model_type") == VARIANT:
        own = checked(values.get("variant", {}), dict[str, Any], where)
        config_class = variants.load_trusted(path, config_class)
    elif values.get("model_type", "llama") not in FAMILIES:
        raise BadInput(f"{path}: model_type {values['model_type']} is not LLaMA-2's")
    if values.get("hidden_act", "silu") != "silu":
        raise BadInput(f"{path}: hidden_act {values['hidden_act']} is not LLaMA-2's")
    for name in CHANGING:
        value = everything.get(name)
        if value is True or value not in (None, False, 1, [], {}):  # a factor of 1 changes nothing
            raise BadInput(f"{path}: {name} {value} is not LLaMA-2's")
    window = values["max_position_embeddings"]
    if values.get("model_type") == "mistral":  # within its sliding window it is LLaMA
        window = min(window, values.get("sliding_window") or window)
    shape = dict(
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        ffn_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_seq_len=window,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings") or False,
        **rope_from_hugging_face(everything, path),
    )
    if (values.get("head_dim") or 0) * shape["num_heads"] not in (0, shape["dim"]):
        shape["head_size"] = values["head_dim"]
    try:
        return config_class(**shape, **own)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: config.json does not fit together ({error})") from None


def config_to_hugging_face(config) -> dict:
    """config.json of a model.ModelConfig. That of a variant is none that transformers takes."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if not variants.is_llama(type(config)):
        kind = {"architectures": [], "model_type": VARIANT, "variant": variants.own_fields(config)}
    if config.head_size:
        kind["head_dim"] = config.head_dim
    return kind | {
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_to_hugging_face(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }
