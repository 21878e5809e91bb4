"""How a command reaches the running gateway: XML-RPC with the standard library, in a session of its own.

Knows the state directory of a gateway on this machine, and --url for any other. The trap: the password must
never be in the process list, so it comes from a file only.
"""

import ssl
import xmlrpc.client
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Self

from cyclopts import Parameter

from gateway.cli.output import CommandError, UsageError
from gateway.state import ADMINISTRATOR, STATE_DIR_VARIABLE, StateDirectory, StateError, read_password_file

TIMEOUT_SECONDS = 60.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GatewayChoice:
    """Which gateway a command talks to, and as whom."""

    state_dir: Annotated[str, Parameter(env_var=STATE_DIR_VARIABLE)] = "./state"
    """State directory of a gateway on this machine: its address and password are read from there."""

    url: str | None = None
    """Address of a gateway elsewhere, as in https://host:8443; needs --password-file."""

    user: str = ADMINISTRATOR
    """User to log in as."""

    password_file: str | None = None
    """File whose first line is the password."""

    ca_file: str | None = None
    """PEM file of the authority to trust; else that of the state directory, or those of the system."""

    def connect(self) -> "Connection":
        """Logs in. CommandError says why not, and what to do."""
        try:
            url, authority, password_file = self._address()
            password = read_password_file(password_file)
        except FileNotFoundError as error:
            raise CommandError(
                f"there is no file {error.filename}; name the file with the password"
            ) from None
        except StateError as error:
            raise CommandError(str(error)) from None
        return Connection(url, self.user, password, authority)

    def _address(self) -> tuple[str, str | None, str]:
        if self.url is not None:
            if not self.url.startswith(("http://", "https://")):
                raise UsageError(f"--url: {self.url!r} is no address; give one as in https://host:8443")
            if self.password_file is None:
                raise UsageError("--url needs --password-file: the file whose first line is the password")
            return self.url, self.ca_file, self.password_file
        state = StateDirectory(self.state_dir)
        running = state.running()
        if self.password_file is None and self.user != ADMINISTRATOR:
            raise UsageError(f"--user {self.user} needs --password-file")
        return running.local_url, self.ca_file or running.authority, self.password_file or state.password_file


class Connection:
    """A session at a gateway; leaving the block logs out."""

    def __init__(self, url: str, user: str, password: str, authority: str | None) -> None:
        self.url = url
        context = None
        if url.startswith("https://"):
            try:
                context = ssl.create_default_context(cafile=authority)
            except OSError as error:
                raise UsageError(f"--ca-file: {authority} can't be used: {error}") from None
        transport: xmlrpc.client.Transport = _SafeTransport(context) if context else _Transport()
        self._proxy = xmlrpc.client.ServerProxy(url, transport=transport)
        self._session: str = self._answer("session.login_with_password", user, password, "1.0", "vdi-gateway")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, CommandError):
                self._answer("session.logout", self._session)
        finally:
            self._proxy("close")()

    def call(self, method: str, *parameters: Any) -> Any:
        """The value of one call. CommandError carries the gateway's own line."""
        return self._answer(method, self._session, *parameters)

    def _answer(self, method: str, *parameters: Any) -> Any:
        try:
            answer: Any = getattr(self._proxy, method)(*parameters)
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            raise CommandError(
                f"the certificate of {self.url} isn't trusted ({reason});"
                " give the gateway's tls/ca.pem with --ca-file"
            ) from None
        except OSError as error:
            raise CommandError(
                f"no gateway answers at {self.url}: {error.strerror or error}; is it running?"
            ) from None
        except (xmlrpc.client.Error, ValueError, SyntaxError) as error:
            text = getattr(error, "errmsg", None) or getattr(error, "faultString", None) or str(error)
            raise CommandError(
                f"{self.url} doesn't answer as a gateway does: {text}; check the address"
            ) from None
        if answer.get("Status") == "Success":
            return answer.get("Value")
        code, *details = answer.get("ErrorDescription", ["INTERNAL_ERROR", "no description"])
        raise CommandError(error_text(method, code, details))


def error_text(method: str, code: str, details: list[str]) -> str:
    """One line for a XenAPI error: what it says in words, and its code for looking it up."""
    from gateway.core.errors import XenAPIError  # noqa: PLC0415  only needed when something fails

    return f"{XenAPIError(code, *details).message} ({code} from {method})"


class _Transport(xmlrpc.client.Transport):
    def make_connection(self, host: Any) -> Any:
        connection = super().make_connection(host)
        connection.timeout = TIMEOUT_SECONDS
        return connection


class _SafeTransport(xmlrpc.client.SafeTransport):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)

    def make_connection(self, host: Any) -> Any:
        connection = super().make_connection(host)
        connection.timeout = TIMEOUT_SECONDS
        return connection
