"""Where a model looks: its attention between words, how far two such maps are apart, how much of one is trivial.

The measures of Gao et al. 2023, arXiv:2310.19084, as in github.com/RiverGao/scaling_finetuning, but R2 is of sentences
that the regression has not seen.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import begins_word

from data import Tokenizer
from lib.plots import picture
from model import load

FOLDS = 5  # of the sentences, of which each in turn is left out of the regression
SENTENCE = re.compile(r"(?:[\"'.]\s+|\"\"\"|\n\s*)([A-Z][a-z]*(?:\s+[a-z][a-z'-]*,?){7,23}\.)(?=\s|\"|$)")


def sentences_of(documents: list[str], most: int) -> list[list[str]]:
    """Sentences of 8 to 24 plain words in docstrings and comments, each once, as words.

    >>> sentences_of(['\\n  Return one of the\\n  many values, as told.\\n'], 9)
    [['Return', 'one', 'of', 'the', 'many', 'values,', 'as', 'told.']]
    """
    found = [" ".join(match.split()) for text in documents for match in SENTENCE.findall(text.replace("#", " "))]
    return [sentence.split() for sentence in dict.fromkeys(found)][:most]


@torch.no_grad()
def attention(model, ids: list[int]) -> Tensor:
    """softmax(QK' / sqrt K) of every layer and head (layers, H, T, T), computed again from what each layer reads."""
    found, future = [], torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)

    def keep(module, read, _):
        q, k, _ = module.heads(*read[:2])                     # (1, T, H, K), (1, T, G, K)
        k = k.repeat_interleave(q.size(2) // k.size(2), 2)
        scores = torch.einsum("bthk,bshk->bhts", q, k) / q.size(-1) ** 0.5
        found.append(scores.masked_fill(future, -torch.inf).softmax(-1)[0])

    hooks = [block.attention.register_forward_hook(keep) for block in model.blocks]
    model.hidden(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def by_words(weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Attention between words (…, n, n), from that between tokens, of words of so many tokens.

    >>> by_words(np.array([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]), [1, 2]).tolist()
    [[1.0, 0.0], [0.375, 0.625]]
    """
    member = np.repeat(np.eye(len(sizes)), sizes, 0)          # (T, n)
    return (member / sizes).T @ weights @ member


def look(model, tokenizer: Tokenizer, before: list[int], words: list[str]) -> np.ndarray:
    """Attention of a sentence's words to its own words (layers, H, n, n), with these tokens in front of it."""
    parts = [tokenizer.encode(f" {word}") for word in words]  # each alone: some pieces would span two words
    ids = [tokenizer.bos_id, *before, *(token for part in parts for token in part)]
    begin = 1 + len(before)
    weights = attention(model, ids)[:, :, begin:, begin:].double().numpy()
    return by_words(weights, [len(part) for part in parts])


def divergence(p: np.ndarray, q: np.ndarray, first: bool = True) -> np.ndarray:
    """Jensen-Shannon's, in nats, of rows (…, n, n) as distributions, mean over rows.

    Without `first`, the first word is left out.
    """
    p, q = (x if first else x[..., 1:, 1:] for x in (p, q))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    ratios = [np.divide(x, (p + q) / 2, out=np.ones_like(x), where=x > 0) for x in (p, q)]
    return ((p * np.log(ratios[0]) + q * np.log(ratios[1])) / 2).sum(-1).mean(-1)


def reliance(maps: list[np.ndarray], first: bool = True) -> np.ndarray:
    """R2 of trivial patterns by layer and sentence (layers, sentences), of sentences outside the regression, by head.

    The mean over sentences is R2 of all together, 1 - SSE / SST, and their spread its standard error (delta method).
    """
    xs, ys = [], []
    for weights in maps:
        i, j = np.tril_indices(weights.shape[-1])
        kept = slice(None) if first else j > 0
        patterns = [np.ones(len(i)), i == j, i == j + 1, j == 0][: 4 if first else 3]
        xs.append(np.stack(patterns, 1)[kept].astype(float))
        ys.append(weights[..., i, j][..., kept].reshape(-1, len(xs[-1])).T)  # (entries, layers * H)
    mean, folds = np.concatenate(ys).mean(0), np.arange(len(maps)) % FOLDS
    errors, totals = np.zeros((2, len(maps), len(mean)))
    for fold in range(FOLDS):
        x, y = (np.concatenate([each for each, at in zip(of, folds) if at != fold]) for of in (xs, ys))
        weights = np.linalg.lstsq(x, y, rcond=None)[0]
        for n in np.flatnonzero(folds == fold):
            errors[n] = ((ys[n] - xs[n] @ weights) ** 2).sum(0)
            totals[n] = ((ys[n] - mean) ** 2).sum(0)
    left, size = errors.sum(0) / totals.sum(0), totals.mean(0)
    each = 1 - left + (left * totals - errors) / size         # (sentences, layers * H)
    return each.reshape(len(maps), *maps[0].shape[:2]).mean(2).T


def random_words(tokenizer: Tokenizer, size: int, count: int) -> list[list[int]]:
    """For each of so many sentences so many tokens that are words."""
    words = [token for token in range(tokenizer.vocab_size) if begins_word(tokenizer, token)]
    return np.random.default_rng(0).choice(words, (count, size)).tolist()


class Seen:
    """What a model sees in sentences (maps), and how far words in front move it: the mean divergence from the sentence
    alone over layers and heads, of each prefix and of as many random tokens that are words (moved: (2, sentences))."""

    def __init__(self, run: Path, sentences: list[list[str]], prefixes: dict[str, str]):
        model, tokenizer = load(run), Tokenizer(str(run))
        self.maps = [look(model, tokenizer, [], words) for words in sentences]
        self.moved = {}
        for name, prefix in prefixes.items():
            told = tokenizer.encode(prefix)
            before = [told] * len(sentences) + random_words(tokenizer, len(told), len(sentences))
            rows = zip(self.maps * 2, before, sentences * 2)
            moved = [divergence(alone, look(model, tokenizer, ids, words)).mean() for alone, ids, words in rows]
            self.moved[name] = np.reshape(moved, (2, -1))


def apart(one: Seen, other: Seen, first: bool = True) -> np.ndarray:
    """The divergence of two models by layer and sentence, over the mean of their heads (layers, sentences)."""
    return np.stack([divergence(p.mean(1), q.mean(1), first) for p, q in zip(one.maps, other.maps)], 1)


def draw(rows: dict[str, list[np.ndarray]], sentences: list[list[str]], place: Path):
    """The shortest sentence's maps, a row a model and a column a layer, heads averaged."""
    number = min(range(len(sentences)), key=lambda n: len(sentences[n]))
    words, places = sentences[number], range(len(sentences[number]))
    with picture(place, (14, 3.6 * len(rows)), len(rows), 4) as panels:
        for line, (name, maps) in zip(panels, rows.items()):
            for layer, (axes, weights) in enumerate(zip(line, maps[number].mean(1)), 1):
                axes.grid(False)
                axes.imshow(weights / weights.sum(-1, keepdims=True), vmin=0, vmax=1, cmap="viridis")
                axes.set_xticks(places, words, rotation=90)
                axes.set_yticks(places, words)
                axes.set_title(f"{name}, layer {layer}")
