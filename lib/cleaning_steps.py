"""The steps of cleaning: functions from the turns of a conversation to those that stay, none of one that goes."""

import hashlib
import importlib
import itertools
import json
import re

from lib.chat_formats import Turn
from lib.errors import BadInput
from lib.refusals import is_refusal

HTML_ANSWER = re.compile(r"<(?:p|div|ol|ul|pre|h[1-6]|blockquote)\b.*>", re.DOTALL)
ABOUT_HTML = re.compile(
    r"\b(?:html|css|xml|svg|jsx|markup|tags?|web ?(?:page|site))\b|<\w", re.IGNORECASE
)
# what a page of chats shows beside an answer: which of several it is, and how long it is
PAGE_NUMBER = re.compile(r"(?:<div\b[^>]*>\s*)*\d+ / \d+\s*(?:</div>\s*)*(?=<(?:div|p)\b)")
PAGE_LENGTH = re.compile(r"Copy\d+ chars / \d+ words")
CODE_BAR = re.compile(r"\s*([\w+#-]+)\s*Copy code")
PAGE_ERROR = re.compile(r"!?Too many requests in 1 hour\. Try again later\.")


def _library(name: str, flag: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadInput(f"--{flag} needs {name}: pip install {name}") from None


def html_to_markdown(turns: list[Turn]) -> list[Turn]:
    """Turn the answers that are HTML, as an exported web page has them, into markdown, code into fenced blocks.

    An answer is HTML when it begins with the tag of a block of text and ends with a tag, but for
    what the page shows beside it, and its question does not speak of markup, for which HTML itself
    is the answer. Anything else, `a < b` and `&amp;` in it, stays as it is.
    """
    asked = ["", *(turn.text for turn in turns)]
    changed = []
    for turn, question in zip(turns, asked):
        html = _without_labels(turn.text)
        is_html = (
            turn.role == "assistant"
            and HTML_ANSWER.fullmatch(html)
            and ('<div class="markdown' in turn.text or not ABOUT_HTML.search(question))
        )
        changed.append(turn._replace(text=_markdown(html)) if is_html else turn)
    return changed


def _without_labels(html: str) -> str:
    """An answer's HTML without what the page shows beside it."""
    html = PAGE_LENGTH.sub("", html).strip()
    number = PAGE_NUMBER.match(html)
    return html[number.end() :] if number else html


def _code_language(block) -> str:
    """What the class of a block of code says of its language."""
    found = re.findall(r'class="[^"]*language-([\w+#-]+)', str(block))
    return found[0] if found else ""


def _markdown(html: str) -> str:
    bs4 = _library("bs4", "html")
    try:
        soup = bs4.BeautifulSoup(html, "html.parser")
    except bs4.ParserRejectedMarkup as error:
        raise BadInput(
            f"an answer is HTML that cannot be read ({str(error).splitlines()[-1].strip()})"
        ) from None
    for block in soup.find_all("pre"):
        if block.code:  # above it there may be a bar with its language and a button
            bar = CODE_BAR.match(block.get_text())
            if bar and not _code_language(block):
                block.code["class"] = f"language-{bar[1]}"
            block.contents = [block.code]
    options = {f"escape_{what}": False for what in ("asterisks", "underscores", "misc")}
    options |= {
        "heading_style": "ATX",
        "bullets": "-",
        "code_language_callback": _code_language,
    }
    try:
        return (
            _library("markdownify", "html")
            .MarkdownConverter(**options)
            .convert_soup(soup)
            .strip()
        )
    except RecursionError:
        raise BadInput("an answer is HTML that cannot be read (nested too deeply)") from None


def tidy_characters(turns: list[Turn]) -> list[Turn]:
    """Line ends become \\n and odd blanks ordinary ones; control and invisible characters go, and blanks at the ends
    of a text and more than two blank lines on end. Indentation stays."""
    return [turn._replace(text=_tidy(turn.text)) for turn in turns]


def _tidy(text: str) -> str:
    text = re.sub("\r\n?|[\u2028\u2029]", "\n", text)
    text = re.sub("[\u00a0\u202f\u3000]", " ", text)
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff]", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return re.sub(
        r"\A(?:[ \t]*\n)+|\A (?=\S)", "", text.rstrip()
    )  # \s+\Z would try every blank of a long run


def drop_empty(turns: list[Turn]) -> list[Turn]:
    """Leave out empty turns and a service's message that it was asked too often, and a conversation
    in which one side says nothing."""
    said = []
    for turn in turns:
        text = turn.text.strip()
        failed = turn.role == "assistant" and PAGE_ERROR.fullmatch(text)
        if text and not failed:
            said.append(turn)
    return said if {"user", "assistant"} <= {turn.role for turn in said} else []


def mend_roles(turns: list[Turn]) -> list[Turn]:
    """At most one system turn at the start, then user and assistant in turn, an answer at the end.

    Turns of one role that follow each other are joined; answers before the first question and questions after the last
    answer are left out; a conversation with a system turn further on or with another role is dropped.
    """
    joined = []
    for role, group in itertools.groupby(turns, key=lambda turn: turn.role):
        joined.append(Turn(role, "\n\n".join(turn.text for turn in group)))
    system, rest = (joined[:1], joined[1:]) if joined[0].role == "system" else ([], joined)
    if not {turn.role for turn in rest} <= {"user", "assistant"}:
        return []
    if rest[0].role == "assistant":
        rest = rest[1:]
    rest = rest[: len(rest) // 2 * 2]
    return system + rest if rest else []


def in_language(language: str):
    """A step that drops conversations surely in another language; code and texts under 40 letters tell none."""
    langid = _library("py3langid.langid", "language")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        raise BadInput(
            f"--language {language} is none of {', '.join(sorted(identifier.labels))}"
        )

    def step(turns: list[Turn]) -> list[Turn]:
        text = re.sub(
            r"```.*?```", " ", "\n".join(turn.text for turn in turns), flags=re.DOTALL
        )[:5000]
        found, probability = identifier.classify(text)
        other = found != language and probability > 0.95 and sum(map(str.isalpha, text)) >= 40
        return [] if other else turns

    return step


def cut_refusals(turns: list[Turn]) -> list[Turn]:
    """Cut a conversation before the first question whose answer refuses.

    All after it goes too, since people answer a refusal; what is left is the beginning of a real conversation.
    """
    refused = (
        i for i, turn in enumerate(turns) if turn.role == "assistant" and is_refusal(turn.text)
    )
    kept = turns[: next(refused, len(turns) + 1) - 1]
    return kept if kept and kept[-1].role == "assistant" else []


def drop_short(chars: int):
    return lambda turns: (
        []
        if any(turn.role == "assistant" and len(turn.text) < chars for turn in turns)
        else turns
    )


def drop_long(chars: int):
    return lambda turns: [] if sum(len(turn.text) for turn in turns) > chars else turns


def drop_copies():
    """A step that drops a conversation it has seen before; about 110 bytes of memory for each."""
    seen = set()

    def step(turns: list[Turn]) -> list[Turn]:
        digest = hashlib.sha256(json.dumps(turns).encode()).digest()[:16]
        known = digest in seen
        seen.add(digest)
        return [] if known else turns

    return step


def drop_near_copies(threshold: float):
    """A step that drops a conversation whose set of runs of 5 words is like an earlier one's: Jaccard similarity
    threshold or more, as 128 minimal hashes estimate it (Broder 1997), of questions and answers together and of the
    answers alone, since many questions may share a passage. About 8 kB of memory for each that is kept."""
    if not 0 < threshold <= 1:
        raise BadInput(f"--near_duplicates {threshold} must be from 0 to 1")
    datasketch = _library("datasketch", "near_duplicates")
    index, sketches = datasketch.MinHashLSH(threshold, num_perm=128), []

    def sketch(turns: list[Turn], *roles: str):
        words = " ".join(turn.text for turn in turns if turn.role in roles).lower().split()
        runs = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        made = datasketch.MinHash(128)
        made.update_batch(runs)
        return made

    def step(turns: list[Turn]) -> list[Turn]:
        mine = sketch(turns, "user", "assistant"), sketch(turns, "assistant")
        for other in index.query(mine[0]):
            if all(a.jaccard(b) >= threshold for a, b in zip(mine, sketches[other])):
                return []
        index.insert(len(sketches), mine[0])
        sketches.append(mine)
        return turns

    return step
