import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import MESSAGES, XenAPIError, as_xenapi_error
from gateway.images.errors import CorruptImage


@pytest.mark.parametrize("code", MESSAGES)
def test_every_message_is_one_sentence_whatever_parameters_are_missing(code: str) -> None:
    message = XenAPIError(code).message
    assert message.endswith(".")
    assert "\n" not in message
    assert ";" in message or ":" in message, "it says what is wrong and then what to do"


@given(code=st.sampled_from([*MESSAGES, "SOMETHING_NEW"]), params=st.lists(st.text(), max_size=5))
def test_no_parameter_breaks_a_message(code: str, params: list[str]) -> None:
    error = XenAPIError(code, *params)
    assert "\n" not in error.message
    assert str(error) == f"{code}: {error.message}"
    assert error.error_info == [code, *params]


def test_parameters_fill_the_message() -> None:
    message = XenAPIError("VDI_TOO_SMALL", "OpaqueRef:x", "2097152").message
    assert re.search(r"more data than the VDI OpaqueRef:x of 2097152 bytes holds", message)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (("task", "OpaqueRef:t"), "using the task OpaqueRef:t; wait"),
        (("VDI", "OpaqueRef:v", "7 seconds"), "using the VDI OpaqueRef:v (7 seconds); wait"),
        ((), "using the unknown unknown; wait"),
    ],
)
def test_a_detail_is_told_if_there_is_one(params: tuple[str, ...], text: str) -> None:
    assert text in XenAPIError("OTHER_OPERATION_IN_PROGRESS", *params).message


def test_a_user_is_named_if_one_was_given() -> None:
    nobody = XenAPIError("SESSION_AUTHENTICATION_FAILED", "", "there are no credentials")
    assert nobody.message.startswith("The credentials could not be verified (there are no credentials)")
    somebody = XenAPIError("SESSION_AUTHENTICATION_FAILED", "eve", "wrong")
    assert somebody.message.startswith("The credentials of user 'eve' could not be verified (wrong)")


def test_the_reference_of_a_session_is_in_the_answer_but_not_in_the_text() -> None:
    error = XenAPIError("SESSION_INVALID", "OpaqueRef:secret")
    assert error.error_info == ["SESSION_INVALID", "OpaqueRef:secret"]
    assert "secret" not in str(error) + repr(error) + error.message


def test_what_a_client_has_sent_is_not_sent_back_by_the_megabyte() -> None:
    error = XenAPIError("HANDLE_INVALID", "VDI", "x" * 1_000_000)
    assert len(error.params[1]) == 5001
    assert len(str(error)) < 6000
    assert "x" * 5002 not in repr(error.args)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (XenAPIError("VDI_MISSING"), "VDI_MISSING"),
        (OSError(errno.ENOSPC, "No space left on device"), "SR_FULL"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "SR_FULL"),
        (OSError(errno.EIO, "Input/output error"), "VDI_IO_ERROR"),
        (CorruptImage("/sr/a.vhd", "the footer's checksum is wrong"), "VDI_IO_ERROR"),
        (ZeroDivisionError("division by zero"), "INTERNAL_ERROR"),
        (ExceptionGroup("", [KeyError(1), ExceptionGroup("", [OSError(errno.EIO, "x")])]), "VDI_IO_ERROR"),
        (ExceptionGroup("", [OSError(errno.EIO, "x"), XenAPIError("TASK_CANCELLED")]), "TASK_CANCELLED"),
        (KeyboardInterrupt(), "TASK_INTERRUPTED"),
        (BaseExceptionGroup("", [KeyboardInterrupt(), OSError(errno.EIO, "x")]), "VDI_IO_ERROR"),
    ],
)
def test_every_exception_has_a_code(error: BaseException, code: str) -> None:
    assert as_xenapi_error(error).code == code
