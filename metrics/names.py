"""What can be measured, by the words of --metrics. No torch here: a misspelt word is told at once."""

from argparse import ArgumentTypeError
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A word's metric: which function of measures.py makes its numbers, of what one network sees in the samples and of the
    Reference that the same network made."""

    network: str  # of networks.py
    function: str  # (Features, Reference, device) -> a number, or as many as there are titles
    titles: dict  # {name in files: in the table}
    needs: tuple = ()  # fields of the Reference
    digits: int = 4  # behind the point, in the table


# The Inception's, then those of other networks, whose names end with the network's.
METRICS = {
    "fid": Metric("inception", "fd", {"fid": "FID"}, ("mu", "sigma")),
    "sfid": Metric("inception", "spatial_fd", {"sfid": "sFID"}, ("mu_s", "sigma_s")),
    "is": Metric("inception", "score", {"inception_score": "Inception Score"}),
    "precision-recall": Metric("inception", "coverage", {"precision": "Precision", "recall": "Recall"}, ("features",)),
    "kid": Metric("inception", "kid", {"kid": "KID"}, ("features",), 6),
    "mind": Metric("inception", "mind", {"mind": "MIND"}, ("features",)),
    "fd-dinov2": Metric("dinov2", "fd", {"fd_dinov2": "FD-DINOv2"}, ("mu", "sigma")),
    "kid-dinov2": Metric("dinov2", "kid", {"kid_dinov2": "KID-DINOv2"}, ("features",), 6),
    "mind-dinov2": Metric("dinov2", "mind", {"mind_dinov2": "MIND-DINOv2"}, ("features",)),
    "fd-pixels": Metric("pixels", "fd", {"fd_pixels": "FD-pixels"}, ("mu", "sigma")),
    "kid-pixels": Metric("pixels", "kid", {"kid_pixels": "KID-pixels"}, ("features",), 6),
    "mind-pixels": Metric("pixels", "mind", {"mind_pixels": "MIND-pixels"}, ("features",)),
}
DEFAULT = ("fid", "sfid", "is", "precision-recall")  # those of ADM's evaluation suite
WEIGHTS = ("inception", "dinov2")  # networks that have a flag --NETWORK-weights
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")


def word(text):
    """A word of METRICS, as a flag's type."""
    if text not in METRICS:
        raise ArgumentTypeError(f"there is no metric {text!r}; choose from {' '.join(METRICS)}")
    return text


def networks_of(words):
    """The networks that these metrics need, each once."""
    return list(dict.fromkeys(METRICS[each].network for each in words))


def unused_weights(words):
    """The flags, as attributes, whose files none of these metrics needs."""
    return [f"{network}_weights" for network in WEIGHTS if network not in networks_of(words)]
