"""Numbers of pages: how many hold some tokens, and the few that are compiled for."""


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // page_size)


def bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few distinct sizes, less than half too large."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power
