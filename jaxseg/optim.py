"""Learning-rate schedules and optimisers, as optax transformations."""

import jax
import optax


def create_schedule(name, *, learning_rate, num_steps, warmup_steps=0):
    """Learning rate as a function of the step.

    Args:
      name: "constant", "polynomial" (power 0.9, Chen et al. 2017; nnU-Net's choice) or "cosine"
        (Loshchilov and Hutter 2017); the last two reach 0 at `num_steps`.
      learning_rate: the highest value.
      num_steps: steps of the whole run, warm-up included.
      warmup_steps: steps of linear increase from 0.
    Returns:
      A function from step to learning rate.
    """
    decay_steps = num_steps - warmup_steps
    decay = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "polynomial": lambda: optax.polynomial_schedule(learning_rate, 0.0, 0.9, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
    }[name]()
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def create_optimizer(name, schedule, *, weight_decay=0.0, momentum=0.99, clip_norm=0.0):
    """Gradient transformation: clip, decay weights, step.

    Args:
      name: "sgd" (Nesterov momentum; decay is added to the gradient) or "adamw" (decoupled decay,
        Loshchilov and Hutter 2019).
      schedule: function from step to learning rate.
      weight_decay: of convolution kernels alone; biases and normalisation are never decayed.
      momentum: of "sgd".
      clip_norm: largest global norm of the gradient; 0 means no clipping.
    Returns:
      An optax.GradientTransformation.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    if name == "adamw":
        adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=_is_kernel)
        return optax.chain(clip, adamw)
    decay = optax.add_decayed_weights(weight_decay, mask=_is_kernel)
    return optax.chain(clip, decay, optax.sgd(schedule, momentum=momentum, nesterov=True))


def _is_kernel(params):
    return jax.tree.map(lambda param: param.ndim > 1, params)
