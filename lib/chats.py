"""Conversations in order: whose turn it is, and which records can be learned from."""

from collections import Counter
from collections.abc import Callable, Iterator

from lib.chat_formats import Record, Turn
from lib.errors import BadInput

FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
}


def in_order(turns: list[Turn]) -> list[Turn]:
    """The turns without blanks around them, neighbours of one role merged: perhaps a system's, then user and assistant.

    Raises ValueError naming the first turn, counted from 1, that is empty or out of order.
    """
    ordered = []
    for number, (role, text) in enumerate(turns, 1):
        text, before = text.strip(), ordered[-1].role if ordered else ""
        if role == before:
            ordered[-1] = Turn(role, f"{ordered[-1].text}\n\n{text}".strip())
        elif role not in FOLLOWS[before]:
            place = f"right after the {before}'s" if before else "at the beginning"
            raise BadInput(f"turn {number} is the {role}'s, {place}")
        elif text or role != "system":
            ordered.append(Turn(role, text))
        if not text and role != "system":
            raise BadInput(f"turn {number}, the {role}'s, is empty")
    return ordered


def exchanges(turns: list[Turn]) -> tuple[str, list[tuple[str, str | None]]]:
    """The system's text, "" without one, and each question with its answer, None where the last has none yet.

    Raises ValueError for turns out of order.
    """
    turns = in_order(turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    if not turns:
        raise BadInput("it has no turns of a user")
    texts = [turn.text for turn in turns] + [None] * (len(turns) % 2)
    return system, list(zip(texts[::2], texts[1::2]))


def settle_tools(turns: list[Turn], tools: str, counts: Counter) -> list[Turn]:
    """The turns without those of tools, or with them as what assistant and user say.

    Raises ValueError where it is not said, by --tools, what becomes of them.
    """
    spoken = {"call": "assistant", "tool": "user"}
    of_tools = sum(turn.role in spoken for turn in turns)
    if not of_tools:
        return turns
    if not tools:
        number = 1 + next(i for i, turn in enumerate(turns) if turn.role in spoken)
        raise BadInput(f"turn {number} is of a tool; give --tools render or --tools drop")
    counts[f"tool_turns_{'dropped' if tools == 'drop' else 'rendered'}"] += of_tools
    if tools == "drop":
        return [turn for turn in turns if turn.role not in spoken]
    return [Turn(spoken.get(turn.role, turn.role), turn.text) for turn in turns]


def usable(
    records: Iterator[Record],
    tools: str,
    clean: Callable[[list[Turn], str], list[Turn] | None],
    counts: Counter,
    bad: list,
) -> Iterator[tuple[list[Turn], ...]]:
    """The sides of every good record, cleaned and in order; what is wrong with the others goes to bad."""
    for record in records:
        counts["records"] += 1
        sides = record.sides
        try:
            if record.problem:
                raise BadInput(record.problem)
            sides = tuple(settle_tools(turns, tools, counts) for turns in sides)
            if len(sides) == 1:
                cleaned = clean(sides[0], record.place)
                if cleaned is None:
                    counts["cleaned_away"] += 1
                    continue
                sides = (cleaned,)
            sides = tuple(in_order(turns) for turns in sides)
            _check_sides(sides)
        except ValueError as error:
            bad.append(f"{record.place}: {error}")
            continue
        counts["pairs" if len(sides) == 2 else "conversations"] += 1
        if counts["pairs"] and counts["conversations"]:
            raise BadInput(
                f"{record.place}: preference pairs and conversations are mixed; prepare them apart"
            )
        yield sides


def first_question(sides: tuple[list[Turn], ...]) -> bytes:
    """What decides between training and validation, so that no first question of one is in the other."""
    return next(turn.text for turn in sides[0] if turn.role == "user").encode()


def _check_sides(sides: tuple[list[Turn], ...]):
    if not all(side and side[-1].role == "assistant" for side in sides):
        raise BadInput("the last turn is not an answer")
    if len(sides) == 2 and sides[0][:-1] != sides[1][:-1]:
        raise BadInput("chosen and rejected differ before the last answer")
    if len(sides) == 2 and sides[0] == sides[1]:
        raise BadInput("chosen and rejected are the same")
