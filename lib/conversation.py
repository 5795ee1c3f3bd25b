"""A conversation with a model, as turns; how a model reads and writes comes from sample.py."""

from collections.abc import Callable

from lib.errors import BadInput
from lib.stream import TextStream


class Conversation:
    """What was said, as turns.

    The prompt is rendered anew from them for every answer, as training rendered them. system is an
    instruction that stays. A subclass says what a `turn` is, how to `render` turns as ids, and how
    to `write`(ids, max_new_tokens, sampling, add) what follows them.
    """

    def __init__(self, tokenizer, window: int, system: str):
        self.tokenizer, self.window = tokenizer, window
        self.system = [self.turn("system", system)] if system else []
        self.forget()

    def forget(self):
        self.turns = []

    def prompt(self, text: str, room: int) -> list[int]:
        """Add a user's turn; the ids up to where the answer begins.

        The oldest exchanges are forgotten until the answer has room for so many tokens. Raises
        ValueError, having changed nothing, for a text that alone is too long.
        """
        most = self.window - room
        turns = [*self.turns, self.turn("user", text)]
        while True:
            ids = self.render([*self.system, *turns])
            if len(ids) <= most:
                break
            if len(turns) < 3:
                problem = f"with room for {room} of the answer, {most} fit"
                raise BadInput(f"{len(ids)} tokens are too long: {problem}")
            del turns[:2]
        self.turns = turns
        return ids

    def answer(
        self,
        text: str,
        max_new_tokens: int,
        sampling,
        on_text: Callable[[str], None],
        stop: tuple[str, ...] = (),
    ) -> str:
        """The model's answer, up to EOS or a stop string, which is then part of the history.

        on_text gets it as it comes. At least half of the context window is for what was said, the
        rest, if so much is asked for, for the answer.
        """
        ids = self.prompt(text, min(max_new_tokens, self.window // 2))
        stream, parts = TextStream(self.tokenizer, ids, stop), []
        most = min(max_new_tokens, self.window - len(ids))
        self.num_read, self.num_written = len(ids), 0  # tokens

        def hand_out(text: str):
            text = text if parts else text.lstrip()
            if text:
                parts.append(text)
                on_text(text)

        def add(_, token: int) -> bool:
            self.num_written += 1
            hand_out(stream.add(token))
            return stream.finished

        try:
            self.write(ids, most, sampling, add)
        except ValueError:
            self.turns.pop()  # a question without an answer is no exchange
            raise
        hand_out(stream.end())
        ended = stream.finished or self.num_written < most
        self.ended_by = "stop" if ended else "length"
        said = "".join(parts).strip()
        if said:
            self.turns.append(self.turn("assistant", said))
        else:
            self.turns.pop()
        return said
