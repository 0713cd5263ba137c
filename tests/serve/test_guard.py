"""Token, size, rate and the log, around an ASGI app of a few lines."""

from __future__ import annotations

import logging

import httpx
import pytest
from fastapi import FastAPI, Request

from rporec.config import ConfigError, ServeConfig
from serve.guard import Guard, Metrics, Rates, read_token


def client(token: str | None = None, **config) -> httpx.AsyncClient:
    app = FastAPI()

    @app.post("/echo/{word}")
    async def echo(word: str, request: Request) -> int:
        return len(await request.body())

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret of the house")

    @app.get("/healthz")
    async def health() -> str:
        return "ok"

    guard = Guard(app, ServeConfig(**config), token, Metrics())
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test")


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", "Basic right", "Bearer righ", "Bearer rightt"])
async def test_without_the_token_nothing_but_health_answers(header: str) -> None:
    async with client("right") as http:
        answer = await http.post("/echo/a", headers={"Authorization": header} if header else {})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
        assert (await http.get("/healthz")).status_code == 200


async def test_with_the_token_it_answers() -> None:
    async with client("right") as http:
        assert (await http.post("/echo/a", headers={"Authorization": "bearer right"})).status_code == 200


async def test_a_body_is_too_large_whether_it_says_so_or_not() -> None:
    async def pieces():
        for _ in range(4):
            yield b"x" * 512

    async with client(max_body_bytes=1024) as http:
        assert (await http.post("/echo/a", content=b"x" * 1024)).json() == 1024
        assert (await http.post("/echo/a", content=b"x" * 1025)).status_code == 413
        assert (await http.post("/echo/a", content=pieces())).status_code == 413


async def test_who_asks_too_often_is_told_when_to_come_back() -> None:
    async with client(requests_per_minute=3) as http:
        statuses = [(await http.post("/echo/a")).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert 1 <= int((await http.post("/echo/a")).headers["retry-after"]) <= 21
        assert (await http.get("/healthz")).status_code == 200


def test_a_bucket_fills_again() -> None:
    rates = Rates(60)
    assert not any(rates.wait("a", 0.0) for _ in range(60))
    assert rates.wait("a", 0.0) == pytest.approx(1.0)
    assert rates.wait("b", 0.0) == 0.0
    assert rates.wait("a", 0.5) == pytest.approx(0.5)
    assert rates.wait("a", 1.0) == 0.0


async def test_neither_response_nor_access_log_tell_more_than_they_should(caplog) -> None:
    async with client() as http:
        with caplog.at_level(logging.INFO, "ray.serve"):
            answer = await http.get("/broken")
            await http.post("/echo/alice@example.org?token=abc")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    access = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert any("/echo/{word}" in line for line in access)
    assert not any("alice" in line or "abc" in line for line in access)
    assert any(record.exc_info for record in caplog.records)  # whoever runs it finds the traceback there


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RPOREC_SERVE_TOKEN", raising=False)
    assert read_token(ServeConfig()) is None
    monkeypatch.setenv("RPOREC_SERVE_TOKEN", "from-environment")
    assert read_token(ServeConfig()) == "from-environment"
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"serve\.token_file"):
        read_token(ServeConfig(token_file=str(path)))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(ServeConfig(token_file=str(path)))
    path.write_text("from-file\n")
    assert read_token(ServeConfig(token_file=str(path))) == "from-file"
