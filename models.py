"""The SiT backbone: a diffusion transformer (DiT) read at a continuous time t in [0, 1].

Architecture: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), with the
adaLN-Zero block; used by Ma et al., "SiT" (arXiv 2401.08740). Shapes below: N images, T tokens, D hidden width.
"""

import inspect
import math

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch.utils.checkpoint import checkpoint


def modulate(h, shift, scale):
    """Scale and shift tokens h (N, T, D) by per-image vectors (N, D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Embeds times t (N,) as vectors (N, D): fixed sines and cosines, then a two-layer MLP.

    Float32 as far as the weights are, under autocast too: bfloat16 cannot tell t = 0.999 from t = 1.
    """

    def __init__(self, hidden_size, num_features=256):
        super().__init__()
        self.num_features = num_features
        self.time_map = None  # what a network from elsewhere is told instead of t
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def frequencies(count, dtype=torch.float32, device=None):
        return torch.exp(-math.log(10000.0) * torch.arange(count, dtype=dtype, device=device) / count)

    def features(self, t):
        freqs = self.frequencies(self.num_features // 2, device=t.device)
        t = t if self.time_map is None else self.time_map(t)
        angles = t.float()[:, None] * freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t):
        kind = t.device.type if torch.amp.is_autocast_available(t.device.type) else "cpu"  # such as meta tensors
        with torch.autocast(kind, enabled=False):
            return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embeds class ids y (N,) as vectors (N, D).

    With dropout_prob > 0 the table has one more row, the null class of id num_classes, and in training each label
    becomes null with that probability (classifier-free guidance, Ho & Salimans, arXiv 2207.12598).
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y, force_drop_ids=None):
        """force_drop_ids, a bool mask (N,), takes the place of the random draw, so that a caller can own the randomness."""
        if self.training and self.dropout_prob > 0:
            if force_drop_ids is None:
                force_drop_ids = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(force_drop_ids, self.num_classes, y)
        return self.embedding_table(y)


class SiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.attn.fused_attn = True  # scaled_dot_product_attention, whatever timm chose at import
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        """x (N, T, D), c (N, D) -> (N, T, D)"""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return x


class FinalLayer(nn.Module):
    """Tokens (N, T, D) -> patches (N, T, patch_size^2 * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """Scalable Interpolant Transformer.

    input_size: side of the (latent) image, or its (height, width); patch_size must divide them.
    class_dropout_prob: chance that training sees the null class; 0 means that there is no null class.
    learn_sigma: twice the output channels, of which the second half is not used. Published weights have it.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"input size {input_size} is not a multiple of patch size {patch_size}")
        self.grid = height // patch_size, width // patch_size  # of patches: rows and columns
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.grad_checkpointing = False  # recompute each block in the backward pass: less memory, more time

        self.x_embedder = PatchEmbed((height, width), patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        pos_embed = sincos_pos_embed(hidden_size, *self.grid)
        self.pos_embed = nn.Parameter(pos_embed.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for every Linear, then zeros where adaLN-Zero wants them, so that a fresh model returns exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj = self.x_embedder.proj  # a strided convolution is a Linear over flattened patches
        nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
        nn.init.zeros_(proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, tokens):
        """(N, T, patch_size^2 * C) -> (N, C, H, W); a token holds its patch as (row, column, channel)."""
        p, c, (rows, columns) = self.patch_size, self.out_channels, self.grid
        grid = tokens.reshape(tokens.shape[0], rows, columns, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(tokens.shape[0], c, rows * p, columns * p)

    def forward(self, x, t, y, force_drop_ids=None):
        """Predict at x (N, C, H, W), times t (N,) in [0, 1] and class ids y (N,); returns (N, C, H, W) in x's dtype."""
        h = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        c = (self.t_embedder(t) + self.y_embedder(y, force_drop_ids)).to(h.dtype)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                h = checkpoint(block, h, c, use_reentrant=False)
            else:
                h = block(h, c)
        out = self.unpatchify(self.final_layer(h, c))
        return out[:, : self.in_channels].to(x.dtype)

    def forward_with_cfg(self, x, t, y, cfg_scale, guided_channels=3):
        """Classifier-free guidance: x is [z, z], y is [classes, null], and only the first half of x is read.

        guided = uncond + cfg_scale (cond - uncond) on the first guided_channels channels, in both halves; the
        remaining channels stay as the network gave them for each half. Published numbers were made with 3, also
        in a latent space of 4 channels; None guides all.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        cond, uncond = out.chunk(2)
        guided = (uncond + cfg_scale * (cond - uncond))[:, :guided_channels]
        rest = out[:, guided.shape[1] :]
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def sincos_pos_embed(hidden_size, rows, columns):
    """Fixed position embedding of a grid, row-major: (rows * columns, hidden_size).

    The first half of the channels encodes the column, the second half the row; each is [sin(p w_k), cos(p w_k)]
    with w_k = 10000^(-k / (hidden_size / 4)), computed in float64.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden size {hidden_size} is not a multiple of 4")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (longer side, hidden_size / 2)
    column = axis[None, :columns].expand(rows, columns, -1)
    row = axis[:rows, None].expand(rows, columns, -1)
    return torch.cat([column, row], dim=2).reshape(rows * columns, hidden_size).float()


# The paper's four sizes, T, a tiny one for a CPU, and larger ones by their number of parameters. The name of a model is its
# size and its patch: SiT-XL/2.
SIZES = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "T": dict(depth=6, hidden_size=128, num_heads=4),
    "3B": dict(depth=40, hidden_size=2048, num_heads=16),  # not the paper's, as the next two; heads of 128 channels
    "8B": dict(depth=48, hidden_size=3072, num_heads=24),  # more states than a GPU of 80 GB holds: for --shard
    "17B": dict(depth=56, hidden_size=4096, num_heads=32),  # for --shard over 8 GPUs or more
}
SIT_CONFIGS = {f"SiT-{size}/{patch}": {**dims, "patch_size": patch} for size, dims in SIZES.items() for patch in (2, 4, 8)}


def _constructor(config):
    return lambda **kwargs: SiT(**{**config, **kwargs})


SiT_models = {name: _constructor(config) for name, config in SIT_CONFIGS.items()}


def model_config(name, **changes):
    """All of SiT's keywords for a name in SIT_CONFIGS, as checkpoints hold them. Raises ValueError for another name."""
    if name not in SIT_CONFIGS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SIT_CONFIGS)}")
    defaults = {key: parameter.default for key, parameter in inspect.signature(SiT).parameters.items()}
    return {**defaults, **SIT_CONFIGS[name], **changes}
