"""recipes/incite.py: rounding that is fp16's and bf16's, its scale, and measures on numbers worked by hand."""

import doctest
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, byte_data, random_model
from data import Dataset, Tokenizer
from lib import variants
from model import ModelConfig

sys.path.insert(0, str(ROOT / "recipes"))
import incite
import measures
import study

TINY = dict(dim=16, num_layers=4, num_heads=2, num_kv_heads=2, ffn_dim=24, vocab_size=258, max_seq_len=256)
IDS = torch.randint(258, (3, 65), generator=torch.Generator().manual_seed(0))


def rounded(mantissa: int, scale: float = 1.0):
    """The model that recipes/rounded.py trains, with the weights of the plain one."""
    config_class = variants.load(ROOT / "recipes" / "rounded.py", ModelConfig)
    model = config_class(**TINY, tie_embeddings=True, mantissa=mantissa, loss_scale=scale).build()
    model.load_state_dict(plain().state_dict())
    return model


def plain():
    return random_model(ModelConfig(**TINY, tie_embeddings=True))


def gradient(model, targets: float = 192.0, scale: float = 1.0) -> torch.Tensor:
    """Of the loss divided by so many targets, all parameters in a row; scale is taken off by hand."""
    (model.loss(IDS[:, :-1], IDS[:, 1:]) / targets).backward(torch.tensor(scale))
    return torch.cat([weight.grad.float().flatten() for weight in model.parameters()]) / scale


def test_without_gradients_it_is_the_plain_model():
    for model in (rounded(7), rounded(10, 4096), rounded(23)):
        with torch.no_grad():
            assert torch.equal(model(IDS), plain()(IDS))
            assert torch.equal(model.log_probs(IDS[:, :-1], IDS[:, 1:]), plain().log_probs(IDS[:, :-1], IDS[:, 1:]))


def test_a_scale_goes_in_and_comes_out_again():
    exact = gradient(plain())
    for scale in (1, 4096):
        torch.testing.assert_close(gradient(rounded(23, scale)), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mantissa, dtype, scale", [(10, torch.float16, 256.0), (7, torch.bfloat16, 1.0)])
def test_it_rounds_as_much_as_arithmetic_in_that_type_does(mantissa, dtype, scale):
    """The model itself in fp16 or bf16, against fp32: gradients are as far off, by a factor of 2 at most."""
    exact = gradient(plain())
    real = (gradient(plain().to(dtype), scale=scale) - exact).norm()
    mine = (gradient(rounded(mantissa, scale)) - exact).norm()
    assert 0.5 < mine / real < 2 and real < 0.2 * exact.norm()


def test_small_gradients_are_lost_without_a_scale_and_kept_with_it():
    """The control: a loss divided by 2^20 as if it had that many targets more; bf16 has the exponents of fp32."""
    targets = 192.0 * 2**20
    exact = gradient(plain(), targets)

    def lost(mantissa: int, scale: float) -> float:
        return float((gradient(rounded(mantissa, scale), targets) - exact).norm() / exact.norm())

    assert lost(10, 1.0) > 0.9 and lost(10, 2.0**20) < 0.05 and lost(7, 1.0) < 0.2


def test_what_fp16_flushes_of_the_logits_gradient(tmp_path, monkeypatch):
    """A model for which all 258 tokens are as likely: 1/258 less 1 for the target, over 64 targets, times a scale."""
    data, model = Dataset(byte_data(tmp_path, 30), "train", 64), plain()
    torch.nn.init.zeros_(model.embedding.weight)
    monkeypatch.setattr(measures, "SCALES", (2.0**-10, 2.0**-12, 2.0**-20))  # fp16 rounds 2^-25 and less to 0
    found = measures.flushed(model, data, 1)
    assert 2**-10 / 258 / 64 > 2**-25 > 2**-12 / 258 / 64 and 257 / 258 / 64 * 2**-20 < 2**-25
    assert found["logits"] == pytest.approx([0, 100 * 257 / 258, 100])
    assert set(found) == {"logits", "weights", *(f"after layer {n}" for n in range(1, 5))}


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(measures)
    assert found.attempted > 0 and found.failed == 0


def test_agreement_is_1_of_a_measure_with_itself_and_minus_1_with_its_opposite():
    """Seven checkpoints, of which each answers more questions than the one before; by chance it is near 0."""
    draw = np.random.default_rng(0)
    rising = np.array([[[place < 10 * step for place in range(80)] for step in range(1, 8)]] * 2, float)
    same, opposite = measures.agreement(rising, rising, 50), measures.agreement(rising, 1 - rising, 50)
    assert same.mean == 1 and same.seeds == (1, 1) and same.low > 0.9
    assert opposite.mean == -1 and opposite.high < -0.9
    chance = [measures.tau(*draw.random((2, 7))) for _ in range(400)]
    assert abs(np.mean(chance)) < 0.06 and max(chance) > 0.5  # so one run says little


def test_bits_and_next_words(tmp_path, monkeypatch):
    bytes_, data, model = Tokenizer("bytes"), Dataset(byte_data(tmp_path, 30), "train", 64), plain()
    torch.nn.init.zeros_(model.embedding.weight)
    expected = np.log2(258) / data.bytes_per_target
    assert measures.window_bits(model, data, 20) == pytest.approx(np.full(20, expected), rel=1e-5)
    monkeypatch.setattr(measures, "written", lambda model, tokenizer, prompts, size: [" one two", "oneself", "", "b"])
    rows = [{"context": "a", "choices": ["x", choice], "answer": 1} for choice in ("one too", "one", "one", "b c")]
    assert measures.next_words(None, bytes_, rows).tolist() == [1, 0, 0, 1]


BITS = {"fp32": 2.0, "bf16": 2.002, "fp16, scaled": 2.03, "fp16": 2.1}


@pytest.mark.parametrize("most", [(0.5, 0.2), (0.27, 0.01)])
def test_arithmetics_are_compared_against_their_margins(most, tmp_path, monkeypatch, capsys):
    """fp16 with a scale is made 0.03 bits worse than bf16, 1 point better by likelihood and 5 worse by writing.

    Where fp32 is hardly better than chance, the last two are not judged.
    """
    noise = np.random.default_rng(0).normal(0, 1e-3, 200)
    rights = {"bf16": (0.50, 0.20), "fp16, scaled": (0.51, 0.15)}

    def measured(place: int):
        return lambda run, *_: np.full(200, rights.get(str(run), most)[place]) + noise * (str(run) == "bf16")

    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(incite, "arm_of", lambda name, seed, steps: Path(name))
    monkeypatch.setattr(incite, "load_model", lambda run: (Path(run), None))
    monkeypatch.setattr(incite, "window_bits", lambda run, *_: BITS[str(run)] + noise)
    monkeypatch.setattr(incite, "by_likelihood", measured(0))
    monkeypatch.setattr(incite, "next_words", measured(1))
    for name in ("once", "read_lines", "Dataset", "text"):
        monkeypatch.setattr(incite, name, lambda *words: None)
    incite.by_arithmetic(study.Report("incite", "A title"), incite.Config(seeds=2))
    said = capsys.readouterr().out
    verdicts = [line.rpartition("**")[0].rpartition("**")[2] for line in said.splitlines()
                if line.startswith("- Predicted")]  # fmt: skip
    yes, no, able = "confirmed in direction", "refuted in direction", most == (0.5, 0.2)
    assert verdicts == [no, yes, yes] + [yes, no] * able
    assert said.count("nothing can be said") == 2 * (not able)


def test_protocols_are_compared_at_every_checkpoint(monkeypatch, tmp_path, capsys):
    right = {step: (np.arange(20) < step, np.arange(20) < step // 2) for step in (6, 12, 18)}
    monkeypatch.setattr(incite.attention, "model_of", lambda width, kind, seed: Path(f"{width}_{kind}_{seed}"))
    monkeypatch.setattr(incite, "read_lines", lambda path: [{"subject": "new wording"}] * 30)
    monkeypatch.setattr(incite, "answered", lambda run, lines, out: right if len(lines) == 20 else None)
    incite.by_protocol(study.Report("incite", "A title"), incite.Config(seeds=2, asked=20))
    said = capsys.readouterr().out
    assert "| 12 | 60.0, 60.0 | 30.0, 30.0 |" in said and "Found: +1 (" in said
