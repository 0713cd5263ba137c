"""Data under a URL comes whole or not at all."""

from __future__ import annotations

import http.server
import threading
from functools import partial

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from rporec.data import DataError
from rporec.data.remote import fetch, is_url


@pytest.fixture
def bucket():
    """A bucket of fsspec's in-memory file system, as object stores are: folders are prefixes of names."""
    system = fsspec.filesystem("memory")
    system.pipe({"/bucket/log/interactions.csv": b"user_id,item_id\n", "/bucket/log/more/items.csv": b"x" * 10_000_000})
    yield "memory://bucket/log"
    system.rm("/bucket", recursive=True)


def test_a_folder_is_copied_with_what_is_below_it(bucket, tmp_path) -> None:
    told = []
    fetch(bucket + "/", tmp_path / "source", lambda *words: told.append(words))
    assert (tmp_path / "source/interactions.csv").read_bytes() == b"user_id,item_id\n"
    assert (tmp_path / "source/more/items.csv").stat().st_size == 10_000_000
    assert told[-1] == ("fetch", 10_000_016, 10_000_016)
    assert [one[1] for one in told] == sorted({one[1] for one in told})


def test_what_breaks_off_leaves_nothing(bucket, tmp_path) -> None:
    def break_off(*_):
        raise ConnectionResetError("the line went dead")

    with pytest.raises(DataError, match=r"memory://bucket/log: cannot be read \(the line went dead\)"):
        fetch(bucket, tmp_path / "source", break_off)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../stolen.csv", "more/../../../stolen.csv"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name) -> None:
    system = fsspec.filesystem("memory")
    system.store[f"/bucket/log/{name}"] = MemoryFile(system, f"/bucket/log/{name}", b"x")  # as no client would put it
    try:
        with pytest.raises(DataError, match="which is outside of it"):
            fetch("memory://bucket/log", tmp_path / "run" / "source", lambda *_: None)
    finally:
        system.store.clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://bucket/none", "nothing there"),
        ("memory://bucket/log/interactions.csv", "a file; give the folder"),
        ("s4://bucket/log", "cannot be read .Protocol not known: s4"),
    ],
)
def test_faults_are_one_line(bucket, tmp_path, url, told) -> None:
    with pytest.raises(DataError, match=told) as error:
        fetch(url, tmp_path / "source", lambda *_: None)
    assert str(error.value).startswith(url)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "source").exists()


def test_a_web_server_serves_as_well(tmp_path) -> None:
    (tmp_path / "www/log").mkdir(parents=True)
    (tmp_path / "www/log/items.csv").write_text("item_id\n1\n")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/log"
        assert is_url(url)
        fetch(url, tmp_path / "source", lambda *_: None)
        server.shutdown()
    assert (tmp_path / "source/items.csv").read_text() == "item_id\n1\n"


def test_what_signs_a_url_is_in_no_message(tmp_path) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/log"
        with pytest.raises(DataError, match=f"^{url}: ") as error:
            fetch(f"{url}?sig=SECRET&se=2026", tmp_path / "source", lambda *_: None)
        server.shutdown()
    assert "SECRET" not in str(error.value)
    assert "se=2026" not in str(error.value)
