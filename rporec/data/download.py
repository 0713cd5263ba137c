"""Public data sets from their official sources, turned into interactions.parquet and items.parquet.

A download goes to NAME.part and is resumed there by HTTP Range; MovieLens publishes md5 sums, which are checked, the
others only a size.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rporec.config import first_line
from rporec.data.errors import DataError
from rporec.data.folder import Progress, check_free, new_folder, silent

if TYPE_CHECKING:
    import httpx

MOVIELENS = "https://files.grouplens.org/datasets/movielens/"
MOVIETWEETINGS = "https://raw.githubusercontent.com/sidooms/MovieTweetings/master/latest/"
AMAZON = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/"
SIZES = ("100k", "1m", "10m", "20m", "25m", "32m")  # of MovieLens
NAMES = (*(f"movielens-{size}" for size in SIZES), "movietweetings", "amazon-2023:CATEGORY")
TIMEOUT = 30.0  # seconds without a byte


def download(name: str, out: Path | str, progress: Progress | None = None, *, base: str | None = None) -> None:
    """Fetch a data set and write interactions.parquet and items.parquet into the folder `out`.

    `name` is one of NAMES. What was fetched is kept beside `out` in `out`.download until all is written, so a second
    call resumes it. `base` replaces the address of the source (a mirror with the same files).
    Raises DataError for an unknown name, an unreachable source, a wrong checksum, an `out` that is not empty.
    """
    out = Path(out)
    progress = progress or silent
    check_free(out)
    kind, _, rest = name.partition(":" if name.startswith("amazon") else "-")
    store = out.with_name(f"{out.name}.download")
    if kind == "movielens" and rest in SIZES:
        write = _movielens(rest, base or MOVIELENS, store, progress)
    elif name == "movietweetings":
        write = _movietweetings(base or MOVIETWEETINGS, store, progress)
    elif kind == "amazon-2023" and re.fullmatch(r"\w+", rest):
        write = _amazon(rest, base or AMAZON, store, progress)
    else:
        raise DataError(f"{name!r}: unknown data set; use one of {', '.join(NAMES)}")
    try:
        with new_folder(out) as partial:
            write(partial)
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, KeyError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise DataError(f"{store}: not what the source describes ({reason}); delete the folder and retry") from None
    shutil.rmtree(store)


def fetch(url: str, path: Path, progress: Progress, *, md5_url: str | None = None) -> Path:
    """Download `url` to `path` unless it is there, going on from `path`.part; then check md5 or size.

    Raises DataError when the source cannot be reached, answers with an error, or the bytes are not the published ones.
    """
    import httpx

    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
            wanted = _published_md5(client, md5_url) if md5_url else None
            total = _resume(client, url, part, progress)
    except httpx.HTTPStatusError as error:
        raise DataError(f"{url}: the source answers {error.response.status_code}; check the name") from None
    except (httpx.HTTPError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{url}: cannot be fetched ({reason}); check the connection and retry, it resumes") from None
    size = part.stat().st_size
    if total is not None and size != total:
        raise DataError(f"{url}: {size} of {total} bytes came; retry, it resumes")
    if wanted is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != wanted:
            part.unlink()
            raise DataError(f"{url}: md5 {found} is not the published {wanted}; the file was deleted, retry")
    part.replace(path)
    return path


def _published_md5(client: httpx.Client, url: str) -> str:
    text = client.get(url).raise_for_status().text
    match = re.search(r"\b[0-9a-f]{32}\b", text)
    if match is None:
        raise DataError(f"{url}: holds no md5; check the source by hand")
    return match[0]


def _resume(client: httpx.Client, url: str, part: Path, progress: Progress) -> int | None:
    """Append what is missing to `part`; returns the whole size if the server says it."""
    have = part.stat().st_size if part.exists() else 0
    # Ranges are counted in encoded bytes; without identity a server might compress on the fly.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as answer:
        total = None
        if answer.status_code == 416:  # nothing after `have`: the part is whole, or not of this file
            if answer.headers.get("Content-Range", "") == f"bytes */{have}":
                return have
            part.unlink()
            raise DataError(f"{url}: the file changed at the source; what was fetched is deleted, retry")
        answer.raise_for_status()
        if have and answer.status_code != 206:
            have = 0  # the server knows no ranges and sends all of it
        if "Content-Length" in answer.headers:
            total = have + int(answer.headers["Content-Length"])
        with part.open("ab" if have else "wb") as file:
            for chunk in answer.iter_raw():
                file.write(chunk)
                have += len(chunk)
                progress(f"download {part.stem}", have, total)
    return total


# Sources. Each fetches and returns what writes the two files into a folder.

Writer = Callable[[Path], None]


def _movielens(size: str, base: str, store: Path, progress: Progress) -> Writer:
    archive = fetch(f"{base}ml-{size}.zip", store / f"ml-{size}.zip", progress, md5_url=f"{base}ml-{size}.zip.md5")

    def write(folder: Path) -> None:
        with zipfile.ZipFile(archive) as files:
            names = {Path(name).name: name for name in files.namelist()}
            if size == "100k":
                with files.open(names["u.data"]) as file:
                    _ratings(file, folder, "\t", (0, 1, 2, 3), progress)
                items = _movies_100k(files.read(names["u.item"]), files.read(names["u.genre"]))
            elif "ratings.csv" in names:
                with files.open(names["ratings.csv"]) as file:
                    _ratings(file, folder, ",", (0, 1, 2, 3), progress, skip=1)
                text = files.read(names["movies.csv"]).decode("utf-8")
                rows = list(csv.reader(io.StringIO(text, newline="")))
                items = _movies(rows[1:])
            else:
                with files.open(names["ratings.dat"]) as file:
                    _ratings(file, folder, ":", (0, 2, 4, 6), progress)  # "::" leaves empty columns between
                text = files.read(names["movies.dat"]).decode("latin-1" if size == "1m" else "utf-8")
                items = _movies([line.split("::") for line in text.splitlines() if line])
            pq.write_table(items, folder / "items.parquet")

    return write


def _movietweetings(base: str, store: Path, progress: Progress) -> Writer:
    ratings = fetch(f"{base}ratings.dat", store / "ratings.dat", progress)
    movies = fetch(f"{base}movies.dat", store / "movies.dat", progress)

    def write(folder: Path) -> None:
        with ratings.open("rb") as file:
            _ratings(file, folder, ":", (0, 2, 4, 6), progress)
        lines = movies.read_text(encoding="utf-8").split("\n")
        pq.write_table(_movies([line.split("::") for line in lines if line.strip()]), folder / "items.parquet")

    return write


def _amazon(category: str, base: str, store: Path, progress: Progress) -> Writer:
    ratings = fetch(f"{base}benchmark/0core/rating_only/{category}.csv.gz", store / f"{category}.csv.gz", progress)
    meta = fetch(f"{base}raw/meta_categories/meta_{category}.jsonl.gz", store / f"meta_{category}.jsonl.gz", progress)

    def write(folder: Path) -> None:
        with gzip.open(ratings) as file:
            items = _ratings(cast(IO[bytes], file), folder, ",", (0, 1, 2, 3), progress, skip=1)
        pq.write_table(_products(meta, items, progress), folder / "items.parquet")

    return write


def _ratings(
    file: IO[bytes],
    folder: Path,
    delimiter: str,
    columns: tuple[int, int, int, int],
    progress: Progress,
    skip: int = 0,
) -> set[str]:
    """Write interactions.parquet from delimited text (columns: user, item, rating, timestamp); returns the items."""
    names = [f"c{place}" for place in range(columns[-1] + 1)]
    user, item, rating, timestamp = (names[place] for place in columns)
    types = {user: pa.string(), item: pa.string(), rating: pa.float32(), timestamp: pa.int64()}
    schema = pa.schema(zip(("user_id", "item_id", "rating", "timestamp"), types.values(), strict=True))
    items: set[str] = set()
    rows = 0
    reader = pacsv.open_csv(
        file,
        read_options=pacsv.ReadOptions(column_names=names, skip_rows=skip, block_size=1 << 24),
        parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char=False),
        convert_options=pacsv.ConvertOptions(column_types=types, include_columns=list(types)),
    )
    with pq.ParquetWriter(folder / "interactions.parquet", schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(pa.record_batch(batch.columns, schema=schema))
            items.update(batch.column(1).unique().to_pylist())
            rows += batch.num_rows
            progress("convert interactions", rows, None)
    return items


def _movies(rows: list[list[str]]) -> pa.Table:
    return pa.table(
        {
            "item_id": [row[0] for row in rows],
            "title": [row[1] for row in rows],
            "genres": ["" if row[2] == "(no genres listed)" else row[2] for row in rows],
        }
    )


def _movies_100k(items: bytes, genres: bytes) -> pa.Table:
    names = [line.split("|")[0] for line in genres.decode("latin-1").splitlines() if line]
    rows = []
    for line in items.decode("latin-1").splitlines():
        cells = line.split("|")
        flags = cells[-len(names) :]
        rows.append([cells[0], cells[1], "|".join(n for n, flag in zip(names, flags, strict=True) if flag == "1")])
    return _movies(rows)


def _products(meta: Path, items: set[str], progress: Progress) -> pa.Table:
    """Products of the category that somebody rated; one without a description keeps its id alone."""
    rows: list[dict[str, Any]] = []
    left = set(items)
    for done, product in enumerate(_json_lines(meta), 1):
        if product["parent_asin"] in left:
            left.discard(product["parent_asin"])
            rows.append(
                {
                    "item_id": product["parent_asin"],
                    "title": product.get("title"),
                    "categories": "|".join(product.get("categories") or []),
                    "store": product.get("store"),
                    "description": " ".join(product.get("description") or []),
                    "average_rating": product.get("average_rating"),
                    "rating_number": product.get("rating_number"),
                }
            )
        if done % 10_000 == 0:
            progress("convert items", done, None)
    rows += [{"item_id": item} for item in sorted(left)]
    kinds = [(n, pa.string()) for n in ("item_id", "title", "categories", "store", "description")]
    return pa.Table.from_pylist(
        rows, pa.schema([*kinds, ("average_rating", pa.float64()), ("rating_number", pa.int64())])
    )


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
