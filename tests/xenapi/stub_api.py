"""An Api that answers one prepared value or error: the codecs need no more."""

from typing import TYPE_CHECKING, Any, cast

from gateway.core.errors import XenAPIError

if TYPE_CHECKING:
    from gateway.xenapi.dispatch import Api, Caller

CALLER = cast("Caller", object())


class StubApi:
    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[str, list[Any]]] = []

    async def call(self, name: str, params: list[Any], caller: "Caller") -> Any:
        assert caller is CALLER
        self.calls.append((name, params))
        if isinstance(self.answer, XenAPIError):
            raise self.answer
        return self.answer


def stub(answer: Any) -> tuple[StubApi, "Api"]:
    api = StubApi(answer)
    return api, cast("Api", api)
