"""What the Gluon kernels share: places of tokens, and what goes into shared memory and comes out of it.

Vectors of tokens are put there too: every warp then reads them as the rows or columns of whatever tile it needs them
for, and nothing is converted from layout to layout.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.jit
def places(start, end, i_h, H: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """token_rows_of_chunk in a layout."""
    o_c = gl.arange(0, C, LAYOUT)
    return start + o_c < end, (start + o_c).to(gl.int64) * H + i_h, gl.minimum(o_c, end - start - 1)


@gluon.jit
def to_shared(b):
    """The operand b [R, D] in shared memory; fence_async_shared and a barrier before a product reads it."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b.shape, b.dtype)
    return gl.allocate_shared_memory(b.dtype, b.shape, LAYOUT, b)


@gluon.jit
def scalars_in_row(p, i_row, o_row, m_t, LAYOUT: gl.constexpr):
    """Scalars of tokens in fp32 as row ``i_row`` of [4, C], 0 elsewhere: a warp reads one row, a thread one token."""
    o_i = gl.arange(0, 4, gl.SliceLayout(1, LAYOUT))
    mask = (o_i == i_row)[:, None] & m_t[None, :]
    return gl.load(p + (o_row[None, :] + 0 * o_i[:, None]), mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def vector(b):
    """A vector of tokens in shared memory."""
    return gl.allocate_shared_memory(b.dtype, b.shape, gl.SwizzledSharedLayout(1, 1, 1, [0]), b)


@gluon.jit
def copy_rows(s, p, o_r, o_d, stride):
    """Rows ``o_r`` of ``stride`` elements from ``p`` into shared memory [., BLOCK_D], asynchronously."""
    async_copy.async_copy_global_to_shared(s, p + (o_r[:, None] * stride + o_d[None, :]))
    async_copy.commit_group()


@gluon.jit
def stored():
    """What threads have stored can be read by the tensor cores."""
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def arrived(copies: gl.constexpr):
    """All but the last ``copies`` copies can be read by the tensor cores, and what threads stored before a fence."""
    async_copy.wait_group(copies)
    tl.debug_barrier()


@gluon.jit
def shared_scalars(b):
    """[4, C] in shared memory, row by row."""
    s = gl.allocate_shared_memory(b.dtype, b.shape, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), b)
    return s._reinterpret(b.dtype, b.shape, gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def sums_of_rows(b, WARPS: gl.constexpr):
    """Sums of rows of a sum of products, a warpgroup's share apart from the other's, in shared memory."""
    C: gl.constexpr = b.shape[0]
    SHARES: gl.constexpr = WARPS // 4
    b_shares = gl.sum(b.reshape([C, SHARES, b.shape[1] // SHARES]), axis=2)
    s_shares = gl.allocate_shared_memory(gl.float32, [C, SHARES], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]), b_shares)
    return s_shares._reinterpret(gl.float32, [SHARES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def load_sums(s_shares, LAYOUT: gl.constexpr):
    b = s_shares.index(0).load(LAYOUT)
    if s_shares.shape[0] == 2:
        b += s_shares.index(1).load(LAYOUT)
    return b


@gluon.jit
def largest_of_rows(b, WARPS: gl.constexpr):
    """Largest entries of rows, as :func:`sums_of_rows` has sums."""
    C: gl.constexpr = b.shape[0]
    SHARES: gl.constexpr = WARPS // 4
    b_shares = gl.max(b.reshape([C, SHARES, b.shape[1] // SHARES]), axis=2)
    s_shares = gl.allocate_shared_memory(gl.float32, [C, SHARES], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]), b_shares)
    return s_shares._reinterpret(gl.float32, [SHARES, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def load_largest(s_shares, LAYOUT: gl.constexpr):
    b = s_shares.index(0).load(LAYOUT)
    if s_shares.shape[0] == 2:
        b = gl.maximum(b, s_shares.index(1).load(LAYOUT))
    return b
