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

LEAST = 256  # tokens of the smallest room; each larger one is twice as large


def cuda_graph(action: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What does again all that action does on the GPU, and gives the same tensor, written anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = action()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


class Room:
    """Room for the cache of so many rows and tokens, and the step of the cache that lives in it."""

    def __init__(self, like, tokens: int):
        """like is a model.KVCache, of as many rows."""
        layers, rows, heads, _, width = like.keys.shape
        self.cache = copy.copy(like)
        self.cache.keys = like.keys.new_zeros(layers, rows, heads, tokens, width)
        self.cache.values = torch.zeros_like(self.cache.keys)
        self.cache.lengths = torch.zeros_like(like.lengths)
        self.tokens = like.lengths.new_zeros(rows, 1)
        self.size = (rows, tokens)
        self.nbytes = 2 * self.cache.keys.nbytes
        self.tenant: Callable = lambda: None
        self.steps = 0

    def is_free(self) -> bool:
        tenant = self.tenant()
        return tenant is None or tenant.keys is not self.cache.keys

    def take_in(self, tenant):
        known = tenant.longest
        self.cache.keys[:, :, :, :known] = tenant.keys[:, :, :, :known]
        self.cache.values[:, :, :, :known] = tenant.values[:, :, :, :known]
        self.cache.lengths.copy_(tenant.lengths)
        for name in ("keys", "values", "lengths"):
            setattr(tenant, name, getattr(self.cache, name))
        self.tenant = weakref.ref(tenant)

    def step(self, hidden: Callable, tokens: Tensor, record: Callable) -> Tensor:
        """hidden(tokens, cache). The second time it is recorded, from then on played."""
        self.cache.longest = self.size[1] - 1  # as if full: no shape depends on what there is
        self.steps += 1
        self.tokens.copy_(tokens)
        if self.steps == 1:  # what a library does once, such as choosing kernels, is not recorded
            return hidden(self.tokens, self.cache)
        if self.steps == 2:
            self.play = record(lambda: hidden(self.tokens, self.cache))
        return self.play().clone()


class Recorded:
    """In place of a model's `hidden`: what reads one token of each row is recorded."""

    def __init__(self, model: nn.Module, record: Callable = cuda_graph):
        self.hidden = model.hidden
        self.record = record
        self.window = model.config.max_seq_len
        self.most_bytes = sum(p.nbytes for p in model.parameters())  # of rooms, when some are free
        self.rooms: list[Room] = []
        self.known: weakref.WeakSet = weakref.WeakSet()  # caches that have read a single token

    def __call__(self, tokens: Tensor, cache=None, documents=None) -> Tensor:
        if cache is None or tokens.size(1) > 1 or torch.is_grad_enabled():
            return self.hidden(tokens, cache, documents)
        if not 0 < cache.longest < self.window:
            return self.hidden(tokens, cache)
        if cache not in self.known:  # perhaps there is no second
            self.known.add(cache)
            return self.hidden(tokens, cache)
        states = self.room_of(cache).step(self.hidden, tokens, self.record)
        cache.longest += 1
        return states

    def room_of(self, cache) -> Room:
        """The room that a cache is in, after it has moved where it has to."""
        for room in self.rooms:
            if room.cache.keys is cache.keys and cache.longest < room.size[1]:
                return room
        rows, tokens = len(cache.lengths), LEAST
        while tokens <= cache.longest:
            tokens *= 2
        size = (rows, min(tokens, self.window))
        fitting = [room for room in self.rooms if room.size == size and room.is_free()]
        room = fitting[0] if fitting else self.new_room(cache, size[1])
        room.take_in(cache)
        return room

    def new_room(self, cache, tokens: int) -> Room:
        room = Room(cache, tokens)
        for other in [room for room in self.rooms if room.is_free()]:
            if sum(each.nbytes for each in (room, *self.rooms)) > self.most_bytes:
                self.rooms.remove(other)
        self.rooms.append(room)
        return room
