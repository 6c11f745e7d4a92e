"""Judges: who says which response is better, one file per kind.

Pointwise judges give every response a score (`score(rows)`: a number per objective). Pairwise ones compare a response
with the control's and say which is better (`ask(questions)`: raw replies, from which `rubric.parse` reads the verdict).
"""
