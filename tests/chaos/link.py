"""The way of one process to Redis: a TCP proxy that breaks as it is told, counts what it has broken, and can lead
elsewhere, as the address of a service does after a failover."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Trap:
    """Waits for a command that contains `marker`, after `skip` others, and does `then` with it or with its reply.

    `hold` never passes it on, nor anything after it on that connection; `reset` ends the connection instead.
    """

    marker: bytes
    where: Literal["command", "reply"]
    then: Literal["hold", "reset"]
    skip: int = 0
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    is_armed: bool = True


class Link:
    """Listens on a loopback port and connects each call to `target`, a unix socket or an address; those that are open
    stay where they lead."""

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self.target = target
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._refuses = False
        self._budget: int | None = None
        self._traps: list[Trap] = []
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.latency_s = 0.0
        self.num_connections = 0
        self.num_bytes = 0
        self.num_bytes_held = 0
        self.num_delayed = 0
        self.num_reset = 0
        self.num_refused = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Link]:
        await self.open()
        try:
            yield self
        finally:
            await self.close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self._refuses = True
        self.reset()

    def fall_silent(self) -> None:
        """Keep every connection open, and new ones too, and let nothing through: a half-open link. What is under way
        arrives when the link is mended."""
        self._flows.clear()

    def reset_after(self, num_bytes: int) -> None:
        """Reset the connection on which the next `num_bytes` of replies, over all connections, are complete."""
        self._budget = num_bytes

    def reset(self) -> None:
        for task, writer in self._serving.items():
            self._abort(writer)
            task.cancel()

    def mend(self) -> None:
        """Be a good link again. Connections that were reset stay so; what was held back flows."""
        self._refuses, self._budget, self.latency_s = False, None, 0.0
        self._flows.set()

    def trap(
        self, marker: str, where: Literal["command", "reply"], then: Literal["hold", "reset"], skip: int = 0
    ) -> Trap:
        trap = Trap(marker.encode(), where, then, skip)
        self._traps.append(trap)
        return trap

    async def close(self) -> None:
        # Connections that were taken last are still on their way to `_accept`.
        self._refuses = True
        if self._server is not None:
            self._server.close()
        self.reset()
        await asyncio.gather(*self._serving, return_exceptions=True)
        # Aborted transports close in turns of the loop to come.
        await asyncio.sleep(0.01)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            self.num_refused += 1
            self._abort(writer)
            return
        self.num_connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(self.target, Path):
                server_reader, server_writer = await asyncio.open_unix_connection(str(self.target))
            else:
                server_reader, server_writer = await asyncio.open_connection(*self.target)
        except OSError:
            # Redis is away: a caller at its own address would be refused.
            self._abort(writer)
            return
        caught: list[Trap] = []
        ways = [
            asyncio.ensure_future(self._commands(reader, server_writer, caught)),
            asyncio.ensure_future(self._replies(server_reader, writer, caught)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # All of it before the first wait, which a second cancellation may end.
            for way in ways:
                way.cancel()
            for end in (writer, server_writer):
                end.close()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _commands(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter, caught: list[Trap]) -> None:
        while data := await reader.read(1 << 16):
            await self._pass(data)
            trap = self._sprung_by(data)
            if trap is not None and trap.where == "command":
                trap.sprung.set()
                await self._end(trap)
                return
            if trap is not None:
                caught.append(trap)
            to.write(data)
            await to.drain()

    async def _replies(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter, caught: list[Trap]) -> None:
        while data := await reader.read(1 << 16):
            await self._pass(data)
            if caught:
                # The server has carried the command out.
                self.num_bytes_held += len(data)
                caught[0].sprung.set()
                await self._end(caught[0])
                self._abort(to)
                return
            self.num_bytes += len(data)
            if self._budget is not None:
                self._budget -= len(data)
                if self._budget <= 0:
                    self._budget = None
                    to.write(data[: len(data) // 2])
                    self._abort(to)
                    return
            to.write(data)
            await to.drain()

    async def _pass(self, data: bytes) -> None:
        if self.latency_s:
            self.num_delayed += 1
            await asyncio.sleep(self.latency_s)
        if not self._flows.is_set():
            self.num_bytes_held += len(data)
            await self._flows.wait()

    def _sprung_by(self, data: bytes) -> Trap | None:
        for trap in self._traps:
            if trap.is_armed and trap.marker in data:
                if trap.skip:
                    trap.skip -= 1
                    continue
                trap.is_armed = False
                return trap
        return None

    async def _end(self, trap: Trap) -> None:
        if trap.then == "hold":
            await asyncio.Event().wait()

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        """Close with RST, as a vanished peer does."""
        self.num_reset += 1
        connection: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
