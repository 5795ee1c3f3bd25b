"""The library beside the five files: one subject a file. Scripts import it, it imports no script."""

import os
import sys

if sys.version_info < (3, 11) or os.name == "nt":
    here = f"Python {sys.version.split()[0]} on {sys.platform}"
    sys.stderr.write(f"plainllama needs Python 3.11 or newer on Linux, macOS or Windows' WSL; this is {here}\n")
    sys.exit(2)
