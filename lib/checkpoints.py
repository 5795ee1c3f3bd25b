"""A run's folder: which checkpoints are in it, which of them counts, and which are whole.

A checkpoint is a folder whose name is step_ and eight digits. One that its owner moved to another
disk, leaving a link, is still read; a link is never renamed or deleted.
"""

import errno
import functools
import hashlib
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lib import hub
from lib.errors import BadInput
from lib.files import file_in, sha256, write_whole
from lib.records import read_json, read_record

HASHES = "sha256.json"  # in a checkpoint: the SHA-256 of each of its files
STEP = re.compile("step_[0-9]{8}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    found = folder.glob("step_*")
    return sorted(path for path in found if STEP.fullmatch(path.name) and path.is_dir())


def named_by_last(folder: Path) -> Path | None:
    """The checkpoint that the file `last` names; None where it is missing or holds no such name."""
    try:
        name = (folder / "last").read_bytes().strip().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return folder / name if STEP.fullmatch(name) else None


def read_best(folder: Path) -> tuple[str, float]:
    """The checkpoint of the lowest validation loss of a run, and that loss; "" where none is known."""
    if not (folder / "best").exists():
        return "", math.inf
    best = read_record(folder / "best", dict[str, Any])
    name, loss = str(best.get("checkpoint")), best.get("val_loss")
    if not STEP.fullmatch(name) or not isinstance(loss, float):
        raise BadInput(f"{folder / 'best'} names no checkpoint and its loss")
    return name, loss


def write_best(folder: Path, checkpoint: str, loss: float):
    """Let `best` name a checkpoint, where its validation loss is the lowest so far."""
    _, lowest = read_best(folder)
    if loss < lowest:
        write_whole(folder / "best", json.dumps({"checkpoint": checkpoint, "val_loss": loss}))


def forget_best_after(folder: Path, checkpoint: str):
    """Whatever comes after this checkpoint will be done again, or differently."""
    if read_best(folder)[0] > checkpoint:
        (folder / "best").unlink()


def place_of(path: str | Path) -> Path:
    """The checkpoint of the lowest validation loss for RUN:best, the folder of a model of the Hub for
    hf:OWNER/NAME, any other path unchanged.

    Raises ValueError where a run has none, and where there is no such model.
    """
    if str(path).startswith(hub.PREFIX):
        return hub.fetched(str(path), "model", hub.OF_A_MODEL)
    path = Path(path)
    if not path.name.endswith(":best") or path.exists():
        return path
    folder = path.with_name(path.name.removesuffix(":best"))
    name, _ = read_best(folder)
    if not name or not (folder / name).exists():
        hint = "it needs a validation at a step that is also saved"
        raise BadInput(f"{folder} has no best checkpoint; {hint}")
    return folder / name


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has begun here, so that nothing may begin anew over it."""
    return (folder / "last").exists() or bool(checkpoints(folder))


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints to go on from, best first: what `last` names, and those before it.

    Where that one is gone, or `last` names none, all that there are.
    """
    last, found = named_by_last(folder), checkpoints(folder)[::-1]
    if last in found:
        return [path for path in found if path.name <= last.name]
    return [last, *found] if last else found


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that stands for a run: what `last` names, or else the newest whole one.

    Raises ValueError where there is none.
    """
    last, pointer = named_by_last(folder), folder / "last"
    if last and (last / ".metadata").exists():
        return last
    if newest := next(filter(is_whole, newest_first(folder)), None):
        problem = "names no checkpoint that is there" if pointer.exists() else "is missing"
        _say_once(f"{pointer} {problem}; taking {newest}")
        return newest
    if pointer.exists():
        raise BadInput(f"{last or folder}: no checkpoint there, though {pointer} is")
    raise BadInput(f"{folder}: this run has no complete checkpoint yet")


def checkpoint_folder(path: Path) -> Path:
    """The last complete checkpoint of a run folder, or the best of RUN:best; any other path unchanged.

    Raises ValueError if there is nothing.
    """
    path = place_of(path)
    if not path.exists():
        hint = ""
        if len(path.parts) == 2:
            hint = f"; a model of the Hugging Face Hub is called hf:{path}"
        raise BadInput(f"{path}: no such file or folder{hint}")
    if not (path / "run.json").exists():
        return path
    return last_checkpoint(path)


@functools.cache
def _say_once(text: str):
    print(text, file=sys.stderr)


def is_whole(checkpoint: Path) -> bool:
    """Whether all its files are there and as they were written."""
    from lib.checkpoint_index import read_index

    try:
        read_index(checkpoint)
        check_hashes(checkpoint)
    except Exception:  # a damaged pickle may raise any
        return False
    return (checkpoint / "config.json").exists()


def hashes(checkpoint: Path, share: slice = slice(None)) -> dict[str, str]:
    """The SHA-256 of a checkpoint's files by name, or of those in one process's share."""
    names = [path.name for path in checkpoint.iterdir() if path.name != HASHES]
    return _hashed(checkpoint, names, share)


def check_hashes(checkpoint: Path, share: slice = slice(None)):
    """Raise ValueError naming a file in share that is missing or not as it was written.

    A checkpoint of an older version of this project has no hashes and is taken as it is.
    """
    if not (checkpoint / HASHES).exists():
        return
    written = read_record(checkpoint / HASHES, dict[str, str])
    for name in written:
        file_in(checkpoint, name)
    for name, found in _hashed(checkpoint, list(written), share).items():
        if found != written[name]:
            what = "it is damaged; its SHA-256 is not the one that it was written with"
            raise BadInput(f"{checkpoint / name} cannot be read: {what}")


def _hashed(checkpoint: Path, names: list[str], share: slice) -> dict[str, str]:
    mine = sorted(names)[share]
    with ThreadPoolExecutor() as pool:
        return dict(zip(mine, pool.map(_hash, [checkpoint / name for name in mine])))


def _hash(path: Path) -> str:
    if path.name != "adapter_config.json":
        return sha256(path)
    settings = read_json(path)
    settings.pop("base_model_name_or_path", None)  # the base model may move, and is then named anew
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def remove(folder: Path):
    """Delete a checkpoint, which loses its name first, so that a kill leaves no half of it behind.

    Raises FileExistsError for a link and for what is no folder: these are not this project's.
    """
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        what = f"{folder.name}, a link or no folder, is in the way and stays as it is"
        raise FileExistsError(errno.EEXIST, what, str(folder))
    if folder.exists():
        nameless = folder.with_suffix(".tmp")
        if folder != nameless:
            shutil.rmtree(nameless, ignore_errors=True)
            folder.rename(nameless)
        shutil.rmtree(nameless)


def remove_old(folder: Path, newest: str, keep: int, keep_every: int):
    """Delete the checkpoints before the newest, but the last `keep`, every keep_every-th step and
    the best.

    What a kill left half written or half deleted goes too. Links, later checkpoints, and whatever
    has another name stay. Without a keep_every, 0, no step is kept for good.
    """
    ours = [path for path in checkpoints(folder) if path.name <= newest and not path.is_symlink()]
    best, _ = read_best(folder)
    for path in ours[:-keep]:
        if path.name != best and (not keep_every or int(path.name[5:]) % keep_every):
            remove(path)
    for path in folder.glob("step_*.tmp"):
        if STEP.fullmatch(path.stem) and path.is_dir() and not path.is_symlink():
            remove(path)
