"""The command eval.py --compare: the difference of two results, printed and written."""

import json
from collections.abc import Callable
from pathlib import Path

from lib.eval_flags import check_out_name
from lib.files import write_whole
from lib.results import check_out
from lib.tables import say_difference


def report_difference(paths: tuple[str, ...], out: str, compare: Callable[..., dict]):
    """Print what compare(paths), eval.py's, finds; and write it to out, where that is named.

    Raises ValueError where out is no free name ending in .json, before anything is compared.
    """
    if out:
        check_out_name(out)
        check_out(Path(out))
    difference = compare(paths)
    say_difference(difference, paths)
    if out:
        write_whole(Path(out), json.dumps(difference, indent=2))
