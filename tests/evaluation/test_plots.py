import xml.etree.ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from jaxseg.evaluation import plots


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count_of(pixels, colour):
    return int((np.abs(pixels - np.asarray(colour)).max(-1) <= 3).sum())


def blended(index, background=0):
    """Colour of a class over a grey of that value."""
    code = plots.CLASS_COLOURS[index - 1]
    colour = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])
    return plots.OVERLAY_ALPHA * colour + (1 - plots.OVERLAY_ALPHA) * background


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    yield saved
    plt.close("all")


def lines_of(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_curves_show_every_number_at_its_step(figures):
    rows = [
        {"step": 10, "loss": 1.0, "images_per_s": 5.0},
        {"step": 20, "loss": None},
        {"step": 20, "val_loss": 0.8, "val_dice": 0.25},
        {"step": 30, "loss": 0.5},
        {"step": 40, "val_loss": 0.7, "val_dice": None},
        {"step": 60, "val_loss": 0.6, "val_dice": 0.75},
    ]
    plots.save_learning_curves("curves.png", rows)
    loss, dice = figures[0].axes
    assert lines_of(loss) == {
        "loss": [[10, 1.0], [30, 0.5]],
        "val_loss": [[20, 0.8], [40, 0.7], [60, 0.6]],
    }
    assert lines_of(dice) == {"val_dice": [[20, 0.25], [60, 0.75]]}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["loss", "val_loss"]
    assert [axis.get_xlabel() for axis in (loss, dice)] == ["step", "step"]


def test_dice_is_shown_against_minutes_where_they_are_known(figures):
    rows = [
        {"step": 10, "minutes": 0.5, "loss": 1.0},
        {"step": 20, "minutes": 1.5, "val_loss": 0.8, "val_dice": 0.25},
        {"step": 60, "minutes": 3.25, "val_loss": 0.6, "val_dice": 0.75},
    ]
    plots.save_learning_curves("curves.png", rows)
    loss, dice = figures[0].axes
    assert lines_of(loss) == {"loss": [[10, 1.0]], "val_loss": [[20, 0.8], [60, 0.6]]}
    assert lines_of(dice) == {"val_dice": [[1.5, 0.25], [3.25, 0.75]]}
    assert [axis.get_xlabel() for axis in (loss, dice)] == ["step", "minutes"]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "val_dice": None}]])
def test_curves_without_some_numbers_are_drawn_all_the_same(tmp_path, rows):
    plots.save_learning_curves(str(tmp_path / "curves.png"), rows)
    assert pixels_of(tmp_path / "curves.png").std() > 0
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert plt.get_fignums() == []


def test_a_sheet_overlays_reference_and_prediction_in_the_colours_of_their_classes(tmp_path):
    image = np.zeros((20, 20))
    label, prediction = np.zeros((2, 20, 20), np.uint8)
    label[:, :10] = 1
    prediction[:10] = 2
    path = str(tmp_path / "sheet.png")
    plots.save_contact_sheet(path, [("a", image, label, prediction, 1.0)], ("bg", "x", "y"))
    pixels = pixels_of(path)
    width = pixels.shape[1] // 3
    columns = [pixels[:, i * width : (i + 1) * width] for i in range(3)]
    area = count_of(columns[0], (0, 0, 0))
    assert area > 10_000
    for column, (first, second) in zip(columns, [(0, 0), (0.5, 0), (0, 0.5)], strict=True):
        assert count_of(column, blended(1)) == pytest.approx(first * area, abs=0.05 * area)
        assert count_of(column, blended(2)) == pytest.approx(second * area, abs=0.05 * area)
    assert plt.get_fignums() == []


def test_the_legend_names_the_classes_but_the_background(figures):
    blank = np.zeros((4, 4))
    label = blank.astype(np.uint8)
    names = ("background", *(f"class {i}" for i in range(9)))
    panels = [("a", blank, label, label, 1.0), ("b", blank, label, label, 2.0)]
    plots.save_contact_sheet("sheet.png", panels, names)
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(names[1:])
    colours = [tuple(np.round(h.get_facecolor(), 3)) for h in legend.legend_handles]
    assert len(set(colours)) == 7 and colours[7:] == colours[:2]
    assert [axis.get_title() for axis in figures[0].axes] == [
        *("a", "reference", "prediction"),
        *("b", "reference", "prediction"),
    ]
    assert [axis.get_aspect() for axis in figures[0].axes] == [1.0] * 3 + [2.0] * 3


def test_more_classes_than_colours_are_overlaid(figures):
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    overlay = plots._coloured(label)
    assert overlay.shape == (3, 4, 4)
    assert (overlay[0, 0] == 0).all()
    assert (overlay.reshape(12, 4)[1:, 3] == plots.OVERLAY_ALPHA).all()
    np.testing.assert_array_equal(overlay.reshape(12, 4)[8], overlay.reshape(12, 4)[1])


def test_extreme_values_do_not_darken_the_rest():
    image = np.tile(np.linspace(0, 100, 50), (50, 1))
    image[0, 0] = 1e6
    shown = plots._rescaled(image)
    assert shown.min() == 0 and shown.max() == 1
    assert np.median(shown) == pytest.approx(0.5, abs=0.02)
    assert (plots._rescaled(np.full((3, 3), 7.0)) == 0).all()


def test_a_colour_image_keeps_its_colours(tmp_path):
    image = np.zeros((20, 20, 3))
    image[:, :10, 0] = 255
    image[:, 10:, 1] = 255
    label = np.zeros((20, 20), np.uint8)
    path = str(tmp_path / "sheet.png")
    plots.save_contact_sheet(path, [("a", image, label, label, 1.0)], ("bg", "x"))
    pixels = pixels_of(path)
    red, green = count_of(pixels, (255, 0, 0)), count_of(pixels, (0, 255, 0))
    assert red > 10_000
    assert red == pytest.approx(green, rel=0.05)


def test_boxes_show_the_quartiles_and_every_case():
    values = [[0.1, 5.0], [0.2, np.nan], [0.3, 7.0], [0.4, np.inf], [0.5, 6.0]]
    figure = plots.draw_boxes(values, ["liver", "tumour"], "Dice")
    (axis,) = figure.axes
    boxes = [patch.get_path().vertices[:-1] for patch in axis.patches]
    reach = [(box[:, 0].min(), box[:, 0].max()) for box in boxes]
    np.testing.assert_allclose(reach, [(0.2, 0.4), (5.5, 6.5)])
    points = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "."]
    assert points == [[0.1, 0.2, 0.3, 0.4, 0.5], [5.0, 7.0, 6.0]]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["liver", "tumour"]
    assert axis.yaxis_inverted()
    plt.close(figure)


def test_a_long_name_leaves_room_for_the_boxes():
    name = "left lateral ventricle, temporal horn, without choroid plexus"
    text = plots.svg_of(plots.draw_boxes, [[0.5]], [name], "Dice")
    assert "left lateral ventricle,…" in text and name not in text


def test_a_class_without_a_case_keeps_its_place():
    figure = plots.draw_boxes([[np.nan, 0.5]], ["liver", "tumour"], "Dice")
    points = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "."]
    assert len(points[0]) == 0
    assert points[1][0, 0] == 0.5 and round(points[1][0, 1]) == 1
    plt.close(figure)


def test_reliability_is_drawn_against_the_diagonal():
    curves = {"before": ([0.5, 0.9], [0.4, 0.7]), "after": ([0.45, 0.8], [0.4, 0.75])}
    figure = plots.draw_reliability(curves)
    assert lines_of(figure.axes[0]) == {
        "ideal": [[0, 0], [1, 1]],
        "before": [[0.5, 0.4], [0.9, 0.7]],
        "after": [[0.45, 0.4], [0.8, 0.75]],
    }
    plt.close(figure)


def test_an_svg_has_the_ink_of_the_page_and_escaped_text():
    names = ["</text><script>", "$\\frac{", "_b"]
    before = dict(plt.rcParams)
    text = plots.svg_of(plots.draw_boxes, [[0.1, 0.2, 0.3]], names, "a & b")
    root = xml.etree.ElementTree.fromstring(text)
    shown = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*names, "a & b"} <= shown
    assert "script" not in {element.tag.partition("}")[2] for element in root.iter()}
    assert "stroke: currentColor" in text and plots._INK not in text
    assert "#000000" not in text  # unseen on a dark page
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before


def test_curves_on_a_page_show_one_panel():
    figure = plots.draw_curves([{"step": 3, "loss": 1.0, "val_loss": 2.0}], *plots.CURVES[0])
    assert lines_of(figure.axes[0]) == {"loss": [[3, 1.0]], "val_loss": [[3, 2.0]]}
    plt.close(figure)


def test_a_name_with_a_dollar_is_no_formula(tmp_path):
    blank = np.zeros((4, 4), np.uint8)
    panels = [("$\\frac{", blank, blank, blank, 1.0)]
    plots.save_contact_sheet(str(tmp_path / "sheet.png"), panels, ("bg", "$_{"))
    assert pixels_of(tmp_path / "sheet.png").std() > 0


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    figure = plt.figure()
    figure.savefig = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        plots._save(figure, str(path))
    plt.close("all")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
