"""Runs vdi-gateway with the arguments, and dies as by kill -9 at the step whose number stands before them.

Steps are the beginning and the end of each call to the gateway, sync, rename and removal. Exit code 9 at a
step; what the command says when it came to its end before.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from gateway.cli.connection import Connection
from gateway.cli.main import run

CODE = 9


def main() -> int:
    left = int(sys.argv[1])

    def step() -> None:
        nonlocal left
        left -= 1
        if not left:
            os._exit(CODE)

    def surrounded(call: Callable[..., Any]) -> Callable[..., Any]:
        def surrounding(*arguments: Any, **named: Any) -> Any:
            step()
            result = call(*arguments, **named)
            step()
            return result

        return surrounding

    for owner, name in ((Connection, "_answer"), (os, "fsync"), (os, "rename"), (os, "unlink")):
        setattr(owner, name, surrounded(getattr(owner, name)))
    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
