"""LLaMA-2, the whole model in one file (Touvron et al. 2023, arXiv:2307.09288).

Comments give tensor shapes in these letters:

    B  sequences in the batch    H  query heads               D  model width
    T  tokens in a sequence      G  key/value heads, G <= H   F  feed-forward width
    V  vocabulary                K  width of one head         S  slots of the key/value cache

Read `Transformer.hidden` first, then what it calls. lib/kernels.py has what is faster than the
plain formula and computes the same; lib/weights.py and lib/formats.py know the files of models.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config_checks import check_config
from lib.errors import BadInput
from lib.kernels import IGNORE, CrossEntropy
from lib.packed import Documents, attend_within
from lib.rows import fill_normal, local_rows


@dataclass(frozen=True)
class ModelConfig:
    dim: int                       # D, a multiple of 2 * num_heads: rotary pairs of channels
    num_layers: int
    num_heads: int                 # H
    num_kv_heads: int              # G = H: multi-head; 1: multi-query; between: grouped-query
    ffn_dim: int                   # F
    vocab_size: int = 32_000       # V
    max_seq_len: int = 4096        # tokens; the context window
    rope_theta: float = 10_000.0   # base of the rotary wavelengths
    rope_scale: float = 1.0        # position interpolation (Chen et al. 2023) divides by this
    rope_window: int = 0           # Llama 3's first window, by which it spares short wavelengths
    norm_eps: float = 1e-5
    tie_embeddings: bool = False   # one matrix for the embedding and the output
    head_size: int = 0             # K where it is not dim / num_heads

    def __post_init__(self):
        check_config(self)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.num_heads

    def build(self) -> "Transformer":
        return Transformer(self)  # of a variant's config the variant, see lib/variants.py


SIZES = {
    # LLaMA-2
    "7B": ModelConfig(4096, 32, 32, 32, 11008),
    "13B": ModelConfig(5120, 40, 40, 40, 13824),
    "70B": ModelConfig(8192, 80, 64, 8, 28672),
    # LLaMA-1, OpenLLaMA, TinyLlama
    "33B": ModelConfig(6656, 60, 52, 52, 17920, max_seq_len=2048, norm_eps=1e-6),
    "65B": ModelConfig(8192, 80, 64, 64, 22016, max_seq_len=2048),
    "3B": ModelConfig(3200, 26, 32, 32, 8640, max_seq_len=2048, norm_eps=1e-6),
    "1.1B": ModelConfig(2048, 22, 32, 4, 5632, max_seq_len=2048),
    # tinyllamas, the models of llama2.c
    "110M": ModelConfig(768, 12, 12, 12, 2048, max_seq_len=1024, tie_embeddings=True),
    "42M": ModelConfig(512, 8, 8, 8, 1376, max_seq_len=1024, tie_embeddings=True),
    "15M": ModelConfig(288, 6, 6, 6, 768, max_seq_len=256, tie_embeddings=True),
    "260K": ModelConfig(64, 5, 8, 4, 172, vocab_size=512, max_seq_len=512, tie_embeddings=True),
    # for two laptop cores
    "laptop": ModelConfig(128, 4, 4, 4, 352, vocab_size=4096, max_seq_len=256, tie_embeddings=True),
}


class RMSNorm(nn.Module):
    """Divide each token by its root mean square, then scale every channel by a learned weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # a mean of squares needs more than the 8 bits of bf16
        mean_square = x32.square().mean(-1, keepdim=True)
        return self.weight * (x32 * torch.rsqrt(mean_square + self.eps)).type_as(x)


Rope = tuple[Tensor, Tensor]  # cosines and sines, see rope_table


def rope_table(config: ModelConfig, positions: Tensor) -> Rope:
    """Cosine and sine of the angle of every channel pair at these positions (…, T).

    Two fp32 tensors (…, T, K/2). Computed where used, never stored: `model.to(bfloat16)` would
    round it, and after initialisation on the meta device it would be garbage.
    """
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_wavelength = 1.0 / (config.rope_theta ** (channel / config.head_dim))
    stretched = inverse_wavelength / config.rope_scale
    # Llama 3 keeps pairs that turn 4 times in its first window, and part of what turns once
    turns = inverse_wavelength * config.rope_window / (2 * math.pi)
    inverse_wavelength = stretched.lerp(inverse_wavelength, ((turns - 1) / 3).clamp(0, 1))
    angles = positions[..., None].float() * inverse_wavelength
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn channel pairs (i, i + K/2) of x (B, T, heads, K) by the angles of their positions.

    This is the order of Hugging Face folders; Meta's and llama2.c's files pair neighbours.
    """
    cos, sin = (table.unsqueeze(-2) for table in rope)  # (…, T, 1, K/2)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class KVCache:
    """The keys and values of the tokens read so far: of row b the first lengths[b].

    Pass it to `Transformer.forward` with the next chunk (B, T) of tokens, of any size. Rows may
    differ in length: pad a chunk on the right, then `trim` to the true lengths; what was padding is
    overwritten by the next chunk, and until then no query can see it, because its position lies in
    the future.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        # (layers, B, G, S, K)
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0  # the largest of lengths, known to the host without waiting for the device

    def begin(self, num_tokens: int) -> Tensor:
        """Positions (B, T) of the next chunk; sets the mask that its attention uses."""
        if (need := self.longest + num_tokens) > self.keys.size(3):
            raise BadInput(f"{need} tokens do not fit in a cache of {self.keys.size(3)}")
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        slots = torch.arange(need, device=self.lengths.device)
        rows = torch.arange(len(positions), device=positions.device)
        self.places = rows[:, None], slice(None), positions  # of the chunk, in one layer
        self.mask = None  # queries and keys start together: plainly causal
        if self.longest:
            # (B, 1, T, S), added to the scores; booleans would be converted by every layer
            future = slots > positions[..., None]
            mask = torch.zeros_like(future, dtype=self.keys.dtype)
            self.mask = mask.masked_fill_(future, -math.inf)[:, None]
        return positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the chunk's k and v (B, G, T, K), without gradient; return those of all tokens so
        far (B, G, S, K)."""
        filled = self.longest + k.size(2)
        all_tokens = []
        for kept, new in ((self.keys[layer], k), (self.values[layer], v)):
            kept[self.places] = new.detach().transpose(1, 2).to(kept.dtype)
            all_tokens.append(kept[:, :, :filled])
        return tuple(all_tokens)

    def end(self, num_tokens: int):
        self.lengths += num_tokens
        self.longest += num_tokens

    def trim(self, lengths: list[int]):
        """Forget all but the first lengths[b] tokens of each row b."""
        self.lengths.copy_(torch.tensor(lengths))
        self.longest = max(lengths)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What q (B, H, T, K) reads from k and v (B, G, S, K), each query from its own past.

    is_causal is right only where queries and keys start together; a filled cache brings its mask.
    """
    causal, grouped = mask is None, q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`causal_attention` written out, for train.py --attention plain: softmax(Q Kᵀ / √K) V."""
    k, v = (heads.repeat_interleave(q.size(1) // k.size(1), 1) for heads in (k, v))
    scores = q @ k.mT / q.size(-1) ** 0.5                     # (B, H, T, S)
    if mask is None:
        mask = torch.full(scores.shape[-2:], -math.inf, device=q.device).triu(1)
    return (scores + mask).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Causal self-attention, H query heads sharing G key/value heads."""

    attend = staticmethod(causal_attention)  # train.py may install one that suits a CPU better
    attend_within = staticmethod(attend_within)

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.dim, q_dim, bias=False)
        self.key = nn.Linear(config.dim, kv_dim, bias=False)
        self.value = nn.Linear(config.dim, kv_dim, bias=False)
        self.out = nn.Linear(q_dim, config.dim, bias=False)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.key(x).unflatten(-1, (-1, self.head_dim))    # (B, T, G, K)
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        return rotate(q, rope), rotate(k, rope), v

    def forward(
        self, x: Tensor, rope: Rope, cache: KVCache | None, documents: Documents | None
    ) -> Tensor:
        q, k, v = self.heads(x, rope)
        if documents is not None:                             # packed rows
            return self.out(self.attend_within(q, k, v, documents).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)             # (B, G, S, K)
            mask = cache.mask
        y = self.attend(q, k, v, mask)                        # (B, H, T, K)
        return self.out(y.transpose(1, 2).flatten(2))         # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: a SiLU gate multiplies the up-projection, then project back down (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: each half normalises its input and adds its output to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rope: Rope, cache: KVCache | None, documents: Documents | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, documents)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Unembedding(nn.Linear):
    """Turns the residual stream (B, T, D) into logits, or into what is made of them."""

    # in chunks, so that the logits of all tokens never exist; train.py may install another
    cross_entropy = CrossEntropy()

    def forward(self, x: Tensor, targets: Tensor | None = None, each: bool = False) -> Tensor:
        """Logits (B, T, V); with targets the sum of their losses, or each one's log-probability."""
        if targets is None:
            return super().forward(x)
        loss = self.cross_entropy.log_probs if each else self.cross_entropy
        return loss(x, self.weight, targets)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.unembedding = Unembedding(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0):
        """Normal(0, 0.02), but 0.02 / sqrt(2 * layers) for what writes to the residual stream.

        Any number of processes, each drawing the rows that it holds, makes the same model.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                local_rows(weight)[1].fill_(not name.endswith("bias"))
            elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                fill_normal(weight, 0.02 / (2 * len(self.blocks)) ** 0.5, f"{seed} {name}")
            else:
                fill_normal(weight, 0.02, f"{seed} {name}")

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.embedding(tokens)  # positions enter by rotation, in every attention

    def hidden(
        self, tokens: Tensor, cache: KVCache | None = None, documents: Documents | None = None
    ) -> Tensor:
        """The normalised residual stream (B, T, D), which `unembedding` turns into logits.

        Raises ValueError when the tokens do not fit in the context window or in the cache.
        """
        num_tokens = tokens.size(1)
        if num_tokens > self.config.max_seq_len:
            window = self.config.max_seq_len
            raise BadInput(f"{num_tokens} tokens exceed the context window of {window}")
        if documents is not None:
            positions = documents.positions
        elif cache is not None:
            positions = cache.begin(num_tokens)
        else:
            positions = torch.arange(num_tokens, device=tokens.device)
        rope = rope_table(self.config, positions)
        x = self.embed(tokens, positions)                     # (B, T, D)
        for block in self.blocks:
            x = block(x, rope, cache, documents)
        if cache is not None:
            cache.end(num_tokens)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """fp32 logits (B, T, V) of the token after each of tokens (B, T); or nats a target.

        Targets (B, T) are the tokens one later; `IGNORE` marks those that do not count and cost
        nothing. No targets at all is a loss of 0.
        """
        if targets is None:
            return self.unembedding(self.hidden(tokens, cache)).float()
        return self.loss(tokens, targets) / max(1, int((targets != IGNORE).sum()))

    def loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Nats of all targets together; train.py divides by the targets of the whole step."""
        return self.unembedding(self.hidden(tokens, None, documents), targets)

    def log_probs(
        self, tokens: Tensor, targets: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """The log-probability of each target (B, T), 0 where there is none."""
        return self.unembedding(self.hidden(tokens, None, documents), targets, each=True)


def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """The model at path, its weights converted to dtype one tensor at a time.

    path is a Hugging Face folder, Meta's (of which LLaMA-2's window of 4,096 is taken), a llama2.c
    .bin, or a run or checkpoint of train.py. Raises ValueError for files that cannot be read or do
    not fit their config, and for the code of somebody else's variant. No other file can run code.
    """
    from lib import weights

    model = empty(weights.read_config(path, ModelConfig), device, dtype)
    weights.load_weights(model, path)
    return model


def save(model: Transformer, folder: str | Path, tokenizer=None, template: str = "", **more):
    """Write a Hugging Face folder, complete or not at all; ValueError if it holds something.

    The tokenizer goes with it, and the chat template in Jinja.
    """
    from lib import formats

    formats.save_hugging_face(model, folder, tokenizer, template, **more)


def empty(config: ModelConfig, device, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose weights are yet to be set."""
    with torch.device("meta"):
        model = config.build().to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:  # which now have memory of their own each
        model.unembedding.weight = model.embedding.weight
    return model
