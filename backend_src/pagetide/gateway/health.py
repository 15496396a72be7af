"""Whether the engine answers: Triton goes on saying ready when it does not."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from pagetide.gateway.errors import ApiError
from pagetide.gateway.triton import Generation, Triton
from pagetide.tracing import TRACEPARENT, UNRECORDED

log = logging.getLogger("pagetide.gateway")

PROBE_EVERY_S = 3.0
PATIENCE_S = 9.0  # without a sign of life; a stuck engine is noticed within ten seconds


class Health:
    """Asks for one token every few seconds, as the first of all that wait, unless answers flow anyway."""

    def __init__(self, triton: Triton):
        self._triton = triton
        self._last_life = 0.0
        self._model = ""
        self.reason = "the server is starting"

    @property
    def is_good(self) -> bool:
        return time.monotonic() - self._last_life < PATIENCE_S

    def saw_life(self) -> None:
        """An answer has come from the engine."""
        self._last_life = time.monotonic()

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            if time.monotonic() - self._last_life > PROBE_EVERY_S:
                try:
                    await self._probe()
                except Exception:
                    log.exception("the engine could not be asked; it is asked again")
            await asyncio.sleep(PROBE_EVERY_S / 3)

    async def _probe(self) -> None:
        try:
            await asyncio.wait_for(self._ask(), PATIENCE_S / 2)
            self.saw_life()
        except asyncio.TimeoutError:
            self.reason = "the engine does not answer"
        except ApiError as error:
            if error.status == 429:  # an engine that is full is alive
                self.saw_life()
            self.reason = error.message
            self._model = ""  # which may have been unloaded: the next probe looks for one that is there

    async def _ask(self) -> None:
        if not self._model:
            self._model = next(iter(await self._triton.models()), "")
        if not self._model:
            raise ApiError(503, "Triton serves no model that takes chats")
        fields = {
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
            "priority": -(2**31 - 1),
            TRACEPARENT: UNRECORDED,
        }
        probe = Generation(self._model, f"probe-{uuid.uuid4().hex}", {"text_input": "."}, fields)
        async for _ in self._triton.generate(probe):
            pass
