from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_mount.catalogue import Catalogue, Changes, Sr, Vdi
from fuse_mount.tree import DIRECTORIES, ROOT_INODE, Place, Tree, VdiNode

SR = Sr("sr", "5500dddd-0000-4000-8000-000000000000", "disks")
OTHER = Sr("other", "66001111-0000-4000-8000-000000000000", "others")
DISK = Vdi("disk", "aaaaaaaa-0000-4000-8000-000000000000", "web", "sr", 1 << 20, 4096)
SECOND = Vdi("second", "bbbbbbbb-0000-4000-8000-000000000000", "db", "sr", 1 << 20, 4096)
SNAPSHOT = Vdi("snapshot", "cccccccc-0000-4000-8000-000000000000", "web", "sr", 1 << 20, 4096, "disk")
BOTH = frozenset({"sr", "other"})


def everything(*vdis: Vdi, srs: tuple[Sr, ...] = (SR, OTHER), attached: frozenset[str] = BOTH) -> Changes:
    return Changes({vdi.ref: vdi for vdi in vdis}, {sr.ref: sr for sr in srs}, attached, whole=True)


def planted(*vdis: Vdi) -> Tree:
    tree = Tree(Catalogue())
    tree.apply(everything(*vdis))
    return tree


def inode_at(tree: Tree, path: str) -> int:
    inode = ROOT_INODE
    for name in path.split("/"):
        inode = tree.child(inode, name.encode())
    return inode


def walk(tree: Tree, inode: int = ROOT_INODE, above: str = "") -> Iterator[tuple[str, int]]:
    for name, entry in tree.entries(inode):
        path = above + name.decode()
        yield path, entry
        if tree.find(entry).place in DIRECTORIES - {Place.PARTITIONS}:
            yield from walk(tree, entry, path + "/")


def paths(tree: Tree) -> list[str]:
    return sorted(path for path, _ in walk(tree) if not path.startswith("by-uuid/"))


FILES = ("", "/disk.qcow2", "/disk.raw", "/disk.vhd", "/partitions", "/record.json")


def test_a_disk_is_a_directory_of_files_and_its_snapshots_stand_in_it() -> None:
    assert paths(planted(DISK, SNAPSHOT)) == sorted(
        [
            "by-uuid",
            "disks",
            "others",
            *(f"disks/web{name}" for name in FILES),
            "disks/web/snapshots",
            *(f"disks/web/snapshots/web{name}" for name in FILES),
        ]
    )


def test_a_snapshot_without_data_has_a_record_alone() -> None:
    tree = planted(DISK, replace(SNAPSHOT, has_data=False))
    inode = inode_at(tree, "disks/web/snapshots/web")
    assert tree.entries(inode) == [(b"record.json", inode_at(tree, "disks/web/snapshots/web/record.json"))]
    with pytest.raises(KeyError):
        tree.child(inode, b"disk.raw")


def test_the_link_of_each_uuid_leads_to_its_directory() -> None:
    tree = planted(DISK, SNAPSHOT)
    targets = {}
    for name, inode in tree.entries(inode_at(tree, "by-uuid")):
        node = tree.find(inode).node
        assert isinstance(node, VdiNode)
        targets[name.decode()] = tree.target(node)
    assert targets == {DISK.uuid: b"../disks/web", SNAPSHOT.uuid: b"../disks/web/snapshots/web"}


def test_an_sr_that_is_called_by_uuid_gets_out_of_the_way() -> None:
    tree = Tree(Catalogue())
    tree.apply(everything(srs=(replace(SR, label="by-uuid"),)))
    assert [name for name, _ in tree.entries(ROOT_INODE)] == [b"by-uuid", b"by-uuid~5500dddd"]


def test_a_disk_that_is_renamed_keeps_its_inodes_and_its_snapshots() -> None:
    tree = planted(DISK, SNAPSHOT)
    before = {inode for path, inode in walk(tree) if path.startswith("disks/")}
    tree.apply(Changes({"disk": replace(DISK, label="shop")}, {}, BOTH))
    assert {inode for path, inode in walk(tree) if path.startswith("disks/")} == before
    assert "disks/shop/snapshots/web/disk.raw" in paths(tree)


def test_a_disk_that_takes_over_a_name_gets_it() -> None:
    tree = planted(DISK, SECOND)
    tree.apply(Changes({"disk": replace(DISK, label="db"), "second": replace(SECOND, label="web")}, {}, BOTH))
    assert tree.find(inode_at(tree, "disks/db")).node is not tree.find(inode_at(tree, "disks/web")).node
    tree.apply(Changes({"disk": None, "second": replace(SECOND, label="db")}, {}, BOTH))
    assert [name for name, _ in tree.entries(inode_at(tree, "disks"))] == [b"db"]


def test_an_sr_that_is_renamed_keeps_its_disks() -> None:
    tree = planted(DISK)
    inode = inode_at(tree, "disks/web/disk.raw")
    tree.apply(Changes({}, {"sr": replace(SR, label="vault")}, BOTH))
    assert inode_at(tree, "vault/web/disk.raw") == inode


def test_the_snapshot_of_a_disk_that_goes_moves_to_the_sr_and_keeps_its_inode() -> None:
    tree = planted(DISK, SNAPSHOT)
    inode = inode_at(tree, "disks/web/snapshots/web")
    assert tree.apply(Changes({"disk": None}, {}, BOTH)) == {DISK.uuid: True, SNAPSHOT.uuid: False}
    assert inode_at(tree, "disks/web") == inode


def test_an_sr_that_comes_back_shows_its_disks_again() -> None:
    tree = planted(DISK, SNAPSHOT)
    shown = paths(tree)
    tree.apply(Changes({}, {}, frozenset({"other"})))
    assert paths(tree) == ["by-uuid", "others"]
    assert tree.entries(Place.BY_UUID) == []
    tree.apply(Changes({}, {}, BOTH))
    assert paths(tree) == shown


def test_what_the_kernel_knows_of_a_disk_that_has_gone_stays_until_it_is_forgotten() -> None:
    tree = planted(DISK)
    inode, directory = inode_at(tree, "disks/web/disk.raw"), inode_at(tree, "disks/web")
    for _ in range(1000):
        tree.looked_up(inode)
        tree.looked_up(directory)
    tree.apply(Changes({"disk": None}, {}, BOTH))
    tree.forget(inode, 1000)
    tree.forget(directory, 999)
    node = tree.find(inode).node
    assert isinstance(node, VdiNode)
    assert (node.gone, tree.entries(directory)) == (True, [])
    tree.forget(directory, 1)
    for forgotten in (inode, directory):
        with pytest.raises(KeyError):
            tree.find(forgotten)
    assert tree.lookups == 0


def test_a_disk_that_nobody_has_looked_up_is_forgotten_when_it_goes() -> None:
    tree = planted(DISK)
    inode = inode_at(tree, "disks/web")
    tree.apply(Changes({"disk": None}, {}, BOTH))
    with pytest.raises(KeyError):
        tree.find(inode)


def test_a_disk_that_is_there_is_found_also_when_it_is_forgotten() -> None:
    tree = planted(DISK)
    inode = inode_at(tree, "disks/web/disk.raw")
    tree.looked_up(inode)
    tree.forget(inode, 1)
    assert inode_at(tree, "disks/web/disk.raw") == inode
    assert tree.find(inode).place == Place.RAW


def test_a_disk_that_comes_again_has_other_inodes() -> None:
    tree = planted(DISK)
    inode = inode_at(tree, "disks/web")
    tree.looked_up(inode)
    tree.apply(Changes({"disk": None}, {}, BOTH))
    tree.apply(Changes({"disk": DISK}, {}, BOTH))
    assert inode_at(tree, "disks/web") != inode


def test_all_numbers_of_a_node_are_forgotten_with_it() -> None:
    tree = planted(DISK)
    before = inode_at(tree, "disks/web/disk.raw")
    tree.looked_up(before)
    node = tree.find(before).node
    assert isinstance(node, VdiNode)
    tree.renew(node)
    after = inode_at(tree, "disks/web/disk.raw")
    tree.looked_up(after)
    assert tree.find(before) == tree.find(after)
    tree.apply(Changes({"disk": None}, {}, BOTH))
    tree.forget(after, 1)
    assert tree.find(before).node is tree.find(after).node is node
    tree.forget(before, 1)
    for inode in (before, after):
        with pytest.raises(KeyError):
            tree.find(inode)


def test_the_time_of_a_record_is_when_it_was_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1, 100))
    monkeypatch.setattr("fuse_mount.tree.time.time_ns", lambda: next(times))
    tree = planted(DISK)
    node = tree.find(inode_at(tree, "disks/web")).node
    assert node is not None
    first = node.changed_ns
    tree.apply(Changes({"disk": replace(DISK)}, {}, BOTH))
    assert node.changed_ns == first
    tree.apply(Changes({"disk": replace(DISK, record=b'{"a": 1}')}, {}, BOTH))
    assert node.changed_ns > first
    assert isinstance(node, VdiNode)
    assert node.document == b'{\n  "a": 1,\n  "ref": "disk"\n}\n'
    changed, document = node.changed_ns, node.document
    busy = b'{"a": 1, "current_operations": {"task": "read"}, "allowed_operations": []}'
    tree.apply(Changes({"disk": replace(DISK, record=busy)}, {}, BOTH))
    assert node.changed_ns == changed
    assert node.document == document
    tree.apply(Changes({"disk": replace(DISK, record=busy, stored=DISK.stored + 4096)}, {}, BOTH))
    assert node.changed_ns > changed


@pytest.mark.parametrize(
    ("path", "directories"),
    [("disks", 2), ("disks/web", 2), ("disks/web/snapshots", 1), ("disks/db", 1), ("disks/db/partitions", 0)],
)
def test_directories_know_how_many_are_in_them(path: str, directories: int) -> None:
    assert tree_of_three().directories_in(inode_at(tree_of_three(), path)) == directories


def tree_of_three() -> Tree:
    return planted(DISK, SECOND, SNAPSHOT)


refs = st.sampled_from(["v1", "v2", "v3", "v4", "v5"])
vdis = st.builds(
    lambda ref, label, sr, above, managed: Vdi(
        ref, f"{ref[1:] * 8}-0000-4000-8000-000000000000", label, sr, 1 << 20, 0, above, managed
    ),
    refs,
    st.sampled_from(["web", "db", "a/b", "", "web~11111111"]),
    st.sampled_from(["sr", "other"]),
    st.one_of(st.just(""), refs),
    st.sampled_from([True, True, True, False]),
)
steps = st.one_of(
    st.builds(lambda vdi, attached: Changes({vdi.ref: vdi}, {}, attached), vdis, st.just(BOTH)),
    st.builds(lambda ref: Changes({ref: None}, {}, BOTH), refs),
    st.builds(lambda: Changes({}, {}, frozenset({"other"}))),
    st.builds(
        lambda label: Changes({}, {"sr": replace(SR, label=label)}, BOTH), st.sampled_from(["x", "others"])
    ),
    st.builds(
        lambda several: everything(*several), st.lists(vdis, max_size=5, unique_by=lambda vdi: vdi.ref)
    ),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=12))
def test_after_any_changes_each_shown_disk_stands_once_where_it_belongs(history: list[Changes]) -> None:
    catalogue = Catalogue()
    tree = Tree(catalogue)
    tree.apply(everything())
    for changes in history:
        tree.apply(changes)
        shown = {ref: home for ref in catalogue.vdis if (home := catalogue.home_of(ref)) is not None}
        stands: dict[str, str] = {}
        for path, inode in walk(tree):
            node, place = tree.find(inode)
            assert node is None or not node.gone
            if isinstance(node, VdiNode) and place == Place.DIRECTORY:
                assert node.vdi.ref not in stands
                assert node.path.decode() == path
                assert node.vdi == catalogue.vdis[node.vdi.ref]
                stands[node.vdi.ref] = (
                    node.home.vdi.ref if isinstance(node.home, VdiNode) else node.home.sr.ref
                )
        assert stands == shown
        uuids = {catalogue.vdis[ref].uuid.encode() for ref in shown}
        assert {name for name, _ in tree.entries(Place.BY_UUID)} == uuids
