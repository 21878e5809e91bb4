"""Tells systemd how far the gateway is: the datagram of sd_notify(3), for services of Type=notify."""

import os
import socket

import structlog

log = structlog.get_logger("gateway.systemd")


def notify(state: str) -> None:
    """Sends `state`, as in READY=1, where NOTIFY_SOCKET names a socket; else nothing happens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    # A name that begins with @ is in the abstract namespace.
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd was not told", state=state, socket=path, why=str(error))
