"""Asks a host for its usage as often as the first argument says."""

import sys

import vmbed

host = vmbed.Host()
with host.build(vmbed.BareConfig(b"\xf4")):
    for _ in range(int(sys.argv[1])):
        host.usage()
