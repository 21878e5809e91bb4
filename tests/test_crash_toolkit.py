import os
import random
from pathlib import Path

import pytest

from tests.crash import CrashState, RecordingFileCalls
from tests.crash_model import PAGE

Seen = dict[str, bytes]
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL


def files_of(state: CrashState) -> Seen:
    return {
        str(path.relative_to(state.directory)): path.read_bytes()
        for path in state.directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "built"


def killed(files: RecordingFileCalls, into: Path) -> list[Seen]:
    return [files_of(state) for state in files.kill_states(into)]


def powerless(files: RecordingFileCalls, into: Path, per_point: int = 40) -> list[Seen]:
    return [files_of(state) for state in files.power_states(into, random.Random(1), per_point)]


def test_what_was_written_back_takes_as_many_blocks_from_then_on(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "a"), CREATE)
    for number in range(30):
        files.pwrite(fd, b"a" * PAGE, number * 16 * PAGE)
    files.close(fd)
    *_, state = files.kill_states(into)
    path = state.directory / "a"
    state.write_back()
    before = path.stat()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    after = path.stat()
    assert (after.st_blocks, after.st_mtime_ns) == (before.st_blocks, before.st_mtime_ns)


def test_a_kill_leaves_what_was_done_so_far(root: Path, into: Path) -> None:
    (root / "old").write_bytes(b"old")
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "new"), CREATE)
    files.pwrite(fd, b"abcdef", 0)
    files.truncate(fd, 3)
    files.sync(fd)
    files.close(fd)
    files.rename(str(root / "new"), str(root / "old"))
    files.unlink(str(root / "old"))
    assert killed(files, into) == [
        {"old": b"old"},
        {"old": b"old", "new": b""},
        {"old": b"old", "new": b"abcdef"},
        {"old": b"old", "new": b"abc"},
        {"old": b"abc"},
        {},
    ]


def test_a_long_write_is_also_cut_at_a_page(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file"), CREATE)
    files.pwrite(fd, b"x" * 4 * PAGE, 0)
    files.close(fd)
    assert [len(state.get("file", b"")) for state in killed(files, into)] == [0, 0, 2 * PAGE, 4 * PAGE]


def test_holes_punches_and_copies_are_replayed(root: Path, into: Path) -> None:
    source_content = b"s" * PAGE + bytes(3 * PAGE) + b"t" * 100
    source = root / "source"
    with source.open("wb") as out:
        out.write(b"s" * PAGE)
        out.seek(4 * PAGE)
        out.write(b"t" * 100)
    files = RecordingFileCalls(root)
    source_fd = os.open(source, os.O_RDONLY)
    fd = files.open(str(root / "copy"), CREATE)
    files.copy_range(source_fd, 0, fd, 0, len(source_content))
    files.punch(fd, 10, PAGE)
    files.pwrite(fd, b"u" * 7, 2 * PAGE + 5)
    files.close(fd)
    os.close(source_fd)
    punched = source_content[:10] + bytes(PAGE) + source_content[10 + PAGE :]
    written = punched[: 2 * PAGE + 5] + b"u" * 7 + punched[2 * PAGE + 12 :]
    copies = [state.get("copy") for state in killed(files, into)]
    assert [copy for copy in copies if copy is None or len(copy) == len(source_content)] == [
        None,
        source_content,
        punched,
        written,
    ]


def test_hard_links_stay_one_file(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "one"), CREATE)
    files.link(str(root / "one"), str(root / "two"))
    files.pwrite(fd, b"both", 0)
    files.close(fd)
    *_, last = files.kill_states(into)
    assert files_of(last) == {"one": b"both", "two": b"both"}
    assert (last.directory / "one").samefile(last.directory / "two")


def test_directories_and_renames_between_them_are_replayed(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    files.mkdir(str(root / "staging"))
    fd = files.open(str(root / "staging" / "file"), CREATE)
    files.close(fd)
    files.rename(str(root / "staging" / "file"), str(root / "file"))
    assert killed(files, into) == [{}, {}, {"staging/file": b""}, {"file": b""}]


def test_a_power_failure_never_takes_what_was_synced(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file"), CREATE)
    files.pwrite(fd, b"safe" * 200, 0)
    files.datasync(fd)
    files.sync_directory(str(root))
    files.mark("safe")
    files.pwrite(fd, b"lost" * 200, 800)
    files.close(fd)
    marked = 0
    for state in files.power_states(into, random.Random(1), per_point=40):
        if "safe" in state.marks:
            marked += 1
            assert files_of(state)["file"][:800] == b"safe" * 200
    assert marked > 40


def test_a_power_failure_loses_reorders_and_tears_unsafe_writes(root: Path, into: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file"), CREATE)
    files.sync_directory(str(root))
    files.pwrite(fd, b"a" * 1024, 0)
    files.pwrite(fd, b"b" * 512, 1024)
    files.close(fd)
    seen = {state["file"] for state in powerless(files, into) if "file" in state}
    assert b"" in seen
    assert b"a" * 1024 + b"b" * 512 in seen
    assert bytes(1024) + b"b" * 512 in seen  # the later write without the earlier one
    assert b"a" * 512 in seen  # torn
    assert bytes(512) + b"a" * 512 in seen
    assert bytes(1024) in seen  # only its growth
    for content in seen:
        sectors = [content[i : i + 512] for i in range(0, len(content), 512)]
        assert all(sector in (bytes(512), b"a" * 512, b"b" * 512) for sector in sectors)


def test_a_name_is_unsafe_until_its_directory_is_synced(root: Path, into: Path) -> None:
    (root / "file").write_bytes(b"old")
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file.new"), CREATE)
    files.pwrite(fd, b"new", 0)
    files.sync(fd)
    files.close(fd)
    files.rename(str(root / "file.new"), str(root / "file"))
    files.mark("renamed")
    files.sync_directory(str(root))
    files.mark("safe")
    before: set[bytes] = set()
    for state in files.power_states(into, random.Random(2), per_point=40):
        if "safe" in state.marks:
            assert files_of(state) == {"file": b"new"}
        elif "renamed" in state.marks:
            before.add(files_of(state)["file"])
    assert before == {b"old", b"new"}


def test_a_rename_without_fsync_may_show_an_empty_file(root: Path, into: Path) -> None:
    (root / "file").write_bytes(b"old")
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file.new"), CREATE)
    files.pwrite(fd, b"new", 0)
    files.close(fd)
    files.rename(str(root / "file.new"), str(root / "file"))
    files.sync_directory(str(root))
    assert {state["file"] for state in powerless(files, into)} >= {b"old", b"new", b""}


def test_a_state_is_built_anew_after_the_test_changed_it(root: Path, into: Path) -> None:
    (root / "kept").write_bytes(b"kept")
    (root / "empty").touch()
    files = RecordingFileCalls(root)
    files.close(files.open(str(root / "new"), CREATE))
    for state in files.kill_states(into):
        found = files_of(state)
        assert (found.pop("kept"), found.pop("empty")) == (b"kept", b"")
        for name in ("kept", "empty"):
            (state.directory / name).write_bytes(b"hurt")
        (state.directory / "stray").write_bytes(b"stray")


def test_a_change_that_bypasses_the_seam_is_noticed(root: Path, into: Path) -> None:
    (root / "file").write_bytes(b"old")
    files = RecordingFileCalls(root)
    (root / "file").write_bytes(b"new")
    with pytest.raises(AssertionError, match="outside of the seam"):
        next(files.kill_states(into))


def test_the_same_seed_gives_the_same_states(root: Path, tmp_path: Path) -> None:
    files = RecordingFileCalls(root)
    fd = files.open(str(root / "file"), CREATE)
    for number in range(5):
        files.pwrite(fd, bytes([number + 1]) * 2048, number * 1024)
    files.close(fd)
    assert powerless(files, tmp_path / "first", 5) == powerless(files, tmp_path / "second", 5)
