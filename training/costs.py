"""What a SiT costs in arithmetic, memory, traffic, disk and time, from its configuration alone.

    python -m training.costs                 the tables of docs/scaling.md
    python train.py --dry-run FLAGS          the same for the run of these flags, and its first step

network is the model itself, on the meta device, which holds no data (on_paper, or Recipe.build): costs ask it, and know
nothing of their own about it. A multiply-add is 2 FLOPs, and only matrix products count. GB are 10^9 bytes. A state is a
float32: weight, gradient, two moments of Adam, average.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention, Mlp
from torch.utils.flop_counter import FlopCounterMode

from common.sizes import height_width
from models import SiT_models, SiTBlock, model_config

STATES = 5  # weights, gradients, Adam's two moments, EMA
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


def training_bytes(network, batch, precision="bf16", checkpointing=False):
    """(states, activations) of a process that does batch images at a time, uncompiled: together somewhat more than its
    tensors are at their peak, since gradients come as activations go; what kernels and the allocator take is extra.

    In bf16 the backward pass needs autocast's copy of the weights too, which checkpointing makes block by block.
    """
    count = parameters(network)
    copy = 2 * count if precision == "bf16" and not checkpointing else 0
    return STATES * 4 * count, batch * activation_bytes(network, precision, checkpointing) + copy


def all_reduced_bytes(network, processes):
    """Bytes that each process sends in a step to average float32 gradients over a ring."""
    return 2 * (processes - 1) / processes * 4 * parameters(network)


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


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def markdown(title, header, rows):
    """A table with a title; numbers stand to the right in their columns."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


# The tables are of the paper's setting, batch 256, on one machine.
BATCH, GPUS, SHARE = 256, 8, 0.4
EACH = BATCH // GPUS
RUNS = [(f"SiT-{size}/2", px, on_paper(f"SiT-{size}/2", px)) for px in (256, 512) for size in ("S", "B", "L", "XL")]
LARGER = [  # than the paper's: heads of 128 channels
    (f"depth {depth}, width {width}", 256, on_paper("SiT-XL/2", depth=depth, hidden_size=width, num_heads=width // 128))
    for depth, width in ((40, 2048), (48, 3072), (56, 4096))
]


def arithmetic_table():
    header = ["model", "px", "parameters, M", "forward, GFLOP/image", "step, TFLOP", "with checkpointing", "all-reduced, GB"]
    rows = []
    for name, px, network in RUNS:
        steps = [number(step_flops(network, BATCH, again) / 1e12) for again in (False, True)]
        sent = f"{all_reduced_bytes(network, GPUS) / 1e9:.2f}"
        rows.append([name, px, number(parameters(network) / 1e6), number(forward_flops(network) / 1e9), *steps, sent])
    return markdown(f"Arithmetic and traffic of a step, batch {BATCH} on {GPUS} GPUs", header, rows)


def memory_table():
    kinds = [(precision, again) for again in (False, True) for precision in ("tf32", "bf16")]
    header = ["model", "px", "states", *(precision + ", checkpointing" * again for precision, again in kinds)]
    rows = []
    for name, px, network in RUNS:
        sums = [sum(training_bytes(network, EACH, *kind)) for kind in kinds]
        states, _ = training_bytes(network, EACH)
        rows.append([name, px, *(number(count / 1e9) for count in (states, *sums))])
    return markdown(f"Memory of a GPU that trains on {EACH} images at a time, GB: states, and with activations", header, rows)


def time_table():
    kinds = [(gpu, precision) for gpu in PEAKS for precision in ("tf32", "bf16")]
    header = ["model", "px", *(" ".join(kind) for kind in kinds), "16 H100 bf16, ms/step", "all-reduce, ms"]
    rows = []
    for name, px, network in RUNS:
        spans = [[number(hours(network, steps, *kind, BATCH, GPUS, SHARE)) for steps in (400_000, 7_000_000)] for kind in kinds]
        step = hours(network, 1, "H100", "bf16", BATCH, 2 * GPUS, SHARE) * 3600 * 1000
        send = all_reduced_bytes(network, 2 * GPUS) / (GPUS * 25e9) * 1000
        rows.append([name, px, *map(" / ".join, spans), number(step), number(send)])
    title = f"Hours for 400K / 7M steps on {GPUS} GPUs at {SHARE:.0%} of their peak; a step on {2 * GPUS}, and its all-reduce"
    return markdown(title, header, rows)


def autoencoder_table():
    header = ["", "latents, GB", "with mirror images, GB", "encode, GFLOP/image", "decode, GFLOP/image"]
    rows = []
    for px in (256, 512):
        sizes = [cache_bytes(IMAGENET, (4, px // 8, px // 8), variants) for variants in (1, 2)]
        rows.append([f"{px} px", *(number(count / 1e9) for count in (*sizes, *autoencoder_flops(px)))])
    return markdown(f"ImageNet's {IMAGENET:,} images as latents on disk, and the autoencoder's arithmetic", header, rows)


def sharding_table():
    """ZeRO-1 shards Adam's two moments; FSDP all states, of which it gathers the weights of a block at a time."""
    header = ["model", "px", "parameters, M", "DDP", "ZeRO-1", "FSDP", "activations", "activations, checkpointing"]
    rows = []
    for name, px, network in (RUNS[3], RUNS[7], *LARGER):
        count = parameters(network)
        states = [4 * count * share for share in (STATES, STATES - 2 + 2 / GPUS, STATES / GPUS)]
        activations = [EACH * activation_bytes(network, "bf16", again) for again in (False, True)]
        rows.append([name, px, number(count / 1e6), *(number(size / 1e9) for size in (*states, *activations))])
    return markdown(f"States of a GPU by what shards them over {GPUS}, and bf16 activations of {EACH} images, GB", header, rows)


TABLES = (arithmetic_table, memory_table, time_table, autoencoder_table, sharding_table)

if __name__ == "__main__":
    print("\n\n".join(table() for table in TABLES))
