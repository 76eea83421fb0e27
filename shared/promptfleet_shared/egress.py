"""Which URLs of a stranger's we send requests to: judged here, without any I/O.

A callback's URL comes from whoever submits a job. Requests to it leave from inside of our network,
so it must not lead back there: to the cloud's metadata, to a database's port, to a neighbour. The
text of a URL is judged by `check_url`, once, when it is handed over. What its host resolves to is
judged by `is_public` at every attempt, by `promptfleet_workers.egress`.
"""

from __future__ import annotations

import dataclasses
import re
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Final, NoReturn, TypeAlias

from promptfleet_shared.errors import BlockedAddressError, InvalidRequestError

MAX_URL_CHARS: Final = 2048
MAX_HOST_CHARS: Final = 253
_MAX_PORT: Final = 65_535

Address: TypeAlias = IPv4Address | IPv6Address

# The special-purpose registries of IANA, those included that they call globally reachable: no
# receiver lives there. Older versions of `ipaddress` lack some, hence a table of our own.
# https://www.iana.org/assignments/iana-ipv4-special-registry
DENIED_IPV4: Final = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' NAT, and some clouds' metadata
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # the IETF's protocols
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# https://www.iana.org/assignments/iana-ipv6-special-registry
DENIED_IPV6: Final = tuple(
    IPv6Network(network)
    for network in (
        "::/96",  # unspecified, loopback, and IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64 of one's own
        "100::/64",  # discard
        "100:0:0:1::/64",  # dummy
        "2001::/23",  # the IETF's protocols: Teredo, ORCHID, benchmarks, AMT and more
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fc00::/7",  # private, and a cloud's metadata (fd00:ec2::254)
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local
        "ff00::/8",  # multicast
    )
)
# All that was ever given out for use on the internet; the rest is reserved.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# RFC 5214: what an ISATAP router delivers to the IPv4 address in the lower half.
_ISATAP = (0x00005EFE, 0x02005EFE)

# One grammar for the whole URL, so that no other parser can see another host in it: RFC 3986
# without user information and fragment, and with brackets in paths and queries, which many have.
_URL = re.compile(
    r"(?P<scheme>[a-z]+)://"
    r"(?:\[(?P<ipv6>[0-9a-f:.]{2,45})\]|(?P<name>[a-z0-9.-]{1,254}))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>(?:/(?:[a-z0-9._~!$&'()*+,;=:@/\[\]-]|%[0-9a-f]{2})*)?)"
    r"(?P<query>(?:\?(?:[a-z0-9._~!$&'()*+,;=:@/?\[\]-]|%[0-9a-f]{2})*)?)",
    re.IGNORECASE | re.ASCII,  # without ASCII, the Kelvin sign would be a k
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# What other parsers read as (part of) an IPv4 address: 2130706433, 0x7f.1, 0177.0.0.1.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORTS = {"https": 443, "http": 80}
_LOOPBACK_IPV4 = IPv4Network("127.0.0.0/8")
_LOOPBACK_IPV6 = IPv6Address("::1")
_ACCEPTED = (
    f"an https:// URL of at most {MAX_URL_CHARS} characters whose host is a full DNS name in "
    "ASCII or a public address, without user information and without a fragment"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckedUrl:
    """A URL that every parser reads in the same way.

    Attributes:
        url: Scheme and host in lower case, no dot at the host's end, no default port, and a path.
        scheme: "https", or "http" for a loopback host where that is allowed.
        host: A DNS name in ASCII, or a literal address without brackets.
        port: From 1 to 65535.
        address: The host, where it is a literal address.
        is_loopback: True for this very machine, by name or by address.
    """

    url: str
    scheme: str
    host: str
    port: int
    address: Address | None
    is_loopback: bool


def is_public(address: str | Address) -> bool:
    """True for an address that belongs to the internet, and to no special use of it.

    Stricter than `ipaddress`'s `is_global`: an IPv6 address that holds an IPv4 address (mapped,
    compatible, NAT64, 6to4, Teredo, ISATAP) never is, whatever the IPv4 address; nor is one with a
    zone, nor what is no address at all.
    """
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return ip.is_global and not any(ip in network for network in DENIED_IPV4)
    if ip.scope_id is not None or ip not in _GLOBAL_UNICAST:
        return False
    if int(ip) >> 32 & 0xFFFFFFFF in _ISATAP:
        return False
    return ip.is_global and not any(ip in network for network in DENIED_IPV6)


def is_loopback(address: str | Address) -> bool:
    """True for an address of this very machine: 127.0.0.0/8 or ::1, in no other form."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return ip in _LOOPBACK_IPV4 if isinstance(ip, IPv4Address) else ip == _LOOPBACK_IPV6


def names_loopback(host: str) -> bool:
    """True for a name that means this very machine (RFC 6761)."""
    return host == "localhost" or host.endswith(".localhost")


def check_url(url: str, *, field: str, allow_loopback: bool = False) -> CheckedUrl:
    """Judge the text of a URL that requests are to be sent to; nothing is resolved.

    Any port is allowed. Non-ASCII host names are taken in their ASCII form (`xn--…`) only.

    Args:
        url: What a caller gave.
        field: What to call it in errors.
        allow_loopback: Allow `localhost` and loopback addresses, for which http will do; for
            development.

    Raises:
        InvalidRequestError: It is no such URL; says what is accepted and shows nothing of it.
        BlockedAddressError: Its host is a literal address that is not public, or `localhost`.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None:
        _refuse(field, _mistake(url))
    checked = _checked(match, field)
    if len(checked.url) > MAX_URL_CHARS:  # by the path that was left out
        _refuse(field, "it is longer")
    permitted = checked.is_loopback and allow_loopback
    if checked.scheme != "https" and not permitted:
        _refuse(field, "its scheme is not https")
    if permitted:
        return checked
    if checked.is_loopback or (checked.address and not is_public(checked.address)):
        raise BlockedAddressError(
            f"{field}: the host {checked.host} has an address that is not public",
            field=field,
            host=checked.host,
        )
    return checked


def check_base_url(url: str, *, field: str, allow_loopback: bool = False) -> CheckedUrl:
    """The same for the base URL of a provider that a tenant brings along.

    Those in fleet.toml are the operator's own, who may well call a model next door: they are free.

    Raises:
        InvalidRequestError: It is no such URL, or has a query.
        BlockedAddressError: See `check_url`.
    """
    checked = check_url(url, field=field, allow_loopback=allow_loopback)
    if "?" in checked.url:
        _refuse(field, "a base URL has no query")
    return checked


def _checked(match: re.Match[str], field: str) -> CheckedUrl:
    """The parts of a URL that has the right form, still to be judged."""
    scheme = match["scheme"].lower()
    if scheme not in _PORTS:
        _refuse(field, "its scheme is not https")
    address = _literal(match, field)
    host = _name(match["name"], field) if address is None else str(address)
    port = int(match["port"] or _PORTS[scheme])
    if port > _MAX_PORT:
        _refuse(field, f"its port is not one from 1 to {_MAX_PORT}")
    shown_host = f"[{host}]" if isinstance(address, IPv6Address) else host
    shown_port = "" if port == _PORTS[scheme] else f":{port}"
    return CheckedUrl(
        url=f"{scheme}://{shown_host}{shown_port}{match['path'] or '/'}{match['query']}",
        scheme=scheme,
        host=host,
        port=port,
        address=address,
        is_loopback=names_loopback(host) if address is None else is_loopback(address),
    )


def _literal(match: re.Match[str], field: str) -> Address | None:
    """The host as an address, if it is one, in its one canonical form or not at all."""
    try:
        if match["ipv6"] is not None:
            return IPv6Address(match["ipv6"])
        if _NUMBER.fullmatch(match["name"].rstrip(".").rpartition(".")[2].lower()):
            return IPv4Address(match["name"])
    except AddressValueError:
        _refuse(field, "its host is no address in the usual form")
    return None


def _name(name: str, field: str) -> str:
    """A DNS name in lower case, without the dot that makes it absolute."""
    host = name.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        _refuse(field, "its host is no valid DNS name")
    if len(labels) == 1 and not names_loopback(host):
        _refuse(field, "its host is not a full DNS name")
    return host


def _mistake(url: str) -> str:
    """What is wrong with a URL that does not have the right form."""
    authority = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if len(url) > MAX_URL_CHARS:
        return "it is longer"
    if not url.isascii():
        return "it has other characters; write its host as xn--… and the rest with %"
    if "@" in authority:
        return "it has user information"
    if "#" in url:
        return "it has a fragment"
    return "it has another form, or characters that no URL has"


def _refuse(field: str, reason: str) -> NoReturn:
    raise InvalidRequestError(f"{field}: must be {_ACCEPTED}; {reason}", field=field)
