"""`radixmesh chat` through a pipe: in process beside Engine, and with a server that is not ours."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from radixmesh import cli
from radixmesh.commands.chat import Talk, command
from radixmesh.engine import Engine
from tests.text.made import byte_level
from tests.tiny import tiny

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
HOME = Path(cli.__file__).parent.parent
GREEDY = {"temperature": 0, "max_new_tokens": 8}
SMALL = {"slots": 2, "cache_tokens": 512, "max_tokens": 32, "backend": "reference"}


def command_line(*args: str) -> list[str]:
    return [sys.executable, "-m", "radixmesh", "chat", *args]


def talk(lines: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A conversation through a pipe."""
    return subprocess.run(
        command_line(*args), input=lines, capture_output=True, text=True, timeout=120, cwd=HOME, check=False
    )


class Parrot(BaseHTTPRequestHandler):
    """Says the last message word by word; "slow" goes on until the other side hangs up, "bad" is refused."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]
    hung_up: threading.Event

    def log_message(self, *_: Any) -> None: ...

    def whole(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers.get("authorization") != "Bearer k":
            self.whole(401, {"error": {"message": "no key"}})
        elif self.path == "/base/v1/models":
            self.whole(200, {"object": "list", "data": [{"id": "parrot"}]})
        else:
            self.whole(404, {})

    def event(self, data: str) -> None:
        chunk = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        if text == "bad":
            self.whole(400, {"error": {"message": "messages: too bad", "param": "messages"}})
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        said = text.split(" ")
        try:
            for i, word in enumerate(said):
                space = " " if i else ""
                self.event(json.dumps({"choices": [{"index": 0, "delta": {"content": space + word}}]}))
            while text == "slow":
                self.event(json.dumps({"choices": [{"index": 0, "delta": {"content": " slow"}}]}))
                time.sleep(0.02)
            if text == "broken":
                self.close_connection = True
                return
            self.event(json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
            self.event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.hung_up.set()
            self.close_connection = True


@pytest.fixture
def parrot() -> Iterator[tuple[str, type[Parrot]]]:
    kind = type("Parrot", (Parrot,), {"asked": [], "hung_up": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/base", kind
    server.shutdown()
    server.server_close()


def test_with_a_server(parrot: tuple[str, type[Parrot]], tmp_path: Path) -> None:
    url, kind = parrot
    lines = "hello there 🙂\n\n/set top_k=5\n//slash\n/system Be.\nbad\n"
    lines += f"/save {tmp_path}/said.json\n/reset\nlast\n/quit\nnever\n"
    done = talk(lines, "--url", url, "--api-key", "k", "--temperature", "0.5", "--max-tokens", "9")
    assert done.stdout == "hello there 🙂\n/slash\n\nlast\n"
    assert "radixmesh: messages: too bad" in done.stderr
    assert done.returncode == 1, "something was refused"
    first, second, bad, last = kind.asked
    assert first == {
        "model": "parrot", "stream": True, "temperature": 0.5, "max_tokens": 9,
        "messages": [{"role": "user", "content": "hello there 🙂"}],
    }  # fmt: skip
    assert [m["content"] for m in second["messages"]] == ["hello there 🙂", "hello there 🙂", "/slash"]
    assert second["top_k"] == 5
    assert bad["messages"][0] == {"role": "system", "content": "Be."}
    assert [m["content"] for m in last["messages"]] == ["Be.", "last"], "forgotten, but for the system message"
    said = json.loads((tmp_path / "said.json").read_text())["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"], "what failed is not kept"


def test_ctrl_c_stops_the_answer_and_hangs_up(parrot: tuple[str, type[Parrot]]) -> None:
    url, kind = parrot
    with subprocess.Popen(
        command_line("--url", f"{url}/v1/", "--api-key", "k"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HOME,
    ) as chat:  # fmt: skip
        assert chat.stdin
        assert chat.stdout
        chat.stdin.write("slow\n")
        chat.stdin.flush()
        assert chat.stdout.read(14) == "slow slow slow"
        chat.send_signal(signal.SIGINT)
        assert kind.hung_up.wait(20)
        out, _ = chat.communicate("go on\n", timeout=20)
    assert out.endswith("\ngo on\n")
    assert chat.returncode == 0
    roles = [m["role"] for m in kind.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"], "what came of the stopped answer is kept"


@pytest.mark.parametrize(
    ("url", "args", "says"),
    [
        ("http://127.0.0.1:1", (), "Connection refused; start a server there with `radixmesh serve`"),
        ("ftp://x", (), "write it like http://127.0.0.1:30000"),
        ("http://127.0.0.1:99999999", (), "write it like http://127.0.0.1:30000"),
        ("", (), "no key; give it with --api-key"),
        ("", ("--api-key", "k", "--model", "gpt"), "--model gpt: the server has parrot"),
        ("/other", ("--api-key", "k"), "404"),
        ("", ("--api-key", "k", "--backend", "torch"), "--backend: is the server's to decide"),
        ("", ("--api-key", "k", "--temperature", "nan"), "temperature: must be a finite number"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    parrot: tuple[str, type[Parrot]],
    url: str,
    args: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = url if "//" in url else parrot[0] + url
    monkeypatch.setattr(sys, "argv", ["radixmesh", "chat", "--url", where, *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, says in line) == (2, True), line


def test_a_server_that_dies(parrot: tuple[str, type[Parrot]]) -> None:
    done = talk("broken\nhello\n", "--url", parrot[0], "--api-key", "k")
    assert done.returncode == 2
    assert done.stdout == "broken\n"
    assert done.stderr.strip().splitlines()[-1].startswith("radixmesh: --url")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level(chat_template=TEMPLATE)
    tiny(path, vocab=len(tokenizer), max_len=128, eos=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return path


def local(folder: Path) -> list[str]:
    pairs = [x for k, v in SMALL.items() if k != "backend" for x in ("--set", f"{k}={v}")]
    return ["--model", str(folder), "--backend", "reference", "--temperature", "0", "--max-tokens", "8", *pairs]


def test_in_process_it_is_what_engine_says(folder: Path) -> None:
    done = talk("the dog\nand\n" + "x y " * 200 + "\n", "--system", "be", *local(folder))
    with Engine(folder, **SMALL) as engine:
        said: list[str] = []
        for question in ("system: be\nuser: the dog", "and"):
            said.append(f"user: {question}\nassistant:".removeprefix("user: " if not said else ""))
            ids = engine.tokenizer.encode("".join(said), special=False)
            said.append(f" {engine.generate(token_ids=ids, sampling_params=GREEDY)['text']}\n")
    assert done.stdout == f"{said[1][1:]}{said[3][1:]}\n"
    assert "the context holds 128" in done.stderr
    assert done.returncode == 1


def test_a_person_at_a_terminal(folder: Path) -> None:
    """Ctrl-C at the prompt stays, Ctrl-D leaves."""
    near, far = pty.openpty()
    with subprocess.Popen(command_line(*local(folder)), stdin=far, stdout=far, stderr=far, cwd=HOME,
                          start_new_session=True) as chat:  # fmt: skip
        os.close(far)
        screen = Terminal(near)
        try:
            assert "/help says how" in screen.until("> ")
            os.write(near, b"/set temperature=7000\n")
            assert "temperature: must be at least 0" in screen.until("> ")
            for _ in range(3):  # input() misses a signal that comes between its prompt and its wait
                chat.send_signal(signal.SIGINT)
                if screen.shows("> ", 10):
                    break
            screen.until("> ")
            os.write(near, b"the\n")
            assert "cut off" in screen.until("allows more")
            screen.until("> ")
            os.write(near, b"\x04")
            assert chat.wait(20) == 0
        finally:
            chat.kill()
    os.close(near)


class Terminal:
    """What a terminal shows, read up to a mark at a time."""

    def __init__(self, near: int) -> None:
        self.near, self.seen = near, ""

    def until(self, mark: str) -> str:
        assert self.shows(mark, 30), f"no {mark!r} in {self.seen!r}"
        before, _, self.seen = self.seen.partition(mark)
        return before + mark

    def shows(self, mark: str, seconds: float) -> bool:
        """Whether the mark comes, with no more than so many seconds between one part and the next."""
        while mark not in self.seen:
            ready, _, _ = select.select([self.near], [], [], seconds)
            if not ready:
                return False
            self.seen += os.read(self.near, 1000).decode(errors="replace")
        return True


def test_commands() -> None:
    talk = Talk()
    assert command(talk, "/set", "temperature = 0.5") == "temperature=0.5"
    assert command(talk, "/set", "temperature=") == "(nothing is set)"
    for name, rest in (("/set", "temperature=hot"), ("/set", "x=1"), ("/set", "max_tokens=0"), ("/set", "="),
                       ("/what", ""), ("/save", ""), ("/save", "/no/where/x")):  # fmt: skip
        with pytest.raises(InvalidRequest):
            command(talk, name, rest)
    assert talk == Talk()
