"""An engine in a process of its own: it serves as one in this process does, and its end is noticed whatever it is."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import zmq

import engine.run.process as process
from engine.config import Config, load
from engine.errors import BackendLost, ConfigError, InvalidRequest, ModelError, Overloaded, RadixmeshError
from engine.run.child import Link
from engine.run.client import Client, Streams
from engine.run.ipc import ORDERS, REPORTS, Shutdown, encode_order
from engine.run.local import LocalClient
from engine.run.messages import Abort, Flush, News, Submit
from engine.run.process import ProcessClient
from engine.run.spawn import bind
from engine.run.start import decide, start
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.text.tokenizer import Tokenizer
from engine.text.words import Words
from tests.text.made import made
from tests.tiny import Tiny, tiny

HANGING = str(Path(__file__).parent / "hanging.py")
SMALL = {"backend": "reference", "slots": 4, "max_tokens": 32, "cache.tokens": 1024, "queue": 8}
SECONDS = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("model")
    tokenizer = made("byte_level")
    tokenizer.save_pretrained(path)
    return tiny(path, vocab=len(tokenizer), max_len=192, eos=tokenizer.eos_token_id)


def config(model: Tiny, **more: Any) -> Config:
    return load(None, SMALL | {"model.path": str(model.path)} | more)


def open_local(config: Config) -> LocalClient:
    def begin() -> Any:
        decided = decide(config, Path("none"))
        return start(decided, lambda: Tokenizer.open(decided.path).words, queue=config.serve.queue)

    return LocalClient(begin)


def open_process(config: Config, **more: Any) -> ProcessClient:
    words: Future[Words] = Future()
    path = Path(config.model.path or "none")
    if path.is_dir():
        words.set_result(Tokenizer.open(path).words)
    return ProcessClient(config, Path("none"), **({"words": words} | more))


def misbehaving(model: Tiny, how: str, **more: Any) -> ProcessClient:
    return open_process(config(model, **more), program=(HANGING, how))


@pytest.fixture(scope="module", params=[open_local, open_process])
def client(model: Tiny, request: pytest.FixtureRequest) -> Iterator[Client]:
    client: Client = request.param(config(model))
    yield client
    client.shutdown()


class Ear:
    """Hears a client's news."""

    def __init__(self, client: Client) -> None:
        self.news: list[News] = []
        self.outputs: dict[str, queue.SimpleQueue[Output]] = {}
        self.lost: queue.SimpleQueue[RadixmeshError] = queue.SimpleQueue()
        client.listen(self.hear)

    def hear(self, news: News) -> None:
        self.news.append(news)
        for output in news.outputs:
            self.outputs.setdefault(output.rid, queue.SimpleQueue()).put(output)
        if news.lost is not None:
            self.lost.put(news.lost)

    def last(self, rid: str) -> tuple[list[int], Output]:
        """All tokens of a request and its last output."""
        tokens: list[int] = []
        stream = self.outputs.setdefault(rid, queue.SimpleQueue())
        while True:
            output = stream.get(timeout=SECONDS)
            tokens += output.tokens
            if output.finish is not None:
                return tokens, output


@pytest.fixture(scope="module")
def ear(client: Client) -> Ear:
    return Ear(client)


def ask(rid: str, tokens: tuple[int, ...], **params: Any) -> Submit:
    given = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 8} | params
    return Submit(
        request=Request(
            rid=rid, tokens=tokens, params=SamplingParams.of(given), seed=2**64 - 1, arrival=time.monotonic()
        )
    )


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_greedy_is_hugging_faces(client: Client, ear: Ear, model: Tiny) -> None:
    prompts = [(5, 6, 7), (9, 8, 7, 6, 5), (11,)]
    for i, prompt in enumerate(prompts):
        client.say(ask(f"greedy-{i}", prompt))
    for i, prompt in enumerate(prompts):
        tokens, last = ear.last(f"greedy-{i}")
        assert tokens == model.greedy(list(prompt), 8)
        assert last.finish is not None
        assert last.finish.kind == "length"
    assert {rid for n in ear.news for rid, _ in n.begun} >= {"greedy-0", "greedy-1", "greedy-2"}
    assert all(0 <= waited < SECONDS for n in ear.news for _, waited in n.begun)


def test_what_the_engine_is(client: Client, model: Tiny) -> None:
    info = client.info
    assert info.path == str(model.path)
    assert (info.backend, info.architecture, info.limits.slots, info.room) == ("reference", "llama", 4, 192)
    assert {d.field: d.value for d in info.decisions}["dtype"] == "float32"
    assert {"device", "weights", "programs"} <= {name for name, _ in info.stages}
    assert info.status.ready


def test_sampled_tokens_depend_on_nothing_but_the_seed(client: Client, ear: Ear) -> None:
    for rid in ("drawn-a", "drawn-b"):
        client.say(ask(rid, (4, 5, 6), temperature=1.0, max_new_tokens=16))
    assert ear.last("drawn-a")[0] == ear.last("drawn-b")[0]


def test_a_stop_string_ends_it(client: Client, ear: Ear, model: Tiny) -> None:
    tokenizer = Tokenizer.open(model.path)
    whole = tokenizer.decode(model.greedy([5, 6, 7], 40))
    stop = next(whole[i : i + 2] for i in range(8, 40) if "\ufffd" not in whole[i : i + 2])
    client.say(ask("stop", (5, 6, 7), max_new_tokens=40, stop=[stop]))
    tokens, last = ear.last("stop")
    assert last.finish is not None
    assert (last.finish.kind, last.finish.matched) == ("stop", stop)
    assert len(tokens) < 40
    assert stop in tokenizer.decode(tokens)


def test_an_abort_ends_it(client: Client, ear: Ear) -> None:
    client.say(ask("long", (1, 2, 3), max_new_tokens=180))
    wait(lambda: any(o.rid == "long" for n in ear.news for o in n.outputs))
    client.say(Abort(rid="long"))
    tokens, last = ear.last("long")
    assert last.finish is not None
    assert last.finish.kind == "abort"
    assert 0 < len(tokens) < 180
    client.say(Abort(rid="nobody"))  # harmless


def test_what_is_refused_comes_back_as_it_was_raised(client: Client, ear: Ear) -> None:
    client.say(ask("wrong", (1, 10_000)))
    _, last = ear.last("wrong")
    assert type(last.error) is InvalidRequest
    assert last.error.field is not None
    assert "10000" in str(last.error)
    for i in range(40):
        client.say(ask(f"many-{i}", (1, 2, i), max_new_tokens=30))
    ends = [ear.last(f"many-{i}")[1] for i in range(40)]
    refused = [o for o in ends if o.error is not None]
    assert 0 < len(refused) < 40
    assert {type(o.error) for o in refused} == {Overloaded}


def test_a_flush_is_answered(client: Client, ear: Ear) -> None:
    client.say(ask("open", (1, 2, 3), max_new_tokens=150))
    client.say(Flush(rid="early"))
    assert "requests are open" in str(ear.last("early")[1].error)
    client.say(Abort(rid="open"))
    ear.last("open")
    wait(lambda: (s := next(n.stats for n in reversed(ear.news) if n.stats)).held == 0 and not s.running)
    client.say(Flush(rid="late"))
    assert ear.last("late")[1].error is None
    client.say(ask("cold", (1, 2, 3)))
    assert ear.last("cold")[1].cached_tokens == 0


def test_many_threads_say_things_at_once(client: Client, ear: Ear) -> None:
    def run(name: int) -> None:
        for i in range(20):
            client.say(ask(f"t{name}-{i}", (name, i), max_new_tokens=100))
            client.say(Abort(rid=f"t{name}-{i}"))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in range(4):
        for i in range(20):
            assert ear.last(f"t{n}-{i}")[1].finish is not None


@pytest.mark.parametrize("open_client", [open_local, open_process])
def test_shutdown_answers_what_is_open(model: Tiny, open_client: Callable[[Config], Client]) -> None:
    threads, files = threading.active_count(), open_files()
    client = open_client(config(model))
    ear = Ear(client)
    client.say(ask("a", (1, 2, 3), max_new_tokens=180))
    client.shutdown()
    _, last = ear.last("a")
    assert isinstance(last.error, BackendLost)
    assert "shut down" in str(ear.lost.get(timeout=SECONDS))
    assert ear.lost.empty()
    with pytest.raises(BackendLost, match="shut down"):
        client.say(Abort(rid="a"))
    client.shutdown()
    assert threading.active_count() == threads
    assert open_files() == files
    if isinstance(client, ProcessClient):
        assert not alive(client.pid)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_file_is_left(model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes: list[int] = []

    def spied(context: Any, folder: str, name: str) -> Any:
        modes.append(os.stat(folder).st_mode & 0o777)
        return bind(context, folder, name)

    monkeypatch.setattr(process, "bind", spied)
    client = open_process(config(model))
    assert modes == [0o700, 0o700]
    assert list(tmp_path.iterdir()) == []
    os.kill(client.pid, signal.SIGKILL)
    client.shutdown()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_process_that_dies_is_told(model: Tiny, name: str) -> None:
    client = open_process(config(model))
    ear = Ear(client)
    streams = {f"r{i}": client.say(ask(f"r{i}", (1, 2, i), max_new_tokens=180)) for i in range(3)}
    os.kill(client.pid, signal.Signals[name])
    for rid in streams:
        _, last = ear.last(rid)
        assert isinstance(last.error, BackendLost)
        assert name in str(last.error)
    assert name in str(ear.lost.get(timeout=SECONDS))
    with pytest.raises(BackendLost, match=name):
        client.say(Abort(rid="r0"))
    client.shutdown()
    assert not alive(client.pid)


def test_it_outlives_an_interrupt_and_a_service_managers_signal(model: Tiny) -> None:
    client = open_process(config(model))
    ear = Ear(client)
    assert os.getpgid(client.pid) != os.getpgid(0)
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(client.pid, name)
    client.say(ask("a", (1, 2)))
    assert ear.last("a")[1].error is None
    client.shutdown()


def test_orders_that_can_not_be_read_are_dropped(model: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    client = open_process(config(model))
    ear = Ear(client)
    for frame in (b"", b"\xc1", b"\x91\xa5begin", os.urandom(200)):
        client._orders.send(frame, zmq.NOBLOCK)
    client.say(ask("a", (1, 2)))
    assert ear.last("a")[1].error is None
    client.shutdown()
    assert capfd.readouterr().err.count("dropped an order") == 4


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sleeps", "stuck: collect of step 0: 1 rows, 2 tokens"),
        ("holds", "exit code 1"),
        ("exits", "exit code 7"),
        ("raises", "its traceback says why"),
    ],
)
def test_a_backend_that_misbehaves(model: Tiny, how: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    client = misbehaving(model, how, watchdog=1)
    ear = Ear(client)
    if how == "sleeps":
        time.sleep(1.5)  # idle is never stuck
    client.say(ask("a", (1, 2)))
    _, last = ear.last("a")
    assert isinstance(last.error, BackendLost)
    assert said in str(last.error)
    with pytest.raises(BackendLost):
        client.say(Abort(rid="a"))
    client.shutdown()
    err = capfd.readouterr().err
    if how != "exits":
        assert "in collect" in err  # the stack
    if how == "sleeps":
        assert "serve.watchdog is 1); all stacks are above" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"model.path": "nowhere"}, ModelError, "nowhere"),
        ({"backend.platform": "gpu"}, ConfigError, "platform"),
        ({"mesh": "dp=2"}, ConfigError, "dp=2 is not built yet"),
    ],
)
def test_what_can_not_start_is_raised_here(model: Tiny, given: dict[str, Any], kind: type, said: str) -> None:
    threads, files = threading.active_count(), open_files()
    asked = config(model, **given)
    with pytest.raises(RadixmeshError) as local:
        decide(asked, Path("none"))
    with pytest.raises(kind, match=said) as there:
        open_process(asked)
    assert (type(there.value), str(there.value), there.value.field) == (
        type(local.value),
        str(local.value),
        local.value.field,
    )
    assert (threading.active_count(), open_files()) == (threads, files)


def test_a_fault_in_the_start_is_one_line_here(model: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RadixmeshError, match="could not start: MemoryError: no room at all"):
        misbehaving(model, "unloadable")
    assert "Traceback" in capfd.readouterr().err


def test_the_engine_process_imports_no_transformers() -> None:
    look = "import engine.run.child, engine.text.detokenize, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


def test_an_engine_waits_for_its_tokenizer(model: Tiny) -> None:
    words: Future[Words] = Future()

    def stage(name: str) -> None:
        if name == "tokenizer":  # the last stage
            threading.Timer(0.3, lambda: words.set_result(Tokenizer.open(model.path).words)).start()

    client = open_process(config(model), words=words, stage=stage)
    assert dict(client.info.stages)["tokenizer"] > 0.2
    client.shutdown()


def test_an_engine_told_to_stop_while_it_waits_for_its_tokenizer_ends() -> None:
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        orders, reports = (bind(context, folder, name) for name in (ORDERS, REPORTS))
        with orders, reports:
            link = Link(folder)
            orders.send(encode_order(Shutdown()))
            with pytest.raises(BackendLost, match="Shutdown came before the tokenizer's words"):
                link.words()
            link.close()


def test_the_decoder_of_stop_strings_is_made_before_ready(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may import a library, for which no step is to wait."""
    words, made = Tokenizer.open(model.path).words, list[Words]()
    monkeypatch.setattr(Words, "stages", lambda self: made.append(self))
    start(decide(config(model), Path("none")), lambda: words).backend.close()
    assert made == [words]


def test_a_model_that_is_not_there_is_told_as_the_engine_tells_it() -> None:
    words: Future[Words] = Future()
    words.set_exception(ModelError("tokenizer: no folder nowhere", field="tokenizer"))
    with pytest.raises(ModelError, match="nowhere: does not exist"):
        open_process(load(None, SMALL | {"model.path": "nowhere"}), words=words)


@pytest.mark.parametrize("late", [False, True])
def test_a_tokenizer_that_can_not_be_opened_ends_the_start(model: Tiny, late: bool) -> None:
    threads, files = threading.active_count(), open_files()
    words: Future[Words] = Future()

    def stage(name: str) -> None:
        if name == ("tokenizer" if late else "device"):
            words.set_exception(ModelError("tokenizer: none", field="tokenizer"))

    with pytest.raises(ModelError, match="tokenizer: none"):
        open_process(config(model), words=words, stage=stage)
    assert (threading.active_count(), open_files()) == (threads, files)


def test_a_process_that_can_not_even_begin(model: Tiny) -> None:
    with pytest.raises(BackendLost, match="exit code 3"):
        open_process(config(model), program=("-c", "raise SystemExit(3)"))


def test_an_interrupted_start_leaves_nothing(model: Tiny) -> None:
    threads, files = threading.active_count(), open_files()

    def interrupt(name: str) -> None:
        if name == "weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_process(config(model), program=(HANGING, "unready"), stage=interrupt)
    assert (threading.active_count(), open_files()) == (threads, files)


def test_an_engine_that_does_not_end_is_killed(model: Tiny) -> None:
    client = open_process(config(model), program=(HANGING, "sleeps"), grace=0.3)
    ear = Ear(client)
    client.say(ask("a", (1, 2)))
    client.shutdown()
    assert not alive(client.pid)
    assert isinstance(ear.last("a")[1].error, BackendLost)


PARENT = """
import os, signal, sys, time
from pathlib import Path
from engine.config import load
from engine.run.process import ProcessClient
client = ProcessClient(load(None, {"model": sys.argv[1], "backend": "reference"}), Path("none"))
heavy = [name for name in ("jax", "torch", "transformers") if name in sys.modules]
print(client.pid, client._folder, heavy, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_it_dies_with_its_parent(model: Tiny, how: str) -> None:
    command = [sys.executable, "-c", PARENT, str(model.path), how]
    home = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=home, check=False)
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    pid, folder, heavy = done.stdout.split(maxsplit=2)
    assert heavy.strip() == "[]"
    wait(lambda: not alive(int(pid)))
    assert not Path(folder).exists()


def test_streams_over_it(model: Tiny) -> None:
    client = open_process(config(model))
    streams = Streams(client)
    streams.open(ask("a", (1, 2)), "a")
    outputs = list(streams.read("a"))
    assert [t for o in outputs for t in o.tokens] == model.greedy([1, 2], 8)
    prompts = {"c": (1, 2), "d": (3,), "e": (4, 5, 6)}
    together = list(streams.gather([ask(rid, tokens) for rid, tokens in prompts.items()]))
    for rid, tokens in prompts.items():
        assert [t for o in together if o.rid == rid for t in o.tokens] == model.greedy([*tokens], 8)
    client.shutdown()
    with pytest.raises(BackendLost):
        streams.open(ask("b", (1, 2)), "b")
