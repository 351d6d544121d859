"""Medical image segmentation as pure functions, in JAX and Flax."""
