"""What a check says of a directory: names, orphans, copies and chains that trouble the storage manager."""

import errno
import os
import uuid
from pathlib import Path

import pytest

from gateway.images.vhd import check_directory as check_directory_module
from gateway.images.vhd.check import CheckReport, ProblemKind, check_directory, check_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic, set_hidden
from tests.images.damaged import SIZE, Vhd, kinds


def new_name() -> str:
    return f"{uuid.uuid4()}.vhd"


def repository_kinds(path: Path) -> set[ProblemKind]:
    return kinds(check_directory(str(path))[0])


def test_a_healthy_repository_has_no_problems(tmp_path: Path) -> None:
    base, leaf, raw = tmp_path / new_name(), tmp_path / new_name(), tmp_path / f"{uuid.uuid4()}.raw"
    create_dynamic(str(base), SIZE)
    create_differencing(str(leaf), str(base), Vhd(base).image())
    set_hidden(str(base), True)
    raw.write_bytes(bytes(4096))
    (tmp_path / f"{uuid.uuid4()}.cbtlog").touch()
    (tmp_path / "filelog.txt").touch()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".vdi-gateway").mkdir()
    reports = check_directory(str(tmp_path))
    assert [report.problems for report in reports] == [(), (), ()]
    assert [report.path for report in reports] == [str(tmp_path), *sorted(map(str, (base, leaf)))]


def test_orphans_visible_parents_and_copies_are_told(tmp_path: Path) -> None:
    base, leaf = tmp_path / new_name(), tmp_path / new_name()
    create_dynamic(str(base), SIZE)
    create_differencing(str(leaf), str(base), Vhd(base).image())
    assert repository_kinds(tmp_path) == {ProblemKind.VISIBLE_PARENT}
    set_hidden(str(base), True)
    set_hidden(str(leaf), True)
    assert repository_kinds(tmp_path) == {ProblemKind.ORPHAN}
    set_hidden(str(leaf), False)
    (tmp_path / new_name()).write_bytes(leaf.read_bytes())
    assert repository_kinds(tmp_path) == {ProblemKind.SAME_ID}


def test_a_chain_deeper_than_xenserver_makes_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / new_name()
    create_dynamic(str(path), 4096, block_size=4096)
    for _ in range(30):
        above, path = path, tmp_path / new_name()
        create_differencing(str(path), str(above), Vhd(above).image(), block_size=4096)
        set_hidden(str(above), True)
    reports = check_directory(str(tmp_path))
    assert [problem.path for problem in reports[0].problems] == [str(path)]
    assert kinds(reports[0]) == {ProblemKind.CHAIN_TOO_DEEP}


# One for all runs: parallel workers must collect the same names of tests.
SOME_ID = "0f4c2d6e-6a51-4f0e-9d0b-5b8c7e1a2f3a"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("backup.raw", ProblemKind.STRANGE_NAME),
        (f"{SOME_ID.upper()}.raw", ProblemKind.STRANGE_NAME),
        ("coalesce", ProblemKind.STRANGE_NAME),
        ("relink_me", ProblemKind.STRANGE_NAME),
        (f"coalesce_{SOME_ID}", ProblemKind.INTERRUPTED),
        (f"OLD_{SOME_ID}.raw", ProblemKind.INTERRUPTED),
        (f"{SOME_ID}.vhd.new", ProblemKind.INTERRUPTED),
    ],
)
def test_names_that_trouble_the_storage_manager_are_told(
    tmp_path: Path, file: str, expected: ProblemKind
) -> None:
    (tmp_path / file).touch()
    assert repository_kinds(tmp_path) == {expected}


def test_a_broken_image_does_not_stop_the_check_of_the_others(tmp_path: Path) -> None:
    good, bad = tmp_path / new_name(), tmp_path / new_name()
    create_dynamic(str(good), SIZE)
    bad.write_bytes(b"nothing")
    by_path = {report.path: report for report in check_directory(str(tmp_path))}
    assert by_path[str(good)].problems == ()
    assert kinds(by_path[str(bad)]) == {ProblemKind.NO_FOOTER}


def test_a_file_that_cannot_be_read_does_not_stop_the_check_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a disk with bad sectors, for which one checks the directory at all."""
    good, bad, child, link = (tmp_path / new_name() for _ in range(4))
    for path in (good, bad):
        create_dynamic(str(path), SIZE)
    create_differencing(str(child), str(bad), Vhd(bad).image())
    link.symlink_to(tmp_path / "nowhere")
    read = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if os.path.sameopenfile(fd, broken.fileno()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    with bad.open("rb") as broken:
        by_path = {report.path: report for report in check_directory(str(tmp_path))}
    assert by_path[str(good)].problems == ()
    assert kinds(by_path[str(bad)]) == kinds(by_path[str(link)]) == {ProblemKind.UNREADABLE}
    assert "Input/output error" in str(by_path[str(bad)].problems[0])
    assert kinds(by_path[str(child)]) == {ProblemKind.PARENT_UNREADABLE}
    assert by_path[str(bad)].errors


def test_an_image_that_goes_while_the_others_are_checked_is_none_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, goes = sorted(tmp_path / new_name() for _ in range(2))
    for path in (stays, goes):
        create_dynamic(str(path), SIZE)

    def check(path: str) -> CheckReport:
        goes.unlink(missing_ok=True)
        return check_vhd(path)

    monkeypatch.setattr(check_directory_module, "check_vhd", check)
    reports = check_directory(str(tmp_path))
    assert [(report.path, report.problems) for report in reports] == [(str(tmp_path), ()), (str(stays), ())]
