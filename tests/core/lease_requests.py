"""Three files, and who asks a table for leases of them, for tests."""

from gateway.core.lease_table import Holder, LeaseMode
from gateway.images.files import FileIdentity

READ, REPLACE, WRITE = LeaseMode.READ, LeaseMode.REPLACE, LeaseMode.WRITE
A, B, C = (FileIdentity(1, inode) for inode in range(3))


def holder(who: str = "somebody") -> Holder:
    return Holder(who, "test", "OpaqueRef:vdi")
