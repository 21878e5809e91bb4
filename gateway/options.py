"""Every option of the gateway: its name in the configuration file, its range, its default and the reason.

One table: the file is read by it, and `config-show` prints it. Times and sizes are texts with a unit ("15s",
"64KiB"). The trap: a default is a value as it is used, not as the file has it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.core.limits import LIMITS, Limit, Unit
from gateway.transfers.pull_source import source

DEFAULT_HTTP: Final = "127.0.0.1:8080"
DEFAULT_NBD: Final = ("127.0.0.1", 10809)
OFF: Final = "off"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("auto", "json", "console")

_SECONDS: Final[Mapping[str, float]] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final[Mapping[str, float]] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class WrongValue(Exception):  # noqa: N818  the reason alone: who reads it knows the name
    """Why a value can't be used, and what can."""


Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One key of the file. `read` checks what was given and `shown` is its opposite.

    `argument` is its name on the command line, if it has one. What isn't `live` changes by a restart alone.
    """

    section: str
    key: str
    default: Any
    reason: str
    allowed: str
    read: Callable[[Any], Any]
    shown: Callable[[Any], Any]
    argument: str | None = None
    live: bool = True
    limit: Limit | None = None

    @property
    def path(self) -> str:
        """The name in words: listen.http."""
        return f"{self.section}.{self.key}"


# --- values


def address(text: str) -> Address:
    """Host and port of `HOST:PORT` or `[IPv6]:PORT`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\[\]:\s]+)):(\d{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise WrongValue(f"{text!r} is no HOST:PORT")
    return found[1] or found[2], int(found[3])


def _addresses(given: Any) -> list[Address]:
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise WrongValue(f"{_called(given)} is no list of texts")
    return [address(each) for each in given]


def _address_or_off(given: Any) -> Address | None:
    if not isinstance(given, str):
        raise WrongValue(f"{_called(given)} is no text")
    return None if given == OFF else address(given)


def _flag(given: Any) -> bool:
    if not isinstance(given, bool):
        raise WrongValue(f"{_called(given)} is neither true nor false")
    return given


def path_text(given: Any) -> str:
    if not isinstance(given, str) or "\0" in given:
        raise WrongValue(f"{_called(given)} is no path")
    return given


def _user_name(given: Any) -> str:
    if not isinstance(given, str) or not given or "\0" in given:
        raise WrongValue(f"{_called(given)} is no name")
    return given


def _one_of(words: tuple[str, ...]) -> Callable[[Any], str]:
    def read(given: Any) -> str:
        if not isinstance(given, str) or given not in words:
            raise WrongValue(f"{_called(given)} is none of them")
        return given

    return read


def _called(given: Any) -> str:
    """What was given, for an error: short, and as the file has it where that is simple."""
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, str | int | float):
        text = repr(given)
        return text if len(text) <= 60 else text[:57] + "..."
    return {"list": "an array", "dict": "a section"}.get(type(given).__name__, f"a {type(given).__name__}")


def _quantity(limit: Limit) -> Callable[[Any], float]:
    units = _SECONDS if limit.unit is Unit.SECONDS else _BYTES

    def read(given: Any) -> float:
        value: float
        if limit.unit is Unit.NUMBER:
            if not isinstance(given, int) or isinstance(given, bool):
                raise WrongValue(f"{_called(given)} is no whole number")
            value = given
        else:
            found = (
                re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]+)", given)
                if isinstance(given, str)
                else None
            )
            if found is None or found[2] not in units:
                what = "time" if limit.unit is Unit.SECONDS else "size"
                raise WrongValue(f"{_called(given)} is no {what} with a unit")
            value = float(found[1]) * units[found[2]]
            if limit.unit is Unit.BYTES:
                value = int(value)
        if not limit.least <= value <= limit.most:
            raise WrongValue(f"{_called(given)} is out of range")
        return value

    return read


def quantity_text(unit: Unit, value: float) -> str | int:
    """A limit as the file has it: "90s", "64KiB", 512. The largest unit that keeps it whole."""
    if unit is Unit.NUMBER:
        return int(value)
    units = _SECONDS if unit is Unit.SECONDS else _BYTES
    for name, factor in reversed(list(units.items())):
        if value >= factor and (value / factor).is_integer():
            return f"{int(value / factor)}{name}"
    text = f"{value:.12f}".rstrip("0").rstrip(".")
    return f"{text}{'s' if unit is Unit.SECONDS else 'B'}"


def _allowed(limit: Limit) -> str:
    least, most = quantity_text(limit.unit, limit.least), quantity_text(limit.unit, limit.most)
    if limit.unit is Unit.NUMBER:
        return f"a whole number from {least} to {most}"
    units = _SECONDS if limit.unit is Unit.SECONDS else _BYTES
    return f'a text from "{least}" to "{most}"; the units are {", ".join(units)}'


# --- the table

_ADDRESSES_ALLOWED: Final = "addresses as in 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8443"


def _addresses_text(value: list[Address]) -> list[str]:
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in value]


def _address_or_off_text(value: Address | None) -> str:
    return OFF if value is None else _addresses_text([value])[0]


def _sources(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise WrongValue(f"{_called(given)} is no list of texts")
    try:
        return [str(source(each)) for each in given]
    except ValueError as error:
        raise WrongValue(str(error)) from None


def _same(value: Any) -> Any:
    return value


OPTIONS: Final[tuple[Option, ...]] = (
    Option(
        section="listen",
        key="http",
        default=[],
        reason=f"plain HTTP, for the loopback; {DEFAULT_HTTP} when https is empty too",
        allowed=_ADDRESSES_ALLOWED,
        read=_addresses,
        shown=_addresses_text,
        argument="--http",
        live=False,
    ),
    Option(
        section="listen",
        key="https",
        default=[],
        reason="nothing is opened to other machines unasked",
        allowed=_ADDRESSES_ALLOWED,
        read=_addresses,
        shown=_addresses_text,
        argument="--https",
        live=False,
    ),
    Option(
        section="listen",
        key="insecure",
        default=False,
        reason="plain HTTP off the loopback shows passwords and disks to the network",
        allowed="true or false",
        read=_flag,
        shown=_same,
        argument="--insecure",
        live=False,
    ),
    Option(
        section="listen",
        key="nbd",
        default=DEFAULT_NBD,
        reason="the port that clients of NBD try by themselves, on the loopback, where no TLS is needed; on"
        " every other address TLS is required",
        allowed='an address as in 127.0.0.1:10809, [::1]:10809 or 0.0.0.0:10809, or "off"',
        read=_address_or_off,
        shown=_address_or_off_text,
        argument="--nbd",
        live=False,
    ),
    Option(
        section="listen",
        key="insecure_nbd",
        default=False,
        reason="NBD without TLS off the loopback shows disks and sessions to the network",
        allowed="true or false",
        read=_flag,
        shown=_same,
        argument="--insecure-nbd",
        live=False,
    ),
    Option(
        section="nbd",
        key="user",
        default="nobody",
        reason="of a gateway that root has started, the processes that speak with the network run as this"
        " user; those on the private socket nbd.sock as the gateway",
        allowed="the name of a user",
        read=_user_name,
        shown=_same,
        live=False,
    ),
    Option(
        section="nbd",
        key="parallel",
        default=False,
        reason="with several requests of a connection at a time nbdkit before 1.34 (Debian 12) aborts, and"
        " disconnects everybody, when a client without TLS goes while it is owed answers",
        allowed="true or false",
        read=_flag,
        shown=_same,
        live=False,
    ),
    Option(
        section="tls",
        key="certificate",
        default="",
        reason="the gateway makes an authority and a certificate of its own; a relative path starts at this"
        " file's directory",
        allowed="the path of a PEM file",
        read=path_text,
        shown=_same,
        argument="--tls-cert",
    ),
    Option(
        section="tls",
        key="key",
        default="",
        reason="the key of the certificate, without a passphrase",
        allowed="the path of a PEM file",
        read=path_text,
        shown=_same,
        argument="--tls-key",
    ),
    Option(
        section="pull",
        key="from",
        default=[],
        reason="images are fetched from public addresses, and from others only if they are named here: the"
        " gateway may reach what those who call it must not; the name of a host stands for its private and"
        " loopback addresses, link-local and multicast ones have to be named themselves",
        allowed='hosts, addresses and networks as in "images.example", "192.0.2.7" or "10.1.0.0/16"',
        read=_sources,
        shown=_same,
    ),
    Option(
        section="pull",
        key="ca",
        default="",
        reason="servers with https are verified by the system's authorities, and by those in this file; a"
        " relative path starts at this file's directory",
        allowed="the path of a PEM file",
        read=path_text,
        shown=_same,
    ),
    Option(
        section="log",
        key="level",
        default="info",
        reason="a line for each request and each change",
        allowed=f"one of {', '.join(LOG_LEVELS)}",
        read=_one_of(LOG_LEVELS),
        shown=_same,
        argument="--log-level",
    ),
    Option(
        section="log",
        key="format",
        default="auto",
        reason="coloured lines on a terminal, JSON everywhere else",
        allowed=f"one of {', '.join(LOG_FORMATS)}",
        read=_one_of(LOG_FORMATS),
        shown=_same,
        argument="--log-format",
    ),
    *(
        Option(
            section="limits",
            key=each.key,
            default=each.default,
            reason=each.reason,
            allowed=_allowed(each),
            read=_quantity(each),
            shown=lambda value, unit=each.unit: quantity_text(unit, value),  # type: ignore[misc]
            live=each.live,
            limit=each,
        )
        for each in LIMITS
    ),
)
BY_PATH: Final = {each.path: each for each in OPTIONS}
SECTIONS: Final = tuple(dict.fromkeys(each.section for each in OPTIONS))
