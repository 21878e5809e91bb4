import json
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing

from gateway.access.client import open_vdi
from tests.cli.test_transfers import error
from tests.conftest import RunningGateway, clean_environment, program


def make(house: RunningGateway, name: str) -> str:
    """A disk whose snapshot has gone while nothing could be merged."""
    assert house.run("sr-coalesce", "disks", "--pause").returncode == 0
    disk = house.run("vdi-create", name, "4MiB").stdout.strip()
    with closing(open_vdi(str(house.state_dir / "access.sock"), disk, write=True)) as opened:
        opened.pwrite(b"1" * 4096, 0)
    house.run("vdi-snapshot", disk, "--name", f"{name} kept")
    assert house.run("vdi-destroy", f"{name} kept").returncode == 0
    return disk


def nodes_of(house: RunningGateway, disk: str) -> list[dict[str, object]]:
    nodes: list[dict[str, object]] = json.loads(house.run("vdi-chain", disk, "--json").stdout)
    return nodes


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_paused_sr_stays_as_it_is_and_says_so(house: RunningGateway) -> None:
    disk = make(house, "paused")
    shown = house.run("vdi-chain", disk)
    assert "coalescing is paused" in shown.stderr
    assert len(shown.stdout.splitlines()) == 2
    assert "coalescing is paused" in error(house.run("sr-coalesce", "disks"))
    assert house.run("sr-coalesce", "disks", "--resume").returncode == 0
    assert house.run("sr-coalesce", "disks").returncode == 0
    assert [node["uuid"] for node in nodes_of(house, disk)] == [disk]
    assert house.run("vdi-chain", disk).stderr == ""
    both = house.run("sr-coalesce", "disks", "--pause", "--resume")
    assert (both.returncode, "give one of them" in both.stderr) == (2, True)


def test_it_says_for_whom_a_merge_waits_and_what_was_merged(house: RunningGateway) -> None:
    disk = make(house, "held")
    (base,) = [node["uuid"] for node in nodes_of(house, disk) if node["depth"] == 1]
    with closing(open_vdi(str(house.state_dir / "access.sock"), disk, purpose="a test")):
        assert house.run("sr-coalesce", "disks", "--resume").returncode == 0
        done = house.run("sr-coalesce", "disks")
        assert done.returncode == 3, done.stderr
        assert f"{disk} will be merged into {base}, waits for read by root (a test, process" in done.stdout
        until(lambda: " since 20" in str(nodes_of(house, disk)[1]["coalesce"]))
        line = house.run("vdi-chain", disk).stdout.splitlines()[1]
        assert "waits for read by root (a test" in line
        tasks = json.loads(house.run("task-list", "--json", "status=pending").stdout)
        (task,) = [task for task in tasks if task["name_label"] == "coalesce"]
        assert task["other_config"]["blocked-by"].startswith("read by root (a test")
        assert json.loads(house.run("sr-coalesce", "disks", "--json").stdout)["waits"] is True
    until(lambda: len(nodes_of(house, disk)) == 1)


def test_what_it_merged_and_what_failed_is_listed(house: RunningGateway) -> None:
    disk = make(house, "listed")
    (base,) = [node["uuid"] for node in nodes_of(house, disk) if node["depth"] == 1]
    with closing(open_vdi(str(house.state_dir / "access.sock"), disk)):
        house.run("sr-coalesce", "disks", "--resume")
        house.run("sr-coalesce", "disks")
    done = house.run("sr-coalesce", "disks", "--json")
    assert done.returncode == 0, done.stderr
    merged = json.loads(done.stdout)["merged"]
    assert merged in ([], [{"vdi": disk, "into": base}])
    assert [node["uuid"] for node in nodes_of(house, disk)] == [disk]


def test_ctrl_c_ends_the_waiting_for_merges_and_says_that_they_go_on(house: RunningGateway) -> None:
    def write(number: int) -> None:
        with closing(open_vdi(control, disk, write=True)) as opened:
            opened.pwrite(bytes([number]) * 4096, 0)

    control = str(house.state_dir / "access.sock")
    assert house.run("sr-coalesce", "disks", "--pause").returncode == 0
    disk = house.run("vdi-create", "tall", "4MiB").stdout.strip()
    taken = []
    for number in range(24):
        write(number)
        taken.append(house.call("VDI.snapshot", house.call("VDI.get_by_uuid", disk), {}))
    house.call("VDI.destroy", taken[3])
    other = house.run("vdi-create", "other", "4MiB").stdout.strip()
    with closing(open_vdi(control, disk)):
        assert house.run("sr-coalesce", "disks", "--resume").returncode == 0

        def goes_first() -> bool:
            # It tries again when any lease ends; then it goes before those who come, and waits for minutes.
            open_vdi(control, other).close()
            return "coalescing goes first" in house.log()

        until(goes_first)
        process = subprocess.Popen(
            [program(), "sr-coalesce", "disks"],
            env={**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: bool(house.call("task.get_by_name_label", "Async.SR.coalesce")))
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        going_on, interrupted = said.splitlines()
        assert going_on.startswith("the gateway goes on merging; vdi-gateway sr-coalesce ")
        assert interrupted == "interrupted"
        assert house.call("task.get_by_name_label", "Async.SR.coalesce") == []
        assert len(nodes_of(house, disk)) == 48
    until(lambda: len(nodes_of(house, disk)) == 47)
