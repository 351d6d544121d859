"""Where a NIfTI volume lies, against ITK, which reads the same headers."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jaxseg.data import images
from jaxseg.data.formats import nifti
from jaxseg.data.formats.volume import Remark, grouped
from jaxseg.problem import FileProblem

SHAPE = (7, 6, 5)
TURN = Rotation.from_euler("xyz", [10, -20, 33], degrees=True).as_matrix()


def affine_of(spacing, turn=TURN, origin=(12.5, -40.0, 7.25)):
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = origin
    return affine


def save(path, sform, sform_code=1, qform=None, qform_code=0, pixdim=None, unit=2):
    """A NIfTI file whose header says exactly that."""
    image = nibabel.Nifti1Image(np.arange(210, dtype=np.int16).reshape(SHAPE), None)
    header = image.header
    if qform is not None:
        header.set_qform(qform, qform_code, strip_shears=False)
    if sform is not None:
        header.set_sform(sform, sform_code)
    header["qform_code"] = qform_code
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    header["xyzt_units"] = unit
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<3f", raw, 80, *header["pixdim"][1:4])  # nibabel would mend it
    struct.pack_into("<2h", raw, 252, qform_code, sform_code if sform is not None else 0)
    path.write_bytes(raw)
    return path


def itk_affine(path):
    """Where ITK puts the voxels, in RAS+."""
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


FLIPS = np.diag([-1.0, -1.0, 1.0, 1.0])
TRUE = (1.5, 1.5, 10.0)
HEADERS = {
    "all agree": ({"sform": affine_of(TRUE), "pixdim": TRUE}, None),
    "pixdim against sform": ({"sform": FLIPS, "sform_code": 2, "pixdim": TRUE, "unit": 0}, "sform"),
    "micrometre": ({"sform": affine_of(TRUE), "pixdim": TRUE, "unit": 3}, "micrometre"),
    "metre": ({"sform": affine_of(TRUE), "pixdim": TRUE, "unit": 1}, "metre"),
    "unknown unit": ({"sform": affine_of(TRUE), "pixdim": TRUE, "unit": 0}, None),
    "micrometre against sform": ({"sform": FLIPS, "pixdim": TRUE, "unit": 3}, "pixdim"),
    "qform alone": ({"sform": None, "qform": affine_of(TRUE), "qform_code": 1}, None),
    "zero sform": (
        {"sform": np.diag([0.0, 0, 0, 1]), "qform": affine_of(TRUE), "qform_code": 1},
        "the sform is unusable",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADERS)
def test_a_volume_lies_where_itk_puts_it(tmp_path, name):
    options, said = HEADERS[name]
    path = save(tmp_path / "a.nii", **options)
    header = images.describe_image(path)
    if name != "zero sform":  # which ITK takes for a place
        np.testing.assert_allclose(header.affine, itk_affine(path), rtol=1e-5, atol=1e-6)
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    factor = {1: 1000.0, 3: 0.001}.get(options.get("unit"), 1.0)
    np.testing.assert_allclose(spacing, np.multiply(TRUE, factor), rtol=1e-5)
    assert any(said in remark.kind for remark in header.remarks) if said else not header.remarks
    assert len(header.remarks) == (2 if name == "micrometre against sform" else bool(said))
    volume = nifti.read(path, None, "pixdim")
    np.testing.assert_array_equal(volume.affine, header.affine)


def test_the_user_may_believe_the_sform(tmp_path):
    path = save(tmp_path / "a.nii", FLIPS, 2, pixdim=TRUE)
    by_pixdim, by_sform = (images.describe_image(path, name) for name in ("pixdim", "sform"))
    np.testing.assert_allclose(by_pixdim.affine, np.diag([-1.5, -1.5, 10, 1]))
    np.testing.assert_array_equal(by_sform.affine, FLIPS)
    assert "pixdim is taken, as ITK does" in by_pixdim.remarks[0].kind
    assert "sform is taken" in by_sform.remarks[0].kind
    assert by_sform.remarks[0].detail == "sform 1 x 1 x 1, pixdim 1.5 x 1.5 x 10"


def test_where_header_and_matrix_agree_the_matrix_counts_to_the_bit(tmp_path):
    affine = affine_of(TRUE).astype(np.float32).astype(np.float64)
    path = save(tmp_path / "a.nii", affine, pixdim=np.float32(TRUE))
    np.testing.assert_array_equal(images.describe_image(path).affine, affine)


@pytest.mark.parametrize("pixdim", [(0.0, 1.0, 1.0), (np.nan, 1.0, 1.0)])
@pytest.mark.filterwarnings("ignore")
def test_a_pixdim_that_is_no_spacing_is_said(tmp_path, pixdim):
    path = save(tmp_path / "a.nii", affine_of(TRUE), pixdim=pixdim)
    header = images.describe_image(path)
    np.testing.assert_allclose(header.affine, affine_of(TRUE), rtol=1e-6)
    assert "pixdim is no spacing" in header.remarks[0].kind


def test_an_impossible_quaternion_beside_a_good_matrix_is_said(tmp_path):
    path = save(tmp_path / "a.nii", affine_of(TRUE), 1, affine_of(TRUE), 1, TRUE)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<3f", raw, 256, 0.9, 0.9, 0.9)
    path.write_bytes(raw)
    header = images.describe_image(path)
    np.testing.assert_allclose(header.affine, affine_of(TRUE), rtol=1e-6)
    assert [remark.kind for remark in header.remarks] == [
        "the qform is unusable, the sform is taken"
    ]
    struct.pack_into("<h", raw, 254, 0)  # no sform
    path.write_bytes(raw)
    with pytest.raises(
        FileProblem, match=r"a\.nii: not a readable NIfTI file \(w2 should be positive"
    ):
        images.read_image(path)


def test_a_form_of_an_unknown_code_is_not_taken_and_that_is_said(tmp_path, caplog):
    turned = affine_of(TRUE, turn=np.eye(3))
    for sform_code, qform_code, taken, detail in (
        (9, 1, turned, "sform_code 9"),
        (1, 7, affine_of(TRUE), "qform_code 7"),
        (9, -1, None, "sform_code 9, qform_code -1"),
    ):
        path = save(tmp_path / "a.nii", affine_of(TRUE), 1, turned, 1, TRUE)
        raw = bytearray(path.read_bytes())
        struct.pack_into("<2h", raw, 252, qform_code, sform_code)
        path.write_bytes(raw)
        header = images.describe_image(path)
        if taken is not None:
            np.testing.assert_allclose(header.affine, taken, rtol=1e-6)
            np.testing.assert_allclose(header.affine, itk_affine(path), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(header.affine[:3, :3], axis=0), TRUE, rtol=1e-6)
        [remark] = header.remarks
        assert remark.kind.startswith("a code that NIfTI does not know") and remark.detail == detail
    assert not caplog.records


def test_a_header_without_place_and_spacing_is_said_by_name(tmp_path, caplog):
    path = save(tmp_path / "a.nii", None, pixdim=(0.0, 1.5, 0.0))
    caplog.clear()
    header = images.describe_image(path)
    np.testing.assert_allclose(np.abs(np.diag(header.affine)), [1, 1.5, 1, 1])
    [remark] = header.remarks
    assert "neither place nor spacing, 1 mm is taken" in remark.kind
    assert remark.detail == "pixdim 0 x 1.5 x 0, no sform and no qform"
    assert not caplog.records  # nibabel's own lines name no file
    assert not images.describe_image(save(tmp_path / "b.nii", None, pixdim=TRUE)).remarks


def test_two_forms_of_one_space_that_differ_are_said(tmp_path):
    other = affine_of(TRUE, origin=(12.5, -43.0, 7.25))
    path = save(tmp_path / "a.nii", affine_of(TRUE), 1, other, 1, TRUE)
    [remark] = images.describe_image(path).remarks
    assert "sform and qform lead to one space but differ" in remark.kind
    path = save(tmp_path / "b.nii", affine_of(TRUE), 4, other, 1, TRUE)  # another space: as it is
    assert not images.describe_image(path).remarks


def test_a_file_that_is_packed_or_not_is_read_whatever_its_name(tmp_path):
    plain = save(tmp_path / "a.nii", affine_of(TRUE), pixdim=TRUE).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    expected, _ = images.read_image(tmp_path / "a.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(images.read_image(tmp_path / name)[0], expected)


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        ((3, 4, 5, 1, 1), (3, 4, 5, 1)),
        ((3, 4, 5, 1, 2), (3, 4, 5, 2)),
        ((3, 4, 5, 2, 1), (3, 4, 5, 2)),
        ((3, 4), (3, 4, 1, 1)),
    ],
)
def test_axes_of_one_at_the_end_or_in_place_of_time_are_none(tmp_path, stored, seen):
    values = np.arange(np.prod(stored), dtype=np.int16).reshape(stored)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    image, _ = images.read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(image, values.reshape(seen))


def test_remarks_are_told_once_for_all_files():
    same = Remark("is odd", "1 x 2")
    lines = grouped({"a": [same], "b": [same, Remark("is even", "3")], "c": []})
    assert lines == [
        "2 files, for example the first: is odd (a: 1 x 2)",
        "1 file: is even (b: 3)",
    ]


def test_the_real_cardiac_set_has_the_size_of_hearts(shared_data):
    root = shared_data("Dataset027_ACDC")
    for path in sorted((root / "imagesTr").glob("*"))[:6]:
        header = images.describe_image(path)
        spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
        np.testing.assert_allclose(spacing, nibabel.load(path).header["pixdim"][1:4], rtol=1e-3)
