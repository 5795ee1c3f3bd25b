"""Questions of multiple choice from any text: a piece of it, how it really goes on, and three other ways.

    python recipes/cloze.py --data data/stdlib --kind other --count 1000 --out other.jsonl
    python eval.py --model out/stdlib --task choices --data other.jsonl

Wrong answers are of one of three kinds, since results depend on it: `other`, from another document; `same`, from
another place of this one; `written`, by the model --writer, drawn at temperature 1 from the same context, as
HellaSwag's were (Zellers et al. 2019, arXiv:1905.07830). All four have as many tokens, so none wins by its length.
Documents are those of the validation split, which no model of the dataset has read.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from writing import writer

from data import Tokenizer
from lib.cli import BadInput, run_command
from lib.files import write_whole
from lib.meta import read_meta
from sample import load_model


class Place(NamedTuple):
    document: int
    token: int  # the first of the continuation, which begins with a blank


def read_split(folder: Path, split: str = "val") -> list[list[int]]:
    """The documents of a dataset of text, as ids without BOS and EOS."""
    meta, found = read_meta(folder), []
    for file in meta["splits"][split]["files"]:
        ids = np.fromfile(Path(folder) / file["file"], meta["dtype"])
        begins = np.flatnonzero(ids == meta["bos"])
        found += [part[1:-1].tolist() for part in np.split(ids, begins)[1:]]
    return found


def places_of(documents: list[list[int]], tokenizer: Tokenizer, context: int, size: int) -> list[Place]:
    """Where a continuation may begin: at a blank between two words, with room on both sides."""
    words = {token for token in range(tokenizer.vocab_size) if begins_word(tokenizer, token)}
    found = []
    for number, ids in enumerate(documents):
        for token in range(context, len(ids) - size):
            if ids[token] in words:
                found.append(Place(number, token))
    return found


def begins_word(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token is one blank and letters."""
    start = tokenizer.decode([token, token])  # behind another, so that the blank is not lost
    word = start[len(start) // 2 :]
    return word[:1] == " " and word[1:].isalpha()


def make_questions(
    documents: list[list[int]],
    tokenizer: Tokenizer,
    kind: str,
    count: int,
    context: int = 64,
    size: int = 16,
    seed: int = 0,
    write=None,
) -> Iterator[dict]:
    """Questions for eval.py's task choices, the places of the right answer in turn.

    Contexts and right answers, of so many tokens, are the same for every kind. write(contexts, tokens) gives answers of
    the kind `written`.
    """
    places = places_of(documents, tokenizer, context, size)
    if len(places) < count:
        raise BadInput(f"--count {count} is more than the {len(places)} places where a question can be asked")
    chosen = random.Random(seed).sample(places, count)
    contexts = [documents[place.document][place.token - context : place.token] for place in chosen]
    written = write([ids for ids in contexts for _ in range(3)], size) if kind == "written" else []
    draw = random.Random(f"{kind} {seed}")
    for number, (place, ids) in enumerate(zip(chosen, contexts)):
        answers = written[3 * number : 3 * number + 3]
        while len(answers) < 3:
            other = draw.choice(places)
            far = abs(other.token - place.token) >= size
            elsewhere = other.document != place.document
            if elsewhere if kind == "other" else far and not elsewhere:
                answers.append(documents[other.document][other.token : other.token + size])
        answers.insert(number % 4, documents[place.document][place.token : place.token + size])
        before = tokenizer.decode(ids)
        choices = [tokenizer.decode(ids + answer)[len(before) :].removeprefix(" ") for answer in answers]
        yield {"subject": kind, "context": before, "choices": choices, "answer": number % 4}


@dataclass
class Config:
    """Make questions of multiple choice from the validation documents of a dataset."""

    data: str
    out: str                # a .jsonl for eval.py --task choices
    kind: Literal["other", "same", "written"] = "other"
    writer: str = ""        # of the kind `written`: the model that writes wrong answers
    count: int = 1000
    context: int = 64       # tokens
    size: int = 16          # tokens of an answer
    seed: int = 0
    trust_variant: bool = False


def main(config: Config):
    tokenizer, write = Tokenizer(config.data), None
    if (config.kind == "written") != bool(config.writer):
        raise BadInput("--kind written needs --writer, and no other kind does")
    if config.writer:
        write = writer(*load_model(config.writer), config.seed)
    documents, sizes = read_split(Path(config.data)), (config.count, config.context, config.size, config.seed)
    questions = list(make_questions(documents, tokenizer, config.kind, *sizes, write))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(config.out), "".join(json.dumps(row) + "\n" for row in questions))
    print(f"wrote {len(questions):,} questions to {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
