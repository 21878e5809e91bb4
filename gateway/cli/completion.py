"""`vdi-gateway completion`: the script that makes a shell complete commands, their options and file names.

cyclopts writes it from the commands' parameters. The trap: zsh calls a file of its fpath by the name of the
file, so the function must have that name, and must run already the first time, when the file is loaded.
"""

import re
import sys
from typing import Literal

_BASH_FILES = 'COMPREPLY=( $(compgen -f -- "${cur}") )'
# An argument of which nothing is known. zsh only shows a message where it is due, and completes no options.
_ZSH_NO_ACTION = re.compile(r"^( +'(?:\d+|\*):(?:[^:\\\n]|\\.)*)'(?= \\$|$)", re.MULTILINE)
_ZSH_END = """
if [[ $funcstack[1] == _{name} ]]; then
  _{name} "$@"
else
  compdef _{name} {name}
fi
"""


def completion(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print the completion script of a shell, as in: vdi-gateway completion bash >~/.vdi-gateway.bash

    Parameters
    ----------
    shell
        The shell that will read it.
    """
    from gateway.cli.main import PROGRAM, application  # noqa: PLC0415  main knows this command by its name

    script = application().generate_completion(prog_name=PROGRAM, shell=shell)
    if shell == "bash":
        # bash's own completion of file names knows blanks and enters directories; compgen's list doesn't.
        script = script.replace(_BASH_FILES, "compopt -o default; COMPREPLY=()")
    if shell == "zsh":
        script = _ZSH_NO_ACTION.sub(r"\1:{true}'", script).replace(f"_cyclopts_{PROGRAM}", f"_{PROGRAM}")
        script += _ZSH_END.format(name=PROGRAM)
    sys.stdout.write(script)
    return 0
