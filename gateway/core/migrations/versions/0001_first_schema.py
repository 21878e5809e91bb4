"""The first schema. What it makes is written out here, not taken from today's tables, which will change."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=False)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False)


def _bytes(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False)


def _moment(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(32), nullable=False)


def _object(name: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("ref", sa.String, nullable=False),
        sa.Column("uuid", sa.String(36), nullable=False),
        sa.PrimaryKeyConstraint("ref", name=f"pk_{name}"),
        sa.UniqueConstraint("uuid", name=f"uq_{name}_uuid"),
    ]


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("name", sa.String, nullable=False),
        _text("value"),
        sa.PrimaryKeyConstraint("name", name="pk_settings"),
    )
    op.create_table(
        "pools",
        *_object("pools"),
        _text("name_label"),
        _text("name_description"),
        _text("master"),
        _text("default_sr"),
        _text("suspend_image_sr"),
        _text("crash_dump_sr"),
        _json("other_config"),
        _json("tags"),
        _json("gui_config"),
    )
    op.create_table(
        "hosts",
        *_object("hosts"),
        _text("name_label"),
        _text("name_description"),
        _text("hostname"),
        _text("address"),
        _flag("enabled"),
        _json("software_version"),
        _json("other_config"),
        _json("tags"),
    )
    op.create_table(
        "srs",
        *_object("srs"),
        _text("name_label"),
        _text("name_description"),
        _bytes("virtual_allocation"),
        _bytes("physical_utilisation"),
        _bytes("physical_size"),
        _text("type"),
        _text("content_type"),
        _flag("shared"),
        _json("other_config"),
        _json("tags"),
        _json("sm_config"),
        _flag("local_cache_enabled"),
        _text("introduced_by"),
        _flag("clustered"),
        _flag("is_tools_sr"),
    )
    op.create_table(
        "pbds",
        *_object("pbds"),
        _text("host"),
        _text("sr"),
        _json("device_config"),
        _flag("currently_attached"),
        _json("other_config"),
        sa.ForeignKeyConstraint(["host"], ["hosts.ref"], name="fk_pbds_host"),
        sa.ForeignKeyConstraint(["sr"], ["srs.ref"], name="fk_pbds_sr"),
    )
    op.create_table(
        "vdis",
        *_object("vdis"),
        _text("sr"),
        _text("name_label"),
        _text("name_description"),
        _bytes("virtual_size"),
        _bytes("physical_utilisation"),
        _text("type"),
        _flag("sharable"),
        _flag("read_only"),
        _json("other_config"),
        _flag("storage_lock"),
        _text("location"),
        _flag("managed"),
        _flag("missing"),
        _text("parent"),
        _json("xenstore_data"),
        _json("sm_config"),
        _flag("is_a_snapshot"),
        _text("snapshot_of"),
        _moment("snapshot_time"),
        _json("tags"),
        _flag("allow_caching"),
        _text("on_boot"),
        _text("metadata_of_pool"),
        _flag("metadata_latest"),
        _flag("is_tools_iso"),
        _flag("cbt_enabled"),
        _text("content_id"),
        _text("image_format"),
        sa.ForeignKeyConstraint(["sr"], ["srs.ref"], name="fk_vdis_sr"),
    )
    op.create_index("ix_vdis_sr", "vdis", ["sr"])
    op.create_table(
        "tasks",
        *_object("tasks"),
        _text("name_label"),
        _text("name_description"),
        _moment("created"),
        _moment("finished"),
        _text("status"),
        sa.Column("progress", sa.Float, nullable=False),
        _text("type"),
        _text("result"),
        _json("error_info"),
        _json("other_config"),
        _text("subtask_of"),
        _text("resident_on"),
        _text("user"),
        _text("session_uuid"),
        _flag("client_made"),
        _flag("worked_on"),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("role", sa.Integer, nullable=False),
        _flag("disabled"),
        _text("password_hash"),
        sa.PrimaryKeyConstraint("name", name="pk_users"),
    )
    op.create_table(
        "sessions",
        sa.Column("ref_sha256", sa.String(64), nullable=False),
        sa.Column("uuid", sa.String(36), nullable=False),
        _text("object_ref"),
        _text("user"),
        _text("version"),
        _text("originator"),
        _text("address"),
        _moment("created"),
        _moment("last_active"),
        sa.PrimaryKeyConstraint("ref_sha256", name="pk_sessions"),
        sa.UniqueConstraint("uuid", name="uq_sessions_uuid"),
        sa.ForeignKeyConstraint(["user"], ["users.name"], name="fk_sessions_user", ondelete="CASCADE"),
    )
    op.create_index("ix_sessions_user", "sessions", ["user"])
