"""How long a session lasts: over restarts, without use, in use, and with too many others of its user."""

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy.exc import OperationalError
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.database import DatabaseFailed
from gateway.core.limits import Limits
from tests.core.refusal import refused
from tests.core.session_gate import Gate


async def test_a_session_outlives_a_restart_and_its_secret_is_not_on_the_disk(gate: Gate) -> None:
    ref = await gate.login()
    before = gate.sessions.get(ref)
    await gate.reopen()
    assert (await gate.by_ref(ref)).session == before
    await gate.database.aclose()
    for file in Path(gate.path).parent.iterdir():
        assert ref.removeprefix("OpaqueRef:").encode() not in file.read_bytes()
        assert b"right" not in file.read_bytes()
    await gate.open()


async def test_an_idle_session_ends_after_a_day_and_use_renews_it(gate: Gate, mock_clock: MockClock) -> None:
    ref = await gate.login()
    for _ in range(3):
        mock_clock.jump(23 * 3600)
        await gate.by_ref(ref)
    mock_clock.jump(24 * 3600)
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)
    assert gate.sessions.all() == []


async def test_looking_at_a_session_does_not_renew_it(gate: Gate, mock_clock: MockClock) -> None:
    ref = await gate.login()
    mock_clock.jump(23 * 3600)
    gate.sessions.get(ref)
    mock_clock.jump(3600)
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_a_session_in_use_does_not_end_by_being_idle(gate: Gate, mock_clock: MockClock) -> None:
    ref = await gate.login()
    session = gate.sessions.get(ref)
    with gate.sessions.in_use(session), gate.sessions.in_use(session.uuid):
        mock_clock.jump(100 * 3600)
        gate.sessions.get(ref)
    mock_clock.jump(23 * 3600)
    gate.sessions.get(ref)
    with pytest.raises(OSError), gate.sessions.in_use(session):
        raise OSError
    mock_clock.jump(25 * 3600)
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_logging_out_ends_a_session_in_use(gate: Gate) -> None:
    ref = await gate.login()
    with gate.sessions.in_use(gate.sessions.get(ref)):
        await gate.sessions.logout(ref)
        with refused("SESSION_INVALID"):
            gate.sessions.get(ref)


async def test_idle_time_goes_on_over_a_restart(gate: Gate, mock_clock: MockClock) -> None:
    ref = await gate.login()
    gate.now += timedelta(hours=23)
    await gate.reopen()
    mock_clock.jump(3600)
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_a_session_that_ended_while_the_gateway_was_down_is_removed(gate: Gate) -> None:
    ref = await gate.login()
    gate.now += timedelta(hours=25)
    await gate.reopen()
    gate.now -= timedelta(hours=25)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_a_wall_clock_that_was_set_back_neither_ends_a_session_nor_makes_it_last(
    gate: Gate, mock_clock: MockClock
) -> None:
    ref, idle = await gate.login(), await gate.login()
    gate.now = datetime(2001, 1, 1, tzinfo=UTC)
    await gate.reopen()
    await gate.by_ref(ref)
    mock_clock.jump(24 * 3600)
    with refused("SESSION_INVALID"):
        gate.sessions.get(idle)


async def test_use_is_written_down_once_a_minute_at_most(
    gate: Gate, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, other = await gate.login(), await gate.login()
    writes = 0
    run = gate.database.run

    async def counted(work: Any) -> Any:
        nonlocal writes
        writes += 1
        return await run(work)

    monkeypatch.setattr(gate.database, "run", counted)
    for _ in range(50):
        await gate.by_ref(ref)
    assert writes == 0
    mock_clock.jump(60)
    gate.now += timedelta(seconds=60)
    for _ in range(50):
        await gate.by_ref(ref)
    assert writes == 1
    await gate.reopen()
    assert gate.sessions.get(ref).last_active == gate.now
    assert gate.sessions.get(other).last_active == gate.now - timedelta(seconds=60)


async def test_ended_sessions_are_removed_in_the_background_and_used_ones_are_not(
    gate: Gate, mock_clock: MockClock
) -> None:
    idle, used = await gate.login(), await gate.login()

    def rows() -> int:
        connection = sqlite3.connect(gate.path)
        try:
            return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])
        finally:
            connection.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.sessions.run)
        with gate.sessions.in_use(gate.sessions.get(used)):
            await wait_all_tasks_blocked()
            mock_clock.jump(25 * 3600)
            gate.now += timedelta(hours=25)
            while rows() > 1:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    with refused("SESSION_INVALID"):
        gate.sessions.get(idle)
    assert gate.sessions.get(used).last_active == gate.now


async def test_a_full_disk_keeps_nobody_out_who_comes_to_make_room(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_work: object) -> None:
        raise DatabaseFailed("(database or disk is full)")

    gate.limits = replace(Limits(), sessions_per_user=2)
    await gate.reopen()
    with monkeypatch.context() as patch:
        patch.setattr(gate.database, "run", fail)
        # The third makes the first one end.
        for _ in range(3):
            ref = await gate.login()
        assert (await gate.by_ref(ref)).user == "root"
    await gate.by_ref(ref)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_who_logs_out_on_a_full_disk_stays_out_after_a_restart(
    gate: Gate, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_work: object) -> None:
        raise DatabaseFailed("(database or disk is full)")

    ref = await gate.login()
    with monkeypatch.context() as patch, refused("INTERNAL_ERROR"):
        patch.setattr(gate.database, "run", fail)
        await gate.sessions.logout(ref)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.sessions.run)
        await wait_all_tasks_blocked()
        mock_clock.jump(600)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await gate.reopen()
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


async def test_a_full_disk_ends_neither_the_background_work_nor_a_session_in_use(
    gate: Gate, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, used = await gate.login(), await gate.login()
    failures: list[bool] = []

    async def fail(_work: object) -> None:
        failures.append(True)
        raise OperationalError("DELETE", None, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(gate.database, "run", fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gate.sessions.run)
        with gate.sessions.in_use(gate.sessions.get(used)):
            for _ in range(2):
                await wait_all_tasks_blocked()
                mock_clock.jump(25 * 3600)
            await wait_all_tasks_blocked()
        # Twice each: the use of the one, the row of the other.
        assert len(failures) == 4
        await gate.by_ref(used)
        with refused("SESSION_INVALID"):
            gate.sessions.get(idle)
        nursery.cancel_scope.cancel()


async def test_a_client_that_never_logs_out_loses_its_least_used_sessions(
    gate: Gate, mock_clock: MockClock
) -> None:
    gate.limits = replace(Limits(), sessions_per_user=3)
    await gate.reopen()
    refs = [await gate.login()]
    with gate.sessions.in_use(gate.sessions.get(refs[0])):
        for _ in range(4):
            mock_clock.jump(1)
            refs.append(await gate.login())
    valid = {session.uuid for session in gate.sessions.all()}
    assert valid == {gate.sessions.get(refs[index]).uuid for index in (0, 3, 4)}
