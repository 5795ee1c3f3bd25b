"""Whether an answer refuses."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np

from lib.records import read_json

SENTENCE_END = re.compile(r"[.!?:]\s+|\n+")


def is_refusal(text: str) -> bool:
    """Whether an answer in English refuses, wholly or in part, or lectures instead of answering.

    A logistic regression on the grammar of refusing, see recipes/refusals.py, which made its weights and measures it.
    """
    return refusal_score(text, _refusal_model()) > 0


@functools.cache
def _refusal_model() -> dict:
    return read_json(Path(__file__).parent.parent / "recipes" / "refusals.json", "bias", "signs")


def refusal_score(text: str, model: dict) -> float:
    """The log odds that text refuses, by a model as recipes/refusals.py makes it."""
    found = refusal_signs(text, [sign["pattern"] for sign in model["signs"]])
    weights = [[sign[place] for sign in model["signs"]] for place in ("opening", "anywhere")]
    return model["bias"] + float((found * weights).sum())


def refusal_signs(text: str, patterns: list[str], sentences: int | None = None) -> np.ndarray:
    """(2, patterns): whether each is in the first three sentences of text, and whether it is anywhere in its first
    2,000 characters; all that follows the first `sentences` is left out where that is given."""
    text = text[:2000].lower().replace("’", "'").replace("*", "").replace("`", "").replace("i'm ", "i am ").strip()
    ends = [match.end() for match in itertools.islice(SENTENCE_END.finditer(text), max(3, sentences or 0))]
    ends += [len(text)] * 3
    text = text[: ends[sentences - 1] if sentences else len(text)]
    matches = [re.search(pattern, text) for pattern in patterns]
    return np.array([[bool(m) and m.end() <= ends[2] for m in matches], [bool(m) for m in matches]])
