"""Bits a byte: how well a model predicts documents, and how sure that number is."""

import math
import sys
from collections import defaultdict

import numpy as np

from lib.errors import BadInput

Pairs = list[tuple[dict, dict]]  # records of the same question, by two models

BIT = math.log(2)  # in nats
Z = 1.96           # standard errors to either side of a mean, for 95 %


def summarize_documents(records: list[dict]) -> dict:
    """The scores of all documents together, from the sums of what their records count.

    The interval is that of a ratio of sums, documents being independent of each other; where there
    is one document alone, its windows.
    """
    nats, tokens, num_bytes, words = (
        sum(record.get(name, 0) for record in records)
        for name in ("nats", "num_tokens", "bytes", "words")
    )
    bits = nats / BIT / num_bytes
    groups = by_document(records, records)
    if len(groups) == 1:
        groups = [[record] for record in records]
    squares = 0
    for group in groups:
        excess = (record["nats"] / BIT - bits * record["bytes"] for record in group)
        squares += sum(excess) ** 2
    half = Z * math.sqrt(squares) / num_bytes
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
        whole_document = (record["subject"], record["index"])
        groups[record.get("document", whole_document)].append(item)
    return list(groups.values())


def paired_bits(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The bits of each document (N, 2) by both models, and its bytes (N,).

    Raises ValueError where there is one document alone.
    """
    groups = by_document(pairs, [first for first, _ in pairs])
    if len(groups) < 2:
        raise BadInput("--compare draws documents, and of a single one nothing can be drawn")
    nats, num_bytes = [], []
    for group in groups:
        nats.append([sum(pair[side]["nats"] for pair in group) for side in (0, 1)])
        num_bytes.append(sum(first["bytes"] for first, _ in group))
    return np.array(nats) / BIT, np.array(num_bytes)


def finite_exp(nats: float) -> float | None:
    """exp(nats); None where a float cannot hold it, as of words in a text without blanks."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else None
