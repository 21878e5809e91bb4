"""The certificates of gateways as they were first seen: one line for each host and port, as ssh has it.

A gateway makes its own authority, which no other machine knows; so its certificate is remembered when a
command meets it for the first time, and any other one at the same place is refused from then on. The trap:
two commands may meet a gateway at once, so looking and adding happen under one lock.
"""

import fcntl
import hashlib
import os
from typing import Final

from gateway.cli.output import CommandError, print_note

_ALGORITHM: Final = "sha256"


def configuration_directory() -> str:
    """Where this user keeps what concerns the command: $XDG_CONFIG_HOME or ~/.config, and our name."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "vdi-gateway")


class KnownHosts:
    """The file `known_hosts`; 0600, made when the first certificate is remembered."""

    def __init__(self, path: str | None = None) -> None:
        self.path: Final = path or os.path.join(configuration_directory(), "known_hosts")

    def check(self, place: str, certificate: bytes) -> None:
        """Compare a certificate (DER) with the one known for `place`, "host:port"; remember an unknown one.

        CommandError when it is another one, or when the file can't be used.
        """
        found = f"{_ALGORITHM}:{hashlib.sha256(certificate).hexdigest()}"
        try:
            known = self._known(place, found)
        except OSError as error:
            raise CommandError(
                f"{self.path} can't be used: {error.strerror}; it holds the certificates of gateways:"
                " make it readable and writable for this user, or give --ca-file"
            ) from None
        if known == found:
            return
        if known is not None:
            raise CommandError(
                f"the certificate of {place} has changed: {known} is known, {found} was presented. If the"
                f" gateway was given a new one, remove the line {place} from {self.path} and try again;"
                " otherwise somebody else is answering"
            )
        print_note(f"the certificate of {place} ({found}) is remembered in {self.path}")

    def _known(self, place: str, found: str) -> str | None:
        """What is known for `place`; if nothing is, `found` is added and None returned."""
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with os.fdopen(os.open(self.path, flags, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read().decode("utf-8", "replace")
            for line in text.splitlines():
                name, _, value = line.strip().partition(" ")
                if name == place:
                    return value.strip()
            separator = "" if not text or text.endswith("\n") else "\n"
            file.write(f"{separator}{place} {found}\n".encode())
        return None
