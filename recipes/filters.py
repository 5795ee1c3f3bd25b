"""Filters of written instructions, each with the reason it drops one, and counted.

Those of Self-Instruct (Wang et al. 2022, arXiv:2212.10560) and Alpaca are as in their code: ROUGE-L over lower-case
words without a stemmer, F above 0.7 with any instruction that is there. Those of Evol-Instruct are of its paper's kind
(Xu et al. 2023, arXiv:2304.12244).
"""

import re
import string
from collections import Counter
from dataclasses import dataclass, field

MOST_ALIKE = 0.7
NEAREST = 10  # that the record of an instruction keeps
BLOCKED = "image images graph graphs picture pictures file files map maps draw plot".split() + ["go to"]
ALPACA_BLOCKED = [*BLOCKED, "video", "audio", "music", "flowchart", "diagram"]
COPIED = ("given prompt", "rewritten prompt", "created prompt")  # from Evol-Instruct's own prompts
STOP_WORDS = set(
    "a an and are as at be by for from has have he her his i in is it its my of on or our she that the their them they "
    "this to was we were will with you your".split()
)


@dataclass
class Funnel:
    """How many were written, why some were dropped, and those."""

    written: int = 0
    dropped: Counter = field(default_factory=Counter)
    removed: list[dict] = field(default_factory=list)

    def passes(self, reason: str, **record) -> bool:
        """Count a record; a reason, where there is one, drops it."""
        self.written += 1
        if reason:
            self.dropped[reason] += 1
            self.removed.append({"reason": reason} | record)
        return not reason

    @property
    def kept(self) -> int:
        return self.written - sum(self.dropped.values())

    @property
    def reasons(self) -> str:
        return "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common()) or "none"


# ---- instructions ----


def holds(text: str, words) -> bool:
    """Whether one of these stands in a text as a whole word, in upper or lower case."""
    return any(re.search(rf"\b({word})\b", text, re.IGNORECASE) for word in words)


def unfit(instruction: str, blocked=tuple(BLOCKED)) -> str:
    """Why an instruction by itself is dropped; empty where it is not."""
    if not 3 < len(instruction.split()) <= 150:
        return "too short or too long"
    if holds(instruction, blocked):
        return "blocked word"
    if instruction.startswith("Write a program"):
        return "asks for a program"
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return "begins with a mark"
    return ""


def words_of(text: str) -> list[str]:
    """As ROUGE counts them: runs of letters a to z and digits, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def common_length(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence, a row of its table as the bits of one number.

    The bit-parallel form of Hyyrö 2004; a table of numbers would take a hundred times as long.
    """
    places, full = {}, (1 << len(first)) - 1
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = full
    for word in second:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(first) - row.bit_count()


def rouge_l(first: list[str], second: list[str]) -> float:
    """The F of ROUGE-L of two lists of words, the harmonic mean of both shares of what they have in common.

    >>> rouge_l("which module has dedent".split(), "which module has the indent function".split())
    0.6
    """
    if not first or not second:
        return 0.0
    return 2 * common_length(first, second) / (len(first) + len(second))


class Pool:
    """Instructions that are there, which new ones must differ from."""

    def __init__(self, instructions: list[str]):
        self.texts, self.words = list(instructions), [words_of(text) for text in instructions]

    def add(self, instruction: str) -> tuple[str, dict]:
        """Why an instruction is dropped, else it is added; with the nearest ones, and the mean likeness to all."""
        words = words_of(instruction)
        scores = [rouge_l(words, others) for others in self.words]
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:NEAREST]
        record = {"nearest": {self.texts[i]: scores[i] for i in order}}
        record["mean_likeness"] = sum(scores) / max(1, len(scores))
        if max(scores, default=0) > MOST_ALIKE:
            return "ROUGE-L above 0.7", record
        self.texts.append(instruction)
        self.words.append(words)
        return "", record


# ---- answers ----


def invalid(given: str, output: str) -> str:
    """Why an input with its output is dropped."""
    if given == output or not output:
        return "no output, or its input"
    return "ends with a colon" if given.endswith(":") or output.endswith(":") else ""


def consistent(instances: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Inputs and outputs of a task, each pair once; none at all where one input, not empty, has two outputs."""
    once = list(dict.fromkeys(instances))
    inputs = [given for given, _ in once if given]
    return once if len(inputs) == len(set(inputs)) else []


def failed_evolution(instruction: str, output: str) -> str:
    """Why an evolved instruction with its answer is dropped."""
    if holds(instruction, COPIED):
        return "copies the prompt"
    if "sorry" in output.lower() and len(output.split()) < 80:
        return "sorry, in under 80 words"
    return "" if set(words_of(output)) - STOP_WORDS else "only stop words"
