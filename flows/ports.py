"""Ports of the loopback address."""

from __future__ import annotations

import contextlib
import errno
import socket

import psutil

from artifacts.errors import RequestError


def listen(port: int) -> socket.socket:
    """A socket that listens; 0: at any free port. Raises RequestError that says who has taken it."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise RequestError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}; give another --port") from error
        raise RequestError(
            f"port {port} of 127.0.0.1 is taken by {_listening(port)}; give another --port (0: any free one)"
        ) from error


def _listening(port: int) -> str:
    """`process 123 (python3)`, where the system says who listens there: of other users it does not."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            mine = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if mine and connection.pid is not None:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another program"
