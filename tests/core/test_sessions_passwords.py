"""Passwords at the door: what a check costs, which are believed for a while, and how guessing is slowed."""

import itertools
import tracemalloc
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from gateway.core.errors import XenAPIError
from gateway.core.limits import Limits
from gateway.core.passwords import Passwords, Verdict
from gateway.core.roles import Role
from gateway.core.sessions import Credentials
from tests.core.refusal import refused
from tests.core.session_gate import HERE, LOOK, THERE, CountedPasswords, Gate


async def test_without_credentials_nothing_opens_and_nothing_is_hashed(gate: Gate) -> None:
    for credentials in (Credentials(HERE), Credentials(HERE, user="root"), Credentials(HERE, password="x")):
        with refused("SESSION_AUTHENTICATION_FAILED"):
            await gate.sessions.authorize(credentials, LOOK)
    assert gate.passwords.verified == 0


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


async def test_a_stranger_cannot_fill_the_memory_with_long_names(
    gate: Gate, autojump_clock: MockClock
) -> None:
    tracemalloc.start()
    try:
        for number in range(8):
            with pytest.raises(XenAPIError) as refusal:
                await gate.login(f"{number}{'x' * (1 << 20)}", "wrong")
            assert len(str(refusal.value)) < 1000
            del refusal
        # Python 3.13 has the frames of the last refusal still.
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
    finally:
        tracemalloc.stop()


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
