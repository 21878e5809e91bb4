"""VDI.import_from_url through the API: who may call it, what it refuses, its task, and what nobody reads."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from gateway.core.limits import Limits
from gateway.transfers.pull_source import PullRules
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Api
from tests.transfers.pull_server import LOOPBACK, Connection, Request, file_of, serving

from .estate_for_tests import ADMIN, Site, refusal, sr_of
from .test_copy import ended

MIB = 1 << 20
DATA = bytes(range(256)) * 8192


def fetching(site: Site, rules: PullRules | None = None, **limits: float) -> Site:
    """The site, with a gateway that may fetch from the loopback."""
    api = site.api
    estate = replace(
        api._estate,
        pull_rules=lambda: rules or PullRules.of(LOOPBACK),
        limits=Limits(**limits),  # type: ignore[arg-type]
    )
    return replace(site, api=Api(estate, api._nursery, CLASSES))


async def test_an_image_becomes_a_vdi_under_a_task_that_tells_of_it(live: Site, tmp_path: Path) -> None:
    site = fetching(live)
    sr = await sr_of(site, tmp_path / "sr")
    checksum = f"SHA256:{hashlib.sha256(DATA).hexdigest().upper()}"
    with serving(file_of(DATA)) as server:
        task = await site.call("Async.VDI.import_from_url", "vm-admin", f"{server.url}/a%20b.raw", sr)
        record = await ended(site, task)
        assert record["status"] == "success"
        assert record["other_config"] == {
            "pulled-from": f"{server.url}/a%20b.raw",
            "bytes-pulled": str(len(DATA)),
            "bytes-to-pull": str(len(DATA)),
        }
        vdi = record["result"].removeprefix("<value>").removesuffix("</value>")
        assert await site.call("VDI.get_name_label", ADMIN, vdi) == "a b.raw"
        arguments = (server.url, sr, "named", "raw", checksum, True)
        first = await site.call("VDI.import_from_url", ADMIN, *arguments)
        assert await site.call("VDI.import_from_url", ADMIN, *arguments) == first
        record = await site.call("VDI.get_record", ADMIN, first)
    assert (record["name_label"], record["virtual_size"]) == ("named", len(DATA))
    assert record["other_config"]["pulled-checksum"] == checksum.lower()
    assert len(server.requests) == 2
    assert await site.call("SR.get_current_operations", ADMIN, sr) == {}


async def test_what_it_refuses_is_said(live: Site, tmp_path: Path) -> None:
    site = fetching(live)
    sr = await sr_of(site, tmp_path / "sr")
    url = "http://127.0.0.1:1/x"
    refused = await refusal(site, "VDI.import_from_url", "vm-power-admin", url, sr)
    assert refused[0] == "PULL_ERROR_UNREACHABLE"
    for parameters, expected in (
        (("ftp://me:secret@a/", sr), ["VALUE_NOT_SUPPORTED", "url"]),
        (("http://me:secret@a b/", sr), ["VALUE_NOT_SUPPORTED", "url"]),
        ((url, "OpaqueRef:none"), ["HANDLE_INVALID", "SR", "OpaqueRef:none"]),
        ((url, sr, "", "chunked"), ["VALUE_NOT_SUPPORTED", "format", "chunked"]),
        ((url, sr, "", "iso"), ["IMPORT_ERROR_UNKNOWN_FORMAT", "iso"]),
        ((url, sr, "", "raw", "md5:00"), ["VALUE_NOT_SUPPORTED", "checksum", "md5:00"]),
        ((url, sr, "", "raw", "sha256:00"), ["VALUE_NOT_SUPPORTED", "checksum", "sha256:00"]),
        ((url, sr, "", "raw", "ftp://x:secret@a/"), ["VALUE_NOT_SUPPORTED", "checksum"]),
        ((url, sr), ["PULL_ERROR_UNREACHABLE", url, "Connection refused"]),
        (("http://[::1]:1/", sr), ["PULL_ERROR_ADDRESS_REFUSED", "http://[::1]:1/", "::1"]),
    ):
        refused = await refusal(site, "VDI.import_from_url", ADMIN, *parameters)
        assert refused[: len(expected)] == expected
        assert "secret" not in "".join(refused)
    refused = await refusal(site, "VDI.import_from_url", "vm-operator", url, sr)
    assert refused[0] == "RBAC_PERMISSION_DENIED"
    tasks = await site.call("task.get_all_records", ADMIN)
    assert "secret" not in json.dumps(tasks, default=str)
    assert await site.call("VDI.get_all", ADMIN) == []


async def test_the_rules_in_force_are_those_of_the_moment(live: Site, tmp_path: Path) -> None:
    rules = [PullRules()]
    site = fetching(live)
    site = replace(
        site,
        api=Api(replace(site.api._estate, pull_rules=lambda: rules[0]), site.api._nursery, CLASSES),
    )
    sr = await sr_of(site, tmp_path / "sr")
    with serving(file_of(DATA)) as server:
        refused = await refusal(site, "VDI.import_from_url", ADMIN, server.url, sr)
        assert refused == ["PULL_ERROR_ADDRESS_REFUSED", f"{server.url}/", "127.0.0.1", "a loopback address"]
        rules[0] = PullRules.of(LOOPBACK)
        await site.call("VDI.import_from_url", ADMIN, server.url, sr)


@pytest.mark.parametrize("waits", ["for its turn", "for the server"])
async def test_cancelling_ends_it_wherever_it_waits(live: Site, tmp_path: Path, waits: str) -> None:
    site = fetching(live, transfer_idle=1000)
    sr = await sr_of(site, tmp_path / "sr")
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def handler(_request: Request, connection: Connection) -> None:
        connection.head(Content_Length=10 * MIB)
        token.run_sync_soon(asked.set)
        connection.wait_for_end()

    turns = site.api._estate.pulls
    turns.total_tokens = 1
    with serving(handler) as server:
        task = await site.call("Async.VDI.import_from_url", ADMIN, server.url, sr)
        await asked.wait()
        if waits == "for its turn":
            second = await site.call("Async.VDI.import_from_url", ADMIN, server.url, sr)
            while not turns.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
            await site.call("task.cancel", ADMIN, second)
            assert (await ended(site, second))["status"] == "cancelled"
            assert len(server.requests) == 1
        await site.call("task.cancel", ADMIN, task)
        assert (await ended(site, task))["status"] == "cancelled"
    assert turns.borrowed_tokens == 0
    assert await site.call("VDI.get_all", ADMIN) == []
    assert list((tmp_path / "sr" / ".vdi-gateway" / "staging").iterdir()) == []
