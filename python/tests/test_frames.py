"""Frames that scapy makes, between ports of a switch: its idea of Ethernet, 802.1Q, IP and checksums against ours."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import vmbed
from frames import FILE, made
from scapy.all import ARP, ICMP, IP, TCP, UDP, Dot1Q, Ether, ICMPv6ND_NS, IPv6, Raw, fragment  # type: ignore[import-untyped, attr-defined, unused-ignore]

LONG = 60.0
HEADER = 12
FIRST, SECOND, THIRD = (f"02:00:00:00:00:0{i}" for i in (1, 2, 3))
MAX_FRAME = 65_535 + 14 + 8


class Station:
    """The other end of a port."""

    def __init__(self, switch: vmbed.Switch, name: str, options: vmbed.PortOptions) -> None:
        near, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (near, self.socket):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.socket.settimeout(LONG)
        with near:
            self.port = switch.add_fd(name, near, options)
        self.taken = self.fences = 0

    def send(self, frame: Ether | bytes, header: bytes = bytes(HEADER)) -> None:
        """A frame with what is to be said of it."""
        self.socket.send(header + bytes(frame))

    def receive(self) -> bytes:
        """The next frame, which has nothing left to do."""
        message = self.socket.recv(HEADER + MAX_FRAME + 1)
        assert message[:2] == b"\0\0", "a socket knows no offloads"
        self.taken += 1
        return message[HEADER:]

    def received(self) -> list[bytes]:
        """All that the switch has for it."""
        return [self.receive() for _ in range(self.port.statistics().sent.frames - self.taken)]

    def settle(self) -> None:
        """Waits until the switch has done all that is to be done with what was sent: with one byte more, which is no frame."""
        self.fences += 1
        self.socket.send(b"x")
        end = time.monotonic() + LONG
        while self.port.statistics().drops.get("runt", 0) < self.fences:
            assert time.monotonic() < end, f"waited for all frames to be dealt with: {self.port.statistics()}"
            time.sleep(0.001)

    def drops(self) -> dict[str, int]:
        """What was dropped of its frames."""
        drops = dict(self.port.statistics().drops)
        drops["runt"] = drops.get("runt", 0) - self.fences
        return {reason: frames for reason, frames in drops.items() if frames}


@contextmanager
def stations(**options: vmbed.PortOptions) -> Iterator[tuple[Station, ...]]:
    """A switch with a station on each of its ports."""
    switch = vmbed.Switch()
    made = tuple(Station(switch, name, given) for name, given in options.items())
    try:
        yield made
    finally:
        for station in made:
            station.port.remove()
            station.socket.close()


def plain(source: str, *rest: object) -> Ether:
    """To everybody."""
    frame = Ether(src=source, dst="ff:ff:ff:ff:ff:ff")
    for layer in rest:
        frame = frame / layer
    return frame


def test_every_length() -> None:
    with stations(one=vmbed.PortOptions(storm=vmbed.UNLIMITED_RATE), two=vmbed.PortOptions()) as (one, two):
        lengths = [*range(0, 200), *range(1490, 1530), *range(MAX_FRAME - 3, MAX_FRAME + 40)]
        base = bytes(plain(FIRST, Raw(bytes(i % 251 for i in range(70_000)))))
        for length in lengths:
            one.send(base[:length])
            if 14 <= length <= MAX_FRAME:
                assert two.receive() == base[:length], length
            elif length < 14:
                one.fences += 1
        one.settle()
        assert two.received() == []
        assert one.drops() == {"too-long": 39}
        # Less than a header of ours.
        for length in range(HEADER):
            one.socket.send(bytes(length))
        one.send(base[:60])
        assert two.receive() == base[:60]


def tagged(tags: list[tuple[int, int]], source: str = FIRST) -> Ether:
    """With these tags: priority and VLAN."""
    return plain(source, *(Dot1Q(prio=priority, vlan=vlan) for priority, vlan in tags), IP(dst="192.0.2.2") / UDP() / Raw(b"x" * 30))


def expected(frame: Ether, entry: vmbed.PortOptions, leaving: vmbed.PortOptions) -> bytes | None:
    """What 802.1Q has the other port send, as scapy takes a frame apart."""
    first = frame.payload
    has_tag = isinstance(first, Dot1Q)
    vlan, priority = (first.vlan, first.prio) if has_tag else (0, 0)
    inner = first.payload if has_tag else first
    nested = isinstance(inner, Dot1Q)
    # VLAN hopping: where the first tag would go, a second one would lead into a VLAN that nobody has agreed to.
    if vlan == 4095 or (vlan == 0 and nested):
        return None
    if entry.trunk is None:
        if vlan != 0:
            return None
        vlan = entry.vlan
    elif vlan == 0:
        vlan = entry.vlan
        if vlan == 0:
            return None
    elif vlan not in (*entry.trunk, entry.vlan):
        return None
    head = Ether(src=frame.src, dst=frame.dst)
    untagged = vlan == leaving.vlan
    if untagged and nested:
        return None
    if not untagged and (leaving.trunk is None or vlan not in leaving.trunk):
        return None
    return bytes(head / inner.copy() if untagged else head / Dot1Q(prio=priority, vlan=vlan) / inner.copy())


def test_every_case_of_802_1q() -> None:
    kinds = {
        "access10": vmbed.PortOptions(vlan=10),
        "access20": vmbed.PortOptions(vlan=20),
        "trunk": vmbed.PortOptions(vlan=0, trunk=[10, 20]),
        "native": vmbed.PortOptions(vlan=10, trunk=[20, 30]),
    }
    for options in kinds.values():
        options.storm = vmbed.UNLIMITED_RATE
    tags: list[list[tuple[int, int]]] = [[], [(0, 0)], [(5, 0)], [(0, 4095)], [(0, 1)]]
    tags += [[(priority, vlan)] for priority in (0, 7) for vlan in (10, 20, 30, 40, 4094)]
    tags += [[(1, 10), (2, 20)], [(0, 20), (0, 0)], [(3, 0), (0, 10)], [(0, 4095), (0, 10)], [(0, 10), (0, 4095)]]
    tags += [[(0, 10)] * 3]
    for name, entry in kinds.items():
        with stations(entry=entry, **kinds) as all_:
            source, others = all_[0], dict(zip(kinds, all_[1:]))
            for tag in tags:
                frame = tagged(tag)
                source.send(frame)
                source.settle()
                for other, station in others.items():
                    wanted = expected(frame, entry, kinds[other])
                    if wanted is None:
                        assert station.received() == [], (name, tag, other)
                    else:
                        got = station.receive()
                        assert got == wanted, (name, tag, other, Ether(got).summary(), Ether(wanted).summary())


def checked(bytes_: bytes) -> Ether:
    """The frame, whose checksums scapy agrees with."""
    frame = Ether(bytes_)
    again = frame.copy()
    for layer in (IP, TCP, UDP):
        if layer in again:
            del again[layer].chksum
    assert bytes(again) == bytes_, f"{frame.show(dump=True)}\n{Ether(bytes(again)).show(dump=True)}"
    return frame


def vnet(flags: int = 0, gso: int = 0, header: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    """struct virtio_net_hdr_v1."""
    return bytes([flags, gso]) + b"".join(n.to_bytes(2, "little") for n in (header, size, start, offset, 0))


def test_what_a_header_leaves_to_do_is_done_as_scapy_does_it() -> None:
    with stations(one=vmbed.PortOptions(), two=vmbed.PortOptions()) as (one, two):
        dice = random.Random(7)
        for version, network in [(4, IP(src="192.0.2.1", dst="192.0.2.2")), (6, IPv6(src="2001:db8::1", dst="2001:db8::2"))]:
            for tags in ([], [Dot1Q(vlan=0, prio=3)]):
                below = 14 + 4 * len(tags) + (20 if version == 4 else 40)
                # A checksum that is only begun: over the pseudo header, as an offloading sender leaves it.
                for transport, offset in [(TCP(sport=1, dport=2, flags="A"), 16), (UDP(sport=1, dport=2), 6)]:
                    for length in (0, 1, 7, 100, 1400):
                        whole = Ether(src=FIRST, dst="ff:ff:ff:ff:ff:ff")
                        for layer in [*tags, network.copy(), transport.copy(), Raw(dice.randbytes(length))]:
                            whole = whole / layer
                        wanted = bytes(whole)
                        begun = bytearray(wanted)
                        pseudo = pseudo_sum(version, wanted, below, len(wanted) - below)
                        begun[below + offset : below + offset + 2] = pseudo.to_bytes(2, "big")
                        one.send(bytes(begun), vnet(flags=1, start=below, offset=offset))
                        got = two.receive()
                        bare = wanted[:12] + wanted[16:] if tags else wanted
                        assert got == bare, (version, transport.name, length)
                        checked(got)
                # 20,000 bytes, cut where it says: one of TCP's segments, or datagrams that were sent as one.
                tcp = 1 if version == 4 else 4
                for transport, own, offset, gso in [(TCP(sport=1, dport=2, seq=1000, flags="PA"), 20, 16, tcp), (UDP(sport=1, dport=2), 8, 6, 5)]:
                    payload = dice.randbytes(20_000)
                    whole = Ether(src=FIRST, dst="ff:ff:ff:ff:ff:ff")
                    for layer in [*tags, network.copy(), transport.copy(), Raw(payload)]:
                        whole = whole / layer
                    begun = bytearray(bytes(whole))
                    pseudo = pseudo_sum(version, bytes(begun), below, len(begun) - below)
                    begun[below + offset : below + offset + 2] = pseudo.to_bytes(2, "big")
                    one.send(bytes(begun), vnet(flags=1, gso=gso, header=below + own, size=1448, start=below, offset=offset))
                    gathered = b""
                    while len(gathered) < len(payload):
                        segment = checked(two.receive())[type(transport)]
                        data = bytes(segment.payload)
                        assert len(data) == min(1448, len(payload) - len(gathered))
                        if gso == tcp:
                            assert segment.seq == 1000 + len(gathered)
                        else:
                            assert (segment.sport, segment.dport, segment.len) == (1, 2, 8 + len(data)) and segment.chksum != 0
                        gathered += data
                    assert gathered == payload and two.received() == []


def pseudo_sum(version: int, frame: bytes, transport: int, length: int) -> int:
    """RFC 1071 over the pseudo header, not complemented."""
    addresses = frame[transport - 8 : transport] if version == 4 else frame[transport - 32 : transport]
    protocol = frame[transport - 20 + 9] if version == 4 else frame[transport - 40 + 6]
    words = addresses + bytes([0, protocol]) + length.to_bytes(4, "big")
    total = sum(int.from_bytes(words[i : i + 2], "big") for i in range(0, len(words), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_headers_that_make_no_sense() -> None:
    """Whatever they say: dropped and counted, or delivered as a whole frame; and what comes after them is delivered."""
    frames = [
        bytes(plain(FIRST, IP(dst="192.0.2.2") / TCP() / Raw(b"x" * 3000))),
        bytes(plain(FIRST, IPv6(dst="2001:db8::2") / TCP() / Raw(b"x" * 3000))),
        bytes(plain(FIRST, Dot1Q(vlan=0) / IP(dst="192.0.2.2") / UDP() / Raw(b"x" * 100))),
        bytes(plain(FIRST, ARP(pdst="192.0.2.2"))),
        bytes(plain(FIRST, Raw(b""))),
    ]
    with stations(one=vmbed.PortOptions(storm=vmbed.UNLIMITED_RATE), two=vmbed.PortOptions()) as (one, two):
        dice = random.Random(11)
        edge = [0, 1, 2, 13, 14, 33, 34, 54, 0x7FFF, 0xFFFE, 0xFFFF]
        last = bytes(plain(SECOND, Raw(b"the end")))
        for turn in range(2_000):
            header = vnet(dice.choice([0, 1, 2, 3, 0xFF]), dice.choice([0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0xFF]), *dice.choices(edge, k=4))
            one.send(dice.choice(frames), header if turn % 2 else dice.randbytes(HEADER))
            if turn % 50 == 49:
                one.settle()
                for frame in two.received():
                    assert 14 <= len(frame) <= 3100
                one.send(last)
                assert two.receive() == last
        assert sum(one.drops().values()) > 500, one.drops()


def test_fragments_pass_and_are_guarded() -> None:
    guard = vmbed.PortOptions(guard_macs=[FIRST], guard_addresses=["192.0.2.1"])
    with stations(one=guard, two=vmbed.PortOptions()) as (one, two):
        head = Ether(src=FIRST, dst="ff:ff:ff:ff:ff:ff")
        for source, passes in [("192.0.2.1", True), ("192.0.2.66", False)]:
            pieces = fragment(IP(src=source, dst="192.0.2.2") / ICMP() / Raw(b"y" * 4000), fragsize=1000)
            assert len(pieces) > 3
            for piece in pieces:
                one.send(head / piece)
            one.settle()
            assert [Ether(frame)[IP].frag for frame in two.received()] == ([piece.frag for piece in pieces] if passes else [])
        assert one.drops() == {"spoofed-ipv4": len(pieces)}
        # Of a fragment too short for what it says that it is, nothing is known: it is not let through.
        one.send(bytes(head / IP(src="192.0.2.1", dst="192.0.2.2"))[:30])
        one.settle()
        assert two.received() == []


@pytest.mark.parametrize("kind", ["arp", "nd"])
def test_storms_are_limited(kind: str) -> None:
    storm = vmbed.Rate(ops_per_second=1, ops_burst=20)
    with stations(one=vmbed.PortOptions(storm=storm), two=vmbed.PortOptions()) as (one, two):
        two.send(plain(SECOND, ARP(psrc="192.0.2.2", pdst="192.0.2.2")))
        one.receive()
        for i in range(500):
            if kind == "arp":
                one.send(plain(FIRST, ARP(op=1, psrc="192.0.2.1", pdst=f"192.0.2.{i % 250}")))
            else:
                packet = IPv6(src="fe80::1", dst=f"ff02::1:ff00:{i:x}") / ICMPv6ND_NS(tgt=f"fe80::{i:x}")
                one.send(Ether(src=FIRST, dst="33:33:ff:00:00:01") / packet)
        one.settle()
        heard = len(two.received())
        assert 20 <= heard < 20 + LONG and one.drops() == {"storm": 500 - heard}
        # For one alone there is room.
        for i in range(100):
            one.send(Ether(src=FIRST, dst=SECOND) / IP(dst="192.0.2.2") / UDP() / Raw(bytes([i])))
        one.settle()
        assert len(two.received()) == 100


def test_the_frames_of_others_are_up_to_date() -> None:
    """What tests/independent_driver has is what scapy makes of python/tests/frames.py; VMBED_UPDATE_FRAMES=1 writes it anew."""
    now = made()
    if os.environ.get("VMBED_UPDATE_FRAMES"):
        FILE.write_bytes(now)
    assert FILE.read_bytes() == now
