import json
import os

import pytest

from jaxseg.data import predictions

PREDICTOR = {"identity": "abc", "workdirs": ["run"], "class_names": ("background", "liver")}


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")


def find(folder, *, output="out", outputs=("label",), recursive=False):
    return predictions.find_images(str(folder), str(folder.parent / output), outputs, recursive)


def test_find_images_names_cases_and_files_of_volumes_and_pictures(tmp_path):
    root = tmp_path / "in"
    make_files(root, "b.nii.gz", "A.NII", "v1.2.nii", "c.png", "d.JPEG", "e.tif")
    make_files(root, ".hidden.nii", "._b.nii.gz", "notes.txt", "sub/f.nii", "g.hdr")
    cases = find(root, outputs=("label", "probs", "grad_cam:left lung"))
    assert [case.case_id for case in cases] == ["A", "b", "c", "d", "e", "v1.2"]
    assert cases[1].path == str(root / "b.nii.gz")
    out = tmp_path / "out"
    assert cases[1].files == {
        "label": str(out / "b.nii.gz"),
        "probs": str(out / "b_probs.nii.gz"),
        "grad_cam:left lung": str(out / "b_grad_cam_left_lung.nii.gz"),
    }
    assert cases[0].files["label"] == str(out / "A.nii.gz")
    assert cases[3].files == {
        "label": str(out / "d.png"),
        "probs": str(out / "d_probs.tif"),
        "grad_cam:left lung": str(out / "d_grad_cam_left_lung.tif"),
    }


def test_find_images_in_subfolders_keeps_the_subfolders(tmp_path):
    root = tmp_path / "in"
    make_files(root, "p1/ct.nii.gz", "p2/ct.nii.gz", "x.nii", ".git/y.nii")
    cases = find(root, recursive=True)
    assert [case.case_id for case in cases] == ["p1/ct", "p2/ct", "x"]
    assert cases[0].files["label"] == str(tmp_path / "out" / "p1" / "ct.nii.gz")


def test_find_images_takes_no_prediction_for_an_image(tmp_path):
    root = tmp_path / "in"
    make_files(root, "a.nii.gz", "out/a.nii.gz")
    assert [case.case_id for case in find(root, output="in/out", recursive=True)] == ["a"]
    make_files(tmp_path / "all" / "in", "a.nii.gz")
    inside = predictions.find_images(
        str(tmp_path / "all" / "in"), str(tmp_path / "all"), ("label",), True
    )
    assert [case.case_id for case in inside] == ["a"]


def test_find_images_of_one_file(tmp_path):
    make_files(tmp_path, "a.nii.gz", "b.nii.gz")
    (case,) = predictions.find_images(str(tmp_path / "a.nii.gz"), "out", ("label",), False)
    assert (case.case_id, case.path) == ("a", str(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize(
    ("names", "output", "message"),
    [
        ((), "out", r"in holds no NIfTI, MGH.*--recursive"),
        (("sub/a.nii", "b.dcm"), "out", r"in holds no NIfTI, MGH.*--recursive"),
        (("a.nii", "a.nii.gz"), "out", r"a\.nii and .*a\.nii\.gz have one case name"),
        (("a.png", "a.nii"), "out", r"a\.nii and .*a\.png have one case name"),
        (("a.nii", "a_probs.nii"), "out", r"a_probs\.nii\.gz, an output of .* an output of .*a\."),
        (("a.nii",), "in", "--input and --output at once"),
    ],
)
def test_find_images_refuses_a_folder(tmp_path, names, output, message):
    (tmp_path / "in").mkdir()
    make_files(tmp_path / "in", *names)
    with pytest.raises(predictions.FolderProblem, match=message):
        find(tmp_path / "in", output=output, outputs=("label", "probs"))


def test_find_images_refuses_to_write_over_an_image(tmp_path):
    make_files(tmp_path, "a.nii.gz", "b.txt")
    for path, folder, message in (
        ("a.nii.gz", ".", "an output of .*, is a file of an image to segment too"),
        ("b.txt", "out", r"b\.txt is no NIfTI"),
        ("c.nii", "out", r"c\.nii: is missing; correct --input"),
    ):
        with pytest.raises(predictions.FolderProblem, match=message):
            predictions.find_images(str(tmp_path / path), str(tmp_path / folder), ("label",), False)


def test_records_say_done_only_where_files_and_image_are_as_they_were(tmp_path):
    image, folder = tmp_path / "in" / "a.nii", tmp_path / "out"
    make_files(tmp_path / "in", "a.nii")
    folder.mkdir()
    cases = find(tmp_path / "in", outputs=("label", "probs"))
    records = predictions.Records(folder, cases, **PREDICTOR)
    assert not records.is_done(cases[0])
    records.add(cases[0], predictions.state_of(cases[0]) | {"confidence": float("nan")})
    assert not records.is_done(cases[0])  # no files
    make_files(folder, "a.nii.gz", "a_probs.nii.gz")
    assert records.is_done(cases[0])

    again = predictions.Records(folder, cases, **PREDICTOR)
    assert again.content == records.content
    assert again.content["cases"]["a"]["confidence"] is None
    assert again.is_done(cases[0])
    (folder / "a_probs.nii.gz").unlink()
    assert not again.is_done(cases[0])
    assert again.is_done(find(tmp_path / "in")[0])
    os.utime(image, ns=(1, 1))
    assert not again.is_done(find(tmp_path / "in")[0])
    again.add(cases[0], predictions.state_of(cases[0]) | {"error": "disk full"})
    assert not again.is_done(find(tmp_path / "in")[0])
    again.add(cases[0], predictions.state_of(cases[0]))
    assert again.is_done(find(tmp_path / "in")[0])
    case = find(tmp_path / "in")[0]
    image.unlink()
    assert not again.is_done(case)
    assert sorted(os.listdir(folder)) == ["a.nii.gz", "predictions.json"]


def test_voxels_beside_a_header_are_of_the_image(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    make_files(tmp_path / "in", "a.mhd", "a.raw", "b.raw")
    (tmp_path / "in" / "a.mhd").write_text("NDims = 3\nElementDataFile = a.raw\n")
    assert predictions.left_out(tmp_path / "in", folder, False) == ["b.raw"]
    (case,) = find(tmp_path / "in")
    records = predictions.Records(folder, [case], **PREDICTOR)
    make_files(folder, "a.mha")
    records.add(case, predictions.state_of(case))
    assert records.is_done(case)
    os.utime(tmp_path / "in" / "a.raw", ns=(1, 1))
    assert not records.is_done(case)


def test_the_spacing_beside_a_stack_replaces_no_file(tmp_path):
    make_files(tmp_path / "in", "a.tif", "predictions.tif")
    for name in ("a", "predictions"):
        (tmp_path / "in" / f"{name}.json").write_text('{"spacing": [2, 1, 1]}')
    with pytest.raises(
        predictions.FolderProblem, match=r"predictions\.tif, is the file of the rec"
    ):
        find(tmp_path / "in")
    (tmp_path / "in" / "predictions.tif").unlink()
    cases = find(tmp_path / "in")
    make_files(tmp_path / "out", "a.json")
    with pytest.raises(predictions.FolderProblem, match=r"1 file.*first .*a\.json"):
        predictions.Records(tmp_path / "out", cases, **PREDICTOR)


def test_an_empty_output_is_made_again_and_a_changed_one_told(tmp_path):
    make_files(tmp_path / "in", "a.nii")
    (case,) = find(tmp_path / "in")
    make_files(tmp_path / "out", "predictions.json", "a.nii.gz")
    (tmp_path / "out" / "predictions.json").unlink()
    records = predictions.Records(tmp_path / "out", [], **PREDICTOR)
    written = {"written_bytes": predictions.written_bytes(case)}
    records.add(case, predictions.state_of(case) | written)
    assert records.is_done(case)
    assert records.altered(case) == []
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"edited by hand")
    assert records.is_done(case)
    assert records.altered(case) == [str(tmp_path / "out" / "a.nii.gz")]
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"")
    assert not records.is_done(case)


def test_records_of_another_predictor_are_refused(tmp_path):
    predictions.Records(tmp_path, [], **PREDICTOR)
    with pytest.raises(predictions.FolderProblem, match=rf"{os.path.abspath('run')} with other"):
        predictions.Records(tmp_path, [], **PREDICTOR | {"identity": "abd"})


@pytest.mark.parametrize("text", ["", "[]", '{"identity": 1}', "null"])
def test_records_that_this_command_did_not_write_are_refused(tmp_path, text):
    (tmp_path / "predictions.json").write_text(text)
    with pytest.raises(predictions.FolderProblem, match="was not written by this command"):
        predictions.Records(tmp_path, [], **PREDICTOR)
    assert (tmp_path / "predictions.json").read_text() == text


def test_files_that_no_record_calls_predictions_are_not_replaced(tmp_path):
    make_files(tmp_path / "in", "a.nii")
    make_files(tmp_path / "out", "a.nii.gz")
    with pytest.raises(predictions.FolderProblem, match=r"1 file.*first .*a\.nii\.gz"):
        predictions.Records(tmp_path / "out", find(tmp_path / "in"), **PREDICTOR)
    assert os.listdir(tmp_path / "out") == ["a.nii.gz"]

    make_files(tmp_path / "in", "b.nii")
    cases = find(tmp_path / "in")
    records = predictions.Records(tmp_path / "out", cases[1:], **PREDICTOR)
    with pytest.raises(predictions.FolderProblem, match=r"1 file.*first .*a\.nii\.gz"):
        predictions.Records(tmp_path / "out", cases, **PREDICTOR)
    records.add(cases[0], {"error": "interrupted while it was written"})
    assert not predictions.Records(tmp_path / "out", cases, **PREDICTOR).is_done(cases[0])


def test_records_begin_before_the_first_case(tmp_path):
    predictions.Records(tmp_path, [], **PREDICTOR)
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert content == {
        "identity": "abc",
        "workdirs": [os.path.abspath("run")],
        "class_names": ["background", "liver"],
        "cases": {},
    }


def test_what_is_no_image_is_listed(tmp_path):
    make_files(
        tmp_path / "in", "a.png", "b.webp", "c.txt", ".hidden", "sub/d.dcm", "v.tif", "v.json"
    )
    (tmp_path / "in" / "v.json").write_text('{"spacing": [1, 1, 1]}')
    assert predictions.left_out(tmp_path / "in", tmp_path / "out", False) == ["b.webp", "c.txt"]
    recursive = predictions.left_out(tmp_path / "in", tmp_path / "out", True)
    assert recursive == ["b.webp", "c.txt", "sub/d.dcm"]
    make_files(tmp_path / "in", *(f"{number:02d}.log" for number in range(20)))
    assert predictions.left_out(tmp_path / "in", tmp_path / "out", False)[-1] == "and 12 more"


def test_channels_that_are_files(tmp_path):
    make_files(tmp_path / "in", *(f"{case}_000{n}.mha" for case in "ab" for n in range(2)))
    found = predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 2)
    assert [case.case_id for case in found] == ["a", "b"]
    assert [case.files["label"] for case in found] == [f"{tmp_path}/out/{c}.mha" for c in "ab"]
    assert found[0].paths == tuple(f"{tmp_path}/in/a_000{n}.mha" for n in range(2))
    state = predictions.state_of(found[0])
    assert state["file"].endswith("a_0000.mha")
    assert state["channels"][0]["file"].endswith("a_0001.mha")
    apart = predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 1)
    assert [case.case_id for case in apart] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    make_files(tmp_path / "in", "c.mha", "d_0000.mha", "e_2019.mha")  # not all files are named so
    with_other = predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 2)
    assert [case.case_id for case in with_other] == ["a", "b", "c", "d_0000", "e_2019"]
    assert [len(case.paths) for case in with_other] == [2, 2, 1, 1, 1]
    assert [case.lacks for case in with_other] == [(), (), (), ("d_0001",), ("e_0000", "e_0001")]
    make_files(tmp_path / "in", "a_0001.nii")
    with pytest.raises(predictions.FolderProblem, match=r"a_0001.mha and .*a_0001.nii have one"):
        predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 2)
    make_files(tmp_path / "one", "a_0000.mha", "b_0000.mha")
    one = predictions.find_images(tmp_path / "one", tmp_path / "out", ("label",), False)
    assert [case.case_id for case in one] == ["a", "b"]
    make_files(tmp_path / "one", "c.mha")
    one = predictions.find_images(tmp_path / "one", tmp_path / "out", ("label",), False)
    assert [case.case_id for case in one] == ["a_0000", "b_0000", "c"]


def test_links_that_are_not_followed_are_told(tmp_path):
    make_files(tmp_path, "in/a.nii", "elsewhere/b.nii")
    (tmp_path / "in" / "p2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c.nii.gz").symlink_to(tmp_path / "nothing")
    (tmp_path / "in" / "d.nii").symlink_to(tmp_path / "elsewhere" / "b.nii")
    assert [case.case_id for case in find(tmp_path / "in", recursive=True)] == ["a", "d"]
    for recursive, more in ((False, []), (True, ["p2 (a link to a folder)"])):
        told = predictions.left_out(tmp_path / "in", tmp_path / "out", recursive)
        assert told == ["c.nii.gz (a link to nothing)", *more]
    for name in ("a.nii", "d.nii"):
        (tmp_path / "in" / name).unlink()
    but = r"but c\.nii\.gz \(a link to nothing\), p2 \(a link to a folder\); give another --input$"
    with pytest.raises(predictions.FolderProblem, match=but):
        find(tmp_path / "in", recursive=True)
    for name in ("c.nii.gz", "c.nii.gz/e.nii"):
        with pytest.raises(
            predictions.FolderProblem, match=r"is a link to /.*/nothing, where noth"
        ):
            find(tmp_path / "in" / name)
    with pytest.raises(predictions.FolderProblem, match=r"f\.nii: is missing; correct --input"):
        find(tmp_path / "in" / "f.nii")


def test_a_name_that_is_not_utf_8_is_refused_at_once(tmp_path):
    make_files(tmp_path / "in", "a.nii", os.fsdecode(b"M\xfcller.txt"))
    assert predictions.left_out(tmp_path / "in", tmp_path / "out", False) == ["M\ufffdller.txt"]
    make_files(tmp_path / "in", os.fsdecode(b"M\xfcller.nii"))
    with pytest.raises(predictions.FolderProblem, match="M\ufffdller\\.nii: its name is not UTF-8"):
        find(tmp_path / "in")
    with pytest.raises(predictions.FolderProblem, match="its name is not UTF-8"):
        find(tmp_path / "in" / os.fsdecode(b"M\xfcller.nii"))


def test_a_picture_that_holds_its_colours_is_named_without_its_number(tmp_path):
    make_files(tmp_path / "in", "a_0000.png", "b_0000.png")
    found = predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 3)
    assert [case.case_id for case in found] == ["a", "b"]
    make_files(tmp_path / "in", "c_0000.mha", "d.png")  # whatever else is there
    found = predictions.find_images(tmp_path / "in", tmp_path / "out", ("label",), False, 3)
    assert [case.case_id for case in found] == ["a", "b", "c_0000", "d"]
    make_files(tmp_path / "volumes", "a_0000.mha")
    found = predictions.find_images(tmp_path / "volumes", tmp_path / "out", ("label",), False, 3)
    assert [case.case_id for case in found] == ["a_0000"]


def test_two_processes_write_down_what_they_do_in_one_folder(tmp_path):
    halves = []
    for half in range(2):
        make_files(tmp_path / f"in{half}", *(f"c{half}{number}.nii" for number in range(4)))
        halves.append(
            predictions.find_images(tmp_path / f"in{half}", tmp_path / "out", ("label",), False)
        )
    (tmp_path / "out").mkdir()
    both = [predictions.Records(tmp_path / "out", cases, **PREDICTOR) for cases in halves]
    for number in range(4):
        for records, cases in zip(both, halves, strict=True):
            make_files(tmp_path / "out", f"{cases[number].case_id}.nii.gz")
            records.add(cases[number], predictions.state_of(cases[number]))
    again = [predictions.Records(tmp_path / "out", cases, **PREDICTOR) for cases in halves]
    assert len(again[0].content["cases"]) == 8
    assert all(r.is_done(c) for r, cases in zip(again, halves, strict=True) for c in cases)
    with pytest.raises(predictions.FolderProblem, match="with other weights or options"):
        predictions.Records(tmp_path / "out", halves[0], **PREDICTOR | {"identity": "other"})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"identity": 1, "workdirs": [], "class_names": [], "cases": []}']
)
def test_a_damaged_record_is_a_clear_problem(tmp_path, text):
    make_files(tmp_path / "in", "a.nii")
    (tmp_path / "predictions.json").write_text(text)
    with pytest.raises(predictions.FolderProblem, match=r"predictions\.json was not written by"):
        predictions.Records(tmp_path, find(tmp_path / "in"), **PREDICTOR)
