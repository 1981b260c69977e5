"""Seeds for random streams that are functions of several numbers."""

from __future__ import annotations

import hashlib


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on every number and on their order.

    torch's CPU generator reads only the low 32 bits of a seed: numbers that are merely shifted above those
    would be lost, and every epoch would see the same noise.
    """
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
