"""Forward kernel of op_name; the backward pass is the same product."""

import triton
import triton.language as tl


@triton.jit
def _op_name_fwd_kernel(x_ptr, out_ptr, size, scale, BLOCK: tl.constexpr):
    """out = scale * x over `size` contiguous elements; one program per BLOCK of them."""
    # int64: a tensor may hold more than 2**31 elements
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size

    # load
    x = tl.load(x_ptr + at, mask=inside)

    # product, in float32
    out = x.to(tl.float32) * scale

    # store
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
