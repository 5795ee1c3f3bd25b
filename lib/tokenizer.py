"""Tokenizers: text to ids and back, and their files."""

import base64
import functools
import hashlib
from pathlib import Path

from lib.checkpoints import place_of
from lib.codecs import CODECS, SIDE_FILES
from lib.disk import writing
from lib.errors import BadInput
from lib.records import parse_json


def read_tokenizer(spec: str | Path) -> tuple[str, str, bytes]:
    """The name of a tokenizer, what its file is called in a dataset, and what the file holds.

    Raises ValueError.
    """
    path = place_of(spec)
    if str(spec) in ("gpt2", "cl100k_base"):
        return str(spec), "tokenizer.tiktoken", _download_ranks(str(spec))
    if str(spec) == "bytes":
        return "bytes", "tokenizer.bytes", b"ids 0 to 255 are bytes\n"
    if path.is_dir():
        found = file_of(path)
        if not found:
            raise BadInput(f"{path} holds no tokenizer (looked for {', '.join(CODECS)})")
        return read_tokenizer(found)
    if path.name == "tokenizer.bytes" and path.is_file():
        return "bytes", "tokenizer.bytes", path.read_bytes()
    if not path.is_file():
        raise BadInput(
            f"no tokenizer {spec}: neither a file nor one of gpt2, cl100k_base, bytes"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"tokenizer {path} cannot be read ({error.strerror})") from None
    file = "tokenizer.model"
    if path.suffix == ".json":
        file = "tokenizer.json"
    elif path.suffix == ".tiktoken" or data.startswith(b"IQ== 0\n"):  # as Meta names Llama 3's
        file = "tokenizer.tiktoken"
    return path.name, file, data


def file_of(folder: Path) -> Path | None:
    """The tokenizer's file in a folder; None without one.

    tokenizer.json counts where it is alone, or where it has tokens that were added later.
    """
    found = [folder / name for name in CODECS if (folder / name).is_file()]
    whole = folder / "tokenizer.json"
    if len(found) > 1 and found[-1] == whole and _is_larger(whole, found[0]):
        return whole
    return found[0] if found else None


@functools.cache
def _is_larger(whole: Path, other: Path) -> bool:
    try:
        values = parse_json(whole.read_bytes(), whole)
        ids = [token["id"] for token in values.get("added_tokens") or []]
        return max(ids, default=0) >= Tokenizer(other).vocab_size
    except (ValueError, AttributeError, KeyError, TypeError):  # it will not be needed
        return False


class Tokenizer:
    """Text to ids and back; the special ids come only from code, never from text.

    spec is a tokenizer.json, a sentencepiece model (`tokenizer.model`), a tiktoken ranks file
    (`*.tiktoken`), a folder that holds one of them, or a name: `gpt2`, `cl100k_base`, `bytes`.
    What its folder says about chats and generation goes with it. Raises ValueError for anything
    else.

    >>> Tokenizer("bytes").encode("né", bos=True)
    [256, 110, 195, 169]
    """

    FILES = tuple(CODECS)

    def __init__(self, spec: str | Path):
        self.name, self.file, self.data = read_tokenizer(spec)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.beside = _read_beside(place_of(spec), self.file)
        try:
            self.codec = CODECS[self.file](self.data, self.name, self.beside)
        except RuntimeError as error:
            kinds = "neither sentencepiece's nor *.tiktoken nor tokenizer.json"
            raise BadInput(f"{spec} is not a tokenizer file: {kinds}") from error
        self.bos_id, self.eos_id = self.codec.bos_id, self.codec.eos_id
        self.vocab_size = self.codec.vocab_size
        if min(self.bos_id, self.eos_id) < 0:
            raise BadInput(f"{spec} has no BOS or no EOS (ids {self.bos_id} and {self.eos_id})")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text as ordinary text: `<s>` or `[INST]` typed in it are characters like any
        other."""
        ids = self.codec.encode(text)
        if bos:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    def encode_after(self, text: str) -> list[int]:
        """The ids of text that goes on after other text. sentencepiece's encoder begins any text
        with a blank more."""
        lead = self.codec.lead
        return self.codec.encode(lead + text)[len(self.codec.encode(lead)) :]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the ids of a text to be continued.

        Blanks at its end are left off, because a vocabulary of words holds them with the word that
        follows (LLaMA-2: "Answer: A" ends in the id of " A", "Answer: " in a lone blank that never
        precedes a word).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(f"the prompt {text!r} is not Unicode text") from None
        return self.encode(text if self.name == "bytes" else text.rstrip(" "), bos=True)

    def special(self, token: str) -> int:
        """The id of a control token, which no text has. Raises ValueError where it is none."""
        if token not in self.codec.specials:
            known = ", ".join(list(self.codec.specials)[:8])
            raise BadInput(f"the tokenizer {self.name} has no special token {token} (it has {known})")
        return self.codec.specials[token]

    def control_texts(self) -> dict[int, str]:
        """The names of the control tokens by their ids."""
        return {number: text for text, number in self.codec.specials.items()}

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids give nothing, broken UTF-8 gives U+FFFD."""
        return self.codec.decode([int(i) for i in ids])

    def save(self, folder: str | Path):
        for name, data in {**self.beside, self.file: self.data}.items():
            path = Path(folder) / name
            with writing(path):
                path.write_bytes(data)


def _read_beside(spec: Path, file: str) -> dict[str, bytes]:
    """What else is in a model's folder about its tokenizer and its chats; of one by name nothing."""
    if not spec.exists():
        return {}
    folder = spec if spec.is_dir() else spec.parent
    names = [name for name in (*CODECS, *SIDE_FILES) if name != file]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer file of a model: in its folder, or for a checkpoint in its run's folder; None
    without one."""
    path = place_of(path)
    return file_of(path) or file_of(path.parent)


def _download_ranks(name: str) -> bytes:
    import tiktoken

    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except OSError as error:
        raise BadInput(
            f"{name} has to be downloaded once and that failed ({type(error).__name__}); "
            f"without a network give --tokenizer the path of a .tiktoken file"
        ) from None
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)
