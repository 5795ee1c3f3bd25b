"""QLoRA's formats: what do four bits a weight lose, by their values, blocks and scales?

Paper       Dettmers et al. 2023, arXiv:2305.14314.
Command     python recipes/qlora_formats.py
            also with stories260K (huggingface.co/karpathy/tinyllamas) and a text of TinyStories:
            python recipes/qlora_formats.py --stories stories260K.bin tok512.model valid.txt
Hardware    one core, no GPU; 6 minutes (2026-11-27, AMD EPYC), stories260K in it, without recipes/compeft.py's models.
Claim       NF4, quantiles of the normal distribution, keeps a model better than floats or whole numbers of four bits;
            scales of eight bits (double quantisation, DQ) make 4.5 bits a weight 4.127 and cost nothing.
Miniature   The laptop's models, three seeds, and stories260K, which somebody else trained. Forms and measures: ABOUT.
Predicted   before the full run, with four forms in blocks of 64 known from a try (seed 0, 16 windows, stories260K): NF4
            below int4 and FP4 in error and in loss; DQ adds less than a tenth of what NF4 loses; int8 costs choices
            (expected: not decided).
Result      Error on the laptop's: NF4 9.2 %, E2M1 10.6, int4 10.8, FP4 12.2, E3M0 18.8, int8 0.6. NF4 less int4 -1.58
            points (-1.67 to -1.49; by seed -1.57, -1.56, -1.61), less FP4 -3.02 (-3.07 to -2.97; -3.02, -3.01, -3.03):
            confirmed. NF4 adds 0.0060 nats a token (+0.0052 to +0.0067): less FP4 -0.0036 (-0.0046 to -0.0026; -0.0027,
            -0.0048, -0.0032), confirmed; less int4 -0.0018 (-0.0028 to -0.0008; -0.0019, -0.0037, +0.00003), not
            decided. DQ's loss less a tenth of NF4's -0.00054 (-0.00062 to -0.00046): confirmed. int8: not decided. On
            stories260K, one model, NF4 adds 0.119 (+0.115 to +0.123), less int4 -0.050 (-0.056 to -0.045), less FP4
            -0.086 (-0.093 to -0.080), DQ as above -0.014: confirmed. Three that lose as much would decide for int4.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from codes import Form, quantized, size
from compeft import HERE as CHATS
from compeft import tuned
from scoring import Questions
from study import Report, base, difference, text

from data import Dataset, Tokenizer
from lib.cli import BadInput, run_command
from model import load

FORMS = (
    *(Form(code) for code in ("int8", "NF4", "FP4", "FP4 E2M1", "FP4 E3M0", "int4")),
    *(Form(code, block) for code in ("NF4", "FP4", "int4") for block in (32, 128)),
    *(Form("NF4", block, True) for block in (32, 64, 128)),
)
INT8, NF4, FP4, INT4, DOUBLE = Form("int8"), Form("NF4"), Form("FP4"), Form("int4"), Form("NF4", 64, True)
LENGTH = 512  # of windows of stories260K
ABOUT = """What do four bits a weight lose, by their values, blocks and scales (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314)? In LLaMA-2 models of 1.3 M parameters, pretrained on Python's standard library, all matrices of the
layers are written in codes of four bits (*int8*: eight) and read back; embeddings are not. *Values*: *NF4*, quantiles
of the normal distribution; *int*, whole numbers; *FP4*, bitsandbytes' floats, *E2M1*, *E3M0* in IEEE's form. *Block*:
so many weights share a scale, fp32 or, with double quantisation (*DQ*), of eight bits. *Bits a weight*, with scales, in
these matrices, and *large*, in one of 2^24 weights. *Error*: the norm of what is wrong in a matrix over its own. *Loss
more*: nats a token above {loss:.4f} on {windows} windows of held-out text. Of all these lower is better. *Choices
more*: points of right choices above the {right:.1f} % of models tuned on chats (negative: lost). {seeds} seeds."""


@dataclass
class Config:
    """Weights in four and eight bits, with a report."""

    seeds: int = 3
    windows: int = 192             # of validation text
    stories: tuple[str, ...] = ()  # also measure stories260K: its .bin, its tokenizer and a text of stories


@torch.no_grad()
def losses(model, tokens, targets) -> np.ndarray:
    """Nats a token of each window; both are (windows, length)."""
    rows = zip(tokens.split(16), targets.split(16))
    return torch.cat([-model.log_probs(each, wanted).mean(1) for each, wanted in rows]).numpy()


def library(count: int) -> tuple:
    """So many windows of the standard library's validation files: tokens, targets."""
    data = Dataset(text(), "val", 256)
    batch = data.batch(data.spread_indices(count)).to(torch.device("cpu"))
    return batch.tokens, batch.targets


def stories(path: str, tokenizer: Tokenizer, count: int) -> tuple:
    """So many windows of a text, each behind BOS: tokens, targets."""
    told = Path(path).read_text(encoding="utf-8", errors="replace")
    ids = tokenizer.encode(told[: 8 * LENGTH * count])[: LENGTH * count]
    if len(ids) < LENGTH * count:
        raise BadInput(f"--stories: {path} has {len(ids):,} tokens, but {count} windows take {LENGTH * count:,}")
    targets = torch.tensor(ids).view(count, LENGTH)
    return torch.nn.functional.pad(targets, (1, 0), value=tokenizer.bos_id)[:, :-1], targets


def measure(models: list, windows: tuple) -> dict:
    """Errors (models, matrices), losses (models, windows), bits a weight of each form; None is as they are."""
    found = {None: ([], [losses(model, *windows) for model in models], 32)}
    for form in FORMS:
        made = [quantized(model, form) for model in models]
        found[form] = ([one.errors for one in made], [losses(one.model, *windows) for one in made], made[0].bits)
    return found


def choices(seeds: int) -> dict:
    """Whether questions are answered rightly (seeds, questions) by tuned models in each form; None is as they are."""
    runs = [tuned("all weights", seed) for seed in range(seeds)]
    questions, models = Questions(runs[0], CHATS / "test.jsonl"), [load(run) for run in runs]
    found = {None: [questions.right(model) for model in models]}
    return found | {form: [questions.right(quantized(model, form).model) for model in models] for form in FORMS}


def tell(report: Report, found: dict, right: dict):
    """A line a form."""
    rows = []
    for form in FORMS:
        errors, nats, bits = found[form]
        row = [form, bits, size(2**24, form) / 2**24, 100 * float(np.mean(errors)), difference(found[None][1], nats)]
        rows.append(row + [difference(right[None], right[form]).times(100) for _ in right and [0]])
    header = ["values, block", "bits a weight", "large", "error %", "loss more", "choices more"]
    report.table(header[: len(rows[0])], rows)


def judge(report: Report, found: dict, models: str):
    for place, name, unit in ((0, "error", "of the weight's norm"), (1, "loss", "nats a token")):
        for other in (INT4, FP4):
            less = difference(found[other][place], found[NF4][place])
            report.judge(f"NF4 below {other.code} in {name}, {models}", less, -1, unit)
    plain, single, double = (np.array(found[form][1]) for form in (None, NF4, DOUBLE))
    more = difference((single - plain) / 10, double - single)
    report.judge(f"DQ adds less than a tenth of NF4's loss (less that tenth), {models}", more, -1, "nats a token")


def main(config: Config):
    if len(config.stories) not in (0, 3):
        raise BadInput("--stories takes three files: a model, its tokenizer and a text")
    report = Report("qlora_formats", "QLoRA's formats: weights in four bits")
    found = measure([load(base(seed)) for seed in range(config.seeds)], library(config.windows))
    right = choices(config.seeds)
    report.about(ABOUT.format(loss=np.mean(found[None][1]), right=100 * np.mean(right[None]), **vars(config)))
    tell(report, found, right)
    judge(report, found, "the laptop's")
    report.judge("int8 costs choices", difference(right[None], right[INT8]).times(100), -1, "points")
    if config.stories:
        model, tokenizer, path = config.stories
        found = measure([load(model)], stories(path, Tokenizer(tokenizer), config.windows))
        report.say(f"stories260K, one model, on stories; its loss as it is: {np.mean(found[None][1]):.4f}.")
        tell(report, found, {})
        judge(report, found, "stories260K")
    report.end()


if __name__ == "__main__":
    run_command(main, Config)
