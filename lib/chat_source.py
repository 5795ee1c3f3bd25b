"""Conversations and preference pairs as a source of data.py, beside its plain one, the documents of text files."""

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lib.chat_formats import FORMATS, Turn, read_conversations, roles_of
from lib.chats import first_question, usable
from lib.cleaning import Cleaner, Cleaning
from lib.datasets import TokenFiles
from lib.disk import writing
from lib.errors import BadInput
from lib.meta import counted_as, read_meta
from lib.record_files import SUFFIXES
from lib.shards import EncodedTask
from lib.sources import CORPORA
from lib.template_forms import form_of, spelled
from lib.templates import bracketed, encode_conversation
from lib.tokenizer import Tokenizer


@dataclass
class Flags:
    # conversations and preference pairs, from .json, .jsonl, .csv and .parquet
    template: str = ""
    """llama2-chat, vicuna, alpaca (Stanford's own), alpaca-lf (as most later copies have it, with a
    line end before the answer), chatml, plain, llama3, chatml-tokens (as SmolLM2's and Qwen's) or a
    file .toml with fields such as question = "Q: {system}{question}" makes a set to fine-tune on"""
    max_len: int = 2048                 # tokens; what is longer is split between exchanges
    format: str = "auto"
    """by a record's fields, or sharegpt, openai, alpaca, dolly, oasst, hh-rlhf, completion, pairs
    (ShareGPT's chosen, rejected)"""
    allow_bad: float = 0.01             # fraction of the records that may be bad, and are left out
    cleaning: Cleaning = field(default_factory=Cleaning)
    fields: str = ""
    """columns of any other format and who says what is in them: question=user,reply=assistant"""
    tools: Literal["", "render", "drop"] = ""
    """turns that call a tool or give its result: render keeps them as the assistant's and the
    user's, drop leaves them out; else such a conversation is bad"""

    def chat_flags(self) -> dict:
        """What to type to make a set again, of the cleaning what is not the default."""
        typed = {}
        for name, value in asdict(self.cleaning).items():
            if value != getattr(Cleaning, name):
                typed[name] = value
        for name in ("fields", "tools"):
            if getattr(self, name):
                typed[name] = getattr(self, name)
        names = ("template", "max_len", "format", "allow_bad", "val_fraction")
        return {name: getattr(self, name) for name in names} | typed


class Chats:
    """A source whose items are the sides of a record: one conversation, or the two of a preference pair.

    Conversations, not pairs, are cleaned first; what that takes out goes to removed.jsonl, a report to cleaning.txt.
    What is longer than max_len is split between exchanges; an exchange or pair that does not fit is left out, counted.
    Raises ValueError for bad input, and where more than the fraction allow_bad of the records is bad.
    """

    suffixes = SUFFIXES
    group = staticmethod(first_question)
    documents_are = "BOS, turns, EOS"

    def __init__(self, config: Flags):
        self.template = spelled(config.template)
        if config.format not in ("auto", *FORMATS):
            known = ", ".join(("auto", *FORMATS))
            raise BadInput(f"--format {config.format} is not one of {known}")
        roles_of(config.fields)
        if config.max_len < 2 or not 0 <= config.allow_bad <= 1:
            problem = f"--max_len {config.max_len} must be at least 2, --allow_bad {config.allow_bad}"
            raise BadInput(f"{problem} lie between 0 and 1")
        if config.tokenizer.startswith("train:"):
            raise BadInput(f"--template {config.template} needs the --tokenizer of the model that will be trained")
        if config.val_last:
            raise BadInput("--val_last divides text, not conversations")
        for item in config.source:
            if item == "stdlib" or item in CORPORA and not CORPORA[item].chats:
                raise BadInput(f"--source {item} is text without conversations; leave --template out")
        tokenizer = Tokenizer(config.tokenizer)  # before anything is read
        for token in form_of(self.template).special:
            tokenizer.special(token)
        self.config, self.counts, self.bad = config, Counter(records=0, duplicates=0), []
        self.encode = functools.partial(encode_conversation, template=self.template, max_len=config.max_len)
        self.flags = config.chat_flags()

    def begin(self, files: list[Path], folder: Path) -> Tokenizer:
        tokenizer = Tokenizer(self.config.tokenizer)
        self.files, self.folder = files, folder
        self.cleaner = Cleaner(self.config.cleaning, folder / "removed.jsonl", tokenizer)
        return tokenizer

    def items(self) -> Iterator[tuple[list[Turn], ...]]:
        config, cleaner = self.config, self.cleaner
        for path in self.files:
            records = read_conversations(path, config.format, config.fields)
            yield from usable(records, config.tools, cleaner, self.counts, self.bad)

    def content(self, sides: tuple[list[Turn], ...]) -> bytes:
        return json.dumps(sides).encode()

    def size(self, sides: tuple[list[Turn], ...]) -> int:
        return sum(len(turn.text) for side in sides for turn in side)

    def progress(self) -> dict:
        return {"unit": " documents"}

    def done(self, task: EncodedTask) -> int:
        return len(task.sizes)

    def about(self, empty: bool) -> dict:
        """What meta.json says beside the numbers of the files, after all was read. Raises ValueError for too many bad
        records, and where nothing is left."""
        config, counts, bad = self.config, self.counts, self.bad
        counts["bad"] = len(bad)
        if len(bad) > config.allow_bad * counts["records"]:
            share = f"{len(bad)} of {counts['records']} records are bad, more than --allow_bad {config.allow_bad}"
            raise BadInput(f"{share} of them: {'; '.join(bad[:3])}")
        for problem in bad:
            print(f"left out {problem}", file=sys.stderr)
        if empty:
            raise BadInput(f"nothing is left of the records at --max_len {config.max_len}: {counted_as(counts)}")
        kind = "preference" if counts["pairs"] else "chat"
        if kind == "preference" and config.cleaning != Cleaning():
            raise BadInput("preference pairs are not cleaned; leave the flags of cleaning out")
        if kind == "chat":
            with writing(self.folder / "cleaning.txt"):
                (self.folder / "cleaning.txt").write_text(self.cleaner.report() + "\n")
        form = {"kind": kind, "template": self.template, "max_len": config.max_len}
        return {"documents_are": self.documents_are} | form | {"counts": dict(counts)}


def show(folder: str | Path, num: int) -> str:
    """The first training examples of a fine-tuning or preference set, the tokens that the loss counts in ⟦brackets⟧."""
    meta = read_meta(folder)
    kind = meta.get("kind", "text")
    if kind == "text":
        raise BadInput(f"--show {folder}: a dataset of text; only those made with --template have a mask to show")
    files, tokenizer = TokenFiles(folder, "train", meta["max_len"]), Tokenizer(folder)
    tokens, mask, bounds = files.files[0], files.masks[0], files.bounds[0]
    shown = []
    for number, (begin, end) in enumerate(zip(bounds[:num], bounds[1:])):
        name = str(number)
        if kind == "preference":
            name = f"{number // 2} {'rejected' if number % 2 else 'chosen'}"
        text = bracketed(tokens[begin:end].tolist(), mask[begin:end].tolist(), tokenizer)
        shown.append(f"--- {name}: {end - begin} tokens, {mask[begin:end].sum()} of them targets\n{text}")
    return "\n".join(shown)
