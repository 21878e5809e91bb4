"""A child that gets another parent: who reads it then, what stays as it was, and crashes at every call."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pyvhdi

from gateway.images.errors import CorruptImage, UnsupportedImage
from gateway.images.vhd.check import check_vhd
from gateway.images.vhd.create import create_dynamic, create_fixed
from gateway.images.vhd.format import FOOTER_SIZE, HEADER_SIZE, LOCATORS, DynamicHeader, ParentLocator
from gateway.images.vhd.image import open_vhd, parent_names
from gateway.images.vhd.relink import restore_header, set_parent
from tests.crash import RecordingFileCalls
from tests.images.disks import content, entries, inspect, libvhdi_reads, make_child, noise, put
from tests.images.merges import merge
from tests.images.watched_calls import Watched

MIB = 1 << 20
SECTOR = 512
LEAF = "3f6d0c1e-8a51-4b7e-9d1b-0c1f5a7e2b01.vhd"
CHILD = "5a1c7b2d-40e3-49f6-8a2c-7d3e9b4f6c02.vhd"
PARENT = "9e8d7c6b-5a49-4837-a625-1403f2e1d003.vhd"


def build(
    root: Path, *, parent: str = PARENT, child: str = CHILD, leaf: str = LEAF
) -> tuple[Path, Path, Path]:
    """leaf -> child -> parent, the child merged into the parent already."""
    below, middle, top = root / parent, root / child, root / leaf
    create_dynamic(str(below), 8 * 8192, block_size=8192)
    put(below, (0, noise(5 * 8192)))
    make_child(middle, below, block_size=8192)
    put(middle, (4096, noise(8192, 2)), (6 * 8192, noise(4096, 3)))
    make_child(top, middle, block_size=8192)
    put(top, (12288, noise(4096, 4)), (7 * 8192, noise(4096, 5)))
    merge(middle, below)
    return top, middle, below


def rewrite_header(path: Path, **changes: object) -> None:
    image = inspect(path)
    assert image.header is not None
    with path.open("r+b") as out:
        out.seek(image.footer.data_offset)
        out.write(replace(image.header, **changes).pack())  # type: ignore[arg-type]


def header_of(path: Path) -> DynamicHeader:
    header = inspect(path).header
    assert header is not None
    return header


def names_in(path: Path) -> list[str]:
    with path.open("rb") as file:
        return parent_names(open_vhd(file.fileno(), str(path)))


# Foreign children: each makes more than one sector of the header change.


def without_locators(path: Path) -> None:
    rewrite_header(path, locators=(ParentLocator(),) * LOCATORS)


def with_one_locator_and_no_name(path: Path) -> None:
    rewrite_header(
        path, locators=(header_of(path).locators[1],) + (ParentLocator(),) * 7, parent_name=bytes(512)
    )


def with_locators_without_room(path: Path) -> None:
    locators = header_of(path).locators
    rewrite_header(path, locators=(*locators[:2], replace(locators[2], data_offset=1 << 30), *locators[3:]))


def with_a_header_across_sectors(path: Path) -> None:
    """The header moves behind the blocks, to where no sector begins."""
    image = inspect(path)
    assert image.header is not None
    assert image.footer_offset is not None
    footer = replace(image.footer, data_offset=image.footer_offset + 412).pack()
    with path.open("r+b") as out:
        out.write(footer)
        out.seek(image.footer_offset)
        out.write(bytes(412) + image.header.pack() + bytes(100) + footer)


def with_a_locator_over_the_header(path: Path) -> None:
    """The header moves behind the blocks, and the first locator says that its place is there."""
    image = inspect(path)
    assert image.header is not None
    assert image.footer_offset is not None
    place = image.footer_offset
    locators = (replace(image.header.locators[0], data_offset=place), *image.header.locators[1:])
    footer = replace(image.footer, data_offset=place).pack()
    with path.open("r+b") as out:
        out.write(footer)
        out.seek(place)
        out.write(replace(image.header, locators=locators).pack() + footer)


def with_two_locators_in_one_place(path: Path) -> None:
    locators = header_of(path).locators
    rewrite_header(path, locators=(replace(locators[0], data_offset=locators[1].data_offset), *locators[1:]))


FOREIGN = [
    without_locators,
    with_one_locator_and_no_name,
    with_locators_without_room,
    with_a_header_across_sectors,
    with_a_locator_over_the_header,
]


class TestTheNewParent:
    def test_is_found_and_the_chain_reads_as_before(self, tmp_path: Path) -> None:
        leaf, child, parent = build(tmp_path)
        before = content(leaf)
        set_parent(str(leaf), str(parent))
        child.unlink()
        assert content(leaf) == before == libvhdi_reads([leaf, parent])
        assert names_in(leaf) == [PARENT]
        assert check_vhd(str(leaf)).problems == ()

    def test_is_what_libvhdi_says_it_is(self, tmp_path: Path) -> None:
        leaf, _, parent = build(tmp_path)
        set_parent(str(leaf), str(parent))
        theirs, its_parent = pyvhdi.file(), pyvhdi.file()
        theirs.open(str(leaf))
        its_parent.open(str(parent))
        assert theirs.get_parent_identifier() == its_parent.get_identifier()
        assert theirs.get_parent_filename().rsplit("\\")[-1] == PARENT
        theirs.close()
        its_parent.close()

    def test_takes_the_locators_and_one_sector_and_nothing_else(self, tmp_path: Path) -> None:
        leaf, _, parent = build(tmp_path)
        before, table = leaf.read_bytes(), entries(leaf)
        old = header_of(leaf)
        set_parent(str(leaf), str(parent))
        after = leaf.read_bytes()
        assert len(after) == len(before)
        changed = {index // SECTOR for index in range(len(after)) if before[index] != after[index]}
        assert changed == {1, *(locator.data_offset // SECTOR for locator in old.locators[:3])}
        assert header_of(leaf).locators == old.locators
        assert entries(leaf) == table

    def test_is_durable_before_the_locators_also_when_a_killed_predecessor_wrote_it(
        self, tmp_path: Path
    ) -> None:
        leaf, _, parent = build(tmp_path)
        set_parent(str(leaf), str(parent))
        files = Watched()
        set_parent(str(leaf), str(parent), files=files)
        assert [name for name, *_ in files.calls] == ["datasync", *["pwrite"] * 3, "datasync"]

    def test_can_replace_a_raw_one(self, tmp_path: Path) -> None:
        raw, parent, leaf = tmp_path / "r.raw", tmp_path / "p.vhd", tmp_path / "l.vhd"
        raw.write_bytes(noise(MIB))
        create_dynamic(str(parent), MIB)
        put(parent, (0, noise(MIB)))
        make_child(leaf, raw)
        files = RecordingFileCalls(tmp_path)
        set_parent(str(leaf), str(parent), keep=str(tmp_path / "keep"), files=files)
        for state in files.kill_states(tmp_path.parent / "kill"):
            restore_header(str(state.directory / "l.vhd"), str(state.directory / "keep"))
            assert content(state.directory / "l.vhd") == noise(MIB), state

    @pytest.mark.parametrize("name", ["p.vhd", "a-name-that-is-longer-than-that-of-the-other-one.vhd"])
    def test_may_have_a_name_of_another_length(self, tmp_path: Path, name: str) -> None:
        leaf, child, parent = build(tmp_path, parent=name)
        before = content(leaf)
        set_parent(str(leaf), str(parent), keep=str(tmp_path / "keep"))
        child.unlink()
        assert content(leaf) == before
        assert check_vhd(str(leaf)).problems == ()
        assert not (tmp_path / "keep").exists()

    @pytest.mark.parametrize("make_foreign", [*FOREIGN, with_two_locators_in_one_place])
    def test_gets_all_locators_in_a_foreign_child(
        self, tmp_path: Path, make_foreign: Callable[[Path], None]
    ) -> None:
        leaf, child, parent = build(tmp_path)
        before = content(leaf)
        make_foreign(leaf)
        assert content(leaf) == before
        with pytest.raises(UnsupportedImage, match="more than one sector"):
            set_parent(str(leaf), str(parent))
        assert content(leaf) == before
        set_parent(str(leaf), str(parent), keep=str(tmp_path / "keep"))
        child.unlink()
        assert content(leaf) == before == libvhdi_reads([leaf, parent])
        assert check_vhd(str(leaf)).problems == ()
        put(leaf, (5 * 8192, noise(8192, 9)))
        assert content(leaf) == before[: 5 * 8192] + noise(8192, 9) + before[6 * 8192 :]
        assert check_vhd(str(leaf)).problems == ()


class TestCrashes:
    def sweep(
        self,
        scratch: Path,
        make_foreign: Callable[[Path], None] | None,
        names: tuple[str, str],
        *,
        per_point: int,
        look_closer_every: int = 1,
    ) -> set[bool]:
        """Return for which states a header had to be put back: for some, for none, or for both kinds."""
        root = scratch / "sr"
        root.mkdir()
        leaf, child, parent = build(root, child=names[0], parent=names[1])
        before = content(leaf)
        if make_foreign is not None:
            make_foreign(leaf)
        files = RecordingFileCalls(root)
        set_parent(str(leaf), str(parent), keep=str(root / "keep"), files=files)
        files.mark("done")
        restored: set[bool] = set()
        rng = random.Random(per_point)
        states = [
            files.kill_states(scratch / "kill"),
            files.power_states(scratch / "power", rng, per_point),
        ]
        for number, state in enumerate(state for kind in states for state in kind):
            crashed, upper, lower = (state.directory / path.name for path in (leaf, child, parent))
            keep = state.directory / "keep"
            torn = not whole_header(crashed)
            restore_header(str(crashed), str(keep))
            restored.add(torn)
            assert not keep.exists(), state
            assert content(crashed) == before, state
            assert header_of(crashed).parent_id in (inspect(upper).unique_id, inspect(lower).unique_id), state
            assert check_vhd(str(crashed)).errors == () or "done" not in state.marks, state
            if number % look_closer_every and "done" not in state.marks:
                continue
            if "done" not in state.marks:
                set_parent(str(crashed), str(lower), keep=str(keep))
            upper.unlink()
            assert content(crashed) == before == libvhdi_reads([crashed, lower]), state
            assert check_vhd(str(crashed)).problems == (), state
        return restored

    def test_a_child_of_ours_never_needs_its_header_restored(self, in_memory: Path) -> None:
        assert self.sweep(in_memory, None, (CHILD, PARENT), per_point=8, look_closer_every=4) == {False}

    @pytest.mark.parametrize("names", [(CHILD, "p.vhd"), ("p.vhd", CHILD)])
    def test_names_of_other_lengths(self, in_memory: Path, names: tuple[str, str]) -> None:
        assert self.sweep(in_memory, None, names, per_point=6, look_closer_every=4) == {False, True}

    @pytest.mark.parametrize("make_foreign", FOREIGN)
    def test_foreign_children(self, in_memory: Path, make_foreign: Callable[[Path], None]) -> None:
        assert self.sweep(in_memory, make_foreign, (CHILD, PARENT), per_point=6, look_closer_every=4) == {
            False,
            True,
        }

    @pytest.mark.long
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("make_foreign", [None, *FOREIGN])
    @pytest.mark.parametrize(
        "names",
        [
            (CHILD, PARENT),
            (CHILD, "p.vhd"),
            ("p.vhd", CHILD),
            ("l\u00e4nger-" + CHILD, PARENT),
            (CHILD, 200 * "x" + ".vhd"),
        ],
    )
    def test_many_states(
        self, in_memory: Path, make_foreign: Callable[[Path], None] | None, names: tuple[str, str]
    ) -> None:
        restored = self.sweep(in_memory, make_foreign, names, per_point=40)
        assert restored == ({False} if make_foreign is None and names == (CHILD, PARENT) else {False, True})


def whole_header(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            open_vhd(file.fileno(), str(path))
        except CorruptImage:
            return False
    return True


class TestRestoring:
    def test_without_a_kept_header_changes_nothing(self, tmp_path: Path) -> None:
        leaf, _, _ = build(tmp_path)
        before = leaf.read_bytes()
        restore_header(str(leaf), str(tmp_path / "keep"))
        assert leaf.read_bytes() == before

    @pytest.mark.parametrize("kept", [b"", b"half", bytes(HEADER_SIZE)])
    def test_leaves_a_whole_header_alone(self, tmp_path: Path, kept: bytes) -> None:
        leaf, _, _ = build(tmp_path)
        before = leaf.read_bytes()
        (tmp_path / "keep").write_bytes(kept)
        files = Watched()
        restore_header(str(leaf), str(tmp_path / "keep"), files)
        assert files.calls == [("datasync", 0, 0)]  # nobody knows whether it is the new one, and durable
        assert leaf.read_bytes() == before
        assert not (tmp_path / "keep").exists()

    def test_puts_the_old_header_back_even_without_the_footer_at_the_end(self, tmp_path: Path) -> None:
        leaf, _, _ = build(tmp_path)
        before = leaf.read_bytes()
        (tmp_path / "keep").write_bytes(before[FOOTER_SIZE : FOOTER_SIZE + HEADER_SIZE])
        torn = before[: FOOTER_SIZE + 600] + b"torn" + before[FOOTER_SIZE + 604 : -512] + bytes(512)
        leaf.write_bytes(torn)
        restore_header(str(leaf), str(tmp_path / "keep"))
        assert leaf.read_bytes() == before[:-512] + bytes(512)
        assert not (tmp_path / "keep").exists()

    def test_keeps_what_it_has_when_both_headers_are_damaged(self, tmp_path: Path) -> None:
        leaf, _, _ = build(tmp_path)
        (tmp_path / "keep").write_bytes(b"half")
        with leaf.open("r+b") as out:
            out.seek(FOOTER_SIZE + 600)
            out.write(b"torn")
        before = leaf.read_bytes()
        with pytest.raises(CorruptImage, match="so is the copy"):
            restore_header(str(leaf), str(tmp_path / "keep"))
        assert leaf.read_bytes() == before
        assert (tmp_path / "keep").exists()


class TestRefusals:
    def test_a_parent_in_another_directory(self, tmp_path: Path) -> None:
        leaf, _, parent = build(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        parent.rename(tmp_path / "elsewhere" / PARENT)
        with pytest.raises(ValueError, match="same directory"):
            set_parent(str(leaf), str(tmp_path / "elsewhere" / PARENT))

    @pytest.mark.parametrize("name", ["p.raw", ".p.vhd"])
    def test_a_parent_that_no_chain_would_accept(self, tmp_path: Path, name: str) -> None:
        leaf, _, parent = build(tmp_path)
        parent.rename(tmp_path / name)
        with pytest.raises(UnsupportedImage, match=r"ends in \.vhd"):
            set_parent(str(leaf), str(tmp_path / name))

    @pytest.mark.parametrize("create", [create_dynamic, create_fixed])
    def test_an_image_without_a_parent(self, tmp_path: Path, create: Callable[..., None]) -> None:
        _, _, parent = build(tmp_path)
        create(str(tmp_path / "alone.vhd"), MIB)
        with pytest.raises(UnsupportedImage, match="has no parent"):
            set_parent(str(tmp_path / "alone.vhd"), str(parent))

    def test_an_image_as_its_own_parent(self, tmp_path: Path) -> None:
        leaf, _, _ = build(tmp_path)
        with pytest.raises(CorruptImage, match="its own parent"):
            set_parent(str(leaf), str(leaf))

    def test_an_image_that_lost_its_end(self, tmp_path: Path) -> None:
        leaf, _, parent = build(tmp_path)
        with leaf.open("r+b") as out:
            out.seek(-512, os.SEEK_END)
            out.write(bytes(512))
        before = leaf.read_bytes()
        with pytest.raises(CorruptImage, match="repair it"):
            set_parent(str(leaf), str(parent))
        assert leaf.read_bytes() == before
