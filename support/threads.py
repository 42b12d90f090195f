"""How long the threads of tensor operations wait for each other; to be called before torch is imported."""

import os

# MiniLM on two quiet cores, float32, batches of 16, by `python -m benchmarks.speed sharing`: one run alone
# takes 1.02 times as long as with libgomp's own spinning, and two at once take 2.15 times as long as one,
# each. With 1,000 these are 1.16 and 1.9; with libgomp's own spinning 1 and 3.
SPIN_COUNT = 6_000


def share_cores() -> None:
    """Let threads that wait for each other go to sleep soon. Has no effect once torch is imported.

    An operation's threads meet at its end. By default those of libgomp, torch's OpenMP on Linux, spin there
    for some 3 ms, to go on the sooner. While another program has the core that the last one needs, they keep
    their own core from everybody: two trainings on two cores each took twelve times as long as one alone.

    What the user has set stays: OMP_WAIT_POLICY, GOMP_SPINCOUNT.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
