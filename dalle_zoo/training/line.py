"""Connections between the ranks of a run that carry JSON, independent of the collectives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from dalle_zoo.training.rank_table import SILENT

BEAT = 1.0
"""Seconds between messages of a rank."""
MAX_LINE = 2**16
"""Bytes of a message; a peer that sends more is disconnected."""


class Line:
    """A connection that carries JSON objects, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        self._rest = b""
        self._sending = threading.Lock()
        connection.settimeout(BEAT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A lost machine closes no connection: probe it, with short timeouts. That of a stopped process answers.
        for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("USER_TIMEOUT", 30_000)):
            if hasattr(socket, f"TCP_{name}"):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        # Workers of a data loader are forks, in which the connection must not stay open when this process ends.
        os.register_at_fork(after_in_child=connection.close)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; `receive` notices a lost peer."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages of one beat; None if the connection is closed or its data are invalid."""
        try:
            data = self.socket.recv(2**16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            if not data or len(self._rest) > MAX_LINE:
                return None
            return [dict(json.loads(line)) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError, TypeError, RecursionError):
            return None


class Clock:
    """Notices that this process was stopped, by a long time between two calls."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def pause(self) -> float:
        """Returns the seconds since the last call, if they are more than a busy machine explains; otherwise 0."""
        last, self._last = self._last, time.monotonic()
        return self._last - last if self._last - last > SILENT else 0.0
