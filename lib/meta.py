"""meta.json, which says what is in a dataset folder: its fields, and the check that they fit together."""

import json
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

from lib.disk import writing
from lib.errors import BadInput
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
    template: NotRequired[
        str
    ]  # of conversations and pairs, as max_len and the numbers of targets
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
        for amount in ("tokens", "documents", "bytes", "targets"):
            found = sum(file.get(amount, 0) for file in split["files"])
            if found != split.get(amount, 0):
                told = split.get(amount, 0)
                raise BadInput(
                    f"{path}: field splits.{name}.{amount} is {told}, its files have {found}"
                )
    for name, there in fields.items():
        if there != (kind != "text"):
            problem = "is missing" if kind != "text" else "does not belong there"
            raise BadInput(f"{path}: it is of kind {kind}, and field {name} {problem}")
    return meta


def read_meta(folder: str | Path) -> DatasetMeta:
    """meta.json of a dataset folder, its fields checked, its tokenizer file against the hash too. Raises ValueError."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        made = f"python data.py --source PATH --out {folder}"
        raise BadInput(f"{folder} holds no dataset (no meta.json); make one: {made}")
    meta, tokenizer = read_dataset_meta(folder / "meta.json"), Tokenizer(folder)
    file, expected = meta["tokenizer"]["file"], meta["tokenizer"]["sha256"]
    if tokenizer.sha256 != expected:
        found = tokenizer.sha256[:12]
        raise BadInput(
            f"{folder}: {file} has SHA-256 {found}…, the dataset was made with {expected[:12]}…"
        )
    for name, told in (
        ("vocab_size", tokenizer.vocab_size),
        ("bos", tokenizer.bos_id),
        ("eos", tokenizer.eos_id),
    ):
        if meta[name] != told:
            raise BadInput(
                f"{folder / 'meta.json'}: field {name} is {meta[name]}, its tokenizer's is {told}"
            )
    return meta


def check_together(folders: list[str]) -> str:
    """The kind of datasets together, chat where some are text. Raises ValueError where they do not go together."""
    metas = [read_meta(folder) for folder in folders]
    kinds = {meta.get("kind", "text") for meta in metas}
    templates = {meta["template"] for meta in metas if "template" in meta}
    if len(templates) > 1 or kinds > {"preference"}:
        found = ", ".join(sorted(templates if len(templates) > 1 else kinds))
        raise BadInput(f"--data {' '.join(folders)}: these do not go together ({found})")
    for folder, meta in zip(folders, metas):
        if meta["tokenizer"]["sha256"] != metas[0]["tokenizer"]["sha256"]:
            raise BadInput(
                f"--data {folder} was made with another tokenizer than {folders[0]}"
            )
    return next(kind for kind in ("preference", "chat", "text") if kind in kinds)


def write_meta(folder: Path, meta: dict, command: str):
    """Write meta.json, with what to type to make the dataset again."""
    meta["command"] = command
    with writing(folder / "meta.json"):
        (folder / "meta.json").write_text(json.dumps(meta, indent=2))


def counted_as(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def report(meta: dict):
    """Print what is in a dataset and what was left out."""
    for split, numbers in meta["splits"].items():
        documents, num_bytes, tokens = (
            f"{numbers[name]:,}" for name in ("documents", "bytes", "tokens")
        )
        per_token = numbers["bytes"] / numbers.get("targets", numbers["tokens"])
        if "targets" in numbers:
            targets = f"{numbers['targets']:,} targets of {num_bytes} bytes"
            print(
                f"{split:5}  {documents} documents  {tokens} tokens, {targets}, {per_token:.2f} each"
            )
        else:
            print(
                f"{split:5}  {documents} documents  {num_bytes} bytes  {tokens} tokens, {per_token:.2f} bytes each"
            )
    if "counts" in meta:
        print(counted_as(meta["counts"]))
    else:
        duplicates, empty = meta["duplicate_documents"], meta["empty_documents"]
        print(f"dropped {duplicates:,} exact duplicates and {empty:,} empty documents")
