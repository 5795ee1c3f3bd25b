"""Damaged, edited and hostile folders run no code, are not lost, and give no other weights."""

import dataclasses
import functools
import itertools
import json
import os
import pickle
import random
import shutil
import struct

import pytest
import torch

import sample
import train
from conftest import TINY_RUN, checkpoints_of, random_model, run_ranks
from data import Tokenizer
from lib import formats, opening, peft
from lib.checkpoints import checkpoint_folder
from lib.defaults import by_kind
from lib.errors import BadInput
from lib.weights import read_config
from lib.world import join_world, local
from model import ModelConfig, Transformer, load, save
from test_train import CPU, build, micro_batch, rows, same_bits, world  # noqa: F401
from train import Config

TINY = ModelConfig(32, 2, 4, 2, 48, vocab_size=258, max_seq_len=32)


@pytest.fixture(scope="module")
def a_run(tiny_data, tmp_path_factory):
    """A run of four steps with the checkpoints 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    options = TINY_RUN | dict(
        steps=6, stop_at=4, save_every=2, data=(str(tiny_data),), out=str(folder)
    )
    train.main(Config(**options))
    return folder


@pytest.fixture
def copy(a_run, tmp_path, monkeypatch):
    """That run, copied, to be damaged."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(a_run, "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["config"]["out"] = "run"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run"


def resume(run, **flags) -> int:
    """Continue a run in this process; returns the step of its last checkpoint."""
    resumed = by_kind(Config(resume=run.name))
    train.main(dataclasses.replace(resumed, **flags))
    return int((run / "last").read_text()[5:])


def adapter(base, folder, config=TINY, **settings):
    """A LoRA adapter as PEFT writes it, on the query matrices."""
    tensors = {}
    for layer in range(config.num_layers):
        tensors[f"blocks.{layer}.attention.query.lora_A"] = torch.full((4, config.dim), 0.1)
        tensors[f"blocks.{layer}.attention.query.lora_B"] = torch.full((config.dim, 4), 0.1)
    written = peft.adapter_settings(base, 4, 8.0, ["query"]) | settings
    peft.save_adapter(peft.Adapter(base, written, tensors), folder)
    return tensors


# ---- code ----


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def an_index_that_fails(index: bytes, loads: int) -> bytes:
    """A pickle that gives the index `loads` times, then fails, where it may name _get_layout.

    It counts in the attributes of that function: what _get_layout("torch.strided") gives is looked
    up in a table that the pickle puts there; the last number leads to None, which is in no table.
    """
    layout, call = b"ctorch.serialization\n_get_layout\n", b"\x85R"  # one argument, call
    name = lambda text: b"X" + struct.pack("<I", len(text)) + text.encode()  # noqa: E731
    now = layout + name("torch.strided") + call + b"q\xf0"
    states = ["1", "2"][:loads]
    pairs = b"h\xf0" + name("1")
    for state, following in itertools.zip_longest(states, states[1:]):
        pairs += name(state) + (name(following) if following else b"N")
    table = lambda inside: b"}" + name("cache") + b"}(" + inside + b"us"  # noqa: E731
    turn = layout + table(pairs) + b"b0"  # the table of what follows what
    turn += layout + b"h\xf0" + call + b"q\xf10"
    turn += layout + table(b"".join(name(s) + b"N" for s in "12")) + b"b0"  # those that may follow
    known = layout + b"h\xf1" + call + b"0"
    turn += known + layout + table(name("torch.strided") + b"h\xf1") + b"b0"
    return b"\x80\x02" + now + b"0" + turn + pickle.dumps(pickle.loads(index), 2)[2:]


@pytest.mark.parametrize("what, loads", [
    ("resume", 0), ("resume", 1), ("init_from", 2), ("sample.py", 2), ("eval.py", 2),
])  # fmt: skip
def test_no_command_runs_code_from_a_run(what, loads, copy, tiny_data, tmp_path, monkeypatch):
    """PyTorch takes __0.metadata where .metadata fails, which can wait until nobody looks."""
    import eval

    monkeypatch.setattr(torch.serialization._get_layout, "cache", {})
    for step in copy.glob("step_*"):
        index = (step / ".metadata").read_bytes()
        bad = an_index_that_fails(index, loads) if loads else pickle.dumps(5)
        (step / ".metadata").write_bytes(bad)
        (step / "__0.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "payload")))
        (step / "sha256.json").unlink(missing_ok=True)
    command = {
        "resume": lambda: resume(copy),
        "init_from": lambda: train.main(
            Config(init_from="run", data=(str(tiny_data),), out="next", seq_len=32)
        ),
        "sample.py": lambda: sample.main(sample.Config(model="run")),
        "eval.py": lambda: eval.main(
            eval.Config(("run",), "perplexity", data=str(tiny_data), out="out.json")
        ),
    }[what]
    with pytest.raises(ValueError):
        command()
    assert not (tmp_path / "payload").exists()


def test_only_the_index_that_was_checked_is_read(copy, tiny_data, monkeypatch):
    """PyTorch's own unpickler reads none."""
    from torch.distributed.checkpoint import filesystem

    monkeypatch.setattr(filesystem.pickle, "load", lambda file: 1 / 0)
    sample.main(sample.Config(model="run", max_new_tokens=1))
    assert resume(copy) == 6


def index_of(folder, change):
    """Change the index of a checkpoint, and leave off its hashes as an attacker would."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))
    (folder / "sha256.json").unlink()


def drop_tensor(index):
    del index.state_dict_metadata["model.norm.weight"]


def drop_parts(index):
    index.state_dict_metadata["model.norm.weight"].chunks.clear()


def shorten_part(index):
    chunk = index.state_dict_metadata["model.embedding.weight"].chunks[0]
    chunk.sizes = torch.Size([chunk.sizes[0] - 1, chunk.sizes[1]])


def lead_outside(index):
    for info in index.storage_data.values():
        info.relative_path = "../step_00000002/" + info.relative_path


def compress(index):
    next(iter(index.storage_data.values())).transform_descriptors = ["stream.zstd/1"]


def promise_much(index):
    entry = index.state_dict_metadata["model.norm.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size([10**12])


@pytest.mark.parametrize("change, message", [
    (drop_tensor, r"tensor norm.weight \(32,\) is missing"),
    (drop_parts, "has not all parts of model.norm.weight"),
    (shorten_part, "has not all parts of model.embedding"), (lead_outside, "is no file in there"),
    (compress, "is compressed or encrypted"),
    (promise_much, "a part of model.norm.weight that is not in the files"),
])  # fmt: skip
def test_an_index_that_lacks_a_tensor_or_leads_elsewhere_is_refused(change, message, copy, capsys):
    index_of(copy / "step_00000004", change)
    with pytest.raises(ValueError, match=message):
        load(copy)
    assert resume(copy) == 6
    assert "going back to run/step_00000002" in capsys.readouterr().err


@pytest.mark.parametrize("index", [
    b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    b"\x80\x04Nr\xff\xff\xff\x7f.", b"\x80\x04]" + b"]a" * 5 + b"0" * 3, b"",
])  # fmt: skip
def test_an_index_of_huge_lengths_is_refused_at_once(index, copy):
    (copy / "step_00000004" / "sha256.json").unlink()
    (copy / "step_00000004" / ".metadata").write_bytes(index)
    with pytest.raises(ValueError, match="step_00000004.* cannot be read"):
        load(copy)


# ---- flipped bits ----


def flip_a_bit(path, draw: random.Random):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flips_on_two_processes(folder):
    """Two checkpoints whose weights equal their steps; a bit of the second flips in each file."""
    join_world()
    model = build()
    optimizers, guard = train.make_optimizers(model, Config()), train.Guard(6.0, CPU)
    checkpoints = checkpoints_of(folder, Config(), model, optimizers, guard, {"r": 1})
    for step in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        checkpoints.begin(step)
        assert checkpoints.finish() is None
    first = train.dist.get_rank() == 0
    names = sorted(path.name for path in (folder / "step_00000002").iterdir())
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "config.json", "sha256.json"} < set(names)
    draw = random.Random(0)
    for name in sorted(names + [name for name in names if "distcp" in name]):
        kept = (folder / "step_00000002" / name).read_bytes()
        train.dist.barrier()
        if first:
            flip_a_bit(folder / "step_00000002" / name, draw)
        train.dist.barrier()
        assert checkpoints.restore() == 1, name
        assert all(bool((local(p) == 1).all()) for p in model.parameters()), name
        train.dist.barrier()
        if first:
            (folder / "step_00000002" / name).write_bytes(kept)
        train.dist.barrier()
    assert checkpoints.restore() == 2


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed(tmp_path):
    run_ranks(2, flips_on_two_processes, tmp_path)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "config.json"])
def test_a_model_with_a_flipped_bit_is_not_loaded(name, copy):
    draw = random.Random(1)
    whole = (copy / "step_00000004" / name).read_bytes()
    for _ in range(5):
        flip_a_bit(copy / "step_00000004" / name, draw)
        with pytest.raises(ValueError, match="step_00000004"):
            load(copy)
        (copy / "step_00000004" / name).write_bytes(whole)
    load(copy)


def test_checkpoints_without_hashes_are_read_as_before(copy):
    for path in copy.glob("step_*/sha256.json"):
        path.unlink()
    load(copy)
    assert resume(copy) == 6


def test_an_adapter_finds_its_base_where_the_user_says_it_went(copy, tiny_run):
    run = tiny_run("lora", init_from="run", lora_rank=4, steps=1)
    (run.parent / "run").rename(run.parent / "moved")
    path = run / "step_00000001" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            settings | {"base_model_name_or_path": str(run.parent / "moved" / "step_00000004")}
        )
    )
    load(run)
    path.write_text(json.dumps(settings | {"lora_alpha": 9.0}))
    with pytest.raises(ValueError, match="adapter_config.json cannot be read: it is damaged"):
        load(run)


# ---- what is in a run's folder ----


@pytest.mark.parametrize("last", [
    None, b"", b"\xff\xfe", b"../run/step_00000002", b"/run/step_00000002", b"step_00000003",
    b"hello",
    b"step_0000000\xb2",
])  # fmt: skip
def test_a_run_whose_last_is_missing_or_wrong_goes_on_from_its_newest_whole_checkpoint(
    last, copy, capsys
):
    (copy / "last").unlink()
    if last is not None:
        (copy / "last").write_bytes(last)
    os.truncate(copy / "step_00000004" / "__0_0.distcp", 5000)
    if last == b"hello":  # as if it were of an older version
        (copy / "step_00000004" / "sha256.json").unlink()
    before = (copy / "log.jsonl").read_text().splitlines()
    assert checkpoint_folder(copy) == copy / "step_00000002"
    load(copy)
    assert resume(copy, stop_at=3) == 3
    said = capsys.readouterr()
    assert "last" in said.err and "continuing run after step 2" in said.out
    assert {path.name[12:] for path in copy.glob("step_*")} >= set("234")
    assert (copy / "log.jsonl").read_text().splitlines()[: len(before) // 2] == before[
        : len(before) // 2
    ]


@pytest.mark.parametrize("again", ["resume", "the same command"])
def test_a_run_is_never_begun_anew_over_its_checkpoints(again, copy, tiny_data):
    """Not even where none is whole."""
    (copy / "last").unlink()
    for step in copy.glob("step_*"):
        (step / ".metadata").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    config = by_kind(Config(resume="run"))
    if again != "resume":
        config.resume = ""
    with pytest.raises(ValueError, match="cannot be read"):
        train.main(config)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load(copy)
    after = {
        path: path.read_bytes()
        for path in copy.rglob("*")
        if path.is_file() and "tokenizer" not in path.name
    }
    assert after.items() <= before.items() and len(after) >= len(before) - 1


def test_saving_touches_nothing_but_checkpoints_of_its_own(copy, tmp_path):
    """Links, notes, copies under other names and later checkpoints stay; what a kill left goes."""
    shutil.copytree(copy / "step_00000004", copy / "step_00000004_best")
    shutil.copytree(copy / "step_00000004", copy / "step_00000009")
    (copy / "step_by_step_notes").mkdir()
    (copy / "step_notes.txt").write_text("keep me")
    (copy / "step_00000001").write_text("a file")
    (tmp_path / "larger").mkdir()
    (copy / "step_00000002").rename(tmp_path / "larger" / "step_00000002")
    (copy / "step_00000002").symlink_to(tmp_path / "larger" / "step_00000002")
    (copy / "step_00000003.tmp").mkdir()
    others = set(copy.glob("step_*")) - {copy / f"step_0000000{end}" for end in ("0", "3.tmp", "4")}
    assert resume(copy, keep=1) == 6
    assert set(copy.glob("step_*")) == others | {copy / "step_00000006"}
    assert (copy / "step_00000002").is_symlink() and load(copy / "step_00000002")
    assert (tmp_path / "larger" / "step_00000002" / ".metadata").exists()


def test_a_checkpoint_that_was_moved_and_linked_to_is_resumed_from_and_never_replaced(
    copy, tmp_path, capsys
):
    (copy / "step_00000004").rename(tmp_path / "moved")
    (copy / "step_00000004").symlink_to(tmp_path / "moved")
    assert resume(copy) == 6 and "continuing run after step 4" in capsys.readouterr().out
    shutil.rmtree(copy / "step_00000006")
    (copy / "last").write_text("step_00000002")
    before = (tmp_path / "moved" / ".metadata").stat().st_mtime_ns
    assert resume(copy) == 6
    assert (
        "no checkpoint of step 4 (step_00000004, a link or no folder, is in the way"
        in capsys.readouterr().out
    )
    assert (copy / "step_00000004").is_symlink() and (
        tmp_path / "moved" / ".metadata"
    ).stat().st_mtime_ns == before


# ---- sizes and fields ----


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("field, value, message", [
    ("num_hidden_layers", 10**6, r"tensor blocks.2.attention_norm.weight \(32,\) is missing"),
    ("vocab_size", 10**9, r"should be \(1000000000, 32\) and is \(258, 32\)"),
    ("hidden_size", 2**40, "config.json: field hidden_size: Expected int <= 2147483647"),
    ("hidden_size", 32.0, "config.json: field hidden_size: Expected int, got float"),
    ("hidden_size", 1e30, "config.json: field hidden_size: Expected int, got float"),
    ("hidden_size", "32", "config.json has no number hidden_size"),
    ("vocab_size", True, "config.json: field vocab_size: Expected int, got bool"),
    ("num_hidden_layers", -1, "config.json: field num_hidden_layers: Expected int >= 1"),
    ("num_key_value_heads", 3, "config.json does not fit together"),
    ("tie_word_embeddings", "false", "config.json: field tie_word_embeddings: Expected bool"),
    ("rms_norm_eps", float("inf"), "config.json: field rms_norm_eps"),
    ("rms_norm_eps", float("nan"), "config.json: field rms_norm_eps"),
    ("rope_theta", -1.0, "config.json: field rope_theta"),
    ("rope_scaling", {"rope_type": "linear", "factor": float("inf")}, "field rope_scaling.factor"),
    ("rope_scaling", {"rope_type": "linear"}, "rope_type linear, but no factor"),
    ("rope_scaling", [1], "config.json: field rope_scaling: Expected object"),
    ("hidden_act", 5, "config.json: field hidden_act"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_a_config_that_its_files_do_not_bear_out_is_one_sentence(
    kind, field, value, message, copy, tmp_path
):
    folder = copy / "step_00000004"
    if kind == "folder":
        save(random_model(TINY), folder := tmp_path / "m")
    edit(folder / "config.json", **{field: value})
    # the latter is what the model is built from
    for read in (load, functools.partial(read_config, config_class=ModelConfig)):
        with pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"hidden_size": ' + "9" * 5000 + "}", "[]", '{"a": "\xff"}', "{"]
)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "adapter_config.json", "params.json"]
)
def test_a_file_that_is_no_object_is_named(name, text, tmp_path):
    save(random_model(TINY), tmp_path / "m")
    if name == "params.json":
        torch.save({}, tmp_path / "m" / "consolidated.00.pth")
    (tmp_path / "m" / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=name) as error:
        load(tmp_path / "m")
    assert type(error.value) is BadInput and "\n" not in str(error.value)


@pytest.mark.parametrize("header", [
    (32, 48, 2**31 - 1, 4, 2, 258, 32), (32, 48, 2**20, 4, 2, 258, 32), (32, 48, 2, 4, 2, 10**9, 32)
])  # fmt: skip
def test_a_header_that_promises_more_than_the_file_is_refused_before_a_list_is_made(
    header, tmp_path, monkeypatch
):
    monkeypatch.setattr(formats.np, "prod", lambda shape: 1 / 0)
    (tmp_path / "m.bin").write_bytes(struct.pack("<7i", *header) + bytes(1000))
    with pytest.raises(ValueError, match="m.bin: 1028 bytes, but its header asks for"):
        load(tmp_path / "m.bin")


def test_no_memory_is_taken_before_sizes_are_compared(tmp_path, monkeypatch):
    save(random_model(TINY), tmp_path / "m")
    edit(tmp_path / "m" / "config.json", vocab_size=10**9)
    monkeypatch.setattr("model.Transformer", lambda config: 1 / 0)
    with pytest.raises(ValueError, match="should be"):
        load(tmp_path / "m")


@pytest.mark.parametrize("weight_map", [
    {"x": "../other/model.safetensors"}, {"x": "/etc/passwd"}, {"x": ".."}, {"x": "nowhere"},
    {"x": 5}, ["x"], None
])  # fmt: skip
def test_shards_are_files_of_the_folder(weight_map, tmp_path):
    for name in ("m", "other"):
        save(random_model(TINY), tmp_path / name)
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="is no file in there|index.json: (field|Expected)"):
        load(tmp_path / "m")


# ---- adapters and Meta's releases ----


@pytest.mark.parametrize("name, value", [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "of-next-year"), ("alora_invocation_tokens", [5]), ("use_qalora", True),
    ("lora_bias", True),
    ("layer_replication", [[0, 1]]), ("trainable_token_indices", [3]), ("target_parameters", ["x"]),
    ("kasa_config", {"a": 1}), ("megatron_config", {"a": 1}), ("modules_to_save", ["lm_head"]),
    ("peft_type", "IA3"),
])  # fmt: skip
def test_an_adapter_that_computes_something_else_is_refused_by_name(name, value, tmp_path):
    save(random_model(TINY), tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a", **{name: value})
    with pytest.raises(ValueError, match=f"an adapter with {name} .* cannot be read"):
        load(tmp_path / "a")


@pytest.mark.parametrize("first", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_adapter_may_begin_in_any_way_that_leaves_its_base_alone(first, tmp_path):
    save(random_model(TINY), tmp_path / "base")
    harmless = {
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "rank_pattern": {},
    }
    tensors = adapter(
        tmp_path / "base", tmp_path / "a", init_lora_weights=first, peft_version="0.21", **harmless
    )
    a, b = (tensors[f"blocks.0.attention.query.lora_{part}"] for part in "AB")
    merged, plain = (
        load(tmp_path / name).blocks[0].attention.query.weight for name in ("a", "base")
    )
    torch.testing.assert_close(merged, plain + 2 * b @ a)


@pytest.mark.parametrize("settings, message", [
    ({"lora_alpha": float("nan")}, "field lora_alpha"),
    ({"lora_alpha": float("inf")}, "field lora_alpha"),
    ({"lora_alpha": "8"}, "field lora_alpha"), ({"r": 0}, "field r: Expected int >= 1"),
    ({"r": 4.0}, "field r"),
    ({"r": 10**30}, "field r"),
    ({"base_model_name_or_path": None}, "field base_model_name_or_path"),
    ({"base_sha256": 5}, "field base_sha256"),
])  # fmt: skip
def test_a_wrong_field_of_an_adapter_is_named(settings, message, tmp_path):
    save(random_model(TINY), tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a")
    edit(tmp_path / "a" / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match=f"a/adapter_config.json: {message}"):
        load(tmp_path / "a")


def meta_folder(folder, **params):
    from test_model import meta_state

    folder.mkdir()
    torch.save(meta_state(random_model(TINY), 1)[0], folder / "consolidated.00.pth")
    plain = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(plain | params))
    return folder


@pytest.mark.parametrize("params, message", [
    ({"quantization_args": {"group_size": 256}},
     "params.json: quantization_args .* is not LLaMA-2's"),
    ({"lora_args": {"rank": 16}}, "params.json: lora_args .* is not LLaMA-2's"),
    ({"vision_num_layers": 3}, "params.json: vision_num_layers 3 is not LLaMA-2's"),
    ({"n_layers": 10**6}, "tensor blocks.2.attention_norm.weight .* is missing"),
    ({"dim": 64}, r"should be \(258, 64\) and is \(258, 32\)"),
    ({"dim": 32.0}, "params.json: field dim"),
    ({"n_layers": True}, "params.json: field n_layers"),
    ({"norm_eps": "x"}, "params.json: field norm_eps"),
    ({"rope_theta": float("inf")}, "params.json: field rope_theta"),
    ({"n_heads": None}, "params.json: field n_heads"),
])  # fmt: skip
def test_metas_params_are_read_as_strictly_as_config_json(params, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(meta_folder(tmp_path / "m", **params))


def test_metas_params_may_name_what_changes_no_number(tmp_path):
    harmless = {
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.3,
        "max_batch_size": 32,
        "max_seq_len": 2048,
    }
    folder = meta_folder(tmp_path / "m", use_scaled_rope=False, rope_theta=500_000.0, **harmless)
    assert load(folder).config.rope_theta == 500_000


# ---- numbers that are none ----


def with_nan(number: float, row: int = 3) -> Transformer:
    model = random_model(TINY)
    model.blocks[1].feed_forward.up.weight.data[row, 5] = number
    return model


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_model_with_nan_or_infinity_is_refused_by_name(number, tmp_path):
    save(with_nan(number), tmp_path / "m")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(
            ValueError, match="m: tensor blocks.1.feed_forward.up.weight holds NaN or infinity"
        ):
            load(tmp_path / "m", dtype=dtype)
    adapter(tmp_path / "m", tmp_path / "a")
    with pytest.raises(
        ValueError, match="m: tensor blocks.1.feed_forward.up.weight holds NaN or infinity"
    ):
        load(tmp_path / "a")


def test_an_adapter_with_nan_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    save(random_model(TINY), tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match="a: tensor blocks.0.attention.query.lora_A holds NaN or infinity"
    ):
        load(tmp_path / "a")
    save_file({}, path)
    with pytest.raises(ValueError, match="an adapter without a tensor"):
        load(tmp_path / "a")


def reads_its_rows(folder):
    """NaN in one of the last rows, which are the second process's: both refuse the model."""
    join_world()
    model = train.build(TINY, Config(dtype="fp32"), CPU)
    with pytest.raises(ValueError, match="blocks.1.feed_forward.up.weight holds NaN"):
        opening.first_weights(model, 0, str(folder))


def test_all_processes_refuse_a_model_where_one_reads_nan(tmp_path):
    save(with_nan(float("nan"), row=47), tmp_path / "m")
    run_ranks(2, reads_its_rows, tmp_path / "m")


def test_training_starts_on_no_base_with_nan(tiny_run, tiny_data, tmp_path):
    save(with_nan(float("nan")), tmp_path / "base", Tokenizer(tiny_data))
    for more in ({}, {"lora_rank": 4}):
        with pytest.raises(
            ValueError, match="base: tensor blocks.1.feed_forward.up.weight holds NaN or infinity"
        ):
            tiny_run(init_from=str(tmp_path / "base"), steps=1, **more)
