"""All metrics that were asked for, and how far their numbers may be off."""

from common.spread import mean_and_error

from . import measures
from .features import take
from .names import DEFAULT, METRICS


def evaluate(samples, references, words=DEFAULT, device="cpu"):
    """The metrics called words: {name: number}, None where the reference lacks what a metric needs.

    samples: {network: Features}; references: {network: Reference}.
    """
    results = {}
    for metric in map(METRICS.get, words):
        reference = references.get(metric.network)
        lacks = any(getattr(reference, need, None) is None for need in metric.needs)
        values = None if lacks else getattr(measures, metric.function)(samples[metric.network], reference, device)
        results |= zip(metric.titles, values if isinstance(values, tuple) else [values] * len(metric.titles))
    return results


def summary(results):
    """{name: {"mean", "standard_error", "values"}} of evaluate's results for several sets of samples."""
    columns = {name: [each[name] for each in results] for name in results[0]}
    about = {name: (None, None) if None in values else mean_and_error(values) for name, values in columns.items()}
    return {name: dict(zip(("mean", "standard_error"), about[name]), values=values) for name, values in columns.items()}


def split_summary(samples, references, splits, words=DEFAULT, device="cpu"):
    """summary of so many disjoint parts of the samples. Of their images each takes every splits-th, and so all classes."""
    parts = [{name: take(features, slice(k, None, splits)) for name, features in samples.items()} for k in range(splits)]
    return summary([evaluate(part, references, words, device) for part in parts])
