"""Position interpolation: the paper's bound, the sliding window, and keys that a model finds or does not."""

import dataclasses
import doctest
import json
import math
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, random_model
from data import Tokenizer
from model import ModelConfig, rope_table

sys.path.insert(0, str(ROOT / "recipes"))
import interpolation
import longer
import passkeys

TINY = ModelConfig(16, 2, 2, 2, 24, vocab_size=512, max_seq_len=2048, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(shared) -> Tokenizer:
    return Tokenizer(shared("stories260K/tok512.rebuilt.model"))


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(passkeys)
    assert found.attempted > 0 and found.failed == 0


def test_a_score_between_two_positions_lies_near_the_line_between_them():
    """|a(t) - line| <= max|h| (t - t1)(t2 - t) / 2 * sum of theta^2, of which the paper has the larger part alone."""
    config = dataclasses.replace(TINY, dim=256, num_heads=2, num_kv_heads=2)  # heads of 128, as LLaMA's
    theta = 10_000.0 ** -(torch.arange(64) / 64)
    assert float(theta.square().sum()) == pytest.approx((1 - 1e-8) / (1 - 10_000 ** (-1 / 32)), rel=1e-4)
    assert 32 * math.log(10_000) == pytest.approx(294.73, abs=5e-3)  # the paper's constant
    bound = float(theta.square().sum()) / 8
    h = torch.randn(200, 64, 2, generator=torch.Generator().manual_seed(0))
    h = h / h.norm(dim=-1).amax(-1)[:, None, None]  # pairs as complex numbers, the largest of them 1
    squeezed = dataclasses.replace(config, rope_scale=2.0)

    def scores(config: ModelConfig, position: int) -> torch.Tensor:
        cos, sin = (table[0] for table in rope_table(config, torch.tensor([position])))
        return (h[..., 0] * cos - h[..., 1] * sin).sum(-1)

    for position in (0, 7, 1000):  # half way to the next: at 2 p + 1 of twice as many positions
        line = (scores(config, position) + scores(config, position + 1)) / 2
        off = (scores(squeezed, 2 * position + 1) - line).abs()
        assert 0.05 * bound < off.max() < bound
        torch.testing.assert_close(scores(squeezed, 2 * position), scores(config, position))


def test_blocks_are_scored_with_the_window_that_ends_with_them(monkeypatch):
    monkeypatch.setattr(interpolation, "LONG", 128)
    draw = np.random.default_rng(0)
    documents = [draw.integers(512, size=size).tolist() for size in (129, 300)]
    model = random_model(TINY)
    for window in (40, 128):
        found = interpolation.bits(model, documents, window, 2, 1.5)
        for ids, ends, value in zip(documents, ((129, 129), (129, 300)), found):
            rows = torch.tensor([ids[end - window - 1 : end] for end in ends])
            expected = -model.log_probs(rows[:, :-1], rows[:, 1:])[:, -32:].mean() / math.log(2) / 1.5
            assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    model.embedding.weight.data.zero_()  # so that all 512 tokens are equally likely
    assert interpolation.bits(model, documents, 64, 2, 1.0) == pytest.approx([9.0, 9.0])


class Reader:
    """Answers with the token behind the last "key is " that it sees, in so many tokens."""

    def __init__(self, tokenizer: Tokenizer, sight: int):
        self.mark, self.sight = tokenizer.encode("The pass key is")[-5:], sight

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        answers = []
        for ids in rows.tolist():
            seen = ids[:-5][-self.sight :]
            places = [i for i in range(len(seen) - 5) if seen[i : i + 5] == self.mark]
            answers.append(seen[places[-1] + 5] if places else 0)
        return torch.tensor(answers)[:, None]

    def unembedding(self, answers: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(answers, 512)


def test_a_key_is_found_as_far_as_a_reader_sees(tokenizer):
    distances, right = passkeys.found_keys(Reader(tokenizer, 9999), tokenizer, 1500, 3)
    assert right.shape == (32, 3) and right.all() and distances == sorted(distances)
    assert distances[-1] < 1500 < distances[-1] + len(tokenizer.encode(passkeys.prompt("with", 0, 3)))
    sight = 600
    distances, right = passkeys.found_keys(Reader(tokenizer, sight), tokenizer, 1500, 3)
    assert sight - 150 < passkeys.farthest(distances, right) < sight
    distances, right = passkeys.found_keys(random_model(TINY).eval(), tokenizer, 400, 8)
    assert right.mean() < 0.1 and passkeys.farthest(distances, right) < 200  # by chance alone


def test_keys_are_words_of_one_token_in_their_place(tokenizer):
    keys = passkeys.keys_of(tokenizer)
    assert len(keys) > 10
    for key in keys:
        asked = passkeys.prompt(key, 2, 3)
        assert len(tokenizer.encode(f"{asked} {key}")) == len(tokenizer.encode(asked)) + 1
        assert len(tokenizer.encode(asked)) == len(tokenizer.encode(passkeys.prompt(keys[0], 2, 3)))


def test_texts_with_keys_fit_in_the_short_window(tokenizer, tmp_path, monkeypatch, shared):
    made = []
    monkeypatch.setattr(passkeys, "text", lambda: shared("stories260K"))
    monkeypatch.setattr(passkeys, "Tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(passkeys, "once", lambda folder, *words: made.append(words) or folder)
    monkeypatch.setattr(passkeys, "TEXTS", 40)
    passkeys.passkeys(tmp_path, 400)
    (words,) = made
    texts = [json.loads(line)["text"] for line in (tmp_path / "passkeys.jsonl").open()]
    sizes = [len(tokenizer.encode(text, bos=True, eos=True)) for text in texts]
    assert len(texts) == 40 and 350 < max(sizes) <= 400 and min(sizes) < 300
    for text in texts:
        key = text.split()[-1].rstrip(".")
        assert text.count(f" {key}") == 3 and key in passkeys.keys_of(tokenizer)


def test_every_arm_reads_positions_in_its_own_way(monkeypatch):
    monkeypatch.setattr(longer, "original", lambda seed: "original")
    monkeypatch.setattr(longer, "extended", lambda seed, name, length, scale: longer.Path(f"{name} {length} {scale:g}"))
    loaded = []
    tuned = dataclasses.replace(TINY, rope_scale=4.0)
    monkeypatch.setattr(
        longer, "load", lambda path: loaded.append(str(path)) or random_model(tuned if "1024 4" in str(path) else TINY)
    )
    arms = {name: model.config for name, model in longer.models_of(0)}
    assert all(config.max_seq_len == 1024 for config in arms.values())
    scales = {name: config.rope_scale for name, config in arms.items()}
    expected = dict.fromkeys(arms, 1.0) | {name: 4.0 for name in arms if name.startswith("interpolated")}
    assert scales == expected and len(arms) == 8
    # a base that stretches the longest wave as interpolation does and leaves the shortest as it is
    (before, after) = (rope_table(config, torch.tensor([100.0]))
                       for config in (TINY, dataclasses.replace(arms["NTK-aware base"], rope_scale=1.0)))  # fmt: skip
    assert before[0][0, 0] == after[0][0, 0]
    slow = [math.acos(float(table[0][0, -1])) for table in (before, after)]
    assert slow[0] / slow[1] == pytest.approx(4.0, rel=1e-3)
