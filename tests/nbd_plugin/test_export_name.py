import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_plugin.export_name import ExportName, ExportNameError, parse_export_name

UUID = "5762f81c-efde-4db2-8924-b737ea268264"
SESSION = "OpaqueRef:16a4f8b0-9f84-4de1-b7a6-6336aff5beb4"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (UUID, ExportName(UUID)),
        (f"/{UUID}", ExportName(UUID)),
        (f"/{UUID.upper()}", ExportName(UUID)),
        (f"/{UUID}?session_id={SESSION}", ExportName(UUID, SESSION)),
        (f"/{UUID}?session_id={SESSION.replace(':', '%3a')}", ExportName(UUID, SESSION)),
        (f"/{UUID}?session_id={SESSION}&mode=rw", ExportName(UUID, SESSION, write=True)),
        (f"/{UUID}?mode=rw&session_id={SESSION}", ExportName(UUID, SESSION, write=True)),
        (f"/{UUID}?session_id={SESSION}&rw", ExportName(UUID, SESSION, write=True)),
        (f"{UUID}?mode=rw", ExportName(UUID, write=True)),
        (f"{UUID}?mode=ro", ExportName(UUID)),
        (f"%2F{UUID}".replace("%2F", "/"), ExportName(UUID)),
        (f"/{UUID.replace('-', '%2D')}", ExportName(UUID)),
    ],
)
def test_a_name_says_which_vdi_for_whom_and_how(name: str, expected: ExportName) -> None:
    assert parse_export_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        f"//{UUID}",
        f"%2f{UUID}",  # the slash in front is no part of the path
        f"{UUID}/",
        f"{UUID}.vhd",
        f"../{UUID}",
        UUID[:-1],
        UUID.replace("-", ""),
        UUID.replace("5", "\u0665"),  # a digit elsewhere
        f"{UUID}?",
        f"{UUID}?mode",
        f"{UUID}?made=rw",
        f"{UUID}?mode=",
        f"{UUID}?mode=RW",
        f"{UUID}?mode=rw&mode=ro",
        f"{UUID}?rw&mode=rw",
        f"{UUID}?rw=",
        f"{UUID}?session_id",
        f"{UUID}?session_id=",
        f"{UUID}?session_id={'x' * 257}",
        f"{UUID}?session_id={SESSION}&session_id={SESSION}",
        f"{UUID}?session_id=a%0ab",
        f"{UUID}?session_id=a%00",
        f"{UUID}?session_id=a b",
        f"{UUID}?session_id=%c3%a9",
        f"{UUID}?session_id=%",
        f"{UUID}?session_id=%4",
        f"{UUID}?session_id=%4x",
        f"{UUID}?session_id=%+4",
        f"{UUID}?mode=rw&&session_id={SESSION}",
        f"{UUID}?purpose=other",
        f"{UUID}?mode=rw?",
        f"{UUID}#mode=rw",
        f"{UUID}\n",
        f"{UUID}\0",
        f"{UUID}?mode=rw\n",
        UUID + "?" + "mode=ro&" * 200,
    ],
)
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ExportNameError) as refused:
        parse_export_name(name)
    assert SESSION not in str(refused.value)


def test_a_session_is_not_shown() -> None:
    assert SESSION not in repr(parse_export_name(f"/{UUID}?session_id={SESSION}"))


@given(
    st.one_of(st.text(), st.text(alphabet=string.hexdigits + "%&=?/-moderw_", max_size=60).map(UUID.__add__))
)
def test_any_name_is_parsed_or_refused(name: str) -> None:
    try:
        parsed = parse_export_name(name)
    except ExportNameError:
        return
    assert parsed.vdi == UUID or len(parsed.vdi) == len(UUID)
    assert parsed.write == ("rw" in name.lower() or "%" in name.partition("?")[2])
