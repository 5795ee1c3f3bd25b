"""What goes wrong while a file is written, as an error that names the file."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, or a quota or limit is reached


@contextlib.contextmanager
def writing(path: str | Path, *own_errors: type[Exception]) -> Iterator[None]:
    """Whatever fails inside is raised as an OSError that names path, which the system does only when it opens a file.

    own_errors are the errors of a library that has its own instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except own_errors as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
