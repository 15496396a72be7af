"""What the four models share in their dealings with Triton's Python backend: requests to numpy, errors to
Triton's codes.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.config import Settings, SettingsError, read_settings, settings_file
from pagetide.contract.values import integer
from pagetide.tracing import TRACEPARENT
from pagetide.types import EngineError, QueueFullError, RequestError

log = logging.getLogger("pagetide.triton")


def input_arrays(request: Any) -> dict[str, np.ndarray]:
    """The request's input tensors by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def parameters(request: Any) -> dict[str, Any]:
    """The request's own parameters: texts, numbers and booleans by name."""
    text = request.parameters()
    return json.loads(text) if text else {}


def timeout_us(request: Any, parameters: dict[str, Any]) -> int:
    """The request's own time limit in microseconds, 0: none; HTTP's generate brings it as a parameter,
    which is taken out. Raises RequestError.
    """
    given = integer("timeout", parameters.pop("timeout", 0))
    if given < 0:
        raise RequestError(f"timeout is {given}, must be a number of microseconds, 0 for no limit")
    return given or request.timeout()


def traceparent(request: Any) -> str:
    """Of Triton's own span of this request, if Triton is told to trace (in its mode `opentelemetry`)."""
    context = request.trace().get_context()
    return str(json.loads(context).get(TRACEPARENT, "")) if context else ""


def tensor(name: str, array: np.ndarray) -> Any:
    """An output tensor. (The stub fills triton_python_backend_utils only after it has imported the model.)"""
    return pb_utils.Tensor(name, array)


def text_array(texts: list[bytes]) -> np.ndarray:
    """A BYTES tensor's array, which NumPy does not cut at NUL bytes."""
    return np.array(texts, dtype=np.object_)


def error_of(error: Exception) -> Any:
    """An exception as Triton reports it: the client's fault, a full queue, or ours, of which clients learn
    the kind and the log the rest.
    """
    if isinstance(error, RequestError):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, QueueFullError | ConnectionError):
        code = pb_utils.TritonError.UNAVAILABLE
    else:
        code = pb_utils.TritonError.INTERNAL
    if code == pb_utils.TritonError.INTERNAL and not isinstance(error, EngineError):
        log.error("a request has failed", exc_info=error)
        return pb_utils.TritonError(
            f"internal error ({type(error).__name__}); the server's log says more", code
        )
    return pb_utils.TritonError(str(error), code)


def error_response(error: Exception) -> Any:
    """A response that says what was wrong, with Triton's code for its class."""
    return pb_utils.InferenceResponse(output_tensors=[], error=error_of(error))


def server_pid() -> int:
    """The process id of the Triton server: stubs are its children."""
    return os.getppid()


def engine_of(args: dict[str, str]) -> str:
    """The name of a model's engine, from initialize()'s arguments: the parameter `engine` of its
    config.pbtxt, empty for the models that are there from the beginning.
    """
    parameter = json.loads(args["model_config"]).get("parameters", {}).get("engine", {})
    return parameter.get("string_value", "")


def settings_of(args: dict[str, str]) -> Settings:
    """The settings of a model's engine, from initialize()'s arguments. Raises SettingsError."""
    engine = engine_of(args)
    file = Path(args["model_repository"]).parent / settings_file(engine)
    if engine and not file.exists():  # the defaults are those of another model
        raise SettingsError(f"{file} is missing, which has the settings of {engine}")
    return read_settings(file)
