"""`vdi-gateway serve`: checks the arguments, then hands over to gateway.app."""

import ipaddress
import os
import re
import socket
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from gateway.cli.output import CommandError, UsageError
from gateway.state import STATE_DIR_VARIABLE

DEFAULT_HTTP = "127.0.0.1:8080"


def serve(
    *,
    state_dir: Annotated[str, Parameter(env_var=STATE_DIR_VARIABLE)],
    http: Annotated[list[str] | None, Parameter(negative=())] = None,
    https: Annotated[list[str] | None, Parameter(negative=())] = None,
    insecure: Annotated[bool, Parameter(negative=())] = False,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> int:
    """Run the gateway in the foreground until SIGTERM or Ctrl-C.

    It prints one line when it is ready; its log goes to stderr. SIGHUP makes it read its certificate anew.

    Parameters
    ----------
    state_dir
        Directory that holds everything of the gateway: database, certificates, the password of user root in
        DIR/admin-password. Made when it isn't there.
    http
        HOST:PORT to serve plain HTTP on, as in 127.0.0.1:8080 or [::1]:8080; port 0 takes a free one. May be
        given more than once. 127.0.0.1:8080 when neither --http nor --https is given.
    https
        HOST:PORT to serve HTTPS on. May be given more than once.
    insecure
        Allow plain HTTP on addresses that other machines reach: passwords and disks then cross the network
        unencrypted.
    tls_cert
        PEM file with the server's certificate and what follows up to its authority. Without it the gateway
        makes an authority and a certificate of its own in DIR/tls.
    tls_key
        PEM file with the key of --tls-cert.
    log_level
        Least severe messages to write.
    """
    if not http and not https:
        http = [DEFAULT_HTTP]
    plain = [parse_address(text, "--http") for text in http or []]
    encrypted = [parse_address(text, "--https") for text in https or []]
    if not insecure:
        for host, port in plain:
            refuse_plain_off_loopback(host, port)
    if (tls_cert is None) != (tls_key is None):
        missing = "--tls-key" if tls_key is None else "--tls-cert"
        raise UsageError(f"{missing} is missing: a certificate and its key are given together")
    for argument, path in (("--tls-cert", tls_cert), ("--tls-key", tls_key)):
        if path is not None and not os.access(path, os.R_OK):
            raise UsageError(f"{argument}: {path} can't be read; give a PEM file that this user may read")
    if tls_cert is not None and not encrypted:
        raise UsageError("--tls-cert needs --https HOST:PORT, the address to use the certificate on")

    from gateway.app import ServeRefused, ServeSettings, serve  # noqa: PLC0415  bad arguments answer at once

    settings = ServeSettings(
        state_dir=state_dir,
        http=tuple(plain),
        https=tuple(encrypted),
        tls_cert=tls_cert,
        tls_key=tls_key,
        log_level=log_level,
    )
    try:
        serve(settings, ready=announce)
    except ServeRefused as refusal:
        raise CommandError(str(refusal)) from None
    return 0


def announce(line: str) -> None:
    """The one line on stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse_address(text: str, argument: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPv6]:PORT`. UsageError names `argument`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\[\]:\s]+)):(\d{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise UsageError(
            f"{argument}: {text!r} is no HOST:PORT; give one as in 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8443"
        )
    return found[1] or found[2], int(found[3])


def refuse_plain_off_loopback(host: str, port: int) -> None:
    """UsageError unless every address that `host` stands for is this machine's loopback."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(f"--http: the host {host!r} can't be resolved: {error.strerror}") from None
    for *_, address in answers:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                f"--http: {host} is reached by other machines, and plain HTTP shows them passwords and disks;"
                f" use --https {host}:{port or 8443}, or add --insecure if the network is your own"
            )
