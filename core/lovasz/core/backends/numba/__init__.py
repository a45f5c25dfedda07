"""The CPU path's loops, compiled by Numba: each runs without the GIL, over tasks that threads claim one by one.

No result depends on which thread takes which task: what is added up over pixels is integers, and all else is computed
for each pixel, or each segment, on its own. Floating-point contraction and reordering are off; where a multiplication
and an addition are to be one operation, :func:`~lovasz.core.backends.numba.intrinsics.fma` says so.
"""
