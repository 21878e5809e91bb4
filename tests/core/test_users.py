from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from sqlalchemy import Connection
from trio.testing import wait_all_tasks_blocked

from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.network import network_of
from gateway.core.password_delay import _Counter
from gateway.core.passwords import LANES, LONGEST_PASSWORD, MEMORY_KIB, PASSES, Passwords, Verdict
from gateway.core.roles import Role
from gateway.core.users import Users


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))
    yield database
    await database.aclose()


def cheap() -> Passwords:
    return Passwords(memory_kib=8, passes=1)


async def test_hashes_are_argon2id_with_the_intended_cost() -> None:
    passwords = Passwords()
    hashed = await passwords.hash("right")
    assert hashed.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert (MEMORY_KIB, PASSES, LANES) == (19 * 1024, 2, 1)
    assert await passwords.verify(hashed, "right") is Verdict.RIGHT
    assert await passwords.verify(hashed, "wrong") is Verdict.WRONG


async def test_checking_nobodys_password_uses_the_same_parameters() -> None:
    passwords = Passwords()
    hashed = await passwords.hash("right")
    assert passwords._nobody.split("$")[:4] == hashed.split("$")[:4]
    assert [len(part) for part in passwords._nobody.split("$")] == [len(part) for part in hashed.split("$")]
    assert await passwords.verify(None, "right") is Verdict.WRONG


@pytest.mark.parametrize("password", ["", "\ud800", "x" * (LONGEST_PASSWORD + 1), "\0"])
async def test_strange_passwords_are_wrong_without_an_error(password: str) -> None:
    passwords = cheap()
    hashed = await passwords.hash("x" * LONGEST_PASSWORD)
    assert await passwords.verify(hashed, password) is Verdict.WRONG


@pytest.mark.parametrize("password", ["", "x" * (LONGEST_PASSWORD + 1), "\ud800"])
async def test_unusable_passwords_are_not_set(password: str) -> None:
    with pytest.raises(XenAPIError, match="VALUE_NOT_SUPPORTED"):
        await cheap().hash(password)


async def test_a_hash_that_cannot_be_read_is_an_error_and_not_a_wrong_password() -> None:
    with pytest.raises(XenAPIError, match="INTERNAL_ERROR"):
        await cheap().verify("plain text", "right")


async def test_the_first_start_makes_an_administrator_with_a_password_nobody_can_guess(
    database: Database,
) -> None:
    users = await Users.load(database, cheap())
    password = await users.ensure_administrator()
    assert password is not None
    assert len(password) >= 20
    root = users.get("root")
    assert (root.role, root.disabled) == (Role.POOL_ADMIN, False)
    assert await users.passwords.verify(root.password_hash, password) is Verdict.RIGHT
    assert await users.ensure_administrator() is None
    again = await Users.load(database, cheap())
    assert again.all() == [root]
    assert await again.ensure_administrator() is None


async def test_users_change_and_survive_a_restart(database: Database) -> None:
    users = await Users.load(database, cheap())
    changed: list[str] = []
    users.on_change(changed.append)
    for name in ("zoe", "ann"):
        await users.create(name, "right", Role.READ_ONLY)
    await users.set_role("ann", Role.VM_ADMIN)
    await users.set_disabled("ann", True)
    await users.set_password("zoe", "new")
    assert changed == ["ann", "ann", "zoe"]
    again = await Users.load(database, cheap())
    assert [(user.name, user.role, user.disabled) for user in again.all()] == [
        ("ann", Role.VM_ADMIN, True),
        ("zoe", Role.READ_ONLY, False),
    ]
    assert await again.passwords.verify(again.get("zoe").password_hash, "new") is Verdict.RIGHT
    await users.remove("ann")
    assert changed[-1] == "ann"
    assert [user.name for user in (await Users.load(database)).all()] == ["zoe"]


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "x" * 129])
async def test_unusable_names_are_refused(database: Database, name: str) -> None:
    users = await Users.load(database, cheap())
    with pytest.raises(XenAPIError, match="VALUE_NOT_SUPPORTED"):
        await users.create(name, "right", Role.READ_ONLY)


async def test_a_name_is_taken_once_and_an_unknown_one_is_named(database: Database) -> None:
    users = await Users.load(database, cheap())
    await users.create("ann", "right", Role.READ_ONLY)
    with pytest.raises(XenAPIError, match="DB_UNIQUENESS"):
        await users.create("ann", "other", Role.POOL_ADMIN)
    with pytest.raises(XenAPIError) as refusal:
        await users.set_password("bob", "right")
    assert refusal.value.error_info == ["HANDLE_INVALID", "user", "bob"]


async def test_a_name_that_two_ask_for_at_once_goes_to_one_of_them(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hashed_at_once(password: str) -> str:
        return password

    users = await Users.load(database, cheap())
    monkeypatch.setattr(users.passwords, "hash", hashed_at_once)
    refusals: list[str] = []

    async def ask(password: str) -> None:
        try:
            await users.create("ann", password, Role.READ_ONLY)
        except XenAPIError as refused:
            refusals.append(refused.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "one")
        nursery.start_soon(ask, "other")
    assert refusals == ["DB_UNIQUENESS_CONSTRAINT_VIOLATION"]


async def test_a_user_who_is_removed_while_something_else_is_changed_stays_removed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = await Users.load(database, cheap())
    await users.create("ann", "right", Role.READ_ONLY)
    run = database.run

    async def removed_meanwhile(work: Callable[[Connection], object]) -> object:
        monkeypatch.setattr(database, "run", run)
        nursery.start_soon(users.remove, "ann")
        await wait_all_tasks_blocked()
        return await run(work)

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(database, "run", removed_meanwhile)
        await users.set_role("ann", Role.POOL_ADMIN)
    assert users.find("ann") is None


async def test_a_user_does_not_print_the_hash(database: Database) -> None:
    users = await Users.load(database, cheap())
    assert "argon2" not in repr(await users.create("ann", "right", Role.READ_ONLY))


async def test_the_memory_of_wrong_passwords_is_bounded() -> None:
    counter: _Counter[str] = _Counter(Limits(password_delay_entries=10))
    for number in range(1000):
        counter.add(str(number))
    assert len(counter) == 10
    assert counter.delay("0") == 0
    for _ in range(5000):
        counter.add("999")
    assert counter.delay("999") == Limits().password_delay_maximum


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("a socket", "a socket"),
    ],
)
def test_an_ipv6_client_is_known_by_its_network(address: str, network: str) -> None:
    assert network_of(address) == network


async def test_a_password_counts_only_once_its_keeper_has_it(database: Database) -> None:
    users = await Users.load(database, Passwords(memory_kib=64, passes=1))
    await users.create("root", "old", Role.POOL_ADMIN)
    kept: list[tuple[str, str]] = []
    refuse = True

    async def keep(name: str, password: str) -> None:
        if refuse:
            raise OSError("no space")
        kept.append((name, password))

    users.keep_passwords(keep)
    with pytest.raises(OSError, match="no space"):
        await users.set_password("root", "new")
    assert await users.passwords.verify(users.get("root").password_hash, "old") is Verdict.RIGHT
    refuse = False
    await users.set_password("root", "new")
    await users.create("alice", "hers", Role.READ_ONLY)
    assert kept == [("root", "new"), ("alice", "hers")]
    assert await users.passwords.verify(users.get("root").password_hash, "new") is Verdict.RIGHT
