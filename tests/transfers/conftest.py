from tests.repository.conftest import inventory, leases, no_descriptor_stays_open, open_inventory
from tests.system.conftest import small_file_system
from tests.transfers.pulling import files, house

__all__ = [
    "files",
    "house",
    "inventory",
    "leases",
    "no_descriptor_stays_open",
    "open_inventory",
    "small_file_system",
]
