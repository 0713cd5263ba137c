"""The page in a real browser, on a real deployment of a small trained run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("RPOREC_SCREENSHOTS")  # a folder: the docs' pictures are taken there

pytestmark = [
    pytest.mark.browser,
    pytest.mark.engine,
    pytest.mark.cluster,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]

PATIENCE = 60_000  # ms
PHONE = {"width": 360, "height": 740}
# How long the reasoning was, each time that it changed before any item was there.
RECORD = """() => {
  window.lengths = [];
  const text = document.querySelector("#reasoning [role=log]");
  new MutationObserver(() => {
    if (document.querySelector("#reasoned").hidden) window.lengths.push(text.textContent.length);
  }).observe(text, { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def provoked() -> list[str]:
    """Parts of addresses whose failing a test brings about."""
    return []


@pytest.fixture
def page(browser, served, provoked):
    """The page, freshly opened. At the end: nothing failed in it, nothing was asked of another origin."""
    faults: list[str] = []

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning") and not any(part in message.location["url"] for part in provoked):
            faults.append(message.text)

    def on_request(request: Any) -> None:
        if not request.url.startswith(f"{served.url}/"):
            faults.append(f"request to {request.url}")

    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("console", on_console)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", on_request)
    page.goto(f"{served.url}/")
    expect(page.locator("#service")).to_contain_text("Ready", timeout=PATIENCE)
    yield page
    context.close()
    assert not faults


def pick_user(page: Any) -> str:
    page.click("#user-search")
    option = page.locator("#user-options [role=option]").first
    user = option.evaluate("option => option.firstChild.textContent")
    option.click()
    return user


def recommend(page: Any, mode: str) -> list[str]:
    """Press the button and return the item ids of the answer: `mode` is reasoned or plain."""
    page.set_checked("#reason", mode == "reasoned")
    page.click("#recommend")
    expect(page.locator("#stop")).to_be_hidden(timeout=PATIENCE)
    rows = page.locator(f"#{mode} .items > li")
    expect(rows).to_have_count(10)
    return rows.evaluate_all("rows => rows.map((row) => row.dataset.item)")


def shoot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.mouse.move(0, 0)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{scheme}.png", full_page=True)


def answer(*items: tuple[str, str], **more: Any) -> str:
    scored = [{"item_id": id, "title": title, "score": -float(rank)} for rank, (id, title) in enumerate(items)]
    empty = {"cot": None, "answer": None, "version": "0.0", "fallback": None, "warnings": [], "timings_ms": {}}
    return json.dumps({"items": scored, **empty, **more})


def test_reasoning_is_shown_as_it_is_written_and_then_the_items(page):
    pick_user(page)
    page.evaluate(RECORD)
    items = recommend(page, "reasoned")
    assert len(set(items)) == 10
    assert len(set(page.evaluate("lengths"))) >= 2
    expect(page.locator("#cot")).not_to_be_empty()
    expect(page.locator("#reasoned .items + .note")).to_contain_text("reasoned for")


def test_switching_reasoning_off_shows_both_answers_and_what_changed(page):
    pick_user(page)
    reasoned = recommend(page, "reasoned")
    expect(page.locator("#plain")).to_be_hidden()
    plain = recommend(page, "plain")
    expect(page.locator("#reasoned")).to_be_visible()
    new = len(set(reasoned) - set(plain))
    expect(page.locator("#changes")).to_contain_text(f"{new} new, {new} dropped out")
    expect(page.locator("#plain .mark.gone")).to_have_count(new)
    expect(page.locator("#plain .items + .note")).not_to_contain_text("reasoned for")
    shoot(page, "page")


def test_answers_are_marked_against_each_other_and_stay_text(page):
    image = "<img src=x onerror=alert(1)>"
    reasoned = answer(("a", image), ("b", "B"), ("c", "C"), ("e", "E"), cot=image, answer="", fallback="timeout")
    plain = answer(("b", "B"), ("a", image), ("d", "D"), ("e", "E"), warnings=["left out"])

    def fulfil(route: Any) -> None:
        if route.request.post_data_json["stream"]:
            route.fulfill(content_type="text/event-stream", body=f"event: result\ndata: {reasoned}\n\n")
        else:
            route.fulfill(content_type="application/json", body=plain)

    page.route("**/v1/recommend", fulfil)
    page.click("#recommend")
    expect(page.locator("#reasoned .notices")).to_have_text(
        "The reasoning took too long, so the history alone decided."
    )
    page.uncheck("#reason")
    page.click("#recommend")
    expect(page.locator("#reasoned .mark")).to_have_text(["up 1", "down 1", "new", "same"])
    expect(page.locator("#plain .mark")).to_have_text(["", "", "drops out", ""])
    expect(page.locator("#plain .notices")).to_have_text("left out")
    expect(page.locator("#reasoned .title b").first).to_have_text(image)
    expect(page.locator("#cot")).to_have_text(image)


def test_feedback_is_stored_for_the_picked_user_and_for_a_visitor(page, served):
    def stored() -> list[tuple[str, str, str]]:
        parts = sorted((served.run / "feedback").rglob("*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        return [(row["user_id"], row["item_id"], row["event"]) for row in rows]

    def vote(event: str) -> str:
        item = recommend(page, "plain")[1]
        row = page.locator(f'#plain .items > li[data-item="{item}"]')
        row.locator(f"[name={event}]").click()
        expect(row.locator(".stored")).to_contain_text(f"Stored: {event} by")
        expect(row.locator(f"[name={event}]")).to_have_attribute("aria-pressed", "true")
        return item

    user = pick_user(page)
    assert (user, vote("like"), "like") in stored()
    page.click("#clear")
    visitor = page.evaluate("localStorage.getItem('visitor')")
    expect(page.locator("#who")).to_contain_text(visitor)
    assert (visitor, vote("dislike"), "dislike") in stored()


def test_history_that_is_clicked_together_is_what_is_sent(page):
    page.click("#item-search")
    for position in (0, 1, 2):
        page.locator("#item-options [role=option]").nth(position).click()
        page.click("#item-search")
    page.keyboard.press("Escape")
    names = page.locator("#history .name").all_inner_texts()
    page.locator("#history [name=earlier]").nth(1).click()
    page.locator("#history [name=remove]").nth(2).click()
    expect(page.locator("#history .name")).to_have_text([names[1], names[0]])
    with page.expect_request("**/v1/recommend") as asked:
        shown = recommend(page, "plain")
    sent = asked.value.post_data_json["history"]
    assert len(sent) == 2
    assert not set(sent) & set(shown)


def test_keyboard_alone_goes_the_whole_way(page):
    def tab_to(selector: str) -> None:
        for _ in range(400):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("#user-search")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#user-search")).to_have_attribute("aria-activedescendant", "user-options-0")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#user-search")).to_have_attribute("aria-activedescendant", "user-options-1")
    page.keyboard.press("Enter")
    expect(page.locator("#history li").first).to_be_visible()
    tab_to("#recommend")
    page.keyboard.press("Enter")
    expect(page.locator("#reasoned .items > li")).to_have_count(10, timeout=PATIENCE)
    tab_to("#reasoned [name=like]")
    page.keyboard.press("Space")
    expect(page.locator("#reasoned .stored").first).to_contain_text("Stored: like")


def test_request_can_be_stopped_and_a_new_one_takes_its_place(page):
    held: list[Any] = []
    page.route("**/v1/recommend", lambda route: held.append(route))
    page.click("#recommend")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#recommend")).to_be_focused()
    page.click("#recommend")
    page.uncheck("#reason")
    with page.expect_event("requestfailed") as cancelled:
        page.click("#recommend")
    assert cancelled.value.post_data_json["reason"]
    held[-1].fulfill(content_type="application/json", body=answer(("a", "A")))
    expect(page.locator("#plain .title b")).to_have_text("A")
    expect(page.locator("#error")).to_be_hidden()


def test_problem_is_one_line_and_a_token_is_asked_for(page, provoked):
    provoked += ["/v1/recommend", "/v1/users"]
    problem = json.dumps({"title": "Service Unavailable", "status": 503, "detail": "the queue is full."})
    headers = {"Retry-After": "2", "Content-Type": "application/problem+json"}
    page.route("**/v1/recommend", lambda route: route.fulfill(status=503, headers=headers, body=problem))
    page.click("#recommend")
    expect(page.get_by_role("alert")).to_have_text("Service Unavailable: the queue is full; try again in 2 s.")

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, body="")

    page.route("**/v1/users*", guard)
    page.click("#user-search")
    for token in ("wrong", "right"):
        page.get_by_label("Bearer token").fill(token)
        page.keyboard.press("Enter")
        if token == "wrong":
            expect(page.get_by_text("The token was refused.")).to_be_visible()
    expect(page.locator("#user-options [role=option]").first).to_be_visible()
    assert page.evaluate("sessionStorage.token") == "right"
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")


def test_events_are_read_however_the_stream_is_cut(page):
    stream = (
        ': comment\n\nevent: token\r\ndata: {"text": "é 🙂"}\r\n\r\n'
        'data: {"a":\ndata: 1}\nevent: result\n\nevent: token\rdata: {"text": "\\n"}\r\rdata: {"unfinished": 1}\n'
    )
    read = page.evaluate(
        """async (text) => {
          const { serverSentEvents } = await import("/page/service.js");
          const bytes = new TextEncoder().encode(text);
          const all = [];
          for (let size = 1; size <= bytes.length; size++) {
            const body = new ReadableStream({ start(controller) {
              for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
              controller.close();
            } });
            const events = [];
            for await (const { event, data } of serverSentEvents(body)) events.push([event, data]);
            all.push(events);
          }
          return all;
        }""",
        stream,
    )
    assert len(read) == len(stream.encode())
    assert all(
        events == [["token", {"text": "é 🙂"}], ["result", {"a": 1}], ["token", {"text": "\n"}]] for events in read
    )


def test_phone_has_no_horizontal_scroll(page, served):
    def width() -> int:
        return page.evaluate("document.documentElement.scrollWidth")

    page.set_viewport_size(PHONE)
    page.click("#user-search")
    expect(page.locator("#user-options [role=option]").first).to_be_visible()
    assert width() == PHONE["width"]
    pick_user(page)
    recommend(page, "reasoned")
    recommend(page, "plain")
    assert width() == PHONE["width"]
    shoot(page, "phone")
    page.goto(f"{served.url}/docs")
    expect(page.locator("#schemas article").first).to_be_visible()
    assert width() == PHONE["width"]


def test_docs_hold_every_operation_and_every_schema(page, served):
    api = httpx.get(f"{served.url}/openapi.json", timeout=30).json()
    page.goto(f"{served.url}/docs")
    operations = {f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods}
    expect(page.locator("#operations article")).to_have_count(len(operations))
    assert set(page.locator("#operations h2").all_inner_texts()) == operations
    assert set(page.locator("#schemas h2").all_inner_texts()) == set(api["components"]["schemas"])
    curls = page.locator("#operations pre").all_inner_texts()
    assert any("--data" in curl and f"{served.url}/v1/recommend'" in curl for curl in curls)
    targets = "links => links.filter((link) => !document.getElementById(link.hash.slice(1))).map((link) => link.hash)"
    assert page.locator('main a[href^="#"]').evaluate_all(targets) == []
    shoot(page, "docs")
