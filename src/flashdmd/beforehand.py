"""What a recipe and the small files that it names tell to be a mistake, before a model is loaded.

Read are configurations, notes and prompts, a few kilobytes of JSON and text; no weight is.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashdmd import checkpoint, export, plain
from flashdmd.config import Recipe
from flashdmd.data.opening import check_place
from flashdmd.emoji import reward as emoji_reward
from flashdmd.emoji.world import ASSETS, SIZE
from flashdmd.errors import UserError
from flashdmd.loading import check_teacher, device_of, patches, reward_folder
from flashdmd.models import latent_reward, meta
from flashdmd.models.denoiser import Adapter, add_adapter
from flashdmd.models.families import Family
from flashdmd.models.lora_keys import FILE_NAME as LORA
from flashdmd.models.teacher import family_of, index_of, sketch, understood
from flashdmd.models.trust import refuse_unsafe
from flashdmd.models.vision import check_backbone
from flashdmd.rules import EMBEDDED, MADE
from flashdmd.sampler import Sampler
from flashdmd.schedule import Process
from flashdmd.sources import EMOJI, OWN, prompts_of

NEEDED = {"int8": "torchao", "nf4": "bitsandbytes"}  # packages of model.quantize_base


def check(recipe: Recipe) -> None:
    """Raises UserError for a recipe that cannot be run as it stands."""
    device_of(recipe)
    check_packages(recipe)
    if recipe.train.arm != "dmd2":
        check_backbone(recipe.discriminator.backbone, recipe.discriminator.blocks)
    prompts_of(recipe)
    if recipe.data.train_data_dir not in (EMOJI, OWN):
        check_place(recipe.data.train_data_dir)
    check_teacher(recipe)
    name = recipe.model.pretrained_model_name_or_path
    where = str(ASSETS / EMBEDDED[name]) if name in EMBEDDED else name
    entries = index_of(where, recipe.model.revision)
    family = family_of(name, entries)
    reward = recipe.model.reward_model_name_or_path
    with understood(name):
        other = recipe.model.pretrained_vae_model_name_or_path
        pipeline = sketch(where, family, entries, other, recipe.model.revision)
        family.check(pipeline)
        for part in (family.network, "scheduler", "vae"):
            if not getattr(pipeline, part).config:
                raise UserError(f"the {part} has no configuration that can be read")
        process = family.process(pipeline)
        check_steps(family, pipeline, process, recipe.method.student_timesteps, name)
        check_size(recipe, family, pipeline)
    if layers := recipe.lora.lora_layers:
        config = getattr(pipeline, family.network).config
        network = meta.build(".".join(entries[family.network]), dict(config))
        add_adapter(network, Adapter(1, 1.0, layers), "student")
    check_student(recipe, family)
    if reward:
        check_reward(reward_folder(reward), process, pipeline.vae)


def check_output(folder: Path) -> None:
    """Raises UserError for an output_dir of which a run would write over what no run has made.

    A run first writes recipe.yaml, whole and without a comment; where checkpoints are, it has.
    """
    if checkpoint.all_of(folder):
        return
    known, found = folder / "recipe.yaml", [name for name in MADE if (folder / name).exists()]
    if known.is_file():
        text = plain.read(known, "the recipe")
        content = plain.parse(text, str(known))
        whole = isinstance(content, dict) and content.keys() >= Recipe.model_fields.keys()
        if not whole or plain.written(content) != text:
            raise UserError(
                f"output_dir={str(folder)!r} holds a recipe.yaml of your own, where a run writes "
                "down its recipe; give another output_dir, or the recipe another name"
            )
    elif found:
        raise UserError(
            f"output_dir={str(folder)!r} holds {', '.join(found)}, which a run would write over, "
            "and no recipe.yaml says that one has made it; give another output_dir"
        )


def check_packages(recipe: Recipe) -> None:
    wanted = {NEEDED.get(recipe.model.quantize_base): "model.quantize_base"}
    wanted |= {"bitsandbytes": "train.use_8bit_adam"} if recipe.train.use_8bit_adam else {}
    for package, key in wanted.items():
        if package and find_spec(package) is None:
            raise UserError(f"{key} needs {package}; pip install flashdmd[quant], or leave it out")


def check_steps(
    family: Family, pipeline: Any, process: Process, steps: tuple[int, ...], name: object
) -> None:
    """Raises UserError for steps that the teacher does not know, or that no stock scheduler walks.

    Now, and not when a student that was trained on them is to be written.
    """
    try:
        Sampler(process, steps)
        export.stock_scheduler(family, pipeline, steps)
    except ValueError as e:
        raise UserError(
            f"method.student_timesteps: {e}; {name} is a {family.kind} teacher, whose four steps "
            f"are {family.steps(pipeline)}"
        ) from e


def check_size(recipe: Recipe, family: Family, pipeline: Any) -> None:
    """Raises UserError for pictures that are no whole number of patches, or not the embedded."""
    size, told = patches(recipe, family, pipeline), getattr(pipeline, family.network).config
    if told.get("sample_size"):
        size = size or family.resolution(pipeline)
    if recipe.data.train_data_dir == EMOJI and size not in (0, SIZE):
        raise UserError(
            f"data.train_data_dir=emoji has pictures of {SIZE} pixels and the student is to draw "
            f"{size}; name a folder of pictures of your own, or teacher for samples of the teacher"
        )


def check_student(recipe: Recipe, family: Family) -> None:
    """Raises UserError for a student to start from that is of another kind of run."""
    name, rank = recipe.model.student_model_name_or_path, recipe.lora.rank
    if name is None:
        return
    said = f"model.student_model_name_or_path={name!r}"
    weights = LORA if rank else f"{family.network}/{checkpoint.WEIGHTS}"
    folder = (Path(name) / weights).parent
    refuse_unsafe(folder)
    cut = not rank and (folder / checkpoint.INDEX).is_file()
    if not (cut or (Path(name) / weights).is_file()):
        kind = f"lora.rank={rank} starts from a LoRA" if rank else "it starts from all weights"
        raise UserError(f"{said} has no {weights}, and {kind}; give such a student, or none")
    notes = export.notes_of(Path(name))
    if notes and notes.rank and notes.rank != rank:
        raise UserError(f"{said} is a LoRA of rank {notes.rank}, not of lora.rank={rank}")
    steps = recipe.method.student_timesteps
    if notes and notes.steps != steps and not recipe.train.max_train_steps:
        raise UserError(
            f"{said} walks {notes.steps}, not method.student_timesteps={steps}, and with "
            "train.max_train_steps=0 nothing teaches it these; name its steps, or train stage 1"
        )


def check_reward(folder: Path, process: Process, vae: Any) -> None:
    """Raises UserError for a reward that is not there, or scores latents of another kind."""
    if latent_reward.is_one(folder):
        latent_reward.check(folder, latent_reward.facts_of(folder), process, vae)
    else:
        emoji_reward.check(folder, vae)
