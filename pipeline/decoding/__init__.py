"""Guided decoding: the rule, the sessions that keep keys and values, the decoder, other vocabularies, vLLM."""
