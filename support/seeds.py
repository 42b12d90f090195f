"""Seeds made of names and numbers: all randomness here is a pure function of such a seed."""

import zlib

import numpy as np


def make_seed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers; any change in one gives an unrelated seed."""
    # Without their count, SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_of(name: str) -> int:
    """A seed for a name (of a task, a source, a comparison), the same in every process."""
    return zlib.crc32(name.encode())
