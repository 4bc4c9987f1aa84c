"""The sockets of the faces, which are bound before anything slow is imported."""

from __future__ import annotations

import socket

from engine.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket to listen with, bound before anything slow is started; 0 asks for any port. It does not listen before
    there is somebody to answer. A name that stands for both has its IPv4 address.

    Raises ConfigError when it can't be had, as when somebody listens there.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"serve.host: {host}: {error.strerror or error}", field="serve.host") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"serve.port: can't listen on {host}:{port}: {error.strerror}; free it or choose another with --port",
            field="serve.port",
        ) from error
    return sock
