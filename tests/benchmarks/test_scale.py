"""benchmarks/scale.py: the model against numbers worked by hand, and that both commands run."""

from types import SimpleNamespace

import pytest

from benchmarks import scale

TINY = scale.Encoder(linear=1000, rest=50, width=10, words={8: 5, 64: 5}, step_ms=3.0)


def test_model_by_hand():
    # 3 rows of 1000 bfloat16 and 50 + 5 * 10 float32; of that a ring of 8 sends 14/8.
    assert scale.message_bytes(TINY, 3, 5, 2) == 3 * (2000 + 400) == 7200
    place = scale.Place(8, bandwidth=1e6, latency=1e-5)
    assert scale.message_seconds(place, 7200, 4) == pytest.approx(0.0126 + 2 * 3 * 1e-5 * 4)
    args = SimpleNamespace(grad_bytes=2, bucket_mb=0.0018)  # 4 buckets
    assert scale.step_seconds(TINY, place, 3, 5, args) == pytest.approx(0.003 + 0.01284)
    # 2 ms of the messages go during the backward pass.
    assert scale.step_seconds(TINY, place, 3, 5, args, overlap=True) == pytest.approx(0.003 + 0.01284 - 0.002)


def test_model_as_a_command(capsys):
    assert scale.main(["--network_gb", "1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3].startswith("| bert-base | 64 over a network |")
