"""How a training step scales over devices and processes, and what a model of it predicts beyond.

python benchmarks/scaling.py --output=scaling.json
python benchmarks/scaling.py --config=configs/hippocampus.py --devices=1,2,4,8 --modes=shard_map

Strong scaling keeps the global batch (--strong_batch), weak scaling the batch per device
(--weak_batch). Every setting runs in processes of its own: fake devices on CPU, the first N GPUs
on a GPU host, all chips of a TPU host. The data is noise: only shapes matter. Prints tables, and
writes the figures to --output and a plot beside it.

On CPU all devices share the cores. Step times of N fake devices show no speed-up, and nothing is
said of efficiency; what can be seen is the communication that was compiled, recompilation, memory,
compile time, what mapping costs over plain jit, and the time of an all-reduce between processes.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from report import print_report

from jaxseg import parallel
from jaxseg.experiment import build
from jaxseg.models.summary import count_flops
from jaxseg.training import steps

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS
NUM_CLASSES = 4

# Per accelerator: what `predicted_efficiency` takes, and the peak FLOP/s in bfloat16.
# H100: NVLink 900 GB/s, half of it in each direction; one ConnectX-7 of 400 Gb/s for each GPU of a
#   DGX H100; 989 TFLOP/s without sparsity (NVIDIA, H100 datasheet and DGX H100 user guide).
#   Latencies of a step of a ring: hwLat, ring and "Simple", NVLink and network, in NCCL 2.27's
#   src/graph/tuning.cc.
# TPU v5e: 400 GB/s per chip over both directions, 197 TFLOP/s (Google Cloud, "TPU v5e"). No latency
#   is stated: 1 µs for each hop is assumed. A slice has up to 256 chips and no slower links.
ACCELERATORS = {
    "H100, NVLink + InfiniBand": {
        "links": {
            "bandwidth_bytes_per_s": 450e9,
            "latency_s": 3.4e-6,
            "devices_per_host": 8,
            "host_bandwidth_bytes_per_s": 50e9,
            "host_latency_s": 14e-6,
        },
        "flops_per_s": 989e12,
    },
    "TPU v5e, ICI": {
        "links": {"bandwidth_bytes_per_s": 200e9, "latency_s": 1e-6},
        "flops_per_s": 197e12,
    },
}
PREDICTED_DEVICES = (8, 16, 32, 64, 128, 256)
OVERLAPS = (0.0, 0.5)

ALL_REDUCE_BYTES = tuple(2**k for k in range(12, 25))
ALL_REDUCE_ROUNDS = 25

# Opcodes of collectives -> bytes a device sends in a ring of n, for each byte of the result.
SENT_PER_BYTE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
COMPUTE = {"fusion", "convolution", "dot", "custom-call", "while", "call", "conditional", "reduce"}

ON_FAKE_DEVICES = (
    "Fake CPU devices share {cores} cores: step times show no speed-up and are not efficiency, "
    "which is not measured here.",
    "XLA compiles synchronous collectives for CPU: whether they run beside compute is not seen.",
    "Processes beyond the {cores} cores wait for their turn in every round of an all-reduce: a "
    "ring of 4 is not expected to be predicted by a ring of 2 here.",
)


# The model.


def all_reduce_seconds(
    num_devices,
    num_bytes,
    *,
    bandwidth_bytes_per_s,
    latency_s,
    devices_per_host=None,
    host_bandwidth_bytes_per_s=None,
    host_latency_s=None,
):
    """Time of an all-reduce in the alpha-beta model: a message of b bytes takes alpha + b / beta.

    Devices on the same links form a ring: 2 (n - 1) rounds, each of 1/n of the bytes, which sends
    the fewest bytes possible (Patarasu and Yuan 2009). With `devices_per_host` the sum is
    hierarchical: a ring's reduce-scatter within each host; then every device all-reduces its 1/n
    with those of the same rank in other hosts, by recursive halving and doubling in 2 log2(hosts)
    rounds (Thakur et al. 2005); then a ring's all-gather within each host.

    Args:
      num_devices: all devices.
      num_bytes: of the array to sum, on each device.
      bandwidth_bytes_per_s: at which a device can send over the links it shares with all (with
        those of its host).
      latency_s: of a message over these links.
      devices_per_host: None where all devices are on the same links.
      host_bandwidth_bytes_per_s, host_latency_s: as above, between hosts, for each device.
    Raises:
      ValueError: the devices do not fill the hosts.
    """
    inside = min(num_devices, devices_per_host or num_devices)
    hosts, rest = divmod(num_devices, inside)
    if rest:
        raise ValueError(f"{num_devices} devices do not fill hosts of {devices_per_host}")
    seconds = 2 * (inside - 1) * (latency_s + num_bytes / inside / bandwidth_bytes_per_s)
    if hosts > 1:
        seconds += 2 * math.ceil(math.log2(hosts)) * host_latency_s
        seconds += ideal_bytes(hosts, num_bytes / inside) / host_bandwidth_bytes_per_s
    return seconds


def predicted_efficiency(num_devices, *, compute_s, parameter_bytes, overlap, **links):
    """Images per second of N devices, over N times those of one device with the same batch each.

    Assumes: gradients of all parameters are summed in one all-reduce for each step; every device
    computes for the same time, which does not depend on the others (no stragglers, no waiting for
    data); links are as fast as stated, and nobody else uses them. For weak scaling `compute_s` is
    the same for all N; for strong scaling it is that of 1/N of the batch, and an efficiency below
    that of the smaller batch itself is not predicted.

    Args:
      num_devices: N.
      compute_s: time of a step on one device alone, with its part of the batch.
      parameter_bytes: bytes of the gradients that are summed.
      overlap: share of the all-reduce, in [0, 1], that can run beside the backward pass; no more
        than `compute_s` is hidden.
      **links: of `all_reduce_seconds`.
    Returns:
      In (0, 1].
    """
    communicate_s = all_reduce_seconds(num_devices, parameter_bytes, **links)
    exposed_s = communicate_s - min(overlap * communicate_s, compute_s)
    return compute_s / (compute_s + exposed_s)


def ideal_bytes(num_devices, parameter_bytes):
    """Bytes each device must send, at least, to sum gradients: 2 (N - 1) / N of the parameters.

    Reference: Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations".
    """
    return 2 * (num_devices - 1) / num_devices * parameter_bytes


def fit_line(sizes, seconds):
    """(alpha, beta) of seconds = alpha + beta * size, by least squares of the relative error."""
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    rows = np.stack([1 / seconds, sizes / seconds], axis=1)
    return np.linalg.lstsq(rows, np.ones(len(rows)))[0]


# What was compiled.


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: opcode, a key of SENT_PER_BYTE.
      num_bytes: of its result on one device.
      group_size: devices that take part together.
      times: how often a step runs it, by the lengths of the loops around it.
      overlapped: it is split into a start and an end, with compute between them.
    """

    kind: str
    num_bytes: int
    group_size: int
    times: int
    overlapped: bool

    @property
    def bytes_per_step(self):
        return self.num_bytes * self.times

    @property
    def sent_per_step(self):
        """Bytes that a device sends, if it is done as a ring."""
        return SENT_PER_BYTE[self.kind](self.group_size) * self.bytes_per_step


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def find_collectives(hlo_text, num_devices):
    """The collectives that one run of a compiled and scheduled program executes.

    A collective in a loop counts as often as the loop is known to turn; of a conditional, all
    branches count. An asynchronous pair counts once, with the shape of its end.

    Args:
      hlo_text: `compiled.as_text()`.
      num_devices: that run the program; the group of collectives that name none.
    Returns:
      List of Collective.
    Raises:
      ValueError: a collective is in a loop whose length the compiler does not know.
    """
    computations, entry = _parse_hlo(hlo_text)

    @functools.cache
    def visit(name):
        instructions = computations[name]
        found = []
        for index, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if kind in SENT_PER_BYTE:
                found.append(_collective(kind, instructions, index, num_devices))
                continue
            inner = [c for called in _called(instruction.rest) for c in visit(called)]
            trips = 1
            if instruction.opcode == "while" and inner:
                trips = _trip_count(instruction)
            found += [dataclasses.replace(c, times=c.times * trips) for c in inner]
        return found

    return visit(entry)


def _parse_hlo(text):
    """({computation: [_Instruction, ...] in order of execution}, name of the entry)."""
    computations, entry = {}, None
    header = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
    line_of = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if match := header.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif computations and (match := line_of.match(line)):
            computations[name].append(_Instruction(*match.groups()))
    return computations, entry


def _called(rest):
    """Names of the computations that an instruction runs."""
    groups = re.findall(
        r"(?:body|condition|calls|to_apply|branch_computations|\w+_computation)="
        r"(?:\{([^}]*)\}|%?([\w.-]+))",
        rest,
    )
    return [name.strip().lstrip("%") for group in groups for name in "".join(group).split(",")]


def _trip_count(loop):
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if match is None:
        raise ValueError(f"loop {loop.name} holds collectives and its length is not known")
    return int(match[1])


def _collective(kind, instructions, index, num_devices):
    start = instructions[index]
    end, between = start, []
    if start.opcode.endswith("-start"):
        done = kind + "-done"
        last = next(
            i
            for i, other in enumerate(instructions)
            if other.opcode == done and re.search(r"%([\w.-]+)", other.rest)[1] == start.name
        )
        end, between = instructions[last], instructions[index + 1 : last]
    return Collective(
        kind=kind,
        num_bytes=shape_bytes(end.shape),
        group_size=_group_size(start.rest, num_devices),
        times=1,
        overlapped=any(other.opcode in COMPUTE for other in between),
    )


def shape_bytes(shape):
    """Bytes of an HLO shape, or of all parts of a tuple: "(f32[8,3]{1,0}, bf16[2]{0})" has 100."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits
    return math.ceil(total / 8)


def _group_size(attributes, num_devices):
    """Devices in a group: {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}; {} means all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"('.*?')=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'.*?'", match[2]))
    return num_devices


# What one process measures. Each function runs in a process of its own and returns figures.


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


# What starts them.


def main(_):
    if FLAGS.worker:
        print(json.dumps(work(json.loads(FLAGS.worker))))
        return
    machine = run({"measure": "probe"}, {})
    fake = machine["platform"] == "cpu"
    rows = []
    for setting in settings_for(machine):
        logging.info("%s", setting)
        rows.append(setting | run(setting, machine))
    for row in rows:
        row["ideal_bytes"] = ideal_bytes(row["devices"], row["parameter_bytes"])
        row["efficiency"] = None if fake else efficiency(row, rows)
        row["overlapped_share"] = None if fake else row["overlapped_share"]
    overhead = {"measure": "overhead", "devices": 1, "batch_size": FLAGS.weak_batch}
    figures = {
        "config": FLAGS.config.name,
        "patch_size": list(FLAGS.config.data.patch_size),
        "load_before": os.getloadavg()[0],
        "notes": [note.format(cores=os.cpu_count()) for note in ON_FAKE_DEVICES] if fake else [],
        "steps": rows,
        "overhead_over_jit": run(overhead, machine) if device_counts(machine, [1]) == [1] else None,
        "all_reduce": check_all_reduce(machine),
        "predicted": predict(rows[0]),
    }
    print_tables(figures)
    path = os.path.abspath(FLAGS.output)
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print_report("scaling", figures, machine["kind"])
    picture = os.path.splitext(path)[0] + ".png"
    plot(figures, picture)
    print(f"wrote {path} and {picture}")


def device_counts(machine, wanted):
    """Of the wanted numbers of devices those that can be had; a TPU host gives all its chips."""
    if machine["platform"] == "cpu":
        return list(wanted)
    if machine["platform"] == "tpu":
        return [machine["devices"]]
    return [n for n in wanted if n <= machine["devices"]]


def settings_for(machine):
    """What to measure: everything on CPU, what the devices there allow elsewhere."""
    counts = device_counts(machine, map(int, FLAGS.devices))
    for kind, mode, processes, devices in itertools.product(
        ("strong", "weak"), FLAGS.modes, map(int, FLAGS.processes), counts
    ):
        if devices % processes == 0 and (processes == 1 or machine["platform"] != "tpu"):
            yield {
                "measure": "step",
                "scaling": kind,
                "mode": mode,
                "processes": processes,
                "devices": devices,
                "batch_size": FLAGS.strong_batch
                if kind == "strong"
                else FLAGS.weak_batch * devices,
            }


def run(setting, machine):
    """Figures of a setting, from processes of this file started for it.

    Raises:
      RuntimeError: one of them failed; the others are stopped.
    """
    told = {"processes": 1, "platform": machine.get("platform")} | setting
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told["address"] = f"localhost:{free.getsockname()[1]}"
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(told["processes"]):
                command = [
                    sys.executable,
                    *sys.argv,
                    f"--worker={json.dumps(told | {'rank': rank})}",
                ]
                path = os.path.join(folder, str(rank))
                with open(path + ".out", "w") as out, open(path + ".err", "w") as err:
                    environment = os.environ | visible_devices(told, rank)
                    started.append(
                        subprocess.Popen(command, stdout=out, stderr=err, env=environment)
                    )
            statuses = [None]
            while None in statuses and not any(statuses):
                time.sleep(0.05)
                statuses = [process.poll() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        if any(statuses):
            failed = next(rank for rank, status in enumerate(statuses) if status)
            with open(os.path.join(folder, f"{failed}.err")) as file:
                raise RuntimeError(f"{setting}: status {statuses[failed]}\n{file.read()[-2000:]}")
        with open(os.path.join(folder, "0.out")) as file:
            return json.loads(file.read().splitlines()[-1])


def visible_devices(told, rank):
    """The environment in which a process sees no GPU but its own."""
    if told["platform"] != "gpu":
        return {}
    present = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = present.split(",") if present else [str(i) for i in range(told["devices"])]
    per_process = told["devices"] // told["processes"]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[rank * per_process :][:per_process])}


def work(told):
    """Measures what the parent process asked of this one."""
    if told["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", told["devices"] // told["processes"])
    if told["processes"] > 1:
        jax.distributed.initialize(told["address"], told["processes"], told["rank"])
    return MEASURES[told["measure"]](told)


# What it means.


def efficiency(row, rows):
    """Images per second over those of as many single devices; None if one was not measured."""
    alone = [
        other["images_per_s"]
        for other in rows
        if other["devices"] == 1 and all(other[k] == row[k] for k in ("mode", "scaling"))
    ]
    return row["images_per_s"] / row["devices"] / alone[0] if alone else None


def check_all_reduce(machine):
    """The alpha-beta model against measured all-reduces: fitted on every other size.

    Between processes on CPU, between the devices of one process elsewhere. The ring of two also
    predicts the ring of four, from the same latency and bandwidth.
    """
    fake = machine["platform"] == "cpu"
    figures, lines = {}, {}
    for num in device_counts(machine, (2, 4)):
        setting = {"measure": "all_reduce", "devices": num, "processes": num if fake else 1}
        found = run(setting, machine)
        sizes, seconds = np.asarray(found["bytes"]), np.asarray(found["median_s"])
        lines[num] = alpha, beta = fit_line(sizes[::2], seconds[::2])
        found |= {"alpha_s": float(alpha), "beta_s_per_byte": float(beta)}
        found["error_on_unseen_sizes"] = relative(alpha + beta * sizes[1::2], seconds[1::2])
        if num == 4 and 2 in lines:
            # Two rounds of half the bytes each.
            links = {"latency_s": lines[2][0] / 2, "bandwidth_bytes_per_s": 1 / lines[2][1]}
            ring = [all_reduce_seconds(4, size, **links) for size in sizes]
            found["error_of_ring_of_two"] = relative(np.asarray(ring), seconds)
        figures[num] = found
    return figures


def relative(predicted, measured):
    errors = np.abs(predicted / measured - 1)
    return {"median": float(np.median(errors)), "max": float(errors.max())}


def predict(row):
    """Rows of predicted efficiency, from the parameters and FLOP of a measured row."""
    predicted = []
    for name, accelerator in ACCELERATORS.items():
        image_s = row["flops_per_image"] / (FLAGS.utilisation * accelerator["flops_per_s"])
        for num_devices in PREDICTED_DEVICES:
            batch = FLAGS.predicted_batch
            batches = {"weak": batch, "strong": batch * PREDICTED_DEVICES[0] / num_devices}
            predicted.append({"accelerator": name, "devices": num_devices})
            for kind, overlap in itertools.product(batches, OVERLAPS):
                predicted[-1][f"{kind}, {overlap:.0%} hidden"] = predicted_efficiency(
                    num_devices,
                    compute_s=batches[kind] * image_s,
                    parameter_bytes=row["parameter_bytes"],
                    overlap=overlap,
                    **accelerator["links"],
                )
    return predicted


# How it is shown.


def print_tables(figures):
    steps_table = [
        {
            "scaling": row["scaling"],
            "mode": row["mode"],
            "procs": row["processes"],
            "devices": row["devices"],
            "batch": row["batch_size"],
            "median ms": f"{row['median_s'] * 1e3:.1f}",
            "min ms": f"{row['min_s'] * 1e3:.1f}",
            "images/s": f"{row['images_per_s']:.1f}",
            "efficiency": "not measured here"
            if row["efficiency"] is None
            else f"{row['efficiency']:.2f}",
            "all-reduced B": f"{row['reduced_bytes']:.0f}",
            "sent B": f"{row['sent_bytes']:.0f}",
            "ideal B": f"{row['ideal_bytes']:.0f}",
            "overlap": "not seen"
            if row["overlapped_share"] is None
            else f"{row['overlapped_share']:.0%}",
            "MiB/device": f"{row['program_bytes'] / 2**20:.1f}",
            "compile s": f"{row['compile_s']:.1f}",
            "recompiled": row["compilations_after_first_step"],
        }
        for row in figures["steps"]
    ]
    print_table(steps_table)
    beyond = {row["reduced_bytes"] - row["parameter_bytes"] for row in figures["steps"]}
    print(
        f"All-reduced beyond the {figures['steps'][0]['parameter_bytes']} bytes of parameters: "
        f"{sorted(beyond)} (loss, number of examples and checksum are 12)"
    )
    for note in figures["notes"]:
        print(note)
    overhead = figures["overhead_over_jit"]
    for mode in FLAGS.modes if overhead else ():
        row = overhead[mode]
        low, high = row["overhead_95"]
        cpu_low, cpu_high = row["overhead_in_cpu_time_95"]
        print(
            f"{mode} over plain jit, one device, {overhead['rounds']} rounds in turns, jit "
            f"{overhead['jit_median_s'] * 1e3:.1f} ms: wall {row['overhead']:+.1%} "
            f"[{low:+.1%}, {high:+.1%}], CPU time {row['overhead_in_cpu_time']:+.1%} "
            f"[{cpu_low:+.1%}, {cpu_high:+.1%}]"
        )
    print("\nAll-reduce as alpha + beta * bytes, fitted on every other size:")
    for num, found in figures["all_reduce"].items():
        error = found["error_on_unseen_sizes"]
        print(
            f"  {num}: alpha {found['alpha_s'] * 1e6:.0f} µs, 1/beta "
            f"{1e-9 / found['beta_s_per_byte']:.2f} GB/s; error on the other sizes: median "
            f"{error['median']:.0%}, largest {error['max']:.0%}"
        )
        if ring := found.get("error_of_ring_of_two"):
            print(
                f"  {num} predicted from 2: median {ring['median']:.0%}, largest {ring['max']:.0%}"
            )
    print(
        f"\nPredicted efficiency at {FLAGS.utilisation:.0%} of peak FLOP/s; weak: "
        f"{FLAGS.predicted_batch} images per device, strong: as many in all as 8 devices take then:"
    )
    print_table(
        [
            {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
            for row in figures["predicted"]
        ]
    )


def print_table(rows):
    """Prints dicts with the same keys under each other."""
    lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def plot(figures, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    plot_bytes(axes[0], figures["steps"])
    plot_all_reduce(axes[1], figures["all_reduce"])
    plot_efficiency(axes[2], figures)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bytes(axes, rows):
    counts = np.linspace(1, max(row["devices"] for row in rows))
    ideal = ideal_bytes(counts, rows[0]["parameter_bytes"])
    axes.plot(counts, ideal, "k-", label="2 (N - 1) / N x parameters")
    for mode, marker in zip(FLAGS.modes, "ox", strict=False):
        chosen = [row for row in rows if row["mode"] == mode]
        points = ([row["devices"] for row in chosen], [row["sent_bytes"] for row in chosen])
        axes.plot(*points, marker, fillstyle="none", label=f"compiled, {mode}")
    axes.set(xlabel="devices", ylabel="bytes sent per device and step", title="Communication")
    axes.set_ylim(0)
    axes.legend()


def plot_all_reduce(axes, found_by_num):
    for num, found in found_by_num.items():
        sizes = np.asarray(found["bytes"])
        (line,) = axes.loglog(sizes, found["alpha_s"] + found["beta_s_per_byte"] * sizes)
        colour = line.get_color()
        axes.plot(sizes[::2], found["median_s"][::2], "o", color=colour, label=f"{num}: fitted")
        label = f"{num}: predicted"
        axes.plot(sizes[1::2], found["median_s"][1::2], "o", mfc="none", color=colour, label=label)
    axes.set(xlabel="bytes", ylabel="seconds", title="All-reduce as alpha + beta x bytes")
    axes.legend()


def plot_efficiency(axes, figures):
    for name, colour in zip(ACCELERATORS, ("C0", "C1"), strict=True):
        rows = [row for row in figures["predicted"] if row["accelerator"] == name]
        counts = [row["devices"] for row in rows]
        for kind, style in (("weak", "-"), ("strong", "--")):
            low, high = ([row[f"{kind}, {o:.0%} hidden"] for row in rows] for o in OVERLAPS)
            axes.fill_between(counts, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(counts, low, style, color=colour, label=f"{name}: {kind}")
    for kind, marker in (("weak", "ko"), ("strong", "kx")):
        points = [
            (row["devices"], row["efficiency"])
            for row in figures["steps"]
            if row["scaling"] == kind and row["efficiency"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=f"measured: {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(PREDICTED_DEVICES, PREDICTED_DEVICES)
    axes.set(xlabel="devices", title="Predicted efficiency", ylim=(0, 1.02))
    axes.legend(fontsize="small")


def define_flags():
    """Defined when run, so that tests can import this file beside others with such flags."""
    config_flags.DEFINE_config_file("config", "configs/unet.py")
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices.")
    flags.DEFINE_list("processes", ["1", "2"], "Numbers of processes that share them.")
    flags.DEFINE_list("modes", ["pmap", "shard_map"], "Of config.parallel.mode.")
    flags.DEFINE_integer("strong_batch", 8, "Global batch of strong scaling.")
    flags.DEFINE_integer("weak_batch", 2, "Batch per device of weak scaling.")
    flags.DEFINE_integer("predicted_batch", 32, "Batch per device of predictions.")
    flags.DEFINE_integer("num_steps", 10, "Timed steps after the first.")
    flags.DEFINE_integer("overhead_rounds", 60, "Timed steps of jit and each mode, in turns.")
    flags.DEFINE_float("utilisation", 0.2, "Share of peak FLOP/s of a step, for predictions.")
    flags.DEFINE_string("output", "scaling.json", "File of the figures; the plot lies beside it.")
    flags.DEFINE_string("worker", "", "A measurement as JSON, for a process started by this file.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
