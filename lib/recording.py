"""Reading a token of each row on a GPU: recorded once as a CUDA graph, then played again.

A model of 7B starts a thousand programs on the GPU for a token, and starting them from Python takes
longer than running them. A graph starts all of them at once, but always with the same memory. So a
cache moves into room that belongs to a recording, and attention reads all of that room; the mask
hides what lies beyond each row's last token.
"""

import copy
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

LEAST = 256            # tokens of the smallest room; each larger one is twice as large
LEAST_BYTES = 2**30    # of all rooms together; or as many as the weights have


def cuda_graph(action: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What does again all that action does on the GPU, and gives the same tensor, written anew.

    Raises RuntimeError for what cannot be recorded, such as waiting for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # to which it returns, also from an error
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = action()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


def space(like, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and lengths of a model.KVCache with as many rows as this one; not filled yet."""
    layers, rows, heads, _, width = like.keys.shape
    keys = like.keys.new_empty(layers, rows, heads, tokens, width)
    return keys, torch.empty_like(keys), torch.empty_like(like.lengths)


def move(cache, keys: Tensor, values: Tensor, lengths: Tensor):
    """Let a model.KVCache live in these tensors. Behind its tokens there are zeros: what is there
    is hidden, but not if it is not finite."""
    for new, old in ((keys, cache.keys), (values, cache.values)):
        new[:, :, :, : cache.longest] = old[:, :, :, : cache.longest]
        new[:, :, :, cache.longest :] = 0
    lengths.copy_(cache.lengths)
    cache.keys, cache.values, cache.lengths = keys, values, lengths


def move_out(cache, tokens: int):
    """Let it live in tensors of its own, with room for so many tokens."""
    move(cache, *space(cache, tokens))


class Room:
    """Room for the cache of so many rows and tokens, and the step of the cache that lives in it."""

    def __init__(self, like, tokens: int):
        """like is a model.KVCache, of as many rows."""
        self.cache = copy.copy(like)
        self.cache.keys, self.cache.values, self.cache.lengths = space(like, tokens)
        self.tokens = like.lengths.new_zeros(len(like.lengths), 1)
        self.size = (len(like.lengths), tokens)
        self.nbytes = 2 * self.cache.keys.nbytes
        self.tenant: Callable = lambda: None
        self.steps = 0

    def is_free(self) -> bool:
        tenant = self.tenant()
        return tenant is None or tenant.keys is not self.cache.keys

    def take_in(self, tenant):
        move(tenant, self.cache.keys, self.cache.values, self.cache.lengths)
        self.tenant = weakref.ref(tenant)

    def step(self, hidden: Callable, tokens: Tensor, record: Callable) -> Tensor:
        """hidden(tokens, cache). The second time it is recorded, from then on played."""
        self.cache.longest = self.size[1] - 1  # as if full: no shape depends on what there is
        self.tokens.copy_(tokens)
        if self.steps == 0:  # what a library does once, such as choosing kernels, is not recorded
            states = hidden(self.tokens, self.cache)
        else:
            if self.steps == 1:
                self.play = record(lambda: hidden(self.tokens, self.cache))
            states = self.play().clone()
        self.steps += 1
        return states


class Recorded:
    """In place of a model's `hidden`: what reads one token of each row is recorded."""

    def __init__(self, model: nn.Module, record: Callable = cuda_graph):
        self.model = weakref.ref(model)  # which has this, and should end with its last user
        self.read = type(model).hidden
        self.record: Callable | None = record
        self.window = model.config.max_seq_len
        self.most_bytes = max(LEAST_BYTES, sum(p.nbytes for p in model.parameters()))
        self.rooms: list[Room] = []
        # caches that have read a single token, and how many tokens they had room for
        self.known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> "Recorded":
        """That of the copy of the model, with nothing recorded yet."""
        other = copy.copy(self)
        other.model = weakref.ref(memo[id(self.model())])
        other.rooms, other.known = [], weakref.WeakKeyDictionary()
        return other

    def hidden(self, tokens: Tensor, cache=None, documents=None) -> Tensor:
        return self.read(self.model(), tokens, cache, documents)

    def __call__(self, tokens: Tensor, cache=None, documents=None) -> Tensor:
        if cache is None:
            return self.hidden(tokens, None, documents)
        if tokens.size(1) == 1 and 0 < cache.longest < self.window and not torch.is_grad_enabled():
            if cache in self.known:
                room = self.record and self.room_of(cache)
                if room:
                    return self.step(room, tokens, cache)
            else:  # perhaps there is no second
                self.known[cache] = cache.keys.size(3)
        room_for = self.known.get(cache, 0)
        if cache.keys.size(3) < min(room_for, cache.longest + tokens.size(1)):
            move_out(cache, room_for)
        return self.hidden(tokens, cache)

    def step(self, room: Room, tokens: Tensor, cache) -> Tensor:
        try:
            states = room.step(self.hidden, tokens, self.record)
        except RuntimeError:
            if room.steps != 1:
                raise
            self.record = None  # a variant that cannot be recorded, or no memory for it
            move_out(cache, self.known[cache])
            self.rooms.clear()
            return self.hidden(tokens, cache)
        cache.longest += 1
        return states

    def room_of(self, cache) -> Room | None:
        """The room that a cache is in, after it has moved where it has to; None without memory."""
        for room in self.rooms:
            if room.cache.keys is cache.keys and cache.longest < room.size[1]:
                return room
        rows, tokens = len(cache.lengths), LEAST
        while tokens <= cache.longest:
            tokens *= 2
        size = (rows, min(tokens, self.window))
        fitting = [room for room in self.rooms if room.size == size and room.is_free()]
        room = fitting[0] if fitting else self.new_room(cache, size[1])
        if room:
            room.take_in(cache)
        return room

    def new_room(self, cache, tokens: int) -> Room | None:
        """Those that nobody is in make room for it, oldest first; None where that is not enough."""
        need = 2 * cache.keys[:, :, :, 0].nbytes * tokens
        free = [room for room in self.rooms if room.is_free()]
        while need + sum(room.nbytes for room in self.rooms) > self.most_bytes:
            if not free:
                return None
            self.rooms.remove(free.pop(0))
        try:
            room = Room(cache, tokens)
        except torch.OutOfMemoryError:  # the cache itself is still there
            return None
        self.rooms.append(room)
        return room
