"""Questions as a model sees them: token ids of a context, and what may follow it.

config is eval.py's Config; of it bos, chat, template, subjects, task and data are used.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.chat_formats import Turn
from lib.errors import BadInput
from lib.template_forms import form_of
from lib.templates import render_prompt

Pair = tuple[list[int], list[int]]  # ids of a context, and of what may follow it


@dataclass
class Question:
    """A context, and the choices that may follow it or the text that should.

    Of choices the likeliest is the answer.
    """

    subject: str
    index: int                   # in the subject's file
    context: list[int]
    choices: list[Pair] = field(default_factory=list)  # none where the model writes
    gold: list[int] = field(default_factory=list)      # the choices that are right
    target: str = ""             # the text that is right
    shots: int = 0               # examples that the context has kept
    cut: int = 0                 # tokens lost from its left, when even without examples it was too long
    sizes: list[int] = field(default_factory=list)     # characters of the choices; bytes and words of a document
    sha256: str = ""             # of the question's own text and the right answers, for any model
    document: str = ""           # of a window of a dataset, the document in which it starts


def question_hash(*parts: Any) -> str:
    """A hash of a question's own text, choices and right answers, equal for every model and prompt."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def prompt_hash(question: Question) -> bytes:
    """A hash of all ids of a question: of this prompt, by this tokenizer."""
    parts = [question.context]
    for pair in question.choices:
        parts += [part for part in pair if part is not question.context]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.array([len(part), *part], "<u4").tobytes())
    return digest.digest()


# ---- ids ----


def encode(config, tokenizer, text: str) -> list[int]:
    if not config.chat:
        return tokenizer.encode(text, bos=config.bos)
    ids = render_prompt([Turn("user", text)], config.template, tokenizer)
    if not config.bos and ids[0] == tokenizer.bos_id:
        return ids[1:]
    return ids


def pair(config, tokenizer, context: str, text: str) -> Pair:
    """The ids of context, and those that text adds after it.

    Both are encoded together: sentencepiece begins a text with a blank of its own (LLaMA-2 makes two
    ids of " A", and one after "Answer:"). A tokenizer whose pieces join the end of the one and the
    beginning of the other encodes text by itself. Blanks at the end of context go to text; an empty
    context is BOS. Raises ValueError for a text of no ids.
    """
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    context = stripped
    if config.chat and context:
        before, _, _ = form_of(config.template).answer.partition("{answer}")
        return encode(config, tokenizer, context), tokenizer.encode_after(before + text.strip())
    bos = config.bos or not context
    head = tokenizer.encode(context, bos=bos)
    whole = tokenizer.encode(context + text, bos=bos)
    choice = whole[len(head) :]
    if whole[: len(head)] != head:
        choice = tokenizer.encode(text)
    if not choice:
        raise BadInput(f"{text!r} has no tokens")
    return head, choice


class Prompts:
    """The few-shot prompts of one subject: a header, as many of the examples as fit, and a question."""

    def __init__(self, config, tokenizer, header: str, examples: list[str], room: int):
        self.config, self.tokenizer, self.room = config, tokenizer, room
        self.header, self.examples = header, examples
        self.sizes = [len(tokenizer.encode(text)) for text in (header, *examples)]

    def encode(self, question: str, shots: int) -> list[int]:
        text = self.header + "".join(self.examples[:shots]) + question
        return encode(self.config, self.tokenizer, text)

    def guess(self, question: str) -> int:
        """About how many examples fit, by the sizes of the parts, which saves encoding long prompts often."""
        spare = self.room - self.sizes[0] - len(encode(self.config, self.tokenizer, question))
        for shots, size in enumerate(self.sizes[1:]):
            spare -= size
            if spare < 0:
                return shots
        return len(self.examples)

    def ask(self, question: str) -> dict:
        """Context, shots and cut of a Question: examples leave from the end until it has at most room tokens."""
        shots = self.guess(question)
        ids = self.encode(question, shots)
        while shots < len(self.examples):
            more = self.encode(question, shots + 1)
            if len(more) > self.room:
                break
            ids, shots = more, shots + 1
        while len(ids) > self.room and shots:
            shots -= 1
            ids = self.encode(question, shots)
        cut = max(0, len(ids) - self.room)
        return {"context": ids[cut:], "shots": shots, "cut": cut}


def chosen_subjects(config, known: list[str]) -> list[str]:
    """The subjects that --subjects names, else all known ones. Raises ValueError for another."""
    if not config.subjects:
        return known
    named = list(dict.fromkeys(map(str.strip, config.subjects.split(","))))
    for subject in named:
        if subject not in known:
            others = f"{config.task}'s {len(known)}, such as {known[0]}"
            raise BadInput(f"--subjects {subject} is not one of {others}")
    return named


# ---- files of questions ----


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}") from None


def text_of(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise BadInput(f"{name} must be a text and is a {type(row[name]).__name__}")
    return row[name]


def texts_of(row: dict, name: str) -> list[str]:
    if not isinstance(row[name], list) or not all(isinstance(part, str) for part in row[name]):
        raise BadInput(f"{name} must be a list of texts")
    return row[name]


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, object) of a .jsonl, or of a .json that holds a list.

    Raises ValueError naming them.
    """
    if not path.is_file():
        raise BadInput(f"--data {path} is not a file of questions")
    whole = read_text(path)
    one_list = path.suffix == ".json"
    for number, part in enumerate([whole] if one_list else whole.split("\n"), 1):
        rows = _parse(part, path, number)
        for place, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            name = f"{path}: question {place}" if one_list else f"{path}:{number}"
            if not isinstance(row, dict):
                raise BadInput(f"{name}: not an object but {str(row)[:40]}")
            yield name, row


def _parse(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{number + error.lineno - 1}: not JSON ({error.msg})") from None
    except (RecursionError, ValueError):  # Python bounds depth, and the digits of an integer
        problem = "nested too deeply, or a number of too many digits"
        raise BadInput(f"{path}:{number}: {problem}") from None


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """An object of a file that lacks something raises one ValueError that says where."""
    try:
        yield
    except KeyError as error:
        raise BadInput(f"{place}: no field {error}") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise BadInput(f"{place}: {error}") from None
