"""Which layers there are, how wide they are, and that nothing after the last wanted one is computed."""

import copy
import itertools

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from diffusion_sae.extraction.extractor import DiffusionFeatureExtractor
from diffusion_sae.extraction.hooks import ImageStream, run_until_captured, tensors_of
from diffusion_sae.extraction.layers import canonical_layers, family_of, resolve_layer
from diffusion_sae.provenance import ExtractorConfig


def count_calls(modules):
    """Calls of each module, counted until the handles are removed."""
    calls = dict.fromkeys(modules, 0)

    def make_hook(name):
        def hook(*_):
            calls[name] += 1

        return hook

    return calls, [module.register_forward_pre_hook(make_hook(name)) for name, module in modules.items()]


def hooks_on(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("image_size", [None, 64])
@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_available_layers_are_what_a_real_forward_puts_out(
    make_sd_extractor, make_dit_extractor, images, family, image_size
):
    make, layer = (make_sd_extractor, "bottleneck") if family == "unet" else (make_dit_extractor, "block0")
    infos = make(layers=layer, image_size=image_size).available_layers()
    names = tuple(info.name for info in infos)
    extractor = make(layers=names, pooling="none", image_size=image_size)
    out = extractor(images[0])
    size = image_size or 32
    for info in infos:
        activation = out[info.name, 25]
        assert info.family == family
        if family == "unet":
            assert tuple(activation.shape) == (1, info.channels, size // info.stride, size // info.stride)
        else:
            assert tuple(activation.shape) == (1, (size // info.stride) ** 2, info.channels)
    assert extractor.layer_infos() == infos


def test_layers_come_in_the_order_of_the_forward(make_sd_extractor, make_dit_extractor):
    unet, dit = make_sd_extractor(), make_dit_extractor(layers="block0")
    assert [info.name for info in unet.available_layers()] == [
        *(f"down_ft{i}" for i in range(4)),
        "bottleneck",
        *(f"up_ft{i}" for i in range(4)),
    ]
    assert [info.name for info in dit.available_layers()] == ["block0", "block1", "block2"]
    assert [info.module_path for info in unet.available_layers()][4:6] == ["mid_block", "up_blocks.0"]
    assert dit.available_layers()[1].module_path == "transformer_blocks.1"


def test_layer_infos_take_dotted_paths(make_sd_extractor):
    paths = ("up_blocks.1.attentions.0", "mid_block.attentions.0.transformer_blocks.0.attn1", "conv_in")
    infos = make_sd_extractor(layers=paths).layer_infos()
    assert [(info.name, info.module_path) for info in infos] == [(path, path) for path in paths]
    assert [(info.channels, info.stride) for info in infos] == [(16, 16), (24, 32), (8, 4)]


def test_what_comes_after_the_last_layer_is_not_computed(tiny_sd_pipeline, make_sd_extractor, images):
    unet = tiny_sd_pipeline.unet
    modules = {name: unet.get_submodule(path) for name, path in canonical_layers(unet).items()}
    modules["conv_out"] = unet.conv_out
    order = list(modules)
    for layers in (("bottleneck",), ("up_ft1", "down_ft0"), ("down_ft0",), ("up_ft3",)):
        extractor = make_sd_extractor(layers=layers, timesteps=(25, 100))
        calls, handles = count_calls(modules)
        extractor(images[:2])
        for handle in handles:
            handle.remove()
        last = max(order.index(layer) for layer in layers)
        assert [calls[name] for name in order] == [2] * (last + 1) + [0] * (len(order) - last - 1), layers


def test_a_dit_stops_as_well(tiny_dit_pipeline, make_dit_extractor, images):
    extractor = make_dit_extractor(layers="block1")
    calls, handles = count_calls(dict(enumerate(tiny_dit_pipeline.transformer.transformer_blocks)))
    extractor(images[:2])
    for handle in handles:
        handle.remove()
    assert calls == {0: 1, 1: 1, 2: 0}


def test_hooks_are_removed_also_after_an_exception(tiny_sd_pipeline, make_sd_extractor, images):
    unet = tiny_sd_pipeline.unet
    assert hooks_on(unet) == 0
    extractor = make_sd_extractor(layers=("down_ft0", "up_ft1"))
    extractor(images[0])
    extractor.available_layers()
    assert hooks_on(unet) == 0

    def fail(*_):
        raise RuntimeError("a block broke")

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a block broke"):
        extractor(images[0])
    handle.remove()
    assert hooks_on(unet) == 0
    # a broken conditioning: the pipeline fails before it calls the denoiser
    handle = tiny_sd_pipeline.text_encoder.register_forward_pre_hook(fail)
    scheduler = tiny_sd_pipeline.scheduler
    with pytest.raises(RuntimeError, match="a block broke"):
        make_sd_extractor()
    handle.remove()
    assert hooks_on(unet) == 0
    assert tiny_sd_pipeline.scheduler is scheduler


def test_the_pipeline_still_generates_afterwards(tiny_sd_pipeline, make_sd_extractor, images):
    def generate():
        generator = torch.Generator().manual_seed(0)
        return tiny_sd_pipeline(
            "a bag", num_inference_steps=2, height=32, width=32, generator=generator, output_type="latent"
        ).images

    before = generate()
    tiny_sd_pipeline.scheduler.set_timesteps(7)
    make_sd_extractor(layers="up_ft0", prompt="a shoe")(images[0])
    assert len(tiny_sd_pipeline.scheduler.timesteps) == 7
    assert torch.equal(generate(), before)


def test_canonical_name_and_module_path_are_one_layer(make_sd_extractor, images):
    out = make_sd_extractor(layers=("up_ft1", "up_blocks.1", "bottleneck", "mid_block"))(images[:2])
    assert torch.equal(out["up_ft1", 25], out["up_blocks.1", 25])
    assert torch.equal(out["bottleneck", 25], out["mid_block", 25])


def test_resolve_names_and_paths(tiny_sd_pipeline, tiny_dit_pipeline):
    unet, dit = tiny_sd_pipeline.unet, tiny_dit_pipeline.transformer
    assert resolve_layer(unet, "bottleneck") == "mid_block"
    assert resolve_layer(unet, "down_blocks.0.resnets.0") == "down_blocks.0.resnets.0"
    assert resolve_layer(dit, "block2") == "transformer_blocks.2"
    assert (family_of(unet), family_of(dit)) == ("unet", "transformer")
    # blocks within a U-Net's attention have the same class as those of a DiT, and are no canonical layers
    assert not any(name.startswith("block") for name in canonical_layers(unet))


def test_unknown_layer_lists_the_valid_ones(make_sd_extractor, make_dit_extractor):
    with pytest.raises(
        ValueError, match=r"no layer 'up_ft9'.*Did you mean 'up_ft\d'.*: down_ft0, .*bottleneck, up_ft0"
    ):
        make_sd_extractor(layers="up_ft9")
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel has no layer 'bottleneck'.*block0, block1, block2"):
        make_dit_extractor(layers="bottleneck")
    with pytest.raises(ValueError, match=r"has no layer 'zzz'.*or any dotted module path"):
        make_sd_extractor(layers=("bottleneck", "zzz"))


def test_a_module_that_the_forward_does_not_call(make_sd_extractor, images):
    extractor = make_sd_extractor(layers=("bottleneck", "down_blocks"))  # a ModuleList
    with pytest.raises(ValueError, match=r"UNet2DConditionModel never called down_blocks \(down_blocks\)"):
        extractor(images[0])


def test_a_layer_without_positions_is_refused(tiny_sd_pipeline, make_sd_extractor, images):
    extractor = make_sd_extractor(layers="time_embedding")
    with pytest.raises(ValueError, match=r"Layer time_embedding puts out the shape \(1, 32\).*\(B, C, h, w\)"):
        extractor(images[0])
    assert hooks_on(tiny_sd_pipeline.unet) == 0


def test_tensors_of_tuples_and_outputs(tiny_sd_pipeline):
    tensor = torch.zeros(1, 2)
    assert tensors_of(tensor) == [tensor]
    assert [id(t) for t in tensors_of((tensor, (tensor + 1,), None))] == [id(tensor)]
    output = tiny_sd_pipeline.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 12, 16))
    assert tensors_of(output)[0] is output.sample
    assert tensors_of(5) == []


def test_a_layer_called_twice_gives_its_first_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.out = nn.ReLU(), nn.Identity()

        def forward(self, x):
            return self.out(self.act(self.act(x) + 1))

    model, x = Twice(), torch.ones(1, 2, 3)
    captured = run_until_captured(model, {"act": "act", "out": "out"}, lambda: model(x), ImageStream(None))
    assert captured["act"].tolist() == x.tolist()
    assert captured["out"].tolist() == (x + 1).tolist()


def test_pipelines_that_are_not_supported(tiny_sd_pipeline):
    no_blocks = copy.copy(tiny_sd_pipeline)
    no_blocks.unet = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline is not supported: it needs a denoiser"):
        DiffusionFeatureExtractor(no_blocks, ExtractorConfig())
    strange = copy.copy(tiny_sd_pipeline)
    strange.scheduler = IPNDMScheduler()
    with pytest.raises(ValueError, match=r"noise levels of IPNDMScheduler are not known. Supported: .*flow matching"):
        DiffusionFeatureExtractor(strange, ExtractorConfig())


def test_image_size_and_guidance_must_fit_the_model(make_sd_extractor):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 4 for this model, got 30"):
        make_sd_extractor(image_size=30)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel takes no guidance embedding"):
        make_sd_extractor(guidance=3.5)
    assert make_sd_extractor().config.image_size == 32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' own constructors
def test_the_scheduler_class_does_not_change_the_noise(tiny_sd_pipeline, make_sd_extractor, images):
    """DPM-Solver++, UniPC and Euler made from the same schedule: their own `add_noise` would disagree."""
    expected = make_sd_extractor(layers="up_ft1")
    for scheduler_class in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
        pipeline = copy.copy(tiny_sd_pipeline)
        pipeline.scheduler = scheduler_class.from_config(tiny_sd_pipeline.scheduler.config)
        other = make_sd_extractor(pipeline=pipeline, layers="up_ft1")
        torch.testing.assert_close(
            other(images[:2])["up_ft1", 25], expected(images[:2])["up_ft1", 25], atol=1e-5, rtol=0
        )
        assert other.provenance.fingerprint == expected.provenance.fingerprint


def test_timesteps_change_the_features(make_sd_extractor, images):
    timesteps = (0, 25, 400, 999)
    out = make_sd_extractor(layers="bottleneck", timesteps=timesteps)(images[:2])
    for a, b in itertools.combinations(timesteps, 2):
        assert (out["bottleneck", a] - out["bottleneck", b]).abs().max() > 1e-3
