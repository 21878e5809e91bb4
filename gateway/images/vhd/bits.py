"""Sector bitmaps, the first sector being the highest bit."""


def set_bits(bitmap: bytearray, first: int, last: int) -> None:
    """Set the bits [first, last), MSB first."""
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


def bit_runs(mask: int, sectors: int) -> list[tuple[int, int]]:
    """Return the runs [first, last) of set bits, the highest of `sectors` bits being number 0."""
    find = f"{mask:0{sectors}b}".find  # no arithmetic is as fast
    runs: list[tuple[int, int]] = []
    first = find("1")
    while first >= 0:
        last = find("0", first)
        if last < 0:
            last = sectors
        runs.append((first, last))
        first = find("1", last)
    return runs
