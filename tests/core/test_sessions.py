import itertools
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy.exc import OperationalError
from trio.testing import MockClock, wait_all_tasks_blocked

from gateway.core.clock import utc_now
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.passwords import Passwords, Verdict
from gateway.core.roles import Permission, Role
from gateway.core.sessions import Credentials, Identity, Sessions
from gateway.core.users import Users

HERE, THERE = "192.0.2.1", "198.51.100.9"
LOOK = Permission("VDI.get_record", Role.READ_ONLY)
ADMINISTER = Permission("pool.set_name_label", Role.POOL_ADMIN)


class CountedPasswords(Passwords):
    """Cheap parameters; `verified` counts the hashes that checking passwords took."""

    def __init__(self) -> None:
        super().__init__(memory_kib=8, passes=1)
        self.verified = 0

    async def verify(self, password_hash: str | None, password: str) -> Verdict:
        self.verified += 1
        return await super().verify(password_hash, password)


class Gate:
    """Users and sessions over one database, which can be closed and opened again."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.now = utc_now()
        self.passwords = CountedPasswords()
        self.limits = Limits()

    async def open(self) -> "Gate":
        self.database = await Database.open(self.path)
        self.users = await Users.load(self.database, self.passwords)
        await self.users.ensure_administrator("right")
        self.sessions = await Sessions.load(
            self.database, self.users, limits=self.limits, now=lambda: self.now
        )
        return self

    async def reopen(self) -> None:
        await self.database.aclose()
        await self.open()

    async def login(self, user: str = "root", password: str = "right", address: str = HERE) -> str:
        return await self.sessions.login(user, password, version="1.0", originator="test", address=address)

    async def by_ref(self, ref: str, permission: Permission = LOOK) -> Identity:
        return await self.sessions.authorize(Credentials(HERE, session_ref=ref), permission)

    async def by_password(self, user: str = "root", password: str = "right", address: str = HERE) -> Identity:
        return await self.sessions.authorize(Credentials(address, user=user, password=password), LOOK)


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    gate = await Gate(str(tmp_path / "gateway.sqlite3")).open()
    yield gate
    await gate.database.aclose()


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(XenAPIError) as refusal:
        yield
    assert refusal.value.code == code


async def test_a_session_opens_what_its_users_role_allows(gate: Gate) -> None:
    await gate.users.create("guest", "right", Role.READ_ONLY)
    ref = await gate.login("guest")
    identity = await gate.by_ref(ref)
    assert (identity.user, identity.role) == ("guest", Role.READ_ONLY)
    assert identity.session is not None
    assert identity.session == gate.sessions.get(ref)
    assert (identity.session.originator, identity.session.address) == ("test", HERE)
    with refused("RBAC_PERMISSION_DENIED"):
        await gate.by_ref(ref, ADMINISTER)
    await gate.users.set_role("guest", Role.POOL_ADMIN)
    await gate.by_ref(ref, ADMINISTER)


async def test_after_logging_out_the_reference_opens_nothing(gate: Gate) -> None:
    ref, other = await gate.login(), await gate.login()
    await gate.sessions.logout(ref)
    for call in (gate.by_ref, gate.sessions.logout):
        with refused("SESSION_INVALID"):
            await call(ref)
    await gate.by_ref(other)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        gate.sessions.get(ref)


@pytest.mark.parametrize("ref", ["", "OpaqueRef:NULL", "OpaqueRef:x", "\ud800"])
async def test_a_strange_reference_is_refused(gate: Gate, ref: str) -> None:
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)


async def test_neither_the_uuid_nor_the_object_reference_of_a_session_opens_it(gate: Gate) -> None:
    session = gate.sessions.get(await gate.login())
    assert gate.sessions.by_uuid(session.uuid) == session
    for name in (session.uuid, session.object_ref, f"OpaqueRef:{session.uuid}"):
        with refused("SESSION_INVALID"):
            await gate.by_ref(name)


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


async def test_a_session_in_use_does_not_end_but_by_logging_out(gate: Gate, mock_clock: MockClock) -> None:
    ref = await gate.login()
    session = gate.sessions.get(ref)
    with gate.sessions.in_use(session), gate.sessions.in_use(session.uuid):
        mock_clock.jump(100 * 3600)
        gate.sessions.get(ref)
    mock_clock.jump(23 * 3600)
    gate.sessions.get(ref)
    with gate.sessions.in_use(session):
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


async def test_a_wall_clock_that_was_set_back_ends_no_session(gate: Gate) -> None:
    ref = await gate.login()
    gate.now = datetime(2001, 1, 1, tzinfo=UTC)
    await gate.reopen()
    await gate.by_ref(ref)


async def test_use_is_written_down_once_a_minute_at_most(
    gate: Gate, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await gate.login()
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
    assert gate.sessions.get(ref).last_active == gate.now


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
        assert len(failures) == 3
        await gate.by_ref(used)
        with refused("SESSION_INVALID"):
            gate.sessions.get(idle)
        nursery.cancel_scope.cancel()


async def test_a_disabled_users_sessions_and_passwords_open_nothing(
    gate: Gate, autojump_clock: MockClock
) -> None:
    ref = await gate.login()
    await gate.by_password()
    await gate.users.set_disabled("root", True)
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.by_password()
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.login(address=THERE)
    await gate.users.set_disabled("root", False)
    await gate.by_ref(ref)


async def test_a_removed_users_sessions_go_too(gate: Gate) -> None:
    await gate.users.create("guest", "right", Role.READ_ONLY)
    ref = await gate.login("guest")
    await gate.users.remove("guest")
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)
    await gate.reopen()
    with refused("SESSION_INVALID"):
        await gate.by_ref(ref)


async def test_who_listens_is_told_of_every_session_that_ends(gate: Gate) -> None:
    told: list[str] = []
    gate.sessions.on_end(told.append)
    for name in ("disabled", "removed"):
        await gate.users.create(name, "right", Role.VM_ADMIN)
    refs = [await gate.login(name) for name in ("root", "disabled", "removed", "root")]
    uuids = [gate.sessions.get(ref).uuid for ref in refs]
    await gate.sessions.logout(refs[0])
    await gate.users.set_disabled("disabled", True)
    await gate.users.remove("removed")
    assert told == uuids[:3]


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


async def test_without_credentials_nothing_opens_and_nothing_is_hashed(gate: Gate) -> None:
    for credentials in (Credentials(HERE), Credentials(HERE, user="root"), Credentials(HERE, password="x")):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.sessions.authorize(credentials, LOOK)
    assert gate.passwords.verified == 0


async def test_a_session_reference_comes_before_a_password(gate: Gate) -> None:
    credentials = Credentials(HERE, session_ref="OpaqueRef:x", user="root", password="right")
    with refused("SESSION_INVALID"):
        await gate.sessions.authorize(credentials, LOOK)


def test_credentials_do_not_print_their_secrets() -> None:
    text = repr(Credentials(HERE, session_ref="OpaqueRef:secret", user="root", password="hunter2"))
    assert "secret" not in text
    assert "hunter2" not in text


async def test_basic_costs_one_hash_until_it_is_forgotten(gate: Gate, mock_clock: MockClock) -> None:
    for _ in range(20):
        identity = await gate.by_password()
    assert (identity.user, identity.session, gate.passwords.verified) == ("root", None, 1)
    mock_clock.jump(gate.limits.basic_cache_seconds)
    await gate.by_password()
    assert gate.passwords.verified == 2


async def test_requests_at_once_with_the_same_basic_credentials_cost_one_hash(gate: Gate) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(gate.by_password)
    assert gate.passwords.verified == 1


async def test_a_believed_password_does_not_make_another_one_right(
    gate: Gate, autojump_clock: MockClock
) -> None:
    await gate.by_password()
    for user, password in (("root", "wrong"), ("roo", "tright"), ("rootr", "ight"), ("root", "")):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.by_password(user, password)


async def test_a_changed_password_ends_the_belief_in_the_old_one(
    gate: Gate, autojump_clock: MockClock
) -> None:
    await gate.by_password()
    await gate.users.set_password("root", "new")
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.by_password()
    await gate.by_password(password="new")


async def test_a_password_that_changes_while_it_is_checked_is_not_believed(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    verify = gate.passwords.verify

    async def changed_meanwhile(password_hash: str | None, password: str) -> Verdict:
        verdict = await verify(password_hash, password)
        if gate.passwords.verified == 1:
            await gate.users.set_password("root", "new")
        return verdict

    monkeypatch.setattr(gate.passwords, "verify", changed_meanwhile)
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.by_password()


async def test_the_belief_in_basic_credentials_is_bounded(gate: Gate) -> None:
    gate.limits = replace(Limits(), basic_cache_entries=2)
    await gate.reopen()
    for name in ("a", "b", "c"):
        await gate.users.create(name, "right", Role.READ_ONLY)
        await gate.by_password(name)
    await gate.by_password("c")
    await gate.by_password("b")
    assert gate.passwords.verified == 3
    await gate.by_password("a")
    assert gate.passwords.verified == 4


async def test_an_unknown_user_costs_a_hash_as_a_known_one_does(
    gate: Gate, autojump_clock: MockClock
) -> None:
    for user in ("root", "nobody"):
        with pytest.raises(XenAPIError) as refusal:
            await gate.login(user, "wrong")
        assert refusal.value.error_info == [
            "SESSION_AUTHENTICATION_FAILED",
            user,
            "the user name or the password is wrong",
        ]
    assert gate.passwords.verified == 2


async def test_wrong_passwords_from_one_address_wait_twice_as_long_each_time(
    gate: Gate, autojump_clock: MockClock
) -> None:
    moments = [trio.current_time()]
    for _ in range(8):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(password="wrong")
        moments.append(trio.current_time())
    waits = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert waits[:5] == pytest.approx([0.25, 0.5, 1, 2, 4])
    assert waits[7] == pytest.approx(4)
    before = trio.current_time()
    await gate.login()
    assert trio.current_time() - before <= 4
    await gate.login()
    assert trio.current_time() - before <= 4, "the right password is not slowed any more"


async def test_wrong_passwords_sent_at_once_gain_nothing(gate: Gate, autojump_clock: MockClock) -> None:
    start = trio.current_time()

    async def guess() -> None:
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(password="wrong")

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(guess)
    # 0, 0.25, 0.75, 1.75, 3.75, then every 4 s until those who would wait for more than 30 s are sent away.
    assert gate.passwords.verified <= 12
    assert trio.current_time() - start < 60


async def test_an_attack_does_not_slow_the_right_password_from_another_address(
    gate: Gate, autojump_clock: MockClock
) -> None:
    for _ in range(8):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(password="wrong", address=THERE)
    before = trio.current_time()
    await gate.login()
    await gate.by_password()
    assert trio.current_time() == before


async def test_who_waits_for_a_wrong_password_holds_up_nobody(gate: Gate, mock_clock: MockClock) -> None:
    async def guess() -> None:
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(password="wrong", address=THERE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guess)
        while gate.passwords.verified < 1:
            await trio.lowlevel.checkpoint()
        await gate.login()
        mock_clock.jump(1)


async def test_guessing_many_users_from_one_address_is_slowed_and_a_right_password_forgives_nothing(
    gate: Gate, autojump_clock: MockClock
) -> None:
    for number in range(15):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(f"user{number}", "wrong", THERE)
    await gate.login(address=THERE)
    before = trio.current_time()
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.login("user99", "wrong", THERE)
    after_first = trio.current_time()
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.login("user100", "wrong", THERE)
    assert trio.current_time() - after_first >= 4
    assert after_first - before < 4.5


async def test_wrong_passwords_are_forgotten_after_a_while(gate: Gate, autojump_clock: MockClock) -> None:
    for _ in range(6):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.login(password="wrong")
    autojump_clock.jump(gate.limits.password_delay_forget + 1)
    before = trio.current_time()
    with refused("SESSION_AUTHENTICATION_FAILED"):
        await gate.login(password="wrong")
    assert trio.current_time() - before == pytest.approx(0.25)


async def test_a_password_hashed_by_older_parameters_is_hashed_anew_at_login(gate: Gate) -> None:
    old = gate.users.get("root").password_hash
    gate.passwords = CountedPasswords()
    Passwords.__init__(gate.passwords, memory_kib=16, passes=2)
    await gate.reopen()
    await gate.login()
    new = gate.users.get("root").password_hash
    assert "m=8,t=1" in old
    assert "m=16,t=2" in new
    await gate.reopen()
    await gate.login()
    assert gate.users.get("root").password_hash == new
