"""Scores of many questions: averages, their intervals, and whether two results differ by chance."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from lib.bits import Pairs, Z, paired_bits, summarize_documents
from lib.errors import BadInput
from lib.results import read_pairs

Categories = dict[str, list[str]]  # a name and its subjects


def estimate(values: list[float]) -> list[float]:
    """Mean and 95 % interval of values in 0 … 1.

    Wilson's where all are 0 or 1, else mean ± 1.96 standard errors.
    """
    n = len(values)
    mean = float(np.mean(values))
    if set(values) <= {0.0, 1.0}:
        divisor = 1 + Z * Z / n
        middle = (mean + Z * Z / (2 * n)) / divisor
        variance = mean * (1 - mean) / n
        widening = Z * Z / (4 * n * n)
        half = Z / divisor * math.sqrt(variance + widening)
        return interval(mean, middle, half)
    half = Z * float(np.std(values)) / math.sqrt(n)
    return interval(mean, mean, half)


def interval(value: float, middle: float, half: float) -> list[float]:
    """[value, low, high]: middle ± half, inside 0 … 1."""
    low = max(0.0, middle - half)
    high = min(1.0, middle + half)
    return [value, low, high]


def macro_estimate(subjects: dict[str, list[float]]) -> list[float]:
    """The mean of the subjects' means, and its 95 % interval."""
    means = [np.mean(values) for values in subjects.values()]
    variances = [float(np.var(values)) / len(values) for values in subjects.values()]
    macro = float(np.mean(means))
    half = Z * math.sqrt(sum(variances)) / len(subjects)
    return interval(macro, macro, half)


def summarize(records: list[dict], task: str, categories: Categories | None = None) -> dict:
    """Every score as [value, low, high], the bounds of 95 % intervals.

    Over all questions (micro), as the mean of the subjects (macro), by subject, and by category.
    For perplexity the totals of all documents.
    """
    shots = Counter(record["shots"] for record in records)
    counts = {
        "questions": len(records),
        "shots_kept": dict(sorted(shots.items(), reverse=True)),
        "ties": sum(record.get("tie", False) for record in records),
        "cut_from_the_left": sum(record["cut"] > 0 for record in records),
    }
    if task == "perplexity":
        return counts | summarize_documents(records)
    names = {}  # in the order in which they come
    for record in records:
        names |= dict.fromkeys(record["scores"])
    scores = {name: averages(records, name, categories) for name in names}
    return counts | {"scores": scores}


def averages(records: list[dict], name: str, categories: Categories | None) -> dict:
    """The averages of one score."""
    subjects = defaultdict(list)
    for record in records:
        scores, subject = record["scores"], record["subject"]
        if name in scores:
            subjects[subject].append(scores[name])
    all_values = values_of(subjects, list(subjects))
    by_subject = {subject: estimate(values) for subject, values in subjects.items()}
    found = {
        "micro": estimate(all_values),
        "macro": macro_estimate(subjects),
        "subjects": by_subject,
    }
    if categories is not None:
        found["categories"] = {}
        for category, members in categories.items():
            values = values_of(subjects, members)
            if values:
                found["categories"][category] = estimate(values)
    return found


def values_of(subjects: dict[str, list[float]], members: list[str]) -> list[float]:
    """The values of all members that are subjects, one after the other."""
    values = []
    for subject in members:
        values += subjects.get(subject, [])
    return values


# ---- two results ----


def paired_difference(paths: tuple[str, ...], protocols: dict, draws: int) -> dict:
    """Second result less the first, with a 95 % interval and a test.

    Questions (of perplexity: documents) are drawn with replacement. Where every score is 0 or 1,
    McNemar's exact test counts who alone is right; else the bootstrap's share beyond 0 is doubled.
    Whether another run of the same settings would do alike is not in it. Raises ValueError unless
    both were asked the same questions in the same way.
    """
    if len(paths) != 2:
        raise BadInput(f"--compare takes two results, not {len(paths)}")
    protocol, pairs = read_pairs((Path(paths[0]), Path(paths[1])))
    task, wanted = protocol["task"], protocol["protocol"]
    known = protocols.get(task, {})
    if wanted not in known:
        raise BadInput(f"{paths[0]}: {task} has no protocol {wanted} here")
    if task == "perplexity":
        name, drawn = "bits a byte", "documents"
        both, weights = paired_bits(pairs)
    else:
        metric = next(iter(pairs[0][0]["scores"]))
        average = known[wanted].average
        name, drawn = f"{metric}, {average}", "questions"
        both, weights = paired_scores(pairs, metric, average)
    first, second = both.T
    total = weights.sum()
    difference = second - first
    mean = difference.sum() / total
    means = bootstrap(difference, weights, draws)
    low, high = np.percentile(means, (2.5, 97.5))
    found = {
        "score": name,
        drawn: len(both),
        "first": first.sum() / total,
        "second": second.sum() / total,
        "difference": [mean, low, high],
    }
    scores = both / weights[:, None]
    right_or_wrong = np.isin(scores.round(9), (0, 1))
    if task != "perplexity" and right_or_wrong.all():
        return found | mcnemar_test(difference)
    return found | bootstrap_test(means, len(both))


def paired_scores(pairs: Pairs, metric: str, average: str) -> tuple[np.ndarray, np.ndarray]:
    """The weighted scores of each question (N, 2) by both models, and the weights (N,)."""
    scores, subjects = [], []
    for first, second in pairs:
        if metric in first["scores"]:
            scores.append([first["scores"][metric], second["scores"][metric]])
            subjects.append(first["subject"])
    weights = np.ones(len(scores))
    if average == "macro":
        counts = Counter(subjects)
        weights = np.array([1 / counts[subject] for subject in subjects])
    return np.array(scores) * weights[:, None], weights


def bootstrap(difference: np.ndarray, weights: np.ndarray, draws: int) -> np.ndarray:
    """Weighted means of questions drawn with replacement, so many times."""
    generator = np.random.default_rng(0)
    means = np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(len(weights), size=len(weights))
        total = difference[drawn].sum()
        means[i] = total / weights[drawn].sum()
    return means


def bootstrap_test(means: np.ndarray, num_drawn: int) -> dict:
    """Whether chance makes such a difference: twice the share of means on the other side of 0.

    That two documents speak for one model is a toss of two coins, so p has a least value.
    """
    draws = len(means)
    not_above, not_below = (means <= 0).sum(), (means >= 0).sum()
    other_side = min(not_above, not_below)
    p = 2 * (other_side + 1) / (draws + 1)
    least = 2.0 ** (1 - num_drawn)
    return {"test": "bootstrap", "p": float(min(1.0, max(p, least)))}


def mcnemar_test(difference: np.ndarray) -> dict:
    """How many questions one model alone has right, and whether chance does that."""
    gained = int((difference > 0).sum())
    lost = int((difference < 0).sum())
    return {
        "only_first": lost,
        "only_second": gained,
        "test": "McNemar",
        "p": mcnemar(gained, lost),
    }


def mcnemar(gained: int, lost: int) -> float:
    """How likely chance makes so uneven a split of the questions that one model alone has right.

    >>> mcnemar(9, 1)
    0.021484375
    """
    total = gained + lost
    tail = 0  # of the binomial distribution, in splits of the questions
    for i in range(min(gained, lost) + 1):
        tail += math.comb(total, i)
    return min(1.0, tail * 2 / 2**total)
