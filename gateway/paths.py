"""What answers under which path of HTTP: images go in and out, and XenAPI in both its forms."""

import trio

from gateway.core.limits import Limits
from gateway.http.connection import Connection
from gateway.http.disk_request import DiskServices
from gateway.http.export_raw_vdi import ExportRawVDI
from gateway.http.import_raw_vdi import ImportRawVDI
from gateway.http.request import Request
from gateway.http.routes import Routes
from gateway.http.rpc import JSON, XML, LargeBodies, Reply, rpc_handler
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import LOCAL, Api, Caller
from gateway.xenapi.estate import Estate
from gateway.xenapi.jsonrpc import read_jsonrpc
from gateway.xenapi.xmlrpc import read_xmlrpc


def routes_of(estate: Estate, limits: Limits, nursery: trio.Nursery) -> Routes:
    """The paths of a gateway; calls that go on without their client run in `nursery`."""
    services = DiskServices.for_limits(
        estate.inventory, estate.tasks, estate.sessions, limits, estate.publications
    )
    api = Api(estate, nursery, CLASSES)

    def xmlrpc(body: bytes) -> Reply:
        call = read_xmlrpc(body)
        return lambda request, connection: call(api, _caller(request, connection))

    def jsonrpc(body: bytes) -> Reply:
        call = read_jsonrpc(body)
        return lambda request, connection: call(api, _caller(request, connection))

    large = LargeBodies()
    xml = {"POST": rpc_handler(xmlrpc, XML, large)}
    return Routes(
        {
            "/": xml,
            "/RPC2": xml,
            "/xmlrpc": xml,
            "/jsonrpc": {"POST": rpc_handler(jsonrpc, JSON, large)},
            "/import_raw_vdi": {"PUT": ImportRawVDI(services)},
            "/export_raw_vdi": {"GET": ExportRawVDI(services)},
        }
    )


def _caller(request: Request, connection: Connection) -> Caller:
    transport = LOCAL if request.address == LOCAL else request.scheme
    return Caller(request.address, transport, connection.ending)
