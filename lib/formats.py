"""Models on disk: Hugging Face folders, Meta's release, llama2.c's files and this project's checkpoints.

A reader gives the model's config and its tensors, which come one at a time, after their shapes were compared with the
config: nothing is allocated for what is not in the files. config_class is model.ModelConfig.
"""

import json
import math
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib import variants
from lib.checkpoints import check_hashes
from lib.configs import config_from_hugging_face, config_to_hugging_face, read_params
from lib.disk import writing
from lib.errors import BadInput
from lib.files import file_in, new_folder
from lib.naming import HF_NAMES, Named, block_shapes, check_shapes, translate
from lib.records import checked, read_json
from lib.rope_configs import rope_from_params
from lib.tokenizer_export import write_tokenizer

META_NAMES = {  # the same for Meta's release; the number is the dimension that model parallelism splits
    "embedding": ("tok_embeddings", 1),
    "norm": ("norm", None),
    "unembedding": ("output", 0),
    "blocks": ("layers", None),
    "attention_norm": ("attention_norm", None),
    "attention.query": ("attention.wq", 0),
    "attention.key": ("attention.wk", 0),
    "attention.value": ("attention.wv", 0),
    "attention.out": ("attention.wo", 1),
    "feed_forward_norm": ("ffn_norm", None),
    "feed_forward.gate": ("feed_forward.w1", 0),
    "feed_forward.up": ("feed_forward.w3", 0),
    "feed_forward.down": ("feed_forward.w2", 1),
}


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key matrix from neighbouring rotary pairs to pairs K/2 apart."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_hugging_face(folder: Path, config_class: type) -> tuple:
    from safetensors import safe_open

    config = config_from_hugging_face(config_class, folder)
    table = {theirs: ours for ours, theirs in HF_NAMES.items()}

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = checked(read_json(index, "weight_map")["weight_map"], dict[str, str], index)
        names = sorted(set(weight_map.values()))
    inside, found = [], {}
    for path in [file_in(folder, name) for name in names]:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                # older conversions store the rotary wavelengths, and some the output of a tied model twice
                if name.endswith("rotary_emb.inv_freq") or config.tie_embeddings and name == "lm_head.weight":
                    continue
                inside.append((path, name))
                found[translate(name, table)] = tuple(file.get_slice(name).get_shape())
    check_shapes(config, found, folder)

    def tensors() -> Named:
        for path, name in inside:
            # opened anew, so that what was read does not stay mapped
            with safe_open(path, "pt") as file:
                yield translate(name, table), file.get_tensor(name)

    return config, tensors()


def read_meta_release(folder: Path, config_class: type) -> tuple:
    """Meta's release: params.json and one consolidated.NN.pth for each model-parallel rank."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise BadInput(f"{folder} has params.json but no consolidated.*.pth")
    params = read_params(folder / "params.json")
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
    config = config_class(
        dim=params["dim"],
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        ffn_dim=sum(part["layers.0.feed_forward.w1.weight"].size(0) for part in parts),
        vocab_size=sum(part["output.weight"].size(0) for part in parts),
        norm_eps=params["norm_eps"],
        **rope_from_params(params),
    )
    names = {theirs: ours for ours, (theirs, _) in META_NAMES.items()}
    split_dims = dict(META_NAMES.values())

    def pieces_of(name: str) -> tuple[str, int | None, list[Tensor]]:
        words = name.split(".")
        kind = ".".join(words[2:-1] if name.startswith("layers.") else words[:-1])
        return kind, split_dims.get(kind), [part[name] for part in parts]

    found = {}
    for name in filter("rope.freqs".__ne__, parts[0]):
        _, dim, pieces = pieces_of(name)
        shape = list(pieces[0].shape)
        if dim is not None:
            shape[dim] = sum(piece.size(dim) for piece in pieces)
        found[translate(name, names)] = tuple(shape)
    check_shapes(config, found, folder)

    def tensors() -> Named:
        for name in parts[0]:
            if name == "rope.freqs":
                continue
            kind, dim, pieces = pieces_of(name)
            whole = pieces[0] if dim is None else torch.cat(pieces, dim)
            if kind in ("attention.wq", "attention.wk"):
                whole = _halves(whole, config.num_heads if kind == "attention.wq" else config.num_kv_heads)
            yield translate(name, names), whole

    return config, tensors()


def read_llama2c(path: Path, config_class: type) -> tuple:
    """llama2.c's version 0: seven int32 (a negative vocabulary means untied), then fp32 matrices, layers stacked."""
    with open(path, "rb") as file:
        dim, ffn_dim, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", file.read(28))
    try:
        config = config_class(dim, layers, heads, kv_heads, ffn_dim, abs(vocab), seq_len, tie_embeddings=vocab > 0)
    except ValueError as error:
        raise BadInput(f"{path} is no llama2.c version 0 file ({error})") from None
    stacks, rope_pairs = block_shapes(config), config.head_dim // 2
    ends = [("norm.weight", (dim,)), ("", (2 * seq_len * rope_pairs,))]  # its rotary tables too
    ends += [] if config.tie_embeddings else [("unembedding.weight", (abs(vocab), dim))]
    in_layers = layers * sum(map(math.prod, stacks.values()))
    expected = abs(vocab) * dim + in_layers + sum(math.prod(shape) for _, shape in ends)
    expected, found = 28 + 4 * expected, path.stat().st_size
    if expected != found:
        raise BadInput(f"{path}: {found} bytes, but its header asks for {expected}; is it a llama2.c version 0 file?")
    layout = [("embedding.weight", (abs(vocab), dim))]
    for name, shape in stacks.items():
        layout += [(f"blocks.{i}.{name}.weight", shape) for i in range(layers)]
    layout += ends

    def tensors() -> Named:
        data, start = np.memmap(path, "<f4", "r", offset=28), 0
        for name, shape in layout:
            values = torch.from_numpy(data[start : start + int(np.prod(shape))].copy()).view(shape)
            start += values.numel()
            if name.endswith(("query.weight", "key.weight")):
                values = _halves(values, heads if "query" in name else kv_heads)
            if name:
                yield name, values

    return config, tensors()


def open_checkpoint(folder: Path, config_class: type) -> tuple:
    """A checkpoint of train.py that holds a whole model."""
    from lib.checkpoint_index import read_index

    config = config_from_hugging_face(config_class, folder)
    entries = read_index(folder).state_dict_metadata
    weights = {name: entry for name, entry in entries.items() if name.startswith("model.")}
    found = {name.removeprefix("model."): tuple(entry.size) for name, entry in weights.items()}
    check_shapes(config, found, folder)
    return config, read_checkpoint(folder)


def read_checkpoint(folder: Path) -> Named:
    """The weights in a checkpoint of train.py, read a gigabyte at a time; its moments stay unread."""
    import torch.distributed.checkpoint as dcp

    from lib.checkpoint_index import Reader

    check_hashes(folder)
    reader = Reader(folder)
    entries = reader.index.state_dict_metadata
    names = [name for name in entries if name.startswith("model.")]
    while names:
        part, used = {}, 0
        while names and used < 2**30:
            name = names.pop(0)
            part[name] = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
            used += part[name].nbytes
        with warnings.catch_warnings(action="ignore"):  # that each process reads for itself, as it should
            dcp.load(part, storage_reader=reader, no_dist=True)
        for name, tensor in part.items():
            yield name.removeprefix("model."), tensor


def save_hugging_face(
    model: nn.Module, folder: str | Path, tokenizer, template: str, max_shard_bytes: int = 5_000_000_000
):
    """Write the model in the Hugging Face layout, for transformers, vLLM and llama.cpp.

    tokenizer is a data.Tokenizer; template is a chat's, as lib/template_forms.py writes it, or
    empty. Written beside the folder and renamed when complete. Raises ValueError if that holds
    something.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, weight in model.named_parameters():  # a tied matrix is named once
        if shards[-1] and used + weight.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][translate(name, HF_NAMES)] = weight.detach()
        used += weight.nbytes
    with new_folder(folder) as aside:
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: weight.cpu().contiguous() for name, weight in shard.items()}
            with writing(aside / file, SafetensorError):
                save_file(tensors, aside / file, {"format": "pt"})
            (aside / file).chmod(0o644)  # safetensors makes it readable for its owner alone
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(weight.nbytes for shard in shards for weight in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            with writing(aside / "model.safetensors.index.json"):
                (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        config = config_to_hugging_face(model.config) | {"torch_dtype": dtype}
        if tokenizer is not None:
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            write_tokenizer(tokenizer, template, aside)
        variants.export(type(model.config), aside)
        with writing(aside / "config.json"):
            (aside / "config.json").write_text(json.dumps(config, indent=2))
    variants.say_if_no_llama(type(model.config), folder)
