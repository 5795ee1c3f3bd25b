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
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from guesses import acceptance, expected_tokens, speed, times_of, tokens_a_round
from study import OUT, Report, text, train
from writing import beginnings

from lib.cli import run_command
from lib.runs import read_log
from lib.sampling import Sampling
from lib.speculative import Speculation
from sample import Decoder, load_model

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


def trained(name: str) -> Path:
    names = ("--num_layers", "--dim", "--num_heads", "--ffn_dim", "--learning_rate", "--steps")
    shape = [word for pair in zip(names, SHAPES[name]) for word in pair]
    return train(HERE / name, "--data", text(), *shape)


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
            fast, wrote = speed(model, some, config.new_tokens, sampling, None)
            plain.append(fast)
            texts.append([prompt + ids for prompt, ids in zip(some, wrote)])
        for name, draft in drafts.items():
            a = acceptance(model, draft, sum(texts, []), sampling)
            made, seen, same = Speculation(Decoder, draft, 4, sampling), [], True
            for some, known in zip(prompts, texts):
                fast, wrote = speed(model, some, config.new_tokens, sampling, made)
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
        fast, _ = speed(model, prompts[0], config.new_tokens, sampling, made)
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
