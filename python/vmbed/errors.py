"""What calls raise when they fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One thing that is wrong: where, what, and what would be right."""

    name: str
    problem: str
    remedy: str


class Error(Exception):
    """A call failed, and changed nothing. Its text says what was being done, and why it failed."""

    #: One of the header's VMBED_ERR_*.
    code: int
    #: The host's errno, or 0.
    errno: int
    #: What lies behind it, outermost first.
    sources: list[str]
    #: Every bad field of a configuration, or every constraint of a refusal.
    fields: list[Field]

    def __init__(self, message: str, code: int, errno: int, sources: list[str], fields: list[Field]) -> None:
        super().__init__(message)
        self.code, self.errno, self.sources, self.fields = code, errno, sources, fields
        if sources:
            cause = sources[0]
            self.__cause__ = OSError(errno, cause) if errno else Exception(cause)


class InvalidArgument(Error):
    """An argument is wrong; the text names it."""


class InvalidState(Error):
    """The object is in no state for this call."""


class NotFound(Error):
    """A file, device or interface does not exist."""


class PermissionDenied(Error):
    """The host does not let this process do it."""


class Busy(Error):
    """Somebody else uses it."""


class Unsupported(Error):
    """This host, or this version of vmbed, cannot do it."""


class BadImage(Error):
    """A kernel, initrd or disk image is not what it should be."""


class Exhausted(Error):
    """The host ran out of something."""


class Refused(Error):
    """The ledger has not that much to give; `fields` has the slack on every constraint."""


class TimedOut(Error):
    """It has not happened in time."""


class HostError(Error):
    """The host's kernel failed; `errno` says how."""


class Internal(Error):
    """A defect in vmbed."""


_STATUS: dict[int, type[Error]] = {
    -1: InvalidArgument,
    -2: InvalidState,
    -3: NotFound,
    -4: PermissionDenied,
    -5: Busy,
    -6: Unsupported,
    -7: BadImage,
    -8: Exhausted,
    -9: Refused,
    -10: TimedOut,
    -11: HostError,
    -12: Internal,
}


def by_status(status: int) -> type[Error]:
    """The class for one of VMBED_ERR_*."""
    return _STATUS.get(status, Error)
