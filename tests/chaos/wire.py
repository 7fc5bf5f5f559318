"""The way of one process to a Redis of a test's own, over TCP: it breaks as it is told, counts what it has broken, and
can lead elsewhere, as the address of a service does after a failover."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator


class Wire:
    """Listens on a loopback port and connects each call to `target`; those that are open stay where they lead."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        # How long each reply takes on its way.
        self.latency_s = 0.0
        self.num_refused = self.num_reset = self.num_bytes_held = self.num_delayed = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._budget: int | None = None
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Wire]:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield self
        finally:
            self._server.close()
            self.reset()
            await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self._is_cut = True
        self.reset()

    def fall_silent(self) -> None:
        """Keep every connection open, take new ones, and let nothing through: a half-open link."""
        self._flows.clear()

    def reset_after(self, num_bytes: int) -> None:
        """Reset the connection that brings the last of the next `num_bytes` of replies."""
        self._budget = num_bytes

    def reset(self) -> None:
        for task, writer in self._open.items():
            self._abort(writer)
            task.cancel()

    def mend(self) -> None:
        """Be a good wire again. What was held back flows."""
        self._is_cut, self._budget, self.latency_s = False, None, 0.0
        self._flows.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            self.num_refused += 1
            self._abort(writer)
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._open.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.target)
        except OSError:
            # Redis is away: a caller at its own address would be refused.
            self._abort(writer)
            return
        ways = [
            asyncio.ensure_future(self._commands(reader, server_writer)),
            asyncio.ensure_future(self._replies(server_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, server_writer):
                end.close()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _commands(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._hold(data)
            to.write(data)
            await to.drain()

    async def _replies(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.latency_s:
                self.num_delayed += 1
                await asyncio.sleep(self.latency_s)
            await self._hold(data)
            if self._budget is not None:
                self._budget -= len(data)
                if self._budget <= 0:
                    self._budget = None
                    to.write(data[: len(data) // 2])
                    self._abort(to)
                    return
            to.write(data)
            await to.drain()

    async def _hold(self, data: bytes) -> None:
        if not self._flows.is_set():
            self.num_bytes_held += len(data)
            await self._flows.wait()

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        """Close with RST, as a vanished peer does."""
        self.num_reset += 1
        connection: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
