"""What a model reads at a time: rows alike in length, their common beginning set apart."""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from lib.prompts import Question


class Row(NamedTuple):
    """What is read for one question, or for those of its choices that differ in the last token."""

    question: int
    ids: list[int]
    begin: int            # from here on the ids are part of the choice
    last: dict[int, int]  # choice: its last token, which need not be read


class ScoreBatch(NamedTuple):
    prefix: list[int]     # what all rows begin with, read once
    rows: list[Row]


def rows_to_read(questions: list[Question]) -> Iterator[Row]:
    """Of every question what has to be read, once where choices are alike up to the last token."""
    for number, question in enumerate(questions):
        context = question.context
        if not question.choices:
            yield Row(number, context, len(context), {})
        alike: dict[tuple, dict[int, int]] = defaultdict(dict)
        for place, (context, choice) in enumerate(question.choices):
            *read, last = choice
            alike[id(context), *read][place] = last
        for last_tokens in alike.values():
            first = next(iter(last_tokens))
            context, choice = question.choices[first]
            ids = context + choice[:-1]
            yield Row(number, ids, len(context), last_tokens)


def make_batches(
    questions: list[Question], rows: list[Row], batch_tokens: int, new_tokens: int = 0
) -> list[ScoreBatch]:
    """Rows in batches of at most batch_tokens read and four times that many kept in caches.

    Those of a batch are alike in length. Questions of a subject that keep the same examples begin
    alike; where that saves enough, their rows come together and what they have in common is the
    batch's prefix.
    """
    groups, others, batches = defaultdict(list), [], []
    for row in rows:
        question = questions[row.question]
        groups[question.subject, question.shots].append(row)
    for group in groups.values():
        common = os.path.commonprefix([row.ids for row in group])
        common = common[: min(row.begin for row in group) - 1]
        saved = len(common) * (len(group) - 1)
        if saved > sum(len(row.ids) for row in group) / 10:
            batches += cut_to_size(group, common, batch_tokens, new_tokens)
        else:
            others += group
    return batches + list(cut_to_size(others, [], batch_tokens, new_tokens))


def cut_to_size(
    rows: list[Row], prefix: list[int], batch_tokens: int, new_tokens: int
) -> Iterator[ScoreBatch]:
    rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    while rows:
        longest = len(rows[0].ids)
        read = batch_tokens // (longest - len(prefix))
        kept = 4 * batch_tokens // (longest + new_tokens)
        size = max(1, min(read, kept))
        yield ScoreBatch(prefix, rows[:size])
        rows = rows[size:]
