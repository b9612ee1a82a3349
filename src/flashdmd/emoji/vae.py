"""`flashdmd emoji vae`: an AutoencoderKL from 64 px pictures to 16 x 8 x 8 latents, unit variance.

The normalisation of each latent channel is folded into the two 1 x 1 convolutions, so
`scaling_factor` is 1, `shift_factor` is 0 and stock pipelines need no other number.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flashdmd.emoji.fit import Fit, Losses, fit
from flashdmd.emoji.world import Split, World
from flashdmd.seeds import seed_of

LATENT_CHANNELS = 16
KL_WEIGHT = 5e-4  # on the mean over latent elements; posterior noise of about a tenth


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=True,
    )


def pixels(images: np.ndarray) -> Tensor:
    """(B, 3, H, W) uint8 -> float in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def renderings(
    world: World, split: Split, n: int, *seed: int | str
) -> tuple[np.ndarray, np.ndarray]:
    """`n` pictures of a split drawn at random and rendered: (n, 3, 64, 64) uint8, and indices."""
    rng = np.random.default_rng(seed_of(*seed))
    chosen = rng.choice(world.indices(split), size=n)
    return np.stack([world.render(i, rng) for i in chosen]), chosen


def train(folder: Path, max_train_steps: int, batch: int = 32, seed: int = 0) -> AutoencoderKL:
    """Trains, folds in the normalisation, and writes the autoencoder to `folder / "vae"`."""
    torch.manual_seed(seed)
    world, vae = World(), build()

    def loss(step: int) -> Losses:
        images = pixels(renderings(world, "train", batch, seed, step)[0])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        return {
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "kl": KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel(),
        }

    held_out = pixels(renderings(world, "test", 256, seed, "psnr")[0])

    def show(_: nn.Module, step: int) -> None:
        print(f"step {step}: {psnr(vae, held_out):.2f} dB on held-out pictures", flush=True)

    plan = Fit(max_train_steps, 1e-3, folder, seed, ema_decay=0.998, weight_decay=0.0)
    fit(vae, loss, plan, show, show_every=500)
    normalise(vae, pixels(renderings(world, "train", 2048, seed, "normalise")[0]))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB (peak 1 after clamping)."""
    decoded = torch.cat(
        [vae.decode(vae.encode(b).latent_dist.mode()).sample for b in images.split(64)]
    )
    mse = (decoded.clamp(-1, 1) - images).div(2).square().flatten(1).mean(1)
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Rescales latents to zero mean and unit variance a channel; decode(encode(x)) is unchanged."""
    latents = torch.cat([vae.encode(b).latent_dist.mode() for b in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    enc, dec = vae.quant_conv, vae.post_quant_conv
    c = LATENT_CHANNELS
    enc.bias[:c] = (enc.bias[:c] - mean) / std
    enc.weight[:c] /= std[:, None, None, None]
    enc.bias[c:] -= 2 * std.log()  # the second half is a log-variance
    dec.bias += dec.weight[:, :, 0, 0] @ mean
    dec.weight *= std[None, :, None, None]
