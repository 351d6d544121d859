"""What communication costs when devices sum gradients: an alpha-beta model, and its constants."""

import math

import numpy as np

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
