"""What the Gluon kernels for Hopper share: operands and vectors in shared memory, and the Chebyshev iteration.

Vectors of tokens are put into shared memory: every warp then reads them as the rows or columns of whatever tile it
needs them for, and nothing is converted from layout to layout.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from gka_ops.triton.primitives import certainly


@gluon.jit
def places(start, end, i_h, H: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """token_rows_of_chunk in a layout."""
    o_c = gl.arange(0, C, LAYOUT)
    return start + o_c < end, (start + o_c).to(gl.int64) * H + i_h, gl.minimum(o_c, end - start - 1)


@gluon.jit
def to_shared(b):
    """The operand b [R, D] in shared memory; ``stored`` comes before a product that reads it."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b.shape, b.dtype)
    return gl.allocate_shared_memory(b.dtype, b.shape, LAYOUT, b)


@gluon.jit
def kept(b):
    """The vector b [C] in shared memory, which any layout can be read from."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(b.dtype, b.shape, LAYOUT, b)


@gluon.jit
def scalars_in_row(p, i_row, o_row, m_t, LAYOUT: gl.constexpr):
    """Scalars of tokens in fp32 as row ``i_row`` of [4, C], 0 elsewhere: a warp reads one row, a thread one token."""
    o_i = gl.arange(0, 4, gl.SliceLayout(1, LAYOUT))
    mask = (o_i == i_row)[:, None] & m_t[None, :]
    return gl.load(p + (o_row[None, :] + 0 * o_i[:, None]), mask=mask, other=0.0).to(gl.float32)


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
    """All but the last ``copies`` copies can be read by the tensor cores, and so can what threads have stored."""
    async_copy.wait_group(copies)
    stored()


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


@gluon.jit
def chebyshev(b_b, s_h, s_k, phi, b_psi, delta, num_iter):
    """primitives.chebyshev with Ĥ and K̂ in shared memory, φ [C, 1] and Ψ [C, C] in the layouts of the products.

    ``b_y`` is r + δ z, what the products alone have made of b: no vector arithmetic touches an accumulator in flight.
    The next increment may be formed in fp16, because whatever it is, y follows it.
    """
    M_R: gl.constexpr = b_b.type.layout
    M_S: gl.constexpr = b_psi.type.layout
    A_R: gl.constexpr = gl.DotOperandLayout(0, M_R, 2)
    A_S: gl.constexpr = gl.DotOperandLayout(0, M_S, 2)
    theta = 0.5 * (1 + delta)
    h2 = 0.25 * (1 - delta) * (1 - delta)
    nu = 1 / theta
    b_d = (nu * b_b).to(gl.float16)
    b_z = gl.zeros(b_b.shape, gl.float32, M_R)
    b_y = b_b
    b_zero = gl.zeros(b_psi.shape, gl.float32, M_S)
    b_phi = (-phi).to(gl.float16)
    s_psi = to_shared((-b_psi).to(gl.float16))
    tl.debug_barrier()
    for i in range(num_iter):
        b_s = warpgroup_mma(gl.convert_layout(b_d, A_S), s_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_y = warpgroup_mma(gl.convert_layout(b_d * b_phi, A_R), s_h, b_y, is_async=True)
        b_s = warpgroup_mma_wait(1, [b_s])  # the other one goes on
        b_p = gl.convert_layout(b_s.to(gl.float16) * s_psi.load(M_S), A_R)
        b_y = warpgroup_mma(b_p, s_k, b_y, is_async=True)
        nu_next = 1 / (2 * theta - h2 * nu)
        if certainly(i):  # a block of its own, or ptxas may move this behind the wait
            gl.inline_asm_elementwise("", "=r,0", [i], gl.int32, is_pure=False, pack=1)  # or LLVM makes it selects
            b_z += b_d.to(gl.float32)
            b_d = b_d * (h2 * nu * nu_next).to(gl.float16)
        b_y = warpgroup_mma_wait(0, [b_y])
        b_d = gl.fma((b_y - delta * b_z).to(gl.float16), (2 * nu_next).to(gl.float16), b_d)
        nu = nu_next
    return b_z + b_d.to(gl.float32)
