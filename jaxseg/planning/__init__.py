"""From what is known of a dataset to the network that fits it: pure functions of numbers.

Measures of its cases enter; a `Configuration` for each way to train (2d, 3d_fullres, 3d_lowres)
leaves, with the reason of every decision. The rules are those of nnU-Net v2 (Isensee et al. 2021,
doi 10.1038/s41592-020-01008-z, and 2024, arXiv:2404.09556).
"""
