"""Text as it comes: tokens to text that is certain, and a conversation on the terminal."""

import sys
from collections.abc import Callable


class TextStream:
    """Turns one row's tokens into text as they come: no split characters, no lost blanks.

    What has been returned, joined, equals the decoded whole, cut at the first stop string.
    """

    def __init__(self, tokenizer, prompt: list[int], stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        # decoding needs a few tokens before the new ones, or a first blank is lost
        self.ids = prompt[-8:]
        self.held = ""
        self.settled = len(self.ids)
        self.finished = False

    def add(self, token: int) -> str:
        """The text that is certain after this token; sets finished when a stop string has come."""
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[: self.settled])
        after = self.tokenizer.decode(self.ids)
        if after.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        text = after[len(before) :]
        self.ids = self.ids[max(0, self.settled - 8) :]
        self.settled = len(self.ids)
        return self._pass_on(text)

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.finished:
            return ""
        settled = self.tokenizer.decode(self.ids[: self.settled])
        rest = self.tokenizer.decode(self.ids)[len(settled) :]
        text = self._pass_on(rest) + ("" if self.finished else self.held)
        self.held = ""
        return text

    def _pass_on(self, text: str) -> str:
        """What of the held text and this one cannot be the beginning of a stop string."""
        text = self.held + text
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.finished, self.held = True, ""
            return text[: min(found)]
        begun = 0  # letters at the end that may begin a stop string
        for word in self.stop:
            begun = max([begun, *(n for n in range(1, len(word)) if text.endswith(word[:n]))])
        keep = len(text) - begun
        self.held = text[keep:]
        return text[:keep]


class TextStreams:
    """The texts of the rows of a batch, from tokens as they come.

    on_text(row, text) gets each piece.
    """

    def __init__(
        self,
        tokenizer,
        prompts: list[list[int]],
        stop: tuple[str, ...],
        on_text: Callable[[int, str], None] | None = None,
    ):
        self.streams = [TextStream(tokenizer, ids, stop) for ids in prompts]
        self.texts = [""] * len(prompts)
        self.on_text = on_text

    def add(self, row: int, token: int) -> bool:
        """Add a token to a row; whether a stop string has come, which ends it."""
        stream = self.streams[row]
        self._hand_out(row, stream.add(token))
        return stream.finished

    def end(self) -> list[str]:
        """The texts, once no more tokens come."""
        for row, stream in enumerate(self.streams):
            self._hand_out(row, stream.end())
        return self.texts

    def _hand_out(self, row: int, text: str):
        self.texts[row] += text
        if self.on_text:
            self.on_text(row, text)


def talk(chat, config):
    """A sample.Chat on the terminal, or with lines from a pipe, until its end or Ctrl-C.

    /reset forgets what was said.
    """
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/reset forgets what was said, Ctrl-D ends", file=sys.stderr)
    try:
        while True:
            text = input("> " if sys.stdin.isatty() else "").strip()
            if text == "/reset":
                chat.forget()
            elif text:
                _answer(chat, text, config)
    except (EOFError, KeyboardInterrupt):
        print()


def _answer(chat, text: str, config):
    try:
        chat.answer(text, config.max_new_tokens, config, show)
        print()
    except ValueError as error:
        print(error, file=sys.stderr)


def show(text: str):
    """Print text as it comes."""
    print(text, end="", flush=True)
