"""What a model answered: collected until a question is complete, then graded, one record a question."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from lib.prompts import Question
from lib.results import append_lines, read_lines


class Answers:
    """The records of an evaluation so far, by the place of their question."""

    def __init__(self, task: str, grade: Callable, questions: list[Question], keys: list[str]):
        self.task, self.grade, self.questions, self.keys = task, grade, questions, keys
        self.records: dict[int, dict] = {}
        self.begun: dict[int, dict] = defaultdict(dict)  # of a question: what is known by choice
        self.right: list[float] = []  # the first score of each record

    def resume(self, lines: Path) -> list[int]:
        """Take over the records of an evaluation that was broken off; the places of their questions.

        The file is made now, so that a name that cannot be written fails before the work.
        """
        self.records = read_lines(lines, self.questions, self.keys)
        for record in self.records.values():
            self.right += first_score(record)
        append_lines(lines, [])
        return list(self.records)

    def add(self, results: list[tuple[int, int, float | str]]) -> list[dict]:
        """The records of questions that become complete by these: (question, choice, answer)."""
        new = []
        for number, choice, answer in results:
            question, known = self.questions[number], self.begun[number]
            known[choice] = answer
            if len(known) < max(1, len(question.choices)):
                continue
            del self.begun[number]
            if question.choices:
                answer = [known[i] for i in range(len(known))]
                self.check_finite(question, answer)
            record = self.record(number, question) | self.grade(question, answer)
            self.records[number] = record
            self.right += first_score(record)
            new.append(record)
        return new

    def check_finite(self, question: Question, logprobs: list[float]):
        if not all(map(math.isfinite, logprobs)):
            place = f"{question.subject} {question.index}"
            why = "the model is damaged, or was trained to NaN"
            raise ValueError(f"log-probabilities of {place} are not finite; {why}")

    def record(self, number: int, question: Question) -> dict:
        """What a record says of its question."""
        gold = question.gold
        if len(gold) < 2:
            gold = gold[0] if gold else question.target
        return {
            "task": self.task,
            "subject": question.subject,
            "index": question.index,
            "shots": question.shots,
            "num_tokens": len(question.context),
            "cut": question.cut,
            "gold": gold,
            "key": self.keys[number],
            "question_sha256": question.sha256,
        }

    def share_right(self) -> str:
        return f"{sum(self.right) / len(self.right):.1%}" if self.right else ""

    def in_order(self) -> list[dict]:
        return [self.records[number] for number in sorted(self.records)]


def first_score(record: dict) -> list[float]:
    return list(record.get("scores", {}).values())[:1]
