"""A command: its flags from a dataclass, bad input as one sentence."""

import functools
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_command(main, config_class, defaults=None):
    """Parse the flags and call main. Bad input ends with one sentence and exit code 2; a bug keeps its traceback.

    Bad input is a ValueError raised by one of this project's files, or an OSError about a file; from deeper down a
    ValueError is a bug. defaults turns a first reading of the flags into those that count where a flag is not typed.
    """
    import tyro

    parse = functools.partial(tyro.cli, config_class, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    try:
        config = parse()
        main(parse(default=defaults(config)) if defaults else config)
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        about_a_file = isinstance(error, OSError) and error.filename is not None
        if raised_in.parent not in (ROOT, ROOT / "lib", ROOT / "recipes") and not about_a_file:
            raise
        text = f"{error.filename}: {error.strerror}" if about_a_file else str(error)
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def spell(command: list[str], flags: dict) -> str:
    """What to type for these flags, as `--bos`, `--no_bos` or `--source a b`."""
    words = [*command]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def git_commit() -> str:
    """The commit of this code, "-dirty" added where it was changed since; empty outside a repository."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
