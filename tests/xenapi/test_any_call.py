import json
import xmlrpc.client
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import XenAPIError
from gateway.core.refs import NULL_REF
from gateway.core.roles import Role
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.dispatch import Caller
from gateway.xenapi.jsonrpc import read_jsonrpc
from gateway.xenapi.xmlrpc import read_xmlrpc

from .estate_for_tests import ADMIN, CALLER, open_site

NAMES = sorted(
    f"{model.name}.{name}"
    for model in CLASSES
    for name in model.all_messages
    if not name.startswith(("login_", "logout"))
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["host", "pool", NULL_REF, "success", "folder", "file"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["SR", "host", "virtual_size", "device_config", "location", "other_config"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


async def gone() -> None:
    """The client does not wait for anything to happen."""


IMPATIENT = Caller("192.0.2.1", "https", gone)
CALLS = st.tuples(
    st.sampled_from(NAMES) | st.text(max_size=20),
    st.sampled_from([role.wire_name for role in Role]) | VALUES,
    st.lists(VALUES, max_size=9),
)


@settings(max_examples=25)
@given(calls=st.lists(CALLS, min_size=10, max_size=40))
def test_any_call_gets_a_result_that_both_codecs_carry_or_an_error_of_xenapi(
    calls: list[tuple[str, Any, list[Any]]],
) -> None:
    async def run(path: Path) -> None:
        async with open_site(path) as site:
            known = {"host": site.estate.records.this_host.ref, "pool": site.estate.records.pool.ref}
            for name, session, params in calls:
                there = [known.get(item, item) if isinstance(item, str) else item for item in params]
                try:
                    await site.api.call(name, [session, *there], IMPATIENT)
                except XenAPIError as error:
                    assert error.code != "INTERNAL_ERROR", error
            for model in CLASSES:
                if not model.enumerable:
                    continue
                method = f"{model.name}.get_all_records"
                body = xmlrpc.client.dumps((ADMIN,), method).encode()
                (xml,), _ = xmlrpc.client.loads(await read_xmlrpc(body)(site.api, CALLER))
                body = json.dumps({"method": method, "params": [ADMIN], "id": 1}).encode()
                plain = json.loads(await read_jsonrpc(body)(site.api, CALLER))["result"]
                assert isinstance(xml, dict)
                assert set(xml["Value"]) == set(plain)

    with TemporaryDirectory() as directory:
        trio.run(run, Path(directory))
