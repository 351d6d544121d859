"""Converted and adapted weights, by value: against torch, and by what adaptation promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxseg.models import encoders
from jaxseg.models.blocks import Conv, Style, UpConv
from jaxseg.models.fcn import FCN, Upsample, bilinear_kernel
from jaxseg.models.unet import UNet
from jaxseg.run.weights import read_weights
from jaxseg.training import transfer
from jaxseg.training.transfer import TransferProblem, adapt, adapt_channels, from_torch, inflate

STYLE = Style("batch", "relu")
PUBLISHED_SIZES = {
    "vgg16": 138_357_544,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
}


def vgg16_shapes():
    """Names and shapes of torchvision's vgg16."""
    shapes, given, index = {}, 3, 0
    for features, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(num_convs):
            shapes[f"features.{index}.weight"] = (features, given, 3, 3)
            shapes[f"features.{index}.bias"] = (features,)
            given, index = features, index + 2  # a ReLU follows
        index += 1  # a pooling
    for index, shape in ((0, (4096, 512 * 49)), (3, (4096, 4096)), (6, (1000, 4096))):
        shapes[f"classifier.{index}.weight"] = shape
        shapes[f"classifier.{index}.bias"] = shape[:1]
    return shapes


def resnet_shapes(num_layers):
    """Names and shapes of torchvision's ResNets."""
    shapes = {}

    def conv_bn(conv, bn, features, given, size):
        shapes[f"{conv}.weight"] = (features, given, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{name}"] = (features,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7)
    given, factor = 64, 4 if num_layers == 50 else 1
    num_blocks = (2, 2, 2, 2) if num_layers == 18 else (3, 4, 6, 3)
    for layer, (num, width) in enumerate(zip(num_blocks, (64, 128, 256, 512), strict=True), 1):
        for i in range(num):
            block = f"layer{layer}.{i}"
            widths = ((width, 1), (width, 3), (4 * width, 1)) if factor == 4 else ((width, 3),) * 2
            first = given
            for number, (features, size) in enumerate(widths, 1):
                conv_bn(f"{block}.conv{number}", f"{block}.bn{number}", features, first, size)
                first = features
            if given != factor * width or (layer > 1 and i == 0):
                conv_bn(f"{block}.downsample.0", f"{block}.downsample.1", factor * width, given, 1)
            given = factor * width
    shapes |= {"fc.weight": (1000, given), "fc.bias": (1000,)}
    return shapes


def shapes_of(name):
    return vgg16_shapes() if name == "vgg16" else resnet_shapes(int(name.removeprefix("resnet")))


def random_state(shapes, seed=0):
    """Random weights that keep signals near 1; variances are positive."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if len(shape) > 1:
            values *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            values = 0.5 + np.abs(values)
        state[name] = values.astype(np.int64) if name.endswith("tracked") else values
    return state


def flat(tree):
    return flatten_dict(tree, sep="/")


def shapes_in(model, num_channels, size=64, rank=2):
    image = jax.ShapeDtypeStruct((1, *(size,) * rank, num_channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), image)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_names_and_shapes_fill_the_whole_encoder(name):
    shapes = shapes_of(name)
    counted = [math.prod(s) for n, s in shapes.items() if "running" not in n and "num" not in n]
    assert sum(counted) == PUBLISHED_SIZES[name]  # of torchvision's documentation

    source = from_torch({n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()})
    model = FCN(2, name, ()) if name == "vgg16" else UNet(2, (), name)
    variables = shapes_in(model, 3)
    head = "classifier/6" if name == "vgg16" else "fc"
    rest = {f"{head}/kernel", f"{head}/bias"}
    assert rest < source["params"].keys()
    for collection in ("params", "batch_stats"):
        wanted = {
            path: leaf.shape
            for path, leaf in flat(variables.get(collection, {})).items()
            if path.startswith(("encoder/", "fc")) and not path.startswith("encoder/full")
        }
        given = {p: a.shape for p, a in source[collection].items() if p not in rest}
        assert given == wanted


def vgg16_in_torch(state, x):
    F = pytest.importorskip("torch").nn.functional
    maps = []
    for index in (0, 2, "M", 5, 7, "M", 10, 12, 14, "M", 17, 19, 21, "M", 24, 26, 28, "M"):
        if index == "M":
            maps.append(x)
            x = F.max_pool2d(x, 2)
        else:
            weight, bias = (state[f"features.{index}.{name}"] for name in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
    return maps


def resnet_in_torch(state, x, num_layers):
    F = pytest.importorskip("torch").nn.functional

    def conv_bn(x, conv, bn, stride):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{bn}.{name}"] for name in names))

    x = F.relu(conv_bn(x, "conv1", "bn1", 2))
    maps = [x]
    x = F.max_pool2d(x, 3, 2, 1)
    strides = (1, 2, 1) if num_layers == 50 else (2, 1)
    for layer in range(1, 5):
        i = 0
        while f"layer{layer}.{i}.conv1.weight" in state:
            block = f"layer{layer}.{i}"
            striding = layer > 1 and i == 0
            y = x
            for number, stride in enumerate(strides, 1):
                stride = stride if striding else 1
                y = conv_bn(y, f"{block}.conv{number}", f"{block}.bn{number}", stride)
                y = F.relu(y) if number < len(strides) else y
            if f"{block}.downsample.0.weight" in state:
                stride = 2 if striding else 1
                x = conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = F.relu(x + y)
            i += 1
        maps.append(x)
    return maps


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
def test_a_file_in_torchvisions_names_gives_torchs_feature_maps(name, tmp_path):
    torch = pytest.importorskip("torch")
    shapes = {n: s for n, s in shapes_of(name).items() if not n.startswith(("classifier", "fc"))}
    state = random_state(shapes)
    np.savez(tmp_path / "weights.npz", **state)
    image = np.random.default_rng(1).normal(size=(2, 32, 48, 3)).astype(np.float32)
    num_layers = 0 if name == "vgg16" else int(name.removeprefix("resnet"))
    encoder = encoders.ResNet(num_layers, STYLE) if num_layers else encoders.VGG16(STYLE)
    fresh = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), image, False)),
    )
    target = {c: {"encoder": fresh.get(c, {})} for c in ("params", "batch_stats")}
    variables, report = adapt(read_weights(str(tmp_path / "weights.npz")), target)
    assert not report.unused and not report.adapted
    assert all(path.startswith("encoder/full/") for path, _ in report.skipped)

    variables = {c: tree["encoder"] for c, tree in variables.items() if tree}
    maps = jax.jit(lambda v, x: encoder.apply(v, x, False))(variables, image)
    with torch.no_grad():
        tensors = {n: torch.from_numpy(a) for n, a in state.items()}
        x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        if num_layers:
            expected = resnet_in_torch(tensors, x, num_layers)
            maps = maps[1:]  # the first sees full resolution, which the published network does not
        else:
            expected = vgg16_in_torch(tensors, x)
    for ours, theirs in zip(maps, expected, strict=True):
        theirs = theirs.numpy().transpose(0, 2, 3, 1)
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_fully_connected_layers_become_convolutions():
    rng = np.random.default_rng(0)
    state = {n: np.zeros((1,) * len(s), np.float32) for n, s in vgg16_shapes().items()}
    dense = {0: rng.normal(size=(5, 4 * 49)), 3: rng.normal(size=(6, 5))}
    for index, weight in dense.items():
        state[f"classifier.{index}.weight"] = weight.astype(np.float32)
    params = from_torch(state)["params"]
    pooled = rng.normal(size=(7, 7, 4))
    flattened = pooled.transpose(2, 0, 1).ravel()  # torch flattens channels first
    first = np.einsum("xyc,xycf->f", pooled, params["fc6/kernel"])
    np.testing.assert_allclose(first, dense[0] @ flattened, rtol=1e-4)
    assert params["fc7/kernel"].shape == (1, 1, 5, 6)
    np.testing.assert_allclose(first @ params["fc7/kernel"][0, 0], dense[3] @ first, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["conv", "upconv", "upsample"])
def test_a_converted_convolution_gives_torchs_output(kind, rank):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    names = {"conv": "Conv", "upconv": "ConvTranspose", "upsample": "ConvTranspose"}
    make = getattr(torch.nn, f"{names[kind]}{rank}d")
    layer, ours = {
        "conv": lambda: (make(3, 5, 3, padding=1), Conv(5)),
        "upconv": lambda: (make(3, 5, 2, stride=2), UpConv(5)),
        "upsample": lambda: (make(4, 4, 4, stride=2, bias=False), Upsample(2, True)),
    }[kind]()
    state = {f"up.{kind}0.{n}": p.detach().numpy() for n, p in layer.named_parameters()}
    params = unflatten_dict(from_torch(state)["params"], sep="/")["up"][f"{kind}0"]
    image = torch.randn(2, layer.in_channels, *(5, 6, 4)[:rank])
    expected = np.moveaxis(layer(image).detach().numpy(), 1, -1)
    actual = ours.apply({"params": params}, np.moveaxis(image.numpy(), 1, -1))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_names_of_ours_with_dots_and_leaves_of_torch():
    state = {
        "encoder.stage0.conv0.weight": np.zeros((4, 2, 3, 5)),
        "encoder.stage0.norm0.weight": np.zeros(4),
        "encoder.stage0.norm0.bias": np.zeros(4),
        "encoder.stage0.norm0.running_mean": np.zeros(4),
        "encoder.stage0.norm0.running_var": np.zeros(4),
        "encoder.stage0.norm0.num_batches_tracked": np.zeros(()),
        "classifier.weight": np.zeros((7, 6)),
        "something": np.zeros(9),
        "head/kernel": np.zeros((1, 1, 4, 2)),
    }
    source = from_torch(state)
    assert {path: array.shape for path, array in source["params"].items()} == {
        "encoder/stage0/conv0/kernel": (3, 5, 2, 4),
        "encoder/stage0/norm0/scale": (4,),
        "encoder/stage0/norm0/bias": (4,),
        "classifier/kernel": (6, 7),
        "something": (9,),
        "head/kernel": (1, 1, 4, 2),
    }
    assert set(source["batch_stats"]) == {
        "encoder/stage0/norm0/mean",
        "encoder/stage0/norm0/var",
    }


def test_names_that_collide_are_an_error():
    with pytest.raises(TransferProblem, match="would become norm/scale"):
        from_torch({"norm.weight": np.zeros(2), "norm.scale": np.zeros(2)})


def test_vgg16_with_batch_norm_is_refused():
    state = {"features.0.weight": np.zeros((1, 1, 3, 3)), "features.1.running_mean": np.zeros(1)}
    with pytest.raises(TransferProblem, match="vgg16_bn"):
        from_torch(state)


MODELS = {
    "unet": UNet(2, (8, 16, 32)),
    "residual": UNet(2, (8, 16, 32), "residual"),
    "vgg16": UNet(2, (), "vgg16"),
    "resnet18": UNet(2, (), "resnet18", norm="batch"),
    "fcn": FCN(2, features=(4,) * 5),
    "fcn_vgg16": FCN(2, "vgg16", ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_that_see_the_image_are_those_whose_shape_follows_its_channels(name):
    one, two = (flat(shapes_in(MODELS[name], n)["params"]) for n in (1, 2))
    follow = {path for path in one if one[path].shape != two[path].shape}
    assert follow and follow == transfer.IMAGE_KERNELS & one.keys()


def test_one_channel_responds_as_to_a_grey_image():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)
    grey = np.random.default_rng(1).normal(size=(3, 3, 1))
    expected = np.einsum("xyc,xycf->f", np.repeat(grey, 3, -1), kernel)
    actual = np.einsum("xyc,xycf->f", grey, adapt_channels(kernel, 1))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_more_channels_repeat_cyclically():
    kernel = np.float32([[[[1, 10], [2, 20], [3, 30]]]])
    adapted = adapt_channels(kernel, 5)
    expected = 0.6 * np.array([[1, 10], [2, 20], [3, 30], [1, 10], [2, 20]])
    np.testing.assert_allclose(adapted[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(adapt_channels(kernel, 6).sum(-2), kernel.sum(-2), rtol=1e-6)
    np.testing.assert_allclose(adapt_channels(kernel, 2)[0, 0], 1.5 * kernel[0, 0, :2])
    assert adapted.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "name", "length"),
    [(Conv(4), "conv0", 3), (UpConv(4), "upconv0", 2), (Upsample(2, True), "upsample3", 4)],
)
def test_an_inflated_layer_responds_alike_where_nothing_varies_along_z(layer, name, length):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    params = jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(np.float32),
        layer.init(jax.random.key(0), image)["params"],
    )
    flat_output = layer.apply({"params": params}, image)
    kernel = inflate(params["kernel"], length, name)
    assert kernel.shape == (*params["kernel"].shape[:2], length, 4, 4)
    assert kernel.dtype == np.float32
    volume = np.repeat(image[:, :, :, None], 8, axis=3)
    output = np.asarray(layer.apply({"params": params | {"kernel": kernel}}, volume))
    inside = output[:, :, :, 2:-2]  # away from the zeros beyond the border
    expected = np.repeat(np.asarray(flat_output)[:, :, :, None], inside.shape[3], axis=3)
    np.testing.assert_allclose(inside, expected, atol=1e-4)


def test_an_inflated_bilinear_kernel_is_trilinear():
    inflated = inflate(bilinear_kernel(2, 2, 3), 4, "upsample")
    np.testing.assert_allclose(inflated, bilinear_kernel(2, 3, 3), atol=1e-7)


def init(model, num_channels, rank=2, seed=0):
    """Random variables of a model, and the source they are."""
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        shapes_in(model, num_channels, 16, rank),
    )
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    return variables, {name: flat(tree) for name, tree in variables.items()}


def test_the_same_network_is_loaded_whole():
    model = UNet(2, (4, 8), norm="batch")
    given, source = init(model, 1)
    fresh, _ = init(model, 1, seed=1)
    variables, report = adapt(source, fresh, strict=True)
    assert jax.tree.structure(variables) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, variables, given)
    num = sum(len(arrays) for arrays in source.values())
    assert str(report) == (
        f"{num} arrays loaded, 0 adapted, 0 skipped (they stay as initialised), "
        "0 of the source unused"
    )


def test_other_classes_channels_and_rank_at_once():
    _, source = init(UNet(2, (4, 8), kernel_sizes=((3, 3), (3, 3)), strides=((2, 2),)), 3)
    model = UNet(5, (4, 8), kernel_sizes=((3, 3, 1), 3), strides=((2, 2, 1),))
    fresh, _ = init(model, 1, rank=3, seed=1)
    variables, report = adapt(source, fresh)
    after, before, given = flat(variables["params"]), flat(fresh["params"]), source["params"]

    for path in ("head/kernel", "head/bias"):
        np.testing.assert_array_equal(after[path], before[path])
    assert report.skipped == (
        ("head/bias", "(2,) in the source, (5,) in the network"),
        ("head/kernel", "(1, 1, 4, 2) in the source, (1, 1, 1, 4, 5) in the network"),
    )
    assert not report.unused
    first = "encoder/stage0/conv0/kernel"
    expected = given[first].sum(2)[:, :, None, None]
    np.testing.assert_allclose(after[first], expected, atol=1e-6)
    deep = "encoder/stage1/conv1/kernel"
    for z in range(3):
        np.testing.assert_allclose(after[deep][:, :, z], given[deep] / 3, rtol=1e-6)
    np.testing.assert_array_equal(after["upconv0/kernel"][:, :, 0], given["upconv0/kernel"])
    np.testing.assert_array_equal(after["up0/norm1/scale"], given["up0/norm1/scale"])
    text = "from 3 to 1 input channels and inflated along a new axis of 1"
    assert (first, text) in report.adapted
    assert f"  adapted {first}: {text}" in report.lines()
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(np.float32)}


def test_only_kernels_that_see_the_image_take_other_channels():
    _, source = init(UNet(2, (4, 8)), 1)
    fresh, _ = init(UNet(2, (5, 8)), 1, seed=1)
    variables, report = adapt(source, fresh)
    path = "encoder/stage1/conv0/kernel"
    text = "(3, 3, 4, 8) in the source, (3, 3, 5, 8) in the network"
    assert (path, text) in report.skipped and not report.adapted
    np.testing.assert_array_equal(flat(variables["params"])[path], flat(fresh["params"])[path])


def test_arrays_take_the_dtype_of_the_network():
    given, source = init(UNet(2, (4, 8)), 1)
    fresh = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), given)
    variables, _ = adapt(source, fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}


def test_a_brief_report_names_some_of_many_arrays_with_one_reason():
    fresh, source = init(UNet(2, (4, 8)), 1)
    kernel = source["params"].pop("head/kernel")
    source["params"] |= {f"extra{i:02d}/kernel": kernel for i in range(20)}
    _, report = adapt(source, fresh)
    lines = str(report).splitlines()
    assert lines[1] == "  skipped head/kernel: not in the source"
    names = "extra00/kernel, extra01/kernel, extra02/kernel and 17 more"
    assert lines[2] == f"  unused {names}: (1, 1, 4, 2)"


def test_strict_refuses_what_is_skipped_and_what_is_unused_and_lists_it_all():
    fresh, source = init(UNet(2, (4, 8)), 1)
    extra = {f"extra{i:02d}/kernel": np.zeros(1) for i in range(20)}
    unused = {**source, "params": source["params"] | extra}
    with pytest.raises(TransferProblem, match="strict") as error:
        adapt(unused, fresh, strict=True)
    assert all(name in str(error.value) for name in extra)
    del source["params"]["head/kernel"]
    with pytest.raises(TransferProblem, match="skipped head/kernel: not in the source"):
        adapt(source, fresh, strict=True)


def test_a_report_shows_few_of_many_reasons():
    entries = tuple((f"layer{i:02d}/kernel", f"reason {i}") for i in range(20))
    report = transfer.TransferReport((), (), entries, ())
    lines = str(report).splitlines()
    assert lines[8] == "  skipped layer07/kernel: reason 7"
    assert lines[9:] == ["  and 12 more lines of skipped arrays"]
    assert len(report.lines()) == 21


@pytest.mark.parametrize("strict", [False, True])
def test_weights_of_which_nothing_fits_are_an_error(strict):
    fresh, _ = init(UNet(2, (4, 8)), 1)
    source = {"params": {f"module/w{i}": np.zeros(3) for i in range(5)}, "batch_stats": {}}
    message = (
        "the source has module/w0, module/w1, module/w2 and 2 more; "
        "the network encoder/stage0/conv0/kernel \\(not in the source\\), "
    )
    with pytest.raises(TransferProblem, match=message):
        adapt(source, fresh, strict=strict)


def test_a_network_of_another_width_is_an_error_that_gives_both_shapes():
    _, source = init(UNet(2, (4, 8)), 1)
    fresh, _ = init(UNet(3, (5, 10)), 1)
    shapes = r"\(3, 3, 1, 4\) in the source, \(3, 3, 1, 5\) in the network"
    with pytest.raises(TransferProblem, match=shapes):
        adapt(source, fresh)
