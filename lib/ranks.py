"""The ranks of a tiktoken file."""

from lib.errors import BadInput


def check_ranks(ranks: dict[bytes, int], name: str):
    """Raise ValueError unless the ranks are 0, 1, 2 … and every byte is a piece.

    With a rank beyond these, typed text could become a special token; without all bytes tiktoken
    cannot encode.
    """
    count = len(ranks)
    if sorted(ranks.values()) != list(range(count)):
        problem = "one of them is there twice"
        for rank in ranks.values():
            if not 0 <= rank < count:
                problem = f"one of them is {rank}"
                break
        raise BadInput(f"{name}: its ranks must be 0 to {count - 1}, each once, and {problem}")
    missing = []
    for byte in range(256):
        if bytes([byte]) not in ranks:
            missing.append(byte)
    if missing:
        problem = f"{len(missing)} of the 256 single bytes are no pieces"
        raise BadInput(f"{name}: {problem}, the first is {missing[0]}")
    if b"" in ranks:
        rank = ranks[b""]
        raise BadInput(f"{name}: rank {rank} is of an empty piece")
