"""Training a tokenizer."""

import re
from collections.abc import Iterator
from pathlib import Path

from lib.disk import writing
from lib.errors import BadInput

MAX_PIECES = 1_000_000         # the largest vocabulary that is trained; LLaMA-3's has 128,256


def trained_size(spec: str) -> int | None:
    """The size in `train:SIZE`; None for any other tokenizer. Raises ValueError for a size that cannot be trained."""
    if not spec.startswith("train:"):
        return None
    size = spec.removeprefix("train:")
    if not (re.fullmatch("[0-9]{1,7}", size) and 300 < int(size) <= MAX_PIECES):
        sizes = f"a vocabulary size above 300 and at most {MAX_PIECES:,}"
        raise BadInput(f"--tokenizer {spec[:40]}: give {sizes}, such as train:4096")
    return int(size)


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path):
    """Train a byte-pair encoding on texts: whitespace kept, pieces may span blanks and line ends, every Unicode
    text comes back exactly. Raises ValueError when the texts have too few different pairs for vocab_size."""
    from sentencepiece import SentencePieceTrainer

    failed = []  # what reading the texts raised; the trainer would hand it on as a text of its own

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except BaseException as error:  # Ctrl-C too
            failed.append(error)

    try:
        with writing(path), open(path, "wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=sentences(),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_by_whitespace=False,
                split_digits=True,
                max_sentence_length=8192,
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1] or "there is no text to train on"
        raise (failed or [BadInput(f"--tokenizer train:{vocab_size}: {reason}")])[0] from None
    if failed:
        raise failed[0]


def _sentences(texts: Iterator[str], size: int = 2048) -> Iterator[str]:
    """Runs of whole lines of at most size characters, which is what the trainer takes as a sentence."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + size) + 1 if start + size < len(text) else len(text)
            end = end or min(start + size, len(text))
            yield text[start:end]
            start = end
