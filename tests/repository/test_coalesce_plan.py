"""What there is to coalesce, by SM's rules, in SRs that exist only as the results of scans."""

from dataclasses import replace

import pytest

from gateway.repository.coalesce_plan import (
    Candidate,
    CoalesceKind,
    Plan,
    Refusal,
    Switches,
    garbage,
    make_plan,
)
from gateway.repository.scan import FileStamp, ScannedImage, ScanResult

MIB = 1 << 20
ROOMY = 1 << 40


def sr(*nodes: ScannedImage, journals: tuple[str, ...] = ()) -> ScanResult:
    return ScanResult({node.uuid: node for node in nodes}, journals)


def uuid(letter: str) -> str:
    """The uuid of a node that has a letter's name in these tests."""
    return f"{ord(letter):08d}-0000-4000-8000-000000000000"


def node(name: str, parent: str | None = None, *, size: int = 8 * MIB, used: int = MIB) -> ScannedImage:
    """A capital letter is a hidden node, a small one a VDI."""
    return ScannedImage(
        uuid=uuid(name),
        path=f"/sr/{uuid(name)}.vhd",
        format="vhd",
        stamp=FileStamp(ord(name), used, 0),
        virtual_size=size,
        physical_utilisation=used,
        parent=None if parent is None else uuid(parent),
        hidden=name.isupper(),
    )


def plan(found: ScanResult, *, free: int = ROOMY, switches: Switches | None = None) -> Plan:
    return make_plan(found, switches or Switches(), free)


def names(candidates: tuple[Candidate, ...]) -> list[str]:
    return [chr(int(candidate.child[:8])) for candidate in candidates]


def reasons(made: Plan) -> dict[str, str]:
    return {chr(int(refusal.uuid[:8])): refusal.reason for refusal in made.refused}


def test_a_hidden_node_that_is_the_only_child_of_a_hidden_one_goes_into_it() -> None:
    made = plan(sr(node("A"), node("B", "A", used=3 * MIB), node("k", "B"), node("l", "B")))
    assert made == Plan(
        candidates=(
            Candidate(
                CoalesceKind.INLINE, uuid("B"), uuid("A"), (uuid("k"), uuid("l")), 3 * MIB, tree_height=3
            ),
        )
    )


def test_a_vdi_that_is_the_only_child_of_a_hidden_node_goes_into_it() -> None:
    made = plan(sr(node("A"), node("k", "A")))
    assert made == Plan(
        candidates=(Candidate(CoalesceKind.LEAF, uuid("k"), uuid("A"), (), MIB, tree_height=2),)
    )


def test_nodes_that_others_stand_beside_stay_where_they_are() -> None:
    assert plan(sr(node("A"), node("k", "A"), node("l", "A"))) == Plan()
    assert plan(sr(node("A"), node("B", "A"), node("k", "A"), node("l", "B"), node("m", "B"))) == Plan()
    assert plan(sr(node("a"))) == Plan()


def test_hidden_nodes_that_no_vdi_stands_on_are_garbage_children_first() -> None:
    found = sr(node("A"), node("B", "A"), node("C", "B"), node("D", "B"), node("E"), node("k", "E"))
    assert garbage(found) == (uuid("C"), uuid("D"), uuid("B"), uuid("A"))
    assert plan(found).garbage == garbage(found)
    assert names(plan(found).candidates) == ["k"]


def test_garbage_still_stands_beside_others_until_it_is_gone() -> None:
    made = plan(sr(node("A"), node("B", "A"), node("k", "A")))
    assert (made.garbage, made.candidates) == ((uuid("B"),), ())


def test_what_was_being_relinked_is_no_garbage_and_comes_first_to_be_finished() -> None:
    # k stands on A already, so B isn't the only child any more.
    tall = (node("P"), node("Q", "P"), node("R", "Q"), node("x", "R"))
    found = sr(node("A"), node("B", "A"), node("k", "A"), *tall, journals=(f"relink_{uuid('B')}",))
    made = plan(found, free=0)
    assert made.garbage == ()
    assert made.candidates == (
        Candidate(CoalesceKind.INLINE, uuid("B"), uuid("A"), (), 0, tree_height=2, relink_only=True),
    )
    assert names(plan(found).candidates) == ["B", "Q", "R", "x"]


def test_the_tallest_tree_comes_first_from_its_root_up_and_leaves_last() -> None:
    low = (node("A"), node("a", "A"))
    tall = (node("P"), node("Q", "P"), node("R", "Q"), node("x", "R"))
    middle = (node("G"), node("H", "G"), node("h", "H"))
    assert names(plan(sr(*low, *tall, *middle)).candidates) == ["Q", "R", "x", "H", "h", "a"]


def test_nothing_goes_into_a_vdi_or_a_raw_image() -> None:
    made = plan(sr(node("a"), node("B", "a"), node("k", "B"), node("l", "B")))
    assert (made.candidates, reasons(made)) == ((), {"B": f"its parent {uuid('a')}.vhd is a VDI of its own"})
    raw = replace(node("a"), format="raw", path=f"/sr/{uuid('a')}.raw")
    assert reasons(plan(sr(raw, node("k", "a")))) == {"k": f"its parent {uuid('a')}.raw is a VDI of its own"}


@pytest.mark.parametrize(
    ("nodes", "refused"),
    [
        pytest.param(
            (node("A"), node("B", "A", size=4 * MIB), node("k", "B"), node("l", "B")),
            {"B": "it is smaller than its parent"},
            id="bytes of the parent would show in a longer child",
        ),
        pytest.param(
            (node("A"), node("B", "A", size=4 * MIB), *(node(leaf, "B", size=4 * MIB) for leaf in "kl")),
            {},
            id="no child is longer than the node",
        ),
        pytest.param(
            (node("A"), node("k", "A", size=4 * MIB)), {"k": "is larger"}, id="a VDI keeps its size"
        ),
        pytest.param(
            (node("A"), node("B", "A", size=4 * MIB), node("k", "B"), node("l", "A", size=4 * MIB)),
            {"k": "is smaller than it and than"},
            id="bytes below the parent would show once it has grown",
        ),
    ],
)
def test_no_coalesce_brings_bytes_to_light(nodes: tuple[ScannedImage, ...], refused: dict[str, str]) -> None:
    made = plan(sr(*nodes))
    found = reasons(made)
    assert found.keys() == refused.keys()
    assert all(part in found[name] for name, part in refused.items())
    assert not {uuid(name) for name in refused} & {candidate.child for candidate in made.candidates}


def test_a_smaller_parent_is_made_larger_which_may_take_its_size_again() -> None:
    nodes = (node("A", size=4 * MIB, used=2 * MIB), node("k", "A", used=MIB))
    (candidate,) = plan(sr(*nodes), free=3 * MIB).candidates
    assert (candidate.grow_to, candidate.extra_bytes) == (8 * MIB, 3 * MIB)
    assert "3145728 more bytes" in reasons(plan(sr(*nodes), free=3 * MIB - 1))["k"]


def test_space_that_is_known_not_to_be_needed_is_not_asked_for() -> None:
    found = sr(node("A"), node("k", "A", used=5 * MIB))
    assert "5242880 more bytes, and the SR has 100 free" in reasons(plan(found, free=100))["k"]
    made = make_plan(found, Switches(), 100, extra_bytes=lambda child, parent: 100)
    assert names(made.candidates) == ["k"]


@pytest.mark.parametrize(
    ("other_config", "refused"),
    [
        ({}, {}),
        ({"gc": "true", "coalesce": "yes", "leaf-coalesce": ""}, {}),
        ({"gc": "false"}, {"B": "gc", "l": "gc", "X": "gc", "k": "gc"}),
        ({"coalesce": "False"}, {"B": "coalesce", "k": "coalesce", "l": "coalesce"}),
        ({"leaf-coalesce": "false"}, {"k": "leaf-coalesce", "l": "leaf-coalesce"}),
    ],
)
def test_sms_switches_in_the_srs_other_config(other_config: dict[str, str], refused: dict[str, str]) -> None:
    found = sr(node("A"), node("B", "A"), node("l", "B"), node("C"), node("k", "C"), node("X"))
    made = plan(found, switches=Switches.of(other_config))
    assert reasons(made) == {name: f"the SR's other_config {key} is false" for name, key in refused.items()}
    everything = {"B", "k", "l", "X"}
    done = set(names(made.candidates)) | {chr(int(waste[:8])) for waste in made.garbage}
    assert done == everything - refused.keys()


def test_what_is_to_be_skipped_is_refused_with_the_reason() -> None:
    made = make_plan(sr(node("A"), node("k", "A")), Switches(), ROOMY, skip={uuid("k"): "it failed just now"})
    assert made == Plan(refused=(Refusal(uuid("k"), "it failed just now"),))


def test_one_file_that_cannot_be_used_keeps_everything_from_being_planned() -> None:
    whole = (node("A"), node("k", "A"), node("X"))
    broken = replace(node("b"), error="the footer is damaged")
    assert plan(sr(*whole, broken)) == Plan(problems=(f"{uuid('b')}.vhd: the footer is damaged",))
    orphan = replace(node("b"), error=f"its parent {uuid('Z')}.vhd is missing")
    assert plan(sr(*whole, orphan)).problems == (f"{uuid('b')}.vhd: its parent {uuid('Z')}.vhd is missing",)


@pytest.mark.parametrize("journal", ["coalesce_{}", "leaf_{}", "clone_{}", "OLD_{}.vhd", "{}.vhd.new"])
def test_what_sm_left_half_done_keeps_everything_from_being_planned(journal: str) -> None:
    name = journal.format(uuid("k"))
    found = replace(sr(node("A"), node("k", "A"), journals=(name,)), unresolved={name: "k is in use"})
    assert plan(found) == Plan(problems=(f"{name}: k is in use",))


def test_a_relink_whose_node_is_gone_keeps_everything_from_being_planned() -> None:
    name = f"relink_{uuid('B')}"
    assert plan(sr(node("A"), node("k", "A"), journals=(name,))).problems == (f"{name}: an operation of SM",)


def test_a_relink_of_a_vdi_keeps_everything_from_being_planned() -> None:
    name = f"relink_{uuid('k')}"
    found = replace(sr(node("A"), node("k", "A"), journals=(name,)), unresolved={name: "k is a VDI"})
    assert plan(found) == Plan(problems=(f"{name}: k is a VDI",))


def test_nodes_that_stand_on_themselves_or_on_a_file_of_a_strange_name() -> None:
    made = plan(sr(node("A", "B"), node("B", "A"), node("k", "B")))
    assert [problem.partition(":")[0] for problem in made.problems] == [f"{uuid(name)}.vhd" for name in "ABk"]
    strange = replace(node("B"), parent="golden image")
    assert names(plan(sr(strange, node("k", "B"))).candidates) == ["k"]
