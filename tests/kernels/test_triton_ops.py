"""TritonOps: every verb against TorchOps, its errors, and that it does no torch arithmetic.

The kernels have tests of their own with all their shapes; these are about the adapter between them and the network.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import inferneo_kernels
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from inferneo_core.batch import (
    INV_TEMPERATURE,
    TOP_P,
    AttentionMetadata,
    DecodeState,
    SampleOutput,
    empty_sampling_batch,
)
from inferneo_core.errors import ConfigError, ShapeError
from inferneo_core.ops import select_ops
from inferneo_core.ops.base import CacheLayer, GraphOps, Linear, Norm, Segment
from inferneo_core.ops.torch_ops import TorchOps
from inferneo_core.ops.triton_ops import TritonOps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that a mask discards

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, VOCAB = 48, 6, 2, 16, 4, 61
QKV_ROWS = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
KERNELS = Path(inferneo_kernels.__file__).parent


@pytest.fixture
def random(generator: torch.Generator, device: torch.device) -> Callable[..., Tensor]:
    """random(*shape): normal fp32 values."""
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


@pytest.fixture
def backends(device: torch.device) -> tuple[TritonOps, TorchOps]:
    return TritonOps(torch.float32, device), TorchOps(torch.float32, device)


def make_linear(random: Callable[..., Tensor], rows: int, columns: int, *, bias: bool = False) -> Linear:
    return Linear((Segment(random(rows, columns) * columns**-0.5),), columns, random(rows) if bias else None)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Both are fp32 sums of the same terms, in other orders."""
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def make_cache(random: Callable[..., Tensor], num_blocks: int = 7) -> CacheLayer:
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return CacheLayer(k=random(*shape), v=random(*shape))


def make_norm(random: Callable[..., Tensor]) -> Norm:
    return Norm(1 + 0.2 * random(HIDDEN), 1e-5)


# The verbs


@pytest.mark.parametrize("num_tokens", [1, 5, 19])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layer_verbs_are_those_of_the_reference(num_tokens: int, bias: bool, backends: Any, random: Any) -> None:
    triton_ops, torch_ops = backends
    x, norm, residual = random(num_tokens, HIDDEN), make_norm(random), random(num_tokens, 35)
    down, gate_up = make_linear(random, 35, HIDDEN, bias=bias), make_linear(random, 2 * 37, HIDDEN, bias=bias)
    prepared = [(ops, ops.prepare(down), ops.prepare(gate_up)) for ops in (triton_ops, torch_ops)]
    for verb in (
        lambda ops, down, _: ops.linear_add(x, down, residual),
        lambda ops, down, _: ops.linear_add(x, down, None),
        lambda ops, _, gate_up: ops.gate_up_silu(x, norm, gate_up),
        lambda ops, down, _: ops.lm_head(x, norm, down),
    ):
        actual, expected = (verb(*arguments) for arguments in prepared)
        assert_close(actual, expected)


@pytest.mark.parametrize("num_tokens", [1, 5, 19])
def test_qkv_rope_store_is_that_of_the_reference(
    num_tokens: int, backends: Any, random: Any, device: torch.device
) -> None:
    x, norm, rope = random(num_tokens, HIDDEN), make_norm(random), random(32, HEAD_DIM)
    linear = make_linear(random, QKV_ROWS, HIDDEN, bias=True)
    positions = torch.arange(num_tokens, device=device) + 3
    slots = torch.randperm(28, generator=torch.Generator().manual_seed(1))[:num_tokens].to(device)
    start = make_cache(random)
    results = []
    for ops in backends:
        cache = CacheLayer(start.k.clone(), start.v.clone())
        q = ops.qkv_rope_store(x, norm, ops.prepare(linear), positions, rope, cache, slots)
        results.append((q, cache.k, cache.v))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_attention_of_a_mixed_batch_is_that_of_the_reference(backends: Any, random: Any, device: torch.device) -> None:
    """A decode, a whole prompt and a chunk behind a prefix in one step; block tables out of order."""
    query_lens, seq_lens = [1, 6, 3], [9, 6, 11]
    tables = [[6, 1, 4], [3, 0, 0], [2, 5, 0]]
    tables[1][1] = 4  # two sequences share a block
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 7, 10], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    q, cache = random(sum(query_lens), NUM_HEADS, HEAD_DIM), make_cache(random)
    actual, expected = (ops.attention(q, cache, metadata) for ops in backends)
    assert_close(actual, expected)
    again, _ = (ops.attention(q, cache, metadata) for ops in backends)
    assert torch.equal(again, actual)  # the counters are as they were


@pytest.mark.parametrize("num_logprobs", [-1, 3])
@pytest.mark.parametrize("has_filters", [False, True], ids=["plain", "filtered"])
def test_embed_and_next_tokens_are_those_of_the_reference(
    has_filters: bool, num_logprobs: int, backends: Any, random: Any, device: torch.device
) -> None:
    """A greedy row and one that draws, of tokens that are not the batch's last; with and without logits written out."""
    ids = torch.tensor([60, 0, 7, 7, 31], device=device)
    x, norm, head = random(5, HIDDEN), make_norm(random), make_linear(random, VOCAB, HIDDEN)
    rows, batch = torch.tensor([4, 1], device=device), empty_sampling_batch(2, num_logprobs)
    batch.floats[1, INV_TEMPERATURE] = 1.5
    if has_filters:
        batch.floats[1, TOP_P] = 0.7
    batch = replace(batch, has_filters=has_filters).to(device)
    outputs = []
    for ops in backends:
        prepared = ops.prepare(head)
        outputs.append((ops.embed(ids, prepared), ops.next_tokens(x, norm, prepared, rows, batch)))
    (embedded, sampled), (expected_rows, expected) = outputs
    assert torch.equal(embedded, expected_rows)
    check_sampled(sampled, expected)


def test_score_is_that_of_the_reference(backends: Any, random: Any, device: torch.device) -> None:
    logits, targets = random(4, VOCAB) * 3, torch.tensor([5, 60, -1, 0], device=device)
    check_sampled(*(ops.score(logits, targets, 5) for ops in backends))


def check_sampled(actual: SampleOutput, expected: SampleOutput) -> None:
    assert torch.equal(actual.token_ids, expected.token_ids)
    assert (actual.logprobs is None) == (expected.logprobs is None)
    if actual.logprobs is None:
        return
    for name in ("ranks", "top_ids"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("logprobs", "top_logprobs"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-4, equal_nan=True, msg=name
        )


def test_prepare_keeps_segments_of_several_types(backends: Any, random: Any) -> None:
    """As a Q4_K_M file has them: quantised rows of two types and dense ones, some in GGUF's interleaved order."""
    gguf = pytest.importorskip("gguf", reason="the gguf package makes the quantised rows")
    columns = 64
    segments = []
    for name, rows in (("Q4_1", 16), ("Q8_0", 5)):
        quantised = gguf.quantize(random(rows, columns).cpu().numpy(), gguf.GGMLQuantizationType[name])
        segments.append(Segment(torch.from_numpy(quantised), name))
    order = torch.arange(16).view(2, 8).T.reshape(-1)
    segments[0] = Segment(segments[0].data, "Q4_1", order)
    segments.append(Segment(random(7, columns)))
    linear, x = Linear(tuple(segments), columns), random(3, columns)
    assert backends[0].prepare(linear).out_features == 28
    table, ids = Linear((segments[1],), columns), torch.tensor([4, 0, 4], device=x.device)
    rows, expected_rows = (ops.embed(ids, ops.prepare(table)) for ops in backends)
    assert torch.equal(rows, expected_rows)
    actual, expected = (ops.linear_add(x, ops.prepare(linear), None) for ops in backends)
    assert_close(actual, expected)


def test_advance_moves_live_rows_and_no_others(backends: Any, device: torch.device) -> None:
    def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    state = DecodeState(
        token_ids=tensor([1, 2, 3]),
        positions=tensor([3, 9, 0]),
        slot_mapping=tensor([19, 25, -1]),
        seq_lens=tensor([4, 10, 0], torch.int32),
        block_tables=tensor([[4, 2, 0], [1, 3, 6], [0, 0, 0]], torch.int32),
        sampling_ints=tensor([[0, 7, 4, 0, 1], [0, 7, 10, 0, 0], [0, 7, 1, 0, -1]]),
        token_counts=torch.zeros(2, VOCAB, dtype=torch.int32, device=device),
        bias_start=tensor([0, 1, 2, 2], torch.int32),
        bias_values=torch.full((4,), -1.0, device=device),
        bias_steps=tensor([1, 3, 0, 0], torch.int32),
        ring=tensor([[0, 0, 0], [0, 0, 0]]),
        step=tensor([1]),
    )
    backends[0].advance(state, tensor([50, -1, 9]), BLOCK_SIZE)
    assert state.token_ids.tolist() == [50, 0, 3]
    assert state.positions.tolist() == [4, 10, 0]
    assert state.slot_mapping.tolist() == [2 * BLOCK_SIZE, 6 * BLOCK_SIZE + 2, -1]
    assert state.seq_lens.tolist() == [5, 11, 0]
    assert state.sampling_ints[:, 2].tolist() == [5, 11, 1]
    assert state.ring[1].tolist()[:2] == [50, -1]
    assert state.step.tolist() == [2]
    assert state.token_counts.nonzero().tolist() == [[1, 50]]
    assert state.bias_values.tolist() == [0.0, -1.0, -1.0, -1.0]


# Errors


def test_shapes_that_disagree_are_refused(backends: Any, random: Any, device: torch.device) -> None:
    ops, _ = backends
    norm, down = make_norm(random), ops.prepare(make_linear(random, 35, HIDDEN))
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    refused: tuple[Callable[[], object], ...] = (
        lambda: ops.linear_add(random(2, HIDDEN + 1), down, None),
        lambda: ops.linear_add(random(2, HIDDEN), down, random(2, 34)),
        lambda: ops.gate_up_silu(random(2, 47), norm, down),
        lambda: ops.lm_head(random(2, 47), norm, down),
        lambda: ops.qkv_rope_store(
            random(2, HIDDEN), norm, down, positions, random(9, HEAD_DIM), make_cache(random), positions
        ),
        lambda: ops.sample(random(3, VOCAB), empty_sampling_batch(2)),
        lambda: ops.sample(random(2, 5), empty_sampling_batch(2, num_logprobs=6)),
        lambda: ops.score(random(2, VOCAB), positions, VOCAB + 1),
        lambda: ops.attention(random(2, 5, HEAD_DIM), make_cache(random), None),
    )
    for call in refused:
        with pytest.raises(ShapeError):
            call()


def test_unknown_backend_is_refused(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="one of"):
        select_ops("cuda", device, torch.float32)


def test_backend_can_capture(device: torch.device) -> None:
    assert isinstance(select_ops("triton", device, torch.float32), GraphOps)
    assert not isinstance(TorchOps(), GraphOps)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "only in Triton's interpreter"),
        ("import sys; sys.modules['triton'] = None", "Triton is not installed"),
    ],
    ids=["on a CPU", "without Triton"],
)
def test_backend_says_what_it_lacks(code: str, message: str) -> None:
    """In a process of its own: this one has interpreted kernels already."""
    script = f"{code}\nimport torch; from inferneo_core.ops import select_ops\n"
    script += "select_ops('triton', torch.device('cpu'), torch.float32)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode != 0
    assert "BackendUnavailable" in result.stderr.splitlines()[-1]
    assert message in result.stderr


# No torch arithmetic


class Recorder(TorchDispatchMode):
    """Collects the names of the aten operators that run, but for those of Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.is_interpreting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_interpreting:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        launch = interpreter.GridExecutor.__call__

        def launch_unrecorded(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.is_interpreting = True
            try:
                launch(executor, *args, **kwargs)
            finally:
                self.is_interpreting = False

        patch.setattr(interpreter.GridExecutor, "__call__", launch_unrecorded)
        with self:
            yield


ROOM_AND_VIEWS = {
    "empty",
    "view",
    "slice",
    "select",
    "t",
    "transpose",
    "as_strided",
    "detach",
    "alias",
    "unsqueeze",
    "unbind",
}
VENDOR = {"mm", "addmm"}


@pytest.mark.parametrize("num_tokens", [1, 5, 19])
def test_verbs_do_no_torch_arithmetic(
    num_tokens: int, backends: Any, random: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, _ = backends
    norm, cache, rope = make_norm(random), make_cache(random), random(32, HEAD_DIM)
    qkv, out = (ops.prepare(make_linear(random, *shape)) for shape in ((QKV_ROWS, HIDDEN), (HIDDEN, 96)))
    gate_up, head = (ops.prepare(make_linear(random, rows, HIDDEN)) for rows in (74, VOCAB))
    ids, positions = (torch.arange(num_tokens, device=device) for _ in range(2))
    metadata = AttentionMetadata(
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        block_tables=torch.arange(7, dtype=torch.int32, device=device)[None],
        max_query_len=num_tokens,
        max_seq_len=num_tokens,
    )
    rows, batch = torch.zeros(1, dtype=torch.int64, device=device), empty_sampling_batch(1, 2).to(device)
    ops.attention(random(num_tokens, NUM_HEADS, HEAD_DIM), cache, metadata)  # makes the counters, once for all
    recorder = Recorder()
    with recorder.recording(monkeypatch):
        x = ops.embed(ids, head)
        q = ops.qkv_rope_store(x, norm, qkv, positions, rope, cache, positions)
        x = ops.linear_add(ops.attention(q, cache, metadata), out, x)
        ops.gate_up_silu(x, norm, gate_up)
        ops.next_tokens(x, norm, head, rows, batch)
        ops.next_tokens(x, norm, head, rows, replace(batch, num_logprobs=-1, has_filters=False))
        ops.score(ops.lm_head(x, norm, head), ids, 2)
    assert recorder.names <= ROOM_AND_VIEWS | (VENDOR if num_tokens > 16 else set())
    assert "empty" in recorder.names


# What a launcher may call of torch. quant_layout moves bytes about at load; benchmarks and tables need none of it.
ALLOWED_CALLS = {"torch.empty", "torch.empty_like"}
ALLOWED_CALLS |= {f"torch.cuda.get_device_{what}" for what in ("properties", "capability", "name")}
ALLOWED_IN = {
    "attention": {"torch.zeros"},  # its counters
    "linear": {"torch.mm", "torch.addmm"},
    "triton_ops": {f"torch.cuda.{name}" for name in ("graph_pool_handle", "CUDAGraph", "graph")},
}
SOURCES = [
    *(path for path in sorted(KERNELS.glob("*.py")) if path.stem not in ("aot", "quant_layout")),
    Path(sys.modules[TritonOps.__module__].__file__ or ""),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_launchers_call_nothing_else_of_torch(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    names = {ast.unparse(call.func) for call in calls}
    found = {name for name in names if name.startswith(("torch.", "F."))}
    assert found <= ALLOWED_CALLS | ALLOWED_IN.get(path.stem, set())
