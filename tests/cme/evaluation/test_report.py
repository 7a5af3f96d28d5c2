"""Tables, pictures and numbers as a person reads them."""

import pytest

from cme.evaluation.report import Table, bounds, decimal, draw_intervals, percent, picture, with_interval


def test_one_table_is_written_in_two_ways():
    table = Table(("signal", "AUROC"), [("length", "0.5"), ("a", "–")])
    assert table.plain() == "signal  AUROC\nlength    0.5\na           –"
    assert table.markdown() == "| signal | AUROC |\n| --- | --- |\n| length | 0.5 |\n| a | – |"
    assert Table(("none",), []).plain() == "none"


def test_numbers_have_their_interval_unless_it_is_unknown():
    assert with_interval(0.6123, (0.5, 0.7)) == "0.612 [0.500, 0.700]"
    assert with_interval(0.6123, (0.5, 0.7), share=True) == "61.2 % [50.0, 70.0]"
    assert with_interval(0.25, (-0.5, 1), sign="+") == "+0.250 [-0.500, +1.000]"
    assert with_interval(0.5, None) == "0.500"
    assert with_interval(None, None) == decimal(None) == percent(None) == "–"
    assert bounds((0, 1)) == "[0.000, 1.000]"


def test_a_picture_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    with picture(path, 4, 3) as figure:
        axes = figure.subplots()
        draw_intervals(axes, {"first": (0.4, (0.2, 0.6)), "second": (0.5, None), "third": (None, None)}, 0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second", "third"]
    assert axes.yaxis_inverted()  # from the top
    whole = path.read_bytes()
    assert whole[:4] == b"\x89PNG"
    with pytest.raises(KeyboardInterrupt), picture(path, 4, 3):
        raise KeyboardInterrupt
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
