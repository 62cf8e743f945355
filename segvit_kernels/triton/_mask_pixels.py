"""What mask losses need of one pixel in Triton: its logit between the cells of a map, losses and slopes.

Interpolation. A tile is 16 groups of R ≤ ⌈scale⌉ output rows, times BLOCK columns. The rows of a group touch
three rows of the low-resolution map, which are loaded and interpolated along x once; then

    x = v₀ + clamp(f) (v₁ − v₀) + clamp(f − 1) (v₂ − v₁),    f = position below v₀, clamp to [0, 1]:

two multiply-adds a pixel at any scale, one where no group reaches across the centre of a cell. The adjoint is
three multiply-adds into sums that stay in registers. Kernels walk the R rows of all groups at once.

Per pixel one exponential and one reciprocal square root; log(1 + e) is a polynomial, accurate for small e as
the hardware's logarithm is not.

Factors of products are split in two terms that tensor cores take as they are: TF32 loses nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log1p(e, root):
    """log(1 + e) for e in [0, 1]: e times a minimax polynomial in root = (1 + e)^(-1/2), error 2.2e-8."""
    y = root * -0.07078979077973632 + 0.37277049874695506
    y = y * root - 0.7856167479721908
    y = y * root + 0.6612776151423766
    y = y * root + 0.8971570618647687
    y = y * root - 0.07479865884513312
    return e * y


@triton.jit
def _shares(x):
    """σ(|x|), σ(−|x|), exp(−|x|) and (1 + exp(−|x|))^(-1/2)."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    root = tl.rsqrt(1.0 + e)  # squared, it is a reciprocal without the range checks of a division
    larger = root * root
    return larger, e * larger, e, root


@triton.jit
def _logistic_of_size(x):
    """σ(|x|), σ(−|x|) and log(1 + exp(−|x|))."""
    larger, smaller, e, root = _shares(x)
    return larger, smaller, _log1p(e, root)


@triton.jit
def _logistic(x):
    """σ(x), σ(−x) and log(1 + exp(−|x|))."""
    larger, smaller, e, root = _shares(x)
    positive = x > 0
    return tl.where(positive, larger, smaller), tl.where(positive, smaller, larger), _log1p(e, root)


@triton.jit
def _power(m, gamma, GAMMA_TWO: tl.constexpr):
    if GAMMA_TWO:
        return m * m
    else:
        return tl.where(m > 0, tl.exp2(gamma * tl.log2(m)), 0.0)  # where m is 0, so is what it multiplies


@triton.jit
def _losses(x, t, alpha, gamma, GAMMA_TWO: tl.constexpr, HARD: tl.constexpr):
    """Focal, bce, p·t and p of every pixel; ``t`` is boolean if HARD.

    ``None`` for ``t`` is 0 everywhere: the focal loss is then without its factor 1 − α.
    """
    p, q, log = _logistic(x)
    if t is None:
        bce = tl.maximum(x, 0.0) + log
        focal = _power(p, gamma, GAMMA_TWO) * bce
        overlap = 0.0
    elif HARD:
        bce = tl.maximum(tl.where(t, -x, x), 0.0) + log
        m = tl.where(t, q, p)
        focal = tl.where(t, alpha, 1.0 - alpha) * _power(m, gamma, GAMMA_TWO) * bce
        overlap = tl.where(t, p, 0.0)
    else:
        bce = log + x * (tl.where(x > 0, 1.0, 0.0) - t)
        m = p * (1.0 - t) + q * t
        focal = (alpha * t + (1.0 - alpha) * (1.0 - t)) * _power(m, gamma, GAMMA_TWO) * bce
        overlap = p * t
    return focal, bce, overlap, p


@triton.jit
def _slopes(x, t, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO: tl.constexpr, HARD: tl.constexpr):
    """Derivative of g₀ focal + g₁ bce + g₂ p·t + g₃ p in x; ``None`` for ``t`` is 0 everywhere."""
    p, q, log = _logistic(x)
    if t is None:
        focal = (1.0 - alpha) * g0 * (gamma * q * (tl.maximum(x, 0.0) + log) + p)
        rest = g1 + g3 * q
        if GAMMA_TWO:
            return p * (p * focal + rest)
        else:
            return _power(p, gamma, GAMMA_TWO) * focal + p * rest
    elif HARD:
        # With z = −x inside and x outside: bce = softplus(z), m = σ(z), n = 1 − m.
        bce = tl.maximum(tl.where(t, -x, x), 0.0) + log
        m, n = tl.where(t, q, p), tl.where(t, p, q)
        focal = tl.where(t, -alpha * g0, (1.0 - alpha) * g0) * (gamma * n * bce + m)
        rest = tl.where(t, -g1, g1) + tl.where(t, g2 + g3, g3) * n
        if GAMMA_TWO:
            return m * (m * focal + rest)
        else:
            return _power(m, gamma, GAMMA_TWO) * focal + m * rest
    else:
        bce = log + x * (tl.where(x > 0, 1.0, 0.0) - t)
        m = p * (1.0 - t) + q * t
        slope, error = p * q, p * (1.0 - t) - q * t
        alpha_t = alpha * t + (1.0 - alpha) * (1.0 - t)
        if GAMMA_TWO:
            focal = m * (2.0 * (1.0 - 2.0 * t) * slope * bce + m * error)
        else:
            # m is at least the smaller of p and 1 − p, so that the ratio is at most 1.
            ratio = tl.where(m > 0, slope / m, 0.0)
            focal = _power(m, gamma, GAMMA_TWO) * (gamma * (1.0 - 2.0 * t) * ratio * bce + error)
        return g0 * alpha_t * focal + g1 * error + (g2 * t + g3) * slope


@triton.jit
def _source(i, cells, size):
    """Where output element i of ``size`` lies among ``cells``: the cell before it and the way past that.

    The cell may be off by one at a boundary, where it does not matter; the way is exact but for one rounding.
    """
    position = (2 * i + 1) * cells - size  # in units of 1 / (2 size)
    unit = tl.cast(2 * size, tl.float32)  # a size of 1 is a number of Python's
    before = (position.to(tl.float32) / unit).to(tl.int32)
    before = tl.minimum(tl.maximum(before, 0), cells - 1)
    return before, (position - before * (2 * size)).to(tl.float32) / unit


@triton.jit
def _rows(y, h, H):
    """The row of the map above each output row y, the way past it, and the way to the next output row."""
    row, past = _source(y, h, H)
    return row, past, tl.cast(h, tl.float32) / tl.cast(H, tl.float32)


@triton.jit
def _columns(x, w, W):
    """The column of the map before each output column x, and the way past it in [0, 1]."""
    column, past = _source(x, w, W)
    return column, tl.where(column < w - 1, tl.maximum(past, 0.0), 0.0)


@triton.jit
def _map_row(ptr, row, h, w, column, past):
    """One row of the map, interpolated at the output columns: [rows, columns]."""
    # The hint is for the layout, loads stay scalar: by itself Triton 3.6 lets threads run down the rows.
    ptrs = ptr + tl.minimum(row, h - 1) * w
    left = tl.load(tl.max_contiguous(ptrs + column, [1, 2])).to(tl.float32)
    right = tl.load(tl.max_contiguous(ptrs + tl.minimum(column + 1, w - 1), [1, 2])).to(tl.float32)
    return left + past * (right - left)


@triton.jit
def _between(past):
    return tl.minimum(tl.maximum(past, 0.0), 1.0)


@triton.jit
def _wide(label):
    """Labels in at least 32 bits, to compare them with numbers that theirs may not hold."""
    return label.to(tl.int32) if label.dtype.primitive_bitwidth < 32 else label


@triton.jit
def _lowered(logits, inside):
    return tl.where(inside, logits, -1e30)


@triton.jit
def _read(
    targets_ptr, y, x, target, H, W, M, logits,
    LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr,
    EVEN: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Targets of one output row of every group, and the logits.

    Ignored pixels, and if LOWER those outside, get a logit so low that they add nothing to sums or gradients.
    """
    offset = y * W + x
    inside = (y < H) & (x < W)
    if EVEN:
        t = tl.load(targets_ptr + offset)
    else:
        t = tl.load(targets_ptr + offset, mask=inside, other=0)
        if LOWER:
            logits = _lowered(logits, inside)
    if LABELS:
        label = _wide(t)
        t = label == target
        if LOWER:
            t = t & inside
        if MASK_IGNORED:
            logits = tl.where((label >= 0) & (label < M), logits, -1e30)
    else:
        t = (t != 0) if HARD else t.to(tl.float32)
    return logits, t


@triton.jit
def _high(x):
    """x without the bits that tensor cores would drop."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(f, t, acc, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """acc + f t in float32; EXACT says that tensor cores take t as it is."""
    if SPLIT:
        f_high, t_high = _high(f), _high(t)
        acc = tl.dot(f - f_high, t_high, acc, input_precision="tf32")
        if not EXACT:
            acc = tl.dot(f_high, t - t_high, acc, input_precision="tf32")
        return tl.dot(f_high, t_high, acc, input_precision="tf32")
    else:
        return tl.dot(f, t, acc, input_precision="ieee")
