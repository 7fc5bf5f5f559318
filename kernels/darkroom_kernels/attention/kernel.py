"""The two Triton kernels of attention. Imported only where Triton is; the maths and the figures are in README.md.

Sizes that no power of two fits are cut into two powers of two (`split`), each with blocks of its own: `D1` and `D2` of
a head, `N1` and `N2` of a short text. A cut may end in a few masked places, because a product needs 16. `D2` or `N2`
is 0 when one block holds all.

Strides come in units of `UNIT` elements. With UNIT 8 the compiler sees that every row starts at a multiple of 16 bytes,
even where a stride such as 40 is no multiple of 16 elements, and reads in vectors; one build then serves all strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from darkroom_kernels.attention.launch import precision
from darkroom_kernels.attention.tiles import Row, load_table, split
from darkroom_kernels.backend import Build, launch_options


@triton.jit
def _rows(p_base, o_row, o_dim, stride, m_row, m_dim, HAS_M_ROW: tl.constexpr, HAS_M_DIM: tl.constexpr):
    """A block `[rows, dims]` of 16-bit or 32-bit values; zeros where a mask is false."""
    p = p_base + o_row[:, None] * stride + o_dim[None, :]
    if HAS_M_ROW and HAS_M_DIM:
        b = tl.load(p, mask=m_row[:, None] & m_dim[None, :], other=0.0)
    elif HAS_M_ROW:
        b = tl.load(p, mask=m_row[:, None], other=0.0)
    elif HAS_M_DIM:
        b = tl.load(p, mask=m_dim[None, :], other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def _flash_step(
    b_q1, b_q2, b_acc1, b_acc2, b_max, b_sum, p_k, p_v, start, num_keys, stride_k, stride_v, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running softmax."""
    o_n = tl.arange(0, BLOCK_N)
    o_d1 = tl.arange(0, D1)
    m_n = start + o_n < num_keys
    # `start` is a plain number under the interpreter, so the stride is what becomes 64 bits wide.
    p_k += stride_k.to(tl.int64) * start
    p_v += stride_v.to(tl.int64) * start
    b_k1 = _rows(p_k, o_n, o_d1, stride_k, m_n, o_d1 < D, MASKED, D1 > D)  # [BLOCK_N, D1]
    b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_k2 = _rows(p_k, o_n, o_d2, stride_k, m_n, o_d2 < D, MASKED, D1 + D2 > D)  # [BLOCK_N, D2]
        b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new_max[:, None])
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc1 = b_acc1 * b_decay[:, None]
    b_v1 = _rows(p_v, o_n, o_d1, stride_v, m_n, o_d1 < D, MASKED, D1 > D)  # [BLOCK_N, D1]
    b_p = b_p.to(b_v1.dtype)
    b_acc1 = tl.dot(b_p, b_v1, b_acc1, input_precision=PRECISION)
    if D2 > 0:
        b_acc2 = b_acc2 * b_decay[:, None]
        b_v2 = _rows(p_v, o_n, o_d2, stride_v, m_n, o_d2 < D, MASKED, D1 + D2 > D)  # [BLOCK_N, D2]
        b_acc2 = tl.dot(b_p, b_v2, b_acc2, input_precision=PRECISION)
    return b_acc1, b_acc2, b_new_max, b_sum


# Integers that Triton shall not look into: one build serves all sizes, and a single head does not become a constant.
UNSPECIALISED = [
    "num_heads", "num_queries", "num_keys", "num_tiles", "stride_qb", "stride_qh", "stride_qm",
    "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def flash_kernel(
    p_q, p_k, p_v, p_out, p_lengths, p_slots, scale, num_heads, num_queries, num_keys, num_tiles,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries to all keys, tile by tile, with a running softmax.

    `p_q` `[B, H, M, D]`, `p_k` and `p_v` `[S, H, N, D]`, `p_out` `[B, M, H, D]` dense. `scale` includes log2(e).
    Grid: (B · H · num_tiles). Source: Dao 2023, FlashAttention-2, algorithm 1.
    """
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles) % num_heads
    row = tl.program_id(0) // (num_tiles * num_heads)
    slot = tl.load(p_slots + row).to(tl.int64) if HAS_SLOTS else row.to(tl.int64)
    if HAS_LENGTHS:
        num_keys = tl.minimum(num_keys, tl.load(p_lengths + row))
    start_m = tile * BLOCK_M
    p_q += (row.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + start_m.to(tl.int64) * stride_qm) * UNIT
    p_k += (slot * stride_kb + head.to(tl.int64) * stride_kh) * UNIT
    p_v += (slot * stride_vb + head.to(tl.int64) * stride_vh) * UNIT
    o_m = tl.arange(0, BLOCK_M)
    o_d1 = tl.arange(0, D1)
    m_m = start_m + o_m < num_queries
    b_q1 = _rows(p_q, o_m, o_d1, stride_qm * UNIT, m_m, o_d1 < D, not EVEN_M, D1 > D)  # [BLOCK_M, D1]
    b_acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    b_q2, b_acc2 = b_q1, b_acc1
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_q2 = _rows(p_q, o_m, o_d2, stride_qm * UNIT, m_m, o_d2 < D, not EVEN_M, D1 + D2 > D)  # [BLOCK_M, D2]
        b_acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    # Finite, so that a row without keys ends in zeros and not in NaN.
    b_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        b_acc1, b_acc2, b_max, b_sum = _flash_step(
            b_q1, b_q2, b_acc1, b_acc2, b_max, b_sum, p_k, p_v, start, num_keys, stride_kn * UNIT, stride_vn * UNIT,
            scale, D, D1, D2, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    if not EVEN_N:
        for start in tl.range(whole, num_keys, BLOCK_N):
            b_acc1, b_acc2, b_max, b_sum = _flash_step(
                b_q1, b_q2, b_acc1, b_acc2, b_max, b_sum, p_k, p_v, start, num_keys, stride_kn * UNIT,
                stride_vn * UNIT, scale, D, D1, D2, BLOCK_N, True, PRECISION,
            )  # fmt: skip
    b_scale = 1.0 / tl.maximum(b_sum, 1.0e-37)
    p_out += ((row.to(tl.int64) * num_queries + start_m) * num_heads + head) * D
    stride_out = num_heads * D
    _store(p_out, o_m, o_d1, stride_out, b_acc1 * b_scale[:, None], m_m, o_d1 < D, not EVEN_M, D1 > D)
    if D2 > 0:
        _store(p_out, o_m, o_d2, stride_out, b_acc2 * b_scale[:, None], m_m, o_d2 < D, not EVEN_M, D1 + D2 > D)


@triton.jit
def _store(p_base, o_row, o_dim, stride, b, m_row, m_dim, HAS_M_ROW: tl.constexpr, HAS_M_DIM: tl.constexpr):
    """Write a block `[rows, dims]` where both masks are true."""
    p = p_base + o_row[:, None] * stride + o_dim[None, :]
    b = b.to(p_base.dtype.element_ty)
    if HAS_M_ROW and HAS_M_DIM:
        tl.store(p, b, mask=m_row[:, None] & m_dim[None, :])
    elif HAS_M_ROW:
        tl.store(p, b, mask=m_row[:, None])
    elif HAS_M_DIM:
        tl.store(p, b, mask=m_dim[None, :])
    else:
        tl.store(p, b)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "tiles_per_program"])
def few_keys_kernel(
    p_q, p_k, p_v, p_out, p_lengths, p_slots, scale, num_heads, num_queries, num_keys, num_tiles,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    tiles_per_program, UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of `tiles_per_program` tiles of queries to all keys of a head, which stay on the chip.

    One pass: every score of a query is there before its softmax. Arguments as `flash_kernel`'s, where `num_tiles`
    counts programs of one head; keys are blocks of `N1` and `N2`. Grid: (B · H · num_tiles).
    """
    first = tl.program_id(0) % num_tiles * tiles_per_program
    head = (tl.program_id(0) // num_tiles) % num_heads
    row = tl.program_id(0) // (num_tiles * num_heads)
    slot = tl.load(p_slots + row).to(tl.int64) if HAS_SLOTS else row.to(tl.int64)
    if HAS_LENGTHS:
        num_keys = tl.minimum(num_keys, tl.load(p_lengths + row))
    MASKED: tl.constexpr = not EVEN_N
    p_q += (row.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh) * UNIT
    p_k += (slot * stride_kb + head.to(tl.int64) * stride_kh) * UNIT
    p_v += (slot * stride_vb + head.to(tl.int64) * stride_vh) * UNIT
    p_out += (row.to(tl.int64) * num_queries * num_heads + head) * D
    stride_q = stride_qm * UNIT
    stride_out = num_heads * D
    o_m = tl.arange(0, BLOCK_M)
    o_n1 = tl.arange(0, N1)
    o_d1 = tl.arange(0, D1)
    m_n1 = o_n1 < num_keys
    b_k11 = _rows(p_k, o_n1, o_d1, stride_kn * UNIT, m_n1, o_d1 < D, MASKED, D1 > D)  # [N1, D1]
    b_v11 = _rows(p_v, o_n1, o_d1, stride_vn * UNIT, m_n1, o_d1 < D, MASKED, D1 > D)  # [N1, D1]
    if D2 > 0:
        o_d2 = D1 + tl.arange(0, D2)
        b_k12 = _rows(p_k, o_n1, o_d2, stride_kn * UNIT, m_n1, o_d2 < D, MASKED, D1 + D2 > D)  # [N1, D2]
        b_v12 = _rows(p_v, o_n1, o_d2, stride_vn * UNIT, m_n1, o_d2 < D, MASKED, D1 + D2 > D)  # [N1, D2]
    if N2 > 0:
        o_n2 = N1 + tl.arange(0, N2)
        m_n2 = o_n2 < num_keys
        b_k21 = _rows(p_k, o_n2, o_d1, stride_kn * UNIT, m_n2, o_d1 < D, MASKED, D1 > D)  # [N2, D1]
        b_v21 = _rows(p_v, o_n2, o_d1, stride_vn * UNIT, m_n2, o_d1 < D, MASKED, D1 > D)  # [N2, D1]
        if D2 > 0:
            b_k22 = _rows(p_k, o_n2, o_d2, stride_kn * UNIT, m_n2, o_d2 < D, MASKED, D1 + D2 > D)  # [N2, D2]
            b_v22 = _rows(p_v, o_n2, o_d2, stride_vn * UNIT, m_n2, o_d2 < D, MASKED, D1 + D2 > D)  # [N2, D2]
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, tl.cdiv(num_queries, BLOCK_M))):
        start_m = tile * BLOCK_M
        m_m = start_m + o_m < num_queries
        p_qm = p_q + stride_q.to(tl.int64) * start_m
        b_q1 = _rows(p_qm, o_m, o_d1, stride_q, m_m, o_d1 < D, not EVEN_M, D1 > D)  # [BLOCK_M, D1]
        b_s1 = tl.dot(b_q1, tl.trans(b_k11), input_precision=PRECISION)  # [BLOCK_M, N1]
        if D2 > 0:
            b_q2 = _rows(p_qm, o_m, o_d2, stride_q, m_m, o_d2 < D, not EVEN_M, D1 + D2 > D)  # [BLOCK_M, D2]
            b_s1 = tl.dot(b_q2, tl.trans(b_k12), b_s1, input_precision=PRECISION)
        if MASKED:
            b_s1 = tl.where(m_n1[None, :], b_s1, float("-inf"))
        b_max = tl.max(b_s1, 1)
        if N2 > 0:
            b_s2 = tl.dot(b_q1, tl.trans(b_k21), input_precision=PRECISION)  # [BLOCK_M, N2]
            if D2 > 0:
                b_s2 = tl.dot(b_q2, tl.trans(b_k22), b_s2, input_precision=PRECISION)
            if MASKED:
                b_s2 = tl.where(m_n2[None, :], b_s2, float("-inf"))
            b_max = tl.maximum(b_max, tl.max(b_s2, 1))
        # Finite, so that a row without keys ends in zeros and not in NaN.
        b_max = tl.maximum(b_max * scale, -3.0e38)
        b_p1 = tl.exp2(b_s1 * scale - b_max[:, None])
        b_sum = tl.sum(b_p1, 1)
        b_p1 = b_p1.to(b_v11.dtype)
        b_out1 = tl.dot(b_p1, b_v11, input_precision=PRECISION)  # [BLOCK_M, D1]
        if D2 > 0:
            b_out2 = tl.dot(b_p1, b_v12, input_precision=PRECISION)  # [BLOCK_M, D2]
        if N2 > 0:
            b_p2 = tl.exp2(b_s2 * scale - b_max[:, None])
            b_sum += tl.sum(b_p2, 1)
            b_p2 = b_p2.to(b_v11.dtype)
            b_out1 = tl.dot(b_p2, b_v21, b_out1, input_precision=PRECISION)
            if D2 > 0:
                b_out2 = tl.dot(b_p2, b_v22, b_out2, input_precision=PRECISION)
        b_scale = 1.0 / tl.maximum(b_sum, 1.0e-37)
        p_outm = p_out + stride_out.to(tl.int64) * start_m
        _store(p_outm, o_m, o_d1, stride_out, b_out1 * b_scale[:, None], m_m, o_d1 < D, not EVEN_M, D1 > D)
        if D2 > 0:
            _store(p_outm, o_m, o_d2, stride_out, b_out2 * b_scale[:, None], m_m, o_d2 < D, not EVEN_M, D1 + D2 > D)


# Texts of one and two chunks of a prompt, and the keys of a picture's own tokens.
SHORT_TEXT, LONG_TEXT, PICTURE = 77, 154, 4096
# Tuning takes no tile that spills with the Triton at hand; another release may give it a few registers less.
MEASURED_STACK_BYTES = 160
# Head sizes that bounds of the table stand for.
HEAD_DIMS = {48: 40}


def builds() -> list[Build]:
    """Every row of the tuned table as a launch would build it: whole tiles; the same with slots, as a tick attends to
    a text; and odd sizes with lengths and slots."""
    found = []
    for kind, rows in load_table().items():
        capability = int(kind.rpartition("sm_")[2])
        for row in rows:
            forms = [(False, False), (True, True)]
            if row.tile.kernel == "few_keys":
                forms.append((False, True))
            for is_odd, has_slots in forms:
                found.append(_build(row, f"attention {kind}", capability, is_odd, has_slots))
    return found


def _build(row: Row, name: str, capability: int, is_odd: bool, has_slots: bool) -> Build:
    tile, dim = row.tile, HEAD_DIMS.get(row.max_head_dim, row.max_head_dim)
    dtype = "fp32" if row.bits == 32 else "bf16" if is_odd else "fp16"
    d1, d2 = split(dim)
    constants = {
        "UNIT": 8,
        "D": dim,
        "D1": d1,
        "D2": d2,
        "BLOCK_M": tile.block_m,
        "EVEN_M": not is_odd,
        "HAS_LENGTHS": is_odd,
        "HAS_SLOTS": has_slots,
        "PRECISION": precision(torch.float32 if row.bits == 32 else torch.float16),
    }
    if tile.kernel == "flash":
        kernel = flash_kernel
        constants |= {"BLOCK_N": tile.block_n, "EVEN_N": not is_odd}
        keys = PICTURE
    else:
        kernel = few_keys_kernel
        keys = SHORT_TEXT if row.max_keys is not None and row.max_keys < LONG_TEXT else LONG_TEXT
        n1, n2 = split(keys)
        constants |= {"N1": n1, "N2": n2, "EVEN_N": False}
    # What a kernel has no use for is a pointer to other values.
    types = {
        "p_lengths": "*i32" if is_odd else f"*{dtype}",
        "p_slots": "*i64" if has_slots else f"*{dtype}",
        "scale": "fp32",
    }
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, f"*{dtype}" if argument.startswith("p_") else "i32")
        for argument in kernel.arg_names
    }
    integers = {argument for argument, kind in signature.items() if kind == "i32"}
    return Build(
        f"{name} {tile.kernel} {dim} x {keys} {dtype} {tile.block_m}x{tile.block_n} {tile.num_warps}w "
        f"{tile.num_stages}s{' odd' if is_odd else ' slots' if has_slots else ''}",
        kernel,
        signature,
        constants,
        launch_options(tile.num_warps, tile.num_stages),
        uneven=frozenset(integers),
        has_products=True,
        capabilities=(capability,),
        most_stack_bytes=MEASURED_STACK_BYTES if row.measured else 0,
    )
