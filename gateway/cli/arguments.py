"""Types of arguments that several commands have, for cyclopts; each command says what they mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

Flag = Annotated[bool, Parameter(negative=())]
Texts = Annotated[list[str] | None, Parameter(negative=())]

# The shells complete file names where a Path stands. The commands get what was typed, as str: a Path would
# have lost "./".
if TYPE_CHECKING:
    FileName = str
else:
    FileName = Annotated[Path, Parameter(converter=lambda _, tokens: tokens[0].value)]
