"""Single values of requests: from tensors, JSON or request parameters to Python's types, with one clear
sentence for each wrong one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from pagetide.types import RequestError

_MAX_SHOWN = 80


def shown(value: Any) -> str:
    """A value as an error message shows it: short, whatever a client sent."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def text(name: str, raw: Any) -> str:
    """UTF-8 text, from a tensor or from JSON. Raises RequestError, also for NUL and lone surrogates."""
    if isinstance(raw, bytes):
        try:
            raw = raw.decode()
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{name} is not valid UTF-8 (byte {error.start}); it must be UTF-8 text"
            ) from None
    if isinstance(raw, str):
        if "\0" in raw or not _is_encodable(raw):
            raise RequestError(
                f"{name} is {shown(raw)}, must be a text without zero bytes and lone surrogates"
            )
        return raw
    raise RequestError(f"{name} is {shown(raw)}, must be a text")


def _is_encodable(raw: str) -> bool:
    try:
        raw.encode()
    except UnicodeEncodeError:
        return False
    return True


def integer(name: str, raw: Any) -> int:
    """A whole number of any size; a text or a float that is one counts too. Raises RequestError."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, str) and len(raw) < 40:
        try:
            return int(raw)
        except ValueError:
            pass
    raise RequestError(f"{name} is {shown(raw)}, must be an integer")


def int32(name: str, raw: Any) -> int:
    """A whole number that fits into a tensor of type INT32. Raises RequestError."""
    value = integer(name, raw)
    if not -(2**31) <= value < 2**31:
        raise RequestError(f"{name} is {shown(value)}, must be from {-(2**31)} to {2**31 - 1}")
    return value


def number(name: str, raw: Any) -> float:
    """A finite number; a text that is one counts too. Raises RequestError."""
    if isinstance(raw, int | float | str) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            value = math.nan
        if math.isfinite(value):
            return value
    raise RequestError(f"{name} is {shown(raw)}, must be a finite number")


def boolean(name: str, raw: Any) -> bool:
    """A truth value; 0, 1 and their usual texts count too. Raises RequestError."""
    if isinstance(raw, bool):
        return raw
    if raw in ("true", "True", "1", 1):
        return True
    if raw in ("false", "False", "0", 0):
        return False
    raise RequestError(f"{name} is {shown(raw)}, must be true or false")


def json_value(name: str, raw: Any, what: str) -> Any:
    """What a JSON text says; anything that is no text is taken as it is."""
    if not isinstance(raw, str | bytes):
        return raw
    raw = text(name, raw)
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
        # Half of a pair of surrogates can be written in JSON, but is no text: nothing that follows could
        # encode it.
        is_text = "\\u" not in raw or _is_encodable(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not valid JSON ({error}); it must be {what}") from None
    if not is_text:
        raise RequestError(
            f"{name} has a lone surrogate (\\ud800 to \\udfff), must be JSON whose texts are Unicode"
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def json_object(name: str, raw: Any) -> dict[str, Any]:
    """An object from its JSON text; empty text: an empty one. Raises RequestError."""
    value = json_value(name, raw, "a JSON object") if raw else {}
    if not isinstance(value, dict):
        raise RequestError(f"{name} is a JSON {type(value).__name__}, must be an object")
    return value


def json_objects(name: str, raw: Any) -> list[dict[str, Any]]:
    """A list of at least one object, from its JSON text. Raises RequestError."""
    value = json_value(name, raw, "a JSON list of objects")
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"{name} must be a JSON list of at least one object")
    return value


def token_biases(name: str, raw: Any) -> dict[int, float]:
    """{token id: bias} from a JSON object, whose keys are texts."""
    return {
        int32(f"{name}'s token", key): number(f"{name}'s bias of {shown(key)}", bias)
        for key, bias in json_object(name, raw).items()
    }


CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "BYTES": text,
    "INT32": integer,
    "UINT64": integer,
    "FP32": number,
    "BOOL": boolean,
    "object": json_object,
    "objects": json_objects,
    "biases": token_biases,
}
