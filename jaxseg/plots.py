"""Pictures of a run: learning curves and contact sheets of overlays."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from jaxseg.writers import replacing

# Wong 2011: colours that readers with colour-vision deficiency can tell apart.
CLASS_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
OVERLAY_ALPHA = 0.7


def save_learning_curves(path, rows):
    """Plots loss and validation Dice over steps.

    Args:
      path: of the PNG.
      rows: dicts with "step" and any of "loss", "val_loss", "val_dice".
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, names, title in (
        (axes[0], ("loss", "val_loss"), "loss"),
        (axes[1], ("val_dice",), "mean validation Dice (whole cases)"),
    ):
        for name in names:
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." * (name != "loss"))
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    _save(figure, path)


def save_contact_sheet(path, panels, class_names):
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


def _rescaled(image):
    low, high = np.percentile(image, [0.5, 99.5])
    return np.clip((image - low) / max(high - low, 1e-8), 0, 1)


def _coloured(label):
    colours = [(0, 0, 0, 0)]
    colours += [
        matplotlib.colors.to_rgba(CLASS_COLOURS[i % len(CLASS_COLOURS)], OVERLAY_ALPHA)
        for i in range(label.max())
    ]
    return np.asarray(colours)[label]


def _save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
