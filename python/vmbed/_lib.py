"""The library behind the package, and what every call needs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Callable, Protocol, TypeVar

from vmbed._cdef import ffi as _ffi

from .errors import Error, Field, Refused, Verdict, by_status

ffi: Any = _ffi
lib: Any = ffi.dlopen(str(Path(__file__).with_name("libvmbed.so.0")))

#: C objects that the library holds on to, until it says that it does so no more.
_held: set[Any] = set()


_new = ffi.new
_ERROR = ffi.typeof("vmbed_error **")


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Makes a call that answers a status; raises what its error says."""
    error = _new(_ERROR)
    status = function(*arguments, error)
    if status:
        raise take_error(status, error[0])


def make(function: Callable[..., int], kind: str, *arguments: Any) -> Any:
    """Makes a call whose last result but the error is a new object, which is freed with the last reference to it."""
    out = ffi.new(f"vmbed_{kind} **")
    call(function, *arguments, out)
    return ffi.gc(out[0], getattr(lib, f"vmbed_{kind}_free"))


def text(pointer: Any) -> str:
    """A string of the library's; empty for NULL."""
    return "" if pointer == ffi.NULL else ffi.string(pointer).decode(errors="replace")


def optional(value: str | bytes | None) -> Any:
    """A string for the library; NULL for None."""
    if value is None:
        return ffi.NULL
    return ffi.new("char[]", value.encode() if isinstance(value, str) else value)


def structure(kind: str, /, **fields: Any) -> Any:
    """A structure that carries its size."""
    made = ffi.new(f"{kind} *", fields)
    made.size = ffi.sizeof(kind)
    return made


def numbers(values: list[int] | None) -> Any:
    """Numbers for the library; NULL for None, and not for none of them."""
    return ffi.NULL if values is None else ffi.new("uint32_t[]", values or [0])


class HasFileno(Protocol):
    """A file, socket, pipe or the like."""

    def fileno(self) -> int:
        """Its descriptor."""


def fileno(file: int | HasFileno) -> int:
    """The descriptor of a file, or one."""
    return file if isinstance(file, int) else file.fileno()


T = TypeVar("T", bound=tuple[Any, ...])


_LETTERS = {"uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i"}


def filled(kind: str, made: type[T], function: Callable[..., int]) -> Callable[..., T]:
    """A call that has the library fill a structure of numbers, and answers it as a named tuple of the same names, in the same order. Read at
    once, and everything looked up beforehand: embedders ask for statistics often."""
    names: tuple[str, ...] = getattr(made, "_fields")
    layout, end = "=", 0
    members = dict(ffi.typeof(kind).fields)
    for name in names:
        field = members[name]
        layout += f"{field.offset - end}x{_LETTERS[field.type.cname]}"
        end = field.offset + ffi.sizeof(field.type)
    pointer, first = ffi.typeof(f"{kind} *"), (ffi.sizeof(kind),)
    unpack = struct.Struct(layout).unpack_from
    new, buffer, null, construct = ffi.new, ffi.buffer, ffi.NULL, tuple.__new__

    def ask(*arguments: Any) -> T:
        found = new(pointer, first)
        # Most calls work: an error is asked for when there is one, by asking once more.
        if function(*arguments, found, null):
            call(function, *arguments, found)
        return construct(made, unpack(buffer(found)))

    return ask


def take_error(status: int, error: Any) -> Error:
    """What an error says, as an exception; frees it."""
    try:
        sources: list[str] = []
        fields: list[Field] = []
        while (source := lib.vmbed_error_source(error, len(sources))) != ffi.NULL:
            sources.append(text(source))
        while (field := lib.vmbed_error_field(error, len(fields))) != ffi.NULL:
            index = len(fields)
            problem, remedy = lib.vmbed_error_problem(error, index), lib.vmbed_error_remedy(error, index)
            fields.append(Field(text(field), text(problem), text(remedy)))
        message, errno = text(lib.vmbed_error_message(error)), lib.vmbed_error_errno(error)
        made = by_status(status)(message or f"status {status}", status, errno, sources, fields)
        verdict = structure("vmbed_verdict")
        if isinstance(made, Refused) and lib.vmbed_error_verdict(error, verdict):
            made.verdict = Verdict._of(verdict)
        return made
    finally:
        lib.vmbed_error_free(error)


def hold(value: object) -> Any:
    """A pointer that stands for `value` in callbacks, and keeps it alive until `let_go`."""
    handle = ffi.new_handle(value)
    _held.add(handle)
    return handle


@ffi.callback("void(void *)")  # type: ignore[untyped-decorator]
def let_go(handle: Any) -> None:
    """The library's last word about a callback's data."""
    _held.discard(handle)
