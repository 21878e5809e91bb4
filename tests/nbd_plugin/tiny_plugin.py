"""A plugin for nbdkit that knows no gateway: 1 MiB of the letter x, as slow as the export's name says."""

import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import nbdkit

from nbd_plugin import leash
from nbd_plugin.stopping import stop_at_signals

API_VERSION = 2
SIZE = 1 << 20

parameters: dict[str, str] = {}


def thread_model() -> Any:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    parameters[key] = value


def after_fork() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    stop_at_signals(nbdkit.shutdown)
    leash.follow(int(parameters["leash"]))


def open(readonly: bool) -> float:  # noqa: A001
    return float(nbdkit.export_name() or 0)


def get_size(seconds: float) -> int:
    return SIZE


def pread(seconds: float, buf: memoryview, offset: int, flags: int) -> None:
    if seconds:
        print("reading", file=sys.stderr, flush=True)
        time.sleep(seconds)
    buf[:] = b"x" * len(buf)
