"""Variants: files whose classes stand in for those of model.py."""

import ast
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro

import model
import train
from conftest import ROOT, TINY_RUN, additions, assert_same_but_for_rounding, byte_data, command, flags, run_ranks
from lib import variant_flags, variants
from lib.configs import config_from_hugging_face
from lib.errors import BadInput
from lib.packed import Documents
from lib.records import read_json
from lib.weights import read_config
from model import FeedForward, ModelConfig, causal_attention, load, plain_attention, save
from sample import Decoder, load_model

SHIPPED = sorted((ROOT / "variants").glob("*.py"))
SHAPE = dict(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=64, max_seq_len=64)
UNCHANGED = "import model\n\n\nclass FeedForward(model.FeedForward):\n    pass\n"


def of(name: str, seed: int = 0, **changes):
    """A model of a shipped variant whose weights are large enough to tell things apart."""
    config_class = variants.load(ROOT / "variants" / f"{name}.py", ModelConfig)
    net = config_class(**SHAPE | changes).build()
    torch.manual_seed(seed)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
    return net.eval()


def written(tmp_path, text: str, name: str = "mine.py") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def weights_of(folder: Path) -> dict:
    return {name: weight.detach() for name, weight in load(folder).named_parameters()}


def assert_equal(mine: dict, theirs: dict):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


IDS = torch.tensor([[(7 * place * place + 3) % 64 for place in range(24)]])


# ---- what is shipped ----


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_variant_is_short_names_its_paper_and_trains(path, tiny_run):
    source = path.read_text()
    assert len(source.splitlines()) <= 40
    assert re.search(r"(19|20)\d\d", ast.get_docstring(ast.parse(source)))
    first, last = (tiny_run(f"run{steps}", variant=str(path), steps=steps, eval_every=20) for steps in (1, 8))
    rows = [json.loads(line) for folder in (first, last) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert read_json(last / "run.json")["variant"]["sha256"] == variants.sha256(path)
    assert (last / "variant.py").read_text() == source
    # what the run's folder gives back is the variant, with or without the cache
    net, _ = load_model(str(last))
    ids = IDS % 256
    decoder = Decoder(net, 1, 24)
    pieces = [decoder.read([part.tolist()[0]])[0] for part in ids.split((5, 1, 18), 1)]
    whole = net(ids)[0]
    assert_same_but_for_rounding(torch.stack(pieces), whole[[4, 5, 23]], 10 * additions(net.config, 24))


def test_there_are_at_least_twelve():
    assert len(SHIPPED) >= 12


def test_relu2_and_gelu_have_the_papers_formula_and_as_many_parameters():
    formulas = {"relu2": lambda x: x.clamp(min=0) ** 2, "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))}
    for name, activation in formulas.items():
        layer, x = of(name).blocks[0].feed_forward, torch.randn(5, 32)
        assert_same_but_for_rounding(layer(x), activation(x @ layer.up.weight.T) @ layer.down.weight.T, 200)
        assert sum(weight.numel() for weight in layer.parameters()) == 3 * 32 * 48


def test_layernorm_is_pytorchs_and_begins_without_bias():
    norm, x = of("layernorm").norm, torch.randn(5, 32) + 3
    assert_same_but_for_rounding(norm(x), F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-5), 100)
    net = of("layernorm")
    net.init_weights()
    assert net.norm.bias.abs().max() == 0 and net.norm.weight.min() == 1


def test_post_norm_normalises_the_stream_after_each_half():
    block = of("post_norm").blocks[0]
    x, rope = torch.randn(1, 6, 32), model.rope_table(ModelConfig(**SHAPE), torch.arange(6))
    half = block.attention_norm(x + block.attention(x, rope, None, None))
    assert torch.equal(block(x, rope, None, None), block.feed_forward_norm(half + block.feed_forward(half)))


def test_parallel_reads_one_norm_and_has_no_second():
    block = of("parallel").blocks[0]
    x, rope = torch.randn(1, 6, 32), model.rope_table(ModelConfig(**SHAPE), torch.arange(6))
    normal = block.attention_norm(x)
    both = x + block.attention(normal, rope, None, None) + block.feed_forward(normal)
    assert torch.equal(block(x, rope, None, None), both)
    assert not hasattr(block, "feed_forward_norm")


def test_without_positions_the_order_of_what_came_before_does_not_matter():
    shuffled = IDS[:, [*torch.randperm(23).tolist(), 23]]
    for name, matters in (("no_positions", False), ("learned_positions", True), ("alibi", True), ("relu2", True)):
        net = of(name, num_layers=1)  # in a second layer the mask tells the order again
        same = torch.allclose(net(IDS)[0, -1], net(shuffled)[0, -1], atol=1e-4)
        assert same != matters, name


def test_learned_positions_add_a_vector_for_each_place():
    net = of("learned_positions")
    embedded = net.embed(IDS, torch.arange(24))
    assert torch.equal(embedded, net.embedding.weight[IDS] + net.position.weight[:24])


def test_alibi_lowers_the_score_by_slope_and_distance():
    """Slopes 2^(-8 h / H) (Press et al. 2021, section 3)."""
    attention = of("alibi").blocks[0].attention
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    expected = torch.empty(1, 4, 9, 8)
    for head in range(4):
        for i in range(9):
            scores = k[0, head // 2, : i + 1] @ q[0, head, i] / 8**0.5
            scores -= 2.0 ** (-8 * (head + 1) / 4) * torch.arange(i, -1, -1)
            expected[0, head, i] = scores.softmax(0) @ v[0, head // 2, : i + 1]
    assert_same_but_for_rounding(attention.attend(q, k, v, None), expected, 100)


def test_a_sliding_window_sees_window_tokens_in_each_layer():
    config_class = variants.load(ROOT / "variants" / "sliding_window.py", ModelConfig)
    net = of("sliding_window", num_layers=1, window=5)
    assert isinstance(net.config, config_class) and net.config.window == 5
    changed = IDS.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 64
    moved = (net(IDS) - net(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


def test_qk_norm_does_not_mind_how_long_queries_are():
    net = of("qk_norm")
    before = net(IDS)
    with torch.no_grad():
        net.blocks[0].attention.query.weight *= 50
    assert_same_but_for_rounding(net(IDS), before, 200 * additions(net.config, 24))  # eps counts less, too


def test_softcap_bounds_logits_and_its_losses_are_those_of_the_bounded_logits():
    net = of("softcap", cap=2.0)
    targets = IDS.roll(-1, 1).clone()
    targets[0, 3] = model.IGNORE
    logits = net(IDS)
    assert logits.abs().max() <= 2 and logits.abs().max() > 1.9
    log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    assert_same_but_for_rounding(net.log_probs(IDS, targets), log_probs, 2000)
    assert_same_but_for_rounding(net.loss(IDS, targets), -log_probs.sum(), 4000)


def test_multi_query_and_untied_are_shapes_of_llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert of("multi_query").blocks[0].attention.key.weight.shape == (8, 32)
    net = of("untied", tie_embeddings=True)
    assert net.unembedding.weight is not net.embedding.weight
    for name in ("multi_query", "untied"):
        net = of(name, tie_embeddings=True)
        save(net, tmp_path / name)
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert_same_but_for_rounding(net(IDS), theirs(IDS).logits.detach(), additions(net.config, 24))
        assert not (tmp_path / name / "variant.py").exists()
        assert type(read_config(tmp_path / name, ModelConfig)) is ModelConfig


def test_zero_init_begins_as_the_embedding_alone():
    net = of("zero_init")
    net.init_weights()
    assert torch.equal(net(IDS), net.unembedding(net.norm(net.embedding(IDS))))


# ---- a run ----


def test_a_variant_that_changes_nothing_computes_the_same_bits(tmp_path, tiny_run):
    mine = tiny_run("mine", variant=str(written(tmp_path, UNCHANGED)), steps=6)
    plain = tiny_run("plain", steps=6)
    assert_equal(weights_of(mine), weights_of(plain))
    assert not (plain / "variant.py").exists() and "variant" not in read_json(plain / "run.json")


def test_an_attention_may_be_written_from_nothing(tmp_path, tiny_run):
    text = "from torch import nn\n\n\nclass Attention(nn.Module):\n    def __init__(self, config, layer):\n"
    text += "        super().__init__()\n        self.out = nn.Linear(config.dim, config.dim, bias=False)\n\n"
    text += "    def attend(self, x):\n        return self.out(x)\n\n"
    text += "    def forward(self, x, rope, cache, documents):\n        return self.attend(x)\n"
    folder = tiny_run("run", variant=str(written(tmp_path, text)), steps=2)
    assert not any("query" in name for name in weights_of(folder))


def test_a_plain_model_beside_a_variant_stays_plain():
    variants.load(ROOT / "variants" / "relu2.py", ModelConfig)
    plain = ModelConfig(**SHAPE).build()
    assert type(plain) is model.Transformer and type(plain.blocks[0].feed_forward) is FeedForward
    assert type(model.Transformer(ModelConfig(**SHAPE)).blocks[0].feed_forward) is FeedForward
    assert sys.modules["model"] is model


def test_a_run_goes_on_with_its_copy_whatever_became_of_the_file(tmp_path, tiny_run):
    path = written(tmp_path, (ROOT / "variants" / "relu2.py").read_text())
    whole = tiny_run("whole", variant=str(path), steps=6)
    tiny_run("half", variant=str(path), steps=6, stop_at=2)
    tiny_run("half", variant=str(path), steps=6, stop_at=3)  # typed again
    path.write_text(UNCHANGED)
    with pytest.raises(BadInput, match="another variant than --variant .*mine.py; go on with --resume"):
        tiny_run("half", variant=str(path), steps=6)
    with pytest.raises(BadInput, match="another variant than no --variant"):
        tiny_run("half", steps=6)
    half = tiny_run(resume="half", out="half")
    assert_equal(weights_of(half), weights_of(whole))
    with pytest.raises(BadInput, match="another variant"):
        tiny_run("plain", steps=2)
        tiny_run("plain", steps=2, variant=str(path))


def test_what_a_failed_start_left_is_no_part_of_the_next_run(tiny_run, tmp_path):
    relu2 = str(ROOT / "variants" / "relu2.py")
    with pytest.raises(BadInput, match="--sample has"):  # after run.json was written
        tiny_run("run", variant=relu2, steps=2, sample="x" * 99)
    assert (tmp_path / "run" / "variant.py").exists()
    tiny_run("run", steps=2, stop_at=1)
    tiny_run(resume="run", out="run")
    assert not (tmp_path / "run" / "variant.py").exists()


def test_a_changed_copy_is_refused(tiny_run):
    folder = tiny_run("run", variant=str(ROOT / "variants" / "relu2.py"), steps=4, stop_at=2)
    shutil.copy(ROOT / "variants" / "gelu.py", folder / "variant.py")  # known code, but not this run's
    with pytest.raises(BadInput, match="is not the variant that the run began with"):
        tiny_run(resume="run", out="run")


def test_new_fields_of_its_config_are_flags(tiny_data, tiny_run, tmp_path, monkeypatch, capsys):
    words = flags(TINY_RUN | {"data": tiny_data, "out": "run", "steps": 2, "eval_every": 2, "compile": "off"})
    words += ["--variant", str(ROOT / "variants" / "sliding_window.py")]
    command("train.py", *words, "--window", "7", "--stop_at", "1", cwd=tmp_path)
    assert read_json(tmp_path / "run" / "run.json")["model"]["window"] == 7
    done = command("train.py", "--resume", "run", "--window", "8", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "holds a run with --window 7, not 8" in done.stderr
    tiny_run(resume="run", out="run")
    assert read_config(tmp_path / "run", ModelConfig).window == 7
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--help"])
    kind = variant_flags.read_flags(train.Config)
    with pytest.raises(SystemExit):
        tyro.cli(kind, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    helped = capsys.readouterr().out
    assert "--window INT" in helped and "tokens that a query sees, with its own" in helped
    assert "optimizer steps; the schedule ends there" in helped  # the others keep their words


def test_a_flag_that_train_py_has_already_is_refused(tmp_path):
    text = "from dataclasses import dataclass\nimport model\n@dataclass(frozen=True)\n"
    text += "class ModelConfig(model.ModelConfig):\n    epochs: int = 3\n"
    with pytest.raises(BadInput, match="--epochs is a flag of train.py already"):
        variant_flags.extended(train.Config, str(written(tmp_path, text)), "")


def test_a_model_to_begin_with_must_be_of_the_same_variant_or_plain(tiny_run):
    relu2, gelu = (str(ROOT / "variants" / f"{name}.py") for name in ("relu2", "gelu"))
    tiny_run("first", variant=relu2, steps=2)
    with pytest.raises(BadInput, match="--init_from first is of a variant: add --variant first/step_00000002/var"):
        tiny_run("second", init_from="first", steps=2)
    with pytest.raises(BadInput, match="is of a variant"):
        tiny_run("second", init_from="first", steps=2, variant=gelu)
    second = tiny_run("second", init_from="first", steps=2, variant=relu2)
    assert "feed_forward.gate" not in "".join(weights_of(second))
    tiny_run("plain", steps=2)
    third = tiny_run("third", init_from="plain", steps=2, variant=str(ROOT / "variants" / "sliding_window.py"))
    assert read_config(third, ModelConfig).window == 64
    with pytest.raises(BadInput, match="feed_forward.gate.* has no place|is missing|should be"):
        tiny_run("fourth", init_from="plain", steps=2, variant=relu2)


def test_adapters_of_a_variant_are_merged_into_it(tiny_run):
    relu2 = str(ROOT / "variants" / "relu2.py")
    tiny_run("base", variant=relu2, steps=2)
    lora = tiny_run("lora", variant=relu2, init_from="base", lora_rank=2, steps=2, eval_every=2)
    net, base = load(lora), load(lora.parent / "base")
    assert type(net.config) is type(base.config) and variants.variant_of(type(net.config))
    assert not torch.equal(net.blocks[0].feed_forward.up.weight, base.blocks[0].feed_forward.up.weight)


@pytest.mark.parametrize("name", ["alibi", "sliding_window", "no_positions", "learned_positions", "relu2"])
def test_in_packed_rows_a_variant_reads_every_document_alone(name):
    net = of(name)
    bounds = torch.tensor([0, 5, 9, 24, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(size) for size in bounds.diff().tolist()]).view(2, 24)
    ids = torch.cat((IDS, IDS.flip(1)))
    packed = net.unembedding(net.hidden(ids, None, Documents(positions, bounds))).flatten(0, 1)
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        alone = net(ids.flatten()[None, begin:end])[0]
        assert_same_but_for_rounding(packed[begin:end], alone, 10 * additions(net.config, 24))


def test_two_processes_train_a_variant_as_one_does(tiny_data, tmp_path, tiny_run, one_thread):
    path = str(ROOT / "variants" / "learned_positions.py")
    alone = tiny_run("alone", variant=path, steps=3)
    options = dict(data=(str(tiny_data),), out=str(tmp_path / "both"), variant=path, steps=3)
    run_ranks(2, train_on_ranks, TINY_RUN | options)
    mine, theirs = weights_of(tmp_path / "both"), weights_of(alone)
    assert mine.keys() == theirs.keys() and "position.weight" in mine
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-5), name


def train_on_ranks(options: dict):
    train.main(train.Config(**options))


def test_a_smoothed_loss_does_not_go_with_a_variants_own_loss(tiny_run):
    with pytest.raises(BadInput, match="--label_smoothing 0.1 does not go with a variant that has its own loss"):
        tiny_run("run", variant=str(ROOT / "variants" / "softcap.py"), label_smoothing=0.1, steps=1)


# ---- mistakes ----

MISTAKES = {
    "class FeedForward(:\n    pass\n": r"mine.py:1: SyntaxError: ",
    "from model import FeedForwrd\n": r"mine.py:1: ImportError: cannot import name 'FeedForwrd'",
    "import model\nclass FeedForwrd(model.FeedForward):\n    pass\n": r"mine.py: FeedForwrd is no part of mo",
    "import model\nclass KVCache(model.KVCache):\n    pass\n": r"mine.py: KVCache is no part of model.py that",
    "x = 1\n": r"mine.py: nothing in it stands in for a part of model.py \(ModelConfig, ",
    "import model\nclass FeedForward(model.FeedForward):\n    def forward(self, x):\n        return self.up(x)\n":
        r"RuntimeError: The size of tensor a \(32\) must match .*\(tried: width 32, ",
    "import model\nclass FeedForward(model.FeedForward):\n    def forward(self, x):\n        return self.dwn(x)\n":
        r"mine.py:4: AttributeError: .* has no attribute 'dwn'",
    "import model\nclass FeedForward(model.FeedForward):\n    def forward(self, x):\n        return x.flip(1)\n":
        r"mine.py: a token sees those after it",
    "import model\nclass Attention(model.Attention):\n    def attend(self, q, k, v, mask):\n"
    "        return model.causal_attention(q, k[:, :, -q.size(2):], v[:, :, -q.size(2):], None)\n":
        r"mine.py: read in pieces, with the cache, a text has other logits",
    "import model\nclass ModelConfig(model.ModelConfig):\n    window: int = 3\n": r"lacks @dataclass\(frozen=True\)",
    "IS_LLAMA = True\ndef rotate(x, rope):\n    return x\n": r"mine.py: it says IS_LLAMA, and LLaMA has other logits",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_in_a_variant_is_one_sentence_before_anything_is_written(text, tmp_path, tiny_run):
    path = written(tmp_path, text)
    with pytest.raises(BadInput, match=MISTAKES[text]) as caught:
        tiny_run("run", variant=str(path), steps=2)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert sys.modules["model"] is model


def test_a_variant_that_is_not_there_or_no_text_is_one_sentence(tmp_path, tiny_data, tiny_run):
    done = command("train.py", "--data", str(tiny_data), "--variant", "gone.py", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr == "train.py: gone.py: No such file or directory\n"
    (tmp_path / "odd.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="odd.py is no Python file"):
        tiny_run("run", variant=str(tmp_path / "odd.py"), steps=1)


# ---- code in a model's folder ----

STRANGE = "import model\n\nopen('ran', 'w')\n\n\nclass FeedForward(model.FeedForward):\n    pass\n"


@pytest.fixture
def strangers(tmp_path, tiny_run, monkeypatch) -> Path:
    """A run's folder as it comes from somebody else, with code that leaves a mark."""
    monkeypatch.setattr(variants, "loaded", {})
    folder = tiny_run("run", variant=str(written(tmp_path, STRANGE)), steps=2)
    (tmp_path / "ran").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(variants, "trusted", set())
    variants.loaded.clear()
    return folder


def test_code_in_somebody_elses_folder_runs_only_when_it_is_trusted(strangers, tiny_run, tmp_path):
    env, problem = {"XDG_CACHE_HOME": str(tmp_path / "another")}, "is code that was not trained here: read it, then add"
    done = command("sample.py", "--model", "run/step_00000002", cwd=tmp_path, env=env, check=False)
    assert done.returncode == 2 and f"{problem} --trust_variant" in done.stderr and done.stderr.count("\n") == 1
    for path in (strangers, strangers / "step_00000002"):
        with pytest.raises(BadInput, match=problem):
            load(path)
    with pytest.raises(BadInput, match=problem):
        tiny_run(resume="run", out="run")
    assert not (tmp_path / "ran").exists()
    command("sample.py", "--model", "run", "--max_new_tokens", "2", "--trust_variant", cwd=tmp_path, env=env)
    assert (tmp_path / "ran").exists()
    load(strangers)  # it is known from now on
    (strangers / "step_00000002" / "variant.py").write_text(STRANGE + "# changed\n")
    with pytest.raises(BadInput, match=problem):
        load(strangers)


def test_the_file_of_a_variant_must_be_there(tiny_run):
    folder = tiny_run("run", variant=str(ROOT / "variants" / "relu2.py"), steps=2)
    (folder / "step_00000002" / "variant.py").unlink()
    with pytest.raises(BadInput, match="is of a variant and variant.py is not there"):
        read_config(folder, ModelConfig)


# ---- for others ----


def test_an_export_says_that_it_is_no_llama_and_others_do_not_take_it_for_one(tiny_run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    net, tokenizer = load_model(str(tiny_run("run", variant=str(ROOT / "variants" / "sliding_window.py"), steps=2)))
    capsys.readouterr()
    save(net, tmp_path / "hf", tokenizer)
    assert "is not LLaMA any more but a variant" in capsys.readouterr().out
    again = load(tmp_path / "hf")
    assert again.config == net.config and again.config.window == 64
    assert torch.equal(again(IDS), net(IDS))
    with pytest.raises((ValueError, KeyError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = read_json(tmp_path / "hf" / "config.json")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"variant": {"windw": 3}}))
    with pytest.raises(BadInput, match="windw"):
        config_from_hugging_face(ModelConfig, tmp_path / "hf")


# ---- attention written out ----


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_written_out_is_the_fast_kernel(kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, kv_heads, 9, 16), torch.randn(2, kv_heads, 9, 16)
    assert_same_but_for_rounding(plain_attention(q, k, v, None), causal_attention(q, k, v, None), 60)
    mask = torch.zeros(2, 1, 3, 9).masked_fill(torch.rand(2, 1, 3, 9) < 0.3, -math.inf)
    mask[..., 0] = 0
    few = q[:, :, :3]
    assert_same_but_for_rounding(plain_attention(few, k, v, mask), causal_attention(few, k, v, mask), 60)
    bf16 = [tensor.bfloat16() for tensor in (q, k, v)]
    assert plain_attention(*bf16, None).dtype == torch.bfloat16
    assert (plain_attention(*bf16, None).float() - plain_attention(q, k, v, None)).abs().max() < 0.05


def test_training_with_attention_written_out_is_training(tiny_run, tmp_path):
    plain, fast = tiny_run("plain", attention="plain", steps=4), tiny_run("fast", steps=4)
    mine, theirs = weights_of(plain), weights_of(fast)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4), name
    alibi = str(ROOT / "variants" / "alibi.py")
    with pytest.raises(BadInput, match="--attention plain does not go with a variant's own attention"):
        tiny_run("both", attention="plain", variant=alibi, steps=2)


def test_attention_written_out_reads_packed_documents_alone(tmp_path, tiny_run):
    data = byte_data(tmp_path, 60)
    runs = [tiny_run(kind, attention=kind, data=str(data), pack=True, steps=3) for kind in ("plain", "fast")]
    mine, theirs = map(weights_of, runs)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4), name
