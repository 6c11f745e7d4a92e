"""Guided decoding inside serving engines; each is an optional extra that nothing else imports."""
