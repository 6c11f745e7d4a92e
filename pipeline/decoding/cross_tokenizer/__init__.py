"""Guidance across tokenizers: an ARM of one model family steers a base of another, token by token.

The ARM and what it was made from (its reference) read the text that the base writes in their own tokens, and say of
each of the base's tokens how much likelier the ARM finds it than its reference does: log P_arm − log P_ref. Added to
the base's own logits that is the ARM *translated* to the base, and what decodes takes it for an ARM of the base. Prefix
probabilities by themselves favour short strings, whatever they say; the ratio cancels that.

`spelling` (tokens as bytes) → `translation` (the base's vocabulary in the ARM's) → `rewindable_cache` (a model that
reads on, rewinds and looks ahead) → `session` (the rows, and the ratios).
"""
