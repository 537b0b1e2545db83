"""Sequence: its counts, and when it ends."""

from __future__ import annotations

import pytest

from inferneo_core.sampling_params import SamplingParams
from inferneo_core.sequence import Sequence, SequenceStatus

EOS = 2


def make_sequence(params: SamplingParams | None = None, max_tokens: int = 5) -> Sequence:
    params = params or SamplingParams()
    return Sequence(0, (7, 8, 9), params, max_tokens=max_tokens, seed=1, stop_ids=frozenset({EOS}))


def test_sequence_starts_with_its_prompt_alone() -> None:
    seq = make_sequence()
    assert seq.status is SequenceStatus.WAITING
    assert (seq.token_ids, seq.num_tokens, seq.num_prompt_tokens) == ([7, 8, 9], 3, 3)
    assert (seq.num_output_tokens, seq.output_token_ids) == (0, [])
    assert (seq.num_computed_tokens, seq.num_cached_tokens, seq.block_table) == (0, 0, [])
    assert not seq.is_finished
    assert seq.finish_reason is None


def test_sequence_copies_its_prompt() -> None:
    prompt = [7, 8, 9]
    seq = Sequence(0, prompt, SamplingParams(), max_tokens=5, seed=1)
    seq.append(4)
    assert prompt == [7, 8, 9]


def test_append_counts_output_only() -> None:
    seq = make_sequence()
    assert seq.append(4) is None
    assert seq.append(5) is None
    assert (seq.num_tokens, seq.num_output_tokens, seq.output_token_ids) == (5, 2, [4, 5])


def test_append_ends_with_length_at_max_tokens() -> None:
    seq = make_sequence(max_tokens=3)
    assert [seq.append(4), seq.append(4), seq.append(4)] == [None, None, "length"]


def test_append_ends_with_stop_at_a_stop_id() -> None:
    seq = make_sequence()
    assert seq.append(4) is None
    assert seq.append(EOS) == "stop"
    assert seq.output_token_ids == [4, EOS]


def test_append_prefers_stop_to_length_at_the_last_token() -> None:
    assert make_sequence(max_tokens=1).append(EOS) == "stop"


def test_append_passes_a_stop_id_before_min_tokens() -> None:
    seq = make_sequence(SamplingParams(min_tokens=3))
    assert [seq.append(EOS), seq.append(EOS), seq.append(EOS)] == [None, None, "stop"]


def test_append_ignores_stop_ids_of_the_prompt() -> None:
    seq = Sequence(0, (EOS, EOS), SamplingParams(), max_tokens=5, seed=1, stop_ids=frozenset({EOS}))
    assert seq.append(4) is None


@pytest.mark.parametrize(("num_top", "expected"), [(None, True), (0, False), (3, False)])
def test_uses_prefix_cache_unless_prompt_logprobs_are_asked(num_top: int | None, expected: bool) -> None:
    assert make_sequence(SamplingParams(prompt_logprobs=num_top)).uses_prefix_cache is expected


def test_sequence_takes_no_unknown_attribute() -> None:
    with pytest.raises(AttributeError):
        make_sequence().num_computed_token = 3  # type: ignore[attr-defined]


def test_repr_shows_progress_and_no_token() -> None:
    seq = Sequence(3, [31337] * 4, SamplingParams(), max_tokens=5, seed=1)
    assert "seq_id=3" in repr(seq)
    assert "WAITING" in repr(seq)
    assert "31337" not in repr(seq)
