"""The Triton backend: kernels for a GPU, and the host code that lays out their buffers and launches them.

On the host: ``compute`` (a batch), ``layout`` (the arrays that host and kernels share, and where they are in buffers),
``columns`` (the columns of these arrays), ``program`` (the launches of a kind of batch, in their order), ``launches``,
``graphs`` (programs recorded as CUDA graphs), ``limits`` (which batches the backend takes).

Kernels, in the order of their launches: ``softmax`` or ``binary`` (statistics of all pixels), ``segments`` or
``binary_segments`` (what becomes of each segment; ``binary_segments`` also shares out bins, and ``segments`` adds up
the loss of a batch at the end), ``softmax_ranks`` or ``binary_ranks`` (errors counted in tables or listed in buckets,
and sums of cross-entropies), ``tables`` (the scan), ``sorting`` (buckets), ``softmax_backward`` or ``binary_backward``.
They share ``planes``, ``bins`` and ``elementary``.
"""
