"""Models loaded and unloaded on the real server, with requests in flight; two models side by side; who may
manage them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as grpc
from client import CACHE, Streams, generate, stream_one, wait_for, wait_until_idle
from gateway import Gateway
from parrot import pieces_of, write_parrot
from test_faults import ask_health
from triton_server import REPOSITORY, ROOT, ModelControl, TritonServer, free_address
from tritonclient.utils import InferenceServerException

TOKEN = "a-token"
LONG = {"text_input": "Once upon a time", "ignore_eos": True, "stream": True}


def add_model(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "add_model.py"),
        "--repository",
        str(repository),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TritonServer]:
    """The embedded model, and beside it a parrot."""
    repository, parrot = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("parrot")
    for model in REPOSITORY.iterdir():
        if model.is_dir():
            (repository / model.name).symlink_to(model)
    write_parrot(parrot, pieces_of("Polly wants a cracker. ", 2), ends=False)
    done = add_model(repository, "polly", "--model", str(parrot), "--num-blocks", "300", "--cache-dir", CACHE)
    assert done.returncode == 0, done.stderr
    settings = {"dtype": "float32", "num_blocks": 600, "cache_dir": CACHE, "check_integrity": True}
    settings["log_requests"] = True
    server = TritonServer(free_address(), settings, repository, ModelControl(TOKEN))
    server.start()
    server.wait_until_ready()
    yield server
    wait_until_idle(server)
    processes = server.processes()
    assert server.stop()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def manage(server: TritonServer, model: str, action: str, token: str = TOKEN) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://{server.address.http}/v2/repository/models/{model}/{action}",
        data=b"{}",
        headers={"admin-token": token},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def engines(server: TritonServer) -> set[int]:
    found = set()
    for process in server.processes():
        if process.status() != psutil.STATUS_ZOMBIE and "pagetide.engine" in process.cmdline():
            found.add(process.pid)
    return found


def test_two_models_answer_side_by_side(server):
    assert len(engines(server)) == 2
    streams = Streams(server)
    sent = {
        name: [
            streams.send(
                name, f"{name}{i}", text_input="The capital of France is", temperature=0.0, max_tokens=9
            )
            for i in range(8)
        ]
        for name in ("ensemble", "polly")
    }
    assert all(one.done.wait(60) for its in sent.values() for one in its) and not streams.errors
    streams.close()
    assert all("Paris" in one.text for one in sent["ensemble"])
    assert not any("Paris" in one.text for one in sent["polly"])
    assert len({one.text for one in sent["polly"]}) == 1
    status, answer = generate(server, {"text_input": "Hi", "max_tokens": 3}, model="polly_unary")
    assert status == 200 and answer["text_output"]
    assert ask_health(server) == ask_health(server, "--model", "polly") == (0, "the engine answers")
    assert ask_health(server, "--model", "parrot")[0] == 1


def test_settings_of_an_added_model_that_are_missing_are_said(server):
    (file,) = (server.folder / "models").glob("pagetide-*.json")
    target = file.resolve()
    file.unlink()
    assert manage(server, "polly_llm", "unload") == (200, "")
    wait_for(lambda: len(engines(server)) == 1, 30, "the end of its engine")
    status, said = manage(server, "polly_llm", "load")
    assert status == 400 and "pagetide-polly.json is missing" in said
    file.symlink_to(target)
    assert manage(server, "polly_llm", "load") == (200, "")
    assert stream_one(server, "polly", text_input="Hi", max_tokens=4).reason == "length"


def num_running(server: TritonServer, model: str) -> float:
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        found = re.search(
            rf'^pagetide_requests_running{{model="{model}".*}} (\S+)$', answer.read().decode(), re.M
        )
    return float(found[1]) if found else 0.0


def test_each_has_its_own_metrics(server):
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    total = {line for line in lines if line.startswith("pagetide_kv_blocks_total{")}
    assert {line.partition("} ")[2].split()[0] for line in total} == {"600", "300"}
    assert any('model="polly_llm"' in line for line in total)


def test_the_live_view_shows_both(server):
    streams = Streams(server)
    sent = [streams.send("ensemble", f"t{i}", max_tokens=200, **LONG) for i in range(4)]
    wait_for(lambda: all(one.responses for one in sent), 60, "first responses")
    time.sleep(1.5)  # metrics are a second old
    port = str(server.address.metrics_port)
    command = [sys.executable, str(ROOT / "scripts" / "top.py"), "--once", "--metrics-port", port]
    done = subprocess.run([*command, "--interval", "1.2"], capture_output=True, text=True, timeout=60)
    assert all(one.done.wait(60) for one in sent)
    streams.close()
    first, second = sorted(done.stdout.splitlines())
    assert first.startswith("model llm  running 4  waiting 0  KV used ")
    assert "tokens/s 0 " not in first and "per token" in first
    assert second.startswith("model polly_llm  running 0 ") and "tokens/s 0 " in second


def test_a_view_of_nothing_says_so():
    port = str(free_address().metrics_port)
    command = [sys.executable, str(ROOT / "scripts" / "top.py"), "--metrics-port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"127.0.0.1:{port} does not answer" in done.stderr


def test_the_log_has_a_line_for_each_request(server):
    streams = Streams(server)
    assert streams.send("ensemble", "told", text_input="A secret word", max_tokens=4).done.wait(60)
    streams.close()
    pattern = r'pagetide\.requests: (\{"request_id": "told".*\})'
    wait_for(lambda: re.search(pattern, server.log.read_text()) is not None, 10, "the line")
    facts = json.loads(re.search(pattern, server.log.read_text())[1])
    assert facts["answer_tokens"] == 4 and facts["finish_reasons"] == ["length"] and facts["total_s"] > 0
    assert "secret word" not in server.log.read_text()


def test_the_gateway_serves_both(server):
    gateway = Gateway(server, admin_token=TOKEN)
    try:
        client = gateway.client()
        assert {"ensemble", "polly"} <= {model.id for model in client.models.list()}
        texts, tokens = {}, {}
        for name in ("ensemble", "polly"):
            answer = client.completions.create(
                model=name, prompt="The capital of France is", max_tokens=9, temperature=0
            )
            texts[name] = answer.choices[0].text
            status, body = gateway.ask("/tokenize", {"prompt": "Polly wants", "model": name})
            assert status == 200
            tokens[name] = json.loads(body)["tokens"]
        assert tokens["ensemble"] != tokens["polly"]  # which knows no more than its own words
        status, body = gateway.ask("/detokenize", {"tokens": tokens["ensemble"], "model": "ensemble"})
        assert (status, json.loads(body)["prompt"]) == (200, "Polly wants")
        assert "Paris" in texts["ensemble"] and "Paris" not in texts["polly"]
        chat = client.chat.completions.create(
            model="ensemble", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat)
        status, body = gateway.ask("/v1/completions", {"prompt": "x", "model": "parrot"})
        assert status == 404 and "polly" in body["error"]["message"]
        status, body = gateway.ask("/tokenize", {"prompt": "x"})
        assert status == 400 and body["error"]["message"].startswith("model must be named; there are ")
        assert manage(server, "polly_llm", "unload") == (200, "")
        wait_for(lambda: len(engines(server)) == 1, 30, "the end of its engine")
        status, body = gateway.ask("/v1/completions", {"prompt": "x", "model": "polly"})
        assert status in (404, 503), body  # unknown once the list of models has been asked for again
        assert manage(server, "polly_llm", "load") == (200, "")
        wait_for(
            lambda: gateway.ask("/v1/completions", {"prompt": "x", "model": "polly"})[0] == 200, 60, "polly"
        )
    finally:
        gateway.stop()


def test_unloading_lets_requests_end_and_loading_brings_all_back(server):
    for _ in range(2):
        streams = Streams(server)
        sent = [streams.send("ensemble", f"u{i}", max_tokens=120, **LONG) for i in range(8)]
        wait_for(lambda sent=sent: all(one.responses for one in sent), 60, "first responses")
        own = engines(server)
        assert manage(server, "llm", "unload") == (200, "")
        # At once, while the old engine still has requests.
        status, said = manage(server, "llm", "load")
        assert status == 200, said
        assert all(one.done.wait(60) for one in sent) and not streams.errors
        assert all(len(one.ids()) == 120 for one in sent)
        streams.close()
        wait_for(lambda: generate(server, {"text_input": "Hi", "max_tokens": 3})[0] == 200, 60, "answers")
        wait_for(lambda own=own: len(engines(server)) == 2 and engines(server) != own, 20, "one engine each")
    assert stream_one(server, "polly", text_input="Hi", max_tokens=4).reason == "length"


def test_an_unloaded_model_is_gone_and_the_other_stays(server):
    with ThreadPoolExecutor() as pool:
        whole = {"text_input": "Hi", "max_tokens": 4000, "ignore_eos": True}
        running = pool.submit(generate, server, whole, "polly_unary")
        wait_for(lambda: num_running(server, "polly_llm") == 1, 30, "a request under way")
        assert manage(server, "polly_llm", "unload") == (200, "")
        status, answer = running.result(60)
        assert status >= 400 and answer["error"], "no engine will ever take it again"
    wait_for(lambda: len(engines(server)) == 1, 30, "the end of its engine")
    status, answer = generate(server, {"text_input": "Hi", "max_tokens": 3}, model="polly")
    assert status in (400, 404) and "polly" in answer["error"]
    status, answer = generate(server, {"text_input": "Hi", "max_tokens": 3}, model="polly_unary")
    assert status >= 400
    assert generate(server, {"text_input": "Hi", "max_tokens": 3})[0] == 200
    assert manage(server, "polly_llm", "load") == (200, "")
    wait_for(
        lambda: generate(server, {"text_input": "Hi", "max_tokens": 3}, model="polly")[0] == 200, 60, "polly"
    )
    assert len(engines(server)) == 2


def test_only_who_has_the_token_manages(server):
    status, said = manage(server, "llm", "unload", token="wrong")
    assert status == 403, said
    client = grpc.InferenceServerClient(server.address.grpc)
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model("llm")
    client.load_model("llm", headers={"triton-grpc-protocol-admin-token": TOKEN})
    client.close()
    assert generate(server, {"text_input": "Hi", "max_tokens": 3})[0] == 200


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["llm_", "--model", "x"], "letters, digits"),
        (["preprocessing"], "has preprocessing already"),
        (["one", "--block-size", "0"], "block_size"),
        (["none", "--remove"], "no added model none"),
    ],
)
def test_what_cannot_be_added_is_said(options, says, tmp_path):
    shutil.copytree(REPOSITORY / "preprocessing", tmp_path / "preprocessing", symlinks=True)
    done = add_model(tmp_path, *options)
    assert done.returncode == 2 and says in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["preprocessing"]


def test_what_was_added_can_be_removed(tmp_path):
    assert add_model(tmp_path, "two.b", "--max-num-seqs", "3").returncode == 0
    assert json.loads((tmp_path / "pagetide-two.b.json").read_text())["max_num_seqs"] == 3
    assert add_model(tmp_path, "two.b", "--remove").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_control_from_elsewhere_needs_a_token():
    ports = [str(port) for port in free_address().ports]
    command = [str(ROOT / "scripts" / "serve.sh"), "--host", "0.0.0.0", "--model-control", "--no-gateway"]
    options = ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "set ADMIN_TOKEN" in done.stdout + done.stderr
