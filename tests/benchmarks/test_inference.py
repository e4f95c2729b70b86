import pytest

from benchmarks.inference import main


@pytest.mark.slow
def test_both_ways_give_the_same_labels(capsys):
    found = main(size=96, slices=80, roi=32, steps=5, amp="off")
    assert found["voxels"] == 96 * 96 * 80 and found["classes"] > 5  # of a network that learnt a little
    assert found["differ"] <= 1e-5 * found["voxels"] or found["margin"] < 1e-5
    printed = capsys.readouterr().out
    assert "peak memory" in printed and "back to the file" in printed


@pytest.mark.slow
def test_without_the_plain_way_ours_alone_is_measured(capsys):
    found = main(size=64, slices=48, roi=32, steps=1, plain="false")  # as the command line gives it
    assert found.keys() == {"voxels", "classes"}
    assert "plain" not in capsys.readouterr().out
