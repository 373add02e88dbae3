"""A way to a server through a port of the test's own, which can be made to fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class FaultyLink:
    """Carries bytes both ways between `port` and a server."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        # Connections that were closed at once.
        self.refused = 0

    def stall(self) -> None:
        """Carry nothing until `resume`; connections stay open, and new ones are taken."""
        self._flowing.clear()

    def cut(self) -> None:
        """Close every connection, and each new one at once, until `resume`."""
        self._is_cut = True
        for task in self._tasks:
            task.cancel()

    def resume(self) -> None:
        """Carry what waits, and what comes."""
        self._is_cut = False
        self._flowing.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            self.refused += 1
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_writer = None
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                far_reader, far_writer = await asyncio.open_connection(*self._target)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(reader, far_writer))
                    group.create_task(self._carry(far_reader, writer))
        except* ConnectionError:
            pass
        finally:
            self._tasks.discard(task)
            for each in (writer, far_writer):
                if each is not None:
                    each.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()

    @classmethod
    @asynccontextmanager
    async def to(cls, host: str, port: int) -> AsyncIterator["FaultyLink"]:
        """A link to a server, for the time of the block."""
        link = cls((host, port))
        server = await asyncio.start_server(link._connected, "127.0.0.1", 0)
        link.port = server.sockets[0].getsockname()[1]
        try:
            yield link
        finally:
            server.close()
            for task in list(link._tasks):
                task.cancel()
            if link._tasks:
                await asyncio.wait(link._tasks)
