"""The networks whose features are compared, by the names that names.METRICS has for them."""

from math import isqrt

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from common.checkpoint import load_checkpoint, load_weights
from common.errors import UserError, told_as
from download import locate

from .features import load_inception

DINOV2 = "hub:timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"
SIDE, GRID = 224, 16  # pixels that DINOv2 sees a side, in patches of 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
HEAD = 64  # features of an attention head, in all sizes of DINOv2


class DINOv2:
    """DINOv2 (Oquab et al., arXiv 2304.07193): the class token after the last norm, at 224 px whatever the images' size."""

    def __init__(self, network, device):
        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self.widths = (network.num_features,)
        self.mean, self.std = (torch.tensor(numbers, device=device).view(1, 3, 1, 1) for numbers in (MEAN, STD))

    def see(self, images):
        """uint8 images (N, 3, H, W) as the network sees them: float32 (N, 3, 224, 224)."""
        pixels = images.to(self.device).float() / 255
        pixels = interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.mean) / self.std

    def __call__(self, images):
        return (self.network(self.see(images)),)


def load_dinov2(weights=None, device="cpu"):
    """DINOv2 from a file of weights, facebook's or timm's, or from the Hub: ViT-L/14, whose features published FDs are of;
    another size's file makes that size. Raises UserError naming the file."""
    import timm  # slow, and the other networks do without

    with told_as("--dinov2-weights"):
        path = weights or locate(DINOV2, "--dinov2-weights")
        state = load_checkpoint(path)
        state.pop("mask_token", None)  # which only its training needs
        try:
            state["pos_embed"] = at_224_pixels(state["pos_embed"])
            shape = dict(embed_dim=state["cls_token"].shape[2], depth=sum(key.endswith(".attn.qkv.weight") for key in state))
            heads = shape["embed_dim"] // HEAD
            network = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=SIDE, num_heads=heads, **shape)
        except (
            KeyError,
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            AssertionError,
        ) as error:
            raise UserError(f"--ckpt {path}: these are not the weights of a DINOv2 of patches of 14 pixels") from error
        load_weights(network, state, path)
    return DINOv2(network, device)


def at_224_pixels(pos_embed):
    """The position embedding (1, 1 + 37 * 37, D) of training at 518 px, for 16 x 16 patches: the class token's and bicubic.

    Resampled as DINOv2's own code does, by a scale of 16.1 / 37 (its guard against rounding, which shifts the points a little)
    and without antialiasing; timm resamples otherwise, and its features are others.
    """
    side = isqrt(pos_embed.shape[1] - 1)
    if side == GRID:
        return pos_embed
    patches = pos_embed[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = interpolate(patches, scale_factor=((GRID + 0.1) / side,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Pixels:
    """No network: the grey image, averaged over boxes to 16 x 16 numbers in [0, 1]. For small images such as the demo's
    digits, and to try a pipeline without any download."""

    widths = (256,)

    def __init__(self, device):
        self.device = device

    def __call__(self, images):
        grey = images.to(self.device).float().mean(1, keepdim=True) / 255
        return (adaptive_avg_pool2d(grey, 16).flatten(1),)


LOADERS = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "pixels": lambda weights, device: Pixels(device),
}


def load_networks(names, weights, device):
    """{name: network}; weights: {name: file}, of which those that are left out, or None, are downloaded once."""
    return {name: LOADERS[name](weights.get(name), device) for name in names}
