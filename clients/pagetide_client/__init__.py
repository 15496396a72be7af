"""A typed client for Pagetide on Triton, over gRPC: needs tritonclient[grpc] and nothing of the server.

    from pagetide_client import Client

    with Client("127.0.0.1:8001") as client:
        print(client.generate("The tide rises because", max_tokens=40).text)
        for chunk in client.stream_chat([{"role": "user", "content": "Why is the sea salty?"}]):
            print(chunk.text, end="", flush=True)

Every keyword is a request field by its name in model_repository/README.md; the server says which one is
wrong, and what is allowed. Leaving a stream's loop cancels its request. AsyncClient is the same with await.
"""

from pagetide_client.answers import Answer, Chunk, Completion
from pagetide_client.asynchronous import AsyncClient
from pagetide_client.errors import (
    EngineError,
    InvalidRequestError,
    PagetideError,
    RequestTimeoutError,
    ServerBusyError,
    ServerUnavailableError,
)
from pagetide_client.synchronous import Client

__all__ = [
    "Answer",
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "EngineError",
    "InvalidRequestError",
    "PagetideError",
    "RequestTimeoutError",
    "ServerBusyError",
    "ServerUnavailableError",
]
