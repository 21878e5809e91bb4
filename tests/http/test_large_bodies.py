"""Calls whose bodies are large take turns: whoever sends them need not have logged in."""

from pathlib import Path

from trio.testing import wait_all_tasks_blocked

from gateway.http.rpc import LARGE
from tests.http.gate import Client, Gate, open_gate


async def begin(client: Client, length: int = LARGE) -> None:
    await client.head("POST", "/", {"content-length": str(length)})


async def test_one_address_has_one_large_body_at_a_time_on_its_way(gate: Gate) -> None:
    async with gate.client() as first, gate.client() as second, gate.client() as third:
        await begin(first)
        await first.send(b"a")
        await wait_all_tasks_blocked()
        await begin(second)
        await second.send(b"b" * LARGE)
        # Small ones don't wait for anybody.
        await begin(third, 1)
        await third.send(b"c")
        assert (await third.answer()).body == b"http:c"
        await wait_all_tasks_blocked()
        gate.heard.clear()
        await first.send(b"a" * (LARGE - 1))
        assert (await second.answer()).body == b"http:" + b"b" * LARGE
        assert (await first.answer()).body == b"http:" + b"a" * LARGE
    assert gate.heard == [b"a", b"b"]


async def test_whose_turn_does_not_come_is_told_so(tmp_path: Path) -> None:
    async with (
        open_gate(tmp_path, transfer_idle=0.3) as gate,
        gate.client() as first,
        gate.client() as second,
        gate.client() as third,
    ):
        for client in (first, second, third):
            await begin(client)
            await wait_all_tasks_blocked()
        assert (await first.answer()).status == 408
        refused = await third.answer()
        assert refused.status == 503
        assert "try again later" in refused.text


async def test_what_is_too_large_is_refused_without_a_turn(gate: Gate) -> None:
    async with gate.client() as first, gate.client() as second:
        await begin(first)
        await wait_all_tasks_blocked()
        await begin(second, 1 << 30)
        assert (await second.answer()).status == 413
