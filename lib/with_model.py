"""What a model's folder brings beside its weights: its tokenizer, a chat's template, an adapter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lib.errors import BadInput
from lib.jinja_template import known_template
from lib.peft import save_adapter
from lib.probe import check_code
from lib.runs import find_template
from lib.template_forms import TEMPLATES, spelled
from lib.tensors import DTYPES
from lib.tokenizer import Tokenizer, find_tokenizer
from lib.weights import read_adapter, whole_adapter


def fitting_tokenizer(path: str, named: str, shape) -> Tokenizer:
    """The tokenizer of the model at path, or the one that is named; shape is the model's ModelConfig.

    An adapter's is that of its base. Raises ValueError where there is none, and for one that has
    more tokens than the model.
    """
    folder = named or find_tokenizer(path)
    if not folder and (Path(path) / "adapter_config.json").exists():
        folder = find_tokenizer(read_adapter(path, type(shape)).base)
    if not folder:
        raise BadInput(f"{path} brings no tokenizer; name one with --tokenizer")
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        problem = f"has {tokenizer.vocab_size} tokens, more than the model's {shape.vocab_size}"
        raise BadInput(f"tokenizer {tokenizer.name} {problem}")
    return tokenizer


def check_alike(path: str, first: Tokenizer, second: Tokenizer, shape, other):
    """Raise ValueError unless the model at path, of shape `other`, can be used beside one of `shape`:
    it needs the same tokenizer, as many logits, and a window as long."""
    if first.sha256 != second.sha256:
        raise BadInput(f"{path} has another tokenizer than the model: {second.name}")
    if other.vocab_size != shape.vocab_size:
        many = f"{other.vocab_size} logits, not {shape.vocab_size}"
        raise BadInput(f"{path} has {many} as the model")
    if other.max_seq_len < shape.max_seq_len:
        short = f"a window of {other.max_seq_len}, less than the model's {shape.max_seq_len}"
        raise BadInput(f"{path} has {short}")


def run_template(named: str, path: str) -> str:
    """The chat template that is named, or that of the run at path; empty where there is none."""
    template = named or find_template(path)
    return template and spelled(template)


def found_template(named: str, path: str, tokenizer: Tokenizer) -> str:
    """A chat's template: one that is named, that of a run, or that of a model's own folder; empty
    where there is none."""
    return run_template(named, path) or known_template(tokenizer)


def chosen_template(named: str, path: str, tokenizer: Tokenizer) -> str:
    """As `found_template`. Raises ValueError where there is none."""
    template = found_template(named, path, tokenizer)
    if not template:
        known = f"name one of {', '.join(TEMPLATES)} with --template"
        raise BadInput(f"{path} names no template that is known here; {known}")
    return template


def asked_in_chat(config, path: str, tokenizer: Tokenizer, say: bool):
    """eval.py's flags with the template that --chat asks in: its own, and LLaMA-2's where the model
    at path has none; says which, unless another process does."""
    if not config.chat:
        return config
    template = found_template(config.template, path, tokenizer)
    whose = "--template" if config.template else "the model's own"
    if not template:
        template, whose = "llama2-chat", "LLaMA-2's, for the model has none"
    if say:
        print(f"chat template: {template} ({whose})", flush=True)
    return dataclasses.replace(config, template=template)


def export(config, config_class: type, load: Callable, save: Callable):
    """Write the model of sample.py's flags as a Hugging Face folder, and say so.

    load and save are model.py's. In fp32 unless --dtype says otherwise: the same on any machine.
    """
    check_code(config_class, config.model, config.anyway)
    dtype = "fp32" if config.dtype == "auto" else config.dtype
    model = load(config.model, dtype=DTYPES[dtype])
    tokenizer = fitting_tokenizer(config.model, config.tokenizer, model.config)
    save(model, config.export, tokenizer, run_template(config.template, config.model))
    print(f"wrote {config.export}")


def export_adapter(path: str, out: str, named: str, config_class: type):
    """Write what LoRA learned in the run at path as a PEFT folder, and say so.

    The tokenizer that is named, or else the run's, goes with it.
    """
    tokenizer = named or find_tokenizer(path)
    adapter = whole_adapter(path, config_class)
    save_adapter(adapter, out, tokenizer and Tokenizer(tokenizer))
    print(f"wrote {out}")
