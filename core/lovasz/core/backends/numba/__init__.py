"""The Numba backend: loops compiled for the CPU. They run without the GIL, over tasks that threads claim one by one.

No result depends on which thread takes which task: sums over pixels are sums of integers, and everything else is
computed for each pixel, or each segment, separately. Floating-point contraction and reordering are off; a fused
multiply-add is always an explicit :func:`~lovasz.core.backends.numba.intrinsics.fma`.
"""
