"""A chat in the terminal, with Triton over gRPC, or with any server of OpenAI's API such as the gateway.

python clients/chat.py [--url 127.0.0.1:8001] [--gateway http://127.0.0.1:9000/v1]
    [--system "You are a poet."]

/system TEXT      instructions that stand before the conversation; without a text: none
/params NAME=VALUE ...    sampling parameters by their names; without any: shows them
/retry            another answer to the last message
/reset            forgets the conversation
/save FILE        writes it as JSON messages
/help             this list; an empty line or Ctrl-D ends the chat, Ctrl-C an answer

Answers are shown as markdown where the output is a terminal and rich is installed.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
# Sends a conversation with these parameters; yields the pieces of the next message.
Ask = Callable[[Messages, dict[str, Any]], Iterator[str]]


NOT_PARAMETERS = ("messages", "model", "stream", "timeout", "self")


class ChatError(Exception):
    """The answer did not come; the chat goes on."""


def ask_triton(url: str, model: str) -> Ask:
    from pagetide_client import Client, PagetideError

    client = Client(url, model or "ensemble")

    def ask(messages: Messages, params: dict[str, Any]) -> Iterator[str]:
        try:
            for chunk in client.stream_chat(messages, **params):
                yield chunk.text
        except PagetideError as error:
            raise ChatError(str(error)) from error

    return ask


def ask_gateway(url: str, model: str) -> Ask:
    def ask(messages: Messages, params: dict[str, Any]) -> Iterator[str]:
        body = {"model": model or "ensemble", "messages": messages, "stream": True, **params}
        request = urllib.request.Request(
            f"{url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as events:
                for line in events:
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise ChatError(event["error"]["message"])
                        for choice in event["choices"]:
                            yield choice["delta"].get("content") or ""
        except urllib.error.HTTPError as error:
            raise ChatError(_reason(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChatError(f"{url} gave no whole answer: {error}") from error

    return ask


def _reason(error: urllib.error.HTTPError) -> str:
    """What an OpenAI server says, or whoever else has answered."""
    body = error.read().decode(errors="replace")
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error}: {body[:200]}"


class Chat:
    """A conversation, and the commands that change it."""

    def __init__(self, ask: Ask, system: str, params: dict[str, Any]):
        self._ask = ask
        self._system = system
        self._params = params
        self._said: Messages = []

    @property
    def messages(self) -> Messages:
        """All of them, the instructions first."""
        return [{"role": "system", "content": self._system}] * bool(self._system) + self._said

    def say(self, text: str) -> None:
        """Sends a message and shows the answer; a message without an answer is forgotten."""
        self._said.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            show(self._remembered(pieces))
        except ChatError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print()
        if pieces:
            self._said.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self._said.pop()

    def _remembered(self, pieces: list[str]) -> Iterator[str]:
        for piece in self._ask(self.messages, self._params):
            pieces.append(piece)
            yield piece

    def command(self, line: str) -> None:
        """Does what a line that begins with / asks for."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/system":
            self._system = rest
        elif name == "/params":
            self._set_params(rest.split())
        elif name == "/reset":
            self._said = []
        elif name == "/retry" and self._said:
            self._said.pop()
            self.say(self._said.pop()["content"])
        elif name == "/retry":
            print("error: there is no message to answer again")
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        else:
            if name not in ("/help", "/save"):
                print(f"error: there is no command {name}")
            print("\n".join(text for text in __doc__.splitlines() if text.startswith("/")))

    def _set_params(self, given: list[str]) -> None:
        for pair in given:
            name, equals, value = pair.partition("=")
            if not equals:
                print(f"error: {pair} is not NAME=VALUE")
            elif name in NOT_PARAMETERS:
                print(f"error: {name} is no sampling parameter")
            elif not value:
                self._params.pop(name, None)
            else:
                self._params[name] = parsed(value)
        print(" ".join(f"{name}={json.dumps(value)}" for name, value in self._params.items()) or "none")

    def _save(self, file: Path) -> None:
        try:
            file.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False), encoding="utf-8")
            print(f"{len(self.messages)} messages in {file}")
        except OSError as error:
            print(f"error: {error}")


def parsed(value: str) -> Any:
    """A number, truth value or list if it is one in JSON, the text otherwise."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def show(pieces: Iterable[str]) -> None:
    """Prints an answer as it comes."""
    if not (sys.stdout.isatty() and importlib.util.find_spec("rich")):
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    text = ""
    with Live(console=Console(), vertical_overflow="visible", refresh_per_second=12) as live:
        for piece in pieces:
            text += piece
            live.update(Markdown(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="127.0.0.1:8001", help="Triton's gRPC address")
    parser.add_argument("--gateway", help="the base of an OpenAI API, instead of Triton")
    parser.add_argument("--model", default="", help="the model's name there (ensemble)")
    parser.add_argument("--system", default="", help="instructions that stand before the conversation")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args()

    ask = (
        ask_gateway(options.gateway, options.model)
        if options.gateway
        else ask_triton(options.url, options.model)
    )
    chat = Chat(ask, options.system, {"max_tokens": options.max_tokens, "temperature": options.temperature})
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        if line.startswith("/"):
            chat.command(line)
        else:
            chat.say(line)


if __name__ == "__main__":
    main()
