"""Asking a model about every record of a file: what is open is asked, many at once, until it is settled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import RecordFile
from swim_fast.llm.endpoint import Endpoint, EndpointOptions, RefusedError, run_workers
from swim_fast.llm.journal import Answer, Journal, answer_key
from swim_fast.nl_refer.placeholders import Expression, Task, check_rest, find_task
from swim_fast.nl_refer.prompt import UnnamedError, estimate_tokens, messages, objection, read_answer
from swim_fast.nl_refer.validation import RejectedError, check_expressions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskOptions:
    """See `swim_fast.nl_refer.build.BuildOptions`."""

    endpoint: EndpointOptions
    binding: str
    max_words: int
    attempts: int
    progress: bool


@dataclass
class Asked:
    """What was asked and what it cost.

    Attributes:
        prices: of a million tokens in and out; 0 where nobody said.
        settled_before: records that the journal had settled already.
        open: records that were to be asked about.
        requests: sent in this run, retries included.
        tokens_in, tokens_out: of this run, as the endpoint counts them; of a dry run, estimated.
        kept_in, kept_out: of all answers that the journal has for these records.
        answers: received in this run.
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

    def add(self, answer: Answer) -> None:
        """Count an answer of this run."""
        self.answers += 1
        self.tokens_in += answer.tokens_in
        self.tokens_out += answer.tokens_out

    @property
    def cost(self) -> float:
        """Of this run."""
        return self._cost(self.tokens_in, self.tokens_out)

    def lines(self, dry_run: bool) -> Iterator[str]:
        """For the report.

        Args:
            dry_run: whether the tokens are estimates.
        """

        def cost(tokens_in: int, tokens_out: int) -> str:
            return f", cost {self._cost(tokens_in, tokens_out):,.2f}" if any(self.prices) else ""

        if self.settled_before:
            yield f"  {self.settled_before:,} records were settled by the journal"
        spent = f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out{cost(self.tokens_in, self.tokens_out)}"
        if dry_run:
            yield f"  {self.open:,} records to ask about, at least {self.open:,} requests: about {spent}"
            return
        yield f"  {self.requests:,} requests, {self.answers:,} answers, {spent}"
        if self.answers and not self.tokens_in:
            yield "  (the endpoint does not count tokens)"
        if self.settled_before:
            kept = f"{self.kept_in:,} tokens in, {self.kept_out:,} out{cost(self.kept_in, self.kept_out)}"
            yield f"  with earlier runs: {kept}"

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6


@dataclass(frozen=True)
class Outcome:
    """What the answers for a record amount to.

    Attributes:
        expressions: valid ones, or None.
        is_open: whether the record should be asked about (again).
        kind, reason: why there are no expressions: in one word for all such records, and for this one.
        answer: the last answer.
        chat: what is to be asked next.
    """

    expressions: Sequence[Expression] | None
    is_open: bool
    kind: str = ""
    reason: str = ""
    answer: str | None = None
    chat: tuple[dict[str, str], ...] = ()


def judge(task: Task, answers: Sequence[str], max_words: int, attempts: int) -> Outcome:
    """Hold a model's answers, in the order in which they came, against the rules.

    Args:
        task: the record.
        answers: as the model wrote them.
        max_words: most words of an expression.
        attempts: how many answers there may be.
    """
    chat, reason = messages(task, max_words), ""
    for answer in answers:
        try:
            expressions = read_answer(answer, task)
            check_expressions(task, expressions, max_words)
            return Outcome(expressions, False, answer=answer)
        except UnnamedError as error:
            return Outcome(None, False, "never named, says the model", str(error), answer)
        except RejectedError as error:
            reason = str(error)
            chat += objection(answer, reason)
    last = answers[-1] if answers else None
    return Outcome(None, len(answers) < attempts, "rejected in every attempt", reason, last, tuple(chat))


def ask_all(
    records: RecordFile,
    count: int,
    options: AskOptions,
    journal: Journal | None,
    asked: Asked,
    *,
    dry_run: bool,
) -> Callable[[Task, dict], Outcome]:
    """Ask about the first ``count`` records until the journal settles each.

    Args:
        records: the raw file.
        count: how many of its records.
        options: how.
        journal: takes the answers; None only for a dry run without one.
        asked: is filled in while this runs.
        dry_run: only estimate.

    Returns:
        A function of a record's task and raw entry: what the journal has for it.

    Raises:
        EndpointError: the endpoint cannot be used; what was answered is in the journal.
    """
    refused: dict[int, str] = {}

    def key_of(task: Task, entry: dict) -> str:
        return answer_key(task.number, entry, options.endpoint.model, messages(task, options.max_words))

    def outcome(task: Task, key: str) -> Outcome:
        kept = journal.answers(key) if journal is not None else []
        return judge(task, [answer.answer for answer in kept], options.max_words, options.attempts)

    def final(task: Task, entry: dict) -> Outcome:
        key = key_of(task, entry)
        for answer in journal.answers(key):
            asked.kept_in += answer.tokens_in
            asked.kept_out += answer.tokens_out
        found = outcome(task, key)
        if found.expressions is None and task.number in refused:
            return Outcome(
                None, False, "refused by the endpoint; the next run asks again", refused[task.number], found.answer
            )
        return found

    def open_tasks() -> Iterator[tuple[Task, str] | None]:
        """The tasks to ask about; None for each record that needs no asking."""
        for number in range(count):
            try:
                entry = records.raw(number)
                task = find_task(entry, number, options.binding)
                if task is not None:
                    check_rest(records, entry, task)
            except DataError:
                task = None  # reported when the output is written
            if task is None:
                yield None
                continue
            key = key_of(task, entry)
            if outcome(task, key).is_open:
                asked.open += 1
                yield task, key
            else:
                asked.settled_before += 1
                yield None

    hidden = not options.progress
    with logging_redirect_tqdm(), tqdm(total=count, desc="asking", unit="record", disable=hidden) as bar:
        if dry_run:
            for found in open_tasks():
                bar.update()
                if found:
                    tokens = estimate_tokens(messages(found[0], options.max_words), len(found[0].placeholders))
                    asked.tokens_in += tokens[0]
                    asked.tokens_out += tokens[1]
        else:
            asyncio.run(_ask(open_tasks(), outcome, options, journal, asked, refused, bar))
    return final


async def _ask(
    tasks: Iterator[tuple[Task, str] | None],
    outcome: Callable[[Task, str], Outcome],
    options: AskOptions,
    journal: Journal,
    asked: Asked,
    refused: dict[int, str],
    bar: tqdm,
) -> None:
    endpoint = Endpoint(options.endpoint)

    async def settle_all() -> None:
        while (found := next(tasks, "end")) != "end":
            if found is not None:
                await settle(*found)
            shown = {"tokens in": asked.tokens_in, "out": asked.tokens_out, "refused": len(refused)}
            bar.set_postfix({**shown, "cost": f"{asked.cost:.2f}"} if any(asked.prices) else shown, refresh=False)
            bar.update()
            await asyncio.sleep(0)  # reading records must not starve the requests under way

    async def settle(task: Task, key: str) -> None:
        while (state := outcome(task, key)).is_open:
            try:
                answer = await endpoint.ask(list(state.chat))
            except RefusedError as error:
                refused[task.number] = str(error)
                logger.warning("record %d is left out: %s", task.number, error)
                return
            journal.add(key, task.number, answer)
            asked.add(answer)

    def ended(whole: bool) -> None:
        asked.requests = endpoint.requests
        if not whole:
            logger.warning(
                "stopped; %d answers of this run are in %s, the same command goes on", asked.answers, journal.path
            )

    await run_workers(endpoint, settle_all, ended)
