"""What a run minimises beside the next token: preferences, and noise on the embeddings.

An objective has `names`, of the sums that it gives of a batch; the gradient is that of the first,
divided by the first of its counts over the whole step. `unit` is what the counts count, and the
sums' means are made into `scores`.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.kernels import IGNORE
from lib.lora import without_adapters
from lib.tensors import OnHost
from lib.variants import variant_of


@dataclass
class Flags:
    # regularization: in the gradient alone, the loss that is reported stays the plain one
    neftune: float = 0.0                # noise on the embeddings, uniform up to this / sqrt(tokens * width)
    # preference pairs, which a dataset of pairs is trained on (DPO)
    dpo_beta: float = 0.1               # how much moving away from the first weights costs


def bits_per_byte(sums: Tensor, val) -> dict[str, float]:
    """Scores of validation sums (sources, 2), targets and nats: nats a target, bits a byte of text.

    The bytes are those that the whole split (val, a data.Mixture) has for a target: of its text, or
    of the answers in conversations. Several sources are also listed one by one.
    """
    each = torch.tensor([part.bytes_per_target for part in val.parts], dtype=sums.dtype)
    num_bytes = sums[:, 0] @ each
    targets, nats = sums.sum(0)
    bits = nats / math.log(2)
    scores = {
        "val_loss": (nats / targets).item(),
        "val_bits_per_byte": (bits / num_bytes).item(),
    }
    if len(val.parts) > 1:
        for name, (count, loss) in zip(val.folders, sums):
            scores[f"val_loss {name}"] = (loss / count).item()
    return scores


def count_targets(targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many targets (B, T) count, and how many of the B sequences have none."""
    counted = targets != IGNORE
    return counted.sum(), (~counted.any(1)).sum()


def for_loss(model: nn.Module, targets: Tensor) -> Tensor | OnHost:
    """Targets as a model's loss takes them: on the host, see lib/kernels.py; but where a variant
    has a loss of its own, FSDP may bring them to its logits."""
    variant = variant_of(type(model.config))
    return targets if variant and variant.own_loss else OnHost(targets)


class DPO:
    """Direct preference optimization (Rafailov et al. 2023, equation 7).

    Rows are chosen, rejected, chosen, … A reward is beta times the log-probability of an answer's
    targets, less that under the reference: the model as it was before training; with LoRA, the same
    model without its adapters.
    """

    unit, names = "pairs", ("loss", "margin", "correct", "drift", "targets")

    def __init__(self, beta: float, reference: nn.Module | None = None):
        self.beta, self.reference = beta, reference

    def counts(self, batch) -> Tensor:
        """Pairs, their targets, and rows without any.

        What fills a batch up has no targets and is no pair.
        """
        pairs = (batch.targets[::2] != IGNORE).any(1).sum()
        return torch.stack((pairs, *count_targets(batch.targets)))

    def log_probs(self, batch) -> Tensor:
        """The log-probability of each target (B, T) under the reference."""
        targets = for_loss(self.reference, batch.targets)
        with torch.no_grad(), without_adapters(self.reference):
            return self.reference.log_probs(batch.tokens, targets, batch.documents)

    def sums(self, model: nn.Module, batch) -> Tensor:
        """Of all pairs, one sum for each of names.

        The loss in nats; by how much the chosen answer's reward exceeds the rejected one's; whether
        it does; the log-probability of the chosen answer's targets, less that under the reference;
        these targets.
        """
        before = self.log_probs(batch)
        after = model.log_probs(batch.tokens, for_loss(model, batch.targets), batch.documents)
        drifts = (after - before).sum(1)  # of each row
        chosen, rejected = drifts.unflatten(0, (-1, 2)).unbind(1)
        margin = self.beta * (chosen - rejected)
        targets = (batch.targets[::2] != IGNORE).sum(1)
        targets = targets.to(margin.device, non_blocking=True)
        moved = margin.detach()
        each = (
            -F.logsigmoid(margin),
            moved,
            (moved > 0).float(),
            chosen.detach(),
            targets.float(),
        )
        return (torch.stack(each) * (targets > 0)).sum(1)

    def scores(self, means: list[float]) -> dict[str, float]:
        """kl is a proxy for the distance from the reference: the drift a target."""
        loss, margin, correct, drift, targets = means
        kl = drift / targets if targets else 0.0
        return dict(loss=loss, margin=margin, accuracy=correct, kl=kl)

    def validation(self, sums: Tensor, val) -> dict[str, float]:
        """Scores of validation sums (sources, 1 + names), the first the pairs."""
        pairs, *totals = sums.sum(0).tolist()
        means = self.scores([total / pairs for total in totals])
        scores = {f"val_{name}": mean for name, mean in means.items()}
        scores["val_pairs"] = int(pairs)
        return scores

    def in_words(self, scores: dict[str, float]) -> str:
        pairs, margin = scores["val_pairs"], scores["val_margin"]
        return f"accuracy {scores['val_accuracy']:.1%} of {pairs}, margin {margin:.4f}"


def noise(batch, dim: int, alpha: float, seed: int) -> Tensor:
    """Noise (B, T, D) for the embeddings, uniform up to alpha / sqrt(T · D) (Jain et al. 2023).

    On one kind of device that of a sequence is a function of the seed and of its number in the run.
    """
    drawn = torch.empty(*batch.tokens.shape, dim, device=batch.tokens.device)
    for number, row in zip(batch.numbers, drawn, strict=True):
        digest = hashlib.sha256(f"{seed} neftune {number}".encode()).digest()
        generator = torch.Generator(drawn.device)
        generator.manual_seed(int.from_bytes(digest[:7]))
        row.uniform_(-1, 1, generator=generator)
    return drawn.mul_(alpha / math.sqrt(drawn[0].numel()))


@contextlib.contextmanager
def noisy(model: nn.Module, batch, alpha: float, seed: int) -> Iterator[None]:
    """Inside, what is trained has `noise` on its embeddings.

    Without an alpha, and in evaluation, nothing changes.
    """
    if not alpha or not torch.is_grad_enabled():
        yield
        return
    added = noise(batch, model.config.dim, alpha, seed)

    def add(module: nn.Module, inputs: tuple, x: Tensor) -> Tensor:
        return x + added.to(x.dtype)

    hook = model.embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
