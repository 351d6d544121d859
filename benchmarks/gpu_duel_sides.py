"""The two sides of gpu_duel.py: jaxseg and torch, as what trains a network and times its steps.

A process loads the library of its side alone: hence the imports within.
"""

import dataclasses
import functools
import statistics
import time

import numpy as np

from jaxseg.evaluation.metrics import confusion_counts, scores_from_counts

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, CLIP_NORM = 1e-2, 0.99, 3e-5, 12.0  # nnU-Net's
STEPS_AT_ONCE = 5
WARM_UP_GROUPS = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be learnt, and by which network.

    Attributes:
      images: training patches, [N, *S, 1] float32.
      labels: [N, *S] uint8.
      held_images: held-out cases, padded to one shape, [M, *S', 1] float32.
      held_labels: M arrays, each of the shape of its case.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    features: tuple[int, ...]
    num_classes: int = 3
    held_images: np.ndarray | None = None
    held_labels: tuple[np.ndarray, ...] = ()
    dtype: str = "bfloat16"


def fit(array, shape):
    """[*S, ...] padded with 0 and cropped around its centre; brought back, what was padded goes."""
    spatial = array.shape[: len(shape)]
    missing = [max(m - n, 0) for n, m in zip(spatial, shape, strict=True)]
    widths = [(m // 2, m - m // 2) for m in missing] + [(0, 0)] * (array.ndim - len(shape))
    starts = [max(n - m, 0) // 2 for n, m in zip(spatial, shape, strict=True)]
    return np.pad(array, widths)[tuple(slice(s, s + m) for s, m in zip(starts, shape, strict=True))]


def with_mirror_images(array):
    """[N, X, Y, Z, ...] to [8 N, ...], so that a batch mirrored at random is a choice of rows."""
    for axis in (1, 2, 3):
        array = np.concatenate([array, np.flip(array, axis)])
    return array


def draws(num_rows, batch_size):
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(num_rows, size=batch_size, dtype=np.int32)


class Side:
    """A library that trains; one of them adds `step`, `wait`, `loss`, `predict` and `peak_gib`."""

    def __init__(self, task):
        self.task = task
        self.draws = draws(8 * len(task.images), task.batch_size)
        self.steps, self.seconds = 0, 0.0

    def warm_up(self):
        """Compiles and takes a few steps, which do not count: a row of what that took."""
        start = time.perf_counter()
        self.step(next(self.draws), 1.0)
        self.wait()
        row = {"first_step_s": time.perf_counter() - start, "first_loss": self.loss()}
        group_s = [self._seconds_of_steps(1.0) for _ in range(WARM_UP_GROUPS)]
        return row | self._row(group_s[1:])

    def train(self, seconds, first, last):
        """Steps for so many seconds, between two shares of the whole schedule: a row."""
        group_s = []
        while (done := sum(group_s)) < seconds:
            share = first + (last - first) * done / seconds
            group_s.append(self._seconds_of_steps((1 - share) ** 0.9))
        self.steps += STEPS_AT_ONCE * len(group_s)
        self.seconds += sum(group_s)
        return self._row(group_s)

    def _seconds_of_steps(self, rate):
        start = time.perf_counter()
        for _ in range(STEPS_AT_ONCE):
            self.step(next(self.draws), rate)
        self.wait()
        return time.perf_counter() - start

    def _row(self, group_s):
        row = {
            "minutes": self.seconds / 60,
            "steps": self.steps,
            "batch_size": self.task.batch_size,
            "step_ms": 1e3 * statistics.median(group_s) / STEPS_AT_ONCE,
            "loss": self.loss(),
        }
        if self.task.held_labels:
            row["dice"] = self._dice()
        return row | {"peak_gib": self.peak_gib()}

    def _dice(self):
        """Mean over foreground classes of the mean over held-out cases."""
        batch, images = self.task.batch_size, self.task.held_images
        parts = [self.predict(images[i : i + batch]) for i in range(0, len(images), batch)]
        scores = []
        for prediction, label in zip(np.concatenate(parts), self.task.held_labels, strict=True):
            counts = confusion_counts(fit(prediction, label.shape), label, self.task.num_classes)
            scores.append(scores_from_counts(counts)["dice"][1:])
        return float(np.nanmean(scores, axis=0).mean())


class Jaxseg(Side):
    def __init__(self, task, weights, **compiler_options):
        import jax

        from jaxseg.models.unet import UNet
        from jaxseg.training import transfer
        from jaxseg.training.optim import create_optimizer
        from jaxseg.training.state import create_train_states

        super().__init__(task)
        self.jax, self.options = jax, compiler_options
        self.model = UNet(
            task.num_classes, features=task.features, deep_supervision=True, dtype=task.dtype
        )
        self.tx = create_optimizer(
            "sgd",
            lambda _: LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            clip_norm=CLIP_NORM,
        )
        (state,) = create_train_states(
            self.model, self.tx, [jax.random.key(0)], task.images.shape[1:]
        )
        target = {"params": state.params, "batch_stats": {}}
        variables, _ = transfer.adapt(transfer.from_torch(weights), target, strict=True)
        self.state = state.replace(params=variables["params"])
        self.held = jax.device_put(
            (with_mirror_images(task.images), with_mirror_images(task.labels))
        )
        self.segment = jax.jit(
            lambda params, image: self.model.apply({"params": params}, image).argmax(-1),
            compiler_options=compiler_options,
        )

    @functools.cached_property
    def program(self):
        """The training step, compiled."""
        from jaxseg.training.losses import dice_cross_entropy_loss
        from jaxseg.training.steps import train_step

        def step(state, held, rows, rate):
            image, label = (array[rows] for array in held)
            batch = {"image": image, "label": label.astype(np.int32)}
            batch["valid"] = self.jax.numpy.ones(label.shape)
            known = {"model": self.model, "loss_fn": dice_cross_entropy_loss, "tx": self.tx}
            return train_step(state, batch, self.jax.random.key(0), rate, **known)

        like = np.zeros(self.task.batch_size, np.int32), np.float32(1)
        lowered = self.jax.jit(step, donate_argnums=0).lower(self.state, self.held, *like)
        return lowered.compile(self.options)

    def step(self, rows, rate):
        self.state, self.metrics = self.program(self.state, self.held, rows, np.float32(rate))

    def wait(self):
        self.jax.block_until_ready(self.state)

    def loss(self):
        return float(self.metrics["loss"])

    def predict(self, images):
        return np.asarray(self.segment(self.state.params, images))

    def peak_gib(self):
        stats = self.jax.devices()[0].memory_stats() or {}  # none of a CPU
        return stats.get("peak_bytes_in_use", np.nan) / 2**30

    def size(self):
        """A row of what a step computes: three times what the forward pass does."""
        from jaxseg.models.summary import count_flops

        flops = count_flops(self.model, self.task.images.shape[1:])
        return {"tflop_per_step": flops and 3 * self.task.batch_size * flops / 1e12}


class Torch(Side):
    def __init__(self, task, weights, compiled=True):
        import torch
        import torch_networks

        super().__init__(task)
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        self.network = torch_network(task).to(self.device)
        self.network.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
        kernels = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": others}],
            LEARNING_RATE,
            momentum=MOMENTUM,
            nesterov=True,
        )
        self.images = self._on_device(with_mirror_images(task.images))
        self.labels = torch.tensor(with_mirror_images(task.labels), device=self.device)
        self.autocast = functools.partial(
            torch.autocast, self.device, torch.bfloat16, enabled=task.dtype == "bfloat16"
        )

        def loss_of(image, label):
            return torch_networks.supervised(self.network(image), label)

        self.loss_of = torch.compile(loss_of) if compiled else loss_of

    def _on_device(self, images):
        return self.torch.tensor(np.moveaxis(images, -1, 1).copy(), device=self.device)

    def step(self, rows, rate):
        rows = self.torch.from_numpy(rows).to(self.device)
        self.optimizer.zero_grad()
        with self.autocast():
            self.last_loss = self.loss_of(self.images[rows], self.labels[rows].long())
        self.last_loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        self.optimizer.step()

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def loss(self):
        return self.last_loss.item()

    def predict(self, images):
        with self.torch.no_grad(), self.autocast():
            logits, *_ = self.network(self._on_device(images))
        return logits.argmax(1).cpu().numpy()

    def peak_gib(self):
        return self.torch.cuda.max_memory_allocated() / 2**30  # 0 on a CPU


def torch_network(task):
    import torch_networks

    return torch_networks.UNet(
        3, 1, task.num_classes, features=task.features, deep_supervision=True
    )


def initial_weights(task):
    """Drawn as nnU-Net does, for all sides; from name in torch to array."""
    import torch

    torch.manual_seed(0)
    network = torch_network(task)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            torch.nn.init.kaiming_normal_(module.weight, a=0.01)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}
