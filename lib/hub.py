"""Models and data sets of the Hugging Face Hub, `hf:OWNER/NAME`, where there is a network."""

from functools import cache
from pathlib import Path

from lib.errors import BadInput

PREFIX = "hf:"
OF_A_MODEL = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja")


@cache
def fetched(name: str, kind: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a "model" or "dataset" of the Hub, downloaded once, what fits the patterns.

    Raises ValueError where it is not there, not open to this user, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BadInput(f"{name} needs huggingface_hub: pip install huggingface_hub") from None
    try:
        plain = name.removeprefix(PREFIX)
        return Path(snapshot_download(plain, repo_type=kind, allow_patterns=list(patterns)))
    except Exception as error:  # the library raises those of its own and of three others
        reason = (str(error).strip().splitlines() or [""])[0]
        problem = f"cannot be fetched ({type(error).__name__}: {reason})"
        hint = "without a network give the path of a folder"
        raise BadInput(f"{name}: this {kind} {problem}; {hint}") from None
