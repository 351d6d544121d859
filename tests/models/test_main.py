"""The table of layers that `python -m jaxseg.models` prints."""

import pytest

from jaxseg.models.__main__ import main


def test_table_lists_layers_and_the_size_of_the_whole(capsys):
    main(["unet", "--image=16x16x1", "--num_classes=3", "features=4,8", "norm=batch"])
    out = capsys.readouterr().out
    for layer in ("encoder/stage0", "encoder/stage1", "upconv0", "up0", "head"):
        assert layer in out
    # 9 * (1*4 + 4*4 + 4*8 + 8*8) + 4 * 8 * 4 + 4 + 9 * (8*4 + 4*4) + norms and the head.
    size = 9 * (4 + 16 + 32 + 64) + 132 + 9 * 48 + 2 * 2 * (4 + 8 + 4) + (4 + 1) * 3
    assert f"UNet: {size:,} parameters" in out
    assert "kept for the gradient: " in out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--image=16x16", "is not like 128x128x1"),
        ("feature=4", "feature"),
        ("features", "is not FIELD=VALUE"),
    ],
)
def test_what_can_not_be_built_is_a_message(argument, words, capsys):
    with pytest.raises(SystemExit):
        main(["unet", argument])
    assert words in capsys.readouterr().err
