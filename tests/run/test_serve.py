"""`radixmesh serve` and `radixmesh doctor` as processes: how they start, how they end, what they say last."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from engine.errors import BackendLost
from radixmesh import cli
from radixmesh.commands import doctor, serve
from tests.text.made import made
from tests.tiny import tiny

HOME = Path(__file__).parent.parent.parent
SMALL = ("--backend", "reference", "--set", "slots=4", "--set", "max_tokens=32", "--set", "cache.tokens=8192")
LONG = {"prompt": "the dog", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = made("byte_level")
    tiny(path, vocab=len(tokenizer), max_len=4096, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return path


class Server:
    """`radixmesh serve`, and what it printed so far."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "radixmesh", "serve", "--port", "0", *SMALL, *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HOME, bufsize=1
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def find(self, pattern: str) -> re.Match[str]:
        """The first line that matches."""
        deadline = time.monotonic() + 30
        while True:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None or self._reader.is_alive(), self.lines
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return self.find(r"ready in [\d.]+ s at (http://127\.0\.0\.1:\d+)")[1]

    def engine(self) -> int:
        """Process id of the engine."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return int(" ".join(c.read_text() for c in children).split()[0])

    def end(self) -> int:
        """Wait for its exit code."""
        code = self.process.wait(30)
        self._reader.join()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()


@contextmanager
def server(*args: str) -> Iterator[Server]:
    s = Server(*args)
    try:
        yield s
    finally:
        s.kill()


class Reader:
    """Reads a stream of events in a thread."""

    def __init__(self, url: str, **more: Any) -> None:
        self.text, self.broken = "", False
        self.begun = threading.Event()
        self._url, self._body = url, LONG | more
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.begun.wait(30)

    def _run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=30) as answer:
                for part in answer.iter_text():
                    self.text += part
                    self.begun.set()
        except httpx.HTTPError:
            self.broken = True
        self.begun.set()

    def end(self) -> str:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.text


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_it_starts_drains_and_ends(folder: Path) -> None:
    with server("--model", str(folder), "--grpc-port", "0") as s:
        url, pid = s.url, s.engine()
        assert re.search(r"gRPC at 127\.0\.0\.1:\d+ \(model small, reference on cpu\)", s.lines[-1])
        stages = ["imports", "decisions", "device", "weights", "programs", "tokenizer", "memory"]
        assert [line.split()[0] for line in s.lines[:-1]] == stages
        with httpx.Client(base_url=url) as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/v1/models").json()["data"][0]["id"] == "small"
            reader = Reader(url, max_tokens=400)
            s.process.send_signal(signal.SIGTERM)
            s.find("stopping; 1 open requests have 30 s")
            assert client.get("/readyz").status_code == 503
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
            assert "[DONE]" in reader.end()
        assert s.end() == 0
        assert s.lines[-1] == "radixmesh: stopped; 1 ended, 0 were aborted"
        records = [json.loads(line) for line in s.lines if line.startswith("{")]
        assert [(r["reason"], r["completion_tokens"]) for r in records] == [("length", 400)]
        assert gone(pid)


def test_what_does_not_end_in_time_is_aborted(folder: Path) -> None:
    with server("--model", str(folder), "--set", "serve.drain=0") as s:
        readers = [Reader(s.url), Reader(s.url)]
        s.process.send_signal(signal.SIGINT)
        assert s.end() == 0
        assert s.lines[-1] == "radixmesh: stopped; 0 ended, 2 were aborted"
        assert all(not r.broken for r in readers if r.end())


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    with server("--model", str(folder)) as s:
        reader, pid = Reader(s.url), s.engine()
        s.process.send_signal(signal.SIGTERM)
        s.find("stopping; 1 open")
        s.process.send_signal(signal.SIGTERM)
        assert s.end() == 128 + signal.SIGTERM
        assert s.lines[-1] == "radixmesh: SIGTERM again: ended at once"
        reader.end()
        assert gone(pid)


def test_a_signal_before_it_is_ready(folder: Path) -> None:
    with server("--model", str(folder)) as s:
        s.find("imports")
        s.process.send_signal(signal.SIGTERM)
        assert s.end() == 128 + signal.SIGTERM
        assert s.lines[-1] == "radixmesh: SIGTERM before it was ready"


def test_an_engine_that_is_lost_ends_the_server(folder: Path) -> None:
    with server("--model", str(folder)) as s:
        reader = Reader(s.url)
        os.kill(s.engine(), signal.SIGKILL)
        assert "killed by SIGKILL" in reader.end()
        assert s.end() == 1
        assert s.lines[-1].startswith("radixmesh: the engine's process was killed by SIGKILL")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model", "nowhere"), "nowhere"),
        (("--backend", "torch", "--set", "backend.platform=gpu"), "no NVIDIA or AMD GPU is visible.*use platform cpu"),
    ],
)
def test_what_a_user_can_mend_is_the_last_line(args: tuple[str, ...], said: str) -> None:
    with server(*args) as s:
        assert s.end() == 2
        assert re.fullmatch(f"radixmesh: .*{said}.*", s.lines[-1])
        assert not any("Traceback" in line for line in s.lines)


def test_what_is_wrong_is_said_before_the_engine_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["radixmesh", "serve", "--model", str(folder), *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    monkeypatch.setattr("engine.run.process.ProcessClient.__init__", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert re.search(rf"serve\.port: .*:{port}: .* choose another with --port$", say("--port", port))
        wrong = say("--port", "0", "--grpc-port", port)
        assert re.search(rf"serve\.grpc_port: .*:{port}; .* choose another with --grpc-port$", wrong)
    assert "serve.grpc_port: 4321 is the port of HTTP too" in say("--port", "4321", "--grpc-port", "4321")
    assert "did you mean sched.slots" in say("--set", "sched.slotz=3")
    assert "serve.host: 256.1.1.1" in say("--host", "256.1.1.1")


def test_an_engine_that_is_lost_while_it_drains_is_not_told_as_a_clean_stop(capsys: pytest.CaptureFixture[str]) -> None:
    async def drain(seconds: float) -> int:
        return 0

    for lost, lines in ((None, ["stopping; 5", "stopped; 5"]), (BackendLost("gone"), ["stopping; 5"])):
        service: Any = SimpleNamespace(open_requests=5, drain=drain, lost=lost)
        asyncio.run(serve._drain(service, 1.0))
        said = capsys.readouterr().out.splitlines()
        assert [line.removeprefix("radixmesh: ")[: len(want)] for line, want in zip(said, lines, strict=True)] == lines


def test_doctor_says_what_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["radixmesh", "doctor", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = json.loads(capsys.readouterr().out)
    found = {f["name"]: f for f in said["findings"]}
    assert (end.value.code, said["ok"]) == (0, True)
    assert found["numpy"]["value"] == __import__("numpy").__version__
    assert " on 1 x " in found["backend"]["value"]
    assert "llama" in found["demo model"]["value"]
    declared = (HOME / "pyproject.toml").read_text()
    listed = re.search(r"\ndependencies = \[(.*?)\n\]", declared, re.S)
    assert listed is not None
    assert re.findall(r'"([\w-]+)', listed[1]) == list(doctor.NEEDED)


def test_doctor_names_troubles_with_their_fixes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("engine.config.Serve", lambda: type("S", (), {"host": "127.0.0.1", "port": port}))
        port = taken.getsockname()[1]
        trouble = doctor.port()
    assert (trouble.broken, str(port) in trouble.fix, "--port" in trouble.fix) == (False, True, True)
    monkeypatch.setattr("radixmesh.engine.DEMO", tmp_path)
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "not-a-package"))
    monkeypatch.setattr(doctor, "port", lambda: trouble)
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setattr(sys, "argv", ["radixmesh", "doctor"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1
    for start in ("not-a-package: not installed; pip install", "demo model: can't be read; ", "port: ", "sockets: "):
        assert any(line.startswith(start) for line in lines), start
