"""Test-time alignment with autoregressive reward models (GenARM, arXiv 2410.08193)."""
