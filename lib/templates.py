"""How conversations are written for a model, and which of their tokens the loss counts."""

import itertools
import re

from lib.chat_formats import INPUT, Turn
from lib.chats import exchanges
from lib.errors import BadInput
from lib.shards import Encoded
from lib.template_forms import Template, form_of, parts_of
from lib.tokenizer import Tokenizer


def render(turns: list[Turn], template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and a mask of them: 1 for those of an answer and its EOS, which the
    loss counts.

    Raises ValueError for turns out of order, and where the last question has no answer.
    """
    return _render(turns, template, tokenizer, answered=True)


def render_prompt(turns: list[Turn], template: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens up to where the answer to the last turn, a user's, begins; render puts the same
    before that answer."""
    ids, _ = _render(turns, template, tokenizer, answered=False)
    return ids


def _render(
    turns: list[Turn], template: str, tokenizer: Tokenizer, answered: bool
) -> tuple[list[int], list[int]]:
    system, pairs = exchanges(turns)
    _, last_answer = pairs[-1]
    if (last_answer is not None) != answered:
        raise BadInput(f"the last turn is the {'user' if answered else 'assistant'}'s")
    ids, mask = [], []
    for number, pair in enumerate(pairs):
        more_ids, more_mask = _render_exchange(pair, system, template, tokenizer, number == 0)
        ids += more_ids
        mask += more_mask
    return ids, mask


def _render_exchange(
    pair: tuple[str, str | None], system: str, template: str, tokenizer: Tokenizer, first: bool
) -> tuple[list[int], list[int]]:
    """A question and its answer.

    They are encoded apart, and so alike in training and before there is an answer.
    """
    question, answer = pair
    form = form_of(template)
    system = system or default_system(form, question)
    before = form.later
    if first:
        before = form.system if system else ""
    asked = form.question.replace("{system}", before)
    values = {"{system}": system, "{question}": question}
    ids = []
    if form.every_bos or first and form.bos:
        ids = [tokenizer.bos_id]
    for part in parts_of(asked, form.special):
        if part in form.special:
            ids.append(tokenizer.special(part))
        else:
            text = filled(part, values)
            ids += tokenizer.encode(text)
    if answer is None:
        return ids, [0] * len(ids)
    said = filled(form.answer, {"{answer}": answer})
    end = end_of_answer(form, tokenizer)
    said = [*tokenizer.encode_after(said), end]
    mask = [0] * len(ids) + [1] * len(said)
    return ids + said, mask


def default_system(form: Template, question: str) -> str:
    """The system's text of a conversation that brings none."""
    if form.with_input and INPUT in question:
        return form.with_input
    return form.default


def filled(text: str, values: dict[str, str]) -> str:
    """A text with {question} and the like replaced, once each, by what they stand for."""

    def value(place: re.Match) -> str:
        return values[place.group()]

    places = "|".join(map(re.escape, values))
    return re.sub(places, value, text)


def end_of_answer(form: Template, tokenizer: Tokenizer) -> int:
    if form.end:
        return tokenizer.special(form.end)
    return tokenizer.eos_id


def end_ids(template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at which an answer ends: EOS, BOS of the next, and the template's own; without a
    template those at which a text ends."""
    ends = (tokenizer.eos_id, tokenizer.bos_id)
    if template:
        ends += (end_of_answer(form_of(template), tokenizer),)
    return ends


def split_to_fit(
    turns: list[Turn], template: str, tokenizer: Tokenizer, max_len: int
) -> tuple[list[Encoded], int]:
    """A conversation as pieces of at most max_len tokens, and how many exchanges did not fit alone
    and are left out.

    Each piece holds as many exchanges as it can and begins with the system's text, as a
    conversation of its own.
    """
    system, pairs = exchanges(turns)
    pieces, dropped = [], 0
    room = 0  # in the last piece
    for pair in pairs:
        _, answer = pair
        num_bytes = len(answer.encode())
        ids, mask = _render_exchange(pair, system, template, tokenizer, first=False)
        if len(ids) <= room:
            begun = pieces[-1]
            pieces[-1] = Encoded(begun.ids + ids, begun.mask + mask, begun.num_bytes + num_bytes)
        else:
            ids, mask = _render_exchange(pair, system, template, tokenizer, first=True)
            if len(ids) > max_len:
                dropped, room = dropped + 1, 0
                continue
            pieces.append(Encoded(ids, mask, num_bytes))
        room = max_len - len(pieces[-1].ids)
    return pieces, dropped


def render_pair(
    sides: tuple[list[Turn], list[Turn]], template: str, tokenizer: Tokenizer
) -> list[Encoded]:
    """Both conversations of a preference pair; the masks hold the last answers alone, with EOS."""
    rendered = []
    for turns in sides:
        ids, mask = render(turns, template, tokenizer)
        end_of_question = len(mask) - mask[::-1].index(0)
        mask[:end_of_question] = [0] * end_of_question
        answer = turns[-1].text
        rendered.append(Encoded(ids, mask, len(answer.encode())))
    return rendered


def encode_conversation(
    sides: tuple[list[Turn], ...], tokenizer: Tokenizer, template: str, max_len: int
) -> tuple[list[Encoded], dict[str, int]]:
    """The documents of a conversation, or both of a pair, and what was too long or was split."""
    if len(sides) == 1:
        pieces, dropped = split_to_fit(sides[0], template, tokenizer, max_len)
        return pieces, {"exchanges_too_long": dropped, "split": int(len(pieces) > 1)}
    pieces = render_pair(sides, template, tokenizer)
    longest = max(len(piece.ids) for piece in pieces)
    if longest > max_len:
        return [], {"pairs_too_long": 1}
    return pieces, {}


def bracketed(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, ⟦ ⟧ around those of the mask, BOS, EOS and control tokens
    spelled out.

    >>> bracketed([256, 104, 105, 33, 257], [0, 0, 0, 1, 1], Tokenizer("bytes"))
    '<s>hi⟦!</s>⟧'
    """
    names = tokenizer.control_texts()
    kinds = [(counts, names.get(token)) for token, counts in zip(ids, mask)]
    text, inside, begin = "", 0, 0
    for (counts, special), group in itertools.groupby(kinds):
        end = begin + len(list(group))
        if counts != inside:
            text += "⟦" if counts else "⟧"
        text += special * (end - begin) if special else tokenizer.decode(ids[begin:end])
        inside, begin = counts, end
    return text + "⟧" if inside else text
