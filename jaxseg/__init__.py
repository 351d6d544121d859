"""Medical image segmentation in JAX."""
