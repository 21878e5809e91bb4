from gateway.core.events import Events
from gateway.core.refusals import Refusals


def test_only_the_last_refusal_of_a_vdi_is_told() -> None:
    refusals = Refusals(Events())
    assert refusals.last("a") == ""
    refusals.note("a", "reading by root", "first")
    refusals.note("a", "writing by root", "second")
    assert refusals.last("a").endswith("Z writing by root: second")


def test_refusals_are_short_printable_and_of_so_many_vdis() -> None:
    refusals = Refusals(Events())
    refusals.note("long", "reading", "x" * 10_000)
    assert len(refusals.last("long")) == 500
    refusals.note("odd", "reading", "a\x00b\x1b[2J\udcff\n")
    assert refusals.last("odd").endswith("a?b?[2J??")
    for number in range(999):
        refusals.note(str(number), "reading", "")
    assert refusals.last("long") == ""
    assert refusals.last("odd")
