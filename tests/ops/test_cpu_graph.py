"""The CPU graph: one tape for every step, the same bits however the work is cut, and a team that rests when idle."""

from __future__ import annotations

import gc
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inferneo_core import Completion, Engine, SamplingParams, cpu_graph
from inferneo_core.batch import AttentionMetadata, ModelInput, empty_sampling_batch
from inferneo_core.cpu_graph import CpuGraph
from inferneo_core.errors import ConfigError, ShapeError
from inferneo_core.ops.base import CacheLayer, Linear, Norm, Segment
from inferneo_core.ops.cpu_ops import CpuOps, available_cores
from inferneo_core.ops.cpu_tape import TapeRecorder

PROMPTS = [[5, 80, 200, 13, 7], list(range(40, 140)), [1], [9, 9, 8, 7] * 6]
PARAMS = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, logprobs=3, top_p=0.95)
WEIGHTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 14},
}


def bits(completions: list[Completion]) -> list[Any]:
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_tape_gives_the_bits_of_the_verbs(weights: str, tiny_model: Any, tiny_engine: Any) -> None:
    model = tiny_model(**WEIGHTS[weights])
    expected = tiny_engine(model)
    expected._runner._tape = None
    assert bits(tiny_engine(model).generate(PROMPTS, PARAMS)) == bits(expected.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_seqs": 1},
        {"num_threads": 2},
        {"num_threads": 5},
        {"block_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bits_do_not_depend_on_the_cut(
    weights: str, arguments: dict[str, Any], tiny_model: Any, tiny_engine: Any
) -> None:
    model = tiny_model(**WEIGHTS[weights])
    expected = bits(tiny_engine(model).generate(PROMPTS, PARAMS))
    assert bits(tiny_engine(model, **arguments).generate(PROMPTS, PARAMS)) == expected


def test_bits_do_not_depend_on_a_prefix_hit(tiny_engine: Any) -> None:
    engine = tiny_engine(block_size=4)
    first, again = (bits(engine.generate(PROMPTS, PARAMS)) for _ in range(2))
    assert engine.stats().prefix_hit_tokens > 100
    assert first == again


@pytest.mark.slow
def test_default_model_gives_the_same_bits_for_any_cut(default_model: Path) -> None:
    """Quantised weights: decode, small batches and prefill run different kernels over the same sums."""
    prompts = [list(range(1000, 1000 + length)) for length in (1, 5, 33, 300)]
    results = []
    for arguments in ({}, {"max_num_batched_tokens": 3, "num_threads": 1}, {"max_num_seqs": 1, "num_threads": 3}):
        with Engine(default_model, kv_cache_memory=2**26, max_model_len=512, **arguments) as engine:
            results.append(bits(engine.generate(prompts, PARAMS)))
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_default_model_parts_from_the_reference_only_at_near_ties(default_model: Path, default_engine: Engine) -> None:
    """Activations are quantised to int8, so a greedy text may part from the reference's, where two tokens are close."""
    greedy = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    golden = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
    with Engine(default_model, ops="cpu", kv_cache_memory=2**28, max_model_len=256) as engine:
        answers = engine.generate([entry["prompt"] for entry in golden], greedy)
    for entry, answer in zip(golden, answers, strict=True):
        ours, reference = answer.token_ids, entry["token_ids"]
        same = next((i for i in range(64) if ours[i] != reference[i]), 64)
        if same == 64:
            continue
        prompt = default_engine.tokenizer.encode(entry["prompt"]) + reference[:same]
        scored = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
        (step,) = default_engine.generate([prompt], scored)
        assert step.logprobs is not None
        likeliest = dict(step.logprobs[0].top)
        margin = likeliest[reference[same]] - likeliest[ours[same]]
        print(f"{entry['prompt']!r} parts after {same} tokens, {margin:.3f} nats apart")
        assert margin < 0.5


def tiny_graph(engine: Engine) -> CpuGraph:
    graph = engine._runner._tape
    assert graph is not None
    return graph


def one_token(**changes: Any) -> ModelInput:
    """A decode step of one sequence, in block 0."""
    fields = {"token_ids": 5, "positions": 2, "slot_mapping": 2, "rows": 0, "seq_len": 3, "block": 0, **changes}
    ids = {name: torch.tensor([fields[name]]) for name in ("token_ids", "positions", "slot_mapping", "rows")}
    starts, lens = torch.tensor([0, 1]).int(), torch.tensor([fields["seq_len"]]).int()
    attention = AttentionMetadata(starts, lens, torch.tensor([[fields["block"]]]).int(), 1, fields["seq_len"])
    return ModelInput(ids["token_ids"], ids["positions"], ids["slot_mapping"], attention, ids["rows"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": 263}, r"token_ids\[0\] is 263; it is in \[0, 263\)"),
        ({"token_ids": -1}, r"token_ids\[0\] is -1"),
        ({"positions": 512}, r"positions\[0\] is 512; it is in \[0, 512\)"),
        ({"slot_mapping": 10**9}, r"slot_mapping\[0\] is 1000000000"),
        ({"slot_mapping": -1}, r"slot_mapping\[0\] is -1"),
        ({"rows": 1}, r"rows\[0\] is 1; it is in \[0, 1\)"),
        ({"block": 10**6}, r"block_tables\[0\]\[0\] is 1000000"),
        ({"seq_len": 17}, r"sequence 0 has 17 tokens; its block table has room for 16"),
        ({}, "a step that samples needs floats and ints"),
    ],
)
def test_step_refuses_what_would_lead_astray(changes: dict[str, int], message: str, tiny_engine: Any) -> None:
    with pytest.raises(ShapeError, match=message):
        tiny_graph(tiny_engine()).launch(one_token(**changes), None)


@pytest.mark.parametrize(
    ("changes", "num_steps", "message"),
    [
        ({}, 0, "num_steps is 0; it is at least 1"),
        ({"seq_len": 4}, 2, "sequence 0 has 4 tokens and decodes the one at 2"),
        ({"positions": 15, "seq_len": 16}, 2, "sequence 0 has 17 tokens; its block table has room for 16"),
        ({"positions": 511, "seq_len": 512}, 2, "its block table has room for 16"),
    ],
)
def test_burst_refuses_what_would_lead_astray(
    changes: dict[str, int], num_steps: int, message: str, tiny_engine: Any
) -> None:
    with pytest.raises(ShapeError, match=message):
        tiny_graph(tiny_engine()).launch(one_token(**changes), empty_sampling_batch(1), num_steps)


def test_burst_refuses_to_pass_the_end_of_the_model(tiny_engine: Any) -> None:
    engine = tiny_engine(max_model_len=20, block_size=32)
    with pytest.raises(ShapeError, match="sequence 0 would have 21 tokens; it may have 20"):
        tiny_graph(engine).launch(one_token(positions=18, seq_len=19), empty_sampling_batch(1), 3)


def test_burst_refuses_a_prompt_and_logprobs(tiny_engine: Any) -> None:
    graph, step = tiny_graph(tiny_engine()), one_token()
    prompt = replace(
        step,
        token_ids=torch.tensor([5, 6]),
        positions=torch.arange(2),
        slot_mapping=torch.arange(2),
        attention=replace(step.attention, query_start_loc=torch.tensor([0, 2]).int()),
    )
    with pytest.raises(ShapeError, match="one token a sequence"):
        graph.launch(prompt, empty_sampling_batch(1), 2)
    with pytest.raises(ShapeError, match="no more where log-probabilities are reported"):
        graph.launch(step, empty_sampling_batch(1, 0), 2)


def test_burst_is_as_long_as_its_bytes_allow(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_graph(tiny_engine())
    weights = 4 * 3 * (80 * 48 + 48 * 48 + 160 * 48 + 48 * 80) + 4 * 263 * 48  # fp32, before it is packed
    monkeypatch.setattr(cpu_graph, "BURST_BYTES", 3.5 * weights)
    assert graph.burst_size([5]) == graph.burst_size([5] * 4) == 3
    assert graph.burst_size([5] * 5) == graph.burst_size([5] * 32) == 1  # 5 tokens: the weights count twice
    a_token = 4 * 3 * 2 * 2 * 8  # keys and values, 3 layers, 2 heads of 8
    assert graph.burst_size([weights // a_token]) == 1
    monkeypatch.setattr(cpu_graph, "BURST_BYTES", 100 * weights)
    assert graph.burst_size([5]) == cpu_graph.MAX_BURST
    monkeypatch.setattr(cpu_graph, "BURST_BYTES", weights // 2)
    assert graph.burst_size([5]) == 1


def test_tape_refuses_what_was_not_prepared() -> None:
    ops, raw = CpuOps(1), Linear((Segment(torch.randn(40, 48)),), 48)
    with pytest.raises(ShapeError, match="prepare"):
        ops.linear_add(torch.randn(3, 48), raw, None)
    with pytest.raises(ShapeError, match="prepare"):
        ops.linear_add(torch.randn(3, 48), raw.with_data(torch.zeros(40, 48, dtype=torch.uint8), None), None)


def test_tape_refuses_a_cache_it_cannot_read() -> None:
    ops, norm = CpuOps(1), Norm(torch.ones(48), 1e-5)
    weight = ops.prepare(Linear((Segment(torch.randn(3 * 8, 48)),), 48))
    ids, rope, x = torch.arange(2), torch.zeros(9, 8), torch.randn(2, 48)
    for k, v, message in (
        (torch.zeros(2, 1, 4, 8).int(), torch.zeros(2, 1, 4, 8).int(), "the cache has dtype Int"),
        (torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8).half(), "of one dtype"),
        (torch.zeros(2, 1, 4, 4).char(), torch.zeros(2, 1, 4, 4).char(), "int8 rows have 4 bytes"),
        (torch.zeros(2, 1, 4, 8), torch.zeros(3, 1, 4, 8), "differ in dimension 0"),
        (torch.zeros(2, 1, 8, 8)[:, :, ::2], torch.zeros(2, 1, 8, 8)[:, :, ::2], "contiguous"),
    ):
        with pytest.raises(ShapeError, match=message):
            ops.qkv_rope_store(x, norm, weight, ids, rope, CacheLayer(k, v), ids)


def test_tape_runs_for_any_number_of_tokens() -> None:
    """Values take over one another's memory; whatever a longer run left there is not read."""
    ops, norm = CpuOps(2), Norm(torch.rand(48) + 0.5, 1e-5)
    generator = torch.Generator().manual_seed(2)
    wide = ops.prepare(Linear((Segment(torch.randn(2 * 80, 48, generator=generator)),), 48))
    narrow = ops.prepare(Linear((Segment(torch.randn(48, 80, generator=generator) / 9),), 80))
    for num_tokens in (1, 300, 2, 65):
        x = torch.randn(num_tokens, 48, generator=generator)
        tape, expected = TapeRecorder(), x
        value = tape.input(x)
        for _ in range(3):
            value = tape.linear_add(tape.gate_up_silu(value, norm, wide), narrow, value)
            expected = ops.linear_add(ops.gate_up_silu(expected, norm, wide), narrow, expected)
        assert torch.equal(tape.run(ops.team), expected)


def worker_states(known: set[str]) -> dict[str, str]:
    """The state letter of each thread of this process that is not known."""
    states = {}
    for task in Path("/proc/self/task").iterdir():
        if task.name not in known:
            states[task.name] = (task / "stat").read_text().rpartition(")")[2].split()[0]
    return states


def threads_now() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


linux_only = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def awaited(condition: Any) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(condition())


@linux_only
def test_idle_team_sleeps_and_ends_with_its_owner() -> None:
    known = threads_now()
    ops = CpuOps(num_threads=3)
    weight = ops.prepare(Linear((Segment(torch.randn(300, 48)),), 48))
    for _ in range(3):  # awake again after each sleep
        ops.linear_add(torch.randn(5, 48), weight, None)
        assert awaited(lambda: list(worker_states(known).values()) == ["S", "S"])
    del ops
    gc.collect()
    assert awaited(lambda: threads_now() <= known)


@linux_only
@pytest.mark.skipif(available_cores() < 2, reason="a thread has no choice of cores")
def test_worker_that_somebody_moves_stays_there() -> None:
    known = threads_now()
    ops = CpuOps(num_threads=2)
    weight = ops.prepare(Linear((Segment(torch.randn(300, 48)),), 48))
    assert awaited(lambda: list(worker_states(known).values()) == ["S"])
    worker = int((threads_now() - known).pop())
    (bed,) = os.sched_getaffinity(worker)  # it sleeps where it was, whoever wakes it
    chosen = max(os.sched_getaffinity(0) - {bed})
    os.sched_setaffinity(worker, {chosen})
    for _ in range(3):
        ops.linear_add(torch.randn(5, 48), weight, None)
        assert awaited(lambda: list(worker_states(known).values()) == ["S"])
        assert os.sched_getaffinity(worker) == {chosen}


@linux_only
def test_closed_engine_has_no_threads(tiny_engine: Any) -> None:
    tiny_engine().generate([[5]], PARAMS)  # what torch and tokenizers start they keep
    known = threads_now()
    engine = tiny_engine(num_threads=4)
    engine.generate([[5, 6, 7]], PARAMS)
    assert len(threads_now() - known) == 3
    engine.close()
    gc.collect()
    assert awaited(lambda: threads_now() <= known)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_team_works_in_a_forked_process() -> None:
    ops, x = CpuOps(num_threads=3), torch.randn(5, 48)
    weight = ops.prepare(Linear((Segment(torch.randn(300, 48)),), 48))
    expected = ops.linear_add(x, weight, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later Pythons warn of every fork of a process with threads
        child = os.fork()
    if child == 0:
        same = torch.equal(ops.linear_add(x, weight, None), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ops.linear_add(x, weight, None), expected)


def test_num_threads_is_checked() -> None:
    assert available_cores() >= 1
    for number in (0, -1, 257):
        with pytest.raises(ConfigError, match=f"num_threads is {number}; it is in \\[1, 256\\]"):
            CpuOps(num_threads=number)


def counting(graph: CpuGraph, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each C++ call of the graph's steps, as they come."""
    calls: list[str] = []
    for name in ("_step", "_again"):
        original = getattr(graph, name)

        def call(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(graph, name, call)
    return calls


def test_decode_runs_the_last_step_again(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a burst; its arguments are new only where a sequence begins or ends, or the burst is a shorter one."""
    engine = tiny_engine(block_size=8)
    calls = counting(tiny_graph(engine), monkeypatch)
    engine.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=24, seed=1, ignore_eos=True))
    # The prompts'; 5 bursts, in which both sequences take blocks; one of the 3 steps that are left.
    assert calls == ["_step", "_step", *["_again"] * 4, "_step"]
    assert engine.stats().steps == 24


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8, 9]]])
def test_decode_outgrows_the_tables_of_its_first_step(
    prompts: list[list[int]], tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=101, seed=1, ignore_eos=True)
    expected = bits(tiny_engine().generate(prompts, params))
    engine = tiny_engine(block_size=2)
    calls = counting(tiny_graph(engine), monkeypatch)
    assert bits(engine.generate(prompts, params)) == expected
    assert len(calls) == 1 + 100 // cpu_graph.MAX_BURST
    assert calls.count("_step") == 1 + 3  # 52 blocks: the first step's, and twice SPARE_BLOCKS more


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"logprobs": 2},
        {"min_tokens": 9, "ignore_eos": False},
        {"logit_bias": {7: 2.0}},
    ],
    ids=str,
)
def test_steps_run_again_give_the_bits_of_steps_made_anew(
    params: dict[str, Any], tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that begin and end at different times, one of them with more to it than the others; blocks run short."""
    plain = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    other = SamplingParams(**{"max_tokens": 23, "seed": 6, "ignore_eos": True, **params})

    def run(engine: Engine) -> list[Any]:
        streams = [engine.stream(PROMPTS[0], plain)]
        for prompt, its_params in ((PROMPTS[2], other), (PROMPTS[3], plain), ([3, 3], other)):
            for _ in range(7):
                next(streams[0])
            streams.append(engine.stream(prompt, its_params))
        for stream in streams:
            for _ in stream:
                pass
        return bits([stream.completion() for stream in streams])

    short = {"block_size": 4, "kv_cache_memory": 2**16, "max_model_len": 64, "max_num_seqs": 3}
    anew = tiny_engine(**short)
    monkeypatch.setattr(tiny_graph(anew), "holds", lambda inputs, num_steps: False)
    assert run(tiny_engine(**short)) == run(anew)


def test_again_needs_a_step_that_succeeded(tiny_engine: Any) -> None:
    graph = tiny_graph(tiny_engine())
    with pytest.raises(ShapeError, match="token_ids"):
        graph.launch(one_token(token_ids=-1), None)
    with pytest.raises(RuntimeError, match="ShapeError: there is no step to run again"):
        torch.ops.inferneo.tape_again(graph._tape, graph._team)
