"""Files of records: .json, .jsonl, .csv and .parquet, a record being an object of named fields."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.documents import open_text, parquet_rows, parse_line
from lib.errors import BadInput

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


def read_records(path: Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Where each record is, as file:line or file:number, and what it holds: an object, or whatever
    else; a ValueError for a line that cannot be read.

    Raises ValueError where the file itself cannot be read, or has not these columns.
    """
    if path.name.endswith(".parquet"):
        for number, row in enumerate(parquet_rows(path, columns), 1):
            yield f"{path}:{number}", row
        return
    with open_text(path) as file:
        if path.name.endswith((".csv", ".csv.gz")):
            yield from _read_csv(path, file, columns)
            return
        lines = ".jsonl" in path.suffixes
        for number, item in enumerate(file if lines else _load_list(path, file), 1):
            if lines and not item.strip():
                continue
            yield f"{path}:{number}", parse_or_say(item) if lines else item


def parse_or_say(line: str) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        return error


def _read_csv(path: Path, file, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**30)  # characters; an answer may be longer than Python's 131,072
    reader = csv.DictReader(file, restkey="")
    names = [name.removeprefix("\ufeff") for name in reader.fieldnames or ()]  # as Excel begins
    reader.fieldnames = names
    for name in columns:
        if name not in names:
            raise BadInput(f"{path} has no column {name} (it has {', '.join(names)})")
    try:
        for row in reader:
            too_many = row.pop("", None)
            problem = BadInput(f"more cells than the {len(names)} columns")
            yield f"{path}:{reader.line_num}", problem if too_many else row
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _load_list(path: Path, file) -> list:
    """The records of a .json file; in the place of one with a number too long for Python stands a
    ValueError."""
    too_long = BadInput("not JSON that can be read (a number has too many digits)")
    found = []

    def whole_number(digits: str):
        try:
            return int(digits)
        except ValueError:
            found.append(digits)
            return too_long

    try:
        records = json.load(file, parse_int=whole_number)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise BadInput(f"{path}: not JSON that can be read (nested too deeply)") from None
    if not isinstance(records, list):
        records = [records]
    if found:
        records = [too_long if _holds(record, too_long) else record for record in records]
    return records


def _holds(record, part) -> bool:
    """Whether part is somewhere in a record of JSON."""
    waiting = [record]
    for value in waiting:  # grows on the way
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return any(value is part for value in waiting)
