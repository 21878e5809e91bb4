"""The supervisor's workers, from their start to their end: those on both pools of sockets, and orphans.

An orphan is a worker of a supervisor that was killed: it serves who is with it, and is no child of this
process. All workers are listed in nbd-workers in the state directory, for the supervisor after one that was
killed. The trap: the number of a process may be another one's by then; so its start time stands beside it.
"""

import contextlib
import math
import os
import signal
import time
from functools import partial
from typing import Final

from nbd_plugin.pool import Pool
from nbd_plugin.supervisor_events import Events
from nbd_plugin.supervisor_log import Log
from nbd_plugin.supervisor_options import Refused
from nbd_plugin.supervisor_repeats import Repeats
from nbd_plugin.worker import Worker, find_again

LIST: Final = "nbd-workers"
_OF_ITSELF: Final = ("exit code", "SIGABRT")


class Workers:
    """Those of the pools and orphans. The current directory is the state directory."""

    def __init__(self, public: Pool, private: Pool, events: Events, log: Log) -> None:
        self.generation = 1
        self.problem: str | None = None
        """What goes wrong now, for people."""
        self.begun = False
        """Whether clients have been answered once. Until then what goes wrong is raised as Refused."""
        self._public: Final = public
        self._private: Final = private
        self._pools: Final = (public, private)
        self._events: Final = events
        self._log: Final = log
        self._repeats: Final = Repeats()
        self._watched: set[Worker] = set()
        self._orphans: set[Worker] = set()
        self._leaving = False
        self._listed = True
        self._find_orphans()
        self._watch_demand(private)

    @property
    def present(self) -> set[Worker]:
        """All but orphans."""
        return self._public.workers | self._private.workers

    @property
    def everybody(self) -> set[Worker]:
        return self.present | self._orphans

    @property
    def clients(self) -> int:
        """How many clients are connected, as of the last count."""
        return sum(each.clients for each in self.everybody)

    @property
    def accept(self) -> bool:
        """Whether one of them may still accept clients."""
        return not self._leaving or not all(each.draining for pool in self._pools for each in pool.leaving)

    @property
    def due(self) -> list[float]:
        """When something is due: a start that has to be tried again, or a line that has come again."""
        times = [self._repeats.due, *(pool.again_at for pool in self._pools)]
        return [each for each in times if each is not None]

    def fill(self, now: float) -> None:
        """Start those that are missing and due. Raises Refused."""
        for pool in self._pools:
            if pool is self._public or pool.again_at is not None:
                self._fill(pool, now)

    def count_clients(self) -> None:
        """Ask each how many clients are with it; the answers come later."""
        for worker in self.present:
            worker.tell("count")

    def tell_repeats(self, now: float = math.inf) -> None:
        """Log how often lines have come again, as far as that is due; at the end all that was counted."""
        for line, level, again in self._repeats.counted(now):
            write = self._log.error if level == "error" else self._log.info
            write("nbdkit has said this again", line=line, times=again)

    def replace(self) -> None:
        """Have new workers take over that have got ready since the last time."""
        for pool in self._pools:
            if pool.look():
                self.generation += 1
                self.problem = None
                self._log.info("new workers have taken over", generation=self.generation)

    def renew(self, tls: str | None) -> None:
        """Begin to replace the present ones by new ones, with the certificates as they are now."""
        self.problem = None
        try:
            self._public.replace_by(self._public.with_tls(tls))
        except OSError as error:
            self._public.abandon_replacement()
            self.problem = f"new workers can't be started: {error}"
            self._log.error("new workers can't be started; the old ones stay", why=str(error))
        finally:
            self._keep(self._public)

    # The end

    def leave(self, how: str) -> None:
        """Accept nobody any more: `drain` serves those who are there, `stop` what they have asked already."""
        self._leaving = True
        for pool in self._pools:
            for each in pool.sockets:
                if each.fileno() >= 0:
                    self._events.forget(each.fileno())
            pool.stop(how)
        if how == "stop":
            # Orphans can't be told otherwise, and one that is only starting listens to nothing else.
            for worker in self._orphans | {each for each in self.present if not each.ready}:
                worker.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End those that don't end."""
        for worker in self.everybody:
            self._log.warning("a worker that doesn't end is killed", process=worker.pid)
            worker.signal(signal.SIGKILL)

    def hand_over(self) -> None:
        """Write the list for the last time: from now on it is that of the supervisor that takes over."""
        self._write_list()
        self._listed = False

    # What happens to them

    def _fill(self, pool: Pool, now: float) -> None:
        try:
            pool.fill(now)
        except OSError as error:
            self.problem = f"nbdkit can't be started: {error.strerror}"
            self._log.error("a worker can't be started", why=str(error))
            if not self.begun:
                raise Refused(self.problem) from error
        finally:
            self._keep(pool)
        self._watch_demand(pool)

    def _keep(self, pool: Pool) -> None:
        """Watch those that have been started, also if others couldn't be."""
        started = pool.workers - self._watched
        self._watched |= started
        for worker in started:
            assert worker.leash is not None
            assert worker.log is not None
            self._events.watch(worker.pidfd, partial(self._ended, pool, worker))
            self._events.watch(worker.leash.fileno(), partial(self._hear, worker))
            self._events.watch(worker.log, partial(self._read_log, worker))
            self._log.info("worker started", process=worker.pid, private=pool.options.private)
        if started:
            self._write_list()

    def _watch_demand(self, pool: Pool) -> None:
        """A socket of a worker that isn't there yet is looked at until somebody comes."""
        for each in pool.sockets:
            fd = each.fileno()
            if fd < 0:
                continue
            if pool.waits_for_demand:
                self._events.watch(fd, partial(self._demanded, pool))
            else:
                self._events.forget(fd)

    def _demanded(self, pool: Pool) -> None:
        self._fill(pool, time.monotonic())

    def _hear(self, worker: Worker) -> None:
        if not worker.reports():
            assert worker.leash is not None
            self._events.forget(worker.leash.fileno())

    def _read_log(self, worker: Worker) -> None:
        lines = worker.lines()
        now = time.monotonic()
        for line in lines or ():
            told = worker.tracebacks.feed(line)
            if told is not None and self._repeats.is_first(told.line, told.level, now):
                write = self._log.error if told.level == "error" else self._log.info
                more = {} if told.traceback is None else {"traceback": told.traceback}
                write("nbdkit says", process=worker.pid, line=told.line, **more)
        if lines is None:
            assert worker.log is not None
            self._events.forget(worker.log)
            worker.close_log()

    def _ended(self, pool: Pool, worker: Worker) -> None:
        self._watched.discard(worker)
        self._events.forget(worker.pidfd)
        if worker.leash is not None:
            self._events.forget(worker.leash.fileno())
        if worker.log is not None:
            self._read_log(worker)
        if worker.log is not None:
            self._events.forget(worker.log)
        how = worker.reap()
        replaced = pool.is_being_replaced and worker not in pool.present
        if pool.ended(worker, time.monotonic()) and not self._leaving:
            # Who is killed says nothing of that; what it said before was about something else.
            reason = worker.said[-1] if worker.said and how.startswith(_OF_ITSELF) else how
            if not self.begun:
                raise Refused(f"nbdkit doesn't start: {reason}")
            self.problem = f"a worker ended by itself: {reason}"
            if replaced:
                self._log.error("new workers don't start; the old ones stay", why=reason)
            else:
                self._log.error(
                    "a worker ended by itself and is started again", process=worker.pid, how=how, why=reason
                )
        else:
            self._log.info("worker ended", process=worker.pid, how=how)
        self._watch_demand(pool)
        self._write_list()

    # The list

    def _find_orphans(self) -> None:
        try:
            with open(LIST, encoding="ascii") as file:
                marks = [tuple(map(int, line.split())) for line in file]
        except (OSError, ValueError):
            return
        for mark in marks:
            worker = find_again(*mark) if len(mark) == 2 else None
            if worker is not None:
                self._orphans.add(worker)
                self._events.watch(worker.pidfd, partial(self._orphan_ended, worker))
                self._log.info("a worker of the supervisor before serves its clients", process=worker.pid)

    def _orphan_ended(self, worker: Worker) -> None:
        self._events.forget(worker.pidfd)
        self._orphans.discard(worker)
        worker.reap()
        self._write_list()

    def _write_list(self) -> None:
        if not self._listed:
            return
        lines = []
        for worker in self.everybody:
            with contextlib.suppress(OSError):
                lines.append("{} {}\n".format(*worker.mark))
        try:
            with open(f"{LIST}.new", "w", encoding="ascii") as file:
                file.writelines(lines)
            os.replace(f"{LIST}.new", LIST)
        except OSError as error:
            self._log.warning("the list of workers can't be written", why=str(error))
