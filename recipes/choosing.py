"""Choosing few examples to tune on: at random, by LIMA's rules, of many sources or few, by greatest entropy.

Paper       LIMA, Zhou et al. 2023, arXiv:2305.11206; InvestLM, Yang et al. 2023, arXiv:2309.13064 (the same in one
            domain); the GME sampler, Delmas et al. 2023, arXiv:2311.06364.
Command     python recipes/choosing.py                                      (docstrings: the domain that the base knows)
            python recipes/choosing.py --records alpaca_random_9k.json      (instructions: a random subset of Alpaca, to
            be fetched before as data/random/random_9k.json of github.com/gpt4life/alpagasus: 9,229 records, of which
            8,340 fit the window. --records alpaca downloads all of Alpaca and makes another report.)
Hardware    one core, no GPU; 9 and 13 minutes of its time (2026-11-27, AMD EPYC), without the bases.
Claim       LIMA: tuned on 1,000 chosen examples, a large model answers well; quality and diversity of examples help,
            their number alone does not. GME: a set as diverse and even as can be, each item chosen for its entropies.
Miniature   The laptop's model, three seeds; arms and measures as in ABOUT. Lengths of 100 to 700 characters stand for
            LIMA's, for a window of 256 tokens; they also used people's judgement. 150 answers, at LIMA's settings.
Predicted   before the run, for both sources: GME's entropies above those of 100 random draws; GME better than random
            on all held-out answers, by little. On good ones: rules better than random; LIMA's draw of sources better
            than few sources; GME among good ones better than chance among them; four times as many at random better
            than good ones, against LIMA, as this base has little to align. Rules: more good answers written.
Result      docstrings, then Alpaca, in bits a byte. GME's entropies are above all 100 draws'. Not decided: GME less
            random, all answers, -0.006 (-0.015 to +0.002; by seed -0.003, -0.011, -0.004) and +0.001 (-0.006 to +0.008;
            +0.005, -0.002, -0.000); rules less random -0.003 (-0.009 to +0.004; -0.005, -0.007, +0.005) and +0.002
            (-0.004 to +0.007; +0.001, +0.003, +0.000). Four times the docstrings held out could tell 0.006. Confirmed:
            many sources less few -0.058 (-0.066 to -0.049; -0.062, -0.048, -0.064) and -0.034 (-0.042 to -0.026;
            -0.027, -0.037, -0.038): few cost, but many are no better than the rules alone (2.103 and 2.109, 2.506 and
            2.506; not tested). Four times as many, in four times the steps, less the rules -0.054 (-0.062 to -0.045;
            -0.054, -0.050, -0.056) and -0.271 (-0.294 to -0.249; -0.276, -0.262, -0.276). GME among good ones -0.010
            (-0.018 to -0.002; -0.003, -0.009, -0.017), confirmed, and -0.006 (-0.013 to +0.001; +0.001, -0.012,
            -0.008), not decided. Rules write 52 % good answers for random's 22, four times as many 16: +30 points (+23
            to +36; +27, +32, +30); Alpaca 56, 30, 22: +27 (+20 to +33; +17, +27, +36); confirmed. Few sources write
            most, 56 and 58 %: what is good is mostly a length, and says nothing of truth.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answering import WINDOW, fitting, measure, tuned
from curating import ARMS, LENGTHS, Record, categories, choose, good, library, read
from study import OUT, Report, base, difference, text

from data import Tokenizer
from lib.cli import run_command

BASE = "none, the base"
ABOUT = """Which few examples are best to tune on (LIMA, arXiv:2305.11206; the GME sampler, arXiv:2311.06364)? A LLaMA-2
model of 1.3 M parameters, pretrained on Python's standard library (*the base*), is fine-tuned for three epochs on
questions with answers, chosen until the answers have {size:,} bytes. An answer is *good* if LIMA's rules keep it: of
100 to 700 characters, no "I" or "my", no word of other answers. *Random*: drawn from all. *Rules*: from the good ones.
*Many sources*: of the good ones, a source drawn with the power 1/3 of its size, then one of its examples, as LIMA did;
*few sources*: one whole source after the other (entropy 0: one is enough). Sources are {sources}. *GME*: one by one,
each time the example that brings the entropies of the chosen nearest to the highest; *GME and rules*: the same among
the good ones. *4 times*: so many bytes, and so about four times the steps. Entropies (nats) are those of the chosen: of
sources, of words in questions and in answers, of lengths of answers in powers of 2. Bits a byte of held-out answers,
all or good: lower is better. Last, what share of {written} answers that the tuned model writes to held-out questions
end and are good, which says nothing of truth."""


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
    tokenizer = Tokenizer(text())
    if config.records == "library":
        pool, tests = (fitting(library(text(), split, tokenizer), tokenizer) for split in ("train", "val"))
    else:
        records = fitting(read(config.records, OUT / "downloads"), tokenizer)
        pool, tests = records[config.tests :], records
    return pool[: config.pool], tests[: config.tests]


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
        means, none = [values.mean() for values in found[arm].values()], [""] * (2 + len(kinds))
        rows.append([arm, *([len(lengths) // config.seeds, np.mean(lengths), *heights] if lengths else none), *means])
    sources = "files of the library" if name == "library" else "the words that questions begin with"
    report.about(ABOUT.format(size=config.size, sources=sources, written=min(config.written, len(tests))))
    report.say(f"{len(pool):,} records ({name}) to choose from that fit the window of {WINDOW} tokens, "
               f"{len(tests)} held out, of which {fine.sum()} are good; means of {config.seeds} seeds.")  # fmt: skip
    report.table(["chosen", "examples", "bytes each", "entropy: sources", "questions", "answers", "lengths",
                  "bits a byte, all", "good", "good ones written, %"], rows)  # fmt: skip
    draws = [choose("random", pool, 1000 + number, config.size) for number in range(100)]
    above = [sum(kind.entropy_of(chosen["GME"][0]) > kind.entropy_of(draw) for draw in draws) for kind in kinds]
    report.say(f"- Predicted: GME's entropies of sources, questions, answers and lengths above those of random draws. "
               f"Found: above {', '.join(map(str, above))} of 100.")  # fmt: skip

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
