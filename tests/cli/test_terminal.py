import fcntl
import os
import re
from pathlib import Path

from tests.cli.slow_proxy import Proxy
from tests.cli.terminal import Terminal
from tests.conftest import RunningGateway

MIB = 1 << 20


def made(house: RunningGateway, name: str, size: str = "64MiB") -> str:
    done = house.command("vdi-create", name, size)
    assert done.returncode == 0, done
    return done.stdout.strip()


def test_a_list_is_a_table_with_aligned_columns(house: RunningGateway) -> None:
    uuids = [made(house, name, "2MiB") for name in ("table-a", "a longer name for the table")]
    with Terminal("vdi-list", "sr-name-label=disks", state_dir=house.state_dir, width=120) as terminal:
        assert terminal.exit_code() == 0
    lines = terminal.text.splitlines()
    assert "\t" not in terminal.text
    assert "\x1b[1m" in terminal.raw  # the heading is bold
    rows = [line for line in lines if any(uuid in line for uuid in uuids)]
    assert len(rows) == 2
    assert {row.index("2 MiB") for row in rows} == {lines[0].index("Size")}


def test_a_narrow_terminal_keeps_every_uuid_whole_or_folded_but_never_cut(house: RunningGateway) -> None:
    uuid = made(house, "narrow", "2MiB")
    with Terminal("vdi-list", "name-label=narrow", state_dir=house.state_dir, width=60) as terminal:
        assert terminal.exit_code() == 0
    first = [line.split(" ")[0] for line in terminal.text.splitlines()[1:]]
    assert "".join(first) == uuid
    assert "…" not in terminal.text


def test_an_import_shows_a_bar_with_sizes_rate_and_time(house: RunningGateway, tmp_path: Path) -> None:
    uuid = made(house, "bar")
    source = tmp_path / "disk.raw"
    with source.open("wb") as file:
        file.write(os.urandom(8 * MIB))
        file.truncate(64 * MIB)
    with Terminal("vdi-import", uuid, str(source), state_dir=house.state_dir) as terminal:
        assert terminal.exit_code() == 0
    last = re.split(r"[\r\n]+", terminal.text.strip())[-1]
    assert re.search(r"100% ━+ 64 MiB of 64 MiB, data 8 MiB, [\d.]+ [KMG]iB/s in 0:0\d", last), terminal.text
    assert "\x1b[?25h" in terminal.raw  # the cursor is back


def test_ctrl_c_cancels_the_import_on_the_gateway(house: RunningGateway, tmp_path: Path) -> None:
    uuid = made(house, "stopped")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    holder = os.open(pipe, os.O_RDWR)
    try:
        with Terminal("vdi-import", uuid, str(pipe), state_dir=house.state_dir) as terminal:
            # What has been sent shows that the gateway takes it; the bar by itself doesn't.
            fcntl.fcntl(holder, fcntl.F_SETPIPE_SZ, 1 << 20)
            os.write(holder, b"x" * (1 << 20))
            terminal.wait_for(r"1 MiB of 64 MiB")
            terminal.type("\x03")
            assert terminal.exit_code() == 130
    finally:
        os.close(holder)
    assert "Traceback" not in terminal.text
    assert "\x1b[?25h" in terminal.raw
    text = house.command("task-list", "params=status,name-description").stdout
    assert re.search(rf"cancelled\timport of .* into {uuid}", text), text


def test_ctrl_c_during_an_export_keeps_what_came_and_says_so(house: RunningGateway, tmp_path: Path) -> None:
    uuid = made(house, "kept")
    (tmp_path / "source").write_bytes(b"\x5a" * 64 * MIB)
    assert house.command("vdi-import", uuid, str(tmp_path / "source")).returncode == 0
    target = tmp_path / "out.raw"
    arguments = ("vdi-export", uuid, str(target), "--password-file", str(house.state_dir / "admin-password"))
    with Proxy(house.url, hold_after=20 * MIB) as proxy:
        with Terminal(*arguments, "--url", proxy.url) as terminal:
            proxy.held.wait(30)
            terminal.wait_for(r"\d\d%")
            terminal.type("\x03")
            assert terminal.exit_code() == 130
    said = " ".join(terminal.text.split())
    kept = re.search(r"interrupted; (\d+) bytes are kept in", said)
    assert kept is not None, terminal.text
    assert not target.exists()
    assert 0 < int(kept[1]) < 64 * MIB
    done = house.command("vdi-export", uuid, str(target))
    assert (done.returncode, f"at {kept[1]} bytes" in done.stderr) == (0, True), done
    assert target.read_bytes() == (tmp_path / "source").read_bytes()


def test_the_password_is_asked_for_and_not_shown(house: RunningGateway) -> None:
    with Terminal("vdi-list", "--url", house.url) as terminal:
        terminal.wait_for("Password of root at ")
        terminal.type(house.password + "\n")
        assert terminal.exit_code() == 0
    assert house.password not in terminal.raw


def test_a_new_user_gets_the_password_that_was_typed_twice(house: RunningGateway, tmp_path: Path) -> None:
    with Terminal("user-add", "typed", "--role", "vm-admin", state_dir=house.state_dir) as terminal:
        terminal.wait_for("New password of typed: ")
        terminal.type("a password\n")
        terminal.wait_for("Once more: ")
        terminal.type("another\n")
        assert terminal.exit_code() == 1
        assert "the passwords differ" in terminal.text
    with Terminal("user-add", "typed", "--role", "vm-admin", state_dir=house.state_dir) as terminal:
        terminal.wait_for("New password of typed: ")
        terminal.type("a password\n")
        terminal.wait_for("Once more: ")
        terminal.type("a password\n")
        assert terminal.exit_code() == 0
    (tmp_path / "pw").write_text("a password\n")
    remote = ("--url", house.url, "--user", "typed", "--password-file", str(tmp_path / "pw"))
    assert house.command("vdi-list", *remote).returncode == 0
    assert house.command("user-disable", "typed").returncode == 0
    refused = house.command("vdi-list", *remote)
    assert (refused.returncode, "SESSION_AUTHENTICATION_FAILED" in refused.stderr) == (1, True)
