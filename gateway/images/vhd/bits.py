"""Sector bitmaps: a bit for each sector, the highest of the first byte being the first one's."""

from gateway.images.files import Buffer


def has_bit(bitmap: Buffer, number: int) -> bool:
    """Return whether a bit is set."""
    return bool(bitmap[number >> 3] & (0x80 >> (number & 7)))


def set_bits(bitmap: bytearray, first: int, last: int) -> None:
    """Set the bits [first, last)."""
    if first >= last:
        return
    begin, end = first >> 3, last >> 3
    head = 0xFF >> (first & 7)
    tail = ~(0xFF >> (last & 7)) & 0xFF
    if begin == end:
        bitmap[begin] |= head & tail
        return
    bitmap[begin] |= head
    bitmap[begin + 1 : end] = b"\xff" * (end - begin - 1)
    if tail:
        bitmap[end] |= tail
