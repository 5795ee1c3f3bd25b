"""Attacks that guess which documents a model was trained on: questions to it, features of its answers, scores.

Meeus et al. 2023, arXiv:2310.15007, section 4, and what they compare with: the loss, the Min-K % probability (Shi et
al. 2023, arXiv:2310.16789), the loss by the size under zlib and the loss less that of another model (Carlini et al.
2021, arXiv:2012.07805). Used by recipes/membership.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from study import Difference

WINDOW = 128  # tokens that the model sees; neighbours share one, so each token but a document's first is asked once
BINS, TREES, FOLDS, DRAWS = 1000, 200, 5, 1000
PAPER, EARLY = "histogram, MaxNormTF", "loss less early"


class Answers(NamedTuple):
    """What a model says of each token but the first of documents as long as each other (documents, tokens)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    largest: np.ndarray  # the log-probability of the likeliest token there


@torch.no_grad()
def ask(model, ids: np.ndarray) -> Answers:
    """Of documents (documents, 1 + n * (WINDOW - 1))."""
    found = []
    for windows in torch.from_numpy(ids).unfold(1, WINDOW, WINDOW - 1):
        logprobs = model(windows[:, :-1]).log_softmax(-1)
        chosen = logprobs.gather(-1, windows[:, 1:, None])[..., 0]
        found.append(torch.stack((chosen, logprobs.amax(-1))).flatten(1))
    return Answers(ids[:, 1:], *torch.stack(found, 1).numpy())


def frequencies(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """R: of each token its share of these; of one that is not among them half the smallest."""
    counts = np.bincount(tokens.ravel(), minlength=vocab_size)
    return np.where(counts, counts, counts[counts > 0].min() / 2) / counts.sum()


def max_norm(answers: Answers, reference: np.ndarray) -> np.ndarray:
    """-log((1 - (largest p - p)) / R(token))."""
    short = np.exp(answers.largest) - np.exp(answers.logprobs)
    return np.log(reference[answers.tokens]) - np.log1p(-np.minimum(short, 1 - 1e-6))


def histograms(answers: Answers, train: np.ndarray, vocab_size: int) -> np.ndarray:
    """HistFE of MaxNormTF: the share of values in each bin; R and edges are those of the training documents alone.

    A value outside the edges counts in the outermost bin.
    """
    values = max_norm(answers, frequencies(answers.tokens[train], vocab_size))
    edges = np.linspace(values[train].min(), values[train].max(), BINS + 1)
    return shares(np.searchsorted(edges[1:-1], values, side="right"), BINS)


def shares(numbers: np.ndarray, size: int) -> np.ndarray:
    """Of each document (documents, tokens) the share of each number below size."""
    return np.array([np.bincount(row, minlength=size) / len(row) for row in numbers])


def aggregates(answers: Answers) -> np.ndarray:
    """AggFE of NoNorm, without the number of tokens: it would tell lengths apart, not membership."""
    losses = -answers.logprobs
    percentiles = np.percentile(losses, (1, 5, 10, 25, 50, 75, 90, 95, 99), axis=1)
    return np.stack([losses.mean(1), losses.min(1), losses.max(1), losses.std(1), *percentiles], 1)


def crossed(features: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, seed: int) -> np.ndarray:
    """Of each document the probability of membership by a forest that was fitted to the other folds.

    features(train) are those of all documents, with what these training documents say.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold

    found = np.empty(len(labels))
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels):
        x = features(train)
        forest = RandomForestClassifier(TREES, max_depth=5, min_samples_leaf=3, random_state=seed)
        found[test] = forest.fit(x[train], labels[train]).predict_proba(x[test])[:, 1]
    return found


def of_counts(ids: np.ndarray, members: np.ndarray, vocab_size: int) -> Answers:
    """What a model would say that knows how often each token is in the members, and nothing else."""
    tokens = ids[:, 1:]
    logprobs = np.log(frequencies(ids[members], vocab_size))[tokens]
    return Answers(tokens, logprobs, logprobs)


def by_probabilities(answers: Answers, early: Answers, packed: np.ndarray) -> dict[str, np.ndarray]:
    """The attacks that nothing is fitted for.

    early is what another model says of the same documents, packed their sizes under zlib.
    """
    logprobs, fifth = answers.logprobs, int(0.2 * answers.logprobs.shape[1])
    return {
        "loss": logprobs.mean(1),
        "Min-20 %": np.sort(logprobs, 1)[:, :fifth].mean(1),
        "loss / zlib": logprobs.sum(1) / packed,
        EARLY: (logprobs - early.logprobs).mean(1),
    }


def attack(answers: Answers, early, packed, labels: np.ndarray, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """The scores of every attack, higher where membership is likelier; see by_probabilities."""
    fitted = {
        PAPER: crossed(lambda train: histograms(answers, train, vocab_size), labels, seed),
        "aggregates, NoNorm": crossed(lambda train: aggregates(answers), labels, seed),
    }
    return fitted | by_probabilities(answers, early, packed)


def blind(ids: np.ndarray, labels: np.ndarray, vocab_size: int, seed: int) -> np.ndarray:
    """The scores of the same forest that is given how often each token is in a document, and no model."""
    return crossed(lambda train: shares(ids, vocab_size), labels, seed)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """How likely a member's score is above another's, ties counting half.

    >>> auc(np.array([1, 2, 2, 3]), np.array([False, True, False, True]))
    0.875
    """
    members, others = labels.sum(), (~labels).sum()
    above = rankdata(scores)[labels].sum() - members * (members + 1) / 2
    return float(above / (members * others))


class Split(NamedTuple):
    labels: np.ndarray  # (seeds, documents)
    scores: dict[tuple[int, str], list[np.ndarray]]  # of epochs and attack: by seed, of each document

    def auc(self, draw: np.ndarray, epochs: int, name: str) -> np.ndarray:
        """Of each seed, on the documents that were drawn."""
        return np.array([auc(s[draw], y[draw]) for s, y in zip(self.scores[epochs, name], self.labels)])

    def estimate(self, measure: Callable[[np.ndarray], np.ndarray]) -> Difference:
        """measure(draw), which gives a number a seed, with an interval by drawing documents DRAWS times."""
        count, generator = self.labels.shape[1], np.random.default_rng(0)
        seeds = measure(np.arange(count))
        means = [measure(generator.integers(count, size=count)).mean() for _ in range(DRAWS)]
        return Difference(seeds.mean(), *np.percentile(means, (2.5, 97.5)), tuple(seeds))
