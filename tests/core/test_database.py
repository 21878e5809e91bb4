import os
import shutil
import sqlite3
import stat
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy
import trio
import trio.testing
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, select, text

from gateway.core import schema
from gateway.core.database import MIGRATIONS, Database, DatabaseFailed, DatabaseUnusable

SECOND_SCHEMA = """
import sqlalchemy as sa
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    with op.batch_alter_table("srs") as table:
        table.add_column(sa.Column("colour", sa.String, nullable=False, server_default="grey"))
        table.alter_column("name_label", existing_type=sa.String, nullable=True)
"""
BROKEN_MIGRATION = """
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.execute("DELETE FROM settings")
    op.execute("this is no SQL")
"""
ORPHANING_MIGRATION = """
from alembic import op
revision = "0002"
down_revision = "0001"
def upgrade():
    op.execute("DELETE FROM settings")
    op.execute("INSERT INTO pbds VALUES ('p', 'p', 'no host', 'no SR', '{}', 1, '{}')")
"""


def put(name: str, value: str) -> "sqlalchemy.Insert":
    return insert(schema.settings).values(name=name, value=value)


def value_of(connection: Connection, name: str) -> str | None:
    query = select(schema.settings.c.value).where(schema.settings.c.name == name)
    return connection.execute(query).scalar_one_or_none()


def migrations_with(directory: Path, script: str) -> Path:
    shutil.copytree(MIGRATIONS, directory, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "versions" / "0002_second.py").write_text(script)
    return directory


async def test_a_new_database_is_private_and_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))
    await database.run(lambda connection: connection.execute(put("colour", "red")))
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    await database.aclose()
    database = await Database.open(str(path))
    assert await database.run(lambda connection: value_of(connection, "colour")) == "red"
    await database.aclose()


async def test_a_file_that_others_may_read_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    path.touch(mode=0o644)
    path.chmod(0o644)
    await (await Database.open(str(path))).aclose()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_the_connection_has_the_settings_that_durability_needs(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))

    def pragmas(connection: Connection) -> dict[str, object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names}

    assert await database.run(pragmas) == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }
    await database.aclose()


async def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))

    def half_done(connection: Connection) -> None:
        connection.execute(put("colour", "red"))
        raise LookupError("in the middle")

    with pytest.raises(LookupError, match="in the middle"):
        await database.run(half_done)
    assert await database.run(lambda connection: value_of(connection, "colour")) is None
    await database.aclose()


async def test_transactions_take_the_write_lock_at_once_and_run_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))
    inside, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def only_reads(connection: Connection) -> None:
        value_of(connection, "colour")
        inside.set()
        assert leave.wait(30)
        order.append("first")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.run, only_reads)
        assert await trio.to_thread.run_sync(inside.wait, 30)
        nursery.start_soon(database.run, lambda _connection: order.append("second"))
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()
        leave.set()
    assert order == ["first", "second"]
    await database.aclose()


async def test_a_caller_that_is_cancelled_during_its_transaction_still_learns_the_result(
    tmp_path: Path,
) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))
    with trio.CancelScope() as scope:

        def cancelled_midway(_connection: Connection) -> str:
            trio.from_thread.run_sync(scope.cancel, trio_token=token)
            return "done"

        token = trio.lowlevel.current_trio_token()
        assert await database.run(cancelled_midway) == "done"
    await database.aclose()


async def test_the_loop_goes_on_while_the_database_works(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))
    turned = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.run, lambda _connection: turned.wait(30))
        await trio.testing.wait_all_tasks_blocked()
        turned.set()
    await database.aclose()


async def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    path.write_bytes(b"a letter to my mother\n" * 100)
    with pytest.raises(
        DatabaseUnusable, match=r"gateway\.sqlite3: it cannot be used as a database .*move it"
    ):
        await Database.open(str(path))
    assert path.read_bytes().startswith(b"a letter")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.core.database.BUSY_TIMEOUT", 10)


@pytest.mark.usefixtures("impatient")
async def test_nobody_is_told_to_move_a_database_away_that_another_program_holds(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    told = r"cannot be used .*database is locked.*; another program uses it: wait"
    with pytest.raises(DatabaseFailed, match=told):
        await database.run(lambda connection: connection.execute(put("colour", "red")))
    await database.aclose()
    with pytest.raises(DatabaseUnusable, match=told):
        await Database.open(str(path))
    other.close()
    database = await Database.open(str(path))
    await database.run(lambda connection: connection.execute(put("colour", "red")))
    await database.aclose()


async def test_a_full_disk_is_told_as_one_and_over_once_there_is_space(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))

    def limit(connection: Connection, pages: int) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    await database.run(partial(limit, pages=1))  # none more than there are
    large = put("colour", "red" * 100_000)
    with pytest.raises(DatabaseFailed, match=r"database or disk is full\); look whether there is space"):
        await database.run(lambda connection: connection.execute(large))
    await database.run(partial(limit, pages=1_000_000))
    await database.run(lambda connection: connection.execute(large))
    await database.aclose()


async def test_nobody_is_told_to_move_a_database_away_that_can_only_be_read(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))
    # Root may write whatever the mode says.
    await database.run(lambda connection: connection.exec_driver_sql("PRAGMA query_only = ON").close())
    with pytest.raises(DatabaseFailed, match="make it and its directory readable and writable"):
        await database.run(lambda connection: connection.execute(put("colour", "red")))
    await database.aclose()


async def test_no_error_shows_what_was_to_be_written(tmp_path: Path) -> None:
    database = await Database.open(str(tmp_path / "gateway.sqlite3"))
    await database.run(lambda connection: connection.execute(put("colour", "a secret")))
    with pytest.raises(sqlalchemy.exc.IntegrityError) as refused:
        await database.run(lambda connection: connection.execute(put("colour", "a secret")))
    assert "UNIQUE" in str(refused.value)
    assert "a secret" not in str(refused.value)
    await database.aclose()


async def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.close()
    with pytest.raises(DatabaseUnusable, match="another program"):
        await Database.open(str(path))


async def test_a_newer_schema_is_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))
    await database.run(
        lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '0777'"))
    )
    await database.aclose()
    with pytest.raises(DatabaseUnusable, match=r"gateway\.sqlite3.*schema 0777 is newer.*install the newer"):
        await Database.open(str(path))
    assert os.listdir(tmp_path) == ["gateway.sqlite3"]


async def test_an_older_schema_is_copied_beside_itself_and_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))

    def filled(connection: Connection) -> None:
        connection.execute(put("colour", "red"))
        defaults = {
            column.name: "" if isinstance(column.type, sqlalchemy.String) else 0
            for column in schema.srs.columns
            if not isinstance(column.type, sqlalchemy.JSON | schema.TextSet)
        }
        maps: dict[str, object] = {"other_config": {}, "sm_config": {}, "tags": ()}
        connection.execute(insert(schema.srs).values({**defaults, **maps, "ref": "s", "uuid": "s"}))
        hosts = dict.fromkeys(("ref", "uuid", "name_label", "name_description", "hostname", "address"), "h")
        connection.execute(
            insert(schema.hosts).values(**hosts, enabled=True, software_version={}, other_config={}, tags=())
        )
        connection.execute(
            insert(schema.pbds).values(
                ref="p",
                uuid="p",
                host="h",
                sr="s",
                device_config={},
                currently_attached=True,
                other_config={},
            )
        )

    await database.run(filled)
    await database.aclose()

    database = await Database.open(
        str(path),
        revisions=("0001", "0002"),
        migrations=migrations_with(tmp_path / "migrations", SECOND_SCHEMA),
    )

    def found(connection: Connection) -> list[object]:
        return [
            value_of(connection, "colour"),
            connection.execute(text("SELECT colour FROM srs")).scalar_one(),
            connection.execute(text("SELECT sr FROM pbds")).scalar_one(),
            connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one(),
            connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one(),
        ]

    assert await database.run(found) == ["red", "grey", "s", "0002", 1]
    await database.aclose()

    copy = tmp_path / "gateway.sqlite3.schema-0001"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    before = await Database.open(str(copy))
    assert await before.run(lambda connection: value_of(connection, "colour")) == "red"
    await before.aclose()

    with pytest.raises(DatabaseUnusable, match="schema 0002 is newer than 0001"):
        await Database.open(str(path))


@pytest.mark.parametrize(
    ("script", "why"), [(BROKEN_MIGRATION, "this"), (ORPHANING_MIGRATION, "rows that refer to nothing")]
)
async def test_an_upgrade_that_fails_leaves_the_database_as_it_was(
    tmp_path: Path, script: str, why: str
) -> None:
    path = tmp_path / "gateway.sqlite3"
    database = await Database.open(str(path))
    await database.run(lambda connection: connection.execute(put("colour", "red")))
    await database.aclose()
    migrations = migrations_with(tmp_path / "migrations", script)
    with pytest.raises(DatabaseUnusable, match=why):
        await Database.open(str(path), revisions=("0001", "0002"), migrations=migrations)
    database = await Database.open(str(path))
    assert await database.run(lambda connection: value_of(connection, "colour")) == "red"
    await database.aclose()


async def test_migrations_from_nothing_make_the_same_tables_as_a_new_database(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    raw.close()
    database = await Database.open(str(path))
    new = await Database.open(str(tmp_path / "new.sqlite3"))

    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), schema.metadata)

    def keys(connection: Connection) -> object:
        inspector = sqlalchemy.inspect(connection)
        return {
            table: (
                inspector.get_pk_constraint(table),
                sorted(inspector.get_foreign_keys(table), key=str),
                sorted(inspector.get_unique_constraints(table), key=str),
            )
            for table in schema.metadata.tables
        }

    assert await database.run(differences) == []
    assert await database.run(keys) == await new.run(keys)
    await database.aclose()
    await new.aclose()


def test_the_program_knows_exactly_the_revisions_that_have_a_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == schema.REVISIONS


async def test_alembic_is_not_imported_for_a_schema_that_is_up_to_date(tmp_path: Path) -> None:
    program = (
        "import sys, trio\n"
        "from gateway.core.database import Database\n"
        "async def main():\n"
        "    for _ in range(2):\n"
        "        await (await Database.open(sys.argv[1])).aclose()\n"
        "    assert 'alembic' not in sys.modules\n"
        "trio.run(main)\n"
    )
    await trio.run_process([sys.executable, "-c", program, str(tmp_path / "gateway.sqlite3")])
