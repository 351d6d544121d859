"""FCN: bilinear up-sampling, the skips of each head, and its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.models.blocks import ConvBlock
from jaxseg.models.fcn import FCN, Upsample, bilinear_kernel
from jaxseg.models.summary import count_parameters

FEATURES = (2, 3, 4, 5, 6)
SKIPS = {"32s": (), "16s": (4,), "8s": (4, 3)}


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(model, image, seed=1):
    """Variables of `model` filled with noise that keeps the scale of what passes through."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0), image))


def oracle_transposed(x, kernel, factor):
    """Adds kernel-sized blocks `factor` apart, then cuts the overhang, half at either end."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    out = np.zeros((x.shape[0], *(factor * (n + 1) for n in x.shape[1:-1]), kernel.shape[-1]))
    for index in np.ndindex(x.shape[1:-1]):
        block = np.einsum("bc,...cf->b...f", x[(slice(None), *index)], kernel)
        where = (slice(factor * i, factor * (i + 2)) for i in index)
        out[(slice(None), *where)] += block
    keep = (slice(factor // 2, factor // 2 + factor * n) for n in x.shape[1:-1])
    return out[(slice(None), *keep)]


def cropped(x, factor):
    """The full transposed convolution without its overhang, half at either end."""
    keep = (slice(factor // 2, n - (factor - factor // 2)) for n in x.shape[1:-1])
    return x[(slice(None), *keep)]


def oracle_max_pool(x):
    height, width = (-(-n // 2) for n in x.shape[1:3])
    out = np.empty((x.shape[0], height, width, x.shape[3]))
    for i, j in np.ndindex(height, width):
        out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
    return out


def test_bilinear_kernel_by_hand():
    profile = np.array([0.25, 0.75, 0.75, 0.25])
    kernel = bilinear_kernel(2, 2, 2)
    expected = np.zeros((4, 4, 2, 2))
    expected[..., 0, 0] = expected[..., 1, 1] = np.outer(profile, profile)
    np.testing.assert_array_equal(kernel, expected)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(
        bilinear_kernel(4, 1, 1)[:, 0, 0], np.array([1, 3, 5, 7, 7, 5, 3, 1]) / 8
    )


@pytest.mark.parametrize(("shape", "factor"), [((6, 5), 2), ((4, 5), 8), ((4, 3, 3), 2)])
def test_upsampling_an_affine_ramp_is_exact_inside(shape, factor):
    slopes = np.arange(2, 2 + len(shape))
    coarse = np.tensordot(slopes, np.indices(shape), axes=1) + 1.0
    fine_at = (np.indices([factor * n for n in shape]) + 0.5) / factor - 0.5
    expected = np.tensordot(slopes, fine_at, axes=1) + 1.0
    coarse = coarse[None, ..., None].astype(np.float32)
    result = cropped(Upsample(factor, learned=False).apply({}, coarse), factor)
    inside = tuple(slice(factor // 2, factor * n - factor // 2) for n in shape)
    np.testing.assert_allclose(result[0, ..., 0][inside], expected[inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "factor"), [((6, 5), 2), ((4, 3), 8), ((3, 4, 3), 2)])
def test_upsampling_is_linear_resizing_away_from_the_border(shape, factor):
    scores = random_array(2, *shape, 3)
    new_shape = tuple(factor * n for n in shape)
    expected = jax.image.resize(scores, (2, *new_shape, 3), "linear")
    result = cropped(Upsample(factor, learned=False).apply({}, scores), factor)
    assert result.shape == expected.shape
    inside = (slice(None), *(slice(factor // 2, n - factor // 2) for n in new_shape))
    np.testing.assert_allclose(result[inside], expected[inside], rtol=1e-5, atol=1e-5)


def test_fixed_upsampling_has_no_parameter_and_learned_starts_equal_with_a_gradient():
    scores = random_array(1, 3, 4, 2)
    fixed, learned = Upsample(2, learned=False), Upsample(2, learned=True)
    assert not fixed.init(jax.random.key(0), scores)
    params = learned.init(jax.random.key(0), scores)["params"]
    np.testing.assert_array_equal(params["kernel"], bilinear_kernel(2, 2, 2))
    np.testing.assert_array_equal(
        learned.apply({"params": params}, scores), fixed.apply({}, scores)
    )
    # Also from one class to another, where the weights start at 0.
    grad = jax.grad(lambda params: jnp.sum(learned.apply({"params": params}, scores)[..., 0]))
    gradient = grad(params)["kernel"]
    assert (gradient[..., :, 0] != 0).all()
    assert (gradient[..., :, 1] == 0).all()


@pytest.mark.parametrize("head", SKIPS)
def test_logits_are_scores_of_the_right_pools_added_from_coarse_to_fine(head):
    model = FCN(2, features=FEATURES, num_convs=1, head=head, upsample="fixed")
    image = random_array(1, 50, 39, 1)
    variables = random_variables(model, image)
    params = variables["params"]
    logits, state = jax.jit(
        lambda variables, image: model.apply(
            variables,
            image,
            capture_intermediates=lambda module, _: isinstance(module, ConvBlock),
            mutable=["intermediates"],
        )
    )(variables, image)
    stages = state["intermediates"]["encoder"]

    def score(pool):
        (stage,) = stages[f"stage{pool - 1}"]["__call__"]
        score = params[f"score{pool}"]
        return oracle_max_pool(np.asarray(stage)) @ score["kernel"][0, 0] + score["bias"]

    def upsample(scores, factor, like):
        finer = oracle_transposed(scores, bilinear_kernel(factor, 2, 2), factor)
        return finer[:, : like.shape[1], : like.shape[2]]

    scores, factor = score(5), 32
    for pool in SKIPS[head]:
        finer = score(pool)
        scores, factor = upsample(scores, 2, finer) + finer, factor // 2
    expected = upsample(scores, factor, image)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_pool3_speaks_in_8s_alone_and_pool4_not_in_32s():
    image = random_array(1, 64, 64, 1)
    models = {head: FCN(2, features=FEATURES, num_convs=1, head=head) for head in SKIPS}
    variables = random_variables(models["8s"], image)

    def score_layers(model):
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        return {name for name in params if name.startswith("score")}

    assert score_layers(models["32s"]) == {"score5"}
    assert score_layers(models["16s"]) == {"score5", "score4"}
    assert score_layers(models["8s"]) == {"score5", "score4", "score3"}

    changed = jax.tree.map(np.copy, variables)
    changed["params"]["score3"]["kernel"] += 1
    apply = jax.jit(models["8s"].apply)
    assert not np.allclose(apply(variables, image), apply(changed, image), atol=0.1)


@pytest.mark.parametrize("head", SKIPS)
@pytest.mark.parametrize("shape", [(64, 32), (50, 33), (1, 5), (7, 35, 3)])
def test_logits_have_the_size_of_the_image_whatever_it_is(head, shape):
    model = FCN(3, features=FEATURES, num_convs=1, head=head)
    image = jax.ShapeDtypeStruct((2, *shape, 1), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert (logits.shape, logits.dtype) == ((2, *shape, 3), jnp.float32)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("head", SKIPS)
@pytest.mark.parametrize("upsample", ["learned", "fixed"])
def test_parameters_are_counted_by_hand(rank, head, upsample):
    num_classes, channels = 3, 2
    expected, before = 0, channels
    for features in FEATURES:  # two convolutions, each with a scale and a shift
        expected += 3**rank * (before * features + features**2) + 4 * features
        before = features
    for pool in (5, *SKIPS[head]):
        expected += (FEATURES[pool - 1] + 1) * num_classes
    if upsample == "learned":
        last = {"32s": 32, "16s": 16, "8s": 8}[head]
        for factor in (*(2 for _ in SKIPS[head]), last):
            expected += (2 * factor) ** rank * num_classes**2
    model = FCN(num_classes, features=FEATURES, head=head, upsample=upsample)
    assert count_parameters(model, (*(32,) * rank, channels)) == expected


def test_every_parameter_of_the_learned_network_has_a_gradient():
    model = FCN(2, features=FEATURES, num_convs=1, norm="none")
    image = random_array(2, 70, 66, 1)
    params = random_variables(model, image)["params"]
    weight = random_array(2, 70, 66, 2, seed=3)
    grads = jax.jit(
        jax.grad(lambda params: jnp.sum(weight * model.apply({"params": params}, image)))
    )(params)
    without = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(grads) if not g.any()]
    assert not without


def test_bfloat16_keeps_float32_parameters_and_logits_and_stays_close():
    image = random_array(2, 64, 64, 1)
    exact = FCN(3, features=FEATURES, num_convs=1)
    coarse = exact.clone(dtype="bfloat16")
    variables = random_variables(coarse, image)
    shapes = jax.eval_shape(coarse.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    logits = jax.jit(coarse.apply)(variables, image)
    expected = jax.jit(exact.apply)(variables, image)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected)
    assert 0 < error.max() < 0.2 * np.std(expected)
    assert error.mean() < 0.02 * np.std(expected)


def test_dropout_only_while_training_and_on_the_coarsest_scores_alone():
    model = FCN(2, features=FEATURES, num_convs=1, dropout=0.5)
    image = random_array(1, 64, 64, 1)
    variables = random_variables(model, image)
    plain = jax.jit(model.clone(dropout=0.0).apply)(variables, image)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, image), plain)

    train = jax.jit(
        lambda variables, key: model.apply(variables, image, train=True, rngs={"dropout": key})
    )
    key = jax.random.key(1)
    assert not np.allclose(train(variables, key), plain)
    # Without weights on pool5, what is dropped there can not be seen.
    variables["params"]["score5"]["kernel"] *= 0
    deaf = jax.jit(model.apply)(variables, image)
    np.testing.assert_allclose(train(variables, key), deaf, rtol=1e-5, atol=1e-5)


def test_published_network_has_the_published_size():
    # 134 million in table 1 of Long et al. 2015: VGG16's 14,714,688, then fc6, fc7 and the scores.
    fc6, fc7, scores = (7 * 7 * 512 + 1) * 4096, (4096 + 1) * 4096, (4096 + 1) * 21
    model = FCN(21, encoder="vgg16", features=(), head="32s", padding="paper", upsample="fixed")
    assert count_parameters(model, (64, 64, 3)) == 14_714_688 + fc6 + fc7 + scores == 134_346_581
    eight = model.clone(head="8s", upsample="learned")
    skips = (512 + 1) * 21 + (256 + 1) * 21
    ups = (4**2 + 4**2 + 16**2) * 21**2
    assert count_parameters(eight, (64, 64, 3)) == 134_346_581 + skips + ups


@pytest.mark.parametrize("padding", ["same", "paper"])
@pytest.mark.parametrize("head", SKIPS)
@pytest.mark.parametrize("shape", [(224, 224), (500, 375), (33, 57), (1, 1)])
def test_vgg_logits_have_the_size_of_the_image_whatever_it_is(padding, head, shape):
    model = FCN(3, encoder="vgg16", features=(), head=head, padding=padding)
    image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert logits.shape == (1, *shape, 3)
