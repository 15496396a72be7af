"""An engine that computes nothing: at fixed times every request gets one more token, at once its first.

The server's clients cannot tell it from the real one: same process, same messages. scripts/way_out.py has
`llm` start it.

python scripts/stand_in_engine.py DEVICE STEP_MS PARENT_PID SETTINGS_JSON ADDRESS
"""

from __future__ import annotations

import sys
import time

import msgspec
import zmq
from pagetide.config import Settings
from pagetide.engine.messages import (
    Cancel,
    Drain,
    Drained,
    FromEngine,
    Hello,
    Outputs,
    Ready,
    Submit,
    ToEngine,
)
from pagetide.engine.parent import end_with_parent
from pagetide.models.families import read_model
from pagetide.models.source import find_model
from pagetide.types import EngineInfo, Output

VOCABULARY = range(1000, 2000)  # whole words and pieces of the embedded model's, no special tokens


class StandIn:
    """info: what it says of itself. step_s: between two tokens of an answer."""

    def __init__(self, info: EngineInfo, step_s: float, socket: zmq.Socket[bytes]):
        self._ready = Ready(info)
        self._step_s = step_s
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._open: dict[int, tuple[bytes, int]] = {}  # request number -> whose, and tokens that are left

    def run(self) -> None:
        due = time.monotonic()
        while True:
            wait_s = max(0.0, due - time.monotonic()) if self._open else 1.0
            if self._socket.poll(int(1000 * wait_s)):
                client, body = self._socket.recv_multipart()
                self._handle(client, self._decoder.decode(body))
            elif self._open and time.monotonic() >= due:
                due = max(due + self._step_s, time.monotonic())
                self._step(list(self._open))

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Hello():
                self._send(client, self._ready)
            case Submit(requests):
                for request in requests:
                    self._open[request.number] = (client, request.params.max_tokens)
                self._step([request.number for request in requests])
            case Cancel(numbers):
                for number in numbers:
                    self._open.pop(number, None)
            case Drain():
                self._send(client, Drained(0, 0))

    def _step(self, numbers: list[int]) -> None:
        by_client: dict[bytes, list[Output]] = {}
        for number in numbers:
            client, left = self._open.pop(number)
            if left > 1:
                self._open[number] = (client, left - 1)
            token = VOCABULARY[left % len(VOCABULARY)]
            reason = "length" if left == 1 else ""
            by_client.setdefault(client, []).append(Output(number, 0, [token], finish_reason=reason))
        for client, outputs in by_client.items():
            self._send(client, Outputs(outputs))

    def _send(self, client: bytes, message: FromEngine) -> None:
        self._socket.send_multipart([client, msgspec.msgpack.encode(message)])


def main() -> None:
    device, step_ms, parent, settings_json, address = sys.argv[1:]
    end_with_parent(int(parent))
    settings = msgspec.json.decode(settings_json, type=Settings)
    model = find_model(settings.model, settings.cache_path)
    _, config = read_model(model)
    info = EngineInfo(
        model=str(model),
        vocab_size=config.vocab_size,
        max_model_len=2048,
        max_num_seqs=settings.max_num_seqs,
        pad_id=config.pad_id,
        device=device,
        num_blocks=1,
        block_size=16,
        allows_logits=False,
    )
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 0
    socket.bind(address)
    StandIn(info, float(step_ms) / 1000, socket).run()


if __name__ == "__main__":
    main()
