"""AsyncEngine: the same engine for asyncio, behind the one thread that drives its steps."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType

from inferneo_core.config import EngineConfig, ModelConfig
from inferneo_core.engine import Engine
from inferneo_core.errors import EngineClosed
from inferneo_core.outputs import Completion, EngineStats, FinishReason, TokenOutput
from inferneo_core.prompt import Prompt, pair_params
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.stream import TokenStream
from inferneo_core.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class AsyncEngine:
    """An Engine whose steps run in a thread of its own, so that the event loop never waits for one.

    Args:
        model, device, ops, dtype, kv_cache_dtype, kv_cache_memory, block_size, max_model_len, max_num_seqs,
            max_num_batched_tokens, enable_prefix_caching, batch_invariant, num_threads: as Engine takes them.

    Attributes:
        config, model_config, tokenizer, max_model_len: as Engine has them.

    Raises:
        What Engine raises.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        ops: str = "auto",
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        kv_cache_memory: int | None = None,
        block_size: int = 16,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        enable_prefix_caching: bool = True,
        batch_invariant: bool | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._engine = Engine(
            model,
            device=device,
            ops=ops,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=kv_cache_memory,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            batch_invariant=batch_invariant,
            num_threads=num_threads,
        )
        self.config: EngineConfig = self._engine.config
        self.model_config: ModelConfig = self._engine.model_config
        self.tokenizer: Tokenizer = self._engine.tokenizer
        self.max_model_len: int = self._engine.max_model_len
        self._readers = _Readers()
        self._work = threading.Event()  # set when there may be something to step for
        self._thread = threading.Thread(target=self._drive, name="inferneo-engine", daemon=True)
        self._thread.start()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, choice: int = 0) -> AsyncTokenStream:
        """Start generating; returns at once. Call it from a running event loop.

        Args, Raises: as Engine.stream.
        Returns:
            An AsyncTokenStream: `async for` over it for TokenOutputs.
        """
        stream = self._engine.stream(prompt, params, choice=choice)
        self._work.set()
        return AsyncTokenStream(stream, self._readers, self._work)

    async def generate(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> list[Completion]:
        """Generate answers to many prompts in shared batches; returns them in the order of the prompts.

        Args, Raises: as Engine.generate.
        """
        streams: list[AsyncTokenStream] = []
        try:
            for prompt, its_params in pair_params(prompts, params):
                streams.append(self.stream(prompt, its_params))
            for stream in streams:
                async for _ in stream:
                    pass
            return [stream.completion() for stream in streams]
        finally:
            for stream in streams:
                await stream.aclose()

    def stats(self) -> EngineStats:
        """A snapshot of the engine's gauges and counters."""
        return self._engine.stats()

    async def close(self) -> None:
        """End every live stream with EngineClosed, stop the thread, release weights and cache. Idempotent."""
        await asyncio.to_thread(self._engine.close)  # waits for the step in flight
        self._work.set()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _drive(self) -> None:
        """The thread: step while there is work, and wake the readers that a step brought something."""
        try:
            while True:
                self._work.wait()
                self._work.clear()
                while self._engine.step():
                    self._readers.wake_settled()
                self._readers.wake_settled()
        except EngineClosed:
            pass
        except Exception:
            logger.exception("the engine's thread failed; the engine is closed")
            self._engine.close()
        self._readers.wake_settled()


class AsyncTokenStream:
    """An async iterator over the TokenOutputs of one request; what AsyncEngine.stream returns.

    For one consumer. Closing, leaving `async with`, dropping it, or cancelling a read aborts the request; to wait
    with a timeout, shield the read.

    Raises (from iteration): as TokenStream.
    """

    def __init__(self, stream: TokenStream, readers: _Readers, work: threading.Event) -> None:
        self._stream = stream
        self._readers = readers
        self._work = work

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model sees it."""
        return self._stream.prompt_token_ids

    @property
    def request_id(self) -> int:
        """The engine's number for this request, as in its log."""
        return self._stream.request_id

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended; None while it runs, or while there are outputs to read."""
        return self._stream.finish_reason

    def completion(self) -> Completion:
        """The whole answer so far; "abort" as finish_reason if the stream has not ended by itself."""
        return self._stream.completion()

    def pause(self) -> None:
        """Stop generating until `resume` or the next read that finds nothing."""
        self._stream.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._stream.resume()
        self._work.set()

    async def aclose(self) -> None:
        """Abort the request unless it has ended; idempotent. A reader that waits meanwhile sees the end."""
        self._stream.close()
        self._work.set()

    def __aiter__(self) -> AsyncTokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._stream.is_settled:
            if self._stream.is_paused:
                self.resume()
            try:
                await self._readers.wait(self._stream)
            except asyncio.CancelledError:  # now, not when the last traceback that holds this stream is dropped
                await self.aclose()
                raise
        try:
            return next(self._stream)  # settled: takes what is there and never steps
        except StopIteration:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Readers:
    """The consumers that wait for an output, each in its own event loop.

    No lock: each access to the dict is one operation of its own. The garbage collector may end a reader, in any thread
    and in the middle of any line, and a reader that had to wait for a lock there would wait for ever.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], TokenStream] = {}

    async def wait(self, stream: TokenStream) -> None:
        """Return once the stream is settled."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = stream
        try:
            if not stream.is_settled:  # looked at after registering: a step in between would wake this future
                await future
        finally:
            self._waiting.pop(future, None)

    def wake_settled(self) -> None:
        """Wake every reader whose stream is settled, with one call into each event loop."""
        by_loop = defaultdict(list)
        for future, stream in self._waiting.copy().items():
            if stream.is_settled:
                self._waiting.pop(future, None)
                by_loop[future.get_loop()].append(future)
        for loop, futures in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, futures)
            except RuntimeError:  # the loop was closed under its readers; nobody is left to wake
                logger.debug("%d readers went away with their event loop", len(futures))


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
