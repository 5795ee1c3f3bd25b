"""Continue text with a trained model.

    python sample.py --model out/stdlib --prompt "def fibonacci(n):" --num 4
    python sample.py --model out/stdlib --export FOLDER     # the same model as a Hugging Face folder
    python sample.py --model out/lora --export_adapter FOLDER     # what LoRA learned, as a PEFT folder
    python sample.py --model out/mini/cleaned_0 --chat      # talk to a model that was fine-tuned on chats

`generate` works on token ids, a batch of prompts of any lengths at once; `complete` puts text around it, `Chat` turns.
"""

from lib.cli import run_command  # isort: skip (lib refuses old Pythons, Windows)

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import Tokenizer
from lib.chat_formats import Turn
from lib.peft import save_adapter
from lib.probe import check_code
from lib.runs import is_record, read_run
from lib.templates import TEMPLATES, render_prompt
from lib.tokenizer import find_tokenizer
from lib.weights import read_adapter, read_config
from model import KVCache, ModelConfig, Transformer, load, save

DRAWN = 256  # random numbers that a row has in advance
MOST = {"num": 10_000, "max_new_tokens": 1_000_000}  # samples of a prompt, and their tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The default is greedy: the likeliest token, always."""

    temperature: float = 0.0         # divides the logits; 0 is greedy
    top_k: int = 0                   # only the k likeliest tokens; 0 is all
    top_p: float = 1.0               # only the likeliest tokens that together are so probable (Holtzman et al. 2020)
    min_p: float = 0.0               # only tokens at least this likely, relative to the likeliest
    repetition_penalty: float = 1.0  # logits of tokens already there are divided by it, or multiplied if negative
    seed: int = 0

    def __post_init__(self):
        if not (0 <= self.temperature < math.inf and self.top_k >= 0):
            wrong = f"--temperature {self.temperature} and --top_k {self.top_k}"
            raise ValueError(f"{wrong} must be numbers that are not negative")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(f"--top_p {self.top_p} and --min_p {self.min_p} must lie between 0 and 1, top_p above 0")
        if not 0 < self.repetition_penalty < math.inf:
            penalty = self.repetition_penalty
            raise ValueError(f"--repetition_penalty {penalty} must be a number above 0")


def choose(logits: Tensor, contexts: list[list[int]], sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token (B,) from logits (B, V); uniform (B,), numbers in [0, 1), picks where sampling is random."""
    if sampling.repetition_penalty != 1:
        for row, context in zip(logits, contexts):
            seen = torch.tensor(sorted(set(context)), device=logits.device)
            penalty = sampling.repetition_penalty
            row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if sampling.temperature < 1e-5:  # dividing by less would overflow
        return logits.argmax(-1)
    logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False  # by rank, so that equal logits do not let more than k through
    # top_p counts what top_k leaves, as in transformers
    p = (logits / sampling.temperature).masked_fill(~keep, -math.inf).softmax(-1)
    keep &= p.cumsum(-1) - p < sampling.top_p
    keep &= p >= sampling.min_p * p[:, :1]
    mass = (p * keep).cumsum(-1)
    place = (mass <= uniform[:, None] * mass[:, -1:]).sum(-1)
    place = torch.minimum(place, keep.sum(-1) - 1).clamp(min=0)
    return tokens.gather(-1, place[:, None])[:, 0]


def read(model: Transformer, cache: KVCache, chunks: list[list[int]]) -> Tensor:
    """Append a chunk, of any length, to each row of the cache; fp32 logits (B, V) after the last token of each.

    The cache then counts the padding of shorter chunks too: trim it before the next.
    """
    device = cache.lengths.device
    longest = max(map(len, chunks))
    tokens = torch.tensor([chunk + [0] * (longest - len(chunk)) for chunk in chunks], device=device)
    hidden = model.hidden(tokens, cache)
    last = hidden[torch.arange(len(chunks)), [len(chunk) - 1 for chunk in chunks]]
    return model.unembedding(last).float()


def new_cache(model: Transformer, rows: int, size: int, prefix: KVCache | None = None) -> KVCache:
    """A cache of so many rows and slots: empty, or in every row what prefix holds, a cache of one row."""
    weight = model.norm.weight
    cache = KVCache(model.config, rows, size, weight.device, weight.dtype)
    if prefix is not None:
        for ours, theirs in ((cache.keys, prefix.keys), (cache.values, prefix.values)):
            ours[:, :, :, : prefix.longest] = theirs[:, :, :, : prefix.longest]
        cache.trim([prefix.longest] * rows)
    return cache


def keep_rows(cache: KVCache, rows: list[int]):
    """Forget all but these rows, which move together."""
    cache.keys, cache.values, cache.lengths = cache.keys[:, rows], cache.values[:, rows], cache.lengths[rows]


def check_prompts(model: Transformer, prompts: list[list[int]]):
    window = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) <= window:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit the model's context window of {window}")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: tuple[int, ...] = (),
    stop: Callable[[int, int], bool] | None = None,
    prefix: KVCache | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to max_new_tokens tokens; returns the new tokens alone, without end_ids.

    A row ends at one of end_ids, or when stop(row, token), called with each new token, returns True; ended rows leave
    the batch. What a row draws depends on the seed and its place, not on the other rows. A row that fills the context
    window goes on with the last half of it, read anew, and stderr says so. prefix, a cache of one row, holds the first
    tokens of every prompt where they all begin alike: these are not read again.
    Raises ValueError for a prompt that is empty or longer than the context window, and for logits
    that are not finite.
    """
    check_prompts(model, prompts)
    window, device = model.config.max_seq_len, model.norm.weight.device
    seeds = [(sampling.seed * 1_000_003 + row) % 2**63 for row in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    contexts = [list(prompt) for prompt in prompts]  # what the model sees of each row
    new: list[list[int]] = [[] for _ in prompts]
    running, told = [True] * len(prompts), False
    rows = list(range(len(prompts)))  # those in the cache
    slots = lambda: min(window, max(len(contexts[row]) for row in rows) + max_new_tokens)
    cache = new_cache(model, len(rows), slots(), prefix)
    unread = [context[cache.longest :] for context in contexts]
    for step in range(max_new_tokens):
        logits = read(model, cache, unread)
        if step % DRAWN == 0:
            uniform = torch.stack([torch.rand(DRAWN, generator=generator) for generator in generators]).to(device)
        finite = logits.isfinite().all(-1)
        tokens = choose(logits, [contexts[row] for row in rows], sampling, uniform[rows, step % DRAWN])
        picked = torch.stack((tokens, finite.long())).tolist()  # one wait for both
        for row, token, sound in zip(rows, *picked):
            if not running[row]:
                continue
            if not sound:
                why = "its weights are damaged, or were trained to NaN"
                raise ValueError(f"the model's logits are not finite; {why}")
            if token in end_ids:
                running[row] = False
                continue
            new[row].append(token)
            contexts[row].append(token)
            if stop and stop(row, token):
                running[row] = False
                del contexts[row][window:]  # it may be read on with the others, and must not overflow
        if not any(running):
            break
        places = [place for place, row in enumerate(rows) if running[row]]
        full = [row for row in rows if running[row] and len(contexts[row]) > window]
        if full:
            if not told:
                notice = f"the context window of {window} tokens is full; reading on with the last {window // 2}"
                print(f"\n[{notice}, whenever that happens]", file=sys.stderr)
                told = True
            for row in full:
                contexts[row] = contexts[row][-(window // 2) :]
            rows = [rows[place] for place in places]
            cache = new_cache(model, len(rows), slots())
            unread = [contexts[row] for row in rows]
            continue
        if len(places) <= 3 * len(rows) / 4:  # fewer at a time would cost more in moving than it saves
            keep_rows(cache, places)
            rows = [rows[place] for place in places]
        # this drops padding; an ended row that is still there reads its last token again, in the same place
        cache.trim([len(contexts[row]) - 1 for row in rows])
        unread = [contexts[row][-1:] for row in rows]
    return new


class TextStream:
    """Turns one row's tokens into text as they come: no split characters, no lost blanks, nothing past a stop string.

    What has been returned, joined, equals the decoded whole, cut at the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = prompt[-8:]  # decoding needs a few tokens before the new ones, or a first blank is lost
        self.held = ""
        self.settled = len(self.ids)
        self.finished = False

    def add(self, token: int) -> str:
        """The text that is certain after this token; sets finished when a stop string has come."""
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[: self.settled])
        after = self.tokenizer.decode(self.ids)
        if after.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        text = after[len(before) :]
        self.ids = self.ids[max(0, self.settled - 8) :]
        self.settled = len(self.ids)
        return self._pass_on(text)

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.finished:
            return ""
        rest = self.tokenizer.decode(self.ids)[len(self.tokenizer.decode(self.ids[: self.settled])) :]
        text = self._pass_on(rest) + ("" if self.finished else self.held)
        self.held = ""
        return text

    def _pass_on(self, text: str) -> str:
        text = self.held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.finished, self.held = True, ""
            return text[: min(found)]
        beginnings = [n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])]
        keep = len(text) - max(beginnings, default=0)
        self.held = text[keep:]
        return text[:keep]


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: tuple[str, ...] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> list[str]:
    """The texts that follow the prompts, up to EOS, BOS or a stop string; on_text(row, text) gets them as they come."""
    rows = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    streams = [TextStream(tokenizer, ids, stop) for ids in rows]
    texts = [""] * len(rows)

    def hand_out(row: int, text: str):
        texts[row] += text
        on_text(row, text)

    def add(row: int, token: int) -> bool:
        hand_out(row, streams[row].add(token))
        return streams[row].finished

    # a model trained on documents that only begin with BOS ends one by beginning the next
    generate(model, rows, max_new_tokens, sampling, (tokenizer.eos_id, tokenizer.bos_id), add)
    for row, stream in enumerate(streams):
        hand_out(row, stream.end())
    return texts


class Chat:
    """A conversation with a model: what was said, as turns, and the keys and values of what it has read.

    Its prompt is rendered anew from the turns for every answer, as training rendered them; only what differs from the
    last one is read. system is an instruction that stays.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: str, system: str = ""):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system = [Turn("system", system)] * bool(system)
        self.cache, self.ids = new_cache(model, 1, model.config.max_seq_len), []
        self.forget()

    def forget(self):
        self.turns: list[Turn] = []

    def prompt(self, text: str, room: int) -> list[int]:
        """Add a user's turn; the ids up to where the answer begins. The oldest exchanges are forgotten until the answer
        has room for so many tokens. Raises ValueError, having changed nothing, for a text that alone is too long."""
        most = self.model.config.max_seq_len - room
        turns = [*self.turns, Turn("user", text)]
        while len(ids := render_prompt([*self.system, *turns], self.template, self.tokenizer)) > most:
            if len(turns) < 3:
                raise ValueError(f"{len(ids)} tokens are too long: with room for {room} of the answer, {most} fit")
            del turns[:2]
        self.turns = turns
        return ids

    def answer(self, text: str, max_new_tokens: int, sampling: Sampling, on_text: Callable[[str], None]) -> str:
        """The model's answer, up to EOS, which is then part of the history; on_text gets it as it comes.

        At least half of the context window is for what was said, the rest, if so much is asked for, for the answer.
        """
        ids = self.prompt(text, min(max_new_tokens, self.model.config.max_seq_len // 2))
        same = next((i for i, (old, new) in enumerate(zip(self.ids, ids)) if old != new), min(len(self.ids), len(ids)))
        same = min(same, len(ids) - 1)  # generate reads at least one
        self.cache.trim([same])
        if new := ids[same:-1]:
            with torch.no_grad():
                read(self.model, self.cache, [new])
        self.ids = ids[:-1]
        stream, parts = TextStream(self.tokenizer, ids), []

        def hand_out(text: str):
            text = text if parts else text.lstrip()
            if text:
                parts.append(text)
                on_text(text)

        def add(_, token: int) -> bool:
            hand_out(stream.add(token))
            return False

        most = min(max_new_tokens, self.model.config.max_seq_len - len(ids))
        ends = (self.tokenizer.eos_id, self.tokenizer.bos_id)
        try:
            generate(self.model, [ids], most, sampling, ends, add, self.cache)
        except ValueError:
            self.turns.pop()  # a question without an answer is no exchange
            raise
        hand_out(stream.end())
        if said := "".join(parts).strip():
            self.turns.append(Turn("assistant", said))
        else:
            self.turns.pop()  # a question without an answer is no exchange
        return said


def find_template(path: str) -> str:
    """The template that a run or its checkpoint was trained with; empty where its record names none."""
    here, above = Path(path), Path(path).parent
    folder = here if (here / "run.json").is_file() else above
    sources = read_run(folder)["dataset"] if folder == here or is_record(above / "run.json") else []
    return next((source["template"] for source in sources if source.get("template")), "")


def talk(chat: Chat, max_new_tokens: int, sampling: Sampling):
    """A chat on the terminal, or with lines from a pipe, until its end or Ctrl-C; /reset forgets what was said."""
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/reset forgets what was said, Ctrl-D ends", file=sys.stderr)
    try:
        while True:
            text = input("> " if sys.stdin.isatty() else "").strip()
            if text == "/reset":
                chat.forget()
            elif text:
                try:
                    chat.answer(text, max_new_tokens, sampling, lambda text: print(text, end="", flush=True))
                    print()
                except ValueError as error:
                    print(error, file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print()


def load_model(
    path: str, tokenizer: str = "", dtype: str = "auto", anyway: bool = False
) -> tuple[Transformer, Tokenizer]:
    """The model at path, on the GPU where there is one, and its tokenizer, from its folder unless named.

    dtype is fp32, bf16 or auto: bf16 on a GPU, else fp32. Raises ValueError when either is missing or they do not fit.
    A run of code that computes something else is taken only with anyway, see `check_code`.
    """
    check_code(Transformer, ModelConfig, path, anyway)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = dtype == "bf16" or dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported(False)
    model = load(path, device, torch.bfloat16 if bf16 else torch.float32).eval()
    found = tokenizer or find_tokenizer(path)
    if not found and (Path(path) / "adapter_config.json").exists():
        found = find_tokenizer(read_adapter(path, ModelConfig).base)
    if not found:
        raise ValueError(f"{path} brings no tokenizer; name one with --tokenizer")
    words, most = Tokenizer(found), model.config.vocab_size
    if words.vocab_size > most:
        raise ValueError(f"tokenizer {words.name} has {words.vocab_size} tokens, more than the model's {most}")
    return model, words


@dataclass
class Config:
    """Continue text with a trained model."""

    model: str                          # a run or checkpoint folder, a Hugging Face or Meta folder, or a llama2.c .bin
    prompt: tuple[str, ...] = ("",)     # one text to continue, or several; blanks at the end are left off
    tokenizer: str = ""                 # where the model's folder holds none
    num: int = 1                        # samples of each prompt
    max_new_tokens: int = 200           # a sample may end earlier, at EOS
    temperature: float = 0.8            # 0 is greedy
    top_k: int = 0                      # 0 is all
    top_p: float = 0.95                 # only the likeliest tokens that together are so probable; 1 is all
    min_p: float = 0.0                  # only tokens at least this likely, relative to the likeliest
    repetition_penalty: float = 1.0     # above 1 makes tokens that are there already less likely
    stop: tuple[str, ...] = ()          # texts at which a sample ends
    seed: int = 0                       # the same seed gives the same samples
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    chat: bool = False                  # talk on the terminal, with lines from it or from a pipe
    template: str = ""                  # of a chat; where the model's run does not name it
    system: str = ""                    # an instruction before a chat
    anyway: bool = False                # also take a run of code that computes something else
    export: str = ""                    # instead write the model there as a Hugging Face folder, auto being fp32
    export_adapter: str = ""            # instead write the adapter of a LoRA run there, as PEFT does


def main(config: Config):
    sampling = Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
    for name, most in MOST.items():
        if not 1 <= (number := getattr(config, name)) <= most:
            bound = "at least 1" if number < 1 else f"at most {most:,}"
            raise ValueError(f"--{name} {number} must be {bound}")
    if not config.prompt or "" in config.stop:
        raise ValueError('--prompt needs a text ("" is one), and --stop texts that are not empty')
    if config.export_adapter:
        check_code(Transformer, ModelConfig, config.model, config.anyway)
        tokenizer = config.tokenizer or find_tokenizer(config.model)
        adapter = read_adapter(config.model, ModelConfig)
        if read_config(config.model, ModelConfig) != read_config(adapter.base, ModelConfig):
            raise ValueError(f"{config.model} differs from its base in more than an adapter can say; use --export")
        save_adapter(adapter, config.export_adapter, tokenizer and Tokenizer(tokenizer))
        print(f"wrote {config.export_adapter}")
        return
    dtype = "fp32" if config.export and config.dtype == "auto" else config.dtype  # the same folder on any machine
    model, tokenizer = load_model(config.model, config.tokenizer, dtype, config.anyway)
    if config.export:
        save(model, config.export, tokenizer)
        print(f"wrote {config.export}")
        return
    if config.chat:
        template = config.template or find_template(config.model)
        if template not in TEMPLATES:
            unknown = f"--template {template} is unknown" if template else f"{config.model} names no template"
            raise ValueError(f"{unknown}; name one of {', '.join(TEMPLATES)} with --template")
        talk(Chat(model, tokenizer, template, config.system), config.max_new_tokens, sampling)
        return
    prompts = [prompt for prompt in config.prompt for _ in range(config.num)]
    rows = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    check_prompts(model, rows)
    shown = [tokenizer.decode(row) for row in rows]
    show = lambda row, text: print(text, end="", flush=True)
    if len(prompts) == 1:
        show(0, shown[0])
        complete(model, tokenizer, prompts, config.max_new_tokens, sampling, config.stop, show)
        print()
        return
    texts = complete(model, tokenizer, prompts, config.max_new_tokens, sampling, config.stop)
    for number, text in enumerate(texts):
        print(f"--- {number + 1}\n{shown[number]}{text}")


if __name__ == "__main__":
    run_command(main, Config)
