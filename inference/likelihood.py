"""Log-likelihood of images under a trained model, in nats and in bits per dimension."""

import math

from common.errors import UsageError, as_usage_error
from data.images import to_pixels

from .settings import DEQUANTIZE


def log_likelihood(pipeline, images, labels, streams, solver, num_probes=1, exact_divergence=False, dequantize="none"):
    """(nats (N,), bits/dim (N,)) of uint8 images (N, 3, H, W) with class ids labels (N,), in float64 on the CPU.

    In pixel space the density is that of the levels 0 to 255, so the change of variables from [-1, 1] is counted; with
    dequantize "uniform", noise in [0, 1) is added to the levels first, and the mean is a lower bound on the
    log-probability of the discrete image (Theis et al., arXiv 1511.01844). With an autoencoder it is the density of a
    posterior sample of the latents, in their own units: a number to compare models of the same latents by, no more.
    """
    device, count = pipeline.device, math.prod(pipeline.latent_shape)
    in_pixels = pipeline.autoencoder.name == "none"
    if dequantize not in DEQUANTIZE:
        raise UsageError(f"--dequantize {dequantize}: choose from {', '.join(DEQUANTIZE)}")
    if dequantize == "uniform":
        if not in_pixels:
            raise UsageError(
                f"--dequantize uniform needs pixel space (--vae none), not autoencoder {pipeline.autoencoder.name}"
            )
        x, stretch = (images + streams.rand(images.shape[1:], "cpu")).to(device) / 128 - 1, 128.0
    else:
        mean, std = pipeline.autoencoder.moments(to_pixels(images.to(device)))
        x = pipeline.autoencoder.latents(mean, std, streams.randn_like(mean))
        stretch = 127.5 if in_pixels else 1.0
    settings = dict(num_probes=num_probes, exact_divergence=exact_divergence, rademacher=streams.rademacher)
    with as_usage_error():
        likelihood = solver.sampler(pipeline).sample_ode_likelihood(**solver.settings, **settings)
    logp, _ = likelihood(x, pipeline.model, y=labels.to(device))
    nats = logp.double().cpu() - count * math.log(stretch)
    return nats, -nats / (count * math.log(2))
