"""Time of jaxseg's U-Net beside the same network in PyTorch: forward, and a full training step.

OMP_WAIT_POLICY=passive python benchmarks/versus_torch.py

Both take their turns in one process, and start from the same weights: the first losses agree. A
step is dice and cross-entropy, gradients, AdamW. On CPU both compute in float32; on GPU in
bfloat16, torch by autocast and torch.compile.

Believe a ratio only if both sides kept the machine's cores busy ("cores", CPU time per wall time).
Threads of torch that wait actively for a core another process holds have made it 4 times slower;
passive waiting does not.
"""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_networks
from absl import app, flags
from report import print_report

from jaxseg.models.unet import UNet
from jaxseg.training import transfer
from jaxseg.training.losses import dice_cross_entropy_loss
from jaxseg.training.optim import create_optimizer
from jaxseg.training.state import create_train_states
from jaxseg.training.steps import train_step

QUICK = flags.DEFINE_bool("quick", False, "Two rounds of each instead of ten.")

FEATURES = (32, 64, 128, 256)
NUM_CLASSES = 4
SHAPES = {"2D": (4, 128, 128, 1), "3D": (1, 48, 64, 48, 1)}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2


def main(_):
    torch.set_num_threads(os.cpu_count())
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    figures = {
        "torch": torch.__version__,
        "dtype": "bfloat16" if gpu else "float32",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_before": os.getloadavg()[0],
    }
    for name, shape in SHAPES.items():
        figures[name] = compare(shape, gpu)
    print_report("versus_torch", figures, str(jax.devices()[0].device_kind))


def compare(shape, gpu):
    """Figures of one network; every call returns once its result is there."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape).astype(np.float32)
    label = rng.integers(NUM_CLASSES, size=shape[:-1]).astype(np.int32)
    torch.manual_seed(0)
    network = torch_networks.UNet(len(shape) - 2, shape[-1], NUM_CLASSES, FEATURES)
    calls = {
        "jax": jax_calls(network, image, label, "bfloat16" if gpu else "float32"),
        "torch": torch_calls(network, image, label, gpu),
    }
    rounds = 2 if QUICK.value else 10
    figures = {"shape": list(shape), "rounds": rounds}
    figures["first_loss"] = {side: step() for side, (_, step) in calls.items()}
    for index, kind in enumerate(("forward", "train_step")):
        functions = {side: pair[index] for side, pair in calls.items()}
        times = seconds_per_call(functions, rounds)
        medians = {side: np.median(values, axis=0) for side, values in times.items()}
        figures[kind] = {
            side: {"median_s": float(wall), "cores": float(cpu / wall)}
            for side, (wall, cpu) in medians.items()
        }
        figures[kind]["jax_over_torch"] = float(medians["jax"][0] / medians["torch"][0])
    return figures


def seconds_per_call(functions, rounds):
    """(wall, CPU) seconds of every call of each function, in turns, without the first."""
    times = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            start = np.array([time.perf_counter(), time.process_time()])
            function()
            times[name].append([time.perf_counter(), time.process_time()] - start)
    return {name: values[1:] for name, values in times.items()}


def jax_calls(network, image, label, dtype):
    """(forward, step) in jaxseg, from the weights of the torch network."""
    model = UNet(NUM_CLASSES, features=FEATURES, dtype=dtype)
    tx = create_optimizer("adamw", lambda _: LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    (state,) = create_train_states(model, tx, [jax.random.key(0)], image.shape[1:])
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    target = {"params": state.params, "batch_stats": {}}
    variables, _ = transfer.adapt(transfer.from_torch(weights), target, strict=True)
    batch = {"image": image, "label": label, "valid": np.ones(label.shape, np.float32)}
    batch, key = jax.device_put(batch), jax.random.key(1)
    apply = jax.jit(model.apply)
    step_fn = functools.partial(train_step, model=model, loss_fn=dice_cross_entropy_loss, tx=tx)
    step_fn = jax.jit(step_fn, donate_argnums=0)
    carried = [state.replace(params=jax.tree.map(jnp.copy, variables["params"]))]

    def forward():
        jax.block_until_ready(apply({"params": variables["params"]}, batch["image"]))

    def step():
        carried[0], metrics = step_fn(carried[0], batch, key)
        jax.block_until_ready(carried[0])
        return float(metrics["loss"])

    return forward, step


def torch_calls(network, image, label, gpu):
    """(forward, step) in torch."""
    device = torch.device("cuda" if gpu else "cpu")
    network = network.to(device)
    image = torch.tensor(np.moveaxis(image, -1, 1).copy(), device=device)
    label = torch.tensor(label, dtype=torch.int64, device=device)
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    call = torch.compile(network) if gpu else network
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=gpu)

    def wait():
        if gpu:
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad(), autocast():
            call(image)
        wait()

    def step():
        optimizer.zero_grad()
        with autocast():
            loss = torch_networks.dice_cross_entropy(call(image), label)
        loss.backward()
        optimizer.step()
        wait()
        return loss.item()

    return forward, step


if __name__ == "__main__":
    app.run(main)
