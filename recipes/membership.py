"""Document-level membership inference: do a model's probabilities tell which documents it was trained on?

Paper       Meeus et al. 2023, arXiv:2310.15007.
Command     python recipes/membership.py   (needs scikit-learn: pip install scikit-learn)
Hardware    two cores, no GPU; 24 minutes beside other work (2026-11-27, AMD EPYC).
Claim       OpenLLaMA-7B: histograms of probabilities, normalised with MaxNormTF, tell members from others with an AUC
            of 0.856 on books and 0.678 on papers; the best aggregates reach 0.626 and 0.635.
Miniature   Honest split: 1,017 tokens from the middle of each file of the standard library, near copies left out, half
            of each folder members. The laptop's model is trained on them alone, 16 epochs of constant learning rate;
            the early checkpoint is that after a quarter of the epochs. The second seed's members are the first one's
            others: what makes a document easy for any model cancels out in the mean. Shifted split: files of scipy,
            called members, against torch's; the same models have read neither. Windows of 128 tokens and 1,000 bins as
            in the paper, 200 trees (paper: 500) of depth 5, five folds. Blind is the same forest on token counts.
Predicted   before the run: honest, after one epoch the six attacks' mean AUC is below 0.6; it rises with epochs;
            the loss less an early checkpoint's is always the strongest. Shifted: the paper's attack is above 0.6 though
            nothing is a member; the blind classifier is better still.
Result      Honest: after one epoch the six have a mean AUC of 0.676, above 0.6 by 0.076 (+0.061 to +0.089; by seed
            +0.079, +0.073): refuted; most have aggregates, 0.902, and Min-20 %, 0.865, and mere counts of tokens in the
            members reach 0.842. It rises (0.513 to 1.000 for the paper's attack): confirmed. The loss less an early
            checkpoint's is below the best other after 1 and 4 epochs (-0.284, -0.016): refuted; after 16 both have
            1.000, and only shorter documents could decide. Shifted: the paper's attack has 0.879 (+0.279 above 0.6,
            +0.243 to +0.309), blind 0.995 (+0.116, +0.088 to +0.150): confirmed.
"""

import importlib.util
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attacks import EARLY, PAPER, WINDOW, Split, ask, attack, auc, blind, by_probabilities, of_counts
from study import OUT, Report, once, text

from data import Dataset, Tokenizer
from lib.cli import BadInput, run_command
from lib.documents import read_documents
from lib.files import new_folder
from lib.meta import write_meta
from lib.shards import ShardWriter, describe_dataset, token_dtype
from lib.sources import find_files
from model import load

HERE = OUT / "membership"
SIZE = 8 * (WINDOW - 1) + 1             # tokens of a document
EARLIER = {0: 0, 1: 0.25, 4: 1, 16: 4}  # epochs, and those of the early checkpoint
BLIND, COUNTS = "blind, no model", "members' counts"


@dataclass
class Config:
    """Membership inference in miniature, with a report."""

    seeds: int = 2
    documents: int = 350                           # of each split, at most
    shifted: tuple[str, str] = ("scipy", "torch")  # two packages


def pieces(name: str, tokenizer: Tokenizer, count: int) -> tuple[np.ndarray, list[str]]:
    """The middle of files of `stdlib` or of a package, as ids (documents, SIZE), and the folder of each.

    They come in random order. Left out are tests, and files of which over a fifth of the runs of five tokens are in
    one before: near copies would be members and others at once.
    """
    root = Path(os.__file__ if name == "stdlib" else importlib.util.find_spec(name).origin).parent
    files = find_files((name if name == "stdlib" else str(root),), HERE, (".py",))
    kept, folders, known = [], [], []
    for number in np.random.default_rng(0).permutation(len(files)):
        place = files[number].relative_to(root).parent
        if len(kept) == count or {"test", "tests", "testing"}.intersection(place.parts):
            continue
        ids = tokenizer.encode(next(read_documents(files[number])))
        begin = (len(ids) - SIZE) // 2
        ids = ids[max(0, begin) :][:SIZE]
        runs = {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}
        if begin >= 0 and all(len(runs & other) <= min(len(runs), len(other)) / 5 for other in known):
            kept.append(ids)
            folders.append(str(place))
            known.append(runs)
    return np.array(kept), folders


def halves(folders: list[str], seed: int) -> np.ndarray:
    """Whether each document is a member: of a folder every other one; an odd seed's are those that are left."""
    order = sorted(np.random.default_rng(seed // 2).permutation(len(folders)), key=lambda document: folders[document])
    members = np.zeros(len(folders), bool)
    members[order[seed % 2 :: 2]] = True
    return members


def write_dataset(out: Path, tokenizer: Tokenizer, members: np.ndarray, others: np.ndarray):
    """A dataset whose training split is the members, and validation the others."""
    with new_folder(out) as folder:
        tokenizer.save(folder)
        writer = ShardWriter(folder, token_dtype(tokenizer.vocab_size))
        for split, part in (("train", members), ("val", others)):
            ids = np.insert(part, (0, part.shape[1]), (tokenizer.bos_id, tokenizer.eos_id), axis=1)
            num_bytes = sum(len(tokenizer.decode(row).encode()) for row in part.tolist())
            writer.write(split, ids.ravel(), len(part), num_bytes)
        write_meta(folder, describe_dataset(tokenizer, writer, 0.5, {}), "python recipes/membership.py")


def trained(seed: int, epochs: float) -> Path:
    """The model after so many epochs over the members: of one run, which stops for each."""
    run, data = HERE / f"run_{seed}", HERE / f"members_{seed}"
    an_epoch = len(Dataset(data, "train", 256)) / 8
    step, last = round(epochs * an_epoch), round(max(EARLIER) * an_epoch)
    how = ("--steps", last, "--schedule", "constant", "--stop_at", max(1, step), "--keep", 99, "--sample=")
    return once(run / f"step_{step:08d}", "train.py", "--data", data, "--seed", seed, "--out", run, *how)


def tabled(report: Report, split: Split):
    epochs, names = (list(dict.fromkeys(part)) for part in zip(*split.scores))
    rows = []
    for name in names:
        cells = []
        for number in epochs:
            found = split.estimate(lambda draw: split.auc(draw, number, name))
            seeds = ", ".join(f"{value:.2f}" for value in found.seeds)
            cells.append(f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}); {seeds}")
        rows.append([name, *cells])
    report.table(["attack", *(f"epochs: {number}" for number in epochs)], rows)


def measured(ids: np.ndarray, labels: list[np.ndarray], epochs: tuple[int, ...], tokenizer, read: bool) -> Split:
    """All attacks on the models of each seed after so many epochs; read says whether these read the members."""
    packed = np.array([len(zlib.compress(tokenizer.decode(row).encode())) for row in ids.tolist()])
    scores, size = defaultdict(list), tokenizer.vocab_size
    for seed, members in enumerate(labels):
        without, counts = blind(ids, members, size, seed), of_counts(ids, members, size)
        counts = by_probabilities(counts, counts, packed)
        ages = sorted({*epochs, *(EARLIER[number] for number in epochs)})
        answers = {age: ask(load(trained(seed, age)), ids) for age in ages}
        for number in epochs:
            found = attack(answers[number], answers[EARLIER[number]], packed, members, size, seed)
            found[BLIND] = without
            if read:
                found |= {f"{name}, {COUNTS}": counts[name] for name in ("loss", "Min-20 %")}
            for name, values in found.items():
                scores[number, name].append(values)
    return Split(np.array(labels), scores)


def judge(report: Report, honest: Split, shifted: Split):
    """The predictions at the head of this file."""
    six = list(dict.fromkeys(name for _, name in honest.scores))[:6]
    others = [name for name in six if name != EARLY]

    def judged(prediction: str, split: Split, measure: Callable, sign: int = 1):
        report.judge(prediction, split.estimate(lambda draw: measure(partial(split.auc, draw))), sign, "AUC")

    mean = "honest, epochs 1: mean of the six less 0.6 is negative"
    judged(mean, honest, lambda found: np.mean([found(1, name) for name in six], 0) - 0.6, -1)
    for name in (PAPER, "loss"):
        judged(f"honest, {name}: rises from 1 epoch to 16", honest, lambda found: found(16, name) - found(1, name))
    for epochs in (1, 4, 16):
        best = f"honest, epochs {epochs}: {EARLY} is above the best other"
        judged(best, honest, lambda found: found(epochs, EARLY) - np.max([found(epochs, name) for name in others], 0))
    judged(f"shifted, {PAPER}: less 0.6 is positive", shifted, lambda found: found(16, PAPER) - 0.6)
    judged(f"shifted: blind is above {PAPER}", shifted, lambda found: found(16, BLIND) - found(16, PAPER))


def main(config: Config):
    if not importlib.util.find_spec("sklearn"):
        raise BadInput("recipes/membership.py needs scikit-learn: pip install scikit-learn")
    tokenizer, report = Tokenizer(text()), Report("membership", "Document-level membership inference")
    ids, folders = pieces("stdlib", tokenizer, config.documents)
    labels = [halves(folders, seed) for seed in range(config.seeds)]
    for seed, members in enumerate(labels):
        if not (out := HERE / f"members_{seed}").exists():
            write_dataset(out, tokenizer, ids[members], ids[~members])
    report.say("AUC: how likely a member's score is above another document's; chance is 0.5. In brackets the 95 % "
               "interval by drawing documents, behind it each seed. The models are asked after so many epochs.")
    report.say(f"Honest split: {len(ids)} pieces of {SIZE:,} tokens of the standard library, half of them members.")
    honest = measured(ids, labels, tuple(EARLIER), tokenizer, read=True)
    tabled(report, honest)
    shuffled = [np.random.default_rng(seed).permutation(labels[0]) for seed in range(10)]
    found = [auc(blind(ids, members, tokenizer.vocab_size, 0), members) for members in shuffled]
    control = f"have a mean AUC of {np.mean(found):.3f}, standard deviation {np.std(found, ddof=1):.3f}"
    report.say("Members' counts: how often each token is in the members, in place of a model. Control: blind forests "
               f"on ten shuffles of the labels {control}. The intervals leave out this luck.")  # fmt: skip
    parts = [pieces(name, tokenizer, config.documents // 2)[0] for name in config.shifted]
    both = " and ".join(f"{len(part)} of {name}" for name, part in zip(config.shifted, parts))
    report.say(f"Shifted split: {both}, the first called members; the models are those above, which read neither.")
    members = np.repeat([True, False], [len(part) for part in parts])
    shifted = measured(np.concatenate(parts), [members] * config.seeds, (0, 16), tokenizer, read=False)
    tabled(report, shifted)
    judge(report, honest, shifted)
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
