"""JSON-RPC 1.0 and 2.0 as XenServer speaks it at /jsonrpc; the version is told from the request itself.

Integers are numbers here and dates are strings. A XenAPI failure is `{"code": 1, "message": CODE, "data":
[params]}` in version 2.0 and the array of code and parameters in 1.0. Whatever bytes arrive, there is one
answer, always with HTTP status 200: a result, a XenAPI failure, or an error with one of the reserved codes of
the JSON-RPC 2.0 specification (section 5.1) for a body that is no call. The trap: notifications (a null or
missing id) and batches exist in the specification but not in XenAPI, and must be refused, not ignored.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.core.errors import XenAPIError
from gateway.core.threads import in_thread
from gateway.xenapi.types import Int32, WireValue, is_large, moment_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.xenapi.dispatch import Api, Caller

    Ask = Callable[[Api, Caller], Awaitable[bytes]]

CONTENT_TYPE: Final = "application/json"
"""Without a charset parameter: clients compare the header literally."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
INVALID_PARAMS: Final = -32602
XENAPI_FAILURE: Final = 1
"""The code of every XenAPI failure in JSON-RPC 2.0."""

MAX_PARTS: Final = 100_000
"""Brackets that open and commas in one request, also those in strings: as many as XML-RPC may have elements.
The decoder keeps the interpreter to itself: a million empty arrays stopped everybody for two seconds."""

_Id = str | int | float | None


class MalformedRequestError(Exception):
    """A body that is no JSON-RPC call: its reserved code, and as much of the call as could be told."""

    def __init__(self, code: int, problem: str, *, version: int = 2, call_id: _Id = None) -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem
        self.version = version
        self.call_id = call_id


class Request(msgspec.Struct, frozen=True):
    """One call: the protocol's version (1 or 2), the id to send back, the method and its positional
    parameters."""

    version: int
    call_id: _Id
    method: str
    params: list[Any]


def parse_request(body: bytes) -> Request:
    """The call in `body`; MalformedRequestError for any other body."""
    if body.count(b"[") + body.count(b"{") + body.count(b",") > MAX_PARTS:
        raise MalformedRequestError(PARSE_ERROR, f"it has more than {MAX_PARTS} brackets and commas")
    try:
        request = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise MalformedRequestError(PARSE_ERROR, f"it is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise MalformedRequestError(PARSE_ERROR, "it is not UTF-8") from None
    except RecursionError:
        raise MalformedRequestError(PARSE_ERROR, "it nests too deeply") from None
    if isinstance(request, list):
        raise MalformedRequestError(INVALID_REQUEST, "batches are not supported; send one call per request")
    if not isinstance(request, dict):
        raise MalformedRequestError(INVALID_REQUEST, "it is not an object")
    version = 2 if "jsonrpc" in request else 1
    call_id = request.get("id")
    if isinstance(call_id, bool) or not isinstance(call_id, str | int | float):
        problem = "its id must be a string or a number; calls without an answer are not supported"
        raise MalformedRequestError(INVALID_REQUEST, problem, version=version)
    if version == 2 and request["jsonrpc"] != "2.0":
        raise MalformedRequestError(INVALID_REQUEST, 'its jsonrpc must be "2.0" or missing', call_id=call_id)
    method = request.get("method")
    if not isinstance(method, str):
        raise MalformedRequestError(
            INVALID_REQUEST, "its method must be a string", version=version, call_id=call_id
        )
    params = request.get("params", [])
    if not isinstance(params, list):
        problem = "its params must be an array; XenAPI has no named parameters"
        raise MalformedRequestError(INVALID_PARAMS, problem, version=version, call_id=call_id)
    return Request(version, call_id, method, params)


def _plain(value: WireValue) -> WireValue:
    """`value` with its dates as text: left to itself the encoder would write them in its own form."""
    if isinstance(value, datetime):
        return moment_text(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        # A lone surrogate, as file names in error texts may hold, cannot be written as UTF-8.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, Int32):
        return int(value)
    return "" if value is None else value


def _encode(answer: dict[str, Any]) -> bytes:
    return msgspec.json.encode(answer)


def dump_success(request: Request, value: WireValue) -> bytes:
    """The answer to a call that succeeded."""
    result = _plain(value)
    if request.version == 1:
        return _encode({"result": result, "error": None, "id": request.call_id})
    return _encode({"jsonrpc": "2.0", "result": result, "id": request.call_id})


def dump_failure(request: Request, error_info: list[str]) -> bytes:
    """The answer to a call that failed: the error's code and its parameters."""
    info = _plain(list(error_info))
    assert isinstance(info, list)
    if request.version == 1:
        return _encode({"result": None, "error": info, "id": request.call_id})
    error = {"code": XENAPI_FAILURE, "message": info[0], "data": info[1:]}
    return _encode({"jsonrpc": "2.0", "error": error, "id": request.call_id})


def dump_malformed(error: MalformedRequestError) -> bytes:
    """The answer to a body that is no call."""
    text = f"The request cannot be read as JSON-RPC: {error.problem}."
    details = {"code": error.code, "message": text, "data": []}
    if error.version == 1:
        return _encode({"result": None, "error": details, "id": error.call_id})
    return _encode({"jsonrpc": "2.0", "error": details, "id": error.call_id})


def read_jsonrpc(body: bytes) -> Ask:
    """What asks the API for the body of the answer (HTTP status 200, content type application/json) to the
    body of a request. Never raises.
    """
    try:
        return partial(_answer, parse_request(body))
    except MalformedRequestError as error:
        return partial(_tell, dump_malformed(error))


async def _tell(problem: bytes, _api: Api, _caller: Caller) -> bytes:
    return problem


async def _answer(request: Request, api: Api, caller: Caller) -> bytes:
    try:
        value = await api.call(request.method, request.params, caller)
    except XenAPIError as error:
        return dump_failure(request, error.error_info)
    if is_large(value):
        return await in_thread(dump_success, request, value)
    return dump_success(request, value)
