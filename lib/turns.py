"""Who says what in a conversation: turns, the names that files have for their roles, and columns
that hold them.
"""

from typing import NamedTuple

from lib.errors import BadInput


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str  # "system", "user" or "assistant"; in a file also "call" and "tool", see lib/chats.py
    text: str


SAID_BY = ("system", "user", "assistant")
ROLES = {name: role for role, names in {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt model bot chatgpt",
    "call": "function_call tool_call",  # of a tool, by the assistant
    "tool": "tool function observation function_response tool_response ipython",
}.items() for name in names.split()}  # fmt: skip


def field_of(record, *names: str, kind: type = str):
    """The first of these fields that is there.

    Raises ValueError without one, and for another type.
    """
    there = [name for name in names if isinstance(record, dict) and name in record]
    if not there:
        raise BadInput(f"no field `{names[0]}`")
    name = there[0]
    value = record[name]
    if not isinstance(value, kind):
        raise BadInput(f"field `{name}` is {type(value).__name__}, not {kind.__name__}")
    return value


def roles_of(columns: str) -> dict[str, str]:
    """The role of each column in --fields, as `question=user,reply=assistant`. Raises ValueError."""
    wanted = {}
    for pair in filter(None, columns.split(",")):
        name, _, role = map(str.strip, pair.partition("="))
        if role not in SAID_BY or not name:
            known = f"such as question=user,reply=assistant; a role is {', '.join(SAID_BY)}"
            raise BadInput(f"--fields {columns}: {pair!r} is not a column and its role, {known}")
        wanted[name] = role
    if wanted and not {"user", "assistant"} <= set(wanted.values()):
        raise BadInput(f"--fields {columns} must name a column of the user and one of the assistant")
    return wanted


def in_columns(record: dict, wanted: dict[str, str]) -> list[Turn]:
    """The turns in the named columns, a system's first; an empty one of the system is none."""
    turns = [Turn(role, field_of(record, name)) for name, role in wanted.items()
             if role != "system" or record.get(name)]
    return sorted(turns, key=lambda turn: SAID_BY.index(turn.role))
