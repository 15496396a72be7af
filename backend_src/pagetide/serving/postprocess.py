"""The model `postprocessing`: chunks of token ids to text.

Never fails, keeps no state, and tells the engine of cancelled requests.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.contract.faces import PASSED, POSTPROCESSING_NAMES
from pagetide.models.source import find_model
from pagetide.serving import triton
from pagetide.serving.client import EngineClient, socket_path
from pagetide.serving.passage import Passed, passed_file
from pagetide.serving.siblings import Siblings
from pagetide.text.tokens import Vocabulary, decode

log = logging.getLogger("pagetide.postprocess")

_PASSED = {name: POSTPROCESSING_NAMES[output] for name, output in PASSED.items()}


class PostprocessModel:
    """Triton's Python model class.

    Exactly one instance, and no dynamic batching: Triton pairs responses by order of arrival.
    """

    def initialize(self, args: dict[str, str]) -> None:
        settings = triton.settings_of(args)
        self._vocabulary = Vocabulary.read(find_model(settings.model, settings.cache_path))
        engine = socket_path(triton.server_pid(), triton.engine_of(args))
        self._passed = Passed(passed_file(engine))
        self._client = EngineClient(
            engine,
            on_outputs=lambda outputs: None,
            on_refused=lambda number, error: None,
            on_lost=lambda: None,
        )
        self._siblings = Siblings(args["model_instance_name"], triton.server_pid())
        self._siblings.join()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        arrays, wanted = triton.input_arrays(request), request.requested_output_names()
        # Ids and lengths only pass.
        tensors = [
            triton.tensor(output, arrays[name])
            for output, name in _PASSED.items()
            if output in wanted and name in arrays
        ]
        # An error from here would leak the whole request inside Triton's ensemble: the client gets what
        # text there is instead.
        try:
            self._report_cancel(request, arrays)
            if "CHUNK_NUMBER" in arrays:
                self._passed.note(int(arrays["CHUNK_NUMBER"].flat[0]))
            texts = self._texts(arrays) if "OUTPUT" in wanted else []
        except Exception:
            log.exception("a chunk could not be turned into text")
            texts = ["\ufffd"]
        if "OUTPUT" in wanted:
            tensors.append(triton.tensor("OUTPUT", triton.text_array([text.encode() for text in texts])))
        return pb_utils.InferenceResponse(tensors)

    def _report_cancel(self, request: Any, arrays: dict[str, np.ndarray]) -> None:
        if "REQUEST_NUMBER" in arrays and request.is_cancelled():
            self._client.cancel(arrays["REQUEST_NUMBER"].reshape(-1).tolist())

    def _texts(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """The text of each row of TOKENS_BATCH [rows, beams, n], beams flattened."""
        if "TOKENS_BATCH" not in arrays:
            return [""]
        ids = arrays["TOKENS_BATCH"]
        rows = (
            ids.reshape(-1, ids.shape[-1])
            if ids.size
            else np.zeros((ids.shape[0] * ids.shape[1], 0), np.int32)
        )
        lengths = _flat(arrays.get("SEQUENCE_LENGTH"), len(rows), rows.shape[1])
        cuts = _flat(arrays.get("TEXT_CUT"), len(rows), 0)
        prompts = _flat(arrays.get("PROMPT_TEXT"), len(rows), b"")
        skips = _flat(arrays.get("SKIP_SPECIAL_TOKENS"), len(rows), True)
        return [
            prompt.decode() + decode(self._vocabulary.table(skip), row[:length].tolist(), cut)
            for row, length, cut, prompt, skip in zip(rows, lengths, cuts, prompts, skips, strict=True)
        ]

    def finalize(self) -> None:
        self._siblings.leave()
        self._client.close()


def _flat(array: np.ndarray | None, rows: int, default: Any) -> list[Any]:
    return [default] * rows if array is None else array.reshape(-1).tolist()
