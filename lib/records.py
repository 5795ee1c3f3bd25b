"""Records in JSON: what this project writes about its folders, and what people and newer versions make of it.

Every such file is read here, so that whatever is wrong with one becomes a sentence that names the file and the field.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lib.errors import BadInput

Kind = TypeVar("Kind")


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """What a JSON text says. Raises ValueError naming `where` for anything that json cannot read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise BadInput(f"{where} is not JSON that can be read (nested too deeply)") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 (byte {error.start})") from None
    except ValueError:  # Python's bound on the digits of an integer
        raise BadInput(f"{where} is not JSON that can be read (a number has too many digits)") from None


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file. Raises ValueError when it is missing, not JSON, or lacks one of keys."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} is missing") from None
    values = parse_json(data, path)
    if not isinstance(values, dict):
        raise BadInput(f"{path} must be an object with {', '.join(keys)}, and is a {type(values).__name__}")
    if missing := [key for key in keys if key not in values]:
        raise BadInput(f"{path} has no field {missing[0]}")
    return values


def checked(values: Any, kind: type[Kind], where: str | Path) -> Kind:
    """Values from JSON as a `kind`: a dataclass, a TypedDict, dict[str, int] …; other fields than its are left out.

    Raises ValueError naming `where` and the field that is missing or of another type. Types may carry bounds, as
    Annotated[int, msgspec.Meta(ge=0)].
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `")
        field = place.removesuffix("`").removeprefix("$").removeprefix(".")
        raise BadInput(f"{where}: {f'field {field}: ' if field else ''}{problem.replace('`', '')}") from None
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply") from None
    except UnicodeEncodeError:
        raise BadInput(f"{where} has half of a character (a lone surrogate)") from None


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """The object in a JSON file as a `kind`, see `checked`. Raises ValueError."""
    return checked(read_json(path), kind, path)
