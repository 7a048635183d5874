"""A TCP proxy in front of a real server that can become a black hole: nothing passes any more, and nothing is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_POLL_S = 0.1
_CHUNK = 65536


class Proxy:
    """Passes what comes to `port` on to `target` and back. Use as a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_S)
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._passes, self._closing = threading.Event(), threading.Event()
        self._passes.set()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._passes.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def swallow(self) -> None:
        """From now on nothing passes, either way; new connections stand and lead nowhere."""
        self._passes.clear()

    def mend(self) -> None:
        """What was held up passes, and all that comes."""
        self._passes.set()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._join, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _join(self, client: socket.socket) -> None:
        """One connection, until either end closes it."""
        self._passes.wait()
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=self._pump, args=(server, client))
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        source.settimeout(_POLL_S)
        with contextlib.suppress(OSError):  # an end that is gone: the other one is told below
            while not self._closing.is_set():
                try:
                    data = source.recv(_CHUNK)
                except TimeoutError:
                    continue
                self._passes.wait()
                if not data:
                    break
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
