"""Benchmarks: each folder measures one thing against its peers.

- ``core``: forward and backward in process, on a CPU (``make bench``) and on a GPU (``make gpu``)
- ``remote``: what a call to the server adds (``make bench-remote``)
- ``joint``: what joining the ranks of a step adds (``make bench-joint``)
- ``bins``: how the number of a table's bins decides the error (``make figures``)

The modules beside them are shared: ``workloads`` defines the inputs, ``child`` asks child processes, ``contenders`` and
``usual`` are what is timed, ``truth`` has the exact answers. Run all of them from the root of the repository, as in
``python -m benchmarks.core.cpu``.
"""
