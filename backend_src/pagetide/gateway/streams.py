"""Several streams of pieces as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from pagetide.gateway.triton import Piece

_MAX_WAITING = 64  # pieces; a slow client slows its own streams


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(number of the stream, piece) in the order in which they come.

    The first error ends all; whoever leaves ends all.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[Any] = asyncio.Queue(_MAX_WAITING)
    tasks = [asyncio.ensure_future(_pass_on(i, stream, queue)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(number: int, stream: AsyncIterator[Piece], queue: asyncio.Queue[Any]) -> None:
    try:
        async with contextlib.aclosing(stream) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                await queue.put((number, piece))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
