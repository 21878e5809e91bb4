"""Logs of changed blocks after a crash: the row of a VDI and its snapshots leads on, and no bit is lost."""

import os
import random
from itertools import chain
from pathlib import Path

from gateway.images.cbtlog import CbtHeader, CbtLog
from gateway.images.files import FILES
from gateway.images.vhd.create import create_dynamic
from gateway.repository.cbt_logs import CbtLogs, child_of_log, recover_logs, way_between
from gateway.repository.directory import SRDirectory, make_service_directory
from tests.crash import RecordingFileCalls

FIRST, DISK, NEW = (f"0000000{number}-0000-4000-8000-000000000000" for number in (1, 2, 3))
SIZE = 4 << 20
BITS = b"\x80\x01" + bytes(6)


def test_after_a_crash_at_any_point_a_snapshot_is_in_the_row_or_was_never_there(tmp_path: Path) -> None:
    directory = SRDirectory(str(tmp_path / "sr"))
    os.mkdir(directory.root)
    make_service_directory(directory)
    for uuid in (FIRST, DISK):
        create_dynamic(directory.image(uuid, "vhd"), SIZE)
    before = CbtLogs(directory, FILES)
    before.write(FIRST, CbtLog(CbtHeader(None, DISK, consistent=True, size=SIZE), bytes(8)))
    before.write(DISK, CbtLog(CbtHeader(FIRST, None, consistent=False, size=SIZE), BITS))

    files = RecordingFileCalls(Path(directory.root))
    logs = CbtLogs(directory, files)
    logs.begin_snapshot(DISK, NEW, SIZE)
    files.mark("begun")
    files.link(directory.image(DISK, "vhd"), directory.image(NEW, "vhd"))
    files.sync_directory(directory.root)
    logs.settle_snapshot(DISK, NEW)
    files.mark("settled")
    logs.write_header(NEW, CbtHeader(FIRST, DISK, consistent=True, size=SIZE))
    files.mark("complete")
    logs.remove(FIRST)
    files.mark("removed")

    pending = chain(
        files.kill_states(tmp_path / "kill"), files.power_states(tmp_path / "power", random.Random(1), 4)
    )
    for state in pending:
        found = SRDirectory(str(state.directory))
        left = CbtLogs(found, FILES)
        there = os.path.exists(found.image(NEW, "vhd"))
        if there:
            # Its log came first, durably.
            made = left.read(NEW)
            assert made is not None, state
            assert made.bits == BITS, state
        if "settled" in state.marks:
            assert left.headers()[DISK].parent == NEW, state
        if "complete" in state.marks:
            assert left.headers()[NEW].consistent, state
        recover_logs(found, FILES)
        headers = left.headers()
        assert (FIRST in headers) or there, state
        assert FIRST not in headers or "removed" not in state.marks, state
        row = [uuid for uuid in (FIRST, NEW, DISK) if uuid in headers]
        assert way_between(headers, row[0], DISK) == row, state
        assert (NEW in row) is there, state
        kept = left.read(NEW if there else DISK)
        assert kept is not None, state
        assert kept.bits == BITS, state
        # XenServer goes the other way.
        assert {uuid: headers[uuid].child for uuid in row} == {u: child_of_log(headers, u) for u in row}, (
            state
        )
        # Doing so again changes nothing.
        recover_logs(found, FILES)
        assert left.headers() == headers, state
