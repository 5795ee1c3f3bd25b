"""Scores of many questions: averages and their intervals, and whether two results differ by chance."""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from lib.results import read_pairs


def estimate(values: list[float]) -> list[float]:
    """Mean and 95 % interval of values in 0 … 1.

    Wilson's where all are 0 or 1, else mean ± 1.96 standard errors.
    """
    n, mean, z = len(values), float(np.mean(values)), 1.96
    if set(values) <= {0.0, 1.0}:
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return [mean, max(0.0, middle - half), min(1.0, middle + half)]
    half = z * float(np.std(values)) / math.sqrt(n)
    return [mean, max(0.0, mean - half), min(1.0, mean + half)]


def macro_estimate(subjects: dict[str, list[float]]) -> list[float]:
    """The mean of the subjects' means, and its 95 % interval."""
    means = [np.mean(values) for values in subjects.values()]
    variance = sum(float(np.var(values)) / len(values) for values in subjects.values())
    macro, half = float(np.mean(means)), 1.96 * math.sqrt(variance) / len(subjects)
    return [macro, max(0.0, macro - half), min(1.0, macro + half)]


def summarize(records: list[dict], task: str, categories: dict[str, list[str]] | None = None) -> dict:
    """Every score as [value, low, high], the bounds of 95 % intervals.

    Over all questions (micro), as the mean of the subjects (macro), by subject, and by category: a
    name and its subjects. For perplexity the totals of all documents.
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
    names = dict.fromkeys(name for record in records for name in record["scores"])
    return counts | {"scores": {name: averages(records, name, categories) for name in names}}


def averages(records: list[dict], name: str, categories: dict[str, list[str]] | None) -> dict:
    """The averages of one score."""
    subjects = defaultdict(list)
    for record in records:
        if name in record["scores"]:
            subjects[record["subject"]].append(record["scores"][name])
    found = {
        "micro": estimate([value for values in subjects.values() for value in values]),
        "macro": macro_estimate(subjects),
        "subjects": {subject: estimate(values) for subject, values in subjects.items()},
    }
    if categories is not None:
        found["categories"] = {}
        for category, members in categories.items():
            values = [value for subject in members for value in subjects.get(subject, [])]
            if values:
                found["categories"][category] = estimate(values)
    return found


def summarize_documents(records: list[dict]) -> dict:
    nats, tokens, num_bytes, words = (
        sum(record.get(name, 0) for record in records)
        for name in ("nats", "num_tokens", "bytes", "words")
    )
    bits = nats / math.log(2) / num_bytes
    # the error of a ratio of sums, documents being independent of each other; of one, its windows
    groups = by_document(records, records)
    if len(groups) == 1:
        groups = [[record] for record in records]
    squares = 0
    for group in groups:
        excess = (record["nats"] / math.log(2) - bits * record["bytes"] for record in group)
        squares += sum(excess) ** 2
    half = 1.96 * math.sqrt(squares) / num_bytes
    scores = {
        "nats_per_token": nats / tokens,
        "bits_per_byte": [bits, bits - half, bits + half],
        "perplexity": finite_exp(nats / tokens),
        "tokens": tokens,
        "bytes": round(num_bytes),
        "documents" if words else "windows": len(records),
    }
    if words:
        scores["word_perplexity"] = finite_exp(nats / words)
    return scores


def by_document(items: list, records: list[dict]) -> list[list]:
    """Items, each of one of the records of perplexity, in groups by document.

    A window of a dataset belongs to the document in which it starts. Its end may be of others, so
    neighbouring groups are not quite independent; but a document much longer than a window, whose
    windows are alike, is drawn as one.
    """
    groups = defaultdict(list)
    for item, record in zip(items, records):
        groups[record.get("document", (record["subject"], record["index"]))].append(item)
    return list(groups.values())


def finite_exp(nats: float) -> float | None:
    """exp(nats); None where that is more than a float holds, as of words in a text without blanks."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else None


# ---- two results ----


def paired_difference(paths: tuple[str, ...], protocols: dict, draws: int) -> dict:
    """Second result less the first, with a 95 % interval and a test.

    Questions (of perplexity: documents) are drawn with replacement. Where every score is 0 or 1,
    McNemar's exact test counts who alone is right; else the bootstrap's share beyond 0 is doubled.
    Whether another run of the same settings would do alike is not in it. Raises ValueError unless
    both were asked the same questions in the same way.
    """
    if len(paths) != 2:
        raise ValueError(f"--compare takes two results, not {len(paths)}")
    protocol, pairs = read_pairs((Path(paths[0]), Path(paths[1])))
    task = protocol["task"]
    if protocol["protocol"] not in protocols.get(task, {}):
        raise ValueError(f"{paths[0]}: {task} has no protocol {protocol['protocol']} here")
    if task == "perplexity":
        name, drawn = "bits a byte", "documents"
        both, weights = paired_bits(pairs)
    else:
        metric = next(iter(pairs[0][0]["scores"]))
        average = protocols[task][protocol["protocol"]].average
        name, drawn = f"{metric}, {average}", "questions"
        both, weights = paired_scores(pairs, metric, average)
    difference = both[:, 1] - both[:, 0]
    means = bootstrap(difference, weights, draws)
    low, high = np.percentile(means, (2.5, 97.5))
    found = {
        "score": name,
        drawn: len(both),
        "first": both[:, 0].sum() / weights.sum(),
        "second": both[:, 1].sum() / weights.sum(),
        "difference": [difference.sum() / weights.sum(), low, high],
    }
    plain = both / weights[:, None]
    if task != "perplexity" and np.isin(plain.round(9), (0, 1)).all():
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        found |= {"only_first": lost, "only_second": gained}
        return found | {"test": "McNemar", "p": mcnemar(gained, lost)}
    p = 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (draws + 1)
    least = 2.0 ** (1 - len(both))  # that two documents speak for one model is a toss of two coins
    return found | {"test": "bootstrap", "p": float(min(1.0, max(p, least)))}


Pairs = list[tuple[dict, dict]]  # records of the same question


def paired_bits(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The bits of each document (N, 2) by both models, and its bytes (N,)."""
    groups = by_document(pairs, [first for first, _ in pairs])
    if len(groups) < 2:
        raise ValueError("--compare draws documents, and of a single one nothing can be drawn")
    nats = [[sum(pair[side]["nats"] for pair in group) for side in (0, 1)] for group in groups]
    num_bytes = [sum(first["bytes"] for first, _ in group) for group in groups]
    return np.array(nats) / math.log(2), np.array(num_bytes)


def paired_scores(pairs: Pairs, metric: str, average: str) -> tuple[np.ndarray, np.ndarray]:
    """The weighted scores of each question (N, 2) by both models, and the weights (N,)."""
    pairs = [pair for pair in pairs if metric in pair[0]["scores"]]
    scores = np.array([[record["scores"][metric] for record in pair] for pair in pairs])
    weights = np.ones(len(pairs))
    if average == "macro":
        counts = Counter(first["subject"] for first, _ in pairs)
        weights = np.array([1 / counts[first["subject"]] for first, _ in pairs])
    return scores * weights[:, None], weights


def bootstrap(difference: np.ndarray, weights: np.ndarray, draws: int) -> np.ndarray:
    """Weighted means of questions drawn with replacement, so many times."""
    generator, means = np.random.default_rng(0), np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(len(weights), size=len(weights))
        means[i] = difference[drawn].sum() / weights[drawn].sum()
    return means


def mcnemar(gained: int, lost: int) -> float:
    """How likely chance makes so uneven a split of the questions that one of two models alone has right.

    >>> mcnemar(9, 1)
    0.021484375
    """
    total = gained + lost
    tail = sum(math.comb(total, i) for i in range(min(gained, lost) + 1))
    return min(1.0, tail * 2 / 2**total)
