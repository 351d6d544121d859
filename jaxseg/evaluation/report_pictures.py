"""The report's overlays: planes of a case as sprites that a page shows slice by slice.

They are shown as radiologists look at them: the patient's right on the left, the front or the head
up. Each plane is one sprite per layer, a grid of slices, of which the page shows one at a time: the
image as JPEG, the labels as exact PNG. A 512x512x600 CT so takes no more than a brain.
"""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxseg.evaluation.plots import CLASS_COLOURS

# A plane of a volume shows this many slices, this many pixels along the longer side; a picture is
# larger. Three cases of pure noise then stay below 8 MB.
NUM_SLICES = 40
SIDE = 192
PICTURE_SIDE = 640
JPEG_QUALITY = 75
JPEG_BLOCK = 8  # slices of whole blocks do not bleed into their neighbours
MARGIN_MM = 20.0  # shown around the structures

# The axis that is scrolled along, the one that runs down and the one that runs to the right.
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
PICTURE_PLANES = {"picture": (2, 0, 1)}
# Where the ends of each axis point, the far one first, since volumes are shown flipped.
ENDS = ("RL", "AP", "SI")


def planes(
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float] | np.ndarray | None,
) -> Iterator[dict[str, Any]]:
    """Yields what the template needs of each plane of one case.

    Args:
      image: [X, Y, Z] or, of a picture, [X, Y, Z, 3].
      label, prediction: [X, Y, Z], class indices.
      spacing_mm: [3], or None for a picture.
    """
    planes, side, box = PLANES, SIDE, (slice(None),) * 3
    is_picture = spacing_mm is None
    if spacing_mm is None:
        planes, side, spacing_mm = PICTURE_PLANES, PICTURE_SIDE, (1, 1, 1)
    else:
        box = _box_of((label > 0) | (prediction > 0), spacing_mm)
    total = label.shape
    image, label, prediction = image[box], label[box], prediction[box]
    low, span = _window_of(image)
    extent = [n * spacing for n, spacing in zip(label.shape, spacing_mm, strict=True)]

    for name, order in planes.items():
        axis, down, right = order
        if label.shape[down] == 1 or label.shape[right] == 1:
            continue  # a line, not a plane
        count = label.shape[axis]
        slices = np.linspace(0, count - 1, min(count, NUM_SLICES)).round().astype(int)
        grey, reference, predicted = (
            _frames(array, slices, order, flipped=not is_picture)
            for array in (image, label, prediction)
        )
        grey = np.uint8(np.round(255 * np.clip((grey - low) / span, 0, 1)))
        longest = max(extent[down], extent[right])
        size = [
            max(1, round(side * extent[a] / longest / JPEG_BLOCK)) * JPEG_BLOCK
            for a in (right, down)
        ]
        columns = math.ceil(math.sqrt(len(slices)))
        outlined = _outlines(_resized(predicted, size, Image.Resampling.NEAREST))
        filled = _resized(reference, size, Image.Resampling.NEAREST)
        yield {
            "name": name,
            "ends": () if is_picture else (*ENDS[right], *ENDS[down]),
            "aspect": f"{extent[right] / extent[down]:.5f}",
            "columns": columns,
            "rows": math.ceil(len(slices) / columns),
            "slices": [int(n) + 1 + (box[axis].start or 0) for n in slices],
            "total": total[axis],
            "start": _most_wrong(reference, predicted),
            "layers": {
                "image": _jpeg(_sprite(_resized(grey, size, Image.Resampling.BILINEAR), columns)),
                "reference": _png(_sprite(filled, columns)),
                "prediction": _png(_sprite(outlined, columns)),
            },
        }


def _frames(array, slices, order, flipped):
    """Slices of [X, Y, Z, ...] along order[0] as pictures, [N, H, W, ...]."""
    frames = np.take(array, slices, order[0])
    frames = np.flip(frames, order[1:]) if flipped else frames
    return frames.transpose(*order, *range(3, array.ndim))


def _box_of(foreground, spacing_mm):
    """Slices that hold the foreground and `MARGIN_MM` around it; everything if there is none."""
    box = []
    for axis, spacing in enumerate(spacing_mm):
        others = tuple(a for a in range(3) if a != axis)
        places = np.flatnonzero(foreground.any(others))
        margin = math.ceil(MARGIN_MM / spacing)
        first, last = (places[0], places[-1]) if places.size else (0, foreground.shape[axis])
        box.append(slice(max(0, int(first) - margin), int(last) + 1 + margin))
    return tuple(box)


def _window_of(image):
    """The value that is shown black, and how far above it is white: nearly all lie between."""
    steps = tuple(slice(None, None, max(1, n // 128)) for n in image.shape[:3])
    low, high = np.percentile(image[steps], [0.5, 99.5])
    return low, (high - low) or 1.0


def _most_wrong(reference, predicted):
    """The frame with most voxels wrong; if none is, that with most foreground."""
    wrong, present = ((a != b).sum((1, 2)) for a, b in ((reference, predicted), (reference, 0)))
    return int(np.lexsort((present, wrong))[-1])


def _resized(frames, size, resampling):
    """Frames [N, H, W] or [N, H, W, 3] uint8 at (width, height) pixels."""
    pictures = (Image.fromarray(frame).resize(size, resampling) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def _outlines(frames):
    """Keeps of each region of class indices [N, H, W] the pixels that touch another class."""
    lowest, highest = (
        extremum(frames, (1, 3, 3)) for extremum in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    return np.where(lowest != highest, frames, 0).astype(np.uint8)


def _sprite(frames, columns):
    """Frames [N, H, W, ...] side by side in rows, [rows * H, columns * W, ...]."""
    rows = math.ceil(len(frames) / columns)
    height, width = frames.shape[1:3]
    blank = np.zeros((rows * columns - len(frames), *frames.shape[1:]), frames.dtype)
    grid = np.concatenate([frames, blank]).reshape(rows, columns, *frames.shape[1:])
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width, *frames.shape[3:])


def _jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return _data_uri("image/jpeg", buffer)


def _png(classes):
    """Class indices [H, W] as a picture in their colours; background is transparent."""
    codes = "000000" + "".join(colour[1:] for colour in CLASS_COLOURS)
    indices = np.where(classes > 0, (classes - 1) % len(CLASS_COLOURS) + 1, 0)
    picture = Image.fromarray(indices.astype(np.uint8))
    picture.putpalette(bytes.fromhex(codes))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0, bits=4)
    return _data_uri("image/png", buffer)


def _data_uri(kind, buffer):
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
