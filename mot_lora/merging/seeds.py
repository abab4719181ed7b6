"""Seeds that depend on what they are for, and on nothing else."""

import hashlib


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else, e.g. (run seed, round, teacher).

    >>> seed_for(0, 1, "a") == seed_for(0, 1, "a") != seed_for(0, 1, "b")
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
