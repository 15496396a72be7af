"""The playground in a real Chromium, on a real server. Skipped where no Chromium is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.sync_playwright import Axe
from client import wait_for
from gateway import Gateway
from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


@pytest.fixture(scope="module")
def gateway(real) -> Iterator[Gateway]:
    found = Gateway(real, "--metrics", real.address.metrics)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(gateway, browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(gateway.url)
    expect(page.locator("#sampling input")).to_have_count(10)
    page.fill("#temperature", "0")
    yield page
    # A refused request is an error to the browser; it is shown on the page, and nothing else may fail.
    assert [text for text in errors if "the server responded with a status of 4" not in text] == []
    context.close()


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ask_for_much(page: Page) -> None:
    """An answer that cannot be short, whatever the model would like to say."""
    page.locator("#schema").evaluate("area => { area.closest('details').open = true; }")
    page.fill("#schema", json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 400}))
    page.fill("#max_tokens", "1000")
    ask(page, "Numbers")
    expect(page.locator(".card .text[tabindex]").first).not_to_be_empty(timeout=30_000)
    page.fill("#schema", "")


def done(page: Page) -> None:
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)


def test_a_chat_streams_with_its_speed_and_probabilities(page):
    ask(page, "What is the capital of France?")
    done(page)
    answer = page.locator(".card .text[tabindex]")
    expect(answer).to_have_text("The capital of France is Paris.")
    facts = page.locator(".facts").inner_text()
    assert re.search(r"first token after \d+ ms(, [\d.]+ tokens/s)?, 8 tokens \(prompt: 37, ", facts), facts
    answer.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    lines = page.locator(".odds").inner_text().splitlines()
    assert lines[0].endswith('% " capital"') and len(lines) == 5
    answer.locator(".token").first.hover()
    assert page.locator(".odds").inner_text().splitlines()[0].endswith('% "The"')
    if os.environ.get("PAGETIDE_SCREENSHOT"):
        page.screenshot(path=os.environ["PAGETIDE_SCREENSHOT"])
    ask(page, "And of Italy?")
    done(page)
    expect(answer.nth(1)).to_contain_text("Rome")


def test_answers_stand_side_by_side_and_one_of_them_is_gone_on_with(page):
    page.select_option("#samples", "3")
    page.fill("#temperature", "1.5")
    page.fill("#max_tokens", "12")
    ask(page, "Tell me a story.")
    done(page)
    texts = page.locator(".card .text[tabindex]").all_inner_texts()
    assert len(set(texts)) == 3
    page.locator(".answers input[type=radio]").nth(2).check()
    page.locator("#python").click()
    page.locator("#retry").click()
    done(page)
    assert page.locator(".turn").count() == 2


def test_stop_ends_an_answer_and_retry_gives_another(page, gateway, real):
    ask_for_much(page)
    page.locator("#stop-answer").click()
    expect(page.locator("#notice")).to_have_text("Stopped.")
    wait_for(lambda: float(gateway.ask("/status")[1].split(b'"running":')[1].split(b",")[0]) == 0)
    page.fill("#max_tokens", "5")
    page.locator("#retry").click()
    done(page)
    assert page.locator(".turn").count() == 2


def test_a_schema_holds_and_what_is_wrong_is_said(page):
    page.locator("summary", has_text="JSON schema").click()
    page.fill("#schema", '{"type": "object", "properties"')
    ask(page, "A city")
    expect(page.locator("#notice")).to_contain_text("the JSON schema is not valid JSON")
    page.locator("#clear").click()
    page.fill(
        "#schema", '{"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}'
    )
    ask(page, "Is Paris big?")
    done(page)
    assert re.fullmatch(
        r'\{\s*"big":\s*(true|false)\s*\}', page.locator(".card .text[tabindex]").inner_text()
    )
    page.fill("#temperature", "9")
    ask(page, "And now?")
    expect(page.locator("#notice")).to_contain_text("temperature: input should be less than or equal to 2")


def sent(page: Page) -> list[dict[str, str]]:
    """The messages of the conversation, up to the last question."""
    page.locator("#curl").click()
    expect(page.locator("#notice")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    quoted = re.search(r"-d '(.*)'$", command, re.S)[1]
    return json.loads(quoted.replace("'\\''", "'"))["messages"]


def test_a_new_chat_knows_nothing_of_the_answer_that_was_on_its_way(page):
    ask_for_much(page)
    page.locator("#clear").click()
    page.fill("#max_tokens", "3")
    ask(page, "Hello")
    done(page)
    assert sent(page) == [{"role": "user", "content": "Hello"}]
    assert page.locator(".turn").count() == 2


def test_choosing_another_answer_changes_its_own_turn_only(page):
    page.select_option("#samples", "2")
    page.fill("#temperature", "1.5")
    page.fill("#max_tokens", "6")
    for question in ("One", "Two"):
        ask(page, question)
        done(page)
    texts = page.locator(".card .text[tabindex]").all_text_contents()
    page.locator(".answers").nth(0).locator("input[type=radio]").nth(1).check()
    ask(page, "Three")
    done(page)
    messages = sent(page)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"] for message in messages[1::2]] == [texts[1], texts[2]]


def test_characters_of_several_tokens_are_shown_whole(page):
    text = "\U0001f9ab Hi \u2603!"
    page.locator("summary", has_text="JSON schema").click()
    page.fill("#schema", json.dumps({"const": text}))
    ask(page, "Go on.")
    done(page)
    answer = page.locator(".card .text[tabindex]")
    assert answer.text_content() == f'"{text}"' and answer.locator(".token").count() > 3


def test_what_failed_leaves_nothing_in_the_conversation(page):
    page.fill("#max_tokens", "3")
    page.fill("#temperature", "9")
    ask(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("temperature")
    page.fill("#temperature", "0")
    page.locator("#retry").click()
    done(page)
    assert sent(page) == [{"role": "user", "content": "Hello"}]
    assert page.evaluate("Object.keys(localStorage).includes('pagetide.prompt')") is False


def test_copies_run(page, gateway):
    page.fill("#max_tokens", "3")
    page.fill("#top_k", "4")
    page.locator("#probabilities").uncheck()
    ask(page, 'It\'s "true" that null is nothing.')
    done(page)
    page.locator("#python").click()
    expect(page.locator("#notice")).to_have_text("Copied.")
    code = page.evaluate("navigator.clipboard.readText()")
    assert "extra_body" in code and f'base_url="{gateway.url}/v1"' in code
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and said.stdout.strip() == page.locator(".card .text[tabindex]").inner_text()
    page.locator("#curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    streamed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert streamed.stdout.endswith("data: [DONE]\n\n"), streamed


def test_the_strip_shows_what_the_server_does(page):
    expect(page.locator("#blocks")).to_contain_text(" / 600")
    expect(page.locator("#running")).to_have_text("0")
    page.select_option("#samples", "4")
    ask_for_much(page)
    expect(page.locator("#running")).to_have_text(re.compile("[1-4]"), timeout=20_000)
    expect(page.locator("#batch")).to_have_text(re.compile(r"[1-4]\.\d"), timeout=20_000)
    assert int(page.locator("#blocks").inner_text().split()[0]) > 0
    page.locator("#stop-answer").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.fill("#max_tokens", "20")
    ask(page, "Hello!")
    done(page)
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    found = Axe().run(page)
    serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious] == []


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.fill("#max_tokens", "20")
    ask(page, "Hello! " + "w" * 200)
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_server_with_keys_asks_for_one(real, browser, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    gateway = Gateway(real, "--metrics", real.address.metrics, "--api-keys-file", str(keys))
    try:
        page = browser.new_page()
        page.goto(gateway.url)
        expect(page.locator("#notice")).to_have_text("the API key is missing or wrong")
        page.fill("#key", "secret")
        page.locator("#key").blur()
        expect(page.locator("#sampling input")).to_have_count(10)
        expect(page.locator("#running")).to_have_text(re.compile(r"\d"), timeout=10_000)
        assert gateway.status("/status") == gateway.status("/fields") == 401
        assert gateway.status("/playground") == gateway.status("/") == 200
        page.close()
    finally:
        gateway.stop()


def test_metrics_that_cannot_be_read_are_said(real):
    gateway = Gateway(real, "--metrics", f"{real.address.metrics}, nowhere here:1")
    try:
        status, answer = gateway.ask("/status")
        assert status == 503 and "Triton's metrics cannot be read" in answer["error"]["message"]
    finally:
        gateway.stop()


def test_it_needs_nothing_but_the_gateway(gateway):
    for name in Path(__file__).parents[2].joinpath("backend_src/pagetide/gateway/playground").iterdir():
        assert "http" not in name.read_text().replace("http-equiv", ""), name
        assert gateway.status(f"/playground/{name.name}") == 200
    assert gateway.status("/playground/nothing.js") == 404
    assert gateway.status("/playground/../app.py") == 404
