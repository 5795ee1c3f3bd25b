"""recipes/attention.py: attention computed again is the model's own, and its measures on numbers worked by hand."""

import doctest
import math
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, random_model
from data import Tokenizer
from model import ModelConfig, save

sys.path.insert(0, str(ROOT / "recipes"))
import attention
import attention_maps as maps
import study

GROUPED = ModelConfig(16, 4, 4, 2, 24, vocab_size=258, max_seq_len=256, tie_embeddings=True)
SENTENCES = [
    "The sun was warm over the little house near the river.",
    "They ran and ran until it was late, as told.",
    "He gave it to his friend, and his friend was very happy.",
    "Return one of the many values that are in the list.",
    "A dog saw the ball and ran to the big park with it.",
]
WORDS = [sentence.split() for sentence in SENTENCES]


def test_the_examples_in_docstrings_are_right():
    found = doctest.testmod(maps)
    assert found.attempted > 0 and found.failed == 0


@torch.no_grad()
def test_attention_computed_again_gives_what_the_models_own_gives():
    """Weights times values, through the output matrix, in every layer; query heads share keys."""
    model, ids = random_model(GROUPED), list(range(40, 52))
    own, values = [], []

    def keep(module, read, out):
        own.append(out[0])
        values.append(module.heads(*read[:2])[2][0].repeat_interleave(2, 1))  # (T, H, K)

    hooks = [block.attention.register_forward_hook(keep) for block in model.blocks]
    model.hidden(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    found = maps.attention(model, ids)
    assert found.shape == (4, 4, 12, 12)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 4, 12))
    assert (found.triu(1) == 0).all() and not model.blocks[0].attention._forward_hooks
    for block, weights, v, out in zip(model.blocks, found, values, own):
        read = torch.einsum("hts,shk->thk", weights, v).flatten(1)
        torch.testing.assert_close(block.attention.out(read), out)


def test_tokens_of_a_word_are_added_up_and_averaged():
    """Two words of 1 and 2 tokens: columns 2 and 3 are one word's, rows 2 and 3 its readings."""
    weights = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    found = maps.by_words(weights, [1, 2])
    assert found == pytest.approx(np.array([[1, 0], [(0.5 + 0.2) / 2, (0.5 + 0.3 + 0.5) / 2]]))
    assert maps.by_words(weights, [1, 1, 1]) == pytest.approx(weights)


def test_only_the_sentences_own_words_are_looked_at():
    model, tokenizer = random_model(GROUPED), Tokenizer("bytes")
    found = maps.look(model, tokenizer, tokenizer.encode("Go:"), ["to", "a", "park"])
    ids = [tokenizer.bos_id, *tokenizer.encode("Go: to a park")]
    whole = maps.attention(model, ids).double().numpy()
    assert found.shape == (4, 4, 3, 3)
    assert found == pytest.approx(maps.by_words(whole[..., 4:, 4:], [3, 2, 5]))


def test_divergence_on_rows_worked_by_hand():
    p, q = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    one_row = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25) + math.log(1 / 0.75)) / 2
    assert maps.divergence(p, q) == pytest.approx(one_row / 2)  # the first rows are the same
    assert maps.divergence(p, 7 * p) == pytest.approx(0)        # rows are distributions
    apart = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    assert maps.divergence(*apart) == pytest.approx(math.log(2))
    three = np.array([[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]]), np.array([[1, 0, 0], [0.1, 0.9, 0], [0, 0.5, 0.5]])
    assert maps.divergence(*three, first=False) == pytest.approx(0)  # without the first word they agree


def trivial(n: int, self: float, previous: float, first: float) -> np.ndarray:
    """A map (1, 1, n, n) of nothing but the three patterns, and 0.1."""
    i, j = np.indices((n, n))
    return np.tril(0.1 + self * (i == j) + previous * (i == j + 1) + first * (j == 0))[None, None]


def test_trivial_maps_are_all_trivial_and_random_ones_are_not():
    sizes, draw = [8, 9, 10, 11, 12, 13, 14] * 6, np.random.default_rng(0)
    for first in (True, False):
        assert maps.reliance([trivial(n, 0.3, 0.2, 0.4) for n in sizes], first) == pytest.approx(1)
    noise = maps.reliance([np.tril(draw.random((1, 1, n, n))) for n in sizes]).mean()
    assert -0.02 < noise < 0.005  # of unseen sentences R2 is 0 or a little less


def test_the_values_of_sentences_have_r2_as_their_mean():
    """Half pattern, half noise of the same variance: worked out with all sentences together."""
    draw = np.random.default_rng(0)
    some = [trivial(10, 0.3, 0, 0) + np.tril(draw.normal(0, 0.1, (1, 1, 10, 10))) for _ in range(20)]
    values = maps.reliance(some)
    errors, entries = 0.0, np.concatenate([each[0, 0][np.tril_indices(10)] for each in some])
    i, j = np.tril_indices(10)
    x = np.stack([np.ones(len(i)), i == j, i == j + 1, j == 0], 1).astype(float)
    for fold in range(maps.FOLDS):
        seen = [each[0, 0][i, j] for n, each in enumerate(some) if n % maps.FOLDS != fold]
        weights = np.linalg.lstsq(np.tile(x, (len(seen), 1)), np.concatenate(seen), rcond=None)[0]
        errors += sum(((some[n][0, 0][i, j] - x @ weights) ** 2).sum() for n in range(fold, 20, maps.FOLDS))
    r2 = 1 - errors / ((entries - entries.mean()) ** 2).sum()
    assert values.shape == (1, 20) and values.mean() == pytest.approx(r2) and 0.3 < r2 < 0.7


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two models of bytes, of two widths."""
    where = tmp_path_factory.mktemp("attention")
    for width in (16, 32):
        shape = ModelConfig(width, 4, 4, 4, 24, vocab_size=258, max_seq_len=256, tie_embeddings=True)
        save(random_model(shape, width), where / str(width), Tokenizer("bytes"))
    return where


def test_a_model_is_as_far_from_itself_as_it_must_be(runs, monkeypatch):
    """A prefix of the random tokens themselves moves as much as they do."""
    spaces = [[ord(letter) for letter in "abcd"]] * len(WORDS)
    monkeypatch.setattr(maps, "random_words", lambda tokenizer, size, count: spaces)
    seen = maps.Seen(runs / "16", WORDS, {"same": "abcd"})
    assert (seen.moved["same"][0] == seen.moved["same"][1]).all() and (seen.moved["same"] > 0).all()
    assert maps.apart(seen, seen) == pytest.approx(np.zeros((4, len(WORDS))))
    assert (maps.apart(seen, maps.Seen(runs / "32", WORDS, {})) > 0).all()


def test_the_report_compares_all_models(runs, tmp_path, monkeypatch, capsys):
    """Tuned models that are their bases are neither moved nor more sensitive."""
    bytes_ = Tokenizer("bytes")
    monkeypatch.setattr(study, "OUT", tmp_path), monkeypatch.setattr(attention, "OUT", tmp_path)
    monkeypatch.setattr(attention, "model_of", lambda width, kind, seed: runs / ("16" if width == 32 else "32"))
    monkeypatch.setattr(attention, "read_split", lambda data: [bytes_.encode("\n" + "\n".join(SENTENCES))])
    monkeypatch.setattr(attention, "text", lambda: "bytes")
    monkeypatch.setattr(maps, "random_words", lambda tokenizer, size, count: [[97] * size] * count)
    attention.main(attention.Config(seeds=1))
    said = capsys.readouterr().out
    assert "5 sentences; seeds: 1" in said and (tmp_path / "attention.png").stat().st_size > 10_000
    assert "| 128, base and chat | 0 | 0 | 0 | 0 | 0 | 0 |" in said
    assert said.count("+0 (+0 to +0) nats") == 6 and said.count("+0 (+0 to +0) points") == 1
