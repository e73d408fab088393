"""`efficiency` through the door, with a tiny SamModel of random weights, and its parts held to what they promise."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from finetune import arms, compute, efficiency, metrics, results, segmenters
from finetune.__main__ import main
from finetune.efficiency import annotated
from finetune.features import groups_of
from finetune.masks import dice
from finetune.measurements import measure
from finetune.patch_samples import collect
from finetune.patches import load_encoder
from finetune.promptable import KINDS, load_promptable, simulate
from hybridssl.errors import UserError
from tests.finetune import masked
from tests.finetune.looked import look

SIDE = 64


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return masked.make(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    """Segment Anything in small: 40,000 random parameters, and the processor that belongs to it."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "output_channels": 16}
    vision |= {"image_size": SIDE, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    pads = {"pad_size": {"height": SIDE, "width": SIDE}, "mask_pad_size": {"height": 16, "width": 16}}
    SamImageProcessor(size={"longest_edge": SIDE}, mask_size={"longest_edge": 16}, **pads).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluate(discs, tmp_path_factory):
    """Run the verb with few steps; give the folder of its result."""

    def run(*options, data=discs.root, out=None, fails=False):
        out = out or tmp_path_factory.mktemp("out")
        given = ["--backbone", "histogram", "--data", data, "--out", out, "--size", SIDE, "--device", "cpu", *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segmenters, "MIN_STEPS", 40)
            assert main(["efficiency", *map(str, given)]) == (2 if fails else 0)
        return out / "efficiency"

    return run


@pytest.fixture(scope="module")
def compared(evaluate, sam_folder):
    return evaluate("--promptable", sam_folder, "--labels-counts", 4, "all", 99, "--seeds", 0, 1)


def test_both_halves_are_judged_by_their_measurements(compared):
    result = results.read(compared / "results.json")
    detail, arrays = result.about["detail"], result.predictions()
    assert [arm["name"] for arm in detail["arms"]] == ["4 masks", "30 masks", "a box", "1 point", "3 points"]
    assert [(arm["masks"], arm["prompts"]) for arm in detail["arms"]] == [(4, 0), (30, 0), (0, 1), (0, 1), (0, 3)]
    assert (detail["cases"], detail["unit"], detail["grid"]) == (15, "px", SIDE)
    assert result.about["cost"]["labels_used"]["val"] == [6, 6]
    # The figures follow from the stored pixels and measurements.
    assert arrays["counts_masks_30"].shape == (2, 15, 3)
    expected = np.nanmean([dice(counts).mean() for counts in arrays["counts_masks_30"]])
    assert result.metrics["dice"].value == pytest.approx(expected)
    own = detail["arms"][1]["measures"]["area"]
    measured, truth = arrays["area_masks_30"], arrays["truth_area"]
    assert own["bias"]["value"] == pytest.approx((measured - truth).mean())
    assert own["pearson"]["value"] == pytest.approx(np.mean([np.corrcoef(m, truth)[0, 1] for m in measured]))
    names = detail["arms"][0]["measures"]
    each = [detail["arms"][1]["measures"][name]["icc_2_1"]["value"] for name in names]
    assert result.metrics["icc"].value == pytest.approx(np.mean(each))
    # Thirty masks of discs teach what random weights do not know, and the test says so.
    assert result.metrics["dice"].low > 0.8 > result.metrics["dice (a box)"].high
    shown = [row for row in detail["comparisons"] if row["masks"] == 30]
    assert {row["verdict"] for row in shown if row["metric"] == "dice"} == {"better"}
    assert len(detail["comparisons"]) == 2 * 2 * 3


def test_differences_can_be_shown_whatever_their_number(compared):
    detail = results.read(compared / "results.json").about["detail"]
    assert 2 * len(detail["comparisons"]) / (detail["resamples"] + 1) <= 0.01, "the smallest p that Holm can leave"


def test_the_area_of_a_case_is_that_of_its_mask(compared, discs):
    arrays = results.read(compared / "results.json").predictions()
    for number, area in zip(arrays["number"], arrays["truth_area"], strict=True):
        stored = cv2.imdecode(np.frombuffer(discs.read(int(number)).mask, np.uint8), cv2.IMREAD_GRAYSCALE) > 0
        assert area == stored.sum()
    both, only, _ = arrays["counts_box"][0].T
    np.testing.assert_array_equal(both + only, arrays["area_box"][0])


def test_the_page_says_what_was_and_what_was_not_shown(compared):
    about, page = results.read(compared / "results.json").about, (compared / "report.html").read_text()
    text = look(compared / "report.html")
    assert "Not shown: what people take to draw a mask" in page
    assert "99 masks were asked for, and train has 30: left out" in about["notes"]
    assert len(about["detail"]["said"]) == 7
    assert all(sentence in text for sentence in about["detail"]["said"])
    measures = len(about["detail"]["arms"][0]["measures"])
    assert measures == 5
    assert page.count(">mean of both") == 4 * measures  # one head and three prompts
    assert page.count("data:image/png") == 6 * 5
    assert 'href="results.json"' in page


def test_what_a_case_costs(compared):
    costs = results.read(compared / "results.json").about["detail"]["compute"]
    assert list(costs) == ["self-supervised", "a box", "1 point", "3 points"]
    assert costs["self-supervised"]["parameters"] == 2 * 76 + 76 * 2 + 2  # batch norm and a 1x1 convolution
    assert costs["a box"]["parameters"] > 30_000
    assert costs["self-supervised"]["gflops"] == pytest.approx(2 * 76 * 2 * 8 * 8 / 1e9)
    assert costs["a box"]["gflops"] > 100 * costs["self-supervised"]["gflops"]
    assert costs["1 point"]["ratio"] == costs["1 point"]["seconds"] / costs["self-supervised"]["seconds"]


def test_without_a_promptable_model_half_of_it_runs_and_says_so(evaluate):
    folder = evaluate("--labels-counts", 4)
    result = results.read(folder / "results.json")
    assert any("only the self-supervised half ran" in note for note in result.about["notes"])
    assert result.about["detail"]["comparisons"] == []
    assert list(result.about["detail"]["compute"]) == ["self-supervised"]
    assert (folder / "report.html").is_file()


def test_a_comparison_is_not_replaced_by_another(evaluate, compared, capsys):
    evaluate("--labels-counts", 4, out=compared.parent, fails=True)
    assert "choose another --out, or --overwrite" in capsys.readouterr().err


def test_faults_are_named(evaluate, new_index, table, export_folder, tmp_path, capsys):
    bare = new_index(table[:60])
    for options, data, words in (
        (["--promptable", export_folder], None, "is a timm_wrapper model, and must be a SamModel"),
        (["--labels-counts", 31], None, "has 30 masks; ask for fewer"),
        ([], bare.root, "has no mask in split 'train'"),
        (["--promptable", tmp_path], None, f"cannot load --promptable {tmp_path}"),
        (["--source", "ward"], None, "has no source 'ward'"),
    ):
        evaluate(*options, out=tmp_path / "out", fails=True, **({"data": data} if data else {}))
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        evaluate("--labels-counts", 1)


def test_only_the_masks_that_were_asked_for_teach(discs, monkeypatch):
    """All other masks turned around: the same heads."""
    monkeypatch.setattr(segmenters, "MIN_STEPS", 10)
    encoder = load_encoder("histogram", size=SIDE)
    numbers = discs.select(["train", "test"])
    samples = collect(encoder, discs, numbers, reads=("patches",))
    train = discs.select(["train"])
    drawn = {0: train[annotated(groups_of(discs, train), 0)[:8]]}
    args = SimpleNamespace(seeds=[0], head="linear")
    found, choices, used = efficiency.train(args, samples, drawn, [8])
    other = ~np.isin(samples.numbers, drawn[0])
    samples.masks[other] = 1 - samples.masks[other]
    again, same, _ = efficiency.train(args, samples, drawn, [8])
    assert choices == same
    rows = np.arange(len(numbers))
    a, b = (segmenters.predict_masks(arm.heads[0], samples, rows) for (arm,) in (found, again))
    np.testing.assert_array_equal(a, b)
    assert used["train"][0] + used["val"][0] == 8


def test_annotation_goes_round_the_patients():
    groups = np.repeat(np.arange(10), 3)
    order = annotated(groups, 0)
    assert sorted(order) == list(range(30))
    for turn in range(3):
        assert sorted(groups[order[10 * turn : 10 * turn + 10]]) == list(range(10))
    assert (annotated(groups, 1) != order).any()
    np.testing.assert_array_equal(annotated(groups, 0), order)


def test_prompts_lie_where_a_person_would_put_them():
    mask = np.zeros((50, 80), dtype=np.uint8)
    mask[10:40, 20:60] = 1  # 40 wide, 30 high
    scale, boxes, points = np.array([80, 50]), [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        boxes.append(simulate("box", mask, rng).box * np.tile(scale, 2))
        clicks = simulate("points", mask, rng).points * scale
        assert clicks.shape == (3, 2)
        assert mask[clicks[:, 1].astype(int), clicks[:, 0].astype(int)].all()
        points.append(simulate("point", mask, rng).points[0] * scale)
    np.testing.assert_allclose(np.mean(boxes, 0), [20, 10, 60, 40], atol=0.4)
    np.testing.assert_allclose(np.std(boxes, 0), [2, 1.5, 2, 1.5], rtol=0.15)
    assert np.std(points, 0)[0] == pytest.approx(2, rel=0.15)
    thread = np.zeros((50, 80), dtype=np.uint8)
    thread[25, 3] = 1
    for kind in KINDS:
        prompt = simulate(kind, thread, np.random.default_rng(0))
        at = prompt.points if prompt.points is not None else prompt.box.reshape(2, 2)
        np.testing.assert_allclose(at * scale, np.tile([3.5, 25.5], (len(at), 1)), atol=0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_transformers_own_processor(sam_folder, kind):
    promptable = load_promptable(str(sam_folder))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 8:20] = 1
    prompts = [simulate(kind, mask, rng) for _ in images]
    ours = promptable.decode(promptable.embed(torch.from_numpy(images).permute(0, 3, 1, 2)), prompts, SIDE)

    processor = SamProcessor(SamImageProcessor.from_pretrained(sam_folder))
    if kind == "box":
        asked = {"input_boxes": [[(p.box * SIDE).tolist()] for p in prompts]}
    else:
        asked = {"input_points": [[(p.points * SIDE).tolist()] for p in prompts]}
    inputs = processor(images=list(images), return_tensors="pt", **asked)
    inputs = {k: v.float() if k.startswith("input_") else v for k, v in inputs.items()}
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        out = promptable.model(**inputs, multimask_output=kind == "point")
    theirs = processor.post_process_masks(out.pred_masks, *sizes)
    for at, found in enumerate(theirs):
        np.testing.assert_array_equal(ours[at], found[0, out.iou_scores[at, 0].argmax()].numpy())
    assert 0 < ours.mean() < 1


def test_millimetres_only_where_every_case_has_them():
    image = cv2.imencode(".png", np.zeros((100, 150, 3), dtype=np.uint8))[1].tobytes()
    metas = [{"mm_per_pixel": "0.1"}, {"mm_per_pixel": 0.2}, {}]
    index = SimpleNamespace(channels=3, read=lambda i: SimpleNamespace(meta=metas[i], key=f"k{i}", image=image))
    lengths, given = arms.pixel_lengths(index, np.array([0, 1]), 50)
    np.testing.assert_allclose(lengths, [0.2, 0.4])  # 100 pixels became 50
    assert given == 2
    lengths, given = arms.pixel_lengths(index, np.array([0, 1, 2]), 50)
    np.testing.assert_array_equal(lengths, 1)
    assert given == 2
    metas[2]["mm_per_pixel"] = "wide"
    with pytest.raises(UserError, match="sample k2"):
        arms.pixel_lengths(index, np.array([2]), 50)


def test_cases_that_cannot_be_measured_are_counted_and_left_out():
    truth = arms.Truth({name: np.arange(1.0, 6) for name in ("area", "irregularity")}, {}, {})
    values = [{**measure(np.zeros((4, 4), bool)), "area": float(i), "irregularity": float(i)} for i in range(1, 6)]
    values[0]["irregularity"] = np.nan
    counts = [np.tile([4, 1, 1], (5, 1, 1))]
    arm = arms.Arm("x", counts=[counts], values=[values])
    found = {name: of(np.ones((2, 5))) for name, of in arms.statistics_of(arm, truth).items()}
    assert found["irregularity icc_2_1"] == pytest.approx(1)
    assert found["dice"] == pytest.approx(0.8)
    assert found["icc"] == pytest.approx(1)
    assert arms.missing(arm, truth, "irregularity") == 1
    assert arms.missing(arm, truth, "area") == 0


def test_operations_are_counted_and_calls_take_turns():
    layer, attention = torch.nn.Linear(30, 50), torch.rand(1, 2, 16, 8)
    assert compute.gflops(lambda: layer(torch.rand(4, 30))) == pytest.approx(2 * 4 * 30 * 50 / 1e9)
    scaled = torch.nn.functional.scaled_dot_product_attention
    assert compute.gflops(lambda: scaled(attention, attention, attention)) == pytest.approx(
        2 * 2 * 2 * 16 * 16 * 8 / 1e9
    )
    assert compute.parameters(layer, layer, None) == 30 * 50 + 50
    order = []
    spent = compute.seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", repeats=2)
    assert order == ["a", "b"] * 3
    assert set(spent) == {"a", "b"}


def test_intervals_are_of_groups(compared):
    """The interval of Dice, computed again from the stored counts by the evaluation's own bootstrap."""
    result = results.read(compared / "results.json")
    arrays = result.predictions()
    values = np.stack([dice(counts) for counts in arrays["counts_masks_30"]])
    weights = metrics.group_weights(arrays["group"], result.about["detail"]["resamples"])
    drawn = np.concatenate([w @ values.mean(0) / w.sum(1) for w in weights])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (result.metrics["dice"].low, result.metrics["dice"].high) == pytest.approx((low, high))
