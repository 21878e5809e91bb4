"""Whatever a server does to an image, it is the disk or one known error, and then nothing is left."""

import random
from itertools import chain, repeat
from pathlib import Path

import pytest

from gateway.core.errors import XenAPIError
from tests.transfers.copying import names
from tests.transfers.pull_server import Connection, Handler, Request, file_of, serving
from tests.transfers.pulling import FORMATS, PACKED, House, image, require_same, sum_of

KNOWN = {
    "IMPORT_ERROR_BAD_COMPRESSION",
    "IMPORT_ERROR_CORRUPT_IMAGE",
    "IMPORT_ERROR_PREMATURE_EOF",
    "IMPORT_ERROR_UNSUPPORTED_IMAGE",
    "IMPORT_ERROR_WRONG_FORMAT",
    "PULL_ERROR_BROKEN_OFF",
    "PULL_ERROR_CHANGED",
    "PULL_ERROR_CHECKSUM",
    "PULL_ERROR_NOT_HTTP",
    "PULL_ERROR_STATUS",
    "VDI_TOO_LARGE",
}


def mischief(seed: int, body: bytes) -> Handler:
    chance = random.Random(seed)
    kind = chance.choice(["break", "change", "damage", "lie", "status", "no ranges", "chunked"])
    cuts = chain((chance.randrange(1, len(body)) for _ in range(chance.randrange(4))), repeat(len(body) + 1))
    if kind == "damage":
        damaged = bytearray(body)
        damaged[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        return file_of(bytes(damaged), cuts=cuts)
    if kind == "lie":
        return file_of(body[: chance.randrange(1, len(body))], cuts=cuts)
    if kind in ("change", "status"):
        other = body[: chance.randrange(len(body))] + chance.randbytes(100)
        later = file_of(other, tag=chance.choice(['"v1"', '"v2"', None]))
        first = file_of(body, cuts=cuts)

        def handler(request: Request, connection: Connection) -> None:
            if chance.random() < 0.5:
                first(request, connection)
            elif kind == "change":
                later(request, connection)
            else:
                connection.head(chance.choice([404, 500, 503, 206]), Content_Length=0)

        return handler
    return file_of(
        body,
        cuts=cuts,
        ranges=kind != "no ranges",
        chunked=kind == "chunked",
        tag=chance.choice(['"v1"', None]),
    )


async def play(house: House, files: Path, seed: int) -> None:
    chance = random.Random(seed)
    form, packing = chance.choice(list(FORMATS)), chance.choice(list(PACKED))
    body = image(files, form, packing)
    before = names(house.directory)
    with serving(mischief(seed, body)) as server:
        try:
            vdi = await house.pull(server.url, sum_of(body))
        except XenAPIError as error:
            assert error.code in KNOWN, (seed, form, packing)
            assert names(house.directory) == before
            return
    require_same(house, vdi, files)
    await house.inventory.vdi_destroy(vdi.ref)


@pytest.mark.parametrize("part", range(4))
async def test_whatever_a_server_does_it_is_the_disk_or_one_error(
    house: House, files: Path, part: int
) -> None:
    for seed in range(part * 100, part * 100 + 12):
        await play(house, files, seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
async def test_whatever_a_server_does_at_length(house: House, files: Path, part: int) -> None:
    for seed in range(10_000 + part * 100, 10_000 + part * 100 + 60):
        await play(house, files, seed)
