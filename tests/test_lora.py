"""LoRA: one frozen network, and whoever speaks is a matter of the adapter that is on."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from flashdmd import export
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.errors import UserError
from flashdmd.loading import load_teacher
from flashdmd.memory import held
from flashdmd.models.denoiser import Adapter, AdapterDenoiser, save_memory
from flashdmd.models.teacher import Teacher, load_pipeline
from flashdmd.sampler import times
from flashdmd.session import Session, open_session

PROMPTS = ["fluent emoji of a strawberry", "a bird emoji"]
MAKE = {"score": tiny.score_folder, "flow": tiny.flow_folder}


@pytest.fixture(scope="module", params=["score", "flow"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp(request.param)
    teacher = load_pipeline(tiny.score_folder(base / "score"))
    network = emoji_reward.build(teacher.denoiser.network)
    made = MAKE[request.param](base / "teacher")
    emoji_reward.write(network, base / "reward", str(base / "score"))
    return made


def adapted(folder: Path) -> tuple[Teacher, AdapterDenoiser, AdapterDenoiser]:
    """A teacher and two disturbed adapters on its network."""
    teacher = load_pipeline(folder)
    d = teacher.denoiser
    adapter = Adapter(4, 4.0, teacher.family.lora_layers)
    teacher.denoiser = AdapterDenoiser(d.network, d.family, d.process, adapter)
    student = teacher.denoiser.twin("student").requires_grad_(True)
    score = student.twin("score")
    assert isinstance(student, AdapterDenoiser)
    for p in (*student.parameters(), *score.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    return teacher, student, score


def asked(teacher: Teacher) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noise = teacher.noise(len(PROMPTS), 0)
    return noise, times(500, noise), teacher.encode_prompts(PROMPTS)


def test_an_adapter_that_is_new_changes_nothing(folder: Path) -> None:
    plain, teacher = load_pipeline(folder), load_pipeline(folder)
    d = teacher.denoiser
    adapter = Adapter(4, 4.0, teacher.family.lora_layers)
    teacher.denoiser = AdapterDenoiser(d.network, d.family, d.process, adapter)
    student = teacher.denoiser.twin("student").requires_grad_(True)
    expected = plain.denoiser(*asked(plain))
    torch.testing.assert_close(student(*asked(teacher)), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(teacher.denoiser(*asked(teacher)), expected, atol=1e-6, rtol=1e-6)


def test_each_adapter_speaks_for_itself_and_the_teacher_for_none(folder: Path) -> None:
    plain = load_pipeline(folder)
    teacher, student, score = adapted(folder)
    said = [f(*asked(teacher)) for f in (teacher.denoiser, student, score)]
    torch.testing.assert_close(said[0], plain.denoiser(*asked(plain)), atol=1e-6, rtol=1e-6)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(said, said[1:] + said[:1], strict=True))
    noise = plain.noise(2, 0)  # nor does the stock pipeline that shares the network
    assert (plain.sample(PROMPTS, noise, 2, 3.0) == teacher.sample(PROMPTS, noise, 2, 3.0)).all()


def test_the_base_is_in_memory_once(folder: Path) -> None:
    teacher, student, score = adapted(folder)
    reference = student.twin("reference")
    alone = load_pipeline(folder)
    held = {
        p.data_ptr(): p.nbytes
        for d in (teacher.denoiser, student, score, reference)
        for p in d.network.parameters()
    }
    base = sum(p.nbytes for p in alone.denoiser.network.parameters())
    adapters = sum(p.nbytes for d in (student, score, reference) for p in d.parameters())
    assert sum(held.values()) == base + adapters


def test_gradients_reach_the_speaking_adapter_alone(folder: Path) -> None:
    teacher, student, score = adapted(folder)
    score.requires_grad_(True)
    student(*asked(teacher)).sum().backward()
    # the last block of an MMDiT asks nothing on behalf of the words
    silent = {k for k, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("add_q_proj" in name for name in silent)
    others = {id(p) for p in student.network.parameters()} - {id(p) for p in student.parameters()}
    assert all(p.grad is None for p in student.network.parameters() if id(p) in others)


@pytest.mark.parametrize("between", [True, False])
def test_checkpointing_recomputes_as_who_spoke_first(folder: Path, between: bool) -> None:
    """By the backward pass the teacher and the score estimator have used the same weights."""
    gradients = []
    for saving in (False, True):
        torch.manual_seed(0)
        teacher, student, score = adapted(folder)
        if saving:
            save_memory(student.network)
        x0 = student(*asked(teacher))
        if between:
            teacher.denoiser(*asked(teacher))
            score(*asked(teacher))
        x0.square().sum().backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-4)


def test_checkpointing_keeps_less(folder: Path) -> None:
    kept = []
    for saving in (False, True):
        teacher, student, _ = adapted(folder)
        if saving:
            save_memory(student.network)
        held: dict[int, int] = {}

        def hold(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            student(*asked(teacher))
        kept.append(sum(held.values()))
    assert kept[1] < 0.7 * kept[0]


def test_coupling_factors_is_coupling_weights_but_for_a_product_of_differences(
    folder: Path,
) -> None:
    """lambda (1 - lambda) (B_psi - B_theta)(A_psi - A_theta), see docs/paper.md."""
    _, student, score = adapted(folder)
    score.take(student)
    with torch.no_grad():
        for p in score.parameters():
            p.add_(0.01 * torch.randn_like(p))
    theta, psi, keep = deltas(student), deltas(score), 0.98
    apart = {k: (score.own[k] - student.own[k]).detach().clone() for k in student.own}
    for p, q in zip(score.parameters(), student.parameters(), strict=True):
        with torch.no_grad():
            p.lerp_(q, 1 - keep)
    for layer, coupled in deltas(score).items():
        wanted = keep * psi[layer] + (1 - keep) * theta[layer]
        b, a = apart[f"{layer}.lora_B.weight"], apart[f"{layer}.lora_A.weight"]
        error = keep * (1 - keep) * product(b, a)
        torch.testing.assert_close(coupled, wanted - error, atol=1e-6, rtol=1e-5)
        moved = (1 - keep) * (theta[layer] - psi[layer]).norm()
        assert (coupled - wanted).norm() < 0.2 * moved


def deltas(denoiser: AdapterDenoiser) -> dict[str, Tensor]:
    names = [k.removesuffix(".lora_A.weight") for k in denoiser.own if ".lora_A." in k]
    own = denoiser.own
    return {
        k: product(own[f"{k}.lora_B.weight"], own[f"{k}.lora_A.weight"]).detach() for k in names
    }


def product(b: Tensor, a: Tensor) -> Tensor:
    return b.flatten(1) @ a.flatten(1)


def test_layers_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such layers; its linear ones are called .*to_q"):
        opened(folder, lora={"rank": 2, "lora_layers": ["qkv"]})


def named(folder: Path) -> dict[str, str]:
    reward = folder.with_name("reward")
    return {
        "pretrained_model_name_or_path": str(folder),
        "reward_model_name_or_path": str(reward),
    }


def opened(folder: Path, **sections: object) -> Session:
    """A session of two iterations of stage 1 and of stage 2."""
    content = {
        "model": named(folder),
        "lora": {"rank": 4},
        "method": {"student_timesteps": load_pipeline(folder).default_steps},
        "train": {"train_batch_size": 4, "preference_batch_size": 2, "mixed_precision": "no"},
        "discriminator": {"width": 8},
    }
    return open_session(Recipe.model_validate(content | sections))


def test_both_stages_teach_the_adapters_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    run = opened(folder)
    before = {k: v.clone() for k, v in load_pipeline(folder).denoiser.network.state_dict().items()}
    start = [p.detach().clone() for p in run.generator.parameters()]
    trainer = run.trainer("distill")
    for _ in range(2):
        trainer.iterate()
    run.start = trainer.state.for_next_stage()
    run.take_over()
    trainer = run.trainer("joint")
    for _ in range(3):
        record = trainer.iterate()
    assert "preference" in record
    assert any(
        not torch.equal(p, q) for p, q in zip(run.generator.parameters(), start, strict=True)
    )
    for name, weight in run.teacher.denoiser.network.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    check_written(run, tmp_path)


def check_written(run: Session, tmp_path: Path) -> None:
    """The student's folder draws what the run's student draws, and fills another run's."""
    method, student = run.recipe.method, run.student
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    written = export.write_student(run.teacher, student, method, tmp_path / "student")
    loaded = load_teacher(str(written))
    expected = student(*asked(run.teacher))
    torch.testing.assert_close(loaded.denoiser(*asked(loaded)), expected, atol=1e-5, rtol=1e-4)
    other = run.generator.twin("other")
    export.read_student(other, written)
    for p, q in zip(other.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    size = sum(p.stat().st_size for p in written.iterdir())
    assert size < 2 * sum(p.nbytes for p in student.parameters()) + 20_000
    drawn = loaded.sample(PROMPTS, loaded.noise(2, 0), len(method.student_timesteps), 0.0)
    assert np.isfinite(drawn).all()


def test_a_checkpoint_holds_adapters_alone_and_brings_them_back(
    folder: Path, tmp_path: Path
) -> None:
    run = opened(folder)
    trainer = run.trainer("distill")
    trainer.iterate()
    trainer.save(tmp_path / "checkpoint-1")
    ends = []
    for restored in (False, True):
        if restored:
            trainer = opened(folder).trainer("distill")
            trainer.restore(tmp_path / "checkpoint-1")
        trainer.iterate()
        networks = (trainer.algorithm.generator, trainer.algorithm.score)
        ends.append([p.detach().clone() for n in networks for p in n.parameters()])
    assert all(map(torch.equal, *ends))
    stored = (tmp_path / "checkpoint-1/generator.safetensors").stat().st_size
    assert stored < sum(p.nbytes for p in run.generator.parameters()) + 30_000


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantised_base_is_smaller_and_its_adapters_learn(
    folder: Path, kind: str, package: str
) -> None:
    pytest.importorskip(package)
    plain = opened(folder)
    model = {"quantize_base": kind, "frozen_dtype": "bf16"}
    run = opened(folder, model=model | named(folder))
    sizes = [held(r.teacher.denoiser.network) - held_by(r) for r in (plain, run)]
    assert sizes[1] < 0.75 * sizes[0]
    start = [p.detach().clone() for p in run.generator.parameters()]
    trainer = run.trainer("distill")
    for _ in range(2):
        trainer.iterate()
    assert any(
        not torch.equal(p, q) for p, q in zip(run.generator.parameters(), start, strict=True)
    )
    assert {p.dtype for p in run.generator.parameters()} == {torch.float32}


def held_by(run: Session) -> int:
    """Bytes of the adapters."""
    denoisers = (run.generator, run.score, run.student)
    return sum(p.nbytes for d in denoisers for p in d.parameters())


def test_eight_bit_moments_are_saved_and_restored(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    train = {"train_batch_size": 4, "preference_batch_size": 2, "use_8bit_adam": True}
    ends = []
    trainer = opened(folder, lora={"rank": 64}, train=train).trainer("distill")
    trainer.iterate()
    trainer.save(tmp_path / "checkpoint-1")
    for restored in (False, True):
        if restored:
            trainer = opened(folder, lora={"rank": 64}, train=train).trainer("distill")
            trainer.restore(tmp_path / "checkpoint-1")
        trainer.iterate()
        ends.append([p.detach().clone() for p in trainer.algorithm.score.parameters()])
    assert all(map(torch.equal, *ends))
