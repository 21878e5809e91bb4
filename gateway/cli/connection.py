"""How a command reaches the running gateway: JSON-RPC with the standard library, in a session of its own.

Knows the state directory of a gateway on this machine, --url for any other, and the user's client.toml. The
trap: the password must never be in the process list or the environment, so it comes from a file or is asked
for on the terminal.
"""

import contextlib
import getpass
import http.client
import json
import re
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Final, Self

from cyclopts import Parameter

from gateway.cli.arguments import FileName
from gateway.cli.client_config import ClientConfig, load_client_config
from gateway.cli.door import CONNECT_SECONDS, Door, DoorClosedError
from gateway.cli.output import CommandError, UsageError
from gateway.state import ADMINISTRATOR, STATE_DIR_VARIABLE, StateDirectory, StateError, read_password_file

CALL_SECONDS: Final = 120.0
_LOGOUT_SECONDS: Final = 5.0
DEFAULT_STATE_DIR: Final = "./state"
_REFUSED: Final = 1  # the code of every XenAPI failure
# What XML has no way to say; bytes of an argument that are no UTF-8 are among it.
_NOT_IN_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Login:
    """Where to log in, as whom; the password is fetched when it is needed."""

    door: Door
    user: str
    password: Callable[[], str]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GatewayChoice:
    """Which gateway a command talks to, and as whom."""

    state_dir: Annotated[FileName | None, Parameter(env_var=STATE_DIR_VARIABLE)] = None
    """State directory of a gateway on this machine, which needs no password; ./state unless client.toml names
    a gateway."""

    url: str | None = None
    """Address of a gateway elsewhere, as in https://host:8443."""

    user: str | None = None
    """User to log in as; root when it is left out."""

    password_file: FileName | None = None
    """File whose first line is the password; without it the password is asked for on the terminal."""

    ca_file: FileName | None = None
    """PEM file of the authority that must have signed the certificate. Without it the certificate is
    remembered when it is first seen, and must stay the same."""

    def connect(self) -> "Connection":
        """Logs in. CommandError says why not, and what to do."""
        try:
            return Connection(self._login())
        except StateError as error:
            raise CommandError(str(error)) from None

    def _login(self) -> Login:
        if self.url is not None:
            config = load_client_config()
            return self._remote(self.url, config if self.url == config.url else ClientConfig(config.path))
        if self.state_dir is None:
            config = load_client_config()
            if config.url is not None:
                return self._remote(config.url, config)
        return self._local(StateDirectory(self.state_dir or DEFAULT_STATE_DIR))

    def _remote(self, url: str, config: ClientConfig) -> Login:
        user = self.user or config.user or ADMINISTRATOR
        door = Door(url, authority=self.ca_file or config.ca_file)
        own = user == (config.user or ADMINISTRATOR)
        if self.password_file is None and own and config.password is not None:
            known = config.password
            return Login(door, user, lambda: known)
        path = self.password_file or (config.password_file if own else None)
        if path is None and not sys.stdin.isatty() and not sys.stderr.isatty():
            raise UsageError(
                "there is no terminal to ask for the password; give --password-file, the file whose first"
                f" line it is, or write it into {config.path}"
            )
        return Login(door, user, lambda: _ask(user, url) if path is None else read_password(path))

    def _local(self, state: StateDirectory) -> Login:
        """Through the Unix socket, where the kernel says who we are: the gateway's own user, or root."""
        state.running()
        door = Door(f"the socket {state.socket}", path=state.socket)
        path = self.password_file
        return Login(door, self.user or ADMINISTRATOR, lambda: "" if path is None else read_password(path))


def read_password(path: str) -> str:
    """The first line of a file. CommandError when there is none."""
    try:
        return read_password_file(path)
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}; name the file with the password") from None
    except StateError as error:
        raise CommandError(str(error)) from None


def _ask(user: str, url: str) -> str:
    try:
        return getpass.getpass(f"Password of {user} at {url}: ")
    except EOFError:
        raise CommandError("no password was given") from None


class Connection:
    """A session at a gateway; leaving the block logs out."""

    def __init__(self, login: Login) -> None:
        self.door: Final = login.door
        self._login: Final = login
        self._password: str | None = None
        self._http = DoorHTTPConnection(self.door, CALL_SECONDS)
        self.session = ""
        self.log_in()

    def log_in(self) -> None:
        """Begin a session; a new one, where the old one has ended."""
        if self._password is None:
            self._password = self._login.password()
        self.session = self._answer(
            "session.login_with_password", self._login.user, self._password, "1.0", "vdi-gateway"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                self.restart(_LOGOUT_SECONDS)  # the gateway may be one that answers no more
            if not isinstance(error, DoorClosedError):
                with contextlib.suppress(CommandError):
                    self._answer("session.logout", self.session)
        finally:
            self._http.close()

    def call(self, method: str, *parameters: Any) -> Any:
        """The value of one call. CallRefusedError carries the gateway's own line."""
        return self._answer(method, self.session, *parameters)

    def restart(self, seconds: float) -> None:
        """Forget the connection under the session: the next call opens another, and waits so long for it."""
        self._http.close()
        self._http = DoorHTTPConnection(self.door, seconds)

    def _answer(self, method: str, *parameters: Any) -> Any:
        check_speakable(parameters)
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}).encode()
        try:
            return _value(method, self._posted(body))
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            # A port that wants TLS resets what comes without.
            doubt = "" if self.door.encrypted or self.door.path is not None else ", and is it not https://?"
            raise DoorClosedError(
                f"{self.door.url} broke the connection off: {text}; is it running{doubt or '?'}"
            ) from None
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise CommandError(
                f"{self.door.url} doesn't answer as a gateway does: {error}; check the address"
            ) from None

    def _posted(self, body: bytes) -> bytes:
        """The answer to one request. A connection that has waited may have been closed meanwhile: then it is
        sent once more."""
        waited = self._http.sock is not None
        try:
            self._http.request("POST", "/jsonrpc", body, {"Content-Type": "application/json"})
            answer = self._http.getresponse()
            text = answer.read()
        except BaseException as error:
            self._http.close()
            if not waited or not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                raise
            return self._posted(body)
        if answer.status != 200:
            raise ValueError(f"{answer.status} {answer.reason}")
        return text


def _value(method: str, text: bytes) -> Any:
    answer = json.loads(text)
    error = answer.get("error")
    if error is None:
        return answer["result"]
    if error["code"] != _REFUSED:
        raise ValueError(error["message"])
    raise CallRefusedError(method, error["message"], error["data"])


class CallRefusedError(CommandError):
    """The gateway refused a call: its code and what belongs to it."""

    def __init__(self, method: str, code: str, details: list[str]) -> None:
        super().__init__(error_text(method, code, details))
        self.code: Final = code


def error_text(method: str, code: str, details: list[str]) -> str:
    """One line for a XenAPI error: what it says in words, and its code for looking it up."""
    from gateway.core.errors import XenAPIError  # noqa: PLC0415  only needed when something fails

    return f"{XenAPIError(code, *details).message} ({code} from {method})"


def speakable(text: str) -> str:
    """A text as a gateway can be told it, such as the name of a file, which may hold any byte."""
    return _NOT_IN_XML.sub("\ufffd", text)


def check_speakable(value: Any) -> None:
    """UsageError for a text somewhere in a parameter that a gateway can't be told. It may be a password."""
    if isinstance(value, str) and (found := _NOT_IN_XML.search(value)):
        raise UsageError(
            f"what is to be sent has the character {found[0]!a}, which is a control character or no UTF-8;"
            " give a name, or a password, without it"
        )
    parts = list(value.values()) if isinstance(value, dict) else value
    for each in parts if isinstance(parts, (list, tuple)) else ():
        check_speakable(each)


class DoorHTTPConnection(http.client.HTTPConnection):
    """A connection through a door, opened when it is needed; `seconds` are waited for each answer."""

    def __init__(self, door: Door, seconds: float) -> None:
        super().__init__(door.host, timeout=seconds)
        self._door = door

    def connect(self) -> None:
        self.sock = self._door.open(min(CONNECT_SECONDS, self.timeout or CONNECT_SECONDS))
        self.sock.settimeout(self.timeout)
