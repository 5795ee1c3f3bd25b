"""Processes that share the work of an evaluation. They exchange JSON, not tensors."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lib.errors import BadInput


class World:
    """The processes that torchrun started, or one alone. They meet in a store of keys and values."""

    def __init__(self):
        if "RANK" in os.environ:
            self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        else:
            self.store, self.rank, self.size = dist.HashStore(), 0, 1
        # a batch may take long; when a process dies torchrun ends them all
        self.store.set_timeout(timedelta(days=7))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.calls = 0

    def share(self, batches: list, work: Callable[[Any], list]) -> Iterator[list]:
        """What work makes of each batch, in order, on the first process.

        The others do their part and get nothing.
        """
        self.calls += 1
        for number, batch in enumerate(batches):
            key, is_ours = f"{self.calls} {number}", number % self.size == self.rank
            if is_ours and self.rank:
                self._hand_in(key, work, batch)
            elif is_ours:
                yield work(batch)
            elif not self.rank:
                answer = json.loads(self.store.get(key))
                if "error" in answer:
                    raise BadInput(answer["error"])
                yield answer["found"]
                self.store.delete_key(key)
        self._wait_for_the_others("done")

    def _hand_in(self, key: str, work: Callable[[Any], list], batch: Any):
        try:
            self.store.set(key, json.dumps({"found": work(batch)}))
        except ValueError as error:
            self.store.set(key, json.dumps({"error": str(error)}))
            raise

    def _wait_for_the_others(self, word: str):
        """The first process holds the store, and must not leave before the others."""
        for other in range(1, self.size):
            if self.rank == other:
                self.store.set(f"{self.calls} {word} {other}", "")
            elif self.rank == 0:
                self.store.get(f"{self.calls} {word} {other}")

    def agree(self, value: Any) -> Any:
        """The first process's value, on all."""
        self.calls += 1
        if self.rank == 0:
            self.store.set(f"{self.calls} value", json.dumps(value))
        return json.loads(self.store.get(f"{self.calls} value"))

    def first(self, act: Callable, *args, **options) -> Any:
        """What act(*args, **options) returns on the first process, on all.

        Bad input that it finds there is raised on all, as ValueError.
        """
        answer = {}
        if self.rank == 0:
            try:
                answer = {"value": act(*args, **options)}
            except ValueError as error:
                answer = {"error": str(error)}
            except OSError as error:
                answer = {"error": f"{error.filename}: {error.strerror}"}
        answer = self.agree(answer)
        if "error" not in answer:
            return answer["value"]
        self._wait_for_the_others("heard")
        raise BadInput(answer["error"])


def progress(world: World, items: Iterable | None = None, **options):
    """A bar on stderr, on the first process."""
    from tqdm import tqdm

    return tqdm(items, file=sys.stderr, disable=world.rank > 0, **options)
