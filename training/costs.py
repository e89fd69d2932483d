"""What a SiT costs in arithmetic, memory, traffic, disk and time, from its configuration alone.

    python -m training.costs                 the tables of docs/scaling.md
    python train.py --dry-run FLAGS          the same for the run of these flags, and its first step

network is the model itself, on the meta device, which holds no data (on_paper, or Recipe.build): costs ask it, and know
nothing of their own about it. A multiply-add is 2 FLOPs, and only matrix products count. GB are 10^9 bytes. A state is a
float32: weight, gradient, two moments of Adam, averages.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.flop_counter import FlopCounterMode

from common.sizes import height_width
from models import SiT_models, SiTBlock, model_config

STATES = 4  # weights, gradients and Adam's two moments, beside the averages
# What the blocks of models.py are made of: of others it is not known what they keep for the backward pass.
KNOWN_MODULES = {SiTBlock, Attention, Mlp, nn.ModuleList, nn.LayerNorm, nn.Sequential, nn.Linear}
KNOWN_MODULES |= {nn.GELU, nn.SiLU, nn.Dropout, nn.Identity}
IMAGENET = 1_281_167  # training images
PEAKS = {  # FLOP/s of dense matrix products, from NVIDIA's data sheets (SXM)
    "A100": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
    "H100": {"fp32": 67e12, "tf32": 494e12, "bf16": 989e12},
}
SD_AUTOENCODER = dict(  # Stable Diffusion's, whose weights ema and mse are
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


def on_paper(model, image_size=256, **changes):
    """The network that train.py makes of a name for ImageNet's classes and Stable Diffusion's latents, without data."""
    sides = tuple(side // 8 for side in height_width(image_size))
    latents = dict(input_size=sides, in_channels=4, learn_sigma=False)
    with torch.device("meta"):
        return SiT_models[model](**model_config(model, **latents | changes))


def parameters(network):
    """Trained numbers; the fixed position embedding is not among them."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@lru_cache(maxsize=32)
def forward_flops(network):
    """FLOPs of a network on the meta device for one image, counted as it runs: right for any backbone."""
    x = torch.empty(1, network.in_channels, *(side * network.patch_size for side in network.grid), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def step_flops(network, batch, checkpointing=False):
    """FLOPs of a training step: forward, twice that backward, and forward once more with gradient checkpointing."""
    return (4 if checkpointing else 3) * batch * forward_flops(network)


def activation_bytes(network, precision="bf16", checkpointing=False):
    """What the forward pass of one image keeps for the backward pass, uncompiled; nan for blocks other than models.py's.

    A block keeps for each token and channel, in the float32 of the residual stream, the inputs of two LayerNorms and of
    two modulations (4 numbers); in the precision of the products, the inputs of four Linears, the queries, keys and
    values, the input of GELU and both gated outputs (8 + 2 mlp_ratio numbers). With checkpointing it keeps its input
    alone, and one block at a time is there in full.
    """
    if not {type(module) for module in network.blocks.modules()} <= KNOWN_MODULES:
        return math.nan
    (_, tokens, width), depth = network.pos_embed.shape, len(network.blocks)
    mlp = network.blocks[0].mlp.fc1.out_features
    size = 2 if precision == "bf16" else 4
    stream = 4 * tokens * width
    block = 4 * stream + size * tokens * (8 * width + 2 * mlp)
    final = 2 * stream + size * tokens * width
    return final + (depth * stream + block if checkpointing else depth * block)


def state_bytes(network, averages=1, shards=1):
    """Of a process that holds one of so many shards of each state."""
    return 4 * (STATES + averages) * parameters(network) / shards


def training_bytes(network, batch, precision="bf16", checkpointing=False, averages=1, shards=None):
    """(states, activations) of a process that does batch images at a time, uncompiled: together somewhat more than its
    tensors are at their peak, since gradients come as activations go; what kernels and the allocator take is extra.

    In bf16 the backward pass needs autocast's copy of the weights too, which checkpointing makes block by block. shards: of
    train.py --shard, whose weights are gathered in bfloat16 (gathered_bytes), block by block too; None without it.
    """
    copy = 2 * parameters(network) if precision == "bf16" and not checkpointing and shards is None else 0
    activations = batch * activation_bytes(network, precision, checkpointing) + copy
    return state_bytes(network, averages, shards or 1), activations


def _blocks_and_rest(network, count=parameters):
    """count(module) of each block, which is gathered by itself, and of the rest of the network."""
    blocks = [count(block) for block in getattr(network, "blocks", None) or []]
    return blocks, count(network) - sum(blocks)


def _dealt(network, shards):
    """Numbers in a network's shards, all together, fixed ones too: each tensor's rows are dealt out, as many to each shard."""
    return sum(-(-len(p) // shards) * shards * p[0].numel() for p in network.parameters())


def gathered_bytes(network, precision="bf16", shards=1):
    """What a process holds at the peak beside its shards: the weights of a block and of the next, the first's gradients, and
    these in float32 on their way to their shards; and weights and gradients of what is in no block, in float32."""
    if shards == 1:
        return 0
    blocks, rest = _blocks_and_rest(network)
    return (10 if precision == "bf16" else 16) * max(blocks, default=0) + 8 * rest


def checkpoint_bytes(network, averages=1):
    """A whole checkpoint: all states but gradients."""
    return 4 * (STATES - 1 + averages) * parameters(network)


def all_reduced_bytes(network, processes):
    """Bytes that each process sends in a step to average float32 gradients over a ring."""
    return 2 * (processes - 1) / processes * 4 * parameters(network)


def sharded_traffic(network, processes, shards, precision="bf16", parts=1):
    """(gathered, reduced, averaged) bytes that each process sends in a step of so many parts, by rings: weights, once for the
    forward and once for the backward pass; float32 gradients to their shards; these among the replicas of a group of shards."""
    blocks, rest = _blocks_and_rest(network, lambda part: _dealt(part, shards))
    gathered = 2 * ((2 if precision == "bf16" else 4) * sum(blocks) + 4 * rest)
    reduced, replicas = 4 * parameters(network), processes // shards
    others = (shards - 1) / shards
    averaged = 2 * (replicas - 1) / replicas * reduced / shards
    return parts * others * gathered, parts * others * reduced, parts * averaged


def cache_bytes(images, latent_shape, variants=2):
    """Latents of a data set on disk: mean and standard deviation of each image and its mirror image, in float16."""
    return images * variants * 2 * math.prod(latent_shape) * 2


def hours(network, steps, gpu, precision="bf16", batch=256, gpus=8, share=0.4, checkpointing=False, encoding=0):
    """Time of a training's arithmetic at a share of the GPUs' peak; encoding: FLOPs of the autoencoder for an image, which
    are done in TF32 unless the precision is fp32."""
    arithmetic = step_flops(network, batch, checkpointing) / PEAKS[gpu][precision]
    autoencoder = batch * encoding / PEAKS[gpu]["fp32" if precision == "fp32" else "tf32"]
    return steps * (arithmetic + autoencoder) / (gpus * share) / 3600


def autoencoder_flops(image_size):
    """FLOPs of Stable Diffusion's encoder and decoder for one image, counted on tensors that hold no data."""
    from diffusers import AutoencoderKL  # seconds to import, for one table

    with torch.device("meta"):
        vae, pixels = AutoencoderKL(**SD_AUTOENCODER), torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as encode:
            latents = vae.encode(pixels).latent_dist.mean
        with FlopCounterMode(display=False) as decode:
            vae.decode(latents)
    return encode.get_total_flops(), decode.get_total_flops()


def gb(count):
    return f"{count / 1e9:.3g} GB"


if __name__ == "__main__":
    from .cost_tables import TABLES

    print("\n\n".join(table() for table in TABLES))
