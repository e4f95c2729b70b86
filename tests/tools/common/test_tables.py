"""Tables and lines that commands print."""

from __future__ import annotations

from tools.common.tables import print_table, print_written


def test_names_are_aligned(capsys):
    print_table([("scans", "3"), ("learning rate", "0.1")])
    assert capsys.readouterr().out == "  scans          3\n  learning rate  0.1\n"


def test_what_was_written_is_named_and_nothing_else(tmp_path, capsys):
    (tmp_path / "model.pt").touch()
    print_written(tmp_path / "model.pt", tmp_path / "backbone.pt")
    assert capsys.readouterr().out == f"written:\n  {tmp_path / 'model.pt'}\n"
    print_written(tmp_path / "backbone.pt")
    assert not capsys.readouterr().out
