"""What calls raise when they fail."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Field:
    """One thing that is wrong: where, what, and what would be right."""

    name: str
    problem: str
    remedy: str


class Constraint(IntEnum):
    """What the ledger keeps to."""

    #: One VM's memory keeps to the least, the most and the step that one VM may have.
    MEMORY_UNITS = 0
    #: One VM's shared vCPUs keep to the least, the most and the step that one VM may have.
    VCPU_UNITS = 1
    #: The VMs' memory sizes together stay within (total - reserved) x ratio.
    NOMINAL = 2
    #: Guarantees and overhead together stay within total - reserved.
    GUARANTEE = 3
    #: Everything that guests can touch, and overhead, stays within total - reserved + swap, unless the VM may be stopped.
    SOLVENCY = 4
    #: Free memory after the newcomer's guarantee covers what guests touch during the reaction time.
    HEADROOM = 5
    #: The VMs' shared vCPUs together stay within cores x ratio.
    VCPUS = 6
    #: Each dedicated vCPU has a core of its own.
    DEDICATED_VCPUS = 7


class Slack(NamedTuple):
    """How one constraint stands to a claim, in bytes or vCPUs."""

    #: `UNLIMITED` where it is not limited.
    limit: int
    used: int
    wanted: int
    #: What would be left; negative is how much is missing.
    left: int
    #: This alone forbids the claim.
    broken: bool


class Verdict(NamedTuple):
    """The ledger's answer to a claim."""

    #: The constraint that forbids it; None where it fits.
    binding: Constraint | None
    slack: dict[Constraint, Slack]

    @classmethod
    def _of(cls, given: Any) -> Verdict:
        binding = None if given.binding < 0 else Constraint(given.binding)
        slack = {}
        for constraint in Constraint:
            found = given.slack[constraint]
            slack[constraint] = Slack(found.limit, found.used, found.wanted, found.left, bool(found.broken))
        return cls(binding, slack)



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
    """The ledger has not that much to give; `fields` has the slack on every constraint, `verdict` the numbers."""

    verdict: Verdict | None = None


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
