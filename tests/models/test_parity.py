"""The networks against PyTorch: logits, loss, and the gradient of every parameter and the image.

Weights go through the converter users have, `transfer.from_torch`. Errors are relative to the
largest absolute value of the tensor compared; `pytest -s` prints the largest of each network.

Where a ReLU's input is within rounding of 0, one side may take the other slope. Outputs do not
show it; gradients do, by up to some per cent, and torch's own float32 and float64 differ as much.
So a small network sees an image that keeps all such inputs away from 0. A published one has ten
million of them: outputs are compared on every image, and gradients have to agree on one.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxseg.models import fcn
from jaxseg.models.blocks import Style
from jaxseg.models.encoders import VGG16, ResNet
from jaxseg.models.fcn import FCN
from jaxseg.models.unet import UNet
from jaxseg.training import losses, transfer

torch = pytest.importorskip("torch")
networks = pytest.importorskip("torch_networks")

# Statistics of few voxels, layer upon layer, amplify rounding: ResNet-50's "batch maps" are 1.5e-4
# off torch's in float64, as torch's in float32 are.
TOLERANCES = {
    "logits": 1e-5,
    "loss": 2e-6,
    "statistics": 1e-5,
    "gradient": 1e-4,
    "maps": 1e-5,
    "batch maps": 1e-3,
}
# Small networks take most of their time to compile.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = (8, 16, 24)


def randomise(network):
    """Kernels that keep the scale of what passes; scales, shifts and statistics off 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                torch.nn.init.kaiming_normal_(tensor, generator=generator)
            elif tensor.ndim == 1:
                tensor.uniform_(-0.3, 0.3, generator=generator)
                if name.endswith(("weight", "var")):
                    tensor += 1
    return network


class KinkDistance(torch.overrides.TorchFunctionMode):
    """Notes how near to 0, where the slope changes, any input of a ReLU comes."""

    smallest = np.inf

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.relu, torch.nn.functional.leaky_relu):
            self.smallest = min(self.smallest, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


def images(shape):
    return (
        np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for seed in itertools.count()
    )


def image_away_from_kinks(network, shape):
    """The first image for which rounding, some 1e-6, decides no slope."""
    for image in itertools.islice(images(shape), 50):
        with torch.no_grad(), KinkDistance() as kinks:
            network(to_torch(image))
        if kinks.smallest > 1e-5:
            return image
    raise AssertionError("every image brings a ReLU's input near 0: take a smaller shape")


def to_torch(x):
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def to_ours(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def converted(network, model, image):
    """Our variables with the network's weights; every array finds its place."""
    state = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    target = {"params": target["params"], "batch_stats": target.get("batch_stats", {})}
    variables, _ = transfer.adapt(transfer.from_torch(state), target, strict=True)
    return variables


class Errors:
    """The largest absolute and relative error of a comparison, by what was compared."""

    def __init__(self, name):
        self.name, self.rows = name, {}

    def add(self, kind, ours, theirs):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        scale = max(theirs.max(), -theirs.min())
        assert scale > 0, f"{kind}: nothing to compare"
        difference = ours - theirs
        absolute = max(difference.max(), -difference.min())
        before = self.rows.get(kind, (0.0, 0.0))
        self.rows[kind] = (max(before[0], absolute), max(before[1], absolute / scale))

    def __str__(self):
        rows = (f"{kind} {a:.1e} abs {r:.1e} rel" for kind, (a, r) in self.rows.items())
        return f"{self.name}: {'  '.join(rows)}"

    def check(self, *kinds):
        for kind in kinds or self.rows:
            assert self.rows[kind][1] < TOLERANCES[kind], f"{kind} of {self}"


def comparison(name, model, network, shape, num_classes, compiler_options=None):
    """A function from an image to the `Errors` of a training step without its update."""
    label = np.random.default_rng(1).integers(num_classes, size=shape[:-1]).astype(np.int32)
    variables = converted(network, model, np.zeros(shape, np.float32))

    def loss_fn(params, image):
        outputs, updated = model.apply(
            variables | {"params": params}, image, train=True, mutable=["batch_stats"]
        )
        loss = losses.supervise(
            losses.dice_cross_entropy_loss, outputs, jnp.asarray(label), jnp.ones(label.shape)
        )
        return loss.mean(), (outputs, updated)

    step = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    step = jax.jit(step, compiler_options=compiler_options)

    def errors_for(image):
        (loss, (outputs, updated)), (grads, image_grad) = step(variables["params"], image)

        image_torch = to_torch(image).requires_grad_()
        network.zero_grad()
        outputs_torch = network(image_torch)
        loss_torch = networks.supervised(outputs_torch, torch.tensor(label, dtype=torch.int64))
        loss_torch.backward()

        errors = Errors(name)
        if not isinstance(outputs, tuple):
            outputs, outputs_torch = (outputs,), (outputs_torch,)
        for ours, theirs in zip(outputs, outputs_torch, strict=True):
            errors.add("logits", ours, to_ours(theirs))
        errors.add("loss", loss, loss_torch.item())
        grads = flatten_dict(grads, sep="/")
        expected = {n: p.grad.numpy() for n, p in network.named_parameters()}
        expected = transfer.from_torch(expected)["params"]
        assert grads.keys() == expected.keys()
        for path, grad in expected.items():
            errors.add("gradient", grads[path], grad)
        errors.add("gradient", image_grad, to_ours(image_torch.grad))
        if variables["batch_stats"]:
            add_statistics(errors, variables, updated, network, math.prod(shape[:-1]))
        return errors

    return errors_for


def add_statistics(errors, variables, updated, network, num_voxels):
    """Compares running statistics; torch's variance is the unbiased one, ours the biased."""
    before = flatten_dict(variables["batch_stats"], sep="/")
    ours = flatten_dict(updated["batch_stats"], sep="/")
    state = {n: t.numpy() for n, t in network.state_dict().items() if "running" in n}
    for path, theirs in transfer.from_torch(state)["batch_stats"].items():
        if path.endswith("var"):
            n = num_voxels / 4 ** int(re.search(r"(?:stage|up)(\d)", path)[1])
            kept = 0.9 * before[path]
            theirs = kept + (theirs - kept) * (n - 1) / n
        errors.add("statistics", ours[path], theirs)


def compare_small(name, model, network, shape, num_classes):
    image = image_away_from_kinks(randomise(network), shape)
    errors = comparison(name, model, network, shape, num_classes, COMPILE_FAST)(image)
    print(f"\n{errors}")
    errors.check()


def compare_published(name, model, network, shape, num_classes):
    errors_for = comparison(name, model, randomise(network), shape, num_classes)
    for image in itertools.islice(images(shape), 8):
        errors = errors_for(image)
        print(f"\n{errors}")
        errors.check("logits", "loss")
        if errors.rows["gradient"][1] < TOLERANCES["gradient"]:
            return
    errors.check()


@pytest.mark.parametrize(
    ("name", "shape", "options", "torch_options"),
    [
        ("plain 2D", (2, 24, 16, 2), {}, {}),
        ("plain 3D", (1, 8, 16, 12, 1), {}, {}),
        ("plain 2D, batch norm", (3, 24, 16, 2), {"norm": "batch"}, {"norm": "batch"}),
        ("plain 2D, group norm", (2, 24, 16, 2), {"norm": "group"}, {"norm": "group"}),
        (
            "anisotropic 3D",
            (1, 4, 16, 12, 1),
            {"kernel_sizes": ((1, 3, 3), 3, 3), "strides": ((1, 2, 2), 2)},
            {"kernels": [(1, 3, 3), 3, 3], "strides": [(1, 2, 2), 2]},
        ),
        (
            "coarser than the image, 3D",
            (1, 8, 16, 16, 1),
            {"strides": (2, (1, 2, 2), 2)},
            {"strides": [2, (1, 2, 2), 2]},
        ),
        (
            "residual and coarser than the image, 2D",
            (2, 24, 32, 1),
            {
                "encoder": "residual",
                "num_convs": (1, 2, 2),
                "decoder_convs": 1,
                "strides": ((2, 4), 2, 2),
            },
            {"blocks": (1, 2, 2), "decoder_convs": 1, "strides": [(2, 4), 2, 2]},
        ),
        ("attention 2D", (2, 24, 16, 1), {"attention": True}, {"attention": True}),
        ("attention 3D", (1, 8, 8, 12, 1), {"attention": True}, {"attention": True}),
        (
            "residual 2D",
            (2, 24, 16, 1),
            {"encoder": "residual", "num_convs": (1, 2, 3), "decoder_convs": 1},
            {"blocks": (1, 2, 3), "decoder_convs": 1},
        ),
        (
            "residual 3D, anisotropic",
            (1, 4, 16, 12, 1),
            {
                "encoder": "residual",
                "num_convs": (1, 2, 2),
                "decoder_convs": 1,
                "kernel_sizes": ((1, 3, 3), 3, 3),
                "strides": ((1, 2, 2), 2),
            },
            {
                "blocks": (1, 2, 2),
                "decoder_convs": 1,
                "kernels": [(1, 3, 3), 3, 3],
                "strides": [(1, 2, 2), 2],
            },
        ),
    ],
)
def test_modern_unet(name, shape, options, torch_options):
    rank = len(shape) - 2
    network = networks.UNet(rank, shape[-1], 3, SMALL, **torch_options)
    compare_small(name, UNet(3, features=SMALL, **options), network, shape, 3)


@pytest.mark.parametrize("shape", [(2, 32, 48, 1), (1, 16, 16, 8, 1)])
def test_deep_supervision(shape):
    features = (8, 8, 16, 16)
    rank = len(shape) - 2
    network = networks.UNet(rank, 1, 3, features, deep_supervision=True)
    model = UNet(3, features=features, deep_supervision=True)
    compare_small(f"deep supervision {rank}D", model, network, shape, 3)


def test_published_unet():
    network = networks.UNet2015()
    assert sum(p.numel() for p in network.parameters()) == 31_030_658
    model = UNet(
        2,
        features=(64, 128, 256, 512, 1024),
        norm="none",
        activation="relu",
        down="max_pool",
        padding="valid",
    )
    compare_published("U-Net 2015", model, network, (1, 204, 188, 1), 2)


def test_published_fcn(monkeypatch):
    # With its 4096 channels (counted in test_fcn) this takes three times as long.
    monkeypatch.setattr(fcn, "HIDDEN", 64)
    network = networks.FCN8sVGG16(hidden=64)
    model = FCN(21, encoder="vgg16", features=(), head="8s", padding="paper")
    compare_published("FCN-8s VGG16", model, network, (1, 33, 40, 3), 21)


@pytest.mark.parametrize(
    ("num_layers", "train"), [(18, True), (34, False), (50, False), (50, True)]
)
def test_resnet_of_torchvision(num_layers, train):
    network = randomise(networks.ResNet(num_layers)).train(train)
    check_encoder(f"ResNet-{num_layers}", network, f"resnet{num_layers}", train, skip=1)


def test_vgg16_of_torchvision():
    check_encoder("VGG16", randomise(networks.VGG16()), "vgg16", train=False, skip=0)


def check_encoder(name, network, encoder, train, skip):
    """Maps of a published encoder, with weights under torchvision's names."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    style = Style("instance", "relu")
    module = VGG16(style) if encoder == "vgg16" else ResNet(int(encoder[6:]), style)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, False))
    target = {
        collection: {"encoder": jax.tree.map(lambda s: np.ones(s.shape, s.dtype), dict(tree))}
        for collection, tree in ({"params": {}, "batch_stats": {}} | dict(shapes)).items()
    }
    state = {n: tensor.numpy().copy() for n, tensor in network.state_dict().items()}
    variables, report = transfer.adapt(transfer.from_torch(state), target)
    assert not report.unused and not report.adapted
    assert {path.split("/")[1] for path, _ in report.skipped} <= {"full"}
    variables = {collection: tree.get("encoder", {}) for collection, tree in variables.items()}
    maps, _ = jax.jit(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))(
        variables, image
    )
    errors = Errors(f"{name}, {'training' if train else 'evaluating'}")
    for ours, theirs in zip(maps[skip:], network(to_torch(image)), strict=True):
        errors.add("batch maps" if train else "maps", ours, to_ours(theirs))
    print(f"\n{errors}")
    errors.check()
