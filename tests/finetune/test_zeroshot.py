"""Classes known by their words: the label head of a run, models with a text half, and the metrics of both."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from sklearn.metrics import recall_score, roc_auc_score

from finetune import kinds, results, words, zeroshot
from finetune.__main__ import main
from finetune.backbones import load
from finetune.features import extract
from hybridssl import checkpoint, run, text
from hybridssl.backbone import BackboneOptions, build
from hybridssl.objectives import Context, labels
from hybridssl.recipe import to_dict
from hybridssl.student import Student
from hybridssl.text import ClassText, TextOptions
from tests.finetune.conftest import rows
from tests.finetune.looked import look

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a an image clinical of showing blue brown red crimson mole stain : sea"
TABLE = "class,name,synonyms,definition\nblue,blue stain,sea,a stain\nbrown,brown mole,,\nred,red stain,crimson,\n"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LOOKS = {**WORDS, "image_size": 32, "patch_size": 8}


def save_tokenizer(folder):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY.split()))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return {"vocab_size": len(VOCABULARY.split()), "max_position_embeddings": 48}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "bert"
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**save_tokenizer(folder), **WORDS)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "classes.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture(scope="module")
def unlabelled_red(new_index, table):
    """The index of a pretraining that had no red lesion labelled, in any split."""
    return new_index([{**row, "label": "" if row["label"] == "red" else row["label"]} for row in table])


@pytest.fixture(scope="module")
def make_run(bert, described, tmp_path_factory):
    """A run on an index, written by the program that trains, its prototypes moved from where text put them."""

    def make(index, splits=("train",), **changes):
        options = labels.Options(**{"init": "text", "unfreeze_at": 0.0, **changes})
        said = TextOptions(encoder=bert, classes=str(described))
        backbone = BackboneOptions(name="vit_tiny_patch16_224", args=TINY)
        start = text.class_prototypes(said, index.classes, 24, seed=3) if options.init == "text" else None
        named = torch.from_numpy(index.named())
        context = Context(dim=24, classes=len(index.classes), named=named, prototypes=start, steps=1, batch=1, micro=1)
        torch.manual_seed(2)
        students = [
            Student(build(backbone, 3, 32), torch.nn.ModuleDict({"labels": labels.Labels(options, context)}))
            for _ in range(2)
        ]
        folder = tmp_path_factory.mktemp("runs") / "worded"
        folder.mkdir()
        head = students[1].objectives["labels"]
        save_file({"initial": head.weight.detach().clone()}, folder / "prototypes.safetensors")
        for parameter in students[1].parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter is not head.weight else None
        with torch.no_grad():
            head.weight += 0.1 * torch.randn_like(head.weight)
            head.weight *= 1.7
        about = {"options": to_dict(backbone), "channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
        data = {"index": str(index.root), "index_sha256": index.sha256, "splits": list(splits), "samples": 1}
        data |= {"sources": list(index.sources), "classes": list(index.classes), "synthetic": True}
        recipe = {"seed": 3, "text": to_dict(said), "objectives": {"labels": to_dict(options)}}
        state = run.RunState(3, 96, recipe, about, data)
        checkpoint.save(folder, state, *students, torch.optim.AdamW(students[0].parameters()))
        return folder, head

    return make


@pytest.fixture(scope="module")
def worded(make_run, unlabelled_red):
    return make_run(unlabelled_red)


FEATURES = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
KNOWN = [
    ClassText("red", "red stain", ("crimson",)),
    ClassText("blue", "blue stain", ("sea",), "a stain"),
    ClassText("brown", "brown mole"),
]


# --------------------------------------------------------------------------------------------------------- label heads


@pytest.mark.parametrize("changes", [{}, {"head": "linear"}, {"head": "mlp"}, {"kind": "multi", "scale": 4.0}])
def test_a_labelled_class_has_the_trained_row_and_a_new_one_the_maps(make_run, unlabelled_red, index, bert, changes):
    folder, head = make_run(unlabelled_red, **changes)
    found = words.of_run(folder, index, KNOWN, None, None)
    assert found.seen == ("blue", "brown")
    with torch.no_grad():
        own = head.logits(torch.from_numpy(FEATURES))
    logits = found.logits(FEATURES)
    np.testing.assert_allclose(logits[:, 1:], own, atol=1e-4)

    old, new = text.embed_classes(bert, KNOWN[1:]), text.embed_classes(bert, KNOWN[:1])
    row = text.fit_map(old, 24, 0.5, seed=3)(new)[0]
    if changes.get("head") == "linear":
        expected = FEATURES @ row.numpy() * head.weight.norm(dim=1).mean().item() + head.bias.mean().item()
    else:
        cosine = F.normalize(head.project(torch.from_numpy(FEATURES)), dim=1).detach() @ row
        bias = 0 if head.bias is None else head.bias.mean()
        expected = (head.options.scale * cosine + bias).detach().numpy()
    np.testing.assert_allclose(logits[:, 0], expected, atol=1e-4)
    assert found.kept["red"] == pytest.approx(float(text.expressed(old, new)[0]), abs=1e-5)
    assert 0 < found.kept["red"] < 1


def test_a_class_of_the_head_without_a_labelled_image_stands_where_text_put_it(make_run, index, new_index, table):
    """Red is a class of the index, because test images are, but no training image says so."""
    blank = [
        {**row, "label": "" if (row["label"], row["split"]) == ("red", "train") else row["label"]} for row in table
    ]
    pretrained = new_index(blank)
    assert "red" in pretrained.classes
    folder, _ = make_run(pretrained)
    start = load_file(folder / "prototypes.safetensors")["initial"][2]
    for data in (pretrained, index):  # the index at hand, and the one that the run remembers
        found = words.of_run(folder, data, KNOWN, None, "an encoder that is not asked")
        assert found.seen == ("blue", "brown")
        cosine = F.cosine_similarity(torch.from_numpy(FEATURES), start[None])
        np.testing.assert_allclose(found.logits(FEATURES)[:, 0], 10 * cosine.numpy(), atol=1e-4)
        assert not found.kept
    assert any("mean cosine of 0.9" in note for note in found.notes)
    assert words.of_run(make_run(pretrained, ("train", "test"))[0], index, KNOWN, None, None).seen == (
        "red",
        "blue",
        "brown",
    )


def test_second_labels_count_as_labels(make_run, new_index, table, index):
    """The index keeps an image's first label in its column; red is only ever the second."""
    second = [{**row, "label": "blue|red" if row["label"] == "red" else row["label"]} for row in table]
    pretrained = new_index(second)
    assert words.of_run(make_run(pretrained, kind="multi")[0], index, KNOWN, None, None).seen == (
        "red",
        "blue",
        "brown",
    )


def test_without_the_pretraining_index_it_is_said(worded, index, tmp_path):
    folder = shutil.copytree(worded[0], tmp_path / "moved")
    path = run.latest(folder) / "state.json"
    path.write_text(path.read_text().replace("shards", "gone"))
    assert any("pretraining index is not here" in n for n in words.of_run(folder, index, KNOWN, None, None).notes)


def test_words_of_the_pretraining_are_looked_for_and_checked(
    make_run, unlabelled_red, index, bert, described, tmp_path
):
    folder, _ = make_run(unlabelled_red)
    other = tmp_path / "other.csv"
    other.write_text(TABLE.replace("blue stain,sea,a stain", "crimson mole,,"))
    # The user's table says something else of blue than the pretraining did; the recipe's table is still there.
    assert words.of_run(folder, index, KNOWN, other, None).kept
    path = run.latest(folder) / "state.json"
    path.write_text(path.read_text().replace(str(described), str(tmp_path / "gone.csv")))
    with pytest.raises(words.UserError, match=r"cannot be made again with .*other\.csv"):
        words.of_run(folder, index, KNOWN, other, None)
    assert words.of_run(folder, index, KNOWN, described, None).kept
    path.write_text(path.read_text().replace(f'"encoder": "{bert}"', '"encoder": ""'))
    with pytest.raises(words.UserError, match=r"names no text encoder.*--encoder, to place red"):
        words.of_run(folder, index, KNOWN, described, None)
    assert words.of_run(folder, index, KNOWN, described, bert).kept


def test_what_text_cannot_place_is_refused(
    run_folder, export_folder, make_run, unlabelled_red, index, worded, tmp_path
):
    for folder, message in (
        (export_folder, "exported backbone.*give zeroshot the run folder"),
        (run_folder, "without a label head"),
        (make_run(unlabelled_red, init="random")[0], "started from random numbers"),
        (tmp_path, "no checkpoint"),
    ):
        with pytest.raises(words.UserError, match=message):
            words.of_run(folder, index, KNOWN, None, None)
    broken = shutil.copytree(worded[0], tmp_path / "broken")
    (broken / "prototypes.safetensors").unlink()
    with pytest.raises(words.UserError, match="copy the whole run folder"):
        words.of_run(broken, index, KNOWN, None, None)


def test_words_come_from_the_table_or_from_the_names(tmp_path, described):
    assert words.words(None, tmp_path, ["basal_cell"]) == [ClassText("basal_cell", "basal cell")]
    assert words.words(described, tmp_path, ["red", "blue"]) == KNOWN[:2]
    shutil.copy(described, tmp_path / "classes.csv")
    assert words.words(None, tmp_path, ["red", "new_one"])[1] == ClassText("new_one", "new one")
    with pytest.raises(words.UserError, match=r"lacks 1 .*'new_one'"):
        words.words(described, tmp_path, ["red", "new_one"])


# ---------------------------------------------------------------------------------------------- models with a text half


def save_two_towers(name, folder):
    torch.manual_seed(1)
    written = save_tokenizer(folder)
    size = {"height": 32, "width": 32}
    if name == "clip":
        config = hf.CLIPConfig(
            text_config={**WORDS, **written, "eos_token_id": 3}, vision_config=LOOKS, projection_dim=6
        )
        model, processor = hf.CLIPModel(config), hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    elif name == "siglip":
        model = hf.SiglipModel(hf.SiglipConfig(text_config={**WORDS, **written}, vision_config=LOOKS))
        processor = hf.SiglipImageProcessor(size=size)
    else:
        config = hf.BlipConfig(text_config={**WORDS, **written}, vision_config=LOOKS, projection_dim=6)
        model, processor = hf.BlipModel(config), hf.BlipImageProcessor(size=size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


@pytest.mark.parametrize("name", ["clip", "siglip", "blip"])
def test_scores_are_the_librarys_own(name, tmp_path):
    model, processor = save_two_towers(name, tmp_path)
    known = [ClassText("a", "red stain"), ClassText("b", "a clinical image of a brown mole")]
    encoder = load(f"hf:{tmp_path}")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = words.of_two_towers(f"hf:{tmp_path}", known, encoder.dim, ("{}",))
    found = found.logits(encoder.features(images)["cls"].numpy())

    tokenizer = hf.BertTokenizer.from_pretrained(tmp_path)
    padding = {"padding": "max_length", "max_length": 48} if name == "siglip" else {"padding": True}
    tokens = tokenizer([c.name for c in known], return_tensors="pt", **padding)
    mask = {} if name == "siglip" else {"attention_mask": tokens["attention_mask"]}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], pixel_values=(images / 255 - mean) / std, **mask)
    np.testing.assert_allclose(found, out.logits_per_image.numpy(), atol=1e-4)
    assert np.ptp(found, axis=1).min() > 1e-3, "the texts differ to the model"


def test_a_model_without_a_text_half_and_one_that_lacks_its_projection(tmp_path):
    torch.manual_seed(1)
    hf.ViTModel(hf.ViTConfig(**LOOKS)).save_pretrained(tmp_path / "vit")
    with pytest.raises(words.UserError, match="ViTModel and has no text half"):
        words.of_two_towers(f"hf:{tmp_path / 'vit'}", KNOWN, 16)
    save_two_towers("blip", tmp_path / "blip")
    tensors = load_file(tmp_path / "blip/model.safetensors")
    kept = {k: v for k, v in tensors.items() if k != "text_projection.weight"}
    save_file(kept, tmp_path / "blip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(words.UserError, match=r"lacks 1 tensors .*text_projection"):
        words.of_two_towers(f"hf:{tmp_path / 'blip'}", KNOWN, 16)
    with pytest.raises(words.UserError, match="cannot load hf:"):
        words.of_two_towers(f"hf:{tmp_path}", KNOWN, 16)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_seen_and_unseen_classes_are_scikit_learns():
    rng = np.random.default_rng(1)
    y, scores, weight = rng.integers(5, size=300), rng.random((300, 5)), rng.integers(0, 3, size=(1, 300)).astype(float)
    scores[np.arange(300), y] += 0.4
    seen, unseen = [0, 3], [1, 2, 4]
    found = zeroshot.parted(kinds.choose("one-of", list("abcde")), seen, unseen)
    value = {name: metric(y, scores, weight)[0] for name, metric in found.items()}
    recalls = recall_score(y, scores.argmax(1), average=None, sample_weight=weight[0])
    s, u = recalls[seen].mean(), recalls[unseen].mean()
    assert value["balanced_accuracy_seen"] == pytest.approx(s)
    assert value["balanced_accuracy_unseen"] == pytest.approx(u)
    assert value["harmonic_mean"] == pytest.approx(2 * s * u / (s + u))
    areas = [roc_auc_score(y == k, scores[:, k], sample_weight=weight[0]) for k in range(5)]
    assert value["macro_auroc_unseen"] == pytest.approx(np.mean([areas[k] for k in unseen]))
    own = np.isin(y, unseen)
    chosen = np.array(unseen)[scores[own][:, unseen].argmax(1)]
    expected = recall_score(y[own], chosen, average="macro", sample_weight=weight[0][own])
    assert value["balanced_accuracy_among_unseen"] == pytest.approx(expected)
    assert zeroshot.parted(kinds.choose("one-of", list("ab")), [], [0, 1]) == {}
    several = zeroshot.parted(kinds.choose("multi-label", list("abcde")), seen, unseen)
    assert several.keys() == {"macro_auroc_seen", "macro_auroc_unseen"}
    multi_hot = (rng.random((300, 5)) < 0.3).astype(np.uint8)
    expected = np.mean([roc_auc_score(multi_hot[:, k], scores[:, k], sample_weight=weight[0]) for k in seen])
    assert several["macro_auroc_seen"](multi_hot, scores, weight)[0] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ the verb


def evaluate(backbone, index, out, *options):
    arguments = ["zeroshot", "--backbone", str(backbone), "--data", str(index.root), "--out", str(out)]
    return main([*arguments, "--device", "cpu", *map(str, options)])


def test_only_test_images_are_read_and_labelled_ones_of_other_splits_need_not_be_there(
    worded, new_index, described, tmp_path
):
    data = new_index(rows(seed=3, splits={"train": 2, "test": 4}))
    assert evaluate(worded[0], data, tmp_path / "a", "--text", described, "--cache", tmp_path / "cache") == 0
    (file,) = (tmp_path / "cache").iterdir()
    np.testing.assert_array_equal(np.sort(load_file(file)["numbers"]), data.select(["test"]))
    without = new_index([row for row in rows(seed=3, splits={"test": 4}) if row["label"] != "red"])
    assert evaluate(worded[0], without, tmp_path / "b", "--text", described) == 0
    about = results.read(tmp_path / "b/zeroshot/results.json").about
    assert list(about["data"]["splits"]) == ["test"]
    assert list(about["data"]["classes"]) == ["blue", "brown"]


def test_a_class_without_a_test_image_may_still_be_said(worded, new_index, described, tmp_path):
    table = rows(seed=4, splits={"train": 2, "test": 4})
    data = new_index([row for row in table if row["split"] == "train" or row["label"] != "red"])
    assert evaluate(worded[0], data, tmp_path, "--text", described) == 0
    result = results.read(tmp_path / "zeroshot/results.json")
    assert result.predictions()["scores"].shape[2] == 3
    assert any("no test image of red" in note for note in result.about["notes"])
    assert not any("no training label" in note for note in result.about["notes"])


def test_the_verb_on_a_run(worded, index, described, tmp_path):
    assert evaluate(worded[0], index, tmp_path, "--text", described) == 0
    result = results.read(tmp_path / "zeroshot/results.json")
    assert (result.about["detail"]["seen"], result.about["detail"]["unseen"]) == (["blue", "brown"], ["red"])
    features = extract(load(str(worded[0])), index, index.select(["test"]))
    known = words.words(described, index.root, ["blue", "brown", "red"])
    logits = words.of_run(worded[0], index, known, described, None).logits(features.x["cls"])
    recalls = recall_score(features.label, logits.argmax(1), average=None)
    assert result.metrics["balanced_accuracy"].value == pytest.approx(recalls.mean())
    assert result.metrics["balanced_accuracy_unseen"].value == pytest.approx(recalls[2])
    assert result.about["cost"]["labels_used"] == {"train": [0], "val": [0]}
    assert not any("no training label" in note for note in result.about["notes"])
    scores = result.predictions()["scores"][0]
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    page = (tmp_path / "zeroshot/report.html").read_text()
    look(tmp_path / "zeroshot/report.html")
    assert f">{result.metrics['macro_auroc_unseen'].value:.3f}</a>" in page
    assert "red stain; crimson" in page
    assert evaluate(f"random:{worded[0]}", index, tmp_path / "null", "--text", described) == 0
    assert results.read(tmp_path / "null/zeroshot/results.json").about["backbone"]["baseline"]


def test_the_verb_on_clip_with_several_labels(new_index, table, tmp_path):
    save_two_towers("clip", tmp_path / "clip")
    data = new_index([{**row, "label": "blue|red" if row["label"] == "red" else row["label"]} for row in table])
    assert evaluate(f"hf:{tmp_path / 'clip'}", data, tmp_path / "o", "--multi-label") == 0
    result = results.read(tmp_path / "o/zeroshot/results.json")
    assert result.about["detail"]["seen"] == []
    assert result.metrics.keys() == {"macro_auroc", "average_precision"}
    assert any("is not known" in note for note in result.about["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["histogram"], "histogram knows no words"),
        (["random:timm:test_vit"], "timm:test_vit knows no words"),
        (["hf:x", "--encoder", "y"], "read by its own text half"),
        (["hf:x", "--labels", "0.1"], "zeroshot uses no train label"),
    ],
)
def test_the_verb_refuses_what_knows_no_words(index, tmp_path, options, message, capsys):
    assert evaluate(options[0], index, tmp_path / "o", *options[1:]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
