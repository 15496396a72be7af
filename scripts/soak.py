"""Random traffic of all features through clients of every kind, with cancels, clients that leave and engines
that are killed, for as long as you like: every answer is compared with what the engine alone, without a
server, says to the same request.

It begins with each request in every way. It must never stand still. Afterwards nothing may run and no block
be used; memory, descriptors and threads must not have grown.

python scripts/soak.py [--seconds 900] [--clients 8] [--requests 200] [--kill-every 120] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz
import numpy as np
import psutil
import tritonclient.grpc as grpc
import tritonclient.http as http
from faults import process_called, role
from fuzz import ANSWER_TIMEOUT_S, Report, as_arrays, as_body, as_tensors, make_wish
from gateway_process import gateway_of, start_gateway
from triton_server import ROOT, TritonServer, free_address

SETTINGS = {"cache_dir": str(ROOT / ".cache"), "num_blocks": 600, "max_model_len": 4096}
INTERRUPTED = re.compile(r"the engine (failed while|is not running)")
INTERRUPTED_S = 60.0  # after a kill
SAMPLE_S = 5.0
STILL_S = 30.0  # in which some client must have been answered; a killed engine is back long before
MIN_SAMPLES = 12  # fewer say nothing about growth
# What depends on the clock, or is another answer in a stream.
LEFT_OUT = {"timeout_ms", "timeout", "exclude_input_in_output", "echo"}
PLAIN = ("max_tokens", "temperature", "top_p", "seed", "n", "stop", "presence_penalty", "frequency_penalty")

Values = dict[str, Any]
Answers = list[dict[str, Any]]  # of each sequence: ids, text, reason


@dataclass
class Question:
    """A request by its JSON names, and what it must be answered. is_plain: it has only what OpenAI's API
    has.
    """

    values: Values
    answers: Answers
    is_plain: bool


# -- what must be answered ---------------------------------------------------------------------------------


def make_requests(count: int, seed: int) -> list[tuple[Values, bool]]:
    """Half of them plain."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        if len(found) % 2:
            found.append((plain_values(rng), True))
        elif not (wish := make_wish(rng)).wrong and not LEFT_OUT & wish.values.keys():
            found.append(({**wish.values, "seed": rng.randrange(2**31)}, False))
    return found


def plain_values(rng: random.Random) -> Values:
    return {
        "text_input": rng.choice(fuzz.TEXTS),
        "max_tokens": rng.randint(1, 40),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "top_p": rng.choice([0.9, 1.0]),
        "seed": rng.randrange(2**31),
        "n": rng.choice([1, 1, 3]),
        "stop": rng.choice([["the"], [".", "\n"]]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
    }


def print_answers(count: int, seed: int) -> None:
    """Of the engine alone, as JSON: null where it refuses what the table of fields allows one by one."""
    from pagetide.config import make_settings
    from pagetide.contract.parse import parse
    from pagetide.llm import LLM
    from pagetide.serving.defaults import read_defaults
    from pagetide.serving.prompts import PromptReader
    from pagetide.types import RequestError

    settings, llm = make_settings(**SETTINGS), LLM(**SETTINGS)
    model = Path(llm.engine.info.model)
    reader, defaults = PromptReader(model, settings), read_defaults(model, settings)
    for values, _ in make_requests(count, seed):
        answers = None
        try:
            prompt = reader.read(parse(*as_arrays(values), defaults)[0])
            reader.tokenize([prompt])
            (result,) = llm.generate([prompt.ids], prompt.parsed.params)
            answers = [
                {"ids": one.token_ids, "text": one.text, "reason": one.finish_reason}
                for one in result.outputs
            ]
        except RequestError:
            pass
        print(json.dumps(answers), flush=True)
    llm.close()


def read_questions(count: int, seed: int) -> list[Question]:
    """In a process of its own, whose memory is not the server's."""
    command = [sys.executable, __file__, "--answers", "--requests", str(count), "--seed", str(seed)]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    pairs = zip(make_requests(count, seed), map(json.loads, said), strict=True)
    return [Question(values, answers, is_plain) for (values, is_plain), answers in pairs if answers]


# -- ways to ask -------------------------------------------------------------------------------------------


class Asker:
    """One client. Each way returns the answers, or raises what the server has said."""

    ways = ("grpc_stream", "grpc_whole", "http_generate", "http_stream", "http_infer")
    plain_ways = (*ways, "openai", "openai_stream")

    def __init__(self, server: TritonServer, gateway: str):
        self._server, self._gateway = server, gateway

    def grpc_stream(self, values: Values) -> Answers:
        parts: list[Any] = []
        done = threading.Event()

        def receive(result: Any, error: Any) -> None:
            if not done.is_set():
                parts.append(error or result)
                if error or result.get_response().parameters["triton_final_response"].bool_param:
                    done.set()

        inputs, parameters = as_tensors({**values, "stream": True})
        with grpc.InferenceServerClient(self._server.address.grpc) as client:
            client.start_stream(receive)
            client.async_stream_infer("ensemble", inputs, parameters=parameters)
            is_done = done.wait(ANSWER_TIMEOUT_S)
            done.set()
            # Triton keeps a connection's descriptor where a stream is cancelled just as it ends.
            client.stop_stream(cancel_requests=not is_done)
        if not is_done or isinstance(parts[-1], Exception):
            raise parts[-1] if is_done else TimeoutError("no answer")
        return fuzz.answers_of_stream(parts)

    def grpc_whole(self, values: Values) -> Answers:
        inputs, parameters = as_tensors(values)
        with grpc.InferenceServerClient(self._server.address.grpc) as client:
            return answers_of_rows(client.infer("ensemble_unary", inputs, parameters=parameters).as_numpy)

    def http_infer(self, values: Values) -> Answers:
        arrays, parameters = as_arrays(values)
        inputs = [
            http.InferInput(name, list(array.shape), fuzz.DTYPES[name].dtype).set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        with http.InferenceServerClient(
            self._server.address.http, network_timeout=ANSWER_TIMEOUT_S
        ) as client:
            return answers_of_rows(client.infer("ensemble_unary", inputs, parameters=parameters).as_numpy)

    def http_generate(self, values: Values) -> Answers:
        found = self._post(f"http://{self._server.address.http}/v2/models/ensemble_unary/generate", values)
        return list(fuzz.answers_of_json(json.loads(found)))

    def http_stream(self, values: Values) -> Answers:
        url = f"http://{self._server.address.http}/v2/models/ensemble/generate_stream"
        answers: dict[int, dict[str, Any]] = {}
        for event in events_of(self._post(url, {**values, "stream": True})):
            if "error" in event:
                raise RuntimeError(event["error"])
            ids = event["output_ids"]
            answer = answers.setdefault(event["sequence_index"], {"ids": [], "text": "", "reason": ""})
            answer["ids"] += (ids if isinstance(ids, list) else [ids])[: event["sequence_length"]]
            answer["text"] += event["text_output"]
            answer["reason"] = event["finish_reason"]
        return [answers[index] for index in sorted(answers)]

    def openai(self, values: Values) -> Answers:
        found = json.loads(self._post(f"{self._gateway}/v1/completions", openai_body(values)))
        return [{"text": one["text"], "reason": one["finish_reason"]} for one in found["choices"]]

    def openai_stream(self, values: Values) -> Answers:
        body = openai_body(values) | {"stream": True}
        answers: dict[int, dict[str, Any]] = {}
        for event in events_of(self._post(f"{self._gateway}/v1/completions", body)):
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for one in event["choices"]:
                answer = answers.setdefault(one["index"], {"text": "", "reason": None})
                answer["text"] += one["text"]
                answer["reason"] = one["finish_reason"] or answer["reason"]
        return [answers[index] for index in sorted(answers)]

    def _post(self, url: str, values: Values) -> str:
        request = urllib.request.Request(
            url, json.dumps(as_body(values)).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None


def events_of(stream: str) -> list[Any]:
    """Server-sent events."""
    data = [line.removeprefix("data:").strip() for line in stream.split("\n") if line.startswith("data:")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def openai_body(values: Values) -> Values:
    return {"model": "ensemble", "prompt": values["text_input"], **{name: values[name] for name in PLAIN}}


def answers_of_rows(as_numpy: Callable[[str], np.ndarray]) -> Answers:
    """A whole answer in tensors: a row for each sequence."""
    names = ("output_ids", "sequence_length", "text_output", "finish_reason")
    columns = [as_numpy(name) for name in names]
    rows = zip(columns[0].reshape(columns[1].size, -1), *(c.reshape(-1) for c in columns[1:]), strict=True)
    return [
        {"ids": ids[:length].tolist(), "text": text.decode(), "reason": reason.decode()}
        for ids, length, text, reason in rows
    ]


def is_same(answers: Answers, expected: Answers) -> bool:
    """OpenAI's API tells no ids."""
    return len(answers) == len(expected) and all(
        one.get(name, value) == value
        for one, right in zip(answers, expected, strict=True)
        for name, value in right.items()
    )


# -- the soak ----------------------------------------------------------------------------------------------


class Soak:
    """What is sent, killed and watched until the time is up."""

    def __init__(self, server: TritonServer, gateway: str, questions: list[Question], report: Report):
        self._server, self._gateway = server, gateway
        self._questions, self._report = questions, report
        self._killed_at = -INTERRUPTED_S
        self._first: queue.SimpleQueue[tuple[str, Question]] = queue.SimpleQueue()
        for question in questions:
            for way in Asker.plain_ways if question.is_plain else Asker.ways:
                self._first.put((way, question))
        self.samples: list[dict[str, float]] = []

    def run(self, seconds: float, num_clients: int, kill_every: float) -> None:
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._ask_until, args=(end, number), daemon=True)
            for number in range(num_clients)
        ]
        for thread in threads:
            thread.start()
        next_kill, told = time.monotonic() + kill_every, 0.0
        while (now := time.monotonic()) < end:
            self.samples.append(self._sample())
            # The last requests are to end without one.
            if now > next_kill and end - now > INTERRUPTED_S:
                next_kill += kill_every
                self._killed_at = now
                process_called(self._server, "engine").kill()
                self._report.count("engine killed")
            if now - told > 15:
                told = now
                print(f"{end - now:5.0f} s left: {dict(self._report.outcomes)}", file=sys.stderr, flush=True)
            time.sleep(SAMPLE_S)
        for thread in threads:
            thread.join(10 * ANSWER_TIMEOUT_S)
            if thread.is_alive():
                self._report.fail("a client still waits", None, None)

    def _ask_until(self, end: float, number: int) -> None:
        rng = random.Random(number)
        asker, leaver = (
            Asker(self._server, self._gateway),
            fuzz.Client(self._server.address, self._report, number),
        )
        while not self._first.empty():
            with contextlib.suppress(queue.Empty):
                self._ask(asker, *self._first.get_nowait())
        while time.monotonic() < end:
            question = rng.choice(self._questions)
            if rng.random() < 0.1:
                try:
                    leaver.leave(fuzz.Wish(question.values, []))
                except Exception as error:
                    self._report.fail(f"leaving: {type(error).__name__}", question.values, error)
            else:
                self._ask(asker, rng.choice(asker.plain_ways if question.is_plain else asker.ways), question)

    def _ask(self, asker: Asker, way: str, question: Question) -> None:
        try:
            answers = getattr(asker, way)(question.values)
        except Exception as error:
            said = str(error)
            if INTERRUPTED.search(said) and time.monotonic() - self._killed_at < INTERRUPTED_S:
                self._report.count("interrupted")
                time.sleep(0.5)
            else:
                self._report.fail(f"{way}: {type(error).__name__}", question.values, said)
            return
        if is_same(answers, question.answers):
            self._report.count(way)
        else:
            self._report.fail(f"{way}: not what the engine says", question.values, answers)

    def _sample(self) -> dict[str, float]:
        """Of all processes but the engine, which is another one after each kill: its memory apart."""
        gateway = gateway_of(self._server.folder)
        answers = sum(self._report.outcomes[way] for way in Asker.plain_ways)
        found: Counter[str] = Counter({"at": int(time.monotonic()), "answers": answers})
        for process in [*self._server.processes(), *([gateway] if gateway else [])]:
            try:
                megabytes = process.memory_info().rss / 2**20
                if role(process) == "engine":
                    found["engine MB"] += round(megabytes)
                else:
                    found["MB"] += round(megabytes)
                    found["descriptors"] += process.num_fds()
                    found["threads"] += process.num_threads()
            except psutil.NoSuchProcess:
                continue
        return dict(found)


GROWTH = {"MB": 60, "descriptors": 40, "threads": 20}  # that may be, from a third of the time to its end


def judge_growth(samples: list[dict[str, float]], report: Report) -> None:
    """Slopes by least squares over the last two thirds."""
    late = [one for one in samples[len(samples) // 3 :] if "engine MB" in one]
    if len(late) < MIN_SAMPLES:
        return
    times = np.array([one["at"] for one in late], dtype=float)
    for name in (*GROWTH, "engine MB"):  # an engine is another one after each kill
        values = np.array([one[name] for one in late], dtype=float)
        slope = np.polyfit(times - times[0], values, 1)[0]
        print(f"{name}: {values[0]:.0f} to {values[-1]:.0f}, {slope * 3600:+.1f} an hour")
        if slope * (times[-1] - times[0]) > GROWTH.get(name, float("inf")):
            report.fail(f"{name} grow", None, values.tolist())


def judge_standstills(samples: list[dict[str, float]], report: Report) -> None:
    """The longest time in which nobody was answered."""
    longest, since = 0.0, samples[0]
    for sample in samples:
        if sample["answers"] != since["answers"]:
            since = sample
        longest = max(longest, sample["at"] - since["at"])
    print(f"longest time without an answer: {longest:.0f} s")
    if longest > STILL_S:
        report.fail("the server stood still", None, longest)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="different ones")
    parser.add_argument("--kill-every", type=float, default=120, help="seconds; 0: no engine is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", action="store_true", help="print what the engine alone answers")
    arguments = parser.parse_args()
    if arguments.answers:
        print_answers(arguments.requests, arguments.seed)
        return 0
    report = run(
        arguments.seconds,
        arguments.clients,
        arguments.requests,
        arguments.kill_every or float("inf"),
        arguments.seed,
    )
    for failure in report.failures[:20]:
        print(json.dumps(failure, default=repr))
    print(json.dumps({"seconds": arguments.seconds, **report.outcomes, "wrong": len(report.failures)}))
    return 1 if report.failures else 0


def run(seconds: float, num_clients: int, num_requests: int, kill_every: float, seed: int) -> Report:
    report = Report(seed)
    questions = read_questions(num_requests, seed)
    guesses = {"num_speculative_tokens": 4}  # which change no answer
    server = TritonServer(free_address(), {**SETTINGS, **guesses, "check_integrity": True})
    server.start()
    try:
        server.wait_until_ready()
        port = free_address().http_port
        start_gateway(server.folder, server.address, port, ends_with_parent=True)
        soak = Soak(server, f"http://{server.address.host}:{port}", questions, report)
        soak.run(seconds, num_clients, kill_every)
        fuzz.wait_until_idle(server.address, report)
        judge_growth(soak.samples, report)
        if soak.samples:
            judge_standstills(soak.samples, report)
    finally:
        if not server.stop():
            report.fail("the server did not stop by itself", None, None)
    return report


if __name__ == "__main__":
    sys.exit(main())
