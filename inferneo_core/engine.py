"""Engine: one model that many streams share, a step at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from inferneo_core.assembly import assemble
from inferneo_core.batch import SampleOutput
from inferneo_core.config import EngineConfig
from inferneo_core.errors import EngineClosed, StepFailed
from inferneo_core.outputs import Completion, EngineStats, Logprob
from inferneo_core.profile import Profile, StepObserver
from inferneo_core.prompt import Prompt, encode_prompt, make_sequence, pair_params
from inferneo_core.request import Request
from inferneo_core.runner import Pending, PromptScores, logprobs_of
from inferneo_core.sampling_params import SamplingParams
from inferneo_core.scheduler import ScheduledBatch
from inferneo_core.step_driver import StepDriver
from inferneo_core.stream import TokenStream
from inferneo_core.stream_decoder import StreamDecoder

logger = logging.getLogger(__name__)

SPEED_WINDOW = 128  # steps over which stats() averages its tokens/s


class Engine:
    """Generates text from a Llama. Thread-safe: any number of threads may stream at once and share its batches.

    No thread is started: a consumer that lacks a token drives the next step for everybody.

    Args:
        model: a directory, a .gguf file, a hub id, or the known name "smollm2-135m-instruct".
        device, ops, dtype, kv_cache_dtype, kv_cache_memory, block_size, max_model_len, max_num_seqs,
            max_num_batched_tokens, enable_prefix_caching, batch_invariant, num_threads: see EngineConfig.

    Attributes:
        config: EngineConfig, as given.
        model_config: ModelConfig of the model.
        tokenizer: its Tokenizer.
        max_model_len: tokens of prompt and output that one stream may have.

    Raises:
        ModelError: the model's files cannot be used.
        ConfigError: an argument is impossible, or the cache does not fit.
        BackendUnavailable: the device or the backend is missing.
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
        self.config = EngineConfig(
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
        parts = assemble(model, self.config)
        self.model_config = parts.model_config
        self.max_model_len = parts.max_model_len
        self.tokenizer = parts.tokenizer
        self._runner = parts.runner
        self._scheduler = parts.scheduler
        self._block_manager = parts.block_manager
        self._requests: dict[int, Request] = {}  # alive, by seq_id
        self._seq_ids = itertools.count()
        self._driver = StepDriver(self._step, self._shut)
        # The step launched before the last one's tokens were read.
        self._in_flight: tuple[ScheduledBatch, Pending] | None = None
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_aborts = 0
        self._speed: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW)  # (seconds, tokens) of recent steps

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, choice: int = 0) -> TokenStream:
        """Start generating; returns at once.

        Args:
            prompt: text, token ids, or chat messages (dicts with "role" and "content").
            params: SamplingParams; None takes its defaults.
            choice: tells apart the draws of several answers to one prompt and seed.
        Returns:
            A TokenStream: iterate over it for TokenOutputs; close or drop it to abort.
        Raises:
            RequestError: the prompt or the parameters are refused; nothing was started.
            EngineClosed: the engine was closed.
        """
        if params is None:
            params = SamplingParams()
        elif not isinstance(params, SamplingParams):
            raise TypeError(f"params is a {type(params).__name__}; it is a SamplingParams or None")
        vocab_size = self.model_config.vocab_size
        sequence = make_sequence(
            next(self._seq_ids),
            encode_prompt(prompt, self.tokenizer, vocab_size),
            params,
            choice=choice,
            max_model_len=self.max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )
        request = Request(sequence, StreamDecoder(self.tokenizer, tuple(params.stop)))
        self._driver.submit(partial(self._admit, request))
        return TokenStream(self, request)

    def generate(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Generate answers to many prompts in shared batches; returns them in the order of the prompts.

        Args:
            prompts: a list of what `stream` takes.
            params: for all of them, or one for each.
            progress: show a tqdm bar.
        Raises:
            RequestError: one of them is refused; nothing was started.
            StepFailed, EngineClosed: as iteration over a stream does; the others are aborted.
        """
        streams: list[TokenStream] = []
        try:
            for prompt, its_params in pair_params(prompts, params):
                streams.append(self.stream(prompt, its_params))
            for stream in tqdm(streams, desc="Generating", unit="prompt", disable=not progress):
                deque(stream, maxlen=0)
            return [stream.completion() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def step(self) -> bool:
        """Run one step for every live stream, or a few that pay together; False when there was nothing to do.

        Streams call this by themselves.
        """
        return self._driver.step()

    def profile(self, prompt: Prompt, params: SamplingParams | None = None) -> Profile:
        """Generate one answer and time every verb of its steps; needs no tool from outside.

        Other streams share the steps and are in their times. A GPU's decode steps run verb by verb, not as one graph:
        the verbs' times are the device's own, the steps' are longer than when served.

        Args:
            prompt, params: as `stream` takes them.
        Raises:
            RequestError, StepFailed, EngineClosed: as `stream` and its iteration do.
        """
        with self.stream(prompt, params) as stream:
            observer = StepObserver(self._runner.ops.device)
            self._driver.submit(partial(self._runner.observe, observer))
            try:
                while stream.finish_reason is None:
                    while not stream.is_settled:
                        started = time.perf_counter()
                        self.step()
                        observer.end_step(time.perf_counter() - started)
                    next(stream)
            finally:
                self._driver.post(partial(self._runner.observe, None))
            return Profile(stream.completion(), tuple(observer.steps))

    def stats(self) -> EngineStats:
        """A snapshot of the engine's gauges and counters."""
        with self._driver.between_steps():
            speed = list(self._speed)  # a copy: a step may append to it meanwhile
            seconds = sum(duration for duration, _ in speed)
            return EngineStats(
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting + self._scheduler.num_paused,
                free_blocks=self._block_manager.free_blocks,
                cached_blocks=self._block_manager.cached_blocks,
                total_blocks=self._block_manager.total_blocks,
                steps=self._num_steps,
                prompt_tokens=self._num_prompt_tokens,
                generated_tokens=self._num_generated_tokens,
                prefix_query_tokens=self._scheduler.prefix_query_tokens,
                prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
                preemptions=self._scheduler.num_preemptions,
                aborts=self._num_aborts,
                tokens_per_s=sum(tokens for _, tokens in speed) / seconds if seconds else 0.0,
            )

    def close(self) -> None:
        """End every live stream with EngineClosed and release the weights and the cache. Thread-safe, idempotent.

        Waits for the step in flight, except when called from inside it; then the step closes the engine as it ends.
        """
        self._driver.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What a TokenStream calls.

    def advance(self, request: Request) -> None:
        """Return once the request is settled: wait while another thread steps, otherwise step."""
        progressed = self._driver.advance(lambda: request.is_settled)
        is_alive = request.sequence.seq_id in self._requests  # asked before is_settled: it settles, then it dies
        assert progressed or is_alive or request.is_settled, f"nobody serves {request.sequence}"

    def abort(self, request: Request) -> None:
        """End the request before the next step."""
        self._driver.post(partial(self._end, request))

    def set_paused(self, request: Request, paused: bool) -> None:
        """Pause or resume the request before the next step."""
        change = self._scheduler.pause if paused else self._scheduler.resume
        self._driver.post(partial(change, request.sequence))

    # The step, and what runs between steps. Only the thread whose turn it is comes here.

    def _step(self) -> bool:
        """Schedule, launch, wait, update, deliver. Where the device needs no token to go on, it is sent on first."""
        self._driver.drain()
        batch, pending = self._in_flight or (self._schedule(), None)
        self._in_flight = None
        if not batch:
            assert len(self._requests) == self._scheduler.num_paused, "there are requests that no step can serve"
            return False
        started = time.perf_counter()
        repeatable = True
        try:
            pending = pending or self._launch(batch)
            following = self._launch_ahead(batch, pending)
            sampled = pending.wait()
            token_ids = [] if sampled is None else sampled.token_ids.tolist()
            repeatable = False
            num_sampled = self._accept(batch, pending.prompt_scores, sampled, token_ids)
        except Exception as error:
            self._fail(batch, error)
            return True
        except BaseException as error:  # a KeyboardInterrupt: the next step repeats this one, if it may
            if not repeatable:  # else a stream would go on without the token it was not handed
                self._fail(batch, error)
            raise
        self._in_flight = following
        self._num_steps += batch.num_steps
        self._speed.append((time.perf_counter() - started, num_sampled))
        return True

    def _schedule(self) -> ScheduledBatch:
        """The next batch: one step, or as many as pay where no step of them waits for anybody."""
        batch = self._scheduler.schedule()
        return self._scheduler.extend(batch, self._runner.num_steps(batch)) if batch else batch

    def _launch(self, batch: ScheduledBatch) -> Pending:
        for sequence, start, _, _ in batch.sequences:
            if start < sequence.num_prompt_tokens:
                self._requests[sequence.seq_id].start_prefill()
        return self._runner.launch(batch)

    def _launch_ahead(self, batch: ScheduledBatch, pending: Pending) -> tuple[ScheduledBatch, Pending] | None:
        """Launch the step after `batch` behind it, if that needs no token of it. It is dropped should `batch` fail."""
        ahead = self._scheduler.schedule_ahead(batch) if pending.can_go_on else None
        return None if ahead is None else (ahead, self._runner.launch_ahead(ahead))

    def _accept(
        self,
        batch: ScheduledBatch,
        prompt_scores: list[PromptScores],
        sampled: SampleOutput | None,
        token_ids: list[int],
    ) -> int:
        """Update and deliver, step after step of the batch: what a sequence drew past its end is dropped.

        Returns:
            How many tokens were delivered.
        """
        for scores in prompt_scores:
            request = self._requests.get(scores.sequence.seq_id)
            if request is not None:
                request.accept_prompt_logprobs(scores.start, scores.logprobs)
        logprobs = logprobs_of(sampled) if sampled is not None and sampled.logprobs is not None else None
        num_rows = len(token_ids) // batch.num_steps
        num_delivered = 0
        for index in range(batch.num_steps):
            step = batch.ahead(index) if index else batch
            drawn = token_ids[index * num_rows : (index + 1) * num_rows]
            if -1 in drawn:
                self._fail_undrawn(step, drawn)
            self._scheduler.update(step, drawn)
            num_delivered += self._deliver(step, logprobs or [None] * num_rows)
        return num_delivered

    def _deliver(self, batch: ScheduledBatch, logprobs: SequenceOf[Logprob | None]) -> int:
        """Hand each stream its token; returns how many there were."""
        shares = [share for share in batch.sequences if share.samples]
        num_delivered = 0
        for (sequence, start, num_tokens, _), logprob in zip(shares, logprobs, strict=True):
            request = self._requests.get(sequence.seq_id)
            if request is None or sequence.num_tokens != start + num_tokens + 1:
                continue  # it ended, or lost its blocks, since the step was launched; or no token could be drawn
            request.accept(sequence.token_ids[-1], logprob)
            num_delivered += 1
            if request.finish_reason is not None:
                self._retire(request)
        self._num_generated_tokens += num_delivered
        return num_delivered

    def _fail_undrawn(self, batch: ScheduledBatch, token_ids: list[int]) -> None:
        """End the requests for which the sampler found no token to draw; it marks them with -1."""
        sampling = (share.sequence for share in batch.sequences if share.samples)
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            if token_id == -1 and sequence.seq_id in self._requests:
                where = f"at position {sequence.num_tokens}"
                error = StepFailed(f"no token can be drawn {where}: the logits hold a NaN, or every token is forbidden")
                self._end(self._requests[sequence.seq_id], error)

    def _admit(self, request: Request) -> None:
        self._requests[request.sequence.seq_id] = request
        self._num_prompt_tokens += request.sequence.num_prompt_tokens
        self._scheduler.add(request.sequence)

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        """End a request that has not ended by itself; one that has stays as it is."""
        if request.finish_reason is None:
            request.end(error)
            self._num_aborts += 1
            self._retire(request)

    def _retire(self, request: Request) -> None:
        """Forget an ended request, free its blocks, and log it."""
        assert request.finish_reason is not None
        self._scheduler.finish(request.sequence, request.finish_reason)
        del self._requests[request.sequence.seq_id]
        request.log()

    def _fail(self, batch: ScheduledBatch, cause: BaseException) -> None:
        """Raise a step's exception in every stream of its batch; the others go on, unless the device is lost."""
        logger.error("a step of %d sequences failed: %r", len(batch.sequences), cause)
        for share in batch.sequences:
            request = self._requests.get(share.sequence.seq_id)
            if request is not None:  # else it had its last token before the step failed
                error = StepFailed(f"the engine's step failed: {type(cause).__name__}: {cause}")
                error.__cause__ = cause
                self._end(request, error)
        if isinstance(cause, torch.AcceleratorError):
            self._driver.close()  # takes effect as this step ends: nothing on a lost device can be trusted

    def _shut(self) -> None:
        for request in list(self._requests.values()):
            self._end(request, EngineClosed("the engine was closed before the stream's end"))
        self._runner.release()
