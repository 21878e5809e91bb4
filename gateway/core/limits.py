"""Every limit of the gateway in one place, each with its reason. Times are seconds, sizes are bytes."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults suit one gateway with a few dozen clients; tests make their own."""

    # A close reaches us a little late (nbdkit, FUSE and HTTP all tear down asynchronously), so asking for a
    # lease waits as long as that takes, and no longer than a person accepts before an answer.
    lease_wait: float = 5.0

    # A client that sends nothing for so long is gone: a TCP peer that lost its power never says so.
    transfer_idle: float = 60.0
    # All headers must have come by then: a client that dribbles them holds a connection for nothing.
    header_seconds: float = 15.0
    # A session, a task and a VDI reference in the query take 230 bytes; 64 KiB leave room for every cookie
    # jar.
    header_bytes: int = 64 * KIB
    # Between two requests on one connection; longer than a browser's poll, shorter than a firewall's memory.
    keepalive_idle: float = 60.0
    # Below the usual limit of 1024 descriptors, with room for the image files of every chain.
    connections: int = 512
    # Each holds a worker thread and a buffer; more of them only make each slower.
    transfers: int = 16
    # XenAPI calls are small; an uploader sends its disks over HTTP.
    rpc_body_bytes: int = 4 * MIB
    # After a refusal the body that is already under way is read and thrown away, or the reset would eat our
    # answer.
    refusal_drain_bytes: int = 16 * MIB
    refusal_drain_seconds: float = 5.0
    # With no length given, bytes past the virtual size may still come; so long is waited for the one that
    # proves it.
    excess_wait: float = 1.0
    # What stops with SIGTERM gets so long to end in order.
    shutdown_seconds: float = 10.0

    # Holders of leases come back within a second of a restart; those who have not after this are dead.
    announce_seconds: float = 10.0
    # xapi keeps finished tasks for a day too.
    task_keep_seconds: float = 24 * 3600.0
    # A task record is about 1 KiB, and a list of more helps nobody.
    task_keep: int = 1000
    # Progress is asked for once a second; more events than that would only wake clients up.
    task_progress_seconds: float = 1.0

    # xapi's default.
    session_idle: float = 24 * 3600.0
    # Being used is written down at most this often: a restart may shorten a session by as much.
    session_touch_seconds: float = 60.0
    # Clients that never log out must not fill the memory; each user's least recently used session goes.
    sessions_per_user: int = 500

    # A verified Basic password is believed so long without another hash.
    basic_cache_seconds: float = 600.0
    basic_cache_entries: int = 1024
    # A wrong password costs this, doubled with each further one up to the maximum.
    password_delay_first: float = 0.25
    password_delay_maximum: float = 4.0
    # Wrong passwords are forgotten after so long without another one.
    password_delay_forget: float = 300.0
    # So many users and so many addresses are remembered; the longest untouched go.
    password_delay_entries: int = 4096
    # An address whose attempts have queued up for longer is refused at once: waiting must not pile up
    # connections.
    password_queue_seconds: float = 30.0

    # Changes of so many objects are remembered for event.from; a client that comes later starts again.
    event_entries: int = 16384
