"""From log-densities of what the network sees to bits per dimension of what a user has."""

import math


def bits_per_dim(logp, autoencoder, latent_shape):
    """Nats (N,) -> bits per dimension (N,). In pixel space the density is that of levels 0 to 255, not of [-1, 1]:
    each dimension is stretched by 127.5. In latent space it is the latents' own density."""
    stretch = math.log2(127.5) if autoencoder.name == "none" else 0.0
    return -logp / (math.prod(latent_shape) * math.log(2)) + stretch
