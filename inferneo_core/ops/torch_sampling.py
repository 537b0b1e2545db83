"""The sampler's reference: each step from logits to a token, in torch. The faster samplers reproduce it bit for bit.

Bits are the same everywhere because nothing here depends on the order of a floating-point sum. `exp` and `log` are
polynomials of plain fp32 products and sums in a written order (no FMA; a division is IEEE division). Probability mass
is an integer: `weights` are exp(z - max) in units of 2**-40, so masses, prefixes and cut-offs are integer sums, exact
in any order. A filter is one operation, `shortest_prefix`: sort, then keep the fewest whose mass reaches a target.

A row whose adjusted logits hold a NaN, or in which no token is allowed, has token id -1. Infinite logits are legal: a
token at -inf is never drawn; several at +inf tie, and the lowest id wins.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from inferneo_core.batch import (
    CHOICE,
    COUNT_ROW,
    FREQUENCY,
    INV_TEMPERATURE,
    MIN_P,
    NUM_FLOATS,
    NUM_INTS,
    POSITION,
    PRESENCE,
    PROMPT_BIT,
    REPETITION,
    SEED,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    SampleOutput,
    SamplingBatch,
)
from inferneo_core.errors import ShapeError
from inferneo_core.ops.base import check_shape

MAX_VOCAB_SIZE = 2**22  # keeps the mass of a row, at most vocab_size * 2**40, in an int64
EVERYTHING = 2**63 - 1  # a prefix target that no mass reaches: keeps all

# Minimax coefficients, lowest power first, for exp(r) = 1 + r + r**2 * poly(r) on |r| <= ln(2) / 2 and
# log(1 + f) = f - f**2 / 2 + f**3 * poly(f) on sqrt(1/2) <= 1 + f < sqrt(2).
EXP_POLY = (0.5, 0.16666576266288757, 0.04166646674275398, 0.008363179862499237, 0.0013933650916442275)
LOG_POLY = (
    0.3333333134651184,
    -0.24999989569187164,
    0.20000708103179932,
    -0.1666848063468933,
    0.14249937236309052,
    -0.12411050498485565,
    0.11661510914564133,
    -0.115712009370327,
    0.07149753719568253,
)
LOG2_E = 1.4426950216293335
LN2_HIGH, LN2_LOW = 0.693359375, -0.00021219444170128554  # LN2_HIGH has 9 bits: a multiple of it by n is exact
ROUND_TO_INT = 12582912.0  # 1.5 * 2**23: adding, then subtracting it rounds an fp32 to the nearest integer
SQRT_HALF_BITS, ONE_BITS = 0x3F3504F3, 0x3F800000
SQRT_HALF_WORD = 0xB504F334  # the first 32-bit word x for which (x + 0.5) * 2**-32 is above sqrt(1/2)
MIN_EXPONENT = -28.0  # exp(-28) is below 2**-40, the unit of mass


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """`Ops.sample`: one token a row; the definition that the other backends are tested against."""
    check_sampling(logits, batch)
    token_ids = choose(adjusted_logits(logits, batch), batch)
    if batch.num_logprobs < 0:
        return SampleOutput(token_ids)
    return _score(logits, token_ids, batch.num_logprobs)


def score(logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
    """`Ops.score`: log-probabilities of given tokens.

    A row with a NaN has logprob NaN, rank 0, top ids -1 and top log-probabilities NaN. A target of -1 (no token) has
    logprob NaN and rank 0.
    """
    check_logits(logits)
    check_shape("targets", targets, logits.shape[0])
    if targets.dtype != torch.int64:
        raise ShapeError(f"targets has dtype {targets.dtype}; it must be torch.int64")
    if targets.numel() and not -1 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        bad = next(t for t in targets.tolist() if not -1 <= t < logits.shape[1])
        raise ShapeError(f"targets holds {bad}; a target is in [0, {logits.shape[1]}), or -1 for none")
    if not 0 <= num_logprobs <= logits.shape[1]:
        raise ShapeError(f"num_logprobs is {num_logprobs}; it is in [0, {logits.shape[1]}] (the vocabulary)")
    return _score(logits, targets, num_logprobs)


def adjusted_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits after penalties and biases: [num_seqs, vocab_size] fp32.

    In this order: tokens of prompt or output are divided by the repetition penalty if positive, else multiplied; then
    `presence + frequency * count` is subtracted from generated tokens; then biases are added one by one. -inf forbids.
    """
    rows = logits.float().clone()
    penalised = (batch.ints[:, COUNT_ROW] >= 0).nonzero().flatten()
    if batch.token_counts is not None and len(penalised):
        counts = batch.token_counts[batch.ints[penalised, COUNT_ROW]]
        repetition, presence, frequency = batch.floats[penalised][:, [REPETITION, PRESENCE, FREQUENCY]].T[..., None]
        x, times = rows[penalised], counts & (PROMPT_BIT - 1)
        seen = (counts & (2 * PROMPT_BIT - 1)) != 0
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        rows[penalised] = torch.where(times > 0, x - (presence + frequency * times.float()), x)
    if batch.bias_start is not None and batch.bias_ids is not None and batch.bias_values is not None:
        offsets = batch.bias_start.tolist()
        for row, (start, end) in enumerate(pairwise(offsets)):
            for token_id, bias in zip(batch.bias_ids[start:end].tolist(), batch.bias_values[start:end], strict=True):
                rows[row, token_id] = bias if bias == -torch.inf else rows[row, token_id] + bias
    return rows


def choose(rows: Tensor, batch: SamplingBatch) -> Tensor:
    """Token ids [num_seqs] int64 for adjusted logits [num_seqs, vocab_size] fp32."""
    inv_temperature = batch.floats[:, [INV_TEMPERATURE]]
    z = torch.where(inv_temperature == 0, rows, rows * inv_temperature)
    scores = z.clone()
    drawn = (inv_temperature[:, 0] != 0).nonzero().flatten()
    if len(drawn):
        kept = kept_tokens(z[drawn], batch.floats[drawn], batch.ints[drawn])
        gumbel = -log(gumbel_exponentials(batch.ints[drawn], z.shape[1]))
        scores[drawn] = (z[drawn] + gumbel).masked_fill(~kept, -torch.inf)
    ids = scores.argmax(dim=1)  # of equals, the first
    allowed = scores.gather(1, ids[:, None])[:, 0] > -torch.inf
    return torch.where(allowed & ~z.isnan().any(dim=1), ids, -1)


def kept_tokens(z: Tensor, floats: Tensor, ints: Tensor) -> Tensor:
    """Which tokens survive top-k, typical, top-p and min-p, in this order: [num_seqs, vocab_size] bool.

    Each filter sees the weights of those that the one before has kept, so it acts on their renormalised probabilities.
    A cut-off is `trunc(fp64(p) * fp64(mass))`, and at least 1.
    """
    top_k, top_p, min_p, typical_p = ints[:, [TOP_K]], floats[:, [TOP_P]], floats[:, [MIN_P]], floats[:, [TYPICAL_P]]
    kept = z > -torch.inf
    if not bool(((top_k > 0) | (top_p < 1) | (typical_p < 1) | (min_p > 0)).any()):
        return kept
    descending = z.masked_fill(z.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True).indices

    kept = shortest_prefix(descending, kept.long(), torch.where(top_k > 0, top_k, EVERYTHING)) & kept
    below_max = -differences(z)
    w = weights(-below_max) * kept
    surprise = (torch.where(w > 0, exp(-below_max) * below_max, 0.0) * 2.0**40).long()
    mean = (surprise.sum(1, keepdim=True).double() / w.sum(1, keepdim=True).double()).float()
    typical = (below_max - mean).abs().masked_fill(~kept, torch.inf).sort(dim=1, stable=True).indices
    kept &= shortest_prefix(typical, w, prefix_target(typical_p, w))
    w = w * kept
    kept &= shortest_prefix(descending, w, prefix_target(top_p, w))
    w = w * kept
    floor = (min_p.clamp(max=1.0).double() * w.amax(1, keepdim=True).double()).long()
    return kept & ((w >= floor) | ~(min_p > 0))


def prefix_target(p: Tensor, mass: Tensor) -> Tensor:
    """The mass that a prefix must reach to hold a share p of the whole; p >= 1 keeps everything."""
    target = (p.double() * mass.sum(1, keepdim=True).double()).nan_to_num().long().clamp(min=1)
    return torch.where(p < 1, target, EVERYTHING)


def shortest_prefix(order: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """The tokens of the shortest prefix of `order` whose mass is at least `target`: [num_seqs, vocab_size] bool."""
    ordered = mass.gather(1, order)
    before = ordered.cumsum(1) - ordered
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, before < target)


def differences(z: Tensor) -> Tensor:
    """z minus its row's maximum; 0 at the maximum even when that is infinite."""
    largest = z.amax(dim=1, keepdim=True)
    return torch.where(z == largest, 0.0, z - largest)


def weights(d: Tensor) -> Tensor:
    """trunc(exp(d) * 2**40) as int64, for fp32 d <= 0: probabilities up to their sum."""
    return (exp(d) * 2.0**40).long()


def exp(d: Tensor) -> Tensor:
    """e**d for fp32 d <= 0, with relative error below 1e-7; everything below -28 counts as -28."""
    d = d.clamp(min=MIN_EXPONENT)
    n = (d * LOG2_E + ROUND_TO_INT) - ROUND_TO_INT
    r = (d - n * LN2_HIGH) - n * LN2_LOW
    power_of_two = ((n.int() + 127) << 23).view(torch.float32)
    return (((_polynomial(EXP_POLY, r) * r) * r + r) + 1.0) * power_of_two


def log(v: Tensor) -> Tensor:
    """Natural logarithm of a normal fp32 v > 0, with relative error below 1e-7."""
    bits = v.view(torch.int32) + (ONE_BITS - SQRT_HALF_BITS)
    mantissa = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)  # in [sqrt(1/2), sqrt(2))
    return log1p_scaled(mantissa - 1.0, ((bits >> 23) - 127).float())


def log1p_scaled(f: Tensor, exponent: Tensor) -> Tensor:
    """log((1 + f) * 2**exponent), for sqrt(1/2) <= 1 + f < sqrt(2)."""
    square = f * f
    tail = ((f * square) * _polynomial(LOG_POLY, f) + exponent * LN2_LOW) - square * 0.5
    return (f + tail) + exponent * LN2_HIGH


def gumbel_exponentials(ints: Tensor, vocab_size: int) -> Tensor:
    """E = -log(v) for the uniform v = (x + 0.5) * 2**-32 of each token: [num_seqs, vocab_size] fp32; -log(E) is Gumbel.

    x is output word `token_id % 4` of Philox at counter (position, token_id // 4, choice, 0). Near v = 1 the logarithm
    takes 1 - v from the complement of x, in full resolution, where v itself would round to 1: E goes down to 2**-33, so
    that 2**17 equal logits stay equally likely. `fp32(word)` rounds to nearest even.
    """
    block = torch.arange((vocab_size + 3) // 4, device=ints.device)[None, :]
    words = philox4x32((ints[:, [POSITION]], block, ints[:, [CHOICE]], torch.zeros_like(block)), ints[:, [SEED]])
    x = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    near_one = -(((0xFFFFFFFF - x).float() + 0.5) * 2.0**-32)
    elsewhere = log((x.float() + 0.5) * 2.0**-32)
    return -torch.where(x >= SQRT_HALF_WORD, log1p_scaled(near_one, torch.zeros_like(near_one)), elsewhere)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words a counter, as int64 in [0, 2**32).

    Args:
        counter: four int64 tensors that broadcast; their low 32 bits count.
        key: int64; the low word is key 0, the high word key 1.
    Source: Salmon et al., doi 10.1145/2063384.2063405.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (word & mask for word in counter)
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, which leaves both halves right
        c0, c1 = ((product1 >> 32) & mask) ^ c1 ^ k0, product1 & mask
        c2, c3 = ((product0 >> 32) & mask) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _score(logits: Tensor, targets: Tensor, num_logprobs: int) -> SampleOutput:
    x = logits.float()
    broken = x.isnan().any(dim=1)
    d = differences(x)
    logprobs = d - log(weights(d).sum(1, keepdim=True).float() * 2.0**-40)

    chosen = targets.clamp(min=0)[:, None]
    value, ids = x.gather(1, chosen), torch.arange(x.shape[1], device=x.device)
    ranks = 1 + ((x > value) | ((x == value) & (ids < chosen))).sum(1)
    absent = broken | (targets < 0)
    top = x.sort(dim=1, descending=True, stable=True).indices[:, :num_logprobs]
    return SampleOutput(
        targets,
        logprobs.gather(1, chosen)[:, 0].masked_fill(absent, torch.nan),
        ranks.masked_fill(absent, 0),
        top.masked_fill(broken[:, None], -1),
        logprobs.gather(1, top).masked_fill(broken[:, None], torch.nan),
    )


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def check_logits(logits: Tensor) -> None:
    """Raise ShapeError unless logits are [num_rows, vocab_size] fp32 or bf16, with 1 to 2**22 tokens."""
    check_shape("logits", logits, None, None)
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"logits has dtype {logits.dtype}; it must be torch.float32 or torch.bfloat16")
    if not 1 <= logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ShapeError(f"logits has a vocabulary of {logits.shape[1]}; it must be in [1, {MAX_VOCAB_SIZE}]")


def check_sampling(logits: Tensor, batch: SamplingBatch) -> None:
    """Raise ShapeError unless logits and batch agree: shapes, dtypes, and every id and offset within bounds."""
    check_logits(logits)
    num_seqs, vocab_size = logits.shape
    check_shape("floats", batch.floats, num_seqs, NUM_FLOATS)
    check_shape("ints", batch.ints, num_seqs, NUM_INTS)
    if batch.num_logprobs > vocab_size:
        raise ShapeError(f"num_logprobs is {batch.num_logprobs}; it is at most {vocab_size} (the vocabulary)")
    num_count_rows = 0 if batch.token_counts is None else batch.token_counts.shape[0]
    if batch.token_counts is not None:
        check_shape("token_counts", batch.token_counts, None, vocab_size)
    count_row = int(batch.ints[:, COUNT_ROW].max()) if num_seqs else -1
    if count_row >= num_count_rows:
        raise ShapeError(f"a count_row is {count_row}; token_counts has {num_count_rows} rows")
    parts = (batch.bias_start, batch.bias_ids, batch.bias_values)
    if any(part is None for part in parts) and any(part is not None for part in parts):
        raise ShapeError("bias_start, bias_ids and bias_values must be given together")
    if batch.bias_start is not None and batch.bias_ids is not None and batch.bias_values is not None:
        check_shape("bias_start", batch.bias_start, num_seqs + 1)
        check_shape("bias_values", batch.bias_values, batch.bias_ids.numel())
        offsets, ids = batch.bias_start.tolist(), batch.bias_ids.tolist()
        if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ShapeError(f"bias_start must rise from 0 to {len(ids)}, the number of biases; it is {offsets[:8]}")
        if bad := [token_id for token_id in ids if not 0 <= token_id < vocab_size]:
            raise ShapeError(f"bias_ids holds {bad[0]}; it is in [0, {vocab_size})")
        if not bool((batch.bias_values < torch.inf).all()):
            raise ShapeError("bias_values holds NaN or +inf; a bias is finite, or -inf to forbid the token")
