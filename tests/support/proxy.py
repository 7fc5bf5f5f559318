"""A proxy before Redis that loses the replies it is told to lose."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path


class LossyProxy:
    """Passes everything on, except that the next `num_replies` replies to a command that contains `marker` are dropped
    with their connection, after the server has carried the command out."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._marker = b""
        self._left = 0
        self.num_dropped = 0
        self._frozen: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def lose_replies_to(self, marker: str, num_replies: int) -> None:
        self._marker, self._left = marker.encode(), num_replies

    def freeze(self) -> None:
        """Answer no more on the connections that are open now, without closing them: a half-open link."""
        self._frozen |= self._open

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_closed:
            # It was taken before the server was closed.
            writer.transport.abort()
            return
        self._open.add(writer)
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def close(self) -> None:
        self._is_closed = True
        for writer in self._open:
            writer.close()
        await asyncio.gather(*self._serving)
        # Transports close in turns of the loop to come.
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(str(self._target))
        is_doomed = False

        async def forward() -> None:
            nonlocal is_doomed
            while data := await reader.read(1 << 16):
                if self._left and self._marker in data:
                    self._left -= 1
                    is_doomed = True
                server_writer.write(data)
                await server_writer.drain()

        async def answer() -> None:
            while data := await server_reader.read(1 << 16):
                if is_doomed:
                    self.num_dropped += 1
                    return
                if writer not in self._frozen:
                    writer.write(data)
                    await writer.drain()

        tasks = [asyncio.create_task(forward()), asyncio.create_task(answer())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open.discard(writer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.close()
            server_writer.close()
            await asyncio.gather(writer.wait_closed(), server_writer.wait_closed(), return_exceptions=True)


@contextlib.asynccontextmanager
async def lossy_proxy(target: Path, path: Path) -> AsyncIterator[LossyProxy]:
    proxy = LossyProxy(target)
    server = await asyncio.start_unix_server(proxy.accept, str(path))
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
