"""Memory of a GPU that two processes share by a file descriptor; imported by client and server only when it is needed.

``driver`` says what is needed of a driver, ``cuda`` is CUDA's, and ``mapping`` makes and imports memory through either.
"""
