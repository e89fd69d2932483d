"""Whose code trained a checkpoint: what dialects.py reads, as words that need no torch."""

KINDS = ("auto", "sit", "repa", "dit")
