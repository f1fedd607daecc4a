"""Frames that scapy makes for who has no Python: tests/independent_driver sends these through cards both ways."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from scapy.all import ARP, ICMP, IP, TCP, UDP, Dot1Q, Ether, ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6ND_RS  # type: ignore[import-untyped, attr-defined, unused-ignore]
from scapy.all import IPv6, IPv6ExtHdrFragment, Raw, fragment, fragment6  # type: ignore[attr-defined, unused-ignore]

FILE = Path(__file__).parents[2] / "tests" / "independent_driver" / "frames.pcap"
NEAR, EVERYBODY = "02:00:00:00:00:01", "ff:ff:ff:ff:ff:ff"
# Customers' tags, providers' (802.1ad), and what was used for those before.
TYPES = (0x8100, 0x88A8, 0x9100)
ECHO = 0x0800


def ether(*layers: object, to: str = EVERYBODY) -> bytes:
    frame = Ether(src=NEAR, dst=to)
    for layer in layers:
        frame = frame / layer
    return bytes(frame)


def tagged(*tags: tuple[int, int, int], drop_eligible: bool = False) -> bytes:
    """With these tags, each of a type, with a priority and a VLAN."""
    frame = Ether(src=NEAR, dst=EVERYBODY, type=tags[0][0])
    following = [kind for kind, _, _ in tags[1:]] + [ECHO]
    for (_, priority, vlan), kind in zip(tags, following):
        frame = frame / Dot1Q(prio=priority, vlan=vlan, type=kind)
    made = bytearray(bytes(frame / IP(src="192.0.2.1", dst="192.0.2.2", id=1) / ICMP(id=1, seq=1) / Raw(b"t" * 30)))
    made[14] |= 0x10 if drop_eligible else 0
    return bytes(made)


def tags() -> list[bytes]:
    """Every case of 802.1Q, and of what it must not be taken for."""
    made = []
    for kind in TYPES:
        for vlan in (0, 1, 10, 20, 30, 4094, 4095):
            made += [tagged((kind, 0, vlan)), tagged((kind, 7, vlan), drop_eligible=True)]
        for inner in TYPES:
            made += [tagged((kind, 1, outer), (inner, 2, vlan)) for outer, vlan in [(10, 20), (0, 10), (0, 0), (4095, 10), (10, 4095), (10, 0), (10, 10)]]
        made.append(tagged(*[(kind, 0, 10)] * 3))
        # One that ends in a tag, or behind it.
        made += [tagged((kind, 0, 10), (kind, 0, 20))[:length] for length in range(14, 24)]
    return made


def fragments() -> list[bytes]:
    """Whole datagrams in pieces; pieces that are tiny, out of order, twice there, or not there at all."""
    four = IP(src="192.0.2.1", dst="192.0.2.2", id=7) / UDP(sport=7, dport=7) / Raw(bytes(i % 251 for i in range(6000)))
    six = IPv6(src="2001:db8::1", dst="2001:db8::2") / IPv6ExtHdrFragment(id=7) / UDP(sport=7, dport=7) / Raw(bytes(i % 251 for i in range(6000)))
    tiny = fragment(IP(src="192.0.2.1", dst="192.0.2.2", id=8) / TCP(sport=7, dport=7) / Raw(b"tiny" * 20), fragsize=8)
    pieces = [*fragment(four, fragsize=1480), *fragment6(six, 1280), *tiny, *reversed(tiny), tiny[0], *tiny[1::2]]
    overlapping = IP(src="192.0.2.1", dst="192.0.2.2", id=9, proto=17)
    pieces += [overlapping.copy() / Raw(b"o" * 64), IP(bytes(IP(src="192.0.2.1", dst="192.0.2.2", id=9, proto=17, frag=4) / Raw(b"O" * 64)))]
    # Beyond what a datagram can be.
    pieces.append(IP(src="192.0.2.1", dst="192.0.2.2", id=10, proto=17, frag=8189) / Raw(b"!" * 400))
    return [ether(piece) for piece in pieces]


def storms() -> list[bytes]:
    """ARP and neighbour discovery, as from one who has lost his mind."""
    made = []
    for i in range(100):
        ask = ARP(op=1, hwsrc=NEAR, psrc="192.0.2.1", hwdst="00:00:00:00:00:00", pdst=f"192.0.2.{i}")
        tell = ARP(op=2, hwsrc=NEAR, psrc=f"192.0.2.{i}", hwdst=EVERYBODY, pdst=f"192.0.2.{i}")
        made += [ether(ask), ether(tell)]
        solicit = IPv6(src="fe80::1", dst=f"ff02::1:ff00:{i:x}", hlim=255) / ICMPv6ND_NS(tgt=f"fe80::{i:x}")
        made.append(ether(solicit, to=f"33:33:ff:00:00:{i:02x}"))
    for i in range(20):
        head = IPv6(src="fe80::1", dst="ff02::1", hlim=255)
        made += [ether(head / last, to="33:33:00:00:00:01") for last in (ICMPv6ND_NA(tgt=f"fe80::{i:x}"), ICMPv6ND_RS(), ICMPv6ND_RA())]
    return made


def nonsense() -> list[bytes]:
    """Lengths that are none, headers that are longer than what they are in, bytes of no meaning."""
    dice = random.Random(29)
    v4, v6 = {"src": "192.0.2.1", "dst": "192.0.2.2", "id": 1}, {"src": "2001:db8::1", "dst": "2001:db8::2"}
    bent = [
        IP(**v4, ihl=15) / UDP() / Raw(b"x"),
        IP(**v4, ihl=1) / UDP() / Raw(b"x"),
        IP(**v4, len=9) / UDP() / Raw(b"x"),
        IP(**v4, len=65535) / UDP() / Raw(b"x"),
        IP(**v4, version=9) / TCP(),
        IP(**v4, flags="MF", frag=0, proto=17),
        IP(**v4) / UDP(len=3) / Raw(b"x" * 20),
        IP(**v4) / TCP(dataofs=15),
        IP(**v4) / TCP(dataofs=0),
        IPv6(**v6, plen=65535) / UDP() / Raw(b"x"),
        IPv6(**v6, nh=0) / Raw(b"\0\xff" * 4),
        IPv6(**v6, nh=44) / Raw(b"\x2c\0\0\1\0\0\0\7" * 20),
        IPv6(**v6) / ICMPv6EchoRequest(id=1, seq=1) / Raw(b"x" * 7),
        ARP(hwlen=255, plen=255, hwsrc=NEAR, psrc="192.0.2.1", hwdst=EVERYBODY, pdst="192.0.2.2"),
    ]
    sound = [ether(packet) for packet in bent] + tags()[:6]
    made = list(sound)
    for _ in range(100):
        frame = bytearray(dice.choice(sound))
        for _ in range(dice.randint(1, 6)):
            # Its sender stays the same: a switch is to know where it is.
            frame[dice.choice([*range(6), *range(12, len(frame))])] = dice.randrange(256)
        made.append(bytes(frame))
    made += [dice.choice(sound)[: dice.randrange(40)] for _ in range(60)]
    made += [ether()[:12] + kind.to_bytes(2, "big") + dice.randbytes(dice.randrange(200)) for kind in (0, 46, 1500, 1501, 0x0800, 0x0806, 0x86DD, 0x8035, 0x8847, 0x9200, 0xFFFF) for _ in range(4)]
    made += [dice.randbytes(dice.randrange(120)) for _ in range(40)]
    return made


def made() -> bytes:
    """All of them, in a file that Wireshark opens."""
    frames = [*tags(), *fragments(), *storms(), *nonsense()]
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    return head + b"".join(struct.pack("<IIII", 0, number, len(frame), len(frame)) + frame for number, frame in enumerate(frames))
