"""The networks: U-Net and FCN as flax.linen modules.

An image [B, *S, C] comes in, float32 logits [B, *S, num_classes] go out; 2D or 3D by the image's
rank. Nothing here knows of training, files or commands.
"""
