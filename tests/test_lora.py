"""LoRA and QLoRA: what is trained, what is kept, and that PEFT reads what is written here, and the other way round."""

import dataclasses
import json
import math
import os
import sys

import pytest
import torch

import model as module
import sample
import simulate
import train
from conftest import TINY_RUN, additions, assert_same_but_for_rounding, forecast_of, random_model, run_ranks
from data import Mixture
from lib import dropout, forecast, lora, nf4, planning, weights
from lib.lora import TARGETS, FrozenLinear, adapters
from model import SIZES, ModelConfig, Transformer, load, save
from test_train import log, micro_batch, read_checkpoint, rows, same_bits, world  # noqa: F401
from train import Config

CPU = torch.device("cpu")
SHAPE = ModelConfig(64, 2, 4, 2, 128, vocab_size=259, max_seq_len=32)  # 259: bytes
LORA = dict(lora_rank=4, lora_alpha=8.0, weight_decay=0.0)
with_and_without_nf4 = pytest.mark.parametrize("quantize", ["none", "nf4"])
TOKENS = torch.randint(259, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def bitsandbytes_where_needed(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes makes NF4")


def gentle_model(config=SHAPE) -> Transformer:
    """Random weights as large as those of trained models."""
    model = random_model(config)
    for p in model.parameters():
        p.data.mul_(0.3 if p.dim() > 1 else 1)
    return model


@pytest.fixture
def base(tiny_data, tmp_path):
    """A Hugging Face folder to adapt, with the tokenizer of the tests' data."""
    from data import Tokenizer

    save(gentle_model(), tmp_path / "base", Tokenizer(tiny_data))
    return tmp_path / "base"


def beside(base, run=None, rank=4, alpha=8.0, targets=tuple(TARGETS), nf4=False) -> Transformer:
    """The base with adapters beside it as in training: zero, or those of a run."""
    model = lora.add_adapters(module.empty(SHAPE, "cpu", torch.float32), rank, alpha, targets, nf4)
    weights.load_weights(model, base)
    learned = weights.read_adapter(run, ModelConfig).tensors if run else {}
    assert not run or learned.keys() == adapters(model).keys()
    for name, p in adapters(model).items():
        p.data.copy_(learned.get(name, torch.zeros_like(p)))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


def build(base, quantize="none", **flags) -> Transformer:
    """What train.py trains, spread over the ranks of the world."""
    model = train.build(SHAPE, Config(dtype="fp32", quantize=quantize, **LORA | flags), CPU)
    weights.load_weights(model, base)
    lora.init_adapters(model, 0)
    return model


# ---- the module ----


def test_an_adapted_matrix_computes_what_the_paper_says():
    """h = W x + (alpha / rank) B A x, and its gradients; equation 3 of Hu et al. 2021."""
    linear = torch.nn.Linear(12, 8, bias=False)
    adapted, x = FrozenLinear(linear, 3, 6.0, False), torch.randn(5, 12)
    assert torch.equal(adapted(x), linear(x))
    torch.nn.init.normal_(adapted.lora_A), torch.nn.init.normal_(adapted.lora_B)
    w, a, b = (t.detach().clone().requires_grad_() for t in (linear.weight, adapted.lora_A, adapted.lora_B))
    expected = x @ (w + 6.0 / 3 * b @ a).T
    torch.testing.assert_close(adapted(x), expected)
    expected.square().sum().backward()
    adapted(x).square().sum().backward()
    assert_same_but_for_rounding(adapted.lora_A.grad, a.grad, 12 + 3 + 8 + 5)
    assert_same_but_for_rounding(adapted.lora_B.grad, b.grad, 12 + 3 + 8 + 5)
    assert linear.weight.grad is None


# ---- dropout ----


def adapted_and_chosen(share: float, numbers=range(8), seed=0, rows=8) -> FrozenLinear:
    """A matrix of zeros with an adapter that gives its input back, all but what is left out."""
    part = FrozenLinear(torch.nn.Linear(64, 64, bias=False), 64, 64.0, False)
    with torch.no_grad():
        part.weight.zero_(), part.lora_A.copy_(torch.eye(64)), part.lora_B.copy_(torch.eye(64))
    model = torch.nn.ModuleDict({"query": part})
    tokens = torch.zeros(rows, 50, dtype=torch.long)
    lora.choose_dropped(model, train.Batch(tokens, tokens, None, numbers), Config(lora_dropout=share, seed=seed))
    return part


def mask_of(*args, **options) -> torch.Tensor:
    """Which of (B, 50, 64) inputs are left out."""
    keys = adapted_and_chosen(*args, **options).keys
    return ~dropout.kept(keys, 50, 64, args[0])


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout_leaves_out_its_share_and_what_stays_counts_as_much_more(share):
    part, x = adapted_and_chosen(share), torch.randn(8, 50, 64)
    y = part(x)
    gone = y == 0
    torch.testing.assert_close(y[~gone], x[~gone] / (1 - share))
    deviation = (share * (1 - share) / gone.numel()) ** 0.5
    assert abs(gone.double().mean() - share) < 4 * deviation
    for axes in ((1, 2), (0, 2), (0, 1)):  # in every row, at every place, in every channel
        means = gone.double().mean(axes)
        assert means.std().item() == pytest.approx(deviation * len(means) ** 0.5, rel=0.5)
    with torch.no_grad():
        torch.testing.assert_close(part(x), x)  # no gradient, no dropout


def test_what_is_left_out_depends_on_seed_number_matrix_place_and_channel_alone():
    mask = mask_of(0.3)
    assert torch.equal(mask, torch.cat((mask_of(0.3, range(3), rows=3), mask_of(0.3, range(3, 8), rows=5))))
    first, second = dropout.row_keys(["blocks.0.query", "blocks.1.query"], range(2), 2, 0)
    assert len({*first, *second}) == 4
    for other in (mask_of(0.3, range(1, 9)), mask_of(0.3, seed=1), mask.roll(1, 0), mask.roll(1, 1), mask.roll(1, 2)):
        both = (mask & other).double().mean().item()
        assert both == pytest.approx(0.09, rel=0.06)  # independent of each other
    pairs = dropout.row_keys(["query"], range(4), 8, 0)
    assert len(set(pairs[0])) == 8, "both answers of a pair have masks of their own"
    longer = dropout.kept(adapted_and_chosen(0.3).keys, 99, 64, 0.3)
    assert torch.equal(~longer[:, :50], mask), "padding at the end changes nothing"


def test_an_adapter_with_dropout_has_the_gradient_of_its_formula():
    part, x = adapted_and_chosen(0.4), torch.randn(8, 50, 64, requires_grad=True)
    torch.nn.init.normal_(part.lora_A), torch.nn.init.normal_(part.lora_B), torch.nn.init.normal_(part.weight)
    part(x).square().sum().backward()
    w, a, b, other = (t.detach().clone().requires_grad_() for t in (part.weight, part.lora_A, part.lora_B, x))
    (other @ w.T + other * ~mask_of(0.4) / 0.6 @ a.T @ b.T).square().sum().backward()
    for mine, theirs in ((part.lora_A.grad, a.grad), (part.lora_B.grad, b.grad), (x.grad, other.grad)):
        assert_same_but_for_rounding(mine, theirs, 3 * 64 + 8 * 50)


def test_dropout_is_resumed_exactly_divided_freely_and_absent_from_validation(tiny_run, base):
    options = dict(init_from=str(base), steps=7, batch_size=4, lora_dropout=0.3, pack=True, **LORA)
    straight = tiny_run("straight", **options)
    tiny_run("cut", **options, stop_at=3)
    assert same_bits(tiny_run(resume="cut"), straight)
    assert log(tiny_run("again", **options, checkpointing="full"), "loss") == log(straight, "loss")
    assert log(tiny_run("parts", **options, micro_batch=1), "loss") == pytest.approx(log(straight, "loss"), rel=1e-5)
    plain = tiny_run("plain", **options | dict(lora_dropout=0.0))
    assert log(plain, "loss")[0] == pytest.approx(log(straight, "loss")[0], rel=1e-6)  # B is still zero
    assert abs(log(plain, "loss")[-1] - log(straight, "loss")[-1]) > 1e-4
    assert log(straight, "val_loss")[-1] == pytest.approx(val_loss(straight, options), rel=1e-5)
    settings = json.loads((straight / "step_00000007" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.3


def val_loss(run, options: dict) -> float:
    """Of the merged model, which has no dropout."""
    model = load(run)
    val = Mixture(tuple(json.loads((run / "run.json").read_text())["config"]["data"]), "val", 32, True)
    sums = torch.zeros(2, dtype=torch.float64)
    config = Config(**TINY_RUN | dict(data=val.folders))
    for _, batch, _ in val.validation(config, 0, 1):
        batch = batch.to(CPU)
        with torch.no_grad():
            loss = model.loss(batch.tokens, batch.targets, batch.documents)
        sums += torch.tensor([loss.item(), (batch.targets != module.IGNORE).sum().item()])
    return (sums[0] / sums[1]).item()


def test_two_processes_drop_as_one(base, tiny_data, tmp_path):
    shape = dict.fromkeys(("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"), 0) | {"size": Config.size}
    options = TINY_RUN | shape | LORA | dict(data=(str(tiny_data),), init_from=str(base), lora_dropout=0.3, steps=6)
    for ranks in (1, 2):
        run_ranks(ranks, train_here, tmp_path, options | {"out": str(ranks)})
    for field in ("loss", "grad_norm", "val_loss"):
        assert log(tmp_path / "2", field) == pytest.approx(log(tmp_path / "1", field), rel=1e-5)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch.tokens, batch.targets, batch.documents).backward()
    return {name: p.grad.full_tensor().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "full"])
def test_what_is_computed_again_or_compiled_leaves_out_the_same(mode, world):  # noqa: F811
    """All blocks share one compiled graph, but the first, whose input needs no gradient."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def found(mode: str, compiled: bool) -> dict[str, torch.Tensor]:
        config = Config(dtype="fp32", lora_dropout=0.3, checkpointing=mode, **LORA)
        model = train.build(dataclasses.replace(SHAPE, num_layers=4), config, CPU)
        model.init_weights(0)
        if compiled:
            torch.compiler.reset()
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend=compiler, fullgraph=True)
        lora.choose_dropped(model, batch, config)
        return gradients(model, batch)

    batch = micro_batch(rows(length=32))._replace(numbers=range(4, 8))
    expected, again, compiled = found("none", False), found(mode, False), found(mode, True)
    assert len(graphs) == 2 and len(expected) == 4 * 7 * 2
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(again[name], gradient)
        torch.testing.assert_close(compiled[name], gradient)


# Dettmers et al. 2023, appendix E
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def test_nf4_is_the_papers_and_bitsandbytes_own():
    from bitsandbytes import functional

    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    parts = nf4.to_nf4(weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nf4.from_nf4(**parts, dtype=torch.float32), functional.dequantize_4bit(packed, state))

    values, largest = torch.tensor([float(v) for v in NF4.split()]), weight.unflatten(1, (-1, 64)).abs().amax(-1)
    nearest = ((weight.unflatten(1, (-1, 64)) / largest[..., None])[..., None] - values).abs().argmin(-1).flatten(1)
    codes = torch.stack((parts["codes"] >> 4, parts["codes"] & 15), -1).flatten(1)
    assert torch.equal(codes.long(), nearest)
    exact = (values[nearest].unflatten(1, (-1, 64)) * largest[..., None]).flatten(1)
    torch.testing.assert_close(nf4.from_nf4(**parts, dtype=torch.float32), exact, atol=1e-3, rtol=0)
    assert sum(part.nbytes for part in parts.values()) / weight.numel() == pytest.approx(0.5 + 1 / 64, abs=3e-3)


def test_a_missing_bitsandbytes_is_said_in_a_sentence(tiny_run, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        tiny_run(init_from=str(base), quantize="nf4", **LORA)


def test_the_product_with_an_nf4_matrix_has_the_gradient_of_one_with_the_unpacked_matrix():
    parts = nf4.to_nf4(torch.randn(48, 128))
    x = torch.randn(2, 5, 128, requires_grad=True)
    nf4.nf4_product(x, *parts.values(), False).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ nf4.from_nf4(**parts, dtype=torch.float32).T).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_a_new_adapter_is_drawn_as_large_as_pefts_is():
    """PEFT draws A by kaiming_uniform_(a=sqrt(5)), and leaves B at zero."""
    model = Transformer(ModelConfig(96, 2, 4, 2, 320, 259))
    lora.add_adapters(model, 64, 8.0, list(TARGETS), False)
    lora.init_adapters(model, 0)
    for name, p in adapters(model).items():
        theirs = torch.nn.init.kaiming_uniform_(torch.empty_like(p), a=math.sqrt(5))
        if name.endswith("lora_A"):
            assert p.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
            assert abs(p.mean()) < 0.1 * p.std()
        else:
            assert not p.any()


# ---- training ----


@with_and_without_nf4
def test_only_adapters_have_gradients_and_moments_and_the_base_keeps_every_bit(quantize, world, base):  # noqa: F811
    model = build(base, quantize)
    before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    names = adapters(model).keys()
    assert len(names) == 2 * 7 * 2
    plain = load(base)
    expected = logits(plain if quantize == "none" else beside(base, nf4=True))
    assert torch.equal(logits(model), expected), "the first step starts from the base"
    (optimizer,) = train.make_optimizers(model, Config(**LORA))
    assert len(optimizer.state) == len(names)
    for _ in range(3):
        batch = micro_batch(rows(length=32))
        model.zero_grad()
        train.train_step(model, [optimizer], [batch], 1e-2, Config(grad_clip=1e9), train.Guard(6.0, CPU))
    model(batch.tokens, batch.targets).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name in names)
        assert torch.equal(p.full_tensor(), before[name]) == (name not in names)
    with lora.without_adapters(model):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_only_the_chosen_matrices_get_adapters(world, base):  # noqa: F811
    names = adapters(build(base, lora_targets="query,down"))
    assert {name.split(".")[3] for name in names} == {"query", "down"} and len(names) == 2 * 2 * 2


def test_frozen_weights_kept_in_bf16_train_as_in_fp32(tiny_run, base, monkeypatch):
    options = dict(init_from=str(base), steps=6, dtype="bf16", **LORA)
    kept = tiny_run("bf16", **options)
    monkeypatch.setattr(Transformer, "to", lambda model, dtype: model)
    assert log(tiny_run("fp32", **options), "loss") == log(kept, "loss")


@with_and_without_nf4
def test_a_run_resumes_exactly_and_keeps_only_adapters(quantize, tiny_run, base):
    options = dict(init_from=str(base), steps=12, quantize=quantize, **LORA)
    straight = tiny_run("straight", **options)
    tiny_run("cut", stop_at=5, **options)
    assert same_bits(tiny_run(resume="cut"), straight)
    assert log(straight, "loss")[-1] < log(straight, "loss")[0]
    trained = {name for name in read_checkpoint(straight) if name.startswith("model.")}
    assert trained == {f"model.{name}" for name in adapters(beside(base))}


def train_here(folder, options: dict):
    os.chdir(folder)
    train.main(Config(**options))


@with_and_without_nf4
def test_two_processes_train_as_one(quantize, base, tiny_data, tmp_path):
    shape = dict.fromkeys(("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"), 0) | {"size": Config.size}
    options = TINY_RUN | shape | LORA | dict(data=(str(tiny_data),), init_from=str(base), quantize=quantize, steps=8)
    for ranks in (1, 2):
        run_ranks(ranks, train_here, tmp_path, options | {"out": str(ranks)})
    for field in ("loss", "val_loss"):
        assert log(tmp_path / "2", field) == pytest.approx(log(tmp_path / "1", field), abs=1e-4)
    first = [weights.read_adapter(tmp_path / ranks / "step_00000000", ModelConfig).tensors for ranks in "12"]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert all(t.any() == name.endswith("lora_A") for name, t in first[0].items())


def test_qlora_keeps_less_than_a_quarter_of_what_training_all_weights_does_in_nf4(world, tmp_path):  # noqa: F811
    """Weights, gradients and moments."""
    shape = ModelConfig(256, 4, 4, 4, 704, vocab_size=512, max_seq_len=32)
    save(gentle_model(shape), tmp_path / "large")

    def kept(**flags) -> int:
        config = Config(dtype="fp32", **flags)
        model = train.build(shape, config, CPU)
        weights.load_weights(model, tmp_path / "large")
        optimizers, batch = train.make_optimizers(model, config), micro_batch(rows(length=32))
        model(batch.tokens, batch.targets).backward()
        state = [t for optimizer in optimizers for moments in optimizer.state.values() for t in moments.values()]
        return sum(t.nbytes for p in model.parameters() for t in (p, p.grad) if t is not None) + sum(
            t.nbytes for t in state
        )

    assert kept(lora_rank=8, quantize="nf4") < kept() / 4


def test_matrices_are_packed_as_they_are_read_and_never_all_unpacked_in_nf4(tmp_path):
    shape = ModelConfig(256, 12, 4, 4, 704, vocab_size=512, max_seq_len=32)
    save(gentle_model(shape), tmp_path / "large")
    with torch.device("meta"):
        model = lora.add_adapters(Transformer(shape), 4, 8.0, list(TARGETS), True)
    with simulate.Allocated() as allocated:
        model.to_empty(device="cpu")
        held = allocated.now
        weights.load_weights(model, tmp_path / "large")
    whole = 4 * planning.count_parameters(shape)
    assert held < whole / 3 and allocated.peak < held + whole / 8


# ---- forecast ----


@pytest.mark.parametrize("size, options", [
    ("15M", dict(micro_batch=8, batch_size=8, seq_len=256, gpus=1)),
    ("15M", dict(micro_batch=8, batch_size=32, seq_len=256, gpus=2, lora_targets="query,value")),
    ("15M", dict(micro_batch=8, batch_size=8, seq_len=256, gpus=1, lora_dropout=0.1)),
    ("15M", dict(micro_batch=8, batch_size=8, seq_len=256, gpus=1, lora_dropout=0.1, checkpointing="full")),
    pytest.param("1.1B", dict(micro_batch=2, batch_size=32, seq_len=2048, gpus=8, quantize="nf4",
                              checkpointing="full"), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_forecast_of_memory_is_within_a_tenth_of_a_simulation(size, options):
    config = Config(**dict(dtype="bf16", compile="off", lora_rank=16) | options)
    expected = sum(forecast_of(SIZES[size], config, config.gpus, compiled=False).values())
    assert expected == pytest.approx(simulate.peak(SIZES[size], config, config.gpus, fake=True), rel=0.1)


@with_and_without_nf4
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("targets", [",".join(TARGETS), "query,value", "gate,up", "gate", "out", "down"])
def test_the_forecast_knows_what_a_block_keeps_and_no_unpacked_matrix_is_kept(targets, share, compiled, quantize):
    model, rope = beside_random(targets.split(","), quantize == "nf4"), module.rope_table(SHAPE, torch.arange(32))
    batch = train.Batch(TOKENS[:1], TOKENS[:1], None, range(1))
    lora.choose_dropped(model, batch, Config(lora_dropout=share))
    block = model.blocks[0]
    torch.compiler.reset()
    how = dict(backend="aot_eager_decomp_partition", fullgraph=True)
    forward = torch.compile(block.forward, **how) if compiled else block.forward
    x = torch.randn(1, 32, 64, requires_grad=True) * 1.0
    keys = [part.keys for part in block.modules() if getattr(part, "keys", None) is not None]
    kept = simulate.kept_for_backward(lambda: forward(x, rope, None, None), (*block.parameters(), *rope, *keys))
    assert kept / 32 == forecast.kept_bytes(SHAPE, "none", compiled, 4, 4, targets, share > 0)


def beside_random(targets: list[str], nf4: bool) -> Transformer:
    model = lora.add_adapters(module.empty(SHAPE, "cpu", torch.float32), 4, 8.0, targets, nf4)
    weights.fill(model, iter(gentle_model().state_dict().items()), None)
    return model


def test_a_plan_counts_frozen_weights_once_and_no_gradients_of_them():
    shape, tokens = SIZES["7B"], 512
    full, frozen = (planning.flops_per_token(shape, tokens, frozen) for frozen in (False, True))
    assert full - frozen == 2 * planning.count_parameters(shape)
    config = Config(size="7B", seq_len=tokens, batch_size=8, micro_batch=1, lora_rank=8, dtype="bf16", gpus=8)
    assert forecast_of(shape, config, 8, True)["weights"] == pytest.approx(2 * 6.74e9 / 8, rel=0.02)


# ---- merging and exchange ----


@with_and_without_nf4
def test_merged_weights_give_the_logits_of_base_and_adapter(quantize, tiny_run, base):
    run = tiny_run(init_from=str(base), steps=10, quantize=quantize, **LORA)
    merged = logits(load(run))
    assert (merged - logits(load(base))).abs().max() > 0.01
    expected = logits(beside(base, run, nf4=quantize == "nf4"))
    assert_same_but_for_rounding(merged, expected, additions(SHAPE, 32))
    sample.main(sample.Config(model=str(run), export="exported"))
    assert torch.equal(logits(load("exported")), merged)
    assert torch.equal(logits(sample.load_model(str(run))[0]), merged)


def from_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_an_adapter_of_a_run_loads_in_peft_with_the_same_logits(tiny_run, base):
    peft = pytest.importorskip("peft")
    flags = dict(lora_targets="query,key,out,down", lora_dropout=0.1)
    run = tiny_run(init_from=str(base), steps=10, **flags, **LORA)
    sample.main(sample.Config(model=str(run), export_adapter="adapter"))
    assert peft.PeftConfig.from_pretrained("adapter").lora_dropout == 0.1
    assert {path.name for path in (run.parent / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.bytes"
    }  # fmt: skip
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(from_transformers(base), "adapter")(TOKENS).logits
    assert_same_but_for_rounding(logits(load(run)), theirs, additions(SHAPE, 32))
    assert_same_but_for_rounding(logits(load("adapter")), theirs, additions(SHAPE, 32))
    with pytest.raises(ValueError, match="adapter exists; choose another folder"):
        sample.main(sample.Config(model=str(run), export_adapter="adapter"))
    with pytest.raises(ValueError, match="no adapter here"):
        sample.main(sample.Config(model=str(base), export_adapter="another"))


def peft_adapter(base, folder, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["k_proj", "v_proj", "up_proj"]) | options)
    model = peft.get_peft_model(from_transformers(base), config).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    model.save_pretrained(folder)
    return model


def test_an_adapter_of_peft_loads_here_with_the_same_logits_and_trains_on(tiny_run, base, tmp_path):
    theirs = peft_adapter(base, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert_same_but_for_rounding(logits(load(tmp_path / "theirs")), expected, additions(SHAPE, 32))
    assert sample.load_model(str(tmp_path / "theirs"))[1].name == "bytes"  # the tokenizer of the base
    run = tiny_run(init_from=str(tmp_path / "theirs"), steps=2, **LORA)  # adapters on adapters
    assert (logits(load(run)) - expected).abs().max() > 1e-4
    torch.testing.assert_close(logits(load(run / "step_00000002")), logits(load(run)))


@pytest.mark.parametrize("option, value", [("use_dora", True), ("use_rslora", True), ("bias", "all")])
def test_an_adapter_that_is_not_plain_lora_is_refused(option, value, base, tmp_path):
    peft_adapter(base, tmp_path / "theirs", **{option: value})
    with pytest.raises(ValueError, match=f"an adapter with {option} {value} cannot be read"):
        load(tmp_path / "theirs")


def test_an_adapter_that_does_not_fit_its_base_is_refused(tiny_run, base, tmp_path):
    peft_adapter(base, tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(ValueError, match=r"'s adapter \(4, 64\) does not fit \((32|128), 64\)"):
        load(tmp_path / "theirs")
    save(gentle_model(ModelConfig(64, 1, 4, 2, 128, vocab_size=259, max_seq_len=32)), tmp_path / "smaller")
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "smaller")}))
    with pytest.raises(ValueError, match="tensor blocks.1.* has no place in this model"):
        load(tmp_path / "theirs")


def test_a_run_whose_base_is_gone_or_another_says_so(tiny_run, base):
    run = tiny_run(init_from=str(base), steps=4, stop_at=2, **LORA)
    base.rename(base.with_name("moved"))
    for action in (lambda: load(run), lambda: tiny_run(resume="run")):
        with pytest.raises(ValueError, match="base model .*base is not there; base_model_name_or_path"):
            action()
    other = gentle_model()
    other.blocks[1].feed_forward.up.weight.data[0, 0] += 1e-3
    save(other, base)
    for action in (lambda: load(run), lambda: tiny_run(resume="run")):
        with pytest.raises(ValueError, match="holds other weights than those it was trained on"):
            action()


def test_a_base_may_be_a_run_and_stays_the_checkpoint_it_was(tiny_run):
    first = tiny_run("first", steps=4, num_heads=4, dim=64, ffn_dim=128)
    run = tiny_run("second", init_from="first", steps=3, **LORA)
    before = logits(load(run))
    tiny_run("first", steps=4, num_heads=4, dim=64, ffn_dim=128)
    assert torch.equal(logits(load(run)), before)
    assert json.loads((run / "run.json").read_text())["adapter"]["base_model_name_or_path"] == str(
        first / "step_00000004"
    )


@pytest.mark.parametrize("flags, message", [
    (dict(lora_rank=4), "--lora_rank 4 needs --init_from"),
    (dict(lora_rank=-1), "--lora_rank -1 must be a number that is not negative"),
    (dict(lora_alpha=0.0), "--lora_alpha 0.0 must be above 0"),
    (dict(lora_rank=4, lora_targets="query,proj"), "'proj' is not one of query, key, value, out, gate, up, down"),
    (dict(lora_rank=4, lora_dropout=1.0), "--lora_dropout 1.0 must lie between 0 and 1"),
    (dict(lora_rank=4, lora_dropout=-0.1), "--lora_dropout -0.1 must lie between 0 and 1"),
    (dict(lora_dropout=0.1), "--lora_dropout 0.1 needs --lora_rank"),
    (dict(quantize="nf4"), "--quantize nf4 needs --lora_rank"),
    (dict(lora_rank=4, checkpointing="selective"), "--checkpointing selective does not go with --lora_rank"),
])  # fmt: skip
def test_flags_that_do_not_fit_together_are_refused(flags, message, tiny_run):
    with pytest.raises(ValueError, match=message):
        tiny_run(**flags)


def test_a_width_that_blocks_do_not_divide_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="blocks of 64, which do not divide a width of 172"):
        lora.add_adapters(Transformer(SIZES["260K"]), 4, 8.0, list(TARGETS), True)
