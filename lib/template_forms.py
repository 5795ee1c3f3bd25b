"""Chat templates: how conversations are written for a model, those that are known and one's own."""

import json
import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

from lib.errors import BadInput
from lib.records import checked


@dataclass(frozen=True)
class Template:
    """How conversations are written, as texts with {question}, {answer} and {system} in them.

    A file of one's own (`--template my.toml`) has these fields. Special tokens are BOS, the `end`
    and those that `special` lists, where this template has them, and nothing else: in what is
    asked or answered, `<|im_start|>` and `[INST]` are ordinary text.
    """

    question: str            # {system} is the system's text or, from the second question on, `later`
    answer: str = "{answer}"  # a blank before it belongs to the first token of it
    system: str = "{system}\n\n"
    later: str = ""
    every_bos: bool = False  # BOS before every question, not only the first
    bos: bool = True         # BOS at the beginning
    default: str = ""        # the system's text where there is none
    with_input: str = ""     # the same for a question with an input, as some of Alpaca's
    special: tuple[str, ...] = ()  # control tokens of the tokenizer, written by their names
    end: str = ""            # the one that ends an answer; else it is EOS


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
CHATML = Template(
    "{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    system="<|im_start|>system\n{system}<|im_end|>\n",
    later="\n",
)
STANFORD = Template(
    "{system}### Instruction:\n{question}\n\n### Response:",
    later="\n\n",
    default=ALPACA,
    with_input=ALPACA_WITH_INPUT,
)
TEMPLATES = {
    "llama2-chat": Template(
        "[INST] {system}{question} [/INST]",
        " {answer} ",
        "<<SYS>>\n{system}\n<</SYS>>\n\n",
        every_bos=True,
    ),
    "vicuna": Template(
        "{system}USER: {question} ASSISTANT:",
        " {answer}",
        "{system} ",
        default=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "alpaca": STANFORD,  # as Stanford's own train.py has it
    "chatml": CHATML,    # for models without its tokens: ordinary text, and EOS ends an answer
    "plain": Template("{system}{question}\n", later="\n"),
    # a line feed more, as alpaca-lora and most later copies have it
    "alpaca-lf": replace(STANFORD, question=STANFORD.question + "\n"),
    "llama3": Template(
        "{system}<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
    ),
    # with ChatML's own tokens and end, as SmolLM2 and Qwen have them
    "chatml-tokens": replace(
        CHATML, bos=False, special=("<|im_start|>", "<|im_end|>"), end="<|im_end|>"
    ),
}
PLACES = {
    "question": ("{system}", "{question}"),
    "answer": ("{answer}",),
    "system": ("{system}",),
}


@cache
def form_of(template: str) -> Template:
    """The template of a name, of a file of one's own, or as `spelled` writes it.

    Raises ValueError where there is none, or it would lose something.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if template.startswith("{"):
        return _checked(json.loads(template), "the template")
    path = Path(template)
    if path.suffix != ".toml" or not path.is_file():
        known = f"{', '.join(TEMPLATES)}, nor a file .toml of your own"
        raise BadInput(f"--template {template} is not one of {known}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML ({error})") from None
    return _checked(values, path)


def spelled(template: str) -> str:
    """A template as records keep it: a known one by its name, one's own by its fields."""
    form = form_of(template)
    if template in TEMPLATES:
        return template
    return json.dumps(asdict(form))


def _checked(values: dict, where: str | Path) -> Template:
    names = [field.name for field in fields(Template)]
    for name in sorted(values.keys() - set(names)):
        raise BadInput(f"{where}: a template has no field {name} (it has {', '.join(names)})")
    form = checked(values, Template, where)
    for name, words in PLACES.items():
        for word in words:
            if getattr(form, name).count(word) != 1:
                raise BadInput(f"{where}: {name} must have {word} once, or that text is lost")
    if form.end not in ("", *form.special):
        raise BadInput(f"{where}: its end {form.end} is not among its special tokens")
    return form


def parts_of(form: str, special: tuple[str, ...]) -> list[str]:
    """A text of a template as control tokens and what stands between them."""
    if not special:
        return [form]
    return [part for part in re.split(f"({'|'.join(map(re.escape, special))})", form) if part]
