/* Bridges and TAP interfaces of the host, in a network namespace of the test's own. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>

#include "guest.h"

void the_hosts_side_of_a_network(void);

static void in_a_namespace(void)
{
    const uint32_t vlans[] = {10, 20};
    vmbed_wiring *wiring;
    OK(vmbed_wiring_new(&wiring, &error));
    const vmbed_bridge_options bridge = {.size = sizeof bridge, .mac = "02:00:00:00:00:01", .mtu = 1400};
    OK(vmbed_wiring_add_bridge(wiring, "br0", &bridge, &error));
    OK(vmbed_wiring_add_bridge(wiring, "br1", NULL, &error));
    const vmbed_tap_options on = {.size = sizeof on, .bridge = "br0", .multi_queue = 1, .owner = 65534, .persistent = 1};
    OK(vmbed_wiring_add_tap(wiring, "vnet0", &on, &error));
    OK(vmbed_wiring_add_tap(wiring, "vnet1", NULL, &error));
    OK(vmbed_wiring_attach(wiring, "vnet1", "br1", &error));
    CHECK(if_nametoindex("br0") && if_nametoindex("br1") && if_nametoindex("vnet0") && if_nametoindex("vnet1"));

    FAILS(VMBED_ERR_BUSY, "bridge 'br0'", vmbed_wiring_add_bridge(wiring, "br0", NULL, &error));
    const vmbed_bridge_options odd = {.size = sizeof odd, .mac = "two"};
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "'two' is not a MAC", vmbed_wiring_add_bridge(wiring, "br2", &odd, &error));
    vmbed_tap_options wrong = {.size = sizeof wrong, .bridge = "br0", .vlan = 10};
    FAILS(VMBED_ERR_INVALID_STATE, "VLANs", vmbed_wiring_add_tap(wiring, "vnet2", &wrong, &error));
    wrong.vlan = 4095;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "VLAN 4095", vmbed_wiring_add_tap(wiring, "vnet2", &wrong, &error));
    wrong.vlan = 0, wrong.reserved = 1;
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "reserved", vmbed_wiring_add_tap(wiring, "vnet2", &wrong, &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "VLAN 65536", vmbed_wiring_set_vlans(wiring, "vnet0", 65536, NULL, 0, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "VLANs", vmbed_wiring_set_vlans(wiring, "vnet0", 0, vlans, 2, &error));
    FAILS(VMBED_ERR_NOT_FOUND, "'eth7'", vmbed_wiring_add_vlan(wiring, "eth7.10", "eth7", 10, &error));
    FAILS(VMBED_ERR_INVALID_STATE, "port of 'br1'", vmbed_wiring_attach(wiring, "vnet1", "br0", &error));
    FAILS(VMBED_ERR_INVALID_ARGUMENT, "there before", vmbed_wiring_remove(wiring, "lo", &error));
    CHECK(!if_nametoindex("br2") && !if_nametoindex("vnet2"));

    OK(vmbed_wiring_detach(wiring, "vnet1", &error));
    OK(vmbed_wiring_set_mtu(wiring, "vnet1", 9000, &error));
    OK(vmbed_wiring_set_mac(wiring, "vnet1", "02:00:00:00:00:02", &error));
    OK(vmbed_wiring_set_mtu(wiring, "lo", 2000, &error));
    OK(vmbed_wiring_set_up(wiring, "lo", true, &error));
    OK(vmbed_wiring_remove(wiring, "br1", &error));
    CHECK(!if_nametoindex("br1"));
    OK(vmbed_wiring_release(wiring, &error));
    CHECK(!if_nametoindex("br0") && if_nametoindex("vnet0") && !if_nametoindex("vnet1"));
    OK(vmbed_wiring_add_bridge(wiring, "br0", NULL, &error));
    vmbed_wiring_free(wiring);
    CHECK(!if_nametoindex("br0"));
    vmbed_wiring_free(NULL);
}

void the_hosts_side_of_a_network(void)
{
    int before = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    CHECK(before >= 0 && unshare(CLONE_NEWNET) == 0);
    in_a_namespace();
    CHECK(setns(before, CLONE_NEWNET) == 0);
    close(before);
}
