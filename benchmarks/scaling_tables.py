"""How the figures of the scaling benchmark are shown: tables for a terminal, and a plot."""

import matplotlib
import numpy as np
from absl import flags
from scaling_model import ACCELERATORS, OVERLAPS, PREDICTED_DEVICES, ideal_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FLAGS = flags.FLAGS


def print_tables(figures):
    """Prints steps, overhead, all-reduces and predictions, in this order."""
    print_table([_shown_step(row) for row in figures["steps"]])
    beyond = {row["reduced_bytes"] - row["parameter_bytes"] for row in figures["steps"]}
    print(
        f"All-reduced beyond the {figures['steps'][0]['parameter_bytes']} bytes of parameters: "
        f"{sorted(beyond)} (loss, number of examples and checksum are 12)"
    )
    for note in figures["notes"]:
        print(note)
    if figures["overhead_over_jit"]:
        _print_overhead(figures["overhead_over_jit"])
    print("\nAll-reduce as alpha + beta * bytes, fitted on every other size:")
    for num, found in figures["all_reduce"].items():
        _print_all_reduce(num, found)
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


def _shown_step(row):
    return {
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


def _print_overhead(overhead):
    for mode in FLAGS.modes:
        row = overhead[mode]
        low, high = row["overhead_95"]
        cpu_low, cpu_high = row["overhead_in_cpu_time_95"]
        print(
            f"{mode} over plain jit, one device, {overhead['rounds']} rounds in turns, jit "
            f"{overhead['jit_median_s'] * 1e3:.1f} ms: wall {row['overhead']:+.1%} "
            f"[{low:+.1%}, {high:+.1%}], CPU time {row['overhead_in_cpu_time']:+.1%} "
            f"[{cpu_low:+.1%}, {cpu_high:+.1%}]"
        )


def _print_all_reduce(num, found):
    error = found["error_on_unseen_sizes"]
    print(
        f"  {num}: alpha {found['alpha_s'] * 1e6:.0f} µs, 1/beta "
        f"{1e-9 / found['beta_s_per_byte']:.2f} GB/s; error on the other sizes: median "
        f"{error['median']:.0%}, largest {error['max']:.0%}"
    )
    if ring := found.get("error_of_ring_of_two"):
        print(f"  {num} predicted from 2: median {ring['median']:.0%}, largest {ring['max']:.0%}")


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
