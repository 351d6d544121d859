"""What one process of the scaling benchmark measures; each function returns figures.

The flags are those of `scaling`, which starts the processes.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
from absl import flags
from collectives import find_collectives

from jaxseg import parallel
from jaxseg.experiment import build
from jaxseg.models.summary import count_flops
from jaxseg.training import steps

FLAGS = flags.FLAGS
NUM_CLASSES = 4
ALL_REDUCE_BYTES = tuple(2**k for k in range(12, 25))
ALL_REDUCE_ROUNDS = 25


def work(told):
    """Measures what the parent process asked of this one."""
    if told["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", told["devices"] // told["processes"])
    if told["processes"] > 1:
        jax.distributed.initialize(told["address"], told["processes"], told["rank"])
    return MEASURES[told["measure"]](told)


def probe(_):
    """What there is to run on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": str(device.device_kind),
        "devices": jax.device_count(),
    }


def measure_step(setting):
    """Time, communication, memory and compilation of the training step of a run."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if "backend_compile" in event else None
    )
    step, arguments = create_step(setting["mode"], setting["batch_size"] // jax.process_count())
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0].params))
    model = build.create_model_for(FLAGS.config, NUM_CLASSES)
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    train_once = trainer(step, arguments)
    train_once()
    num_compilations = len(compilations)
    times = seconds_per_call({"step": train_once}, FLAGS.num_steps)["step"][:, 0]

    collectives = find_collectives(compiled.as_text(), jax.device_count())
    reduced = sum(c.bytes_per_step for c in collectives)
    overlapped = sum(c.bytes_per_step for c in collectives if c.overlapped)
    memory = compiled.memory_analysis()
    device_memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "median_s": float(np.median(times)),
        "min_s": float(times.min()),
        "images_per_s": setting["batch_size"] / float(np.median(times)),
        "compile_s": compile_s,
        "compilations_after_first_step": len(compilations) - num_compilations,
        "flops_per_image": 3 * count_flops(model, (*FLAGS.config.data.patch_size, 1)),
        "parameter_bytes": parameter_bytes,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "reduced_bytes": reduced,
        "sent_bytes": sum(c.sent_per_step for c in collectives),
        "overlapped_share": overlapped / reduced if reduced else None,
        "program_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "device_peak_bytes": device_memory.get("peak_bytes_in_use"),
    }


def measure_overhead(setting):
    """The same step body under plain `jax.jit` and mapped, in turns, on one device."""
    config = FLAGS.config
    loss_fn, tx = build.loss_fn_for(config), build.create_tx(config)
    model, members, batch = create_inputs(tx, setting["batch_size"])
    body = functools.partial(steps.train_step, model=model, loss_fn=loss_fn, tx=tx)
    state, key, learning_rate = members
    plain = (state, jax.device_put(batch), key, learning_rate)
    calls = {"jit": trainer(jax.jit(body, donate_argnums=0), plain)}
    for mode in FLAGS.modes:
        calls[mode] = trainer(*create_step(mode, setting["batch_size"]))
    for call in calls.values():
        call()
    times = seconds_per_call(calls, FLAGS.overhead_rounds)
    figures = {
        "rounds": FLAGS.overhead_rounds,
        "jit_median_s": float(np.median(times["jit"][:, 0])),
    }
    for mode in FLAGS.modes:
        ratios = times[mode] / times["jit"]
        figures[mode] = {
            "median_s": float(np.median(times[mode][:, 0])),
            "overhead": float(np.median(ratios[:, 0]) - 1),
            "overhead_95": [x - 1 for x in confidence_of_median(ratios[:, 0])],
            "overhead_of_minima": float(times[mode][:, 0].min() / times["jit"][:, 0].min() - 1),
            "overhead_in_cpu_time": float(np.median(ratios[:, 1]) - 1),
            "overhead_in_cpu_time_95": [x - 1 for x in confidence_of_median(ratios[:, 1])],
        }
    return figures


def measure_all_reduce(_):
    """Median seconds to sum an array over all devices, for each number of bytes."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    split, whole = jax.P("all"), jax.P()
    sharding = jax.sharding.NamedSharding(mesh, split)
    total = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=split, out_specs=whole)
    )

    def caller(num_bytes):
        shape = (jax.device_count() * num_bytes // 4,)
        part = np.ones(shape[0] // jax.process_count(), np.float32)
        x = jax.make_array_from_process_local_data(sharding, part, shape)
        return lambda: total(x)

    calls = {num_bytes: caller(num_bytes) for num_bytes in ALL_REDUCE_BYTES}
    for call in calls.values():
        jax.block_until_ready(call())
    times = seconds_per_call(calls, ALL_REDUCE_ROUNDS)
    return {
        "bytes": list(times),
        "median_s": [float(np.median(values[:, 0])) for values in times.values()],
    }


MEASURES = {
    "probe": probe,
    "step": measure_step,
    "overhead": measure_overhead,
    "all_reduce": measure_all_reduce,
}


def create_inputs(tx, batch_size):
    """(model, members, batch) of the config, with noise for data."""
    config = FLAGS.config
    patch_size = tuple(config.data.patch_size)
    model = build.create_model_for(config, NUM_CLASSES)
    members = build.create_members(config, model, tx, (*patch_size, 1))
    rng = np.random.default_rng(jax.process_index())
    shape = (batch_size, *patch_size)
    batch = {
        "image": rng.normal(size=(*shape, 1)).astype(np.float32),
        "label": rng.integers(NUM_CLASSES, size=shape).astype(np.int32),
        "valid": np.ones(shape, np.float32),
    }
    return model, members, batch


def create_step(mode, batch_size):
    """(step, arguments): the mapped training step of the config, and what it takes."""
    config = FLAGS.config
    config.parallel.mode = mode
    tx, layout = build.create_tx(config), build.create_layout(config)
    model, members, batch = create_inputs(tx, batch_size)
    step = build.create_steps(config, model, tx, layout)[0]
    state, key, learning_rate = (parallel.place(tree, layout) for tree in members)
    return step, (state, parallel.shard(batch, layout), key, learning_rate)


def trainer(step, arguments):
    """Function that runs one step on, each time, the state that the last one left."""
    carried, rest = list(arguments[:1]), arguments[1:]

    def train_once():
        carried[0], metrics = step(carried[0], *rest)
        return metrics

    return train_once


def seconds_per_call(functions, rounds):
    """(wall, CPU) seconds of every call, [rounds, 2] for each function.

    They take turns, every other round the other way round, so that what else the machine does
    falls on all alike.
    """
    times = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            start = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(functions[name]())
            times[name].append([time.perf_counter(), time.process_time()] - start)
    return {name: np.asarray(values) for name, values in times.items()}


def confidence_of_median(values):
    """95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    return [float(x) for x in np.quantile(medians, (0.025, 0.975))]
