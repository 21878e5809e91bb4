"""kill -9 at random moments of whoever takes part, while a client writes: what a flush has answered is there.

The client says what it is going to write and what has been flushed; a block that it was at may be either.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.nbd_plugin.served import NbdSite, serving
from tests.system.site import MIB, Vdi, stored_content, wait_until

BLOCK = 64 << 10
BLOCKS = 128
SIZE = BLOCK * BLOCKS

WRITER = f"""
import os, random, sys, nbd
client = nbd.NBD()
client.connect_uri(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
def say(what):
    # In one piece, also where Python is told not to buffer: it may be killed at any moment.
    os.write(1, f"{{what}} {{block}} {{value}}\\n".encode())
while True:
    block, value = chance.randrange({BLOCKS}), chance.randrange(1, 256)
    say("begin")
    client.pwrite(bytes([value]) * {BLOCK}, block * {BLOCK})
    client.flush()
    say("done")
"""

pytestmark = pytest.mark.skipif(shutil.which("nbdcopy") is None, reason="libnbd-bin is not installed")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_was_flushed_survives_kill_9_of_anybody_at_any_moment(tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED") or random.randrange(1 << 32))
    sys.stdout.write(f"KILL_SEED={seed}\n")
    chance = random.Random(seed)
    with serving(tmp_path) as site:
        vdi = site.create_vdi(SIZE)
        model: list[set[int]] = [{0} for _ in range(BLOCKS)]
        victims = ["worker", "supervisor", "client", "gateway"] * 5
        chance.shuffle(victims)
        for victim in victims:
            write_until_killed(site, vdi, victim, chance, model)
            if victim == "gateway":
                site.gateway.kill()  # It is dead; its end is waited for.
                site.gateway.start()
            check(site, vdi, model, tmp_path)
        assert site.gateway.stop() == 0
        wait_until(lambda: not site.workers() and not site.supervisors(), "all processes to end")
        assert site.gateway.command("vhd-check", str(vdi.file)).returncode == 0
        settle(model, stored_content(vdi))


def write_until_killed(
    site: NbdSite, vdi: Vdi, victim: str, chance: random.Random, model: list[set[int]]
) -> None:
    command = ["/usr/bin/python3", "-c", WRITER, site.private_uri(vdi, write=True), str(chance.random())[2:]]
    while True:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as writer:
            assert writer.stdout is not None
            line = writer.stdout.readline()
            if not line:
                continue  # The lease of the one before is about to end, or a new worker about to start.
            target = {"client": [writer.pid], "gateway": [site.gateway.pid]}.get(victim) or (
                site.workers() if victim == "worker" else site.supervisors()
            )
            timer = threading.Timer(chance.uniform(0, 0.3), kill, (target,))
            timer.start()
            done = 0
            while line:
                kind, block, value = line.split()
                if kind == "begin":
                    model[int(block)].add(int(value))
                else:
                    model[int(block)] = {int(value)}
                    done += 1
                if not timer.is_alive() and done >= 20 and victim in {"supervisor", "gateway"}:
                    writer.kill()  # It goes on as if nothing had happened, which is what is proved.
                line = writer.stdout.readline()
            timer.join()
            if victim in {"supervisor", "gateway"}:
                assert writer.wait() == -signal.SIGKILL, "the client has met an error"
            return


def kill(processes: list[int]) -> None:
    for each in processes:
        os.kill(each, signal.SIGKILL)


def check(site: NbdSite, vdi: Vdi, model: list[set[int]], tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"

    def copied() -> bool:
        command = ["nbdcopy", site.private_uri(vdi), str(copy)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    wait_until(copied, "the disk to be readable again", 60)
    settle(model, copy.read_bytes())


def settle(model: list[set[int]], content: bytes) -> None:
    """AssertionError unless every block is one of those it may be; from now on it is the one that it is."""
    assert len(content) == SIZE >= MIB
    for number, allowed in enumerate(model):
        block = content[number * BLOCK : (number + 1) * BLOCK]
        values = set(block)
        # A write that was under way may be there in part.
        assert values <= allowed, (number, values, allowed)
        if len(values) == 1:
            model[number] = values
