"""The library behind the package, and what every call needs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Callable, Generic, TypeVar

from vmbed._cdef import ffi as _ffi

from .errors import Error, Field, by_status

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


def structure(kind: str, **fields: Any) -> Any:
    """A structure that carries its size."""
    made = ffi.new(f"{kind} *", fields)
    made.size = ffi.sizeof(kind)
    return made


T = TypeVar("T", bound=tuple[Any, ...])


class Filled(Generic[T]):
    """A structure of numbers that the library fills, as a named tuple of the same names: read at once, since embedders ask
    for statistics often."""

    _LETTERS = {"uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i"}

    def __init__(self, kind: str, made: type[T]) -> None:
        names: tuple[str, ...] = getattr(made, "_fields")
        members = [(name, field.type.cname) for name, field in ffi.typeof(kind).fields[1 : len(names) + 1]]
        assert tuple(name for name, _ in members) == names, f"{kind} is not {made.__name__}"
        self._type, self._size, self._made = ffi.typeof(f"{kind} *"), ffi.sizeof(kind), made
        letters = "".join(self._LETTERS[cname] for _, cname in members)
        self._unpack = struct.Struct(f"=8x{letters}").unpack_from

    def ask(self, function: Callable[..., int], *arguments: Any) -> T:
        """What the function fills."""
        found = _new(self._type)
        found.size = self._size
        call(function, *arguments, found)
        return tuple.__new__(self._made, self._unpack(ffi.buffer(found)))


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
        return by_status(status)(message or f"status {status}", status, errno, sources, fields)
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
