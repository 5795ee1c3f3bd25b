"""A run's folder: its record run.json, its log.jsonl, and the lock by which only one process at a time works in it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from lib.checkpoints import place_of
from lib.errors import BadInput
from lib.files import lock
from lib.records import checked, parse_json, read_json

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Flags(TypedDict):
    """Of a run's flags those that others than train.py read."""

    batch_size: Positive
    seq_len: Positive


class Source(TypedDict):
    """A dataset that a run is trained on."""

    template: NotRequired[str]  # of conversations


class Adapter(TypedDict):
    """What LoRA trains, as in adapter_config.json."""

    base_model_name_or_path: str
    base_sha256: NotRequired[str]


class Record(TypedDict):
    """What is read of a run.json."""

    config: Flags
    model: dict[str, Any]
    dataset: list[Source]
    init_from: str
    init_sha256: str
    adapter: NotRequired[Adapter]


class Row(TypedDict):
    """What is read of a line of log.jsonl."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    loss: NotRequired[float]
    val_loss: NotRequired[float]


def is_record(path: Path) -> bool:
    """Whether a run.json was written by this project, whatever became of its fields."""
    try:
        return {"config", "model", "dataset"} <= read_json(path).keys()
    except ValueError:
        return False


def read_run(folder: Path, **kinds: type) -> dict:
    """The record of the run in a folder, with its types checked; see `Record`.

    For an object of it, `config` or `model`, kinds may name the dataclass that it was made from: then every field is
    checked, and one that an older version did not have takes its default. Raises ValueError, also for a field that a
    newer version has added.
    """
    path = folder / "run.json"
    record = read_json(path)
    checked(record, Record, path)
    for name, kind in kinds.items():
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(record[name].keys() - known):
            raise BadInput(f"{path}, {name}: field {unknown[0]} is unknown to this version; a newer one made the run")
        record[name] = dataclasses.asdict(checked(record[name], kind, f"{path}, {name}"))
    return record


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl, see `Row`. A line that is broken, as a kill or a full disk leaves one, is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = parse_json(line, path)
            checked(row, Row, path)
            rows.append(row)
    return rows


def find_template(path: str) -> str:
    """The template that a run or its checkpoint was trained with; empty where its record names none."""
    here = place_of(path)
    above = here.parent
    folder = here if (here / "run.json").is_file() else above
    sources = []
    if folder == here or is_record(above / "run.json"):
        sources = read_run(folder)["dataset"]
    return next((source["template"] for source in sources if source.get("template")), "")


def append_row(path: Path, row: dict):
    """Add a row to a log.jsonl, on a line of its own also where the last line is broken off."""
    with open(path, "ab+") as file:
        broken = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            broken = file.read() != b"\n"
        if broken:
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder, which is made where it is not there, under a lock that ends with this context or the process.

    What was made and is still empty at the end is taken away again. Raises ValueError where another process has the
    lock.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder)
    if handle is None:
        raise BadInput(f"{folder}: another process is working on this run right now; wait for it, or end it")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()
        os.close(handle)
