"""A volume cut over devices: the logits, losses and gradients of the network on the whole of it.

Networks run under `shard_map`. The number of CPU devices can not change once JAX has started, so
that is a process of its own: this file as a script, which writes what it saw as an .npz file. The
float64 one runs the same code with float64 in place of float32: what then differs is the order of
sums alone. Smaller pieces run here, over a mapped axis of `vmap`.
"""

import concurrent.futures
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxseg.models.blocks import Conv
from jaxseg.models.unet import UNet
from jaxseg.training.losses import LOSSES, supervise

pytestmark = pytest.mark.multiprocess

NUM_CLASSES = 3

# name: shape of an image, (batch, space) meshes, loss, fields of the U-Net
CASES = {
    "plain": (
        (16, 5, 6),
        ((1, 1), (1, 2), (1, 4)),
        "dice_cross_entropy",
        {"features": (4, 6, 8), "dropout": 0.5},
    ),
    "residual": (
        (16, 4, 5),
        ((1, 4),),
        "focal",
        {"features": (8, 16), "encoder": "residual", "norm": "group"},
    ),
    "batch": (
        (8, 4, 4),
        ((2, 2),),
        "soft_dice",
        {"features": (4, 6), "norm": "batch", "remat": True},
    ),
    "anisotropic": (
        (16, 6, 4),
        ((1, 2), (1, 4)),
        "tversky",
        {
            "features": (4, 5, 6),
            "kernel_sizes": ((1, 3, 3), 3, (5, 1, 2)),
            "strides": ((1, 2, 2), (2, 2, 1)),
        },
    ),
    "supervised": (
        (32, 9),
        ((1, 4),),
        "cross_entropy",
        {"features": (3, 4, 5, 6), "down": "max_pool", "deep_supervision": True},
    ),
    "flat": (
        (24, 7),
        ((1, 2), (1, 4)),
        "dice_cross_entropy",
        {"features": (4, 6), "kernel_sizes": (4, 3), "strides": (3,), "norm": "none"},
    ),
}
# Of the largest value in an array.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5}
# One process each; float32 is a matter of rounding, so that one network will do.
CASES_OF = {"float64": tuple(CASES), "float32": ("batch",)}
RUNS = [
    (dtype, name, mesh) for dtype in CASES_OF for name in CASES_OF[dtype] for mesh in CASES[name][1]
]

# shape, parts, kernel, strides
CONVOLUTIONS = [
    ((8, 5), 4, (3, 3), (1, 1)),
    ((12, 5), 4, (4, 3), (3, 2)),
    ((8, 5), 2, (1, 1), (2, 1)),
    ((4, 5), 4, (3, 3), (1, 2)),
    ((8, 5, 4), 4, (3, 3, 3), (1, 1, 1)),
    ((8, 5, 4), 4, (3, 3, 3), (2, 1, 2)),
    ((4, 3, 4), 4, (3, 3, 3), (1, 1, 1)),
    ((9, 4, 3), 3, (5, 1, 3), (3, 1, 1)),
    ((6, 5, 4), 3, (1, 3, 3), (1, 2, 2)),
    ((6, 5, 4), 3, (2, 2, 2), (2, 2, 2)),
]

# By the width of a kernel of ones: what it gives along an axis of 12 ones.
ENDS = {
    2: [2] * 11 + [1],
    3: [2] + [3] * 10 + [2],
    4: [3] + [4] * 9 + [3, 2],
    7: [4, 5, 6] + [7] * 6 + [6, 5, 4],
}


def make_case(name, dtype):
    """(model, loss_fn, variables, batch) of noise; some of it does not count."""
    shape, _, loss, options = CASES[name]
    rng = np.random.default_rng(0)
    model = UNet(NUM_CLASSES, num_convs=1, decoder_convs=1, dtype=dtype, **options)
    batch = {
        "image": rng.normal(size=(2, *shape, 2)).astype(dtype),
        "label": rng.integers(0, NUM_CLASSES, (2, *shape)).astype(np.int32),
        "valid": (rng.random((2, *shape)) * (rng.random((2, *shape)) > 0.3)).astype(dtype),
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["image"])
    variables = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size, 9) / 9)).astype(dtype),
        shapes,
    )
    return model, LOSSES[loss], variables, batch


def look(model, loss_fn, variables, batch, axis=None):
    """What one device sees: it differentiates its part of the sum of all devices' losses."""
    stats = variables.get("batch_stats", {})

    def loss_of(params, image):
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(7)},
        )
        loss = supervise(loss_fn, logits, batch["label"], batch["valid"], axis)
        share = 1 if axis is None else 1 / jax.lax.axis_size(axis)
        return share * loss.sum(), {"logits": logits, "loss": loss, "stats": updated}

    grads, seen = jax.grad(loss_of, (0, 1), has_aux=True)(variables["params"], batch["image"])
    return seen | dict(zip(("dparams", "dimage"), grads, strict=True))


def map_parts(model, loss_fn, mesh_shape):
    """`look` at parts of the batch: a function of (variables, batch)."""
    devices = np.asarray(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape)
    model = model.clone(axis_name="batch", space_axis="space")

    def on_part(variables, batch):
        seen = look(model, loss_fn, variables, batch, "space")
        seen["dparams"] = jax.lax.psum(seen["dparams"], ("batch", "space"))
        seen["loss"] = seen["loss"][None]
        seen["stats"] = jax.tree.map(lambda leaf: leaf[None], seen["stats"])
        return seen

    parts = PartitionSpec("batch", "space")
    everywhere = PartitionSpec(("batch", "space"))
    return jax.shard_map(
        on_part,
        mesh=Mesh(devices, ("batch", "space")),
        in_specs=(PartitionSpec(), parts),
        out_specs={
            "logits": parts,
            "dimage": parts,
            "dparams": PartitionSpec(),
            "loss": PartitionSpec("space", "batch"),
            "stats": everywhere,
        },
        check_vma=False,
    )


def flatten(tree, prefix):
    return {
        prefix + jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def run_cases(dtype):
    """{"case (batch, space)|array": values}, and the whole ones as "case whole|array"."""
    facts = {}
    for name in CASES_OF[dtype]:
        model, loss_fn, variables, batch = make_case(name, dtype)
        whole = jax.jit(functools.partial(look, model, loss_fn))(variables, batch)
        facts |= flatten(whole, f"{name} whole|")
        for mesh_shape in CASES[name][1]:
            cut = jax.jit(map_parts(model, loss_fn, mesh_shape))(variables, batch)
            facts |= flatten(cut, f"{name} {mesh_shape}|")
    return facts


def map_space(function, num_parts, out_specs):
    """function(shared, parts) over parts along the second axis of every array in `parts`."""
    return jax.shard_map(
        function,
        mesh=Mesh(jax.devices()[:num_parts], ("space",)),
        in_specs=(PartitionSpec(), PartitionSpec(None, "space")),
        out_specs=out_specs,
        check_vma=False,
    )


def value_and_gradients(conv, params, arrays):
    """Of a convolution of `x` whose result is multiplied by `weight` and summed."""
    value, pull = jax.vjp(lambda p, x: conv.apply({"params": p}, x), params, arrays["x"])
    dparams, dx = pull(arrays["weight"])
    if conv.space_axis is not None:
        dparams = jax.lax.psum(dparams, conv.space_axis)
    return {"value": value, "dx": dx} | {f"d{name}": d for name, d in dparams.items()}


def run_convolutions():
    """Values and gradients of `CONVOLUTIONS`, "convolution 0 whole|array" and "... cut|array".

    Of small whole numbers, so that no order of sums changes a bit.
    """
    facts = {}
    cut_specs = {"value": PartitionSpec(None, "space"), "dx": PartitionSpec(None, "space")}
    cut_specs |= {"dkernel": PartitionSpec(), "dbias": PartitionSpec()}
    for index, (shape, num_parts, kernel_size, strides) in enumerate(CONVOLUTIONS):
        rng = np.random.default_rng(index)
        x, kernel, bias, weight = (
            rng.integers(-4, 5, shape).astype(np.float32)
            for shape in (
                (2, *shape, 2),
                (*kernel_size, 2, 3),
                (3,),
                (2, *(-(-n // s) for n, s in zip(shape, strides, strict=True)), 3),
            )
        )
        conv = Conv(3, kernel_size, strides)
        whole = functools.partial(value_and_gradients, conv)
        cut = functools.partial(value_and_gradients, conv.clone(space_axis="space"))
        cut = map_space(cut, num_parts, cut_specs)
        arguments = {"kernel": kernel, "bias": bias}, {"x": x, "weight": weight}
        facts |= flatten(jax.jit(whole)(*arguments), f"convolution {index} whole|")
        facts |= flatten(jax.jit(cut)(*arguments), f"convolution {index} cut|")
    return facts


def convolve_ones():
    """A line of ones, cut and convolved by ones; "alone": without an exchange."""
    facts, line = {}, np.ones((1, 12, 1, 1), np.float32)
    for width, num_parts in itertools.product(ENDS, (1, 2, 4)):
        kernel = np.ones((width, 1, 1, 1), np.float32)
        for name, axis in (("", "space"), (" alone", None)):
            conv = Conv(1, (width, 1), use_bias=False, space_axis=axis)
            mapped = map_space(conv.apply, num_parts, PartitionSpec(None, "space"))
            result = jax.jit(mapped)({"params": {"kernel": kernel}}, line)
            facts[f"ones {width} {num_parts}{name}"] = np.asarray(result).reshape(-1)
    return facts


def measure_memory():
    """Bytes that the step needs on a device for its temporaries, by number of parts."""
    model, batch = UNet(NUM_CLASSES, features=(4, 8)), (1, 64, 32, 32)
    shapes = {
        "image": jax.ShapeDtypeStruct((*batch, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct(batch, jnp.int32),
        "valid": jax.ShapeDtypeStruct(batch, jnp.float32),
    }
    variables = jax.eval_shape(model.init, jax.random.key(0), shapes["image"])
    loss_fn = LOSSES["dice_cross_entropy"]
    functions = {
        "whole": functools.partial(look, model, loss_fn),
        "parts": map_parts(model, loss_fn, (1, 4)),
    }
    return {
        f"memory of {name}": jax.jit(function)
        .lower(variables, shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for name, function in functions.items()
    }


@pytest.fixture(scope="module")
def runs(quick, run_script, tmp_path_factory):
    """What each process saw, by its dtype."""
    folder = tmp_path_factory.mktemp("runs")

    def run(dtype):
        path = folder / f"{dtype}.npz"
        run_script(__file__, dtype, path, JAX_PLATFORMS="cpu", **quick)
        return dtype, dict(np.load(path))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, TOLERANCES))


def seen_by(facts, name):
    """The arrays that were saved as "name|array"."""
    prefix = f"{name}|"
    return {k.removeprefix(prefix): v for k, v in facts.items() if k.startswith(prefix)}


@pytest.mark.parametrize(("dtype", "name", "mesh_shape"), RUNS)
def test_parts_give_what_the_whole_gives(runs, dtype, name, mesh_shape):
    whole, cut = (seen_by(runs[dtype], f"{name} {kind}") for kind in ("whole", mesh_shape))
    assert whole.keys() == cut.keys()
    assert any("logits" in key for key in whole) and any("dimage" in key for key in whole)
    assert ("['stats']" in "".join(whole)) == (name == "batch")
    for key, expected in whole.items():
        scale = np.abs(expected).max()
        assert scale > 1e-5 and expected.dtype == dtype, key
        # Losses and statistics carry a leading axis of those who say the same.
        result = (
            cut[key] if cut[key].ndim == expected.ndim else cut[key].reshape(-1, *expected.shape)
        )
        np.testing.assert_allclose(
            result,
            np.broadcast_to(expected, result.shape),
            rtol=0,
            atol=TOLERANCES[dtype] * scale,
            err_msg=key,
        )


def test_four_parts_need_about_a_fourth_of_the_memory_each(runs):
    facts = runs["float32"]
    assert facts["memory of whole"] > 10 * 2**20
    assert facts["memory of parts"] < 0.45 * facts["memory of whole"]


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize(("width", "expected"), ENDS.items())
def test_a_constant_is_padded_with_zeros_at_the_ends_alone(runs, width, expected, num_parts):
    result = runs["float32"][f"ones {width} {num_parts}"]
    np.testing.assert_array_equal(result, expected)
    alone = runs["float32"][f"ones {width} {num_parts} alone"]
    assert np.array_equal(alone, expected) == (num_parts == 1)


@pytest.mark.parametrize("index", range(len(CONVOLUTIONS)))
def test_convolution_of_parts_and_its_gradients_are_the_whole_ones(runs, index):
    whole, cut = (seen_by(runs["float32"], f"convolution {index} {k}") for k in ("whole", "cut"))
    assert len(whole) == 4 and whole.keys() == cut.keys()
    for key, expected in whole.items():
        assert np.abs(expected).max() > 4, key
        np.testing.assert_array_equal(cut[key], expected, err_msg=key)


def trace_parts(function, shape, num_parts=2):
    """Shape of function(part) for all parts of an image of `shape`; nothing is computed."""
    parts = PartitionSpec(None, "space")
    mesh = AbstractMesh((num_parts,), ("space",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=parts, check_vma=False)
    return jax.eval_shape(mapped, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def test_a_convolution_that_looks_past_its_neighbour_is_refused():
    kernel = {"kernel": np.ones((5, 3, 1, 1), np.float32)}
    convolve = Conv(1, (5, 3), use_bias=False, space_axis="space").apply
    convolve = functools.partial(convolve, {"params": kernel})
    assert trace_parts(convolve, (1, 4, 4, 1)) == (1, 4, 4, 1)
    with pytest.raises(ValueError, match=r"1 wide .* 5-wide convolution looks 2 .*parallel.space"):
        trace_parts(convolve, (1, 2, 4, 1))


@pytest.mark.parametrize("options", [{}, {"down": "max_pool"}, {"encoder": "residual"}])
def test_strides_that_do_not_divide_a_part_are_refused(options):
    model = UNet(2, features=(2, 2, 2), norm="none", num_convs=1, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 4, 1)))
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    apply = functools.partial(model.clone(space_axis="space").apply, variables)
    assert trace_parts(apply, (1, 8, 4, 1)) == (1, 8, 4, 2)
    with pytest.raises(ValueError, match=r"is 3 wide .* a stride of 2 .*data.patch_size"):
        trace_parts(apply, (1, 12, 4, 1))


def split(x, num_parts):
    """[B, X, ...] as parts [num_parts, B, X / num_parts, ...]."""
    return np.stack(np.split(x, num_parts, axis=1))


def over_parts(function, *shared):
    """Maps function(*shared, *parts) over the parts that lie along the first axis."""
    return jax.jit(jax.vmap(functools.partial(function, *shared), axis_name="space"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOSSES),
        ("cross_entropy", {"class_weights": (0.5, 1, 3)}),
        ("focal", {"alpha": (0.5, 1, 3)}),
        ("tversky", {"include_background": True, "eps": 1.0}),
    ],
)
def test_every_part_gives_the_loss_of_the_whole_and_its_own_gradient(name, options):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 8, 5, NUM_CLASSES)).astype(np.float32)
    label = rng.integers(0, NUM_CLASSES, (3, 8, 5))
    valid = rng.random((3, 8, 5)).astype(np.float32)
    valid[1, 2:] = 0  # some parts of the second example hold nothing, and the third has nothing
    valid[2] = 0

    def loss_and_gradient(space_axis, share, logits, label, valid):
        def loss_of(logits):
            loss = LOSSES[name](logits, label, valid=valid, space_axis=space_axis, **options)
            return share * loss.sum(), loss

        gradient, loss = jax.grad(loss_of, has_aux=True)(logits)
        return loss, gradient

    whole = jax.jit(functools.partial(loss_and_gradient, None, 1))
    loss, gradient = whole(logits, label, valid)
    assert loss[0] > 0 and loss[1] > 0 and loss[2] == 0
    for num_parts in (2, 4):
        mapped = over_parts(loss_and_gradient, "space", 1 / num_parts)
        losses, gradients = mapped(*(split(x, num_parts) for x in (logits, label, valid)))
        np.testing.assert_allclose(losses, np.stack([loss] * num_parts), rtol=1e-6)
        gradients = np.concatenate(gradients, axis=1)
        np.testing.assert_allclose(gradients, gradient, rtol=0, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_coarse_scales_take_the_same_voxels_from_parts_as_from_the_whole(ratio):
    rng = np.random.default_rng(0)
    label, valid = (rng.integers(0, 9, (2, 24, 7)).astype(np.float32) for _ in range(2))
    shapes = ((24, 7), (24 // ratio, 4))
    scales = [rng.integers(0, 9, (2, *shape, 1)).astype(np.float32) for shape in shapes]

    def product(logits, label, valid, space_axis=None):
        total = jnp.sum(logits[..., 0] * label * valid, axis=(1, 2))
        return total if space_axis is None else jax.lax.psum(total, space_axis)

    def supervised(space_axis, label, valid, *scales):
        return supervise(product, scales, label, valid, space_axis)

    mapped = over_parts(supervised, "space")
    result = mapped(*(split(x, 2) for x in (label, valid, *scales)))
    expected = supervised(None, label, valid, *scales)
    np.testing.assert_allclose(result, np.stack([expected] * 2), rtol=1e-6)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    if sys.argv[1] == "float64":
        jax.config.update("jax_enable_x64", True)
        jnp.float32 = jnp.float64
        np.savez(sys.argv[2], **run_cases("float64"))
    else:
        facts = run_cases("float32") | run_convolutions() | convolve_ones() | measure_memory()
        np.savez(sys.argv[2], **facts)
