"""What is asked of a machine and a directory before anything is mounted there."""

import os
import shutil
from pathlib import Path

import pytest

from fuse_mount import mounting
from fuse_mount.mounting import MountRefused, check_machine, claim, mounted_at


def test_what_is_mounted_where_is_read_from_the_kernel(tmp_path: Path) -> None:
    proc = mounted_at("/proc")
    assert proc is not None
    assert proc.kind == "proc"
    assert mounted_at(str(tmp_path)) is None


def test_the_kernels_way_to_write_spaces_is_understood() -> None:
    assert mounting._unescaped(rb"/a\040b\011c\012d\134e\0405") == b"/a b\tc\nd\\e 5"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nothing", "there is no directory"),
        ("file", "is no directory"),
        ("full", "isn't empty"),
        ("file/below", "is no directory"),
    ],
)
def test_a_directory_that_can_not_be_mounted_on_is_refused_by_its_name(
    tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(MountRefused, match=said) as refused:
        claim(str(tmp_path / place))
    assert str(tmp_path / place) in str(refused.value)


def test_another_file_system_is_not_covered() -> None:
    with pytest.raises(MountRefused, match=r"\(proc\) is mounted on /proc"):
        claim("/proc")


def test_a_directory_is_claimed_without_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert claim(str(tmp_path / "link")) == str(tmp_path / "real")


def test_a_machine_without_fuse_is_told_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(MountRefused, match="modprobe fuse"):
        check_machine(others=False)
    (tmp_path / "fuse").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MountRefused, match="package fuse3"):
        check_machine(others=False)


@pytest.mark.parametrize(
    ("configuration", "allowed"),
    [
        ("user_allow_other\n", True),
        ("  user_allow_other \n", True),
        ("#user_allow_other\n", False),
        (None, False),
    ],
)
def test_users_may_let_others_in_where_the_administrator_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str | None, allowed: bool
) -> None:
    (tmp_path / "fuse").touch()
    if configuration is not None:
        (tmp_path / "fuse.conf").write_text(configuration)
    monkeypatch.setattr(mounting, "DEVICE", str(tmp_path / "fuse"))
    monkeypatch.setattr(mounting, "FUSE_CONFIGURATION", str(tmp_path / "fuse.conf"))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fusermount3")
    check_machine(others=True)  # root may in any case
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_machine(others=False)
    if allowed:
        check_machine(others=True)
    else:
        with pytest.raises(MountRefused, match="user_allow_other"):
            check_machine(others=True)
