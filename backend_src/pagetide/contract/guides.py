"""What an answer must look like, as clients say it: our two fields, or vLLM's object."""

from __future__ import annotations

import json
from typing import Any

from pagetide.contract.values import json_object, json_value, shown, text
from pagetide.types import GUIDE_KINDS, Guide, RequestError

# Compiling a grammar takes time that grows faster than its length.
MAX_GUIDE_LENGTH = {
    "json_schema": 64 * 1024,
    "regex": 16 * 1024,
    "ebnf_grammar": 16 * 1024,
    "choice": 256 * 1024,
    "structural_tag": 64 * 1024,
}
VLLM_GUIDES = ("guided_decoding", "structured_outputs")
# vLLM's names of guides; the value of json_object is true.
_GUIDE_OF_VLLM = {
    "json": "json_schema",
    "json_object": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf_grammar",
    "structural_tag": "structural_tag",
}


def make_guide(kind: str, guide: str) -> Guide:
    """A guide whose form is right, as far as it can be told without compiling it. Raises RequestError."""
    if kind not in GUIDE_KINDS:
        raise RequestError(
            f"guided_decoding_guide_type is {shown(kind)}, must be one of {', '.join(GUIDE_KINDS)}"
        )
    if kind == "json":
        return Guide(kind)
    if not guide or len(guide) > MAX_GUIDE_LENGTH[kind]:
        raise RequestError(
            f"guided_decoding_guide has {len(guide)} characters, must have 1 to "
            f"{MAX_GUIDE_LENGTH[kind]} for {kind}"
        )
    if kind == "choice":
        _check_choices(json_value("guided_decoding_guide", guide, "a JSON list of texts"))
    elif kind == "json_schema":
        schema = json_value("guided_decoding_guide", guide, "a JSON schema")
        if not isinstance(schema, dict | bool):
            raise RequestError(
                f"guided_decoding_guide is a JSON {type(schema).__name__}, must be a JSON schema: an object"
            )
    elif kind == "structural_tag":
        json_object("guided_decoding_guide", guide)
    return Guide(kind, guide)


def _check_choices(choices: Any) -> None:
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise RequestError(
            "guided_decoding_guide must be a JSON list of at least one text, none of them empty"
        )


def guide_of_vllm(name: str, raw: Any) -> Guide | None:
    """vLLM's form: an object with one of the names of _GUIDE_OF_VLLM."""
    given = {key: value for key, value in json_object(name, raw).items() if value not in (None, False)}
    unknown = [key for key in given if key not in _GUIDE_OF_VLLM]
    if unknown or len(given) > 1:
        raise RequestError(
            f"{name} has {', '.join(map(shown, given))}; must have one of {', '.join(_GUIDE_OF_VLLM)}"
        )
    for key, value in given.items():
        is_plain = isinstance(value, str)
        return make_guide(_GUIDE_OF_VLLM[key], text(name, value) if is_plain else json.dumps(value))
    return None
