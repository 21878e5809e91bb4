from tests.repository.conftest import inventory, leases, no_descriptor_stays_open, open_inventory

__all__ = ["inventory", "leases", "no_descriptor_stays_open", "open_inventory"]
