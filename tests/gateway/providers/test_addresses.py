"""Where a provider's name may lead: public addresses, in no disguise, unless declared."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers.addresses import Reach, may_dial, reach_of

FORBIDDEN_4 = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
    "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
]  # fmt: skip
forbidden_4 = st.sampled_from(FORBIDDEN_4).flatmap(
    lambda text: st.integers(
        int(IPv4Network(text).network_address), int(IPv4Network(text).broadcast_address)
    )
)
any_4 = st.integers(0, 2**32 - 1)


def spellings(number: int) -> list[str]:
    """Return every form in which an IPv4 address travels as an answer."""
    return [
        str(IPv4Address(number)),
        str(IPv6Address((0xFFFF << 32) | number)),
        str(IPv6Address((0x2002 << 112) | (number << 80) | 1)),
        str(IPv6Address((0x64FF9B << 96) | number)),
        f"::ffff:{IPv4Address(number)}",
    ]


@given(forbidden_4)
def test_what_is_not_public_is_forbidden_in_every_form(number: int) -> None:
    """A forbidden IPv4 address stays one when mapped, in 6to4, or behind NAT64."""
    assert not any(may_dial(each, Reach.PUBLIC) for each in spellings(number))


@given(any_4)
def test_all_forms_of_an_address_are_judged_alike(number: int) -> None:
    """What decides is the address, not its spelling; and what is allowed, Python calls global."""
    verdicts = {may_dial(each, Reach.PUBLIC) for each in spellings(number)}
    assert len(verdicts) == 1
    assert verdicts == {False} or IPv4Address(number).is_global


@given(st.integers(0, 2**128 - 1))
def test_only_global_unicast_of_ipv6(number: int) -> None:
    """Outside 2000::/3 only NAT64 and mapped forms of public addresses may be dialled."""
    address = IPv6Address(number)
    if may_dial(str(address), Reach.PUBLIC) and number >> 125 != 1:
        assert number >> 32 in {0xFFFF, 0x64FF9B << 64}


@pytest.mark.parametrize(
    "address",
    [
        "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "2606:4700::1%eth0", "fc00::1",
        "fd00:ec2::254", "fec0::1", "ff02::1", "2001::1", "2001:db8::1", "3fff::1",
        "64:ff9b:1::808:808", "100::1", "2002:7f00:1::", "::ffff:0:127.0.0.1", "",
        "127.1", "0x7f.1", "2130706433", "localhost", "8.8.8.8 ", "08.8.8.8",
    ],
)  # fmt: skip
def test_forbidden_addresses(address: str) -> None:
    """Special addresses are not dialled, nor is anything that is no address."""
    assert not may_dial(address, Reach.PUBLIC)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::6810:1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses(address: str) -> None:
    """Public addresses are dialled."""
    assert may_dial(address, Reach.PUBLIC)


@pytest.mark.parametrize(
    ("host", "private_addresses", "reach"),
    [
        ("api.openai.com", False, Reach.PUBLIC),
        ("models.internal", True, Reach.ANY),
        ("10.0.0.8", False, Reach.ANY),
        ("::1", False, Reach.ANY),
        ("localhost", False, Reach.LOOPBACK),
        ("Models.LocalHost.", False, Reach.LOOPBACK),
        ("localhost.example", False, Reach.PUBLIC),
        ("127.1", False, Reach.PUBLIC),
        ("2130706433", False, Reach.PUBLIC),
    ],
)
def test_what_a_configuration_declares(
    host: str,
    private_addresses: bool,  # noqa: FBT001 - a parameter of the table
    reach: Reach,
) -> None:
    """A literal address declares itself, localhost means this machine, a flag declares the rest."""
    assert reach_of(host, private_addresses=private_addresses) is reach


def test_localhost_is_this_machine_only() -> None:
    """An answer that leads localhost elsewhere is not followed."""
    assert may_dial("127.0.0.1", Reach.LOOPBACK)
    assert may_dial("::1", Reach.LOOPBACK)
    assert not may_dial("8.8.8.8", Reach.LOOPBACK)
    assert not may_dial("10.0.0.1", Reach.LOOPBACK)
