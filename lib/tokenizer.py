"""Tokenizers: sentencepiece's, tiktoken's and bytes; and training one."""

import base64
import hashlib
from pathlib import Path

from lib.disk import writing
from lib.errors import BadInput
from lib.ranks import check_ranks

CL100K_PATTERN = (  # how text is cut before it is encoded, which the file does not say
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)


class BytesCodec:
    """Ids 0 to 255 are bytes."""

    bos_id, eos_id, vocab_size, lead = 256, 257, 258, ""

    def __init__(self, data: bytes, name: str):
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencepieceCodec:
    """Pieces of a sentencepiece model."""

    lead = "\x01"  # a character that no piece has together with others

    def __init__(self, data: bytes, name: str):
        from sentencepiece import SentencePieceProcessor

        self.model = model = SentencePieceProcessor(model_proto=data)
        self.bos_id, self.eos_id, self.vocab_size = model.bos_id(), model.eos_id(), model.vocab_size()
        self.blank = None
        if not model.encode_as_pieces("a")[0].startswith("▁"):
            # Made by train_tokenizer: nothing is added or normalised, so that only U+2581, which sentencepiece
            # uses for the blank, would not come back. It is spelled out in bytes.
            self.lead = ""
            self.blank = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    def encode(self, text: str) -> list[int]:
        if self.blank is None:
            return self.model.encode(text)
        first, *rest = map(self.model.encode, text.split("▁"))
        return first + [i for part in rest for i in self.blank + part]

    def decode(self, ids: list[int]) -> str:
        # a model's vocabulary may be larger, and sentencepiece fails at an id that it does not have
        return self.model.decode([i for i in ids if i < self.vocab_size])


class TiktokenCodec:
    """Pieces of a file of ranks; how many it has tells which of OpenAI's encodings it is."""

    lead = ""

    def __init__(self, data: bytes, name: str):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
        except ValueError:
            raise BadInput(f"{name} is not a tiktoken ranks file (lines of base64 and a number)") from None
        known = {50_256: (r50k_pat_str, 50_256, 50_257), 100_256: (CL100K_PATTERN, 100_257, 100_277)}
        if len(ranks) not in known:
            raise BadInput(f"{name} has {len(ranks)} ranks; gpt2 has 50256 and cl100k_base 100256")
        check_ranks(ranks, name)
        pattern, end_of_text, self.vocab_size = known[len(ranks)]
        self.bos_id = self.eos_id = end_of_text
        self.num_ranks = len(ranks)
        special = {"<|endoftext|>": end_of_text}
        self.model = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.num_ranks])


CODECS = {
    "tokenizer.model": SentencepieceCodec,
    "tokenizer.tiktoken": TiktokenCodec,
    "tokenizer.bytes": BytesCodec,
}


def read_tokenizer(spec: str | Path) -> tuple[str, str, bytes]:
    """The name of a tokenizer, what its file is called in a dataset, and what the file holds. Raises ValueError."""
    path = Path(spec)
    if str(spec) in ("gpt2", "cl100k_base"):
        return str(spec), "tokenizer.tiktoken", _download_ranks(str(spec))
    if str(spec) == "bytes":
        return "bytes", "tokenizer.bytes", b"ids 0 to 255 are bytes\n"
    if path.is_dir():
        found = [path / name for name in CODECS if (path / name).exists()]
        if not found:
            other, hint = path / "tokenizer.json", ""
            if other.exists():
                hint = f"; {other} is not read, give the tokenizer.model that it was made from"
            raise BadInput(f"{path} holds no tokenizer (looked for {', '.join(CODECS)}){hint}")
        return read_tokenizer(found[0])
    if path.name == "tokenizer.bytes" and path.is_file():
        return "bytes", "tokenizer.bytes", path.read_bytes()
    if not path.is_file():
        raise BadInput(f"no tokenizer {spec}: neither a file nor one of gpt2, cl100k_base, bytes")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"tokenizer {path} cannot be read ({error.strerror})") from None
    return path.name, "tokenizer.tiktoken" if path.suffix == ".tiktoken" else "tokenizer.model", data


class Tokenizer:
    """Text to ids and back; the special ids come only from bos_id and eos_id, never from text.

    spec is a sentencepiece model (`tokenizer.model`), a tiktoken ranks file (`*.tiktoken`), a folder that holds
    one of them, or a name: `gpt2`, `cl100k_base`, `bytes`. Raises ValueError for anything else.

    >>> Tokenizer("bytes").encode("né", bos=True)
    [256, 110, 195, 169]
    """

    FILES = tuple(CODECS)

    def __init__(self, spec: str | Path):
        self.name, self.file, self.data = read_tokenizer(spec)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        try:
            self.codec = CODECS[self.file](self.data, self.name)
        except RuntimeError as error:
            raise BadInput(f"{spec} is not a tokenizer file: neither sentencepiece's nor *.tiktoken") from error
        self.bos_id, self.eos_id = self.codec.bos_id, self.codec.eos_id
        self.vocab_size = self.codec.vocab_size
        if min(self.bos_id, self.eos_id) < 0:
            raise BadInput(f"{spec} has no BOS or no EOS (ids {self.bos_id} and {self.eos_id})")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text as ordinary text: `<s>` or `[INST]` typed in it are characters like any other."""
        ids = self.codec.encode(text)
        if bos:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    def encode_after(self, text: str) -> list[int]:
        """The ids of text that goes on after other text. sentencepiece's encoder begins any text with a blank more."""
        lead = self.codec.lead
        return self.codec.encode(lead + text)[len(self.codec.encode(lead)) :]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the ids of a text to be continued.

        Blanks at its end are left off, because a vocabulary of words holds them with the word that follows
        (LLaMA-2: "Answer: A" ends in the id of " A", "Answer: " in a lone blank that never precedes a word).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput(f"the prompt {text!r} is not Unicode text") from None
        return self.encode(text if self.name == "bytes" else text.rstrip(" "), bos=True)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids give nothing, broken UTF-8 gives U+FFFD."""
        return self.codec.decode([int(i) for i in ids])

    def save(self, folder: str | Path):
        path = Path(folder) / self.file
        with writing(path):
            path.write_bytes(self.data)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer file of a model: in its folder, or for a checkpoint in its run's folder; None without one."""
    places = [folder / name for folder in (Path(path), Path(path).parent) for name in Tokenizer.FILES]
    return next(filter(Path.is_file, places), None)


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
