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
PLAINER = (("’", "'"), ("*", ""), ("`", ""), ("i'm ", "i am "))  # a text's first form, the second
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
    signs = model["signs"]
    found = refusal_signs(text, [sign["pattern"] for sign in signs])
    opening = [sign["opening"] for sign in signs]
    anywhere = [sign["anywhere"] for sign in signs]
    weighted = found * [opening, anywhere]
    return model["bias"] + float(weighted.sum())


def refusal_signs(text: str, patterns: list[str], sentences: int | None = None) -> np.ndarray:
    """(2, patterns): whether each is in the first three sentences of text, and whether it is
    anywhere in its first 2,000 characters, to which both are limited.

    All that follows the first `sentences` is left out where that is given.
    """
    text = text[:READ_CHARS].lower()
    for sign, plain in PLAINER:
        text = text.replace(sign, plain)
    text = text.strip()
    wanted = max(OPENING, sentences or 0)
    found = itertools.islice(SENTENCE_END.finditer(text), wanted)
    ends = [match.end() for match in found]
    ends += [len(text)] * OPENING  # there may be fewer sentences
    if sentences:
        text = text[: ends[sentences - 1]]
    end_of_opening = ends[OPENING - 1]
    opening, anywhere = [], []
    for pattern in patterns:
        match = re.search(pattern, text)
        anywhere.append(match is not None)
        opening.append(match is not None and match.end() <= end_of_opening)
    return np.array([opening, anywhere])
