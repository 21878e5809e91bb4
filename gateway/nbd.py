"""NBD as the gateway sees it: the supervisor that it starts, or finds running, and stops.

The supervisor is a process of its own, which a crash of the gateway leaves alone. While both run they are
connected: what the supervisor has to tell goes to the gateway's log, and whether NBD is served to the API.

The trap: the connection is all that is known. If it ends without being asked to, the supervisor has died; its
workers serve the clients they have, and another one is started.
"""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
import trio

from gateway.core.nbd_service import NbdDoor
from gateway.core.threads import in_thread
from gateway.nbd_addresses import nbd_service
from gateway.nbd_files import NbdFiles, NbdRefused

log = structlog.get_logger("gateway.nbd")

_START_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 5.0
_HAND_OVER_SECONDS: Final = 10.0
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0
_PIECE: Final = 65536
_LEVELS: Final = ("info", "warning", "error")


class _Link:
    """The connection to a supervisor: JSON, one object a line."""

    def __init__(self, connected: trio.socket.SocketType) -> None:
        self._socket: Final = connected
        self._received = b""
        self._messages: list[dict[str, Any]] = []

    @classmethod
    async def connect(cls, path: str) -> "_Link":
        """Raises OSError where nobody answers."""
        connected = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The path may be longer than a socket's address.
            await connected.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        except BaseException:
            connected.close()
            raise
        finally:
            os.close(directory)
        return cls(connected)

    def send(self, order: dict[str, Any]) -> None:
        """One order; lost if the supervisor is gone, which `receive` tells."""
        with contextlib.suppress(OSError):
            os.write(self._socket.fileno(), json.dumps(order).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        while not self._messages:
            try:
                data = await self._socket.recv(_PIECE)
            except (OSError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            *lines, self._received = (self._received + data).split(b"\n")
            try:
                self._messages += [json.loads(line) for line in lines]
            except ValueError as error:
                log.warning("the supervisor of NBD isn't understood", why=str(error))
                return None
        return self._messages.pop(0)

    async def status(self) -> dict[str, Any] | None:
        """The next status; what the supervisor logs meanwhile is logged."""
        while (message := await self.receive()) is not None:
            if "status" in message:
                found: dict[str, Any] = message["status"]
                return found
            _log(message)
        return None

    def close(self) -> None:
        self._socket.close()


class Nbd:
    """The supervisor of this gateway. `certificates` makes the directory of the present certificate."""

    def __init__(
        self,
        files: NbdFiles,
        door: NbdDoor,
        *,
        version: str,
        certificates: Callable[[], tuple[str, str]] | None,
        shutdown_seconds: Callable[[], float],
    ) -> None:
        """`certificates` gives that directory and the file of the chain; None without TLS. It blocks."""
        self._files: Final = files
        self._door: Final = door
        self._version: Final = version
        self._certificates: Final = certificates
        self._shutdown_seconds: Final = shutdown_seconds
        self._directory: str | None = None
        self._chain: str | None = None
        self._served_directory: str | None = None
        """The supervisor's: it keeps an old one if workers can't be started with the new one."""
        self._link: _Link | None = None
        self._addresses: list[tuple[str, int]] = []
        self._stays = False
        self._stopping = False
        self._process: trio.Process | None = None
        self._ended = trio.Event()

    @property
    def urls(self) -> tuple[str, ...]:
        """Where clients connect to."""
        scheme = "nbds" if self._files.tls else "nbd"
        return tuple(
            f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
            for host, port in self._addresses
        )

    async def start(self, *, unless: Callable[[], Awaitable[None]]) -> bool:
        """Find a supervisor, or start one; clients are answered then. Raises NbdRefused, OSError.

        False if `unless` returns first; then what had begun has been ended.
        """
        failed: NbdRefused | OSError | None = None
        given_up = False
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                nonlocal given_up
                await unless()
                given_up = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            try:
                await self._start()
            except (NbdRefused, OSError) as error:
                failed = error
            nursery.cancel_scope.cancel()
        if given_up:
            self.begin_stop()
            async with trio.open_nursery() as nursery:
                if self._link is not None:
                    nursery.start_soon(self._follow_to_the_end, self._link)
                await self.stopped()
                nursery.cancel_scope.cancel()
            return False
        if failed is not None:
            raise failed
        return True

    async def _start(self) -> None:
        if self._certificates is not None:
            self._directory, self._chain = await in_thread(self._certificates)
        if not await self._adopt():
            await self._launch()
        await self._tell_door()

    async def run(self) -> None:
        """Keep it running until `stop`; to be called after `start`."""
        try:
            pause = _FIRST_PAUSE
            while not self._stopping:
                if self._link is not None:
                    began = trio.current_time()
                    await self._follow(self._link)
                    if self._stopping:
                        break
                    self._link.close()
                    self._link = None
                    self._door.serve(None)
                    await self._reap()
                    log.error("the supervisor of NBD has died; another one is started")
                    if trio.current_time() - began > _LONGEST_PAUSE:
                        pause = _FIRST_PAUSE
                try:
                    await self._start()
                except (NbdRefused, OSError) as error:
                    log.warning("NBD is not served", why=str(error), again_in_seconds=pause)
                    await trio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
        finally:
            self._ended.set()

    async def renew(self) -> None:
        """Tell clients that come from now on the certificate and the addresses as they are now."""
        if self._link is None or self._stopping:
            return
        if self._certificates is not None:
            try:
                directory, chain = await in_thread(self._certificates)
            except OSError as error:
                log.warning("NBD keeps the old certificate", why=str(error))
                return
            self._directory, self._chain = directory, chain
            # It may have died meanwhile; the next one begins with these.
            if self._link is not None and directory != self._served_directory:
                self._link.send({"do": "renew", "tls": directory})
        await self._tell_door()

    def begin_stop(self) -> None:
        """Let the requests in flight end, and clients go. One that is to stay goes on."""
        if self._stopping:
            return
        self._stopping = True
        self._door.serve(None)
        if self._link is None or self._stays:
            self._ended.set()
        if self._link is not None and not self._stays:
            self._link.send({"do": "stop"})

    async def stopped(self) -> None:
        """Wait for the end that `begin_stop` has asked for."""
        with trio.move_on_after(self._shutdown_seconds() + _ANSWER_SECONDS) as waiting:
            await self._ended.wait()
        if waiting.cancelled_caught:
            log.warning("the supervisor of NBD doesn't end")
        if self._link is not None:
            self._link.close()
        if not self._stays:
            await self._reap()

    # Beginning

    async def _adopt(self) -> bool:
        """Whether one runs that is as it should be; one that isn't gives its address up."""
        try:
            link = await _Link.connect(self._files.control_socket)
        except OSError:
            return False
        with trio.move_on_after(_ANSWER_SECONDS):
            status = await link.status()
            if status is None or status["leaving"]:
                link.close()
                return False
            if self._suits(status["options"]):
                self._take(link, status)
                if status["tls"] != self._directory:
                    link.send({"do": "renew", "tls": self._directory})
                log.info(
                    "NBD was served on", supervisor=status["pid"], clients=status["clients"], urls=self.urls
                )
                return True
        log.info("another supervisor takes over, with other options; clients that are connected stay")
        link.send({"do": "drain"})
        with trio.move_on_after(_HAND_OVER_SECONDS):
            while (status := await link.status()) is not None and status["accepting"]:
                pass
        link.close()
        return False

    def _suits(self, options: dict[str, Any]) -> bool:
        wanted = self._files.options(self._version)
        if wanted["port"] == 0:
            wanted["port"] = options["port"]
        return bool(options == wanted)

    async def _launch(self) -> None:
        await in_thread(self._files.prepare)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        # The supervisor ends if nobody reads any more and no gateway is connected yet.
        async with trio.lowlevel.FdStream(reading) as stream:
            try:
                command = self._files.command(self._directory, self._version, "--ready-fd", str(writing))
                # Not ended with the gateway: that is what it is for.
                process = await trio.lowlevel.open_process(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            self._process = process
            answer = b""
            with trio.move_on_after(_START_SECONDS) as waiting:
                while not answer.endswith(b"\n") and (piece := await stream.receive_some(_PIECE)):
                    answer += piece
            if waiting.cancelled_caught:
                raise NbdRefused("its supervisor doesn't say that it is ready")
            told = json.loads(answer) if answer else {"refused": "its supervisor has ended", "kind": "other"}
            if "refused" in told:
                await self._reap()
                raise NbdRefused(told["refused"], is_address=told["kind"] == "listen")
            try:
                link = await _Link.connect(self._files.control_socket)
            except OSError as error:
                raise NbdRefused(f"its supervisor doesn't answer: {error.strerror}") from error
            try:
                status = await link.status()
            except BaseException:
                link.close()
                raise
        if status is None:
            link.close()
            raise NbdRefused("its supervisor has ended")
        self._take(link, status)
        log.info("NBD is served", supervisor=process.pid, urls=self.urls)

    async def _reap(self) -> None:
        """Of a supervisor that has ended and was started by this gateway nothing remains."""
        if self._process is not None:
            with trio.move_on_after(_ANSWER_SECONDS):
                await self._process.wait()
            self._process = None

    def _take(self, link: _Link, status: dict[str, Any]) -> None:
        self._link = link
        self._addresses = [(host, port) for host, port in status["addresses"]]
        self._stays = bool(status["stay"])
        self._served_directory = status["tls"]
        if self._stopping and not self._stays:
            link.send({"do": "stop"})

    async def _tell_door(self) -> None:
        try:
            service = await in_thread(nbd_service, self._files.host, self._addresses[0][1], self._chain)
        except (OSError, ValueError) as error:
            log.warning("clients are not told where NBD is", why=str(error))
            service = None
        if self._link is not None and not self._stopping:
            self._door.serve(service)

    async def _follow_to_the_end(self, link: _Link) -> None:
        await self._follow(link)
        self._ended.set()

    async def _follow(self, link: _Link) -> None:
        while (message := await link.receive()) is not None:
            if "status" in message:
                self._served_directory = message["status"]["tls"]
            _log(message)


def _log(message: dict[str, Any]) -> None:
    told = message.get("log")
    if told is not None:
        about = {str(key): value for key, value in told["about"].items() if key != "event"}
        write = getattr(log, told["level"] if told["level"] in _LEVELS else "info")
        write(told["event"], **about)
