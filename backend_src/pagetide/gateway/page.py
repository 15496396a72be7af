"""The playground: plain files beside this module, and what its controls say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from pagetide.contract.fields import FIELDS

FOLDER = Path(__file__).with_name("playground")
CONTROLS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
)
# The page needs nothing but the gateway, and nothing may be brought into it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page(StaticFiles):
    """The folder with the page, as an ASGI application."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def controls() -> list[dict[str, Any]]:
    """Sampling controls with the sentences of the table of request fields."""
    by_name = {name: field for field in FIELDS for name in field.names}
    return [
        {
            "name": name,
            "sentence": by_name[name].sentence,
            "default": by_name[name].default,
            "low": by_name[name].low,
            "high": by_name[name].high,
            "is_number": by_name[name].dtype != "BYTES",
        }
        for name in CONTROLS
    ]
