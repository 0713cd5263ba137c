"""Downloads resume, are checked, and end as the two files that `build` reads; against a server on the loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from rporec.data import DataError, build, download, find_sources
from rporec.data.download import fetch
from rporec.data.folder import silent


class Server(ThreadingHTTPServer):
    """Serves `files`; the first `cut` bytes only, once, when `cut` is set; ranges unless `ranges` is off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: int | None = None
        self.ranges = True

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.server.cut is not None and not name.endswith(".md5"):
            self.wfile.write(body[start : self.server.cut])
            self.server.cut = None
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def md5(body: bytes) -> bytes:
    return f"MD5 (file) = {hashlib.md5(body).hexdigest()}\n".encode()


def archive(folder: str, files: dict[str, str], encoding: str = "utf-8") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for name, text in files.items():
            target.writestr(f"{folder}/{name}", text.encode(encoding))
    return packed.getvalue()


def ratings(separator: str, header: str = "") -> str:
    return header + "".join(
        separator.join((str(u), str(1 + (u + n) % 3), "4.5" if separator == "," else "4", str(1_000_000_000 + n)))
        + "\n"
        for u in range(1, 4)
        for n in range(8)
    )


MOVIELENS = {
    "ml-100k": (
        {
            "u.data": ratings("\t"),
            "u.genre": "unknown|0\nAction|1\nDrama|2\n\n",
            "u.item": "".join(f"{n}|Café {n} (1995)|01-Jan-1995||http://x|0|1|1\n" for n in (1, 2, 3)),
        },
        "latin-1",
        "Action|Drama",
    ),
    "ml-1m": (
        {"ratings.dat": ratings("::"), "movies.dat": "".join(f"{n}::Café {n} (1995)::Drama\n" for n in (1, 2, 3))},
        "latin-1",
        "Drama",
    ),
    "ml-32m": (
        {
            "ratings.csv": ratings(",", "userId,movieId,rating,timestamp\n"),
            "movies.csv": "movieId,title,genres\n" + "".join(f'{n},"Café {n} (1995)",Drama|War\n' for n in (1, 2, 3)),
        },
        "utf-8",
        "Drama|War",
    ),
}


@pytest.mark.parametrize("name", MOVIELENS)
def test_every_generation_of_movielens_becomes_a_data_set(tmp_path, server, name):
    files, encoding, genres = MOVIELENS[name]
    server.files[f"{name}.zip"] = archive(name, files, encoding)
    server.files[f"{name}.zip.md5"] = md5(server.files[f"{name}.zip"])
    told: list[str] = []
    download(
        name.replace("ml", "movielens"),
        tmp_path / "out",
        lambda stage, done, total: told.append(stage),
        base=server.base,
    )
    dataset = build(*find_sources(tmp_path / "out"), tmp_path / "built")
    assert dataset.manifest["counts"]["interactions"] == 24
    assert dataset.catalog.title(0) == "Café 1 (1995)"
    assert dataset.catalog.value("genres", 0) == genres
    assert f"download {name}.zip" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "out"]


def test_movietweetings_becomes_a_data_set(tmp_path, server):
    server.files["ratings.dat"] = ratings("::").encode()
    server.files["movies.dat"] = "".join(f"{n}::Amélie: {n}::Comedy|Romance\n" for n in (1, 2, 3)).encode()
    download("movietweetings", tmp_path / "out", base=server.base)
    dataset = build(*find_sources(tmp_path / "out"), tmp_path / "built")
    assert dataset.catalog.text(0) == "Amélie: 1 | Comedy|Romance"


def test_amazon_keeps_the_rated_products_and_those_without_a_description(tmp_path, server):
    products = [
        {"parent_asin": str(n), "title": f"P{n}", "store": None, "categories": ["a", "b"], "description": ["x", "y"]}
        for n in (1, 2, 9)
    ]
    server.files["benchmark/0core/rating_only/Toys.csv.gz"] = gzip.compress(
        ratings(",", "user_id,parent_asin,rating,timestamp\n").encode()
    )
    server.files["raw/meta_categories/meta_Toys.jsonl.gz"] = gzip.compress(
        "".join(json.dumps(product) + "\n" for product in products).encode()
    )
    download("amazon-2023:Toys", tmp_path / "out", base=server.base)
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert [item["item_id"] for item in items] == ["1", "2", "3"]
    assert items[0]["categories"] == "a|b"
    assert items[0]["description"] == "x y"
    assert items[2]["title"] is None
    assert build(*find_sources(tmp_path / "out"), tmp_path / "built").manifest["counts"]["items"] == 3


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server):
    server.files["f"] = bytes(range(256)) * 1000
    server.files["f.md5"] = md5(server.files["f"])
    server.cut = 1000
    with pytest.raises(DataError, match="retry, it resumes"):
        fetch(f"{server.base}f", tmp_path / "f", silent, md5_url=f"{server.base}f.md5")
    assert (tmp_path / "f.part").stat().st_size == 1000
    fetch(f"{server.base}f", tmp_path / "f", silent, md5_url=f"{server.base}f.md5")
    assert ("f", "bytes=1000-") in server.asked
    assert (tmp_path / "f").read_bytes() == server.files["f"]
    assert not (tmp_path / "f.part").exists()


def test_a_server_without_ranges_sends_all_of_it_again(tmp_path, server):
    server.files["f"], server.ranges = b"abcdef", False
    (tmp_path / "f.part").write_bytes(b"abc")
    assert fetch(f"{server.base}f", tmp_path / "f", silent).read_bytes() == b"abcdef"


def test_a_part_that_is_whole_is_taken_and_one_that_is_too_long_is_not(tmp_path, server):
    server.files["f"] = b"abcdef"
    (tmp_path / "f.part").write_bytes(b"abcdef")
    assert fetch(f"{server.base}f", tmp_path / "f", silent).read_bytes() == b"abcdef"
    (tmp_path / "f").unlink()
    (tmp_path / "f.part").write_bytes(b"abcdefgh")
    with pytest.raises(DataError, match="changed at the source"):
        fetch(f"{server.base}f", tmp_path / "f", silent)
    assert fetch(f"{server.base}f", tmp_path / "f", silent).read_bytes() == b"abcdef"


def test_a_wrong_checksum_is_refused_and_the_bytes_are_deleted(tmp_path, server):
    server.files["ml-1m.zip"] = b"something else"
    server.files["ml-1m.zip.md5"] = md5(b"the real one")
    with pytest.raises(DataError, match="is not the published"):
        download("movielens-1m", tmp_path / "out", base=server.base)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.zip"))


def test_an_archive_that_is_not_what_it_should_be_is_one_line(tmp_path, server):
    server.files["ml-1m.zip"] = archive("ml-1m", {"readme": "x"})
    server.files["ml-1m.zip.md5"] = md5(server.files["ml-1m.zip"])
    with pytest.raises(DataError, match="not what the source describes"):
        download("movielens-1m", tmp_path / "out", base=server.base)
    assert not (tmp_path / "out").exists()


def test_without_a_network_there_is_one_clear_line(tmp_path, server):
    base = server.base
    server.server_close()
    server.shutdown()
    with pytest.raises(DataError, match=r"cannot be fetched .*check the connection") as fault:
        download("movietweetings", tmp_path / "out", base=base)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_unknown_names_and_categories_are_refused(tmp_path, server):
    with pytest.raises(DataError, match="unknown data set; use one of movielens-100k"):
        download("netflix", tmp_path / "out")
    with pytest.raises(DataError, match="answers 404"):
        download("amazon-2023:Nothing", tmp_path / "out", base=server.base)
