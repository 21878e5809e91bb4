"""However an open or a close ends, nothing of it stays open in the client's process.

The gateway is played by the test; each of its answers comes at the worst moment.
"""

import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.access import client, client_answer
from gateway.access.client import AccessDisk, list_vdis, open_vdi
from gateway.access.client_link import ClientLink
from gateway.access.protocol import (
    MAX_MESSAGE,
    Adopted,
    Announce,
    Closed,
    Decoder,
    File,
    Granted,
    Message,
    Open,
    Refused,
    Revoke,
    encode,
    pack_descriptors,
)
from tests.system.site import wait_until

SECONDS = 20
VDI = "00000000-0000-4000-8000-000000000000"
UNREADABLE = (MAX_MESSAGE + 1).to_bytes(4, "big")


class Gateway:
    """Answers one connection after the other, each in the way that the test has given."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "access.sock"
        self.image = directory / "disk.raw"
        self.image.write_bytes(bytes(4096))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread: threading.Thread | None = None
        self.heard: list[type[Message]] = []

    def play(self, *scenes: Callable[["Gateway", socket.socket], None]) -> None:
        def run() -> None:
            for scene in scenes:
                connection, _ = self._listener.accept()
                # A client that leaves before the answer breaks it off.
                with connection, contextlib.suppress(ConnectionError):
                    connection.settimeout(SECONDS)
                    scene(self, connection)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def hear(self, connection: socket.socket, kind: type[Message]) -> None:
        """Wait for a message of this kind; what comes before it doesn't matter."""
        decoder = Decoder()
        while data := connection.recv(65536):
            for message in decoder.feed(data):
                self.heard.append(type(message))
                if isinstance(message, kind):
                    return
        raise AssertionError(f"the client has gone and never sent {kind.__name__}")

    def grant(self, connection: socket.socket, files: int = 1, descriptors: int = 1) -> None:
        granted = Granted("lease", (File(str(self.image), "raw", None),) * files)
        fds = [os.open(self.image, os.O_RDWR) for _ in range(descriptors)]
        try:
            connection.sendmsg([encode(granted)], pack_descriptors(fds) if fds else [])
        finally:
            for fd in fds:
                os.close(fd)

    def until_the_end(self, connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join(SECONDS)
            assert not self._thread.is_alive()
        self._listener.close()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    client._dead_descriptor()  # the process keeps it
    before = descriptors()
    played = Gateway(tmp_path)
    yield played
    played.finish()
    wait_until(lambda: not leases(), "the threads of the leases to end")
    assert descriptors() == before


def descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def leases() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lease of")]


def opened(gateway: Gateway) -> AccessDisk:
    return open_vdi(str(gateway.path), VDI, write=True)


def granting(gateway: Gateway, connection: socket.socket) -> None:
    gateway.hear(connection, Open)
    gateway.grant(connection)
    gateway.until_the_end(connection)


def answering(answer: bytes | None) -> Callable[[Gateway, socket.socket], None]:
    def scene(_: Gateway, connection: socket.socket) -> None:
        connection.recv(65536)
        if answer is not None:
            connection.sendall(answer)
            connection.recv(65536)

    return scene


REFUSED = encode(Refused("VDI_IN_USE", (), "somebody has it"))
ANSWERS = {"refused": REFUSED, "gone": None, "unreadable": UNREADABLE, "senseless": encode(Closed())}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("ask", [opened, lambda gateway: list_vdis(str(gateway.path))], ids=["open", "list"])
def test_what_a_gateway_answers_that_grants_nothing_leaves_nothing(
    gateway: Gateway, answer: bytes | None, ask: Callable[[Gateway], object]
) -> None:
    gateway.play(answering(answer))
    with pytest.raises(OSError):
        ask(gateway)


@pytest.mark.parametrize(("files", "came"), [(2, 1), (1, 2), (1, 0), (0, 2)])
def test_other_descriptors_than_were_promised_are_closed(gateway: Gateway, files: int, came: int) -> None:
    def scene(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Open)
        played.grant(connection, files, came)
        played.until_the_end(connection)

    gateway.play(scene)
    with pytest.raises(ConnectionError):
        opened(gateway)


def test_a_gateway_that_says_nothing_is_given_up(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_answer, "ANSWER_SECONDS", 0.05)
    gateway.play(lambda played, connection: played.until_the_end(connection))
    with pytest.raises(TimeoutError):
        opened(gateway)


@pytest.mark.parametrize("moment", ["answer", "disk"])
def test_ctrl_c_while_a_disk_is_opened_leaves_nothing(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "answer" if moment == "answer" else "open_disk", interrupted)
    gateway.play(granting)
    with pytest.raises(KeyboardInterrupt):
        opened(gateway)


def test_without_a_thread_there_is_no_disk(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    gateway.play(granting)
    monkeypatch.setattr(threading, "Thread", NoThread)
    with pytest.raises(RuntimeError, match="new thread"):
        opened(gateway)


def test_ctrl_c_when_the_thread_has_begun_ends_the_lease_and_nobody_announces_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedStart(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    gateway.play(granting)
    monkeypatch.setattr(threading, "Thread", InterruptedStart)
    with pytest.raises(KeyboardInterrupt):
        opened(gateway)
    wait_until(lambda: not leases(), "the thread to end, though the gateway is there to be announced to")


def test_a_disk_that_is_closed_before_its_thread_runs_leaves_no_connection(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_run = threading.Event()

    class LateThread(threading.Thread):
        def run(self) -> None:
            may_run.wait(SECONDS)
            super().run()

    gateway.play(granting)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", LateThread)
        patched.setattr(client, "RELEASE_SECONDS", 0.0)
        disk = opened(gateway)
        disk.close()
    may_run.set()
    wait_until(lambda: not leases(), "the thread to end")


def test_closing_waits_until_others_have_been_let_in(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    receive = ClientLink.receive

    def noted(link: ClientLink, seconds: float) -> Message | None:
        waits.append(seconds)
        return receive(link, seconds)

    let_in = threading.Event()

    def scene(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Open)
        played.grant(connection)
        played.hear(connection, Closed)
        # The wait into which the close came has passed by then.
        wait_until(lambda: client.RELEASE_SECONDS in waits, "the client to wait on")
        let_in.set()

    monkeypatch.setattr(ClientLink, "receive", noted)
    monkeypatch.setattr(client, "REPORT_SECONDS", 0.2)
    gateway.play(scene)
    disk = opened(gateway)
    wait_until(lambda: client.REPORT_SECONDS in waits, "the thread to listen")
    disk.close()
    assert let_in.is_set()


def test_a_gateway_that_never_lets_others_in_is_left_after_a_while(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RELEASE_SECONDS", 0.05)
    monkeypatch.setattr(client, "REPORT_SECONDS", 0.05)
    gateway.play(granting)
    opened(gateway).close()


def test_a_close_that_is_interrupted_or_fails_ends_the_lease(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scene(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Open)
        played.grant(connection)
        played.hear(connection, Closed)

    gateway.play(scene, scene)
    for error in (KeyboardInterrupt(), OSError(errno.EIO, "the disk is broken")):
        disk = opened(gateway)
        end = disk._disk.close

        def broken(end: Callable[[], None] = end, error: BaseException = error) -> None:
            end()
            raise error

        monkeypatch.setattr(disk._disk, "close", broken)
        with pytest.raises(type(error)):
            disk.close()
        wait_until(lambda: not leases(), "the thread to end")


def test_the_next_gateway_is_told_and_its_connection_is_closed_as_well(gateway: Gateway) -> None:
    def gone(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Open)
        played.grant(connection)

    def refusing(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Announce)
        connection.sendall(encode(Refused("OTHER_OPERATION_IN_PROGRESS", (), "not yet")))

    def adopting(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Announce)
        connection.sendall(encode(Adopted()))
        played.hear(connection, Closed)

    gateway.play(gone, answering(UNREADABLE), refusing, adopting)
    disk = opened(gateway)
    wait_until(lambda: Announce in gateway.heard and disk.connected, "the lease to be adopted")
    disk.close()


def test_files_are_given_up_also_when_the_process_has_no_descriptor_left(gateway: Gateway) -> None:
    revoke = threading.Event()

    def scene(played: Gateway, connection: socket.socket) -> None:
        played.hear(connection, Open)
        played.grant(connection)
        revoke.wait(SECONDS)
        connection.sendall(encode(Revoke("its session has ended")))
        played.until_the_end(connection)

    gateway.play(scene)
    disk = opened(gateway)
    disk.pwrite(bytes(512), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, descriptors())) + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        revoke.set()
        wait_until(lambda: not leases(), "the disk to be given up")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert str(gateway.image) not in descriptors().values()
    with pytest.raises(OSError, match="its session has ended") as ended:
        disk.pwrite(bytes(512), 0)
    assert ended.value.errno == errno.ESHUTDOWN
    disk.close()
