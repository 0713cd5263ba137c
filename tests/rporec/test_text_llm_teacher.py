import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from rporec.config import ConfigError, TeacherConfig, TextConfig
from rporec.data import Catalog
from rporec.text.llm_teacher import BackboneTeacher, OpenAITeacher, finish
from rporec.text.prompt import ItemWriter
from rporec.text.tokenizer import fit_tokenizer

CATALOG = Catalog(pa.table({"item_id": ["a", "b"], "title": ["Zarnak 1", "Kor 1"], "genre": ["x", "y"]}))
WRITER = ItemWriter(CATALOG, TextConfig())
GOOD = "<think>They like\nx.</think><answer>Zarnak 7</answer>"
KEY = "sk-secret-123"


class Endpoint:
    """A chat endpoint on the loopback interface that answers from a script, then with `GOOD`."""

    def __init__(self, *script: tuple[int, dict, object]) -> None:
        self.script = list(script)
        self.requests: list[tuple[dict, dict]] = []
        self.in_flight = self.peak = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.in_flight += 1
                    endpoint.peak = max(endpoint.peak, endpoint.in_flight)
                    endpoint.requests.append((dict(self.headers), body))
                    status, headers, answer = endpoint.script.pop(0) if endpoint.script else (200, {}, message(GOOD))
                endpoint.wait.wait(0.02)
                with endpoint.lock:
                    endpoint.in_flight -= 1
                payload = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.wait = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def message(text):
    return {"choices": [{"message": {"content": text}}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def ask(url, samples=1, **options):
    config = TeacherConfig(kind="openai", base_url=url, model="m", api_key_env="TEACHER_KEY")
    teacher = OpenAITeacher(WRITER, config, max_tokens=99, backoff=0.01, **options)

    async def collect():
        return [r async for r in teacher.rationales((sample, [0, 0], 1) for sample in range(samples))]

    return asyncio.run(collect())


def test_a_rationale_keeps_the_teachers_cot_and_takes_the_target_as_answer():
    with Endpoint() as endpoint:
        (rationale,) = ask(endpoint.url)
        headers, body = endpoint.requests[0]
    assert rationale.text == "<think> They like x.</think><answer> Kor 1 ; y</answer>"
    assert (rationale.sample, rationale.teacher, rationale.model) == (0, "openai", "m")
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["max_tokens"]) == ("m", 99)
    question = body["messages"][0]["content"]
    assert "1. Zarnak 1 (genre: x)\n2. Zarnak 1" in question
    assert "next: Kor 1 (genre: y)" in question


def test_many_samples_are_asked_at_once_but_boundedly():
    with Endpoint() as endpoint:
        rationales = ask(endpoint.url, samples=20, concurrency=3)
        assert sorted(r.sample for r in rationales) == list(range(20))
        assert 1 < endpoint.peak <= 3


def test_rate_limits_and_server_errors_are_retried():
    with Endpoint((429, {"Retry-After": "0"}, {}), (500, {}, {}), (503, {}, {})) as endpoint:
        assert ask(endpoint.url)[0].text is not None
        assert len(endpoint.requests) == 4


def test_an_unusable_answer_is_recorded_as_such_and_not_asked_again():
    with Endpoint((200, {}, message("no tags")), (200, {}, {"error": "odd"})) as endpoint:
        assert [r.text for r in ask(endpoint.url, samples=2)] == [None, None]


def test_a_refused_key_ends_with_one_line_that_does_not_hold_it(caplog):
    with Endpoint((401, {}, {"error": f"bad key {KEY}"})) as endpoint, caplog.at_level("DEBUG"):
        with pytest.raises(ConfigError, match=r"refused the key in \$TEACHER_KEY \(HTTP 401\)") as error:
            ask(endpoint.url)
        assert len(endpoint.requests) == 1
    assert KEY not in str(error.value)
    assert KEY not in caplog.text
    assert "\n" not in str(error.value)


def test_what_was_answered_before_a_failure_is_not_lost():
    answered = []

    async def collect(url):
        config = TeacherConfig(kind="openai", base_url=url, model="m", api_key_env="TEACHER_KEY")
        async for rationale in OpenAITeacher(WRITER, config, 9, concurrency=1).rationales([(0, [0], 1), (1, [0], 1)]):
            answered.append(rationale.sample)

    with (
        Endpoint((200, {}, message(GOOD)), (400, {}, {})) as endpoint,
        pytest.raises(ConfigError, match="refused the request"),
    ):
        asyncio.run(collect(endpoint.url))
    assert answered == [0]


def test_an_endpoint_that_stays_away_is_named():
    with Endpoint() as endpoint:
        url = endpoint.url
    with pytest.raises(ConfigError, match=r"failed 2 times \(ConnectError\); check teacher.base_url"):
        ask(url, retries=1)


def test_without_the_variable_no_key_is_sent(monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    with Endpoint() as endpoint:
        ask(endpoint.url)
        assert "Authorization" not in endpoint.requests[0][0]


@pytest.mark.parametrize(
    ("text", "cot"),
    [
        ("<think>own thoughts</think><think>a</think><answer>b</answer> more", "a"),
        ("<think>a</think>\n<answer>b", "a"),  # the stop string was cut off
        ("<think> </think><answer>b</answer>", None),
        ("<think>a<answer>b</answer></think>", None),
        ("a", None),
        ("", None),
    ],
)
def test_finish_keeps_the_last_cot_in_the_asked_form(text, cot):
    expected = None if cot is None else f"<think> {cot}</think><answer> Kor 1 ; y</answer>"
    assert finish(text, 1, WRITER) == expected


def test_the_backbone_teacher_shows_history_and_target_within_the_context():
    tokenizer = fit_tokenizer(["x"], 300)
    teacher = BackboneTeacher(WRITER, tokenizer, "own", 1200, 100)
    ids = teacher.prompt_ids([0] * 100, 1)
    assert len(ids) <= 1100
    assert "Zarnak 1 (genre: x)" in tokenizer.decode(ids)
    assert "next: Kor 1 (genre: y)" in tokenizer.decode(ids)
    assert teacher.rationale(5, ids, GOOD, 1).text == "<think> They like x.</think><answer> Kor 1 ; y</answer>"
