"""Requests to an OpenAI-compatible chat endpoint: many at once, retried with patience, given up with a reason."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from swim_fast.errors import MissingLibraryError, UserError
from swim_fast.llm.journal import Answer
from swim_fast.options import Endpoint

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds between retries that the endpoint did not ask for
LONGEST_RETRY_AFTER = 600.0
GIVE_UP_AFTER = 3  # records in a row that got no answer at all
GRACE_SECONDS = 10  # for answers under way when a run is stopped


class EndpointError(UserError, OSError):
    """The endpoint cannot be used: no further request makes sense."""


class RefusedError(Exception):
    """The endpoint refuses this one request, for its contents or its length."""


class Client:
    """An open connection to an endpoint, to be used and closed in one event loop.

    The key is read from the environment variable OPENAI_API_KEY and goes nowhere but to the endpoint.

    Raises:
        MissingLibraryError: the package openai is not installed.
        EndpointError: there is no key.

    Attributes:
        requests: number of requests sent, retries included.
    """

    def __init__(self, options: Endpoint):
        try:
            import openai
        except ImportError as error:
            message = "the model is asked through openai; pip install 'swim-fast[nl-refer]'"
            raise MissingLibraryError(message) from error
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise EndpointError("OPENAI_API_KEY is not set; a local server that wants no key takes any value")
        for name in ("httpx", "httpx2"):  # would log a line for each request
            logging.getLogger(name).setLevel(logging.WARNING)
        self.options = options
        self.requests = 0
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=options.base_url,
            timeout=options.timeout,
            max_retries=0,  # retried here, with a log
        )
        self._stop = asyncio.Event()
        self._resume_at = 0.0  # monotonic time before which a rate limit allows no request
        self._unanswered = 0

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def stop(self) -> None:
        """Let the requests under way finish, and cancel whatever waits to send another."""
        self._stop.set()

    async def ask(self, chat: list[dict[str, str]]) -> Answer:
        """Return the answer to a chat.

        Raises:
            CancelledError: `stop` was called before there was one.
            RefusedError: this request cannot be answered, or was not after all its retries.
            EndpointError: no request can be answered: a wrong key or model, an exhausted account, or nobody there.
        """
        for attempt in range(self.options.retries + 1):
            await self._wait_for_rate_limit()
            try:
                self.requests += 1
                answer = await self._request(chat)
            except (self._openai.APIError, ValueError) as error:
                reason, wait = self._diagnose(error, attempt)
            else:
                self._unanswered = 0
                return answer
            if attempt < self.options.retries:
                logger.warning("%s; again in %.1f s (retry %d of %d)", reason, wait, attempt + 1, self.options.retries)
                await self._sleep(wait)
        self._unanswered += 1
        if self._unanswered >= GIVE_UP_AFTER:
            raise EndpointError(f"the endpoint {self._client.base_url} does not answer: {reason}; start again later")
        raise RefusedError(f"no answer after {self.options.retries} retries: {reason}")

    async def _request(self, chat: list[dict[str, str]]) -> Answer:
        extra: dict[str, Any] = {}
        if self.options.temperature is not None:
            extra["temperature"] = self.options.temperature
        done = await self._client.chat.completions.create(model=self.options.model, messages=chat, **extra)
        choices = getattr(done, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError("the endpoint sent something else than a chat completion")  # retried by `ask`
        usage = getattr(done, "usage", None)
        tokens = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
        return Answer(choices[0].message.content or "", *tokens)

    def _diagnose(self, error: Exception, attempt: int) -> tuple[str, float]:
        """Return why a request failed and the seconds to wait; raise where a retry is useless."""
        wait = min(LONGEST_WAIT, self.options.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        if isinstance(error, self._openai.APITimeoutError):
            return f"no answer within {self.options.timeout:g} s", wait
        if not isinstance(error, self._openai.APIStatusError):
            return f"{type(error).__name__}: {_short(error)}", wait
        status, reason = error.status_code, f"status {error.status_code}: {_short(error)}"
        exhausted = status == 429 and getattr(error, "code", None) == "insufficient_quota"
        if status in (401, 403, 404) or exhausted:
            raise EndpointError(f"the endpoint {self._client.base_url} refuses all requests, {reason}") from None
        if status < 500 and status not in (408, 409, 425, 429):
            raise RefusedError(reason) from None
        asked = retry_after(error.response.headers)
        if asked is not None:
            if asked > LONGEST_RETRY_AFTER:
                raise EndpointError(f"the endpoint asks for {asked:.0f} s of patience ({reason}); start again then")
            wait = max(wait, asked) if status != 429 else asked + random.uniform(0, 0.1) * self.options.backoff
        if status == 429:
            self._resume_at = max(self._resume_at, time.monotonic() + wait)
        return reason, wait

    async def _wait_for_rate_limit(self) -> None:
        await self._sleep(0.0)
        while (wait := self._resume_at - time.monotonic()) > 0:
            await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        if not self._stop.is_set() and seconds > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except asyncio.TimeoutError:
                return
        if self._stop.is_set():
            raise asyncio.CancelledError


async def run_workers(client: Client, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run as many workers as there may be requests at the same time, until all end or one fails; then close.

    Args:
        client: what the workers ask through.
        work: a worker, which takes what is next until nothing is left.

    Raises:
        Exception: what the first worker that failed raised.
    """
    workers = [asyncio.create_task(work()) for _ in range(client.options.concurrency)]
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _end(workers, client)
    for worker in workers:
        if not worker.cancelled() and worker.exception() is not None:
            raise worker.exception()


async def _end(workers: list[asyncio.Task], client: Client) -> None:
    """End the workers that still run; requests under way are being paid for and get some seconds to arrive."""
    client.stop()
    await asyncio.sleep(0)
    if pending := [worker for worker in workers if not worker.done()]:
        logger.warning("stopping: waiting up to %d s for %d answers; Ctrl-C gives them up", GRACE_SECONDS, len(pending))
        await asyncio.wait(pending, timeout=GRACE_SECONDS)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await client.close()


def retry_after(headers: Any) -> float | None:
    """Return the seconds that a response's Retry-After (a number or a date) or retry-after-ms asks for, or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is None:
                continue
            seconds = email.utils.mktime_tz(date) - time.time()
        if seconds == seconds:  # not NaN
            return max(0.0, seconds)
    return None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " …"
