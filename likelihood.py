"""Log-likelihood of images under a trained model, in nats and in bits per dimension."""

import csv
import io
import math

import numpy as np

from atomic import write_atomically
from data import to_pixels
from errors import UsageError
from sampling import ode_settings
from transport import Sampler


def log_likelihood(pipeline, args, images, labels, streams):
    """(nats (N,), bits/dim (N,)) of uint8 images (N, 3, H, W) with class ids labels (N,).

    In pixel space the density is that of the levels 0 to 255, so the change of variables from [-1, 1] is counted; with
    --dequantize uniform, noise in [0, 1) is added to the levels first, and the mean is a lower bound on the
    log-probability of the discrete image (Theis et al., arXiv 1511.01844). With an autoencoder it is the density of a
    posterior sample of the latents, in their own units: a number to compare models of the same latents by, no more.
    """
    device, count = pipeline.device, math.prod(pipeline.latent_shape)
    in_pixels = pipeline.autoencoder.name == "none"
    if args.dequantize == "uniform":
        if not in_pixels:
            raise UsageError(f"--dequantize uniform needs pixel space (--vae none), not autoencoder {pipeline.recipe.vae}")
        x, stretch = (images + streams.rand(images.shape[1:], "cpu")).to(device) / 128 - 1, 128.0
    else:
        mean, std = pipeline.autoencoder.moments(to_pixels(images.to(device)))
        x = pipeline.autoencoder.latents(mean, std, streams.randn_like(mean))
        stretch = 127.5 if in_pixels else 1.0
    settings = dict(num_probes=args.num_probes, exact_divergence=args.exact_divergence, rademacher=streams.rademacher)
    try:
        likelihood = Sampler(pipeline.transport).sample_ode_likelihood(**ode_settings(args), **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    logp, _ = likelihood(x, pipeline.model, y=labels.to(device))
    nats = logp.double().cpu() - count * math.log(stretch)
    return nats, -nats / (count * math.log(2))


def mean_and_error(values):
    """(mean, its standard error or None for a single value)"""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def finish_likelihood(store, file, dataset, indices):
    """Write every image's likelihood as .csv; returns means and standard errors."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["image", "label", "bits_per_dim", "nats"])
    chunks = [store.load(chunk, "labels", "bits", "nats", "calls") for chunk in range(store.count)]
    labels, bits, nats = (np.concatenate([chunk[k] for chunk in chunks]) for k in range(3))
    rows.writerows(zip((dataset.name(i) for i in indices), labels.tolist(), bits.tolist(), nats.tolist()))
    write_atomically(file, lambda out: out.write(text.getvalue()), "w")
    (bits_mean, bits_error), (nats_mean, nats_error) = mean_and_error(bits), mean_and_error(nats)
    return {
        "images": store.total,
        "bits_per_dim": bits_mean,
        "bits_per_dim_standard_error": bits_error,
        "nats": nats_mean,
        "nats_standard_error": nats_error,
        "network_calls_per_image": sum(int(c[3]) * len(c[0]) for c in chunks) / store.total,
    }
