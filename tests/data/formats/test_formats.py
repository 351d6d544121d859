"""Formats beside NIfTI: what is read, and what is refused, file by file."""

import sys

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg.data import images, labels
from jaxseg.data.formats import registry
from jaxseg.data.label_values import LabelCoding
from jaxseg.problem import FileProblem


def sitk_image(values, spacing=(1.0, 2.0, 3.0), **options):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(values, **options)
    image.SetSpacing(spacing[: image.GetDimension()])
    return sitk, image


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_channels_of_a_volume_come_last(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 99, (5, 4, 3, 2)).astype(np.int16)
    sitk, image = sitk_image(values, isVector=True)
    path = str(tmp_path / f"a{suffix}")
    sitk.WriteImage(image, path)
    found, affine = images.read_image(path)
    np.testing.assert_array_equal(found, values.transpose(2, 1, 0, 3))
    np.testing.assert_array_equal(affine, np.diag([-1.0, -2.0, 3.0, 1.0]))
    assert images.describe_image(path).shape == (3, 4, 5, 2)


def test_nrrd_in_other_spaces_and_units(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    values = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    path = str(tmp_path / "a.nrrd")
    for space, signs in (("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1))):
        fields = {
            "space": space,
            "space directions": np.diag([1.0, 2, 3]),
            "space origin": [7, 8, 9],
        }
        nrrd.write(path, values, fields)
        _, affine = images.read_image(path)
        expected = np.diag([*signs, 1.0]) @ np.array(
            [[1.0, 0, 0, 7], [0, 2, 0, 8], [0, 0, 3, 9], [0, 0, 0, 1]]
        )
        np.testing.assert_array_equal(affine, expected)
    nrrd.write(path, values, fields | {"space units": ["um", "um", "um"]})
    header = images.describe_image(path)
    np.testing.assert_allclose(np.abs(np.diag(header.affine))[:3], [0.001, 0.002, 0.003])
    assert "the unit is um, sizes are converted to mm" in header.remarks[0].kind
    nrrd.write(path, values, fields | {"space": "scanner-xyz"})
    with pytest.raises(FileProblem, match="its space is 'scanner-xyz'"):
        images.read_image(path)
    nrrd.write(path, values, {"spacings": [1.0, 2.0, 3.0]})
    np.testing.assert_array_equal(images.read_image(path)[1], np.diag([-1.0, -2.0, 3.0, 1.0]))


@pytest.mark.parametrize("module", ["nrrd", "SimpleITK"])
def test_a_reader_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / ("a.nrrd" if module == "nrrd" else "a.mha")
    path.write_bytes(b"NRRD0004\n")
    with pytest.raises(FileProblem, match=rf"{module} is needed .*jaxseg\[formats\]"):
        images.read_image(path)


@pytest.mark.parametrize(
    "suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".tif", ".bmp"]
)
def test_nonsense_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for content in (
        b"",
        b"hello",
        b"NRRD0004\ntype: short\n\n",
        b"ObjectType = Image\nNDims = 3\n",
    ):
        path.write_bytes(content)
        for read in (images.read_image, lambda path: labels.read_label(path, LabelCoding())):
            with pytest.raises(FileProblem) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ") and "; " in str(caught.value)


def test_a_detached_header_without_its_data(tmp_path):
    pytest.importorskip("nrrd")
    sitk, image = sitk_image(np.zeros((5, 4, 3), np.int16))
    sitk.WriteImage(image, str(tmp_path / "a.nhdr"))
    (tmp_path / "a.raw").unlink()
    with pytest.raises(FileProblem, match=r"data file .* is missing"):
        images.read_image(tmp_path / "a.nhdr")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_16_bits_lose_none(tmp_path, suffix, channels):
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, channels)).astype(np.uint16)
    sitk, image = sitk_image(values if channels > 1 else values[..., 0], isVector=channels > 1)
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    found, _ = images.read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found[:, :, 0], values)
    assert images.describe_image(tmp_path / f"a{suffix}").shape == (6, 5, 1, channels)


def test_bmp(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.bmp")[0][:, :, 0], values)


def save_stack(path, values):
    pages = [
        Image.fromarray(np.ascontiguousarray(values[..., z].T)) for z in range(values.shape[2])
    ]
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_stack_of_pages_with_a_spacing_is_a_volume(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 250, (3, 4, 5)).astype(dtype)
    save_stack(tmp_path / "a_0000.tif", values)
    (tmp_path / "a.json").write_text('{"spacing": [3, 2, 1]}')
    assert registry.is_volume(tmp_path / "a_0000.tif")
    image, affine = images.read_image(tmp_path / "a_0000.tif")
    np.testing.assert_array_equal(image[..., 0], values)
    np.testing.assert_array_equal(affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileProblem, match=r"stack of 5 pictures.*\"spacing\": \[z, y, x\]"):
        images.read_image(tmp_path / "a_0000.tif")


@pytest.mark.parametrize("text", ["", '{"spacing": [1, 2]}', '{"spacing": [0, 1, 1]}'])
def test_a_spacing_that_is_none(tmp_path, text):
    save_stack(tmp_path / "a.tif", np.zeros((3, 4, 5), np.uint8))
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileProblem, match=r"a\.json: holds no spacing"):
        images.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"shapes": [], "version": "5.0"}'])
def test_an_annotation_beside_a_picture_makes_no_volume_of_it(tmp_path, text):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    (tmp_path / "a.json").write_text(text)
    assert not registry.is_volume(tmp_path / "a.tif")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.tif")[0][:, :, 0], pixels)


def test_a_palette_of_greys_is_grey(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (6, 5)).astype(np.uint8)
    picture = Image.fromarray(255 - grey)
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([255 - value for value in range(256) for _ in range(3)])
    picture.save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as saved:
        assert saved.mode == "P"
    np.testing.assert_array_equal(images.read_image(tmp_path / "grey.png")[0][..., 0, 0], grey)
    assert images.describe_image(tmp_path / "grey.png").shape == (6, 5, 1, 1)
    picture.putpalette([value for index in range(256) for value in (index, 0, 9)])
    picture.save(tmp_path / "colours.png")
    assert images.read_image(tmp_path / "colours.png")[0].shape == (6, 5, 1, 3)
    assert images.describe_image(tmp_path / "colours.png").shape == (6, 5, 1, 3)


def slice_of_itk(path):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.arange(12, dtype=np.int16).reshape(3, 4))
    image.SetSpacing((0.5, 2))
    image.SetOrigin((10, 20))
    image.SetDirection((0, -1, 1, 0))
    sitk.WriteImage(image, str(path))
    return sitk, image


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_slice_of_itk_is_read_and_answered_with_one(tmp_path, suffix):
    sitk, image = slice_of_itk(tmp_path / f"a{suffix}")
    values, affine = images.read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(values[:, :, 0, 0], np.arange(12).reshape(3, 4).T)
    for index in ((0, 0), (3, 2)):
        expected = np.array([*image.TransformIndexToPhysicalPoint(index), 0]) * (-1, -1, 1)
        np.testing.assert_allclose((affine @ [*index, 0, 1])[:3], expected)
    label = (values[..., 0] > 5).astype(np.uint8)
    probs = np.stack([1 - label, label], -1).astype(np.float32)
    labels.write_label(tmp_path / f"l{suffix}", label, affine, None, tmp_path / f"a{suffix}")
    images.write_map(tmp_path / f"p{suffix}", probs, affine, tmp_path / f"a{suffix}")
    written = sitk.ReadImage(str(tmp_path / f"l{suffix}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), label[:, :, 0].T)
    for found in (written, sitk.ReadImage(str(tmp_path / f"p{suffix}"))):
        for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(found, part)() == getattr(image, part)()
    np.testing.assert_array_equal(images.read_image(tmp_path / f"p{suffix}")[0], probs)


@pytest.mark.parametrize("has_spacings", [True, False])
def test_channels_first_without_a_space_are_answered(tmp_path, has_spacings):
    nrrd = pytest.importorskip("nrrd")
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    spacings = {"spacings": [np.nan, 0.5, 2]} if has_spacings else {}
    nrrd.write(str(tmp_path / "a.nrrd"), values, {"kinds": ["list", "domain", "domain"]} | spacings)
    image, affine = images.read_image(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(image[:, :, 0], np.moveaxis(values, 0, -1))
    np.testing.assert_array_equal(
        np.abs(np.diag(affine)), [*([0.5, 2] if has_spacings else [1, 1]), 1, 1]
    )
    labels.write_label(
        tmp_path / "l.nrrd", image[..., 0].astype(np.uint8), affine, range(30), tmp_path / "a.nrrd"
    )
    label, label_affine = labels.read_label(tmp_path / "l.nrrd", LabelCoding(tuple(range(30))))
    np.testing.assert_array_equal(label[:, :, 0], values[0])
    np.testing.assert_array_equal(label_affine, affine)


def test_a_slice_in_space_stands_upright_on_its_third_axis(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    fields = {
        "space": "LPS",
        "space directions": [[0, 0.5, 0], [0, 0, 2]],
        "space origin": [7, 8, 9],
    }
    nrrd.write(str(tmp_path / "a.nrrd"), np.ones((3, 4), np.int16), fields)
    affine = images.describe_image(tmp_path / "a.nrrd").affine
    expected = [[0, 0, -1, -7], [-0.5, 0, 0, -8], [0, 2, 0, 9], [0, 0, 0, 1]]
    np.testing.assert_array_equal(affine, expected)


@pytest.mark.parametrize("space", ["LPS", "lps", "Left-Posterior-Superior"])
def test_the_case_of_a_space_does_not_matter(tmp_path, space):
    nrrd = pytest.importorskip("nrrd")
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "a.nrrd"
    fields = {"space": space, "space directions": np.eye(3), "space origin": [7, 8, 9]}
    nrrd.write(str(path), np.ones((3, 4, 5), np.int16), fields)
    np.testing.assert_array_equal(images.describe_image(path).affine[:3, 3], [-7, -8, 9])
    assert sitk.ReadImage(str(path)).GetOrigin() == (7, 8, 9)


def test_a_volume_whose_space_is_a_number_of_axes_is_answered_so(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    sitk = pytest.importorskip("SimpleITK")
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    fields = {"space dimension": 3, "space directions": np.diag([0.5, 2, 3.0])}
    nrrd.write(str(tmp_path / "a.nrrd"), values, fields | {"space origin": [7, 8, 9]})
    image, affine = images.read_image(tmp_path / "a.nrrd")
    label = (image[..., 0] > 9).astype(np.uint8)
    labels.write_label(tmp_path / "l.nrrd", label, affine, None, like=tmp_path / "a.nrrd")
    written, source = (sitk.ReadImage(str(tmp_path / f"{name}.nrrd")) for name in "la")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), label.T)
    for part in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, part)() == getattr(source, part)()


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_whose_voxels_are_elsewhere_is_not_described_without_them(tmp_path, suffix):
    sitk, image = sitk_image(np.zeros((9, 8, 7), np.int16))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    (tmp_path / "a.raw").unlink()
    match = rf"a\{suffix}: its data file .*a\.raw is missing; copy both"
    for read in (images.read_image, images.bytes_to_read, labels.decode_label):
        with pytest.raises(FileProblem, match=match):
            read(tmp_path / f"a{suffix}")


def test_packed_voxels_beside_a_header_are_checked(tmp_path):
    sitk, image = sitk_image(np.arange(504, dtype=np.int16).reshape(9, 8, 7))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"), useCompression=True)
    assert images.read_image(tmp_path / "a.mhd")[0].max() == 503
    content = (tmp_path / "a.zraw").read_bytes()
    (tmp_path / "a.zraw").write_bytes(content[:-30])
    with pytest.raises(FileProblem, match=r"a\.zraw: cut short, its packed voxels have no end"):
        images.read_image(tmp_path / "a.mhd")
    (tmp_path / "a.zraw").write_bytes(content[:100] + b"\0\0" + content[102:])
    with pytest.raises(FileProblem, match=r"a\.mhd: not a readable MetaImage file \("):
        images.read_image(tmp_path / "a.mhd")


def test_what_is_missing_of_a_metaimage_is_named(tmp_path):
    sitk, image = sitk_image(np.zeros((9, 8, 7), np.int16))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content[:-40])
    with pytest.raises(FileProblem, match=r"a\.mha: .*its data is cut short\); copy it again"):
        images.read_image(tmp_path / "a.mha")
    for other in (content[:150], b"\x89PNG and so on"):
        (tmp_path / "a.mha").write_bytes(other)
        with pytest.raises(FileProblem, match="not a MetaImage file or cut short, its header has"):
            images.read_image(tmp_path / "a.mha")


@pytest.mark.parametrize("num_held", [90, 283, 400, 787])
def test_a_cut_file_of_freesurfer_says_so(tmp_path, caplog, num_held):
    labels.write_label(tmp_path / "a.mgh", np.zeros((9, 8, 7), np.uint8), np.eye(4), None)
    content = (tmp_path / "a.mgh").read_bytes()
    (tmp_path / "a.mgh").write_bytes(content[:num_held])
    num_expected = 284 if num_held < 284 else 284 + 9 * 8 * 7
    match = rf"a\.mgh: cut short, it holds {num_held} of {num_expected} bytes; copy it again"
    with pytest.raises(FileProblem, match=match):
        images.read_image(tmp_path / "a.mgh")
    (tmp_path / "a.mgh").write_bytes(b"\1" + content[1:])
    with pytest.raises(FileProblem, match="Unknown MGH format version"):
        images.read_image(tmp_path / "a.mgh")
    assert not caplog.records  # of nibabel, without the name of the file


def test_a_volume_of_freesurfer_without_place_is_said(tmp_path):
    path = tmp_path / "a.mgh"
    labels.write_label(path, np.zeros((9, 8, 7), np.uint8), np.diag([2.0, 3, 4, 1]), None)
    assert not images.describe_image(path).remarks
    content = path.read_bytes()
    path.write_bytes(content[:28] + b"\0\0" + content[30:])
    for found in (images.describe_image(path), images.read_volume(path)):
        np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), 1)
        assert "neither place nor spacing, 1 mm is taken" in found.remarks[0].kind


@pytest.mark.parametrize("suffix", [".mgz", ".nii.gz", ".nrrd", ".mha"])
def test_a_packed_file_that_is_damaged_is_not_read_as_other_values(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(0)
    label = rng.integers(0, 200, (9, 8, 7)).astype(np.uint8)
    labels.write_label(path, label, np.eye(4), range(200))
    content, num_refused = path.read_bytes(), 0
    for place in range(len(content) - 200, len(content) - 10, 5):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(labels.decode_label(path).values, label)
        except FileProblem:
            num_refused += 1
    assert num_refused > 30


@pytest.mark.parametrize("suffix", [".nii", ".mgh", ".nrrd", ".mha"])
def test_a_header_that_says_far_more_than_there_is_is_no_want_of_memory(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    labels.write_label(path, np.ones((9, 8, 7), np.uint8), np.eye(4), None)
    content = path.read_bytes()
    for old, new in (
        (np.array([9, 8, 7], "<i2").tobytes(), np.array([30000] * 3, "<i2").tobytes()),
        (np.array([9, 8, 7], ">i4").tobytes(), np.array([30000] * 3, ">i4").tobytes()),
        (b"9 8 7", b"30000 30000 30000"),
    ):
        content = content.replace(old, new, 1)
    path.write_bytes(content)
    with pytest.raises(
        FileProblem, match=r"header says \d+ bytes of voxels, \d+ bytes are|cut short"
    ):
        images.bytes_to_read(path)


def test_channels_in_files_of_their_own(tmp_path):
    import nibabel

    values = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    near = np.eye(4)
    near[0, 3] = 0.2
    paths = [str(tmp_path / f"a_000{channel}.nii.gz") for channel in range(2)]
    for path, channel, affine in zip(
        paths, values.transpose(3, 0, 1, 2), (np.eye(4), near), strict=True
    ):
        nibabel.save(nibabel.Nifti1Image(channel, affine), path)
    volume = images.read_volume(paths)
    np.testing.assert_array_equal(volume.values, values)
    np.testing.assert_array_equal(volume.affine, np.eye(4))
    assert "by up to 0.2 voxels" in volume.remarks[0].detail
    nibabel.save(nibabel.Nifti1Image(values[:, :, :4, 0], np.eye(4)), paths[1])
    with pytest.raises(FileProblem, match=r"a_0001.*shape \[3, 4, 4\], but .*a_0000"):
        images.read_volume(paths)


def test_names_of_formats():
    assert registry.stem_of("x/a.b.nii.gz") == "x/a.b" and registry.stem_of("a.MHA") == "a"
    assert registry.stem_of("a.png") == "a"
    assert registry.output_suffixes("a.nii") == (".nii.gz", ".nii.gz")
    assert registry.output_suffixes("a.mgh") == (".mgz", ".mgz")
    assert registry.output_suffixes("a.jpg") == (".png", ".tif")
    assert registry.is_image("a.NRRD") and not registry.is_image("a.webp")


def test_a_slice_stays_a_slice(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4), np.uint8), np.eye(4)), tmp_path / "a.nii")
    read = images.read_image(tmp_path / "a.nii")
    labels.write_label(
        tmp_path / "b.nii", np.ones((5, 4, 1), np.uint8), read[1], None, like=tmp_path / "a.nii"
    )
    assert nibabel.load(tmp_path / "b.nii").shape == (5, 4)
    labels.read_label(tmp_path / "b.nii", LabelCoding((0, 1)))


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_voxels_beside_a_header_are_files_of_the_image(tmp_path, suffix):
    sitk, image = sitk_image(np.zeros((3, 4, 5), np.int16))
    (tmp_path / "a.b").mkdir()
    path = tmp_path / "a.b" / f"c{suffix}"
    sitk.WriteImage(image, str(path))
    (voxels,) = set(path.parent.iterdir()) - {path}
    assert registry.files_of(path) == [str(path), str(voxels)]
    voxels.unlink()
    assert registry.files_of(path) == [str(path), str(voxels)]
    path.unlink()
    assert registry.files_of(path) == [str(path)]
    whole = path.with_suffix({".mhd": ".mha", ".nhdr": ".nrrd"}[suffix])
    sitk.WriteImage(image, str(whole))
    assert registry.files_of(whole) == [str(whole)]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("LOCAL", []),
        ("a b.raw", ["a b.raw"]),
        ("s%02d.raw 1 5 2", ["s01.raw", "s03.raw", "s05.raw"]),
        ("50% dose.raw", ["50% dose.raw"]),
        ("100%.raw", ["100%.raw"]),
        ("LIST\nx.raw\ny.raw", ["x.raw", "y.raw"]),
    ],
)
def test_a_metaimage_names_its_files_in_several_ways(tmp_path, value, names):
    path = tmp_path / "a.mhd"
    path.write_text(f"ObjectType = Image\nNDims = 3\nElementDataFile = {value}\n")
    assert registry.files_of(path) == [str(path), *(str(tmp_path / name) for name in names)]


def test_the_spacing_beside_a_stack_is_a_file_of_it(tmp_path):
    (tmp_path / "a.json").write_text('{"spacing": [3, 1, 1]}')
    stack = str(tmp_path / "a_0001.tif")
    assert registry.files_of(stack) == [stack, str(tmp_path / "a.json")]
    assert registry.files_written("out/a.tif", stack) == ["out/a.tif", "out/a.json"]
    assert registry.files_written("out/a.tif", tmp_path / "b.tif") == ["out/a.tif"]
    assert registry.files_of(tmp_path / "b.tif") == [str(tmp_path / "b.tif")]
