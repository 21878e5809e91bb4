import errno
import io
import json
import uuid
from collections.abc import Iterator

import pytest
import structlog

from gateway.core.errors import XenAPIError
from gateway.core.log import configure, masked
from tests.conftest import log_plainly

REF = "OpaqueRef:0a1b2c3d-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def configuration_put_back() -> Iterator[None]:
    yield
    log_plainly()


@pytest.mark.parametrize(
    "text",
    [
        f"PUT /import_raw_vdi?session_id={REF}&vdi=x",
        f"PUT /import_raw_vdi?session_id={REF.replace(':', '%3A')}&vdi=x",
        f"cookie: session_id={REF}; vdi=x",
        f"export name /vdi?session_id={REF}",
        f"session_id%3D{REF}",
        f"Authorization: Basic {REF}",
        f"authorization: {REF}",
        f"AUTHORIZATION=Bearer {REF}",
        f"{{'authorization': 'Basic {REF}'}}",
        f"(b'Authorization', b'Basic {REF}')",
    ],
)
def test_secrets_are_masked_wherever_a_line_may_hold_them(text: str) -> None:
    assert "0a1b2c3d" not in masked(text)
    assert "***" in masked(text)


def test_masking_leaves_everything_else() -> None:
    assert masked(f"vdi={REF}&session_id={REF}&task_id={REF}") == f"vdi={REF}&session_id=***&task_id={REF}"


def test_lines_are_json_when_nobody_watches_and_hold_no_secret() -> None:
    stream = io.StringIO()
    configure("info", stream)
    log = structlog.get_logger()
    log.debug("not shown")
    log.info(
        "request",
        url=f"/x?session_id={REF}",
        headers={"Authorization": f"Basic {REF}", "host": "h"},
        pairs=[(b"authorization", f"Basic {REF}".encode())],
        password=REF,
        length=3,
    )
    (line,) = stream.getvalue().splitlines()
    assert "0a1b2c3d" not in line
    fields = json.loads(line)
    assert (fields["event"], fields["level"], fields["length"]) == ("request", "info", 3)
    assert fields["headers"] == {"Authorization": "***", "host": "h"}


@pytest.mark.parametrize("terminal", [False, True])
def test_tracebacks_show_neither_local_variables_nor_session_references(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    configure("info", stream)

    def login(password: str) -> None:
        raise XenAPIError("SESSION_INVALID", f"OpaqueRef:{password}")

    secret = uuid.uuid4().hex
    try:
        login(secret)
    except XenAPIError:
        structlog.get_logger().exception("login failed")
    assert "SESSION_INVALID" in stream.getvalue()
    assert secret not in stream.getvalue()


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="no log level 'loud'"):
        configure("loud")


class Disk(io.StringIO):
    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_lines_that_could_not_be_written_are_counted_once_there_is_space_again() -> None:
    stream = Disk()
    configure("info", stream)
    log = structlog.get_logger()
    stream.full = True
    log.info("first")
    log.warning("second")
    stream.full = False
    log.info("third")
    log.info("fourth")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in events] == ["log lines were lost", "third", "fourth"]
    assert events[0]["lines"] == 2


def test_a_closed_stream_stops_nobody() -> None:
    stream = io.StringIO()
    configure("info", stream)
    stream.close()
    structlog.get_logger().error("nobody reads this")


def test_the_form_can_be_chosen() -> None:
    stream = io.StringIO()
    configure("info", stream, form="console")
    structlog.get_logger().info("for people")
    assert "for people" in stream.getvalue()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(stream.getvalue())


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_a_stranger_chose_gives_the_terminal_no_commands(form: str) -> None:
    stream = io.StringIO()
    configure("info", stream, form=form)
    chosen = "a\x1b[2J\x1b]0;title\x07\rb\x9b2Jc\u202ed\x7f\nwrong password address=10.0.0.1"
    log = structlog.get_logger()
    log.warning("wrong password", user=chosen)
    log.error("failed", exc_info=ValueError(chosen))
    # structlog itself writes colours, which end in m.
    assert not set("\x07\r\x7f\x9b\u202e") & set(stream.getvalue())
    assert "\x1b[2J" not in stream.getvalue()
    assert "\x1b]" not in stream.getvalue()
    assert "\nwrong password" not in stream.getvalue().partition("ValueError")[0]
