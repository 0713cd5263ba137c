"""Versions that change and replicas that die, under load: no request fails, and none is of two versions."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from served_run import ServedRun, serving
from trained_run import Watched

from rporec.data import Dataset
from rporec.engine.reference import ReferenceEngine
from rporec.models.backbone import load_model, load_tokenizer, save_model
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.promotion import Promoted, promote, promoted, roll_back
from rporec.recipes.rporec import RPORec
from rporec.run import Run
from rporec.text.completion import parse
from serve.service import readable

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

USERS, K, SECONDS = 6, 5, 60.0


@pytest.fixture(scope="module")
def service(trained: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRun]:
    run = tmp_path_factory.mktemp("swap") / "run"
    shutil.copytree(trained.folder, run)
    with serving(run, "serve.reasoners=2", "serve.retrievers=2", "serve.timeout_ms=60000") as service:
        yield service


@dataclass
class Load:
    """Clients that ask without a pause until they are stopped."""

    url: str
    bodies: list[dict]
    answers: list[tuple[dict, dict, float]] = field(default_factory=list)  # (body, response, seconds)
    failures: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def going_on(self, clients: int) -> Iterator[Load]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            turn = number
            while not self.over.is_set():
                body = self.bodies[turn % len(self.bodies)]
                turn += 1
                began = time.monotonic()
                try:
                    answer = client.post("/v1/recommend", json=body)
                    if answer.status_code == 200:
                        self.answers.append((body, answer.json(), time.monotonic() - began))
                    else:
                        self.failures.append(answer.text)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def wait(self, until: Callable[[Load], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not until(self):
            assert time.monotonic() < deadline, (Counter(r["version"] for _, r, _ in self.answers), self.failures[:3])
            time.sleep(0.05)


class Expected:
    """What each version must answer, from its folder alone: transformers' greedy text, ranked by its head."""

    def __init__(self, run: Run, dataset: Dataset) -> None:
        self.run, self.dataset = run, dataset
        self.recipe = RPORec(run, run.config())
        self._known: dict[str, dict[tuple[str, bool], tuple[str | None, list[str]]]] = {}

    def of(self, version: str) -> dict[tuple[str, bool], tuple[str | None, list[str]]]:
        """(user, reason) -> (cot, item ids)."""
        if version not in self._known:
            folder = Promoted(version, self.run.folder / "promoted" / version)
            head = RecHead.load(folder.head, self.dataset.catalog).freeze()
            engine = ReferenceEngine(folder.model, self.run.config().engine, context=self.recipe.context, seed=0)
            answers: dict[tuple[str, bool], tuple[str | None, list[str]]] = {}
            for user in range(USERS):
                seen = self.dataset.items[slice(*self.dataset.offsets[user : user + 2])].astype(np.int64)
                prompt = self.recipe.writer.prompt_ids(seen)
                [written] = engine.submit(prompt, self.recipe.greedy_spec()).result()
                for text in (None, written.text):
                    parsed = parse(text or "")
                    inputs = HeadInputs(
                        [seen],
                        np.array([int(time.time())]),
                        [parsed.cot],
                        [parsed.answer],
                        np.array([parsed.format], np.float32),
                    )
                    scores = head.scores(inputs).numpy()[0]
                    scores[seen] = -np.inf
                    ids = [self.dataset.catalog.ids[item] for item in np.argsort(-scores, kind="stable")[:K]]
                    key = (self.dataset.user_ids[user], text is not None)
                    answers[key] = (text if text is None else readable(text, [])[0], ids)
            engine.close()
            self._known[version] = answers
        return self._known[version]


def another(run: Run, number: int, scratch: Path) -> Promoted:
    """Promote a model and a head that disagree with those in use."""
    generator = torch.Generator().manual_seed(number)
    source = promoted(run)
    assert source is not None
    model = load_model(source.model)
    head = RecHead.load(source.head, Dataset.load(run.data).catalog)
    with torch.no_grad():
        for network, much in ((model, 0.1), (head, 0.5)):
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter += much * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_model(model, load_tokenizer(source.model), scratch / "model")
    head.save(run.head())
    return promote(run, f"9.{number}", scratch / "model", 0.9 + number / 100)


def test_three_promotions_under_load_fail_no_request_and_mix_no_versions(service: ServedRun, tmp_path: Path) -> None:
    run = Run.open(service.run)
    dataset = Dataset.load(run.data)
    expected = Expected(run, dataset)
    versions = [promoted(run).version]
    expected.of(versions[0])
    bodies = [
        {"user_id": dataset.user_ids[user], "k": K, "reason": reason}
        for user in range(USERS)
        for reason in (True, False)
    ]
    began = time.monotonic()
    with Load(service.url, bodies).going_on(4) as load:
        for number in (1, 2, 3):
            load.over.wait(max(0.0, began + number * SECONDS / 4 - time.monotonic()))
            versions.append(another(run, number, tmp_path / str(number)).version)
            load.wait(lambda load, new=versions[-1]: any(one["version"] == new for _, one, _ in load.answers))
        load.over.wait(max(0.0, began + SECONDS - time.monotonic()))
    assert not load.failures, load.failures[:3]
    assert {one["version"] for _, one, _ in load.answers} == set(versions)
    for body, one, _ in load.answers:
        cot, ids = expected.of(one["version"])[body["user_id"], body["reason"]]
        assert one["fallback"] is None
        assert one["cot"] == cot
        assert [item["item_id"] for item in one["items"]] == ids
    said = [expected.of(version)[bodies[0]["user_id"], True] for version in versions]
    assert len({str(one) for one in said}) == len(versions), "versions that answer alike prove nothing"
    for reason in (True, False):
        seconds = sorted(took for body, _, took in load.answers if body["reason"] == reason)
        print(f"reason={reason}: {len(seconds)} answers, median {np.median(seconds):.3f} s, max {seconds[-1]:.3f} s")
    roll_back(run)
    with Load(service.url, bodies[1:2]).going_on(1) as load:
        load.wait(lambda load: any(one["version"] == versions[-2] for _, one, _ in load.answers))


@pytest.mark.chaos
@pytest.mark.parametrize("role", ["Reasoner", "Retriever"])
def test_a_killed_replica_fails_no_request(service: ServedRun, role: str) -> None:
    dataset = Dataset.load(Run.open(service.run).data)
    bodies = [
        {"user_id": dataset.user_ids[user], "k": K, "reason": reason}
        for user in range(USERS)
        for reason in (True, False)
    ]
    streams: Counter[str] = Counter()

    def stream() -> None:
        with httpx.Client(base_url=service.url, timeout=120) as client:
            while not load.over.is_set():
                body = {**bodies[0], "stream": True}
                with client.stream("POST", "/v1/recommend", json=body) as answer:
                    names = [line for line in answer.iter_lines() if line.startswith("event: ")]
                streams[names[-1]] += 1

    with httpx.Client(base_url=service.url) as client:  # the one that comes in its place must know added items too
        client.post("/v1/items", json={"item_id": "added", "title": dataset.catalog.title(0)})
    bodies.append({"history": ["added"], "k": K, "reason": True})
    before = replicas(service, role)
    with Load(service.url, bodies).going_on(4) as load:
        streaming = threading.Thread(target=stream)
        streaming.start()
        load.wait(lambda load: len(load.answers) > 20)
        os.kill(before[0], signal.SIGKILL)
        killed = len(load.answers)
        load.wait(lambda load: len(load.answers) > killed + 20)
        load.wait(lambda _: len(set(replicas(service, role)) - {before[0]}) == 2)
        replaced = len(load.answers)
        load.wait(lambda load: len(load.answers) > replaced + 40)
        load.over.set()
        streaming.join()
    assert not load.failures, load.failures[:3]
    assert streams["event: result"] > 0
    assert set(streams) <= {"event: result", "event: error"}
    print(f"{role}: {len(load.answers)} answers, max {max(took for *_, took in load.answers):.2f} s, streams {streams}")


def replicas(service: ServedRun, role: str) -> list[int]:
    """Process ids of a deployment's live replicas."""
    found = []
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f":{role}" in "".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
