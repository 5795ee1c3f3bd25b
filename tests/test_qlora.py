"""QLoRA's recipes: values of four bits, blocks and their scales by hand, and training on what is read back."""

import doctest
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, random_model
from data import Tokenizer
from lib import lora, nf4
from lib.weights import load_weights
from model import ModelConfig, empty, save

sys.path.insert(0, str(ROOT / "recipes"))
import codes
import qlora
import qlora_formats
import study
from codes import Form

SHAPE = ModelConfig(64, 2, 2, 2, 128, vocab_size=258, max_seq_len=64, tie_embeddings=True)
# Dettmers et al. 2023, appendix E
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes has the values of scales")


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(codes)
    assert found.attempted > 0 and found.failed == 0


def test_nf4_by_its_formula_is_the_papers_list():
    assert codes.values_of("NF4").tolist() == pytest.approx([float(value) for value in NF4.split()], abs=1e-6)


@pytest.mark.parametrize("code, count", [("int4", 15), ("int8", 255), ("FP4", 15), ("FP4 E2M1", 15), ("FP4 E3M0", 15)])
def test_values_rise_from_minus_1_to_1_and_hold_0(code, count):
    values = codes.values_of(code)
    assert len(values) == count and values[0] == -1 and values[-1] == 1 and 0 in values
    assert torch.equal(values, -values.flip(0)) and (values.diff() > 0).all()
    with pytest.raises(ValueError, match="int3 is none of NF4, FP4"):
        codes.values_of("int3")


def test_a_block_is_read_back_as_by_hand():
    """Sevenths of the largest: 0.5 / 0.7 is 5 sevenths; 0.26 lies nearer to 3 sevenths of 0.7 than to 2."""
    weight = torch.tensor([[0.7, -0.5, 0.26, 0.0], [14.0, 0.9, 1.1, -3.2]])
    found = codes.restored(weight, Form("int4", 4))
    torch.testing.assert_close(found, torch.tensor([[0.7, -0.5, 0.3, 0.0], [14.0, 0.0, 2.0, -4.0]]))
    whole = codes.restored(weight, Form("int4", 8))  # one scale for all, 14, so small weights are lost
    assert whole.tolist() == [[0, 0, 0, 0], [14.0, 0.0, 2.0, -4.0]]
    assert not codes.restored(torch.zeros(2, 4), Form("NF4", 4)).any()
    with pytest.raises(ValueError, match="blocks of 3 do not divide a matrix of 8 weights"):
        codes.restored(weight, Form("int4", 3))


def test_each_weight_is_the_nearest_value_and_what_is_read_back_stays():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for code in ("NF4", "FP4", "FP4 E3M0", "int8"):
        found, values = codes.restored(weight, Form(code)), codes.values_of(code)
        scaled = weight / weight.abs().amax(1, keepdim=True)
        expected = values[(scaled[..., None] - values).abs().argmin(-1)]
        torch.testing.assert_close(found / weight.abs().amax(1, keepdim=True), expected)
        torch.testing.assert_close(codes.restored(found, Form(code)), found)


def test_on_normal_numbers_the_order_is_known_and_small_blocks_err_less():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

    def error(form: Form) -> float:
        return float((codes.restored(weight, form) - weight).norm() / weight.norm())

    by_code = [error(Form(code)) for code in ("int8", "NF4", "FP4 E2M1", "int4", "FP4", "FP4 E3M0")]
    assert by_code == sorted(by_code) and by_code[0] < 0.007
    # whole numbers err by a uniform share of a step, of which the scale has 7 or 127
    scale = float(weight.view(-1, 64).abs().amax(1).square().mean().sqrt())
    assert error(Form("int4")) == pytest.approx(scale / 7 / 12**0.5, rel=0.01)
    assert error(Form("int8")) == pytest.approx(scale / 127 / 12**0.5, rel=0.01)
    assert error(Form("NF4", 32)) < error(Form("NF4", 64)) < error(Form("NF4", 128))


def test_nf4_and_fp4_are_bitsandbytes_own(bitsandbytes):
    weight = 0.05 * torch.randn(352, 128, generator=torch.Generator().manual_seed(0))
    for code in ("NF4", "FP4"):
        packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type=code.lower())
        theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
        torch.testing.assert_close(codes.restored(weight, Form(code)), theirs, atol=1e-6, rtol=0)
    theirs = nf4.from_nf4(**nf4.to_nf4(weight), dtype=torch.float32)
    apart = (codes.restored(weight, Form("NF4", 64, True)) - theirs).abs().view(-1, 64).amax(1)
    assert (apart > 1e-6).sum() <= 2 and apart.max() < 1e-3  # of 704 scales, one near the middle of two values


def test_bits_are_those_of_what_is_kept(bitsandbytes):
    parts = nf4.to_nf4(torch.randn(128, 256))
    assert codes.size(128 * 256, Form("NF4", 64, True)) == 8 * sum(part.nbytes for part in parts.values())
    assert codes.size(2**24, Form("int8")) / 2**24 == 8.5 and codes.size(2**24, Form("FP4", 32)) / 2**24 == 5
    made = codes.quantized(random_model(SHAPE), Form("NF4", 32))
    assert made.bits == 5 and len(made.errors) == 7 * SHAPE.num_layers


def test_a_model_is_changed_in_its_blocks_alone_and_as_a_copy():
    model = random_model(SHAPE)
    made = codes.quantized(model, Form("int4"))
    for (name, before), after in zip(model.named_parameters(), made.model.parameters()):
        assert torch.equal(before, after) != (name.startswith("blocks.") and before.dim() == 2), name
    assert torch.equal(model.blocks[0].attention.query.weight, random_model(SHAPE).blocks[0].attention.query.weight)
    before, after = (each.blocks[0].attention.query.weight.detach() for each in (model, made.model))
    assert made.errors[0] == pytest.approx(float((after - before).norm() / before.norm()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of bytes."""
    made = tmp_path_factory.mktemp("qlora") / "base"
    save(random_model(SHAPE), made, Tokenizer("bytes"))
    return made


def test_adapters_on_what_is_read_back_learn_as_with_quantize_nf4(bitsandbytes, folder, tmp_path, monkeypatch):
    """The same outputs and gradients of the adapters, but for a scale or two in the middle between two values."""
    monkeypatch.setattr(qlora, "base", lambda seed: folder)
    monkeypatch.setattr(qlora, "HERE", tmp_path)
    starts = [qlora.start(arm, 0) for arm in ("LoRA", "LoRA", "QLoRA, NF4 DQ")]
    tokens, found = torch.arange(64)[None], []
    assert starts[0] == folder
    for packed, start in zip((True, False, False), starts):
        model = lora.add_adapters(empty(SHAPE, "cpu", torch.float32), 4, 8.0, list(lora.TARGETS), packed)
        load_weights(model, start)
        for number, adapter in enumerate(lora.adapters(model).values()):
            adapter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        model(tokens).square().mean().backward()
        found.append([model(tokens).detach(), *(adapter.grad for adapter in lora.adapters(model).values())])
    assert len(found[0]) == 1 + 2 * 7 * SHAPE.num_layers
    for packed, plain, read_back in zip(*found):
        assert (read_back - packed).norm() < 0.02 * (plain - packed).norm()


def test_losses_are_of_windows_and_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary():
    blank = random_model(SHAPE)
    blank.embedding.weight.data.zero_()
    tokens = torch.arange(20 * 32).view(20, 32) % 258
    assert qlora_formats.losses(blank, tokens, tokens).tolist() == pytest.approx([np.log(258)] * 20, rel=1e-5)
    model = random_model(SHAPE)
    each = qlora_formats.losses(model, tokens[:, :-1], tokens[:, 1:])
    alone = [float(model.loss(row[None, :-1], row[None, 1:]).detach()) / 31 for row in tokens]
    assert each.tolist() == pytest.approx(alone, rel=1e-4)


def test_windows_of_stories_begin_with_bos_and_are_shifted_by_one(tmp_path):
    (tmp_path / "told.txt").write_text("abc" * 1000)
    tokens, targets = qlora_formats.stories(tmp_path / "told.txt", Tokenizer("bytes"), 3)
    assert tokens.shape == targets.shape == (3, 512) and (tokens[:, 0] == Tokenizer("bytes").bos_id).all()
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="has 3,000 tokens, but 9 windows take 4,608"):
        qlora_formats.stories(tmp_path / "told.txt", Tokenizer("bytes"), 9)


def test_the_report_of_formats_compares_with_the_model_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(qlora_formats, "DOUBLE", Form("FP4", 32))  # needs no bitsandbytes
    forms = (Form("NF4"), Form("int4"), Form("FP4"), Form("FP4", 32))
    monkeypatch.setattr(qlora_formats, "FORMS", forms)
    tokens = torch.arange(4 * 33).view(4, 33) % 258
    models = [random_model(SHAPE, seed) for seed in range(2)]
    found = qlora_formats.measure(models, (tokens[:, :-1], tokens[:, 1:]))
    assert np.shape(found[Form("NF4")][0]) == (2, 14) and np.shape(found[None][1]) == (2, 4)
    report = study.Report("x", "X")
    right = {None: [[True, True, False]]} | {form: [[True, False, False]] for form in forms}
    qlora_formats.tell(report, found, right)
    qlora_formats.judge(report, found, "tiny models")
    said = capsys.readouterr().out
    assert "| NF4, 64 | 4.5 | 4.5 |" in said and "| -33.33 (" in said and said.count("Predicted: ") == 5


def test_every_model_is_asked_with_every_seed(folder, monkeypatch):
    class Asked:
        def __init__(self, run, data):
            self.draw = np.random.default_rng(0)

        def gold(self):
            return np.zeros(5, int)

        def logprobs(self, model):
            return -self.draw.random((5, 4))

    forms = {"QLoRA, NF4": Form("NF4"), "QLoRA, FP4": Form("FP4")}
    monkeypatch.setattr(qlora, "base", lambda seed: folder)
    monkeypatch.setattr(qlora, "tuned", lambda arm, seed: folder)
    monkeypatch.setattr(qlora, "Questions", Asked)
    monkeypatch.setattr(qlora, "QLORA", forms)
    monkeypatch.setattr(qlora, "ARMS", ("all weights", "LoRA", *forms))
    nats, right = qlora.answers(qlora.Config(seeds=2))
    assert list(nats) == ["base", *qlora.ARMS, "LoRA, then NF4", "LoRA, then FP4"]
    assert all(np.shape(nats[name]) == np.shape(right[name]) == (2, 5) for name in nats)
