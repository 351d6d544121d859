"""The scaling benchmark's model against hand computation, and its reading of compiled programs.

Programs are compiled for four devices in a process of its own: this file as a script, which prints
their HLO texts.
"""

import json
import os
import subprocess
import sys

import collectives
import jax
import numpy as np
import pytest
import scaling
import scaling_model

LINKS = {"bandwidth_bytes_per_s": 1e9, "latency_s": 1e-5}
HOSTS = {"devices_per_host": 4, "host_bandwidth_bytes_per_s": 1e8, "host_latency_s": 1e-4}


def test_ring_takes_the_time_of_its_rounds():
    # Six rounds of a quarter of 4 MB: each 10 µs and 1 ms.
    assert scaling_model.all_reduce_seconds(4, 4e6, **LINKS) == pytest.approx(6 * (1e-5 + 1e-3))


def test_hosts_add_a_tree_over_their_share():
    # Inside as above; then a quarter, 1 MB, among 8 hosts: 2 x 3 rounds, 2 x 7/8 MB at 100 MB/s.
    inside, between = 6 * (1e-5 + 1e-3), 6 * 1e-4 + 0.0175
    seconds = scaling_model.all_reduce_seconds(32, 4e6, **LINKS, **HOSTS)
    assert seconds == pytest.approx(inside + between)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_one_host_is_a_ring_whatever_is_between_hosts(num_devices):
    one_host = scaling_model.all_reduce_seconds(num_devices, 4e6, **LINKS, **HOSTS)
    assert one_host == scaling_model.all_reduce_seconds(num_devices, 4e6, **LINKS)


def test_devices_that_do_not_fill_the_hosts_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="6 devices do not fill hosts of 4"):
        scaling_model.all_reduce_seconds(6, 1.0, **LINKS, **HOSTS)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (0.0, 10 / (10 + 6.06)),
        (0.5, 10 / (10 + 3.03)),
        (1.0, 1.0),
    ],
)
def test_efficiency_is_compute_over_compute_and_what_is_not_hidden(overlap, expected):
    found = scaling_model.predicted_efficiency(
        4, compute_s=1e-2, parameter_bytes=4e6, overlap=overlap, **LINKS
    )
    assert found == pytest.approx(expected)


def test_no_more_is_hidden_than_there_is_compute():
    # Of 6.06 ms, 1 ms of compute hides 1 ms.
    found = scaling_model.predicted_efficiency(
        4, compute_s=1e-3, parameter_bytes=4e6, overlap=1.0, **LINKS
    )
    assert found == pytest.approx(1 / 6.06)


def efficiency(num_devices, **links):
    return scaling_model.predicted_efficiency(
        num_devices, compute_s=0.01, parameter_bytes=4e6, overlap=0.0, **links
    )


def test_one_device_and_free_links_lose_nothing():
    assert efficiency(1, **LINKS) == 1
    assert efficiency(256, bandwidth_bytes_per_s=np.inf, latency_s=0.0) == 1


def test_many_devices_on_a_ring_send_the_parameters_twice_and_latency_ends_it():
    without_latency = LINKS | {"latency_s": 0.0}
    assert efficiency(10**9, **without_latency) == pytest.approx(0.01 / (0.01 + 8e-3))
    assert efficiency(10**9, **LINKS) == pytest.approx(0, abs=1e-5)
    falling = [efficiency(2**k, **LINKS) for k in range(9)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == 9


@pytest.mark.parametrize(("num_devices", "expected"), [(1, 0), (2, 100), (4, 150), (8, 175)])
def test_ideal_is_twice_the_parameters_but_a_part(num_devices, expected):
    assert scaling_model.ideal_bytes(num_devices, 100) == expected


def test_line_is_found_and_small_sizes_count_as_much_as_large_ones():
    sizes = np.array([1e3, 1e4, 1e6, 1e8])
    seconds = 1e-4 + 2e-9 * sizes
    np.testing.assert_allclose(scaling_model.fit_line(sizes, seconds), (1e-4, 2e-9))
    noisy = seconds * np.array([1, 1, 1, 1.2])  # absolute error would move alpha by thousands
    np.testing.assert_allclose(scaling_model.fit_line(sizes, noisy), (1e-4, 2e-9), rtol=0.2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[8,3]{1,0}", 96),
        ("f32[]", 4),
        ("(f32[8,3]{1,0:T(8,128)S(1)}, bf16[2]{0}, pred[5]{0})", 96 + 4 + 5),
        ("s4[3]{0}", 2),
        ("u32[0,7]{1,0}", 0),
    ],
)
def test_bytes_of_a_shape(shape, expected):
    assert collectives.shape_bytes(shape) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add", 2),
        ("replica_groups=[2,4]<=[8], to_apply=%add", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add", 4),
        ("replica_groups={}, to_apply=%add", 8),
    ],
)
def test_group_is_counted_however_it_is_written(groups, expected):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4]{{0}} all-reduce(%p), {groups}"
    (found,) = collectives.find_collectives(text, num_devices=8)
    assert found.group_size == expected


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", [1, 2, 8]), ("gpu", [1, 2]), ("tpu", [4])]
)
def test_devices_that_can_be_had(platform, expected):
    machine = {"platform": platform, "devices": 4}
    assert scaling.device_counts(machine, (1, 2, 8)) == expected


def test_processes_see_their_own_gpus_of_those_that_are_visible(monkeypatch):
    told = {"platform": "gpu", "devices": 4, "processes": 2}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert scaling.visible_devices(told, 1) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert scaling.visible_devices(told, 0) == {"CUDA_VISIBLE_DEVICES": "7,5"}
    assert scaling.visible_devices(told | {"platform": "cpu"}, 0) == {}


def test_measured_efficiency_is_of_the_same_mode_and_scaling():
    def row(devices, rate, scaling_kind="weak", mode="pmap"):
        return {"devices": devices, "images_per_s": rate, "scaling": scaling_kind, "mode": mode}

    rows = [row(1, 99.0, "strong"), row(1, 98.0, mode="shard_map"), row(1, 10.0), row(4, 30.0)]
    assert scaling.efficiency(rows[3], rows) == pytest.approx(0.75)
    assert scaling.efficiency(rows[3], rows[:2]) is None


# As XLA writes programs for GPU: pairs, one of them with compute in between.
ASYNCHRONOUS = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %double = f32[8]{0} add(%p, %p)
}

ENTRY %main (p: f32[8], q: f32[16]) -> (f32[8], f32[64], f32[4]) {
  %p = f32[8]{0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %first = f32[8]{0} all-reduce-start(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %second = (f32[16]{0}, f32[64]{0}) all-gather-start(%q), replica_groups={{0,1,2,3}}
  %compute = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %first-end = f32[8]{0} all-reduce-done(%first)
  %second-end = f32[64]{0} all-gather-done(%second)
  %third = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%q), replica_groups={{0,1,2,3}}
  %view = f32[8]{0} bitcast(%compute)
  %third-end = f32[4]{0} reduce-scatter-done(%third)
  ROOT %all = (f32[8]{0}, f32[64]{0}, f32[4]{0}) tuple(%first-end, %second-end, %third-end)
}
"""


def test_pair_counts_once_and_overlaps_if_compute_lies_between():
    found = collectives.find_collectives(ASYNCHRONOUS, num_devices=4)
    assert [(c.kind, c.num_bytes, c.overlapped) for c in found] == [
        ("all-reduce", 32, True),
        ("all-gather", 256, True),
        ("reduce-scatter", 16, False),
    ]
    # A ring of 4: 2 x 3/4 of 32, 3/4 of 256, and three parts of 16.
    assert [c.sent_per_step for c in found] == [48, 192, 48]


def texts_for_four_devices():
    """HLO texts of programs whose collectives are known, by the names used below."""
    import jax.numpy as jnp
    from jax import lax

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2), ("a", "b"))

    def text_of(function, *shapes):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
        )
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(mapped).lower(*arguments).compile().as_text()

    def turn(x, _):
        return lax.psum(x, "a") * 0.5, None

    def turn_twice(x, _):
        return lax.scan(turn, x, length=3)[0], None

    return {
        "together": text_of(lambda x, y: lax.psum((x, y), ("a", "b")), (8, 3), (5,)),
        "pmap": jax.pmap(lambda x: lax.psum(x, "i"), axis_name="i")
        .lower(jnp.ones((4, 8, 3)))
        .compile()
        .as_text(),
        "one axis": text_of(lambda x: lax.psum(x, "b"), (8, 3)),
        "gather": text_of(lambda x: lax.all_gather(x, "a"), (8, 3)),
        "scatter": text_of(lambda x: lax.psum_scatter(x, "b", tiled=True), (8, 3)),
        "permute": text_of(lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)]), (8, 3)),
        "loop": text_of(lambda x: lax.scan(turn, x, length=7)[0], (8, 3)),
        "loop in a loop": text_of(lambda x: lax.scan(turn_twice, x, length=5)[0], (8, 3)),
        "nothing": text_of(lambda x: 2 * x, (8, 3)),
        "unknown": text_of(
            lambda x: lax.while_loop(lambda v: v[0, 0] < 9, lambda v: lax.psum(v, "a"), x), (8, 3)
        ),
    }


@pytest.fixture(scope="module")
def texts():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.path.dirname(scaling.__file__)
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # kind, bytes of the result on a device, group, times
        ("together", ("all-reduce", 96 + 20, 4, 1)),
        ("pmap", ("all-reduce", 96, 4, 1)),
        ("one axis", ("all-reduce", 96, 2, 1)),
        ("gather", ("all-gather", 192, 2, 1)),
        ("scatter", ("reduce-scatter", 48, 2, 1)),
        ("loop", ("all-reduce", 96, 2, 7)),
        ("loop in a loop", ("all-reduce", 96, 2, 15)),
    ],
)
def test_collectives_of_compiled_programs_are_found(texts, name, expected):
    (found,) = collectives.find_collectives(texts[name], num_devices=4)
    assert (found.kind, found.num_bytes, found.group_size, found.times) == expected
    assert not found.overlapped
    assert found.bytes_per_step == expected[1] * expected[3]


def test_each_neighbour_gets_all_of_what_is_permuted(texts):
    (found,) = collectives.find_collectives(texts["permute"], num_devices=4)
    assert (found.kind, found.sent_per_step) == ("collective-permute", 96)


def test_all_reduce_that_was_compiled_sends_the_ideal(texts):
    (found,) = collectives.find_collectives(texts["together"], num_devices=4)
    assert found.sent_per_step == scaling_model.ideal_bytes(4, 96 + 20) == 174


def test_program_without_collectives_has_none(texts):
    assert collectives.find_collectives(texts["nothing"], num_devices=4) == []


def test_loop_of_unknown_length_is_refused(texts):
    with pytest.raises(ValueError, match="its length is not known"):
        collectives.find_collectives(texts["unknown"], num_devices=4)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    print(json.dumps(texts_for_four_devices()))
