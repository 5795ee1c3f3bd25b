"""Position interpolation: does squeezing positions let a model read further than it was trained to?

Paper       Chen et al. 2023, arXiv:2306.15595.
Command     python recipes/interpolation.py
Hardware    one core, no GPU; 26 minutes of the clock (2026-11-27, AMD EPYC), beside other work, without the bases.
Claim       LLaMA-7B, window 2,048, on PG19 at 8,192: perplexity above 1,000 as it is, 16.10 with positions divided by
            4, 6.95 after 1,000 steps of tuning so (7.13 at 2,048, where the original has 7.20), 7.69 after ten times as
            many without dividing; keys found 8,192 tokens back after 200 steps, 2,560 without dividing.
Miniature   The laptop's model, window 256, which first learns to find a key (a word, as five digits are too hard for
            it) in texts of at most 256 tokens. Then 100 steps at 1,024, positions divided by 4 or not, on library code
            and the same short texts; beside them 100 steps at 256. 17 documents, 8 blocks of 32 tokens each, always
            the same, read with windows of 64 to 1,024; 320 new keys at 32 distances. Three seeds.
Predicted   before the run: as it is, worse at 1,024 than at 256; divided without tuning better than that, but worse
            than the original at 256; tuned within 2 % of a model tuned at 256, there, and better at 1,024 than at 256;
            direct tuning worse than divided at 1,024, and finds fewer keys beyond 256 tokens. (Of the first three
            seed 0's losses were known from a trial.)
Result      bits a byte. As it is, 0.274 worse at 1,024 than at 256 (+0.237 to +0.310; by seed +0.279, +0.274, +0.269);
            divided without tuning 0.092 better there (-0.130 to -0.054; -0.126, -0.088, -0.063), 0.182 worse than the
            original at 256 (+0.112 to +0.251; +0.153, +0.186, +0.205): confirmed. Tuned 100 steps, divided, it is flat
            from 64 to 1,024: at 1,024 0.003 worse than at 256 (+0.001 to +0.006): refuted in direction, since this
            model gains next to nothing from more than 64 tokens anyway; at 256 it is 0.041 more than 2 % above a model
            tuned there (-0.001 to +0.083): not decided. Direct tuning is 0.011 better at 1,024 than divided (-0.045 to
            +0.024; -0.017, -0.018, +0.003): not decided; 17 documents are few. Keys say nothing: the original finds
            2.5 % of them within its own window, so it has not learned to copy; one that has, larger or trained for
            longer, could.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cloze import read_split
from longer import LONG, SCALE, SHORT, STEPS, models_of
from passkeys import farthest, found_keys
from study import Report, difference, text

from data import Dataset, Tokenizer
from lib.bits import BIT
from lib.cli import run_command

WINDOWS = (64, SHORT, 512, LONG)
BLOCK = 32                       # tokens that are scored at a time: the stride, an eighth of the first window
ABOUT = """Does squeezing positions let a model read further than it was trained to (position interpolation, Chen et al.
2023, arXiv:2306.15595)? A LLaMA-2 model of 1.3 M parameters, pretrained on Python's standard library with a window of
{short} tokens, first learns in texts of at most {short} tokens to say a key, a word, that is hidden there: the
*original*. Then it reads {long:,}. *Extrapolated*: the original as it is. *Interpolated*: its positions divided by
{scale:g}. *NTK-aware base*: not divided, but rotary embedding's base is raised instead. *Tuned* so many steps: goes on
with library code and short texts with keys, at {long:,} tokens, with positions divided (*interpolated*) or not
(*direct*), or, as the control, at {short}, not divided. Columns {windows}: bits a byte of the same {blocks} blocks of
{block} tokens in each of {documents} held-out documents, read with windows of so many tokens, a window ending with its
block; lower is better. *Keys*: per cent found, of {trials} at each of 32 distances from the prompt's end: *near* are
those up to {short} tokens, *far* those beyond; higher is better. *k_max*, by seed: the largest distance up to which a
fifth of the keys is found at every one, in tokens; 0 is none. {seeds} seeds."""


@dataclass
class Config:
    """Position interpolation against extrapolation, with a report."""

    seeds: int = 3
    blocks: int = 8      # of each document
    trials: int = 10     # keys at each of 32 distances


@torch.no_grad()
def bits(model, documents: list[list[int]], window: int, blocks: int, bytes_per_token: float) -> np.ndarray:
    """Bits a byte of each document's blocks, each read with the window that ends with it; always the same blocks.

    This is a sliding window with a stride of a block, at places spread over the document.
    """
    found = []
    for ids in documents:
        ends = np.linspace(LONG + 1, len(ids), blocks).astype(int)
        rows = torch.tensor([ids[end - window - 1 : end] for end in ends])
        hidden = model.hidden(rows[:, :-1])[:, -BLOCK:]
        found.append(-model.unembedding(hidden, rows[:, -BLOCK:], each=True).mean().item())
    return np.array(found) / BIT / bytes_per_token


def measure(config: Config) -> tuple[dict, dict, list[int]]:
    """Bits a byte of every (arm, window) (seeds, documents), found keys of every arm (seeds, 32, T), and distances."""
    tokenizer, scores, keys = Tokenizer(text()), defaultdict(list), defaultdict(list)
    documents = [ids for ids in read_split(text()) if len(ids) > LONG]
    sizes = config.blocks, Dataset(text(), "val", SHORT).bytes_per_target
    for seed in range(config.seeds):
        for name, model in models_of(seed):
            for window in WINDOWS:
                scores[name, window].append(bits(model, documents, window, *sizes))
            distances, right = found_keys(model, tokenizer, LONG, config.trials)
            keys[name].append(right)
            print(f"seed {seed}, {name}: measured", flush=True)
    return scores, keys, distances


def main(config: Config):
    report = Report("interpolation", "Position interpolation")
    scores, keys, distances = measure(config)
    far = np.array(distances) > SHORT
    rows = []
    for name in keys:
        share = [100 * np.mean([right[part] for right in keys[name]]) for part in (~far, far)]
        longest = " ".join(str(farthest(distances, right)) for right in keys[name])
        rows.append([name, *(float(np.mean(scores[name, window])) for window in WINDOWS), *share, longest])
    sizes = dict(short=SHORT, long=LONG, scale=SCALE, windows=", ".join(map(str, WINDOWS)), block=BLOCK)
    report.about(ABOUT.format(**sizes, documents=len(scores[name, SHORT][0]), **vars(config)))
    report.table(["model", *map(str, WINDOWS), "keys near", "keys far", "k_max"], rows)

    def judge(prediction: str, first: tuple, second: tuple, sign: int, allowed: float = 1):
        lower = allowed * np.array(scores[first])
        report.judge(prediction, difference(lower, scores[second]), sign, "bits a byte")

    raw, same, tuned = "extrapolated", f"tuned {STEPS[-1]} steps at {SHORT}", f"interpolated, tuned {STEPS[-1]} steps"
    direct = f"direct, tuned {STEPS[-1]} steps"
    judge(f"extrapolated, {LONG} worse than {SHORT}", (raw, SHORT), (raw, LONG), 1)
    judge(f"interpolated without tuning, {LONG} better than extrapolated", (raw, LONG), ("interpolated", LONG), -1)
    judge(f"but worse than the original at {SHORT}", (raw, SHORT), ("interpolated", LONG), 1)
    judge(f"tuned, at {SHORT} below 1.02 times one tuned there", (same, SHORT), (tuned, SHORT), -1, 1.02)
    judge(f"tuned, {LONG} better than {SHORT}", (tuned, SHORT), (tuned, LONG), -1)
    judge(f"tuned directly, {LONG} worse than interpolated and tuned", (tuned, LONG), (direct, LONG), 1)
    found = {name: [right[far].ravel() for right in keys[name]] for name in (direct, tuned)}
    gain = difference(found[direct], found[tuned]).times(100)
    report.judge(f"and finds fewer keys beyond {SHORT} tokens (interpolated less direct)", gain, 1, "points")
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
