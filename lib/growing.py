"""The rows of a batch while tokens are added to them: which go on, and what the model still sees."""

import sys
from collections.abc import Callable

from lib.errors import BadInput
from lib.sampling import NOT_FINITE


class Rows:
    """The prompts of a batch as they grow: what the model sees of each, and what is new."""

    def __init__(
        self,
        prompts: list[list[int]],
        window: int,
        end_ids: tuple[int, ...],
        stop: Callable[[int, int], bool] | None,
    ):
        self.window = window
        self.end_ids = end_ids
        self.stop = stop
        self.contexts = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self.running = set(range(len(prompts)))
        self.told = False

    def extend(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Append a token to each of rows that still runs; those that go on."""
        left = []
        for row, token in zip(rows, tokens):
            if row in self.running and self.add(row, token):
                left.append(row)
        self.running = set(left)
        return left

    def add(self, row: int, token: int) -> bool:
        """Append a token to a row; whether the row goes on."""
        if token == NOT_FINITE:
            why = "its weights are damaged, or were trained to NaN"
            raise BadInput(f"the model's logits are not finite; {why}")
        if token in self.end_ids:
            return False
        self.new[row].append(token)
        self.contexts[row].append(token)
        if self.stop and self.stop(row, token):
            # it may be read on with the others, and must not overflow
            del self.contexts[row][self.window :]
            return False
        return True

    def room(self, rows: list[int], max_new_tokens: int) -> int:
        """Tokens that a decoder of these rows must hold."""
        longest = max(len(self.contexts[row]) for row in rows)
        return min(self.window, longest + max_new_tokens)

    def shorten(self, rows: list[int]) -> bool:
        """Cut those that have filled the window to its last half; whether there are any."""
        full = False
        half = self.window // 2
        for row in rows:
            if len(self.contexts[row]) > self.window:
                full = True
                self.contexts[row] = self.contexts[row][-half:]
        if full and not self.told:
            notice = (
                f"the context window of {self.window} tokens is full; "
                f"reading on with the last {half}, whenever that happens"
            )
            print(f"\n[{notice}]", file=sys.stderr)
            self.told = True
        return full
