"""What a run will need: bytes on each GPU at the peak of a step, floating-point operations, hours."""

from typing import NamedTuple

from torch import nn

from lib.kernels import LOSS_CHUNK

LOGIT_BYTES = {  # by size of a number and whether the loss is compiled: of a logit, at the loss's own peak
    (2, False): 6,  # bf16, and an fp32 copy
    (4, False): 4,
    (2, True): 4,   # bf16, and its gradient
    (4, True): 12,  # logits, exponentials and gradient
}


def kept_bytes(shape, mode: str, compiled: bool, size: int, rank: int = 0, targets: str = "") -> int:
    """Bytes that one block keeps of a token for its backward pass.

    size is that of a number in the arithmetic; rank and targets are LoRA's.
    """
    dim, kv_dim, ffn_dim = shape.dim, shape.num_kv_heads * shape.head_dim, shape.ffn_dim
    attention = 4 * shape.num_heads  # its fp32 normalizers
    if mode == "full":
        return size * dim  # the input
    if mode == "selective":  # input, attention's output, and of the seven products query, value, gate and down
        return size * (4 * dim + kv_dim + ffn_dim) + attention
    adapters = size * _kept_beside_adapters(shape, compiled, rank, targets) if rank else 0
    if compiled:
        # input, two normed inputs, query, key, value, attention's output, out, gate, up, their product
        return size * (6 * dim + 2 * kv_dim + 3 * ffn_dim) + attention + 8 + adapters
    # the norms keep an fp32 copy, the normed and the scaled input; SiLU keeps its input, the product its factors
    norms = 2 * (4 + 2 * size) * dim
    return norms + size * (2 * dim + 2 * kv_dim + 4 * ffn_dim) + attention + 8 + adapters


def _kept_beside_adapters(shape, compiled: bool, rank: int, targets: str) -> int:
    """Numbers a token that adapters add to what a block keeps, less those that a frozen block can spare."""
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


class Tally(NamedTuple):
    """What the parameters of a model or a block come to, before sharding."""

    stored: int    # bytes
    gathered: int  # bytes as the arithmetic takes them
    trained: int   # numbers that have a gradient


def tally(part: nn.Module, size: int) -> Tally:
    parameters = list(part.parameters())
    gathered = sum(p.numel() * (size if p.is_floating_point() else 1) for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Tally(sum(p.nbytes for p in parameters), gathered, trained)


def forecast(model: nn.Module, config, world: int, compiled: bool, pairs: bool = False) -> dict[str, int]:
    """Bytes on each rank at the peak of a step, by what they are for; the allocator's and NCCL's are not in it.

    model is the one to train, on the meta device. Pairs have two rows each, here of full length, and a frozen
    reference. The peak is at one of three moments: in the loss, when all activations are kept; in the backward pass
    of the last block, the same; or in that of the first, when the gradients of all others are there instead.
    """
    shape, size = model.config, 4 if config.dtype == "fp32" else 2
    whole, block = tally(model, size), tally(model.blocks[0], size)
    ends = shape.vocab_size * shape.dim  # numbers in the embedding, and in the output
    share = config.batch_size // world
    tokens = (config.micro_batch or share) * config.seq_len * (2 if pairs else 1)
    ranks = config.shard_over or world
    shard = whole.trained // ranks

    kept, again = _activations(shape, config, compiled, size)
    chunk = 4 * LOSS_CHUNK if compiled and size == 2 else LOSS_CHUNK
    in_chunk = min(tokens, chunk) * shape.vocab_size
    trained_ends = ends if model.unembedding.weight.requires_grad else 0
    # the weight's gradient, and a chunk's beside it
    product = 4 if size == 4 and tokens <= chunk else 4 + size
    first_chunks = LOGIT_BYTES[size, compiled] * in_chunk + (4 * trained_ends if tokens > chunk else 0)
    logits = max(first_chunks, size * in_chunk + product * trained_ends)
    gradients = (4 + size) * block.trained  # as they are computed, and as they are reduced
    earlier = 0  # gradients of earlier micro-batches: whole until the last one reduces them
    if config.micro_batch not in (0, share):
        earlier = 4 * (shard if config.reduce_each else whole.trained)
    gathered = 2 * block.gathered + size * ends if config.reshard_after_forward else whole.gathered
    if config.quantize == "nf4":  # the largest matrix, unpacked
        gathered += size * shape.dim * max(shape.dim, shape.ffn_dim)
    loss = dict(gradients=earlier, activations=tokens * kept, logits=logits)
    last = dict(gradients=earlier + gradients, activations=tokens * (kept + again), logits=0)
    first = dict(gradients=max(earlier, 4 * shard) + gradients, activations=tokens * again, logits=0)
    peak = max((loss, last, first), key=lambda parts: sum(parts.values()))
    moments = 8 * shard
    if config.optimizer == "muon":  # one moment for the blocks' matrices instead of two
        trained = (p for p in model.blocks.parameters() if p.requires_grad and p.dim() >= 2)
        moments -= 4 * sum(p.numel() for p in trained) // ranks
    parts = {"weights": whole.stored // ranks, "moments": moments, "gathered": gathered}
    if pairs and not config.lora_rank:
        parts["reference"] = whole.gathered // ranks
    return parts | peak


def _activations(shape, config, compiled: bool, size: int) -> tuple[int, int]:
    """Bytes of a token that all blocks keep, and those of one block whose forward pass is computed again."""
    modes = [config.checkpointing] * shape.num_layers
    if config.checkpointing.isdigit():
        every = int(config.checkpointing)
        modes = ["none" if layer % every else "full" for layer in range(shape.num_layers)]
    adapted = (config.lora_rank, config.lora_targets)
    kept = sum(kept_bytes(shape, mode, compiled, size, *adapted) for mode in modes)
    if set(modes) == {"none"}:
        return kept, 0
    # it then has all it keeps, and gradients of it
    whole = kept_bytes(shape, "none", compiled, size, *adapted)
    return kept, whole + size * (2 * shape.ffn_dim + shape.dim)
