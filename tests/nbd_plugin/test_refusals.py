import time
import xmlrpc.client
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import result_of
from tests.nbd_plugin.conftest import Nbd
from tests.system.site import MIB, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable


def refused(nbd: Nbd, libnbd: Any, uri: str) -> None:
    """The client is told in time that there is no such export, which is all that NBD can say."""
    handle = libnbd.NBD()
    start = time.monotonic()
    with pytest.raises(libnbd.Error) as error:
        handle.connect_uri(uri)
    assert error.value.errno == "ENOENT"
    assert time.monotonic() - start < 10


def gateway_says(nbd: Nbd, *words: str) -> None:
    wait_until(
        lambda: any(all(word in line for word in words) for line in nbd.site.gateway.log().splitlines()),
        f"the gateway's log to say {words}",
    )


def test_a_second_writer_is_refused_and_the_log_says_why(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    first = nbd.connect(libnbd, vdi, write=True)
    refused(nbd, libnbd, nbd.uri(vdi, write=True))
    gateway_says(nbd, "refused", vdi.uuid, "VDI_IN_USE", '"purpose": "nbd"')
    first.pwrite(b"1" * 512, 0)
    first.shutdown()
    nbd.connect(libnbd, vdi, write=True).shutdown()


def test_a_writer_among_readers_and_a_reader_beside_a_writer_are_refused(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    readers = [nbd.connect(libnbd, vdi) for _ in range(3)]
    refused(nbd, libnbd, nbd.uri(vdi, write=True))
    for reader in readers:
        assert reader.pread(512, 0) == bytes(512)
        reader.shutdown()
    writer = nbd.connect(libnbd, vdi, write=True)
    refused(nbd, libnbd, nbd.uri(vdi))
    writer.shutdown()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "00000000-0000-4000-8000-000000000000",
        "../../etc/passwd",
        "?mode=rw",
        "a" * 4096,
        "{uuid}?mode=RW",
        "{uuid}?session_id=OpaqueRef:00000000-0000-4000-8000-000000000000",
    ],
)
def test_what_names_no_vdi_or_no_session_is_refused(nbd: Nbd, libnbd: Any, name: str) -> None:
    handle = libnbd.NBD()
    handle.set_export_name(name.format(uuid=nbd.site.create_vdi().uuid))
    with pytest.raises(libnbd.Error):
        handle.connect_unix(str(nbd.socket))
    assert nbd.process.poll() is None


def test_a_public_socket_needs_a_session_and_lists_nothing(
    nbd: Nbd, libnbd: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    vdi = nbd.site.create_vdi()
    directory = tmp_path_factory.mktemp("public")
    public = Nbd(nbd.site, directory, private=False)
    try:
        refused(public, libnbd, public.uri(vdi))
        session = nbd.site.gateway.session
        reader = public.connect(libnbd, vdi, session=session)
        assert reader.pread(512, 0) == bytes(512)
        reader.shutdown()
        writer = public.connect(libnbd, vdi, write=True, session=session)
        writer.pwrite(b"1" * 512, 0)
        writer.shutdown()
        assert listed(libnbd, public) == {}
        assert session not in public.log()
    finally:
        assert public.stop() == 0


def test_a_private_socket_lists_every_vdi_with_its_name(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi()
    assert listed(libnbd, nbd)[vdi.uuid] == "system test"


def listed(libnbd: Any, nbd: Nbd) -> dict[str, str]:
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(nbd.socket))
    found = {}
    handle.opt_list(lambda name, description: found.update({name: description}) or 0)
    handle.opt_abort()
    return found


def test_logging_out_ends_requests_with_a_shutdown_error(nbd: Nbd, libnbd: Any) -> None:
    vdi = nbd.site.create_vdi(8 * MIB)
    writer = nbd.connect(libnbd, vdi, write=True)
    writer.pwrite(b"d" * 65536, 0)
    writer.shutdown()
    gateway = nbd.site.gateway
    with xmlrpc.client.ServerProxy(gateway.url) as proxy:
        session = result_of(proxy.session.login_with_password("root", gateway.password))
    reader = nbd.connect(libnbd, vdi, session=session)
    assert reader.pread(3, 0) == b"ddd"
    with xmlrpc.client.ServerProxy(gateway.url) as proxy:
        result_of(proxy.session.logout(session))

    def ended() -> bool:
        try:
            reader.pread(512, 0)
        except libnbd.Error as error:
            assert error.errno == "ESHUTDOWN"
            return True
        return False

    wait_until(ended, "the lease to end")
    requests: list[Callable[[], Any]] = [
        lambda: reader.pread(512, 4 * MIB),  # where no file has anything
        lambda: reader.block_status(MIB, 0, lambda *_: 0),
        lambda: reader.cache(MIB, 0),
    ]
    for request in requests:
        with pytest.raises(libnbd.Error) as error:
            request()
        assert error.value.errno == "ESHUTDOWN"
    reader.shutdown()
    nbd.connect(libnbd, vdi, write=True).shutdown()
