"""meta.json, which says what is in a dataset folder: its fields, and the check that they fit together."""

from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

from lib.records import checked, read_json
from lib.tokenizer import Tokenizer

FORMAT = "plainllama tokens 1"
Count = Annotated[int, Meta(ge=1, le=2**62)]
Id = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class TokenizerRecord(TypedDict):
    name: str
    file: str
    sha256: str


class TokenFile(TypedDict):
    """A file of tokens, perhaps with its mask and bounds beside it."""

    file: Annotated[str, Meta(pattern=r"^(train|val)_[0-9]+\.bin$")]
    tokens: Count
    documents: Count
    bytes: Count  # of text in UTF-8; of conversations only the answers
    targets: NotRequired[Count]  # tokens that the loss counts, where there is a mask


class Split(TypedDict):
    """The sums over its files, and the files."""

    tokens: Count
    documents: Count
    bytes: Count
    targets: NotRequired[Count]
    files: Annotated[list[TokenFile], Meta(min_length=1)]


class Splits(TypedDict):
    train: Split
    val: Split


class DatasetMeta(TypedDict):
    """The fields that reading a dataset needs; meta.json has more, for people."""

    format: NotRequired[Literal[FORMAT]]
    tokenizer: TokenizerRecord
    vocab_size: Count
    dtype: Literal["uint16", "uint32"]
    bos: Id
    eos: Id
    kind: NotRequired[Literal["text", "chat", "preference"]]  # text where it is missing
    template: NotRequired[str]  # of conversations and pairs, as max_len and the numbers of targets
    max_len: NotRequired[Annotated[int, Meta(ge=2, le=2**62)]]
    splits: Splits


def read_dataset_meta(path: Path) -> DatasetMeta:
    """meta.json with all its fields. Raises ValueError naming the one that is missing, of a wrong type or at odds."""
    meta = read_json(path)
    checked(meta, DatasetMeta, path)
    kind = meta.get("kind", "text")
    fields = {name: name in meta for name in ("template", "max_len")}
    for name in ("train", "val"):
        split = meta["splits"][name]
        fields[f"splits.{name}.targets"] = "targets" in split
        for sum_of in ("tokens", "documents", "bytes", "targets"):
            found = sum(file.get(sum_of, 0) for file in split["files"])
            if found != split.get(sum_of, 0):
                told = split.get(sum_of, 0)
                raise ValueError(f"{path}: field splits.{name}.{sum_of} is {told}, its files have {found}")
    for name, there in fields.items():
        if there != (kind != "text"):
            problem = "is missing" if kind != "text" else "does not belong there"
            raise ValueError(f"{path}: it is of kind {kind}, and field {name} {problem}")
    return meta


def read_meta(folder: str | Path) -> DatasetMeta:
    """meta.json of a dataset folder, its fields checked, its tokenizer file against the hash too. Raises ValueError."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        made = f"python data.py --source PATH --out {folder}"
        raise ValueError(f"{folder} holds no dataset (no meta.json); make one: {made}")
    meta, tokenizer = read_dataset_meta(folder / "meta.json"), Tokenizer(folder)
    file, expected = meta["tokenizer"]["file"], meta["tokenizer"]["sha256"]
    if tokenizer.sha256 != expected:
        found = tokenizer.sha256[:12]
        raise ValueError(f"{folder}: {file} has SHA-256 {found}…, the dataset was made with {expected[:12]}…")
    for name, told in (("vocab_size", tokenizer.vocab_size), ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if meta[name] != told:
            raise ValueError(f"{folder / 'meta.json'}: field {name} is {meta[name]}, its tokenizer's is {told}")
    return meta
