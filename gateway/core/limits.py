"""Every limit of the gateway in one place, each with its unit, its range and its reason.

Times are seconds, sizes are bytes. The reasons are data: `config-show` and the configuration reference print
them. All objects of one gateway share one Limits and read it whenever they need it; SIGHUP changes it in
place. The trap: whoever copies a value keeps the old one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
DAY: Final = 24 * 3600.0


class Unit(Enum):
    """What a limit counts."""

    SECONDS = "seconds"
    BYTES = "bytes"
    NUMBER = "number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What is known of one limit. `name` is its attribute of Limits, `key` what the configuration calls it.

    A limit that isn't `live` is read once at the start.
    """

    name: str
    key: str
    unit: Unit
    default: float
    least: float
    most: float
    reason: str
    live: bool


_ABOUT: Final = "limit"


def _limit(
    default: float,
    reason: str,
    *,
    unit: Unit,
    within: tuple[float, float],
    key: str = "",
    live: bool = True,
) -> Any:
    about = {"reason": reason, "unit": unit, "within": within, "key": key, "live": live}
    return field(default=default, metadata={_ABOUT: about})


def _seconds(
    default: float, within: tuple[float, float], reason: str, *, key: str = "", live: bool = True
) -> Any:
    return _limit(default, reason, unit=Unit.SECONDS, within=within, key=key, live=live)


def _bytes(default: int, within: tuple[int, int], reason: str, *, key: str = "") -> Any:
    return _limit(default, reason, unit=Unit.BYTES, within=within, key=key)


def _number(default: int, within: tuple[int, int], reason: str, *, live: bool = True) -> Any:
    return _limit(default, reason, unit=Unit.NUMBER, within=within, live=live)


@dataclass(slots=True)
class Limits:
    """The defaults suit one gateway with a few dozen clients; tests make their own, of any value."""

    lease_wait: float = _seconds(
        5.0,
        (0, 600),
        "a close reaches the gateway a little late, so a disk in use is waited for as long as that takes,"
        " and no longer than a person accepts before an answer",
    )

    transfer_idle: float = _seconds(
        60.0,
        (1, DAY),
        "a client that sends or takes nothing for so long is gone: a peer that lost its power never says so",
    )
    header_seconds: float = _seconds(
        15.0,
        (1, 600),
        "a request's whole head must have come by then: a client that dribbles it holds a connection for"
        " nothing",
        key="header_time",
    )
    header_bytes: int = _bytes(
        64 * KIB,
        (1 * KIB, 1 * MIB),
        "a session, a task and a VDI reference in the query take 230 bytes; this has room for cookies too",
        key="header_size",
    )
    keepalive_idle: float = _seconds(
        60.0,
        (1, DAY),
        "between two requests on one connection: longer than a client's poll, shorter than a firewall's"
        " memory",
    )
    connections: int = _number(
        512,
        (1, 100_000),
        "below the usual limit of 1024 descriptors, with room for the image files of every chain",
    )
    connections_per_address: int = _number(
        256,
        (1, 100_000),
        "one machine can't take all of them from the others; an IPv6 network (/64) counts as one machine, and"
        " so do all clients behind a proxy",
    )
    transfers: int = _number(
        16,
        (1, 1024),
        "each holds a worker thread and a buffer, and more of them only make each slower",
    )
    rpc_body_bytes: int = _bytes(
        4 * MIB,
        (4 * KIB, 64 * MIB),
        "XenAPI calls are small; disks come over other paths",
        key="rpc_body_size",
    )
    refusal_drain_bytes: int = _bytes(
        16 * MIB,
        (0, 1024 * MIB),
        "after a refusal so much of the body that is under way is read and thrown away, or the reset would"
        " eat the answer",
        key="refusal_drain_size",
    )
    refusal_drain_seconds: float = _seconds(
        5.0,
        (0, 600),
        "and no longer than this",
        key="refusal_drain_time",
    )
    excess_wait: float = _seconds(
        1.0,
        (0, 60),
        "of an upload without a length bytes past the virtual size may still come; so long is waited for the"
        " one that proves it",
    )
    spool_bytes: int = _bytes(
        1024 * 1024 * MIB,
        (1 * MIB, 64 * 1024 * 1024 * MIB),
        "a qcow2, VHDX or VMDK image lies whole in the SR's staging directory before it is read;"
        " one upload must not fill the SR with what it never uses",
        key="spool_size",
    )
    shutdown_seconds: float = _seconds(
        10.0,
        (0, 3600),
        "requests and transfers get so long to end when the gateway is stopped, before they are cancelled",
        key="shutdown_time",
    )

    announce_seconds: float = _seconds(
        10.0,
        (0, 600),
        "holders of leases come back within a second of a restart; those who have not after this are dead",
        key="announce_time",
        live=False,
    )
    task_keep_seconds: float = _seconds(
        DAY,
        (1, 365 * DAY),
        "xapi keeps finished tasks for a day too",
        key="task_keep_time",
    )
    task_keep: int = _number(
        1000,
        (1, 100_000),
        "so many finished ones of each user: each takes about 1 KiB, and a list of more helps nobody; and as"
        " many pending ones that clients make",
    )
    task_progress_seconds: float = _seconds(
        1.0,
        (0.1, 60),
        "progress is asked for once a second; more events than that would only wake clients up",
        key="task_progress_interval",
    )

    coalesce_interval: float = _seconds(
        300.0,
        (1, DAY),
        "an SR is looked at so often, beside what destroys and scans set off; what failed waits twice as long"
        " each time",
    )
    coalesce_first_seconds: float = _seconds(
        300.0,
        (0, 3600),
        "in a chain of 25 levels or on an SR 95 % full a coalesce goes before new requests for so long: the"
        " chain ends at 30",
        key="coalesce_first_time",
    )
    coalesce_first_pause_seconds: float = _seconds(
        1800.0,
        (0, DAY),
        "and then people go first for at least so long",
        key="coalesce_first_pause",
    )

    nbd_workers: int = _number(
        1,
        (1, 64),
        "one process serves several fast readers; more of them spread readers over more cores",
        live=False,
    )
    nbd_clients: int = _number(
        256,
        (1, 10_000),
        "in each worker; every client takes four threads and the descriptors of a chain's files",
        live=False,
    )

    session_idle: float = _seconds(DAY, (60, 365 * DAY), "xapi's default")
    session_touch_seconds: float = _seconds(
        60.0,
        (1, 3600),
        "that a session was used is written down at most this often: a restart may shorten one by as much",
        key="session_touch_interval",
    )
    sessions_per_user: int = _number(
        500,
        (1, 100_000),
        "clients that never log out must not fill the memory; each user's least recently used session goes",
    )

    basic_cache_seconds: float = _seconds(
        600.0,
        (0, DAY),
        "a verified Basic password is believed so long without another hash",
        key="basic_cache_time",
    )
    basic_cache_entries: int = _number(1024, (1, 100_000), "of so many different credentials")
    password_delay_first: float = _seconds(
        0.25,
        (0, 60),
        "the first wrong password costs this, each further one twice as much",
    )
    password_delay_maximum: float = _seconds(
        4.0,
        (0, 600),
        "up to this: a guesser gets nowhere, and a person who mistyped waits for it",
    )
    password_delay_forget: float = _seconds(
        300.0,
        (1, DAY),
        "wrong passwords are forgotten after so long without another one",
    )
    password_delay_entries: int = _number(
        4096,
        (16, 1_000_000),
        "so many users and so many addresses are remembered; the longest untouched go",
    )
    password_queue_seconds: float = _seconds(
        30.0,
        (1, 600),
        "an address whose attempts have queued up for longer is refused at once: waiting must not pile up"
        " connections",
        key="password_queue_time",
    )

    event_entries: int = _number(
        16384,
        (16, 1_000_000),
        "changes of so many objects are remembered for event.from; a client that comes later starts again",
        live=False,
    )

    def adopt(self, values: Mapping[str, float]) -> None:
        """Take other values, by attribute; all that share this object go by them from now on."""
        for name, value in values.items():
            setattr(self, name, value)


def _about(each: Any) -> Limit:
    about = each.metadata[_ABOUT]
    least, most = about["within"]
    return Limit(
        name=each.name,
        key=about["key"] or each.name,
        unit=about["unit"],
        default=each.default,
        least=least,
        most=most,
        reason=about["reason"],
        live=about["live"],
    )


LIMITS: Final[tuple[Limit, ...]] = tuple(_about(each) for each in fields(Limits))
