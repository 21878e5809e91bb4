"""OpenStack's os-xenapi at work: its session, its objects, its tasks, its disk images.

Runs with the interpreter of tests/foreign/.venv, apart from the gateway; asked and answering in JSON. Of
XenAPISession two methods are replaced, and no more: one looks the URL's host up together with its port, so it
knows only URLs without one; the other asks a plugin in dom0 for its version. Plugins (host.call_plugin) are
programs on a XenServer, so nothing that goes through them runs here: glance and bandwidth plugins, VHD files
moved within dom0, partitions, the guest's agent. In Python 3 they run nowhere, since the answer is unpickled
as text.
"""

import io
import json
import logging
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

warnings.simplefilter("ignore")  # eventlet says at its import that it is to be abandoned

from os_xenapi.client import XenAPI, image, session, utils  # type: ignore[import-not-found]  # noqa: E402
from os_xenapi.client.image import vdi_handler, vhd_utils  # type: ignore[import-not-found]  # noqa: E402


class Session(session.XenAPISession):  # type: ignore[misc]
    def _get_ip_from_url(self, url: str) -> str:
        return str(urlparse(url).hostname)

    def _verify_plugin_version(self) -> None:
        pass


def failure(call: Any, *parameters: Any) -> list[str]:
    try:
        call(*parameters)
    except XenAPI.Failure as error:
        return list(error.details)
    raise AssertionError("it succeeded")


def work(asked: dict[str, Any], connected: Session) -> dict[str, Any]:
    """The calls that nova makes on the way to a disk."""
    sr = asked["sr"]
    connected.pool.set_default_SR(connected.pool.get_all()[0], sr)
    vdi = utils.create_vdi(
        connected, utils.get_default_sr(connected), {"uuid": "of-instance"}, "disk", "root", 4 << 20
    )
    record = connected.get_rec("VDI", vdi)
    with connected.custom_task("label", "description") as task:
        during = connected.task.get_record(task)
    connected.VDI.add_to_other_config(vdi, "key", "value")
    where = connected.VDI.get_all_records_where(f'field "uuid"="{record["uuid"]}"')
    found = dict(connected.get_all_refs_and_recs("VDI"))
    connected.VDI.destroy(vdi)
    with connected.http_connection() as connection:
        connection.request("GET", "/nowhere")
        status = connection.getresponse().status
    return {
        "product": [list(connected.product_version), connected.product_brand],
        "platform": list(connected.platform_version),
        "host": connected.host_uuid,
        "record": record,
        "task": [during["name_label"], during["name_description"], during["status"]],
        "task after": connected.get_rec("task", task),
        "where": list(where),
        "listed": vdi in found,
        "after": connected.get_rec("VDI", vdi),
        "unknown": failure(connected.VDI.get_uuid, vdi),
        "plugin": failure(connected.call_plugin, "xenhost.py", "host_uptime", {}),
        "status": status,
    }


def send_image(asked: dict[str, Any], connected: Session) -> dict[str, Any]:
    """A gzipped tar with a VHD, as glance has images, becomes a VDI; and what os-xenapi says of it."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    speaker = logging.getLogger(vdi_handler.__name__)
    speaker.addHandler(listener)
    speaker.setLevel(logging.DEBUG)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(asked["file"], "0.vhd")
    packed.seek(0)
    vdis = image.stream_to_vdis(
        None, connected, {"name": "instance", "uuid": "u"}, asked["url"], asked["sr"], packed
    )
    return {"vdis": vdis, "said": said}


def fetch_image(asked: dict[str, Any], connected: Session) -> dict[str, Any]:
    """A VDI becomes a VHD file, whose size os-xenapi computes before it has seen the end.

    The tar around it can't be had: in Python 3 os-xenapi feeds tarfile from a pipe that gives less than was
    asked for, and tarfile takes that for the end, whoever the server is.
    """
    export = vdi_handler.VdisToTarStream(
        None, connected, {"name": "instance"}, asked["url"], [asked["vdi"]], None, 1
    )
    stream = export._connect_request(connected.VDI.get_by_uuid(asked["vdi"]))
    parser = vhd_utils.VHDDynDiskParser(stream)
    Path(asked["file"]).write_bytes(parser.cached_buff + parser.src_file.read())
    export._clean()
    return {"size": parser.get_vhd_file_size()}


def parse(asked: dict[str, Any], _connected: Session) -> dict[str, Any]:
    """What os-xenapi reads out of the head of a VHD file."""
    with Path(asked["file"]).open("rb") as file:
        parser = vhd_utils.VHDDynDiskParser(file)
        return {
            "virtual size": parser.footer.current_size,
            "blocks": parser.Bat.num_valid_bat_entries,
            "size": parser.get_vhd_file_size(),
        }


def main() -> None:
    asked = json.load(sys.stdin)
    connected = Session(asked["url"], asked["user"], asked["password"], originator="tests", concurrent=3)
    program = {"work": work, "send": send_image, "fetch": fetch_image, "parse": parse}[asked["program"]]
    json.dump(program(asked, connected), sys.stdout, default=str)


main()
