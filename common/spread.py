"""Spread in both senses: indices that are evenly spread, and how far a mean may be off."""

import numpy as np


def spread(length, limit):
    """Up to limit indices below length, evenly spread; None is all."""
    count = length if limit is None else min(limit, length)
    return [i * length // count for i in range(count)]


def mean_and_error(values):
    """(mean, its standard error or None for a single value)"""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
