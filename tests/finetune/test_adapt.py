"""adapt through the door on the small index, and its parts: what moves, what does not, when it stops, what is saved."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from finetune import adapt, adapters, probe, results, task, training
from finetune.__main__ import main, parser
from finetune.adapters import Change
from finetune.backbones import load
from finetune.foreign import forward_of
from finetune.training import Recipe
from hybridssl import lora
from hybridssl.errors import UserError
from hybridssl.views import normalise

QUICK = Recipe(batch=8, epochs=2, patience=5, weight_decay=0.0, layer_decay=0.75, warmup=0.1, steps=2)
MODES = {
    "full": [],
    "lora": [],
    "lpft": [],
    "partial": ["--freeze-blocks", 1],
}


@pytest.fixture(scope="module", autouse=True)
def short_sweep():
    """The probe that lpft begins with is judged elsewhere: two penalties are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "CS", (0.01, 1.0))
        yield


@pytest.fixture
def evaluate(index, export_folder, tmp_path):
    """Run `adapt` for two short epochs; give the result."""

    def run(mode, *options, backbone=export_folder, data=index.root, out=tmp_path / "out", lrs=(1e-3,)):
        arguments = ["adapt", "--mode", mode, "--backbone", backbone, "--data", data, "--out", out, "--device", "cpu"]
        arguments += ["--epochs", 2, "--steps", 2, "--train-batch", 16, "--lr", *lrs, *options]
        assert main(list(map(str, arguments))) == 0
        return results.read(out / f"adapt-{mode}" / "results.json")

    return run


@pytest.fixture(scope="module")
def work(index, export_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    options = ["--backbone", str(export_folder), "--data", str(index.root), "--out", str(out), "--device", "cpu"]
    return task.prepare(parser("adapt").parse_args(["adapt", "--mode", "full", *options]), ["adapt-full"])


def plan(mode, lrs=(1e-2,), recipe=QUICK, tta=False, **change):
    return adapt.Plan(Change(mode, **change), lrs, recipe, tta)


def images(encoder, count=3):
    size = (count, 3, encoder.input_size, encoder.input_size)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def all_present(work):
    return np.ones(len(work.classes), dtype=bool)


# ----------------------------------------------------------------------------------------------------- through the door


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_reports_and_saves_a_backbone(evaluate, index, export_folder, mode):
    result = evaluate(mode, *MODES[mode], "--tta", lrs=(1e-3, 1e-2))
    about, predictions = result.about, result.predictions()
    assert about["protocol"] == f"adapt-{mode}"
    assert about["selected"]["split"] == "val"
    assert about["selected"]["grid"]["lr"] == [1e-3, 1e-2]
    assert about["selected"]["grid"]["class_weight"] == "balanced", "calibrate warns by it"
    choice = about["selected"]["choices"][0]
    tried = about["detail"]["tried"][0]["runs"]
    assert choice["val"] == pytest.approx(max(run["val"] for run in tried), abs=1e-4)
    assert next(run for run in tried if run["lr"] == choice["lr"])["epoch"] == choice["epoch"]
    assert predictions["scores"].shape == (1, about["data"]["splits"]["test"], 3)
    assert predictions["val_scores_0"].shape == (about["data"]["splits"]["val"], 3)
    np.testing.assert_allclose(predictions["scores"].sum(-1), 1, atol=1e-5)
    counts = about["detail"]["parameters"]
    assert 0 < counts["trainable_backbone"] <= counts["backbone"]
    assert (counts["trainable_backbone"] < counts["backbone"]) == (mode in ("lora", "partial"))
    assert about["cost"]["seconds"] > 0
    assert about["cost"]["peak_memory_mb"] > 0
    folder = result.path.parent / "model"
    saved = json.loads((folder / "adapted.json").read_text())
    assert saved["backbone_sha256"] == load(str(export_folder)).sha256
    assert saved["sha256"] == load(str(folder)).sha256
    assert (saved["sha256"] == saved["backbone_sha256"]) == (choice["epoch"] == 0), "or nothing beat the start"
    arguments = ["knn", "--backbone", folder, "--data", index.root, "--out", folder.parent, "--device", "cpu"]
    assert main(list(map(str, arguments))) == 0, "the adapted backbone is a backbone"


def test_training_helps_on_colours(evaluate):
    """The untrained classifier is at chance (1/3); colours are learnt within a few epochs."""
    result = evaluate("full", "--epochs", 6, "--steps", 6, "--layer-decay", 1, lrs=(3e-3,))
    assert result.metrics["balanced_accuracy"].low > 0.5
    assert result.about["selected"]["choices"][0]["epoch"] > 0


def test_choices_never_see_the_test_labels(evaluate, new_index, table, tmp_path):
    names = sorted({row["label"] for row in table})
    wrong = [
        {**row, "label": names[(names.index(row["label"]) + 1) % 3]} if row["split"] == "test" else row for row in table
    ]
    a = evaluate("lpft", out=tmp_path / "a", lrs=(1e-4, 1e-2))
    b = evaluate("lpft", out=tmp_path / "b", lrs=(1e-4, 1e-2), data=new_index(wrong).root)
    assert a.about["selected"] == b.about["selected"]
    np.testing.assert_array_equal(a.predictions()["scores"], b.predictions()["scores"])
    assert a.metrics["accuracy"].value > b.metrics["accuracy"].value + 0.2
    hashes = [json.loads((r.path.parent / "model" / "adapted.json").read_text())["sha256"] for r in (a, b)]
    assert hashes[0] == hashes[1]


def test_several_labels_an_image(evaluate, new_index, table):
    many = [{**row, "label": f"{row['label']}|big" if i % 2 else row["label"]} for i, row in enumerate(table)]
    result = evaluate("full", "--multi-label", data=new_index(many).root)
    scores = result.predictions()["scores"]
    assert scores.shape[-1] == 4
    assert "macro_auroc" in result.metrics
    assert ((scores > 0) & (scores < 1)).all()
    assert (np.abs(scores.sum(-1) - 1) > 1e-3).any(), "sigmoids, not a softmax"


def test_what_cannot_be_adapted_is_refused_with_the_remedy(index, tmp_path, capsys):
    common = ["--data", str(index.root), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["adapt", "--mode", "full", "--backbone", "histogram", *common]) == 2
    assert "histogram has no weights to adapt: use the frozen protocols" in capsys.readouterr().err
    assert main(["adapt", "--mode", "partial", "--backbone", "random:resnet18", "--size", "32", *common]) == 2
    assert "not a stack of blocks" in capsys.readouterr().err
    assert main(["adapt", "--mode", "lora", "--backbone", "random:resnet18", "--size", "32", *common]) == 2
    assert "use --mode full" in capsys.readouterr().err
    assert main(["adapt", "--mode", "full", "--drop-blocks", "1", "--backbone", "histogram", *common]) == 2
    assert "belong to --mode partial" in capsys.readouterr().err
    assert main(["adapt", "--mode", "full", "--lr", "0", "--backbone", "histogram", *common]) == 2
    assert "--lr 0.0 cannot be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_transformers_models_are_refused_by_name(work):
    foreign = replace(work.encoder, name="hf:some/model", model=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="hf:some/model is not a timm model"):
        adapters.require_trainable(foreign)


# ------------------------------------------------------------------------------------------------------------ the modes


def test_merged_lora_gives_the_outputs_of_the_unmerged(work):
    train, val = work.split(0)
    found = adapt.fit(work, train, val, plan("lora"), 0)
    low_rank = {name: p for name, p in found.classifier.moving().items() if "lora_B" in name}
    assert len(low_rank) == 2 * 4, "qkv, proj, fc1, fc2 of both blocks"
    assert all(p.abs().sum() > 0 for p in low_rank.values()), "they have moved"
    before = found.predict(work.test)
    plain = dict(work.encoder.model.named_parameters())  # type: ignore[union-attr]
    lora.merge(found.classifier.model)
    after = dict(found.classifier.model.named_parameters())
    assert after.keys() == plain.keys()
    changed = {name for name in plain if (plain[name] != after[name]).any()}
    assert changed == {n for n in plain if n.endswith(("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight"))}
    np.testing.assert_allclose(found.predict(work.test), before, atol=1e-5)


def test_lora_begins_as_the_backbone_and_rests_but_for_its_updates(work):
    classifier = adapters.build(work.encoder, Change("lora"), all_present(work)).eval()
    x = images(work.encoder)
    with torch.no_grad():
        ours = classifier.read(normalise(x, classifier.mean, classifier.std))[0]
    torch.testing.assert_close(ours, work.encoder.features(x)["cls"], atol=1e-5, rtol=0)
    moving = classifier.moving()
    assert all("lora_" in name or name.startswith("head.") for name in moving)
    shapes = {tuple(p.shape) for name, p in moving.items() if "lora_A" in name}
    assert shapes == {(16, 24), (16, 96)}, "rank 16"


def test_lp_ft_starts_from_the_probes_predictions(work):
    train, val = work.split(0)
    head = probe.fit(work.features.x, work.y, train, val, work.kind, 3)
    classifier = adapters.build(work.encoder, Change("lpft"), all_present(work), head)
    x = {kind: values[work.test] for kind, values in work.features.x.items()}
    found = training.predict(classifier, work, work.test)
    np.testing.assert_allclose(found, head.predict(x), atol=5e-5)  # float32 against float64
    np.testing.assert_array_equal(found.argmax(1), head.predict(x).argmax(1))
    for readout in ("cls", "cls+patch_mean"):
        width = 24 if readout == "cls" else 48
        drawn = np.random.default_rng(0).normal(0, 0.1, (width, 3))
        other = replace(head, readout=readout, weight=drawn, bias=np.array([0.3, -np.inf, 0.1]))
        classifier = adapters.build(work.encoder, Change("lpft"), np.array([True, False, True]), other)
        found = training.predict(classifier, work, work.test)
        np.testing.assert_allclose(found, other.predict(x), atol=1e-5)
        assert (found[:, 1] == 0).all(), "a class without labels gets nothing"


def test_lp_ft_is_never_worse_on_val_than_its_probe(work):
    train, val = work.split(0)
    head = probe.fit(work.features.x, work.y, train, val, work.kind, 3)
    found = adapt.fit(work, train, val, plan("lpft", lrs=(10.0,)), 0)  # a rate that ruins it
    assert found.val == pytest.approx(head.val, abs=1e-6)
    assert found.choice["epoch"] == 0
    assert found.choice["probe"] == head.choice


def test_frozen_blocks_do_not_move_and_the_others_do(work):
    train, val = work.split(0)
    recipe = replace(QUICK, steps=4)
    classifier = adapters.build(work.encoder, Change("partial", freeze_blocks=1), all_present(work))
    start = {name: p.detach().clone() for name, p in classifier.model.named_parameters()}
    trained = training.train(classifier, work, (train, val), recipe, 1e-2, 0)
    now = dict(classifier.model.named_parameters())
    moved = {name for name in start if (start[name] != now[name]).any()}
    assert moved == {name for name in start if name.startswith(("blocks.1.", "norm."))}
    assert set(trained.state) == {f"model.{name}" for name in moved} | {"head.fc.weight", "head.fc.bias"}
    for rest in (2, adapters.ALL):
        head_only = adapters.build(work.encoder, Change("partial", freeze_blocks=rest), all_present(work))
        assert head_only.moving().keys() == {"head.fc.weight", "head.fc.bias"}
    everything = adapters.build(work.encoder, Change("partial", freeze_blocks=0), all_present(work))
    assert len(everything.moving()) == len(list(everything.parameters()))
    source = work.encoder.model.state_dict()  # type: ignore[union-attr]
    assert all((source[name] == p).all() for name, p in start.items()), "the encoder itself is a copy's original"


def test_dropped_blocks_are_gone_and_what_is_saved_loads_without_them(evaluate, work):
    result = evaluate("partial", "--drop-blocks", 1, "--freeze-blocks", 0)
    folder = result.path.parent / "model"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert len(model.blocks) == 1
    assert json.loads((folder / "config.json").read_text())["model_args"]["depth"] == 1
    for asked in ({"drop_blocks": 2}, {"freeze_blocks": 3}, {"freeze_blocks": 2, "drop_blocks": 1}):
        with pytest.raises(UserError, match="blocks"):
            adapters.build(work.encoder, Change("partial", **asked), all_present(work))


def test_the_deit_head_reads_patches_in_any_order(work):
    change = Change("partial", freeze_blocks=2, head="deit", head_blocks=1)
    classifier = adapters.build(work.encoder, change, all_present(work)).eval()
    cls, patches = classifier.read(normalise(images(work.encoder), classifier.mean, classifier.std))
    with torch.no_grad():
        logits = classifier.head(cls, patches)
        torch.testing.assert_close(classifier.head(cls * 0, patches.flip(1)), logits)
        assert (classifier.head(cls, patches * 2) - logits).abs().max() > 1e-3
    assert {name.split(".")[0] for name in classifier.moving()} == {"head"}
    bare = torch.nn.Module()
    bare.blocks = torch.nn.Sequential(torch.nn.Identity())
    bare.pretrained_cfg, bare.num_features = {}, 4
    bare.forward_features = lambda x: x.mean((2, 3))
    bare.forward_head = lambda x, pre_logits: x
    with pytest.raises(UserError, match="no patch features"):
        adapters.build(replace(work.encoder, model=bare), replace(change, freeze_blocks=1), all_present(work))


def test_the_deit_head_is_saved_whole(evaluate):
    result = evaluate("partial", "--head", "deit", "--head-blocks", 1)
    saved = load_file(result.path.parent / "model" / "head.safetensors")
    assert sum(t.numel() for t in saved.values()) == result.about["detail"]["parameters"]["head"]


# -------------------------------------------------------------------------------------------------------- what is saved


def test_the_saved_model_and_head_give_the_reported_scores_through_timm(evaluate, index, work):
    """timm alone, with nothing of this package but the image preparation, reproduces the test scores."""
    result = evaluate("lora", "--seeds", 0, 1)
    folder = result.path.parent / "model"
    seed_at = [0, 1].index(result.about["detail"]["model"]["seed"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    head = load_file(folder / "head.safetensors")
    about = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    predictions = result.predictions()
    data = training.Images(index, predictions["number"], about["input_size"][-1])
    batch = torch.stack([data[0, row][0] for row in range(len(predictions["number"]))])
    with torch.no_grad():
        features = model.forward_features(normalise(batch, about["mean"], about["std"]))[:, 0]
        scores = (features @ head["fc.weight"].T + head["fc.bias"]).softmax(1)
    np.testing.assert_allclose(scores.numpy(), predictions["scores"][seed_at], atol=1e-5)


def test_known_pretraining_images_are_handed_on_with_those_trained_on(evaluate, index, export_folder, tmp_path):
    import shutil

    from safetensors.numpy import save_file

    folder = shutil.copytree(export_folder, tmp_path / "known")
    save_file({"digest": np.array([7])}, folder / "pretraining.safetensors")
    saved = evaluate("full", "--labels", 0.5, backbone=folder).path.parent / "model"
    digests = load(str(saved)).digests
    train = np.array(index.column("digest")[index.select(["train"])])
    assert digests is not None
    assert 7 in digests
    assert 0.4 * len(train) < np.isin(train, digests).sum() < 0.8 * len(train)
    assert load(str(evaluate("full", "--overwrite").path.parent / "model")).digests is None, "unknown stays unknown"


def test_a_run_and_a_released_architecture_can_be_adapted(evaluate, run_folder, tmp_path):
    for at, spec in enumerate((run_folder, "random:resnet10t")):
        evaluate("full", "--size", 32, "--epochs", 1, "--steps", 1, backbone=spec, out=tmp_path / str(at))


def test_a_folder_that_would_not_load_the_same_is_not_left_behind(work, tmp_path, monkeypatch):
    classifier = adapters.build(work.encoder, Change("full"), all_present(work))
    wrong = replace(work.encoder, std=(0.5, 0.5, 0.5))
    config = adapt.adapted.config
    monkeypatch.setattr(adapt.adapted, "config", lambda c, encoder: config(c, wrong))
    with pytest.raises(UserError, match="its features differ"):
        adapt.adapted.save(tmp_path / "model", classifier, work, work.split(0)[0], {})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- the loop


def test_early_stopping_stops_and_the_best_epoch_comes_back(work, monkeypatch):
    """Val as written here: the best is epoch 3, and two epochs without a better one end it."""
    said = iter([0.1, 0.2, 0.2, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(type(work.kind), "point", lambda self, y, scores: next(said))
    classifier = adapters.build(work.encoder, Change("full"), all_present(work))
    states = []
    recipe = replace(QUICK, epochs=50, patience=2, steps=1, batch=64)
    keep = lambda epoch, val: states.append(training._state(classifier))  # noqa: E731
    found = training.train(classifier, work, work.split(0), recipe, 1e-3, 0, keep)
    assert [entry["val"] for entry in found.history] == [0.2, 0.2, 0.5, 0.4, 0.5]
    assert (found.epoch, found.val) == (3, 0.5)
    assert all((found.state[name] == tensor).all() for name, tensor in states[2].items())
    assert any((found.state[name] != tensor).any() for name, tensor in states[3].items())


def test_the_same_seed_trains_the_same_network(work):
    train, val = work.split(0)
    short = replace(QUICK, epochs=1, batch=32)
    a, b, other = (adapt.fit(work, train, val, plan("lora", recipe=short), seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a.predict(work.test), b.predict(work.test))
    assert (a.predict(work.test) != other.predict(work.test)).any()


def test_layer_decay_scales_the_rate_from_the_head_down(work):
    classifier = adapters.build(work.encoder, Change("full"), all_present(work))
    scale = {id(p): g["lr_scale"] for g in training.groups(classifier, QUICK) for p in g["params"]}
    assert len(scale) == len(list(classifier.parameters()))
    of = {name: scale[id(p)] for name, p in classifier.named_parameters()}
    assert of["head.fc.weight"] == of["model.norm.weight"] == 1
    assert of["model.blocks.1.mlp.fc1.weight"] == 1
    assert of["model.blocks.0.mlp.fc1.weight"] == pytest.approx(0.75)
    assert of["model.patch_embed.proj.weight"] == pytest.approx(0.75**2)


def test_the_loss_with_priors_is_right_for_balanced_accuracy(work):
    """Two classes, nine to one, and an input that says nothing: the best logits are equal, not nine to one."""
    target = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
    prior = training.log_prior(target, work.kind)
    logits = torch.zeros(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(training.loss_of(logits.expand(10, 2), target, work.kind, prior), logits)
    torch.testing.assert_close(gradient, torch.zeros(2), atol=1e-6, rtol=0)
    weights = torch.tensor([1 / 0.9, 1 / 0.1])  # what weighing would give there as well: the same minimum
    shared = torch.nn.functional.cross_entropy(logits.expand(10, 2), target.argmax(1), weight=weights)
    torch.testing.assert_close(torch.autograd.grad(shared, logits)[0], torch.zeros(2), atol=1e-6, rtol=0)


def test_absent_classes_survive_mixing_without_nan(work):
    logits = torch.tensor([[0.2, adapters.ABSENT, 0.1]] * 2, requires_grad=True)
    target = torch.tensor([[0.7, 0.0, 0.3], [0.0, 0.0, 1.0]])
    loss = training.loss_of(logits, target, work.kind, training.log_prior(target, work.kind))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert (logits.grad[:, 1] == 0).all()


def test_mixup_mixes_images_and_labels_alike():
    torch.manual_seed(0)
    x, y = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 2), torch.eye(4)
    mixed, target = training.mix(x, y, 1.0)
    torch.testing.assert_close(mixed[:, 0, 0, 0], target @ torch.arange(4.0))
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    assert (target != y).any()
    assert training.mix(x, y, 0)[0] is x


def test_views_are_a_function_of_the_seed_and_flips_obey(index):
    numbers = index.select(["train"])[:4]
    plain = training.Images(index, numbers, 32)[0, 1][0]
    kept = training.Images(index, numbers, 32, replace(QUICK, crop=1, flips="none"), 0)
    assert all(torch.equal(kept[position, 1][0], plain) for position in range(6))
    across = training.Images(index, numbers, 32, replace(QUICK, crop=1, flips="across"), 0)
    seen = [across[position, 1][0] for position in range(12)]
    assert all(torch.equal(view, plain) or torch.equal(view, plain.flip(-1)) for view in seen)
    assert len({view.numpy().tobytes() for view in seen}) == 2
    random = training.Images(index, numbers, 32, QUICK, 0)
    assert torch.equal(random[3, 1][0], random[3, 1][0])
    assert not torch.equal(random[3, 1][0], random[4, 1][0])


def test_test_time_augmentation_is_the_mean_over_flips(work):
    classifier = adapters.build(work.encoder, Change("full"), all_present(work))
    flips = training.all_flips("both")
    assert sorted(flips) == sorted([(), (-1,), (-2,), (-1, -2)])
    each = [training.predict(classifier, work, work.test, [axes]) for axes in flips]
    np.testing.assert_allclose(training.predict(classifier, work, work.test, flips), np.mean(each, axis=0), atol=1e-7)
    assert np.abs(each[0] - each[1]).max() > 1e-6


def test_batch_norm_keeps_its_statistics():
    encoder = load("random:resnet10t", size=32)
    classifier = adapters.build(encoder, Change("full"), np.ones(3, dtype=bool)).train()
    before = {name: b.clone() for name, b in classifier.model.named_buffers()}
    classifier(images(encoder)).sum().backward()
    assert all(torch.equal(before[name], b) for name, b in classifier.model.named_buffers())
    assert forward_of(classifier.model)(torch.zeros(1, 3, 32, 32))[0].shape == (1, encoder.dim)


def test_plans_take_what_is_asked_and_keep_the_rest():
    given = dict.fromkeys(("lr", "epochs", "patience", "train_batch", "layer_decay"))
    args = Namespace(**given, steps=20, mixup=0.2, crop=0.5, flips="both", tta=False)
    assert adapt.plan_of(args, Change("lora")).recipe.batch == 16
    args.lr, args.epochs = [1e-4], 7
    asked = adapt.plan_of(args, Change("lora"))
    assert (asked.lrs, asked.recipe.epochs, asked.recipe.patience) == ((1e-4,), 7, 20)
