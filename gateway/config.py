"""What the gateway is told to be: from its command line, else its configuration file, else the defaults.

It knows the table of options and nothing of what they do. The trap: a value is checked where it comes in, and
the error names it as the user wrote it, `--http` or `listen.http`.
"""

import difflib
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from gateway.options import (
    BY_PATH,
    DEFAULT_HTTP,
    DEFAULT_NBD,
    OPTIONS,
    SECTIONS,
    Address,
    Option,
    WrongValue,
    address,
    path_text,
)
from gateway.toml_file import read_toml
from gateway.transfers.pull_source import PullRules

FILE_NAME: Final = "config.toml"


class ConfigError(Exception):
    """A value can't be used: one line that names it and says what is allowed.

    `argument` tells that it stood on the command line.
    """

    def __init__(self, text: str, *, argument: bool = False) -> None:
        super().__init__(text)
        self.argument = argument


class Source(Enum):
    """Where a value comes from."""

    DEFAULT = "default"
    FILE = "file"
    COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it comes from."""

    value: Any
    source: Source


class Config:
    """All options, each with its value. `file` is the one that was read, None if there was none."""

    def __init__(self, settings: Mapping[str, Setting], file: str | None) -> None:
        self.settings: Final = settings
        self.file: Final = file

    def value(self, path: str) -> Any:
        """What the option with this path is."""
        return self.settings[path].value

    def named(self, path: str) -> str:
        """The option as the user gave it, for an error: `--http`, or `listen.http` with its file."""
        if self.settings[path].source is Source.FILE:
            return f"{self.file}: {path}"
        return str(BY_PATH[path].argument or path)

    @property
    def http(self) -> tuple[Address, ...]:
        """Where to serve plain HTTP: (host, port), port 0 takes a free one."""
        return tuple(self.value("listen.http"))

    @property
    def https(self) -> tuple[Address, ...]:
        """Where to serve HTTPS."""
        return tuple(self.value("listen.https"))

    @property
    def nbd(self) -> Address | None:
        """Where to serve NBD; None: nowhere."""
        found: Address | None = self.value("listen.nbd")
        return found

    @property
    def nbd_asked_for(self) -> bool:
        """Whether somebody has asked for NBD, other than by leaving things as they are."""
        return self.settings["listen.nbd"].source is not Source.DEFAULT

    @property
    def nbd_insecure(self) -> bool:
        return bool(self.value("listen.insecure_nbd"))

    @property
    def nbd_user(self) -> str:
        return str(self.value("nbd.user"))

    @property
    def nbd_parallel(self) -> bool:
        """Whether a connection without TLS has several threads also where a client can abort nbdkit then."""
        return bool(self.value("nbd.parallel"))

    @property
    def certificate(self) -> tuple[str, str] | None:
        """The files of the operator's certificate and its key; None: the gateway makes its own."""
        certificate, key = self.value("tls.certificate"), self.value("tls.key")
        return (certificate, key) if certificate and key else None

    @property
    def pull_rules(self) -> PullRules:
        """Where images are fetched from."""
        return PullRules.of(self.value("pull.from"), self.value("pull.ca"))

    @property
    def log_level(self) -> str:
        return str(self.value("log.level"))

    @property
    def log_format(self) -> str:
        return str(self.value("log.format"))

    @property
    def limits(self) -> dict[str, float]:
        """Values of the attributes of Limits."""
        return {each.limit.name: self.value(each.path) for each in OPTIONS if each.limit is not None}


@dataclass(frozen=True, slots=True)
class Origins:
    """Where a configuration is read from, so that it can be read again.

    `file` None means config.toml in the state directory, if there is one. `arguments` are the values of the
    command line, by path; None is not given.
    """

    state_dir: str
    file: str | None
    arguments: Mapping[str, Any]

    def read(self) -> Config:
        """The configuration as it is now. Raises ConfigError."""
        file = self.file or os.path.join(self.state_dir, FILE_NAME)
        present = self.file is not None or _is_there(file)
        settings = {each.path: Setting(each.default, Source.DEFAULT) for each in OPTIONS}
        settings |= _of_file(file) if present else {}
        settings |= _of_arguments(self.arguments)
        if not settings["listen.http"].value and not settings["listen.https"].value:
            if any(settings[path].source is not Source.DEFAULT for path in ("listen.http", "listen.https")):
                raise ConfigError(
                    "listen.http and listen.https are both empty; give one of them an address, as in"
                    f' http = ["{DEFAULT_HTTP}"]'
                )
            settings["listen.http"] = Setting([address(DEFAULT_HTTP)], Source.DEFAULT)
        _check_together(settings, file)
        return Config(settings, os.path.abspath(file) if present else None)


def _is_there(file: str) -> bool:
    """Raises ConfigError where nobody can tell: the defaults in place of what it says would be wrong."""
    try:
        os.lstat(file)
    except PermissionError as error:
        raise ConfigError(
            f"{file} can't be looked for: {error.strerror}; run this as the user of the gateway"
        ) from error
    except OSError:
        return False
    return True


def _of_file(file: str) -> dict[str, Setting]:
    try:
        with open(file, "rb") as opened:
            document = read_toml(opened)
    except ValueError as error:  # also what is no text, and numbers of thousands of digits
        raise ConfigError(f"{file}: this is not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give a file that this user may read") from error
    settings: dict[str, Setting] = {}
    for section, keys in document.items():
        if section not in SECTIONS:
            raise ConfigError(f"{file}: {section}: there is no such section{_perhaps(section, SECTIONS)}")
        if not isinstance(keys, dict):
            raise ConfigError(f"{file}: {section}: this is a section; write it as [{section}] above its keys")
        for key, given in keys.items():
            path = f"{section}.{key}"
            option = BY_PATH.get(path)
            if option is None:
                known = [each.key for each in OPTIONS if each.section == section]
                raise ConfigError(f"{file}: {path}: there is no such key{_perhaps(key, known)}")
            if option.read is path_text and isinstance(given, str) and given:
                given = os.path.join(os.path.dirname(os.path.abspath(file)), given)  # noqa: PLW2901
            settings[path] = Setting(_read(option, given, f"{file}: {path}"), Source.FILE)
    return settings


def _perhaps(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; perhaps {near[0]} was meant" if near else f"; there are {', '.join(known)}"


def _of_arguments(arguments: Mapping[str, Any]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for path, given in arguments.items():
        if given is not None:
            option = BY_PATH[path]
            try:
                settings[path] = Setting(_read(option, given, str(option.argument)), Source.COMMAND_LINE)
            except ConfigError as error:
                raise ConfigError(str(error), argument=True) from None
    return settings


def _read(option: Option, given: Any, name: str) -> Any:
    try:
        return option.read(given)
    except WrongValue as wrong:
        raise ConfigError(f"{name}: {wrong}; give {option.allowed}") from None


def _check_together(settings: Mapping[str, Setting], file: str) -> None:
    """What options ask of each other."""

    def refuse(path: str, problem: str) -> ConfigError:
        given = settings[path].source is Source.COMMAND_LINE
        return ConfigError(
            f"{BY_PATH[path].argument}{problem}" if given else f"{file}: {path}{problem}", argument=given
        )

    http = settings["listen.http"]
    if not settings["listen.insecure"].value:
        for host, port in http.value:
            problem = plain_is_unsafe(host, port)
            if problem:
                raise refuse("listen.http", f": {problem}")
    certificate, key = settings["tls.certificate"], settings["tls.key"]
    for one, other in (("tls.certificate", "tls.key"), ("tls.key", "tls.certificate")):
        if settings[one].value and not settings[other].value:
            missing = BY_PATH[other].argument if settings[one].source is Source.COMMAND_LINE else other
            together = f"{missing} is missing: a certificate and its key are given together"
            raise ConfigError(
                together if settings[one].source is Source.COMMAND_LINE else f"{file}: {together}",
                argument=settings[one].source is Source.COMMAND_LINE,
            )
    for path, setting in (
        ("tls.certificate", certificate),
        ("tls.key", key),
        ("pull.ca", settings["pull.ca"]),
    ):
        if setting.value and not os.access(setting.value, os.R_OK):
            raise refuse(path, f": {setting.value} can't be read; give a PEM file that this user may read")
    if certificate.value and not settings["listen.https"].value and not _nbd_beyond(settings):
        raise refuse("tls.certificate", " needs --https HOST:PORT, the address to use the certificate on")


def _nbd_beyond(settings: Mapping[str, Setting]) -> bool:
    """Whether NBD may need the certificate, which the loopback by default doesn't."""
    found: Address | None = settings["listen.nbd"].value
    return found is not None and found != DEFAULT_NBD and not settings["listen.insecure_nbd"].value


def plain_is_unsafe(host: str, port: int) -> str | None:
    """Why plain HTTP may not be served there; None where all that `host` stands for is this machine's
    loopback."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"the host {host!r} can't be resolved: {reason}"
    for *_, resolved in answers:
        if not ipaddress.ip_address(str(resolved[0]).partition("%")[0]).is_loopback:
            return (
                f"{host} is reached by other machines, and plain HTTP shows them passwords and disks;"
                f" use --https {host}:{port or 8443}, or add --insecure if the network is your own"
            )
    return None
