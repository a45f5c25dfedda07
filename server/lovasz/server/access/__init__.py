"""Who may come in: certificates and tokens, from files that are read again when they change."""
