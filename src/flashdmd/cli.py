"""The command line. Heavy imports happen inside the commands, so `--help` is quick."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from flashdmd.cli_emoji import emoji, say
from flashdmd.errors import FULL, Interrupted, Stopped, UserError, masked

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distils a text-to-image diffusion model into a student of 1 to 8 steps.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at a recipe.")
app.add_typer(emoji, name="emoji")
app.add_typer(config_app, name="config")

OUTSIDE = FULL | {  # what can be wrong with a disk or a path, and is no fault of ours
    errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip

SHARED = ("train", "demo", "sample", "evaluate")  # by several processes
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Changes to the recipe."),
]
OutputDir = Annotated[Path | None, typer.Option(help="Instead of the recipe's output_dir.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]


def show_version(wanted: bool | None) -> None:
    if wanted:
        say(f"flashdmd {version('flashdmd')}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool | None,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


@app.command()
def demo(
    overrides: Overrides = None,
    family: Annotated[str, typer.Option(help="The kind of teacher: score or flow.")] = "score",
    output_dir: Annotated[Path, typer.Option()] = Path("runs/demo"),
) -> None:
    """Both stages on the shipped teacher, measured, with a report at the end."""
    from flashdmd import run

    if family not in ("score", "flow"):
        raise UserError(f"--family {family}: there are 'score' and 'flow'")
    report = run.demo(family, output_dir, overrides or [])
    say(f"Report: {report}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or emoji-score or emoji-flow.")],
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = True,
) -> None:
    """Distil, then refine, as the recipe says; then measure and report."""
    from flashdmd import config, run

    report = run.full(config.read(recipe, overrides or [], output_dir), resume)
    say(f"Report: {report}")


@app.command()
def replay(
    kept: Annotated[Path, typer.Argument(help="A folder in not-finite of a run.")],
) -> None:
    """Make an iteration that was not finite again, and say what first was not."""
    import json

    from flashdmd.replay import replay

    say(json.dumps(replay(kept), indent=2))


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or emoji-score or emoji-flow.")],
    overrides: Overrides = None,
) -> None:
    """What memory a run needs, before anything is loaded, and what to change."""
    from flashdmd import config
    from flashdmd.doctor.recipe import examine

    for part in examine(config.read(recipe, overrides or [])):
        say(part)


@app.command()
def reward(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as recipes/reward-sdxl.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes to the recipe.")
    ] = None,
) -> None:
    """Train a latent reward model on preferences; goes on where it was stopped."""
    import json

    from flashdmd import reward_fit

    read = reward_fit.read(recipe, overrides or [])
    say(json.dumps(reward_fit.fit_reward(read), indent=2))
    say(f"Wrote {Path(read.output_dir) / 'reward'}")


@app.command("import-reward")
def import_reward(
    published: Annotated[Path, typer.Argument(help="The folder or file of published LRM weights.")],
    base: Annotated[str, typer.Option(help="The pipeline that they were trained from.")],
    output: Annotated[Path, typer.Option(help="A folder for model.reward_model_name_or_path.")],
    unpickle: Annotated[
        bool,
        typer.Option(help="Read .bin and .pt too, tensors alone (weights_only)."),
    ] = False,
) -> None:
    """Take over published weights of a latent reward model (LPO's)."""
    from flashdmd.models import latent_reward, published_lrm

    if output.exists():
        raise UserError(f"--output {output} is there already; name another")
    latent_reward.write(published_lrm.load_published(published, base, unpickle), output)
    say(f"Wrote {output}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A student or teacher folder, or emoji-score.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="A teacher's, 50 if not given; a student has its own.")
    ] = None,
    seed: Seed = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Teachers only; 3 if not given.")
    ] = None,
    output: Annotated[Path, typer.Option()] = Path("sample.png"),
) -> None:
    """Draw one picture a prompt into one PNG."""
    from flashdmd import run

    say(f"Wrote {run.sample(model, prompts, steps, seed, guidance, output)}")


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(help="A run's output_dir, a checkpoint in it, or a student's folder.")
    ],
    output: Annotated[Path, typer.Option(help="A folder, or a file that ends in .safetensors.")],
    format: Annotated[
        str, typer.Option(help="diffusers, lora, comfyui or single-file.")
    ] = "diffusers",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the weights.")] = (
        "fp32"
    ),
    rank: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Of a LoRA of a full fine-tuning.")
    ] = 64,
) -> None:
    """Write a student for stock diffusers or for ComfyUI."""
    from flashdmd import publish

    written, lost = publish.export_run(run, format, output, dtype, rank)
    say(f"Wrote {written}" + (f"; {lost}" if lost else ""))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...")],
    output: Annotated[Path, typer.Option(help="A file, replaced if it is there.")] = Path(
        "metrics.json"
    ),
    num_prompts: Annotated[int, typer.Option(min=8, max=276)] = 276,
    reward: Annotated[str, typer.Option(help="A reward's folder, emoji-reward, or none.")] = (
        "emoji-reward"
    ),
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="Of teachers; default: the students', beside none 3."),
    ] = None,
    split: Annotated[
        Literal["test", "train"],
        typer.Option(help="Pairs of thing and style held out, or those that were trained on."),
    ] = "test",
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of noise and of real renderings.")
    ] = 1234,
) -> None:
    """Measure models side by side: same prompts, same noise, same judge."""
    import json

    from flashdmd import compare, run

    named = None if reward == "none" else reward
    written = run.evaluate(models, output, num_prompts, named, guidance, split, seed)
    say(compare.table(json.loads(written.read_text("utf-8"))["rows"]))
    say(f"Wrote {written}")


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or emoji-score or emoji-flow.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="How many: 0, 1, ...")] = 3,
    arms: Annotated[
        str, typer.Option(help="Some of them, with commas.")
    ] = "flash-dmd,rl,rl-only,dmd2",
    output_dir: Annotated[Path, typer.Option()] = Path("runs/compare"),
) -> None:
    """Flash-DMD, RL alone, DMD2 at equal cost: several seeds in one table."""
    from flashdmd import compare, config

    planned = [arm.strip() for arm in arms.split(",")]
    read = config.read(recipe, overrides or [], output_dir)
    table = compare.compare(read, range(seeds), planned, output_dir)
    say(table.read_text("utf-8"))
    say(f"Wrote {table}")


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Write report.html for a run from what is in its folder."""
    from flashdmd.report import write

    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a folder; give the output_dir of a run")
    say(f"Report: {write(run_folder)}")


@config_app.command("show")
def config_show(recipe: str, overrides: Overrides = None) -> None:
    """The recipe as it would run, every default filled in."""
    from flashdmd import config

    typer.echo(config.dump(config.read(recipe, overrides or [])), nl=False)


@config_app.command("init")
def config_init(
    model: Annotated[str, typer.Argument(help="A pipeline folder or a hub id.")],
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    full: Annotated[bool, typer.Option(help="Full fine-tuning instead of LoRA.")] = False,
) -> None:
    """A complete, commented recipe for a model, right for its family."""
    from flashdmd import initial

    say(f"Wrote {initial.write(model, output, full)}")


@config_app.command("schema")
def config_schema() -> None:
    """The recipe's JSON schema."""
    import json

    from flashdmd import reference

    typer.echo(json.dumps(reference.schema(), indent=2))


@config_app.command("keys")
def config_keys() -> None:
    """Every key of a recipe in a table: what it takes, its default, its meaning."""
    from flashdmd import reference

    typer.echo(reference.page(), nl=False)


@app.command()
def env() -> None:
    """Versions, for a bug report."""
    import platform

    say(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("flashdmd", "torch", "diffusers", "transformers", "safetensors", "numpy"):
        say(f"{name} {version(name)}")


def main() -> None:
    """Runs a command; what a person can mend ends with a message and code 2, a stop with 130."""
    again = "the same command" + (", without --no-resume," if "--no-resume" in sys.argv else "")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with company():
            obey()
    except UserError as e:
        if out_of_memory(e):
            fail(no_memory(e, again), 2)
        fail(str(e), 2)
    except Interrupted as e:
        fail(f"{e}; {again} goes on from there", 130)
    except Stopped:
        fail(f"stopped; what was saved before is intact, and {again} uses it", 130)
    except FloatingPointError as e:
        fail(
            f"not finite: {e}. What was saved before is intact; {again} with lower learning rates "
            "goes on from there. Where that is not finite at once, the newest checkpoint led here: "
            "move it away, and the run goes on from the one before",
            2,
        )
    except (MemoryError, RuntimeError, ImportError, OSError) as e:
        if out_of_memory(e):
            fail(no_memory(e, again), 2)
        if not isinstance(e, OSError) or e.errno not in OUTSIDE:
            raise
        where = f": {e.filename}" if e.filename else ""
        on = f"; with room, {again} goes on" if e.errno in FULL else ""
        fail(f"{e.strerror}{where}. What was saved before is intact{on}", 2)


def obey() -> None:
    """Runs the command that was given, and ends; what is wrong with its words is said masked."""
    for word in sys.argv[1:]:
        if not word or (word.startswith("--") and word.endswith("=")):
            raise UserError("an argument is empty, and an empty one names nothing; leave it out")
    try:
        sys.exit(app(standalone_mode=False))
    except TyperException as e:
        if told := e.format_message():  # else it has shown the help
            fail(f"{told} See --help", e.exit_code)
        sys.exit(e.exit_code)


def several() -> bool:
    """Whether this process was started as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def company() -> Iterator[None]:
    """Joins the other processes, if there are any; all but the first say nothing but errors."""
    if not several():
        yield
        return
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "help")
    if command not in SHARED:
        raise UserError(
            f"{command} is work for one process; started as several are {', '.join(SHARED)}"
        )
    from flashdmd import distributed

    try:
        with distributed.joined():
            if not distributed.first():
                os.environ["TQDM_DISABLE"] = "1"
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end
            yield
    except distributed.Absent as e:
        fail(f"{e}. Nothing was begun; start all of them with the same command", 75)
    except RuntimeError as e:
        if not distributed.lost(e):
            raise
        told = str(e).partition("\n")[0]
        late = f", or was awaited for longer than {distributed.TIMEOUT}" if "time" in told else ""
        fail(
            f"another process of this run has ended{late} ({told}). What was saved before is "
            "intact; the same command goes on from there",
            75,
        )


def out_of_memory(error: BaseException | None) -> bool:
    """Also where it is behind another error. CUDA's own error tells it in words, as the allocator,
    oneDNN, Python's threads and the loader of libraries do.
    """
    told = (
        *("allocate memory", "not enough memory", "out of memory", "could not create a primitive"),
        *("can't start new thread", "failed to map segment"),
    )
    while error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(words in str(error).lower() for words in told):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_memory(error: BaseException, again: str) -> str:
    told = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"out of memory ({told}). What was saved before is intact; {again} goes on from there "
        "with more of train.gradient_accumulation_steps (the numbers stay the same), or "
        "train.gradient_checkpointing=true. A new run may have a smaller "
        "train.train_batch_size, a lora.rank, train.use_8bit_adam, or several processes with "
        "train.sharded=true; `flashdmd doctor RECIPE` tells what each needs"
    )


def interrupt(*_: object) -> None:
    """Ctrl-C and SIGTERM outside of training, where they ask for a checkpoint."""
    raise Stopped


def fail(message: str, code: int) -> None:
    if several():
        message = f"process {os.environ.get('RANK')}: {message}"
    if "tqdm" in sys.modules:  # a bar that is open would be drawn over the message
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"flashdmd: {masked(message)}", file=sys.stderr)
    sys.exit(code)
