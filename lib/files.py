"""Files and folders that appear when they are whole, belong to one process while they are made, and are known again."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lib.errors import BadInput

OURS = ".plainllama-unfinished"  # marks a folder that `new_folder` makes


def write_whole(path: Path, text: str | bytes):
    """Replace a small file so that a reader finds the old text or the new, never a part."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(text if isinstance(text, bytes) else text.encode())
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
    sync(path.parent)


def sync(path: Path):
    """Make sure that a file or folder is on the disk and not only in the memory of the system."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_in(folder: Path, name: str) -> Path:
    """The file of this name in a folder. Raises ValueError where there is none, as for `../x`."""
    if Path(name).name != name or not (folder / name).is_file():
        raise BadInput(f"{folder} cannot be read: {name} is missing, or is no file in there")
    return folder / name


def lock(path: Path) -> int | None:
    """Take the lock of a file or folder: a handle that holds it until it is closed or the process ends.

    None where another process holds it. Where the file system knows no locks, every process gets one.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass
    return handle


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when complete, and is gone when writing fails.

    Until then it is called FOLDER.unfinished and belongs to this process alone; one that a killed process left is begun
    anew. Raises ValueError if FOLDER holds something, and where FOLDER.unfinished is another process's or not of this
    project.
    """
    folder = Path(folder)
    if folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists; choose another folder or delete it")
    aside = folder.with_name(folder.name + ".unfinished")
    handle = _claim(aside, folder)
    try:
        yield aside
        (aside / OURS).unlink()
        os.rename(aside, folder)  # onto an empty folder it works
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(error.filename or folder)) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise BadInput(f"{folder} was made by somebody else meanwhile; choose another folder") from None
        raise
    finally:
        os.close(handle)


def _claim(aside: Path, folder: Path) -> int:
    """Make the folder aside; the handle holds its lock."""
    if aside.is_dir() and not aside.is_symlink():
        left = lock(aside)
        if left is None:
            raise BadInput(f"{folder} is being written by another process right now; wait for it, or end it")
        if (aside / OURS).exists():
            shutil.rmtree(aside)
        os.close(left)
    try:
        aside.mkdir(parents=True)
    except FileExistsError:
        raise BadInput(f"{aside} is in the way and not of this project's making; move it, then try again") from None
    while (handle := lock(aside)) is None:  # another process has found the folder and looks whose it is
        time.sleep(0.01)
    (aside / OURS).touch()
    return handle
