import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import trio

from gateway.core import schema
from gateway.core.database import Database
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.records import PBD, SR, VDI, Host, Pool, Records
from gateway.core.refs import NULL_REF, new_ref, new_uuid


class Store:
    def __init__(self, path: str) -> None:
        self.path = path
        self.events = Events()

    async def open(self, **host: Any) -> Records:
        self.database = await Database.open(self.path)
        self.records = await Records.load(self.database, self.events, **host)
        return self.records

    async def reopen(self, **host: Any) -> Records:
        await self.database.aclose()
        return await self.open(**host)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(str(tmp_path / "gateway.sqlite3"))
    await store.open(host_name="gateway", address="192.0.2.7")
    yield store
    await store.database.aclose()


def new_sr(**fields: Any) -> SR:
    return SR(ref=new_ref(), uuid=new_uuid(), **fields)


def new_vdi(sr: SR, **fields: Any) -> VDI:
    return VDI(ref=new_ref(), uuid=new_uuid(), sr=sr.ref, **fields)


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (Pool, schema.pools),
        (Host, schema.hosts),
        (SR, schema.srs),
        (PBD, schema.pbds),
        (VDI, schema.vdis),
    ],
)
def test_a_table_has_a_column_for_each_field(kind: Any, table: sqlalchemy.Table) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == [column.name for column in table.columns]


async def test_the_first_start_makes_a_pool_and_this_host(store: Store) -> None:
    host, pool = store.records.this_host, store.records.pool
    assert (host.name_label, host.hostname, host.address) == ("gateway", "gateway", "192.0.2.7")
    assert pool.master == host.ref
    assert (len(store.records.hosts), len(store.records.pools)) == (1, 1)


async def test_this_host_keeps_its_identity_and_name_but_follows_its_address(store: Store) -> None:
    before = store.records.this_host
    await store.records.hosts.change(before.ref, name_label="mine")
    records = await store.reopen(host_name="other", address="192.0.2.8", software_version={"api": "2.21"})
    after = records.this_host
    assert (after.ref, after.uuid, after.name_label) == (before.ref, before.uuid, "mine")
    assert (after.hostname, after.address, after.software_version) == ("other", "192.0.2.8", {"api": "2.21"})
    assert records.pool.master == before.ref


async def test_every_field_survives_a_restart(store: Store) -> None:
    sr = await store.records.srs.add(
        new_sr(name_label="Ä disk 💾", physical_size=-1, sm_config={"a": "b", "": ""}, tags=("x", "y"))
    )
    pbd = await store.records.pbds.add(
        PBD(
            ref=new_ref(),
            uuid=new_uuid(),
            host=store.records.this_host.ref,
            sr=sr.ref,
            device_config={"location": "/srv"},
        )
    )
    vdi = await store.records.vdis.add(
        new_vdi(
            sr,
            name_label="root",
            virtual_size=2040 * 2**30,
            is_a_snapshot=True,
            snapshot_of=new_ref(),
            snapshot_time=datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
            other_config={"xo:import:task": "1"},
            content_id=new_uuid(),
            image_format="raw",
        )
    )
    records = await store.reopen()
    assert records.srs.all() == [sr]
    assert records.pbds.all() == [pbd]
    assert records.vdis.all() == [vdi]
    assert records.vdis.get(vdi.ref).snapshot_time.tzinfo is not None


async def test_records_are_found_by_reference_uuid_name_and_reference_to_another(store: Store) -> None:
    records = store.records
    sr = await records.srs.add(new_sr())
    one, two = new_vdi(sr, name_label="disk"), new_vdi(sr, name_label="disk", snapshot_of=new_ref())
    await records.vdis.add_all([one, two])
    assert records.vdis.get(one.ref) is one
    assert records.vdis.by_uuid(one.uuid.upper()) is one
    assert records.vdis.find(one.ref) is records.vdis.find(one.uuid) is one
    assert records.vdis.by_name_label("disk") == records.vdis_of_sr(sr.ref) == [one, two]
    assert records.snapshots_of_vdi(two.snapshot_of) == [two]
    await records.vdis.change(one.ref, name_label="renamed")
    assert records.vdis.by_name_label("disk") == [two]
    await records.vdis.remove(two.ref)
    with pytest.raises(XenAPIError, match="UUID_INVALID"):
        records.vdis.by_uuid(two.uuid)
    assert records.vdis.by_name_label("disk") == []
    assert records.snapshots_of_vdi(two.snapshot_of) == []


async def test_what_is_not_there_is_named(store: Store) -> None:
    vdis = store.records.vdis
    missing, uuid = new_ref(), new_uuid()
    calls: list[tuple[Callable[[], VDI], list[str]]] = [
        (lambda: vdis.get(missing), ["HANDLE_INVALID", "VDI", missing]),
        (lambda: vdis.find(NULL_REF), ["HANDLE_INVALID", "VDI", NULL_REF]),
        (lambda: vdis.find(uuid), ["UUID_INVALID", "VDI", uuid]),
        (lambda: vdis.find("root disk"), ["UUID_INVALID", "VDI", "root disk"]),
    ]
    for call, info in calls:
        with pytest.raises(XenAPIError) as refusal:
            call()
        assert refusal.value.error_info == info
    with pytest.raises(XenAPIError, match="HANDLE_INVALID"):
        await vdis.change(missing, name_label="x")
    with pytest.raises(XenAPIError, match="HANDLE_INVALID"):
        await vdis.remove(missing)


async def test_a_uuid_is_taken_once(store: Store) -> None:
    srs = store.records.srs
    sr = await srs.add(new_sr())
    for batch in ([SR(ref=new_ref(), uuid=sr.uuid.upper())], [(twin := new_sr()), twin]):
        with pytest.raises(XenAPIError) as refusal:
            await srs.add_all(batch)
        assert refusal.value.error_info[:3] == ["DB_UNIQUENESS_CONSTRAINT_VIOLATION", "SR", "uuid"]
    assert (await store.reopen()).srs.all() == [sr]


async def test_each_change_publishes_one_event_after_it_is_durable(store: Store) -> None:
    start = store.events.counter
    srs = store.records.srs
    sr = await srs.add(new_sr())
    await srs.change(sr.ref, name_label="a")
    await srs.change(sr.ref, name_label="a")
    changes = store.events.since(start)
    assert changes is not None
    assert [(change.class_name, change.operation, change.ref) for change in changes] == [
        ("SR", "add", sr.ref)
    ]
    assert store.events.counter == start + 2, "the third write changed nothing and told nobody"
    await srs.remove(sr.ref)
    gone = store.events.since(start)
    assert gone is not None
    assert gone[-1].operation == "del"


async def test_a_change_is_not_seen_before_it_is_durable(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    srs = store.records.srs
    sr = await srs.add(new_sr(name_label="before"))
    counter = store.events.counter

    async def fail(_work: object) -> None:
        assert srs.get(sr.ref).name_label == "before"
        raise OSError("the disk is gone")

    monkeypatch.setattr(store.database, "run", fail)
    with pytest.raises(OSError, match="gone"):
        await srs.change(sr.ref, name_label="after")
    with pytest.raises(OSError, match="gone"):
        await srs.add(new_sr())
    with pytest.raises(OSError, match="gone"):
        await srs.remove(sr.ref)
    assert srs.all() == [sr]
    assert store.events.counter == counter


async def test_edits_of_one_record_at_once_lose_nothing(store: Store) -> None:
    srs = store.records.srs
    sr = await srs.add(new_sr())

    def add_key(key: str, record: SR) -> Mapping[str, Any]:
        return {"other_config": {**record.other_config, key: "1"}}

    async def edit(key: str) -> None:
        await srs.edit(sr.ref, lambda record: add_key(key, record))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(edit, str(number))
    assert len(srs.get(sr.ref).other_config) == 20
    assert len((await store.reopen()).srs.get(sr.ref).other_config) == 20


async def test_a_batch_is_all_or_nothing(store: Store) -> None:
    records = store.records
    sr = await records.srs.add(new_sr())
    good = [new_vdi(sr), new_vdi(sr)]
    await records.vdis.add_all(good)
    stranger = VDI(ref=new_ref(), uuid=new_uuid(), sr=new_ref())
    with pytest.raises(XenAPIError, match="OPERATION_NOT_ALLOWED"):
        await records.vdis.add_all([new_vdi(sr), stranger])
    with pytest.raises(XenAPIError, match="HANDLE_INVALID"):
        await records.vdis.change_all({good[0].ref: {"name_label": "x"}, stranger.ref: {}})
    with pytest.raises(XenAPIError, match="HANDLE_INVALID"):
        await records.vdis.remove_all([good[0].ref, stranger.ref])
    assert records.vdis.all() == good
    await records.vdis.change_all({vdi.ref: {"missing": True} for vdi in good})
    assert [vdi.missing for vdi in (await store.reopen()).vdis.all()] == [True, True]


async def test_a_record_that_others_refer_to_stays(store: Store) -> None:
    sr = await store.records.srs.add(new_sr())
    vdi = await store.records.vdis.add(new_vdi(sr))
    with pytest.raises(XenAPIError, match=r"OPERATION_NOT_ALLOWED.*refers"):
        await store.records.srs.remove(sr.ref)
    await store.records.vdis.remove(vdi.ref)
    await store.records.srs.remove(sr.ref)
    assert len(store.records.srs) == 0


async def test_a_reference_and_a_uuid_never_change(store: Store) -> None:
    sr = await store.records.srs.add(new_sr())
    with pytest.raises(ValueError, match="keeps"):
        await store.records.srs.change(sr.ref, uuid=new_uuid())


async def test_ten_thousand_disks_load_and_list(store: Store) -> None:
    sr = await store.records.srs.add(new_sr())
    disks = [new_vdi(sr, name_label=str(number)) for number in range(10_000)]
    await store.records.vdis.add_all(disks)
    records = await store.reopen()
    assert records.vdis.all() == records.vdis_of_sr(sr.ref) == disks
    assert records.vdis.by_name_label("9999") == [disks[-1]]
