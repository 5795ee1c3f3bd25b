"""What a person can mend, as opposed to a bug."""


class BadInput(ValueError):
    """Flags, files or data that cannot be used: its message is the sentence that a person reads."""
