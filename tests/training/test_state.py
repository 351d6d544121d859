"""The state a run starts from."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.models.blocks import Norm
from jaxseg.training.state import create_train_states

IMAGE_SHAPE = (4, 5, 2)


class Pixelwise(nn.Module):
    norm: str = "batch"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Dense(3, dtype=self.dtype)(image)
        return Norm(self.norm)(x, train=train)


@pytest.fixture(scope="module")
def states():
    """States of the keys 0, 0 and 1."""
    tx = optax.adam(0.1)
    return create_train_states(Pixelwise(), tx, map(jax.random.key, (0, 0, 1)), IMAGE_SHAPE)


def test_state_is_a_function_of_the_key(states):
    first, same, other = states
    jax.tree.map(np.testing.assert_array_equal, first, same)
    kernels = [state.params["Dense_0"]["kernel"] for state in (first, other)]
    assert kernels[0].shape == (2, 3)
    assert not np.allclose(*kernels)


def test_state_starts_at_step_0_with_an_untouched_optimiser(states):
    state = states[0]
    assert state.step.dtype == jnp.int32
    assert state.step == 0
    moments = state.opt_state[0]
    assert jax.tree.structure(moments.mu) == jax.tree.structure(state.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(moments))


def test_running_statistics_start_as_the_identity(states):
    stats = states[0].batch_stats["Norm_0"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(3))
    np.testing.assert_array_equal(stats["var"], np.ones(3))


def test_without_batch_norm_there_are_no_statistics():
    model = Pixelwise(norm="instance")
    (state,) = create_train_states(model, optax.sgd(0.1), [jax.random.key(0)], IMAGE_SHAPE)
    assert state.batch_stats == {}


def test_parameters_are_float32_whatever_the_compute_dtype():
    model = Pixelwise(dtype="bfloat16")
    (state,) = create_train_states(model, optax.adam(0.1), [jax.random.key(0)], IMAGE_SHAPE)
    floats = jax.tree.leaves((state.params, state.batch_stats, state.opt_state[0].mu))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
