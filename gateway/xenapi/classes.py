"""All classes of the API. A new class is a file of its own and a line here."""

from typing import Final

from gateway.xenapi.datamodel import ApiClass
from gateway.xenapi.event import event_class
from gateway.xenapi.host import HOST
from gateway.xenapi.network import NETWORK
from gateway.xenapi.pbd import PBD
from gateway.xenapi.pif import PIF
from gateway.xenapi.pool import POOL
from gateway.xenapi.session import SESSION
from gateway.xenapi.sr import SR
from gateway.xenapi.task import TASK
from gateway.xenapi.user import USER
from gateway.xenapi.vbd import VBD
from gateway.xenapi.vdi import VDI

_WITH_OBJECTS: Final[tuple[ApiClass, ...]] = (
    SESSION,
    TASK,
    POOL,
    HOST,
    NETWORK,
    PIF,
    SR,
    PBD,
    VDI,
    VBD,
    USER,
)

CLASSES: Final[tuple[ApiClass, ...]] = (*_WITH_OBJECTS, event_class(_WITH_OBJECTS))
