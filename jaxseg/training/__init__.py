"""What one step of training is, as pure functions of arrays.

A batch (image, label, valid), the state of the networks and a key come in; the next state, the loss
and checksums go out. Losses, optimisers, and weights of other networks put into ours.
"""
