"""Tokenizers of other kinds as a tokenizer.json, which Hugging Face's tokenizers reads."""

import json

from lib.codecs import ODD_TEXTS, BytesCodec, SentencepieceCodec, TiktokenCodec
from lib.tokenizer import Tokenizer

SPLIT_LIKE_CL100K = (  # its pattern as Hugging Face writes it, without possessive repetitions
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NO_STEPS = dict(truncation=None, padding=None, normalizer=None, pre_tokenizer=None)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def special_tokens(tokenizer: Tokenizer) -> list[dict]:
    """The control tokens as a tokenizer.json lists them, one for every id that is no
    other token: there the ids have no gaps."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    texts = tokenizer.control_texts()
    if first := getattr(tokenizer.codec, "num_ranks", 0):
        for number in range(first, tokenizer.vocab_size):
            texts.setdefault(number, f"<|reserved_{number}|>")
    return [{"id": number, "content": texts[number]} | plain for number in sorted(texts)]


def bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **more) -> dict:
    plain = dict(dropout=None, unk_token=None, continuing_subword_prefix=None)
    plain |= dict(end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False)
    return {"type": "BPE", **plain, **more, "vocab": vocab, "merges": [*map(list, merges)]}


def from_bytes(codec: BytesCodec) -> dict:
    characters = byte_characters()
    vocab = {character: byte for byte, character in enumerate(characters)}
    return {"model": bpe(vocab, []), "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}


def last_parts(piece: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that are merged last to a piece: two, or more where nothing leads to it but itself."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        lowest = min(pairs)
        if lowest >= rank:
            break
        place = pairs.index(lowest)
        whole = parts[place] + parts[place + 1]
        parts[place : place + 2] = [whole]
    return parts


def from_tiktoken(codec: TiktokenCodec) -> dict:
    """The merges are those by which tiktoken itself comes to each piece: of lower ranks alone."""
    characters = byte_characters()
    written = {piece: "".join(characters[byte] for byte in piece) for piece in codec.ranks}
    merges = []
    for piece, rank in sorted(codec.ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            parts = last_parts(piece, rank, codec.ranks)
            if len(parts) == 2:
                first, second = parts
                merges.append((written[first], written[second]))
    vocab = {written[piece]: rank for piece, rank in codec.ranks.items()}
    split = BYTE_LEVEL | {"use_regex": True}
    if codec.num_ranks > 50_256:
        cut = {"Regex": SPLIT_LIKE_CL100K}
        pieces = dict(type="Split", pattern=cut, behavior="Isolated", invert=False)
        split = {"type": "Sequence", "pretokenizers": [pieces, BYTE_LEVEL]}
    model = bpe(vocab, merges, ignore_merges=True)
    return {"model": model, "pre_tokenizer": split, "decoder": BYTE_LEVEL}


def from_sentencepiece(codec: SentencepieceCodec) -> dict:
    """sentencepiece merges the pair whose whole has the best score, the first one of equals."""
    model = codec.model
    pieces = [model.id_to_piece(i) for i in range(codec.vocab_size)]
    ordinary = {}
    kinds = (model.is_control, model.is_unknown, model.is_byte, model.is_unused)
    for i, piece in enumerate(pieces):
        if not any(is_kind(i) for is_kind in kinds):
            ordinary[piece] = model.get_score(i)
    merges = []
    for piece in sorted(ordinary, key=ordinary.get, reverse=True):
        for cut in range(1, len(piece)):
            if piece[:cut] in ordinary and piece[cut:] in ordinary:
                merges.append((piece[:cut], piece[cut:]))
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    made = {}
    if codec.blank is None:
        prepend = {"type": "Prepend", "prepend": "▁"}
        blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        made["normalizer"] = {"type": "Sequence", "normalizers": [prepend, blanks]}
        back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders = [back, *decoders, strip]
    else:  # a blank is itself, so that U+2581 is spelled in bytes
        pieces = [piece.replace("▁", " ") for piece in pieces]
        merges = [tuple(part.replace("▁", " ") for part in pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[model.unk_id()]
    made["model"] = bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    return made | {"decoder": {"type": "Sequence", "decoders": decoders}}


CONVERTERS = {
    BytesCodec: from_bytes,
    SentencepieceCodec: from_sentencepiece,
    TiktokenCodec: from_tiktoken,
}


def to_json(tokenizer: Tokenizer) -> dict:
    """A tokenizer of another kind as a tokenizer.json, which gives the same ids, BOS first."""
    codec, bos = tokenizer.codec, tokenizer.control_texts()[tokenizer.bos_id]
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    begin = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    made = {"version": "1.0", "added_tokens": special_tokens(tokenizer), "post_processor": begin}
    return made | NO_STEPS | CONVERTERS[type(codec)](codec)


EASILY_CUT = (
    "", " ", "  a   b\n\n\n  c ", "aaaaaaa bbbb ====== \t\t", "it's I'LL we'd 12345 x=f(y)[0];",
    "▁ a▁b", "naïve Ünïcödé", "<s>[INST]</s>", "the same, and the same again. The end.\n" * 3,
)  # fmt: skip


def same_ids(tokenizer: Tokenizer, values: dict) -> bool:
    """Whether a tokenizer.json gives our ids for texts that are easily cut otherwise."""
    import tokenizers

    other = tokenizers.Tokenizer.from_str(json.dumps(values))
    other.encode_special_tokens = True
    for text in (*ODD_TEXTS, *EASILY_CUT):
        if other.encode(text).ids != tokenizer.encode(text, bos=True):
            return False
    return True
