"""The TLS context that each new HTTPS connection gets, and its replacement while the gateway runs."""

import ssl
from collections.abc import Callable

import structlog

from gateway.certificates import ServerCertificate

log = structlog.get_logger("gateway.tls")


class CertificateError(Exception):
    """A certificate or key can't be used; the text names the file and says why."""


class ReloadableContext:
    """Holds the present context. A reload that fails keeps the one there is."""

    def __init__(self, find: Callable[[], ServerCertificate]) -> None:
        """`find` says where the certificate is now, and may make or renew it. Raises CertificateError."""
        self._find = find
        self._certificate, self._context = self._load()

    @property
    def authority(self) -> str | None:
        """PEM file of the gateway's own authority; None where the operator brought the certificate."""
        return self._certificate.authority

    @property
    def certificate(self) -> ServerCertificate:
        """The files that were loaded last."""
        return self._certificate

    def current(self) -> ssl.SSLContext:
        """The context for a new connection."""
        return self._context

    def reload(self) -> None:
        """Reads the certificate anew. It blocks: for a worker thread. Says in the log what came of it."""
        try:
            self._certificate, self._context = self._load()
        except CertificateError as error:
            log.warning("the certificate was not reloaded; the old one stays in use", why=str(error))
        else:
            log.info("certificate loaded", file=self._certificate.chain)

    def _load(self) -> tuple[ServerCertificate, ssl.SSLContext]:
        try:
            certificate = self._find()
        except OSError as error:
            raise CertificateError(
                f"{error.filename}: {error.strerror}; look what is there: this user has to read and write it"
            ) from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(
                certificate.chain, certificate.key, password=_no_passphrase(certificate.key)
            )
        except ssl.SSLError as error:
            reason = error.reason or str(error)
            raise CertificateError(
                f"{certificate.chain} and {certificate.key} can't be used together ({reason});"
                " give a PEM certificate and its own key"
            ) from error
        except OSError as error:
            raise CertificateError(f"{certificate.chain} or {certificate.key}: {error.strerror}") from error
        return certificate, context


def _no_passphrase(key: str) -> Callable[[], str]:
    """Without it OpenSSL would ask on the terminal, and a service would hang there."""

    def refuse() -> str:
        raise CertificateError(f"{key} has a passphrase; give a key without one")

    return refuse
