"""Runs other engines on the benchmark's workloads, each in the environment that scripts/peers.sh has made
for it.

python peer_engines.py ENGINE PEERS_DIRECTORY DTYPE MODEL_DIRECTORY NAME

Started by benchmark.py; imports nothing of Pagetide. NAME: under which peers.sh keeps the converted model.

Reads one workload a line, as JSON: [{"prompt": [token ids], "num_tokens": n, "at": seconds after the
beginning}, ...], greedy, exactly n tokens each.
Prints a line for each: {"seconds": ..., "first": [seconds of each job's first token], "last": [...],
"counts": [tokens of each job], "tokens": [their ids, where the engine says them]}. Settings are those that
each engine's own documentation asks for; at most 32 sequences run at the same time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

MAX_RUNNING = 32
LONGEST = 8192  # context of one sequence


class Stepped(Protocol):
    """An engine that computes a step when it is asked to."""

    def add(self, number: int, prompt: list[int], num_tokens: int) -> None: ...

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """One step; yields (job, its new tokens)."""


class OpenVino:
    """ContinuousBatchingPipeline."""

    def __init__(self, peers: Path, dtype: str, model: Path, name: str):
        import openvino_genai

        self._library = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = MAX_RUNNING
        scheduler.cache_size = 2
        scheduler.enable_prefix_caching = True
        precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]
        properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(peers / "openvino" / "models" / name), scheduler, "CPU", properties
        )
        self._handles: dict[int, Any] = {}

    def add(self, number: int, prompt: list[int], num_tokens: int) -> None:
        import numpy as np
        import openvino

        config = self._library.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._handles[number] = self._pipeline.add_request(
            number, openvino.Tensor(np.array([prompt], np.int64)), config
        )

    def step(self) -> Iterator[tuple[int, list[int]]]:
        self._pipeline.step()
        for number, handle in list(self._handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    yield number, output.generated_ids
            if handle.get_status() != self._library.GenerationStatus.RUNNING:
                del self._handles[number]


class Vllm:
    """vLLM's engine in this process."""

    def __init__(self, peers: Path, dtype: str, model: Path, name: str):
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        llm = LLM(
            model=str(model),
            dtype=dtype,
            max_num_seqs=MAX_RUNNING,
            max_model_len=LONGEST,
            kv_cache_memory_bytes=2 * 2**30,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._engine = llm.llm_engine
        self._counts: Counter[str] = Counter()

    def add(self, number: int, prompt: list[int], num_tokens: int) -> None:
        params = self._params(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    def step(self) -> Iterator[tuple[int, list[int]]]:
        for output in self._engine.step():
            so_far = output.outputs[0].token_ids
            yield int(output.request_id), list(so_far[self._counts[output.request_id] :])
            self._counts[output.request_id] = len(so_far)


def run_stepped(engine: Stepped, jobs: list[dict[str, Any]], begin_number: int) -> dict[str, Any]:
    first, last = ([0.0] * len(jobs) for _ in range(2))
    tokens: list[list[int]] = [[] for _ in jobs]
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i]["at"])
    left = len(jobs)
    begin = time.perf_counter()
    while left:
        now = time.perf_counter() - begin
        while waiting and jobs[waiting[0]]["at"] <= now:
            i = waiting.pop(0)
            engine.add(begin_number + i, jobs[i]["prompt"], jobs[i]["num_tokens"])
        if len(waiting) == left:  # nothing runs yet
            time.sleep(max(0.0, jobs[waiting[0]]["at"] - now))
            continue
        for number, new in engine.step():
            i, now = number - begin_number, time.perf_counter() - begin
            first[i] = first[i] or now
            left -= len(tokens[i]) < jobs[i]["num_tokens"] <= len(tokens[i]) + len(new)
            tokens[i] += new
            last[i] = now
    seconds, counts = time.perf_counter() - begin, [len(ids) for ids in tokens]
    return {"seconds": seconds, "first": first, "last": last, "counts": counts, "tokens": tokens}


class LlamaCpp:
    """llama-server, asked over HTTP; it streams where times of tokens matter, since its streams cost it 5 %
    of a batch.
    """

    def __init__(self, peers: Path, dtype: str, model: Path, name: str):
        assert dtype == "bfloat16", "peers.sh makes a bfloat16 file"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        program = peers / "llamacpp" / "build" / "bin" / "llama-server"
        options = [
            "--parallel",
            MAX_RUNNING,
            "--ctx-size",
            MAX_RUNNING * 1024,
            "--threads",
            os.cpu_count(),
            "--port",
            self._port,
            "--no-webui",
        ]
        command = [
            str(program),
            "--model",
            str(peers / "llamacpp" / "models" / f"{name}.gguf"),
            *map(str, options),
        ]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health").status == 200:
                    break
            except OSError:
                assert self._server.poll() is None, "llama-server ended"
                time.sleep(0.05)

    def run(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        first, last, counts = ([0.0] * len(jobs) for _ in range(3))
        begin = time.perf_counter()
        streams = len(jobs) == 1 or any(job["at"] for job in jobs)

        def ask(i: int) -> None:
            job = jobs[i]
            time.sleep(max(0.0, job["at"] - (time.perf_counter() - begin)))
            body = {
                "prompt": job["prompt"],
                "n_predict": job["num_tokens"],
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": True,
                "stream": streams,
            }
            request = urllib.request.Request(
                f"http://127.0.0.1:{self._port}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=900) as answer:
                if not streams:
                    counts[i] = json.load(answer)["tokens_predicted"]
                    first[i] = last[i] = time.perf_counter() - begin
                    return
                for line in answer:
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        last[i] = time.perf_counter() - begin
                        first[i] = first[i] or last[i]
                        counts[i] = event["tokens_predicted"] if event["stop"] else counts[i] + 1

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "seconds": time.perf_counter() - begin,
            "first": first if streams else [],
            "last": last,
            "counts": counts,
        }

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()


def main() -> None:
    name, peers, dtype, model = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is not an answer
    engine: Any = {"openvino": OpenVino, "vllm": Vllm, "llamacpp": LlamaCpp}[name](
        peers, dtype, model, sys.argv[5]
    )
    number = 0
    for line in sys.stdin:
        jobs = json.loads(line)
        result = engine.run(jobs) if isinstance(engine, LlamaCpp) else run_stepped(engine, jobs, number)
        number += len(jobs)
        assert result["counts"] == [job["num_tokens"] for job in jobs], (
            "an answer has another number of tokens than was asked for"
        )
        print(json.dumps(result), file=answers, flush=True)
    if isinstance(engine, LlamaCpp):
        engine.close()


if __name__ == "__main__":
    main()
