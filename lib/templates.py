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
    """How conversations are written. BOS comes first and EOS ends every answer; a template has no other special token,
    so that `<|im_start|>` or `[INST]` are ordinary text, also where a user types them."""

    question: str                # first the system's text or, from the second question on, `later`; then what is asked
    answer: str = "{}"           # a blank before the answer belongs to the first token of it
    system: str = "{}\n\n"
    later: str = ""
    every_bos: bool = False      # BOS before every question, not only the first
    default: Callable[[str], str] = no_system  # the system's text where there is none


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.",
)
TEMPLATES = {
    "llama2-chat": Template("[INST] {}{} [/INST]", " {} ", "<<SYS>>\n{}\n<</SYS>>\n\n", every_bos=True),
    "vicuna": Template("{}USER: {} ASSISTANT:", " {}", "{} ", default=lambda question: VICUNA),
    "alpaca": Template(  # as Stanford's own train.py has it
        "{}### Instruction:\n{}\n\n### Response:", later="\n\n", default=lambda question: ALPACA[INPUT in question]
    ),
    "chatml": Template(
        "{}<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        later="\n",
    ),
    "plain": Template("{}{}\n", later="\n"),
    "alpaca-lf": Template(  # a line feed more, as alpaca-lora and most later copies have it
        "{}### Instruction:\n{}\n\n### Response:\n", later="\n\n", default=lambda question: ALPACA[INPUT in question]
    ),
}


def render(turns: list[Turn], template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and a mask of them: 1 for those of an answer and its EOS, which the loss counts.

    Raises ValueError for turns out of order, and where the last question has no answer.
    """
    return _render(turns, template, tokenizer, answered=True)


def render_prompt(turns: list[Turn], template: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens up to where the answer to the last turn, a user's, begins; render puts the same before that answer."""
    return _render(turns, template, tokenizer, answered=False)[0]


def _render(turns: list[Turn], template: str, tokenizer: Tokenizer, answered: bool) -> tuple[list[int], list[int]]:
    system, pairs = exchanges(turns)
    if (pairs[-1][1] is not None) != answered:
        raise BadInput(f"the last turn is the {'user' if answered else 'assistant'}'s")
    ids, mask = [], []
    for number, pair in enumerate(pairs):
        for whole, part in zip((ids, mask), _render_exchange(pair, system, template, tokenizer, number == 0)):
            whole += part
    return ids, mask


def _render_exchange(
    pair: tuple[str, str | None], system: str, template: str, tokenizer: Tokenizer, first: bool
) -> tuple[list[int], list[int]]:
    """A question and its answer. They are encoded apart, and so alike in training and before there is an answer."""
    (question, answer), form = pair, TEMPLATES[template]
    system = system or form.default(question)
    before = (form.system.format(system) if system else "") if first else form.later
    ids = tokenizer.encode(form.question.format(before, question), bos=first or form.every_bos)
    said = [] if answer is None else [*tokenizer.encode_after(form.answer.format(answer)), tokenizer.eos_id]
    return ids + said, [0] * len(ids) + [1] * len(said)


def split_to_fit(turns: list[Turn], template: str, tokenizer: Tokenizer, max_len: int) -> tuple[list[Encoded], int]:
    """A conversation as pieces of at most max_len tokens, and how many exchanges did not fit alone and are left out.

    Each piece holds as many exchanges as it can and begins with the system's text, as a conversation of its own.
    """
    system, pairs = exchanges(turns)
    pieces, dropped = [], 0
    room = 0  # in the last piece
    for pair in pairs:
        ids, mask = _render_exchange(pair, system, template, tokenizer, first=False)
        if len(ids) <= room:
            pieces[-1] = Encoded(*(a + b for a, b in zip(pieces[-1], (ids, mask, len(pair[1].encode())))))
        else:
            ids, mask = _render_exchange(pair, system, template, tokenizer, first=True)
            if len(ids) > max_len:
                dropped, room = dropped + 1, 0
                continue
            pieces.append(Encoded(ids, mask, len(pair[1].encode())))
        room = max_len - len(pieces[-1].ids)
    return pieces, dropped


def render_pair(sides: tuple[list[Turn], list[Turn]], template: str, tokenizer: Tokenizer) -> list[Encoded]:
    """Both conversations of a preference pair; the masks hold only the last answers and their EOS."""
    rendered = []
    for turns in sides:
        ids, mask = render(turns, template, tokenizer)
        end_of_question = len(mask) - mask[::-1].index(0)
        mask[:end_of_question] = [0] * end_of_question
        rendered.append(Encoded(ids, mask, len(turns[-1].text.encode())))
    return rendered


def encode_conversation(
    sides: tuple[list[Turn], ...], tokenizer: Tokenizer, template: str, max_len: int
) -> tuple[list[Encoded], dict[str, int]]:
    """The documents of a conversation, or both of a pair, and what was too long or had to be split."""
    if len(sides) == 1:
        pieces, dropped = split_to_fit(sides[0], template, tokenizer, max_len)
        return pieces, {"exchanges_too_long": dropped, "split": int(len(pieces) > 1)}
    pieces = render_pair(sides, template, tokenizer)
    if max(len(piece.ids) for piece in pieces) > max_len:
        return [], {"pairs_too_long": 1}
    return pieces, {}


def bracketed(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, ⟦ ⟧ around those of the mask, BOS and EOS spelled out.

    >>> bracketed([256, 104, 105, 33, 257], [0, 0, 0, 1, 1], Tokenizer("bytes"))
    '<s>hi⟦!</s>⟧'
    """
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    text, inside = "", 0
    for (counts, special), group in itertools.groupby(zip(ids, mask), lambda pair: (pair[1], names.get(pair[0]))):
        part = [i for i, _ in group]
        if counts != inside:
            text += "⟦" if counts else "⟧"
        text += special * len(part) if special else tokenizer.decode(part)
        inside = counts
    return text + "⟧" if inside else text
