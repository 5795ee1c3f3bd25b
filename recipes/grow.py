"""Grow the vocabulary of a model: its tokenizer takes on another's pieces, and its matrices get a row for each.

    python recipes/grow.py --model A --tokenizer NEW.model --rows pieces --out C

Ids of A stay what they are; the pieces of NEW.model that A lacks follow behind them, in their order and with their
scores, up to --size. New rows are, of embedding and output:
    random   normal, of the spread of the old rows
    mean     the mean of all old rows
    pieces   the mean of the rows of the old pieces that the new one's text had (Gee et al. 2022)
    first    in the embedding as pieces; in the output the row of the first of them, since what a model says of a text
             so far is how likely its first old piece is. One matrix for both ends cannot have it.
train.py --init_from C goes on with data made by data.py --tokenizer C; its optimizer begins anew.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Tokenizer
from lib.cli import BadInput, run_command
from lib.runs import find_template
from model import Transformer, empty, save
from sample import load_model

NORMAL = ModelProto.SentencePiece.NORMAL  # a piece of text: no byte, no control token


def merge(old: bytes, new: bytes, size: int = 0) -> bytes:
    """One file of sentencepiece from two: old's pieces, then those that only new has, up to size (0 takes all)."""
    merged, other = ModelProto.FromString(old), ModelProto.FromString(new)
    if merged.trainer_spec.model_type != other.trainer_spec.model_type:
        raise BadInput("tokenizers of two kinds, such as BPE and unigram, cannot be merged: their scores differ")
    known = {piece.piece for piece in merged.pieces}
    more = [piece for piece in other.pieces if piece.type == NORMAL and piece.piece not in known]
    merged.pieces.extend(more[: max(0, size - len(known))] if size else more)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged.SerializeToString(deterministic=True)


def unreachable(tokenizer: bytes, begin: int = 0) -> list[str]:
    """The pieces from an id on that no text gives. What lies around a piece can only prevent it: its text decides."""
    proto = ModelProto.FromString(tokenizer)
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    pieces = list(enumerate(proto.pieces))[begin:]
    return [p.piece for number, p in pieces if p.type == NORMAL and model.encode(p.piece) != [number]]


def read(tokenizer: bytes) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(tokenizer)
        return Tokenizer(folder)


def old_pieces(old: Tokenizer, merged: Tokenizer) -> list[list[int]]:
    """The ids by which old writes each new piece of merged."""
    new = range(old.vocab_size, merged.vocab_size)
    return [old.encode_after(merged.codec.model.id_to_piece(number).replace("▁", " ")) for number in new]


def new_rows(weight: torch.Tensor, pieces: list[list[int]], rows: str, draw: torch.Generator) -> torch.Tensor:
    """Rows for new pieces, each given by its old ones, from the old rows (V, D)."""
    if rows == "random":
        return weight.std() * torch.randn(len(pieces), weight.size(1), generator=draw)
    if rows == "mean":
        return weight.mean(0).expand(len(pieces), -1)
    return torch.stack([weight[ids[:1] if rows == "first" else ids].mean(0) for ids in pieces])


@torch.no_grad()
def grow(model: Transformer, known: int, pieces: list[list[int]], rows: str, seed: int = 0) -> Transformer:
    """A model with rows for new pieces behind those of the known ids; what stood there was padding."""
    if model.config.tie_embeddings and rows == "first":
        raise BadInput("--rows first needs an output matrix of its own, and this model's is its embedding")
    draw = torch.Generator().manual_seed(seed)
    larger = empty(replace(model.config, vocab_size=known + len(pieces)), "cpu", model.norm.weight.dtype)
    for name, old in model.named_parameters():
        if name in ("embedding.weight", "unembedding.weight"):
            way = "pieces" if rows == "first" and name == "embedding.weight" else rows
            old = torch.cat((old[:known], new_rows(old[:known], pieces, way, draw).to(old.dtype)))
        larger.get_parameter(name).copy_(old)
    return larger.eval()


@dataclass
class Config:
    """Grow the vocabulary of a model."""

    model: str
    tokenizer: str  # of the new language, or one merged before: a tokenizer.model or its folder
    out: str        # a Hugging Face folder to write
    rows: Literal["random", "mean", "pieces", "first"] = "pieces"
    size: int = 0   # of the merged vocabulary, at most; 0 takes all pieces
    seed: int = 0   # of random rows
    trust_variant: bool = False


def main(config: Config):
    (model, old), new = load_model(config.model, dtype="fp32"), Tokenizer(config.tokenizer)
    if {old.file, new.file} != {"tokenizer.model"}:
        raise BadInput(f"{old.name} and {new.name} are not both files of sentencepiece, tokenizer.model")
    merged = read(merge(old.data, new.data, config.size))
    if not (pieces := old_pieces(old, merged)):
        raise BadInput(f"{config.tokenizer} has no piece to add up to --size {config.size}")
    larger = grow(model.cpu(), old.vocab_size, pieces, config.rows, config.seed)
    save(larger, config.out, merged, find_template(config.model))
    lost = unreachable(merged.data, old.vocab_size)
    print(f"wrote {config.out}: {len(pieces):,} new pieces; no text gives {len(lost):,} of them, as {lost[:5]}")


if __name__ == "__main__":
    run_command(main, Config)
