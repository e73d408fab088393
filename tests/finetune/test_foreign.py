"""Backbones of transformers, tiny and saved to a folder, against the library's own forward pass."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from finetune.backbones import load
from finetune.encoder import from_model
from finetune.features import fingerprint
from finetune.foreign import FC_NORM, forward_of, norms_late
from hybridssl.errors import UserError
from hybridssl.views import normalise

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = {**VIT, "intermediate_size": 48}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
SQUARE, CROP = {"height": 32, "width": 32}, {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
NECK = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
SAM = {**VIT, "mlp_dim": 48, "output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8}
STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
FOCAL = {"embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "focal_levels": [1] * 4}


def first(out, prefix=1):
    """The class token, and the patches behind it and the registers."""
    return out.last_hidden_state[:, 0], out.last_hidden_state[:, prefix:]


def pooled(out, prefix=0):
    return out.pooler_output.flatten(1), out.last_hidden_state[:, prefix:]


def plane(out):
    """A map [N, D, H, W] as patches."""
    return out.last_hidden_state.flatten(2).mT


# name: (model, image processor, what the library says of normalised pixels)
MODELS = {
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=WIDE, projection_dim=6)),
        lambda: hf.CLIPImageProcessor(**CROP),
        lambda model, x: pooled(model.vision_model(pixel_values=x), 1),
    ),
    "clip, its image half alone": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE)),
        lambda: hf.CLIPImageProcessor(**CROP),
        lambda model, x: pooled(model(pixel_values=x), 1),
    ),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=WORDS, vision_config=WIDE)),
        lambda: hf.SiglipImageProcessor(size=SQUARE),
        lambda model, x: pooled(model.vision_model(pixel_values=x)),
    ),
    "blip": (
        lambda: hf.BlipModel(hf.BlipConfig(text_config=WORDS, vision_config=WIDE, projection_dim=6)),
        lambda: hf.BlipImageProcessor(size=SQUARE),
        lambda model, x: pooled(model.vision_model(pixel_values=x), 1),
    ),
    "sam": (
        lambda: hf.SamModel(
            hf.SamConfig(vision_config=SAM, prompt_encoder_config={"hidden_size": 16}, mask_decoder_config=NECK)
        ),
        lambda: hf.SamImageProcessor(size={"longest_edge": 32}, pad_size=SQUARE),
        lambda model, x: (plane(model.vision_encoder(x)).mean(1), plane(model.vision_encoder(x))),
    ),
    "dinov2": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT)),
        lambda: hf.BitImageProcessor(**CROP),
        lambda model, x: first(model(pixel_values=x)),
    ),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3)),
        lambda: hf.BitImageProcessor(**CROP),
        lambda model, x: first(model(pixel_values=x), 4),
    ),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**WIDE, num_register_tokens=3)),
        lambda: hf.DINOv3ViTImageProcessor(size=SQUARE),
        lambda model, x: first(model(pixel_values=x), 4),
    ),
    "dinov3 convnext": (
        lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**STAGES)),
        lambda: hf.DINOv3ViTImageProcessor(size=SQUARE),
        lambda model, x: pooled(model(pixel_values=x), 1),
    ),
    "focalnet (SEEM)": (
        lambda: hf.FocalNetModel(hf.FocalNetConfig(**FOCAL, focal_windows=[3] * 4, image_size=32, patch_size=2)),
        lambda: hf.BitImageProcessor(**CROP),
        lambda model, x: pooled(model(pixel_values=x)),
    ),
    "swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=2)
        ),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: pooled(model(pixel_values=x)),
    ),
    "convnext": (
        lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)),
        lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}),
        lambda model, x: (model(pixel_values=x).pooler_output, plane(model(pixel_values=x))),
    ),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(**WIDE)),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: first(model(pixel_values=x)),
    ),
    "vit with a classifier": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**WIDE)),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: first(model.vit(pixel_values=x)),
    ),
    "beit": (
        lambda: hf.BeitModel(hf.BeitConfig(**WIDE, use_mean_pooling=True)),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: tuple(model.pooler.layernorm(tokens) for tokens in first(model(pixel_values=x))),
    ),
    "beit, normed before": (
        lambda: hf.BeitModel(hf.BeitConfig(**WIDE, use_mean_pooling=False)),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: first(model(pixel_values=x)),
    ),
    "mae": (
        lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**WIDE, mask_ratio=0.75)),
        lambda: hf.ViTImageProcessor(size=SQUARE),
        lambda model, x: first(whole(model)(pixel_values=x, noise=torch.arange(16.0).expand(len(x), -1))),
    ),
}
ONE_SIZE = {"sam"}


def whole(model):
    model.config.mask_ratio = 0.0
    return model


def saved(name, folder):
    torch.manual_seed(4)
    model, processor = MODELS[name][0]().eval(), MODELS[name][1]()
    for parameter in model.parameters():  # class tokens and position embeddings begin at zero, where no error shows
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim else None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_librarys_own(name, tmp_path, images):
    model, processor = saved(name, tmp_path)
    encoder = load(f"hf:{tmp_path}")
    mean, std = processor.image_mean, processor.image_std
    assert (encoder.mean, encoder.std, encoder.input_size) == (tuple(mean), tuple(std), 32)
    pixels = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        cls, patches = MODELS[name][2](model, pixels)
    assert encoder.dim == cls.shape[1]
    torch.testing.assert_close(encoder.features(images)["cls"], cls, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.patches(images), patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.features(images)["patch_mean"], patches.mean(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.patches(images), encoder.patches(images)), "two passes differ"

    fresh, again = load(f"random:hf:{tmp_path}", seed=1), load(f"random:hf:{tmp_path}", seed=1)
    assert (fresh.dim, fresh.mean, fresh.input_size) == (encoder.dim, encoder.mean, 32)
    assert fresh.baseline
    assert fresh.sha256 == again.sha256 != encoder.sha256
    if name in ONE_SIZE:
        with pytest.raises(UserError, match=r"does not run at 64 px"):
            load(f"hf:{tmp_path}", size=64)
    else:
        larger = load(f"hf:{tmp_path}", size=64)
        assert larger.patches(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1] == 4 * patches.shape[1]


def test_half_precision_files_run_in_float32(tmp_path, images):
    model, _ = saved("dinov2", tmp_path)
    model.half().save_pretrained(tmp_path)
    encoder = load(f"hf:{tmp_path}")
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    assert encoder.features(images)["cls"].isfinite().all()


def drop(folder, part):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_lack_tensors_are_refused(tmp_path):
    saved("dinov2", tmp_path)
    drop(tmp_path, "layer.1.")
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ tensors of a Dinov2Model"):
        load(f"hf:{tmp_path}")


@pytest.mark.parametrize(("name", "part"), [("clip", "text_model"), ("clip", "projection"), ("vit", "pooler")])
def test_what_the_image_half_does_not_need_may_be_missing(name, part, tmp_path):
    saved(name, tmp_path)
    before = load(f"hf:{tmp_path}").sha256
    drop(tmp_path, part)
    assert name == "vit" or load(f"hf:{tmp_path}").sha256 == before  # a pooler that was not there is fresh
    load(f"hf:{tmp_path}")


TIMM = ["test_vit", "test_vit2", "test_convnext", "test_byobnet", "test_mambaout", "test_nfnet", "test_resnet"]


@pytest.mark.parametrize("name", TIMM)
def test_timm_architectures_with_fresh_weights(name):
    """cls is what the architecture's own head would be fed; of those with a class token, that token."""
    encoder = load(f"random:timm:{name}")
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = encoder.model.forward_features(normalise(images, encoder.mean, encoder.std))
        own = encoder.model.forward_head(hidden, pre_logits=True)
    found = encoder.features(images)["cls"]
    assert found.shape == (2, encoder.dim)
    token = getattr(encoder.model, "cls_token", None) is not None
    torch.testing.assert_close(found, hidden[:, 0] if token else own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "late"), [("beit_base_patch16_224", True), ("vit_tiny_patch16_224", False)])
def test_tokens_of_timm_have_gone_through_the_final_norm(name, late, index):
    """BEiT keeps its norm behind the pooling: without it, the class token is the residual stream."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=0, img_size=32, embed_dim=24, depth=2, num_heads=2).eval()
    norm = model.fc_norm if late else model.norm
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    blocks, x = [], torch.rand(2, 3, 32, 32)
    model.blocks.register_forward_hook(lambda *hooked: blocks.append(hooked[2]))
    model.blocks[-1].register_forward_hook(lambda *hooked: blocks.append(hooked[2]))
    with torch.no_grad():
        cls, patches = forward_of(model)(x)
        expected = norm(blocks[-1])
    assert patches is not None
    torch.testing.assert_close(cls, expected[:, 0])
    torch.testing.assert_close(patches, expected[:, 1:])
    assert norms_late(model) == late
    about = {"name": name, "dim": 24, "input_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "device": "cpu"}
    before, after = (from_model(model, forward_of(model), **about, reading=r) for r in ("", FC_NORM))
    assert fingerprint(before, index) != fingerprint(after, index), "features kept from before are not taken"
