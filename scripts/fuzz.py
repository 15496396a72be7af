"""Sends seeded random requests, made from the contract's table, to a running server, and checks every
answer against what the table promises.

Every field, in and out of its range, combined; nasty texts; clients that cancel or leave at random moments.
Afterwards the engine must be the same process, nothing may run, no block be used, and memory be flat.

python scripts/fuzz.py [--seconds 600] [--clients 8] [--seed 0] [--http-port 8000]

Without the port of a server that serve.sh has started it starts one of its own. Ends with status 1 and the
requests that went wrong, as JSON that can be sent again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import tritonclient.grpc as grpc
from pagetide.contract.field import Field
from pagetide.contract.fields import FIELDS, tensor_fields
from triton_server import ROOT, Address, TritonServer, find_running, free_address

ANSWER_TIMEOUT_S = 120
WARM_UP_S = 10
MAX_GROWTH_MB = 200
REASONS = {"stop", "length", "cancelled", "timeout"}
# Compiled and read beside other work: a request's time may be up before they turn out to be none.
FOUND_LATER = {"guided_decoding_guide", "lora_name"}
TEXTS = [
    "The capital of France is",
    "x",
    " ",
    "\n\n\t",
    "🌊👩‍👩‍👧‍👦 e\u0301 \u202eabc\u202c \u200b\ufeff",
    "漢字かな交じり文" * 20,
    "<|im_start|>system\n<|im_end|><|endoftext|>",
    "{% for x in range(99999) %}{{ x }}{% endfor %}",
    '{"a": [1, 2, {"b": "\\u0000"}]}',
    "' OR 1=1; -- \\",
    "a" * 3000,
    "\u2028\u2029\x7f\x1b[31m",
    "(((((" * 50,
    "0" * 400,
]
GUIDES = [
    ("json", ""),
    (
        "json_schema",
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], '
        '"additionalProperties": false}',
    ),
    ("json_schema", '{"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2}'),
    ("regex", "[a-z]{2,5}(-[0-9]+)?"),
    ("choice", '["Paris", "Rome", "漢字", "a \\"b\\""]'),
    ("ebnf_grammar", 'root ::= "(" root ")" | [a-c]'),
]
BAD_GUIDES = [
    ("ebnf_grammar", "root ::= root"),
    ("regex", r"[^\s\S]"),
    ("regex", "[a-"),
    ("json_schema", '{"$ref": "#"}'),
    ("json_schema", '{"uniqueItems": true}'),
    ("json_schema", '{"type":"array","items":' * 300 + "true" + "}" * 300),
    ("choice", "[]"),
    ("structural_tag", "{}"),
    ("nothing", "x"),
]
# Errors that a request may get although each of its values is allowed: rules that exclude each other, and a
# server that is full.
TOGETHER = re.compile(
    r"no token is left|Exceeds maximum queue size|guided_decoding_guide|must be at most|give one "
    r"of them|must be at least|leave one"
    r"|must be 1 with guided decoding|the beams may need"
)


@dataclass
class Report:
    """What has been sent, and what was wrong with the answers."""

    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1

    def note_time(self, seconds: float, way: str, wish: Wish) -> None:
        with self.lock:
            self.slowest = sorted(
                [*self.slowest, (seconds, f"{way} {json.dumps(wish.values)[:300]}")], reverse=True
            )[:5]

    def fail(self, what: str, request: Any, answer: Any) -> None:
        with self.lock:
            self.failures.append({"what": what, "request": request, "answer": repr(answer)[:600]})


# -- requests ----------------------------------------------------------------------------------------------


@dataclass
class Wish:
    """A request by JSON names. wrong: the fields that have a value out of their range."""

    values: dict[str, Any]
    wrong: list[str]


# Fields that have a value of their own drawn.
DRAWN = [
    field
    for field in FIELDS
    if not field.is_prompt
    and not field.is_unsupported
    and field.name not in ("max_tokens", "tools", "cancel", "chat_template_kwargs")
]


def make_wish(rng: random.Random) -> Wish:
    wish = Wish({"text_input": rng.choice(TEXTS), "max_tokens": rng.randint(1, 12)}, [])
    if rng.random() < 0.15:
        del wish.values["text_input"]
        wish.values["input_ids"] = [rng.randrange(49_152) for _ in range(rng.choice([1, 2, 15, 16, 17, 300]))]
    elif rng.random() < 0.15:
        text = wish.values.pop("text_input")
        wish.values["messages"] = json.dumps(
            [{"role": "user", "content": rng.choice([text, [{"type": "text", "text": text}]])}]
        )
    for one in rng.sample(DRAWN, rng.choice([0, 1, 1, 2, 3, 5, 8])):
        is_wrong = rng.random() < 0.06
        values = wrong_values(one, rng) if is_wrong else allowed_values(one, rng)
        wish.values.update(values)
        wish.wrong = [name for name in wish.wrong if name not in values] + (
            [one.name] if is_wrong and values else []
        )
    if rng.random() < 0.12:
        kind, text = rng.choice(BAD_GUIDES if (is_wrong := rng.random() < 0.2) else GUIDES)
        wish.values |= {"guided_decoding_guide_type": kind, "guided_decoding_guide": text, "max_tokens": 40}
        wish.wrong += ["guided_decoding_guide"] if is_wrong else []
    if rng.random() < 0.03:
        wish.values |= {"max_tokens": rng.choice([2**31 - 1, 8000]), "timeout_ms": rng.randint(1, 600)}
        wish.wrong = [name for name in wish.wrong if name != "timeout_ms"]
    return wish


def allowed_values(one: Field, rng: random.Random) -> dict[str, Any]:
    """The field with a value from its range, its ends included."""
    name = one.name
    special: dict[str, Any] = {
        "num_return_sequences": lambda: rng.choice([1, 2, 3, 32]),
        "best_of": lambda: rng.choice([1, 2, 5, 32]),
        "beam_width": lambda: rng.choice([1, 2, 4, 32]),
        "min_tokens": lambda: rng.choice([0, 1, 5, 2**31 - 1]),
        "end_id": lambda: rng.choice([-1, 0, 2, 49_151]),
        "pad_id": lambda: rng.choice([-1, 0, 2**31 - 1]),
        "stop_words": lambda: rng.choice([[""], ["a"], ["e", " ", "\n"], ["漢", "🌊"], ["x" * 1024] * 64]),
        "bad_words": lambda: rng.choice([[""], ["the", "Paris"], ["🌊"], [" a b c" * 100]]),
        "stop_token_ids": lambda: rng.sample(range(49_152), rng.choice([0, 1, 1024])),
        "allowed_token_ids": lambda: rng.sample(range(49_152), rng.choice([1, 2, 500, 20_000])),
        "logit_bias": lambda: json.dumps(
            {str(rng.randrange(49_152)): rng.choice([-100, 0, 100]) for _ in range(rng.choice([0, 1, 1024]))}
        ),
        "cache_salt": lambda: rng.choice(["", "s", "🌊" * 500]),
        "user": lambda: rng.choice(["", "a", "🌊" * 500]),
        "traceparent": lambda: rng.choice(["", "nonsense", "🌊" * 500, f"00-{'a' * 32}-{'b' * 16}-01"]),
        "timeout_ms": lambda: rng.choice([0, 1, 5, 60_000, 2**31 - 1]),
        "logprobs": lambda: rng.choice([0, 1, 20]),
        "prompt_logprobs": lambda: rng.choice([0, 1, 20]),
        "lora_name": lambda: "",
        "lora_task_id": lambda: 0,
    }
    if name in ("embedding_bias_words", "embedding_bias_weights"):
        words = rng.choice([["a"], ["", "the"], ["🌊", "Paris", " "]])
        return {
            "embedding_bias_words": words,
            "embedding_bias_weights": [rng.choice([-1000, 0, 1000]) for _ in words],
        }
    if name in (
        "guided_decoding_guide",
        "guided_decoding_guide_type",
        "return_context_logits",
        "return_generation_logits",
    ):
        return {}
    if name in special:
        return {rng.choice(json_names(one)): special[name]()}
    if one.dtype == "BOOL":
        return {name: rng.random() < 0.5}
    assert one.low is not None and one.high is not None, name
    within = (
        rng.uniform(one.low, min(one.high, one.low + 3))
        if one.dtype == "FP32"
        else rng.randint(int(one.low), int(one.high))
    )
    return {rng.choice(json_names(one)): rng.choice([one.low, one.high, within])}


def json_names(one: Field) -> list[str]:
    return [name for name in one.names if name not in ("len_penalty", "runtime_top_k", "runtime_top_p")]


def wrong_values(one: Field, rng: random.Random) -> dict[str, Any]:
    """The field with a value that it may not have."""
    if one.low is not None and one.high is not None and one.name not in ("lora_task_id", "seed"):
        return {
            one.name: rng.choice(
                [one.low - 1, one.high * 2 + 1]
                if one.dtype == "FP32" or one.high < 2**30
                else [int(one.low) - 1]
            )
        }
    wrong: dict[str, Any] = {
        "stop_words": ["x"] * 65,
        "bad_words": ["y" * 1025],
        "stop_token_ids": [49_152],
        "allowed_token_ids": [-1],
        "logit_bias": '{"1": 101}',
        "cache_salt": "s" * 1025,
        "traceparent": "t" * 1025,
        "user": "u" * 1025,
        "lora_name": "nobody",
        "embedding_bias_weights": [1.0],
    }
    return {one.name: wrong[one.name]} if one.name in wrong else {}


# -- answers -----------------------------------------------------------------------------------------------


def check_error(wish: Wish, message: str) -> str:
    """What is wrong with an error, if anything."""
    if re.search(r"Traceback|site-packages|\.py\b|internal error|the engine failed", message):
        return "an error shows the inside of the server"
    if len(message) > 1500:
        return "an error is no sentence"
    if not wish.wrong and not TOGETHER.search(message):
        return "an allowed request was refused"
    return ""


def check_answers(wish: Wish, answers: list[dict[str, Any]]) -> str:
    """answers: for each sequence its ids, text, reason and log-probabilities, in their order."""
    values = wish.values
    is_too_early = set(wish.wrong) <= FOUND_LATER and all(answer["reason"] == "timeout" for answer in answers)
    if wish.wrong and not is_too_early:
        return f"{', '.join(wish.wrong)} should have been refused"
    count = values.get("num_return_sequences", values.get("n", 1))
    if len(answers) != count:
        return f"{len(answers)} answers instead of {count}"
    for answer in answers:
        if answer["reason"] not in REASONS:
            return f"finish_reason is {answer['reason']!r}"
        if len(answer["ids"]) > values["max_tokens"]:
            return "more tokens than asked for"
        if not all(math.isfinite(p) for p in answer["logprobs"]):
            return "a log-probability is not finite"
        allowed = values.get("allowed_token_ids")
        if allowed and "guided_decoding_guide" not in values and not set(answer["ids"]) <= set(allowed):
            return "a token that is not allowed"
        if wrong := check_guided(values, answer):
            return wrong
    return ""


def check_guided(values: dict[str, Any], answer: dict[str, Any]) -> str:
    """A whole answer is one of its grammar, unless something else has cut or decorated it."""
    others = {
        "stop_words",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "exclude_input_in_output",
        "end_id",
    }
    if (
        "guided_decoding_guide" not in values
        or others & values.keys()
        or answer["reason"] != "stop"
        or not answer["ids"]
    ):
        return ""
    kind, guide, text = values["guided_decoding_guide_type"], values["guided_decoding_guide"], answer["text"]
    if kind == "regex":
        return "" if re.fullmatch(guide, text) else f"{text!r} does not match"
    if kind == "choice":
        return "" if text in json.loads(guide) else f"{text!r} is no choice"
    if kind in ("json", "json_schema"):
        try:
            json.loads(text)
        except ValueError:
            return f"{text!r} is no JSON"
    return ""


# -- ways to send ------------------------------------------------------------------------------------------


class Client:
    """One client that sends random requests, each in a random way."""

    def __init__(self, address: Address, report: Report, number: int):
        self._address = address
        self._report = report
        self._rng = random.Random(f"{report.seed}/{number}")
        self._number = number
        self._count = 0

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            self._count += 1
            wish = make_wish(self._rng)
            way = self._rng.choices(
                [self._unary, self._stream, self._leave_http, self._cancel], [50, 35, 8, 7]
            )[0]
            begin = time.monotonic()
            try:
                way(wish)
                self._report.note_time(time.monotonic() - begin, way.__name__, wish)
            except Exception as error:
                self._report.fail(f"{way.__name__}: {type(error).__name__}", wish.values, error)

    def _unary(self, wish: Wish) -> None:
        """HTTP generate; every field as JSON."""
        url = f"http://{self._address.http}/v2/models/ensemble_unary/generate"
        body = json.dumps(as_body(wish.values)).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, body), timeout=ANSWER_TIMEOUT_S
            ) as answer:
                found = json.loads(answer.read(), parse_constant=lambda constant: 1 / 0)
        except urllib.error.HTTPError as error:
            self._judge(wish, check_error(wish, json.loads(error.read())["error"]), "refused", error)
            return
        self._judge(wish, check_answers(wish, list(answers_of_json(found))), "answered", found)

    def _stream(self, wish: Wish) -> None:
        """gRPC stream; every field as a tensor."""
        done, closing, errors, parts = threading.Event(), threading.Event(), [], []

        def receive(result: Any, error: Any) -> None:
            if closing.is_set():  # what the end of the stream itself says
                return
            if error is not None:
                errors.append(error.message())
                done.set()
                return
            parts.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                done.set()

        values = {**wish.values, "stream": self._rng.random() < 0.7}
        with grpc.InferenceServerClient(self._address.grpc) as client:
            client.start_stream(receive)
            try:
                inputs, parameters = as_tensors(values)
                client.async_stream_infer(
                    "ensemble", inputs, request_id=f"{self._number}-{self._count}", parameters=parameters
                )
                if not done.wait(ANSWER_TIMEOUT_S):
                    self._judge(wish, "no answer", "", parts)
                    return
            finally:
                closing.set()
                client.stop_stream(cancel_requests=not done.is_set())
        if errors:
            self._judge(wish, check_error(wish, errors[0]), "refused", errors)
        else:
            self._judge(
                wish,
                check_answers(wish, answers_of_stream(parts)),
                "streamed",
                [p.get_response() for p in parts[:3]],
            )

    def leave(self, wish: Wish) -> None:
        """Goes, or cancels, before the answer is whole."""
        self._count += 1
        self._rng.choice([self._leave_http, self._cancel])(wish)

    def _leave_http(self, wish: Wish) -> None:
        """Leaves generate_stream after some bytes, or before any."""
        data = json.dumps(as_body(long(wish.values))).encode()
        head = "POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(
            (self._address.host, self._address.http_port), timeout=ANSWER_TIMEOUT_S
        ) as connection:
            connection.sendall(head.encode() + data[: self._rng.choice([len(data), len(data) // 2])])
            time.sleep(self._rng.uniform(0, 0.1))
        self._report.count("left")

    def _cancel(self, wish: Wish) -> None:
        """Cancels the stream, or by the request's id, at a random moment."""
        inputs, parameters = as_tensors(long(wish.values))
        name = f"{self._number}-{self._count}"
        with grpc.InferenceServerClient(self._address.grpc) as client:
            client.start_stream(lambda result, error: None)
            client.async_stream_infer("ensemble", inputs, request_id=name, parameters=parameters)
            time.sleep(self._rng.uniform(0, 0.3))
            if self._rng.random() < 0.5:
                client.async_stream_infer("ensemble", as_tensors({"cancel": True})[0], request_id=name)
                time.sleep(0.05)
            client.stop_stream(cancel_requests=True)
        self._report.count("cancelled")

    def _judge(self, wish: Wish, wrong: str, outcome: str, answer: Any) -> None:
        if wrong:
            self._report.fail(wrong, wish.values, answer)
        else:
            self._report.count(outcome)


def long(values: dict[str, Any]) -> dict[str, Any]:
    """A stream that would go on for some time; several sequences are told of their client only when they
    say something, which may be at the end.
    """
    is_single = not {"n", "num_return_sequences", "best_of", "beam_width"} & values.keys()
    return {**values, "max_tokens": 2000 if is_single else 60, "stream": True}


DTYPES = dict(tensor_fields())
NUMPY = {"BYTES": np.object_, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_, "INT32": np.int32}


def as_body(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON body of generate.

    An empty list has no JSON form there: it is left out, and so is an empty text in a list of one.
    """
    return {name: value for name, value in values.items() if value != []}


def as_arrays(values: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors of one prompt, and what has no tensor as request parameters."""
    arrays, parameters = {}, {}
    for name, value in values.items():
        if name not in DTYPES:
            parameters[name] = value
            continue
        items = value if isinstance(value, list) else [value]
        encoded = [item.encode() if isinstance(item, str) else item for item in items]
        try:
            arrays[name] = np.array([encoded], dtype=NUMPY[DTYPES[name].dtype]).reshape(1, -1)
        except OverflowError:  # no tensor of this type can hold it
            parameters[name] = value
    return arrays, parameters


def as_tensors(values: dict[str, Any]) -> tuple[list[grpc.InferInput], dict[str, Any]]:
    """The same for a gRPC client."""
    arrays, parameters = as_arrays(values)
    inputs = [
        grpc.InferInput(name, list(array.shape), DTYPES[name].dtype).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]
    return inputs, parameters


def answers_of_json(found: dict[str, Any]) -> Any:
    """The rows of a unary answer.

    One row comes as plain values, several as lists; output_ids of all rows in one list, padded.
    """
    reasons = found["finish_reason"] if isinstance(found["finish_reason"], list) else [found["finish_reason"]]
    columns = {
        name: found[name] if isinstance(found[name], list) else [found[name]]
        for name in ("text_output", "sequence_length", "output_ids")
    }
    width = len(columns["output_ids"]) // len(reasons)
    cumulative = found.get("cum_log_probs", 0.0)
    logprobs = cumulative if isinstance(cumulative, list) else [cumulative] * len(reasons)
    for i, reason in enumerate(reasons):
        ids = columns["output_ids"][i * width : i * width + columns["sequence_length"][i]]
        yield {"ids": ids, "text": columns["text_output"][i], "reason": reason, "logprobs": [logprobs[i]]}


def answers_of_stream(parts: list[Any]) -> list[dict[str, Any]]:
    """The chunks of each sequence put together."""
    answers: dict[int, dict[str, Any]] = {}
    for part in parts:
        index = int(part.as_numpy("sequence_index").item())
        answer = answers.setdefault(index, {"ids": [], "text": "", "reason": "", "logprobs": []})
        assert not answer["reason"], "something follows the last response of a sequence"
        answer["ids"] += part.as_numpy("output_ids").reshape(-1).tolist()
        answer["text"] += part.as_numpy("text_output").item().decode("utf-8", "strict")
        answer["reason"] = part.as_numpy("finish_reason").item().decode()
        for name in ("cum_log_probs", "output_log_probs"):
            if (found := part.as_numpy(name)) is not None:
                answer["logprobs"] += found.reshape(-1).tolist()
    return [answers[index] for index in sorted(answers)]


# -- the server --------------------------------------------------------------------------------------------


def metrics(address: Address) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address.metrics}/metrics", timeout=30) as answer:
        return {
            name: float(value)
            for name, value in re.findall(
                r"^(pagetide_\w+)\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE
            )
        }


def engine_and_memory(server: TritonServer) -> tuple[list[int], float]:
    processes = server.processes()
    return [p.pid for p in processes if "pagetide.engine" in p.cmdline()], sum(
        p.memory_info().rss for p in processes
    ) / 2**20


def wait_until_idle(address: Address, report: Report) -> None:
    names = ("pagetide_requests_running", "pagetide_requests_waiting", "pagetide_kv_blocks_used")
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while any((found := metrics(address))[name] for name in names):
        if time.monotonic() > deadline:
            report.fail("something still runs", None, {name: found[name] for name in names})
            return
        time.sleep(0.2)


def fill_cache(address: Address) -> None:
    """Writes to every block of a small KV cache: its memory comes with the first use."""
    rng, prompt = random.Random(0), 1000
    num_tokens = min(16 * int(metrics(address)["pagetide_kv_blocks_total"]), 20_000)
    for _ in range(-(-num_tokens // prompt)):
        body = json.dumps({"input_ids": rng.choices(range(100, 40_000), k=prompt), "max_tokens": 1}).encode()
        url = f"http://{address.http}/v2/models/ensemble_unary/generate"
        urllib.request.urlopen(urllib.request.Request(url, body), timeout=ANSWER_TIMEOUT_S).close()


def run(server: TritonServer, seconds: float, clients: int, seed: int) -> Report:
    """Fuzzes a server that runs; returns what was found."""
    report = Report(seed)
    # Memory that is taken once.
    fill_cache(server.address)
    send(server.address, report, clients, min(WARM_UP_S, seconds))
    wait_until_idle(server.address, report)
    engine, before = engine_and_memory(server)
    send(server.address, report, clients, seconds)
    wait_until_idle(server.address, report)
    same, after = engine_and_memory(server)
    if same != engine or metrics(server.address)["pagetide_engine_restarts"]:
        report.fail("the engine is not the same process", None, (engine, same))
    if after - before > MAX_GROWTH_MB:
        report.fail("memory has grown", None, f"{before:.0f} to {after:.0f} MB")
    for taken, request in report.slowest:
        print(f"slow: {taken:.1f} s {request}", file=sys.stderr)
    print(f"memory {before:.0f} MB before, {after:.0f} MB after", file=sys.stderr)
    return report


def send(address: Address, report: Report, clients: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    offset = sum(report.outcomes.values())  # other requests than before
    threads = [
        threading.Thread(target=Client(address, report, offset + i).run, args=(until,))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(15)
            print(
                f"{max(0, until - time.monotonic()):4.0f} s left: {dict(report.outcomes)}, "
                f"{len(report.failures)} wrong",
                file=sys.stderr,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--http-port", type=int, help="of a server that serve.sh has started; without it one is started"
    )
    arguments = parser.parse_args()
    server = find_running(arguments.http_port) if arguments.http_port else None
    if arguments.http_port and server is None:
        parser.error(f"no server was started on port {arguments.http_port}")
    own = server is None
    if server is None:
        server = TritonServer(
            free_address(),
            {
                "cache_dir": str(ROOT / ".cache"),
                "check_integrity": True,
                "num_blocks": 600,
                "max_model_len": 4096,
            },
        )
        server.start()
        server.wait_until_ready()
    try:
        report = run(server, arguments.seconds, arguments.clients, arguments.seed)
    finally:
        stopped = server.stop() if own else True
    if not stopped:
        report.fail("the server did not stop by itself", None, None)
    for failure in report.failures[:20]:
        print(json.dumps(failure, default=repr))
    print(
        json.dumps(
            {
                "seed": arguments.seed,
                "seconds": arguments.seconds,
                "outcomes": report.outcomes,
                "wrong": len(report.failures),
            }
        )
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
