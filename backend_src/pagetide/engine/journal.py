"""What is written of each request when it ends: counts, times and how it ended, and nothing of what was
said.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable

from pagetide.config import Settings
from pagetide.engine.sequence import Answer, SequenceGroup
from pagetide.engine.spans import RequestSpans
from pagetide.tracing import make_tracer

log = logging.getLogger("pagetide.requests")


# Writes of a request that has ended: the request, when (ns), and what error it has ended with in place of an
# answer.
Writer = Callable[[SequenceGroup, int, BaseException | None], None]


def writers_of(settings: Settings) -> list[Writer]:
    """Those that the settings ask for."""
    writers: list[Writer] = [log_line] if settings.log_requests else []
    if settings.otlp_traces_endpoint:
        writers.append(RequestSpans(make_tracer(settings.otlp_traces_endpoint, "pagetide"), settings.model))
    return writers


class Journal:
    """now: in ns on the clock of the groups' times."""

    def __init__(self, writers: Iterable[Writer], now: Callable[[], int]):
        self._writers, self._now = tuple(writers), now

    def note(self, group: SequenceGroup, answers: Iterable[Answer]) -> None:
        """Answers that have ended."""
        if self._writers:
            for answer in answers:
                group.reasons.append(answer.reason)
                if answer.sequence is not None:
                    group.num_generated += len(answer.sequence.token_ids) - answer.sequence.num_prompt

    def close(self, group: SequenceGroup, error: BaseException | None = None) -> None:
        """The request has ended; error: with what, in place of an answer."""
        if self._writers:
            now = self._now()
            for write in self._writers:
                write(group, now, error)


def log_line(group: SequenceGroup, end_ns: int, error: BaseException | None) -> None:
    """One line of JSON in the log."""
    request = group.request

    def seconds(until: int) -> float | None:
        return round((until - group.arrival_ns) / 1e9, 6) if until else None

    facts = {
        "request_id": request.request_id,
        "number": request.number,
        "priority": request.priority,
        "lora_name": request.lora_name,
        "prompt_tokens": len(request.prompt_ids),
        "cached_tokens": group.num_cached,
        "answer_tokens": group.num_generated,
        "queue_s": seconds(group.first_scheduled_ns),
        "first_token_s": seconds(group.first_token_ns),
        "total_s": seconds(end_ns),
        "finish_reasons": group.reasons,
        # Its sentence may quote the request.
        "error": type(error).__name__ if error is not None else None,
    }
    log.info("%s", json.dumps(facts))
