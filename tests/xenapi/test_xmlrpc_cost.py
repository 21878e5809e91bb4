"""What reading and writing XML-RPC costs, whatever is in it."""

import gc
import resource
import subprocess
import sys

from gateway.xenapi.xmlrpc import parse_call

DOUBLE_IN_SPACE = """
from gateway.xenapi.xmlrpc import MalformedRequestError, parse_call
number = "1" * 400 + " " * 4_000_000
for text, refused in ((number, False), (number + "x", True)):
    value = f"<value><double>{text}</double></value>"
    body = f"<methodCall><methodName>m</methodName><params><param>{value}</param></params></methodCall>"
    try:
        parse_call(body.encode())
    except MalformedRequestError:
        assert refused
    else:
        assert not refused
"""


def test_a_double_in_megabytes_of_space_is_read_in_the_time_of_any_other_body() -> None:
    # The thread that reads it keeps the interpreter to itself. One look for each way to divide the digits
    # would take half a minute, and the kernel ends that after eight seconds of a processor.
    subprocess.run(
        [sys.executable, "-c", DOUBLE_IN_SPACE],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (8, 8)),
    )


def test_a_call_is_not_kept_until_the_collector_comes() -> None:
    gc.collect()
    gc.disable()
    try:
        parse_call(b"<methodCall><methodName>m</methodName><params/></methodCall>")
        assert gc.collect() == 0
    finally:
        gc.enable()
