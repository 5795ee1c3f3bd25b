"""The ranks of a tiktoken file."""


def check_ranks(ranks: dict[bytes, int], name: str):
    """Raise ValueError unless the ranks are 0, 1, 2 … and every byte is a piece.

    With a rank beyond these, typed text could become a special token; without all bytes tiktoken cannot encode.
    """
    if sorted(ranks.values()) != list(range(len(ranks))):
        odd = next((rank for rank in ranks.values() if not 0 <= rank < len(ranks)), None)
        problem = "one of them is there twice" if odd is None else f"one of them is {odd}"
        raise ValueError(f"{name}: its ranks must be 0 to {len(ranks) - 1}, each once, and {problem}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{name}: {len(missing)} of the 256 single bytes are no pieces, the first is {missing[0]}")
    if b"" in ranks:
        raise ValueError(f"{name}: rank {ranks[b'']} is of an empty piece")
