"""Everything that can be done to several VDIs, in any order, against plain bytes.

After each step libvhdi reads every node, and each file is checked.
"""

import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.repository.chains_story import PLACES, STEPS, Interrupting, Step, begin, told

steps = st.builds(
    Step,
    what=st.sampled_from(STEPS),
    number=st.integers(0, 100),
    place=st.sampled_from(PLACES),
    value=st.integers(1, 255),
)


async def play(directory: Path, story: list[Step]) -> None:
    await begin(directory)
    async with told(directory, Interrupting()) as lives:
        for step in story:
            await lives.do(step)
            await lives.assert_true()
        await lives.house.assert_records_are_true(lives.sr)
        await lives.assert_all_merged()
        await lives.assert_true(again=True)


@settings(max_examples=7, derandomize=True)
@given(st.lists(steps, min_size=8, max_size=20))
def test_any_order_of_operations_gives_every_vdi_its_bytes(story: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(play, Path(directory), story)


# In parts, so that several workers can have them; each looks for examples of its own.
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
@settings(max_examples=50)
@given(story=st.lists(steps, min_size=10, max_size=60))
def test_any_long_order_of_operations_gives_every_vdi_its_bytes(part: int, story: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(play, Path(directory), story)
