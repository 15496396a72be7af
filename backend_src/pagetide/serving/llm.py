"""The models `llm` (decoupled: one response for each chunk) and `llm_unary` (one response for each request).

Thin: Triton requests become engine requests, engine outputs become responses. `llm` also starts and watches
the engine.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.contract.checks import check_request
from pagetide.contract.parse import parse
from pagetide.contract.parsed import ParsedRequest, timed
from pagetide.serving import triton
from pagetide.serving.client import NOT_RUNNING, EngineClient, EngineStartError, socket_path
from pagetide.serving.defaults import read_defaults
from pagetide.serving.metrics import Engine, EngineMetrics
from pagetide.serving.pacer import ResponsePacer
from pagetide.serving.passage import Passage, passed_file
from pagetide.serving.responses import ClientRequest, send
from pagetide.serving.siblings import Siblings
from pagetide.serving.supervisor import EngineSupervisor, has_owner, wait_for_engine
from pagetide.serving.tensors import Prompt, TokenTexts, is_vllm_face
from pagetide.tracing import nearest
from pagetide.types import EngineError, Output, Request, RequestError

log = logging.getLogger("pagetide.llm")

_CANCEL_POLL_S = 0.05
_UNLOADED_S = 1.0  # after which a model that starts an engine has not just been replaced by another


class LlmModel:
    """Triton's Python model class."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        # Triton's stub ends by itself only if none of its threads waits for the server.
        self._siblings = Siblings(args["model_instance_name"], triton.server_pid())
        self._is_decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self._settings = triton.settings_of(args)
        self._open: dict[int, ClientRequest] = {}  # request number of each prompt -> its client request
        self._lock = threading.Lock()
        # What an engine took with it and the next one is to be asked, and when it was lost.
        self._interrupted: list[tuple[float, ClientRequest]] = []
        self._numbers = itertools.count(os.getpid() << 32)
        try:
            self._path = path = socket_path(triton.server_pid(), triton.engine_of(args))
            # Only one of the engine's clients starts it.
            self._supervisor = (
                EngineSupervisor(self._settings, path, args["model_instance_name"], log.warning)
                if self._is_decoupled
                else None
            )
        except EngineStartError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._passage = Passage(passed_file(path)) if self._is_decoupled else None
        self._pacer = ResponsePacer(self._send, self._passage)
        self._metrics = None
        if self._supervisor is not None:
            self._metrics = EngineMetrics(
                args["model_name"], self._settings.metric_names, self._supervisor, self._pacer.take_gaps
            )
        on_statistics = self._metrics.update if self._metrics is not None else None
        self._client = EngineClient(
            path, self._pacer.put, self._on_refused, self._on_lost, on_statistics, self._on_ready
        )
        try:
            wait_for_engine(
                self._client, path, self._settings.engine_start_timeout_s, self._supervisor is not None
            )
        except EngineStartError as error:
            self._close()
            raise pb_utils.TritonModelException(str(error)) from error
        if self._supervisor is not None:
            self._supervisor.mark_started()
        engine = self._client.engine
        assert engine is not None
        if engine.device == "cpu":
            self._pacer.spare_the_processor()
        self._defaults = read_defaults(Path(engine.model), self._settings)
        self._texts = TokenTexts(Path(engine.model))
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll_cancels, name="pagetide-cancels", daemon=True)
        self._poller.start()
        self._siblings.join()

    def execute(self, requests: list[Any]) -> None:
        """Parses and queues; returns at once. Responses come from the pacer's thread."""
        submitted: list[Request] = []
        for request in requests:
            sender = request.get_response_sender()
            try:
                submitted += self._accept(request, sender)
            except Exception as error:  # whatever it is, it belongs to this request
                send(sender, triton.error_response(error), is_last=True)
        self._submit(submitted)

    def _submit(self, requests: list[Request]) -> None:
        with self._lock:
            requests = [request for request in requests if request.number in self._open]
        if not requests:
            return
        try:
            self._client.submit(requests)
        except Exception as error:
            self._fail([request.number for request in requests], error)

    def _accept(self, request: Any, sender: Any) -> list[Request]:
        """Checks a client request and registers it; returns its engine requests, none for a cancel."""
        engine = self._client.engine
        prompts = self._read_prompts(request)
        is_cancel = any(prompt.parsed.cancel for prompt in prompts)
        if engine is None or not (self._client.is_ready or is_cancel):
            raise ConnectionError(NOT_RUNNING)
        wanted = request.requested_output_names()
        collects = not self._is_decoupled or is_vllm_face(wanted)
        opened = ClientRequest(
            sender, wanted, prompts, self._is_decoupled, collects, engine, self._texts, self._passage
        )
        if is_cancel:
            self._cancel_named(request.request_id(), opened)
            return []
        parent = triton.traceparent(request) if self._settings.otlp_traces_endpoint else ""
        requests = [self._engine_request(prompt, request.request_id(), parent) for prompt in prompts]
        for one in requests:
            check_request(one, engine)
        opened.requests = requests
        with self._lock:
            self._open.update((one.number, opened) for one in requests)
        return requests

    def _engine_request(self, prompt: Prompt, request_id: str, traceparent: str) -> Request:
        parsed = prompt.parsed
        return Request(
            number=prompt.number,
            prompt_ids=prompt.ids,
            params=parsed.params,
            request_id=request_id,
            stream=parsed.stream and self._is_decoupled,
            arrival_ns=parsed.arrival_ns,
            deadline_ns=parsed.deadline_ns,
            priority=parsed.priority,
            salt=parsed.salt,
            lora_name=parsed.lora_name,
            user=parsed.user,
            traceparent=nearest(parsed.traceparent, traceparent),
            context_logits="return_context_logits" in parsed.returns,
            timings="return_perf_metrics" in parsed.returns,
            generation_logits="return_generation_logits" in parsed.returns,
        )

    def _read_prompts(self, request: Any) -> list[Prompt]:
        arrays = triton.input_arrays(request)
        packed, lengths = arrays.pop("PARAMS", None), arrays.pop("input_lengths", None)
        if packed is not None:
            parsed = [_unpack(one) for one in packed.reshape(-1)]
        else:
            now, parameters = time.monotonic_ns(), triton.parameters(request)
            timeout_us = triton.timeout_us(request, parameters)
            parsed = [timed(one, now, timeout_us) for one in parse(arrays, parameters, self._defaults)]
        ids = arrays.get("input_ids", np.zeros((len(parsed), 0), np.int32))
        if any(one.cancel for one in parsed):
            ids, lengths = np.zeros((len(parsed), 0), np.int32), None
        if lengths is not None and (
            lengths.size != len(ids) or lengths.min() < 0 or lengths.max() > ids.shape[1]
        ):
            raise RequestError(
                f"input_lengths is {lengths.reshape(-1).tolist()}, must be from 0 to "
                f"{ids.shape[1]} for each prompt"
            )
        counts = [ids.shape[1]] * len(parsed) if lengths is None else lengths.reshape(-1).tolist()
        return [
            Prompt(next(self._numbers), index, one, row[:count].tolist(), is_direct=packed is None)
            for index, (one, row, count) in enumerate(zip(parsed, ids, counts, strict=True))
        ]

    # -- answers -------------------------------------------------------------------------------------------

    def _send(self, output: Output) -> None:
        """Called by the pacer, in order for each sequence."""
        with self._lock:
            opened = self._open.get(output.number)
        if opened is None:
            return
        try:
            is_done = opened.take(output)
        except Exception as error:
            # The pacer's thread serves all requests: what one of them does to it is that one's own.
            self._client.cancel(opened.numbers)
            opened.fail(error)
            is_done = True
        if is_done:
            self._forget(opened)

    def _on_refused(self, number: int, error: Exception) -> None:
        self._fail([number], error)

    def _on_lost(self) -> None:
        with self._lock:
            opened = list({id(one): one for one in self._open.values()}.values())
        self._pacer.forget_all()
        repeated = [one for one in opened if self._settings.repeat_interrupted and self._begin_again(one)]
        if repeated:
            log.warning("%d requests that had not been answered begin again", len(repeated))
        failed = [number for one in opened if one not in repeated for number in one.numbers]
        if self._metrics is not None:
            self._metrics.show_engine(Engine.DOWN)
            self._metrics.count_failed(len(failed))
        self._fail(
            failed, EngineError("the engine failed while it was working on this request; send it again")
        )

    def _begin_again(self, opened: ClientRequest) -> bool:
        """As soon as there is an engine; False if it may not."""
        before = opened.numbers
        if not opened.begin_again(self._numbers):
            return False
        self._client.cancel(before)  # if there is an engine all the same
        with self._lock:
            for number in before:
                self._open.pop(number, None)
            self._open.update((number, opened) for number in opened.numbers)
            self._interrupted.append((time.monotonic(), opened))
        return True

    def _on_ready(self) -> None:
        if self._metrics is not None:
            self._metrics.show_engine(Engine.UP)
        with self._lock:
            waiting, self._interrupted = self._interrupted, []
        self._submit([request for _, opened in waiting for request in opened.requests])

    def _give_up(self) -> None:
        """On requests that no engine has taken: their time is up, their client gone, or no engine comes."""
        patience_s = self._settings.engine_start_timeout_s if has_owner(self._path) else _UNLOADED_S
        latest, now_ns = time.monotonic() - patience_s, time.monotonic_ns()
        self._end_interrupted(lambda opened: opened.is_late(now_ns), "timeout")
        self._end_interrupted(lambda opened: opened.is_direct and opened.is_cancelled(), "cancelled")
        with self._lock:
            late = [opened for since, opened in self._interrupted if since < latest]
            self._interrupted = [one for one in self._interrupted if one[0] >= latest]
        self._fail([number for opened in late for number in opened.numbers], ConnectionError(NOT_RUNNING))

    def _end_interrupted(self, is_meant: Callable[[ClientRequest], bool], reason: str) -> None:
        """Answers those of them with what there is of their answers: nothing."""
        with self._lock:
            meant = [opened for _, opened in self._interrupted if is_meant(opened)]
            self._interrupted = [one for one in self._interrupted if one[1] not in meant]
        for opened in meant:
            self._forget(opened)
            opened.end(reason)

    def _fail(self, numbers: list[int], error: Exception) -> None:
        with self._lock:
            failed = {id(opened): opened for number in numbers if (opened := self._open.get(number))}.values()
        for opened in failed:
            self._forget(opened)
            for number in opened.numbers:
                self._pacer.forget(number)
            self._client.cancel([number for number in opened.numbers if number not in numbers])
            opened.fail(error)

    def _forget(self, opened: ClientRequest) -> None:
        with self._lock:
            for number in opened.numbers:
                self._open.pop(number, None)

    # -- cancelling ----------------------------------------------------------------------------------------

    def _cancel_named(self, request_id: str, opened: ClientRequest) -> None:
        """Ends the running requests of this name, and answers the request that asked for it."""
        if not request_id:
            raise RequestError("cancel needs the request_id of the requests to end, and it is empty")
        self._client.cancel([], request_id)
        self._end_interrupted(
            lambda waiting: any(one.request_id == request_id for one in waiting.requests), "cancelled"
        )
        opened.end("cancelled")

    def _poll_cancels(self) -> None:
        """Looks for clients that are gone, and for requests that no engine takes.

        Inside an ensemble Triton never says so here, and `postprocessing` hears of it instead.
        """
        while not self._closing.wait(_CANCEL_POLL_S):
            with self._lock:
                opened = {id(one): one for one in self._open.values()}.values()
            for one in opened:
                if one.is_direct and one.is_cancelled():
                    self._client.cancel(one.numbers)
            self._give_up()

    def finalize(self) -> None:
        self._siblings.leave()
        self._closing.set()
        self._poller.join()
        self._close()

    def _close(self) -> None:
        self._client.close()
        self._pacer.close()
        if self._passage is not None:  # before another one of this model may begin
            self._passage.close()
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._metrics is not None:
            self._metrics.close()


def _unpack(packed: bytes) -> ParsedRequest:
    """What `preprocessing` has checked; anything else that calls itself PARAMS is refused."""
    try:
        return msgspec.msgpack.decode(packed, type=ParsedRequest)
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"PARAMS is not what preprocessing makes ({error}); send the parameters by their own names"
        ) from None
