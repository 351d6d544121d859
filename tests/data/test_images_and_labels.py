import gzip
import os
import pathlib
import tracemalloc

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxseg.data import images, labels
from jaxseg.data.formats import nifti, registry
from jaxseg.data.label_values import IGNORED, LabelCoding
from jaxseg.problem import FileProblem

OBLIQUE = np.array(
    [[0.7, -0.3, 0.1, -12.5], [0.4, 0.8, -0.2, 33.25], [0.05, 0.1, 2.5, 7], [0, 0, 0, 1]],
    np.float32,
)


def shared_data(name):
    path = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs the real images in {path}")
    return path


def save_nifti(path, values, affine=OBLIQUE, image_class=nibabel.Nifti1Image, scaling=None):
    image = image_class(values, affine, dtype=values.dtype)
    if scaling:
        image.header.set_slope_inter(*scaling)
    nibabel.save(image, path)
    return path


def save_picture(path, pixels, mode=None):
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def random_values(dtype, shape=(3, 4, 5)):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nii", True), ("a.nii.gz", True), ("A.NII.GZ", True), ("a.gz", False), ("a.png", False)],
)
def test_is_nifti(name, expected):
    assert registry.is_volume(name) is expected
    assert registry.is_volume(pathlib.Path("folder.nii", name)) is expected


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [">i2", np.uint8, np.uint16, np.float32, np.float64])
def test_read_image_gives_the_stored_values_and_affine(tmp_path, suffix, image_class, dtype):
    values = random_values(dtype)
    path = save_nifti(tmp_path / f"a{suffix}", values, image_class=image_class)
    image, affine = images.read_image(path)
    assert image.dtype == np.float32
    assert affine.dtype == np.float64
    np.testing.assert_array_equal(image, values[..., None])
    np.testing.assert_array_equal(affine, OBLIQUE)


def test_read_image_applies_the_file_scaling(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", random_values(np.int16))
    stored = np.asarray(nibabel.load(path).dataobj)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(content))
    image, _ = images.read_image(path)
    np.testing.assert_array_equal(image[..., 0], stored * 0.5 - 1024)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("scaling", [None, (0.25, -1024), (np.float32(1 / 3), 7)])
def test_read_image_in_pieces_is_what_nibabel_reads(tmp_path, monkeypatch, suffix, scaling):
    monkeypatch.setattr(nifti, "_VOXELS_AT_ONCE", 7)
    path = tmp_path / f"a{suffix}"
    save_nifti(path, random_values(np.int16, (3, 4, 5, 2)), scaling=scaling)
    image, _ = images.read_image(path)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, np.asarray(nibabel.load(path).dataobj, np.float32))


def test_read_image_of_another_byte_order(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    values = random_values(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, OBLIQUE, header), tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    image, affine = images.read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(image[..., 0], values)
    np.testing.assert_array_equal(affine, OBLIQUE)
    labels.write_label(tmp_path / "b.nii", values, affine, range(200), like=tmp_path / "a.nii")
    label, affine = labels.read_label(tmp_path / "b.nii", LabelCoding(tuple(range(200))))
    np.testing.assert_array_equal(label, values)
    np.testing.assert_array_equal(affine, OBLIQUE)


def test_read_image_holds_little_more_than_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, "_VOXELS_AT_ONCE", 1 << 14)
    values = np.random.default_rng(0).integers(-1000, 1000, (128, 128, 64)).astype(np.int16)
    path = save_nifti(tmp_path / "a.nii.gz", values, scaling=(0.5, 0))
    tracemalloc.start()
    try:
        image, _ = images.read_image(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.nbytes <= peak < 1.2 * image.nbytes


@pytest.mark.parametrize("num_channels", [1, 2, 4])
def test_read_image_takes_a_fourth_axis_as_channels(tmp_path, num_channels):
    values = random_values(np.int16, (3, 4, 5, num_channels))
    image, _ = images.read_image(save_nifti(tmp_path / "a.nii", values))
    np.testing.assert_array_equal(image, values)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey.png", random_values(np.uint8, (3, 4))),
        ("grey.tif", random_values(np.uint8, (3, 4))),
        ("deep.png", random_values(np.uint16, (3, 4)) * 300),
        ("deep.tif", random_values(np.uint16, (3, 4)) * 300),
        ("real.tif", random_values(np.float32, (3, 4)) / 7),
        ("bits.png", random_values(np.uint8, (3, 4)) > 100),
        ("rgb.png", random_values(np.uint8, (3, 4, 3))),
        ("rgb.tiff", random_values(np.uint8, (3, 4, 3))),
    ],
)
def test_read_image_gives_the_pixels_of_a_picture(tmp_path, name, pixels):
    image, affine = images.read_image(save_picture(tmp_path / name, pixels))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, pixels.reshape(3, 4, 1, -1))
    np.testing.assert_array_equal(affine, np.eye(4))


@pytest.mark.parametrize("num_channels", [1, 3])
def test_read_image_drops_an_opaque_alpha_channel_only(tmp_path, num_channels):
    pixels = np.full((3, 4, num_channels + 1), 255, np.uint8)
    pixels[..., :-1] = random_values(np.uint8, (3, 4, num_channels))
    image, _ = images.read_image(save_picture(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(image[:, :, 0], pixels[..., :-1])
    pixels[1, 2, -1] = 254
    pixels[0, 0, -1] = 0
    path = save_picture(tmp_path / "a.png", pixels)
    with pytest.raises(FileProblem, match=r"a\.png: 2 transparent pixels.*alpha"):
        images.read_image(path)


def test_read_image_gives_the_colours_of_a_palette_and_read_label_its_indices(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    colours = np.array([[9, 8, 7], [200, 0, 0], [0, 100, 50]], np.uint8)
    picture = Image.fromarray(indices, "L")
    picture.putpalette(colours.ravel().tolist())
    picture.save(tmp_path / "a.png")
    image, _ = images.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image[:, :, 0], colours[indices])
    label, _ = labels.read_label(tmp_path / "a.png", LabelCoding((0, 1, 2)))
    np.testing.assert_array_equal(label[..., 0], indices)


def test_read_image_refuses_a_palette_with_transparency(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "L")
    picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.save(tmp_path / "a.png", transparency=b"\x00\xff")
    with pytest.raises(FileProblem, match="1 transparent pixels"):
        images.read_image(tmp_path / "a.png")


def test_read_image_of_a_jpeg(tmp_path):
    pixels = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    image, _ = images.read_image(save_picture(tmp_path / "a.jpg", pixels))
    np.testing.assert_allclose(image[:, :, 0], pixels, atol=3)


def damaged_files(folder):
    """Name of a file that cannot be decoded -> what its message says."""
    good = save_nifti(folder / "good.nii", random_values(np.int16)).read_bytes()
    packed = gzip.compress(good, mtime=0)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in the check sum
    huge = good[:42] + np.array([32767] * 3, "<i2").tobytes() + good[48:]
    num_claimed = 352 + 2 * 32767**3
    contents = {
        "cut.nii.gz": (gzip.compress(good[:-20]), f"it holds {len(good) - 20} of {len(good)} "),
        "huge.nii": (huge, f"it holds {len(good)} of {num_claimed} bytes"),
        "huge.nii.gz": (gzip.compress(huge), f"it holds {len(good)} of {num_claimed} bytes"),
        "empty.nii": (b"", "the file is empty"),
        "empty.nii.gz": (b"", "the file is empty"),
        "empty.png": (b"", "the file is empty"),
        "half.nii.gz": (packed[: len(packed) // 2], "damaged gzip file"),
        "tail.nii.gz": (packed[:-4], "damaged gzip file"),
        "sum.nii.gz": (bytes(flipped), "damaged gzip file"),
        "garbled.nii.gz": (packed[:12] + b"\xff" * 40 + packed[52:], "damaged gzip file"),
        "magic.nii": (good[:344] + b"XYZ\0" + good[348:], "not a NIfTI file"),
        "pair.nii": (good[:344] + b"ni1\0" + good[348:], "not a NIfTI file"),
        "text.nii": (b"hello", "not a NIfTI file"),
        "half.nii": (good[:-20], f"it holds {len(good) - 20} of {len(good)} bytes"),
        "type.nii": (good[:70] + b"\xff\x7f" + good[72:], "not a readable NIfTI file"),
        "text.png": (b"hello", "not a readable PNG, JPEG, BMP, TIFF file"),
    }
    for suffix in ("png", "jpg", "tif"):
        whole = save_picture(folder / f"whole.{suffix}", random_values(np.uint8, (64, 64)))
        content = whole.read_bytes()
        contents[f"half.{suffix}"] = (
            content[: len(content) // 2],
            "not a readable PNG, JPEG, BMP, TIFF",
        )
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    messages = {name: message for name, (_, message) in contents.items()}

    Image.fromarray(random_values(np.uint8, (3, 4))).save(folder / "gif.png", "GIF")
    save_nifti(folder / "five.nii", random_values(np.int16, (3, 4, 5, 2, 2)))
    save_nifti(folder / "complex.nii", random_values(np.complex64))
    save_nifti(folder / "rgb.nii", np.zeros((3, 4, 5), [(c, "u1") for c in "RGB"]))
    Image.fromarray(random_values(np.uint8, (3, 4, 4)), "CMYK").save(folder / "cmyk.tif")
    frames = [Image.fromarray(random_values(np.uint8, (3, 4)))] * 3
    frames[0].save(folder / "stack.tif", save_all=True, append_images=frames[1:])
    return messages | {
        "missing.nii.gz": "is missing",
        "missing.png": "is missing",
        "gif.png": "not a readable PNG, JPEG, BMP, TIFF file",
        "five.nii": r"5 axes, shape [3, 4, 5, 2, 2]",
        "complex.nii": "voxels are complex64",
        "rgb.nii": "voxels are colours",
        "cmyk.tif": "colour mode CMYK",
        "stack.tif": "a stack of 3 pictures",
    }


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
def test_every_damaged_file_is_a_file_problem_that_names_it_and_the_mend(tmp_path):
    for name, message in damaged_files(tmp_path).items():
        path = str(tmp_path / name)
        for read in (images.read_image, lambda path: labels.read_label(path, LabelCoding())):
            with pytest.raises(FileProblem) as caught:
                read(path)
            text = str(caught.value)
            assert text.startswith(f"{path}: ") and message in text and "; " in text, text


def test_read_image_counts_what_is_not_finite(tmp_path):
    values = random_values(np.float64)
    values[0, 0, :2] = np.nan
    values[1, 0, :3] = (np.inf, -np.inf, 1e300)
    path = save_nifti(tmp_path / "a.nii", values)
    with pytest.raises(FileProblem, match="2 NaN and 3 infinite values among 60"):
        images.read_image(path)


def test_read_image_takes_values_whose_sum_is_beyond_float32(tmp_path):
    values = np.full((3, 4, 5), 3e38, np.float32)
    image, _ = images.read_image(save_nifti(tmp_path / "a.nii", values))
    np.testing.assert_array_equal(image[..., 0], values)


def test_read_image_refuses_an_image_without_voxels(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.zeros((3, 0, 5), np.uint8))
    with pytest.raises(FileProblem, match=r"no voxels, its shape is \[3, 0, 5, 1\]"):
        images.read_image(path)


@pytest.mark.parametrize(("entry", "word"), [(0, "singular"), (np.nan, "not finite")])
def test_an_unusable_affine_is_refused(tmp_path, entry, word):
    path = save_nifti(tmp_path / "a.nii", random_values(np.uint8))
    content = bytearray(path.read_bytes())
    content[280:296] = np.array([entry] * 4, "<f4").tobytes()  # srow_x
    path.write_bytes(content)
    for read, options in (
        (images.read_image, ()),
        (labels.read_label, (LabelCoding(),)),
        (labels.read_instances, (LabelCoding(),)),
    ):
        with pytest.raises(FileProblem, match=rf"a\.nii: the affine is {word}"):
            read(path, *options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("last_axis", [(), (1,)])
def test_read_label_maps_values_to_class_indices(tmp_path, dtype, last_axis):
    values = np.array([0, 7, 3, 7, 0, 3]).astype(dtype).reshape(1, 2, 3, *last_axis)
    path = save_nifti(tmp_path / "a.nii.gz", values)
    label, affine = labels.read_label(path, LabelCoding((0, 7, 3)))
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, [[[0, 1, 2], [1, 0, 2]]])
    np.testing.assert_array_equal(affine, OBLIQUE)


def test_read_label_holds_256_classes(tmp_path):
    values = np.arange(256, dtype=np.int16).reshape(4, 8, 8)
    path = save_nifti(tmp_path / "a.nii", values)
    label, _ = labels.read_label(path, LabelCoding(tuple(reversed(range(256)))))
    np.testing.assert_array_equal(label, 255 - values)


def test_a_mask_has_one_value_besides_0(tmp_path):
    for dtype, value in ((np.uint8, 255), (np.uint8, 1), (np.uint16, 65535)):
        mask = np.array([[0, value, 0], [value, value, 0]], dtype)
        label, affine = labels.read_label(save_picture(tmp_path / "a.png", mask), LabelCoding())
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label[..., 0], [[0, 1, 0], [1, 1, 0]])
        np.testing.assert_array_equal(affine, np.eye(4))


def test_several_values_of_a_mask_are_not_all_foreground(tmp_path):
    path = save_picture(tmp_path / "a.png", np.array([[0, 1, 1], [255, 0, 1]], np.uint8))
    with pytest.raises(FileProblem, match=r"label values 1 \(3 .*255 \(1 .*ignore_val"):
        labels.read_label(path, LabelCoding())
    without_void, _ = labels.read_label(path, LabelCoding(ignore=(255,)))
    np.testing.assert_array_equal(without_void[..., 0], [[0, 1, 1], [IGNORED, 0, 1]])
    as_objects, _ = labels.read_label(path, LabelCoding(objects=True))
    np.testing.assert_array_equal(as_objects[..., 0], [[0, 1, 1], [1, 0, 1]])


def test_read_label_names_and_counts_unknown_values(tmp_path):
    values = np.array([0, 127, 255, 128, 128, 0.5, -1, np.nan], np.float32).reshape(2, 2, 2)
    path = save_nifti(tmp_path / "a.nii", values)
    with pytest.raises(FileProblem) as caught:
        labels.read_label(path, LabelCoding((0, 127, 255)))
    listing = "-1 (1 voxels), 0.5 (1 voxels), 128 (2 voxels), nan (1 voxels)"
    assert f"{path}: unknown label values {listing}, where" in str(caught.value)
    with pytest.raises(FileProblem, match=r"values -1 \(1 voxels\), nan \(1 voxels\)"):
        labels.read_label(path, LabelCoding())


def test_read_label_names_ten_unknown_values_at_most(tmp_path):
    path = save_nifti(tmp_path / "a.nii", np.arange(36, dtype=np.uint8).reshape(3, 3, 4))
    with pytest.raises(FileProblem, match=r"11 \(1 voxels\) and 24 more values,"):
        labels.read_label(path, LabelCoding((0, 1)))


def test_read_label_of_one_bit_and_of_equal_colours(tmp_path):
    mask = random_values(np.uint8, (3, 4)) > 100
    bits = save_picture(tmp_path / "bits.png", mask)
    colours = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    np.testing.assert_array_equal(labels.read_label(bits, LabelCoding((0, 1)))[0][..., 0], mask)
    equal = save_picture(tmp_path / "equal.png", colours)
    np.testing.assert_array_equal(labels.read_label(equal, LabelCoding((0, 255)))[0][..., 0], mask)
    colours[0, 0] = (1, 2, 3)
    unequal = save_picture(tmp_path / "unequal.png", colours)
    with pytest.raises(FileProblem, match="this one has colours"):
        labels.read_label(unequal, LabelCoding((0, 255)))


def test_a_jpeg_mask_is_read_where_its_values_can_be_told_apart(tmp_path):
    index = np.indices((64, 64)) - 30
    mask = np.where(np.hypot(*index) < 20, np.uint8(255), np.uint8(0))
    path = save_picture(tmp_path / "a.jpg", mask)
    stored = labels.decode_label(path)
    assert len(np.unique(stored.values)) > 2  # what compression has made of two values
    assert [remark.kind for remark in stored.remarks] == [labels.JPEG_REMARK.kind]
    for coding in (LabelCoding(), LabelCoding((0, 255))):
        label, _ = labels.read_label(path, coding)
        np.testing.assert_array_equal(label[..., 0], mask > 0)
    colours = save_picture(tmp_path / "colours.jpg", np.repeat(mask[..., None], 3, -1))
    np.testing.assert_array_equal(labels.read_label(colours, LabelCoding())[0][..., 0], mask > 0)
    with pytest.raises(FileProblem, match=r"\[0, 1, 255\] lie too close to tell apart"):
        labels.read_label(path, LabelCoding((0, 1, 255)))
    noise = save_picture(tmp_path / "noise.jpg", random_values(np.uint8, (64, 64)))
    with pytest.raises(FileProblem, match=r"only .* % of the pixels are near one of \[0, 255\]"):
        labels.read_label(noise, LabelCoding())


def test_rounding_noise_of_a_label_is_no_other_value(tmp_path):
    values = np.array([0, 1.0000153, 1.9999999995, 2.0009, 0.9991, -4e-6], np.float64)
    path = save_nifti(tmp_path / "a.nii", values.reshape(1, 2, 3))
    label, _ = labels.read_label(path, LabelCoding((0, 1, 2)))
    np.testing.assert_array_equal(label.ravel(), [0, 1, 2, 2, 1, 0])
    path = save_nifti(tmp_path / "b.nii", (values + 0.0002).reshape(1, 2, 3))
    with pytest.raises(FileProblem, match="unknown label values"):
        labels.read_label(path, LabelCoding((0, 1, 2)))


def test_a_palette_means_what_it_shows(tmp_path):
    mask = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    white_first = Image.fromarray(1 - mask // 255).convert("P")
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    white_first.save(tmp_path / "white.png")
    label, _ = labels.read_label(tmp_path / "white.png", LabelCoding())
    np.testing.assert_array_equal(label[..., 0], mask > 0)

    voc = Image.fromarray(mask // 255).convert("P")  # colours: the indices are the classes
    voc.putpalette([0, 0, 0, 128, 0, 0])
    voc.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(
        labels.read_label(tmp_path / "voc.png", LabelCoding((0, 1)))[0][..., 0], mask > 0
    )
    voc.putpalette([128, 0, 0, 0, 0, 0])
    voc.save(tmp_path / "other.png")
    with pytest.raises(FileProblem, match="palette shows index 1 in black, and index 0"):
        labels.read_label(tmp_path / "other.png", LabelCoding((0, 1)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_their_tag_says(tmp_path, orientation):
    pixels = random_values(np.uint8, (3, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels),
    }[orientation]
    image, _ = images.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image[:, :, 0, 0], shown)
    assert images.describe_image(tmp_path / "a.png").shape == image.shape


def test_read_label_refuses_what_cannot_be_a_label(tmp_path):
    channels = save_nifti(tmp_path / "a.nii", np.zeros((3, 4, 5, 2), np.uint8))
    with pytest.raises(FileProblem, match="this one has 2"):
        labels.read_label(channels, LabelCoding())


@pytest.mark.parametrize(
    ("label_values", "dtype"),
    [
        ((0, 1, 255), np.uint8),
        ((0, 1, 256), np.uint16),
        ((5, 70000, 0), np.uint32),
        (None, np.uint8),
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_write_label_then_read_label(tmp_path, suffix, label_values, dtype):
    label = np.random.default_rng(0).integers(0, 3, (3, 4, 5)).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    labels.write_label(path, label, OBLIQUE, label_values)
    written = nibabel.load(path)
    assert written.get_data_dtype() == dtype
    assert written.header.get_xyzt_units()[0] == "mm"
    assert np.isnan(written.dataobj.slope) or written.dataobj.slope == 1
    expected = np.asarray(label_values or (0, 1, 2))[label]
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected)
    restored, affine = labels.read_label(path, LabelCoding(label_values or (0, 1, 2)))
    np.testing.assert_array_equal(restored, label)
    np.testing.assert_array_equal(affine, OBLIQUE)


@pytest.mark.parametrize(("label_values", "mode"), [((0, 127, 255), "L"), ((0, 1, 500), "I;16")])
def test_write_label_as_png(tmp_path, label_values, mode):
    label = np.random.default_rng(0).integers(0, 3, (3, 4, 1)).astype(np.uint8)
    labels.write_label(tmp_path / "a.png", label, np.eye(4), label_values)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == mode
    restored, _ = labels.read_label(tmp_path / "a.png", LabelCoding(label_values))
    np.testing.assert_array_equal(restored, label)


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("sform_code", "qform_code"), [(1, 1), (4, 0), (0, 1), (2, 3), (0, 0)])
def test_writing_copies_the_place_of_the_source_image(
    tmp_path, image_class, sform_code, qform_code
):
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.7, 0.8, 2.5]
    affine[:3, 3] = (1.1, -2.2, 3.3)
    source = image_class(random_values(np.int16, (3, 4, 5, 2)), affine)
    source.set_sform(affine, sform_code)
    source.set_qform(affine, qform_code)
    source.header.set_xyzt_units("micron", "sec")
    source.header.set_slope_inter(0.5, 3)
    source.header["descrip"] = b"patient name"
    nibabel.save(source, tmp_path / "source.nii.gz")
    source = nibabel.load(tmp_path / "source.nii.gz")

    _, read_affine = images.read_image(tmp_path / "source.nii.gz")
    label = random_values(np.uint8) % 2
    probs = np.random.default_rng(0).random((3, 4, 5, 2))
    like = tmp_path / "source.nii.gz"
    labels.write_label(tmp_path / "label.nii.gz", label, read_affine, (0, 9), like=like)
    images.write_map(tmp_path / "map.nii.gz", probs, read_affine, like=like)
    for name, values in (("label", 9 * label), ("map", probs.astype(np.float32))):
        written = nibabel.load(tmp_path / f"{name}.nii.gz")
        assert type(written) is image_class
        assert written.affine.tobytes() == source.affine.tobytes()
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
        for field in ("srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
        for field in ("pixdim", "qoffset_x", "qoffset_y", "qoffset_z"):
            assert written.header[field].tobytes() == source.header[field].tobytes(), field
        assert written.header["descrip"].item() == b""
        assert written.get_data_dtype() == values.dtype
        np.testing.assert_array_equal(np.asarray(written.dataobj), values)


def test_write_label_refuses_another_grid_than_the_source(tmp_path):
    source = save_nifti(tmp_path / "source.nii", random_values(np.int16))
    moved = OBLIQUE.astype(np.float64)
    moved[1, 3] += 0.01
    for shape, affine in (((3, 4, 5), moved), ((3, 5, 4), OBLIQUE)):
        with pytest.raises(ValueError, match=r"not on the grid of .*source\.nii"):
            label = np.zeros(shape, np.uint8)
            labels.write_label(tmp_path / "a.nii", label, affine, (0, 1), like=source)


@pytest.mark.parametrize(
    ("name", "shape", "value", "label_values", "message"),
    [
        ("a.jpg", (3, 4, 1), 0, (0, 1), r"as a volume or as .png"),
        ("a.png", (3, 4, 2), 0, (0, 1), r"\[3, 4, 2\]"),
        ("a.png", (3, 4, 1), 0, (0, 70000), "uint32"),
        ("a.nii", (3, 4, 1), 2, (0, 1), "there are 2 label values"),
        ("a.nii", (3, 4, 1), -1, (0, 1), "from -1"),
        ("a.nii", (3, 4, 1), 0, (-1, 1), "at least 0"),
    ],
)
def test_write_label_refuses(tmp_path, name, shape, value, label_values, message):
    with pytest.raises(ValueError, match=message):
        labels.write_label(tmp_path / name, np.full(shape, value), np.eye(4), label_values)
    assert not os.listdir(tmp_path)


def test_write_label_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    labels.write_label(path, np.zeros((2, 2, 2), np.uint8), np.eye(4), (0, 1))
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        labels.write_label(path, np.ones((2, 2, 2), np.uint8), np.eye(4), (0, 1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_write_label_makes_equal_bytes_of_equal_arguments(tmp_path):
    label = random_values(np.uint8)
    for name in ("a.nii.gz", "b.nii.gz"):
        labels.write_label(tmp_path / name, label, OBLIQUE, None)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz"))
    assert first == second
    assert first[4:8] == bytes(4)  # no time of writing in the gzip header


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_written_bytes_do_not_depend_on_the_order_in_memory(tmp_path, suffix):
    label = random_values(np.uint8, (3, 4, 5)) % 7
    in_memory = {
        "c": np.ascontiguousarray(label),
        "f": np.asfortranarray(label),
        "flipped": np.ascontiguousarray(label[::-1, :, ::-1])[::-1, :, ::-1],
    }
    for name, values in in_memory.items():
        labels.write_label(tmp_path / f"{name}{suffix}", values, OBLIQUE, tuple(range(7)))
    contents = {(tmp_path / f"{name}{suffix}").read_bytes() for name in in_memory}
    assert len(contents) == 1
    restored, _ = labels.read_label(tmp_path / f"c{suffix}", LabelCoding(tuple(range(7))))
    np.testing.assert_array_equal(restored, label)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 6), (1, 4, 1, 2)])
def test_write_map_of_a_volume(tmp_path, suffix, shape):
    values = np.random.default_rng(0).normal(size=shape)
    values.flat[0] = np.nan
    path = tmp_path / f"a{suffix}"
    images.write_map(path, values, OBLIQUE)
    written = nibabel.load(path)
    assert written.get_data_dtype() == np.float32
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(written.dataobj), values.astype(np.float32))
    np.testing.assert_array_equal(written.affine, OBLIQUE)


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF"])
def test_write_map_of_a_picture_has_a_page_per_class(tmp_path, name):
    values = np.random.default_rng(0).normal(size=(30, 40, 1, 3))
    images.write_map(tmp_path / name, values, np.eye(4))
    with Image.open(tmp_path / name) as picture:
        assert picture.n_frames == 3
        for page in range(3):
            picture.seek(page)
            assert picture.mode == "F"
            np.testing.assert_array_equal(picture, values[:, :, 0, page].astype(np.float32))
    images.write_map(tmp_path / name, values[..., 0], np.eye(4))
    image, _ = images.read_image(tmp_path / name)
    np.testing.assert_array_equal(image, values[..., :1].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("a.png", (3, 4, 1), r"as a volume or as .tif"),
        ("a.tif", (3, 4, 2), r"\[3, 4, 2\]; write NIfTI"),
        ("a.nii", (3, 4, 6, 2), r"not on the grid of .*source\.nii"),
    ],
)
def test_write_map_refuses(tmp_path, name, shape, message):
    source = save_nifti(tmp_path / "source.nii", random_values(np.int16))
    with pytest.raises(ValueError, match=message):
        images.write_map(tmp_path / name, np.zeros(shape), OBLIQUE, like=source)
    assert os.listdir(tmp_path) == ["source.nii"]


def test_real_label_survives_writing_like_its_image(tmp_path):
    root = shared_data("Task04_Hippocampus")
    image_path = root / "imagesTr" / "hippocampus_001.nii.gz"
    label, affine = labels.read_label(
        root / "labelsTr" / "hippocampus_001.nii.gz", LabelCoding((0, 1, 2))
    )
    assert sorted(np.unique(label)) == [0, 1, 2]
    labels.write_label(tmp_path / "a.nii.gz", label, affine, (0, 1, 2), like=image_path)
    restored, restored_affine = labels.read_label(tmp_path / "a.nii.gz", LabelCoding((0, 1, 2)))
    np.testing.assert_array_equal(restored, label)
    np.testing.assert_array_equal(restored_affine, images.read_image(image_path)[1])


def test_real_picture_with_an_alpha_channel_is_grey():
    root = shared_data("axondeepseg_sem")
    image, _ = images.read_image(root / "sub-rat6" / "micr" / "sub-rat6_sample-data15_SEM.png")
    assert image.shape == (744, 1154, 1, 1)


def test_read_instances_takes_the_values_of_an_instance_map(tmp_path):
    values = np.array([[0, 7, 7], [300, 0, 7]], np.uint16)
    save_picture(tmp_path / "cells.png", values)
    instances, _ = labels.read_instances(str(tmp_path / "cells.png"), LabelCoding(objects=True))
    np.testing.assert_array_equal(instances[..., 0], [[0, 1, 1], [2, 0, 1]])


@pytest.mark.parametrize(("first", "expected"), [(0, [0, 1, 2, 3, 4, 2]), (1, [2, 1, 3, 4, 5, 3])])
def test_read_instances_keeps_any_two_values_apart(tmp_path, first, expected):
    values = np.reshape([first, 0.4, 1.2, 1.7, 3e9, 1.2], (2, 3, 1))
    instances, affine = labels.read_instances(
        save_nifti(tmp_path / "a.nii", values), LabelCoding(objects=True)
    )
    np.testing.assert_array_equal(instances.ravel(), expected)
    np.testing.assert_array_equal(affine, OBLIQUE.astype(np.float64))


@pytest.mark.parametrize("label_values", [None, (0, 9)])
def test_read_instances_of_a_mask_are_what_hangs_together(tmp_path, label_values):
    values = np.array([[9, 0, 9], [9, 0, 0], [0, 9, 0]], np.uint8)
    save_picture(tmp_path / "mask.png", values)
    instances, _ = labels.read_instances(str(tmp_path / "mask.png"), LabelCoding(label_values))
    np.testing.assert_array_equal(instances[..., 0], [[1, 0, 2], [1, 0, 0], [0, 3, 0]])


def test_read_instances_of_two_classes_are_apart_where_they_touch(tmp_path):
    values = np.array([[1, 1, 2], [0, 0, 2], [1, 0, 0]], np.uint8)
    save_picture(tmp_path / "mask.png", values)
    instances, _ = labels.read_instances(str(tmp_path / "mask.png"), LabelCoding((0, 1, 2)))
    np.testing.assert_array_equal(instances[..., 0], [[1, 1, 3], [0, 0, 3], [2, 0, 0]])
