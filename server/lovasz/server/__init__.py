"""The gRPC service around ``lovasz.core``.

The folders, each by what its modules are for:

- ``access``: who may come in, and take how much.
- ``observe``: what people see of the server: logs, metrics, runs, shares of the device, steps that wait, traces.
- ``memory``: memory for the tensors of requests, on the host and on the device.
- ``schedule``: which requests are admitted, which wait for each other, and which are computed next.
- ``device``: the engine that owns the device, and what is known of the device.
- ``transport``: how requests arrive and answers leave. Only this folder knows gRPC and the Unix sockets.
- ``web``: the HTTP port with the metrics and the status page.

``server`` connects them, and ``__main__`` is the command. docs/architecture.md has the order in which they may import
each other.
"""
