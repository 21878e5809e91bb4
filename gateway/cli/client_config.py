"""~/.config/vdi-gateway/client.toml: which gateway a user usually talks to, and the password for it.

    url = "https://gateway.example:8443"
    user = "backup"
    password-file = "/home/backup/.gateway-password"      # or password = "…"
    ca-file = "/etc/ssl/gateway-ca.pem"                   # instead of remembering the certificate

The trap: a password in this file belongs to its `url` and its `user` alone; it must not be sent to whatever
--url names.
"""

import os
import stat
from dataclasses import dataclass
from typing import Any, Final

from gateway.cli.known_hosts import configuration_directory
from gateway.cli.output import CommandError
from gateway.toml_file import read_toml

KEYS: Final = ("url", "user", "password", "password-file", "ca-file")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What the file says; None for what it doesn't."""

    path: str
    url: str | None = None
    user: str | None = None
    password: str | None = None
    password_file: str | None = None
    ca_file: str | None = None


def load_client_config(path: str | None = None) -> ClientConfig:
    """Read the file; an empty configuration when there is none. CommandError names what is wrong in it."""
    path = path or os.path.join(configuration_directory(), "client.toml")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = read_toml(file)
    except FileNotFoundError:
        return ClientConfig(path)
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror}; correct its permissions") from None
    except ValueError as error:  # also what is no text
        raise CommandError(f"{path} is no TOML: {error}; correct it") from None
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise CommandError(f"{path} can be read by others and may hold a password; chmod 600 {path}")
    return _checked(path, content)


def _checked(path: str, content: dict[str, Any]) -> ClientConfig:
    for key, value in content.items():
        if key not in KEYS:
            raise CommandError(f"{path}: there is no key {key!r}; the keys are {', '.join(KEYS)}")
        if not isinstance(value, str) or not value:
            raise CommandError(f'{path}: {key} must be text, as in {key} = "…"')
    if "password" in content and "password-file" in content:
        raise CommandError(f"{path}: password and password-file are both there; keep one of them")
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for key in ("password_file", "ca_file"):
        if key in values:
            # Relative to the file, whatever directory the command runs in.
            values[key] = os.path.join(os.path.dirname(path), os.path.expanduser(values[key]))
    return ClientConfig(path, **values)
