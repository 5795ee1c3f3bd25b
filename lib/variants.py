"""A variant of the model: a short file whose classes stand in for those of the same names in model.py.

The file imports the originals from `model` and subclasses them. model.py is executed once more for it, with the file's
classes in the place of its own, so plain models in the same process stay plain. What carries a variant from the flags
to the weights is its ModelConfig: `build` makes a model of its parts. A new field of it becomes a flag of train.py.

A run keeps a copy of its file. It is code, so one in a model's folder runs only where the same file was trained on this
machine or is one of variants/, or with --trust_variant.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

from lib.errors import BadInput
from lib.files import sha256, write_whole
from lib.packed import each_alone

FILE = "variant.py"  # its copy in a run's folder, a checkpoint and an exported model
HERE = Path(__file__).resolve().parent.parent / "variants"
PARTS = (
    "ModelConfig", "RMSNorm", "rope_table", "rotate", "Attention", "FeedForward", "Block",
    "Unembedding", "Transformer",
)  # fmt: skip
loaded: dict[tuple[str, type], type] = {}
trusted: set[str] = set()  # hashes, "*" for all: of the folders that this process may take code from


class Variant(NamedTuple):
    """What a variant's ModelConfig knows of its file."""

    source: str
    sha256: str
    plain: type             # the ModelConfig of model.py
    model: ModuleType       # model.py with the file's classes in it
    is_llama: bool          # what it trains is a LLaMA, only of another shape
    own_loss: bool          # it brings an Unembedding, which makes the loss
    fields: dict[str, Any]  # that it adds to ModelConfig, by name their types


def variant_of(config_class: type) -> Variant | None:
    return getattr(config_class, "variant", None)


def own_fields(shape) -> dict[str, Any]:
    """The values of what a variant adds to the shape of a model; of a plain one none."""
    variant = variant_of(type(shape))
    return {name: getattr(shape, name) for name in variant.fields} if variant else {}


def load(path: Path, config_class: type) -> type:
    """The ModelConfig of the model that the file at path describes. Raises ValueError for a mistake in the file.

    config_class is model.ModelConfig, or that of a variant.
    """
    try:
        source = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no Python file; a variant is one") from None
    variant = variant_of(config_class)
    plain = variant.plain if variant else config_class
    if (source, plain) not in loaded:
        found = _assemble(source, path, plain)
        with _mistakes(path, " (tried: width 32, 2 layers, 4 query and 2 key/value heads, feed-forward 48)"):
            _try(found)
        loaded[source, plain] = found
    return loaded[source, plain]


def load_trusted(folder: Path, config_class: type) -> type:
    """As `load`, of the file in a model's folder. Raises ValueError where it is code of somebody else."""
    path = folder / FILE
    if not path.is_file():
        raise BadInput(f"{folder} is of a variant and {FILE} is not there")
    digest = sha256(path)
    if "*" in trusted:
        remember(digest)
    known = trusted | {sha256(shipped) for shipped in HERE.glob("*.py")}
    if digest not in known and not (_memory() / digest).exists():
        raise BadInput(f"{path} is code that was not trained here: read it, then add --trust_variant to run it")
    return load(path, config_class)


def _memory() -> Path:
    """Where this machine's user keeps the hashes of the variants that ran."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "plainllama" / "variants"


def remember(digest: str):
    """Take this file's code from any folder from now on."""
    trusted.add(digest)
    with contextlib.suppress(OSError):
        _memory().mkdir(parents=True, exist_ok=True)
        (_memory() / digest).touch()


@contextlib.contextmanager
def _mistakes(path: Path, tried: str = ""):
    """Turn whatever the code of a variant raises into one sentence that names the line."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        place = f"{path}:{lines[-1]}" if lines else str(path)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(f"{place}: {type(error).__name__}: {reason}{tried}") from None


def _assemble(source: str, path: Path, plain: type) -> type:
    """Execute model.py anew and the file upon it. Returns its ModelConfig."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    # names of their own, by which the compiler finds the globals of a function
    copy = _execute_model(f"model_{digest[:16]}", sys.modules[plain.__module__].__file__)
    file = ModuleType(f"variant_{digest[:16]}")
    file.__file__ = str(path)
    sys.modules[file.__name__] = file
    before = sys.modules.get("model")
    sys.modules["model"] = copy
    try:
        with _mistakes(path):
            exec(compile(source, path, "exec"), vars(file))
    finally:
        del sys.modules["model"]
        if before:
            sys.modules["model"] = before
    original = copy.Attention
    _stand_in(file, copy, path)
    # a class that is no Attention of model.py may have neither, and reads packed rows by itself
    attend, within = (getattr(copy.Attention, name, None) for name in ("attend", "attend_within"))
    if attend is not original.attend and within is original.attend_within:
        copy.Attention.attend_within = property(_within)
    hints = get_type_hints(copy.ModelConfig)
    names = {field.name for field in dataclasses.fields(copy.ModelConfig)}
    names -= {field.name for field in dataclasses.fields(plain)}
    is_llama = getattr(file, "IS_LLAMA", False)
    fields = {name: hints[name] for name in names}
    own_loss = "Unembedding" in vars(file)
    copy.ModelConfig.variant = Variant(source, digest, plain, copy, is_llama, own_loss, fields)
    return copy.ModelConfig


def write(config_class: type, folder: Path):
    """Put the file of a variant into a folder; of a plain model nothing."""
    if variant := variant_of(config_class):
        write_whole(folder / FILE, variant.source)


def export(config_class: type, folder: Path):
    """Put the file of a variant into a folder for others, which a LLaMA does not need."""
    if not is_llama(config_class):
        write(config_class, folder)


def is_llama(config_class: type) -> bool:
    """Whether what is trained is a LLaMA, for transformers and others."""
    variant = variant_of(config_class)
    return variant is None or variant.is_llama


def say_if_no_llama(config_class: type, folder: str | Path):
    if not is_llama(config_class):
        print(f"{folder} is not LLaMA any more but a variant: only this project loads it, with its {FILE}")


def _within(attention):
    return each_alone(attention.attend)


def _execute_model(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _stand_in(file: ModuleType, copy: ModuleType, path: Path):
    """Put what the file defines into the place of what has its name in model.py."""
    own = [name for name, value in vars(file).items() if getattr(value, "__module__", "") == file.__name__]
    for name in own:
        if name not in PARTS and not name.startswith("_"):
            known = f"no part of model.py that a variant replaces ({', '.join(PARTS)})"
            raise BadInput(f"{path}: {name} is {known}; the name of a helper begins with _")
    if not set(own) & set(PARTS):
        raise BadInput(f"{path}: nothing in it stands in for a part of model.py ({', '.join(PARTS)})")
    for name in set(own) & set(PARTS):
        setattr(copy, name, vars(file)[name])
    config_class = copy.ModelConfig
    if "__annotations__" in vars(config_class) and "__dataclass_fields__" not in vars(config_class):
        raise BadInput(f"{path}: ModelConfig has new fields and lacks @dataclass(frozen=True)")


def _try(config_class: type):
    """Let a tiny model of the variant learn and write, so that a mistake shows before a run starts."""
    import torch

    shape = config_class(32, 2, 4, 2, 48, 32, 32)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = shape.build()
    model.init_weights()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    ids = torch.randint(32, (2, 24), generator=generator)
    model(ids, ids).backward()
    cache = variant_of(config_class).model.KVCache(shape, 2, 24)
    with torch.no_grad():
        whole = model(ids)
        steps = torch.cat([model(part, cache=cache) for part in ids.split((9, 1, 1, 13), 1)], 1)
        changed = ids.clone()
        changed[:, 12:] = (changed[:, 12:] + 1) % 32
        earlier = model(changed)[:, :12]
    scale = whole.abs().max()
    if not (earlier - whole[:, :12]).abs().max() <= 1e-3 * scale:
        raise BadInput("a token sees those after it")
    if not (steps - whole).abs().max() <= 1e-3 * scale:
        raise BadInput("read in pieces, with the cache, a text has other logits than read at once")
    if is_llama(config_class):
        plain = variant_of(config_class).plain(**dataclasses.asdict(shape)).build()
        plain.load_state_dict(model.state_dict())
        if not (plain(ids) - whole).abs().max() <= 1e-3 * scale:
            raise BadInput("it says IS_LLAMA, and LLaMA has other logits")
