"""How conversations are written for a model, and which of their tokens the loss counts."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from lib.chat_formats import INPUT, Turn
from lib.chats import exchanges
from lib.errors import BadInput
from lib.shards import Encoded
from lib.tokenizer import Tokenizer


def no_system(question: str) -> str:
    return ""


class Template(NamedTuple):
    """How conversations are written. BOS comes first and EOS ends every answer; a template has no
    other special token, so that `<|im_start|>` or `[INST]` are ordinary text, also where a user
    types them."""

    question: str            # first the system's text or, later on, `later`; then what is asked
    answer: str = "{}"       # a blank before the answer belongs to the first token of it
    system: str = "{}\n\n"
    later: str = ""          # from the second question on
    every_bos: bool = False  # BOS before every question, not only the first
    default: Callable[[str], str] = no_system  # the system's text where there is none


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)


def vicuna_system(question: str) -> str:
    return VICUNA


def alpaca_system(question: str) -> str:
    return ALPACA_WITH_INPUT if INPUT in question else ALPACA


TEMPLATES = {
    "llama2-chat": Template(
        "[INST] {}{} [/INST]", " {} ", "<<SYS>>\n{}\n<</SYS>>\n\n", every_bos=True
    ),
    "vicuna": Template("{}USER: {} ASSISTANT:", " {}", "{} ", default=vicuna_system),
    "alpaca": Template(  # as Stanford's own train.py has it
        "{}### Instruction:\n{}\n\n### Response:", later="\n\n", default=alpaca_system
    ),
    "chatml": Template(
        "{}<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        later="\n",
    ),
    "plain": Template("{}{}\n", later="\n"),
    "alpaca-lf": Template(  # a line feed more, as alpaca-lora and most later copies have it
        "{}### Instruction:\n{}\n\n### Response:\n", later="\n\n", default=alpaca_system
    ),
}


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
    form = TEMPLATES[template]
    system = system or form.default(question)
    if first:
        before = form.system.format(system) if system else ""
    else:
        before = form.later
    asked = form.question.format(before, question)
    ids = tokenizer.encode(asked, bos=first or form.every_bos)
    said = []
    if answer is not None:
        said = tokenizer.encode_after(form.answer.format(answer))
        said = [*said, tokenizer.eos_id]
    return ids + said, [0] * len(ids) + [1] * len(said)


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
    """The text of ids, ⟦ ⟧ around those of the mask, BOS and EOS spelled out.

    >>> bracketed([256, 104, 105, 33, 257], [0, 0, 0, 1, 1], Tokenizer("bytes"))
    '<s>hi⟦!</s>⟧'
    """
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    kinds = [(counts, names.get(token)) for token, counts in zip(ids, mask)]
    text, inside, begin = "", 0, 0
    for (counts, special), group in itertools.groupby(kinds):
        end = begin + len(list(group))
        if counts != inside:
            text += "⟦" if counts else "⟧"
        text += special * (end - begin) if special else tokenizer.decode(ids[begin:end])
        inside, begin = counts, end
    return text + "⟧" if inside else text
