"""Which clients have gone: generation for them stops."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

# set once the client of the request that the current task answers has gone
GONE: ContextVar[threading.Event] = ContextVar("gone")


class Disconnects:
    """An ASGI middleware that listens for the end of the connection while a request is answered."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = threading.Event()
        GONE.set(gone)
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def listen() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    gone.set()
                    return

        listener = asyncio.create_task(listen())
        try:
            await self.app(scope, messages.get, send)
        finally:
            listener.cancel()
