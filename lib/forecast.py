"""What a run will need: bytes on each GPU at the peak of a step, and those of a checkpoint."""

from typing import NamedTuple

from torch import nn

from lib.kernels import LOSS_CHUNK, blocks_together
from lib.optimizers import matrices

LOGIT_BYTES = {  # by size of a number and whether the loss is compiled: of a logit, at its own peak
    (2, False): 6,  # bf16, and an fp32 copy
    (4, False): 4,
    (2, True): 4,   # bf16, and its gradient
    (4, True): 12,  # logits, exponentials and gradient
}


class Tally(NamedTuple):
    """What the parameters of a model or a block come to, before sharding."""

    stored: int    # bytes
    gathered: int  # bytes as the arithmetic takes them
    trained: int   # numbers that have a gradient


def tally(part: nn.Module, size: int) -> Tally:
    """size is that of a number in the arithmetic, in bytes."""
    stored = gathered = trained = 0
    for p in part.parameters():
        stored += p.nbytes
        gathered += p.numel() * (size if p.is_floating_point() else 1)
        trained += p.numel() if p.requires_grad else 0
    return Tally(stored, gathered, trained)


# ---- what is kept for the backward pass ----


def kept_bytes(
    shape,
    mode: str,
    compiled: bool,
    size: int,
    rank: int = 0,
    targets: str = "",
    dropout: bool = False,
) -> int:
    """Bytes that one block keeps of a token for its backward pass, under --checkpointing mode.

    size is that of a number in the arithmetic; rank, targets and dropout are LoRA's.
    """
    dim, ffn_dim = shape.dim, shape.ffn_dim
    q_dim, kv_dim = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    normalizers = 4 * shape.num_heads  # of attention, in fp32
    if mode == "full":
        return size * dim  # the input
    if mode == "selective":
        products = dict(query=q_dim, value=kv_dim, gate=ffn_dim, down=dim)  # of seven
        numbers = dict(input=dim, attention=q_dim, **products)
        return size * sum(numbers.values()) + normalizers
    numbers = dict(query=q_dim, key=kv_dim, value=kv_dim, attention=q_dim)
    numbers |= dict(gate=ffn_dim, up=ffn_dim, product=ffn_dim)
    if compiled:
        numbers |= dict(input=dim, normed=2 * dim, out=dim)
        norms = 8  # a number for each, in fp32
    else:
        numbers |= dict(activated=ffn_dim)  # the gate after SiLU, which also keeps its input
        norms = 2 * (4 + 2 * size) * dim + 8  # an fp32 copy, the normed and the scaled input
    if rank:
        numbers |= dict(adapters=_beside_adapters(shape, compiled, rank, targets))
    masks = 0
    if dropout and compiled:
        numbers["dropped"], masks = _dropped(shape, targets)
    return size * sum(numbers.values()) + normalizers + norms + masks


def _beside_adapters(shape, compiled: bool, rank: int, targets: str) -> int:
    """Numbers a token that adapters add to what a block keeps, less what frozen matrices spare."""
    adapted = set(targets.split(","))
    numbers = rank * len(adapted)  # x A^T; but frozen matrices need no inputs
    if not adapted & {"query", "key", "value"}:
        numbers -= shape.dim
    if not adapted & {"gate", "up"}:
        numbers -= shape.dim
    if "down" not in adapted:
        numbers -= shape.ffn_dim
    if not compiled:
        numbers -= 2 * shape.dim  # frozen norms need no normed inputs, which eager code keeps
    return numbers


def _dropped(shape, targets: str) -> tuple[int, int]:
    """Numbers and bytes a token that dropout adds in a compiled block: every matrix keeps its own
    input and its mask, where else several share an input, or attention keeps it. Eager code makes
    them again."""
    adapted = set(targets.split(","))
    readers = adapted - {"out", "down"}  # of the normed stream
    attention, ffn = len(readers & {"query", "key", "value"}), len(readers & {"gate", "up"})
    q_dim = shape.num_heads * shape.head_dim * ("out" in adapted)
    masks = len(readers) * shape.dim + q_dim + shape.ffn_dim * ("down" in adapted)
    return shape.dim * (max(0, attention - 1) + max(0, ffn - 1)) + q_dim, masks


def _activations(shape, config, compiled: bool, size: int) -> tuple[int, int]:
    """Bytes of a token that all blocks keep, and those of one block that is computed again."""
    modes = [config.checkpointing] * shape.num_layers
    if config.checkpointing.isdigit():
        every = int(config.checkpointing)
        modes = ["none" if layer % every else "full" for layer in range(shape.num_layers)]
    adapted = (config.lora_rank, config.lora_targets, config.lora_dropout > 0)
    kept = sum(kept_bytes(shape, mode, compiled, size, *adapted) for mode in modes)
    if set(modes) == {"none"}:
        return kept, 0
    # it then has all it keeps, and gradients of it
    whole = kept_bytes(shape, "none", compiled, size, *adapted)
    gradients = size * (2 * shape.ffn_dim + shape.dim)
    return kept, whole + gradients


# ---- the peak of a step ----


def forecast(
    model: nn.Module, config, num_ranks: int, compiled: bool, pairs: bool = False
) -> dict[str, int]:
    """Bytes on each rank at the peak of a step, by what they are for.

    What the allocator and NCCL need is not in it. model is the one to train, on whatever device.
    Pairs have two rows each, here of full length, and a frozen reference. The peak is at one of
    three moments: in the loss, when all activations are kept; in the backward pass of the last
    block, the same; or in that of the first, when the gradients of all others are there instead.
    """
    shape = model.config
    size = 4 if config.dtype == "fp32" else 2
    whole, block = tally(model, size), tally(model.blocks[0], size)
    together = min(blocks_together(model.blocks[0]), shape.num_layers)
    sharers = config.shard_over or num_ranks
    shard = whole.trained // sharers
    rows = config.micro_batch or config.batch_size // num_ranks
    tokens = rows * config.seq_len * (2 if pairs else 1)

    kept, again = _activations(shape, config, compiled, size)
    earlier = _earlier_gradients(config, num_ranks, whole, shard)
    gradients = (4 + size) * together * block.trained  # as they are computed, and as they are reduced
    in_loss = dict(
        gradients=earlier,
        activations=tokens * kept,
        logits=_logits(model, tokens, compiled, size),
    )
    in_last = dict(
        gradients=earlier + gradients,
        activations=tokens * (kept + again),
        logits=0,
    )
    in_first = dict(
        gradients=max(earlier, 4 * shard) + gradients,
        activations=tokens * again,
        logits=0,
    )
    parts = dict(
        weights=whole.stored // sharers,
        moments=_moments(model, config, whole, sharers),
        gathered=_gathered(shape, config, whole, block, size, together),
    )
    if pairs and not config.lora_rank:
        parts["reference"] = whole.gathered // sharers
    return parts | max(in_loss, in_last, in_first, key=lambda moment: sum(moment.values()))


def _logits(model: nn.Module, tokens: int, compiled: bool, size: int) -> int:
    """Bytes of logits, and of the gradient of the output matrix, at the peak of the loss."""
    chunk = 4 * LOSS_CHUNK if compiled and size == 2 else LOSS_CHUNK
    in_chunk = min(tokens, chunk) * model.config.vocab_size
    trained = 0  # numbers of the output matrix
    if model.unembedding.weight.requires_grad:
        trained = model.config.vocab_size * model.config.dim
    alone = size == 4 and tokens <= chunk
    products = 4 if alone else 4 + size  # the matrix's gradient, and a chunk's beside it
    first_chunks = LOGIT_BYTES[size, compiled] * in_chunk
    if tokens > chunk:
        first_chunks += 4 * trained
    return max(first_chunks, size * in_chunk + products * trained)


def _earlier_gradients(config, num_ranks: int, whole: Tally, shard: int) -> int:
    """Bytes of earlier micro-batches' gradients: whole until the last one reduces them."""
    if config.micro_batch in (0, config.batch_size // num_ranks):
        return 0
    return 4 * (shard if config.reduce_each else whole.trained)


def _moments(model: nn.Module, config, whole: Tally, sharers: int) -> int:
    """Bytes of the optimizers' moments on a rank, two numbers a weight in fp32."""
    shard = whole.trained // sharers
    moments = 8 * shard
    if config.optimizer == "muon":  # one moment for the blocks' matrices instead of two
        moments -= 4 * sum(p.numel() for p in matrices(model.blocks)) // sharers
    return moments


def checkpoint_bytes(model: nn.Module, config) -> int:
    """Bytes on disk of a checkpoint: all weights, with LoRA only the adapters, and the moments."""
    whole = tally(model, 4)
    weights = 4 * whole.trained if config.lora_rank else whole.stored
    return weights + _moments(model, config, whole, 1)


def _gathered(shape, config, whole: Tally, block: Tally, size: int, together: int) -> int:
    """Bytes of the weights that are there whole: twice the blocks that are gathered together and an
    end, or all of them."""
    gathered = whole.gathered
    if config.reshard_after_forward:
        unit = together * block.gathered
        gathered = min(gathered, 2 * unit + size * shape.vocab_size * shape.dim)
    if config.quantize == "nf4":  # the largest matrix, unpacked
        gathered += size * shape.dim * max(shape.dim, shape.ffn_dim)
    return gathered
