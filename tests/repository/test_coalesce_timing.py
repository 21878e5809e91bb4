import trio
import trio.testing

from gateway.core.limits import Limits
from gateway.repository.coalesce_plan import Candidate, CoalesceKind
from gateway.repository.coalesce_timing import GoesFirst

CHILD, PARENT = (f"0000000{number}-0000-4000-8000-000000000000" for number in (7, 8))
TALL, SHORT = (Candidate(CoalesceKind.INLINE, CHILD, PARENT, (), 0, height) for height in (25, 24))


async def test_a_tall_tree_goes_first_for_once_and_no_other_beside_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first = GoesFirst(Limits(coalesce_first_seconds=300, coalesce_first_pause_seconds=1800))
    assert first.until(SHORT, full=False) is None
    until = trio.current_time() + 300
    assert first.until(TALL, full=False) == until
    await trio.sleep(10)
    assert first.until(TALL, full=False) == until
    assert first.until(SHORT, full=False) is None
    await trio.sleep(300)
    assert first.until(TALL, full=False) is None
    await trio.sleep(1800)
    assert first.until(TALL, full=False) == trio.current_time() + 300


async def test_in_a_full_sr_any_tree_goes_first(autojump_clock: trio.testing.MockClock) -> None:
    first = GoesFirst(Limits(coalesce_first_seconds=300, coalesce_first_pause_seconds=1800))
    until = trio.current_time() + 300
    assert first.until(SHORT, full=True) == until
    assert first.until(TALL, full=True) == until
    await trio.sleep(301)
    assert first.until(TALL, full=True) is None
