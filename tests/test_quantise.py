"""A quantised base under adapters: the real UNet at tiny size, gradients against the full base."""

import sys
import warnings

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.memory import Live, held
from flashdmd.models.quantise import quantise_base, quantised_bytes

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
ERROR = {"int8": 0.004, "nf4": 0.1}  # of the output; a weight errs by up to 1/254, and 1/15
TOKENS = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=PACKAGES)
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES[request.param])
    return str(request.param)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=8,
    ).requires_grad_(False)


def run(network: nn.Module, cast: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=rng)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        return network(x, torch.tensor([3.0, 700.0]), TOKENS).sample.float()


def adapt(network: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters that do something, the same ones whatever they stand on, in float32."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: a base in 8 bits cannot be merged
        network.add_adapter(config, "student")
    cast_training_params(network, torch.float32)
    found = {n: p for n, p in network.named_parameters() if p.requires_grad}
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in found.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    return found


def test_the_base_shrinks_as_foretold_and_says_nearly_the_same(kind: str) -> None:
    network = unet()
    linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
    packed = sum(quantised_bytes(m, kind) for m in linears)
    others = held(network) - held(*(m.weight for m in linears))
    before = run(network)
    quantise_base(network, kind)
    assert held(network) == pytest.approx(others + packed, rel=0.02)
    error = (run(network) - before).norm() / before.norm()
    assert 0 < error < ERROR[kind]


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "bf16"])
def test_adapters_on_it_learn_what_they_learn_on_the_full_base(kind: str, cast: bool) -> None:
    full, packed = unet(), unet()
    quantise_base(packed, kind)
    grads = []
    for network in (full, packed):
        learning = adapt(network)
        assert {p.dtype for p in learning.values()} == {torch.float32}
        run(network, cast).square().mean().backward()
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
        grads.append(torch.cat([p.grad.flatten() for p in learning.values()]))
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert error < {"int8": 0.02, "nf4": 0.2}[kind]


def test_peft_knows_what_it_puts_adapters_on(kind: str) -> None:
    network = unet()
    quantise_base(network, kind)
    adapt(network)
    layers = {type(m).__name__ for m in network.modules() if isinstance(m, BaseTunerLayer)}
    assert layers == {{"int8": "TorchaoLoraLinear", "nf4": "Linear4bit"}[kind]}


def test_adapters_switched_off_leave_the_quantised_base(kind: str) -> None:
    network = unet()
    quantise_base(network, kind)
    before = run(network)
    adapt(network)
    assert not torch.equal(run(network), before)
    network.disable_adapters()
    assert torch.equal(run(network), before)


def test_the_graph_holds_no_unpacked_weights(kind: str) -> None:
    width = 256
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    layers.requires_grad_(False).to(torch.bfloat16)
    quantise_base(layers, kind)
    x = torch.randn(2, width, requires_grad=True)
    with Live() as live, torch.autocast("cpu", torch.bfloat16):
        y = layers(x)
        assert live.now < 0.1 * 2 * width**2  # of one weight of the four, unpacked
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0


def test_a_transformer_is_quantised_too(kind: str) -> None:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(s, generator=rng) for s in ((2, 4, 8, 8), (2, 5, 64), (2, 64)))
    before = network(x, text, pooled, torch.ones(2)).sample
    size = held(network)
    quantise_base(network, kind)
    assert held(network) < 0.4 * size
    after = network(x, text, pooled, torch.ones(2)).sample
    assert 0 < (after - before).norm() / before.norm() < 2 * ERROR[kind]


def test_none_changes_nothing() -> None:
    network = unet()
    before, size = run(network), held(network)
    quantise_base(network, "none")
    assert held(network) == size
    assert torch.equal(run(network), before)


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torchao.quantization", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"flashdmd\[quant\]"):
        quantise_base(nn.Sequential(nn.Linear(2, 2)), kind)
