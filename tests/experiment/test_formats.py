"""From a file in any format to its prediction in the same, as independent readers find it."""

import json
import pathlib

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from jaxseg.data import images
from jaxseg.data.formats import registry
from jaxseg.experiment.predict_folder import predict

nrrd = pytest.importorskip("nrrd")
sitk = pytest.importorskip("SimpleITK")

TURN = Rotation.from_euler("xyz", [4, -6, 8], degrees=True).as_matrix()
SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd")


@pytest.fixture(scope="module")
def predicted(finished_run, tmp_path_factory):
    """(input folder, output folder) of one scan in every format, predicted."""
    run, data = finished_run
    source, out = (tmp_path_factory.mktemp(name) for name in ("in", "out"))
    values = np.asarray(nibabel.load(data / "imagesTr" / "case_00.nii.gz").dataobj, np.float32)
    affine = np.eye(4)
    affine[:3, :3] = TURN @ np.diag([-0.9, 1.1, 2.0])
    affine[:3, 3] = (12.345, -40.5, 7 / 3)
    nibabel.save(nibabel.Nifti1Image(values, affine), source / "a.nii")
    nibabel.save(nibabel.Nifti1Image(values, affine), source / "b.nii.gz")
    nibabel.save(nibabel.Nifti2Image(values, affine), source / "c.nii.gz")
    nibabel.save(nibabel.MGHImage(values, affine), source / "d.mgz")
    nibabel.save(nibabel.MGHImage(values, affine), source / "e.mgh")
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    to_lps = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing((0.9, 1.1, 2.0))
    image.SetDirection((to_lps @ TURN @ np.diag([-1.0, 1, 1])).ravel().tolist())
    image.SetOrigin((to_lps @ affine[:3, 3]).tolist())
    for name in ("f.nrrd", "g.nhdr", "h.mha", "i.mhd"):
        sitk.WriteImage(image, str(source / name), useCompression=True)
    pages = [
        Image.fromarray(np.ascontiguousarray(values[..., z].T)) for z in range(values.shape[2])
    ]
    pages[0].save(source / "j.tif", save_all=True, append_images=pages[1:])
    (source / "j.json").write_text(json.dumps({"spacing": [2.0, 1.1, 0.9]}))
    num_done, _, failed = predict([str(run)], str(source), str(out), outputs=("label", "probs"))
    assert not failed and num_done == 10
    return source, out


def in_and_out(predicted, *suffixes):
    """Pairs of the path of an image and that of its label, for some formats."""
    source, out = predicted
    found = [path for path in sorted(source.iterdir()) if path.name.endswith(suffixes)]
    assert found
    for path in found:
        suffix, _ = registry.output_suffixes(path)
        yield path, pathlib.Path(out, pathlib.Path(registry.stem_of(path)).name + suffix)


def test_every_format_gets_the_same_label(predicted):
    labels = []
    for path, written in in_and_out(predicted, *SUFFIXES):
        labels.append(images.read_image(written)[0])
        assert labels[-1].shape == images.read_image(path)[0].shape
        np.testing.assert_array_equal(labels[-1], labels[0])
        assert set(np.unique(labels[-1])) == {0, 1, 2}


def test_itk_finds_the_label_where_it_finds_the_image(predicted):
    for path, written in in_and_out(
        predicted, "a.nii", "b.nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"
    ):
        image, label = (sitk.ReadImage(str(file)) for file in (path, written))
        for field in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(label, field)() == getattr(image, field)(), (path.name, field)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of nibabel's MGH
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nibabel_finds_the_label_where_it_finds_the_image(predicted):
    for path, written in in_and_out(predicted, ".nii", ".nii.gz", ".mgz", ".mgh"):
        image, label = nibabel.load(path), nibabel.load(written)
        assert type(label) is type(image)
        np.testing.assert_array_equal(label.affine, image.affine)
        np.testing.assert_array_equal(label.header.get_zooms()[:3], image.header.get_zooms()[:3])
        ours, _ = images.read_image(written)
        np.testing.assert_array_equal(np.asarray(label.dataobj), ours[..., 0])


def test_pynrrd_finds_the_label_where_it_finds_the_image(predicted):
    for path, written in in_and_out(predicted, ".nrrd", ".nhdr"):
        image, (values, label) = nrrd.read_header(str(path)), nrrd.read(str(written))
        for field in ("space", "space directions", "space origin"):
            np.testing.assert_array_equal(label[field], image[field])
        np.testing.assert_array_equal(values, images.read_image(written)[0][..., 0])


def test_a_stack_of_pages_keeps_its_spacing(predicted):
    [(path, written)] = in_and_out(predicted, ".tif")
    assert written.with_suffix(".json").read_text() == path.with_suffix(".json").read_text()
    with Image.open(written) as picture:
        pages = []
        for page in range(picture.n_frames):
            picture.seek(page)
            pages.append(np.asarray(picture).T)
    label, affine = images.read_image(written)
    np.testing.assert_array_equal(np.stack(pages, -1), label[..., 0])
    np.testing.assert_array_equal(affine, np.diag([0.9, 1.1, 2.0, 1.0]))


def test_maps_have_a_channel_for_each_class(predicted):
    _, out = predicted
    expected, _ = images.read_image(out / "b_probs.nii.gz")
    assert expected.shape[3] == 3
    for name in ("d_probs.mgz", "f_probs.nrrd", "h_probs.mha"):
        found, _ = images.read_image(out / name)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_headers_say_what_reading_finds(predicted, suffix):
    for path, _ in in_and_out(predicted, suffix):
        header = images.describe_image(path)
        image, affine = images.read_image(path)
        assert (*header.shape, 1)[:4] == image.shape and header.dtype.kind == "f"
        np.testing.assert_array_equal(header.affine, affine)
