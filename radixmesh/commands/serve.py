"""`radixmesh serve`: an engine in a process of its own, the network faces in this one. Owns the life of both."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import ConfigError, RadixmeshError
from radixmesh.commands import options

if TYPE_CHECKING:
    import socket

    from engine.config import Config
    from engine.run.messages import Info
    from engine.run.process import ProcessClient
    from engine.serve.service import Service
    from engine.text.tokenizer import Tokenizer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_SECONDS = 0.2
"""How often the life of the engine is looked at; a request that it loses is told at once."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    port: Annotated[int | None, typer.Option(help="Of HTTP; 0 is any. 30000 if left out.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if left out.")] = None,
    model: options.Model = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    grpc_port: Annotated[int | None, typer.Option(help="Of gRPC, which is off if left out; 0 is any.")] = None,
    api_key: Annotated[str | None, typer.Option(help="What clients must send; none if left out.")] = None,
    deterministic: options.Deterministic = False,
    ready_early: Annotated[
        bool | None, typer.Option("--ready-early", help="Be ready with small steps, while larger ones are compiled.")
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="Folder of programs (radixmesh compile --bundle).")] = None,
    config: options.File = None,
    pairs: options.Set = None,
) -> None:
    """Serve a model over HTTP and gRPC, until SIGTERM or an interrupt, which let open requests end.

    Exit code 0 after a drain, 1 when the engine is lost, 2 when it can't start.
    """
    from engine.config import load

    faces = {"serve.host": host, "serve.port": port, "serve.grpc_port": grpc_port, "serve.api_key": api_key}
    given = options.flags(model, backend, mesh, dtype, pairs, deterministic)
    faces |= {"sched.ready_early": ready_early, "backend.jax.bundle": bundle}
    lost = run(load(config, given | {k: v for k, v in faces.items() if v is not None}))
    if lost is not None:
        print(f"radixmesh: {' '.join(str(lost).split())}", file=sys.stderr, flush=True)
        sys.exit(1)


def run(config: Config) -> RadixmeshError | None:
    """Serve until told to stop, or until the engine is lost: gives why. Raises what can't be started."""
    began = time.monotonic()
    from engine.serve.sockets import listen

    if config.serve.grpc_port and config.serve.grpc_port == config.serve.port:
        raise ConfigError(
            f"serve.grpc_port: {config.serve.port} is the port of HTTP too; give another with --grpc-port",
            field="serve.grpc_port",
        )
    sock = listen(config.serve.host, config.serve.port)
    try:
        if config.serve.grpc_port:
            try:
                listen(config.serve.host, config.serve.grpc_port).close()
            except ConfigError as error:
                what = f"can't listen on {_address(config.serve.host, config.serve.grpc_port)}"
                fix = "free it or choose another with --grpc-port"
                raise ConfigError(f"serve.grpc_port: {what}; {fix}", field="serve.grpc_port") from error
        with _interrupted():
            client, tokenizer = _open(config)
    except BaseException:
        sock.close()
        raise
    try:
        with asyncio.Runner(loop_factory=_loops()) as runner:
            return runner.run(_live(config, sock, client, tokenizer, began))
    finally:
        client.shutdown()


def _open(config: Config) -> tuple[ProcessClient, Tokenizer]:
    """The engine, and meanwhile the tokenizer and the libraries of the faces here."""
    from engine.run.process import ProcessClient
    from radixmesh.engine import DEMO

    def prepare() -> Tokenizer:
        import engine.serve.http
        from engine.text.tokenizer import Tokenizer

        if config.serve.grpc_port is not None:
            import engine.serve.grpc  # noqa: F401
        return Tokenizer.open(config.model.path or DEMO)

    report = _Report()
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(prepare)
        words = pool.submit(lambda: opened.result().words)
        client = ProcessClient(config, DEMO, words=words, stage=report.begin)
        try:
            report.begin("")
            print(f"  {_told(client.info)}", flush=True)
            return client, opened.result()
        except BaseException:
            client.shutdown()
            raise


def _told(info: Info) -> str:
    """What the start took of memory, at which speed, and parts of its stages."""
    seconds, gib = dict(info.stages), 1 << 30
    parts = [f"{name} {size / gib:.2f} GiB" for name, size in info.status.memory.items()]
    if "weights" in info.status.memory:
        parts.append(f"weights at {info.status.memory['weights'] / gib / max(seconds['weights'], 1e-9):.1f} GiB/s")
    parts += [f"{name.partition('.')[2]} {s:.2f} s" for name, s in info.stages if "." in name]
    return f"{'memory':<12}{', '.join(parts)}"


class _Report:
    """Prints each stage of the start, with its seconds, when it ends."""

    def __init__(self) -> None:
        self._name, self._since = "imports", time.monotonic()

    def begin(self, name: str) -> None:
        """The next one; "" is none."""
        now = time.monotonic()
        print(f"  {self._name:<12}{now - self._since:6.2f} s", flush=True)
        self._name, self._since = name, now


@contextmanager
def _interrupted() -> Iterator[None]:
    """A signal during the start ends it: nothing is left of the engine, and nobody waits for an answer."""

    def end(number: int, frame: object) -> None:
        print(f"radixmesh: {signal.Signals(number).name} before it was ready", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    before = {name: signal.signal(name, end) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _loops() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where there is one."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


async def _live(
    config: Config, sock: socket.socket, client: ProcessClient, tokenizer: Tokenizer, began: float
) -> RadixmeshError | None:
    """From ready to the end. Gives why the engine was lost, if it was."""
    from engine.serve import http, records
    from engine.serve.service import Service

    name = config.serve.name or Path(client.info.path).resolve().name
    service = Service(client, tokenizer, config.serve, name)
    told, stop = _signals(client), asyncio.Event()
    grpc: Any = None
    where = ""
    if config.serve.grpc_port is not None:
        from engine.serve.grpc import start_grpc

        grpc, port = await start_grpc(service, config.serve.host, config.serve.grpc_port, config.serve.api_key)
        where = f", gRPC at {_address(config.serve.host, port)}"

    def ready(port: int) -> None:
        platform = next((d.value for d in client.info.decisions if d.field == "platform"), "")
        url, what = f"http://{_address(config.serve.host, port)}", f"model {name}, {client.info.backend} on {platform}"
        print(f"radixmesh: ready in {time.monotonic() - began:.1f} s at {url}{where} ({what})", flush=True)

    handler = records.show(sys.stdout)
    face = asyncio.ensure_future(http.serve(http.make_app(service, config), sock, ready, stop))
    ends = [asyncio.ensure_future(told.wait()), asyncio.ensure_future(_gone(service))]
    try:
        await asyncio.wait((face, *ends), return_when=asyncio.FIRST_COMPLETED)
        if told.is_set() and service.lost is None:
            await _drain(service, config.serve.drain)
    finally:
        for end in ends:
            end.cancel()
        stop.set()
        if grpc is not None:
            await grpc.stop(1.0)
        await face
        records.LOGGER.removeHandler(handler)
    return service.lost


def _signals(client: ProcessClient) -> asyncio.Event:
    """Set by the first signal; the second ends all at once."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def take(number: signal.Signals) -> None:
        if told.is_set():
            client.kill()
            print(f"radixmesh: {number.name} again: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        told.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, take, number)
    return told


async def _drain(service: Service, seconds: float) -> None:
    """Requests that are open may end; new ones are refused, and /readyz says so."""
    count = service.open_requests
    print(f"radixmesh: stopping; {count} open requests have {seconds:g} s, a second signal ends at once", flush=True)
    cut = await service.drain(seconds)
    if service.lost is not None:  # which is told, and ended them
        return
    print(f"radixmesh: stopped; {count - cut} ended, {cut} were aborted", flush=True)


async def _gone(service: Service) -> None:
    """Until the engine is lost."""
    while service.lost is None:
        await asyncio.sleep(LOOK_SECONDS)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
