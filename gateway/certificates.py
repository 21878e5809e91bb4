"""The gateway's own certificate authority, and the server certificate it signs.

Made at the first start, so that HTTPS works before anybody has asked a site's authority for a certificate:
clients trust `tls/ca.pem` once, the server certificate below it is made anew when it nears its end or when
the gateway listens under a new name. The trap: key and certificate are two files, and a crash may leave an
old one beside a new one. So what is on disk is checked as a pair at each start, and a pair that doesn't fit
is replaced.
"""

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.reachable import reachable_addresses
from gateway.state import write_private_file

log = structlog.get_logger("gateway.app")

CA_LIFETIME = datetime.timedelta(days=3650)
# Clients that follow the CA/Browser Forum refuse more than 398 days, even below a private authority.
SERVER_LIFETIME = datetime.timedelta(days=396)
# Renewed this long before its end, so that a gateway that is restarted monthly never serves an expired one.
RENEW_BEFORE = datetime.timedelta(days=30)
# Clients must accept a certificate that was made just now, also if the clock had local time for UTC then.
CLOCK_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """Paths of PEM files: the chain that the server sends, its key, and the authority that clients trust."""

    chain: str
    key: str
    authority: str | None


def own_names(listen_hosts: Iterable[str]) -> list[str]:
    """Every name and address that a client on this machine or beside it may connect to."""
    reachable = [address for host in listen_hosts for address in reachable_addresses(host)]
    names = [socket.gethostname(), "localhost", "127.0.0.1", "::1", *reachable]
    return [name for name in dict.fromkeys(names) if name]


def ensure_server_certificate(
    directory: str, names: Iterable[str], now: datetime.datetime | None = None
) -> ServerCertificate:
    """The certificate in `directory`, made or renewed where needed. OSError when that can't be written."""
    now = now or datetime.datetime.now(datetime.UTC)
    names = list(names)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    ca_path, ca_key_path = os.path.join(directory, "ca.pem"), os.path.join(directory, "ca-key.pem")
    server_path, server_key_path = (
        os.path.join(directory, "server.pem"),
        os.path.join(directory, "server-key.pem"),
    )

    authority = _load_pair(ca_path, ca_key_path)
    if authority is None or authority[0].not_valid_after_utc <= now + SERVER_LIFETIME:
        if os.path.lexists(ca_path) or os.path.lexists(server_path):
            why = "it or its key is missing or damaged" if authority is None else "it nears its end"
            log.warning("the authority is a new one, which clients have to trust", path=ca_path, why=why)
        authority = _make_authority(now)
        _store_pair(ca_path, ca_key_path, authority)
    server = _load_pair(server_path, server_key_path)
    if server is None or not _still_good(server[0], authority[0], names, now):
        server = _make_server(authority, names, now)
        _store_pair(server_path, server_key_path, server)
    for path, pair in ((ca_path, authority), (server_path, server)):
        begin = pair[0].not_valid_before_utc
        if begin > now:
            # It isn't replaced: where the clock is slow until it is set, clients would lose what they trust.
            advice = f"look at this machine's clock; if it is right, remove {path} and send SIGHUP"
            log.warning("a certificate has not begun", path=path, begin=begin.isoformat(), advice=advice)
            break
    return ServerCertificate(chain=server_path, key=server_key_path, authority=ca_path)


_Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _load_pair(certificate_path: str, key_path: str) -> _Pair | None:
    """Certificate and key, or None where either is missing, broken or doesn't belong to the other."""
    try:
        certificate = x509.load_pem_x509_certificate(Path(certificate_path).read_bytes())
        key = serialization.load_pem_private_key(Path(key_path).read_bytes(), password=None)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    return certificate, key


def _store_pair(certificate_path: str, key_path: str, pair: _Pair) -> None:
    certificate, key = pair
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private_file(key_path, private)
    # The certificate is public, but lies in a directory of ours; clients are handed a copy of it.
    write_private_file(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _still_good(
    certificate: x509.Certificate, authority: x509.Certificate, names: list[str], now: datetime.datetime
) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # noqa: BLE001  whatever is wrong with the old one, the cure is a new one
        return False
    return certificate.not_valid_after_utc - now > RENEW_BEFORE and set(_alternative_names(names)) <= set(
        held
    )


def subject_of(chain: bytes) -> str | None:
    """A host name that a PEM certificate (the first one) is for; a wildcard only where there is no other.

    None for one without names. ValueError for what is no certificate.
    """
    certificate = x509.load_pem_x509_certificate(chain)
    try:
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    names = held.get_values_for_type(x509.DNSName)
    return next(iter(sorted(names, key=lambda name: name.startswith("*"))), None)


def _alternative_names(names: Iterable[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            if name.isascii():
                found.append(x509.DNSName(name))
    return found


def _make_authority(now: datetime.datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # Two gateways on one desk have authorities that can be told apart in a trust store.
    name = _name(f"VDI Gateway authority of {socket.gethostname()}"[:64])
    builder = _builder(name, name, key.public_key(), now, CA_LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return builder.sign(key, hashes.SHA256()), key


def _make_server(authority: _Pair, names: list[str], now: datetime.datetime) -> _Pair:
    issuer, issuer_key = authority
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(names[0][:64]), issuer.subject, key.public_key(), now, SERVER_LIFETIME)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(names)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    return builder.sign(issuer_key, hashes.SHA256()), key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
