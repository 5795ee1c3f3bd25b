"""Speculative decoding: what does a small model's guessing bring, and which small model brings most?

Paper       Leviathan et al. 2023, arXiv:2211.17192; Yan et al. 2024, arXiv:2402.01528.
Command     python recipes/speculate.py
Hardware    one core, no GPU; 5 minutes (2026-11-27, AMD EPYC), and 15 of its time to train the six models once.
Claim       The text is the model's own. With acceptance a, a round of n guesses gives (1 - a^(n+1)) / (1 - a) tokens;
            tokens a second are those of a round over n t_draft + t_verify(n). A draft's latency decides, so its depth
            and hardly its width, and its quality as a language model does not predict the gain (Yan et al.).
Miniature   A target of 8 layers, 256 wide, 400 steps on the standard library; four drafts with as many parameters in
            their blocks (0.37 to 0.39 M): 8 x 64, 4 x 88, 2 x 128, 1 x 176 (layers x width), as many steps; and 8 x 64
            with three times the steps, as a deep draft of better quality. 8 prompts of 64 tokens for each of three
            seeds, 96 new tokens, greedy and at temperature 1.
Predicted   before the run: greedy text equal on all prompts; tokens a round within 15 % of the formula; throughput
            within 15 % of the model of times; the longer trained deep draft slower than the shallow ones all the same.
Result      Greedy text equal on all 24 prompts with each draft. Tokens a round 0 to 7 % below the formula: confirmed.
            Tokens a second from 7 % above to 20 % below the model of times, in which the loop between rounds is not:
            within 15 % for three of five greedy and four of five sampled arms, refuted for the fastest drafts.
            Greedy: one layer 1.46 times as fast as the target alone, two layers 1.07, four 0.96, eight 0.65; eight
            layers trained longer have the best loss (4.66; one layer 5.14) and reach 0.74: confirmed. Speed goes with
            1 / latency (rank correlation 1.00; sampled 0.60) rather than with loss (-0.40; +0.40). At temperature 1
            it is not so clear: four layers 1.20, two 1.19, one layer 1.08, eight 0.90, trained longer 0.69. The deep
            one trained longer is slower than both shallow ones in either case: confirmed.
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


def verdicts(report: Report, rows: list[list]):
    """The predictions at the head of this file, from the rows of the table."""

    def say(predicted: str, found: str, holds: bool):
        report.say(f"- Predicted: {predicted}. Found: {found}. **{'confirmed' if holds else 'refuted'}**")

    same = [row[-1] for row in rows if row[0] == "greedy"]
    say("greedy text equal on all prompts", f"with {sum(same)} of {len(same)} drafts", all(same))
    for what, measured, predicted in (("tokens a round", 4, 5), ("tokens/s", 8, 9)):
        off = [100 * (row[measured] / row[predicted] - 1) for row in rows]
        near = sum(abs(percent) <= 15 for percent in off)
        found = f"{min(off):+.0f} to {max(off):+.0f} %; within it are {near} of {len(off)}"
        say(f"{what} within 15 % of what is predicted", found, near == len(off))
    for words in ("greedy", "temperature 1"):
        times = {row[1]: row[10] for row in rows if row[0] == words}
        slower = times["8x64_long"] < min(times["2x128"], times["1x176"])
        found = ", ".join(f"{name} {times[name]:.2f}" for name in ("8x64_long", "2x128", "1x176"))
        say(f"{words}: the deep draft, trained longer, is slower than the shallow ones", found, slower)


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
    layers, width = SHAPES["target"][:2]
    report.say(f"Target: {layers} layers, {width} wide. Drafts: layers x width. {config.seeds} x {config.prompts} "
               f"prompts, {config.new_tokens} new tokens, four guesses a round. Its loss is the draft's on validation "
               "text; a is the chance that a guess is accepted, from which the formula (1 - a^5) / (1 - a) is; "
               "tokens/s are the median of the seeds, predicted by tokens a round and the two times before it; "
               "speed-up is against the target alone.")  # fmt: skip
    header = ["", "draft", "its loss", "a", "tokens a round", "formula", "ms a guess", "ms to verify", "tokens/s"]
    report.table([*header, "predicted", "speed-up", "same text"], rows)
    verdicts(report, rows)
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
