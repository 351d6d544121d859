"""Pictures of a run: learning curves, box plots, calibration, and contact sheets of overlays."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from jaxseg.run.writers import replacing

matplotlib.rcParams["text.parse_math"] = False  # a case or a class may be called "$"

# Wong 2011: colours that readers with colour-vision deficiency can tell apart.
CLASS_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
OVERLAY_ALPHA = 0.7

# Panels of the learning curves: the numbers drawn, the heading, and what they are drawn against.
CURVES = (
    (("loss", "val_loss"), "loss", "step"),
    (("val_dice",), "mean validation Dice (whole cases)", "minutes"),
)

# Stands for the text colour of the page that an SVG is put into.
_INK = "#010203"
_ON_PAGE: dict[Any, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.prop_cycle": cycler(color=CLASS_COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxseg",  # the same numbers give the same file
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg_of(draw: Callable[..., Figure], *args: Any) -> str:
    """Draws a figure as an SVG element whose ink is the text colour of the page around it.

    Args:
      draw: `draw_curves`, `draw_boxes` or `draw_reliability`.
      *args: what it takes.
    Returns:
      str, from "<svg" to "</svg>", with every text of `args` escaped.
    """
    text = io.StringIO()
    with plt.rc_context(_ON_PAGE):
        figure = draw(*args)
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :].strip().replace(_INK, "currentColor")


def save_learning_curves(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plots loss over steps, and validation Dice over minutes.

    Args:
      path: of the PNG.
      rows: dicts with "step" and any of "minutes", "loss", "val_loss", "val_dice".
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, curves in zip(axes, CURVES, strict=True):
        _plot_curves(axis, rows, *curves)
    _save(figure, path)


def draw_curves(
    rows: Sequence[Mapping[str, Any]], names: Iterable[str], title: str, along: str = "step"
) -> Figure:
    """Draws one panel of the learning curves.

    Args:
      rows: as for `save_learning_curves`.
      names: the numbers to draw.
      title: heading.
      along: what they are drawn against, "step" where a row does not say it.
    Returns:
      Figure.
    """
    figure, axis = plt.subplots(figsize=(4.8, 3), layout="constrained")
    _plot_curves(axis, rows, names, title, along)
    return figure


def draw_boxes(
    values: Sequence[Sequence[float | None]] | np.ndarray, class_names: Sequence[str], title: str
) -> Figure:
    """Draws a box plot per class, from the top down, with every case as a point.

    The box reaches from the lower to the upper quartile, its line is the median, the whiskers reach
    to the outermost case within 1.5 box lengths.

    Args:
      values: of one score, [cases, classes]; what is not finite is left out.
      class_names: of these classes.
      title: heading.
    Returns:
      Figure.
    """
    values = np.asarray(values, np.float64)
    figure, axis = plt.subplots(figsize=(4.8, 0.8 + 0.4 * len(class_names)), layout="constrained")
    for place, column in enumerate(values.T):
        column = column[np.isfinite(column)]
        colour = CLASS_COLOURS[place % len(CLASS_COLOURS)]
        line = {"color": plt.rcParams["text.color"]}
        axis.boxplot(
            [column],
            positions=[place],
            orientation="horizontal",
            widths=0.6,
            patch_artist=True,
            showfliers=False,
            boxprops={"facecolor": colour, "edgecolor": line["color"]},
            medianprops=line,
            whiskerprops=line,
            capprops=line,
        )
        # Beside each other in the order of the cases, so that equal values do not hide.
        beside = place + np.linspace(-0.2, 0.2, len(column))
        axis.plot(column, beside, ".", markersize=4, alpha=0.6, **line)
    shown_names = [n if len(n) <= 24 else f"{n[:23]}…" for n in class_names]
    axis.set_yticks(range(len(class_names)), shown_names)
    axis.set(title=title, ylim=(len(class_names) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    return figure


def draw_reliability(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draws how often voxels are right against how sure the network was of them.

    Args:
      curves: dict from a curve's label to (confidence, accuracy) per bin, each [bins] in [0, 1].
    Returns:
      Figure.
    """
    figure, axis = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    axis.plot([0, 1], [0, 1], "--", color=plt.rcParams["text.color"], alpha=0.5, label="ideal")
    for label, (confidence, accuracy) in curves.items():
        axis.plot(confidence, accuracy, ".-", label=label)
    axis.set(xlabel="mean confidence", ylabel="share that is right", title="calibration")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def save_contact_sheet(
    path: str | Path,
    panels: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, float]],
    class_names: Sequence[str],
) -> None:
    """Draws a row per case: image, reference overlay, prediction overlay.

    Args:
      path: of the PNG.
      panels: list of (title, image [H, W] or [H, W, 3] float, label [H, W], prediction [H, W],
        aspect), aspect being the height of a pixel over its width.
      class_names: of all classes, background first.
    """
    figure, axes = plt.subplots(
        len(panels), 3, figsize=(9, 3 * len(panels)), squeeze=False, layout="constrained"
    )
    for row, (title, image, label, prediction, aspect) in zip(axes, panels, strict=True):
        for axis, overlay, heading in zip(
            row, (None, label, prediction), (title, "reference", "prediction"), strict=True
        ):
            axis.imshow(_rescaled(image), cmap="gray", aspect=aspect)
            if overlay is not None:
                axis.imshow(_coloured(overlay), aspect=aspect)
            axis.set_title(heading, fontsize=9)
            axis.axis("off")
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=CLASS_COLOURS[i % len(CLASS_COLOURS)])
        for i in range(len(class_names) - 1)
    ]
    figure.legend(handles, class_names[1:], loc="outside lower center", ncols=4)
    _save(figure, path)


def _plot_curves(axis, rows, names, title, along):
    along = along if all(along in row for row in rows) else "step"
    for name in names:
        points = [(r[along], r[name]) for r in rows if r.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, marker="." * (name != "loss"))
    axis.set(xlabel=along, title=title)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def _rescaled(image):
    low, high = np.percentile(image, [0.5, 99.5])
    return np.clip((image - low) / max(high - low, 1e-8), 0, 1)


def _coloured(label):
    colours: list[tuple[float, ...]] = [(0, 0, 0, 0)]
    colours += [
        matplotlib.colors.to_rgba(CLASS_COLOURS[i % len(CLASS_COLOURS)], OVERLAY_ALPHA)
        for i in range(label.max())
    ]
    return np.asarray(colours)[label]


def _save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
