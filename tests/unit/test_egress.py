"""Which URLs and addresses of strangers requests may go to."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

import httpx
import pytest
import yarl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promptfleet import BlockedAddressError, InvalidRequestError
from promptfleet_shared.egress import (
    DENIED_IPV4,
    DENIED_IPV6,
    CheckedUrl,
    check_base_url,
    check_url,
    is_loopback,
    is_public,
)

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "100.63.255.255",
    "100.128.0.0",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2606:4700:4700::1111",
    "2a00:1450:4001:81b::200e",
]
PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.0.192",
    "192.0.2.1",
    "192.31.196.1",
    "192.52.193.1",
    "192.88.99.1",
    "192.168.1.1",
    "192.175.48.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::8.8.8.8",
    "::ffff:8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::8.8.8.8",
    "64:ff9b::a00:1",
    "64:ff9b:1::1",
    "64:ff9b:1:fffe::10.0.0.1",
    "100::1",
    "100:0:0:1::1",
    "2001::1",
    "2001:0:53aa:64c:0:fbff:f5ff:fffe",
    "2001:2::1",
    "2001:3::1",
    "2001:4:112::1",
    "2001:10::1",
    "2001:20::1",
    "2001:30::1",
    "2001:1ff:ffff::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",
    "2620:4f:8000::1",
    "2a00:1450::5efe:10.0.0.1",
    "2a00:1450::200:5efe:10.0.0.1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "febf::1",
    "fec0::1",
    "feff::1",
    "ff02::1",
    "ff0e::1",
]
NO_ADDRESS = [
    "",
    "localhost",
    "example.com",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "8.8.8.08",
    "8.8.8.8 ",
    "8.8.8.8/32",
    "[2606:4700:4700::1111]",
    "fe80::1%eth0",
    "2606:4700:4700::1111%1",
    "٨.٨.٨.٨",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_what_is_no_plain_address_is_not_public(address: str) -> None:
    assert not is_public(address)
    assert not is_loopback(address)


def test_a_zone_is_never_public_nor_loopback() -> None:
    assert not is_public(IPv6Address("2606:4700:4700::1111%eth0"))
    assert not is_loopback(IPv6Address("::1%eth0"))


def test_loopback_has_two_forms_and_no_third() -> None:
    assert all(is_loopback(address) for address in ("127.0.0.1", "127.9.9.9", "::1"))
    assert not any(is_loopback(a) for a in ("0.0.0.0", "::", "::ffff:127.0.0.1", "10.0.0.1"))


ipv4 = st.integers(0, 2**32 - 1).map(IPv4Address)
ipv6 = st.integers(0, 2**128 - 1).map(IPv6Address)
DENIED: list[IPv4Network | IPv6Network] = [*DENIED_IPV4, *DENIED_IPV6]
inside_denied = st.sampled_from(DENIED).flatmap(
    lambda network: st.integers(0, network.num_addresses - 1).map(lambda n: network[n])
)


@given(inside_denied)
@settings(deadline=None)
def test_no_address_inside_a_denied_network_is_public(address: IPv4Address | IPv6Address) -> None:
    assert not is_public(address)
    assert not is_public(str(address))


def test_both_ends_of_every_denied_network_are_denied() -> None:
    for network in DENIED:
        assert not is_public(network[0])
        assert not is_public(network[-1])


@given(st.one_of(ipv4, ipv6, st.integers(0x2 << 124, (0x4 << 124) - 1).map(IPv6Address)))
@settings(deadline=None)
def test_whatever_the_standard_library_denies_is_denied(
    address: IPv4Address | IPv6Address,
) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved


EMBEDDINGS: dict[str, Callable[[int], int]] = {
    "mapped": lambda v4: (0xFFFF << 32) | v4,
    "compatible": lambda v4: v4,
    "translated": lambda v4: (0xFFFF << 48) | v4,
    "NAT64": lambda v4: (0x64FF9B << 96) | v4,
    "NAT64 of one's own, /96": lambda v4: (0x64FF9B0001 << 80) | v4,
    "NAT64 of one's own, /48": lambda v4: (0x64FF9B0001 << 80) | (v4 >> 16 << 64) | (v4 & 0xFFFF),
    "6to4": lambda v4: (0x2002 << 112) | (v4 << 80) | 1,
    "Teredo's client": lambda v4: (0x20010000 << 96) | (0x5EF0E61A << 64) | (v4 ^ 0xFFFFFFFF),
    "Teredo's server": lambda v4: (0x20010000 << 96) | (v4 << 64) | 1,
    "ISATAP": lambda v4: (0x2A001450 << 96) | (0x5EFE << 32) | v4,
    "ISATAP, unique": lambda v4: (0x2A001450 << 96) | (0x02005EFE << 32) | v4,
}


@pytest.mark.parametrize("embed", EMBEDDINGS.values(), ids=EMBEDDINGS)
@given(v4=ipv4)
@settings(max_examples=30, deadline=None)
@example(v4=IPv4Address("127.0.0.1"))
@example(v4=IPv4Address("8.8.8.8"))
def test_an_ipv6_address_that_holds_an_ipv4_address_is_not_public(
    embed: Callable[[int], int], v4: IPv4Address
) -> None:
    assert not is_public(IPv6Address(embed(int(v4))))


# -- URLs ------------------------------------------------------------------------------------


def check(url: str, *, allow_loopback: bool = False) -> CheckedUrl:
    return check_url(url, field="callback_url", allow_loopback=allow_loopback)


@pytest.mark.parametrize(
    ("url", "normal", "host", "port"),
    [
        ("https://example.com", "https://example.com/", "example.com", 443),
        ("https://example.com/a?b=c", "https://example.com/a?b=c", "example.com", 443),
        ("https://example.com?b=/@:", "https://example.com/?b=/@:", "example.com", 443),
        ("HTTPS://Example.COM.:443/A", "https://example.com/A", "example.com", 443),
        ("https://example.com:8443/", "https://example.com:8443/", "example.com", 8443),
        ("https://a-b.xn--bcher-kva.de/", "https://a-b.xn--bcher-kva.de/", None, 443),
        ("https://1.example.com/", "https://1.example.com/", "1.example.com", 443),
        ("https://8.8.8.8:1/", "https://8.8.8.8:1/", "8.8.8.8", 1),
        (
            "https://[2606:4700:0:0::1]:65535",
            "https://[2606:4700::1]:65535/",
            "2606:4700::1",
            65535,
        ),
        ("https://example.com/a//b/../c", "https://example.com/a//b/../c", "example.com", 443),
        ("https://example.com/%2F?a[]=%5C", "https://example.com/%2F?a[]=%5C", "example.com", 443),
        (
            "https://example.com/".ljust(2048, "x"),
            "https://example.com/".ljust(2048, "x"),
            None,
            443,
        ),
        ("https://example.com/u@h:80", "https://example.com/u@h:80", "example.com", 443),
    ],
)
def test_urls_that_are_taken(url: str, normal: str, host: str | None, port: int) -> None:
    checked = check(url)
    assert (checked.url, checked.port, checked.scheme) == (normal, port, "https")
    assert host is None or checked.host == host
    assert not checked.is_loopback
    assert check(checked.url) == checked


INVALID = {
    "": "form",
    "example.com": "form",
    "//example.com/": "form",
    "https:/example.com": "form",
    "https:example.com": "form",
    "https://": "form",
    "https:///path": "form",
    "https://?q": "form",
    "http://example.com/": "scheme is not https",
    "ftp://example.com/": "scheme is not https",
    "file:///etc/passwd": "form",
    "javascript://example.com/": "scheme is not https",
    "https://user@example.com/": "user information",
    "https://user:secret@example.com/": "user information",
    "https://:@example.com/": "user information",
    "https://example.com@127.0.0.1/": "user information",
    "https://example.com/#f": "fragment",
    "https://example.com/#": "fragment",
    "https://example.com#@127.0.0.1/": "fragment",
    "https://example.com\\@127.0.0.1/": "user information",
    "https://example.com\\.evil.com/": "form",
    "https://127.0.0.1\\example.com/": "form",
    "https://exa mple.com/": "form",
    " https://example.com/": "form",
    "https://example.com/ ": "form",
    "https://example.com/\n": "form",
    "https://example.com/\r\nHost: x": "form",
    "https://exam\tple.com/": "form",
    "https://example.com\0/": "form",
    "https://example.com:/": "form",
    "https://example.com:0/": "form",
    "https://example.com:00443/": "form",
    "https://example.com:-1/": "form",
    "https://example.com:+1/": "form",
    "https://example.com:65536/": "port",
    "https://example.com:99999/": "port",
    "https://example.com:443:443/": "form",
    "https://ex%61mple.com/": "form",
    "https://%31%32%37.0.0.1/": "form",
    "https://example.com/%": "form",
    "https://example.com/%zz": "form",
    "https://example.com/<>": "form",
    "https://.example.com/": "DNS name",
    "https://example..com/": "DNS name",
    "https://example.com../": "DNS name",
    "https://./": "DNS name",
    "https://-a.example.com/": "DNS name",
    "https://a-.example.com/": "DNS name",
    "https://a_b.example.com/": "form",
    f"https://{'a' * 64}.com/": "DNS name",
    f"https://{'a.' * 126}aa/": "DNS name",
    f"https://{'a.' * 200}com/": "form",
    "https://intranet/": "full DNS name",
    "https://com./": "full DNS name",
    "https://bücher.de/": "xn--",
    "https://\uff45xample.com/": "xn--",
    "https://example。com/": "xn--",
    "https://①②⑦.⓪.⓪.①/": "xn--",
    "https://example\u017f.com/": "xn--",
    "https://\u212a.com/": "xn--",
    "https://example.com/ä": "xn--",
    "http\u017f://example.com/": "xn--",
    "https://2130706433/": "usual form",
    "https://0x7f000001/": "usual form",
    "https://017700000001/": "usual form",
    "https://127.1/": "usual form",
    "https://127.0.1/": "usual form",
    "https://0x7f.1/": "usual form",
    "https://0x7f.0.0.1/": "usual form",
    "https://0177.0.0.1/": "usual form",
    "https://127.0.0.01/": "usual form",
    "https://127.0.0.1./": "usual form",
    "https://127.0.0.0x1/": "usual form",
    "https://1.2.3.4.5/": "usual form",
    "https://256.1.1.1/": "usual form",
    "https://example.com.1/": "usual form",
    "https://example.0x/": "usual form",
    "https://0/": "usual form",
    "https://[]/": "form",
    "https://[::1/": "form",
    "https://::1/": "form",
    "https://[::1]x/": "form",
    "https://[example.com]/": "form",
    "https://[1.2.3.4]/": "usual form",
    "https://[fe80::1%25eth0]/": "form",
    "https://[fe80::1%eth0]/": "form",
    "https://[v1.x]/": "form",
    "https://[::ffff:1.2.3.04]/": "usual form",
    "https://example.com/" + "x" * 2048: "longer",
    "https://example.com?".ljust(2048, "x"): "longer",  # with the path that it lacks
}


@pytest.mark.parametrize(("url", "complaint"), INVALID.items(), ids=ascii)
@pytest.mark.parametrize("allow_loopback", [False, True])
def test_urls_that_are_refused(url: str, complaint: str, allow_loopback: bool) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(url, allow_loopback=allow_loopback)
    assert complaint in caught.value.message.rpartition("; ")[2]
    assert not isinstance(caught.value, BlockedAddressError)
    assert caught.value.field == "callback_url"
    assert "secret" not in caught.value.message


BLOCKED = [
    "https://127.0.0.1/",
    "https://10.0.0.1:8443/x",
    "https://169.254.169.254/latest/meta-data/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[::]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[fd00:ec2::254]/",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://a.b.localhost/",
]


@pytest.mark.parametrize("url", BLOCKED)
def test_urls_whose_host_is_known_not_to_be_public(url: str) -> None:
    with pytest.raises(BlockedAddressError) as caught:
        check(url)
    assert (caught.value.field, caught.value.code) == ("callback_url", "blocked_address")


LOOPBACK = [
    "http://localhost:8000/hook",
    "https://localhost/",
    "http://api.localhost/",
    "http://127.0.0.1:5000/",
    "http://127.8.9.1/",
    "http://[::1]:5000/",
]


@pytest.mark.parametrize("url", LOOPBACK)
def test_loopback_is_for_development(url: str) -> None:
    assert check(url, allow_loopback=True).is_loopback
    with pytest.raises(InvalidRequestError):
        check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "http://8.8.8.8/",
        "http://10.0.0.1/",
        "http://localhost.example.com/",
        "http://[::ffff:127.0.0.1]/",
        "http://0.0.0.0/",
        "https://10.0.0.1/",
        "https://[::ffff:127.0.0.1]/",
        "ftp://localhost/",
    ],
)
def test_the_switch_for_development_opens_nothing_else(url: str) -> None:
    with pytest.raises(InvalidRequestError):
        check(url, allow_loopback=True)


def test_a_tenants_base_url_is_under_the_same_guard() -> None:
    checked = check_base_url("https://llm.example.com/v1", field="base_url")
    assert checked.url == "https://llm.example.com/v1"
    assert check_base_url("http://localhost/v1", field="base_url", allow_loopback=True).is_loopback
    with pytest.raises(BlockedAddressError):
        check_base_url("https://169.254.169.254/v1", field="base_url")
    for url in ("https://llm.example.com/v1?key=secret", "http://llm.example.com/v1"):
        with pytest.raises(InvalidRequestError) as caught:
            check_base_url(url, field="base_url")
        assert caught.value.field == "base_url"
        assert "secret" not in caught.value.message


# What attackers put together: parts that one parser takes for one thing and another for another.
pieces = st.sampled_from(
    [
        *"@:/\\?#[]%.,;&=+-_~!$'()*\"<>^`{|}",
        *" \t\r\n\0\x7f\x85\xa0\u017f\u212a。\uff0e｡①⓪ä",
        *("//", "://", "https", "http", "HTTPS", "https://", "http://", "%2e", "%2F", "%40", "%00"),
        *("example.com", "evil.org", "localhost", "xn--a", "xn--bcher-kva.de", "a", "com", "443"),
        *(
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f",
            "0177",
            "10",
            "::1",
            "[::1]",
            "ffff",
            "8.8.8.8",
        ),
        *("[::ffff:127.0.0.1]", "[2606:4700::1111]", "169.254.169.254", "user:pw@", ":0", ":65536"),
    ]
)
crafted = st.lists(pieces, max_size=12).map("".join)
with_scheme = st.builds("{}://{}".format, st.sampled_from(["https", "http", "HtTpS"]), crafted)
good = st.sampled_from(
    ["https://example.com:8443/a?b=c", "https://8.8.8.8/", "https://[2606:4700::1]:1/", LOOPBACK[0]]
)


ascii_chars = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """A good URL with something put into it, or over a part of it."""
    url = draw(good)
    for piece in draw(st.lists(st.one_of(pieces, ascii_chars, ascii_chars), max_size=2)):
        start = draw(st.integers(0, len(url)))
        url = url[:start] + piece + url[start + draw(st.integers(0, 2)) :]
    return url


# What looks like a URL throughout, its host made of what names and addresses are made of.
hosts = st.one_of(
    st.text("ab1.-x0", min_size=1, max_size=12),
    st.text("0127x.", min_size=1, max_size=10),
    st.text("0127fx.:", min_size=2, max_size=12).map("[{}]".format),
    st.one_of(ipv6, st.integers(0x2 << 124, (0x3 << 124) - 1).map(IPv6Address)).map("[{}]".format),
    ipv4.map(str),
)
shaped = st.builds(
    "https://{}{}{}{}".format,
    hosts,
    st.sampled_from(["", "", ".", ".com", ".com."]),
    st.sampled_from(["", "", ":1", ":443", ":65535", ":080"]),
    st.sampled_from(["", "/", "?", "//evil.org", "/@evil.org", "/a:b@c?//d@e", "?@evil.org/", ";"]),
)
wild = st.one_of(st.text(max_size=60), crafted, with_scheme, spoiled())


def see_the_same_host(text: str, checked: CheckedUrl) -> None:
    """Fail unless each parser finds the host and the port of `checked` in `text`."""
    python, theirs, quoted = urlsplit(text), httpx.URL(text), yarl.URL(text)
    for host in (
        python.hostname,
        theirs.raw_host.decode(),
        quoted.raw_host,
        yarl.URL(text, encoded=True).raw_host,
    ):
        assert host
        if checked.address is None:
            assert host.lower().removesuffix(".") == checked.host
        else:
            assert ipaddress.ip_address(host.strip("[]")) == checked.address
    default = {"https": 443, "http": 80}[checked.scheme]
    assert {python.port or default, theirs.port or default, quoted.port} == {checked.port}
    assert [python.username, python.password, theirs.userinfo, quoted.user] == [
        None,
        None,
        b"",
        None,
    ]


@given(wild, st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_wild_text_is_refused_or_a_url_that_all_read_alike(url: str, loopback: bool) -> None:
    refused_or_read_alike(url, allow_loopback=loopback)


@given(shaped, st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_likely_url_is_refused_or_one_that_all_read_alike(url: str, loopback: bool) -> None:
    refused_or_read_alike(url, allow_loopback=loopback)


def refused_or_read_alike(url: str, *, allow_loopback: bool) -> None:
    try:
        checked = check(url, allow_loopback=allow_loopback)
    except InvalidRequestError:
        return
    assert checked.scheme == "https" or (allow_loopback and checked.is_loopback)
    assert checked.address is None or is_public(checked.address) or checked.is_loopback
    assert check(checked.url, allow_loopback=allow_loopback) == checked
    see_the_same_host(checked.url, checked)
    see_the_same_host(url, checked)


@given(st.one_of(ipv4, ipv6))
@settings(deadline=None)
def test_a_literal_address_is_judged_as_an_address(address: IPv4Address | IPv6Address) -> None:
    url = f"https://{address}/" if address.version == 4 else f"https://[{address.exploded}]/"
    if is_public(address):
        assert check(url).address == address
    else:
        with pytest.raises(BlockedAddressError):
            check(url)
