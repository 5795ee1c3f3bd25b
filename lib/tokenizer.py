"""Tokenizers: sentencepiece's, tiktoken's and bytes; and training one."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from lib.disk import writing
from lib.ranks import check_ranks

MAX_PIECES = 1_000_000         # the largest vocabulary that is trained; LLaMA-3's has 128,256


class Tokenizer:
    """Text to ids and back; the special ids come only from bos_id and eos_id, never from text.

    spec is a sentencepiece model (`tokenizer.model`), a tiktoken ranks file (`*.tiktoken`), a folder that holds
    one of them, or a name: `gpt2`, `cl100k_base`, `bytes`. Raises ValueError for anything else.

    >>> Tokenizer("bytes").encode("né", bos=True)
    [256, 110, 195, 169]
    """

    FILES = ("tokenizer.model", "tokenizer.tiktoken", "tokenizer.bytes")
    _lead = ""  # a character that no piece has together with others, where text must be kept from beginning anew

    def __init__(self, spec: str | Path):
        path = Path(spec)
        if str(spec) in ("gpt2", "cl100k_base"):
            self.name, self.file, self.data = str(spec), "tokenizer.tiktoken", _download_ranks(str(spec))
        elif str(spec) == "bytes":
            self.name, self.file, self.data = "bytes", "tokenizer.bytes", b"ids 0 to 255 are bytes\n"
        elif path.is_dir():
            found = [path / name for name in self.FILES if (path / name).exists()]
            if not found:
                other = path / "tokenizer.json"
                hint = f"; {other} is not read, give the tokenizer.model that it was made from" * other.exists()
                raise ValueError(f"{path} holds no tokenizer (looked for {', '.join(self.FILES)}){hint}")
            self.__init__(found[0])
            return
        elif path.name == "tokenizer.bytes" and path.is_file():
            self.name, self.file, self.data = "bytes", "tokenizer.bytes", path.read_bytes()
        elif path.is_file():
            try:
                self.name, self.data = path.name, path.read_bytes()
            except OSError as error:
                raise ValueError(f"tokenizer {path} cannot be read ({error.strerror})") from None
            self.file = "tokenizer.tiktoken" if path.suffix == ".tiktoken" else "tokenizer.model"
        else:
            raise ValueError(f"no tokenizer {spec}: neither a file nor one of gpt2, cl100k_base, bytes")
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        try:
            dict(zip(self.FILES, (self._sentencepiece, self._tiktoken, self._bytes)))[self.file]()
        except RuntimeError as error:
            raise ValueError(f"{spec} is not a tokenizer file: neither sentencepiece's nor *.tiktoken") from error
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{spec} has no BOS or no EOS (ids {self.bos_id} and {self.eos_id})")

    def _bytes(self):
        self.bos_id, self.eos_id, self.vocab_size = 256, 257, 258
        self._encode = lambda text: list(text.encode())
        self._decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")

    def _sentencepiece(self):
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_proto=self.data)
        self.bos_id, self.eos_id, self.vocab_size = model.bos_id(), model.eos_id(), model.vocab_size()
        self._encode = model.encode
        # a model's vocabulary may be larger, and sentencepiece fails at an id that it does not have
        self._decode = lambda ids: model.decode([i for i in ids if i < self.vocab_size])
        if not model.encode_as_pieces("a")[0].startswith("▁"):
            # Made by train_tokenizer: nothing is added or normalised, so that only U+2581, which sentencepiece
            # uses for the blank, would not come back. It is spelled out in bytes.
            block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

            def encode(text: str) -> list[int]:
                first, *rest = map(model.encode, text.split("▁"))
                return first + [i for part in rest for i in block + part]

            self._encode = encode
        else:
            self._lead = "\x01"

    def _tiktoken(self):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        try:
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self.data.splitlines())}
        except ValueError:
            raise ValueError(f"{self.name} is not a tiktoken ranks file (lines of base64 and a number)") from None
        # the split pattern is not in the file; how many ranks it has tells which of OpenAI's encodings it is
        cl100k = (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
            r"|\s*[\r\n]|\s+(?!\S)|\s"
        )
        known = {50_256: (r50k_pat_str, 50_256, 50_257), 100_256: (cl100k, 100_257, 100_277)}
        if len(ranks) not in known:
            raise ValueError(f"{self.name} has {len(ranks)} ranks; gpt2 has 50256 and cl100k_base 100256")
        check_ranks(ranks, self.name)
        pattern, end_of_text, self.vocab_size = known[len(ranks)]
        self.bos_id = self.eos_id = end_of_text
        model = tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end_of_text}
        )
        self._encode = model.encode_ordinary
        self._decode = lambda ids: model.decode([i for i in ids if i < len(ranks)])

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of text as ordinary text: `<s>` or `[INST]` typed in it are characters like any other."""
        return [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos

    def encode_after(self, text: str) -> list[int]:
        """The ids of text that goes on after other text. sentencepiece's encoder begins any text with a blank more."""
        return self._encode(self._lead + text)[len(self._encode(self._lead)) :]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the ids of a text to be continued.

        Blanks at its end are left off, because a vocabulary of words holds them with the word that follows
        (LLaMA-2: "Answer: A" ends in the id of " A", "Answer: " in a lone blank that never precedes a word).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r} is not Unicode text") from None
        return self.encode(text if self.name == "bytes" else text.rstrip(" "), bos=True)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids give nothing, broken UTF-8 gives U+FFFD."""
        return self._decode([int(i) for i in ids])

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
        raise ValueError(
            f"{name} has to be downloaded once and that failed ({type(error).__name__}); "
            f"without a network give --tokenizer the path of a .tiktoken file"
        ) from None
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)


def trained_size(spec: str) -> int | None:
    """The size in `train:SIZE`; None for any other tokenizer. Raises ValueError for a size that cannot be trained."""
    if not spec.startswith("train:"):
        return None
    size = spec.removeprefix("train:")
    if not (re.fullmatch("[0-9]{1,7}", size) and 300 < int(size) <= MAX_PIECES):
        sizes = f"a vocabulary size above 300 and at most {MAX_PIECES:,}"
        raise ValueError(f"--tokenizer {spec[:40]}: give {sizes}, such as train:4096")
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
        raise (failed or [ValueError(f"--tokenizer train:{vocab_size}: {reason}")])[0] from None
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
