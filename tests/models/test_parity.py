"""The networks against PyTorch: logits, loss, and the gradient of every parameter and the image.

Weights go through the converter users have, `transfer.from_torch`. Errors are relative to the
largest absolute value of the tensor compared; `pytest -s` prints the largest of each network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxseg import losses, transfer
from jaxseg.models.blocks import Style
from jaxseg.models.encoders import VGG16, ResNet
from jaxseg.models.fcn import FCN
from jaxseg.models.unet import UNet

torch = pytest.importorskip("torch")
networks = pytest.importorskip("torch_networks")

# Batch statistics of few voxels, layer upon layer, amplify rounding: hence those of "maps".
TOLERANCES = {"logits": 2e-5, "loss": 2e-6, "statistics": 2e-5, "gradient": 2e-4, "maps": 2e-4}
SMALL = (8, 16, 24)


def randomise(network):
    """Kernels that keep the scale of what passes; scales, shifts and statistics off 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                torch.nn.init.kaiming_normal_(tensor, generator=generator)
            elif tensor.ndim == 1:
                noise = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if "var" in name else noise)
    return network


def to_torch(x):
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def to_ours(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def converted(network, model, image):
    """Our variables with the network's weights; every array finds its place."""
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
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
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        scale = np.max(np.abs(theirs))
        assert scale > 0, f"{kind}: nothing to compare"
        absolute = np.max(np.abs(ours - theirs))
        before = self.rows.get(kind, (0.0, 0.0))
        self.rows[kind] = (max(before[0], absolute), max(before[1], absolute / scale))

    def check(self):
        text = "  ".join(f"{k} {a:.1e} abs {r:.1e} rel" for k, (a, r) in self.rows.items())
        print(f"\n{self.name}: {text}")
        for kind, (_, relative) in self.rows.items():
            assert relative < TOLERANCES[kind], f"{self.name}, {kind}: {text}"


def nearest(label, shape):
    for axis, (n, m) in enumerate(zip(label.shape[1:], shape, strict=True), start=1):
        label = label.index_select(axis, torch.tensor([int((i + 0.5) * n / m) for i in range(m)]))
    return label


def torch_loss(outputs, label):
    """The same supervision, written again: coarser scales weigh half, valid logits the centre."""
    if not isinstance(outputs, tuple):
        start = [(n - m) // 2 for n, m in zip(label.shape[1:], outputs.shape[2:], strict=True)]
        for axis, (s, m) in enumerate(zip(start, outputs.shape[2:], strict=True), start=1):
            label = label.narrow(axis, s, m)
        return networks.dice_cross_entropy(outputs, label)
    total = sum(0.5**i for i in range(len(outputs)))
    return sum(
        0.5**i / total * networks.dice_cross_entropy(scale, nearest(label, scale.shape[2:]))
        for i, scale in enumerate(outputs)
    )


def compare(name, model, network, shape, num_classes, train=True):
    """Forward, loss and all gradients of both, in the mode of training."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape).astype(np.float32)
    label = rng.integers(num_classes, size=shape[:-1]).astype(np.int32)
    randomise(network).train(train)
    variables = converted(network, model, image)

    def loss_fn(params, image):
        outputs, updated = model.apply(
            variables | {"params": params}, image, train=train, mutable=["batch_stats"]
        )
        loss = losses.supervise(
            losses.dice_cross_entropy_loss, outputs, jnp.asarray(label), jnp.ones(label.shape)
        )
        return loss.mean(), (outputs, updated)

    step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (loss, (outputs, updated)), (grads, image_grad) = step(variables["params"], image)

    image_torch = to_torch(image).requires_grad_()
    outputs_torch = network(image_torch)
    loss_torch = torch_loss(outputs_torch, torch.tensor(label, dtype=torch.int64))
    loss_torch.backward()
    expected = transfer.from_torch({n: p.grad.numpy() for n, p in network.named_parameters()})

    errors = Errors(name)
    if not isinstance(outputs, tuple):
        outputs, outputs_torch = (outputs,), (outputs_torch,)
    for ours, theirs in zip(outputs, outputs_torch, strict=True):
        errors.add("logits", ours, to_ours(theirs))
    errors.add("loss", loss, loss_torch.item())
    grads = flatten_dict(grads, sep="/")
    assert grads.keys() == expected["params"].keys()
    for path, grad in expected["params"].items():
        errors.add("gradient", grads[path], grad)
    errors.add("gradient", image_grad, to_ours(image_torch.grad))
    if updated.get("batch_stats"):
        ours = flatten_dict(updated["batch_stats"], sep="/")
        state = {n: t.numpy() for n, t in network.state_dict().items() if "running" in n}
        for path, value in transfer.from_torch(state)["batch_stats"].items():
            if path.endswith("mean"):  # torch's running variance is the unbiased one
                errors.add("statistics", ours[path], value)
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
            (1, 3, 16, 12, 1),
            {"kernel_sizes": ((1, 3, 3), 3, 3), "strides": ((1, 2, 2), (1, 2, 2))},
            {"kernels": [(1, 3, 3), 3, 3], "strides": [(1, 2, 2), (1, 2, 2)]},
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
            "residual 3D",
            (1, 8, 8, 12, 1),
            {"encoder": "residual", "num_convs": (1, 2, 2), "decoder_convs": 1},
            {"blocks": (1, 2, 2), "decoder_convs": 1},
        ),
    ],
)
def test_modern_unet(name, shape, options, torch_options):
    rank = len(shape) - 2
    network = networks.UNet(rank, shape[-1], 3, SMALL, **torch_options)
    compare(name, UNet(3, features=SMALL, **options), network, shape, 3)


@pytest.mark.parametrize("shape", [(2, 32, 48, 1), (1, 16, 16, 8, 1)])
def test_deep_supervision(shape):
    features = (8, 8, 16, 16)
    rank = len(shape) - 2
    network = networks.UNet(rank, 1, 3, features, deep_supervision=True)
    model = UNet(3, features=features, deep_supervision=True)
    compare(f"deep supervision {rank}D", model, network, shape, 3)


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
    compare("U-Net 2015", model, network, (1, 204, 188, 1), 2)


def test_published_fcn():
    network = networks.FCN8sVGG16()
    model = FCN(21, encoder="vgg16", features=(), head="8s", padding="paper")
    compare("FCN-8s VGG16", model, network, (1, 33, 40, 3), 21)


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
    state = {n: tensor.numpy() for n, tensor in network.state_dict().items()}
    variables, report = transfer.adapt(transfer.from_torch(state), target)
    assert not report.unused and not report.adapted
    assert {path.split("/")[1] for path, _ in report.skipped} <= {"full"}
    variables = {collection: tree.get("encoder", {}) for collection, tree in variables.items()}
    maps, _ = jax.jit(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))(
        variables, image
    )
    errors = Errors(f"{name}, {'training' if train else 'evaluating'}")
    for ours, theirs in zip(maps[skip:], network(to_torch(image)), strict=True):
        errors.add("maps", ours, to_ours(theirs))
    errors.check()
