"""Which requests are admitted, which wait for each other, and which are computed next."""
