"""Whether an answer refuses, by the signs and weights of refusals.json.

recipes/refusals.py makes that file from answers labelled by people, and measures it.
"""

import functools
import itertools
import re
from pathlib import Path

import numpy as np

from lib.records import read_json

READ_CHARS = 2000          # of an answer; a refusal says so before that
OPENING = 3                # sentences
SENTENCE_END = re.compile(r"[.!?:]\s+|\n+")


def is_refusal(text: str) -> bool:
    """Whether an answer in English refuses, wholly or in part, or lectures instead of answering.

    A logistic regression on the grammar of refusing.
    """
    return refusal_score(text, _shipped()) > 0


@functools.cache
def _shipped() -> dict:
    return read_json(Path(__file__).with_suffix(".json"), "bias", "signs")


def refusal_score(text: str, model: dict) -> float:
    """The log odds that text refuses, by a model as recipes/refusals.py makes it."""
    found = refusal_signs(text, [sign["pattern"] for sign in model["signs"]])
    weights = [[sign[place] for sign in model["signs"]] for place in ("opening", "anywhere")]
    return model["bias"] + float((found * weights).sum())


def refusal_signs(text: str, patterns: list[str], sentences: int | None = None) -> np.ndarray:
    """(2, patterns): whether each is in the first three sentences of text, and whether it is
    anywhere in its first 2,000 characters, to which both are limited.

    All that follows the first `sentences` is left out where that is given.
    """
    text = text[:READ_CHARS].lower().replace("’", "'").replace("*", "").replace("`", "")
    text = text.replace("i'm ", "i am ").strip()
    found = itertools.islice(SENTENCE_END.finditer(text), max(OPENING, sentences or 0))
    ends = [match.end() for match in found] + [len(text)] * OPENING
    text = text[: ends[sentences - 1] if sentences else len(text)]
    matches = [re.search(pattern, text) for pattern in patterns]
    opening = [bool(match) and match.end() <= ends[OPENING - 1] for match in matches]
    return np.array([opening, [bool(match) for match in matches]])
