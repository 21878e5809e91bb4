"""`vdi-gateway serve`: checks the arguments, then hands over to gateway.app."""

import gc
import os
import sys
from contextlib import suppress
from typing import Annotated, Literal

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag, Texts
from gateway.cli.loading import loading
from gateway.cli.output import CommandError, UsageError
from gateway.config import Config, ConfigError, Origins
from gateway.state import STATE_DIR_VARIABLE


def serve(
    *,
    state_dir: Annotated[FileName, Parameter(env_var=STATE_DIR_VARIABLE)],
    http: Texts = None,
    https: Texts = None,
    insecure: Flag = False,
    nbd: str | None = None,
    insecure_nbd: Flag = False,
    tls_cert: FileName | None = None,
    tls_key: FileName | None = None,
    log_level: Literal["debug", "info", "warning", "error"] | None = None,
    log_format: Literal["auto", "json", "console"] | None = None,
    config: FileName | None = None,
) -> int:
    """Run the gateway in the foreground until SIGTERM or Ctrl-C.

    It prints one line when it is ready; its log goes to stderr. SIGHUP makes it read its configuration and
    its certificate anew.

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
    nbd
        HOST:PORT to serve NBD on, 127.0.0.1:10809 by default, or off. Other addresses than those of the
        loopback require TLS of clients. Needs nbdkit; without it the gateway runs without NBD unless this is
        given.
    insecure_nbd
        Allow NBD without TLS on addresses that other machines reach: disks and sessions then cross the
        network unencrypted.
    tls_cert
        PEM file with the server's certificate and what follows up to its authority. Without it the gateway
        makes an authority and a certificate of its own in DIR/tls.
    tls_key
        PEM file with the key of --tls-cert.
    log_level
        Least severe messages to write; info by default.
    log_format
        json, console (coloured lines), or auto: console on a terminal, else json.
    config
        TOML file with these settings and every limit; what is given here comes before it. By default
        DIR/config.toml if it is there. `vdi-gateway config-show` prints it whole.
    """
    origins = Origins(
        state_dir=state_dir,
        file=config,
        arguments={
            "listen.http": http or None,
            "listen.https": https or None,
            "listen.insecure": insecure or None,
            "listen.nbd": nbd,
            "listen.insecure_nbd": insecure_nbd or None,
            "tls.certificate": tls_cert,
            "tls.key": tls_key,
            "log.level": log_level,
            "log.format": log_format,
        },
    )
    present = read(origins)

    # The gateway itself is loaded only now: bad arguments answer at once.
    with loading():
        from gateway.app import serve  # noqa: PLC0415
        from gateway.listening import ServeRefused  # noqa: PLC0415
        from gateway.reload import Configuration  # noqa: PLC0415
    gc.freeze()  # nor while it runs

    try:
        serve(state_dir, Configuration(origins, present), ready=announce)
    except ServeRefused as refusal:
        raise CommandError(str(refusal)) from None
    return 0


def read(origins: Origins) -> Config:
    """The configuration now. UsageError for a wrong argument, CommandError for a mistake in the file."""
    try:
        return origins.read()
    except ConfigError as error:
        raise (UsageError if error.argument else CommandError)(str(error)) from None


def announce(line: str) -> None:
    """The one line on stdout. That nobody can read it is no reason not to serve."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
