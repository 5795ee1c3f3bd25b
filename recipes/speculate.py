"""Speculative decoding: what does a small model's guessing bring, and which small model brings most?

Paper       Leviathan et al. 2023, arXiv:2211.17192; Yan et al. 2024, arXiv:2402.01528.
Command     python recipes/speculate.py
Hardware    two cores, no GPU; MINUTES_HERE
Claim       The text is the model's own. With acceptance a, a round of n guesses gives (1 - a^(n+1)) / (1 - a) tokens;
            tokens a second are those of a round over n t_draft + t_verify(n). A draft's latency decides, so its depth
            and hardly its width, and its quality as a language model does not predict the gain (Yan et al.).
Miniature   A target of 8 layers, 256 wide, 400 steps on the standard library; four drafts with as many parameters in
            their blocks (0.37 to 0.39 M): 8 x 64, 4 x 88, 2 x 128, 1 x 176 (layers x width), as many steps; and 8 x 64
            with three times the steps, as a deep draft of better quality. 8 prompts of 64 tokens for each of three
            seeds, 96 new tokens, greedy and at temperature 1.
Predicted   before the run: greedy text equal on all prompts; tokens a round within 15 % of the formula; throughput
            within 15 % of the model of times; the longer trained deep draft slower than the shallow ones all the same.
Result      RESULT_HERE
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from study import OUT, Report, text, train
from writing import beginnings

from lib.cli import run_command
from lib.runs import read_log
from lib.sampling import Sampling, distribution
from lib.speculative import Speculation
from sample import Decoder, generate, load_model

HERE = OUT / "speculate"
SHAPES = {  # layers, width, heads, feed-forward width, learning rate, steps
    "target": (8, 256, 8, 688, 1e-3, 400),
    "8x64": (8, 64, 4, 176, 2e-3, 400),
    "8x64_long": (8, 64, 4, 176, 2e-3, 1200),
    "4x88": (4, 88, 4, 240, 2e-3, 400),
    "2x128": (2, 128, 4, 352, 2e-3, 400),
    "1x176": (1, 176, 4, 480, 2e-3, 400),
}


@dataclass
class Config:
    """Speculative decoding in miniature, with a report."""

    seeds: int = 3
    prompts: int = 8   # a seed
    new_tokens: int = 96
    rounds: int = 5    # of each timing, in turns


def trained(name: str) -> Path:
    names = ("--num_layers", "--dim", "--num_heads", "--ffn_dim", "--learning_rate", "--steps")
    shape = [word for pair in zip(names, SHAPES[name]) for word in pair]
    return train(HERE / name, "--data", text(), *shape)


def expected_tokens(a: float, n: int) -> float:
    """Tokens of a round of n guesses, each accepted with probability a (Leviathan et al.).

    >>> [round(expected_tokens(0.8, n), 2) for n in (1, 2, 4, 8)]
    [1.8, 2.44, 3.36, 4.33]
    """
    return (1 - a ** (n + 1)) / (1 - a) if a < 1 else n + 1.0


@torch.no_grad()
def acceptance(model, draft, texts: list[list[int]], sampling: Sampling) -> float:
    """The mean over positions of the sum of min(p, q), the chance that a guess is accepted."""
    shares = []
    for ids in texts:
        both = (each(torch.tensor([ids]))[0, 63:] for each in (model, draft))  # behind the prompt
        p, q = (distribution(logits, [[]] * len(logits), sampling) for logits in both)
        shares.append(torch.minimum(p, q).sum(-1))
    return float(torch.cat(shares).mean())


def timed(work, count: int = 12) -> float:
    """Milliseconds of a call, the median of so many."""
    work()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def times_of(made: Speculation, model, ids: list[int]) -> tuple[float, float]:
    """Milliseconds of a draft's step and of a verification with its draws, after ids."""
    decoder = made(model, 1, 256)
    decoder.read([ids])
    n, last = made.draft_tokens, ids[-1:]

    def guess():
        decoder.draft.trim([len(ids) - 1])
        decoder.guess(ids)

    def verify():
        decoder.target.trim([len(ids) - 1])
        logits = model.unembedding(decoder.target.states([last + decoder.guesses])[0]).float()
        for place in range(1 + round(tokens_a_round(made) - 1)):  # those that are looked at
            decoder.draw(logits[place : place + 1].clone(), [ids], made.sampling, torch.tensor([0.5]))

    return timed(guess) / n, timed(verify)


def tokens_a_round(made: Speculation) -> float:
    return (made.accepted + made.rounds) / max(1, made.rounds)


def speed(model, prompts, config: Config, sampling: Sampling, made: Speculation | None) -> tuple[float, list]:
    """Tokens a second, and the texts."""
    began, texts = time.perf_counter(), []
    for prompt in prompts:
        texts += generate(model, [prompt], config.new_tokens, sampling, decoder=made or Decoder)
    return sum(map(len, texts)) / (time.perf_counter() - began), texts


@torch.no_grad()
def main(config: Config):
    report = Report("speculate", "Speculative decoding")
    model, tokenizer = load_model(str(trained("target")))
    drafts = {name: load_model(str(trained(name)))[0] for name in SHAPES if name != "target"}
    loss = {name: read_log(HERE / name / "log.jsonl")[-1]["val_loss"] for name in drafts}
    documents = read_split(text())
    prompts = [beginnings(documents, tokenizer, config.prompts, 64, seed) for seed in range(config.seeds)]
    rows, measured = [], {}
    for words, sampling in (("greedy", Sampling()), ("temperature 1", Sampling(1.0))):
        plain, texts = [], []
        for some in prompts:
            fast, wrote = speed(model, some, config, sampling, None)
            plain.append(fast)
            texts.append([prompt + ids for prompt, ids in zip(some, wrote)])
        for name, draft in drafts.items():
            a = acceptance(model, draft, sum(texts, []), sampling)
            made, seen, same = Speculation(Decoder, draft, 4, sampling), [], True
            for some, known in zip(prompts, texts):
                fast, wrote = speed(model, some, config, sampling, made)
                seen.append(fast)
                same &= [prompt + ids for prompt, ids in zip(some, wrote)] == known
            step, verify = times_of(made, model, prompts[0][0])
            predicted = 1000 * tokens_a_round(made) / (4 * step + verify)
            got, alone = statistics.median(seen), statistics.median(plain)
            measured[name, words] = (got, 1 / step)
            found = [tokens_a_round(made), expected_tokens(a, 4), step, verify, got, predicted, got / alone]
            rows.append([words, name, loss[name], a, *found, same if words == "greedy" else ""])
    header = ["", "draft", "its loss", "a", "tokens a round", "formula", "ms a guess", "ms to verify", "tokens/s"]
    report.say(f"Four guesses a round; {config.seeds} x {config.prompts} prompts, medians of the seeds.")
    report.table([*header, "predicted", "times plain", "same text"], rows)
    draft, sampling, grown = drafts["2x128"], Sampling(1.0), []
    a = acceptance(model, draft, sum(texts, []), sampling)
    for n in range(1, 9):
        made = Speculation(Decoder, draft, n, sampling)
        fast, _ = speed(model, prompts[0], config, sampling, made)
        grown.append([n, tokens_a_round(made), expected_tokens(a, n), fast])
    report.say(f"By the number of guesses, draft 2x128 at temperature 1, acceptance {a:.3f}:")
    report.table(["guesses", "tokens a round", "formula", "tokens/s"], grown)
    for words in ("greedy", "temperature 1"):
        speeds, latencies = zip(*(measured[name, words] for name in drafts))
        by_loss, by_latency = (spearmanr(speeds, other).statistic for other in (list(loss.values()), latencies))
        report.say(f"- {words}: rank correlation of tokens/s with the draft's loss {by_loss:+.2f} (good drafts fast "
                   f"would be -1), with 1 / its latency {by_latency:+.2f}, of {len(drafts)} drafts")  # fmt: skip
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
