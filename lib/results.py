"""Results as files: which names are free, lines added as they come, what is read back from them.

A result X.json has a table beside it in X.md, and in X.jsonl a line for each question.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from lib.errors import BadInput
from lib.files import write_whole
from lib.records import checked, parse_json, read_json, read_record

Share = Annotated[float, Meta(ge=0, le=1.000001)]  # a sum of probabilities may be rounded up
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]  # neither infinite nor NaN
Interval = Annotated[list[Finite], Meta(min_length=3, max_length=3)]  # value, low, high


class Averages(TypedDict):
    micro: Interval
    macro: Interval


class Scores(TypedDict):
    """The scores of a task that has answers."""

    scores: Annotated[dict[str, Averages], Meta(min_length=1)]


class TextScores(TypedDict):
    """The scores of perplexity."""

    bits_per_byte: Interval


class Protocol(TypedDict):
    """How the questions of X.json were asked: results are compared only where all of it is equal.

    --limit and --subjects are not here, since the questions themselves are compared.
    """

    task: str
    protocol: str
    shots: int
    max_prompt: int
    bos: bool
    chat: bool


class Line(TypedDict):
    """A line of X.jsonl: a question, and what came of it."""

    subject: str
    index: int
    shots: int
    num_tokens: int
    cut: int
    question_sha256: str


class Answer(Line):
    scores: Annotated[dict[str, Share], Meta(min_length=1)]


class Text(Line):
    nats: Annotated[float, Meta(ge=0, le=1e300)]
    bytes: Annotated[float, Meta(gt=0, le=1e300)]
    words: NotRequired[int]
    document: NotRequired[str]  # where a line is a window of a document, its name


# ---- writing ----


def check_out(out: Path, **beginnings: str | None):
    """Raise ValueError unless a result can be written as `out` and beside it, with these suffixes.

    Nothing may be there, a link to nowhere included, but what begins as an unfinished result of the
    same kind does: suffix=BEGINNING.
    """
    for path, beginning in (
        (out, None),
        *((out.with_suffix(f".{name}"), text) for name, text in beginnings.items()),
    ):
        if not os.path.lexists(path) or beginning is not None and _begins(path, beginning):
            continue
        why = "exists" if beginning is None else "exists and is no unfinished result of this kind"
        raise BadInput(f"--out: {path} {why}; choose another name")


def _begins(path: Path, text: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        found = file.read(len(text.encode()))
    return found in (b"", text.encode())


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """An error of the system that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(error.filename or path)) from None


def append_lines(path: Path, records: list[dict]):
    """Add records to a .jsonl. Raises OSError naming it."""
    with about(path), open(path, "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def write_all(texts: dict[Path, str | bytes]):
    """Write the files of a result. When one cannot be written, those that are new here go again."""
    made = []
    try:
        for path, text in texts.items():
            made += [] if path.exists() else [path]
            write_whole(path, text)
    except OSError:
        for path in made:
            path.unlink(missing_ok=True)
        raise


# ---- reading ----


def check_same(path: Path, expected: dict):
    """Raise ValueError naming what differs where the result at path has other values."""
    found = read_json(path)
    differing = [
        name for name, value in json.loads(json.dumps(expected)).items() if found.get(name) != value
    ]
    if differing:
        names = ", ".join(differing)
        raise BadInput(
            f"--out: {path} is of another evaluation; choose another name (other {names})"
        )


def read_result(path: Path, expected: dict) -> dict:
    """The result at path. Raises ValueError where it is of another evaluation, or damaged."""
    check_same(path, expected)
    result = read_json(path, "scores")
    checked(result["scores"], TextScores if expected["task"] == "perplexity" else Scores, path)
    return result


def check_line(record: Any, task: str, where: str | Path) -> dict:
    """What a comparison needs of a line. Raises ValueError naming a field that is missing or wrong."""
    return checked(record, Text if task == "perplexity" else Answer, where)


def read_lines(path: Path, questions: list, keys: list[str]) -> dict[int, dict]:
    """The records of an evaluation that was broken off, by the place of their question.

    A last line that is not whole is deleted. Raises ValueError naming the line that is not of this
    model, these questions, prompts and this protocol.
    """
    if not path.exists():
        return {}
    places = {(question.subject, question.index): i for i, question in enumerate(questions)}
    data, done = path.read_bytes(), {}
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = parse_json(line, path)
            check_line(record, record["task"], path)
            place = places[record["subject"], record["index"]]
            if record["key"] != keys[place]:
                raise KeyError
        except (ValueError, KeyError, TypeError):
            problem = "is of another evaluation; choose another name"
            raise BadInput(f"--out: {path}:{number} {problem}") from None
        done[place] = record
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return done


def read_answers(path: Path) -> tuple[Protocol, dict[tuple[str, int], dict]]:
    """How a result was measured, and its lines by (hash of the question, how many had it before).

    Raises ValueError naming file, line and field.
    """
    result, lines = read_record(path, Protocol), path.with_suffix(".jsonl")
    found, counts, places = {}, Counter(), set()
    if not lines.exists():
        raise BadInput(f"{lines} is missing, the lines of {path}")
    for number, line in enumerate(lines.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        where = f"{lines}:{number}"
        record = parse_json(line, where)
        if isinstance(record, dict) and "question_sha256" not in record:
            raise BadInput(
                f"{where} does not say which question it answers (no question_sha256): evaluate again"
            )
        record = check_line(record, result["task"], where)
        if (place := (record["subject"], record["index"])) in places:
            raise BadInput(f"{where}: {place[0]} {place[1]} is there twice")
        places.add(place)
        found[record["question_sha256"], counts[record["question_sha256"]]] = record
        counts[record["question_sha256"]] += 1
    if (
        total := checked(read_json(path, "questions")["questions"], int, f"{path}: questions")
    ) != len(found):
        raise BadInput(f"{lines} has {len(found)} lines, {path} speaks of {total} questions")
    return result, found


def read_pairs(paths: tuple[Path, Path]) -> tuple[Protocol, list[tuple[dict, dict]]]:
    """The lines of two results that answer the same question, and by what they were measured.

    Raises ValueError where they were not asked the same questions in the same way.
    """
    (protocol, first), (other, second) = map(read_answers, paths)
    for name in Protocol.__annotations__:
        if protocol[name] != other[name]:
            each = ", ".join(
                f"{path} has {result[name]}" for path, result in zip(paths, (protocol, other))
            )
            raise BadInput(
                f"--compare needs the same questions, asked in the same way; of {name}, {each}"
            )
    if first.keys() != second.keys():
        both = len(first.keys() & second.keys())
        each = ", ".join(f"{path} has {len(lines)}" for path, lines in zip(paths, (first, second)))
        raise BadInput(
            f"--compare needs the same questions: {each}, and {both} of them are in both"
        )
    pairs = [(record, second[key]) for key, record in first.items()]
    for one, two in pairs:
        if (
            one.get("bytes") != two.get("bytes")
            or one.get("scores", {}).keys() != two.get("scores", {}).keys()
        ):
            place = f"{one['subject']} {one['index']}"
            raise BadInput(
                f"--compare: {place} has other bytes or other scores in {paths[1]} than in {paths[0]}"
            )
    return protocol, pairs
