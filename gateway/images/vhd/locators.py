"""Where the parent locators of a differencing VHD go when they are written anew.

A locator that has room in its old place stays there, for blktap wants no metadata behind blocks. The others
go to the end of the file, and the footer behind them. The trap: what a locator calls its place may be the
place of something else, so it is held against all the file's structures before anything is written there.
"""

from dataclasses import replace

from gateway.images.vhd.check_parent import LOCATOR_PLATFORMS, locator_text
from gateway.images.vhd.format import (
    HEADER_SIZE,
    LOCATORS,
    SECTOR,
    UNUSED,
    DynamicHeader,
    ParentLocator,
    round_up_to_sector,
)
from gateway.images.vhd.image import VhdFile


def place_locators(
    image: VhdFile, header: DynamicHeader, parent: str
) -> tuple[tuple[ParentLocator, ...], list[tuple[int, bytes]]]:
    """Return the locators that name `parent`, and (offset, whole sectors) of what they hold.

    Offsets from the footer's on mean that the footer has to move behind them.
    """
    old = {locator.platform: locator for locator in header.locators}
    assert image.footer_offset is not None
    free = round_up_to_sector(image.footer_offset)
    first_block = min(image.bat, default=UNUSED) * SECTOR
    locators: list[ParentLocator] = []
    places: list[tuple[int, bytes]] = []
    for platform in LOCATOR_PLATFORMS:
        data = locator_text(platform, parent)
        space = round_up_to_sector(len(data))
        locator = old.get(platform)
        if locator is not None and _has_room(image, header, locator, space, first_block):
            locator = replace(locator, data_length=len(data))
        else:
            locator = ParentLocator(platform, space, len(data), free)
            free += space
        locators.append(locator)
        places.append((locator.data_offset, data.ljust(space, b"\0")))
    locators += [ParentLocator()] * (LOCATORS - len(locators))
    return tuple(locators), places


def _has_room(
    image: VhdFile, header: DynamicHeader, locator: ParentLocator, space: int, first_block: int
) -> bool:
    """Return whether a locator's old place is its own: inside the file and over nothing else."""
    start, stop = locator.data_offset, locator.data_offset + space
    if locator.space_bytes < space or start % SECTOR or stop > image.data_end:
        return False
    end = header.table_end
    if image.batmap is not None:
        end = image.batmap.map_offset + image.batmap.map_sectors * SECTOR
    header_start = image.footer.data_offset  # usually before the table, but it may be anywhere
    if start < end or (start < header_start + HEADER_SIZE and header_start < stop):
        return False
    others = [other for other in header.locators if other != locator and other.platform]
    if any(start < other.data_offset + other.space_bytes and other.data_offset < stop for other in others):
        return False
    if stop <= first_block:
        return True
    whole = image.bitmap_size + image.block_size
    return not any(
        entry != UNUSED and start < entry * SECTOR + whole and entry * SECTOR < stop for entry in image.bat
    )
