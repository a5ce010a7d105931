"""Files that users name: written whole or not at all, read within bounds, and plain files only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from neml2_aoti_plugin import InputError
from neml2_aoti_plugin.files import draft, file_name, require_writable, variable_of


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("stress", "stress"),
        ("state/S", "state%2FS"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E."),
        ("a%2Fb", "a%252Fb"),
        ("x~1", "x~1"),
        ("stress@E.a+b-c_d", "stress@E.a+b-c_d"),
        ("a b\\c:d\n", "a%20b%5Cc%3Ad%0A"),
        ("é", "%C3%A9"),
        ("\udc80", "%ED%B2%80"),
        ("", ""),
    ],
)
def test_any_variable_has_a_file_name_of_its_own(variable: str, name: str) -> None:
    assert file_name(variable) == name and variable_of(name) == variable


class TestWritten:
    def test_a_new_file_has_the_mode_of_the_umask(self, tmp_path: Path) -> None:
        for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
            before = os.umask(mask)
            try:
                with draft(tmp_path / oct(mask)) as scratch:
                    scratch.write_text("new")
            finally:
                os.umask(before)
            assert stat.S_IMODE((tmp_path / oct(mask)).stat().st_mode) == mode

    def test_one_that_was_there_keeps_its_mode(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("old")
        file.chmod(0o640)
        with draft(file) as scratch:
            scratch.write_text("new")
            assert file.read_text() == "old" and scratch.suffix == ".txt"
        assert file.read_text() == "new" and stat.S_IMODE(file.stat().st_mode) == 0o640
        assert list(tmp_path.iterdir()) == [file]

    def test_an_error_leaves_the_old_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("old")
        with pytest.raises(ZeroDivisionError), draft(file) as scratch:
            scratch.write_text("half")
            raise ZeroDivisionError
        assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("kind", ["pipe", "link", "dangling link", "folder", "device"])
    def test_only_plain_files_are_written_over(self, kind: str, tmp_path: Path) -> None:
        target, other = tmp_path / "target", tmp_path / "other"
        other.write_text("other")
        if kind == "pipe":
            os.mkfifo(target)
        elif kind == "folder":
            target.mkdir()
        elif kind == "device":
            target = Path("/dev/null")
        else:
            target.symlink_to(other if kind == "link" else tmp_path / "gone")
        before, mode = sorted(tmp_path.iterdir()), os.lstat(target).st_mode
        with pytest.raises(InputError, match=f"is a {kind.split()[-1]}, expected the name of a file"):
            require_writable(target)
        with pytest.raises(InputError, match=f"is a {kind.split()[-1]}, expected"), draft(target):
            pytest.fail("begun")
        assert sorted(tmp_path.iterdir()) == before and os.lstat(target).st_mode == mode
        assert other.read_text() == "other"

    def test_what_the_command_reads_is_not_written_over(self, tmp_path: Path) -> None:
        read, same = tmp_path / "read", tmp_path / "same"
        read.write_text("in")
        same.hardlink_to(read)
        for target in (read, same, tmp_path / "." / "read"):
            with pytest.raises(InputError, match="is read by the same command"), draft(target, [tmp_path / "no", read]):
                pytest.fail("begun")
        with draft(tmp_path / "new", [read]) as scratch:
            scratch.write_text("out")
        assert read.read_text() == "in"

    @pytest.mark.parametrize("layout", ["metadata.json", "cpu/law_meta.json"])
    @pytest.mark.parametrize("place", ["a.txt", "cpu/a.txt", "cpu/float64/a.txt"])
    def test_nothing_is_written_into_an_artifact(self, layout: str, place: str, tmp_path: Path) -> None:
        (tmp_path / "law/cpu/float64").mkdir(parents=True)
        (tmp_path / "law" / layout).write_text("{}")
        (tmp_path / "link").symlink_to(tmp_path / "law")
        for folder in ("law", "link", "law/../law"):
            with pytest.raises(InputError, match=r"lies in the artifact .*law, which is never changed"):
                require_writable(tmp_path / folder / place)
        require_writable(tmp_path / "a.txt")
