"""A vision tower, and a language model that reads what the tower sees: LLaVA (Liu et al. 2023, arXiv:2304.08485)."""

import io
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scenes import ANSWERS, COLORS, PATCH, Batches, Test, caption, paint, patches_of

from data import Dataset, Tokenizer
from lib.errors import BadInput
from lib.files import write_whole
from model import IGNORE, Transformer

WIDTH = 64  # channels of the tower


class Tower(nn.Module):
    """Patches (B, P, 48) through three layers; `forward` says which colors and which shapes are there (B, 10)."""

    def __init__(self, patches: int):
        super().__init__()
        self.patch, self.place = nn.Linear(3 * PATCH**2, WIDTH), nn.Parameter(0.02 * torch.randn(patches, WIDTH))
        shape = dict(d_model=WIDTH, nhead=4, dim_feedforward=2 * WIDTH, dropout=0.0)
        layers = (nn.TransformerEncoderLayer(**shape, batch_first=True, norm_first=True) for _ in range(3))
        self.layers, self.out = nn.ModuleList(layers), nn.Linear(WIDTH, 10)

    def features(self, patches: Tensor) -> Tensor:
        """What the last layer but one makes of each patch (B, P, 64), as LLaVA takes it from CLIP."""
        x = self.patch(patches) + self.place
        for layer in self.layers[:-1]:
            x = layer(x)
        return x

    def forward(self, patches: Tensor) -> Tensor:
        return self.out(self.layers[-1](self.features(patches)).mean(1))


class Seeing(nn.Module):
    """A language model that reads projected features of a picture in place of the embeddings of tokens 1 to P.

    The projection begins so wide that these patches' features come out as wide as the embeddings of words.
    """

    def __init__(self, tower: Tower, language: Transformer, patches: Tensor, blind: bool = False):
        super().__init__()
        self.tower, self.language, self.blind = tower.requires_grad_(False), language, blind
        self.project = nn.Linear(WIDTH, language.config.dim)
        scale = (language.embedding.weight.std() / tower.features(patches).norm(dim=-1).mean()).item()
        nn.init.normal_(self.project.weight, 0, scale)
        nn.init.zeros_(self.project.bias)
        self.seen = None
        language.embed = self.embed

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.language.embedding(tokens)
        if self.seen is None:  # no picture: the language model as it is
            return x
        return torch.cat((x[:, :1], self.seen, x[:, 1 + self.seen.size(1) :]), 1)

    def look(self, patches: Tensor | None):
        """Let what is read from now on have these pictures (B, P, 48) behind its first token."""
        self.seen = None if patches is None else self.project(self.tower.features(patches)) * (not self.blind)


def rows_of(tokenizer: Tokenizer, pairs: list[tuple[str, str]], patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets (B, T) of questions and answers, the answers alone targets; where questions end (B,)."""
    rows = []
    for asked, answer in pairs:
        whole = [tokenizer.bos_id, *[0] * patches, *tokenizer.encode(f"{asked} Answer: {answer}"), tokenizer.eos_id]
        rows.append((whole, patches + len(tokenizer.encode(f"{asked} Answer:"))))
    longest = max(len(whole) for whole, _ in rows) - 1
    tokens, targets = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), IGNORE)
    for row, (whole, last) in enumerate(rows):
        tokens[row, : len(whole) - 1] = torch.tensor(whole[:-1])
        targets[row, last : len(whole) - 1] = torch.tensor(whole[last + 1 :])
    return tokens, targets, torch.tensor([last for _, last in rows])


def tower_losses(tower: Tower, batches: Batches) -> Iterator[Tensor]:
    """Of saying which colors and which shapes are in a picture."""
    for batch, patches in batches:
        there = torch.zeros(len(batch), 10)
        for row, one in enumerate(batch):
            for color, shape, _, _ in one.objects:
                there[row, color] = there[row, len(COLORS) + shape] = 1
        yield F.binary_cross_entropy_with_logits(tower(patches), there)


def losses(model: Seeing, batches: Batches, captions: bool, tokenizer: Tokenizer, mixed=None) -> Iterator[Tensor]:
    """Nats a target of captions or answers; with windows of text (tokens, targets), 30 % of the loss is theirs."""
    for batch, patches in batches:
        pairs = [("Describe.", caption(one.objects)) if captions else (one.asked, one.answer) for one in batch]
        tokens, targets, _ = rows_of(tokenizer, pairs, patches.size(1))
        model.look(patches)
        loss = model.language(tokens, targets)
        if mixed is not None:
            model.look(None)
            loss = 0.7 * loss + 0.3 * model.language(*next(mixed))
        yield loss


@torch.no_grad()
def right(model: Seeing, tokenizer: Tokenizer, size: int, asked: list[Test]) -> list[bool]:
    """Whether the right answer's first token is likelier than those of the other answers of its kind, of each test.

    Raises ValueError where a tokenizer begins two of them alike.
    """
    begins, found = len(tokenizer.encode("Answer:")), []
    first = {kind: [tokenizer.encode(f"Answer: {word}")[begins] for word in ANSWERS[kind]] for kind in ANSWERS}
    if any(len(set(tokens)) < len(tokens) for tokens in first.values()):
        raise BadInput("this tokenizer has answers that begin with the same token")
    for begin in range(0, len(asked), 100):
        part = asked[begin : begin + 100]
        patches = patches_of([paint(test.objects, size) for test in part])
        tokens, _, last = rows_of(tokenizer, [(test.asked, test.answer) for test in part], patches.size(1))
        model.look(patches)
        logits = model.language.unembedding(model.language.hidden(tokens)[torch.arange(len(part)), last])
        for row, test in zip(logits, part):
            found.append(ANSWERS[test.kind][int(row[first[test.kind]].argmax())] == test.answer)
    return found


@torch.no_grad()
def bits(model: Seeing, folder: Path, windows: int = 96) -> list[float]:
    """A byte of a dataset's validation text without pictures, in windows of 256 tokens spread over it."""
    model.look(None)
    data, found = Dataset(folder, "val", 256), []
    for index in data.spread_indices(windows):
        batch = data.batch([index]).to(torch.device("cpu"))
        found.append(float(model.language(batch.tokens, batch.targets)) / math.log(2) / data.bytes_per_target)
    return found


def kept(path: Path, module: nn.Module, make: Callable):
    """Give the module the weights in a file, or train it by make() and write them there."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
    else:
        make()
        held = io.BytesIO()
        torch.save(module.state_dict(), held)
        write_whole(path, held.getvalue())
