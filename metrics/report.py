"""What a person reads of the results: a table, and what limits what its numbers mean."""

from .names import METRICS


def limits(results, num_samples, widths, precision="fp32", splits=None):
    """A line for each thing that limits what evaluate's results mean. widths: {network: features that its FD is of}."""
    distances = [metric for metric in METRICS.values() if metric.function == "fd" and metric.titles.keys() <= results.keys()]
    what = "FD" if {metric.network for metric in distances} - {"inception"} else "FID"
    if precision == "bf16":
        yield "features in bf16: their FID does not compare with that of float32 features"
    if distances and num_samples < 50_000:
        yield f"{what} is biased upwards by few samples: {num_samples} do not compare with FID-50K"
    for width in (widths[metric.network] for metric in distances):
        if num_samples <= width:
            yield f"the covariance of {width} features of {num_samples} samples is singular"
    if results.get("sfid", 0) is None:
        yield "no sFID: the reference has no mu_s and sigma_s"
    if results.get("precision", 0) is None:
        yield "no precision and recall: the reference has neither images nor their features"
    if splits and (distances or any(name.startswith("mind") for name in results)):
        part = f"FD and MIND of a part's {num_samples // splits} samples are biased upwards against those of all {num_samples}"
        yield f"{part}: the parts' mean does not compare with FID-50K, their spread does"


def table(columns, over=None, heads=()):
    """Lines: a row for each number, a column for each of evaluate's results, under heads. over, a summary of several, adds
    their mean and its standard error."""
    shown = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"  # noqa: E731
    lines = [" ".join([" " * 15, *(f"{head:>10}" for head in heads)])] if heads else []
    for metric in METRICS.values():
        for name, title in metric.titles.items():
            if name in columns[0]:
                cells = [shown(results[name], metric.digits) for results in columns]
                cells += [shown(over[name]["mean"], metric.digits)] if over else []
                error = over[name]["standard_error"] if over else None
                row = " ".join([f"{title:15}", *(f"{cell:>10}" for cell in cells)])
                lines.append(row if error is None else f"{row} +- {shown(error, metric.digits)}")
    return lines
