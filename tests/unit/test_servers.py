"""Servers behind one name come and go with its addresses."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from pagetide.gateway.servers import Server, Servers, leave


def answer(*hosts: str, port: int = 8001) -> list[Any]:
    """As getaddrinfo has it."""
    families = {host: socket.AF_INET6 if ":" in host else socket.AF_INET for host in hosts}
    return [(family, socket.SOCK_STREAM, 6, "", (host, port)) for host, family in families.items()]


@pytest.fixture
def looked_up(monkeypatch):
    """What names stand for, and the servers after each lookup, in one event loop."""
    names: dict[str, list[Any]] = {}

    async def getaddrinfo(host: str, port: str, **_: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return names[host]

    async def run(urls: list[str], *states: dict[str, list[Any]]) -> list[set[str]]:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        servers, found = Servers(urls), []
        for state in states:
            names.clear()
            names.update(state)
            await servers.look_up()
            found.append({server.url for server in servers.in_turn()})
            assert {server.url for server in servers.for_prompt({"text_input": "a"})} == found[-1]
        await servers.close()
        return found

    return lambda *arguments: asyncio.run(run(*arguments))


def test_a_name_with_one_address_stays_a_name(looked_up):
    states = {"triton": answer("10.0.0.1")}, {"triton": answer("10.0.0.9")}, {}
    assert looked_up(["triton:8001"], *states) == [{"triton:8001"}] * 3


def test_several_addresses_are_several_servers(looked_up):
    both = {"triton": answer("10.0.0.1", "10.0.0.2"), "other": answer("10.1.0.1")}
    more = {**both, "triton": answer("10.0.0.2", "10.0.0.3", "10.0.0.4")}
    one = {**both, "triton": answer("10.0.0.4")}
    assert looked_up(["triton:8001", "other:9001"], both, more, one) == [
        {"10.0.0.1:8001", "10.0.0.2:8001", "other:9001"},
        {"10.0.0.2:8001", "10.0.0.3:8001", "10.0.0.4:8001", "other:9001"},
        {"triton:8001", "other:9001"},
    ]


def test_a_name_that_cannot_be_looked_up_keeps_its_servers(looked_up):
    both = {"triton": answer("10.0.0.1", "10.0.0.2")}
    assert looked_up(["triton:8001"], {}, both, {}) == [
        {"triton:8001"},
        {"10.0.0.1:8001", "10.0.0.2:8001"},
        {"10.0.0.1:8001", "10.0.0.2:8001"},
    ]


def test_addresses_of_both_kinds_are_not_counted_twice(looked_up):
    assert looked_up(["triton:8001"], {"triton": answer("::1", "127.0.0.1")}) == [{"triton:8001"}]
    six = {"triton": answer("fd00::1", "fd00::2")}
    assert looked_up(["triton:8001"], six) == [{"[fd00::1]:8001", "[fd00::2]:8001"}]


def test_a_server_that_stays_keeps_what_is_known_of_it(monkeypatch):
    async def run() -> None:
        loop = asyncio.get_running_loop()
        hosts = [["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.3"]]

        async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
            return answer(*hosts.pop(0))

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        servers = Servers(["triton:8001"])
        await servers.look_up()
        first = next(one for one in servers.in_turn() if one.url == "10.0.0.1:8001")
        first.rest("it is full")
        await servers.look_up()
        assert first in servers.in_turn() and servers.in_turn()[-1] is first
        await servers.close()

    asyncio.run(run())


def test_a_server_that_has_lost_its_name_may_end_its_answers(monkeypatch):
    monkeypatch.setattr("pagetide.gateway.servers._GRACE_S", 0.01)

    async def run() -> None:
        server, closed = Server("10.0.0.1:8001"), []

        async def close(grace: float | None = None) -> None:
            closed.append(server.num_open)

        monkeypatch.setattr(server.channel, "close", close)
        server.num_open = 1
        leaving = asyncio.ensure_future(leave(server))
        await asyncio.sleep(0.1)
        assert not leaving.done() and not closed
        server.num_open = 0
        await asyncio.wait_for(leaving, 10)
        assert closed == [0]

    asyncio.run(run())
