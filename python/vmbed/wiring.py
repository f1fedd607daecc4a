"""The host's side of guests' networks: bridges, TAP interfaces, VLANs; undone when it is done with."""

from __future__ import annotations

from types import TracebackType

from ._lib import call, lib, make, numbers, optional, structure


class Wiring:
    """What this process has made of the host's network, and changed in it. All of it is undone by :meth:`release`, at the end of a
    ``with`` block, and with the last reference: what it made is gone, what was there before is as it was, and what others have changed
    meanwhile stays as they left it. A process that is killed undoes nothing. It works in the network namespace of the thread that makes
    it, and wants ``CAP_NET_ADMIN`` there.

    A call that fails has changed nothing.
    """

    def __init__(self) -> None:
        self._pointer = make(lib.vmbed_wiring_new, "wiring")

    def add_bridge(self, name: str, *, vlan_filtering: bool = False, mtu: int | None = None, mac: str | None = None) -> None:
        """Makes a bridge, and sets it up. With `vlan_filtering` it tells VLANs apart: each port is in VLAN 1 until it is told another."""
        address = optional(mac)
        options = structure("vmbed_bridge_options", mac=address, vlan_filtering=int(vlan_filtering), mtu=mtu or 0)
        call(lib.vmbed_wiring_add_bridge, self._pointer, name.encode(), options)

    def add_tap(
        self,
        name: str,
        *,
        bridge: str | None = None,
        vlan: int = 0,
        trunk: list[int] | None = None,
        multi_queue: bool = False,
        persistent: bool = False,
        owner: int = 0,
        group: int = 0,
        mtu: int | None = None,
        mac: str | None = None,
    ) -> None:
        """Makes a TAP interface, for a card (``Net(name)``), puts it on a bridge if so told, and sets it up.

        In the one VLAN `vlan`, without tags (0: what the bridge gives to every port); with `trunk` in those, with tags, and in `vlan` without
        one. The user `owner` and members of `group`, by number, may open it without any capability. `persistent`: it stays when the rest
        is undone. To the kernel all of them are persistent, since a card attaches to it later: when the process is killed it stays, as a
        bridge does.
        """
        on, address, list_ = optional(bridge), optional(mac), numbers(trunk)
        options = structure(
            "vmbed_tap_options", bridge=on, mac=address, trunk=list_, trunk_length=len(trunk or []), vlan=vlan,
            multi_queue=int(multi_queue), persistent=int(persistent), owner=owner, group=group, mtu=mtu or 0,
        )  # fmt: skip
        call(lib.vmbed_wiring_add_tap, self._pointer, name.encode(), options)

    def add_vlan(self, name: str, of: str, vlan: int) -> None:
        """Makes an interface that carries one VLAN of another one, and sets it up."""
        call(lib.vmbed_wiring_add_vlan, self._pointer, name.encode(), of.encode(), vlan)

    def remove(self, name: str) -> None:
        """Deletes an interface that this made."""
        call(lib.vmbed_wiring_remove, self._pointer, name.encode())

    def attach(self, port: str, bridge: str) -> None:
        """Makes an interface a port of a bridge. One of another bridge is to be detached first."""
        call(lib.vmbed_wiring_attach, self._pointer, port.encode(), bridge.encode())

    def detach(self, port: str) -> None:
        """Takes a port from its bridge. When that is undone, it has its settings there again (cost, flooding, isolation and the like),
        its VLANs and the addresses that somebody has put behind it for good (`bridge fdb`); not static groups (`bridge mdb`),
        settings of single VLANs and tunnels (`bridge vlan set`), and what the bridge had learned."""
        call(lib.vmbed_wiring_detach, self._pointer, port.encode())

    def set_vlans(self, port: str, vlan: int = 0, trunk: list[int] | None = None) -> None:
        """Says which VLANs a port of a bridge is in, or the bridge itself: in `vlan` without a tag, in those of `trunk` with tags."""
        call(lib.vmbed_wiring_set_vlans, self._pointer, port.encode(), vlan, numbers(trunk), len(trunk or []))

    def set_up(self, name: str, up: bool = True) -> None:
        """Sets an interface up or down. One that is set down loses its routes and IPv6 addresses. When that is undone, it has again
        what somebody gave it of them; not next hop objects and the routes through them, addresses with a lifetime, permanent
        neighbours, and the routes and IPv6 addresses of VLAN interfaces on it."""
        call(lib.vmbed_wiring_set_up, self._pointer, name.encode(), up)

    def set_mtu(self, name: str, mtu: int) -> None:
        """Sets the largest packet that an interface carries, in bytes without the Ethernet header. Below 1280 there is no IPv6: its
        addresses and routes are lost, and come back as in :meth:`set_up`; its own `net.ipv6.conf` do not."""
        call(lib.vmbed_wiring_set_mtu, self._pointer, name.encode(), mtu)

    def set_mac(self, name: str, mac: str) -> None:
        """Sets an interface's own address."""
        call(lib.vmbed_wiring_set_mac, self._pointer, name.encode(), mac.encode())

    def release(self) -> None:
        """Undoes everything, and raises the first thing that could not be undone."""
        call(lib.vmbed_wiring_release, self._pointer)

    def __enter__(self) -> Wiring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
