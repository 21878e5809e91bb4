"""What a URL may be, what is shown of it, and which addresses are connected to."""

import ipaddress

import pytest

from gateway.transfers.pull_source import ImageURL, PullRules, WrongURL, source


@pytest.mark.parametrize(
    ("text", "host", "port", "target", "shown"),
    [
        ("http://a.example", "a.example", 80, "/", "http://a.example/"),
        ("HTTPS://A.Example:443/x", "a.example", 443, "/x", "https://a.example/x"),
        ("http://a:8080/x?k=v#part", "a", 8080, "/x?k=v", "http://a:8080/x?***"),
        ("https://[2001:DB8::1]:9/d", "2001:db8::1", 9, "/d", "https://[2001:db8::1]:9/d"),
        ("http://u:p%40w@a/b", "a", 80, "/b", "http://***@a/b"),
        ("http://a?x=1", "a", 80, "/?x=1", "http://a/?***"),
        ("http://a/" + "%20.qcow2", "a", 80, "/%20.qcow2", "http://a/%20.qcow2"),
    ],
)
def test_a_url_is_taken_apart_and_shown_without_its_secrets(
    text: str, host: str, port: int, target: str, shown: str
) -> None:
    url = ImageURL.parse(text)
    assert (url.host, url.port, url.target, str(url)) == (host, port, target, shown)


def test_user_and_password_become_a_header_and_are_in_no_text() -> None:
    url = ImageURL.parse("http://me:s%3Acret@a/b")
    assert url.authorization == "Basic bWU6czpjcmV0"
    assert "cret" not in f"{url} {url!r}"
    assert "bWU6" not in f"{url} {url!r}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b",
        "ftp://a/b",
        "file:///etc/passwd",
        "http:///b",
        "http://",
        "http://a b/",
        "http://a/\r\nX: y",
        "http://a\\@b/",
        "http://a@b@c/",
        "http://a:0/",
        "http://a:65536/",
        "http://a:x/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://[v1.a]/",
        "http://ä.example/",
        "http://a/" + "x" * 9000,
    ],
)
def test_what_two_programs_could_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(WrongURL):
        ImageURL.parse(text)


def test_a_redirection_keeps_the_password_on_the_same_server_alone() -> None:
    url = ImageURL.parse("https://u:p@a.example/one/two?q=1")
    for location, shown in (
        ("three", "https://***@a.example/one/three"),
        ("/four", "https://***@a.example/four"),
        ("//a.example/five", "https://***@a.example/five"),
        ("https://a.example:8443/six", "https://a.example:8443/six"),
        ("https://b.example/seven", "https://b.example/seven"),
        ("https://x:y@b.example/eight", "https://b.example/eight"),
    ):
        assert str(url.redirected(location)) == shown
    for location in ("http://a.example/", "ftp://a.example/", "https://a.example/ x", "https://[/"):
        with pytest.raises(WrongURL):
            url.redirected(location)


REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.8.8.8",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.168.0.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:10.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::a00:1",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:a00:1::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_public_is_refused_unless_its_network_is_named(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert PullRules().objection("a.example", address) is not None
    assert PullRules.of(["8.8.8.8", "a.test"]).objection("a.example", address) is not None
    assert PullRules.of([f"{text}/{address.max_prefixlen}"]).objection("a.example", address) is None


@pytest.mark.parametrize(
    "text", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"]
)
def test_what_is_public_is_not_asked_about(text: str) -> None:
    assert PullRules().objection("a.example", ipaddress.ip_address(text)) is None


def test_a_named_host_gets_private_addresses_and_no_others() -> None:
    rules = PullRules.of(["Images.Example"])
    for text in ("10.0.0.1", "192.168.7.7", "127.0.0.1", "100.64.0.1", "fd00::7", "::1"):
        assert rules.objection("images.example", ipaddress.ip_address(text)) is None
        assert rules.objection("other.example", ipaddress.ip_address(text)) is not None
    for text in (
        "169.254.169.254",
        "169.254.1.1",
        "fe80::1",
        "224.0.0.1",
        "100.100.100.200",
        "0.0.0.0",
        "::ffff:10.0.0.1",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "fd00:a9fe:a9fe::1",
        "64:ff9b::a00:1",
    ):
        assert rules.objection("images.example", ipaddress.ip_address(text)) is not None


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.256", "a b", "", "-a", "http://a", "a/b", "*.a"])
def test_what_is_neither_a_host_nor_a_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        source(text)
