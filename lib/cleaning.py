"""Conversations cleaned before they are rendered, and a report of what that did."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lib.chat_formats import Turn
from lib.cleaning_steps import (
    cut_refusals,
    drop_copies,
    drop_empty,
    drop_long,
    drop_near_copies,
    drop_short,
    html_to_markdown,
    in_language,
    mend_roles,
    tidy_characters,
)
from lib.disk import writing
from lib.errors import BadInput
from lib.tokenizer import Tokenizer


@dataclass
class Cleaning:
    """What is done to conversations before they are rendered, beyond what is always done: exact copies and empty
    turns are dropped, control characters removed, turns out of order mended."""

    html: bool = True               # answers that are HTML become markdown
    language: str = ""              # keep only conversations in this language, such as en
    min_answer_chars: int = 0       # drop a conversation with a shorter answer
    max_chars: int = 0              # drop a longer conversation; 0: no bound
    drop_refusals: bool = False     # cut a conversation before the first question whose answer refuses
    near_duplicates: float = 0.8    # drop a conversation that shares this much (Jaccard) with an earlier one; 0: none


class Cleaner:
    """Cleans conversations one after the other and counts what each step did.

    A step is a function from turns to turns; it leaves none of a conversation that it drops. What was cut off or
    dropped goes to the file `removed`, one JSON a line: step, where, turns; its tokens are counted by a tokenizer.
    """

    def __init__(
        self, options: Cleaning, removed: str | Path | None = None, tokenizer: Tokenizer | None = None
    ):
        for name in ("min_answer_chars", "max_chars"):
            if getattr(options, name) < 0:
                raise BadInput(f"--{name} {getattr(options, name)} must be at least 0")
        steps = {
            "html": options.html and html_to_markdown,
            "characters": tidy_characters,
            "empty": drop_empty,
            "roles": mend_roles,
            "language": options.language and in_language(options.language),
            "refusals": options.drop_refusals and cut_refusals,
            "short": options.min_answer_chars and drop_short(options.min_answer_chars),
            "long": options.max_chars and drop_long(options.max_chars),
            "copies": drop_copies(),
            "near copies": options.near_duplicates and drop_near_copies(options.near_duplicates),
        }
        self.steps = {name: step for name, step in steps.items() if step}
        self.removed, self.tokenizer = removed, tokenizer
        self.counts = {name: Counter() for name in ("read", *self.steps, "kept")}
        self.examples = {}

    def __call__(self, turns: list[Turn], where: str = "") -> list[Turn] | None:
        """The cleaned conversation, or None where a step dropped it; where says in the report which one it was."""
        self._count("read", "conversations", turns, [])
        for name, step in self.steps.items():
            before, turns = turns, step(turns)
            if turns != before:
                self._count(name, "changed" if turns else "dropped", before, turns)
                self._keep_what_went(name, before, turns, where)
            if not turns:
                return None
        self._count("kept", "conversations", turns, [])
        return turns

    def _count(self, name: str, effect: str, before: list[Turn], after: list[Turn]):
        chars = sum(len(turn.text) for turn in before) - sum(len(turn.text) for turn in after)
        self.counts[name].update({effect: 1, "turns": len(before) - len(after), "characters": chars})

    def _keep_what_went(self, name: str, before: list[Turn], after: list[Turn], where: str):
        """What was cut off in the file `removed`, and the first of each step's doings as examples."""
        cut = _left_out(before, after) if len(after) < len(before) else []
        if self.tokenizer:
            self.counts[name]["tokens"] += sum(len(self.tokenizer.encode(turn.text)) for turn in cut)
        if cut and self.removed:
            row = {"step": name, "where": where, "turns": [turn._asdict() for turn in cut]}
            with writing(self.removed), open(self.removed, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        examples = self.examples.setdefault(name, [])
        if len(examples) < 3:
            examples.append(f"{where} {_difference(before, after, cut)}".strip())

    def report(self) -> str:
        """A table of how many conversations each step changed or dropped and what it took from them, and examples."""
        columns = ("conversations", "changed", "dropped", "turns", "characters", "tokens")
        lines = [f"{'':12}" + "".join(f"{column:>14}" for column in columns)]
        for name, counts in self.counts.items():
            cells = (f"{counts[column]:,}" if counts[column] else "" for column in columns)
            lines.append(f"{name:12}" + "".join(f"{cell:>14}" for cell in cells))
        shown = [f"{name}: {example}" for name, examples in self.examples.items() for example in examples]
        return "\n".join(line.rstrip() for line in [*lines, *shown])


def _left_out(before: list[Turn], after: list[Turn]) -> list[Turn]:
    """The turns of before that are not in after, which holds the others in their order, some perhaps joined."""
    cut, place, start = [], 0, 0  # before goes on at character `start` of turn `place` of after
    for turn in before:
        end = start + len(turn.text)
        joined = after[place] if place < len(after) else Turn("", "")
        ends = end == len(joined.text)
        if turn.role == joined.role and joined.text.startswith(turn.text, start) and (
            ends or joined.text.startswith("\n\n", end)
        ):
            place, start = (place + 1, 0) if ends else (place, end + 2)
        else:
            cut.append(turn)
    return cut


def _difference(before: list[Turn], after: list[Turn], cut: list[Turn]) -> str:
    """The first answer that was cut off, or else the first turn that changed from where it did."""
    if cut:
        return repr(next((turn.text for turn in cut if turn.role == "assistant"), cut[0].text)[:120])
    old, new = next((old.text, new.text) for old, new in zip(before, after) if old != new)
    start = max(0, len(os.path.commonprefix([old, new])) - 20)
    return f"{old[start : start + 60]!r} became {new[start : start + 60]!r}"
