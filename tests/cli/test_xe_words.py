import json
import subprocess
from pathlib import Path

import pytest

from gateway.cli.main import application
from gateway.cli.output import UsageError
from gateway.cli.words import translated
from tests.conftest import RunningGateway, clean_environment, program


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("vdi-create name-label=x virtual-size=1GiB", "vdi-create --name-label=x --virtual-size=1GiB"),
        ("vdi-create name_label=a=b 1GiB", "vdi-create --name-label=a=b 1GiB"),
        ("vdi-create x 1GiB --description a=b", "vdi-create x 1GiB --description a=b"),
        ("vdi-create x 1GiB json=true", "vdi-create x 1GiB --json"),
        ("vdi-create x 1GiB json=false", "vdi-create x 1GiB"),
        ("vdi-import uuid=u filename=-", "vdi-import --uuid=u --filename=-"),
        ("vdi-import u -", "vdi-import u --filename=-"),
        ("vdi-import u ./a=b", "vdi-import u ./a=b"),
        ("vdi-import u -- a=b", "vdi-import u -- a=b"),
        ("vdi-list sr-uuid=s params=uuid", "vdi-list sr-uuid=s --params=uuid"),
        ("vdi-param-set u read-only=false", "vdi-param-set u --read-only=false"),
        ("vdi-param-set uuid=u other-config:k=v=w", "vdi-param-set --uuid=u --other-config=k=v=w"),
    ],
)
def test_words_become_options(given: str, meant: str) -> None:
    assert translated(application(), given.split()) == meant.split()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("vdi-create nam-label=x 1GiB", "'nam-label' (did you mean name-label=?)"),
        ("vdi-import u a=b", "'a'; the keys are "),
        ("vdi-import u quiet=perhaps", "quiet: 'perhaps'"),
    ],
)
def test_a_word_that_is_unknown_is_named(given: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        translated(application(), given.split())
    assert words in str(raised.value)


def test_filters_fields_and_minimal_output_are_as_in_xe(house: RunningGateway) -> None:
    uuids = {
        name: house.run("vdi-create", f"name-label={name}", "virtual-size=2MiB").stdout.strip()
        for name in ("one", "two")
    }
    done = house.run("vdi-list", "--minimal")
    assert sorted(done.stdout.strip().split(",")) == sorted(uuids.values())
    done = house.run("vdi-list", "name-label=two", "params=uuid,virtual-size,read-only")
    assert done.stdout == f"uuid\tvirtual-size\tread-only\n{uuids['two']}\t2097152\tfalse\n"
    done = house.run("vdi-list", "--minimal", "params=name-label", "sr-name-label=disks")
    assert done.stdout == "one,two\n"
    assert house.run("vdi-list", "--minimal", "name-label=none").stdout == "\n"
    found = json.loads(house.run("vdi-list", "--json", "params=uuid,sm-config", "name-label=one").stdout)
    assert [disk["uuid"] for disk in found] == [uuids["one"]]
    for arguments, words in (
        (("name-lable=x",), "'name-lable'"),
        (("params=uid",), "'uid'"),
        (("--minimal", "params=uuid,type"), "one field"),
        (("something",), "'something'"),
    ):
        done = house.run("vdi-list", *arguments)
        assert (done.returncode, done.stdout, words in done.stderr) == (2, "", True), done


def test_a_disks_parameters_are_set_and_its_keys_removed(house: RunningGateway) -> None:
    uuid = house.run("vdi-create", "plain", "2MiB").stdout.strip()
    arguments = (
        f"uuid={uuid}",
        "name-label=a name",
        "other-config:owner=me",
        "other-config:x.y=z",
        "tags=a,b",
    )
    assert house.run("vdi-param-set", *arguments).returncode == 0
    shown = house.run("vdi-list", f"uuid={uuid}", "params=name-label,other-config,tags").stdout
    assert shown.splitlines()[1] == "a name\towner: me; x.y: z\ta; b"
    assert house.run("vdi-param-set", "a name", "other-config:owner=").returncode == 0
    assert house.run("vdi-list", f"uuid={uuid}", "--minimal", "params=other-config").stdout == "x.y: z\n"
    for value in ("true", "false"):
        assert house.run("vdi-param-set", uuid, f"read-only={value}").returncode == 0
        shown = house.run("vdi-list", f"uuid={uuid}", "--minimal", "params=read-only").stdout
        assert shown == f"{value}\n"
    assert house.run("vdi-param-set", uuid).returncode == 2
    assert house.run("vdi-destroy", f"uuid={uuid}").returncode == 0
    assert house.run("vdi-destroy", f"uuid={uuid}").returncode == 1


def test_an_sr_is_made_scanned_and_forgotten_in_xes_words(house: RunningGateway, tmp_path: Path) -> None:
    done = house.run("sr-create", "name-label=more", "type=file", f"device-config:location={tmp_path}/more")
    assert done.returncode == 0, done
    uuid = done.stdout.strip()
    shown = house.run("sr-list", f"uuid={uuid}", "params=name-label,state,location").stdout
    assert shown.splitlines()[1] == f"more\tattached\t{tmp_path}/more"
    assert house.run("sr-scan", f"uuid={uuid}").returncode == 0
    assert house.run("sr-forget", "more").returncode == 0
    assert house.run("sr-list", "--minimal", f"uuid={uuid}").stdout == "\n"
    assert house.run("sr-attach", f"{tmp_path}/more", "--writable").stdout.strip() == uuid


def test_tasks_are_watched_and_cancelled(house: RunningGateway) -> None:
    task = house.call("task.create", "mine", "")
    uuid = house.call("task.get_uuid", task)
    environment = {**clean_environment(), "VDI_GATEWAY_STATE_DIR": str(house.state_dir)}
    command = [program(), "task-watch", task, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["status"] == "pending"
        assert house.run("task-cancel", f"uuid={uuid}").returncode == 0
        assert json.loads(watching.stdout.readline())["status"] == "cancelled"
    assert watching.returncode == 1
    assert "TASK_CANCELLED" in house.run("task-list", f"uuid={uuid}").stdout


def test_status_and_hosts_are_told(house: RunningGateway) -> None:
    found = json.loads(house.run("status", "--json").stdout)
    assert [sr["state"] for sr in found["srs"] if sr["name_label"] == "disks"] == ["attached"]
    assert house.run("host-list", "--minimal").stdout.strip() == house.call(
        "host.get_uuid", house.call("host.get_all")[0]
    )


def test_client_commands_and_their_errors_load_neither_trio_nor_the_database() -> None:
    modules = "connection door sr vdi task host user transfers upload download completion main"
    code = (
        f"import sys\nfrom gateway.cli import {', '.join(modules.split())}\n"
        "connection.error_text('VDI.destroy', 'HANDLE_INVALID', ['VDI', 'x'])\n"
        "print(*sorted({'trio', 'sqlalchemy', 'h11', 'structlog', 'cryptography', 'rich.progress'}"
        " & set(sys.modules)))\n"
    )
    python = Path(program()).parent / "python"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
