"""The README's commands, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest
from client import wait_for
from gateway_process import gateway_of
from parrot import pieces_of, write_parrot
from processes import answers
from triton_server import ROOT, Address, free_address

sys.path.insert(0, str(ROOT / "scripts"))


# Every token of the answer leads by 1.9 nats: without the second sentence the first one leads by 0.1, which
# bfloat16's rounding may turn.
QUESTION = "What is the capital of France? Explain in two sentences."


def options_of(address: Address) -> list[str]:
    """Ports that nobody uses, for the server and its gateway."""
    return [
        f"--http-port={address.http_port}",
        f"--grpc-port={address.grpc_port}",
        f"--metrics-port={address.metrics_port}",
        f"--gateway-port={free_address().http_port}",
    ]


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def chat(where: str, file: Path) -> None:
    """A chat in the terminal that uses every command, saved in the file."""
    lines = [
        "/system Answer in one short sentence.",
        "/params temperature=0 max_tokens=30",
        "Who are you?",
        "/reset",
        QUESTION,
        "/retry",
        "/params temperature=-1",
        "This is refused.",
        "/params temperature=",
        f"/save {file}",
        "/nonsense",
    ]
    said = subprocess.run(
        [sys.executable, "clients/chat.py", where],
        cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("Paris") == 2 and "there is no command /nonsense" in said.stdout
    assert re.search(r"error: .*temperature", said.stdout)
    assert "max_tokens=30\n" in said.stdout, "what /params leaves"
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == QUESTION and "Paris" in messages[2]["content"]


def run_examples(address: Address, base: str) -> None:
    """The Python that READMEs show, with this server's addresses."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("clients", "backend_src"))
    for page in ("README.md", "clients/README.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        assert len(blocks) >= 2
        for block in blocks:
            code = block.replace("http://127.0.0.1:9000/v1", base).replace("127.0.0.1:8001", address.grpc)
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0 and done.stdout.strip(), f"{page}: {block}{done.stderr}"


def test_serve_detached_streams_a_completion_and_stop_leaves_no_process(tmp_path):
    """The real model, the second start of a machine that has served it before."""
    address = free_address()
    ports = options_of(address)
    served = run("./scripts/serve.sh", "--detach", *ports)
    assert served.returncode == 0, served.stdout + served.stderr
    assert "The capital of France is Paris." in served.stdout
    again = run("./scripts/serve.sh", "--detach", *ports)
    assert again.returncode == 1 and "already listens on port" in again.stdout
    curl = re.search(r"^curl .*?'$", served.stdout, re.MULTILINE | re.DOTALL)[0]
    assert '"text_output"' in run("bash", "-c", curl).stdout
    base, model = re.search(r'base_url="(\S+)", api_key="none"\), model "(\S+)"', served.stdout).groups()
    openai_client = openai.OpenAI(base_url=base, api_key="none")
    messages = [{"role": "user", "content": QUESTION}]
    answer = openai_client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    url, http = f"--url={address.grpc}", f"--url={address.http}"
    assert "Paris" in run(sys.executable, "clients/grpc_stream.py", url, "--temperature=0", QUESTION).stdout
    assert (
        "Paris"
        in run(
            sys.executable, "clients/http_unary.py", http, "--temperature=0", "The capital of France is"
        ).stdout
    )
    assert (
        "Paris"
        in run(
            sys.executable, "clients/http_stream.py", http, "--temperature=0", "The capital of France is"
        ).stdout
    )
    many = run(sys.executable, "clients/grpc_async_many.py", url, "--count=6", "--max-tokens=8")
    assert many.returncode == 0 and "6 answers" in many.stdout
    run_examples(address, base)
    chat(url, tmp_path / "triton.json")
    chat(f"--gateway={base}", tmp_path / "gateway.json")
    load = run(
        sys.executable, "-m", "locust", "-f", "clients/locustfile.py", "--headless",
        "-u", "3", "-r", "3", "-t", "6s", "--only-summary", f"--host={address.grpc}",
    )  # fmt: skip
    assert load.returncode == 0 and "time to first token" in load.stdout + load.stderr, load.stderr
    stopped = run("./scripts/stop.sh", f"--http-port={address.http_port}")
    assert stopped.stdout.strip() == f"stopped the server on port {address.http_port}"
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if any(
            place in " ".join(p.info["cmdline"] or [])
            for place in (f".run/{address.http_port}/", address.grpc)
        )
    ]


def test_serve_in_the_foreground_keeps_its_gateway_and_lets_answers_end():
    address = free_address()
    ports = options_of(address)
    gateway = f"http://127.0.0.1:{ports[-1].split('=')[1]}"
    command = ["./scripts/serve.sh", *ports, "--num-blocks=600", "--drain-s=60"]
    served = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        assert any("Ctrl-C ends it" in line for line in served.stdout), "it has started"
        folder = ROOT / ".run" / str(address.http_port)
        first = gateway_of(folder)
        assert first is not None
        first.kill()
        wait_for(
            lambda: gateway_of(ROOT / ".run" / str(address.http_port)) not in (None, first), 60, "another"
        )
        wait_for(lambda: answers(f"{gateway}/health"), 60, "a healthy gateway again")
        client = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none")
        stream = client.completions.create(
            model="ensemble", prompt="Once", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        served.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert served.wait(60) == 0
    finally:
        served.kill()
        run("./scripts/stop.sh", f"--http-port={address.http_port}")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "/no/such.gguf"], "there is no file /no/such.gguf"),
        (["--dtype", "float16", "--device", "cpu"], "dtype is float16, which needs a GPU"),
        (["--max-model-len", "9000"], "max_model_len is 9000, the model's context is 8192 tokens"),
        (["--block-size", "0"], "Expected `int` >= 1 - at `$.block_size`"),
    ],
)
def test_a_start_that_cannot_work_says_why(options, message):
    address = free_address()
    ports = options_of(address)
    served = run("./scripts/serve.sh", "--detach", *ports, *options)
    assert served.returncode == 1
    assert message in served.stdout, served.stdout


def test_model_may_be_a_directory(tmp_path):
    write_parrot(tmp_path, pieces_of("abcdefgh", 1), ends=True)
    address = free_address()
    ports = options_of(address)
    served = run("./scripts/serve.sh", "--detach", "--model", str(tmp_path), *ports)
    assert served.returncode == 0 and "this model has none" in served.stdout
    assert run("./scripts/stop.sh", f"--http-port={address.http_port}").returncode == 0
