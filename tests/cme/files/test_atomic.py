"""Files that are replaced whole, where links lead."""

import pytest

from cme.errors import CMEError
from cme.files.atomic import beside, replacing, write_text


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "data").mkdir()
    target, link, second = tmp_path / "data" / "real.txt", tmp_path / "link.txt", tmp_path / "second.txt"
    target.write_text("old")
    link.symlink_to("data/real.txt")
    second.symlink_to(link)
    write_text(second, "new")
    assert (second.is_symlink(), link.is_symlink(), target.read_text()) == (True, True, "new")
    assert [path.name for path in target.parent.iterdir()] == ["real.txt"]


def test_a_link_that_leads_to_no_file_yet_gets_one(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("real.txt")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to("link.txt")
    with pytest.raises(CMEError, match=r"link\.txt' is a symbolic link that leads back to itself"):
        write_text(link, "new")
    assert link.is_symlink()


def test_files_with_usual_names_beside_it_are_left_alone(tmp_path):
    path = tmp_path / "out.txt"
    others = [tmp_path / name for name in ("out.txt.tmp", "out.txt.lock", ".out.txt.tmp")]
    for other in others:
        other.write_text("a user's")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing is written
    assert not path.exists()
    assert not beside(path, "tmp").exists()
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert {other.read_text() for other in others} == {"a user's"}
