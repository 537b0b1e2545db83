"""Generation: one request's way from its validation to its last chunk, the same for every transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from inferneo.server.chunks import (
    ChatWriter,
    Chunk,
    CompletionWriter,
    EncodedPrompt,
    Envelope,
    Usage,
    Writer,
)
from inferneo.server.errors import SERVER, TIMEOUT, ApiError, from_exception
from inferneo.server.logprobs import prompt_logprobs
from inferneo.server.protocol import ChatCompletionRequest, CompletionRequest
from inferneo.server.requests import Plan, encode_prompts, make_plan, prompt_texts
from inferneo.server.settings import ServerSettings
from inferneo_core import AsyncEngine, AsyncTokenStream, Completion, FinishReason, SamplingParams, Timings, TokenOutput

Transport: TypeAlias = Literal["sse", "websocket", "http"]


class Heartbeat:
    """Nothing new for `heartbeat_seconds`; the transport sends a sign of life."""


HEARTBEAT: Final = Heartbeat()


@dataclass(eq=False, slots=True)
class Choice:
    """One answer of a request.

    Attributes:
        index: its place among all of them.
        number: its place among the answers to its prompt, which tells their draws apart.
        prompt: shared by those answers.
        writer: makes its JSON.
        siblings: choices that start with this one's first token, when the prompt is in the cache for them.
        num_tokens: generated so far.
        timings: up to the latest token; None before the first.
        finish_reason: None until its end.
        completion: the whole answer, at its end, where it is not sent in chunks.
    """

    index: int
    number: int
    prompt: EncodedPrompt
    writer: Writer
    siblings: list[Choice] = field(default_factory=list)
    num_tokens: int = 0
    timings: Timings | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


class Generation:
    """All answers to one request, merged as their tokens come.

    A reader that falls behind pauses its streams at `max_unread_tokens`; one that takes nothing for
    `slow_reader_seconds` is for the transport to notice and to end with `aclose`.

    Made by `start`. For one consumer: iterate over `batches` or `chunks`, or await `result`.

    Attributes:
        id: of the answer, "chatcmpl-..." or "cmpl-...".
        request_id: the request's own label; None without one.
        choices: every answer, in the order of their indices.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        plan: Plan,
        settings: ServerSettings,
        prompts: list[EncodedPrompt],
        transport: Transport,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._settings = settings
        self._is_stream = transport != "http"
        self._envelope = Envelope(plan, is_stream=self._is_stream, omits_nulls=transport == "websocket")
        self._prompts = prompts
        self._live: dict[Choice, AsyncTokenStream] = {}
        self._deadline = asyncio.get_running_loop().time() + settings.max_request_seconds
        self.id = self._envelope.id
        self.request_id = plan.request_id
        writer = ChatWriter if plan.is_chat else CompletionWriter
        self.choices: tuple[Choice, ...] = tuple(
            Choice(index, number, prompt, writer(index, plan, engine.tokenizer))
            for index, (prompt, number) in enumerate(
                (prompt, number) for prompt in prompts for number in range(plan.num_choices)
            )
        )

    @classmethod
    async def start(
        cls,
        engine: AsyncEngine,
        request: ChatCompletionRequest | CompletionRequest,
        settings: ServerSettings,
        *,
        transport: Transport,
    ) -> Generation:
        """Check a request against every limit, and hand it to the engine.

        Args:
            engine: generates.
            request: from `protocol.validate`.
            settings: names and limits.
            transport: "sse" and "websocket" stream, and differ in how chunks show nulls; "http" answers as a whole.
        Raises:
            ApiError: the request is refused; nothing was left running.
        """
        plan = make_plan(request, settings, is_stream=transport != "http")
        token_ids = await encode_prompts(plan.prompts, engine.tokenizer, engine.model_config.vocab_size)
        texts = await prompt_texts(plan.prompts, token_ids, engine.tokenizer) if plan.echo else [""] * len(token_ids)
        prompts = [EncodedPrompt(ids, text) for ids, text in zip(token_ids, texts, strict=True)]
        generation = cls(engine, plan, settings, prompts, transport)
        try:
            generation._submit_all()
        except Exception as error:
            await generation.aclose()
            raise from_exception(error) from error
        return generation

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self._prompts)

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that the prefix cache held, so far as the prompts have been worked on."""
        return sum(choice.timings.cached_tokens for choice in self.choices if choice.timings and choice.number == 0)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.num_tokens for choice in self.choices)

    async def batches(self) -> AsyncGenerator[list[Chunk], None]:
        """The chunks of a stream, in lists of all that are ready, to be sent with one write.

        An empty list is a heartbeat. Leaving the iteration aborts what still runs.

        Raises:
            ApiError: in mid-stream; what still ran was aborted.
        """
        assert self._is_stream, "this request did not ask for a stream; await its result"
        try:
            while (news := await self._next()) is not None:
                usage = self._usage if self._plan.continuous_usage else None
                chunks = [
                    self._envelope.chunk(entry, usage)
                    for choice, output in news
                    for entry in choice.writer.write(output, choice.prompt)
                ]
                if not self._live:
                    self._envelope.end(chunks, self._usage, self.choices[0].timings)
                yield chunks
        finally:
            await self.aclose()

    async def chunks(self) -> AsyncGenerator[Chunk | Heartbeat, None]:
        """As `batches`, one by one."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for item in batch or (HEARTBEAT,):
                    yield item

    async def result(self) -> dict[str, Any]:
        """The whole answer. Cancelling this aborts the request.

        Raises:
            ApiError: it failed on the way.
        """
        assert not self._is_stream, "this request asked for a stream; iterate over its chunks"
        try:
            while await self._next() is not None:
                pass
        finally:
            await self.aclose()
        entries = []
        for choice in self.choices:
            assert choice.completion is not None
            entries.append(choice.writer.whole(choice.completion, choice.prompt))
        answer = self._envelope.whole(entries, self._usage, self.choices[0].timings)
        if self._plan.num_prompt_logprobs is not None:
            for choice, holder in zip(self.choices, [answer] if self._plan.is_chat else entries, strict=False):
                scores, num_top = choice.prompt.logprobs, self._plan.num_prompt_logprobs
                assert scores is not None
                holder["prompt_logprobs"] = prompt_logprobs(scores, num_top, self._engine.tokenizer)
        return answer

    async def aclose(self) -> None:
        """Abort what still runs, within one step of the engine. Idempotent."""
        for stream in self._live.values():
            stream.abort()

    def _submit_all(self) -> None:
        """Start the first choice of each prompt, and the others at once or once the cache has the prompt for them."""
        config, num_choices = self._engine.config, self._plan.num_choices
        for first in range(0, len(self.choices), num_choices):
            choice, *siblings = self.choices[first : first + num_choices]
            self._submit(choice, self._plan.params)
            # Only full blocks are shared, and the prompt's last token is always computed.
            shares = config.enable_prefix_caching and len(choice.prompt.token_ids) > config.block_size
            if shares or self._plan.params.prompt_logprobs is not None:  # a sibling shows its first choice's scores
                choice.siblings = siblings
            else:
                self._submit_siblings(siblings)

    def _submit_siblings(self, siblings: list[Choice]) -> None:
        params = self._plan.sibling_params
        for sibling in siblings:
            self._submit(sibling, params)

    def _submit(self, choice: Choice, params: SamplingParams) -> None:
        self._live[choice] = self._engine.stream(
            choice.prompt.token_ids, params, choice=choice.number, max_unread=self._settings.max_unread_tokens
        )

    async def _next(self) -> list[tuple[Choice, TokenOutput]] | None:
        """What the choices brought since the last call, waiting for it; [] after a long silence; None at the end."""
        if not self._live:
            return None
        clock = asyncio.get_running_loop().time
        timeout = min(self._settings.heartbeat_seconds, self._deadline - clock())
        await self._engine.wait_any(tuple(self._live.values()), timeout)
        try:
            news = self._read()
        except Exception as error:
            raise from_exception(error) from error
        if self._live and clock() >= self._deadline:
            raise ApiError(
                504,
                f"the request took more than {self._settings.max_request_seconds:g} s and was aborted (ask for fewer "
                "tokens, or raise the server's max_request_seconds)",
                type=TIMEOUT,
                code="request_timeout",
            )
        return news

    def _read(self) -> list[tuple[Choice, TokenOutput]]:
        """Every output that is there. Starts the siblings of a choice that got its first."""
        news: list[tuple[Choice, TokenOutput]] = []
        for choice, stream in list(self._live.items()):
            had_ended = stream.finish_reason is not None  # asked first: one that fails now has its error to raise yet
            for output in stream.read_ready():
                if output.index == 0 and self._plan.params.prompt_logprobs is not None and choice.number == 0:
                    choice.prompt.logprobs = stream.completion().prompt_logprobs
                choice.num_tokens += 1
                choice.timings = output.timings
                choice.finish_reason = output.finish_reason
                news.append((choice, output))
            if choice.num_tokens and choice.siblings:
                self._submit_siblings(choice.siblings)
                choice.siblings = []
            if choice.finish_reason is not None:
                choice.completion = None if self._is_stream else stream.completion()
                del self._live[choice]
            elif had_ended:
                raise ApiError(503, "the request was aborted", type=SERVER, code="aborted")
        return news

    @property
    def _usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.num_cached_tokens, self.num_completion_tokens)
