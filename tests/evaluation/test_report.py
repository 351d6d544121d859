import base64
import functools
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from jaxseg.evaluation import plots, report, report_numbers

NAMES = ["background", "liver", "tumour"]
HOSTILE = '"></svg><img src=x onerror=alert(1)><script>alert(2)</script>|`$\\frac{'


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: elements with their attributes, and texts; charts apart."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.drawn_elements, self.drawn_texts = [], []
        self._open, self._is_drawn = None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._open = tag
        self._is_drawn |= tag == "svg"
        elements = self.drawn_elements if self._is_drawn else self.elements
        elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self._is_drawn &= tag != "svg"

    def handle_data(self, data):
        if data.strip() and self._open not in ("script", "style"):
            texts = self.drawn_texts if self._is_drawn else self.texts
            texts.append(" ".join(data.split()))

    def all_of(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def scores_of(dice_by_case, class_names=NAMES):
    """As in the file of an evaluation: each foreground class of a case has that Dice."""
    num = len(class_names)
    return {
        "about": {},
        "class_names": class_names,
        "summary": {
            "dice": {
                "mean": [0.99] + [0.81234] * (num - 1),
                "sd": [0.01] + [0.05678] * (num - 1),
                "num": [len(dice_by_case)] * num,
                "num_infinite": [0] * num,
                "interval": [[0.9, 1.0]] + [[0.71111, 0.92222]] * (num - 1),
            }
        },
        "cases": {case_id: {"dice": [0.99] + [d] * (num - 1)} for case_id, d in dice_by_case},
    }


def content_of(**changes):
    values = {"title": "livers", "set_name": "test", "scores": scores_of([("a", 0.8), ("b", 0.9)])}
    return report.ReportContent(**(values | changes))


def write(folder, **changes):
    report.write_report(str(folder), content_of(**changes))
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def one_case(label, prediction=None, spacing_mm=(1.0, 1.0, 1.0), image=None):
    """Options of a report with that single case."""
    prediction = label if prediction is None else prediction
    image = label[..., None].astype(np.float32) if image is None else image
    return {
        "scores": scores_of([("a", 0.8)]),
        "load_case": lambda case_id: (image, label, prediction, spacing_mm),
    }


def frame_of(page, plane, layer, place):
    """A layer of a plane as the page shows it with the slider at `place`; labels as indices."""
    frames = [a["style"] for a in page.all_of("div", **{"class": "frame"})]
    count = {n: int(v) for n, v in re.findall(r"--(columns|rows):(\d+)", frames[plane])}
    uri = page.all_of("img", **{"class": layer})[plane]["src"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as sprite:
        pixels = np.asarray(sprite)
    height, width = pixels.shape[0] // count["rows"], pixels.shape[1] // count["columns"]
    row, column = divmod(place, count["columns"])
    return pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]


def test_scores_are_shown_with_spread_and_interval(tmp_path):
    page, markdown = write(tmp_path)
    texts = Page(page).texts
    assert texts.count("0.812 ± 0.057") == texts.count("0.711 to 0.922") == 2  # not of background
    assert "| liver | 0.812 ± 0.057 (0.711 to 0.922) |" in markdown
    assert texts[texts.index("Mean Dice") + 1] == "0.850"
    assert "Mean Dice **0.850** over 2 case(s) of the set **test** and 2 class(es)." in markdown


def test_what_does_not_count_is_said(tmp_path):
    scores = scores_of([("a", 0.8), ("b", None)])
    scores["summary"]["hd95"] = {
        "mean": [None, 1.5, None],
        "sd": [None, None, None],
        "num": [0, 1, 0],
        "num_infinite": [0, 1, 0],
        "interval": [[None, None], [1.5, 1.5], [None, None]],
    }
    for case, values in zip(scores["cases"].values(), ([None, 1.5, None], [None] * 3), strict=True):
        case["hd95"] = values
    page, markdown = write(tmp_path, scores=scores)
    assert "| liver | 1.50 ± – (1.50 to 1.50; n = 1, 1 without distance) |" in markdown
    assert "| tumour | – ± – (– to –; n = 0) |" in markdown
    assert "| b | – | – | – |  |" in markdown
    assert {"n = 1, 1 without distance", "n = 0"} <= set(Page(page).texts)
    assert "Mean Dice **0.800**" in markdown


@pytest.mark.parametrize(
    ("about", "headings", "has_volumes"),
    [
        ({}, ["surface Dice", "HD95 (mm)"], True),
        ({"unit": "mm", "tolerance_mm": 1.5}, ["surface Dice at 1.5 mm", "HD95 (mm)"], True),
        ({"unit": "pixel", "tolerance_mm": 1}, ["surface Dice at 1 pixel", "HD95 (pixel)"], False),
    ],
)
def test_distances_have_their_unit(tmp_path, about, headings, has_volumes):
    scores = scores_of([("a", 0.8)]) | {"about": about}
    for name in ("nsd", "hd95", "volume_ml"):
        scores["summary"][name] = scores["summary"]["dice"]
        scores["cases"]["a"][name] = [None, 0.5, 0.5]
    page, markdown = write(tmp_path, scores=scores)
    assert f"| class | {headings[0]} | {headings[1]} |" in markdown
    assert set(headings) <= set(Page(page).texts) & set(Page(page).drawn_texts)
    assert ("predicted (ml)" in markdown) == ("predicted (ml)" in page) == has_volumes


def test_cases_are_listed_worst_first_with_their_flags(tmp_path):
    scores = scores_of([("a", 0.8), ("b", 0.7), ("c", None), ("d", 0.75)])
    flags = {"d": ["spacing is 5 mm", "inverted"]}
    page, markdown = write(tmp_path, scores=scores, flags=flags)
    rows = [line for line in markdown.splitlines() if re.match(r"\| [abcd] \|", line)]
    assert rows == [
        "| b | 0.700 | 0.700 | 0.700 |  |",
        "| d | 0.750 | 0.750 | 0.750 | spacing is 5 mm; inverted |",
        "| a | 0.800 | 0.800 | 0.800 |  |",
        "| c | – | – | – |  |",
    ]
    texts = Page(page).texts
    assert [text for text in texts if text in "abcd"] == ["b", "d", "a", "c"]
    assert "spacing is 5 mm; inverted" in texts


@pytest.mark.parametrize(
    ("dice", "shown"),
    [
        ([0.8, 0.5, 0.9, None, 0.7, 0.6], [("Worst", "b"), ("Median", "e"), ("Best", "c")]),
        ([0.8, 0.5], [("Worst", "b"), ("Best", "a")]),
        ([None, 0.5], [("The only case", "b")]),
        ([None], []),
    ],
)
def test_worst_median_and_best_case_are_shown(tmp_path, dice, shown):
    label = np.ones((4, 4, 4), np.uint8)
    loaded = []

    def load_case(case_id):
        loaded.append(case_id)
        return label[..., None].astype(np.float32), label, label, (1, 1, 1)

    scores = scores_of(list(zip("abcdef", dice, strict=False)))
    page = Page(write(tmp_path, scores=scores, load_case=load_case)[0])
    assert loaded == [case_id for _, case_id in shown]
    assert [t for t in page.texts if re.match("Worst:|Median:|Best:|The only", t)] == [
        f"{heading}: {case_id}" for heading, case_id in shown
    ]
    assert len(page.all_of("img")) == 9 * len(shown)


def test_planes_are_shown_as_radiologists_look_at_them(tmp_path):
    # Voxel (6, 7, 5) of 8: right, at the front, above the middle; 24 pixels per mm.
    label = np.zeros((8, 8, 8), np.uint8)
    label[6, 7, 5] = 2
    page = Page(write(tmp_path, **one_case(label, spacing_mm=(1.0, 1.0, 0.5)))[0])
    axial, coronal, sagittal = (
        frame_of(page, plane, "reference", place) for plane, place in enumerate((5, 7, 6))
    )
    expected = np.zeros((192, 192))
    expected[:24, 24:48] = 2  # second from the patient's right, foremost
    np.testing.assert_array_equal(axial, expected)
    expected = np.zeros((96, 192))
    expected[24:36, 24:48] = 2  # third from the top, 12 pixels high
    np.testing.assert_array_equal(coronal, expected)
    expected = np.zeros((96, 192))
    expected[24:36, :24] = 2
    np.testing.assert_array_equal(sagittal, expected)
    assert not frame_of(page, 0, "reference", 4).any()
    ends = [text for text in page.texts if text in "RLAPSI"]
    assert "".join(ends) == "RLAP" + "RLSI" + "APSI"  # left, right, top, bottom
    aspects = [a["style"] for a in page.all_of("figure", **{"class": "plane"})]
    assert aspects == ["--aspect:1.00000", "--aspect:2.00000", "--aspect:2.00000"]


def test_the_prediction_is_outlined_over_the_image(tmp_path):
    label = np.zeros((24, 24, 24), np.uint8)
    prediction = label.copy()
    prediction[8:16, 8:16, 8:16] = 1
    image = (1000.0 * prediction[..., None]).astype(np.float32)
    page = Page(write(tmp_path, **one_case(label, prediction, image=image))[0])
    outline = frame_of(page, 0, "prediction", 12)
    expected = np.zeros((192, 192))
    expected[64:128, 64:128] = 1
    expected[65:127, 65:127] = 0
    np.testing.assert_array_equal(outline, expected)
    assert not frame_of(page, 0, "reference", 12).any()
    grey = frame_of(page, 0, "image", 12)
    assert grey[72:120, 72:120].min() > 240 and grey[:56].max() < 15


def test_labels_have_the_colours_of_the_legend(tmp_path):
    label = np.ones((4, 4, 4), np.uint8)
    label[2:] = 9  # the colours start again after seven
    names = ["background", *(f"class {i}" for i in range(1, 10))]
    options = one_case(label) | {"scores": scores_of([("a", 0.8)], names)}
    page = Page(write(tmp_path, **options)[0])
    uri = page.all_of("img", **{"class": "reference"})[0]["src"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as sprite:
        colours = np.asarray(sprite.convert("RGBA"))[0, [0, 191]]
    assert ["#" + bytes(c[:3]).hex() for c in colours] == [
        plots.CLASS_COLOURS[1].lower(),
        plots.CLASS_COLOURS[0].lower(),
    ]
    assert (colours[:, 3] == 255).all()
    chips = [a["style"] for a in page.all_of("i")]
    assert chips == [f"background:{plots.CLASS_COLOURS[i % 7]}" for i in range(9)]


def test_a_plane_opens_at_the_slice_with_most_voxels_wrong(tmp_path):
    label = np.zeros((6, 6, 100), np.uint8)
    label[1:5, 1:5, 50:60] = 1
    label[:, :, 51] = 1  # more to see, nothing wrong
    prediction = label.copy()
    prediction[2, 2, 53] = 0
    prediction[2, 2:4, 57] = 0
    page = Page(write(tmp_path, **one_case(label, prediction, spacing_mm=(1, 1, 2)))[0])
    axial = page.all_of("input", type="range")[0]
    slices = [int(n) for n in axial["data-slices"].split(",")]
    assert slices == list(range(41, 71))  # 20 mm around the structure, counted from 1
    start = int(axial["value"])
    assert slices[start] == 58
    style = page.all_of("div", **{"class": "frame"})[0]["style"]
    columns = int(axial["data-columns"])
    assert style.endswith(f"--column:{start % columns};--row:{start // columns}")
    assert page.texts[page.texts.index("58") + 1] == "of 100"


def test_long_volumes_are_scrolled_in_steps(tmp_path):
    label = np.ones((6, 6, 118), np.uint8)
    page = Page(write(tmp_path, **one_case(label))[0])
    axial = page.all_of("input", type="range")[0]
    assert axial["data-slices"] == ",".join(str(n) for n in range(1, 119, 3))


def test_a_picture_is_one_plane_in_its_colours(tmp_path):
    image = np.zeros((80, 160, 1, 3), np.float32)
    image[:40, :, 0, 0] = 255  # the upper half is red
    label = np.zeros((80, 160, 1), np.uint8)
    label[:20, :80, 0] = 1
    page = Page(write(tmp_path, **one_case(label, spacing_mm=None, image=image))[0])
    assert [a["class"] for a in page.all_of("img")] == ["image", "reference", "prediction"]
    assert page.all_of("input", type="range") == []
    shown = frame_of(page, 0, "image", 0)
    assert shown.shape == (320, 640, 3)
    np.testing.assert_allclose(shown[:150].mean((0, 1)), (255, 0, 0), atol=4)
    np.testing.assert_allclose(shown[170:].mean((0, 1)), (0, 0, 0), atol=4)
    expected = np.zeros((320, 640))
    expected[:80, :320] = 1
    np.testing.assert_array_equal(frame_of(page, 0, "reference", 0), expected)


def test_one_slice_of_a_volume_is_one_plane_and_its_first_channel(tmp_path):
    label = np.ones((8, 8, 1), np.uint8)
    image = np.zeros((8, 8, 1, 3), np.float32)
    image[..., 0] = np.arange(8)[:, None, None]
    page = Page(write(tmp_path, **one_case(label, image=image))[0])
    assert len(page.all_of("img")) == 3
    grey = frame_of(page, 0, "image", 0)
    assert grey.ndim == 2 and grey[96, 0] > 240 > 15 > grey[96, -1]  # the right is on the left
    assert "Dice 0.800, channel 1 of 3" in page.texts


def test_an_image_of_one_value_is_black(tmp_path):
    label = np.ones((8, 8, 8), np.uint8)
    image = np.full((8, 8, 8, 1), 1e9, np.float32)
    page = Page(write(tmp_path, **one_case(label, image=image))[0])
    assert (frame_of(page, 0, "image", 3) == 0).all()


def test_nothing_to_see_is_no_reason_to_fail(tmp_path):
    label = np.zeros((60, 8, 8), np.uint8)
    page = Page(write(tmp_path, **one_case(label))[0])
    assert page.all_of("input", type="range")[2]["data-slices"].split(",")[-1] == "60"


def members_of(kind, chosen=None, **changes):
    """As `finish.summarise_members` has them, of two members and two classes."""
    rows = [
        {"seed": 3, "fold": 0, "learning_rate": 0.01, "num_cases": 2, "dice": 0.75},
        {"seed": 4, "fold": 1, "learning_rate": 0.001, "num_cases": 5, "dice": 0.85},
    ]
    for row, dice in zip(rows, ([0.7, None], [0.8, 0.9]), strict=True):
        row["dice_by_class"] = dice
    found = {"mean": 0.8, "sd": 0.0707107, "interval": [0.1646898, 1.4353102], "num": 2}
    alone = {"mean": 0.9, "sd": None, "interval": [None, None], "num": 1}
    members = {"kind": kind, "set": "test", "chosen": chosen, "members": rows}
    if chosen is None:
        members["summary"] = {"dice": found, "dice_by_class": [found, alone]}
    return members | changes


def full_content(name, case_id):
    """Everything a report can hold, with one text in every place that takes any."""
    label = np.ones((4, 4, 4), np.uint8)
    bins = [
        {"confidence": 0.4, "accuracy": 0.5, "count": 3},
        {"confidence": 0.9, "accuracy": 0.8, "count": 7},
    ]
    return content_of(
        title=name,
        scores=scores_of([(case_id, 0.7), ("b", 0.8)], ["background", name, "tumour"]),
        curves=[
            {"step": 1, "loss": 0.5, "member_loss": [0.4, 0.6]},
            {"step": 2, "val_loss": 0.4, "val_dice": 0.7, "member_val_dice": [0.7, None]},
        ],
        members=members_of("seeds"),
        calibration={
            **{"set": "test", "num_voxels": 12345, "temperature": 1.25},
            **{"ece_before": 0.1234, "ece_after": 0.0456, "nll_before": 0.9, "nll_after": 0.8},
            **{"bins_before": bins, "bins_after": bins},
        },
        decisions=[
            {
                "step": {"name": "remove_small", "classes": [1, 2], "min_volume_mm3": 10.0},
                **{"dice_before": 0.91234, "dice_after": 0.92345, "kept": True},
            },
            {
                "step": {"name": "keep_largest", "classes": [2], "together": True},
                **{"dice_before": 0.92345, "dice_after": float("nan"), "kept": False},
            },
        ],
        config=f'{{\n  "name": "{name}"\n}}\n',
        versions={"jax": "0.10.2", name: name},
        sha256="abc123",
        flags={case_id: [name]},
        load_case=lambda case_id: (label[..., None] * 1.0, label, label, (1, 1, 1)),
    )


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """Function from a name to the (HTML, Markdown) of `full_content` of it."""

    @functools.cache
    def report_of(name):
        folder = tmp_path_factory.mktemp("report")
        report.write_report(str(folder), full_content(name, name))
        return (folder / "report.html").read_text(), (folder / "report.md").read_text()

    return report_of


def test_a_name_can_not_change_the_page(full_report):
    plain, hostile = (Page(full_report(name)[0]) for name in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    for (_, attributes), (_, others) in zip(hostile.elements, plain.elements, strict=True):
        assert attributes.keys() == others.keys()
    assert [text.replace(HOSTILE, "plain") for text in hostile.texts] == plain.texts
    assert sum(HOSTILE in text for text in hostile.texts) == 13
    assert {tag for tag, _ in hostile.drawn_elements} == {tag for tag, _ in plain.drawn_elements}
    assert HOSTILE[:23] + "…" in hostile.drawn_texts


def test_a_name_can_not_change_the_markdown(full_report):
    names = ("plain", HOSTILE.replace("`", "`\n# heading\n"))
    plain, hostile = (full_report(n)[1].partition("Config:")[0].splitlines() for n in names)
    assert len(hostile) == len(plain)
    for line, other in zip(hostile, plain, strict=True):
        shown = re.sub(r"\\[^a-z]", "", line)  # what is escaped is text
        assert shown.count("|") == other.count("|")
        assert not set(shown.removeprefix("> ")) & set("<>`$")
        assert line.startswith("#") == other.startswith("#")


def test_config_stays_a_block_of_code(tmp_path):
    markdown = write(tmp_path, config='{\n  "a": "```",\n  "b": 1\n}')[1]
    assert markdown.endswith('    {\n      "a": "```",\n      "b": 1\n    }\n')


def test_the_page_needs_nothing_beside_it(full_report):
    text = full_report("plain")[0]
    page = Page(text)
    for _, attributes in page.elements + page.drawn_elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert set(re.findall(r"url\(.", text)) <= {"url(#"}
    assert "@import" not in text
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # names of SVG
    policy = page.all_of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"].startswith("default-src 'none'; img-src data:;")


def test_all_that_is_known_is_reported(full_report):
    page, markdown = full_report("plain")
    texts, drawn = Page(page).texts, Page(page).drawn_texts
    for text in ("0.1234", "0.0456", "0.9123", "0.9234", "abc123", "0.10.2"):
        assert text in texts and text in markdown
    assert "| remove small | plain, tumour; min\\_volume\\_mm3 10 | 0.9123 | 0.9234 | yes |" in (
        markdown
    )
    assert "| keep largest | tumour; together | 0.9234 | – | no |" in markdown
    assert {"keep largest", "tumour; together", "plain, tumour; min_volume_mm3 10"} <= set(texts)
    assert any("temperature of 1.250" in text and "12,345 voxels" in text for text in texts)
    assert {"loss", "mean validation Dice (whole cases)", "calibration"} <= set(drawn)


@pytest.mark.parametrize("kind", ["seeds", "folds"])
def test_members_have_rows_and_an_interval_of_their_spread(tmp_path, kind):
    page, markdown = write(tmp_path, members=members_of(kind))
    name, first, second, words = {
        "seeds": ("seed", 3, 4, "says nothing about other subjects"),
        "folds": ("fold", 0, 1, "too narrow, since folds share training subjects"),
    }[kind]
    assert f"| member | {name} | cases | mean | liver | tumour |" in markdown
    assert f"| 0 | {first} | 2 | 0.750 | 0.700 | – |\n" in markdown
    assert f"| 1 | {second} | 5 | 0.850 | 0.800 | 0.900 |\n" in markdown
    interval = "0.800 ± 0.071 (0.165 to 1.435; n = 2)"
    assert f"Student's t) | | | {interval} | {interval} | 0.900 ± – (– to –; n = 1) |" in markdown
    texts = Page(page).texts
    start = texts.index("Members")
    assert texts[start + 8 : start + 14] == ["0", str(first), "2", "0.750", "0.700", "–"]
    assert texts.count("0.800 ± 0.071") == texts.count("0.165 to 1.435") == 2
    assert words in markdown and words in " ".join(texts)
    assert "(used)" not in page + markdown


def test_of_learning_rates_the_one_that_is_used_is_marked(tmp_path):
    page, markdown = write(tmp_path, members=members_of("rates", chosen=1))
    assert "| 0 | 0.01 | 2 | 0.750 |" in markdown
    assert "| 1 (used) | 0.001 | 5 | 0.850 |" in markdown
    assert "1 (used)" in Page(page).texts
    assert "Student" not in page + markdown
    for text in (" ".join(Page(page).texts), markdown):
        assert "choice was made on these very cases" in text
        assert "The network has the best of 2 learning rates" in text


def test_each_member_has_a_learning_curve(full_report):
    drawn = Page(full_report("plain")[0]).drawn_texts
    assert drawn.count("seed 3") == 2 and drawn.count("seed 4") == 1  # it has no validation Dice


@pytest.mark.parametrize(
    ("kind", "set_name", "words"),
    [
        (
            "seeds",
            "test",
            "Held-out test subjects: nothing was trained on them or chosen by them. A",
        ),
        ("seeds", "val", "is the average of 2 networks that differ in their seed"),
        ("folds", "test", "A prediction is the average of 2 networks, one of each fold"),
        ("folds", "val", "Cross-validated: each case was predicted by the member that was not"),
    ],
)
def test_it_says_which_networks_made_the_predictions(tmp_path, kind, set_name, words):
    page, markdown = write(tmp_path, set_name=set_name, members=members_of(kind))
    assert words in markdown and words in " ".join(Page(page).texts)
    is_pooled = (kind, set_name) == ("folds", "val")
    assert is_pooled == ("none of them was trained on" not in markdown and set_name == "val")


@pytest.mark.parametrize(
    ("members", "line"),
    [
        (
            members_of("folds"),
            "mean test Dice of a member alone 0.8000 ± 0.0707 (95 % interval 0.1647 to 1.4353) "
            "over 2 folds",
        ),
        (
            members_of("rates", chosen=0, set="val"),
            "mean val Dice of each learning rate: 0.01: 0.7500, 0.001: 0.8500; 0.01 is used",
        ),
    ],
)
def test_members_in_one_line(members, line):
    assert report_numbers.describe_members(members) == line


def test_what_is_not_known_has_no_section(tmp_path):
    page, markdown = write(tmp_path)
    headings = {"Training", "Calibration", "Post-processing", "Cases", "Config"}
    assert not headings & set(Page(page).texts)
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == [
        "## Scores",
        "## All cases",
        "## Origin",
    ]


@pytest.mark.parametrize(
    ("set_name", "words"),
    [
        ("test", "Held-out test subjects"),
        ("val", "choices of the training were made by them"),
        ("evaluation", "do not tell whether these subjects were held out"),
    ],
)
def test_it_says_what_the_figures_are_worth(tmp_path, set_name, words):
    page, markdown = write(tmp_path, set_name=set_name)
    for text in (" ".join(Page(page).texts), markdown):
        assert words in text and "For research; not a medical device." in text


def test_the_markdown_shows_the_pictures_that_are_there(tmp_path):
    assert "![" not in write(tmp_path)[1]
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "report.md"}
    for name in ("test.png", "curves.png", "val.png"):
        (tmp_path / name).write_bytes(b"")
    assert re.findall(r"!\[.*\]\((.*)\)", write(tmp_path)[1]) == ["test.png", "curves.png"]


def test_the_same_content_gives_the_same_file(tmp_path, full_report):
    report.write_report(str(tmp_path), full_content("plain", "plain"))
    assert (tmp_path / "report.html").read_text() == full_report("plain")[0]


def test_a_page_of_noisy_volumes_can_be_mailed(tmp_path):
    image = np.random.default_rng(0).normal(size=(120, 120, 120, 1)).astype(np.float32)
    label = np.zeros(image.shape[:3], np.uint8)
    label[30:90, 30:90, 30:90] = 1
    scores = scores_of([("a", 0.7), ("b", 0.8), ("c", 0.9)])
    write(tmp_path, scores=scores, load_case=lambda _: (image, label, label, (1, 1, 1)))
    assert 1e6 < (tmp_path / "report.html").stat().st_size < 8e6
