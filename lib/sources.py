"""Where a corpus comes from: files, folders, Python's standard library, and public corpora that are downloaded."""

import hashlib
import http.client
import os
import sys
import sysconfig
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from lib import hub
from lib.disk import NO_ROOM
from lib.errors import BadInput

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")


MAX_WORKERS = 1024             # far more than a machine has cores


@dataclass
class Flags:
    source: tuple[str, ...] = ("stdlib",)
    """stdlib, files or folders, or a public corpus: tinyshakespeare, tinystories, fineweb-edu (its first 16 files), c4
    (its first 8); with --template alpaca, dolly, oasst, hh-rlhf. Downloads go to a folder `downloads` beside --out.
    hf:OWNER/NAME is a data set of the Hugging Face Hub"""
    out: str = "data/stdlib"            # the folder to make
    tokenizer: str = "train:4096"       # a file or a model's folder, gpt2, cl100k_base, bytes, or train:SIZE
    val_fraction: float = 0.05          # of the documents, chosen by their hash
    val_last: bool = False              # instead the end of the text, to the character
    workers: int = 0                    # processes; 0 takes all cores


def check_flags(flags: Flags, workers: int):
    """Raise ValueError for what cannot be prepared, before anything is read or downloaded."""
    if not 1 <= workers <= MAX_WORKERS:
        raise BadInput(f"--workers {workers} must be at least 1 and at most {MAX_WORKERS}, or 0 for all cores")
    if not all(flags.source) or not flags.source:
        raise BadInput('--source names nothing ("" is no file); give a file, a folder or a name such as stdlib')
    if Path(flags.out).exists() or Path(flags.out).is_symlink():
        raise BadInput(f"--out {flags.out} exists; choose another folder or delete it")
    if not 0 < flags.val_fraction < 1:
        raise BadInput(f"--val_fraction {flags.val_fraction} must lie between 0 and 1")


@dataclass(frozen=True)
class Corpus:
    """A public corpus that `--source NAME` downloads."""

    urls: tuple[str, ...]
    suffix: str
    licence: str
    sha256: str = ""           # of the only file; where it is empty, the server's own checksum is used
    chats: bool = False        # conversations or pairs, for --template


CORPORA = {
    "tinyshakespeare": Corpus(
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        ".txt",
        "public domain",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": Corpus(
        ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",),
        ".txt",
        "CDLA-Sharing-1.0",
    ),
    "fineweb-edu": Corpus(
        tuple(
            f"https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main/shard_{i:05d}.parquet"
            for i in range(16)
        ),
        ".parquet",
        "ODC-By 1.0",
    ),
    "c4": Corpus(
        tuple(
            f"https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{i:05d}-of-01024.json.gz"
            for i in range(8)
        ),
        ".jsonl.gz",
        "ODC-By 1.0",
    ),
    "alpaca": Corpus(
        ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",),
        ".json",
        "CC BY-NC 4.0",
        chats=True,
    ),
    "dolly": Corpus(
        ("https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",),
        ".jsonl",
        "CC BY-SA 3.0",
        chats=True,
    ),
    "oasst": Corpus(  # its best answers
        (
            "https://huggingface.co/datasets/timdettmers/openassistant-guanaco/resolve/main/"
            "openassistant_best_replies_train.jsonl",
        ),
        ".jsonl",
        "Apache-2.0",
        chats=True,
    ),
    "hh-rlhf": Corpus(
        ("https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz",),
        ".jsonl.gz",
        "MIT",
        chats=True,
    ),
}


def find_files(source: tuple[str, ...], download_folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files of `stdlib`, of named corpora (downloaded here), and of local paths, in a fixed order."""
    files = []
    for item in source:
        if item == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
            paths = sorted(root.rglob("*.py"))
            files += [path for path in paths if not skip.intersection(path.relative_to(root).parts)]
        elif item in CORPORA:
            print(f"{item}: {len(CORPORA[item].urls)} file(s), licence {CORPORA[item].licence}", file=sys.stderr)
            files += [download(url, download_folder / item, CORPORA[item]) for url in CORPORA[item].urls]
        elif (Path(item) / "dataset_info.json").exists():
            problem = "is a folder of datasets' save_to_disk, which is not read"
            raise BadInput(f"{item} {problem}; write it with to_parquet or to_json")
        elif Path(item).is_dir():
            inside = [path for path in sorted(Path(item).rglob("*")) if path.name.endswith(suffixes)]
            found = [path for path in inside if path.is_file() and not path.name.startswith(".")]
            if not found:
                raise BadInput(f"{item} holds no files that end in {', '.join(suffixes)}")
            files += found
        elif Path(item).is_file():
            if not item.endswith(suffixes):
                raise BadInput(f"{item} must end in one of {', '.join(suffixes)}")
            files.append(Path(item))
        elif item.startswith(hub.PREFIX):
            patterns = tuple(f"*{suffix}" for suffix in suffixes)
            folder = hub.fetched(item, "dataset", patterns)
            files += find_files((str(folder),), download_folder, suffixes)
        else:
            raise BadInput(f"--source {item} is neither a file, a folder, stdlib nor one of {', '.join(CORPORA)}")
    return files


def download(url: str, folder: Path, corpus: Corpus) -> Path:
    """Fetch url into folder, continuing where an earlier attempt stopped; checked by size and SHA-256.

    Raises ValueError without a network, and when size or checksum differ (the file is then deleted).
    """
    path = folder / (url.rsplit("/", 1)[1].removesuffix(".json.gz").removesuffix(corpus.suffix) + corpus.suffix)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        size, checksum = _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, str(part)) from None
        raise BadInput(
            f"{url} could not be fetched ({getattr(error, 'reason', error)}); without a network, give --source a local "
            f"file or folder; typed again, the command continues the download"
        ) from None
    checksum = corpus.sha256 or checksum
    have = part.stat().st_size
    if size is not None and have < size:
        raise BadInput(f"{url} broke off at {have} of {size} bytes; type the command again to continue")
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if (size is not None and have > size) or (len(checksum) == 64 and found != checksum):
        part.unlink()
        expected = f"expected {size} with {checksum or 'any'}"
        raise BadInput(f"{url}: {have} bytes with SHA-256 {found}, {expected}; deleted")
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path) -> tuple[int | None, str]:
    """Append to part what it lacks of url; returns the size and the SHA-256 that the server names, where it does.

    Hugging Face names the checksum, as X-Linked-ETag, in the answer that redirects to the file.
    """
    from tqdm import tqdm

    answers = []

    class Remember(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, message, headers, new_url):
            answers.append(headers)
            return super().redirect_request(request, file, code, message, headers, new_url)

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    size = None
    try:
        with urllib.request.build_opener(Remember).open(request, timeout=60) as response:
            answers.append(response.headers)
            have = have if response.status == 206 else 0
            length = response.headers["Content-Length"] or ""
            if length.isdecimal():
                size = have + int(length)
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr)
            with open(part, "ab" if have else "wb") as file, bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left after the bytes that part has
            raise
        answers.append(error.headers)
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else None
    checksums = [headers["X-Linked-ETag"].strip('"') for headers in answers if headers["X-Linked-ETag"]]
    return size, (checksums or [""])[0]
