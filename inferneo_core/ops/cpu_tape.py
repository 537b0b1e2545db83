"""TapeRecorder: the verbs of a forward pass written on a C++ tape instead of computed (csrc/cpu/tape.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inferneo_core import errors
from inferneo_core.batch import AttentionMetadata
from inferneo_core.ops.base import CacheLayer, Linear, Norm, check_shape


class TapeRecorder:
    """Records the verbs that are called on it; their contracts stand in `ops/base.py`.

    What goes from verb to verb are tensors on the meta device: they have a shape and stand for a value of the tape, but
    hold no numbers. Positions, slots and sequences are a step's own, handed over when the tape runs; what is given in
    their place here is ignored.

    Attributes:
        tape: the C++ object, held by a tensor. It holds the weights and caches that it was recorded with.
        verbs: the names of what was recorded, in order.
    """

    def __init__(self) -> None:
        self.tape: Tensor = torch.ops.inferneo.make_tape()
        self.verbs: list[str] = []
        self._inputs: list[Tensor] = []
        self._values: list[tuple[Tensor, int]] = []  # each stand-in, alive as long as this, and its value

    def input(self, x: Tensor) -> Tensor:
        """A value that is x [num_tokens, width] when the tape runs."""
        width = x[0].numel() if len(x) else x.flatten(1).shape[1]
        self._inputs.append(x.reshape(len(x), width))
        return self._stand_in(torch.ops.inferneo.tape_input(self.tape, width), *x.shape[1:])

    def run(
        self,
        team: Tensor,
        *,
        token_ids: Tensor | None = None,
        positions: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        attention: AttentionMetadata | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run what was recorded on the inputs; returns the last verb's value, two-dimensional.

        Raises:
            ShapeError: the inputs or the step's tensors are not what the recorded verbs take.
        """
        sequences = [] if attention is None else sequence_tensors(attention)
        try:
            result: Tensor = torch.ops.inferneo.tape_run(
                self.tape, team, self._inputs, token_ids, positions, slot_mapping, sequences, rows
            )
        except RuntimeError as error:
            raise typed(error) from None
        return result

    def embed(self, ids: Tensor, w: Linear) -> Tensor:
        return self._stand_in(self._record("embed", w.weight), w.in_features)

    def qkv_rope_store(
        self,
        x: Tensor,
        norm: Norm,
        w_qkv: Linear,
        positions: Tensor,
        rope: Tensor,
        cache: CacheLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        value = self._record(
            "qkv_rope_store", self._value(x), norm.weight, norm.eps, w_qkv.weight, rope, cache.k, cache.v
        )
        num_heads = w_qkv.out_features // cache.head_dim - 2 * cache.num_kv_heads
        return self._stand_in(value, num_heads, cache.head_dim)

    def attention(self, q: Tensor, cache: CacheLayer, metadata: AttentionMetadata) -> Tensor:
        check_shape("q", q, None, None, cache.head_dim)
        return self._stand_in(self._record("attention", self._value(q), cache.k, cache.v), q[0].numel())

    def linear_add(self, x: Tensor, w: Linear, residual: Tensor | None) -> Tensor:
        added = None if residual is None else self._value(residual)
        return self._stand_in(self._record("linear_add", self._value(x), w.weight, added), w.out_features)

    def gate_up_silu(self, x: Tensor, norm: Norm, w_gate_up: Linear) -> Tensor:
        value = self._record("gate_up_silu", self._value(x), norm.weight, norm.eps, w_gate_up.weight)
        return self._stand_in(value, w_gate_up.out_features // 2)

    def lm_head(self, x: Tensor, norm: Norm, w_head: Linear) -> Tensor:
        value = self._record("lm_head", self._value(x), norm.weight, norm.eps, w_head.weight)
        return self._stand_in(value, w_head.out_features)

    def _record(self, verb: str, *args: object) -> int:
        try:
            value: int = getattr(torch.ops.inferneo, f"tape_{verb}")(self.tape, *args)
        except RuntimeError as error:
            raise typed(error) from None
        self.verbs.append(verb)
        return value

    def _stand_in(self, value: int, *shape: int) -> Tensor:
        stand_in = torch.empty(1, *shape, device="meta")
        self._values.append((stand_in, value))
        return stand_in

    def _value(self, x: Tensor) -> int:
        return next(value for stand_in, value in reversed(self._values) if stand_in is x)


def sequence_tensors(metadata: AttentionMetadata) -> Sequence[Tensor]:
    """The tensors of a step's sequences, in the order of the C++ operators."""
    return [metadata.query_start_loc, metadata.seq_lens, metadata.block_tables]


def typed(error: RuntimeError) -> Exception:
    """The typed error that a C++ message announces ("ShapeError: ..."); any other error as it is."""
    name, _, message = str(error).partition(": ")
    if name in ("ShapeError", "BackendUnavailable"):
        kind: type[errors.InferneoError] = getattr(errors, name)
        return kind(message)
    return error
