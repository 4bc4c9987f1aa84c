"""A server under many streams: errors, speed, what it costs by process, and whether all is given back afterwards."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import ConfigError
from radixmesh.bench.load import Wanted, load
from radixmesh.bench.workloads import HIGH, workload

URL = re.compile(r"http://[\w.\-\[\]:]+:\d+")
START_SECONDS, STOP_SECONDS, SETTLE_SECONDS, WHOLE_SECONDS = 300.0, 60.0, 15.0, 600.0
TICK = os.sysconf("SC_CLK_TCK")
ENGINE = "engine.run"
"""What stands in the command line of the engine's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server that is measured. pid: of its first process; None when it can't be seen from here."""

    host: str
    port: int
    pid: int | None
    key: str | None

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {self.key}"} if self.key else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@contextmanager
def started(arguments: Sequence[str], key: str | None = None, env: Mapping[str, str] | None = None) -> Iterator[Peer]:
    """A process of python that prints its URL when it listens. Raises ConfigError with its last line if it ends.

    What it prints goes to files: a pipe that nobody reads would stop it.
    """
    with tempfile.TemporaryFile("w+") as log, tempfile.NamedTemporaryFile("r") as said:
        with open(said.name, "w") as out:
            process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=log, env=env)
        try:
            until = time.monotonic() + START_SECONDS
            while not (found := URL.search(Path(said.name).read_text())):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                    raise ConfigError(f"url: the server did not start: {last}", field="url")
                time.sleep(0.05)
            yield peer_at(found[0], key, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def peer_at(url: str, key: str | None, pid: int | None = None) -> Peer:
    """The server of a URL. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ConfigError(f"url: {url}: write it like http://127.0.0.1:30000", field="url")
    return Peer(host=parts.hostname, port=parts.port, pid=pid or listener(parts.port), key=key)


def listener(port: int) -> int | None:
    """The process of this machine that listens on a port, if it may be seen."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{words[9]}]")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(fd) in sockets for fd in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return min(found, default=None)


def processes(first: int | None) -> dict[int, str]:
    """A process and its children, by name: "api" and "engine", or "other"."""
    if first is None:
        return {}
    out = {first: "api"}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda f: int(f.name)):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in out and int(folder.name) not in out:
                said = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                out[int(folder.name)] = "engine" if ENGINE in said else "other"
    return out


def reading(peer: Peer, pids: Mapping[int, str]) -> dict[str, Any]:
    """CPU seconds, resident MiB and open sockets by process, and the pages that requests hold."""
    out: dict[str, Any] = {name: {"cpu": 0.0, "rss_mib": 0.0, "sockets": 0} for name in pids.values()}
    for pid, name in pids.items():
        folder = Path(f"/proc/{pid}")
        with suppress(OSError):
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            out[name]["cpu"] += (int(words[11]) + int(words[12])) / TICK
            rss = re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
            out[name]["rss_mib"] += int(rss[1]) / 1024 if rss else 0.0
            out[name]["sockets"] += sum(os.readlink(f).startswith("socket:") for f in (folder / "fd").iterdir())
    return out


def held(peer: Peer) -> tuple[int, int] | None:
    """Requests that are open and pages that they hold; None for a server that does not tell."""
    status, body = peer.get("/server_info")
    if status != 200:
        return None
    said = json.loads(body)
    accounts = (said.get("stats") or {}).get("accounts", [])
    return said.get("open_requests", 0), sum(a["locked"] + a["owned"] for a in accounts)


def run(wanted: Wanted) -> dict[str, Any]:
    """The load, from a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
        return alone.submit(load, wanted).result()


def measure(
    peer: Peer, streams: int, seconds: float, made: int, name: str | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """Streams of completions. made: tokens of an answer. name: of a workload, whose every request is sent once,
    instead. Warms up for a moment first, so that memory has settled."""
    bodies = [_body(f"def f{i}(x, y):\n", made, 1.0, i) for i in range(streams)]
    until = time.monotonic() + START_SECONDS
    while peer.get("/readyz")[0] != 200:
        if time.monotonic() > until:
            raise ConfigError(f"url: {peer.host}:{peer.port} does not become ready", field="url")
        time.sleep(0.1)
    wanted = Wanted(
        host=peer.host, port=peer.port, path="/v1/completions", key=peer.key, streams=streams, requests=bodies,
        seconds=seconds,
    )  # fmt: skip
    run(replace(wanted, seconds=1.0))
    if name is not None:
        w = workload(name, scale, min(HIGH, json.loads(peer.get("/server_info")[1])["limits"]["vocab"]))
        asked = [_body(prompt, w.made, 0.0, i) for i, prompt in enumerate(w.prompts)]
        wanted = replace(wanted, requests=asked, seconds=WHOLE_SECONDS, count=len(asked))
    settled(peer)
    pids = processes(peer.pid)
    before = reading(peer, pids)
    figures = run(wanted)
    settle = settled(peer)
    after = reading(peer, pids)
    return figures | _costs(before, after, figures["tokens"]) | {"held_after": settle}


def _body(prompt: str | Sequence[int], made: int, temperature: float, seed: int) -> bytes:
    """Of a request."""
    asked = {"prompt": prompt, "max_tokens": made, "ignore_eos": True, "temperature": temperature, "seed": seed}
    return json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode()


def settled(peer: Peer) -> tuple[int, int] | None:
    """Wait until nothing is open; (requests, pages) that still are when patience ends."""
    until = time.monotonic() + SETTLE_SECONDS
    while (now := held(peer)) not in (None, (0, 0)) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)  # connections close, and are seen to
    return now


def _costs(before: Mapping[str, Any], after: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "cpu_us_per_token": {n: (after[n]["cpu"] - b["cpu"]) * 1e6 / max(tokens, 1) for n, b in before.items()},
        "rss_mib": {n: [b["rss_mib"], after[n]["rss_mib"]] for n, b in before.items()},
        "sockets": {n: [b["sockets"], after[n]["sockets"]] for n, b in before.items()},
    }


def measure_bare(streams: int, made: int, size: int, events: int) -> dict[str, Any]:
    """As many events of the same size from a bare uvicorn. made: of an answer."""
    with started(["-m", "radixmesh.bench.bare", str(made), str(size)]) as peer:
        wanted = Wanted(
            host=peer.host, port=peer.port, path="/stream", key=None, streams=streams, requests=[b"{}"], seconds=600,
            count=-(-events // made),
        )  # fmt: skip
        pids = processes(peer.pid)
        before = reading(peer, pids)
        figures = run(wanted)
        return figures | _costs(before, reading(peer, pids), figures["events"])


def table(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines for a person."""
    for name, f in figures.items():
        ttft, gap = f["ttft_seconds"], f["gap_seconds"]
        yield (
            f"{name}: {f['streams']} streams, {f['seconds']:.1f} s, {f['answers']} answers, "
            f"errors: {f['errors'] or 'none'}"
        )
        yield f"  {f['tokens']} tokens in {f['events']} events, {f['tokens_per_second']:.0f} tokens/s"
        for what, s in (("first event", ttft), ("between events", gap)):
            yield f"  {what:15}" + "".join(f"  {p} {v * 1e3:8.2f} ms" for p, v in s.items())
        for process, us in f["cpu_us_per_token"].items():
            rss, sockets = f["rss_mib"][process], f["sockets"][process]
            yield (
                f"  {process:8} {us:8.1f} us of CPU per token, {rss[0]:.0f} -> {rss[1]:.0f} MiB, "
                f"sockets {sockets[0]} -> {sockets[1]}"
            )
        yield f"  {'client':8} {f['client_cpu_us_per_token']:8.1f} us of CPU per token"
        if f.get("held_after") is not None:
            yield f"  left open: {f['held_after'][0]} requests, {f['held_after'][1]} pages"
