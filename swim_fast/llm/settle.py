"""Asking a model about many records at once, each again until its answer will do or no attempt is left.

Answers go to a journal as they arrive and are judged from there, so that a run may be stopped or killed at any time:
the same command resumes it and asks nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm.contrib.logging import logging_redirect_tqdm

from swim_fast.llm.endpoint import Client, RefusedError, run_workers
from swim_fast.llm.journal import Answer, Journal
from swim_fast.options import Endpoint
from swim_fast.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class AnswerError(ValueError):
    """An answer that will not do; the message objects to it in words that the model can act on.

    Attributes:
        final: asking again would not help.
    """

    final = False


@dataclass(frozen=True)
class Request(Generic[Result]):
    """Request about one record.

    Attributes:
        index: index of the record in its file.
        key: key of its answers in the journal.
        chat: messages that ask.
        read: makes the result of an answer; raises `AnswerError`.
        tokens_out: length of a good answer, for the estimate of a dry run.
    """

    index: int
    key: str
    chat: list[dict[str, str]]
    read: Callable[[str], Result]
    tokens_out: int = 0


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """Outcome of a request.

    Attributes:
        result: of the first answer that will do; None without one.
        reason: why there is no result.
        answers: texts of the answers so far.
        chat: messages that ask next; None if nothing more is asked.
        final: the model itself says that there will be no result.
        refused: the endpoint has refused the request in this run.
    """

    result: Result | None
    reason: str
    answers: tuple[str, ...]
    chat: list[dict[str, str]] | None = None
    final: bool = False
    refused: bool = False


@dataclass
class Usage:
    """Counts of requests and tokens.

    Attributes:
        prices: of a million tokens in and out; 0 where nobody said.
        settled_before: records that the journal had settled already.
        open: records that had to be asked about.
        requests: sent in this run, retries included.
        answers: received in this run.
        tokens_in, tokens_out: of this run, as the endpoint counts them; of a dry run, estimated.
        kept_in, kept_out: of all answers that the journal has for these records.
    """

    prices: tuple[float, float] = (0.0, 0.0)
    settled_before: int = 0
    open: int = 0
    requests: int = 0
    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    kept_in: int = 0
    kept_out: int = 0

    def lines(self, dry_run: bool) -> Iterator[str]:
        """Yield the lines of a report; `dry_run` says that the tokens are estimates."""
        spent = self._tokens(self.tokens_in, self.tokens_out)
        if self.settled_before:
            yield f"  {self.settled_before:,} records were settled by the journal"
        if dry_run:
            yield f"  {self.open:,} records to ask about, at least {self.open:,} requests: about {spent}"
            return
        yield f"  {self.requests:,} requests, {self.answers:,} answers, {spent}"
        if self.answers and not self.tokens_in:
            yield "  (the endpoint does not count tokens)"
        if self.settled_before:
            yield f"  with earlier runs: {self._tokens(self.kept_in, self.kept_out)}"

    @property
    def cost(self) -> float:
        """Cost of this run."""
        return self._cost(self.tokens_in, self.tokens_out)

    def _tokens(self, tokens_in: int, tokens_out: int) -> str:
        cost = f", cost {self._cost(tokens_in, tokens_out):,.2f}" if any(self.prices) else ""
        return f"{tokens_in:,} tokens in, {tokens_out:,} out{cost}"

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6


def judge_answers(request: Request[Result], answers: Iterable[str], attempts: int) -> Outcome[Result]:
    """Read a model's answers in the order in which they came; the chat of the outcome objects to each rejected one.

    Args:
        request: what was asked.
        answers: texts of the answers.
        attempts: most answers that are asked for.
    """
    answers, chat, reason = tuple(answers), list(request.chat), "the model was not asked"
    for answer in answers:
        try:
            return Outcome(request.read(answer), "", answers)
        except AnswerError as error:
            reason = str(error)
            if error.final:
                return Outcome(None, reason, answers, final=True)
        again = f"That will not do: {reason}. Answer again with the whole JSON and nothing else."
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
    return Outcome(None, reason, answers, chat if len(answers) < attempts else None)


class Settler:
    """Settles requests at one endpoint.

    Args:
        endpoint: the model, and how it is asked.
        journal: takes the answers; None only where nothing is asked, as in a dry run.
        attempts: most answers for a request.
        prices: of a million tokens in and out.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal | None,
        attempts: int,
        prices: tuple[float, float] = (0.0, 0.0),
    ):
        self._endpoint, self._journal, self._attempts = endpoint, journal, attempts
        self._refused: dict[str, str] = {}
        self.usage = Usage(prices)

    def answers(self, request: Request) -> list[Answer]:
        """Return what the journal has for a request."""
        return [] if self._journal is None else self._journal.answers(request.key)

    def outcome(self, request: Request[Result]) -> Outcome[Result]:
        """Judge what the journal has for a request."""
        found = judge_answers(request, (answer.answer for answer in self.answers(request)), self._attempts)
        if found.result is None and request.key in self._refused:
            reason = f"refused by the endpoint: {self._refused[request.key]}"
            return Outcome(None, reason, found.answers, refused=True)
        return found

    def settle(self, requests: Iterable[Request | None], total: int, desc: str, progress: bool = True) -> None:
        """Ask until every request is settled or refused.

        Args:
            requests: read as they are needed; None for a record about which nothing is to be asked.
            total: number of items in `requests`.
            desc: label of the progress bar.
            progress: show a progress bar.

        Raises:
            EndpointError: the endpoint cannot be used; what was answered is in the journal.
            MissingLibraryError: openai is missing.
        """
        with logging_redirect_tqdm(), ProgressBar(total=total, desc=desc, unit="record", disable=not progress) as bar:
            asyncio.run(self._settle(self._open(requests), bar))

    def estimate(self, requests: Iterable[Request | None], total: int, desc: str, progress: bool = True) -> None:
        """Count what `settle` would ask, and estimate its tokens: about one for four characters of English."""
        for request in ProgressBar(self._open(requests), total=total, desc=desc, unit="record", disable=not progress):
            if request is not None:
                characters = sum(len(message["content"]) for message in request.chat)
                self.usage.tokens_in += characters // 4 + 8 * len(request.chat)
                self.usage.tokens_out += request.tokens_out

    def _open(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        """Yield None in place of the requests that the journal has settled; count both kinds."""
        for request in requests:
            if request is not None and self.outcome(request).chat is None:
                self.usage.settled_before += 1
                request = None
            self.usage.open += request is not None
            yield request

    async def _settle(self, requests: Iterator[Request | None], bar: ProgressBar) -> None:
        client, usage = Client(self._endpoint), self.usage

        async def work() -> None:
            for request in requests:  # shared by all workers
                if request is not None:
                    await self._ask(request, client)
                shown = {"tokens in": usage.tokens_in, "out": usage.tokens_out, "refused": len(self._refused)}
                bar.set_postfix(shown | ({"cost": f"{usage.cost:.2f}"} if any(usage.prices) else {}), refresh=False)
                bar.update()
                await asyncio.sleep(0)  # reading records must not starve the requests under way

        try:
            await run_workers(client, work)
        except BaseException:
            path = self._journal.path
            logger.warning("stopped; %d answers of this run are in %s, the same command resumes", usage.answers, path)
            raise
        finally:
            usage.requests = client.requests

    async def _ask(self, request: Request, client: Client) -> None:
        while (chat := self.outcome(request).chat) is not None:
            try:
                answer = await client.ask(chat)
            except RefusedError as error:
                self._refused[request.key] = str(error)
                logger.warning("record %d is left out: %s", request.index, error)
                return
            self._journal.add(request.key, request.index, answer)
            self.usage.answers += 1
            self.usage.tokens_in += answer.tokens_in
            self.usage.tokens_out += answer.tokens_out
