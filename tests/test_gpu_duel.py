"""The duel of both libraries on a tiny task, without a GPU; and that it refuses to pretend."""

import dataclasses

import gpu_duel
import gpu_duel_sides
import numpy as np
import pytest

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def task():
    """Balls in noise, one of them held out."""
    task = gpu_duel.synthetic(16, features=(4, 8, 8))
    return dataclasses.replace(
        task, held_images=task.images[:1], held_labels=(task.labels[0],), dtype="float32"
    )


def test_both_sides_learn_the_same(task):
    weights = gpu_duel_sides.initial_weights(task)
    sides = gpu_duel_sides.Jaxseg(task, weights), gpu_duel_sides.Torch(task, weights, False)
    firsts, lasts = zip(
        *((side.warm_up(), side.train(0.3, 0.0, 1.0)) for side in sides), strict=True
    )
    losses = [row["first_loss"] for row in firsts]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    early = [row["loss"] for row in firsts]  # after eleven steps
    assert early[0] == pytest.approx(early[1], rel=1e-2)
    for side, first, last in zip(sides, losses, lasts, strict=True):
        assert last["loss"] < first
        assert last["steps"] == side.steps > 0
        assert 0 <= last["dice"] <= 1
    assert sides[0].size()["tflop_per_step"] > 0


def test_a_side_that_fails_is_a_row_and_the_others_go_on(task, monkeypatch):
    rows = []
    bare = dataclasses.replace(task, held_images=None, held_labels=(), features=(4, 8))
    names = "jaxseg, NHWC", "torch, not compiled"
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag")
    gpu_duel.duel(bare, names, rounds=1, seconds=0.1, write=rows.append)
    assert [(row["side"], row["after"]) for row in rows] == [
        (names[0], "warm_up"),
        (names[1], "warm_up"),
        (names[1], "train"),
    ]
    assert "xla_no_such_flag" in rows[0]["error"]
    lines = gpu_duel.table(rows)
    assert lines[1].endswith("failed")
    assert "nan" in lines[2]


def test_what_is_fitted_comes_back():
    array = np.arange(60).reshape(3, 4, 5)
    padded = gpu_duel_sides.fit(array, (6, 4, 8))
    assert padded.shape == (6, 4, 8)
    np.testing.assert_array_equal(gpu_duel_sides.fit(padded, array.shape), array)


def test_cases_are_read_as_far_as_they_are_there(make_msd_folder):
    folder = make_msd_folder(num_cases=4, spacing_mm=(1.0, 1.0, 1.0))
    (folder / "subject_split.json").write_text(
        '{"train": ["case_00", "case_03"], "val": ["case_01"]}'
    )
    (folder / "imagesTr" / "case_03.nii.gz").unlink()
    task = gpu_duel.hippocampus(folder)
    assert task.images.shape == (1, 40, 56, 40, 1)
    assert task.held_images.shape == (1, 24, 24, 8, 1)
    assert set(np.unique(task.labels)) == {0, 1, 2}


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_duel.sys, "argv", ["duel", "--data=x", f"--out={tmp_path / 'rows'}"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here; nothing was measured"):
        gpu_duel.main()
    assert not (tmp_path / "rows").exists()
