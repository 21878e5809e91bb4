import contextlib
import os
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme

from tests.cli.test_transfers import error
from tests.conftest import RunningGateway, clean_environment, program


def run(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Without a state directory and without a terminal."""
    return subprocess.run(
        [program(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
        cwd=cwd,
    )


def https(house: RunningGateway) -> tuple[str, ...]:
    return ("--url", house.https_url, "--password-file", str(house.state_dir / "admin-password"))


def write_config(configuration: Path, text: str, mode: int = 0o600) -> Path:
    configuration.mkdir(parents=True, exist_ok=True)
    path = configuration / "client.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_certificate_is_remembered_when_it_is_first_seen(
    house: RunningGateway, configuration: Path
) -> None:
    place = house.https_url.rpartition("/")[2]
    first = run("vdi-list", *https(house))
    assert (first.returncode, f"the certificate of {place} (sha256:" in first.stderr) == (0, True), first
    known = configuration / "known_hosts"
    assert known.stat().st_mode & 0o777 == 0o600
    assert known.read_text().startswith(f"{place} sha256:")
    second = run("vdi-list", *https(house))
    assert (second.returncode, second.stderr) == (0, "")


def test_another_certificate_is_refused_before_anything_is_sent(
    house: RunningGateway, configuration: Path
) -> None:
    place = house.https_url.rpartition("/")[2]
    configuration.mkdir(parents=True)
    known = configuration / "known_hosts"
    known.write_text(f"elsewhere:1 sha256:00\n{place} sha256:{'ab' * 32}\n")
    before = house.log().count("logged in")
    done = run("vdi-list", *https(house))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"remove the line {place} from {known}" in done.stderr
    assert house.log().count("logged in") == before
    known.write_text("elsewhere:1 sha256:00\n")
    assert run("vdi-list", *https(house)).returncode == 0
    assert known.read_text().startswith(f"elsewhere:1 sha256:00\n{place} sha256:")


def test_an_authority_takes_the_place_of_remembering(house: RunningGateway, configuration: Path) -> None:
    done = run("vdi-list", *https(house), "--ca-file", str(house.ca_file))
    assert (done.returncode, done.stderr) == (0, "")
    assert not configuration.exists()
    other = run("vdi-list", *https(house), "--ca-file", "/etc/ssl/certs/ca-certificates.crt")
    assert (other.returncode, "isn't trusted" in other.stderr) == (1, True), other


def test_the_config_file_names_gateway_user_and_password(
    house: RunningGateway, configuration: Path, tmp_path: Path
) -> None:
    write_config(configuration, f'url = "{house.url}"\npassword = "{house.password}"\n')
    assert run("vdi-list", cwd=tmp_path).returncode == 0
    (configuration / "pw").write_text(house.password + "\n")
    write_config(configuration, f'url = "{house.url}"\nuser = "root"\npassword-file = "pw"\n')
    assert run("vdi-list", cwd=tmp_path).returncode == 0


def test_the_password_of_the_config_file_goes_to_its_own_gateway_only(
    house: RunningGateway, configuration: Path
) -> None:
    write_config(configuration, f'url = "https://elsewhere.invalid"\npassword = "{house.password}"\n')
    done = run("vdi-list", "--url", house.url)
    assert (done.returncode, "--password-file" in done.stderr) == (2, True), done
    write_config(configuration, f'url = "{house.url}"\npassword = "{house.password}"\n')
    done = run("vdi-list", "--user", "another")
    assert (done.returncode, "--password-file" in done.stderr) == (2, True), done


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ('password = "x"', 0o640, "chmod 600"),
        ('pasword = "x"', 0o600, "'pasword'"),
        ("password = 5", 0o600, "password must be text"),
        ('password = "x"\npassword-file = "y"', 0o600, "keep one of them"),
        ("this is no toml", 0o600, "is no TOML"),
        ("url = " + "[" * 5000, 0o600, "nested too deeply"),
        ("# " + "x" * (1 << 20), 0o600, "larger than 1048576 bytes"),
        ('url = "gateway.example"', 0o600, "https://host:8443"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused_by_its_path(
    configuration: Path, tmp_path: Path, text: str, mode: int, words: str
) -> None:
    path = write_config(configuration, text, mode)
    done = run("vdi-list", cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert str(path) in done.stderr or "--url" in done.stderr


def test_on_this_machine_no_password_is_needed(house: RunningGateway) -> None:
    secret = house.state_dir / "admin-password"
    hidden = secret.with_name("hidden")
    os.rename(secret, hidden)
    try:
        assert house.run("vdi-list").returncode == 0
        assert "the socket" in house.run("status").stdout
    finally:
        os.rename(hidden, secret)


def test_a_user_may_do_what_the_role_allows(house: RunningGateway, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("first\n")
    assert house.run("user-add", "reader", "--new-password-file", str(tmp_path / "pw")).returncode == 0
    as_reader = ("--url", house.url, "--user", "reader", "--password-file", str(tmp_path / "pw"))
    assert run("vdi-list", *as_reader).returncode == 0
    refused = run("vdi-create", "x", "2MiB", "--sr", "disks", *as_reader)
    assert (refused.returncode, "RBAC_PERMISSION_DENIED" in refused.stderr) == (1, True), refused
    (tmp_path / "pw").write_text("second\n")
    assert run("vdi-list", *as_reader).returncode == 1
    done = house.run("user-passwd", "reader", "--new-password-file", str(tmp_path / "pw"))
    assert done.returncode == 0, done
    assert run("vdi-list", *as_reader).returncode == 0
    assert house.run("user-disable", "reader").returncode == 0
    assert run("vdi-list", *as_reader).returncode == 1
    assert house.run("user-list", "--minimal", "params=name", "disabled=true").stdout == "reader\n"
    assert house.run("user-disable", "reader", "--enable").returncode == 0
    assert "root" in house.run("session-list", "params=auth-user-name").stdout


def test_the_wrong_one_of_http_and_https_is_told(house: RunningGateway) -> None:
    password = ("--password-file", str(house.state_dir / "admin-password"))
    plain = run("vdi-list", "--url", house.https_url.replace("https:", "http:"), *password)
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (1, "", 1)
    assert plain.stderr.endswith("; is it running, and is it not https://?\n")
    encrypted = run("vdi-list", "--url", house.url.replace("http:", "https:"), *password)
    assert (encrypted.returncode, encrypted.stdout, encrypted.stderr.count("\n")) == (1, "", 1)
    assert "doesn't speak HTTPS" in encrypted.stderr


def test_a_certificate_that_has_expired_is_told_with_what_helps(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1, tzinfo=UTC)).configure_cert(serving)
    (tmp_path / "password").write_text("x\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connected, _ = listener.accept()
            with connected, contextlib.suppress(OSError):
                serving.wrap_socket(connected, server_side=True)

        serving_it = threading.Thread(target=serve, daemon=True)
        serving_it.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        done = run(
            *("vdi-list", "--url", url, "--ca-file", str(tmp_path / "ca.pem")),
            *("--password-file", str(tmp_path / "password")),
        )
        serving_it.join(30)
    assert "(certificate has expired); give the gateway a new one" in error(done)
