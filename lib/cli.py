"""A command: its flags from a dataclass, bad input as one sentence."""

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

from lib.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent

# Set before PyTorch is imported: how long OpenMP's threads wait for each other before they sleep. With GNU's 300,000
# turns a training slows down to a third when somebody else works on the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run_command(main, config_class, defaults=None):
    """Parse the flags and call main. Bad input ends with one sentence and exit code 2; a bug keeps its traceback.

    Bad input is BadInput, or an OSError of the system. defaults turns a first reading of the flags
    into those that count where a flag is not typed. A script that trains or loads models has
    --trust_variant and, where a variant brings some, its flags.
    """
    import tyro

    try:
        if hasattr(config_class, "trust_variant"):
            from lib.variant_flags import read_flags

            config_class = read_flags(config_class)
        settings = dict(config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
        parse = functools.partial(tyro.cli, config_class, **settings)
        config = parse()
        main(parse(default=defaults(config)) if defaults else config)
    except (BadInput, OSError) as error:
        text = str(error)
        if isinstance(error, OSError):
            if error.errno is None:
                raise
            if error.filename is not None:
                text = f"{error.filename}: {error.strerror}"
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
