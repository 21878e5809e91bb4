import errno
import os
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.config import lines_of
from gateway.config import ConfigError, Origins, Source
from gateway.core.limits import LIMITS, Limits, Unit
from gateway.options import OPTIONS, quantity_text
from gateway.transfers.pull_source import PullRules


def origins(directory: Path, text: str | None = None, **arguments: Any) -> Origins:
    """What stands in DIR/config.toml; the names of arguments have _ for the dot."""
    if text is not None:
        (directory / "config.toml").write_text(text)
    given = {name.replace("_", ".", 1): value for name, value in arguments.items()}
    return Origins(state_dir=str(directory), file=None, arguments=given)


def refusal(directory: Path, text: str, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        origins(directory, text, **arguments).read()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_without_a_file_and_arguments_everything_is_the_default(tmp_path: Path) -> None:
    config = origins(tmp_path).read()
    assert config.file is None
    assert config.http == (("127.0.0.1", 8080),)
    assert config.https == ()
    assert config.certificate is None
    limits = Limits()
    assert config.limits == {each.name: getattr(limits, each.name) for each in fields(Limits)}


def test_a_file_sets_addresses_log_and_every_kind_of_limit(tmp_path: Path) -> None:
    config = origins(
        tmp_path,
        """
        [listen]
        http = ["127.0.0.1:1", "[::1]:2"]
        https = ["0.0.0.0:3"]
        [log]
        level = "debug"
        [limits]
        lease_wait = "250ms"
        session_idle = "1.5h"
        header_size = "8 KiB"
        connections = 7
        """,
    ).read()
    assert config.http == (("127.0.0.1", 1), ("::1", 2))
    assert config.https == (("0.0.0.0", 3),)
    assert (config.log_level, config.log_format) == ("debug", "auto")
    values = config.limits
    assert (values["lease_wait"], values["session_idle"]) == (0.25, 5400.0)
    assert (values["header_bytes"], values["connections"]) == (8192, 7)


def test_an_argument_comes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    config = origins(
        tmp_path, '[log]\nlevel = "debug"\nformat = "json"\n', log_level="error", listen_http=None
    ).read()
    assert (config.log_level, config.log_format) == ("error", "json")
    sources = {path: config.settings[path].source for path in ("log.level", "log.format", "listen.http")}
    assert sources == {
        "log.level": Source.COMMAND_LINE,
        "log.format": Source.FILE,
        "listen.http": Source.DEFAULT,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listen = 3", ["listen: ", "[listen]"]),
        ("[network]\nx = 1", ["network: there is no such section"]),
        ("[limit]\nconnections = 1", ["limit: there is no such section", "perhaps limits was meant"]),
        ("[limits]\nconection = 1", ["limits.conection: there is no such key", "connections"]),
        ("[limits]\nheader_bytes = 1", ["limits.header_bytes: there is no such key"]),
        ("[limits]\nconnections = '7'", ["limits.connections: '7' is no whole number", "from 1 to 100000"]),
        ("[limits]\nconnections = true", ["limits.connections: true is no whole number"]),
        ("[limits]\nconnections = 0", ["limits.connections: 0 is out of range", "from 1 to 100000"]),
        ("[limits]\nheader_time = 15", ["limits.header_time: 15 is no time with a unit", '"10m"', "ms, s"]),
        ("[limits]\nheader_time = '15'", ["limits.header_time: '15' is no time with a unit"]),
        ("[limits]\nheader_time = '15min'", ["limits.header_time: '15min' is no time with a unit"]),
        ("[limits]\nheader_time = '-1s'", ["limits.header_time"]),
        ("[limits]\nheader_time = '999ms'", ["limits.header_time: '999ms' is out of range", '"1s" to "10m"']),
        ("[limits]\nheader_size = '64KB'", ["limits.header_size: '64KB' is no size", "KiB"]),
        ("[limits]\nheader_size = []", ["limits.header_size: an array is no size"]),
        ("[log]\nlevel = 'loud'", ["log.level: 'loud'", "debug, info, warning, error"]),
        ("[log]\nlevel = 3", ["log.level: 3"]),
        ("[listen]\nhttp = '127.0.0.1:1'", ["listen.http: '127.0.0.1:1' is no list"]),
        ("[listen]\nhttp = ['8080']", ["listen.http: '8080' is no HOST:PORT", "127.0.0.1:8080"]),
        ("[listen]\nhttp = [8080]", ["listen.http: an array is no list of texts"]),
        ("[listen]\nhttp = ['0.0.0.0:1']", ["listen.http: 0.0.0.0 is reached by other machines"]),
        ("[listen]\nhttp = []", ["listen.http and listen.https are both empty"]),
        ("[listen]\nnbd = '10809'", ["listen.nbd: '10809' is no HOST:PORT", '"off"']),
        ("[listen]\nnbd = ['127.0.0.1:10809']", ["listen.nbd: an array is no text"]),
        ("[nbd]\nuser = ''", ["nbd.user: '' is no name"]),
        ("[nbd]\nparallel = 1", ["nbd.parallel: 1 is neither true nor false"]),
        ("[limits]\nnbd_workers = 0", ["limits.nbd_workers: 0 is out of range"]),
        ("[listen]\ninsecure = 'yes'", ["listen.insecure: 'yes' is neither true nor false"]),
        ("[tls]\ncertificate = 'x.pem'", ["tls.key is missing"]),
        ("[tls]\nkey = 3", ["tls.key: 3 is no path"]),
        ("[pull]\nfrom = '10.0.0.0/8'", ["pull.from: '10.0.0.0/8' is no list of texts"]),
        ("[pull]\nfrom = ['10.0.0.1/8']", ["pull.from: '10.0.0.1/8' is no network", "host bits set"]),
        ("[pull]\nfrom = ['http://a']", ["pull.from: 'http://a' is no network", "images.example"]),
        ("[pull]\nca = 'none.pem'", ["pull.ca: ", "none.pem can't be read; give a PEM file"]),
        ("[limits]\nconnections = \n", ["this is not TOML", "line 2"]),
        (f"[limits]\nconnections = {'[' * 5000}", ["this is not TOML"]),
        ("[limits]\nconnections = 1\nconnections = 2", ["this is not TOML"]),
        (f"[limits]\nconnections = {'1' * 5000}", ["this is not TOML"]),
        ("# " + "x" * (1 << 20), ["this is not TOML", "larger than 1048576 bytes"]),
    ],
)
def test_a_mistake_is_named_with_the_file_and_its_path(text: str, words: list[str], tmp_path: Path) -> None:
    told = refusal(tmp_path, text)
    if "both empty" not in told:
        assert told.startswith(f"{tmp_path / 'config.toml'}: ")
    for word in words:
        assert word in told


def test_a_mistake_in_an_argument_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--http: '1' is no HOST:PORT; give addresses") as refused:
        origins(tmp_path, listen_http=["1"]).read()
    assert refused.value.argument


def test_bytes_that_are_no_text_are_no_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"[log]\nlevel = '\xff'\n")
    with pytest.raises(ConfigError, match="this is not TOML"):
        origins(tmp_path).read()


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match=re.escape(f"{missing}: No such file or directory")):
        Origins(state_dir=str(tmp_path), file=missing, arguments={}).read()


def test_a_file_that_can_not_be_looked_for_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("os.lstat", refuse)
    with pytest.raises(ConfigError, match=r"config.toml can't be looked for: Permission denied; run this as"):
        Origins(state_dir=str(tmp_path), file=None, arguments={}).read()


def test_paths_in_the_file_start_at_its_directory(tmp_path: Path) -> None:
    for name in ("site.pem", "site-key.pem"):
        (tmp_path / name).touch()
    config = origins(
        tmp_path,
        "[listen]\nhttps = ['127.0.0.1:0']\n[tls]\ncertificate = 'site.pem'\nkey = 'site-key.pem'\n",
    ).read()
    assert config.certificate == (str(tmp_path / "site.pem"), str(tmp_path / "site-key.pem"))


def test_what_images_are_fetched_from_is_told_by_names_and_networks(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    config = origins(tmp_path, "[pull]\nfrom = ['Images.Test', '10.0.0.0/8', '::1']\nca = 'ca.pem'\n").read()
    rules = config.pull_rules
    assert rules.hosts == {"images.test"}
    assert [str(network) for network in rules.networks] == ["10.0.0.0/8", "::1/128"]
    assert rules.authorities == str(tmp_path / "ca.pem")
    assert origins(tmp_path, "").read().pull_rules == PullRules()


def test_what_is_shown_can_be_read_back_to_the_same_configuration(tmp_path: Path) -> None:
    first = origins(
        tmp_path,
        '[listen]\nhttp = ["[::1]:0"]\n[limits]\nlease_wait = "1.5s"\nsession_idle = "90m"\n',
        log_level="warning",
    ).read()
    shown = "\n".join(lines_of(first))
    again = origins(tmp_path, shown).read()
    assert {path: each.value for path, each in again.settings.items()} == {
        path: each.value for path, each in first.settings.items()
    }
    document = tomllib.loads(shown)
    assert {f"{section}.{key}" for section, keys in document.items() for key in keys} == {
        each.path for each in OPTIONS
    }


def test_each_shown_value_has_its_source_and_each_default_its_reason(tmp_path: Path) -> None:
    config = origins(tmp_path, "[limits]\nconnections = 7\n", log_level="warning").read()
    shown = "\n".join(lines_of(config))
    assert "connections = 7  # file; the default is 512\n" in shown
    assert 'level = "warning"  # command line; the default is "info"\n' in shown
    assert "transfers = 16  # default\n" in shown
    unwrapped = shown.replace("\n# ", " ").lower()
    for option in OPTIONS:
        assert option.reason.lower() in unwrapped


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_each_limit_has_a_reason_and_a_default_within_its_range(limit: Any) -> None:
    assert len(limit.reason) > 10
    assert limit.least <= limit.default <= limit.most
    assert (type(limit.default) is int) == (limit.unit is not Unit.SECONDS)


def test_keys_are_unique() -> None:
    assert len({each.path for each in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        (Unit.SECONDS, 0.0, "0s"),
        (Unit.SECONDS, 0.25, "250ms"),
        (Unit.SECONDS, 1.2345678, "1.2345678s"),
        (Unit.SECONDS, 90.0, "90s"),
        (Unit.SECONDS, 86400.0, "1d"),
        (Unit.BYTES, 0, "0B"),
        (Unit.BYTES, 1000, "1000B"),
        (Unit.BYTES, 64 << 10, "64KiB"),
        (Unit.NUMBER, 512, 512),
    ],
)
def test_quantities_are_shown_in_the_largest_whole_unit(unit: Unit, value: float, text: str | int) -> None:
    assert quantity_text(unit, value) == text


@pytest.mark.parametrize(
    ("text", "where", "asked_for"),
    [
        ("", ("127.0.0.1", 10809), False),
        ('[listen]\nnbd = "off"', None, True),
        ('[listen]\nnbd = "[::1]:10809"', ("::1", 10809), True),
        ('[listen]\nnbd = "127.0.0.1:10809"', ("127.0.0.1", 10809), True),
    ],
)
def test_nbd_is_served_on_its_usual_port_unless_told_otherwise(
    tmp_path: Path, text: str, where: tuple[str, int] | None, asked_for: bool
) -> None:
    config = origins(tmp_path, text).read()
    assert (config.nbd, config.nbd_asked_for) == (where, asked_for)
    shown = "\n".join(lines_of(config))
    assert origins(tmp_path, shown).read().nbd == where
