"""Two real photographs at their own sizes, and the ways in which files from the world are unlike arrays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from tiny import box_mask, picture, run, tiny_pipe

from pipeline_vton import as_tensors


PHOTOS = Path(__file__).parent / "photos"


def photographs():
    return Image.open(PHOTOS / "person.webp"), Image.open(PHOTOS / "cloth.webp")


def torso_mask(size):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 4, size[1] // 3, size[0] // 2, size[1] // 2), fill=255)
    return mask


@pytest.mark.parametrize("padding_mask_crop", [None, 40])
@pytest.mark.parametrize("cloth_conditioning", ["reference", "joint"])
def test_photographs_come_back_at_their_own_size_and_untouched_outside_the_mask(cloth_conditioning, padding_mask_crop):
    person, cloth = photographs()
    assert (person.size, cloth.size) == ((832, 1248), (576, 864))
    mask = torso_mask(person.size)
    pipe = tiny_pipe(9, cloth_conditioning=cloth_conditioning)
    (result,) = run(pipe, person, cloth, mask, output_type="pil", padding_mask_crop=padding_mask_crop)
    assert result.size == person.size and result.mode == "RGB"
    before, after, inside = np.asarray(person.convert("RGB")), np.asarray(result), np.asarray(mask) > 0
    assert (before == after)[~inside].all()
    assert (before != after).any(axis=-1)[inside].mean() > 0.9


def test_photographs_swap_places():
    person, cloth = photographs()
    mask = torso_mask(cloth.size)
    (result,) = run(tiny_pipe(8), cloth, person, mask, output_type="pil")
    outside = np.asarray(mask) == 0
    assert result.size == cloth.size
    assert (np.asarray(result) == np.asarray(cloth.convert("RGB")))[outside].all()


def test_photographs_of_two_sizes_go_in_one_batch():
    person, cloth = photographs()
    results = run(
        tiny_pipe(9), [person, cloth], cloth, [torso_mask(person.size), torso_mask(cloth.size)],
        output_type="pil", height=40, width=24,
    )  # fmt: skip
    assert [result.size for result in results] == [person.size, cloth.size]


def test_a_seam_is_feathered_inward(tmp_path):
    person, cloth = photographs()
    mask = Image.new("L", person.size)
    mask.paste(255, (100, 100, 700, 1000))
    (result,) = run(tiny_pipe(9), person, cloth, mask, output_type="pil")
    change = abs(np.int32(result) - np.int32(person.convert("RGB"))).mean(axis=-1)
    column = change[200:900, 95:140].mean(axis=0)  # across the left edge, which is at 100
    assert not column[:5].any()
    assert 0 <= column[5] < column[8] < column[20]


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture(1)
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(methods[orientation]).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert turned.getexif()[0x0112] == orientation
    pipe = tiny_pipe(9)
    assert (run(pipe, turned, turned) == run(pipe, upright, upright)).all()


def test_a_picture_of_nothing_is_refused():
    nothing = Image.new("RGBA", (24, 32), (200, 0, 0, 0))
    for name in ("person_image", "cloth_image"):
        with pytest.raises(
            ValueError, match=f"`{name}` must show something, got a picture that is transparent everywhere"
        ):
            as_tensors([picture(1), nothing], name)


@pytest.mark.parametrize("kind", ["usual", "inverted", "everything"])
def test_a_mask_that_may_be_inverted_is_warned_of(recwarn, kind):
    mask = {"usual": box_mask(), "inverted": ImageOps.invert(box_mask()), "everything": Image.new("L", (24, 32), 255)}[
        kind
    ]
    run(tiny_pipe(9), mask=mask)
    told = [str(warning.message) for warning in recwarn]
    assert any("`mask_image` is white in all four corners" in line for line in told) == (kind == "inverted")


def test_transparency_lies_on_white():
    person, cloth = picture(1).convert("RGBA"), picture(2).convert("RGBA")
    hole = Image.new("L", person.size, 255)
    hole.paste(0, (0, 0, 24, 10))
    for image in (person, cloth):
        image.putalpha(hole)
    flat = [
        Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), hole) for image in (person, cloth)
    ]
    pipe = tiny_pipe(9)
    assert (run(pipe, person, cloth) == run(pipe, *flat)).all()
    assert (run(pipe, person, cloth)[0, :8] == 1).all()


PERSON_MODES = ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "1", "I", "F"]


@pytest.mark.parametrize("mode", PERSON_MODES)
def test_a_person_and_a_cloth_may_have_any_mode(mode):
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P", "HSV": "RGB", "I": "L", "F": "L"}.get(mode, mode)
    person, cloth = picture(1).convert(through).convert(mode), picture(2).convert(through).convert(mode)
    assert person.mode == mode
    pipe = tiny_pipe(9)
    plain = [image.convert(through).convert("RGB") for image in (person, cloth)]
    assert (run(pipe, person, cloth) == run(pipe, *plain)).all()


def test_sixteen_bits_keep_their_values():
    gray = picture(1).convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    pipe = tiny_pipe(9)
    assert (run(pipe, deep) == run(pipe, gray)).all()


@pytest.mark.parametrize("mode", [*PERSON_MODES, "I;16", "LAB"])
def test_a_mask_may_have_any_mode(mode):
    mask = box_mask()
    if mode == "I;16":
        other = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    elif mode == "LAB":
        lightness = Image.merge("LAB", (mask, *[Image.new("L", mask.size, 128)] * 2))
        other = lightness
    else:
        other = mask.convert({"La": "LA", "RGBa": "RGBA", "PA": "P", "HSV": "RGB"}.get(mode, mode)).convert(mode)
    assert other.mode == mode
    pipe = tiny_pipe(9)
    assert (run(pipe, mask=other) == run(pipe, mask=mask)).all()
