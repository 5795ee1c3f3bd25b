"""Conversations and preference pairs as the usual formats write them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lib.errors import BadInput
from lib.record_files import read_records
from lib.turns import ROLES, Turn, field_of, in_columns, roles_of


class Record(NamedTuple):
    """A conversation, or the two of a preference pair, chosen and rejected; for a bad record, what
    is wrong with it."""

    place: str  # file:line, or file:number for a record of a .json file
    sides: tuple[list[Turn], ...] = ()
    problem: str = ""


INPUT = "\n\n### Input:\n"  # stands between the instruction and the input of an Alpaca record


def read_conversations(path: Path, format: str = "auto", columns: str = "") -> Iterator[Record]:
    """The records of a file that lib/record_files.py reads, bad ones with their problem.

    format auto goes by the fields of each record; columns are `--fields`. Raises ValueError where
    the file itself cannot be read, or has no such column.
    """
    wanted = roles_of(columns)
    for place, record in read_records(path, tuple(wanted)):
        try:
            sides = _read_record(record, format, wanted)
        except UnicodeEncodeError:
            yield Record(place, problem="half of a surrogate pair, not Unicode text")
        except ValueError as error:
            yield Record(place, problem=str(error))
        else:
            yield Record(place, sides)


def _read_record(record, format: str, wanted: dict[str, str]) -> tuple[list[Turn], ...]:
    """The conversation of a record, or both of a pair. Raises ValueError for a bad record."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise BadInput(f"a {type(record).__name__}, not an object")
    record = {name: value for name, value in record.items() if value is not None}
    if wanted:
        sides = (in_columns(record, wanted),)
    else:
        sides = FORMATS[detect(record) if format == "auto" else format](record)
    for side in sides:
        for turn in side:
            turn.text.encode()  # raises where it is not Unicode
    return sides


def detect(record: dict) -> str:
    """The format of a record, by its fields. Raises ValueError for an unknown one."""
    if {"chosen", "rejected"} & record.keys():
        for name in ("chosen", "rejected"):
            field_of(record, name, kind=object)
        whole_text = isinstance(record["chosen"], str) and "prompt" not in record
        return "hh-rlhf" if whole_text else "pairs"
    if "conversations" in record or "messages" in record:
        return "sharegpt" if "conversations" in record else "openai"
    if "instruction" in record:
        return "dolly" if {"category", "context", "response"} & record.keys() else "alpaca"
    if {"prompt", "completion"} <= record.keys():
        return "completion"
    if any("### Human:" in str(record.get(name)) for name in ("input", "text")):
        return "oasst"
    raise BadInput(f"no known format has the fields {', '.join(record)}")


def messages_of(record: dict) -> tuple[list[Turn]]:
    """ShareGPT and OpenAI; an answer whose label is false was marked as a bad one."""
    if record.get("label") is False:
        raise BadInput("its label is false: answers not to learn from")
    items = field_of(record, "conversations", "messages", kind=list)
    turns = []
    if isinstance(record.get("system"), str):
        turns.append(Turn("system", record["system"]))
    for number, item in enumerate(items, 1):
        role = field_of(item, "from", "role")
        if role not in ROLES:
            problem = "neither system nor user nor assistant"
            raise BadInput(f"turn {number} is from {role!r}, {problem}")
        if item.get("weight", 1) == 0:
            raise BadInput(f"turn {number} has weight 0: an answer not to learn from")
        if item.get("tool_calls"):
            called = json.dumps(item["tool_calls"], ensure_ascii=False)
            said = f"{item.get('content') or ''}\n\n{called}".strip()
            turns.append(Turn("call", said))
        else:
            turns.append(Turn(ROLES[role], _text_of(item)))
    return (turns,)


def _text_of(item: dict) -> str:
    """What a message says, which OpenAI may write in parts."""
    parts = item.get("content")
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
        return "".join(field_of(part, "text") for part in parts)
    return field_of(item, "value", "content")


def _instruction(record: dict) -> tuple[list[Turn]]:
    """Alpaca and Dolly; the input becomes a paragraph below the instruction, under INPUT. Exchanges
    may go before."""
    more = record.get("context") or record.get("input") or ""
    if not isinstance(more, str):
        raise BadInput(f"the input is {type(more).__name__}, not str")
    question = field_of(record, "instruction")
    if more.strip():
        question += INPUT + more
    turns = []
    if record.get("system"):
        turns.append(Turn("system", field_of(record, "system")))
    history = field_of(record, "history", kind=list) if record.get("history") else []
    for pair in history:
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise BadInput("field `history` is not pairs of a question and its answer")
        asked, answered = pair
        turns += [Turn("user", asked), Turn("assistant", answered)]
    answer = field_of(record, "output", "response")
    turns += [Turn("user", question), Turn("assistant", answer)]
    return (turns,)


def _completion(record: dict) -> tuple[list[Turn]]:
    """TRL's and OpenAI's prompt and completion, each a text or messages."""
    turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        part = field_of(record, name, kind=object)
        if isinstance(part, str):
            part = [{"role": role, "content": part}]
        turns += messages_of({"messages": part})[0]
    return (turns,)


def _dialogue(text: str, names: str) -> list[Turn]:
    """The turns of a text in which a name goes before each; names is a pattern with one group."""
    start, *parts = re.split(names, text)
    if start.strip():
        raise BadInput(f"it begins with {start.strip()[:20]!r}, not with a name")
    return [Turn(ROLES[name.lower()], said) for name, said in zip(parts[::2], parts[1::2])]


def _oasst(record: dict) -> tuple[list[Turn]]:
    """`### Human:` and `### Assistant:` in one text, the last answer perhaps in its own field."""
    turns = _dialogue(field_of(record, "input", "text"), r"### (Human|Assistant):")
    if turns and "output" in record:
        begun = turns.pop().text if turns[-1].role == "assistant" else ""
        turns.append(Turn("assistant", begun + field_of(record, "output")))
    return (turns,)


def _hh(record: dict) -> tuple[list[Turn], list[Turn]]:
    """Anthropic's HH-RLHF: two whole conversations, each one text."""
    names = r"\n\n(Human|Assistant):"
    chosen = _dialogue(field_of(record, "chosen"), names)
    rejected = _dialogue(field_of(record, "rejected"), names)
    return chosen, rejected


def _pairs(record: dict) -> tuple[list[Turn], list[Turn]]:
    """ShareGPT with two answers; or a prompt and two answers, each a text, a message, or all
    messages of its side."""
    asked = record.get("prompt", [])
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    for name in ("messages", "conversations"):  # where both are there, the second counts
        asked = record.get(name, asked)
    if not isinstance(asked, list):
        problem = "neither a text nor a list of messages"
        raise BadInput(f"what was asked is {type(asked).__name__}, {problem}")
    sides = []
    for name in ("chosen", "rejected"):
        answer = field_of(record, name, kind=object)
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        if not isinstance(answer, list):
            answer = [answer]
        whole = answer if len(answer) > 1 else [*asked, *answer]
        (side,) = messages_of(record | {"conversations": whole})
        sides.append(side)
    return tuple(sides)


FORMATS = {
    "sharegpt": messages_of,
    "openai": messages_of,
    "alpaca": _instruction,
    "dolly": _instruction,
    "completion": _completion,
    "oasst": _oasst,
    "hh-rlhf": _hh,
    "pairs": _pairs,
}
