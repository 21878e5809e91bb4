"""One class of records: all of them in memory, indexed, written through to one table of the database.

A change is durable before anybody sees it, and each one publishes an event. Reads never wait. Writers of one
class take turns on a lock, for otherwise two of them could reach the database in one order and the memory in
the other; the trap is therefore to write a record inside `edit`'s function, which holds that lock.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

import sqlalchemy
import trio
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from gateway.core.database import Database, DatabaseFailed
from gateway.core.errors import XenAPIError
from gateway.core.events import Events
from gateway.core.refs import NULL_REF, is_ref


class Record(Protocol):
    """A frozen dataclass with a reference and a uuid, whose fields are the columns of its table."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def ref(self) -> str: ...

    @property
    def uuid(self) -> str: ...


T = TypeVar("T", bound=Record)


class Table(Generic[T]):
    """The records of one class. `class_name` is XenAPI's; `indexed` names what `referring` looks up.

    `owners` maps fields that refer to another object to its class: that object's record says something of
    this one (SR.VDIs), so it has changed too when this one comes, goes, turns to another, or changes in one
    of the fields that are `told`.
    """

    def __init__(
        self,
        kind: type[T],
        class_name: str,
        columns: sqlalchemy.Table,
        database: Database,
        events: Events,
        *,
        indexed: tuple[str, ...] = (),
        owners: Mapping[str, str] | None = None,
        told: tuple[str, ...] = (),
    ) -> None:
        self.class_name: Final = class_name
        self._owners = dict(owners or {})
        self._told = (*self._owners, *told)
        self._kind = kind
        self._fields = tuple(field.name for field in dataclasses.fields(kind))
        self._columns = columns
        self._database = database
        self._events = events
        self._lock = trio.Lock()
        self._by_ref: dict[str, T] = {}
        self._by_uuid: dict[str, str] = {}
        # field -> value -> references, in the order they came (a dict keeps it, and removes in no time)
        self._indexes: dict[str, dict[str, dict[str, None]]] = {field: {} for field in indexed}

    def __len__(self) -> int:
        return len(self._by_ref)

    def __contains__(self, ref: object) -> bool:
        return ref in self._by_ref

    def get(self, ref: str) -> T:
        """The record with this reference. Raises HANDLE_INVALID."""
        record = self._by_ref.get(ref)
        if record is None:
            raise XenAPIError("HANDLE_INVALID", self.class_name, ref)
        return record

    def by_uuid(self, uuid: str) -> T:
        """The record with this uuid, in either case. Raises UUID_INVALID."""
        ref = self._by_uuid.get(uuid.lower())
        if ref is None:
            raise XenAPIError("UUID_INVALID", self.class_name, uuid)
        return self._by_ref[ref]

    def find(self, ref_or_uuid: str) -> T:
        """The record with this reference or uuid. Raises HANDLE_INVALID or UUID_INVALID by its form."""
        return self.get(ref_or_uuid) if is_ref(ref_or_uuid) else self.by_uuid(ref_or_uuid)

    def all(self) -> list[T]:
        """Every record, oldest first."""
        return list(self._by_ref.values())

    def by_name_label(self, label: str) -> list[T]:
        """The records with exactly this name; names need not be unique."""
        return self.referring("name_label", label)

    def referring(self, field: str, value: str) -> list[T]:
        """The records whose `field` (an indexed one) is `value`: the VDIs of an SR, the PBDs of a host."""
        return [self._by_ref[ref] for ref in self._indexes[field].get(value, ())]

    async def load(self) -> None:
        """Read every record from the database."""

        def rows(connection: Connection) -> list[Mapping[str, Any]]:
            # SQLite's rowid keeps the order in which the records came.
            query = select(self._columns).order_by(sqlalchemy.literal_column("rowid"))
            return [dict(row) for row in connection.execute(query).mappings()]

        for row in await self._database.run(rows):
            self._put(self._kind(**row))

    async def add(self, record: T) -> T:
        """Store a new record; it is durable on return. Raises DB_UNIQUENESS_CONSTRAINT_VIOLATION,
        HANDLE_INVALID.
        """
        await self.add_all([record])
        return record

    async def add_all(self, records: Iterable[T]) -> None:
        """Store new records in one transaction: all or none."""
        added = list(records)
        async with self._lock:
            uuids: set[str] = set()
            for record in added:
                uuid = record.uuid.lower()
                if uuid in self._by_uuid or uuid in uuids:
                    raise XenAPIError(
                        "DB_UNIQUENESS_CONSTRAINT_VIOLATION", self.class_name, "uuid", record.uuid
                    )
                uuids.add(uuid)
            rows = [self._row(record) for record in added]
            if rows:
                await self._write(lambda connection: connection.execute(insert(self._columns), rows))
            for record in added:
                self._put(record)
                self._events.publish(self.class_name, "add", record.ref)
            self._publish_owners(*added)

    async def change(self, ref: str, **fields: Any) -> T:
        """Set `fields` of one record; the record as it is then. Raises HANDLE_INVALID."""
        return await self.edit(ref, lambda _record: fields)

    async def edit(self, ref: str, compute: Callable[[T], Mapping[str, Any]]) -> T:
        """Set the fields that `compute` makes of the record as it is now, and nobody writes in between.

        What `compute` raises goes to the caller, and nothing is changed.
        """
        async with self._lock:
            await self._store({ref: compute(self.get(ref))})
            return self.get(ref)

    async def record_fact(self, ref: str, compute: Callable[[T], Mapping[str, Any]]) -> None:
        """As `edit`, for what is so already, as the content of a file: if the database can't be written,
        memory follows all the same. Raises DatabaseFailed then; the next change writes the whole record.
        """
        async with self._lock:
            changes = {ref: compute(self.get(ref))}
            try:
                await self._store(changes)
            except DatabaseFailed:
                self._take(self._changed(changes))
                raise

    async def change_all(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Set fields of many records (reference -> fields) in one transaction: all or none. Raises
        HANDLE_INVALID.
        """
        async with self._lock:
            await self._store(changes)

    async def remove(self, ref: str) -> None:
        """Remove one record. Raises HANDLE_INVALID; OPERATION_NOT_ALLOWED while others refer to it."""
        await self.remove_all([ref])

    async def remove_all(self, refs: Iterable[str]) -> None:
        """Remove records in one transaction: all or none."""
        removed = list(dict.fromkeys(refs))
        async with self._lock:
            records = [self.get(ref) for ref in removed]
            if removed:
                statement = delete(self._columns).where(self._columns.c.ref == bindparam("_ref"))
                rows = [{"_ref": ref} for ref in removed]
                await self._write(lambda connection: connection.execute(statement, rows))
            for record in records:
                self._drop(record)
                self._events.publish(self.class_name, "del", record.ref)
            self._publish_owners(*records)

    async def _store(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        changed = self._changed(changes)
        if not changed:
            return
        statement = update(self._columns).where(self._columns.c.ref == bindparam("_ref"))
        rows = [{**self._row(record), "_ref": record.ref} for record in changed]
        await self._write(lambda connection: connection.execute(statement, rows))
        self._take(changed)

    def _changed(self, changes: Mapping[str, Mapping[str, Any]]) -> list[T]:
        """The records that become others by `changes`, as they are then."""
        changed: list[T] = []
        for ref, fields in changes.items():
            before = self.get(ref)
            if "ref" in fields or "uuid" in fields:
                raise ValueError("a record keeps its reference and its uuid")
            after = dataclasses.replace(before, **fields)
            if after != before:
                changed.append(after)
        return changed

    def _take(self, changed: Iterable[T]) -> None:
        """Into memory, and tell everybody."""
        for record in changed:
            before = self._by_ref[record.ref]
            self._drop_from_indexes(before)
            self._put(record)
            self._events.publish(self.class_name, "mod", record.ref)
            if any(getattr(before, field) != getattr(record, field) for field in self._told):
                self._publish_owners(before, record)

    def _publish_owners(self, *records: T) -> None:
        owners = {
            (class_name, str(getattr(record, field)))
            for record in records
            for field, class_name in self._owners.items()
        }
        for class_name, ref in sorted(owners):
            if ref != NULL_REF and (class_name != self.class_name or ref in self._by_ref):
                self._events.publish(class_name, "mod", ref)

    async def _write(self, work: Callable[[Connection], Any]) -> None:
        try:
            await self._database.run(work)
        except sqlalchemy.exc.IntegrityError as error:
            if "foreign key" not in str(error.orig).lower():
                raise
            raise XenAPIError(
                "OPERATION_NOT_ALLOWED",
                f"another object refers to the {self.class_name}, or it refers to none",
            ) from error

    def _row(self, record: T) -> dict[str, Any]:
        return {field: getattr(record, field) for field in self._fields}

    def _put(self, record: T) -> None:
        self._by_ref[record.ref] = record
        self._by_uuid[record.uuid.lower()] = record.ref
        for field, index in self._indexes.items():
            index.setdefault(getattr(record, field), {})[record.ref] = None

    def _drop(self, record: T) -> None:
        del self._by_ref[record.ref]
        del self._by_uuid[record.uuid.lower()]
        self._drop_from_indexes(record)

    def _drop_from_indexes(self, record: T) -> None:
        for field, index in self._indexes.items():
            value = getattr(record, field)
            refs = index[value]
            del refs[record.ref]
            if not refs:
                del index[value]
