"""The flags of eval.py: what a protocol puts in place of those not typed, and which do not fit."""

import dataclasses

from lib.contrast import check_contrast
from lib.errors import BadInput


def settled(config, protocols: dict[str, dict]):
    """The flags with the protocol's own values in place of those not typed.

    protocols are the lib.protocols.Protocol of each task, by name. Raises ValueError for flags that
    are out of range or do not go together.
    """
    check_flags(config)
    known = protocols[config.task]
    name = config.protocol or next(iter(known))
    if name not in known:
        raise BadInput(f"--protocol {name} is not one of {config.task}'s: {', '.join(known)}")
    protocol, shots = known[name], config.shots
    check_task_flags(config, protocol)
    fixed = config.task == "bbh" and name == "cot"  # its examples are part of the files
    if shots > protocol.most_shots or fixed and shots not in (-1, 3):
        problem = f"does not fit {config.task} {name}, which has {protocol.shots}"
        raise BadInput(f"--shots {shots} {problem}")
    if shots < 0:
        shots = protocol.shots
    return dataclasses.replace(
        config,
        protocol=name,
        shots=shots,
        max_prompt=config.max_prompt or protocol.max_prompt,
    )


def check_out_name(out: str):
    if out and not out.endswith(".json"):
        raise BadInput(f"--out {out} must end in .json; the lines go beside it, in .jsonl")


def check_flags(config):
    """What any task needs of the flags."""
    check_contrast(1.0, config.beta)
    for name in ("shots", "limit", "max_prompt", "batch_tokens"):
        number, least = getattr(config, name), 0
        if name == "shots":
            least = -1
        if number < least:
            raise BadInput(f"--{name} {number} must be at least {least}")
    if not config.task or not config.model:
        raise BadInput("--model and --task are needed, or --compare with two results")
    check_out_name(config.out)
    if config.checkpoints == "all" and not config.out:
        beside = "beside which the table and the picture go"
        raise BadInput(f"--checkpoints all needs --out X.json, {beside}")
    if config.checkpoints == "last" and len(config.model) > 1:
        more = f"not {len(config.model)}, but with --checkpoints all"
        raise BadInput(f"--model takes one model, {more}")


def check_task_flags(config, protocol):
    """What this task needs of the flags, and cannot use."""
    for flag, users in (("subjects", ("mmlu", "bbh")), ("lengths", ("passkey",))):
        if getattr(config, flag) and config.task not in users:
            raise BadInput(f"--{flag} is for {' and '.join(users)}, not for {config.task}")
    if config.task == "perplexity" and (config.chat or not config.bos):
        flag = "--no_bos"
        if config.chat:
            flag = "--chat"
        why = "which reads a text as it is, after BOS"
        raise BadInput(f"{flag} does nothing for perplexity, {why}")
    if config.template and not config.chat:
        raise BadInput(f"--template {config.template} is for --chat, which is off")
    if config.amateur and (protocol.max_new_tokens or config.task == "perplexity"):
        raise BadInput(f"--amateur {config.amateur} scores choices, and {config.task} has none")
    if config.task == "passkey" and config.data:
        raise BadInput(f"--data {config.data} is not read for passkey, which makes its prompts")
    if config.task != "passkey" and not config.data:
        raise BadInput(f"--data is needed for {config.task}")
