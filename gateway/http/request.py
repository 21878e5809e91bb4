"""The head of a request: from bytes to a Request, parsed by h11 and checked for what h11 lets pass.

No I/O. Bodies never come here. The traps: h11 merges equal Content-Length headers and refuses every
transfer-encoding but chunked, while an import has to answer the first with 400 and the second with its own
refusal; so both are looked for in the raw head before h11 sees it.
"""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_plus, unquote_to_bytes

import h11

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEAD_END: Final = re.compile(rb"\n\r?\n")
# Never the first line, which is that of the request.
_TRANSFER_ENCODING: Final = re.compile(
    rb"(?i)(?<=\n)transfer-encoding[ \t]*:([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)\r?\n"
)
_CONTENT_LENGTH: Final = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*([^\r\n]*)")
_PAIRS_AT_MOST: Final = 100
_KNOWN_METHODS: Final = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"}
)


class BadRequest(Exception):  # noqa: N818 - it says what the request is
    """The head can't be understood; `status` and the text are the answer."""

    def __init__(self, status: HTTPStatus, problem: str) -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Request:
    """One request without its body.

    Header names are lower case; of a repeated query key, cookie or header the first counts.
    """

    method: str
    path: str
    raw_path: str
    raw_query: str
    query: "Mapping[str, str]"
    cookies: "Mapping[str, str]"
    headers: "Mapping[str, str]"
    scheme: str
    address: str
    http_version: str
    content_length: int | None
    transfer_encoding: str | None

    def parameter(self, name: str) -> str | None:
        """A parameter from the query or else from a cookie; an empty one counts as absent."""
        return self.query.get(name) or self.cookies.get(name) or None

    @property
    def expects_continue(self) -> bool:
        return self.http_version != "1.0" and self.headers.get("expect", "").lower() == "100-continue"

    @property
    def has_body(self) -> bool:
        """Whether bytes of a body may follow the head."""
        return self.transfer_encoding is not None or bool(self.content_length)

    @property
    def wants_close(self) -> bool:
        options = {option.strip().lower() for option in self.headers.get("connection", "").split(",")}
        return self.http_version == "1.0" or "close" in options


def parse_head(head: bytes, *, scheme: str, address: str, largest: int) -> tuple[Request, h11.Connection]:
    """The request that `head` (up to and with its empty line) states, and h11's connection to answer it with.

    Raises BadRequest.
    """
    lengths = _CONTENT_LENGTH.findall(head)
    if len(lengths) > 1 or (lengths and not lengths[0].strip().isdigit()):
        raise BadRequest(
            HTTPStatus.BAD_REQUEST, "The Content-Length is no number or there are two; send one."
        )
    encodings = _TRANSFER_ENCODING.findall(head)
    if encodings:
        head = _TRANSFER_ENCODING.sub(b"", head)
    protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=largest)
    try:
        protocol.receive_data(head)
        event = protocol.next_event()
    except h11.RemoteProtocolError as error:
        status = HTTPStatus(error.error_status_hint)
        raise BadRequest(status, f"The request can't be understood: {error}; send a correct one.") from error
    if not isinstance(event, h11.Request):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "The request has no complete head; send a correct one.")
    headers: dict[str, str] = {}
    for name, value in event.headers:
        headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
    raw_path, _, raw_query = _origin_form(event.target.decode("latin-1")).partition("?")
    request = Request(
        method=event.method.decode("ascii"),
        path=unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        raw_path=raw_path,
        raw_query=raw_query,
        query=_pairs(raw_query, "&"),
        cookies=parse_cookies(headers.get("cookie", "")),
        headers=headers,
        scheme=scheme,
        address=address,
        http_version=event.http_version.decode("ascii"),
        content_length=int(lengths[0]) if lengths else None,
        transfer_encoding=_codings(encodings) if encodings else None,
    )
    if request.method not in _KNOWN_METHODS:
        raise BadRequest(
            HTTPStatus.NOT_IMPLEMENTED,
            f"There is no method {request.method[:20]}; use GET, HEAD, PUT or POST.",
        )
    return request, protocol


def _codings(fields: "Sequence[bytes]") -> str:
    """What all Transfer-Encoding fields of a head say together, folded lines unfolded."""
    return ", ".join(" ".join(field.decode("latin-1").split()) for field in fields)


def parse_cookies(header: str) -> dict[str, str]:
    """Cookie pairs, separated by ';', or by '&' where there is none: xapi's rule (http.ml), but trimmed."""
    return _pairs(header, ";" if ";" in header else "&")


def _pairs(text: str, separator: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in text.split(separator, _PAIRS_AT_MOST)[:_PAIRS_AT_MOST]:
        name, _, value = pair.strip().partition("=")
        if name:
            pairs.setdefault(unquote_plus(name, errors="replace"), unquote_plus(value, errors="replace"))
    return pairs


def _origin_form(target: str) -> str:
    """The path and query of a target; proxies send the absolute form (RFC 9112 3.2.2)."""
    if target[:7].lower() == "http://" or target[:8].lower() == "https://":
        _, slash, rest = target.partition("://")[2].partition("/")
        return slash + rest or "/"
    return target
