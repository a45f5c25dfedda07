"""How requests arrive and answers leave. Only this folder knows gRPC and the Unix sockets."""
