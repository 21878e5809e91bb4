"""The configuration in force, and how SIGHUP replaces it while the gateway runs.

It changes what may change (the shared limits, the log, the paths of the certificate) and says in the log what
waits for a restart. The trap: a file with a mistake in it must change nothing at all, so everything is read
and checked before anything is applied.
"""

from typing import Final

import structlog
import trio

from gateway.config import Config, ConfigError, Origins
from gateway.core.limits import Limits
from gateway.core.log import configure
from gateway.core.threads import in_thread
from gateway.options import OPTIONS

log = structlog.get_logger("gateway.reload")


class Configuration:
    """The present configuration. `limits` is one object for the gateway's whole life; its values change."""

    def __init__(self, origins: Origins, config: Config) -> None:
        self.started: Final = config
        """What the gateway started with: what isn't live stays as it is there."""
        self.current = config
        self.limits: Final = Limits()
        self.limits.adopt(config.limits)
        self.reloading: Final = trio.Lock()
        """Held by whoever reloads: two at once could leave the older file in force."""
        self._origins: Final = origins

    async def reload(self) -> None:
        """Read everything anew. What came of it is in the log; a mistake leaves the old values."""
        try:
            new = await in_thread(self._origins.read, abandon_on_cancel=True)
        except ConfigError as error:
            log.warning("the configuration was not reloaded; the old one stays in use", why=str(error))
            return
        old, self.current = self.current, new
        configure(new.log_level, form=new.log_format)
        live = {each.limit.name for each in OPTIONS if each.limit is not None and each.live}
        self.limits.adopt({name: value for name, value in new.limits.items() if name in live})
        changed = [
            each.path for each in OPTIONS if each.live and old.value(each.path) != new.value(each.path)
        ]
        waiting = [
            each.path
            for each in OPTIONS
            if not each.live and self.started.value(each.path) != new.value(each.path)
        ]
        log.info("configuration reloaded", file=new.file, changed=changed)
        if waiting:
            log.warning("these options change only by a restart", options=waiting)
