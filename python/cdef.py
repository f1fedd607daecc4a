"""Makes vmbed/_cdef.py from the C header, as cffi wants it: without directives."""

import re
from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).resolve().parent.parent / "include" / "vmbed.h"


def declarations(header: str) -> str:
    """The header's declarations; its constants stay, what C++ and compilers want goes."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    kept = []
    for line in text.splitlines():
        if not line.startswith("#") or re.match(r"#define VMBED_\w+ -?\d+$", line):
            kept.append(line)
    return "\n".join(kept)


ffi = FFI()
ffi.set_source("vmbed._cdef", None)
ffi.cdef(declarations(HEADER.read_text()))

if __name__ == "__main__":
    ffi.compile()
