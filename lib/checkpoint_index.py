"""The index of a sharded checkpoint, `.metadata`, read without letting it run anything.

PyTorch writes the index as a pickle, and its own reader unpickles whatever it finds: .metadata, or
where that fails __RANK.metadata. Here the pickle makes inert stand-ins only; what they describe is
checked against the files, and an index is built of it anew. `Reader` hands PyTorch that one and
opens no other.
"""

import functools
import io
import math
import pickle
from collections import Counter
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lib.errors import BadInput

METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
STAND_INS = {  # what an index may name, by module, for which it gets a stand-in
    METADATA: """Metadata TensorStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex
        StorageMeta _MEM_FORMAT_ENCODING""".split(),
    FILES: ["_StorageInfo"],
    "pathlib": ["PosixPath", "WindowsPath"],
    "pathlib._local": ["PosixPath", "WindowsPath"],
}
CONSTANTS = {  # and what it gets as it is: nothing here can be written on
    "Size": torch.Size,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


class Reader(FileSystemReader):
    """Reads the tensors of a checkpoint; hand it to torch.distributed.checkpoint.load."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = Path(folder)

    @functools.cached_property
    def index(self) -> Metadata:
        return read_index(self.folder)

    def read_metadata(self, *args, **options) -> Metadata:
        """The index, whatever is asked for; that of a rank is asked of a function with `kwargs`."""
        return self.index


def read_index(folder: Path) -> Metadata:
    """The tensors of a checkpoint and their places in its files.

    Raises ValueError for an index that names what does not describe tensors, points out of the
    folder, lacks a part of a tensor, or describes more bytes than the files have; and whatever a
    damaged pickle makes Python raise.
    """
    pickled = _Stranger((folder / ".metadata").read_bytes())
    try:
        return _built(pickled.load(), folder)
    except ValueError as error:
        raise BadInput(f"{folder} cannot be read: {error}") from error


class _StandIn:
    """Keeps the state that a pickle gives it.

    Each reading has subclasses of its own, for a pickle can write on a class that it names.
    """

    def __init__(self, *args):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class _Stranger(pickle._Unpickler):
    """Unpickles an index.

    The unpickler in Python, unlike the one in C, takes no memory for what a damaged length or
    number promises, but for byte arrays, which no index has.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.stand_ins = {}

    def find_class(self, module: str, name: str):
        if module == "torch.serialization" and name == "_get_layout":
            return {"torch.strided": torch.strided}.get  # unlike a function, it keeps nothing
        if module == "torch" and name in CONSTANTS:
            return CONSTANTS[name]
        if name not in STAND_INS.get(module, ()):
            raise BadInput(f"its index names {module}.{name}, which does not describe tensors")
        return self.stand_ins.setdefault(name, type(name, (_StandIn,), {}))


def _built(described, folder: Path) -> Metadata:
    entries, places = _fields(described, "Metadata", state_dict_metadata=dict, storage_data=dict)
    stored = {}
    for key, value in places.items():
        name, offset = _fields(key, "MetadataIndex", fqn=str, offset=torch.Size)
        place = dict(relative_path=str, offset=int, length=int)
        file, start, length = _fields(value, "_StorageInfo", **place)
        if value.state.get("transform_descriptors"):
            raise BadInput(f"its index says that {name} is compressed or encrypted")
        stored[MetadataIndex(name, offset)] = _StorageInfo(file, start, length)
    _check_room(stored, folder)

    tensors = {}
    for name, entry in entries.items():
        kinds = dict(properties=object, size=torch.Size, chunks=list)
        properties, size, chunks = _fields(entry, "TensorStorageMetadata", **kinds)
        dtype = _state(properties, "TensorProperties", tuple)[0]
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise BadInput(f"its index gives {name} no type of number")
        box = dict(offsets=torch.Size, sizes=torch.Size)
        parts = [_fields(chunk, "ChunkStorageMetadata", **box) for chunk in chunks]
        _check_parts(name, size, dtype, parts, stored)
        described = [ChunkStorageMetadata(*part) for part in parts]
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, described)
    return Metadata(tensors, storage_data=stored, storage_meta=StorageMeta())


def _state(thing, kind: str, type_: type):
    """The state of a stand-in of this kind. Raises ValueError for anything else."""
    is_one = isinstance(thing, _StandIn) and type(thing).__name__ == kind
    state = thing.state if is_one else None
    if not state or not isinstance(state, type_):
        raise BadInput(f"its index has a {type(thing).__name__} where a {kind} belongs")
    return state


def _fields(thing, kind: str, **types: type) -> list:
    """Some fields of a stand-in. Raises ValueError for another kind, and for another type."""
    state = _state(thing, kind, dict)
    for field, type_ in types.items():
        if not isinstance(state.get(field), type_):
            raise BadInput(f"its index has a {kind} whose {field} is {state.get(field)!r:.40}")
    return [state[field] for field in types]


def _check_room(stored: dict, folder: Path):
    """Raise ValueError where the index names other files than the folder's, or more than is in them."""
    used, end = Counter(), Counter()
    for info in stored.values():
        if info.offset < 0 or info.length < 0:
            raise BadInput("its index describes a negative length")
        file = info.relative_path
        used[file] += info.length
        end[file] = max(end[file], info.offset + info.length)
    for file in used:
        if Path(file).name != file or not (folder / file).is_file():
            raise BadInput(f"its index names {file}, which is no file in there")
        if max(used[file], end[file]) > (folder / file).stat().st_size:
            raise BadInput(f"its index describes more bytes than there are in {file}")


def _check_parts(name: str, size: torch.Size, dtype: torch.dtype, parts: list, stored: dict):
    """Raise ValueError unless the parts of a tensor, rows of it, are stored and are the whole."""
    end = 0
    for offsets, sizes in sorted(parts):
        same_dims = len(offsets) == len(sizes) == len(size)
        if not same_dims or min((*offsets, *sizes, *size), default=0) < 0:
            raise BadInput(f"its index has a part of {name} that does not fit it")
        if not math.prod(sizes):
            continue
        rows = sizes[0] if sizes else 1
        info = stored.get(MetadataIndex(name, offsets))
        if info is None or info.length < math.prod(sizes) * dtype.itemsize:
            raise BadInput(f"its index has a part of {name} that is not in the files")
        if any(offsets[1:]) or sizes[1:] != size[1:] or (offsets[0] if offsets else 0) != end:
            raise BadInput(f"its index has parts of {name} that do not make up the whole")
        end += rows
    if end != (size[0] if size else 1) and math.prod(size):
        raise BadInput(f"its index has not all parts of {name}")
