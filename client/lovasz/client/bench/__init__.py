"""The command ``lovasz bench``: puts a load on a server and reports throughput, latency and where the time goes."""
