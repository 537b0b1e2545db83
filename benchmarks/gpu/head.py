"""Output head and draw in one kernel, beside the two halves with logits between them: which is faster for whom."""

from __future__ import annotations

from typing import Any

import torch
from inferneo_benchmarks.gpu.linear import weight
from inferneo_benchmarks.gpu.measure import copy_bandwidth, microseconds, require, write
from inferneo_benchmarks.gpu.sampling import KINDS, VOCAB, parameters
from inferneo_kernels import linear
from inferneo_kernels.elementwise import rms_norm
from inferneo_kernels.head_draw import head_draw
from inferneo_kernels.quant_layout import Weight
from inferneo_kernels.sampling import sample
from torch import Tensor

HIDDEN, EPS = 2048, 1e-5  # Llama-3.2-1B


def compare(head: Weight, num_seqs: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds of either way for plain draws, and the fused one's share of the floor."""
    generator = torch.Generator("cuda").manual_seed(num_seqs)
    x = torch.randn(num_seqs, HIDDEN, generator=generator, device="cuda", dtype=torch.bfloat16)
    norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    floats, ints = (tensor.cuda() for tensor in parameters(num_seqs, KINDS["plain"]))

    def fused() -> Tensor:
        return head_draw(rms_norm(x, norm, EPS), head, None, floats, ints)

    def halves() -> Tensor:
        logits = linear.lm_head(x, norm, EPS, [head], None)
        return sample(logits, floats, ints, None, None, None, None, -1, has_filters=False)[0]

    # Sums in another order move a score in its last bits: a draw in hundreds may fall the other way.
    agreeing = (fused() == halves()).float().mean().item()
    require(agreeing > 0.95, f"{head.quant_type or 'bf16'}, {num_seqs} rows: {agreeing:.0%} of the tokens agree")
    times = {"fused_us": microseconds(fused), "halves_us": microseconds(halves)}
    return {
        "weights": head.quant_type or "bf16",
        "num_seqs": num_seqs,
        **{name: round(time, 2) for name, time in times.items()},
        "share_of_floor": round(head.num_bytes / times["fused_us"] / 1e3 / bandwidth, 3),
    }


def main() -> None:
    bandwidth = copy_bandwidth()
    rows = []
    for quant_type in ("", "Q4_K", "Q8_0"):
        head = weight(VOCAB, HIDDEN, quant_type)
        for num_seqs in (1, 2, 16, 64, 128, 256):
            rows.append(compare(head, num_seqs, bandwidth))
            print(rows[-1], flush=True)
    write(vocab_size=VOCAB, copy_gb_s=round(bandwidth, 1), rows=rows)


if __name__ == "__main__":
    main()
