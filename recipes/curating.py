"""Questions with answers to choose from, LIMA's rules for a good one, and what GME looks at in them.

The rules are those for StackExchange of Zhou et al. 2023, arXiv:2305.11206. They also took of each exchange the
questions and answers that were voted best; where there are no votes, chance decides.
"""

import ast
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from entropy import Category, gme

from data import Tokenizer
from lib.chat_formats import read_conversations
from lib.errors import BadInput
from lib.sources import find_files

LIMA = (1200, 4096)    # characters of an answer that is kept
LENGTHS = (100, 700)   # the same for a small window
ARMS = ("random", "rules", "many sources", "few sources", "GME", "GME and rules", "random, 4 times")
FIRST_PERSON = re.compile(r"\b(?:I|[Mm]y)\b")
OTHER_ANSWERS = re.compile(r"as mentioned|stack ?exchange", re.I)


class Record(NamedTuple):
    question: str
    answer: str
    group: str  # where it is from: a module, or how an instruction begins


def good(answer: str, shortest: int = LIMA[0], longest: int = LIMA[1]) -> bool:
    """Whether LIMA's rules keep an answer: of this many characters, not in the first person, not about other answers.

    >>> [good(text, 5, 50) for text in ("Sort them.", "No.", "I sort my files.", "As mentioned, sort.", "Iris, sorted")]
    [True, False, False, False, True]
    """
    inside = shortest <= len(answer) <= longest
    return inside and not FIRST_PERSON.search(answer) and not OTHER_ANSWERS.search(answer)


def by_temperature(groups: list[str], draw: random.Random, temperature: float = 3) -> Iterator[int]:
    """Places in a random order: a group is drawn with the power 1 / temperature of its size, then one of its places.

    A group that is used up is drawn no more; LIMA's temperature is 3.
    """
    places = defaultdict(list)
    for place in draw.sample(range(len(groups)), len(groups)):
        places[groups[place]].append(place)
    weights = {group: len(some) ** (1 / temperature) for group, some in places.items()}
    while weights:
        (group,) = draw.choices(list(weights), list(weights.values()))
        yield places[group].pop()
        if not places[group]:
            del weights[group]


def whole_groups(groups: list[str], draw: random.Random) -> list[int]:
    """Places, one whole group after the other: each next one is that of a place drawn at random.

    >>> [("aab"[place]) for place in whole_groups(["a", "a", "b"], random.Random(0))] in (list("aab"), list("baa"))
    True
    """
    order = draw.sample(range(len(groups)), len(groups))
    first = {}
    for number, place in enumerate(order):
        first.setdefault(groups[place], number)
    return sorted(order, key=lambda place: first[groups[place]])


def categories(records: list[Record]) -> tuple[Category, ...]:
    """What GME makes diverse: groups, words of questions, words of answers, and lengths of answers in powers of 2.

    Words have four letters or more and are in at least five records, but in at most a twentieth of them.
    """
    columns = [[{record.group} for record in records]]
    for texts in zip(*(record[:2] for record in records)):
        words = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in texts]
        found = Counter(word for some in words for word in some)
        topics = {word for word, count in found.items() if 5 <= count <= max(5, len(records) / 20)}
        columns.append([some & topics for some in words])
    columns.append([{len(record.answer).bit_length()} for record in records])
    return tuple(Category(map(sorted, column)) for column in columns)


def choose(arm: str, pool: list[Record], seed: int, size: int) -> list[int]:
    """Places in the pool: the first in an arm's order whose answers have so many bytes together."""
    draw, places = random.Random(seed), list(range(len(pool)))
    if "rules" in arm or "sources" in arm:
        places = [place for place in places if good(pool[place].answer, *LENGTHS)]
    some = [pool[place] for place in places]
    groups = [record.group for record in some]
    if "GME" in arm:
        order = (item for item, _ in gme(*categories(some)))
    elif "sources" in arm:
        order = by_temperature(groups, draw) if arm == "many sources" else whole_groups(groups, draw)
    else:
        order = draw.sample(range(len(some)), len(some))
    chosen, left = [], 4 * size if "4 times" in arm else size
    for item in order:
        chosen.append(places[item])
        left -= len(some[item].answer.encode())
        if left <= 0:
            return chosen
    raise BadInput(f"--size {size:,} is more than the answers that can be chosen have ({arm})")


def library(folder: Path, split: str, tokenizer: Tokenizer) -> list[Record]:
    """Functions and classes of a dataset of Python files, each a question, and their docstrings as answers."""
    found = []
    for number, ids in enumerate(read_split(folder, split)):
        for node in ast.walk(ast.parse(tokenizer.decode(ids))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                takes = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                kind = "function" if takes else "class"
                question = f"Write the docstring of this {kind}.\n{node.name}{takes}"
                found.append(Record(question, text, f"file {number}"))
    return list(dict.fromkeys(found))


def read(source: str, downloads: Path) -> list[Record]:
    """The first question and answer of each conversation of a file, or of a named corpus, which is downloaded."""
    found = []
    for file in find_files((source,), downloads, (".json", ".jsonl", ".jsonl.gz", ".parquet")):
        for record in read_conversations(file):
            turns = record.sides[0] if len(record.sides) == 1 else []
            if [turn.role for turn in turns[:2]] == ["user", "assistant"] and turns[1].text.strip():
                question, answer = (turn.text.strip() for turn in turns[:2])
                found.append(Record(question, answer, question.split()[0] if question else ""))
    if not found:
        raise BadInput(f"--records {source} holds no questions with answers")
    return list(dict.fromkeys(found))
