"""Who may come in, and take how much: certificates and tokens with their limits, from files that are read again when
they change; whether strangers could come in."""
