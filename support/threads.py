"""How long the threads of tensor operations wait for each other; to be called before torch is imported."""

import os

# MiniLM on two cores, float32, tokens a second (they vary by 8 %): with 1,000 937 alone, and 535 each for two
# at once; by default 971 alone; two at once have 288 each with 10,000, and 160 with 30,000.
SPIN_COUNT = 1000


def share_cores() -> None:
    """Let threads that wait for each other go to sleep soon. Has no effect once torch is imported.

    An operation's threads meet at its end. By default those of libgomp, torch's OpenMP on Linux, spin there
    for some 3 ms, to go on the sooner. While another program has the core that the last one needs, they keep
    their own core from everybody: two trainings on two cores each took twelve times as long as one alone.

    What the user has set stays: OMP_WAIT_POLICY, GOMP_SPINCOUNT.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
