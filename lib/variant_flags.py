"""The flags by which a run names its variant, and the variant of a run that goes on; see lib/variants.py."""

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lib import variants
from lib.checkpoints import has_checkpoint
from lib.errors import BadInput
from lib.files import sha256


@dataclass
class Flags:
    # file whose classes stand in for those of model.py, such as variants/relu2.py
    variant: str = ""
    trust_variant: bool = False  # run the code that the folder of a variant brings; read it first


def read_flags(kind: type) -> type:
    """The dataclass of a script's flags, with those of the variant that the command line names.

    Raises ValueError for a mistake in the variant.
    """
    if "--trust_variant" in sys.argv:
        variants.trusted.add("*")
    if not hasattr(kind, "config_class"):
        return kind
    return extended(kind, typed("--variant", sys.argv), typed("--resume", sys.argv))


def typed(flag: str, words: list[str]) -> str:
    """The value of a flag on a command line; empty where it is not there."""
    for word, following in zip(words, [*words[1:], ""]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""


def extended(kind: type, variant: str, resume: str) -> type:
    """kind, train.Config, with a flag for each field that a variant adds to the shape of the model."""
    if variants.variant_of(kind.config_class):  # it has them
        return kind
    if resume and (Path(resume) / variants.FILE).exists():
        chosen = variants.load_trusted(Path(resume), kind.config_class)
    elif variant:
        chosen = variants.load(Path(variant), kind.config_class)
    else:
        return kind
    fields = []
    for field in dataclasses.fields(chosen):
        if field.name in chosen.variant.fields:
            if hasattr(kind, field.name):
                raise BadInput(f"{variant or resume}: --{field.name} is a flag of train.py already")
            told = tyro.conf.arg(help=comment_on(field.name, chosen.variant.source))
            flag = Annotated[chosen.variant.fields[field.name], told]
            default = dataclasses.field(default=field.default)
            fields.append((field.name, flag, default))
    own = {"config_class": chosen, "__doc__": kind.__doc__}
    found = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace=own)
    found.__module__ = kind.__module__  # where tyro reads what is said of the other flags
    return found


def comment_on(name: str, source: str) -> str:
    """What is written behind the field of a class."""
    found = re.search(rf"^ +{name}: .*?# *(.*)$", source, re.M)
    return found[1] if found else ""


def chosen(config) -> type:
    """The ModelConfig of the run that config, the flags of train.py, begins or continues.

    Raises ValueError where --variant is not what the run in --out began with.
    """
    folder, config_class = Path(config.out), config.config_class
    kept = folder / variants.FILE
    begun = bool(config.resume) or has_checkpoint(folder)
    if begun and not config.resume:
        before = kept.read_bytes() if kept.exists() else b""
        typed = Path(config.variant).read_bytes() if config.variant else b""
        if before != typed:
            mine = f"--variant {config.variant}" if config.variant else "no --variant"
            what = f"holds a run of another variant than {mine}"
            raise BadInput(f"--out {folder} {what}; go on with --resume, or choose another --out")
        if typed:
            variants.remember(sha256(kept))
    if begun and kept.exists():
        return variants.load_trusted(folder, config_class)
    if begun or not config.variant:
        return config_class
    found = variants.load(Path(config.variant), config_class)
    variants.remember(found.variant.sha256)
    return found


def check_loss(config, config_class: type):
    """Raise ValueError for flags of the loss that a variant with a loss of its own does not heed."""
    variant = variants.variant_of(config_class)
    for name in ("label_smoothing", "z_loss"):
        if variant and variant.own_loss and getattr(config, name):
            raise BadInput(f"--{name} {getattr(config, name)} does not go with a variant that has its own loss")


def describe(config, config_class: type) -> dict:
    """What run.json says of a variant; nothing of a plain model."""
    if variant := variants.variant_of(config_class):
        return {"variant": {"file": config.variant, "sha256": variant.sha256}}
    return {}


def check_unchanged(record: dict, folder: Path):
    """Raise ValueError where the file in a run's folder is not the one that it began with."""
    path = folder / variants.FILE
    before = record.get("variant", {}).get("sha256", "")
    now = sha256(path) if path.exists() else ""
    if before != now:
        raise BadInput(f"{path} is not the variant that the run began with")
