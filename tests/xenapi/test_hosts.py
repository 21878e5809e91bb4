"""This host and others: their addresses, their SRs, and which version of the API they speak."""

import pytest

from gateway.repository.inventory import Where

from .estate_for_tests import ADMIN, Site, inventory_of, refusal


async def test_an_sr_on_another_host_is_made_known(live: Site) -> None:
    uuid = "0d5b4a44-7b0c-4f2e-9a3e-6f2a55a0c001"
    host = await live.call("host.create", ADMIN, "", "other", "", "other.test", "other.test:8443")
    sr = await live.call("SR.introduce", ADMIN, uuid, "there", "", "file", "user", True, {})
    pbd = await live.call("PBD.create", ADMIN, {"host": host, "SR": sr, "device_config": {}})
    assert inventory_of(live).where_is(sr) is Where.NOWHERE
    await live.call("PBD.plug", ADMIN, pbd)
    assert inventory_of(live).where_is(sr) == live.estate.records.hosts.get(host)
    assert await live.call("host.get_PBDs", ADMIN, host) == (pbd,)
    assert (await refusal(live, "host.destroy", ADMIN, host))[0] == "OPERATION_NOT_ALLOWED"
    await live.call("PBD.unplug", ADMIN, pbd)
    await live.call("PBD.destroy", ADMIN, pbd)
    await live.call("host.destroy", ADMIN, host)
    assert len(await live.call("host.get_all", ADMIN)) == 1


@pytest.mark.parametrize(
    "address",
    ["", "a b", "a\r\nb", "a/b", "user@host", "[::1", "::1", "-a", "a:b", "a:123456", "http://a", "é"],
)
async def test_a_host_is_reached_at_an_address_and_nothing_else(site: Site, address: str) -> None:
    create = ("host.create", ADMIN, "", "n", "", "h", address)
    assert (await refusal(site, *create))[:2] == ["VALUE_NOT_SUPPORTED", "address"]
    host = site.estate.records.this_host.ref
    assert (await refusal(site, "host.set_address", ADMIN, host, address))[0] == "VALUE_NOT_SUPPORTED"


@pytest.mark.parametrize("address", ["a", "10.0.0.1", "10.0.0.1:8080", "[::1]", "[fe80::1]:443", "a-b.test"])
async def test_every_form_of_an_address_will_do(site: Site, address: str) -> None:
    host = await site.call("host.create", ADMIN, "", "n", "", "h", address)
    assert await site.call("host.get_address", ADMIN, host) == address


async def test_a_host_has_one_uuid_and_a_gateway_cannot_forget_itself(site: Site) -> None:
    this = site.estate.records.this_host
    create = ("n", "", "h", "a")
    assert (await refusal(site, "host.create", ADMIN, this.uuid, *create))[0] == "VALUE_NOT_SUPPORTED"
    assert (await refusal(site, "host.create", ADMIN, "no uuid", *create))[0] == "VALUE_NOT_SUPPORTED"
    assert (await refusal(site, "host.destroy", ADMIN, this.ref))[0] == "OPERATION_NOT_ALLOWED"
    await site.call("host.disable", ADMIN, this.ref)
    assert await site.call("host.get_enabled", ADMIN, this.ref) is False
    await site.call("host.enable", ADMIN, this.ref)
    assert await site.call("host.get_enabled", ADMIN, this.ref) is True


async def test_a_client_learns_the_version_of_the_api(site: Site) -> None:
    (pool,) = await site.call("pool.get_all", ADMIN)
    host = await site.call("pool.get_master", ADMIN, pool)
    major = await site.call("host.get_API_version_major", ADMIN, host)
    assert (major, await site.call("host.get_API_version_minor", ADMIN, host)) == (2, 21)
    assert isinstance(await site.call("host.get_software_version", ADMIN, host), dict)
