"""From a volume as it was read to its segmentation on the same grid, as pure functions.

An image [X, Y, Z, C] with its affine comes in; it is resampled, normalised, tiled, seen by the
network, blended and brought back. Class indices, maps and explanations go out.
"""
