"""Weights of another network put into ours: names, layouts and shapes, as functions of arrays.

Weights are a "source": {"params": {path: array}, "batch_stats": {path: array}}, with the paths and
layouts of our networks: "encoder/stage0/conv0/kernel" is [*K, C, F].
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxseg.problem import Problem

# The kernels that see the image, of whichever encoder: their input channels are the image's.
IMAGE_KERNELS = frozenset(
    f"encoder/{layer}/kernel"
    for layer in ("stage0/conv0", "stem/conv0", "conv1_1", "conv1", "full/conv0")
)
TRANSPOSED = ("upconv", "upsample")  # how the names of transposed convolutions begin

VGG16_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG16_LAYERS = {
    f"features.{index}": f"encoder.conv{stage}_{i}"
    for stage, indices in enumerate(VGG16_STAGES, start=1)
    for i, index in enumerate(indices, start=1)
}
VGG16_DENSE = {"classifier.0": ("fc6", 7), "classifier.3": ("fc7", 1)}  # width as a convolution

NOT_IN_SOURCE = "not in the source"
SHOWN_LINES, SHOWN_PATHS = 8, 3

Source = dict[str, dict[str, np.ndarray]]


class TransferProblem(Problem, ValueError):
    """The weights do not fit the network."""


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What became of every array; each entry is (path, what was done or why not).

    Attributes:
      loaded: taken as they are.
      adapted: taken with another shape.
      skipped: of the network, and as initialised.
      unused: of the source alone.
    """

    loaded: tuple[tuple[str, str], ...]
    adapted: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    unused: tuple[tuple[str, str], ...]

    def lines(self, brief: bool = False) -> list[str]:
        """Lines of text: counts, then what was not just loaded, all of it or the beginnings."""
        shown_lines, shown_paths = (SHOWN_LINES, SHOWN_PATHS) if brief else (None, None)
        counts = (
            f"{len(self.loaded)} arrays loaded, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped (they stay as initialised), "
            f"{len(self.unused)} of the source unused"
        )
        lines = [counts]
        for kind in ("adapted", "skipped", "unused"):
            paths_by_text: dict[str, list[str]] = {}
            for path, text in getattr(self, kind):
                paths_by_text.setdefault(text, []).append(path)
            groups = [
                f"  {kind} {_listed(paths, shown_paths)}: {text}"
                for text, paths in paths_by_text.items()
            ]
            lines += groups[:shown_lines]
            if rest := len(groups) - len(groups[:shown_lines]):
                lines.append(f"  and {rest} more lines of {kind} arrays")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines(brief=True))


def from_torch(state: dict[str, np.ndarray]) -> Source:
    """Names and layouts of torch made ours.

    Recognises torchvision's VGG16, whose first two fully connected layers become convolutions 7
    and 1 wide, and ResNets. Of any other network layers must be named as ours with dots,
    "encoder.stage0.conv0.weight"; names and layouts that are ours already stay. Convolutions
    [F, C, *K] become [*K, C, F], and so do transposed ones [C, F, *K] (layers "upconv..." and
    "upsample..."); linear layers [F, C] become [C, F]. Counts of batches are dropped; whatever else
    is unknown keeps its name, so that `adapt` reports it as unused.

    Args:
      state: dict from name to NumPy array, as torch's `state_dict`.
    Returns:
      A source (see the top of this file).
    Raises:
      TransferProblem: VGG16 with batch normalisation, which our VGG16 has not; or two arrays that
        become one.
    """
    source: Source = {"params": {}, "batch_stats": {}}
    for name, array in _with_our_layers(state).items():
        *layers, leaf = re.split("[./]", name)
        collection = "params"
        if leaf == "num_batches_tracked":
            continue
        if leaf in ("running_mean", "running_var", "mean", "var"):
            collection, leaf = "batch_stats", leaf.removeprefix("running_")
        elif leaf == "weight" and array.ndim < 2:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "kernel"
            transposed = array.ndim > 2 and layers and layers[-1].startswith(TRANSPOSED)
            inputs, outputs = (0, 1) if transposed else (1, 0)
            array = array.transpose(*range(2, array.ndim), inputs, outputs)
        path = "/".join((*layers, leaf))
        if path in source[collection]:
            raise TransferProblem(f"two arrays of the source would become {path}: rename one")
        source[collection][path] = array
    return source


def _with_our_layers(state):
    """The state with torchvision's layers renamed, and dense layers of VGG16 as convolutions."""
    if "layer1.0.conv1.weight" in state:
        return {_resnet_name(name): array for name, array in state.items()}
    if any(re.fullmatch(r"features\.\d+\.running_mean", name) for name in state):
        raise TransferProblem(
            "these are weights of a VGG with batch normalisation (vgg16_bn), which jaxseg's VGG16 "
            "does not have: take torchvision's vgg16 instead"
        )
    if not {f"{layer}.weight" for layer in VGG16_LAYERS} <= state.keys():
        return state
    renamed = {}
    for name, array in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer in VGG16_DENSE:
            layer, width = VGG16_DENSE[layer]
            if array.ndim == 2 and array.shape[1] % width**2 == 0:
                array = array.reshape(len(array), -1, width, width)
        renamed[f"{VGG16_LAYERS.get(layer, layer)}.{leaf}"] = array
    return renamed


def _resnet_name(name):
    if name.startswith("fc."):
        return name
    name = re.sub(r"^layer(\d+)\.(\d+)\.", r"layer\1_\2.", name)
    name = name.replace("downsample.0.", "downsample_conv.")
    return "encoder." + name.replace("downsample.1.", "downsample_bn.")


def adapt(
    source: Source, target: dict[str, Any], *, strict: bool = False
) -> tuple[dict[str, Any], TransferReport]:
    """Puts a source's arrays into a network's, where they fit or can be made to.

    A kernel that sees the image takes another number of channels (`adapt_channels`), and a kernel
    with fewer spatial axes is inflated (`inflate`). What does not fit, as the head of another
    number of classes, stays as it is in the target.

    Args:
      source: as `from_torch` and `jaxseg.run.weights.read_weights` return.
      target: {"params", "batch_stats"}, nested, as freshly initialised.
      strict: allow nothing to be skipped or unused.
    Returns:
      ({"params", "batch_stats"}, report): trees like the target's, with its dtypes, and a
      TransferReport.
    Raises:
      TransferProblem: nothing fits; or not everything does and `strict` is set.
    """
    loaded: list[tuple[str, str]] = []
    adapted: list[tuple[str, str]] = []
    skipped: list[tuple[str, str]] = []
    unused: list[tuple[str, str]] = []
    trees = {}
    for collection, given in source.items():
        leaves = flatten_dict(target[collection], sep="/")
        unused += [(path, _shape(given[path])) for path in given if path not in leaves]
        for path, leaf in leaves.items():
            if path not in given:
                skipped.append((path, NOT_IN_SOURCE))
                continue
            value, text = _fit(path, given[path], leaf.shape)
            if value is None:
                skipped.append((path, text))
                continue
            (adapted if text else loaded).append((path, text or _shape(leaf)))
            leaves[path] = jnp.asarray(value, leaf.dtype)
        trees[collection] = unflatten_dict(leaves, sep="/")

    report = TransferReport(*(tuple(sorted(e)) for e in (loaded, adapted, skipped, unused)))
    if not loaded and not adapted:
        names = sorted(path for given in source.values() for path in given)
        reasons = [f"{path} ({text})" for path, text in report.skipped]
        raise TransferProblem(
            "no array of the source fits the network: the source has "
            f"{_listed(names, SHOWN_PATHS)}; the network {_listed(reasons, SHOWN_PATHS)}"
        )
    if strict and (skipped or unused):
        lines = "\n".join(report.lines())
        raise TransferProblem(f"the weights do not fit exactly, as strict asks:\n{lines}")
    return trees, report


def _fit(path, value, shape):
    """(value with this shape, how it was adapted); or (None, why not)."""
    given_shape, texts = value.shape, []
    layer, _, leaf = path.rpartition("/")
    if leaf == "kernel" and 2 <= value.ndim <= len(shape):
        if path in IMAGE_KERNELS and value.shape[-2] != shape[-2]:
            texts.append(f"from {value.shape[-2]} to {shape[-2]} input channels")
            value = adapt_channels(value, shape[-2])
        for length in shape[value.ndim - 2 : -2]:
            texts.append(f"inflated along a new axis of {length}")
            value = inflate(value, length, layer.rpartition("/")[2])
    if value.shape == shape:
        return value, " and ".join(texts)
    return None, f"{given_shape} in the source, {shape} in the network"


def adapt_channels(kernel: np.ndarray, num_channels: int) -> np.ndarray:
    """Another number of input channels, with about the response to an image of equal channels.

    It is the same for one channel, which gets the sum over the given ones, and for multiples of
    their number n: more channels get them cyclically, n / num_channels as strong (Wightman's rule
    in timm).

    Args:
      kernel: [*K, n, F].
      num_channels: input channels to come.
    Returns:
      [*K, num_channels, F].
    """
    given = kernel.shape[-2]
    if num_channels == 1:
        return kernel.sum(-2, keepdims=True)
    return kernel[..., np.arange(num_channels) % given, :] * np.float32(given / num_channels)


def inflate(kernel: np.ndarray, length: int, layer: str = "") -> np.ndarray:
    """A last spatial axis for a kernel, with the same response where nothing varies along it.

    A convolution's output sees all taps: each is 1 / length of the given one (Carreira and
    Zisserman 2017, I3D). An "upconv" layer's sees one: each is the given one. An "upsample" layer's
    sees two: taps fall off linearly, so that a bilinear kernel becomes trilinear.

    Args:
      kernel: [*K, C, F].
      length: of the new axis.
      layer: name of the kernel's layer.
    Returns:
      [*K, length, C, F].
    """
    profile = np.full(length, 1 / length)
    if layer.startswith("upconv"):
        profile = np.ones(length)
    elif layer.startswith("upsample"):
        profile = 1 - np.abs(np.arange(length) - (length - 1) / 2) / (length / 2)
    return kernel[..., None, :, :] * profile.astype(np.float32)[:, None, None]


def _shape(array):
    return str(array.shape)


def _listed(names, shown):
    rest = len(names) - len(names[:shown])
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest else "")
