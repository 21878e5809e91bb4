"""What vdi-deploy says of the disks that are there when its clones can't all be made."""

from typing import TYPE_CHECKING, Any, cast

import pytest

from gateway.cli.deploy import _clones, _Disk
from gateway.cli.output import CommandError

if TYPE_CHECKING:
    from gateway.cli.connection import Connection


class Gateway:
    """Makes clones until the `ends`-th call of `method`, at which `end` happens."""

    def __init__(self, method: str, ends: int, end: BaseException) -> None:
        self._method, self._left, self._end = method, ends, end
        self.made: list[str] = []

    def call(self, method: str, *arguments: Any) -> Any:
        if method == self._method:
            self._left -= 1
            if not self._left:
                raise self._end
        if method == "VDI.get_all_records":
            return {}
        if method == "VDI.clone":
            self.made.append(f"uuid-{len(self.made)}")
            return self.made[-1]
        return {"uuid": arguments[0], "name_label": "", "physical_utilisation": "0"}


@pytest.mark.parametrize("end", [CommandError("the gateway has gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["VDI.clone", "VDI.set_name_label"])
def test_all_that_stay_are_told(capsys: pytest.CaptureFixture[str], method: str, end: BaseException) -> None:
    gateway = Gateway(method, 3, end)
    with pytest.raises(type(end)) as ended:
        _clones(cast("Connection", gateway), _Disk("ref", "gold", "debian", 0), 5, None)
    told = str(ended.value) + capsys.readouterr().err
    assert len(gateway.made) == (2 if method == "VDI.clone" else 3)
    assert f"{len(gateway.made)} of 5 clones were made" in told
    assert told.rstrip().endswith(", ".join(["gold", *gateway.made]))
