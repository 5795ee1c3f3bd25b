"""What the flags of train.py are where nobody typed them, by the kind of run."""

import contextlib
import dataclasses
import sys
from pathlib import Path

from lib import variant_flags
from lib.errors import BadInput
from lib.meta import read_meta
from lib.order import mixture_weights
from lib.runs import read_run
from lib.weights import read_config

TUNED = dict(weight_decay=0.0, beta2=0.999, warmup=0.03, final_lr=0.0)
BY_KIND = {  # beside what train.py says, which is for pretraining at a laptop's size
    "pretraining": {},
    # as LLaMA-2's own second stage: a low rate, decay as before
    "more pretraining": dict(learning_rate=2e-5, beta2=0.95, epochs=1.0, warmup=0.03, final_lr=0.1),
    # as Alpaca and Vicuna; LoRA's as alpaca-lora's and QLoRA's for 7B
    "full fine-tuning": TUNED | dict(learning_rate=2e-5, epochs=3.0),
    "LoRA": TUNED | dict(learning_rate=2e-4, epochs=3.0),
    # as Rafailov et al. 2023 and Zephyr; an adapter wants ten times as much
    "DPO": TUNED | dict(learning_rate=5e-7, epochs=1.0, warmup=0.1),
    "DPO with LoRA": TUNED | dict(learning_rate=5e-6, epochs=1.0, warmup=0.1),
}
LONGEST = 2048  # tokens of a sequence of plain text, where the model's window is larger


def kind_of_run(config, kind_of_data: str) -> str:
    """The name in BY_KIND of a run with these flags, on data of this kind."""
    if kind_of_data == "preference":
        return "DPO with LoRA" if config.lora_rank else "DPO"
    if config.lora_rank:
        return "LoRA"
    if not config.init_from:
        return "pretraining"
    return "full fine-tuning" if kind_of_data == "chat" else "more pretraining"


def by_kind(first):
    """The flags that count where none is typed, from a first reading of those that are.

    A run that is continued by --resume has its own. Raises ValueError.
    """
    kind = variant_flags.extended(type(first), first.variant, first.resume)
    if first.resume:
        saved = kind(**read_run(Path(first.resume), config=kind)["config"])
        not_kept = dict(stop_at=0, anyway=False, trust_variant=False)
        return dataclasses.replace(saved, resume=first.resume, out=first.resume, **not_kept)
    metas = []
    with contextlib.suppress(ValueError):  # it may not be there yet, and else it is refused later
        metas = [read_meta(folder) for folder in mixture_weights(first.data)[0]]
    kinds = {meta.get("kind", "text") for meta in metas}
    found = next((name for name in ("preference", "chat") if name in kinds), "text")
    changes = dict(BY_KIND[kind_of_run(first, found)])
    said = any(word.partition("=")[0] == "--steps" for word in sys.argv)
    if said or first.plan and not metas:  # without data nobody knows how long an epoch is
        changes.pop("epochs", None)
    if seq_len := length(first, metas, found):
        changes["seq_len"] = seq_len
    return kind(**changes)


def length(config, metas: list[dict], kind: str) -> int:
    """Tokens of a sequence: of chats those of the longest, as they were prepared, of text the window
    of the model to start from, if it is not too long; 0 where that is not known."""
    longest = max((meta.get("max_len", 0) for meta in metas), default=0)
    if not config.init_from:
        return longest
    with contextlib.suppress(BadInput):
        window = read_config(config.init_from, config.config_class).max_seq_len
        return min(window, longest if kind != "text" else LONGEST)
    return longest


def described(config, kind_of_data: str) -> str:
    """The kind of a run and what came of it, as its first line says it."""
    rate = f"learning rate {config.learning_rate:g}"
    if config.schedule == "constant":
        rate += ", constant"
    else:
        rate += f", {config.schedule} to {config.final_lr:g} of it"
    decay = f"weight decay {config.weight_decay:g}"
    return f"{kind_of_run(config, kind_of_data)}: {rate}, {decay}"
