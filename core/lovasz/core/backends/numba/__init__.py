"""The Numba backend: loops compiled for the CPU. They run without the GIL, over tasks that threads claim one by one.

No result depends on which thread takes which task: sums over pixels are sums of integers, and everything else is
computed for each pixel, or each segment, separately. Floating-point contraction and reordering are off; a fused
multiply-add is always an explicit :func:`~lovasz.core.backends.numba.intrinsics.fma`.

On the host: ``compute`` (the steps of a batch), ``call`` (one computation: its tensors, tasks, threads and scratch),
``outline`` (the part of it that the plan alone decides), ``extension`` (which segments of a term are sorted, and which
counted), ``divided`` (large segments that all threads count, in parts), ``ranges`` (those that all threads sort, with
its loops), ``joint_segments`` and ``joint_tables`` (segments whose pixels other processes hold, too: sorted, counted),
``workers``, ``scratch``.

Compiled: ``planes`` (reads logits and labels), ``softmax`` and ``binary`` (errors and counts, and the way back),
``cross_entropy``, ``whole`` (small joints), ``undivided`` (segments that one thread scores each), ``parts`` (those that
are divided), ``segments`` and ``windows`` (what both do with a segment), ``selecting``, ``keys`` and ``sorting`` (its
pixels that matter are found and sorted), ``tables``, ``scanning`` and ``bins`` (its pixels are counted, and its window
found), ``elementary`` (exp and log), ``intrinsics``. ``disk_cache`` keeps what was compiled.
"""
