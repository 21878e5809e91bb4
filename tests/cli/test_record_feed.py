"""What the mount hears of a gateway, which is a process of its own."""

import json
import os
import threading
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuse_mount.catalogue import Catalogue, Changes
from gateway.cli.door import Door
from gateway.cli.record_feed import FeedRefused, RecordFeed
from tests.cli.conftest import house_in
from tests.conftest import RunningGateway
from tests.system.site import unplugged, wait_until


@contextmanager
def feed_of(gateway: RunningGateway, user: str = "root", password: str = "") -> Iterator[RecordFeed]:
    feed = RecordFeed(Door("the socket", path=str(gateway.state_dir / "xapi.sock")), user, password)
    try:
        yield feed
    finally:
        feed.close()


def made(gateway: RunningGateway, name: str = "disk") -> tuple[str, str]:
    """Reference and uuid of a new disk."""
    uuid = gateway.command("vdi-create", name, "2MiB").stdout.strip()
    return gateway.call("VDI.get_by_uuid", uuid), uuid


class Listener:
    """A catalogue that is kept as the feed says, until it knows something."""

    def __init__(self, feed: RecordFeed) -> None:
        self.catalogue = Catalogue()
        self.feed = feed
        self.first = self.next()

    def next(self) -> Changes:
        changes = self.feed.wait()
        self.catalogue.apply(changes)
        return changes

    def wait_for(self, ref: str, label: str | None) -> None:
        while (vdi := self.catalogue.vdis.get(ref)) is None or vdi.label != label:
            if vdi is None and label is None:
                return
            self.next()


def test_at_first_it_tells_all_that_there_is(house: RunningGateway) -> None:
    ref, uuid = made(house)
    with feed_of(house) as feed:
        first = Listener(feed).first
        assert first.whole
        vdi = first.vdis[ref]
        assert vdi is not None
        assert (vdi.uuid, vdi.label, vdi.size, vdi.managed, vdi.missing, vdi.has_data) == (
            uuid,
            "disk",
            2 << 20,
            True,
            False,
            True,
        )
        record = house.call("VDI.get_record", ref)
        assert json.loads(vdi.record)["name_label"] == record["name_label"]
        assert set(json.loads(vdi.record)) == set(record)
        [sr] = [sr for sr in first.srs.values() if sr is not None]
        assert (sr.ref, sr.label, set(first.attached)) == (record["SR"], "disks", {record["SR"]})
    house.call("VDI.destroy", ref)


def test_then_it_tells_what_changes(house: RunningGateway) -> None:
    with feed_of(house) as feed:
        listener = Listener(feed)
        ref, _ = made(house, "first")
        listener.wait_for(ref, "first")
        house.call("VDI.set_name_label", ref, "second")
        listener.wait_for(ref, "second")
        snapshot = house.call("VDI.snapshot", ref, {})
        listener.wait_for(snapshot, "second")
        assert listener.catalogue.home_of(snapshot) == ref
        house.call("VDI.destroy", ref)
        listener.wait_for(ref, None)
        house.call("VDI.destroy", snapshot)
        listener.wait_for(snapshot, None)


def test_an_sr_that_is_unplugged_is_not_attached(house: RunningGateway) -> None:
    with feed_of(house) as feed:
        listener = Listener(feed)
        [pbd] = house.call("PBD.get_all")
        wait_until(lambda: unplugged(house, pbd), "nobody to use the SR")
        while listener.next().attached:
            pass
        house.call("PBD.plug", pbd)
        while not listener.next().attached:
            pass


def test_what_went_while_the_gateway_was_away_is_told(tmp_path: Path) -> None:
    with house_in(tmp_path) as gateway:
        ref, uuid = made(gateway)
        kept, _ = made(gateway, "kept")
        with feed_of(gateway) as feed:
            listener = Listener(feed)
            gateway.stop()
            with pytest.raises(ConnectionError):
                while True:
                    feed.wait()
            gateway.start()
            gateway.call("VDI.destroy", ref)
            listener.wait_for(ref, None)
            assert set(listener.catalogue.vdis) == {kept}
            assert uuid not in os.listdir(tmp_path / "disks")
            more, _ = made(gateway, "more")
            listener.wait_for(more, "more")


def test_a_session_that_was_ended_is_begun_anew(house: RunningGateway) -> None:
    with feed_of(house) as feed:
        listener = Listener(feed)
        before = feed.session
        assert before is not None
        with xmlrpc.client.ServerProxy(house.url) as proxy:
            proxy.session.logout(before)
        ref, _ = made(house)
        listener.wait_for(ref, "disk")
        assert feed.session not in (None, before)
        house.call("VDI.destroy", ref)


def test_its_session_ends_with_it(house: RunningGateway) -> None:
    def programs() -> list[str]:
        return [session["originator"] for session in house.call("session.get_all_records").values()]

    with feed_of(house) as feed:
        feed.wait()
        assert programs().count("vdi-gateway mount") == 1
    assert "vdi-gateway mount" not in programs()


def test_whoever_waits_is_woken_when_it_is_closed(house: RunningGateway) -> None:
    with feed_of(house) as feed:
        feed.wait()
        broken: list[OSError] = []

        def wait() -> None:
            try:
                while True:
                    feed.wait()
            except OSError as error:
                broken.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        feed.close()
        waiting.join(20)
        assert [type(error) for error in broken] == [ConnectionError]


def test_a_wrong_password_is_told_in_words(house: RunningGateway) -> None:
    with pytest.raises(FeedRefused, match="SESSION_AUTHENTICATION_FAILED") as refused:
        with feed_of(house, password="wrong"):
            pass
    assert refused.value.code == "SESSION_AUTHENTICATION_FAILED"


def test_a_gateway_that_is_not_there_is_no_connection(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="No such file"):
        RecordFeed(Door("the socket", path=str(tmp_path / "xapi.sock")), "root", "")
