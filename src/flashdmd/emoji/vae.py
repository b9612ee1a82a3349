"""`flashdmd emoji vae`: an AutoencoderKL from 64 px pictures to 8 x 8 x 8 latents, unit variance.

Few numbers for the denoiser, and a decoder that draws sharply from them: it learns by squared
error, by what a frozen backbone sees, by an adversary, and on latents that are a little wrong, as
a denoiser leaves them. The normalisation of each latent channel is folded into two 1 x 1
convolutions, so `scaling_factor` is 1, `shift_factor` is 0 and stock pipelines need no more.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flashdmd.discriminator import Discriminator
from flashdmd.emoji.fit import Fit, Losses, fit, weights_of
from flashdmd.emoji.world import CONFETTI_SHARE, SIZE, Split, World
from flashdmd.files import digest, replace_folder
from flashdmd.losses import hinge_discriminator, hinge_generator
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.seeds import seed_of

LATENT_CHANNELS = 8
KL_WEIGHT = 5e-4  # on the mean over latent elements; hardly a bound: WRONG is what blurs them
LOOK_WEIGHT = 0.1
ADVERSARIAL_WEIGHT = 0.02
ADVERSARIAL_FROM = 0.5  # of the steps
WRONG = 0.5  # the most noise that a latent is decoded with, in its channel's standard deviations


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


def seen(adversary: Discriminator, images: Tensor) -> list[Tensor]:
    """The backbone's maps."""
    with torch.autocast("cpu", torch.bfloat16):
        return [m.float() for m in adversary.backbone(images)]


def adversarial(adversary: Discriminator, real: list[Tensor], fake: list[Tensor]) -> Losses:
    """Both sides' terms: the decoder's reaches no head, the heads' reaches no picture."""
    adversary.requires_grad_(False)
    decoder = ADVERSARIAL_WEIGHT * hinge_generator(adversary.logits(fake))
    adversary.requires_grad_(True)
    heads = hinge_discriminator(
        adversary.logits(real), adversary.logits([m.detach() for m in fake])
    )
    return {"adversarial": decoder, "adversary": heads}


def unlike(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Squared distance of feature maps, each place scaled to length 1 (after LPIPS)."""
    pairs = zip(a, b, strict=True)
    return torch.stack([(scaled(x) - scaled(y)).square().mean() for x, y in pairs]).sum()


def scaled(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt()


def train(
    folder: Path,
    max_train_steps: int,
    batch: int = 32,
    seed: int = 0,
    start: Path | None = None,
    decoder_only: bool = False,
    confetti: float = CONFETTI_SHARE,
) -> AutoencoderKL:
    """Trains, folds in the normalisation, and writes the autoencoder to `folder / "vae"`.

    `start` is an autoencoder of this kind to train on; its latents keep their meaning, roughly.
    With `decoder_only` they stay the same to the bit, and what was trained on them stays valid.
    `confetti` is the share of pictures strewn with it, of which more is harder, in 0..1.
    """
    arguments = {
        "--start": weights_of(*([start] if start else [])),
        "--decoder-only": decoder_only,
        "--confetti": confetti,
        "batch": batch,
    }
    plan = Fit(
        max_train_steps, 5e-4, folder, seed, cooldown=1 - ADVERSARIAL_FROM, ema_decay=0.998,
        weight_decay=0.0, muon_rate=4e-3, arguments=arguments,
    )  # fmt: skip
    torch.manual_seed(seed)
    world = World(confetti=confetti)
    vae = AutoencoderKL.from_pretrained(start, use_safetensors=True).train() if start else build()
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    adversary = Discriminator(EfficientNetLite(0), image_size=SIZE, width=64)

    def loss(step: int) -> Losses:
        images = pixels(renderings(world, "train", batch, seed, step)[0])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            z = posterior.sample()
            size = z.detach().std((0, 2, 3), keepdim=True) * WRONG * torch.rand(batch, 1, 1, 1)
            decoded = vae.decode(z + size * torch.randn_like(z)).sample.float()
        with torch.no_grad():
            real = seen(adversary, images)
        fake = seen(adversary, decoded)
        error = decoded - images
        terms = {
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "look": LOOK_WEIGHT * unlike(fake[:-1], real[:-1]),
        }
        if not decoder_only:
            terms["kl"] = KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        if step >= ADVERSARIAL_FROM * max_train_steps:
            terms |= adversarial(adversary, real, fake)
        return terms

    held_out = pixels(renderings(World(), "test", 256, seed, "psnr")[0])

    def show(_: nn.Module, step: int) -> None:
        print(f"step {step}: {psnr(vae, held_out):.2f} dB on held-out pictures", flush=True)

    fit(nn.ModuleDict({"vae": vae, "adversary": adversary}), loss, plan, show, show_every=500)
    if not decoder_only:
        normalise(vae, pixels(renderings(world, "train", 2048, seed, "normalise")[0]))
    with replace_folder(folder / "vae") as beside:
        vae.save_pretrained(beside)
    return vae


def latents_digest(vae: AutoencoderKL) -> str:
    """Of the weights that decide its latents, in half precision, which is how pipelines keep them.

    A decoder that was trained on alone leaves it as it is.
    """
    deciding = {
        k: v.half().numpy().tobytes()
        for k, v in sorted(vae.state_dict().items())
        if k.startswith(("encoder.", "quant_conv."))
    }
    return digest(*deciding.values())


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
