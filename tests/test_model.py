"""The model: architecture, cache, and weights on disk."""

import dataclasses
import json
import os
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata

from conftest import ROOT, additions, assert_same_but_for_rounding, random_model
from lib.cpu_attention import CompiledOnCPU
from lib.errors import BadInput
from lib.packed import Documents, attend_within
from model import (
    IGNORE,
    SIZES,
    KVCache,
    ModelConfig,
    RMSNorm,
    Transformer,
    Unembedding,
    load,
    rope_table,
    rotate,
    save,
)

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=50, max_seq_len=64)
VARIANTS = {
    "MHA": dataclasses.replace(TINY, num_kv_heads=4),
    "GQA": TINY,
    "MQA": dataclasses.replace(TINY, num_kv_heads=1),
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "rope_theta": dataclasses.replace(TINY, rope_theta=500_000.0),
    "rope_scale": dataclasses.replace(TINY, rope_scale=4.0),
    "llama3": dataclasses.replace(TINY, rope_theta=500_000.0, rope_scale=8.0, rope_window=16),
    "head_size": dataclasses.replace(TINY, head_size=16),
}


def make(config: ModelConfig = TINY) -> Transformer:
    return random_model(config)


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def same_weights(a: Transformer, b: Transformer) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


PUBLISHED = {
    "7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192, "33B": 32_528_943_616, "65B": 65_285_660_672,
    "3B": 3_426_473_600, "1.1B": 1_100_048_384, "15M": 15_191_712,
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_the_published_parameter_counts(size):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(SIZES[size]).parameters()) == PUBLISHED[size]


def test_a_token_cannot_see_the_future():
    model, tokens = make(), some_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % TINY.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_attention_depends_only_on_distance():
    q, k = torch.randn(2, 1, 1, 1, 8)
    config = ModelConfig(8, 1, 1, 1, 8)
    score = lambda m, n: (
        rotate(q, rope_table(config, torch.tensor([m]))) * rotate(k, rope_table(config, torch.tensor([n])))
    ).sum()
    torch.testing.assert_close(score(5, 2), score(12, 9))
    torch.testing.assert_close(score(0, 0), (q * k).sum())


def test_rotary_tables_are_fp32_and_the_same_after_bf16_and_meta_initialisation(monkeypatch):
    """Trap 18: a table stored in the model is rounded by .to(bf16) and garbage after to_empty."""
    import model as module

    seen = []
    original = module.rotate
    monkeypatch.setattr(module, "rotate", lambda x, rope: seen.append(rope) or original(x, rope))
    plain, rounded = make(), make().to(torch.bfloat16)
    with torch.device("meta"):
        late = Transformer(TINY)
    late.to_empty(device="cpu").load_state_dict(plain.state_dict())
    tokens = some_tokens(1, 64)
    assert torch.equal(plain(tokens), late(tokens))
    rounded(tokens)
    expected = rope_table(TINY, torch.arange(64))
    assert all(
        table.dtype == torch.float32 and torch.equal(table, right)
        for rope in seen
        for table, right in zip(rope, expected)
    )
    assert not list(plain.buffers())
    positions = rope_table(SIZES["7B"], torch.arange(4096))[1][:, -1]
    assert len(set(positions.tolist())) == 4096


def test_the_norm_takes_its_mean_of_squares_in_fp32():
    """So that an activation in bf16 is rounded once, on the way out, and not in the mean too."""
    sizes = torch.logspace(-3, 1, 200)[:, None]  # of the smallest, eps is the larger part
    x = (torch.randn(200, 512, generator=torch.Generator().manual_seed(0)) * sizes).bfloat16()
    norm, exact = RMSNorm(512, 1e-5).bfloat16(), x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x) != exact.bfloat16()).float().mean() < 1e-3  # with a mean in bf16 a third is


def test_only_residual_writers_start_smaller():
    model = Transformer(dataclasses.replace(TINY, dim=128))
    model.init_weights()
    small = {name for name, p in model.named_parameters() if p.dim() == 2 and p.std() < 0.015}
    assert small == {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.out", "feed_forward.down")}


def test_the_loss_is_the_sum_over_targets_by_their_number():
    model, tokens = make(), some_tokens(3, 9)
    targets = some_tokens(3, 9, seed=1)
    targets[0, 2:], targets[2, :] = IGNORE, IGNORE
    logprobs = model(tokens).log_softmax(-1)
    picked = [-logprobs[b, t, targets[b, t]] for b in range(3) for t in range(9) if targets[b, t] != IGNORE]
    torch.testing.assert_close(model(tokens, targets), torch.stack(picked).mean())
    torch.testing.assert_close(model.loss(tokens, targets), torch.stack(picked).sum())
    assert model(tokens, torch.full_like(targets, IGNORE)) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_those_of_a_full_pass_for_any_chunks(name):
    model, tokens, draw = make(VARIANTS[name]), some_tokens(3, 40), random.Random(0)
    full = model(tokens)
    for _ in range(8):
        cuts = sorted(draw.sample(range(1, 40), draw.randrange(0, 12)))
        cache = KVCache(model.config, 3, 40)
        pieces = [model(tokens[:, a:b], cache=cache) for a, b in zip([0, *cuts], [*cuts, 40])]
        assert_same_but_for_rounding(torch.cat(pieces, 1), full, additions(model.config, 40))


def test_cached_logits_are_right_for_rows_of_different_lengths():
    model, draw = make(), random.Random(1)
    tokens = some_tokens(3, 48)
    full = model(tokens)
    for _ in range(8):
        cache, lengths = KVCache(TINY, 3, 64), [0, 0, 0]
        while min(lengths) < 30:
            counts = [draw.randrange(1, 7) for _ in range(3)]
            chunk = torch.zeros(3, max(counts), dtype=torch.long)
            for row, (start, count) in enumerate(zip(lengths, counts)):
                chunk[row, :count] = tokens[row, start : start + count]
            logits = model(chunk, cache=cache)
            for row, (start, count) in enumerate(zip(lengths, counts)):
                expected = full[row, start : start + count]
                assert_same_but_for_rounding(logits[row, :count], expected, additions(TINY, 48))
            lengths = [length + count for length, count in zip(lengths, counts)]
            cache.trim(lengths)
            if max(lengths) > 40:
                break


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="65 tokens exceed the context window of 64"):
        make()(some_tokens(1, 65))
    with pytest.raises(ValueError, match="9 tokens do not fit in a cache of 8"):
        make()(some_tokens(1, 9), cache=KVCache(TINY, 1, 8))


@pytest.mark.parametrize("change, message", [
    (dict(num_heads=3), "dim 32 must be a multiple of 2 \\* num_heads = 6"),
    (dict(num_kv_heads=3), "num_heads 4 must be a multiple of num_kv_heads 3"),
    (dict(ffn_dim=0), "ffn_dim 0 must be above 0"),
    (dict(head_size=-2), "head_size -2 must be above 0"),
    (dict(head_size=7), "head_size 7 must be even"),
])  # fmt: skip
def test_an_impossible_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_it_learns_one_batch_by_heart():
    model, tokens = Transformer(TINY), some_tokens(2, 12)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---- Hugging Face folders ----


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_gives_the_same_logits(name, tmp_path):
    """Trap 26, both ways: our folder in transformers, and what transformers saves in ours."""
    transformers = pytest.importorskip("transformers")
    model, tokens = make(VARIANTS[name]), some_tokens(2, 60)
    save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    assert back.config == model.config
    assert same_weights(back, model)


@pytest.mark.parametrize("old", [False, True])
def test_configs_of_transformers_4_and_5_are_read(old, tmp_path):
    model = make(dataclasses.replace(TINY, rope_theta=500_000.0, rope_scale=4.0))
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 4.0}
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    config |= (
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
        if old
        else {"rope_parameters": rope | {"rope_theta": 500_000.0}}
    )
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "m").config == model.config


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_load_save_load_is_bit_equal(name, shard_bytes, tmp_path):
    model = make(VARIANTS[name])
    save(model, tmp_path / "a", max_shard_bytes=shard_bytes)
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    once = load(tmp_path / "a")
    save(once, tmp_path / "b", max_shard_bytes=shard_bytes)
    assert same_weights(load(tmp_path / "b"), model)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_sharded_folder_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = make(), some_tokens(1, 20)
    save(model, tmp_path / "m", max_shard_bytes=10_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_save_never_writes_over_a_folder(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("keep me")
    with pytest.raises(ValueError, match="m exists; choose another"):
        save(make(), tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save(make(), tmp_path / "empty")
    assert same_weights(load(tmp_path / "empty"), make())


def break_folder(folder, what):
    from safetensors.torch import load_file, save_file

    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if what == "shape":
        config["intermediate_size"] = 96
    elif what == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif what == "extra":
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    elif what == "rope":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    elif what == "type":
        config["model_type"] = "gemma"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("what, message", [
    ("shape", r"blocks.0.feed_forward.down.weight should be \(32, 96\) and is \(32, 48\)"),
    ("missing", r"blocks.1.feed_forward.up.weight \(48, 32\) is missing"),
    ("extra", r"blocks.7.feed_forward.up.weight \(2,\) has no place"),
    ("rope", "rope_type yarn is not supported"),
    ("type", "model_type gemma is not LLaMA-2's"),
])  # fmt: skip
def test_a_folder_that_does_not_fit_says_which_tensor(what, message, tmp_path):
    save(make(), tmp_path / "m")
    break_folder(tmp_path / "m", what)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m")


def test_only_the_files_and_tensors_of_the_model_are_read(tmp_path):
    """Older conversions hold rotary wavelengths; other weights may lie beside the shards that the index names."""
    from safetensors.torch import load_file, save_file

    model = make()
    save(model, tmp_path / "m", max_shard_bytes=10_000)
    first = next((tmp_path / "m").glob("model-00001*"))
    weights = load_file(first) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, first)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "m" / "consolidated.safetensors")
    assert same_weights(load(tmp_path / "m"), model)


def truncate(name: str, size: int):
    return lambda folder: os.truncate(folder / name, size)


def without(key: str):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize("change, message", [
    (truncate("config.json", 20), "config.json is not JSON"),
    (truncate("config.json", 0), "config.json is not JSON"),
    (without("hidden_size"), "config.json has no number hidden_size"),
    (without("rms_norm_eps"), "config.json has no number rms_norm_eps"),
    (truncate("model.safetensors", 1000), "cannot be read .SafetensorError"),
    (truncate("model.safetensors", 0), "cannot be read .SafetensorError"),
    (lambda folder: (folder / "params.json").write_text("{}"), "has params.json but no consolidated"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json has no field weight_map"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_sentence(change, message, tmp_path):
    save(make(), tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "m")
    assert type(error.value) is BadInput and "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    save(make(), tmp_path / "m", max_shard_bytes=10_000)
    next((tmp_path / "m").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="model-00002-of-.* is missing"):
        load(tmp_path / "m")


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_path_without_a_model_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder|no model here"):
        load(path)


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    """In a process of its own: the peak of resident memory, files mapped into it included, against the weights."""
    import subprocess
    import sys

    from conftest import ROOT

    config = dataclasses.replace(SIZES["42M"], vocab_size=4000, num_layers=24)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)  # what was in this memory may be NaN, which is refused
    save(model, tmp_path / "m", max_shard_bytes=10**10)
    weights = sum(p.nbytes for p in model.parameters())
    code = f"""
import sys, threading, time; sys.path.insert(0, {str(ROOT)!r})
import torch, safetensors.torch
from model import load
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
torch.ones(10).sum(); before = peak = rss(); done = False
def watch():
    global peak
    while not done: peak = max(peak, rss()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model = load({str(tmp_path / "m")!r}); done = True; thread.join(); peak = max(peak, rss())
print(peak - before)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.95 * weights < peak < 1.25 * weights, f"{peak / weights:.2f} times the weights"


# ---- other formats ----


def to_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """From pairs K/2 apart to neighbours, written out: row 2i of a head comes from row i, 2i + 1 from i + K/2."""
    heads = weight.view(num_heads, -1, weight.size(1))
    half = heads.size(1) // 2
    return torch.stack([heads[:, i // 2 + (i % 2) * half] for i in range(2 * half)], 1).view_as(weight)


def meta_state(model: Transformer, num_parts: int) -> list[dict]:
    names = {
        "attention_norm": ("attention_norm", None),
        "attention.query": ("attention.wq", 0),
        "attention.key": ("attention.wk", 0),
        "attention.value": ("attention.wv", 0),
        "attention.out": ("attention.wo", 1),
        "feed_forward_norm": ("ffn_norm", None),
        "feed_forward.gate": ("feed_forward.w1", 0),
        "feed_forward.down": ("feed_forward.w2", 1),
        "feed_forward.up": ("feed_forward.w3", 0),
    }
    config, parts = model.config, [{} for _ in range(num_parts)]
    whole = {
        "tok_embeddings.weight": (model.embedding.weight, 1),
        "norm.weight": (model.norm.weight, None),
        "output.weight": (model.unembedding.weight, 0),
    }
    for i, block in enumerate(model.blocks):
        for ours, (theirs, dim) in names.items():
            weight = block.get_submodule(ours).weight
            if ours in ("attention.query", "attention.key"):
                weight = to_pairs(weight, config.num_heads if ours.endswith("query") else config.num_kv_heads)
            whole[f"layers.{i}.{theirs}.weight"] = (weight, dim)
    for name, (weight, dim) in whole.items():
        for part, piece in zip(parts, [weight] * num_parts if dim is None else weight.chunk(num_parts, dim)):
            part[name] = piece.detach().clone()
    for part in parts:
        part["rope.freqs"] = torch.zeros(4)
    return parts


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("name", ["MHA", "GQA"])
def test_metas_release_is_read_with_all_its_parts(name, num_parts, tmp_path):
    model = make(VARIANTS[name])
    for i, part in enumerate(meta_state(model, num_parts)):
        torch.save(part, tmp_path / f"consolidated.{i:02d}.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"n_kv_heads": model.config.num_kv_heads} if name == "GQA" else {}
    (tmp_path / "params.json").write_text(json.dumps(params))
    back = load(tmp_path)
    assert back.config == dataclasses.replace(model.config, max_seq_len=4096)
    assert same_weights(back, model)


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    """Trap 27."""
    torch.save({"layers.0.feed_forward.w1.weight": Malicious()}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="cannot be read .UnpicklingError"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index", [Malicious(), dcp_metadata.Metadata({"x": dcp_metadata.BytesStorageMetadata()}, None, {})]
)
def test_the_index_of_a_sharded_checkpoint_cannot_run_code(index, tmp_path):
    """PyTorch unpickles it, and unpickles any entry that it says is not a tensor."""
    save(make(), tmp_path / "m")
    (tmp_path / "m" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="which does not describe tensors"):
        load(tmp_path / "m")


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files_are_read(tied, tmp_path):
    model = make(dataclasses.replace(TINY, tie_embeddings=tied))
    config, blocks = model.config, model.blocks
    vocab = config.vocab_size if tied else -config.vocab_size
    layers = [
        [b.attention_norm.weight for b in blocks],
        [to_pairs(b.attention.query.weight, 4) for b in blocks], [to_pairs(b.attention.key.weight, 2) for b in blocks],
        [b.attention.value.weight for b in blocks], [b.attention.out.weight for b in blocks],
        [b.feed_forward_norm.weight for b in blocks], [b.feed_forward.gate.weight for b in blocks],
        [b.feed_forward.down.weight for b in blocks], [b.feed_forward.up.weight for b in blocks],
    ]  # fmt: skip
    tensors = [model.embedding.weight, *sum(layers, []), model.norm.weight, torch.zeros(2, 64, 4)]
    tensors += [] if tied else [model.unembedding.weight]
    data = struct.pack("7i", 32, 48, 2, 4, 2, vocab, 64) + b"".join(
        t.detach().numpy().astype("<f4").tobytes() for t in tensors
    )
    (tmp_path / "m.bin").write_bytes(data)
    back = load(tmp_path / "m.bin")
    assert back.config == config and same_weights(back, model)
    (tmp_path / "short.bin").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="its header asks for"):
        load(tmp_path / "short.bin")


def test_the_trained_checkpoint_has_its_known_loss(shared):
    """BOS and one story a window, stories stripped, cut at 512 tokens: 1.3008 nats a token over 60 stories."""
    from data import Tokenizer

    model, tokenizer = (
        load(shared("stories260K/stories260K.bin")),
        Tokenizer(shared("stories260K/tok512.rebuilt.model")),
    )
    stories = shared("text/tinystories/v2_sample_1728_stories.txt").read_text().split("<|endoftext|>")[:60]
    total = count = 0
    with torch.no_grad():
        for story in stories:
            ids = torch.tensor([tokenizer.encode(story.strip(), bos=True)[:512]])
            total += model.loss(ids[:, :-1], ids[:, 1:]).item()
            count += ids.size(1) - 1
    assert count == 22_501
    assert abs(total / count - 1.3008) < 0.0005


def test_a_weight_is_stored_once_when_tied(tmp_path):
    save(make(VARIANTS["tied"]), tmp_path / "m")
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in stored and len(stored) == 2 + 9 * 2
    assert np.isfinite(stored["model.embed_tokens.weight"]).all()


# ---- packed documents ----


def packed(lengths: list[int], row_len: int) -> Documents:
    """Documents of these lengths, end to end in rows of row_len."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(-1, row_len)
    return Documents(positions, bounds.int())


LENGTHS = [7, 20, 5, 1, 31, 32]  # three rows of 32


def packed_logits(model, tokens: torch.Tensor, documents: Documents) -> torch.Tensor:
    return model.unembedding(model.hidden(tokens, documents=documents)).flatten(0, 1)


def test_documents_in_a_row_do_not_see_each_other():
    """Trap 10: with other tokens in document 1 the logits of all others stay the same to the last bit."""
    model = make()
    tokens = some_tokens(3, 32)
    other = tokens.clone()
    other[0, 7:27] = (other[0, 7:27] + 1) % 50
    documents = packed(LENGTHS, 32)
    before, after = (packed_logits(model, t, documents) for t in (tokens, other))
    same = (before == after).all(-1)
    assert same.tolist() == [True] * 7 + [False] * 20 + [True] * 69
    assert not torch.equal(model(tokens)[0, 27:], model(other)[0, 27:])  # without the bounds they do


def test_a_packed_document_is_the_same_as_alone():
    model = make()
    tokens = some_tokens(3, 32)
    together = packed_logits(model, tokens, packed(LENGTHS, 32)).split(LENGTHS)
    for logits, alone in zip(together, tokens.flatten().split(LENGTHS)):
        assert_same_but_for_rounding(logits, model(alone[None])[0], additions(TINY, 32))
    stretched = packed(LENGTHS, 32)._replace(positions=packed(LENGTHS, 32).positions * 3)
    assert not torch.allclose(packed_logits(model, tokens, stretched), torch.cat(together), atol=1e-3)
    q, k, v = (torch.randn(3, 32, heads, 8) for heads in (4, 2, 2))
    y = attend_within(q, k, v, packed(LENGTHS, 32)).flatten(0, 1).split(LENGTHS)
    begin = 0
    for out, size in zip(y, LENGTHS):
        one = (heads.flatten(0, 1)[None, begin : begin + size] for heads in (q, k, v))
        alone = attend_within(*one, packed([size], size))[0]
        assert torch.equal(out, alone)  # to the last bit
        begin += size


def test_the_loss_of_packed_documents_is_that_of_each_alone():
    model = make()
    tokens = some_tokens(3, 33)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], packed(LENGTHS, 32))
    parts = zip(tokens[:, :-1].flatten().split(LENGTHS), tokens[:, 1:].flatten().split(LENGTHS))
    alone = sum(model.loss(inputs[None], targets[None]) for inputs, targets in parts)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone.backward()
    for grad, p in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-4)


# ---- attention compiled on a CPU ----


@pytest.mark.parametrize("num_tokens", [7, 256, 600])
def test_the_written_out_gradients_of_attention_are_those_of_pytorch(num_tokens):
    """Grouped heads; fewer tokens than one product takes, as many, and more."""
    q, *kv = (torch.randn(2, heads, num_tokens, 8, requires_grad=True) for heads in (6, 3, 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *kv, is_causal=True, enable_gqa=True)
    y, dy = CompiledOnCPU.apply(q, *kv), torch.randn_like(q)
    assert torch.equal(y, expected)
    for mine, theirs in zip(torch.autograd.grad(y, (q, *kv), dy), torch.autograd.grad(expected, (q, *kv), dy)):
        assert_same_but_for_rounding(mine, theirs, 3 * num_tokens)


# ---- the loss in chunks ----


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_in_chunks_is_cross_entropy_with_its_gradients(dtype, tolerance, monkeypatch):
    """Also in bf16, where the value of PyTorch's own (10.125 for 10.437) is wrong."""
    monkeypatch.setattr("lib.kernels.LOSS_CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 21, 24, generator=generator) * 2).to(dtype).requires_grad_()
    output = Unembedding(24, 300, bias=False).to(dtype)
    targets = torch.randint(300, (3, 21), generator=generator)
    targets[1, 4:] = IGNORE
    (output(x, targets) / 7).backward()
    mine = output(x, targets).item(), x.grad.clone(), output.weight.grad.clone()
    x.grad = output.weight.grad = None
    logits = torch.nn.functional.linear(x, output.weight).float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    (total / 7).backward()
    assert mine[0] == pytest.approx(total.item(), rel=1e-6)
    for grad, expected in ((mine[1], x.grad), (mine[2], output.weight.grad)):
        assert (grad - expected).norm() < tolerance * expected.norm()
    assert (mine[1][1, 4:] == 0).all()


def test_ignored_targets_cost_nothing(monkeypatch):
    seen = []
    original = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, weight: seen.append(len(x)) or original(x, weight))
    output, x = Unembedding(8, 30, bias=False), torch.randn(4, 600, 8)
    targets = torch.full((4, 600), IGNORE)
    targets[2, :100] = 3
    output(x, targets)
    assert seen == [100]
    seen.clear()
    assert output(x, torch.full((4, 600), IGNORE)) == 0 and not seen


def test_the_loss_in_chunks_needs_a_quarter_of_the_memory():
    """8,192 tokens, 32,000 classes: counted on tensors without data; the slow test below measures."""
    from simulate import Allocated, fake_tensors

    def peak(loss) -> int:
        with fake_tensors(), Allocated() as allocated:
            x, output = torch.empty(1, 8192, 512, requires_grad=True), Unembedding(512, 32_000, bias=False)
            before = allocated.now
            loss(x, output, torch.zeros(1, 8192, dtype=torch.long)).backward()
            return allocated.peak - before

    chunked = peak(lambda x, output, targets: output(x, targets))
    assert chunked < peak(plain_loss) / 4


def plain_loss(x, output, targets):
    logits = output(x).float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_in_chunks_needs_a_quarter_of_the_memory_and_no_more_time_as_measured(dtype):
    code = f"""
import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, model, test_model
torch.set_num_threads(2)
x = torch.randn(1, 8192, 512, dtype=torch.{dtype}, requires_grad=True)
output = model.Unembedding(512, 32_000, bias=False).to(torch.{dtype})
targets = torch.randint(32_000, (1, 8192))
loss = test_model.plain_loss if sys.argv[1] == "plain" else lambda x, output, targets: output(x, targets)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, which may be a parent's, is forgotten
rss = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before, times = rss(), []
for _ in range(4):
    started = time.perf_counter(); loss(x, output, targets).backward(); times.append(time.perf_counter() - started)
print(rss() - before, sorted(times[1:])[1])
"""
    found = {}
    for kind in ("plain", "chunked"):
        words, env = [sys.executable, "-c", code, kind], os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
        found[kind] = [float(number) for number in done.stdout.split()]
    memory, seconds = (chunked / plain for chunked, plain in zip(found["chunked"], found["plain"]))
    print(f"{dtype}: {memory:.3f} of {found['plain'][0] / 1e3:.0f} MB, {1 / seconds:.2f} × the speed")
    assert memory < 0.25 and seconds < 1 / 0.9


def test_weights_that_are_drawn_row_by_row_are_normal_and_do_not_repeat():
    model = Transformer(dataclasses.replace(TINY, dim=256, ffn_dim=688, num_heads=4, num_kv_heads=4, vocab_size=1000))
    model.init_weights(3)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.02 / 2 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.03) and abs(weight.mean().item()) < std / 30
            assert len(weight[:, 0].unique()) == len(weight)
    other = Transformer(model.config)
    other.init_weights(4)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)
