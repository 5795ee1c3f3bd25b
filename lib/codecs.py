"""The kinds of tokenizer files: bytes, sentencepiece's, tiktoken's and tokenizer.json.

A codec is made from what the file holds and its name. It has bos_id and eos_id (below 0 where there
is none), vocab_size, `specials`, the ids of control tokens by their text, which `encode` never
gives, and `lead`, a text behind which other text is encoded as if it did not begin there.
"""

import base64
import json

from lib.errors import BadInput
from lib.ranks import check_ranks
from lib.records import parse_json

CL100K_PATTERN = (  # how text is cut before it is encoded, which the file does not say
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)


class BytesCodec:
    """Ids 0 to 255 are bytes."""

    bos_id, eos_id, vocab_size, lead = 256, 257, 258, ""
    specials = {"<s>": 256, "</s>": 257}

    def __init__(self, data: bytes, name: str, beside: dict[str, bytes]):
        pass

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencepieceCodec:
    """Pieces of a sentencepiece model."""

    lead = "\x01"  # a character that no piece has together with others

    def __init__(self, data: bytes, name: str, beside: dict[str, bytes]):
        from sentencepiece import SentencePieceProcessor

        self.model = model = SentencePieceProcessor(model_proto=data)
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        self.vocab_size = model.vocab_size()
        controls = filter(model.is_control, range(self.vocab_size))
        self.specials = {model.id_to_piece(i): i for i in controls}
        self.blank = None
        if not model.encode_as_pieces("a")[0].startswith("▁"):
            # Made by train_tokenizer: nothing is added or normalised, so that only U+2581, which
            # sentencepiece uses for the blank, would not come back. It is spelled out in bytes.
            self.lead = ""
            self.blank = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    def encode(self, text: str) -> list[int]:
        if self.blank is None:
            return self.model.encode(text)
        first, *rest = map(self.model.encode, text.split("▁"))
        return first + [i for part in rest for i in self.blank + part]

    def decode(self, ids: list[int]) -> str:
        # a model's vocabulary may be larger, and sentencepiece fails at an id that it does not have
        return self.model.decode([i for i in ids if i < self.vocab_size])


LLAMA3 = {  # the control tokens of Llama 3 that have a use in text and chats
    "<|begin_of_text|>": 128_000,
    "<|end_of_text|>": 128_001,
    "<|start_header_id|>": 128_006,
    "<|end_header_id|>": 128_007,
    "<|eot_id|>": 128_009,
}


class TiktokenCodec:
    """Pieces of a file of ranks; how many it has tells which of the known encodings it is."""

    lead = ""

    def __init__(self, data: bytes, name: str, beside: dict[str, bytes]):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        try:
            lines = map(bytes.split, data.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except ValueError:
            problem = "is not a tiktoken ranks file (lines of base64 and a number)"
            raise BadInput(f"{name} {problem}") from None
        end = "<|endoftext|>"
        known = {  # number of ranks: pattern, special tokens, BOS and EOS, size
            50_256: (r50k_pat_str, {end: 50_256}, 50_256, 50_256, 50_257),
            100_256: (CL100K_PATTERN, {end: 100_257}, 100_257, 100_257, 100_277),
            128_000: (CL100K_PATTERN, LLAMA3, 128_000, 128_001, 128_256),
        }
        if len(ranks) not in known:
            kinds = "gpt2 has 50256, cl100k_base 100256 and Llama 3 128000"
            raise BadInput(f"{name} has {len(ranks)} ranks; {kinds}")
        check_ranks(ranks, name)
        pattern, specials, self.bos_id, self.eos_id, self.vocab_size = known[len(ranks)]
        self.ranks, self.specials = ranks, specials
        self.num_ranks = len(ranks)
        self.model = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.num_ranks])


SIDE_FILES = (  # what a model's folder says of its tokenizer and its chats beside the tokenizer
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
ODD_TEXTS = (  # which must come back as they are
    " Hello  World\n\n\ttab\r\n ", "é e\u0301 Ｗｉｄｅ ﬁ ½ İ", "日本語 😀👩‍💻 \x00\x7f\u200b", "1234.5 '\"`",
)  # fmt: skip


class JsonCodec:
    """A tokenizer.json, as Hugging Face's tokenizers writes it; BOS and EOS are named beside it.

    Raises ValueError for one that does not give every text back, or has no BOS or EOS.
    """

    def __init__(self, data: bytes, name: str, beside: dict[str, bytes]):
        from tokenizers import Tokenizer

        values = parse_json(data, name)
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise BadInput(f"{name} is not a tokenizer.json (no object `model`)")
        added = values.get("added_tokens") or []
        configs = {file: parse_json(beside[file], file) for file in beside if file.endswith("json")}
        ends = [find_token(kind, added, configs, name) for kind in ("bos", "eos")]
        for token in added:  # `</s>` typed into a text must not end it, whatever the file says
            token["special"] = token.get("special") or token["content"] in ends
        try:
            self.model = Tokenizer.from_str(json.dumps(values))
        except Exception as error:  # the library raises no narrower kind
            raise BadInput(f"{name} cannot be read ({error})") from None
        self.model.encode_special_tokens = True  # as ordinary text
        self.model.no_padding()
        self.model.no_truncation()
        self.specials = {token["content"]: token["id"] for token in added if token["special"]}
        self.bos_id, self.eos_id = map(self.model.token_to_id, ends)
        self.vocab_size = max(self.model.get_vocab(True).values()) + 1
        first = self.model.encode("a", add_special_tokens=False).tokens
        self.lead = "\x01" if first and first[0].startswith("▁") else ""
        self.check(values, name)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.vocab_size])

    def check(self, values: dict, name: str):
        """Raise ValueError naming the part that changes text, or makes typed text special."""
        part = f"model {values['model'].get('type')}"
        for kind in ("normalizer", "pre_tokenizer", "decoder"):
            step = values.get(kind) or {}
            inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders")
            names = [one.get("type") for one in inner or [step] if one]
            if part == "model BPE" and names:
                part = f"{kind} {', '.join(names)}"
                break
        for text in ODD_TEXTS:
            if (back := self.decode(self.encode(text))) != text:
                problem = f"{text!r} comes back as {back!r}"
                raise BadInput(f"{name}: its {part} cannot be honoured, for {problem}")
        for text, number in self.specials.items():
            if number in self.encode(text):
                raise BadInput(f"{name}: {text} typed into a text would be the special token")


def find_token(kind: str, added: list[dict], configs: dict[str, dict], name: str) -> str:
    """The text of the bos or eos token, as a folder's files say it. Raises ValueError for none."""
    by_id = {token["id"]: token["content"] for token in added}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = configs.get(file, {}).get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token in by_id.values():
            return token
    number = configs.get("generation_config.json", {}).get(f"{kind}_token_id")
    if isinstance(number, list):
        number = number[0] if number else None
    if number in by_id:
        return by_id[number]
    said = "tokenizer_config.json, special_tokens_map.json and generation_config.json"
    raise BadInput(f"{name}: {said} beside it name no {kind.upper()} token of it")


CODECS = {
    "tokenizer.model": SentencepieceCodec,
    "tokenizer.tiktoken": TiktokenCodec,
    "tokenizer.bytes": BytesCodec,
    "tokenizer.json": JsonCodec,
}
