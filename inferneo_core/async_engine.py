"""AsyncEngine: the same engine for asyncio, behind the one thread that drives its steps."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Sequence as SequenceOf
from itertools import islice
from pathlib import Path
from types import TracebackType

from inferneo_core.config import EngineConfig, ModelConfig
from inferneo_core.engine import Engine
from inferneo_core.errors import EngineClosed
from inferneo_core.outputs import Completion, EngineStats, FinishReason, TokenOutput
from inferneo_core.prompt import Prompt, pair_params
from inferneo_core.readers import Readers
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
        self._readers = Readers()
        # Streams with a max_unread, by request_id. Weak: a stream that its consumer drops must go.
        self._bounded: dict[int, tuple[weakref.ref[TokenStream], int]] = {}
        self._work = threading.Event()  # set when there may be something to step for
        self._thread = threading.Thread(target=self._drive, name="inferneo-engine", daemon=True)
        self._thread.start()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, choice: int = 0, max_unread: int | None = None
    ) -> AsyncTokenStream:
        """Start generating; returns at once. Call it from a running event loop.

        Args:
            prompt, params, choice: as Engine.stream takes them.
            max_unread: pause the stream while so many outputs wait for their reader, who resumes it by reading them
                all; None lets max_tokens of them wait. Steps that run together still bring their tokens.
        Returns:
            An AsyncTokenStream: `async for` over it for TokenOutputs.
        Raises:
            What Engine.stream raises.
        """
        stream = self._engine.stream(prompt, params, choice=choice)
        if max_unread is not None:
            assert max_unread >= 1, f"max_unread is {max_unread}"
            self._bounded[stream.request_id] = (weakref.ref(stream), max_unread)
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

    async def wait_any(self, streams: SequenceOf[AsyncTokenStream], timeout: float | None = None) -> None:
        """Return once a read of one of these streams would not wait, or after so many seconds.

        Reads nothing. Cancelling it ends no stream.
        """
        for stream in streams:
            stream.resume_if_drained()
        await self._readers.wait(*(stream._stream for stream in streams), timeout=timeout)

    @property
    def is_closed(self) -> bool:
        """Whether the engine takes no more requests: it was closed, or its device failed."""
        return not self._thread.is_alive()

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
                    self._pause_unread()
                    self._readers.wake_settled()
                self._readers.wake_settled()
        except EngineClosed:
            pass
        except Exception:
            logger.exception("the engine's thread failed; the engine is closed")
            self._engine.close()
        self._readers.wake_settled()

    def _pause_unread(self) -> None:
        """Pause the streams whose readers are too far behind."""
        for request_id, (reference, max_unread) in self._bounded.copy().items():
            stream = reference()
            if stream is None or stream.has_ended:
                del self._bounded[request_id]
            elif stream.num_unread >= max_unread and not stream.is_paused:
                stream.pause()
                if stream.num_unread < max_unread:  # the reader was here meanwhile, and may not have seen the pause
                    stream.resume()


class AsyncTokenStream:
    """An async iterator over the TokenOutputs of one request; what AsyncEngine.stream returns.

    For one consumer. Closing, leaving `async with`, dropping it, or cancelling a read aborts the request; to wait
    with a timeout, shield the read.

    Raises (from iteration): as TokenStream.
    """

    def __init__(self, stream: TokenStream, readers: Readers, work: threading.Event) -> None:
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

    @property
    def is_settled(self) -> bool:
        """Whether the next read returns at once: there is an output, an error, or the end."""
        return self._stream.is_settled

    @property
    def is_paused(self) -> bool:
        """Whether it was paused, by `pause` or by its max_unread, and not resumed since."""
        return self._stream.is_paused

    def completion(self) -> Completion:
        """As TokenStream.completion."""
        return self._stream.completion()

    def read_ready(self) -> list[TokenOutput]:
        """Every output that is there, without waiting; [] when there is none, be it yet or any more.

        Raises:
            What iteration raises, once there is no output left before it.
        """
        ready = list(islice(self._stream, self._stream.num_unread))
        if not ready and self._stream.has_ended:  # nothing more is made: one that came just now, or the end or error
            ready = list(islice(self._stream, max(1, self._stream.num_unread)))
        return ready

    def pause(self) -> None:
        """Stop generating until `resume` or the next read that finds nothing."""
        self._stream.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._stream.resume()
        self._work.set()

    def resume_if_drained(self) -> None:
        """Undo `pause` where the reader has read all there was."""
        if self._stream.is_paused and not self._stream.is_settled:
            self.resume()

    def abort(self) -> None:
        """Abort the request unless it has ended; idempotent. A reader that waits meanwhile sees the end."""
        self._stream.close()
        self._work.set()

    async def aclose(self) -> None:
        """As `abort`."""
        self.abort()

    def __aiter__(self) -> AsyncTokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._stream.is_settled:
            self.resume_if_drained()
            try:
                await self._readers.wait(self._stream)
            except asyncio.CancelledError:  # now, not when the last traceback that holds this stream is dropped
                self.abort()
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
