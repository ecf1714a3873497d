"""The web page in a browser, against the running service; and against a model that means harm."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright

from tests.integration.conftest import Engine
from tests.integration.server import Server

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE_MS = 30_000
SOON_S = 5.0
STALL_MS = 5000
"""Far above what it takes (some tens), far below what anything that grows with the square of a length would."""
KEY = "a-key-that-must-stay-here"
ATTACKS = (
    "<img src=x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)>",
    "[click](javascript:alert(4)) [data](data:text/html,<script>alert(5)</script>) ![i](http://127.0.0.1:9/x.png)",
    "<a href='javascript:alert(6)'>x</a> <javascript:alert(7)> [x]( javascript:alert(8)) **<b onclick=alert(9)>b</b>**",
    "```html\n<script>alert(10)</script>\n```\n\n| <img src=x> | b |\n|--|--|\n| <iframe srcdoc=x> | `<i>` |",
    "</div></article><style>*{display:none}</style><form action=//x><input name=k>",
)
ALLOWED = set(
    "P STRONG EM DEL CODE BR A SPAN H3 H4 H5 H6 HR BLOCKQUOTE UL OL LI DIV TABLE THEAD TBODY TR TH TD".split()
)
ALLOWED |= {"FIGURE", "FIGCAPTION", "PRE", "BUTTON"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in the PATH")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield made
        made.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1280, "height": 860}, permissions=["clipboard-write"])
    made.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Iterator[Page]:
    """The page, loaded. Whatever a test does, nothing may break the policy, fail, or open a window."""
    made, faults = context.new_page(), []
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    made.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    made.goto(server.url)
    expect(made.locator("#model")).to_have_value("demo")
    yield made
    # The console also tells of requests that a test lets fail.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def wait_for_answers(page: Page, count: int = 1) -> None:
    expect(page.locator(".message.assistant[aria-busy=false]")).to_have_count(count)


def set_max_tokens(page: Page, value: int) -> None:
    page.click("#toggle-settings")
    page.fill("#sampling-max_tokens", str(value))
    page.click("#close-settings")


def answer_with(page: Page, *deltas: dict[str, Any], finish_reason: str = "stop") -> list[dict[str, Any]]:
    """Let a model say this. Returns the list of bodies that it is asked with."""
    bodies: list[dict[str, Any]] = []
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish_reason})
    events = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)

    def fulfill(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=f"{events}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", fulfill)
    return bodies


def go_on_for_long(page: Page) -> None:
    """Let the model answer for longer than any test lasts."""

    def more(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 4000}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", more)


def test_an_answer_comes_with_its_times(page: Page):
    ask(page, "What is 17 + 25?")
    wait_for_answers(page)
    expect(page.locator(".assistant .prose")).not_to_be_empty()
    told = dict(
        zip(
            page.locator(".metrics dt").all_inner_texts(),
            page.locator(".metrics dd").all_inner_texts(),
            strict=True,
        )
    )
    assert {"TTFT", "Output", "Prompt", "Cached", "Queue"} <= told.keys()
    assert told["TTFT"].endswith("s") and told["Output"].endswith(" tok")
    expect(page.locator("#context")).to_contain_text("tokens")
    ask(page, "And 3 more?")
    wait_for_answers(page, 2)
    cached = page.locator(".message.assistant").nth(1).locator(".metrics div", has_text="Cached").locator("dd")
    assert int(cached.inner_text().split()[0]) > 0


@pytest.mark.parametrize("way", ["escape", "button", "clear"])
def test_stop_ends_the_request_on_the_server(page: Page, free_engine: Engine, way: str):
    go_on_for_long(page)
    ask(page, "Hello")
    told = page.locator(".metrics div", has_text="Output").locator("dd")
    for least in (20, 40):  # it streams
        while int(told.inner_text().split()[0]) < least:
            page.wait_for_timeout(20)
    # Not before: while this waits, nobody would let the page's request through to the server.
    free_engine.wait_for(lambda stats: stats["num_running"] == 1 and stats["num_owned_blocks"] > 0)
    if way == "escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop" if way == "button" else "#clear")
    assert free_engine.wait_until_free() < SOON_S
    if way != "clear":
        expect(page.locator(".metrics")).to_contain_text("stopped")
        expect(page.locator(".metrics")).to_contain_text("Speed")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()


def test_thinking_is_folded(page: Page):
    answer_with(page, {"reasoning_content": "Let me *see*. "}, {"reasoning_content": "Yes."}, {"content": "42"})
    ask(page, "What is it?")
    wait_for_answers(page)
    expect(page.locator(".thinking summary")).to_contain_text("Thought for")
    expect(page.locator(".thought")).to_be_hidden()
    page.click(".thinking summary")
    expect(page.locator(".thought")).to_have_text("Let me see. Yes.")
    expect(page.locator(".prose")).to_have_text("42")


def test_tools_are_called_and_answered(page: Page):
    page.click("#toggle-settings")
    page.fill("#tools", "[{")
    expect(page.locator("#tools-help")).to_contain_text("JSON")
    page.click("#example-tool")
    expect(page.locator("#tools-help")).to_have_text("1 function")
    page.select_option("#tool-choice", "required")
    page.select_option("#thinking", "false")
    page.click("#close-settings")
    ask(page, "What is the weather in Paris?")
    wait_for_answers(page)
    expect(page.locator(".call-name").first).to_contain_text("get_weather")
    assert "city" in json.loads(page.locator(".call pre").first.inner_text())
    page.locator(".call textarea").first.fill("18 degrees")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send the result").click()
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles[:3] == ["user", "assistant", "tool"] and sent.value.post_data_json["tools"]
    wait_for_answers(page, 2)


def test_what_a_model_says_stays_text(page: Page, context: BrowserContext):
    requests: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    evil = "<img src=x onerror=alert(0)>"
    deltas: list[dict[str, Any]] = [{"reasoning_content": f"{attack}\n\n"} for attack in ATTACKS]
    deltas += [{"content": f"{attack}\n\n"} for attack in ATTACKS]
    call = {"index": 0, "id": evil, "function": {"name": evil, "arguments": json.dumps({"a": evil})}}
    answer_with(page, *deltas, {"tool_calls": [call]}, finish_reason="tool_calls")
    ask(page, evil)
    wait_for_answers(page)
    page.click(".thinking summary")
    expect(page.locator(".said")).to_have_text(evil)
    found = page.evaluate(
        """() => [...document.querySelectorAll('.prose, .thought')].flatMap((each) => [...each.querySelectorAll('*')])
        .map((each) => [each.tagName, each.getAttributeNames(), each.getAttribute('href')])"""
    )
    assert {tag for tag, _, _ in found} <= ALLOWED
    for tag, names, href in found:
        assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc")], tag
        assert href is None or href.startswith(("http://", "https://", "mailto:"))
    assert page.locator(".message :is(img, script, iframe, svg, style, form:not(.editing))").count() == 0
    expect(page.locator(".call-name")).to_contain_text(evil)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": evil}}))
    ask(page, "again")
    wait_for_answers(page, 2)
    expect(page.locator(".failure:visible")).to_have_text(evil)
    assert all(url.startswith((page.url, "blob:")) for url in requests), requests


def test_no_text_stalls_the_page(page: Page):
    pieces = "*a |**|_|`|[|[a](|<https://|~~|~|# |> |- |``` | |![|\\|1. a\n  |_a_ *b* ~~|\t|:-".split("|")
    for piece in [*pieces, "|", "|-"]:
        source = piece * (50_000 // len(piece))
        took_ms = page.evaluate(
            """async (source) => {
                const { showMarkdown } = await import(new URL('playground/markdown.js', document.baseURI));
                const start = performance.now();
                const parent = document.createElement('div');
                showMarkdown(parent, source);
                showMarkdown(parent, '# ' + source + 'x\\n' + source + '`x');
                showMarkdown(parent, '|a|b|\\n' + source + 'x\\n> ' + source);
                return performance.now() - start;
            }""",
            source,
        )
        assert took_ms < STALL_MS, piece


def test_the_key_is_sent_in_a_header_and_is_nowhere_else(page: Page, context: BrowserContext, tmp_path: Path):
    sent: list[Request] = []
    context.on("request", lambda request: sent.append(request))  # noqa: PLW0108  # playwright marks the function
    page.click("#toggle-settings")
    assert page.get_attribute("#api-key", "type") == "password"
    page.fill("#api-key", KEY)
    page.press("#api-key", "Enter")
    page.fill("#sampling-max_tokens", "8")
    page.click("#close-settings")
    ask(page, "Hello")
    wait_for_answers(page)
    page.click("#show-fleet")
    expect(page.locator(".replicas tbody tr")).not_to_have_count(0)
    page.click("#show-chat")
    page.get_by_role("button", name="View as code").click()
    for language in ("curl", "Python"):
        page.get_by_role("button", name=language, exact=True).click()
        code = page.inner_text("#request-code")
        assert "API_KEY" in code and KEY not in code
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "conversation.json")
    exported = json.loads((tmp_path / "conversation.json").read_text())
    assert [entry["role"] for entry in exported["entries"]] == ["user", "assistant"]
    assert KEY not in json.dumps(exported)
    assert {request.url.rpartition("/")[2] for request in sent} >= {"models", "completions", "status"}
    for request in sent:
        assert KEY not in request.url + (request.post_data or "")
        if "/playground/" not in request.url and not request.url.startswith("blob:"):
            assert request.all_headers()["authorization"] == f"Bearer {KEY}"
            assert "referer" not in request.all_headers()
    assert KEY not in page.url and context.cookies() == []
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_is_asked_for_where_it_is_needed(page: Page):
    error = {"error": {"message": "there is no API key", "type": "x", "param": None, "code": "invalid_api_key"}}
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json=error))
    page.reload()
    expect(page.locator("#api-key")).to_be_focused()
    expect(page.locator("#api-key-fault")).to_have_text("The server wants a key.")
    page.fill("#api-key", "another")
    page.press("#api-key", "Enter")
    expect(page.locator("#api-key-fault")).to_contain_text("does not take this key")
    ask(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("wants an API key")
    page.unroute("**/v1/models")
    page.fill("#api-key", KEY)
    page.press("#api-key", "Enter")
    expect(page.locator("#model")).to_have_value("demo")
    expect(page.locator("#api-key-fault")).to_be_empty()


def test_each_model_has_its_own_defaults_and_stays_chosen(page: Page):
    models = [{"id": "demo", "max_model_len": 1024, "default_sampling_params": {"temperature": 0.7}}]
    models += [{"id": "short", "max_model_len": 512, "default_sampling_params": {"temperature": 0.3, "max_tokens": 64}}]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    page.reload()
    expect(page.locator("#model option")).to_have_text(["demo", "short"])
    page.select_option("#model", "short")
    page.click("#toggle-settings")
    expect(page.locator("#sampling-temperature")).to_have_attribute("placeholder", "0.3")
    expect(page.locator("#sampling-max_tokens")).to_have_attribute("placeholder", "64")
    with page.expect_response("**/v1/models"):  # another key, so the list is asked for again
        page.fill("#api-key", KEY)
        page.press("#api-key", "Enter")
    expect(page.locator("#model")).to_have_value("short")
    page.click("#close-settings")
    usage = {"choices": [], "usage": {"total_tokens": 100, "prompt_tokens": 90, "completion_tokens": 10}}
    events = f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello")
    assert sent.value.post_data_json["model"] == "short"
    expect(page.locator("#context")).to_have_text("100 of 512 tokens")


def test_models_without_replicas_and_lost_replicas_are_shown(page: Page):
    load = {"num_running": 2, "num_waiting": 1, "num_free_blocks": 30, "num_blocks": 40}
    load |= {"step_s": 0.01, "prefill_tokens_per_s": 900.0}
    live = {"replica_id": "aaa", "state": "RUNNING", "age_s": 0.1, "load": load}
    lost = {"replica_id": "bbb", "state": None, "age_s": 9.0, "load": load}
    many = {"name": "many", "num_queued": 0, "target_num_replicas": 2, "min_replicas": 1, "max_replicas": 4}
    none = {"name": "none", "num_queued": 3, "target_num_replicas": 0, "min_replicas": 0, "max_replicas": 1}
    models = [many | {"replicas": [live, lost]}, none | {"replicas": []}]
    page.route("**/status", lambda route: route.fulfill(json={"models": models}))
    page.click("#show-fleet")
    first, second = page.locator(".fleet-model").nth(0), page.locator(".fleet-model").nth(1)
    expect(first.locator(".figure", has_text="Replicas").locator("dd")).to_have_text("1 of 2")
    expect(first.locator("tr.silent")).to_contain_text("gone")
    expect(first.locator(".figure", has_text="Running").locator("dd")).to_have_text("2")  # of who is there
    expect(second.locator("table")).to_be_hidden()
    expect(second).to_contain_text("None runs: the next request starts one.")
    models[0] |= {"replicas": [live | {"state": None}], "target_num_replicas": None}  # the controller does not answer
    expect(first.locator("tbody tr")).to_have_count(1)
    expect(first.locator("tbody tr")).to_contain_text("not known")


def test_a_refusal_says_when_to_come_back(page: Page):
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json={"error": {"message": "too many"}}),
    )
    ask(page, "Hello")
    wait_for_answers(page)
    expect(page.locator(".failure")).to_have_text("too many Try again in 7 s.")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".failure:visible")).to_have_count(0)
    wait_for_answers(page)


def test_a_conversation_is_edited_retried_cleared_and_brought_back(page: Page):
    bodies = answer_with(page, {"content": "one"})
    for text in ("first", "second"):
        ask(page, text)
        wait_for_answers(page, 1 if text == "first" else 2)
    page.get_by_role("button", name="Retry").nth(1).click()
    wait_for_answers(page, 2)
    assert bodies[2]["messages"] == bodies[1]["messages"]
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("other")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".message")).to_have_count(2)
    wait_for_answers(page)
    assert bodies[3]["messages"] == [{"role": "user", "content": "other"}]
    page.click("#clear")
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message")).to_have_count(2)
    page.locator(".assistant").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()


def test_every_parameter_arrives(page: Page):
    bodies = answer_with(page, {"content": "one"})
    page.click("#toggle-settings")
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "max_tokens": 9, "seed": 7}
    values |= {"presence_penalty": -0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1}
    for name, value in values.items():
        page.fill(f"#sampling-{name}", str(value))
    page.select_option("#thinking", "false")
    page.fill("#system-prompt", "Be brief.")
    ask(page, "Hello")
    wait_for_answers(page)
    assert bodies[0].items() >= values.items()
    assert bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.fill("#sampling-top_p", "7")
    ask(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("top_p")
    assert len(bodies) == 1


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_code_of_a_request_runs(page: Page, language: str):
    page.click("#toggle-settings")
    page.fill("#sampling-max_tokens", "8")
    page.fill("#sampling-top_k", "5")
    ask(page, 'It\'s "quoted" $HOME `x` \\ \n été 🙂')
    wait_for_answers(page)
    page.get_by_role("button", name="View as code").click()
    page.get_by_role("button", name=language, exact=True).click()
    command = ["bash", "-c"] if language == "curl" else [sys.executable, "-c"]
    environment = os.environ | {"API_KEY": KEY}
    done = subprocess.run(
        [*command, page.inner_text("#request-code")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ('"finish_reason":"length"' in done.stdout or "[DONE]" in done.stdout) if language == "curl" else done.stdout


def test_the_fleet_is_shown_as_it_is(page: Page, free_engine: Engine):
    go_on_for_long(page)
    ask(page, "Hello")
    expect(page.locator(".metrics div", has_text="Output")).to_be_visible()
    free_engine.wait_for(lambda stats: stats["num_running"] == 1)
    page.click("#show-fleet")
    figure: Callable[[str], Any] = lambda name: page.locator(".figure", has_text=name).locator("dd")  # noqa: E731
    expect(figure("Replicas")).to_have_text("1 of 1")
    expect(figure("Running")).to_have_text("1")
    expect(page.locator(".replicas tbody tr")).to_have_count(1)
    expect(page.locator(".replicas tbody td").first).to_have_text("running")
    page.keyboard.press("Escape")
    expect(figure("Running")).to_have_text("0")
    assert page.locator(".sparkline .line").first.get_attribute("points")
    page.route("**/status", lambda route: route.abort())
    expect(page.locator("#fleet-note")).to_contain_text("The server does not answer.")


def test_it_fits_a_narrow_screen(page: Page):
    page.set_viewport_size({"width": 360, "height": 740})
    wide = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n| a | b |\n|--|--|\n| " + "z " * 90 + "| " + "w" * 90 + " |"
    call = {"index": 0, "id": "c", "function": {"name": "n" * 200, "arguments": '{"a": "' + "v" * 300 + '"}'}}
    answer_with(page, {"reasoning_content": "r" * 300}, {"content": wide}, {"tool_calls": [call]})
    is_too_wide = "document.documentElement.scrollWidth > 360 || document.querySelector('#scroller').scrollWidth > 360"
    assert not page.evaluate(is_too_wide)
    ask(page, "q" * 300)
    wait_for_answers(page)
    page.click(".thinking summary")
    assert not page.evaluate(is_too_wide)
    for button in ("#toggle-settings", "#close-settings", "#show-fleet"):
        page.click(button)
        assert not page.evaluate(is_too_wide)
        # What is covered cannot have the focus.
        assert page.evaluate("document.querySelector('#chat').inert") is (button == "#toggle-settings")
    expect(page.locator(".replicas tbody tr")).not_to_have_count(0)
    assert page.evaluate("document.querySelector('#fleet').scrollWidth") <= 360


def test_it_can_be_used_with_a_keyboard_and_a_screen_reader(page: Page):
    expect(page.locator("#prompt")).to_be_focused()
    page.focus(":is(a, button, input, select, textarea) >> nth=0")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message field"
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    answer_with(page, {"content": "Hello"}, {"content": " there"})
    page.keyboard.type("Hi")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#announcer")).to_have_text("Hello there")
    assert page.locator(".said").inner_text() == "Hi\nyou"
    page.click("#toggle-settings")
    expect(page.locator("#close-settings")).to_be_focused()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, summary')].filter((each) =>
        each.checkVisibility() && !(each.textContent.trim() || each.labels?.length || each.ariaLabel))
        .map((each) => each.outerHTML)"""
    )
    assert nameless == []
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#toggle-settings")).to_be_focused()


def test_dark_and_light_go_by_the_system_unless_chosen(page: Page):
    background = "Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0])"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) < 60
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) > 200
    page.click("#theme")
    page.click("#theme")
    assert page.inner_text("#theme") == "Dark" and page.evaluate(background) < 60
    page.reload()
    assert page.evaluate(background) < 60
