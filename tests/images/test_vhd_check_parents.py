"""What a check says of the parents of an image, and the locators that a repair writes anew."""

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.images.vhd.check import ProblemKind, check_directory, check_vhd, repair_vhd
from gateway.images.vhd.create import create_differencing, create_dynamic
from gateway.images.vhd.format import LOCATORS, ParentLocator, Platform
from tests.images.damaged import BLOCK, SIZE, Damage, Vhd, damage_header, kinds
from tests.images.disks import content


def parent_text(name: str) -> bytes:
    return f".\\{name}".encode("utf-16-le")


def remove_locators(vhd: Vhd) -> None:
    vhd.set_header(locators=(ParentLocator(),) * LOCATORS, parent_name=bytes(512))


def remove_one_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    locators[2] = ParentLocator()
    vhd.set_header(locators=tuple(locators))


def absolute_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    text = "C:\\images\\dynamic.vhd".encode("utf-16-le")
    vhd.put(locators[1].data_offset, text)
    locators[1] = replace(locators[1], data_length=len(text))
    vhd.set_header(locators=tuple(locators))


def other_name_in_locator(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    text = parent_text("somebody.vhd")
    vhd.put(locators[1].data_offset, text.ljust(512, b"\0"))
    locators[1] = replace(locators[1], data_length=len(text))
    vhd.set_header(locators=tuple(locators))


def locator_outside(vhd: Vhd) -> None:
    locators = list(vhd.header().locators)
    locators[1] = replace(locators[1], data_offset=1 << 40)
    vhd.set_header(locators=tuple(locators))


def other_name_in_header(vhd: Vhd) -> None:
    vhd.set_header(parent_name="somebody.vhd".encode("utf-16-be").ljust(512, b"\0"))


def longer_name_than_any_file(vhd: Vhd) -> None:
    vhd.set_header(parent_name=("\u20ac" * 100 + ".vhd").encode("utf-16-be").ljust(512, b"\0"))


def rename_parent(vhd: Vhd) -> None:
    (vhd.path.parent / "dynamic.vhd").rename(vhd.path.parent / "renamed.vhd")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_locators, {ProblemKind.PARENT_UNNAMED}),
        (remove_one_locator, {ProblemKind.LOCATOR_MISSING}),
        (absolute_locator, {ProblemKind.LOCATOR_ABSOLUTE}),
        (other_name_in_locator, {ProblemKind.LOCATOR_WRONG}),
        (locator_outside, {ProblemKind.LOCATOR_OUTSIDE}),
        (other_name_in_header, {ProblemKind.PARENT_NAME_WRONG}),
        (longer_name_than_any_file, {ProblemKind.PARENT_NAME_WRONG}),
        (rename_parent, {ProblemKind.PARENT_MISSING}),
    ],
)
def test_locators_are_written_anew_from_the_known_parent(
    child: Vhd, damage: Damage, expected: set[ProblemKind]
) -> None:
    before = content(child.path)
    damage(child)
    found = check_vhd(str(child.path))
    assert kinds(found) == expected
    assert found.repairable
    repaired = repair_vhd(str(child.path))
    assert repaired.problems == ()
    assert content(child.path) == before
    header = child.header()
    parent = "renamed.vhd" if damage is rename_parent else "dynamic.vhd"
    texts = {
        loc.platform: child.get(loc.data_offset, loc.data_length) for loc in header.locators if loc.platform
    }
    assert texts == {
        Platform.MACX: f"file://./{parent}".encode(),
        Platform.W2KU: parent_text(parent),
        Platform.W2RU: parent_text(parent),
    }


def remove_parent(vhd: Vhd) -> None:
    (vhd.path.parent / "dynamic.vhd").unlink()


def replace_parent(vhd: Vhd) -> None:
    remove_parent(vhd)
    create_dynamic(str(vhd.path.parent / "dynamic.vhd"), SIZE)


def damage_parent(vhd: Vhd) -> None:
    damage_header(Vhd(vhd.path.parent / "dynamic.vhd"))


def test_an_image_whose_names_no_file_can_have_is_checked_like_others(child: Vhd) -> None:
    remove_locators(child)
    remove_parent(child)
    longer_name_than_any_file(child)
    assert kinds(check_vhd(str(child.path))) == {ProblemKind.PARENT_UNNAMED}
    assert kinds(check_directory(str(child.path.parent))[1]) == {ProblemKind.PARENT_UNNAMED}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_parent, ProblemKind.PARENT_MISSING),
        (replace_parent, ProblemKind.PARENT_ID_WRONG),
        (damage_parent, ProblemKind.PARENT_UNREADABLE),
    ],
)
def test_a_lost_parent_is_told(child: Vhd, damage: Damage, expected: ProblemKind) -> None:
    damage(child)
    report = check_vhd(str(child.path))
    assert kinds(report) == {expected}
    assert "dynamic.vhd" in str(report.problems[0])
    assert not report.repairable


def test_a_larger_parent_is_a_warning(tmp_path: Path, dynamic: Vhd) -> None:
    path = tmp_path / "small.vhd"
    create_differencing(str(path), str(dynamic.path), dynamic.image(), virtual_size=BLOCK)
    report = check_vhd(str(path))
    assert (kinds(report), report.errors) == ({ProblemKind.PARENT_LARGER}, ())


def test_a_lost_grandparent_is_told(tmp_path: Path, dynamic: Vhd, child: Vhd) -> None:
    grandchild = tmp_path / "grandchild.vhd"
    create_differencing(str(grandchild), str(child.path), child.image())
    dynamic.path.unlink()
    (problem,) = check_vhd(str(grandchild)).problems
    assert problem.kind is ProblemKind.PARENT_MISSING
    assert "its ancestor child.vhd" in problem.detail


def test_a_loop_of_parents_is_told(tmp_path: Path) -> None:
    ids = [uuid.uuid4(), uuid.uuid4()]
    first, second = Vhd(tmp_path / "first.vhd"), Vhd(tmp_path / "second.vhd")
    create_dynamic(str(second.path), SIZE, unique_id=ids[1])
    create_differencing(str(first.path), str(second.path), second.image(), unique_id=ids[0])
    second.path.unlink()
    create_differencing(str(second.path), str(first.path), first.image(), unique_id=ids[1])
    assert ProblemKind.PARENT_LOOP in kinds(check_vhd(str(first.path)))
    assert len(check_directory(str(tmp_path))) == 3
