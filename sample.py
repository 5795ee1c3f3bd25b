"""Continue text with a trained model.

    python sample.py --model out/stdlib --prompt "def fibonacci(n):" --num 4
    python sample.py --model out/stdlib --export FOLDER          # as a Hugging Face folder
    python sample.py --model out/lora --export_adapter FOLDER    # what LoRA learned, as PEFT's
    python sample.py --model out/mini/cleaned_0 --chat           # talk to a model of chats

`Decoder` reads tokens and gives logits, lib/sampling.py draws the next token from them, `generate`
is the loop of the two. `complete` is about text, `Chat` about turns. Plug in another Decoder.
"""

from lib.cli import BadInput, run_command  # isort: skip (first: refuses old Pythons, Windows)

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data import Tokenizer
from lib import sample_flags
from lib.chat_formats import Turn
from lib.contrast import Contrast
from lib.conversation import Conversation
from lib.decoding import Quantize, prepare, threads_for
from lib.growing import Rows
from lib.probe import check_code
from lib.prompt_files import answer_file
from lib.sample_flags import check_flags
from lib.sampling import Sampling, UniformNumbers, next_tokens
from lib.server import serve
from lib.speculative import Speculation
from lib.stream import TextStreams, show, talk
from lib.templates import end_ids, render_prompt
from lib.tensors import DTYPES
from lib.with_model import (
    check_alike,
    chosen_template,
    export,
    export_adapter,
    fitting_tokenizer,
)
from model import KVCache, ModelConfig, Transformer, load, save


class Decoder:
    """A model and what each row has read so far: gives the logits of the next token."""

    draw = staticmethod(next_tokens)  # from logits; lib/speculative.py has another way

    def __init__(self, model: Transformer, rows: int, size: int, prefix: "Decoder | None" = None):
        """Room for so many rows and tokens; each row begins with what prefix, of one row, read."""
        weight = model.norm.weight
        self.model, self.size = model, sum(p.numel() for p in model.parameters())
        self.cache = KVCache(model.config, rows, size, weight.device, weight.dtype)
        if prefix is not None:
            length = prefix.cache.longest
            self.cache.keys[:, :, :, :length] = prefix.cache.keys[:, :, :, :length]
            self.cache.values[:, :, :, :length] = prefix.cache.values[:, :, :, :length]
            self.cache.trim([length] * rows)

    @torch.no_grad()
    def states(self, chunks: list[list[int]]) -> Tensor:
        """Append a chunk, of any length, to each row; the residual stream (B, T, D) at its tokens.

        Shorter chunks are padded, and the padding counts as read: trim it before the next.
        """
        longest = max(map(len, chunks))
        padded = [chunk + [0] * (longest - len(chunk)) for chunk in chunks]
        tokens = torch.tensor(padded, device=self.cache.lengths.device)
        return self.model.hidden(tokens, self.cache)

    @torch.no_grad()
    def read(self, chunks: list[list[int]]) -> Tensor:
        """As `states`, but the fp32 logits (B, V) after the last token of each chunk.

        They must be finite: to rule a token out, give it a very low one.
        """
        places = [len(chunk) - 1 for chunk in chunks]
        with threads_for(self.size * sum(map(len, chunks))):
            last = self.states(chunks)[torch.arange(len(chunks)), places]
            return self.model.unembedding(last).float()

    def trim(self, lengths: list[int]):
        """Forget all but the first lengths[b] tokens of each row b."""
        self.cache.trim(lengths)

    def keep(self, rows: list[int]):
        """Forget all but these rows, and close the gaps between them."""
        cache = self.cache
        cache.keys = cache.keys[:, rows]
        cache.values = cache.values[:, rows]
        cache.lengths = cache.lengths[rows]


def check_prompts(model: Transformer, prompts: list[list[int]]):
    window = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) <= window:
            problem = f"does not fit the model's context window of {window}"
            raise BadInput(f"a prompt of {len(prompt)} tokens {problem}")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: tuple[int, ...] = (),
    stop: Callable[[int, int], bool] | None = None,
    prefix: Decoder | None = None,
    decoder: Callable[..., Decoder] = Decoder,
) -> list[list[int]]:
    """Continue each prompt by up to max_new_tokens tokens; returns the new ones, without end_ids.

    A row ends at one of end_ids, or when stop(row, token), called with each new token, returns
    True. What it draws depends on the seed and its place, not on the other rows. One that fills the
    context window goes on with the last half of it. prefix has read the first tokens of all. Raises
    ValueError for a prompt that is empty or too long, and for logits that are not finite.
    """
    sampling.check()
    check_prompts(model, prompts)
    batch = Rows(prompts, model.config.max_seq_len, end_ids, stop)
    contexts = batch.contexts
    rows = list(range(len(prompts)))  # those in the decoder
    uniform = UniformNumbers(sampling.seed, len(prompts), model.norm.weight.device)
    room = batch.room(rows, max_new_tokens)
    reader = decoder(model, len(rows), room, prefix)
    known = prefix.cache.longest if prefix else 0
    unread = [context[known:] for context in contexts]
    for step in range(max_new_tokens):
        logits = reader.read(unread)
        seen = [contexts[row] for row in rows]
        tokens = reader.draw(logits, seen, sampling, uniform.at(step, rows))
        left = batch.extend(rows, tokens)
        if not left:
            break
        if batch.shorten(left):  # all that still run are read anew
            rows, unread = left, [contexts[row] for row in left]
            reader = decoder(model, len(rows), batch.room(rows, max_new_tokens))
            continue
        if len(left) <= 3 * len(rows) / 4:  # moving fewer costs more than it saves
            reader.keep([place for place, row in enumerate(rows) if row in batch.running])
            rows = left
        # drop padding; an ended row that is still there reads its last token again, to no effect
        reader.trim([len(contexts[row]) - 1 for row in rows])
        unread = [contexts[row][-1:] for row in rows]
    return batch.new


# ---- text ----


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: tuple[str, ...] = (),
    on_text: Callable[[int, str], None] | None = None,
    end_ids: tuple[int, ...] = (),
    decoder: Callable[..., Decoder] = Decoder,
) -> list[str]:
    """The texts that follow prompts of ids, up to EOS, BOS, one of end_ids or a stop string;
    on_text(row, text) gets them as they come."""
    texts = TextStreams(tokenizer, prompts, stop, on_text)
    # a model trained on documents that only begin with BOS ends one by beginning the next
    end_ids = (tokenizer.eos_id, tokenizer.bos_id, *end_ids)
    generate(model, prompts, max_new_tokens, sampling, end_ids, texts.add, None, decoder)
    return texts.end()


class Chat(Conversation):
    """A conversation with a model, which reads only what differs from the last prompt."""

    turn = Turn

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: str, system: str = ""):
        self.model = model
        self.template = template
        self.decoder = Decoder(model, 1, model.config.max_seq_len)
        self.ids: list[int] = []  # what it has read
        super().__init__(tokenizer, model.config.max_seq_len, system)

    def render(self, turns: list[Turn]) -> list[int]:
        return render_prompt(turns, self.template, self.tokenizer)

    def read(self, ids: list[int]):
        """Let the decoder have read ids but for the last one, which `generate` reads."""
        ids = ids[:-1]
        same = len(os.path.commonprefix([self.ids, ids]))
        self.decoder.trim([same])
        if ids[same:]:
            self.decoder.read([ids[same:]])
        self.ids = ids

    def write(self, ids: list[int], max_new_tokens: int, sampling: Sampling, add: Callable):
        self.read(ids)
        ends = end_ids(self.template, self.tokenizer)
        generate(self.model, [ids], max_new_tokens, sampling, ends, add, self.decoder)


def load_model(
    path: str,
    tokenizer: str = "",
    dtype: str = "auto",
    anyway: bool = False,
    quantize: Quantize = "none",
) -> tuple[Transformer, Tokenizer]:
    """The model at path, on the GPU where there is one, and its tokenizer.

    The tokenizer is that of the model's folder unless named. dtype is fp32, bf16, fp16 or auto:
    bf16 on a GPU that has it, else fp32. Raises ValueError when either is missing or they do not
    fit, and without anyway for a run of code that computes something else.
    """
    check_code(ModelConfig, path, anyway)
    device, usual = "cpu", "fp32"
    if torch.cuda.is_available():
        device = "cuda"
        usual = "bf16" if torch.cuda.is_bf16_supported(False) else "fp32"
    model = load(path, device, DTYPES[usual if dtype == "auto" else dtype]).eval()
    return prepare(model, quantize), fitting_tokenizer(path, tokenizer, model.config)


def load_beside(path: str, config, model: Transformer, tokenizer: Tokenizer) -> Transformer:
    """A second model, to be used beside the first. Raises ValueError where they do not fit."""
    settings = (config.tokenizer, config.dtype, config.anyway, config.quantize)
    other, its_tokenizer = load_model(path, *settings)
    check_alike(path, tokenizer, its_tokenizer, model.config, other.config)
    return other


def chosen_decoder(config, model: Transformer, tokenizer: Tokenizer) -> Callable[..., Decoder]:
    """Decoder, or one with a second model: a draft that guesses, or an amateur to differ from."""
    if config.draft:
        draft = load_beside(config.draft, config, model, tokenizer)
        return Speculation(Decoder, draft, config.draft_tokens, config)
    if config.amateur:
        amateur = load_beside(config.amateur, config, model, tokenizer)
        return Contrast(Decoder, amateur, config.alpha, config.beta)
    return Decoder


@dataclass(frozen=True, kw_only=True)
class Core:
    """The flags to read first; lib/sample_flags.py has those of chats, files and exports."""

    model: str
    """a run or checkpoint folder, a Hugging Face or Meta folder, or a llama2.c .bin"""
    prompt: tuple[str, ...] = ("",)
    """one text to continue, or several; blanks at the end are left off"""
    num: int = 1                     # samples of each prompt
    max_new_tokens: int = 200        # a sample may end earlier, at EOS
    stop: tuple[str, ...] = ()       # texts at which a sample ends


@dataclass(frozen=True, kw_only=True)
class Config(Sampling, sample_flags.Flags, Core):
    """Continue text with a trained model."""

    temperature: float = 0.8  # 0 is greedy
    top_p: float = 0.95  # only the likeliest tokens whose probabilities sum to this; 1 is all


def print_samples(config: Config, model: Transformer, tokenizer: Tokenizer):
    rows, shown = [], []
    for prompt in config.prompt:
        row = tokenizer.encode_prompt(prompt)
        rows += [row] * config.num
        shown += [tokenizer.decode(row)] * config.num
    check_prompts(model, rows)
    decoder = chosen_decoder(config, model, tokenizer)
    write = partial(complete, model, tokenizer, rows, config.max_new_tokens, config, config.stop)
    if len(rows) == 1:  # as it comes
        show(shown[0])
        write(on_text=lambda row, text: show(text), decoder=decoder)
        print()
        if config.draft:
            print(f"[{decoder.described()}]", file=sys.stderr)
        return
    texts = write(decoder=decoder)
    for number, text in enumerate(texts):
        print(f"--- {number + 1}")
        print(shown[number] + text)


def main(config: Config):
    check_flags(config)
    if config.export_adapter:
        check_code(ModelConfig, config.model, config.anyway)
        export_adapter(config.model, config.export_adapter, config.tokenizer, ModelConfig)
        return
    if config.export:
        export(config, ModelConfig, load, save)
        return
    settings = (config.tokenizer, config.dtype, config.anyway, config.quantize)
    model, tokenizer = load_model(config.model, *settings)
    if config.prompts:
        answer_file(config, model, tokenizer, complete)
    elif config.chat or config.serve:
        template = chosen_template(config.template, config.model, tokenizer)
        chat = Chat(model, tokenizer, template, config.system)
        begin = serve if config.serve else talk
        begin(chat, config)
    else:
        print_samples(config, model, tokenizer)


if __name__ == "__main__":
    run_command(main, Config)
