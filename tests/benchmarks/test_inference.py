import pytest

from benchmarks.inference import main


@pytest.mark.slow
def test_both_ways_give_the_same_labels(capsys):
    found = main(size=96, slices=80, roi=32, steps=5)
    assert found["voxels"] == 96 * 96 * 80 and found["classes"] > 5  # of a network that learnt a little
    assert found["differ"] <= 1e-5 * found["voxels"] or found["margin"] < 1e-5
    printed = capsys.readouterr().out
    assert "peak memory" in printed and "back to the file" in printed
