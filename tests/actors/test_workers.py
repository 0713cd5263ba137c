"""What the controller makes of a worker's answers, and of those that do not come."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

import pytest
from ray.exceptions import RayTaskError

from actors.cluster import probable_cause
from actors.workers import Workers, answer, is_death


def test_a_worker_that_is_struck_out_as_it_answers_stays_so() -> None:
    async def work() -> None:
        answered = asyncio.get_running_loop().create_future()
        actor = MagicMock(**{"status.remote": lambda: answered})
        workers = Workers("reward", 1, 1, lambda name, place: actor, lambda actor: None)
        adding = asyncio.create_task(workers.add(0))
        await asyncio.sleep(0)
        answered.set_result({"pid": 1, "node": "here", "cpu_seconds": 0.0})
        workers.bury(workers.left[0])
        assert await adding is None
        assert workers.left == []

    asyncio.run(work())


def test_no_answer_is_a_hang_and_names_its_key() -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s \(reward\.timeout\)") as raised:
            await answer(asyncio.get_running_loop().create_future(), 0.01, "reward.timeout")
        assert is_death(raised.value)
        assert probable_cause(str(raised.value)).startswith("it hangs")

    asyncio.run(work())


def test_a_timeout_of_the_workers_own_code_is_no_death() -> None:
    async def work() -> None:
        answered = asyncio.get_running_loop().create_future()
        answered.set_exception(RayTaskError("score", "", TimeoutError("a judge's endpoint")).as_instanceof_cause())
        with pytest.raises(TimeoutError) as raised:
            await answer(answered, 1.0, "reward.timeout")
        assert isinstance(raised.value, RayTaskError)
        assert not is_death(raised.value)

    asyncio.run(work())
