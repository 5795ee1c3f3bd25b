"""The library beside the five files: one subject a file. Scripts import it, it imports no script."""

import os
import sys

if sys.version_info < (3, 11) or os.name == "nt":
    needs = "plainllama needs Python 3.11 or newer on Linux, macOS or Windows' WSL"
    sys.stderr.write(f"{needs}; this is Python {sys.version.split()[0]} on {sys.platform}\n")
    sys.exit(2)
