import itertools
import unicodedata
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuse_mount.names import LONGEST, Names, plain_name, suffixed_names

A = "aaaaaaaa-1111-4111-8111-111111111111"
B = "bbbbbbbb-2222-4222-8222-222222222222"
C = "cccccccc-3333-4333-8333-333333333333"

# Few words, so that they collide often; what looks like a suffix is among them.
words = st.sampled_from(["", ".", "..", "disk", "a/b", "a_b", "disk~aaaaaaaa", "x" * 300, "ü" * 200, A, "\0"])
labels = st.dictionaries(
    st.sampled_from([A, B, C, *(f"{digit * 8}-{'0' * 4}-4000-8000-000000000000" for digit in "def0")]),
    st.one_of(words, st.text(st.characters(), max_size=300)),
)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("disk", "disk"),
        (" a  b ", " a  b "),
        (".hidden", ".hidden"),
        ("...", "..."),
        ("überrest 盤", "überrest 盤"),
        ("", A),
        (".", A),
        ("..", A),
        ("a/b", "a_b~aaaaaaaa"),
        ("/", "_~aaaaaaaa"),
        ("a\0b\nc\x7f\x9b", "a_b_c__~aaaaaaaa"),
        ("\ud800", "?~aaaaaaaa"),
        ("x" * 255, "x" * 255),
        ("x" * 256, "x" * 246 + "~aaaaaaaa"),
        ("ü" * 128, "ü" * 123 + "~aaaaaaaa"),
    ],
)
def test_a_label_alone_becomes_a_name(label: str, name: str) -> None:
    assert Names().give({A: label}) == {A: name}


def test_all_of_those_that_are_called_the_same_at_the_start_get_a_suffix() -> None:
    assert Names().give({A: "disk", B: "disk", C: "other"}) == {
        A: "disk~aaaaaaaa",
        B: "disk~bbbbbbbb",
        C: "other",
    }


def test_one_that_comes_later_gets_the_suffix_alone() -> None:
    names = Names()
    assert names.give({A: "disk"}) == {A: "disk"}
    assert names.give({B: "disk"}) == {B: "disk~bbbbbbbb"}


def test_a_name_is_free_once_its_owner_has_gone() -> None:
    names = Names()
    names.give({A: "disk"})
    names.take_back(A)
    assert names.give({B: "disk"}) == {B: "disk"}


def test_a_name_that_stands_there_anyway_is_not_given() -> None:
    assert Names(("by-uuid",)).give({A: "by-uuid"}) == {A: "by-uuid~aaaaaaaa"}


def test_labels_that_become_the_same_name_are_told_apart() -> None:
    names = Names().give({A: "a_b", B: "a/b", C: "a\0b"})
    assert names == {A: "a_b~aaaaaaaa", B: "a_b~bbbbbbbb", C: "a_b~cccccccc"}


def test_the_suffix_becomes_longer_where_somebody_is_called_so() -> None:
    names = Names()
    names.give({B: "disk~aaaaaaaa", C: f"disk~{A[:16]}"})
    names.give({"d": "disk"})
    assert names.give({A: "disk"}) == {A: f"disk~{A}"}


def test_there_is_always_one_more_name() -> None:
    several = list(itertools.islice(suffixed_names("x" * 300, A), 100))
    assert len(set(several)) == 100
    assert max(len(name) for name in several) <= LONGEST


@given(labels, labels)
@example({A: "disk", B: "disk"}, {C: "disk~aaaaaaaa"})
def test_names_are_allowed_and_unique_and_stay(first: Mapping[str, str], later: Mapping[str, str]) -> None:
    later = {uuid: label for uuid, label in later.items() if uuid not in first}
    names = Names(("by-uuid",))
    given_names = {**names.give(first), **names.give(later)}
    assert set(given_names) == {*first, *later}
    assert len({"by-uuid", *given_names.values()}) == len(given_names) + 1
    for uuid, name in given_names.items():
        assert name not in ("", ".", "..")
        assert not any(char == "/" or unicodedata.category(char) == "Cc" for char in name)
        assert 0 < len(name.encode()) <= LONGEST
        label = {**first, **later}[uuid]
        assert name in (label, uuid) or "~" in name


@given(labels)
def test_the_same_set_gets_the_same_names_in_any_order(told: Mapping[str, str]) -> None:
    shuffled = dict(reversed(list(told.items())))
    assert Names().give(told) == Names().give(shuffled)


@given(labels)
def test_a_name_that_is_alone_and_allowed_is_the_label(told: Mapping[str, str]) -> None:
    names = Names().give(told)
    plain = {uuid: plain_name(label, uuid) for uuid, label in told.items()}
    for uuid, (name, changed) in plain.items():
        alone = [each for each, _ in plain.values()].count(name) == 1
        if alone and not changed:
            assert names[uuid] == name


@given(labels)
def test_all_that_is_taken_back_can_be_given_again(told: Mapping[str, str]) -> None:
    names = Names()
    first = names.give(told)
    for uuid in told:
        names.take_back(uuid)
    assert names.give(told) == first
