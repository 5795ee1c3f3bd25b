"""What a run writes while it trains and when it ends, so that one sees it learn."""

import shlex
import subprocess
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lib.chat_formats import Turn
from lib.cli import ROOT
from lib.errors import BadInput
from lib.runs import find_template
from lib.templates import end_ids, render_prompt
from lib.tokenizer import Tokenizer

NEW_TOKENS, TEMPERATURE = 100, 0.8


@dataclass
class Flags:
    sample: str = "def "
    """a text to continue when training ends; of a run of chats a question, that of the first
    validation conversation unless you give one; "" is none"""
    sample_every: int = 0               # steps after which a sample is written too; 0 is never


class Sampler:
    """Continues --sample with a model in training; one of chats answers it.

    A run of chats with the default of --sample answers its first validation question.
    """

    def __init__(self, config, val, window: int):
        """val is the data.Mixture of validation. Raises ValueError where the prompt does not fit."""
        self.config, self.tokenizer = config, Tokenizer(val.folders[0])
        self.ids, is_chat = [], val.kind != "text"
        template = next((p.meta["template"] for p in val.parts if "template" in p.meta), "")
        self.ends = end_ids(template, self.tokenizer)
        if is_chat and config.sample == type(config).sample:
            self.ids = first_question(val)[: max(1, window - NEW_TOKENS)]
        elif is_chat and config.sample:
            self.ids = render_prompt([Turn("user", config.sample)], template, self.tokenizer)
        elif config.sample:
            self.ids = self.tokenizer.encode_prompt(config.sample)
        if len(self.ids) > window:
            problem = f"more than the context window of {window}"
            raise BadInput(f"--sample has {len(self.ids)} tokens, {problem}")
        self.width = min(len(self.ids) + NEW_TOKENS, window)

    def is_due(self, step: int) -> bool:
        """Whether there is a sample to write after this step."""
        every, ends = self.config.sample_every, step == self.config.steps
        return bool(self.ids) and (ends or every > 0 and step % every == 0)

    @torch.no_grad()
    def write(self, model: nn.Module, device: torch.device, most: int = NEW_TOKENS) -> str:
        """The prompt and a continuation, drawn at the temperature of sample.py, always alike.

        Every token is one more forward pass over all before it, of one shape, on all ranks: slow,
        but it needs nothing of a model that is sharded and compiled for training.
        """
        tokens = torch.zeros(1, self.width, dtype=torch.long, device=device)
        ids, generator = list(self.ids), torch.Generator().manual_seed(self.config.seed)
        while len(ids) < min(self.width, len(self.ids) + most):
            tokens[0, : len(ids)] = torch.tensor(ids)
            logits = model(tokens)[0, len(ids) - 1].float().cpu()
            chances = (logits / TEMPERATURE).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator).to(device)
            dist.broadcast(drawn, 0)
            ids.append(drawn.item())
            if ids[-1] in self.ends:
                break
        return self.tokenizer.decode(ids)


def first_question(val) -> list[int]:
    """The tokens of the first validation conversation up to where its answer begins."""
    data = next(part for part in val.parts if part.masks)
    begin, end = data.bounds[0][:2]
    answer = data.masks[0][begin:end].argmax()
    return data.files[0][begin : begin + answer].tolist()


def show_sample(config):
    """Let sample.py continue --sample with the run's model, unless it is of chats."""
    if find_template(config.out):
        return
    words = ["sample.py", "--model", config.out, f"--prompt={config.sample}"]
    words += ["--max_new_tokens", "200"]
    if config.anyway:
        words.append("--anyway")
    print(f"\npython {shlex.join(words)}\n", flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sample is drawn by a process of its own
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]])
