"""`vdi-gateway completion`: the script that makes a shell complete commands and their options."""

import sys
from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print the completion script of a shell, as in: vdi-gateway completion bash >~/.vdi-gateway.bash

    Parameters
    ----------
    shell
        The shell that will read it.
    """
    from gateway.cli.main import PROGRAM, application  # noqa: PLC0415  main knows this command by its name

    sys.stdout.write(application().generate_completion(prog_name=PROGRAM, shell=shell))
    return 0
