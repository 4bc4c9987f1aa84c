"""`radixmesh chat`: a conversation, with a server or with a model in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from engine.errors import ConfigError, InvalidRequest, RadixmeshError
from radixmesh.commands import options

HELP = """/help            this
/reset           forget the conversation
/system TEXT     what the model is told first; without TEXT, nothing
/set NAME=VALUE  such as temperature=0.5 or max_tokens=200; /set alone shows what is set, NAME= takes it back
/save FILE       write the conversation as JSON
/quit            leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends in \\ goes on in the next one; // at the beginning stands for /."""
ALIASES = {"max_tokens": "max_new_tokens"}
"""OpenAI's names of what SamplingParams knows by another one."""
UNSENDABLE = ("skip_special_tokens", "no_stop_trim", "logprobs", "prompt_logprobs", "logprob_start_len")
MAX_TOKENS = 512
"""Of an answer in this process, unless it is set."""
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
"""What an answer must not send to a terminal."""
SECONDS = 600.0

Chat = Sequence[Mapping[str, str]]


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    url: Annotated[str | None, typer.Option(help="A server, such as http://127.0.0.1:30000; else in process.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The key that the server wants.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder of a model; with --url, the name of one there.")] = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens an answer.")] = None,
) -> None:
    """Talk with a model: /help says how. Lines from a pipe are messages, one each, and answers come plain."""
    talk = Talk(system=system)
    for name, value in (("temperature", temperature), ("max_tokens", max_tokens)):
        if value is not None:
            talk.set(name, value)
    if url is not None:
        given = {"backend": backend, "mesh": mesh, "dtype": dtype, "config": config, "set": pairs}
        for name, extra in given.items():
            if extra is not None:
                raise ConfigError(f"--{name}: is the server's to decide; leave it or --url out", field=name)
        from radixmesh.commands.remote import Server

        _run(talk, Server.open(url, api_key, model), f"{url}")
        return
    if api_key is not None:
        raise ConfigError("--api-key: goes with --url", field="api_key")
    from radixmesh.engine import Engine

    with Engine(file=config, **options.flags(model, backend, mesh, dtype, pairs)) as engine:
        _run(talk, Local(engine), f"{engine.resolved.backend}, in this process")


class Source(Protocol):
    """What answers. Gives pieces of text, and with the last one why it ended."""

    def answer(self, messages: Chat, settings: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]: ...


@dataclass(frozen=True, slots=True)
class Local:
    """A model in this process."""

    engine: Any

    def answer(self, messages: Chat, settings: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        """Closing it early aborts the request."""
        from engine.text.chat import render

        params = {"max_new_tokens": MAX_TOKENS} | {ALIASES.get(k, k): v for k, v in settings.items()}
        ids, told = render(self.engine.tokenizer, messages), 0
        with closing(self.engine.stream(token_ids=ids, sampling_params=params)) as results:
            for result in results:
                reason = result["meta_info"]["finish_reason"]
                if reason is not None and reason["type"] == "abort":
                    raise RadixmeshError(reason["message"])
                yield result["text"][told:], reason and reason["type"]
                told = len(result["text"])


@dataclass(slots=True)
class Talk:
    """A conversation so far, and how it is to go on."""

    system: str = ""
    said: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as OpenAI has it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.said

    def set(self, name: str, value: Any) -> None:
        """Change a sampling parameter; None takes it back. Raises InvalidRequest."""
        from engine.sampling import SamplingParams

        settings = self.settings | {name: value}
        if name in UNSENDABLE or (ALIASES.get(name, name) == "max_new_tokens" and value == 0):
            raise InvalidRequest(f"{name}: can't be {'set' if name in UNSENDABLE else value} here", field=name)
        if value is None:
            del settings[name]
        SamplingParams.of({ALIASES.get(k, k): v for k, v in (settings | {name: value}).items()})
        self.settings = settings


def _run(talk: Talk, source: Source, where: str) -> None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        from rich.console import Console

        _Repl(talk, source, Console(highlight=False, emoji=False)).run(where)
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if _Plain(talk, source).run():
            raise typer.Exit(1)


class _Plain:
    """Lines of a pipe in, answers out, what goes wrong on stderr."""

    def __init__(self, talk: Talk, source: Source) -> None:
        self.talk, self.source = talk, source
        self.failed = False

    def run(self) -> bool:
        """Until there are no more lines. Gives whether anything went wrong."""
        for line in sys.stdin:
            if not self.take(line.rstrip("\r\n")):
                break
        return self.failed

    def take(self, line: str) -> bool:
        """A command or a message. False: leave."""
        if not line.strip():
            return True
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.note(command(self.talk, name, rest.strip()))
            else:
                self.answer(line[1:] if line.startswith("//") else line)
        except RadixmeshError as error:
            if self.fatal(error):
                raise
            self.fail(" ".join(str(error).split()))
        return True

    def answer(self, line: str) -> None:
        """Send a message and show what comes. An interrupt ends the answer; what came of it stays."""
        asked = [*self.talk.messages, {"role": "user", "content": line}]
        parts: list[str] = []
        reason: str | None = "stopped"
        try:
            with closing(self.source.answer(asked, self.talk.settings)) as pieces:  # type: ignore[type-var]
                for text, reason_ in pieces:
                    parts.append(text)
                    self.show(text)
                    reason = reason_
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            self.end()
        self.talk.said += [asked[-1], {"role": "assistant", "content": "".join(parts)}]
        if reason in ("stopped", "length"):
            self.note("(stopped)" if reason == "stopped" else "(cut off: /set max_tokens=... allows more)")

    def show(self, text: str) -> None:
        """A piece of an answer."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """After an answer."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """What is not an answer."""
        if text:
            print(text, file=sys.stderr)

    def fail(self, text: str) -> None:
        """Something went wrong, and the conversation goes on."""
        self.failed = True
        self.note(f"radixmesh: {text}")

    def fatal(self, error: RadixmeshError) -> bool:
        """Whether to give up: nobody would see the next lines fail in the same way."""
        return isinstance(error, ConfigError)


class _Repl(_Plain):
    """A person at a terminal."""

    def __init__(self, talk: Talk, source: Source, console: Any) -> None:
        super().__init__(talk, source)
        self.console = console

    def run(self, where: str = "") -> bool:
        """Until Ctrl-D or /quit."""
        import readline  # noqa: F401  (input() edits lines and remembers them)

        self.note(f"radixmesh chat: {where}. /help says how, Ctrl-D leaves.")
        going = True
        while going:
            try:
                going = self.take(self.read())
            except EOFError:
                self.console.print()
                going = False
            except KeyboardInterrupt:
                self.console.print()
        return False

    def read(self) -> str:
        """A message, over as many lines as end in a backslash."""
        lines, prompt = [], "\001\x1b[1;36m\002> \001\x1b[0m\002"  # readline must not count what has no width
        while True:
            line = input(prompt if self.console.color_system else "> ")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
            prompt = "  "

    def show(self, text: str) -> None:
        self.console.print(text.translate(CONTROLS), end="", markup=False, soft_wrap=True)

    def end(self) -> None:
        self.console.print()

    def note(self, text: str) -> None:
        if text:
            self.console.print(text, style="dim", markup=False)

    def fail(self, text: str) -> None:
        self.console.print(text, style="red", markup=False)

    def fatal(self, error: RadixmeshError) -> bool:
        return False


def command(talk: Talk, name: str, rest: str) -> str:
    """Do what a line that begins with "/" says. Gives what to tell. Raises InvalidRequest."""
    commands: dict[str, Callable[[Talk, str], str]] = {
        "/help": lambda talk, rest: HELP,
        "/reset": _reset,
        "/system": _system,
        "/set": _set,
        "/save": _save,
    }
    if name not in commands:
        raise InvalidRequest(f"{name}: unknown; /help says what there is", field="command")
    return commands[name](talk, rest)


def _reset(talk: Talk, rest: str) -> str:
    talk.said = []
    return "(forgotten)"


def _system(talk: Talk, rest: str) -> str:
    talk.system = rest
    return f"(system: {rest})" if rest else "(no system message)"


def _set(talk: Talk, rest: str) -> str:
    if rest:
        name, equals, value = (part.strip() for part in rest.partition("="))
        if not (name and equals):
            raise InvalidRequest("/set: write it as NAME=VALUE, such as temperature=0.5", field="set")
        talk.set(name, options.read_set([f"{name}={value}"])[name] if value else None)
    return ", ".join(f"{k}={v}" for k, v in talk.settings.items()) or "(nothing is set)"


def _save(talk: Talk, rest: str) -> str:
    if not rest:
        raise InvalidRequest("/save: name a file", field="save")
    try:
        Path(rest).expanduser().write_text(json.dumps({"messages": talk.messages}, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InvalidRequest(f"/save: {rest}: {error.strerror}", field="save") from error
    return f"(saved: {rest})"
