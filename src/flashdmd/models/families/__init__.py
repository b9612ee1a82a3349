"""Every kind of teacher, by the class of its pipeline."""

from flashdmd.models.families.base import Family
from flashdmd.models.families.flux import Flux
from flashdmd.models.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from flashdmd.models.families.stable_diffusion_3 import StableDiffusion3

KNOWN: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
FAMILIES: dict[str, type[Family]] = {name: f for f in KNOWN for name in f.pipelines}

__all__ = ["FAMILIES", "KNOWN", "Family"]
