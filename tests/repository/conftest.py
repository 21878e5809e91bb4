import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gateway.core.database import Database
from gateway.core.events import Events
from gateway.core.leases import Leases
from gateway.core.limits import Limits
from gateway.core.records import Records
from gateway.images.files import FILES, FileCalls
from gateway.repository.inventory import Inventory
from gateway.repository.repository import Repository

if TYPE_CHECKING:
    from tests.repository.chains import Chains
    from tests.repository.coalesce_house import House, OpenHouse

SR_UUID = "5a3c1f5e-6c2b-4e1a-9f0d-0123456789ab"

OpenInventory = Callable[..., AbstractAsyncContextManager[Inventory]]


@pytest.fixture(autouse=True)
def no_descriptor_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    targets = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{entry}"))
    assert not [target for target in targets if target.startswith(str(tmp_path))]


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> "Chains":
    from tests.repository.chains import Chains

    return Chains(tmp_path_factory.mktemp("chains"))


@pytest.fixture
def leases() -> Leases:
    return Leases(Limits(lease_wait=0))


@pytest.fixture
async def repository(tmp_path: Path, leases: Leases) -> AsyncIterator[Repository]:
    made = await Repository.create(str(tmp_path / "sr"), SR_UUID, leases, who="the test")
    yield made
    await made.detach()


@pytest.fixture
def open_inventory(tmp_path: Path) -> OpenInventory:
    @asynccontextmanager
    async def opened(
        *, database: str = "gateway.sqlite3", files: FileCalls = FILES
    ) -> AsyncIterator[Inventory]:
        events = Events()
        store = await Database.open(str(tmp_path / database))
        try:
            records = await Records.load(store, events)
            async with Inventory.open(
                records, Leases(Limits(lease_wait=0)), events, who="the test", files=files
            ) as inventory:
                yield inventory
        finally:
            await store.aclose()

    return opened


@pytest.fixture
async def inventory(open_inventory: OpenInventory) -> AsyncIterator[Inventory]:
    async with open_inventory() as made:
        yield made


@pytest.fixture
def open_house(tmp_path: Path) -> "OpenHouse":
    # Its module imports tests that import this one.
    from tests.repository.coalesce_house import house_in

    return house_in(tmp_path)


@pytest.fixture
async def house(open_house: "OpenHouse") -> "AsyncIterator[House]":
    async with open_house() as made:
        yield made


def listing(directory: str | Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below `directory` with its inode, time stamp and content."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[os.path.relpath(path, directory)] = (status.st_ino, status.st_mtime_ns, content)
    return found
