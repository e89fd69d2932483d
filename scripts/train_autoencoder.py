"""Train the tiny autoencoder of the demo and the tests: 32 x 32 x 3 pixels to 8 x 8 x 4 latents, in diffusers' format.

    python scripts/train_autoencoder.py --out assets/digits-vae

An AutoencoderKL like Stable Diffusion's, a hundredth of a percent of its size, on the digits that are not held out.
Its loss: squared error of the pixels plus a small KL term, so that latents are smooth enough for a diffusion model.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.images import DigitsDataset, held_out_digits, to_pixels


def shift(images, pixels=2):
    """Move a batch by up to so many pixels each way: 5,000 digits are few."""
    dy, dx = np.random.randint(-pixels, pixels + 1, 2)
    return torch.roll(images, (int(dy), int(dx)), dims=(2, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets/digits-vae", help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--kl-weight", type=float, default=1e-3, help="weight of the KL, per latent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)

    dataset = DigitsDataset(32)
    held = torch.from_numpy(held_out_digits())
    train, test = dataset.images[~held], dataset.images[held]
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    )
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(train)} images, {len(test)} held out")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps, pct_start=0.05)
    started = time.time()
    progress = tqdm(range(args.steps), disable=None)
    for step in progress:
        x = to_pixels(shift(train[torch.randint(len(train), (args.batch_size,))]))
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (mse + args.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(mse=f"{mse.item():.4f}", kl=f"{kl.item():.2f}")

    vae.eval()
    with torch.no_grad():
        x = to_pixels(train)
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in x.split(500)])
        x = to_pixels(test)
        mse = torch.cat([(vae(part).sample - part).square() for part in x.split(500)]).mean()
    # The latents of the training digits get unit variance, as Stable Diffusion's 0.18215 does for photographs.
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(args.out)
    print(f"held-out mean squared error {mse:.5f}, latent std {latents.std():.3f} (by channel {latents.std((0, 2, 3))})")
    print(f"wrote {args.out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
