"""Who asks: the session reference or the Basic credentials of a request.

A session reference comes before Basic credentials, as in xapi, and from the query before a cookie.
Credentials that can't be read are no credentials, but not the same as none: they must not be answered with a
challenge.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.core.sessions import Credentials

if TYPE_CHECKING:
    from gateway.http.request import Request


@dataclass(frozen=True, slots=True)
class Presented:
    """What a request brought: `credentials` if it could be read, `anything` if there was something at all."""

    credentials: Credentials | None
    anything: bool


def presented(request: "Request") -> Presented:
    """The credentials of a request; never raises."""
    session_ref = request.parameter("session_id")
    if session_ref is not None:
        return Presented(Credentials(request.address, session_ref, None, None), anything=True)
    authorization = request.headers.get("authorization")
    if authorization is None:
        return Presented(None, anything=False)
    pair = parse_basic(authorization)
    if pair is None:
        return Presented(None, anything=True)
    return Presented(Credentials(request.address, None, *pair), anything=True)


def parse_basic(authorization: str) -> tuple[str, str] | None:
    """User and password of a Basic header (RFC 7617; UTF-8, or else Latin-1), None if it is none."""
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        text = decoded.decode()
    except UnicodeDecodeError:
        text = decoded.decode("latin-1")
    user, colon, password = text.partition(":")
    return (user, password) if colon else None
