#!/usr/bin/env -S .venv/bin/python
"""The HTTP door beside its peers: uploads and downloads, plain and TLS, memory, start, sparse images.

    scripts/bench http [--size MiB] [--rounds N] [--only GROUP] [--directory DIR]

All contestants run in the same rounds with the same curl and the same source, which lies in memory. A
markdown table goes to stdout, progress to stderr. The exit status says whether it ran, never how fast.

The trap: this file's name is that of a standard-library package, so its directory must not be on sys.path.
"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(dirname(abspath(__file__))))

# ruff: noqa: E402
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from scripts.benchmarks.harness import chain
from scripts.benchmarks.harness.groups import Benchmark, add_groups, run_groups
from scripts.benchmarks.harness.measure import GIB, MIB, interleave, timed
from scripts.benchmarks.harness.peers import BareReceiver, Imageio, Nginx, PeerUnavailableError
from scripts.benchmarks.harness.workplace import Workplace, options_of, workplace, write_noise

CIPHER = "TLS_AES_256_GCM_SHA384"


class Bench(Benchmark):
    def __init__(self, place: Workplace, size: int, rounds: int) -> None:
        super().__init__(place, size, rounds)
        self.memory = place.memory
        self.source = self.memory / "source"
        write_noise(self.source, size)

    def nginx(self, directory: Path) -> Nginx | None:
        chain_file, key, _authority = self.gateway.certificate
        self.peers.callback(shutil.rmtree, directory / "nginx", ignore_errors=True)
        try:
            peer = self.peers.enter_context(Nginx(directory / "nginx", chain_file, key))
        except PeerUnavailableError as error:
            self.note(str(error))
            return None
        self.note(
            f"nginx is {peer.version}, large buffers, no tcp_nopush; its upload spools beside its target"
        )
        return peer

    def note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def curl(self, *arguments: str) -> None:
        authority = str(self.gateway.certificate[2])
        subprocess.run(
            ["curl", "-sS", "--fail", "-o", "/dev/null", "--cacert", authority, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def put(self, url: str, *arguments: str, source: Path | None = None) -> Callable[[], float]:
        return lambda: timed(lambda: self.curl(*arguments, "-T", str(source or self.source), url))

    def get(self, url: str, *arguments: str) -> Callable[[], float]:
        return lambda: timed(lambda: self.curl(*arguments, url))

    # --- the groups -----------------------------------------------------------------------------------------

    def uploads(self) -> None:
        """PUT to disk, until every contestant's bytes are durable."""
        vdi = self.gateway.create_vdi("disk", self.size)
        contestants: dict[str, Callable[[], float]] = {"gateway": self.put(self.gateway.put_url(vdi))}
        if nginx := self.nginx(self.directory):
            contestants["nginx"] = lambda: timed(lambda: self._put_and_sync(nginx.url("upload"), nginx.files))
        target = self.directory / "imageio.raw"
        target.touch()
        os.truncate(target, self.size)
        try:
            imageio = self.peers.enter_context(Imageio(self.directory / "imageio", target, self.size))
        except PeerUnavailableError as error:
            self.note(f"ovirt-imageio was not measured: {error}")
        else:
            self.note(
                f"ovirt-imageio is {imageio.version} with its file backend (O_DIRECT), HTTP without TLS"
            )
            contestants["ovirt-imageio, curl"] = lambda: self._imageio(imageio, self.put(imageio.url))
            contestants["ovirt-imageio, its client"] = lambda: self._imageio(
                imageio, lambda: imageio.upload_with_its_client(self.source)
            )
        bare = self.peers.enter_context(BareReceiver())
        contestants["bare receiver"] = self.put(bare.url)
        rounds = interleave("PUT to disk", self.size, contestants, rounds=self.rounds)
        name = f"PUT {self.size // MIB} MiB into a thin VHD, until durable"
        self.report.compare(name, rounds, "gateway", "nginx", at_least=1.2)
        self.report.compare(name, rounds, "gateway", "ovirt-imageio, its client", at_least=2)
        self.report.compare(name, rounds, "gateway", "ovirt-imageio, curl", at_least=2)
        self.report.compare(name, rounds, "gateway", "bare receiver", at_least=None)
        self.gateway.destroy_vdi(vdi)

    def uploads_to_memory(self) -> None:
        """PUT where fsync is free: what we cost before it."""
        vhd = self.gateway.create_vdi("memory", self.size)
        raw = self.gateway.create_vdi("memory", self.size, "raw")
        bare = self.peers.enter_context(BareReceiver())
        contestants: dict[str, Callable[[], float]] = {
            "gateway": self.put(self.gateway.put_url(vhd)),
            "gateway, raw": self.put(self.gateway.put_url(raw)),
            "bare receiver": self.put(bare.url),
        }
        if nginx := self.nginx(self.memory):
            contestants["nginx"] = self.put(nginx.url("upload"))
        rounds = interleave("PUT to memory", self.size, contestants, rounds=self.rounds)
        name = f"PUT {self.size // MIB} MiB, before the fsync (SR in memory)"
        self.report.compare(f"{name}, VHD", rounds, "gateway", "bare receiver", at_least=0.75)
        self.report.compare(f"{name}, raw", rounds, "gateway, raw", "bare receiver", at_least=0.75)
        self.report.compare(f"{name}, VHD", rounds, "gateway", "nginx", at_least=None)
        for vdi in (vhd, raw):
            self.gateway.destroy_vdi(vdi)

    def small_upload(self) -> None:
        source = self.memory / "small"
        write_noise(source, 64 * MIB)
        vdi = self.gateway.create_vdi("disk", 64 * MIB)
        rounds = interleave(
            "PUT 64 MiB",
            64 * MIB,
            {"gateway": self.put(self.gateway.put_url(vdi), source=source)},
            rounds=self.rounds,
        )
        median = sorted(rounds.seconds["gateway"])[self.rounds // 2]
        self.report.figure("PUT 64 MiB into a thin VHD, until durable", median, "s", below=0.5)
        self.gateway.destroy_vdi(vdi)

    def downloads(self) -> None:
        vhd = self.gateway.create_vdi("disk", self.size)
        raw = self.gateway.create_vdi("disk", self.size, "raw")
        for vdi in (vhd, raw):
            self.curl("-T", str(self.source), self.gateway.put_url(vdi))
        contestants: dict[str, Callable[[], float]] = {
            "gateway": self.get(self.gateway.get_url(vhd)),
            "gateway, raw": self.get(self.gateway.get_url(raw)),
        }
        if nginx := self.nginx(self.directory):
            shutil.copyfile(self.source, nginx.files / "static")
            contestants["nginx"] = self.get(nginx.url("static"))
            contestants["nginx, sendfile off"] = self.get(nginx.url("read/static"))
        rounds = interleave("GET", self.size, contestants, rounds=self.rounds)
        name = f"GET {self.size // MIB} MiB, dense, from the page cache"
        self.report.compare(f"{name}, VHD", rounds, "gateway", "nginx", at_least=1.0)
        self.report.compare(f"{name}, raw", rounds, "gateway, raw", "nginx", at_least=1.0)
        self.report.compare(f"{name}, VHD", rounds, "gateway", "nginx, sendfile off", at_least=None)
        for vdi in (vhd, raw):
            self.gateway.destroy_vdi(vdi)

    def encrypted(self) -> None:
        options = ("--tlsv1.3", "--tls13-ciphers", CIPHER)
        vdi = self.gateway.create_vdi("disk", self.size)
        uploads: dict[str, Callable[[], float]] = {
            "gateway": self.put(self.gateway.put_url(vdi, tls=True), *options)
        }
        downloads: dict[str, Callable[[], float]] = {
            "gateway": self.get(self.gateway.get_url(vdi, tls=True), *options)
        }
        if nginx := self.nginx(self.directory):
            shutil.copyfile(self.source, nginx.files / "static")
            uploads["nginx"] = lambda: timed(
                lambda: self._put_and_sync(nginx.url("upload", tls=True), nginx.files, *options)
            )
            downloads["nginx"] = self.get(nginx.url("static", tls=True), *options)
        self.note(f"HTTPS: TLS 1.3, {CIPHER}, the same EC P-256 certificate for both")
        put = interleave("HTTPS PUT", self.size, uploads, rounds=self.rounds)
        get = interleave("HTTPS GET", self.size, downloads, rounds=self.rounds)
        mib = self.size // MIB
        self.report.compare(
            f"HTTPS PUT {mib} MiB into a thin VHD, until durable", put, "gateway", "nginx", at_least=0.8
        )
        self.report.compare(f"HTTPS GET {mib} MiB, dense VHD", get, "gateway", "nginx", at_least=0.8)
        self.gateway.destroy_vdi(vdi)

    def memory_of_eight(self) -> None:
        """Peak resident size with eight uploads at once, of a gateway of its own: the peak never falls."""
        size = min(self.size, 512 * MIB)
        source = self.memory / "eighth"
        write_noise(source, size)
        with self.place.gateway("eight") as gateway:
            vdis = [gateway.create_vdi("disk", size) for _ in range(8)]
            uploads = [
                subprocess.Popen(["curl", "-sS", "--fail", "-o", "/dev/null", "-T", str(source), url])
                for url in map(gateway.put_url, vdis)
            ]
            for upload in uploads:
                if upload.wait():
                    raise RuntimeError(f"an upload ended with {upload.returncode}")
            peak = gateway.peak_memory()
        self.report.figure("peak memory of the gateway, 8 uploads at once", peak / MIB, "MiB", below=150)

    def start(self) -> None:
        """From the start of the program on an empty state directory to its first answered login."""
        seconds = self.gateway.seconds_to_answer
        self.report.figure("first start to first answered login", seconds, "s", below=2)

    def chain_open(self) -> None:
        directory = self.directory / "chain"
        directory.mkdir()
        self.report.figure(
            "opening a full 2040 GiB VHD chain of depth 3", chain.milliseconds(directory, 3), "ms", below=20
        )

    def sparse(self) -> None:
        """A 64 GiB image that is holes but for 1 GiB in 64 pieces."""
        size, pieces = 64 * GIB, 64
        source = self.memory / "sparse"
        with source.open("wb") as file:
            file.truncate(size)
            for piece in range(pieces):
                file.seek(piece * (size // pieces))
                file.write(os.urandom(GIB // pieces))
        vdi = self.gateway.create_vdi("disk", size)
        taken = self.put(self.gateway.put_url(vdi), source=source)()
        stored = self.gateway.image("disk", vdi).stat().st_blocks * 512
        self.report.figure(
            f"stored of 64 GiB with 1 GiB of data (sent in {taken:.0f} s)", stored / GIB, "GiB", below=1.05
        )
        source.unlink()
        self.gateway.destroy_vdi(vdi)

    # --- steps ----------------------------------------------------------------------------------------------

    def _put_and_sync(self, url: str, files: Path, *options: str) -> None:
        self.curl(*options, "-T", str(self.source), url)
        fd = os.open(files / "upload", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _imageio(peer: Imageio, upload: Callable[[], float]) -> float:
        """Into an empty thin file each time, as a new disk is, and as ours is."""
        size = peer.target.stat().st_size
        os.truncate(peer.target, 0)
        os.truncate(peer.target, size)
        os.sync()
        return upload()


GROUPS: dict[str, Callable[[Bench], None]] = {
    "start": Bench.start,
    "chain": Bench.chain_open,
    "put": Bench.uploads,
    "put-memory": Bench.uploads_to_memory,
    "small": Bench.small_upload,
    "get": Bench.downloads,
    "tls": Bench.encrypted,
    "memory": Bench.memory_of_eight,
    "sparse": Bench.sparse,
}
ON_REQUEST = {"sparse"}  # curl reads 64 GiB of zeroes: a minute


def main() -> None:
    parser = options_of("http", __doc__, directory="on the disk to measure")
    add_groups(parser, GROUPS, size=1024, of="of the image")
    options = parser.parse_args()
    options.only = options.only or [name for name in GROUPS if name not in ON_REQUEST]
    with workplace("http", options.directory) as place:
        run_groups(Bench, GROUPS, place, options)


if __name__ == "__main__":
    main()
