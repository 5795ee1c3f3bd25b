"""The flags of sample.py beside the first ones and those of sampling."""

from dataclasses import dataclass
from typing import Literal

from lib.errors import BadInput
from lib.sampling import MOST


@dataclass(frozen=True, kw_only=True)
class Flags:
    tokenizer: str = ""              # where the model's folder holds none
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    anyway: bool = False             # also take a run whose model.py computed something else
    trust_variant: bool = False      # run the code that a variant's folder brings; read it first
    # chats
    chat: bool = False               # talk on the terminal, with lines from it or from a pipe
    template: str = ""               # a name or a file; where the model does not say it
    system: str = ""                 # an instruction before a chat
    serve: int = 0                   # a page to talk on and OpenAI's chat route, at this port
    # a file of prompts
    prompts: str = ""
    """.jsonl, .json, .csv or .parquet with a field prompt, question, instruction or messages; a
    model of chats answers, any other goes on"""
    out: str = ""
    """where the answers go, a line each in .jsonl; typed again, it goes on where it was"""
    # instead
    export: str = ""
    """write the model there as a Hugging Face folder, auto being fp32"""
    export_adapter: str = ""         # write the adapter of a LoRA run there, as PEFT does


def check_flags(config):
    """Raise ValueError for flags of sample.py that are out of range."""
    for name, most in MOST.items():
        number = getattr(config, name)
        if not 1 <= number <= most:
            bound = "at least 1" if number < 1 else f"at most {most:,}"
            raise BadInput(f"--{name} {number} must be {bound}")
    config.check()
    if not config.prompt or "" in config.stop:
        raise BadInput('--prompt needs a text ("" is one), and --stop texts that are not empty')
    if bool(config.prompts) != bool(config.out) or config.out and not config.out.endswith(".jsonl"):
        names = f'--prompts "{config.prompts}" and --out "{config.out}"'
        raise BadInput(f"{names} go together: a file to read, and one to write that ends in .jsonl")
    if not 0 <= config.serve < 65_536:
        raise BadInput(f"--serve {config.serve} is no port: 1 to 65535, such as 8000")
    if config.prompts and config.num > 1:
        raise BadInput(f"--num {config.num} does not go with --prompts: each has one answer")
