"""Rows of a sweep: which models they need, the decoder or the row store that they come from, and other methods."""
