"""DecodeGraphs: a whole decode step as one graph replay.

At batch 1 a small model's kernels take less time than launching them from Python. But one decode step launches the same
kernels as the last, so they are captured once and replayed together: embedding, layers, output head, draw, and
`advance`, which leaves the state as the next step wants it. What differs between steps lies in tensors whose addresses
never change (DecodeState). A batch runs in the smallest captured size that holds it; its rows to spare are padding.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from inferneo_core.batch import (
    COUNT_ROW,
    NUM_FLOATS,
    NUM_INTS,
    AttentionMetadata,
    DecodeState,
    ModelInput,
    SampleOutput,
    SamplingBatch,
)
from inferneo_core.kv_cache import KVCache
from inferneo_core.model import Llama
from inferneo_core.ops.base import GraphOps

logger = logging.getLogger(__name__)

MAX_BIASES = 4096  # of a whole batch; a step with more runs without a graph
MAX_LOGPROBS = 20  # a graph that reports log-probabilities reports as many as a request may ask for
RING_SIZE = 2  # one step being copied to the host, one in flight
ALIGNMENT = 256  # bytes; Triton compiles wide loads for pointers that are multiples of 16


class _Kind(NamedTuple):
    """What a graph was captured for: steps of one kind and size launch the same kernels."""

    num_rows: int
    has_filters: bool = False
    has_penalties: bool = False
    has_biases: bool = False
    has_logprobs: bool = False


class DecodeGraphs:
    """Runs steps in which every sequence computes one token and draws one.

    Args:
        model, cache, ops: what a step runs.
        token_counts: [max_num_seqs, vocab_size] int32; the counts of every batch with penalties.
        max_num_seqs: sequences a step at most.
        max_model_len: tokens a sequence at most.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        ops: GraphOps,
        token_counts: Tensor,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._ops = ops
        self._token_counts = token_counts
        self._max_model_len = max_model_len
        self._sizes = batch_sizes(max_num_seqs)
        num_rows, num_blocks = self._sizes[-1], -(-max_model_len // cache.block_size)
        self._arena = _Arena(
            {
                "step": ((1,), torch.int64),
                "token_ids": ((num_rows,), torch.int64),
                "positions": ((num_rows,), torch.int64),
                "slot_mapping": ((num_rows,), torch.int64),
                "seq_lens": ((num_rows,), torch.int32),
                "ints": ((num_rows, NUM_INTS), torch.int64),
                "floats": ((num_rows, NUM_FLOATS), torch.float32),
                "bias_start": ((num_rows + 1,), torch.int32),
                "bias_ids": ((MAX_BIASES,), torch.int32),
                "bias_values": ((MAX_BIASES,), torch.float32),
                "bias_steps": ((MAX_BIASES,), torch.int32),
                "block_tables": ((num_rows, num_blocks), torch.int32),
            },
            ops.device,
        )
        self._query_start_loc = torch.arange(num_rows + 1, dtype=torch.int32, device=ops.device)
        self._rows = torch.arange(num_rows, device=ops.device)
        self._ring = torch.zeros(RING_SIZE, num_rows, dtype=torch.int64, device=ops.device)
        self._graphs: dict[_Kind, Callable[[], SampleOutput]] = {}
        self._last: tuple[_Kind, int, int] | None = None  # kind, sequences and log-probabilities of the last step
        self._num_ahead = 0  # steps since the host wrote the state

    @property
    def num_captured(self) -> int:
        """How many graphs there are: none is added while serving what `warm_up` has foreseen."""
        return len(self._graphs)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture steps of every size with and without filters and penalties, largest first: the smaller ones then find
        their memory in its pool. Biases and log-probabilities are captured when first met: by then all is compiled."""
        started = time.perf_counter()
        choices = itertools.product(reversed(self._sizes), (True, False), (True, False))
        kinds = [_Kind(num_rows, has_filters, has_penalties) for num_rows, has_filters, has_penalties in choices]
        for kind in tqdm(kinds, desc="Capturing", unit="graph", leave=False, disable=not sys.stderr.isatty()):
            self._graph(kind)
        seconds = time.perf_counter() - started
        logger.info("captured %d decode graphs of up to %d sequences in %.3f s", len(kinds), self._sizes[-1], seconds)

    def takes(self, inputs: ModelInput, sampling: SamplingBatch) -> bool:
        """Whether a step can run here: one token a sequence, each drawn after, and no more biases than have room."""
        num_seqs = inputs.attention.num_seqs
        num_biases = 0 if sampling.bias_ids is None else sampling.bias_ids.numel()
        is_decode = len(inputs.token_ids) == len(inputs.rows) == num_seqs
        return is_decode and num_seqs <= self._sizes[-1] and num_biases <= MAX_BIASES

    def launch(self, inputs: ModelInput, sampling: SamplingBatch) -> SampleOutput:
        """Run a step that `takes` has accepted, when no step is in flight.

        Args:
            inputs, sampling: on the host, but for token_counts.
        Returns:
            SampleOutput on the device. Its token_ids outlive the next step, the other fields do not.
        """
        num_seqs = inputs.attention.num_seqs
        kind = _Kind(
            next(size for size in self._sizes if size >= num_seqs),
            sampling.has_filters,
            sampling.token_counts is not None,
            sampling.bias_start is not None,
            sampling.num_logprobs >= 0,
        )
        assert sampling.token_counts is None or sampling.token_counts is self._token_counts, "these are other counts"
        self._arena.settle()
        self._fill(inputs, sampling)
        self._pad(num_seqs, kind.num_rows)
        if kind not in self._graphs:
            self._graph(kind)
        self._arena.upload(kind.num_rows)
        self._last, self._num_ahead = (kind, num_seqs, sampling.num_logprobs), 0
        return self._replay()

    def launch_ahead(self, new_blocks: list[tuple[int, int, int]]) -> SampleOutput:
        """Run the step after the last one: the same sequences, each at the token that only the device knows as yet.

        Args:
            new_blocks: (row, index, block): what block tables have gained for the step after this one. This one's slots
                were computed by the last one's `advance`.
        Returns:
            As `launch`.
        """
        host, device = self._arena.host["block_tables"], self._arena.device["block_tables"]
        for row, index, block in new_blocks:
            host[row, index] = block
            device[row, index : index + 1].copy_(host[row, index : index + 1], non_blocking=True)
        self._num_ahead += 1
        return self._replay()

    def _replay(self) -> SampleOutput:
        assert self._last is not None, "there is no step to go on from"
        kind, num_seqs, num_logprobs = self._last
        output = self._graphs[kind]()
        token_ids = self._ring[self._num_ahead % RING_SIZE, :num_seqs]
        if output.logprobs is None or output.ranks is None or output.top_ids is None or output.top_logprobs is None:
            return SampleOutput(token_ids)
        return SampleOutput(
            token_ids,
            output.logprobs[:num_seqs],
            output.ranks[:num_seqs],
            output.top_ids[:num_seqs, :num_logprobs],
            output.top_logprobs[:num_seqs, :num_logprobs],
        )

    def _fill(self, inputs: ModelInput, sampling: SamplingBatch) -> None:
        """Write a step's sequences into the first rows of the host's side."""
        fields: dict[str, Tensor | None] = {
            "token_ids": inputs.token_ids,
            "positions": inputs.positions,
            "slot_mapping": inputs.slot_mapping,
            "seq_lens": inputs.attention.seq_lens,
            "ints": sampling.ints,
            "floats": sampling.floats,
            "bias_start": sampling.bias_start,
            "bias_ids": sampling.bias_ids,
            "bias_values": sampling.bias_values,
            "bias_steps": sampling.bias_steps,
        }
        self._arena.host["bias_start"].zero_()
        for name, tensor in fields.items():
            if tensor is not None:
                self._arena.host[name][: len(tensor)] = tensor
        tables = inputs.attention.block_tables
        self._arena.host["block_tables"][: tables.shape[0], : tables.shape[1]] = tables

    def _pad(self, start: int, end: int) -> None:
        """Make rows `start` to `end` of the host's side rows to spare."""
        host, rows = self._arena.host, slice(start, end)
        for name in ("token_ids", "positions", "seq_lens", "ints", "floats", "block_tables"):
            host[name][rows] = 0
        host["slot_mapping"][rows] = -1
        host["ints"][rows, COUNT_ROW] = -1
        host["bias_start"][start + 1 : end + 1] = host["bias_start"][start]

    def _graph(self, kind: _Kind) -> None:
        """Capture the step of a kind. It runs once before, to compile and load it: with rows to spare only, so that it
        writes nothing to the cache."""
        self._arena.settle()
        filled = {name: tensor.clone() for name, tensor in self._arena.host.items()}
        self._pad(0, kind.num_rows)
        self._arena.upload(kind.num_rows)
        step = self._step(kind)
        step()
        self._graphs[kind] = self._ops.capture(step)
        self._arena.settle()
        for name, tensor in filled.items():
            self._arena.host[name].copy_(tensor)

    def _step(self, kind: _Kind) -> Callable[[], SampleOutput]:
        """What a graph of this kind records, on the first num_rows rows of the device's side."""
        rows = {name: tensor[: kind.num_rows] for name, tensor in self._arena.device.items()}
        state = DecodeState(
            token_ids=rows["token_ids"],
            positions=rows["positions"],
            slot_mapping=rows["slot_mapping"],
            seq_lens=rows["seq_lens"],
            block_tables=rows["block_tables"],
            sampling_ints=rows["ints"],
            token_counts=self._token_counts,
            bias_start=self._arena.device["bias_start"][: kind.num_rows + 1],
            bias_values=self._arena.device["bias_values"],
            bias_steps=self._arena.device["bias_steps"],
            ring=self._ring[:, : kind.num_rows],
            step=rows["step"],
        )
        attention = AttentionMetadata(
            query_start_loc=self._query_start_loc[: kind.num_rows + 1],
            seq_lens=state.seq_lens,
            block_tables=state.block_tables,
            max_query_len=1,
            max_seq_len=self._max_model_len,
        )
        inputs = ModelInput(
            state.token_ids, state.positions, state.slot_mapping, attention, self._rows[: kind.num_rows]
        )
        sampling = SamplingBatch(
            floats=rows["floats"],
            ints=rows["ints"],
            token_counts=self._token_counts if kind.has_penalties else None,
            bias_start=state.bias_start if kind.has_biases else None,
            bias_ids=self._arena.device["bias_ids"] if kind.has_biases else None,
            bias_values=state.bias_values if kind.has_biases else None,
            num_logprobs=min(MAX_LOGPROBS, self._model.head.out_features) if kind.has_logprobs else -1,
            has_filters=kind.has_filters,
        )

        def step() -> SampleOutput:
            x = self._model.forward(self._ops, inputs, self._cache)
            output = self._ops.next_tokens(x, self._model.norm, self._model.head, inputs.rows, sampling)
            self._ops.advance(state, output.token_ids, self._cache.block_size)
            return output

        return step


class _Arena:
    """Named tensors behind one another in one buffer, on the host and on the device, so that one copy brings all over.

    Args:
        fields: shape and dtype of each; of the last one only the rows that a step needs are copied.
        device: where the other side is.

    Attributes:
        host, device: the tensors of either side, by name.
    """

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        spans: dict[str, tuple[int, int]] = {}
        start = 0
        for name, (shape, dtype) in fields.items():
            spans[name] = (start, start + torch.Size(shape).numel() * dtype.itemsize)
            start = -(-spans[name][1] // ALIGNMENT) * ALIGNMENT
        self._host = torch.zeros(start, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(start, dtype=torch.uint8, device=device)
        self.host, self.device = (
            {name: buffer[slice(*spans[name])].view(dtype).view(shape) for name, (shape, dtype) in fields.items()}
            for buffer in (self._host, self._device)
        )
        self._last = list(fields)[-1]
        self._last_start = spans[self._last][0]
        self._uploaded = torch.cuda.Event() if device.type == "cuda" else None

    def settle(self) -> None:
        """Wait until the last upload has read the host's side: it may be written again. A waited step has done so."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def upload(self, num_rows: int) -> None:
        """Copy every field to the device, of the last one num_rows rows; may return before the copy is done."""
        end = self._last_start + self.host[self._last][:num_rows].nbytes
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that graphs are captured for: close together where a row to spare costs most, up to max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, 4097, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
