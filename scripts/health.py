"""Whether a server is well, in one sentence and an exit code (0: yes): what Docker and Kubernetes call.

live     Triton's process answers. Where this fails, a restart helps.
ready    requests are answered now: Triton is ready, and the engine computes a token, or has computed some
         while this one waits. Fails too while models load, while the engine is started again, and when its
         queue is full: send requests elsewhere, and ask again.

python scripts/health.py [live | ready] [--http-port 8000] [--metrics-port 8002] [--model NAME] [--timeout 8]
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.request

FIRST = -(2**31 - 1)  # the priority of what goes before all others
UNRECORDED = f"00-{1:032x}-{1:016x}-00"  # as pagetide/tracing.py has it, of which this script needs nothing


class NotWellError(Exception):
    """Why, in one sentence."""


# Whatever proxy the environment names is for other places.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout: float, body: bytes | None = None) -> bytes:
    """The answer's body. Raises NotWellError, TimeoutError where the answer does not come in time."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=timeout) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        try:
            said = json.loads(said)["error"]
        except (ValueError, KeyError, TypeError):
            said = said.strip() or f"Triton says {error.code} to {url}"
        raise NotWellError(said) from None
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise NotWellError(f"nothing answers at {url} ({error})") from error


def check_live(base: str, timeout: float) -> str:
    get(f"{base}/v2/health/live", timeout)
    return "Triton is live"


def check_ready(base: str, metrics: str, model: str, timeout: float) -> str:
    """model: the ensemble that is asked. Raises NotWellError, TimeoutError."""
    get(f"{base}/v2/health/ready", timeout)
    engine = "llm" if model == "ensemble" else f"{model}_llm"
    before = computed_tokens(metrics, engine, timeout)
    asked = {"text_input": ".", "max_tokens": 1, "temperature": 0, "priority": FIRST}
    body = json.dumps({**asked, "traceparent": UNRECORDED}).encode()
    try:
        get(f"{base}/v2/models/{model}/generate", timeout, body)
    except TimeoutError:
        if before is not None and before != computed_tokens(metrics, engine, timeout):
            return "the engine computes, and is busy"
        raise NotWellError(f"the engine has computed nothing for {timeout:g} s") from None
    return "the engine answers"


def computed_tokens(metrics: str, engine: str, timeout: float) -> float | None:
    """Of all prompts and answers of this engine so far; None where Triton does not tell its metrics."""
    names = ("pagetide_prompt_tokens{", "pagetide_generated_tokens{")
    try:
        lines = get(metrics, timeout).decode().splitlines()
    except (NotWellError, TimeoutError):
        return None
    own = (line for line in lines if line.startswith(names) and f'model="{engine}"' in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in own)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="health.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", choices=("live", "ready"), default="ready")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--model", default="ensemble", help="one that scripts/add_model.py has added")
    parser.add_argument("--timeout", type=float, default=8, help="seconds that each question may take")
    arguments = parser.parse_args()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    base, metrics = f"http://{host}:{arguments.http_port}", f"http://{host}:{arguments.metrics_port}/metrics"
    try:
        if arguments.question == "live":
            print(check_live(base, arguments.timeout))
        else:
            print(check_ready(base, metrics, arguments.model, arguments.timeout))
    except NotWellError as error:
        print(f"not {arguments.question}: {error}")
        return 1
    except TimeoutError:
        print(f"not {arguments.question}: Triton does not answer within {arguments.timeout:g} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
