"""The metadata database: one SQLite file, one connection, one worker thread at a time.

`run` hands a function to that thread inside one transaction; when it returns, what was written survives a
power loss (WAL with synchronous=FULL). Two traps. The sqlite3 driver's own transactions begin late and not
for DDL, so it is put into autocommit and BEGIN IMMEDIATE is sent here. And a thread cannot be cancelled: a
caller that is cancelled while its function runs still gets the result, so that memory and database never
differ.
"""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy
import structlog
import trio
from sqlalchemy import Connection, Engine, event, insert, select
from sqlalchemy.pool import StaticPool

from gateway.core import schema
from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread

T = TypeVar("T")

log: Final[structlog.typing.FilteringBoundLogger] = structlog.get_logger()

MIGRATIONS: Final = Path(__file__).with_name("migrations")

# Milliseconds; only a tool that somebody runs on the file by hand ever makes us wait.
BUSY_TIMEOUT: Final = 10_000


class DatabaseUnusable(Exception):  # noqa: N818 -- it says what the database is
    """The file at `path` cannot be the metadata database; the text says why and what to do."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class DatabaseFailed(XenAPIError):  # noqa: N818 -- it says what happened
    """A transaction was not made, and not by a fault of its own: what every door can tell, with a remedy."""

    def __init__(self, problem: str) -> None:
        self.problem = f"the gateway's database cannot be used {problem}"
        super().__init__("INTERNAL_ERROR", self.problem)

    def __str__(self) -> str:
        return self.problem


class Database:
    """An open metadata database. Made by `Database.open`."""

    def __init__(self, path: str, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self._limiter = trio.CapacityLimiter(1)

    @classmethod
    async def open(
        cls, path: str, *, revisions: tuple[str, ...] = schema.REVISIONS, migrations: Path = MIGRATIONS
    ) -> "Database":
        """Open the file at `path`, made with mode 0600 if it is not there; bring an older schema up to date.

        `revisions` names every schema this program knows, oldest first, and `migrations` is the directory of
        alembic's scripts. Raises DatabaseUnusable: a newer schema, somebody else's file, or no database at
        all.
        """
        engine = await in_thread(_opened, path, revisions, migrations)
        return cls(path, engine)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in the database's thread in one transaction: durable when this returns, undone if it
        raises. Raises DatabaseFailed: a full disk, a lock, a damaged file.
        """
        return await in_thread(self._in_transaction, work, limiter=self._limiter)

    def _in_transaction(self, work: Callable[[Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except sqlalchemy.exc.DatabaseError as error:
            # Not those that tell what is wrong with a row or a statement.
            if (
                isinstance(error, sqlalchemy.exc.OperationalError)
                or type(error) is sqlalchemy.exc.DatabaseError
            ):
                failure = DatabaseFailed(_problem(error))
                log.error("a transaction failed", path=self.path, why=str(failure))  # noqa: TRY400 -- no fault of ours
                raise failure from error
            raise

    async def aclose(self) -> None:
        """Close the file; the write-ahead log is folded into it. Waits for a running transaction."""
        with trio.CancelScope(shield=True):
            await in_thread(self._engine.dispose, limiter=self._limiter)


def _opened(path: str, revisions: tuple[str, ...], migrations: Path) -> Engine:
    # SQLite would make the file by the umask; its -wal and -shm files take the mode of this one.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.chmod(path, 0o600)
    engine = _engine(path)
    try:
        _bring_up_to_date(engine, path, revisions, migrations)
    except sqlalchemy.exc.DatabaseError as error:
        engine.dispose()
        raise DatabaseUnusable(path, f"it cannot be used as a database {_problem(error)}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _problem(error: sqlalchemy.exc.DBAPIError) -> str:
    """Why and what to do. Nobody may lose a database by advice for another trouble than theirs."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        remedy = "another program uses it: wait until that has finished, or end it"
    elif code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
        remedy = "look whether there is space on the disk that it lies on, and whether that works"
    elif code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}:
        remedy = "make it and its directory readable and writable for this user"
    else:
        remedy = "move it away, or restore it from a copy"
    return f"({error.orig}); {remedy}"


def _engine(path: str) -> Engine:
    engine = sqlalchemy.create_engine(
        sqlalchemy.URL.create("sqlite", database=path),
        # One connection serves whichever worker thread holds the limiter.
        poolclass=StaticPool,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT / 1000},
        # Errors are logged and told, and rows hold the hashes of passwords.
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _bring_up_to_date(engine: Engine, path: str, revisions: tuple[str, ...], migrations: Path) -> None:
    newest = revisions[-1]
    with engine.begin() as connection:
        names = set(sqlalchemy.inspect(connection).get_table_names())
        if not names:
            # All in one transaction: a start that is killed here leaves an empty file, which is as good as
            # none.
            schema.metadata.create_all(connection)
            schema.alembic_version.create(connection)
            connection.execute(insert(schema.alembic_version).values(version_num=newest))
            return
        if schema.alembic_version.name not in names:
            raise DatabaseUnusable(
                path, "it is the database of another program; give another state directory"
            )
        current = connection.execute(select(schema.alembic_version.c.version_num)).scalar_one_or_none()
    if current == newest:
        return
    if current is not None and current not in revisions:
        raise DatabaseUnusable(
            path,
            f"its schema {current} is newer than {newest}, the newest that this VDI Gateway knows; "
            "install the newer version again, or put back the copy that was made before the upgrade",
        )
    copy = f"{path}.schema-{current or 'none'}"
    _copy_database(engine, copy)
    log.info("upgrading the database", path=path, schema=current, to=newest, copy=copy)
    _upgrade(engine, migrations, newest)


def _copy_database(engine: Engine, target: str) -> None:
    """A durable, complete copy at `target`; one that a failed upgrade left is replaced."""
    partial = f"{target}.partial"
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        source = engine.raw_connection()
        try:
            driver_connection = source.driver_connection
            assert isinstance(driver_connection, sqlite3.Connection)
            copy = sqlite3.connect(partial)
            try:
                driver_connection.backup(copy)
                # The copy is one file, to be moved about by hand.
                copy.execute("PRAGMA journal_mode = DELETE")
            finally:
                copy.close()
        finally:
            source.close()
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(partial, target)
    directory = os.open(os.path.dirname(target) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _upgrade(engine: Engine, migrations: Path, revision: str) -> None:
    # Only here: importing alembic takes longer than a whole start without it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    with engine.connect() as connection:
        # SQLite changes a table by making another and dropping the first, which must not pull referring rows
        # along. The pragma is void inside a transaction, so it goes to the driver before BEGIN.
        driver_connection = connection.connection.driver_connection
        assert isinstance(driver_connection, sqlite3.Connection)
        driver_connection.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
                if connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
                    raise DatabaseUnusable(
                        str(engine.url.database),
                        "the upgrade would leave rows that refer to nothing; report this",
                    )
        finally:
            driver_connection.execute("PRAGMA foreign_keys = ON")
