"""The tables of the metadata database, in SQLAlchemy Core, and the list of their revisions.

Maps and sets are JSON columns, moments are ISO 8601 text in UTC. A change here takes a new migration beside
the old ones and its name at the end of REVISIONS; a test holds that migrations and tables agree. alembic
itself is not imported here: it costs more time than the rest of the start.
"""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
)

REVISIONS: Final = ("0001",)


class TextSet(TypeDecorator[tuple[str, ...]]):
    """A set or list of strings: JSON in the database, a tuple here."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> Any:
        return None if value is None else list(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[str, ...] | None:
        return None if value is None else tuple(value)


class Moment(TypeDecorator[datetime]):
    """An aware datetime in UTC, kept as text that sorts by time on every database."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, *constraints: ForeignKey, index: bool = False) -> Column[str]:
    return Column(name, String, *constraints, nullable=False, index=index)


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False)


def _bytes(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _map(name: str) -> Column[dict[str, str]]:
    return Column(name, JSON, nullable=False)


def _set(name: str) -> Column[tuple[str, ...]]:
    return Column(name, TextSet, nullable=False)


def _moment(name: str) -> Column[datetime]:
    return Column(name, Moment, nullable=False)


def _ref() -> Column[str]:
    return Column("ref", String, primary_key=True)


def _uuid() -> Column[str]:
    return Column("uuid", String(36), nullable=False, unique=True)


# What alembic calls its own table, so that it finds our stamp and we find its.
alembic_version: Final = Table(
    "alembic_version", MetaData(), Column("version_num", String(32), primary_key=True, nullable=False)
)

settings: Final = Table("settings", metadata, Column("name", String, primary_key=True), _text("value"))

pools: Final = Table(
    "pools",
    metadata,
    _ref(),
    _uuid(),
    _text("name_label"),
    _text("name_description"),
    _text("master"),
    _text("default_sr"),
    _text("suspend_image_sr"),
    _text("crash_dump_sr"),
    _map("other_config"),
    _set("tags"),
    _map("gui_config"),
)

hosts: Final = Table(
    "hosts",
    metadata,
    _ref(),
    _uuid(),
    _text("name_label"),
    _text("name_description"),
    _text("hostname"),
    _text("address"),
    _flag("enabled"),
    _map("software_version"),
    _map("other_config"),
    _set("tags"),
)

srs: Final = Table(
    "srs",
    metadata,
    _ref(),
    _uuid(),
    _text("name_label"),
    _text("name_description"),
    _bytes("virtual_allocation"),
    _bytes("physical_utilisation"),
    _bytes("physical_size"),
    _text("type"),
    _text("content_type"),
    _flag("shared"),
    _map("other_config"),
    _set("tags"),
    _map("sm_config"),
    _flag("local_cache_enabled"),
    _text("introduced_by"),
    _flag("clustered"),
    _flag("is_tools_sr"),
)

pbds: Final = Table(
    "pbds",
    metadata,
    _ref(),
    _uuid(),
    _text("host", ForeignKey("hosts.ref")),
    _text("sr", ForeignKey("srs.ref")),
    _map("device_config"),
    _flag("currently_attached"),
    _map("other_config"),
)

vdis: Final = Table(
    "vdis",
    metadata,
    _ref(),
    _uuid(),
    _text("sr", ForeignKey("srs.ref"), index=True),
    _text("name_label"),
    _text("name_description"),
    _bytes("virtual_size"),
    _bytes("physical_utilisation"),
    _text("type"),
    _flag("sharable"),
    _flag("read_only"),
    _map("other_config"),
    _flag("storage_lock"),
    _text("location"),
    _flag("managed"),
    _flag("missing"),
    _text("parent"),
    _map("xenstore_data"),
    _map("sm_config"),
    _flag("is_a_snapshot"),
    _text("snapshot_of"),
    _moment("snapshot_time"),
    _set("tags"),
    _flag("allow_caching"),
    _text("on_boot"),
    _text("metadata_of_pool"),
    _flag("metadata_latest"),
    _flag("is_tools_iso"),
    _flag("cbt_enabled"),
    _text("content_id"),
    _text("image_format"),
)

tasks: Final = Table(
    "tasks",
    metadata,
    _ref(),
    _uuid(),
    _text("name_label"),
    _text("name_description"),
    _moment("created"),
    _moment("finished"),
    _text("status"),
    Column("progress", Float, nullable=False),
    _text("type"),
    _text("result"),
    _set("error_info"),
    _map("other_config"),
    _text("subtask_of"),
    _text("resident_on"),
    _text("user"),
    _text("session_uuid"),
    # Whether a client made it by task.create, and whether an operation of the gateway works under it.
    _flag("client_made"),
    _flag("worked_on"),
)

users: Final = Table(
    "users",
    metadata,
    Column("name", String, primary_key=True),
    Column("role", Integer, nullable=False),
    _flag("disabled"),
    _text("password_hash"),
)

sessions: Final = Table(
    "sessions",
    metadata,
    # The reference itself is the secret and is never stored.
    Column("ref_sha256", String(64), primary_key=True),
    _uuid(),
    _text("object_ref"),
    _text("user", ForeignKey("users.name", ondelete="CASCADE"), index=True),
    _text("version"),
    _text("originator"),
    _text("address"),
    _moment("created"),
    _moment("last_active"),
)
