"""LLM teachers: a model is shown a history and the item that followed, and explains the step.

Targets shape training rationales only: `ask` is never used for validation or test samples.
`BackboneTeacher` prepares prompts for a rollout engine and finishes what comes back;
`OpenAITeacher` talks to any OpenAI-compatible endpoint itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from rporec.config import ConfigError, TeacherConfig
from rporec.text.completion import ANSWER, ANSWER_END, THINK, THINK_END, parse
from rporec.text.prompt import ChatPrompt, History, ItemWriter
from rporec.text.rationales import Rationale, hash_prompt

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Request = tuple[int, History, int]  # sample, history (item indices, oldest first), target

HEAD = "The list holds the items that one user chose, oldest first, each with its attributes.\n"
_TASK = (
    "\nThe user chose this item next: {target}\n"
    "Explain in a few short sentences how the history leads to it. State what the history shows first, then "
    "conclude; never say that the next item was given. Write the explanation between "
    f"{THINK} and {THINK_END}, then the item between {ANSWER} and {ANSWER_END}, and nothing else."
)


def finish(text: str, target: int, writer: ItemWriter) -> str | None:
    """A training completion from what a teacher wrote: its CoT, and the target as the answer.

    Text before the last `<think>` (a reasoning model's own thoughts, for one) and behind the answer
    is dropped; a missing `</answer>` (the stop string, for most endpoints) is forgiven. None if no CoT
    in the asked form is left.
    """
    text = text[max(text.rfind(THINK), 0) :]
    completion = parse(text.partition(ANSWER_END)[0] + ANSWER_END)
    cot = " ".join(completion.cot.split())
    if not completion.format or not cot:
        return None
    return f"{THINK} {cot}{THINK_END}{ANSWER} {writer.short(target)}{ANSWER_END}"


class BackboneTeacher:
    """The backbone teaches itself: prompts with the target in, rationales that end in it out.

    context, reserve: tokens of the model's window and of the completion.
    """

    kind = "backbone"

    def __init__(
        self, writer: ItemWriter, tokenizer: PreTrainedTokenizerBase, model: str, context: int, reserve: int
    ) -> None:
        self.writer = writer
        self.model = model
        self._chat = ChatPrompt(tokenizer, context - reserve)

    def prompt_ids(self, history: History, target: int) -> list[int]:
        """What the rollout engine is given; sample it with `</answer>` as the stop string, kept."""
        lines = [self.writer.labelled(item) for item in self.writer.visible(history)]
        return self._chat.ids(HEAD, lines, _TASK.format(target=self.writer.labelled(target)))

    def rationale(self, sample: int, prompt_ids: Sequence[int], text: str, target: int) -> Rationale:
        """The record of one generated text."""
        return Rationale(sample, finish(text, target, self.writer), self.kind, self.model, hash_prompt(prompt_ids))


class OpenAITeacher:
    """Rationales from an OpenAI-compatible chat endpoint.

    concurrency: requests in flight. retries: further attempts after a rate limit, a server error or
        a broken connection, waiting `backoff * 2^attempt` seconds with jitter, or what the server's
        Retry-After says. timeout: seconds of one request. max_tokens: of one rationale.

    The key is read from the variable that `teacher.api_key_env` names, sent to the endpoint and
    neither stored nor logged; without it, requests carry none.
    """

    kind = "openai"

    def __init__(
        self,
        writer: ItemWriter,
        config: TeacherConfig,
        max_tokens: int,
        concurrency: int = 8,
        retries: int = 5,
        backoff: float = 1.0,
        timeout: float = 120.0,
    ) -> None:
        if not (config.base_url and config.model):
            raise ConfigError("teacher.kind: openai needs teacher.base_url and teacher.model")
        self.writer = writer
        self.model = config.model
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.retries = retries
        self.backoff = backoff
        self.timeout = timeout
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._key_variable = config.api_key_env

    def ask(self, history: History, target: int) -> str:
        """The text of the one user message."""
        lines = (f"{n}. {self.writer.labelled(item)}" for n, item in enumerate(self.writer.visible(history), 1))
        return "\n".join([HEAD, *lines, _TASK.format(target=self.writer.labelled(target))])

    async def rationales(self, requests: Iterable[Request]) -> AsyncIterator[Rationale]:
        """Rationales in the order in which they come back; requests are drawn as there is room.

        Raises ConfigError if the endpoint refuses a request or stays unreachable after all retries;
        what was yielded before is good, and a rerun may leave it out.
        """
        import httpx

        key = os.environ.get(self._key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        queue = iter(requests)
        running: set[asyncio.Task[Rationale]] = set()
        async with httpx.AsyncClient(headers=headers, timeout=self.timeout, limits=limits) as client:
            try:
                while True:
                    while len(running) < self.concurrency and (request := next(queue, None)) is not None:
                        running.add(asyncio.create_task(self._one(client, request)))
                    if not running:
                        return
                    finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(finished, key=lambda task: task.exception() is not None):
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, client: httpx.AsyncClient, request: Request) -> Rationale:
        sample, history, target = request
        question = self.ask(history, target)
        text = finish(await self._complete(client, question), target, self.writer)
        return Rationale(sample, text, self.kind, self.model, hash_prompt(question))

    async def _complete(self, client: httpx.AsyncClient, question: str) -> str:
        import httpx

        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
        }
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
            try:
                response = await client.post(self._url, json=body)
            except httpx.TransportError as error:
                problem = type(error).__name__
            else:
                if response.is_success:
                    return _content(response)
                # The body is not quoted: some endpoints repeat the key in it.
                problem = f"HTTP {response.status_code}"
                if response.status_code in (401, 403):
                    raise ConfigError(f"teacher: {self._url} refused the key in ${self._key_variable} ({problem})")
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    raise ConfigError(f"teacher: {self._url} refused the request for {self.model!r} ({problem})")
                wait = max(wait, _retry_after(response))
            if attempt < self.retries:
                logger.info("teacher: %s, attempt %d of %d, next in %.1f s", problem, attempt + 1, self.retries, wait)
                await asyncio.sleep(wait)
        raise ConfigError(f"teacher: {self._url} failed {self.retries + 1} times ({problem}); check teacher.base_url")


def _content(response: httpx.Response) -> str:
    """The message's text, "" if the answer has no such thing."""
    try:
        message = response.json()["choices"][0]["message"]
        return message.get("content") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _retry_after(response: httpx.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), 60.0) if seconds.isdecimal() else 0.0
