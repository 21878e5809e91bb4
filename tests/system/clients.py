"""The programs people upload with, each run as its users run it, and a socket to misbehave with."""

import base64
import http.client
import json
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_NODE_UPLOAD = """
const [file, url] = process.argv.slice(1), fs = require('fs'), http = require('http');
const end = (code, text) => { console.log(text); process.exit(code); };
const options = {method: 'PUT', headers: {'Content-Length': fs.statSync(file).size}};
const request = http.request(url, options, answer => {
  let body = '';
  answer.on('data', piece => body += piece);
  answer.on('aborted', () => end(1, 'aborted: ' + body));
  answer.on('error', error => end(1, error.message + ': ' + body));
  answer.on('end', () => {
    end(answer.statusCode === 200 && answer.complete ? 0 : 1, answer.statusCode + ' ' + body);
  });
});
request.on('error', error => end(1, error.message));
fs.createReadStream(file).pipe(request);
"""


@dataclass(frozen=True)
class Outcome:
    """Whether the client believes that the upload succeeded, and what it says."""

    success: bool
    said: str


def curl(*arguments: str, timeout: float = 60) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, check=False, timeout=timeout)


def curl_upload(source: Path, *arguments: str) -> tuple[int, str]:
    """Status and body that curl got; the source "-" is sent in chunks."""
    done = curl("-w", "\n%{http_code}", "-T", str(source), *arguments)
    text, _, status = done.stdout.decode().rpartition("\n")
    return int(status), text


def upload_with_curl(source: Path, url: str) -> Outcome:
    done = curl("--fail-with-body", "-T", str(source), url)
    return Outcome(done.returncode == 0, (done.stdout + done.stderr).decode())


def upload_with_wget(source: Path, url: str) -> Outcome:
    done = subprocess.run(
        [
            "wget",
            "-nv",
            "-O",
            "-",
            "--tries=1",
            "--content-on-error",
            "--method=PUT",
            f"--body-file={source}",
            url,
        ],
        capture_output=True,
        check=False,
        timeout=60,
    )
    return Outcome(done.returncode == 0, (done.stdout + done.stderr).decode())


def upload_with_node(source: Path, url: str) -> Outcome:
    done = subprocess.run(
        ["node", "-e", _NODE_UPLOAD, str(source), url], capture_output=True, check=False, timeout=60
    )
    return Outcome(done.returncode == 0, (done.stdout + done.stderr).decode())


def upload_with_http_client(source: Path, url: str) -> Outcome:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        with source.open("rb") as body:
            connection.request(
                "PUT", f"{parts.path}?{parts.query}", body, {"Content-Length": str(source.stat().st_size)}
            )
        answer = connection.getresponse()
        text = answer.read().decode()
    except (http.client.HTTPException, OSError) as error:
        return Outcome(False, repr(error))
    finally:
        connection.close()
    return Outcome(answer.status == 200, f"{answer.status} {text}")


UPLOADERS = {
    "curl": upload_with_curl,
    "wget": upload_with_wget,
    "http.client": upload_with_http_client,
    "node": upload_with_node,
}


@dataclass(frozen=True)
class Answer:
    """A response as it stood on the wire: `complete` unless fewer bytes came than its Content-Length."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def text(self) -> str:
        return self.body.decode()


class RawClient:
    """One connection on which every byte is the test's own."""

    def __init__(self, url: str, authority: Path | None = None) -> None:
        parts = urlsplit(url)
        self.target = f"{parts.path}?{parts.query}"
        assert parts.hostname is not None
        self._received = b""
        plain = socket.create_connection((parts.hostname, parts.port or 80), timeout=60)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=str(authority))
            # Ending without close_notify is what some clients do; the test decides, not the library.
            self.socket: socket.socket = context.wrap_socket(
                plain, server_hostname=parts.hostname, suppress_ragged_eofs=True
            )
        else:
            self.socket = plain

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def head(self, *headers: str, method: str = "PUT", version: str = "1.1") -> None:
        lines = [f"{method} {self.target} HTTP/{version}", "Host: gateway", *headers, "", ""]
        self.send("\r\n".join(lines).encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def end(self) -> None:
        """End of file towards the server; it may still answer."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with RST, as the kernel does for a process that dies with unread data."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()

    def answer_head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer, without its body."""
        while b"\r\n\r\n" not in self._received:
            piece = self.socket.recv(65536)
            assert piece, f"the connection ended after {self._received!r}"
            self._received += piece
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in fields}

    def receive(self, count: int) -> bytes:
        """Up to `count` bytes of the body: fewer when the connection ends."""
        pieces = [self._received[:count]]
        self._received = self._received[count:]
        left = count - len(pieces[0])
        while left:
            try:
                piece = self.socket.recv(min(left, MAXIMUM_PIECE))
            except ConnectionResetError:
                break
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def answer_body(self, headers: dict[str, str]) -> tuple[bytes, bool]:
        length = int(headers["content-length"])
        body = self.receive(length)
        return body, len(body) == length

    def answer(self) -> Answer:
        """The whole next answer."""
        status, headers = self.answer_head()
        body, complete = self.answer_body(headers)
        return Answer(status, headers, body, complete)


MAXIMUM_PIECE = 1 << 20


def basic(user: str, password: str) -> str:
    """An Authorization header line."""
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def json_call(url: str, method: str, *parameters: object) -> object:
    """One JSON-RPC 2.0 call; the result, or AssertionError with the error."""
    done = curl(
        "--data",
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}),
        url.rstrip("/") + "/jsonrpc",
    )
    answer = json.loads(done.stdout)
    assert "error" not in answer, answer
    return answer["result"]
