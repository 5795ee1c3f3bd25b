"""Where a model looks: does attention change with size and with tuning on instructions, and how?

Paper       Gao et al. 2023, arXiv:2310.19084; method from its code, github.com/RiverGao/scaling_finetuning.
Command     python recipes/attention.py
Hardware    one core, no GPU; 13 minutes of its time (2026-11-27, AMD EPYC), trainings among them, without the bases.
Claim       LLaMA, Alpaca and Vicuna, 7B to 65B: size lowers the reliance on trivial patterns, tuning on instructions
            does not; tuning raises the sensitivity to instructions; size raises the resemblance to human readers.
Miniature   As in ABOUT. Of a word's tokens columns are added up, rows averaged; BOS is left out, as in the paper; but
            R2 is of sentences that the regression has not seen, and divergence of whole rows. Resemblance to readers
            is not done: what people read does not come with the code.
Predicted   before the run, after a trial of 12 sentences: R2 of trivial patterns falls from 32 to 128 wide, with and
            without the first word's column; tuning does not lower it (tested as "raises it": no change could not have
            been confirmed); tuning moves attention less than another seed does; an instruction, the paper's or one like
            the chats' questions, moves the attention of tuned models more, and more beyond what random words do.
Result      R2 falls by 4.1 points (-5.3 to -2.9; by seed -5.3, -2.4, -4.6): confirmed; but without the first word's
            column it rises, by 1.5 (+1.1 to +1.9; +0.5, +3.6, +0.3): refuted. Tuning lowers it, by 3.7 (-4.1 to -3.4;
            -2.0, -5.6, -3.6): refuted. Base and chat are 0.041 nats apart, two seeds 0.048: not decided, as one seed
            has the other sign. The paper's instruction moves a tuned model more, by 0.0104 nats (+0.0096 to +0.0112;
            +0.0119, +0.00798, +0.0112), the other by 0.0070 (+0.0062 to +0.0078; +0.00438, +0.00879, +0.00785):
            confirmed. But so do random words: beyond them +0.0003 (-0.0001 to +0.0008) and -0.0019 (-0.0024 to
            -0.0013), not decided, as seeds differ in sign. More seeds could tell, more sentences could not.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_maps import Seen, apart, draw, reliance, sentences_of
from cloze import read_split
from study import OUT, Report, base, difference, once, text, train

from data import Tokenizer
from lib.cli import run_command

HERE = OUT / "attention"
ABOUT = """Where does a model look, and do size and tuning change it (Gao et al. 2023, arXiv:2310.19084)? LLaMA-2 models
of 4 layers, *32* and *128 wide*, are pretrained alike on Python's standard library (*base*); each is also tuned on
chats about 300 of its functions (*chat*). All read the same sentences, of docstrings and comments that none was trained
on. How much of the attention between words are *trivial patterns* (R2 of a regression on the word itself, the one
before, and the first; with *mean without the first word* that word's column is left out)? How far apart
(Jensen-Shannon's divergence) are two models? How far do words in front of a sentence move its attention?"""
WIDTHS, KINDS = (32, 128), ("base", "chat")
LAYERS = [*(f"layer {n}" for n in range(1, 5)), "mean", "mean without the first word"]
PREFIXES = {
    "translate": "Please translate this sentence into German:",  # the paper's
    "ask": "Can you tell me what this does?",                    # sounds like the chats
}


@dataclass
class Config:
    """Attention by size and tuning, with a report and a picture."""

    seeds: int = 3
    sentences: int = 200  # at most


def model_of(width: int, kind: str, seed: int) -> Path:
    """A run: `base` or `chat`."""
    shape = f"--num_layers 4 --num_heads 4 --dim {width} --ffn_dim {width * 11 // 4} --steps 1350".split()
    tuning = "--learning_rate 2e-3 --epochs 2 --save_every 21 --keep_every 21".split()
    out = HERE / f"base_{width}_{seed}"
    start = base(seed) if width == 128 else train(out, "--data", text(), "--seed", seed, *shape)
    if kind == "base":
        return start
    chats, data = HERE / "chats.jsonl", HERE / "data"
    once(chats, "recipes/mini.py", "--make", "chats", "--subjects", 300, "--out", HERE)
    sizes = "--template llama2-chat --max_len 256 --val_fraction 0.02 --drop_refusals".split()
    once(data, "data.py", "--source", chats, *sizes, "--tokenizer", base(0), "--out", data)
    return train(HERE / f"chat_{width}_{seed}", "--data", data, "--init_from", start, "--seed", seed, *tuning)


class Comparison:
    """All models, what they see in the same sentences, and the report."""

    def __init__(self, config: Config):
        self.seeds, self.report = range(config.seeds), Report("attention", "Attention by size and tuning")
        tokenizer = Tokenizer(str(text()))
        self.sentences = sentences_of([tokenizer.decode(ids) for ids in read_split(text())], config.sentences)
        self.seen = {key: Seen(model_of(*key), self.sentences, PREFIXES)
                     for key in itertools.product(WIDTHS, KINDS, self.seeds)}  # fmt: skip

    def trivial(self):
        def arm(width: int, kind: str, first: bool) -> list[np.ndarray]:
            return [100 * reliance(self.seen[width, kind, seed].maps, first) for seed in self.seeds]

        rows = []
        for width, kind in itertools.product(WIDTHS, KINDS):
            whole, part = (np.mean(arm(width, kind, first), (0, 2)) for first in (True, False))
            rows.append([width, kind, *map(float, whole), float(whole.mean()), float(part.mean())])
        self.report.about(ABOUT)
        self.report.say(f"Trivial patterns, R2 in per cent, {len(self.sentences)} sentences; seeds: {len(self.seeds)}.")
        self.report.table(["width", "model", *LAYERS], rows)
        for first, words in ((True, ""), (False, ", without the first word")):
            small, large = ([each.mean(0) for each in arm(width, "base", first)] for width in (32, 128))
            self.report.judge(f"R2 falls from 32 to 128 wide{words}", difference(small, large), -1, "points")
        before, after = ([each.mean(0) for each in arm(128, kind, True)] for kind in KINDS)
        self.report.judge("tuning does not lower it, 128 wide (tested: raises)", difference(before, after), 1, "points")

    def divergence(self):
        pairs = {f"{width}, base and chat": ((width, "base", 0), (width, "chat", 0)) for width in WIDTHS}
        pairs |= {f"{width}, a seed and the next": ((width, "base", 0), (width, "base", 1)) for width in WIDTHS}
        pairs["32 and 128, base"] = ((32, "base", 0), (128, "base", 0))
        found = {}
        for name, of in pairs.items():
            each = [[(w, kind, (seed + more) % len(self.seeds)) for w, kind, more in of] for seed in self.seeds]
            found[name] = [[apart(self.seen[a], self.seen[b], first) for a, b in each] for first in (True, False)]
        rows = [[name, *map(float, np.mean(whole, (0, 2))), float(np.mean(whole)), float(np.mean(part))]
                for name, (whole, part) in found.items()]  # fmt: skip
        self.report.say("Divergence of two models in nats (at most 0.693), of attention averaged over a layer's heads.")
        self.report.table(["models", *LAYERS], rows)
        names = ("128, a seed and the next", "128, base and chat")
        for first, words in enumerate(("", ", without the first word")):
            arms = [[each.mean(0) for each in found[name][first]] for name in names]
            self.report.judge(f"tuning moves less than another seed{words}", difference(*arms), -1, "nats")

    def sensitivity(self):
        rows = []
        for width, kind, (name, prefix) in itertools.product(WIDTHS, KINDS, PREFIXES.items()):
            moved = [self.seen[width, kind, seed].moved[name] for seed in self.seeds]
            means = np.mean(moved, (0, 2))
            rows.append([width, kind, prefix, *map(float, means), float(means[0] - means[1])])
        self.report.say("Sensitivity: words in front of a sentence move its attention by so many nats, head by head.")
        self.report.table(["width", "model", "instruction", "moves", "as many random words", "difference"], rows)
        for name, prefix in PREFIXES.items():
            moved = [np.array([self.seen[128, kind, seed].moved[name] for seed in self.seeds]) for kind in KINDS]
            beyond, told = [each[:, 0] - each[:, 1] for each in moved], f"`{prefix}` moves a tuned model more"
            self.report.judge(told, difference(*(each[:, 0] for each in moved)), 1, "nats")
            self.report.judge(f"{told}, beyond random words", difference(*beyond), 1, "nats")


def main(config: Config):
    each = Comparison(config)
    each.trivial()
    each.divergence()
    each.sensitivity()
    shown, place = [(32, "base", 0), (128, "base", 0), (128, "chat", 0)], OUT / "attention.png"
    draw({f"{width} wide, {kind}": each.seen[width, kind, seed].maps for width, kind, seed in shown},
         each.sentences, place)  # fmt: skip
    each.report.say(f"Maps of one sentence: {place}")
    each.report.end()


if __name__ == "__main__":
    run_command(main, Config)
