"""The device sampler: its choices against the C++ or torch reference, and its time at a vocabulary of 128k."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from inferneo_benchmarks.gpu.measure import microseconds, require, write
from inferneo_kernels.sampling import sample
from torch import Tensor

VOCAB = 128256
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50, top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "all filters": {"temperature": 0.8, "top_k": 200, "top_p": 0.9, "min_p": 0.02, "typical": 0.95},
}


def parameters(num_seqs: int, kind: dict[str, float]) -> tuple[Tensor, Tensor]:
    """floats [num_seqs, 7] and ints [num_seqs, 5], as SamplingBatch has them."""
    temperature = kind["temperature"]
    row = [1 / temperature if temperature else 0.0, kind.get("top_p", 1.0), kind.get("min_p", 0.0)]
    row += [kind.get("typical", 1.0), 1.0, 0.0, 0.0]
    ints = torch.zeros(num_seqs, 5, dtype=torch.int64)
    ints[:, 0], ints[:, 4] = int(kind.get("top_k", 0)), -1
    ints[:, 1], ints[:, 2] = torch.arange(num_seqs) * 7919, torch.arange(num_seqs) + 100
    return torch.tensor([row] * num_seqs), ints


def main() -> None:
    try:
        from inferneo_core.batch import SamplingBatch
        from inferneo_core.ops.torch_sampling import sample as reference
    except ImportError as error:
        reference = None  # type: ignore[assignment]
        print(f"the choices are not checked: {error}")
    rows: list[dict[str, Any]] = []
    for num_seqs in (1, 8, 32, 128):
        logits = torch.randn(num_seqs, VOCAB, generator=torch.Generator("cuda").manual_seed(0), device="cuda") * 3
        for name, kind in KINDS.items():
            floats, ints = parameters(num_seqs, kind)
            on_device = floats.cuda(), ints.cuda()
            has_filters = len(kind) > 1
            draw = partial(sample, logits, *on_device, None, None, None, None, -1, has_filters=has_filters)
            if reference is not None:
                batch = SamplingBatch(floats, ints, None, None, None, None, -1)
                expected, chosen = reference(logits.cpu(), batch).token_ids, draw()[0].cpu()
                require(torch.equal(chosen, expected), f"{name}, {num_seqs} rows: {chosen} is not {expected}")
            time = microseconds(draw)
            rows.append({"kind": name, "num_seqs": num_seqs, "us": round(time, 2)})
            print(rows[-1], flush=True)
    write(vocab_size=VOCAB, choices_checked=reference is not None, rows=rows)


if __name__ == "__main__":
    main()
