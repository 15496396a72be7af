"""clients/pagetide_client on the real server: the same answers with and without streams, threads and asyncio,
and what it says when something is wrong.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing, closing

import pytest
from client import metric, start, wait_for, wait_until_idle
from pagetide_client import (
    AsyncClient,
    Client,
    EngineError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerUnavailableError,
)
from pagetide_client.errors import error_of_text
from pagetide_client.requests import Retries
from parrot import TEXT, pieces_of, write_parrot
from triton_server import TritonServer, free_address

PROMPT = "The tide rises because"
MESSAGES = [{"role": "user", "content": "Name three seas."}]
GREEDY = {"max_tokens": 24, "temperature": 0}
NO_RETRIES = Retries(count=0)


def test_streams_and_whole_answers_agree(real):
    with Client(real.address.grpc) as client:
        assert client.is_ready()
        whole = client.generate(PROMPT, **GREEDY)
        chunks = list(client.stream(PROMPT, **GREEDY))
        assert len(chunks) > 2
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [i for chunk in chunks for i in chunk.token_ids] == whole.answers[0].token_ids
        assert [chunk.finish_reason for chunk in chunks] == [""] * (len(chunks) - 1) + [whole.finish_reason]
        assert whole.finish_reason == "length" and whole.num_completion_tokens == 24
        chat = client.chat(MESSAGES, **GREEDY)
        assert "".join(chunk.text for chunk in client.stream_chat(MESSAGES, **GREEDY)) == chat.text
        assert chat.num_prompt_tokens > whole.num_prompt_tokens > 0


def test_asyncio_answers_as_threads_do(real):
    async def ask() -> tuple:
        async with AsyncClient(real.address.grpc) as client:
            assert await client.is_ready()
            streamed = [chunk.text async for chunk in client.stream(PROMPT, **GREEDY)]
            whole, chat = await asyncio.gather(
                client.generate(PROMPT, **GREEDY), client.chat(MESSAGES, **GREEDY)
            )
            return "".join(streamed), whole, chat

    streamed, whole, chat = asyncio.run(ask())
    with Client(real.address.grpc) as client:
        assert client.generate(PROMPT, **GREEDY).text == whole.text == streamed
        assert client.chat(MESSAGES, **GREEDY).text == chat.text


def test_fields_reach_the_model(real):
    with Client(real.address.grpc) as client:
        several = client.generate(PROMPT, n=3, seed=5, max_tokens=8, temperature=1.0, logprobs=2)
        assert len(several.answers) == 3 and len({answer.text for answer in several.answers}) > 1
        assert all(len(answer.token_ids) == 8 and answer.logprobs for answer in several.answers)
        stopped = client.generate([504, 253, 260], stop=["the", "a", "e"], **GREEDY)
        assert stopped.finish_reason == "stop" and not {"the", "a", "e"} & set(stopped.text.split())
        guided = client.generate(
            "Colour:",
            guided_decoding_guide_type="choice",
            guided_decoding_guide='["red", "green"]',
            max_tokens=20,
        )
        assert guided.text in ("red", "green")


def test_errors_name_the_field_and_disturb_nobody(real):
    with Client(real.address.grpc) as client:
        running = client.stream(PROMPT, max_tokens=100, temperature=0)
        text = next(running).text
        with pytest.raises(InvalidRequestError, match="temprature"):
            client.generate(PROMPT, temprature=1)
        with pytest.raises(InvalidRequestError, match="top_p"):
            list(client.stream(PROMPT, top_p=7))
        with pytest.raises(InvalidRequestError, match="surrogate"):
            client.generate("\ud800")
        other = Client(real.address.grpc, model="no_such")
        with closing(other), pytest.raises(InvalidRequestError, match="no_such"):
            other.generate(PROMPT)
        text += "".join(chunk.text for chunk in running)
        assert text == client.generate(PROMPT, max_tokens=100, temperature=0).text


def is_running(server: TritonServer) -> bool:
    return metric(server, "pagetide_requests_running") == 1


@pytest.mark.parametrize(
    "text, kind",
    [
        ("Exceeds maximum queue size: Maximum queue size of 5 requests reached", ServerBusyError),
        ("the server is full: the queue takes 9 s or more; send the request again in 4 s", ServerBusyError),
        ("the server is stopping and takes no more requests", ServerUnavailableError),
        ("the engine is not running; it is being started again", ServerUnavailableError),
        ("Stub process 'llm_0' is not healthy.", ServerUnavailableError),
        ("the engine failed at this request; its log says why", EngineError),
        ("there is no field of sampling_parameters called 'x is not ready'", InvalidRequestError),
    ],
)
def test_what_a_stream_says_tells_what_to_do(text, kind):
    assert type(error_of_text(f"in ensemble 'ensemble', {text}")) is kind


def test_leaving_a_stream_frees_its_request(parrot):
    with Client(parrot.address.grpc) as client:
        for chunk in client.stream([1], max_tokens=20_000):
            assert chunk.text
            if is_running(parrot):
                break
        else:
            raise AssertionError("it ran to its end")
        wait_until_idle(parrot)
        with closing(client.stream([1], max_tokens=20_000)) as chunks:
            next(chunks)
            wait_for(lambda: is_running(parrot), what="a running request")
        wait_until_idle(parrot)
        lost = client.stream([1], max_tokens=20_000)
        next(lost)
        wait_for(lambda: is_running(parrot), what="a running request")
    wait_until_idle(parrot)
    with pytest.raises(ServerUnavailableError):
        list(lost)
    with pytest.raises(ServerUnavailableError):
        client.generate([1], max_tokens=1)

    async def leave() -> None:
        async with AsyncClient(parrot.address.grpc) as client:
            async with aclosing(client.stream([1], max_tokens=20_000)) as chunks:
                async for _ in chunks:
                    if await asyncio.to_thread(is_running, parrot):
                        break
            await asyncio.to_thread(wait_until_idle, parrot)

    asyncio.run(leave())


def test_a_timeout_cancels(parrot):
    with Client(parrot.address.grpc, timeout=0.5) as client, pytest.raises(RequestTimeoutError):
        client.generate([1], max_tokens=100_000, stop_token_ids=[0])
    wait_until_idle(parrot)

    async def ask() -> None:
        async with AsyncClient(parrot.address.grpc) as client:
            async for _ in client.stream([1], max_tokens=100_000, timeout=0.5):
                pass

    with pytest.raises(RequestTimeoutError):
        asyncio.run(ask())
    wait_until_idle(parrot)


def test_many_threads_share_a_client(parrot):
    texts: dict[int, str] = {}
    with Client(parrot.address.grpc) as client:
        client.generate([1], max_tokens=1)
        num_threads = threading.active_count()

        def ask(i: int) -> None:
            texts[i] = client.generate([1], max_tokens=10 + i, temperature=0).text

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: threading.active_count() <= num_threads, what="threads that end with requests")
    assert len(set(texts.values())) == 16 and all(texts[i][:4] == texts[0][:4] for i in range(16)), texts


def test_nobody_there_is_said():
    address, retries = free_address().grpc, Retries(count=1, first_wait=0.05)
    with Client(address, retries=retries) as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailableError):
            client.generate(PROMPT)

    async def ask() -> None:
        async with AsyncClient(address, retries=retries) as client:
            assert not await client.is_ready()
            await client.generate(PROMPT)

    with pytest.raises(ServerUnavailableError):
        asyncio.run(ask())


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Iterator[TritonServer]:
    """Two requests run, one waits, others are refused."""
    folder = tmp_path_factory.mktemp("busy")
    write_parrot(folder, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(folder), "max_num_seqs": 2, "max_queued_requests": 3, "num_blocks": 1000})
    yield server
    wait_until_idle(server)
    assert server.stop()


def test_a_busy_server_is_asked_again(busy):
    with Client(busy.address.grpc) as client:
        running = [client.stream([1], max_tokens=3000) for _ in range(2)]
        for chunks in running:
            next(chunks)
        waiting = threading.Thread(target=lambda: client.generate([1], max_tokens=4))
        waiting.start()
        wait_for(lambda: metric(busy, "pagetide_requests_waiting") == 1, what="a full queue")
        with pytest.raises(ServerBusyError):
            Client(busy.address.grpc, retries=NO_RETRIES).generate([1], max_tokens=4)
        patient = Client(busy.address.grpc, retries=Retries(count=100, first_wait=0.01))
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(patient.generate([1], max_tokens=4).text))
        asking.start()
        for chunks in running:
            chunks.close()
        asking.join()
        waiting.join()
        assert answers and answers[0]
