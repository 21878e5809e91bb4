"""Who asks, who waits, and what they get, whoever of them fails or is cancelled."""

import pytest
import trio
import trio.testing

from fuse_mount.questions import Questions
from tests.fuse_mount.askers import Source, asking


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def questions(source: Source) -> Questions[str]:
    return Questions(source.ask, source.keep)


async def test_equal_questions_are_asked_once_and_others_by_themselves(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a", "b", "a", "b")
        assert source.asked == ["a", "b"]
        source.gates[1].set()
        await trio.testing.wait_all_tasks_blocked()
        assert askers.outcomes == [None, None, "b 1", None, "b 1"]
        source.gates[0].set()
    assert askers.outcomes == ["a 0", "a 0", "b 1", "a 0", "b 1"]
    assert source.asked == ["a", "b"]


async def test_an_answer_is_not_remembered(source: Source, questions: Questions[str]) -> None:
    async with asking(questions.answer) as askers:
        for number in range(3):
            await askers.more("a")
            source.gates[number].set()
            await trio.testing.wait_all_tasks_blocked()
    assert askers.outcomes == ["a 0", "a 1", "a 2"]


@pytest.mark.parametrize("answer", [None, (), OSError("no error here")], ids=["None", "empty", "exception"])
async def test_whatever_is_answered_is_an_answer(answer: object) -> None:
    asked: list[str] = []
    gate = trio.Event()
    told: list[object] = []

    async def ask(name: str) -> object:
        asked.append(name)
        await gate.wait()
        return answer

    questions = Questions(ask)

    async def tell() -> None:
        told.append(await questions.answer("a"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        nursery.start_soon(tell)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert [each is answer for each in told] == [True, True]
    assert asked == ["a"]


async def test_an_error_is_raised_for_all_and_the_next_asks_anew(
    source: Source, questions: Questions[str]
) -> None:
    source.failure = failure = OSError("refused")
    async with asking(questions.answer) as askers:
        await askers.more("a", "a", "a")
        source.gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert askers.outcomes == [failure] * 3
        assert source.asked == ["a"]
        source.failure = None
        await askers.more("a")
        assert source.asked == ["a", "a"]
        source.gates[1].set()
    assert askers.outcomes[3] == "a 1"
    assert source.kept == [("a", "a 1")]


async def test_when_the_one_who_asks_is_cancelled_one_of_those_who_wait_asks(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a", "a", "a")
        await askers.cancel(0)
        assert source.asked == ["a", "a"]
        source.gates[1].set()
    assert [scope.cancelled_caught for scope in askers.scopes] == [True, False, False, False]
    assert askers.outcomes == [None, "a 1", "a 1", "a 1"]
    assert source.kept == [("a", "a 1")]


async def test_as_long_as_somebody_waits_somebody_asks_whoever_is_cancelled(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more(*["a"] * 5)
        for number in range(5):
            assert source.asked_now == 1
            await askers.cancel(number)
        assert source.asked_now == 0
        assert all(scope.cancelled_caught for scope in askers.scopes)
        await askers.more("a")
        source.gates[-1].set()
    assert askers.outcomes == [None] * 5 + [f"a {len(source.asked) - 1}"]
    assert source.kept == [("a", askers.outcomes[5])]


async def test_when_one_who_waits_is_cancelled_the_others_notice_nothing(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a", "a")
        await askers.cancel(1)
        assert askers.scopes[1].cancelled_caught
        assert source.asked == ["a"]
        source.gates[0].set()
    assert askers.outcomes == ["a 0", None, "a 0"]
    assert source.asked == ["a"]


async def test_when_all_are_cancelled_at_once_the_next_asks_anew(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a", "a")
        await askers.cancel(0, 1, 2)
        assert source.asked == ["a"]
        await askers.more("a")
        source.gates[1].set()
    assert askers.outcomes == [None, None, None, "a 1"]


async def test_who_asks_after_the_name_was_forgotten_gets_another_answer_and_only_that_is_kept(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a")
        questions.forget("a")
        await askers.more("a", "a")
        assert source.asked == ["a", "a"]
        # The old question ends first, and leaves the new one to those who wait for it.
        source.gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        await askers.more("a")
        assert source.asked == ["a", "a"]
        source.gates[1].set()
    assert askers.outcomes == ["a 0", "a 0", "a 1", "a 1", "a 1"]
    assert source.kept == [("a", "a 1")]


async def test_who_waits_for_a_forgotten_question_that_is_cancelled_waits_for_the_new_one(
    source: Source, questions: Questions[str]
) -> None:
    async with asking(questions.answer) as askers:
        await askers.more("a", "a")
        questions.forget("a")
        await askers.more("a")
        await askers.cancel(0)
        assert source.asked == ["a", "a"]
        source.gates[1].set()
    assert askers.outcomes == [None, "a 1", "a 1"]


async def test_an_answer_is_kept_before_anybody_has_it(source: Source) -> None:
    seen: list[list[str | Exception | None]] = []

    def keep(name: str, answer: str) -> None:
        seen.append(list(askers.outcomes))

    async with asking(Questions(source.ask, keep).answer) as askers:
        await askers.more("a", "a")
        source.gates[0].set()
    assert seen == [[None, None]]
    assert askers.outcomes == ["a 0", "a 0"]
