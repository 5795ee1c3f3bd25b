"""What a model answered: how that is measured, answers until they are graded, and their files."""

import hashlib
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from lib.cli import git_commit
from lib.errors import BadInput
from lib.prompts import Question, prompt_hash
from lib.results import append_lines, check_out, read_lines, read_result, write_all
from lib.tables import heading

FLAGS = ("task", "protocol", "shots", "max_prompt", "bos", "chat", "subjects", "limit")
DEFINING = (  # what makes an evaluation this one: two that have all of it in common are the same
    *FLAGS, "max_new_tokens", "stop", "dtype", "context_window", "tokenizer_sha256",
    "prompts_sha256", "questions_sha256", "weights_sha256",
)  # fmt: skip


# ---- how it is measured ----


def describe(config, protocol, path: str, model, tokenizer) -> dict:
    """How a result is measured: eval.py's flags, the protocol, and what runs it."""
    names = ("task", "data", *FLAGS[1:], "template", "quantize")
    beside = ("amateur", "beta") if config.amateur else ()
    return {"model": path} | {name: getattr(config, name) for name in (*names, *beside)} | {
        "max_new_tokens": protocol.max_new_tokens,
        "stop": protocol.stop,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "context_window": model.config.max_seq_len,
        "tokenizer_sha256": tokenizer.sha256,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def identify(
    questions: list[Question], tokenizer, model, model_hash: str, protocol: str
) -> tuple[list[str], dict]:
    """A key for each question, by which its answer is known again, and what a result says of all.

    model_hash is `weights_sha256` of the model, protocol a name.
    """
    prompts = [prompt_hash(question) for question in questions]
    sources = [question.sha256.encode() for question in questions]
    known = f"{model_hash} {model.embedding.weight.dtype} {protocol}".encode()
    keys = []
    for prompt, source in zip(prompts, sources):
        keys.append(hashlib.sha256(known + prompt + source).hexdigest()[:16])
    return keys, {
        "questions": len(questions),
        "prompt_tokens": sum(len(question.context) for question in questions),
        "prompts_sha256": hashlib.sha256(b"".join(prompts)).hexdigest(),
        "questions_sha256": hashlib.sha256(b"".join(sources)).hexdigest(),
        "weights_sha256": model_hash,
        "first_prompt": tokenizer.decode(questions[0].context),
    }


# ---- answers ----


class Answers:
    """The records of an evaluation so far, by the place of their question; and in X.jsonl."""

    def __init__(
        self, config, grade: Callable[..., dict], questions: list[Question], keys: list[str]
    ):
        """grade is that of the protocol; with --out, lines are written beside it."""
        self.task, self.grade, self.questions, self.keys = config.task, grade, questions, keys
        self.lines = Path(config.out).with_suffix(".jsonl") if config.out else None
        self.records: dict[int, dict] = {}
        self.begun: dict[int, dict] = defaultdict(dict)  # of a question: what is known by choice
        self.right: list[float] = []  # the first score of each record

    def resume(self) -> list[int]:
        """Take over the records of an evaluation that was broken off; where their questions are.

        The file is made now, so that a name that cannot be written fails before the work.
        """
        if self.lines is None:
            return []
        self.records = read_lines(self.lines, self.questions, self.keys)
        for record in self.records.values():
            self.right += first_score(record)
        append_lines(self.lines, [])
        return list(self.records)

    def add(self, results: list[tuple[int, int, float | str]]) -> int:
        """Take results of (question, choice, answer), and grade the questions that they complete.

        Returns how many these are.
        """
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
        if self.lines:
            append_lines(self.lines, new)
        return len(new)

    def check_finite(self, question: Question, logprobs: list[float]):
        if not all(map(math.isfinite, logprobs)):
            place = f"{question.subject} {question.index}"
            why = "the model is damaged, or was trained to NaN"
            raise BadInput(f"log-probabilities of {place} are not finite; {why}")

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


# ---- files ----


def check_free(out: Path, task: str, protocol: str):
    """Raise ValueError unless a result can be written as out, or one of its kind be continued."""
    line = json.dumps({"task": task, "subject": ""})
    check_out(out, jsonl=line.removesuffix('"}'), md=heading(task, protocol) + "\n")


def read_finished(out: Path, described: dict) -> dict:
    """The result at out. Raises ValueError where it is not of the evaluation that is described."""
    return read_result(out, {name: described[name] for name in DEFINING})


def write_result(out: Path, result: dict, records: list[dict], table: str):
    """Write the three files of a result, and say so."""
    lines, page = out.with_suffix(".jsonl"), out.with_suffix(".md")
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_all({lines: text, page: table + "\n", out: json.dumps(result, indent=2)})
    print(f"\nwrote {out}, {lines} and {page}")
