"""Choosing few examples to tune on: at random, by LIMA's rules, of many sources or few, by greatest entropy.

Paper       LIMA, Zhou et al. 2023, arXiv:2305.11206; InvestLM, Yang et al. 2023, arXiv:2309.13064 (the same in one
            domain); the GME sampler, Delmas et al. 2023, arXiv:2311.06364.
Command     python recipes/choosing.py                             (docstrings: the domain that the base knows)
            python recipes/choosing.py --records alpaca            (instructions; downloaded, or a local file)
Hardware    one core, no GPU; 9 and 13 minutes of its time (2026-11-27, AMD EPYC), without the bases.
Claim       LIMA: tuned on 1,000 chosen examples, a large model answers well; quality and diversity of examples help,
            their number alone does not. GME: a set as diverse and even as can be, each item chosen for its entropies.
Miniature   The laptop's model, three seeds, three epochs on examples whose answers have 60,000 bytes, whatever their
            number, and on four times as many at random. LIMA's rules with lengths of 100 to 700 characters, for a
            window of 256 tokens. Bits a byte of held-out answers, all of them and the good ones, which the rules keep;
            and of 150 answers written at LIMA's settings the share that end and are good. LIMA used people's judgement.
Predicted   before the run, for both sources: GME's entropies above those of 100 random draws; GME better than random
            on all held-out answers, by little. On good ones: rules better than random; LIMA's draw of sources better
            than few sources; GME among good ones better than chance among them; four times as many at random better
            than good ones, against LIMA, as this base has little to align. Rules: more good answers written.
Result      docstrings, then Alpaca (9,229 random records), in bits a byte. GME's entropies are above all 100 draws'.
            Not decided: GME less random, all answers, -0.006 (-0.015 to +0.002; by seed -0.003, -0.011, -0.004) and
            +0.001 (-0.006 to +0.008; +0.005, -0.002, -0.000); rules less random -0.003 (-0.009 to +0.004; -0.005,
            -0.007, +0.005) and +0.002 (-0.004 to +0.007; +0.001, +0.003, +0.000). Four times the docstrings held out
            could tell 0.006. Confirmed: many sources less few -0.058 (-0.066 to -0.049; -0.062, -0.048, -0.064) and
            -0.034 (-0.042 to -0.026; -0.027, -0.037, -0.038); four times as many less the rules -0.054 (-0.062 to
            -0.045; -0.054, -0.050, -0.056) and -0.271 (-0.294 to -0.249; -0.276, -0.262, -0.276). GME among good ones
            -0.010 (-0.018 to -0.002; -0.003, -0.009, -0.017), confirmed, and -0.006 (-0.013 to +0.001; +0.001, -0.012,
            -0.008), not decided. Rules write 52 % good answers for random's 22, four times as many 16: +30 points (+23
            to +36; +27, +32, +30); Alpaca 56, 30, 22: +27 (+20 to +33; +17, +27, +36); confirmed.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answering import fitting, measure, tuned
from curating import Record, by_temperature, categories, good, library, read, whole_groups
from entropy import gme
from study import OUT, Report, base, difference, text

from data import Tokenizer
from lib.cli import BadInput, run_command

ARMS = ("random", "rules", "many sources", "few sources", "GME", "GME and rules", "random, 4 times")
LENGTHS = (100, 700)  # characters of a good answer
BASE = "none, the base"


@dataclass
class Config:
    """Few examples, chosen in six ways, and what each does to the tuned model, with a report."""

    records: str = "library"  # or a file of conversations, or alpaca, dolly or oasst, which are downloaded
    seeds: int = 3
    size: int = 60_000        # bytes of the answers that are chosen
    pool: int = 8000          # records to choose from
    tests: int = 400          # held-out records
    written: int = 150        # answers


def records_of(config: Config) -> tuple[list[Record], list[Record]]:
    """The pool, and what is held out: docstrings of other files, or other records."""
    tokenizer = Tokenizer(text())
    if config.records == "library":
        pool, tests = (fitting(library(text(), split, tokenizer), tokenizer) for split in ("train", "val"))
    else:
        records = fitting(read(config.records, OUT / "downloads"), tokenizer)
        pool, tests = records[config.tests :], records
    return pool[: config.pool], tests[: config.tests]


def choose(arm: str, pool: list[Record], seed: int, size: int) -> list[int]:
    """Places in the pool: the first in an arm's order whose answers have so many bytes together."""
    draw, places = random.Random(seed), list(range(len(pool)))
    if "rules" in arm or "sources" in arm:
        places = [place for place in places if good(pool[place].answer, *LENGTHS)]
    some = [pool[place] for place in places]
    groups = [record.group for record in some]
    if "GME" in arm:
        order = (item for item, _ in gme(*categories(some)))
    elif "sources" in arm:
        order = by_temperature(groups, draw) if arm == "many sources" else whole_groups(groups, draw)
    else:
        order = draw.sample(range(len(some)), len(some))
    chosen, left = [], 4 * size if "4 times" in arm else size
    for item in order:
        chosen.append(places[item])
        left -= len(some[item].answer.encode())
        if left <= 0:
            return chosen
    raise BadInput(f"--size {size:,} is more than the answers that can be chosen have ({arm})")


def measured(arm: str, seed: int, config: Config, pool: list[Record], tests: list[Record]) -> tuple[list[int], dict]:
    """What an arm chooses, and what is measured of the model tuned on it."""
    here = OUT / "choosing" / f"{Path(config.records).stem}_{config.size}"
    out = here / f"{arm.replace(' ', '_').replace(',', '')}_{seed}"
    chosen = choose(arm, pool, seed, config.size) if arm != BASE else []
    run = tuned([pool[place] for place in chosen], seed, out) if chosen else base(seed)
    made = out.with_suffix(".npz")
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        np.savez(made, **measure(run, tests, config.written, LENGTHS, seed))
    return chosen, dict(np.load(made))


def main(config: Config):
    name = Path(config.records).stem
    report = Report("choosing" if name == "library" else f"choosing_{name}", f"Choosing few examples: {name}")
    pool, tests = records_of(config)
    kinds, sizes = categories(pool), np.array([len(record.answer.encode()) for record in tests])
    fine = np.array([good(record.answer, *LENGTHS) for record in tests])
    chosen, found, rows = {}, {}, []
    for arm in (BASE, *ARMS):
        pairs = [measured(arm, seed, config, pool, tests) for seed in range(config.seeds)]
        chosen[arm], results = zip(*pairs)
        bits = np.array([result["bits"] for result in results])
        found[arm] = {"all": bits / sizes.mean(), "good": bits[:, fine] / sizes[fine].mean()}
        found[arm]["written"] = 100 * np.array([result["good"] for result in results])
        lengths = [len(pool[place].answer.encode()) for some in chosen[arm] for place in some]
        heights = [np.mean([kind.entropy_of(some) for some in chosen[arm]]) for kind in kinds]
        means = [values.mean() for values in found[arm].values()]
        rows.append([arm, len(lengths) // config.seeds, np.mean(lengths or [0]), *heights, *means])
    report.say(f"{len(pool):,} records to choose from, {len(tests)} held out, of which {fine.sum()} are good; means of "
               f"{config.seeds} seeds. All but the first have answers of {config.size:,} bytes or four times as many; "
               "sources are files, or the words that questions begin with.")  # fmt: skip
    report.table(["chosen", "examples", "bytes each", "entropy: groups", "questions", "answers", "lengths",
                  "bits a byte, all", "good", "good ones written, %"], rows)  # fmt: skip
    draws = [choose("random", pool, 1000 + number, config.size) for number in range(100)]
    above = [sum(kind.entropy_of(chosen["GME"][0]) > kind.entropy_of(draw) for draw in draws) for kind in kinds]
    report.say(f"GME's entropies, in this order, are above those of {above} of 100 random draws.")

    def judge(prediction: str, first: str, second: str, what: str, sign: int = -1):
        unit = "points" if what == "written" else "bits a byte"
        report.judge(prediction, difference(found[first][what], found[second][what]), sign, unit)

    judge("GME better than random, on all", "random", "GME", "all")
    judge("rules better than random, on good ones", "random", "rules", "good")
    judge("many sources better than few, on good ones", "few sources", "many sources", "good")
    judge("GME and rules better than rules, on good ones", "rules", "GME and rules", "good")
    judge("four times as many at random better than rules, on good ones", "rules", "random, 4 times", "good")
    judge("rules write more good answers than random", "random", "rules", "written", 1)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
