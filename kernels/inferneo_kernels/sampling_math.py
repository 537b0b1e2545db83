"""The sampler's arithmetic on the device: what the reference defines in torch, bit for bit.

Bits are equal because every product and sum is rounded on its own (the launchers turn the fusing of multiply and add
off), divisions are IEEE divisions, exp and log are written-out polynomials, and mass is an integer.

Source: Philox, doi 10.1145/2063384.2063405; Gumbel-max, arXiv 1411.0030.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of SamplingBatch.floats and .ints, as inferneo_core/batch.py numbers them.
INV_TEMPERATURE, TOP_P, MIN_P, TYPICAL_P = (tl.constexpr(i) for i in range(4))
REPETITION, PRESENCE, FREQUENCY, NUM_FLOATS = (tl.constexpr(i) for i in range(4, 8))
TOP_K, SEED, POSITION, CHOICE, COUNT_ROW, NUM_INTS = (tl.constexpr(i) for i in range(6))
PROMPT_BIT = tl.constexpr(1 << 30)  # in token_counts: the token stands in the prompt

SQRT_HALF_BITS, ONE_BITS = tl.constexpr(0x3F3504F3), tl.constexpr(0x3F800000)
SQRT_HALF_WORD = tl.constexpr(0xB504F334)  # the first 32-bit word whose uniform is above sqrt(1/2)
ROUND_TO_INT = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding, then subtracting it rounds an fp32 to an integer
LOG2_E = tl.constexpr(1.4426950216293335)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-0.00021219444170128554)
MIN_EXPONENT = tl.constexpr(-28.0)  # exp(-28) is below 2**-40, the unit of mass
MASS_UNITS = tl.constexpr(2.0**40)

# A token is an int64 above 0 that orders tokens by value, then by lowest id: the value's key, then the complement of
# the id, so that the largest token is the choice.
ID_BITS = tl.constexpr(22)  # a vocabulary has at most 2**22 tokens
ID_MASK = tl.constexpr((1 << 22) - 1)
NO_TOKEN = tl.constexpr(0)
NAN_TOKEN = tl.constexpr(1 << 62)  # above every token: one NaN outweighs a row
LOWEST_KEY = tl.constexpr(0x00800000)  # value_key(-inf) is one less: no key below this can be drawn


@triton.jit
def value_key(x):
    """int64 in [0, 2**32) that orders fp32 values; -0 equals +0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def key_value(key):
    """The fp32 value of a key."""
    bits = (key - 0x80000000).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack_token(x, ids):
    """The token with value x and this id."""
    return (value_key(x) << ID_BITS) | (ids ^ ID_MASK).to(tl.int64)


@triton.jit
def token_key(token):
    return token >> ID_BITS


@triton.jit
def token_id(token):
    return (token & ID_MASK) ^ ID_MASK


@triton.jit
def difference(z, largest):
    """z minus its row's maximum; 0 at the maximum even when that is infinite."""
    at_largest = z == largest
    return tl.where(at_largest, 0.0, z) - tl.where(at_largest, 0.0, largest)


@triton.jit
def weight(d):
    """trunc(exp(d) * 2**40) as int64, for fp32 d <= 0."""
    return (exp(d) * MASS_UNITS).to(tl.int64)


@triton.jit
def surprise(d):
    """trunc(exp(d) * -d * 2**40) as int64 where the weight is above 0, otherwise 0."""
    e = exp(d)
    return tl.where(e * MASS_UNITS >= 1.0, e * -tl.maximum(d, MIN_EXPONENT) * MASS_UNITS, 0.0).to(tl.int64)


@triton.jit
def exp(d):
    """e**d for fp32 d <= 0; everything below -28 counts as -28."""
    d = tl.maximum(d, MIN_EXPONENT)
    n = (d * LOG2_E + ROUND_TO_INT) - ROUND_TO_INT
    r = (d - n * LN2_HIGH) - n * LN2_LOW
    power_of_two = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    p = 0.0013933650916442275 * r + 0.008363179862499237
    p = p * r + 0.04166646674275398
    p = p * r + 0.16666576266288757
    p = p * r + 0.5
    return (((p * r) * r + r) + 1.0) * power_of_two


@triton.jit
def log(v):
    """Natural logarithm of a normal fp32 v > 0."""
    bits = v.to(tl.int32, bitcast=True) + (ONE_BITS - SQRT_HALF_BITS)
    mantissa = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    return log1p_scaled(mantissa - 1.0, ((bits >> 23) - 127).to(tl.float32))


@triton.jit
def log1p_scaled(f, exponent):
    """log((1 + f) * 2**exponent), for sqrt(1/2) <= 1 + f < sqrt(2)."""
    p = 0.07149753719568253 * f + -0.115712009370327
    p = p * f + 0.11661510914564133
    p = p * f + -0.12411050498485565
    p = p * f + 0.14249937236309052
    p = p * f + -0.1666848063468933
    p = p * f + 0.20000708103179932
    p = p * f + -0.24999989569187164
    p = p * f + 0.3333333134651184
    square = f * f
    tail = ((f * square) * p + exponent * LN2_LOW) - square * 0.5
    return (f + tail) + exponent * LN2_HIGH


@triton.jit
def gumbel_of_word(x):
    """The standard Gumbel variate of a 32-bit random word: -log(E), E = -log((x + 0.5) * 2**-32)."""
    near_one = -(((0xFFFFFFFF - x).to(tl.float32) + 0.5) * 2.0**-32)  # 1 - v in full resolution
    elsewhere = log((x.to(tl.float32) + 0.5) * 2.0**-32)
    return -log(-tl.where(x >= SQRT_HALF_WORD, log1p_scaled(near_one, 0.0), elsewhere))


@triton.jit
def random_words(ints_row_ptr, group):
    """Philox4x32-10 at counter (position, group, choice, 0): the words of the tokens 4 * group to 4 * group + 3.

    Args:
        ints_row_ptr: the row of SamplingBatch.ints, or some rows; broadcasts against group.
        group: int32 token ids // 4.
    """
    zero = (group * 0).to(tl.uint32)
    position = tl.load(ints_row_ptr + POSITION).to(tl.uint32) + zero
    choice = tl.load(ints_row_ptr + CHOICE).to(tl.uint32) + zero
    return tl.philox(tl.load(ints_row_ptr + SEED), position, group.to(tl.uint32) + zero, choice, position * 0)


@triton.jit
def gumbel_tile(ints_row_ptr, group):
    """Gumbel variates of consecutive tokens, four a group: the last dimension is four times as long."""
    w0, w1, w2, w3 = random_words(ints_row_ptr, group)
    return gumbel_of_word(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def gumbel_at(ints_row_ptr, ids):
    """Gumbel variates of any tokens."""
    w0, w1, w2, w3 = random_words(ints_row_ptr, ids // 4)
    lane = ids % 4
    return gumbel_of_word(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def penalised(x, counts, floats_row_ptr):
    """x after the repetition, presence and frequency penalties; counts as in SamplingBatch.token_counts."""
    repetition = tl.load(floats_row_ptr + REPETITION)
    presence, frequency = tl.load(floats_row_ptr + PRESENCE), tl.load(floats_row_ptr + FREQUENCY)
    seen = (counts & (2 * PROMPT_BIT - 1)) != 0
    times = counts & (PROMPT_BIT - 1)
    x = tl.where(seen, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
    return tl.where(times > 0, x - (presence + frequency * times.to(tl.float32)), x)


@triton.jit
def biased(x, ids, row, bias_start_ptr, bias_ids_ptr, bias_values_ptr):
    """x after one row's biases, added one by one; -inf forbids."""
    for entry in range(tl.load(bias_start_ptr + row), tl.load(bias_start_ptr + row + 1)):
        bias = tl.load(bias_values_ptr + entry)
        forbids = bias == -float("inf")
        moved = tl.where(forbids, bias, x + tl.where(forbids, 0.0, bias))
        x = tl.where(ids == tl.load(bias_ids_ptr + entry), moved, x)
    return x


@triton.jit
def scaled(x, floats_row_ptr):
    """x times the inverse temperature, which is 0 for greedy rows: these keep x."""
    inv_temperature = tl.load(floats_row_ptr + INV_TEMPERATURE)
    return x * tl.where(inv_temperature == 0.0, 1.0, inv_temperature)
