"""The flags of sample.py beside the first ones and those of sampling."""

from dataclasses import dataclass
from typing import Literal

from lib.contrast import check_contrast
from lib.decoding import Quantize
from lib.errors import BadInput
from lib.sampling import MOST


@dataclass(frozen=True, kw_only=True)
class Flags:
    tokenizer: str = ""              # where the model's folder holds none
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32"""
    quantize: Quantize = "none"
    """int8: matrices as whole numbers, on a CPU; faster, and a little less exact"""
    anyway: bool = False             # also take a run whose model.py computed something else
    trust_variant: bool = False      # run the code that a variant's folder brings; read it first
    # a second model with the same tokenizer
    draft: str = ""
    """a small model that guesses, which is faster and, but for rounding, changes nothing at
    temperature 0; above 0 the text differs from that without it, its probabilities do not"""
    draft_tokens: int = 4            # guesses that the model reads at a time
    amateur: str = ""                # a weak model: prefer what the model likes more than it does
    alpha: float = 0.1               # only tokens this likely, relative to the likeliest
    beta: float = 0.5                # how much to differ from the amateur; 0 is not at all
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
    check_second(config)
    if config.export and config.quantize != "none":
        raise BadInput(f"--quantize {config.quantize} does not go with --export")
    if not 0 <= config.serve < 65_536:
        raise BadInput(f"--serve {config.serve} is no port: 1 to 65535, such as 8000")
    if config.prompts and config.num > 1:
        raise BadInput(f"--num {config.num} does not go with --prompts: each has one answer")


def check_second(config):
    """Raise ValueError where --draft or --amateur cannot be used."""
    check_contrast(config.alpha, config.beta)
    if not 1 <= config.draft_tokens <= 64:
        raise BadInput(f"--draft_tokens {config.draft_tokens} must lie between 1 and 64")
    named = [name for name in ("draft", "amateur") if getattr(config, name)]
    if not named:
        return
    flag = f"--{named[0]} {getattr(config, named[0])}"
    if len(named) > 1:
        raise BadInput(f"{flag} does not go with --amateur {config.amateur}")
    modes = ("chat", "serve", "prompts", "export", "export_adapter")
    for mode in modes:
        if getattr(config, mode):
            raise BadInput(f"{flag} is for --prompt, not for --{mode}")
    if config.draft and (config.num > 1 or len(config.prompt) > 1):
        raise BadInput(f"{flag} guesses for one text at a time: one --prompt and --num 1")
