"""Judges, statistics, fronts and tables of what was generated."""
