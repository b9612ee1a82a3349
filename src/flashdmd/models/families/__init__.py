"""Every kind of teacher, by the class of its pipeline."""

from flashdmd.models.families.base import Family
from flashdmd.models.families.flux import Flux
from flashdmd.models.families.flux_2 import Flux2
from flashdmd.models.families.lumina_2 import Lumina2
from flashdmd.models.families.pixart import PixArtSigma
from flashdmd.models.families.qwen_image import QwenImage
from flashdmd.models.families.sana import Sana
from flashdmd.models.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from flashdmd.models.families.stable_diffusion_3 import StableDiffusion3
from flashdmd.models.families.z_image import ZImage

KNOWN: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArtSigma,
    ZImage,
    QwenImage,
    Sana,
    Flux2,
    Lumina2,
)
FAMILIES: dict[str, type[Family]] = {name: f for f in KNOWN for name in f.pipelines}

__all__ = ["FAMILIES", "KNOWN", "Family"]
