"""The gRPC service around ``lovasz.core``.

The folders, each by what its modules are for:

- ``observe``: what people see of the server: logs, metrics, runs, traces.
- ``memory``: host memory for the tensors of requests.
- ``schedule``: which requests are admitted, which wait for each other, and which are computed next.
- ``device``: the engine that owns the device, and what is known of the device.
- ``transport``: how requests arrive and answers leave. Only this folder knows gRPC and the Unix sockets.
- ``web``: the HTTP port with the metrics and the status page.

A module imports only from its own folder and from those before it in this order::

    errors, config  <  observe  <  memory  <  schedule  <  device  <  transport, web  <  server  <  __main__

``transport`` and ``web`` do not know each other. ``housekeeping`` and ``launch`` import nothing of the server. Only
``__main__`` reads the environment.
"""
