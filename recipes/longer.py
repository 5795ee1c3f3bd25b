"""Models whose window is made longer, by squeezed positions or without: shared pieces of recipes/interpolation.py."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from passkeys import passkeys
from study import OUT, base, text, train

from model import load

SHORT, LONG = 256, 1024  # windows: of the first training, and the one that is wanted
SCALE = LONG / SHORT
STEPS = (50, 100)        # of the tuning at the new length
HERE = OUT / "interpolation"


def tune(out: Path, start: Path, seed: int, words: str) -> Path:
    """On library code and texts with keys, half each; packed, so that no document sees another."""
    both = f"--data {text()}:0.5 {passkeys(HERE, SHORT)}:0.5 --pack --init_from {start} --seed {seed} --weight_decay 0"
    return train(out, *both.split(), *words.split(), "--beta2", 0.95, "--eval_every", 1000, "--eval_tokens", 16384)


def original(seed: int) -> Path:
    """The laptop's model of a seed, after it has learned to find keys within its window."""
    return tune(HERE / f"original_{seed}", base(seed), seed, f"--steps 400 --learning_rate 1e-3 --seq_len {SHORT}")


def extended(seed: int, name: str, length: int, scale: float) -> Path:
    """A short tuning at this length, at a constant rate, so that each checkpoint is a shorter tuning's end."""
    words = f"--steps {STEPS[-1]} --save_every {STEPS[0]} --keep_every {STEPS[0]} --seq_len {length} --batch_size"
    words += f" {2048 // length} --rope_scale {scale} --learning_rate 2e-4 --warmup 20 --schedule constant"
    return tune(HERE / f"{name}_{seed}", original(seed), seed + 100, words)


def models_of(seed: int):
    """(name, model) of every arm; all may read the long window, as far as they are able to."""

    def changed(folder: Path, **changes):
        model = load(folder)
        model.config = dataclasses.replace(model.config, max_seq_len=LONG, **changes)  # read anew in every pass
        return model.eval()

    start = original(seed)
    head = load(start).config.head_dim
    yield "extrapolated", changed(start)
    yield "interpolated", changed(start, rope_scale=SCALE)
    yield "NTK-aware base", changed(start, rope_theta=10_000.0 * SCALE ** (head / (head - 2)))
    yield f"tuned {STEPS[-1]} steps at 256", changed(extended(seed, "same", SHORT, 1))
    for name, scale in (("direct", 1), ("interpolated", SCALE)):
        run = extended(seed, name, LONG, scale)
        for steps in STEPS:
            yield f"{name}, tuned {steps} steps", changed(run / f"step_{steps:08d}")
