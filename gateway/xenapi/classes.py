"""All classes of the API. A new class is a file of its own and a line here."""

from typing import Final

from gateway.xenapi.datamodel import ApiClass
from gateway.xenapi.host import HOST
from gateway.xenapi.pbd import PBD
from gateway.xenapi.pool import POOL
from gateway.xenapi.session import SESSION
from gateway.xenapi.sr import SR
from gateway.xenapi.task import TASK
from gateway.xenapi.vdi import VDI

CLASSES: Final[tuple[ApiClass, ...]] = (SESSION, TASK, POOL, HOST, SR, PBD, VDI)
