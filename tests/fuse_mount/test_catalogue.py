import json
from dataclasses import replace

from fuse_mount.catalogue import Catalogue, Changes, Sr, Touched, Vdi

SR = Sr("sr", "uuid-of-sr", "disks")
OTHER = Sr("other", "uuid-of-other", "others")
DISK = Vdi("disk", "uuid-of-disk", "disk", "sr", 1 << 20, 4096)
SNAPSHOT = Vdi("snapshot", "uuid-of-snapshot", "disk", "sr", 1 << 20, 4096, snapshot_of="disk")
NESTED = Vdi("nested", "uuid-of-nested", "disk", "sr", 1 << 20, 4096, snapshot_of="snapshot")
ATTACHED = frozenset({"sr"})


def everything(*vdis: Vdi, attached: frozenset[str] = ATTACHED) -> Changes:
    return Changes({vdi.ref: vdi for vdi in vdis}, {"sr": SR, "other": OTHER}, attached, whole=True)


def change(*vdis: Vdi, attached: frozenset[str] = ATTACHED, **gone: None) -> Changes:
    return Changes({**{vdi.ref: vdi for vdi in vdis}, **gone}, {}, attached)


def filled(*vdis: Vdi, only: tuple[str, ...] | None = None) -> Catalogue:
    catalogue = Catalogue(only)
    catalogue.apply(everything(*vdis))
    return catalogue


def homes(catalogue: Catalogue) -> dict[str, str | None]:
    return {ref: catalogue.home_of(ref) for ref in catalogue.vdis}


def test_a_disk_stands_in_its_sr_and_a_snapshot_with_its_disk() -> None:
    assert homes(filled(DISK, SNAPSHOT, NESTED)) == {"disk": "sr", "snapshot": "disk", "nested": "snapshot"}


def test_what_is_hidden_or_missing_or_in_an_sr_that_is_not_attached_here_is_not_shown() -> None:
    catalogue = filled(
        replace(DISK, managed=False),
        replace(SNAPSHOT, missing=True),
        replace(NESTED, sr="other"),
    )
    assert homes(catalogue) == {"disk": None, "snapshot": None, "nested": None}
    assert catalogue.shows_sr("sr")
    assert not catalogue.shows_sr("other")


def test_a_snapshot_whose_disk_has_gone_stands_in_the_sr() -> None:
    catalogue = filled(DISK, SNAPSHOT, NESTED)
    touched = catalogue.apply(change(disk=None))
    assert touched.vdis == {"disk", "snapshot", "nested"}
    assert homes(catalogue) == {"snapshot": "sr", "nested": "snapshot"}


def test_a_snapshot_in_another_sr_than_its_disk_stands_in_its_own() -> None:
    catalogue = Catalogue()
    catalogue.apply(everything(DISK, replace(SNAPSHOT, sr="other"), attached=frozenset({"sr", "other"})))
    assert homes(catalogue) == {"disk": "sr", "snapshot": "other"}


def test_records_that_go_round_in_a_circle_stand_in_the_sr() -> None:
    catalogue = filled(
        replace(DISK, snapshot_of="nested"), SNAPSHOT, NESTED, replace(DISK, ref="own", snapshot_of="own")
    )
    assert homes(catalogue) == {"disk": "sr", "snapshot": "sr", "nested": "sr", "own": "sr"}


def test_an_sr_that_is_detached_takes_its_disks_along() -> None:
    catalogue = filled(DISK)
    touched = catalogue.apply(change(attached=frozenset()))
    assert touched == Touched(frozenset({"sr"}), frozenset({"disk"}))
    assert homes(catalogue) == {"disk": None}


def test_a_record_that_comes_again_as_it_was_touches_nothing() -> None:
    catalogue = filled(DISK, SNAPSHOT)
    for again in (change(DISK, replace(SNAPSHOT)), everything(DISK, SNAPSHOT)):
        touched = catalogue.apply(again)
        assert touched == Touched(frozenset(), frozenset())


def test_what_a_whole_list_does_not_name_has_gone() -> None:
    catalogue = filled(DISK, SNAPSHOT)
    assert catalogue.apply(everything(SNAPSHOT)).vdis == {"disk", "snapshot"}
    assert homes(catalogue) == {"snapshot": "sr"}


def test_a_disk_that_goes_before_it_was_known_is_no_matter() -> None:
    catalogue = filled(DISK)
    assert catalogue.apply(change(unknown=None)).vdis == frozenset()


def test_only_the_chosen_disks_and_their_snapshots_are_shown() -> None:
    other = replace(DISK, ref="more", uuid="uuid-of-more")
    assert homes(filled(DISK, SNAPSHOT, NESTED, other, only=("uuid-of-disk",))) == {
        "disk": "sr",
        "snapshot": "disk",
        "nested": "snapshot",
        "more": None,
    }
    assert homes(filled(DISK, SNAPSHOT, only=("uuid-of-snapshot",))) == {"disk": None, "snapshot": "sr"}


def test_the_document_is_the_record_with_its_reference_in_order() -> None:
    vdi = replace(DISK, record=json.dumps({"uuid": "u", "name_label": "Überrest", "n": 1}).encode())
    assert vdi.document().decode() == (
        '{\n  "n": 1,\n  "name_label": "Überrest",\n  "ref": "disk",\n  "uuid": "u"\n}\n'
    )
