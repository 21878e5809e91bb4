import stat
import xmlrpc.client
from typing import Any

import pytest

from tests.conftest import RunningGateway


def log_in(gateway: RunningGateway, password: str) -> Any:
    with xmlrpc.client.ServerProxy(gateway.url) as proxy:
        answer: Any = proxy.session.login_with_password("root", password)
    return answer["Value"] if answer["Status"] == "Success" else answer["ErrorDescription"][0]


def test_a_password_changed_through_the_api_is_in_the_file_and_outlives_a_restart(
    gateway: RunningGateway,
) -> None:
    old = gateway.password
    gateway.call("session.change_password", old, "another öne")
    file = gateway.state_dir / "admin-password"
    assert file.read_text(encoding="utf-8") == "another öne\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert log_in(gateway, old) == "SESSION_AUTHENTICATION_FAILED"
    gateway.restart()
    assert log_in(gateway, old) == "SESSION_AUTHENTICATION_FAILED"
    assert log_in(gateway, "another öne").startswith("OpaqueRef:")
    assert "another" not in gateway.log()


def test_a_missing_file_makes_a_new_password(gateway: RunningGateway) -> None:
    old = gateway.password
    gateway.stop()
    (gateway.state_dir / "admin-password").unlink()
    gateway.start()
    assert gateway.password != old
    assert log_in(gateway, old) == "SESSION_AUTHENTICATION_FAILED"
    assert log_in(gateway, gateway.password).startswith("OpaqueRef:")


@pytest.mark.parametrize("password", ["two\nlines", "two\u2028lines", "ends\n"])
def test_a_password_that_the_file_cannot_hold_is_refused_and_changes_nothing(
    gateway: RunningGateway, password: str
) -> None:
    old = gateway.password
    with pytest.raises(AssertionError, match="VALUE_NOT_SUPPORTED"):
        gateway.call("session.change_password", old, password)
    assert gateway.password == old
    assert log_in(gateway, old).startswith("OpaqueRef:")


def test_without_the_file_written_the_password_stays(gateway: RunningGateway) -> None:
    old = gateway.password
    # What the new file is called before it takes the old one's place.
    (gateway.state_dir / "admin-password.new").mkdir()
    with pytest.raises(AssertionError, match="admin-password can't be written"):
        gateway.call("session.change_password", old, "another one")
    assert gateway.password == old
    assert log_in(gateway, old).startswith("OpaqueRef:")
