"""Arithmetic on weights: between two models, part by part, and what training changed of one.

    python recipes/weights.py --mix out/stdlib out/tuned --alpha 0.3 --out out/mixed
    python recipes/weights.py --mix out/stdlib out/tuned --alpha 0.2 0.4 0.3 --out out/mixed

Each weight becomes (1 - alpha) of the first model's and alpha of the second's: alpha 1 is the second, the tuned one
(Lin et al. 2023, arXiv:2309.06256; their code's alpha counts the other way round). Several alphas are for as many
parts, from the input to the output: layers are spread over them evenly, the embedding goes with the first part (also
where it is the output matrix too), the last norm and the output with the last.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import BadInput, run_command
from lib.runs import find_template
from model import load, save
from sample import load_model


def part_of(name: str, num_layers: int, parts: int) -> int:
    """The part, counted from the input, that a parameter belongs to.

    >>> names = ("embedding.weight", "blocks.0.x", "blocks.2.x", "blocks.3.x", "norm.weight")
    >>> [part_of(name, 4, 3) for name in names]
    [0, 0, 1, 2, 2]
    """
    if name.startswith("embedding."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) * parts // num_layers
    return parts - 1


@torch.no_grad()
def mix(first: nn.Module, second: nn.Module, alphas: tuple[float, ...]) -> nn.Module:
    """Change first to lie between the two, alpha of the way to second. Raises ValueError for other shapes."""
    if first.config != second.config:
        raise BadInput("--mix: the two models have different shapes")
    theirs = dict(second.named_parameters())
    for name, weight in first.named_parameters():  # a tied matrix is named once
        alpha = alphas[part_of(name, first.config.num_layers, len(alphas))]
        weight.copy_((1 - alpha) * weight + alpha * theirs[name])
    return first


def task_vector(before, after) -> Tensor:
    """What training changed, of all parameters one after the other (Ilharco et al. 2022, arXiv:2212.04089)."""
    return torch.cat([(b - a).detach().flatten() for a, b in zip(before, after)])


@torch.no_grad()
def add_vector(parameters, vector: Tensor):
    """Change parameters by a task vector."""
    parameters = list(parameters)
    for weight, part in zip(parameters, vector.split([weight.numel() for weight in parameters])):
        weight += part.view_as(weight)


@dataclass
class Config:
    """Write a model whose weights lie between those of two."""

    mix: tuple[str, str]
    """two models of one shape, of which the second was made from the first"""
    out: str
    """the Hugging Face folder to write"""
    alpha: tuple[float, ...] = field(default=(0.5,))
    """how far to go from the first to the second: one number, or one for each part of the layers, input first"""
    anyway: bool = False
    """also take a run whose model.py computed something else"""
    trust_variant: bool = False
    """run the Python file that comes with a model"""


def main(config: Config):
    if not config.alpha or not all(0 <= alpha <= 1 for alpha in config.alpha):
        raise BadInput(f"--alpha {' '.join(map(str, config.alpha))} must be numbers from 0 to 1")
    first, second = (load(path) for path in config.mix)
    if len(config.alpha) > first.config.num_layers:
        raise BadInput(f"--alpha: {len(config.alpha)} parts are more than the {first.config.num_layers} layers")
    _, tokenizer = load_model(config.mix[1], anyway=config.anyway)
    template = find_template(config.mix[1])
    save(mix(first, second, config.alpha), config.out, tokenizer, template)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_command(main, Config)
