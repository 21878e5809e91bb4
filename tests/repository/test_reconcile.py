"""What reconciling does with very many images: it runs on the loop that serves everybody."""

from typing import TYPE_CHECKING

from gateway.core.records import SR
from gateway.repository.reconcile import reconcile
from gateway.repository.scan import FileStamp, ScannedImage, ScanResult

if TYPE_CHECKING:
    from _collections_abc import dict_values

PAIRS = 200


class Counting(dict[str, ScannedImage]):
    """Counts how often all images are gone through."""

    count = 0

    def values(self) -> "dict_values[str, ScannedImage]":
        self.count += 1
        return super().values()


def uuid(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def image(number: int, *, parent: int | None) -> ScannedImage:
    return ScannedImage(
        uuid=uuid(number),
        path=f"/sr/{uuid(number)}.vhd",
        format="vhd",
        stamp=FileStamp(number, 1, 1),
        virtual_size=2 << 20,
        hidden=parent is None,
        parent=None if parent is None else uuid(parent),
    )


def test_a_foreign_sr_is_gone_through_a_few_times_however_many_base_copies_it_has() -> None:
    images = Counting()
    for number in range(PAIRS):
        images[uuid(number)] = image(number, parent=None)
        images[uuid(PAIRS + number)] = image(PAIRS + number, parent=number)
    images[uuid(2 * PAIRS)] = image(2 * PAIRS, parent=None)
    found = reconcile(
        SR(ref="OpaqueRef:sr", uuid=uuid(9999)),
        ScanResult(images),
        [],
        writable=True,
        elsewhere=lambda _uuid: None,
        is_written=lambda _vdi: False,
        ref_is_free=lambda _ref: True,
    )
    # The last one is hidden and nothing stands on it.
    assert {vdi.uuid for vdi in found.add} == images.keys() - {uuid(2 * PAIRS)}
    assert images.count < 5
