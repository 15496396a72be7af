"""Settings that change what requests mean, on one server with room for a single sequence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import CACHE, Streams, generate, stream_one, wait_for, wait_until_idle
from parrot import TEXT, pieces_of, write_parrot
from test_contract_fields import scrape
from triton_server import REPOSITORY, TritonServer, free_address


class ServerWithCopies(TritonServer):
    """Two faces stand in the repository under other names too."""

    def _make_repository(self) -> None:
        super()._make_repository()
        for face, copy in (("ensemble", "my_model"), ("vllm_model", "my_vllm")):
            shutil.copytree(REPOSITORY / face, self.folder / "models" / copy)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("narrow")
    write_parrot(folder, pieces_of(TEXT, 2), ends=False)
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% for message in messages %}<start>{{ "
        "message.content }}{% endfor %}"
        "{{ ending }}{% if add_generation_prompt %}<start>{% endif %}"
    )
    settings = {
        "max_num_seqs": 1,
        "num_blocks": 4000,
        "chat_template": template,
        "default_sampling": "trtllm",
        "metric_names": "trtllm",
    }
    server = ServerWithCopies(
        free_address(), {"model": str(folder), "cache_dir": CACHE, "check_integrity": True, **settings}
    )
    server.start()
    server.wait_until_ready()
    yield server
    wait_until_idle(server)
    assert server.stop()


def test_a_chat_template_of_the_settings_goes_before_the_models(narrow):
    messages = json.dumps([{"role": "user", "content": "波引"}])
    status, answer = generate(
        narrow, {"messages": messages, "max_tokens": 2, "exclude_input_in_output": False}
    )
    assert status == 200 and answer["text_output"].startswith("<start>波引")


@pytest.mark.parametrize(
    "values, rendered",
    [
        ({}, "<start>波引<start>"),
        ({"tools": '[{"name": "西"}]'}, "西<start>波引<start>"),
        ({"add_generation_prompt": False}, "<start>波引"),
        ({"chat_template_kwargs": '{"ending": "干"}'}, "<start>波引干<start>"),
    ],
)
def test_a_template_sees_tools_variables_and_whether_an_answer_begins(narrow, values, rendered):
    body = {
        "messages": json.dumps([{"role": "user", "content": "波引"}]),
        "max_tokens": 1,
        "exclude_input_in_output": False,
        **values,
    }
    status, answer = generate(narrow, body, model="ensemble_unary")
    assert (
        status == 200
        and answer["text_output"].startswith(rendered)
        and len(answer["text_output"]) <= len(rendered) + 2
    )


def test_with_tensorrt_llms_sampling_requests_are_greedy_unless_they_ask_for_more(narrow):
    greedy = [stream_one(narrow, input_ids=[1], max_tokens=30, temperature=5.0).ids() for _ in range(2)]
    assert greedy[0] == greedy[1] and greedy[0][:10] == list(range(2, 12))
    sampled = stream_one(narrow, input_ids=[1], max_tokens=30, temperature=5.0, top_p=1.0, seed=3).ids()
    assert sampled != greedy[0]


def test_a_faces_folder_may_be_copied_under_another_name(narrow):
    body = {"text_input": "<start>", "temperature": 0, "max_tokens": 3}
    status, answer = generate(narrow, body, model="my_model")
    assert status == 200 and answer["model_name"] == "my_model" and answer["output_ids"] == [2, 3, 4]
    assert (
        generate(narrow, {"text_input": "<start>", "parameters": {"stream": False}}, model="my_vllm")[0]
        == 200
    )


def test_lower_priority_numbers_run_sooner(narrow):
    streams = Streams(narrow)
    first = streams.send("ensemble", "first", input_ids=[1], max_tokens=1500, stream=True)
    wait_for(lambda: bool(first.responses), what="a first response")
    waiting = {
        priority: streams.send("ensemble", f"p{priority}", input_ids=[1], max_tokens=3, priority=priority)
        for priority in (7, 0, -3)
    }
    assert first.done.wait(60) and all(stream.done.wait(60) for stream in waiting.values())
    assert [priority for priority, _ in sorted(waiting.items(), key=lambda one: one[1].times[-1])] == [
        -3,
        0,
        7,
    ]
    streams.close()


def test_users_take_turns(narrow):
    """Two requests do not wait for eight of another user that came before."""
    streams = Streams(narrow)
    first = streams.send("ensemble", "first", input_ids=[1], max_tokens=1500, stream=True)
    wait_for(lambda: bool(first.responses), what="a first response")
    waiting = [
        (user, streams.send("ensemble", f"{user}{number}", input_ids=[1], max_tokens=3, user=user))
        for user, count in (("many", 8), ("few", 2))
        for number in range(count)
    ]
    assert first.done.wait(60) and all(stream.done.wait(60) for _, stream in waiting)
    order = [user for user, _ in sorted(waiting, key=lambda one: one[1].times[-1])]
    assert "few" not in order[-4:], order
    streams.close()


def test_prompts_with_different_salts_share_no_blocks(narrow):
    def num_cached(salt: str) -> int:
        values = {
            "input_ids": [5] * 40,
            "max_tokens": 1,
            "cache_salt": salt,
            "return_num_cached_tokens": True,
        }
        return stream_one(narrow, **values).responses[0]["num_cached_tokens"]

    assert [num_cached(salt) for salt in ("a", "a", "b", "b")] == [0, 32, 0, 32]


def test_metrics_come_under_tensorrt_llms_names_too(narrow):
    wait_until_idle(narrow)
    metrics = scrape(narrow)
    assert (
        metrics['nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max"}']
        == metrics["pagetide_kv_blocks_total"]
        == 4000
    )
    assert metrics['nv_trt_llm_request_metrics{request_type="waiting"}'] == 0


def test_torch_is_loaded_by_the_engine_only(narrow):
    """Each of the other processes would need hundreds of megabytes for it."""
    loaded = {"engine": False, "others": False}
    for process in narrow.processes():
        kind = "engine" if "pagetide.engine" in process.cmdline() else "others"
        loaded[kind] |= "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    assert loaded == {"engine": True, "others": False}
