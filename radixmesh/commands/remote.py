"""A server's OpenAI face, read with what Python brings along."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from engine.errors import ConfigError, InvalidRequest, RadixmeshError

CONNECT_SECONDS = 10.0
SECONDS = 600.0
"""Without a word from the server: a long prompt on a slow machine takes its time."""
MAX_ERROR = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where it is and which of its models is meant. prefix: of every path."""

    url: str
    secure: bool
    host: str
    port: int
    prefix: str
    key: str | None
    model: str

    @classmethod
    def open(cls, url: str, key: str | None, model: str | None) -> Server:
        """Look at a server. model: the first that it names if left out.

        Raises ConfigError when it can't be reached, does not speak this language or wants another key.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"--url {url}: write it like http://127.0.0.1:30000", field="url")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: has characters that no header can hold", field="api_key")
        server = cls(
            url=url,
            secure=parts.scheme == "https",
            host=parts.hostname,
            port=port or (443 if parts.scheme == "https" else 80),
            prefix=parts.path.rstrip("/").removesuffix("/v1"),
            key=key,
            model=model or "",
        )
        try:
            with server._say("GET", "/v1/models", None) as answer:
                names = [str(m["id"]) for m in json.loads(answer.read())["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--url {url}: answers, but not as an OpenAI server does", field="url") from error
        except InvalidRequest as error:
            raise ConfigError(f"--url {url}: {error}", field=error.field) from error
        if not names or (model and model not in names):
            raise ConfigError(f"--model {model}: the server has {', '.join(names) or 'none'}", field="model")
        return server if model else replace(server, model=names[0])

    def answer(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]
    ) -> Iterator[tuple[str, str | None]]:
        """Pieces of the text, and with the last why it ended. Closing it early hangs up, which aborts the request."""
        body = {"model": self.model, "messages": list(messages), "stream": True} | dict(settings)
        ended = False
        with self._say("POST", "/v1/chat/completions", body) as answer:
            while not ended and (line := answer.readline()):
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RadixmeshError(str(event["error"].get("message")))
                for choice in event["choices"]:
                    reason = choice.get("finish_reason")
                    ended = ended or reason is not None
                    yield choice["delta"].get("content") or "", reason
        if not ended:
            raise self._unreachable("hung up in the middle of an answer")

    @contextmanager
    def _say(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """A request of its own connection. Raises InvalidRequest with the server's words, and ConfigError."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            connection.connect()
            connection.sock.settimeout(SECONDS)
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self.prefix + path, data, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(answer)
            yield answer
        except (OSError, http.client.HTTPException) as error:
            said = str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
            raise self._unreachable(said or type(error).__name__) from error
        finally:
            connection.close()

    def _unreachable(self, why: str) -> ConfigError:
        return ConfigError(
            f"--url {self.url}: {why}; start a server there with `radixmesh serve`, or leave --url out", field="url"
        )


def _refusal(answer: http.client.HTTPResponse) -> RadixmeshError:
    """What the server said instead of an answer."""
    said = answer.read(MAX_ERROR)
    try:
        text = str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"{answer.status} {answer.reason}"
    if answer.status in (401, 403):
        return InvalidRequest(f"{text}; give it with --api-key", field="api_key")
    return InvalidRequest(text)
