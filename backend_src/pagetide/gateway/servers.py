"""The Tritons that the gateway asks: those that it is told of, and each of several of one name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from pagetide.gateway.routing import in_order, leading

log = logging.getLogger("pagetide.gateway")

_REST_S = 5.0
_LOOK_S = 5.0
_GRACE_S = 60.0  # after which a server that has lost its name, and answers nothing, is left
# A server that is back is found within seconds, however long it was gone.
_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
)


class Server:
    """One Triton (see routing.Routed)."""

    def __init__(self, url: str):
        self.url = url
        self.rests_until = 0.0
        self.num_open = 0
        self.channel = grpc.aio.insecure_channel(url, options=_CHANNEL)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def rest(self, reason: str) -> None:
        self.rests_until = time.monotonic() + _REST_S
        log.warning("%s does not serve, others are asked for %.0f s: %s", self.url, _REST_S, reason)


async def leave(server: Server) -> None:
    """Closes it when nothing of it is under way, nor any call that has chosen it."""
    await asyncio.sleep(_GRACE_S)
    while server.num_open:
        await asyncio.sleep(_GRACE_S)
    await server.channel.close()


class Servers:
    """urls: host:port of gRPC. A host with several addresses (a headless service of Kubernetes, a name that
    containers share) is as many servers, which come and go with their addresses.
    """

    def __init__(self, urls: Iterable[str]):
        self._found = {url: [url] for url in urls}  # by what was told
        self._servers = {url: Server(url) for url in self._found}
        self._turn = 0
        self._leaving: set[asyncio.Future[None]] = set()

    def in_turn(self) -> list[Server]:
        """All of them in the order in which they are asked: those that rest come last."""
        servers = list(self._servers.values())
        self._turn = (self._turn + 1) % len(servers)
        now = time.monotonic()
        turned = servers[self._turn :] + servers[: self._turn]
        return sorted(turned, key=lambda server: server.rests_until > now)

    def for_prompt(self, prompt: Mapping[str, Any]) -> list[Server]:
        """All of them, the best for this prompt first."""
        return in_order(list(self._servers.values()), leading(prompt), time.monotonic())

    async def watch(self) -> None:
        """Looks the names up again and again, until it is cancelled."""
        while True:
            try:
                await self.look_up()
            except Exception:
                log.exception("the servers could not be looked up; they stay as they are")
            await asyncio.sleep(_LOOK_S)

    async def look_up(self) -> None:
        for url in self._found:
            with contextlib.suppress(OSError):  # names that cannot be found now keep what they had
                self._found[url] = await _addresses(url)
        wanted = dict.fromkeys(address for found in self._found.values() for address in found)
        for url in self._servers.keys() - wanted.keys():
            leaving = asyncio.ensure_future(leave(self._servers.pop(url)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            log.info("%s is gone", url)
        for url in wanted.keys() - self._servers.keys():
            self._servers[url] = Server(url)
            log.info("%s has come", url)

    async def close(self) -> None:
        for leaving in self._leaving:
            leaving.cancel()
        for server in self._servers.values():
            await server.channel.close()


async def _addresses(url: str) -> list[str]:
    """Every address of a host that has several; otherwise its name, which gRPC looks up when it connects."""
    host, _, port = url.rpartition(":")
    if not host:
        return [url]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    # The same machine may have addresses of both kinds.
    kinds = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in kinds else socket.AF_INET6
    hosts = sorted({address[0] for kind, *_, address in found if kind == family})
    if len(hosts) < 2:
        return [url]
    return [f"[{one}]:{port}" if family == socket.AF_INET6 else f"{one}:{port}" for one in hosts]
