"""Real shells complete the command line: Tab is typed at them, and a function in the place of `vdi-gateway`
shows what it is given."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.cli.main import COMMANDS
from tests.cli.terminal import Terminal
from tests.conftest import program

SHELLS = ("bash", "zsh", "fish")
SHOW = 'vdi-gateway() { printf "<%s>" "$@"; echo .; }\n'
INPUTRC = "set show-all-if-ambiguous on\nset completion-query-items 0\nset page-completions off\n"
ZSHRC = """
PS1='ready> '
LISTMAX=1000
fpath=("$ZDOTDIR" $fpath)
autoload -Uz compinit && compinit -u
"""


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """What `vdi-gateway completion` prints, by shell."""
    printed = {}
    for shell in SHELLS:
        done = subprocess.run([program(), "completion", shell], capture_output=True, text=True, check=True)
        printed[shell] = done.stdout
    return printed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, scripts: dict[str, str]) -> Path:
    """A home where the scripts are installed, and a directory in it with a few files to be named."""
    home = tmp_path_factory.mktemp("home")
    for name, content in (
        (".inputrc", INPUTRC),
        (".bashrc", f"PS1='ready> '\nsource ~/script.bash\n{SHOW}"),
        ("script.bash", scripts["bash"]),
        (".zshenv", ""),
        (".zshrc", ZSHRC + SHOW),
        ("_vdi-gateway", scripts["zsh"]),
        (".config/fish/completions/vdi-gateway.fish", scripts["fish"]),
        ("files/two words.raw", ""),
        ("files/images/inner.vhd", ""),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    return home


@pytest.fixture
def home(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("HOME", ""), ("ZDOTDIR", ""), ("INPUTRC", ".inputrc")):
        monkeypatch.setenv(name, str(installed / value))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "BASH_ENV"):
        monkeypatch.delenv(name, raising=False)
    # fish completes only what can be run.
    monkeypatch.setenv("PATH", f"{Path(program()).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(installed / "files")
    return installed


def shell_command(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed; scripts/setup --tests brings it")
    return path


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ("vdi-imp\t", "<vdi-import>"),
        ("vdi-import --prog\tj\t", "<vdi-import><--progress><json>"),
        ("vdi-import --progress=j\t", "<vdi-import><--progress=json>"),
        ("completion z\t", "<completion><zsh>"),
        ("vdi-import some two\t", "<vdi-import><some><two words.raw>"),
        ("vhd-check im\tin\t", "<vhd-check><images/inner.vhd>"),
        ("vdi-list --state-d\tim\tin\t", "<vdi-list><--state-dir><images/inner.vhd>"),
    ],
)
def test_tab_completes_what_is_unique(home: Path, shell: str, keys: str, given: str) -> None:
    with Terminal("-i", command=shell_command(shell)) as terminal:
        terminal.wait_for("ready> ")
        terminal.type(f"vdi-gateway {keys}\n")
        assert terminal.wait_for(r"(<.*>)\.")[1] == given


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_lists_commands_and_options(home: Path, shell: str) -> None:
    with Terminal("-i", command=shell_command(shell)) as terminal:
        terminal.wait_for("ready> ")
        terminal.type("vdi-gateway vdi-\t")
        terminal.wait_for(r"(?s)vdi-chain\b.*vdi-export\b.*vdi-snapshot\b")
        terminal.type("import --\t")
        terminal.wait_for(r"(?s)--ca-file\b.*--progress\b.*--quiet\b")
    assert "sr-list" not in terminal.text
    assert "--writable" not in terminal.text


def test_zsh_takes_the_script_by_source_too(
    home: Path, scripts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script").write_text(scripts["zsh"])
    (tmp_path / ".zshrc").write_text(f"{ZSHRC}source $ZDOTDIR/script\n{SHOW}")
    monkeypatch.setenv("ZDOTDIR", str(tmp_path))
    with Terminal("-i", command=shell_command("zsh")) as terminal:
        terminal.wait_for("ready> ")
        terminal.type("vdi-gateway vdi-imp\t--qui\t\n")
        assert terminal.wait_for(r"(<.*>)\.")[1] == "<vdi-import><--quiet>"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vdi-im", {"vdi-import"}),
        ("sr-", {name for name in COMMANDS if name.startswith("sr-")}),
        ("vdi-import --pro", {"--progress"}),
        ("vdi-import --progress ", {"auto", "bar", "json", "none"}),
        ("vdi-import --progress=j", {"--progress=json"}),
        ("completion ", set(SHELLS)),
        ("vdi-import some two", {"two words.raw"}),
        ("vhd-check images/", {"images/inner.vhd"}),
        ("vdi-list --state-dir im", {"images/"}),
    ],
)
def test_fish_offers_what_fits(home: Path, line: str, offered: set[str]) -> None:
    command = [shell_command("fish"), "-c", 'complete -C "$argv"', f"vdi-gateway {line}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert {each.partition("\t")[0] for each in done.stdout.splitlines()} == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command(scripts: dict[str, str], shell: str) -> None:
    assert [name for name in COMMANDS if name not in scripts[shell]] == []
