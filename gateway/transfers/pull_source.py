"""Where an image may be fetched from: what a URL may be, and which addresses may be connected to.

The gateway stands where its clients may not reach, so it fetches from public addresses only; others have to
be named by its configuration. The trap: a name says nothing. What is checked is the very address that will
be connected to, after the name was resolved; and a host that is named for its private address doesn't get
the addresses of a cloud's metadata service by changing what its name resolves to.
"""

import ipaddress
import re
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, unquote_to_bytes, urljoin

from gateway.core.log import MASK

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS: Final = {"http": 80, "https": 443}
_LONGEST: Final = 8192
# Other parsers leave out line breaks in a URL, or take a backslash for a slash: two of them see two hosts.
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?:(?P<user>[^/?#@\\]*)@)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#\\]*)?(?P<query>\?[^#\\]*)?(?:#.*)?",
    re.IGNORECASE,
)
_PRINTABLE: Final = re.compile(r"[!-~]*")

# Services for virtual machines that clouds have at addresses of their own.
_METADATA: Final = frozenset(
    map(
        ipaddress.ip_address,
        (
            *("169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
            *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:c1::a9fe:a9fe"),
            *("fd00:42::42", "fd00:a9fe:a9fe::1"),
        ),
    )
)
_SHARED: Final = ipaddress.ip_network("100.64.0.0/10")
_THIS_NETWORK: Final = ipaddress.ip_network("0.0.0.0/8")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
# Each of these has an IPv4 address in it, or leads into a tunnel.
_DISGUISES: Final = tuple(
    map(ipaddress.ip_network, ("::/96", "::ffff:0:0/96", "64:ff9b:1::/48", "2001::/23", "2002::/16"))
)


class WrongURL(Exception):  # noqa: N818  the reason alone: who reads it knows the URL
    """Why a URL can't be fetched from."""


@dataclass(frozen=True, slots=True)
class ImageURL:
    """One URL. `str` is for people: the password and the query, which may be a signature, are masked."""

    scheme: str
    host: str
    port: int
    target: str
    authorization: str | None = field(default=None, repr=False)
    """The value of the header, from the user and password in the URL."""

    @classmethod
    def parse(cls, text: str) -> "ImageURL":
        """Raises WrongURL."""
        if len(text) > _LONGEST:
            raise WrongURL(f"it has more than {_LONGEST} characters")
        if not _PRINTABLE.fullmatch(text):
            raise WrongURL("a URL has no spaces and no letters beyond ASCII; write them as %20 and the like")
        found = _URL.fullmatch(text)
        if found is None:
            raise WrongURL("it isn't of the form http://HOST/PATH or https://HOST/PATH")
        scheme, host = found["scheme"].lower(), found["host"].lower()
        port = int(found["port"] or _PORTS[scheme])
        if not 0 < port < 65536:
            raise WrongURL(f"there is no port {port}")
        if host.startswith("["):
            try:
                host = str(ipaddress.IPv6Address(host[1:-1]))
            except ValueError:
                raise WrongURL(f"{host} is no IPv6 address") from None
        target = (found["path"] or "/") + (found["query"] or "")
        user = found["user"]
        authorization = None if user is None else f"Basic {b64encode(_user_and_password(user)).decode()}"
        return cls(scheme, host, port, target, authorization)

    def __str__(self) -> str:
        user = "" if self.authorization is None else f"{MASK}@"
        path, has_query, _ = self.target.partition("?")
        return f"{self.scheme}://{user}{self.authority}{path}{f'?{MASK}' if has_query else ''}"

    @property
    def authority(self) -> str:
        """Host and port as the header Host has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """The last part of the path, as a file of that name would be called; empty if there is none."""
        return unquote(self.target.partition("?")[0].rpartition("/")[2])

    def redirected(self, location: str) -> "ImageURL":
        """Where a redirection leads. Only the same scheme, host and port get the password; WrongURL."""
        if not _PRINTABLE.fullmatch(location):
            raise WrongURL("what it leads to is no URL")
        try:
            joined = urljoin(f"{self.scheme}://{self.authority}{self.target}", location)
        except ValueError:
            raise WrongURL("what it leads to is no URL") from None
        to = ImageURL.parse(joined)
        if self.scheme == "https" and to.scheme == "http":
            raise WrongURL(f"it leads from https to {to}")
        same = (to.scheme, to.host, to.port) == (self.scheme, self.host, self.port)
        return ImageURL(to.scheme, to.host, to.port, to.target, self.authorization if same else None)


def _user_and_password(text: str) -> bytes:
    user, _, password = text.partition(":")
    return unquote_to_bytes(user) + b":" + unquote_to_bytes(password)


@dataclass(frozen=True, slots=True)
class PullRules:
    """What is fetched from beside public addresses: hosts by name, and networks.

    `authorities` is a PEM file of those that are trusted beside the system's; empty: none.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPNetwork, ...] = ()
    authorities: str = ""

    @classmethod
    def of(cls, sources: list[str], authorities: str = "") -> "PullRules":
        """From names and networks as `source` accepts them."""
        parsed = [source(each) for each in sources]
        return cls(
            frozenset(each for each in parsed if isinstance(each, str)),
            tuple(each for each in parsed if not isinstance(each, str)),
            authorities,
        )

    def objection(self, host: str, address: IPAddress) -> str | None:
        """What kind of address keeps it from being connected to under this name; None if nothing does."""
        if any(address in network for network in self.networks):
            return None
        kind, only_by_network = _kind_of(address)
        if kind is None or (host in self.hosts and not only_by_network):
            return None
        return kind


def source(text: str) -> str | IPNetwork:
    """A host's name in lower case, an address or a network. Raises ValueError."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        if "/" in text or ":" in text or re.fullmatch(r"[0-9.]+", text):
            raise ValueError(f"{text!r} is no network: {error}") from None
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", text):
        raise ValueError(f"{text!r} is no host name")
    return text.lower()


def _kind_of(address: IPAddress) -> tuple[str | None, bool]:
    """What a person calls an address that isn't public, and whether naming its host isn't enough."""
    if address in _METADATA:
        return "the address of a cloud's metadata service", True
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _kind_of(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))[0], True
        if address not in (ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1")) and any(
            address in network for network in _DISGUISES
        ):
            return "an IPv6 address that stands for another one", True
    if address.is_multicast:
        return "a multicast address", True
    if address.is_link_local:
        return "a link-local address", True
    if address.is_unspecified or address in _THIS_NETWORK:
        return "an address of no host", True
    if address.is_loopback:
        return "a loopback address", False
    if address in _SHARED:
        return "an address of a provider's own network", False
    if address.is_reserved:
        return "a reserved address", True
    if address.is_private or not address.is_global or getattr(address, "is_site_local", False):
        return "a private address", False
    return None, False
