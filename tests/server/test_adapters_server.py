"""LoRA adapters through the real server and the gateway, against PEFT token by token."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from client import CACHE, Streams, generate, wait_until_idle
from gateway import Gateway
from models import expected_of, write_adapters
from pagetide.models.source import find_model
from transformers import AutoModelForCausalLM
from triton_server import ROOT

NUM_TOKENS = 12
# More than have a place beside the model at the same time.
CONFIGS = {
    "sailor": {"r": 8, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "poet": {"r": 16, "lora_alpha": 2, "target_modules": "all-linear"},
    "18446744073709551615": {"r": 2, "lora_alpha": 1, "target_modules": ["o_proj", "gate_proj"]},
}
CHOSEN: list[dict[str, Any]] = [
    {},
    {"lora_name": "sailor"},
    {"lora_name": "poet"},
    {"lora_task_id": 2**64 - 1},
]


@pytest.fixture(scope="module")
def peft(adapters) -> Iterator[Any]:
    """PEFT's model, whose adapters are in the server's folder from now on."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(str(find_model("", Path(CACHE))), dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    yield write_adapters(adapters, model.eval(), CONFIGS)
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("stream", [True, False])
def test_requests_with_and_without_adapters_equal_peft(real, peft, stream):
    """At the same time; each prompt comes with every adapter, and must find no other's cached blocks."""
    chooser = random.Random(0)
    asked = [
        (prompt, chosen)
        for prompt in ([5, 6, 7], chooser.choices(range(100, 40_000), k=90))
        for chosen in (*CHOSEN, *CHOSEN[1:])
    ]
    streams = Streams(real)
    sent = [
        streams.send(
            "ensemble",
            f"p{i}",
            input_ids=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0.0,
            stream=stream,
            **chosen,
        )
        for i, (prompt, chosen) in enumerate(asked)
    ]
    for one in sent:
        assert one.done.wait(120) and not streams.errors
    streams.close()
    wait_until_idle(real)
    answers = [tuple(one.ids()) for one in sent]
    for (prompt, chosen), answer in zip(asked, answers, strict=True):
        adapter = "".join(map(str, chosen.values()))
        assert list(answer) == expected_of(peft, adapter, prompt, NUM_TOKENS), chosen
    assert len(set(answers[:4])) == 4, "adapters that change nothing prove nothing"


def test_what_is_no_adapter_is_refused_and_nobody_else_notices(real, peft, adapters):
    broken = {
        "empty": {},
        "no-weights": {"adapter_config.json": b'{"peft_type": "LORA"}'},
        "no-json": {"adapter_config.json": b"{", "adapter_model.safetensors": b""},
        "list": {"adapter_config.json": b"[]", "adapter_model.safetensors": b""},
        "junk": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"\xff" * 50},
    }
    for name, files in broken.items():
        (adapters / name).mkdir()
        for file, content in files.items():
            (adapters / name / file).write_bytes(content)
    body = {"text_input": "The sea", "max_tokens": 3, "temperature": 0.0}
    for name in (*broken, "nobody", "..", "/etc", "sailor/../sailor"):
        status, answer = generate(real, {**body, "lora_name": name}, model="ensemble_unary")
        assert status == 400 and repr(name) in answer["error"], (name, answer)
    assert generate(real, {**body, "lora_name": "sailor"}, model="ensemble_unary")[0] == 200


def complete_as_the_readme_says(gateway: Gateway) -> Any:
    """Its command, asked of this gateway for an adapter that is there."""
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"curl -s http://127\.0\.0\.1:9000(/v1/completions .*\n.*)\n", text)
    path, *options = shlex.split(command.replace("\\\n", ""))
    given = dict(zip(options[::2], options[1::2], strict=True))
    header, body = given["-H"].split(": "), given["-d"].replace("example", "sailor").encode()
    status, answer = gateway.ask(path, body, {header[0]: header[1]})
    assert status == 200, answer
    return json.loads(answer)


def test_adapters_are_models_of_the_gateway(real, peft, adapters):
    gateway = Gateway(real, "--lora-dir", str(adapters))
    client, prompt = gateway.client(), [5, 6, 7]
    try:
        listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
        assert {"ensemble": None, "sailor": "ensemble", "poet": "ensemble"}.items() <= listed.items()
        assert client.models.retrieve("sailor").id == "sailor"
        for name in ("sailor", "ensemble:sailor"):
            answer = client.completions.create(
                model=name, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0
            )
            assert answer.model == name
        plain = client.completions.create(
            model="ensemble", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0
        )
        named = client.completions.create(
            model="ensemble",
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0,
            extra_body={"lora_name": "sailor"},
        )
        assert answer.choices[0].text == named.choices[0].text != plain.choices[0].text
        with pytest.raises(
            openai.NotFoundError, match=r"there is no model 'nobody'; there are ensemble, .*sailor"
        ):
            client.completions.create(model="nobody", prompt=prompt)
        with pytest.raises(openai.BadRequestError, match="there is no adapter 'nobody'"):
            client.completions.create(model="ensemble:nobody", prompt=prompt)
        with pytest.raises(openai.BadRequestError, match="the adapter 'sailor', and the request 'poet'"):
            client.completions.create(model="sailor", prompt=prompt, extra_body={"lora_name": "poet"})
        assert complete_as_the_readme_says(gateway)["model"] == "sailor"
        chunks = client.chat.completions.create(
            model="poet", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
        )
        assert {chunk.model for chunk in chunks} == {"poet"}
    finally:
        gateway.stop()
