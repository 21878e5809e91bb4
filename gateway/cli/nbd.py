"""`vdi-gateway nbd`: becomes the supervisor of NBD that `serve` otherwise starts by itself."""

import os
from typing import Annotated

from cyclopts import Parameter

from gateway.cli.arguments import FileName, Flag
from gateway.cli.output import CommandError
from gateway.cli.serve import read
from gateway.config import Origins
from gateway.state import STATE_DIR_VARIABLE, StateDirectory


def nbd(
    *,
    state_dir: Annotated[FileName, Parameter(env_var=STATE_DIR_VARIABLE)],
    nbd: str | None = None,
    insecure_nbd: Flag = False,
    tls_cert: FileName | None = None,
    tls_key: FileName | None = None,
    config: FileName | None = None,
    stay: Flag = False,
) -> int:
    """Serve NBD in the foreground until SIGTERM or Ctrl-C, for the gateway on the same state directory.

    `vdi-gateway serve` does this by itself. As a service of its own it outlives the gateway where a crash of
    the gateway ends all its processes, as under systemd: serve finds it and uses it. It prints one line when
    it is ready. SIGHUP replaces its workers by new ones; clients that are connected keep theirs.

    Parameters
    ----------
    state_dir
        State directory of the gateway.
    nbd
        As for serve.
    insecure_nbd
        As for serve.
    tls_cert
        As for serve.
    tls_key
        As for serve.
    config
        As for serve. Give all of these as for serve, or serve replaces this supervisor by one of its own.
    stay
        Go on without a gateway and without clients, and when serve is stopped. Otherwise it ends with serve,
        and after a minute without a gateway and clients.
    """
    origins = Origins(
        state_dir=state_dir,
        file=config,
        arguments={
            "listen.nbd": nbd,
            "listen.insecure_nbd": insecure_nbd or None,
            "tls.certificate": tls_cert,
            "tls.key": tls_key,
        },
    )
    present = read(origins)
    if present.nbd is None:
        raise CommandError(f"{present.named('listen.nbd')} is off; give HOST:PORT to serve NBD on")

    # Loaded only now: bad arguments answer at once.
    from importlib.metadata import version  # noqa: PLC0415

    from gateway.certificates import ServerCertificate, ensure_server_certificate, own_names  # noqa: PLC0415
    from gateway.nbd_files import NbdFiles, NbdRefused  # noqa: PLC0415

    os.umask(0o077)
    state = StateDirectory(state_dir)
    try:
        files = NbdFiles(state, present)
        files.prepare()
        certificates = None
        if files.tls:
            if present.certificate is None:
                hosts = [host for host, _ in (*present.https, present.nbd)]
                certificate = ensure_server_certificate(state.tls, own_names(hosts))
            else:
                chain, key = present.certificate
                certificate = ServerCertificate(chain=chain, key=key, authority=None)
            certificates = files.certificates(certificate)
    except NbdRefused as refused:
        raise CommandError(str(refused)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or state.path}: {error.strerror}") from error
    command = files.command(certificates, version("vdi-gateway"), *(["--stay"] if stay else []))
    os.execv(command[0], command)  # noqa: S606
