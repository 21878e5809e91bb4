"""What clients learn of NBD: VDI.get_nbd_info, the network's purposes, and the addresses of its PIF."""

from pathlib import Path

import pytest

from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.nbd_service import NbdDoor, NbdService
from gateway.core.records import Records

from .estate_for_tests import ADMIN, Site, refusal

MIB = 1 << 20
PLAIN = NbdService(("192.0.2.7", "2001:db8::7"), 10809, None, "gateway.test")
SECURE = NbdService(("192.0.2.7", "2001:db8::7"), 10810, "the certificate", "gateway.test")


@pytest.fixture
async def vdi(live: Site, tmp_path: Path) -> str:
    host = live.estate.records.this_host.ref
    location = {"location": str(tmp_path / "sr")}
    sr = await live.call("SR.create", ADMIN, host, location, "0", "local", "", "file", "user", False, {})
    record = {"SR": sr, "virtual_size": str(4 * MIB), "name_label": "disk"}
    found: str = await live.call("VDI.create", ADMIN, record)
    return found


async def network_of(site: Site) -> str:
    (network,) = await site.call("network.get_all", ADMIN)
    assert isinstance(network, str)
    return network


async def test_without_nbd_there_is_nowhere_to_connect_to(live: Site, vdi: str) -> None:
    assert await live.call("VDI.get_nbd_info", ADMIN, vdi) == []
    network = await network_of(live)
    assert await live.call("network.get_purpose", ADMIN, network) == ()
    assert (await refusal(live, "network.add_purpose", ADMIN, network, "nbd"))[0] == "OPERATION_NOT_ALLOWED"


async def test_each_address_is_told_with_the_session_that_asks(live: Site, vdi: str) -> None:
    live.estate.nbd.serve(PLAIN)
    uuid = await live.call("VDI.get_uuid", ADMIN, vdi)
    assert await live.call("VDI.get_nbd_info", "vm-admin", vdi) == [
        {
            "exportname": f"/{uuid}?session_id=vm-admin",
            "address": address,
            "port": 10809,
            "subject": "gateway.test",
        }
        for address in ("192.0.2.7", "2001:db8::7")
    ]


async def test_a_certificate_is_told_only_by_who_demands_tls(live: Site, vdi: str) -> None:
    live.estate.nbd.serve(PLAIN)
    assert all("cert" not in info for info in await live.call("VDI.get_nbd_info", ADMIN, vdi))
    live.estate.nbd.serve(SECURE)
    told = await live.call("VDI.get_nbd_info", ADMIN, vdi)
    assert {(info["cert"], info["port"]) for info in told} == {("the certificate", 10810)}


async def test_a_disk_that_is_not_here_has_no_address(live: Site, vdi: str) -> None:
    live.estate.nbd.serve(PLAIN)
    (pbd,) = live.estate.records.pbds.all()
    await live.call("PBD.unplug", ADMIN, pbd.ref)
    assert await live.call("VDI.get_nbd_info", ADMIN, vdi) == []


async def test_metadata_without_data_is_no_disk(live: Site, vdi: str) -> None:
    await live.estate.records.vdis.change(vdi, type="cbt_metadata")
    assert await refusal(live, "VDI.get_nbd_info", ADMIN, vdi) == [
        "VDI_INCOMPATIBLE_TYPE",
        vdi,
        "cbt_metadata",
    ]


async def test_who_may_not_read_disks_gets_no_export_name(live: Site, vdi: str) -> None:
    live.estate.nbd.serve(PLAIN)
    assert (await refusal(live, "VDI.get_nbd_info", "vm-operator", vdi))[0] == "RBAC_PERMISSION_DENIED"


async def test_the_last_refusal_is_in_the_record_and_never_stored(live: Site, vdi: str) -> None:
    assert "last-refusal" not in await live.call("VDI.get_sm_config", ADMIN, vdi)
    live.estate.refusals.note(vdi, "writing by root (nbd, process 7)", "VDI_IN_USE: why")
    record = await live.call("VDI.get_record", ADMIN, vdi)
    told = record["sm_config"]["last-refusal"]
    assert told.endswith("Z writing by root (nbd, process 7): VDI_IN_USE: why")
    other = {"SR": record["SR"], "virtual_size": record["virtual_size"], "sm_config": record["sm_config"]}
    copy = await live.call("VDI.create", ADMIN, other)
    assert "last-refusal" not in await live.call("VDI.get_sm_config", ADMIN, copy)
    await live.call("VDI.set_sm_config", ADMIN, vdi, {"last-refusal": "mine", "a": "b"})
    assert await live.call("VDI.get_sm_config", ADMIN, vdi) == {"last-refusal": told, "a": "b"}


@pytest.mark.parametrize(
    ("service", "purpose", "other"), [(PLAIN, "insecure_nbd", "nbd"), (SECURE, "nbd", "insecure_nbd")]
)
async def test_removing_the_purpose_switches_nbd_off_and_adding_it_on_again(
    live: Site, vdi: str, service: NbdService, purpose: str, other: str
) -> None:
    live.estate.nbd.serve(service)
    network = await network_of(live)
    assert await live.call("network.get_purpose", ADMIN, network) == (purpose,)
    await live.call("network.remove_purpose", ADMIN, network, other)
    await live.call("network.add_purpose", ADMIN, network, purpose)
    assert await live.call("network.get_purpose", ADMIN, network) == (purpose,)
    assert await refusal(live, "network.add_purpose", ADMIN, network, other) == [
        "NETWORK_INCOMPATIBLE_PURPOSES",
        other,
        purpose,
    ]
    await live.call("network.remove_purpose", ADMIN, network, purpose)
    assert await live.call("network.get_purpose", ADMIN, network) == ()
    assert await live.call("VDI.get_nbd_info", ADMIN, vdi) == []
    with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
        live.estate.nbd.check()
    await live.call("network.add_purpose", ADMIN, network, purpose)
    assert len(await live.call("VDI.get_nbd_info", ADMIN, vdi)) == 2
    live.estate.nbd.check()


async def test_only_administrators_change_purposes_and_only_known_ones(site: Site) -> None:
    site.estate.nbd.serve(PLAIN)
    network = await network_of(site)
    for verb in ("add", "remove"):
        refused = await refusal(site, f"network.{verb}_purpose", "pool-operator", network, "nbd")
        assert refused[0] == "RBAC_PERMISSION_DENIED"
        assert (await refusal(site, f"network.{verb}_purpose", ADMIN, network, "fun"))[:3] == [
            "VALUE_NOT_SUPPORTED",
            "value",
            "fun",
        ]
        assert (await refusal(site, f"network.{verb}_purpose", ADMIN, "OpaqueRef:x", "nbd"))[
            0
        ] == "HANDLE_INVALID"


async def test_a_switch_lasts_over_restarts_and_so_do_references(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        database = await Database.open(str(tmp_path / "gateway.sqlite3"))
        try:
            events = Events()
            records = await Records.load(database, events)
            nbd = await NbdDoor.load(database, events, records.this_host)
            nbd.serve(PLAIN)
            states.append((nbd.network, nbd.interface, nbd.purposes))
            await nbd.remove_purpose("insecure_nbd")
        finally:
            await database.aclose()
    first, second = states
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == (("insecure_nbd",), ())


async def test_network_host_and_interface_refer_to_each_other(site: Site) -> None:
    site.estate.nbd.serve(PLAIN)
    network = await network_of(site)
    (interface,) = await site.call("network.get_PIFs", ADMIN, network)
    record = await site.call("PIF.get_record", ADMIN, interface)
    assert (record["IP"], record["IPv6"]) == ("192.0.2.7", ("2001:db8::7",))
    assert record["network"] == network
    assert record["host"] == site.estate.records.this_host.ref
    assert await site.call("host.get_PIFs", ADMIN, record["host"]) == (interface,)
    assert await site.call("network.get_by_uuid", ADMIN, await site.call("network.get_uuid", ADMIN, network))
    assert await site.call("network.get_by_name_label", ADMIN, "VDI Gateway") == [network]
    other = await site.call("host.create", ADMIN, "", "other", "", "other", "192.0.2.8")
    assert await site.call("host.get_PIFs", ADMIN, other) == ()


async def test_an_interface_has_the_hosts_address_while_no_nbd_is_served(site: Site) -> None:
    (interface,) = await site.call("PIF.get_all", ADMIN)
    assert await site.call("PIF.get_IP", ADMIN, interface) == "192.0.2.7"
    site.estate.nbd.serve(NbdService(("gateway.test",), 10809))
    assert await site.call("PIF.get_IP", ADMIN, interface) == ""


async def test_what_is_served_is_told_as_it_changes(site: Site) -> None:
    network = await network_of(site)
    first = await site.call("event.from", ADMIN, ["network"], "", 0.0)
    site.estate.nbd.serve(PLAIN)
    told = await site.call("event.from", ADMIN, ["network"], first["token"], 30.0)
    assert [(event["ref"], event["snapshot"]["purpose"]) for event in told["events"]] == [
        (network, ("insecure_nbd",))
    ]
    site.estate.nbd.serve(PLAIN)
    told = await site.call("event.from", ADMIN, ["network"], told["token"], 0.0)
    assert told["events"] == []
