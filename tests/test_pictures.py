"""What a picture may be and what it turns into: masks drawn with transparency, deep and damaged files, colours, seams."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFilter, ImageOps
from tiny import box_mask, picture, run, tiny_pipe

from pipeline_vton import (
    _seam,
    as_bytes,
    as_floats,
    as_masks,
    as_pictures,
    as_tensors,
    composite_result,
    enlarged_part,
    feather,
    resize,
    upright,
)
from train_vton import open_picture, picture_size


# ---- masks


def strokes(mode="RGBA", paper="white"):
    """A drawing of white strokes where `box_mask` is white; its transparency says where they are."""
    drawing = Image.new("RGB", (24, 32), paper)
    drawing.putalpha(box_mask())
    return drawing.convert(mode)


def palette_strokes():
    drawing = Image.new("P", (24, 32))
    drawing.putpalette([255, 255, 255] * 2)
    drawing.paste(1, (6, 8, 18, 24))
    drawing.info["transparency"] = bytes([0, 255])
    return drawing


def keyed_strokes():
    drawing = Image.new("L", (24, 32), 200)
    drawing.paste(255, (6, 8, 18, 24))
    drawing.info["transparency"] = 200
    return drawing


DRAWN = {
    "RGBA": strokes(),
    "LA": strokes("LA"),
    "La": strokes("LA").convert("La"),
    "RGBa": strokes("RGBa"),
    "PA": strokes("PA"),
    "a palette": palette_strokes(),
    "a colour key": keyed_strokes(),
    "black paper": Image.composite(strokes(), Image.new("RGBA", (24, 32)), box_mask()),
    "an opaque alpha": box_mask().convert("RGBA"),
    "a thin alpha that says nothing": Image.merge("LA", (box_mask(), Image.new("L", (24, 32), 90))),
}


@pytest.mark.parametrize("drawing", DRAWN.values(), ids=DRAWN.keys())
def test_of_a_drawing_with_transparency_the_strokes_are_the_mask(drawing):
    expected = torch.from_numpy(np.array(box_mask()) > 0).float()[None]
    assert torch.equal(as_masks(drawing, "mask_image")[0], expected)
    assert (np.asarray(open_picture(lambda: drawing, "mask.png", "mask")) == np.asarray(box_mask())).all()


def test_a_drawn_mask_repaints_what_the_same_mask_in_black_and_white_does():
    pipe = tiny_pipe(9)
    assert (run(pipe, mask=strokes()) == run(pipe)).all()


def agnostic():
    """A person whose clothes are painted over in grey, as a data set's `agnostic` pictures."""
    image = picture(1)
    image.paste((128, 128, 128), (6, 8, 18, 24))
    return image


GREY = np.asarray(picture(1).convert("L"))
NO_MASKS = {
    "a photograph": (picture(1), r"coloured"),
    "an agnostic picture": (agnostic(), r"coloured"),
    "a grey photograph": (picture(1).convert("L"), "between 0.1 and 0.9"),
    "a grey array": (GREY, "between 0.1 and 0.9"),
    "a grey float tensor": (torch.from_numpy(GREY / 255), "between 0.1 and 0.9"),
    "an array in colours": (np.asarray(picture(1)), "coloured"),
    "a grey mask": (box_mask().point(lambda v: 128 if v else 0), r"25\.0% lies between"),
    "coloured strokes": (strokes(paper="red"), r"25\.0% is coloured"),
    "black": (Image.new("L", (24, 32), 20), "black everywhere"),
    "an empty layer": (Image.new("RGBA", (24, 32), (255, 255, 255, 0)), "black everywhere"),
    "black strokes": (strokes(paper="black"), "black everywhere"),
    "labels": (box_mask().point(lambda v: 1 if v else 0), "black everywhere"),
    "a mask and a photograph": ([box_mask(), picture(1)], "coloured"),
}


@pytest.mark.parametrize("value, message", NO_MASKS.values(), ids=NO_MASKS.keys())
def test_what_is_no_mask_is_refused(value, message):
    pipe = tiny_pipe(9)
    persons = [picture(1)] * len(value) if isinstance(value, list) else picture(1)
    with pytest.raises(ValueError, match=f"^`mask_image` must be .*mask.*{message}"):
        run(pipe, persons, mask=value)
    if isinstance(value, Image.Image):
        with pytest.raises(ValueError, match=f"^`mask.png` must be .*mask.*{message}"):
            open_picture(lambda: value, "mask.png", "mask")


def test_a_mask_and_a_cloth_that_changed_places_are_refused():
    with pytest.raises(ValueError, match="`mask_image`.*coloured"):
        run(tiny_pipe(9), cloth=box_mask(), mask=picture(2))


def noisy_mask(tmp_path):
    mask = Image.new("L", (240, 320))
    ImageDraw.Draw(mask).ellipse((60, 80, 180, 240), fill=255)
    mask.convert("RGB").save(tmp_path / "mask.jpg", quality=30)
    return mask, Image.open(tmp_path / "mask.jpg")


def test_soft_edges_and_the_noise_of_jpeg_are_masks(tmp_path):
    mask, noisy = noisy_mask(tmp_path)
    for other in (noisy, mask.filter(ImageFilter.GaussianBlur(6))):
        assert 0 < (np.asarray(other.convert("L")) % 255 > 0).mean() < 0.3
        assert (as_masks(other, "mask_image")[0] - as_masks(mask, "mask_image")[0]).abs().mean() < 0.01


# ---- values


def in_mode(image, mode):
    return {
        "I": lambda: image.convert("I"),
        "I of 16 bits": lambda: Image.fromarray(np.int32(image) * 257),
        "I;16": lambda: Image.fromarray(np.uint16(image) * 257),
        "I;16B": lambda: Image.frombytes("I;16B", image.size, (np.uint16(image) * 257).astype(">u2").tobytes()),
        "F": lambda: image.convert("F"),
        "F to 1": lambda: Image.fromarray(np.float32(image) / 255),
        "F to 1 and a little": lambda: Image.fromarray(np.float32(image) / 255 * 1.0008),
    }[mode]()


DEEP = ["I", "I of 16 bits", "I;16", "I;16B", "F", "F to 1", "F to 1 and a little"]


@pytest.mark.parametrize("mode", DEEP)
def test_deep_modes_keep_their_values(mode):
    image = picture(1).convert("L")
    (plain,), (deep,) = (as_tensors(one, "image") for one in (image, in_mode(image, mode)))
    torch.testing.assert_close(deep, plain, atol=1e-3, rtol=0)
    assert torch.equal(as_masks(in_mode(box_mask(), mode), "m")[0], as_masks(box_mask(), "m")[0])


def test_a_pgm_of_sixteen_bits_keeps_its_values(tmp_path):
    values = (np.asarray(picture(1).convert("L")).astype(np.uint16) * 257 - 100).clip(0, None)
    file = tmp_path / "deep.pgm"
    file.write_bytes(b"P5 24 32 65535\n" + values.astype(">u2").tobytes())
    (deep,) = as_tensors(Image.open(file), "image")
    np.testing.assert_allclose(deep[0].numpy(), values / 65535, atol=1e-6)


@pytest.mark.parametrize("mode, values", [("I", [-3, 7]), ("I", [0, 70000]), ("F", [-1, 1]), ("F", [0, 300]), ("F", [0, np.nan])])  # fmt: skip
def test_deep_values_out_of_range_are_refused(mode, values):
    image = Image.fromarray(np.array([values], np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    with pytest.raises(ValueError, match="`person_image` must have finite values"):
        as_tensors(image, "person_image")


def test_values_may_leave_the_range_by_what_resampling_does():
    pipe = tiny_pipe(9)
    person, cloth, mask = (as_tensors(image, "image")[0].clone() for image in (picture(1), picture(2), box_mask()))
    person[0, 0, 0], person[1, 0, 0], cloth[0, 0, 0], mask[0, 0, 0], mask[0, 16, 12] = -1e-7, 1 + 1e-3, 1 + 9e-4, -1e-3, 1 + 1e-7  # fmt: skip
    clipped = [tensor.clamp(0, 1) for tensor in (person, cloth, mask[:1])]
    assert (run(pipe, person, cloth, mask[:1]) == run(pipe, *clipped)).all()
    person[0, 0, 0] = -2e-3
    with pytest.raises(ValueError, match="`person_image`.*from -0.002 to 1.001"):
        run(pipe, person)


PLAIN = np.asarray(picture(1)).astype(np.float64) / 255
ALIKE = {
    "long doubles": PLAIN.astype(np.longdouble),
    "the other byte order": PLAIN.astype(">f4"),
    "the other byte order, doubles": PLAIN.astype(">f8"),
    "reversed twice": PLAIN[::-1, ::-1].copy()[::-1, ::-1],
    "read only": np.frombuffer(PLAIN.tobytes()).reshape(PLAIN.shape),
    "a gradient": torch.from_numpy(PLAIN).movedim(-1, 0).requires_grad_(),
}


@pytest.mark.parametrize("value", ALIKE.values(), ids=ALIKE.keys())
def test_numbers_in_every_storage_are_the_same_picture(value):
    assert torch.equal(as_tensors(value, "image")[0], as_tensors(PLAIN, "image")[0])


TENSOR = torch.from_numpy(PLAIN).movedim(-1, 0)
UNFIT = {
    "objects": PLAIN.astype(object),
    "None in an array": np.full((32, 24, 3), None),
    "strings": PLAIN.astype(str),
    "bytes": PLAIN.astype("S4"),
    "dates": np.zeros((32, 24, 3), "datetime64[s]"),
    "records": np.zeros((32, 24), [("r", "u1"), ("g", "u1")]),
    "complex": PLAIN.astype(complex),
    "uint16": np.zeros((32, 24, 3), np.uint16),
    "a sparse tensor": TENSOR.to_sparse(),
    "a sparse tensor of one channel": TENSOR[:1].to_sparse(),
    "a complex tensor": TENSOR.to(torch.complex64),
    "a tensor without values": TENSOR.to("meta"),
    "a ragged tensor": torch.nested.nested_tensor([TENSOR[0], TENSOR[0, :9]], layout=torch.jagged),
    "a generator": (image for image in [picture(1)]),
    "a dictionary": {"image": picture(1)},
    "a number": 3,
    "a numpy number": np.float32(3),
}


@pytest.mark.parametrize("name", ["person_image", "cloth_image", "mask_image"])
@pytest.mark.parametrize("value", UNFIT.values(), ids=UNFIT.keys())
def test_what_is_no_picture_is_one_clear_error(name, value):
    pictures = {"person_image": picture(1), "cloth_image": picture(2), "mask_image": box_mask()} | {name: value}
    with pytest.raises((TypeError, ValueError), match=f"^`{name}` must .*, got ") as raised:
        tiny_pipe(9)(**pictures)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["person_image", "cloth_image", "mask_image"])
def test_a_file_that_breaks_off_or_was_closed_is_named(name, tmp_path):
    Image.effect_noise((400, 300), 80).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20_000])
    with Image.open(tmp_path / "whole.png") as closed:
        pass
    for image in (Image.open(tmp_path / "half.png"), closed):
        pictures = {"person_image": picture(1), "cloth_image": picture(2), "mask_image": box_mask()} | {name: image}
        with pytest.raises(ValueError, match=f"^`{name}` must be a whole picture"):
            tiny_pipe(9)(**pictures)


# ---- colours


def icc_profile(space, gamma):
    """The least of an ICC profile: sRGB's primaries, or grey, with a gamma as its curve."""

    def fixed(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {
        "desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        "cprt": b"text\0\0\0\0none\0\0\0\0",
        "wtpt": fixed(0.9642, 1, 0.8249),
    }
    if space == "RGB ":
        tags |= {"rTRC": curve, "gTRC": curve, "bTRC": curve}
        tags |= {"rXYZ": fixed(0.4361, 0.2225, 0.0139), "gXYZ": fixed(0.3851, 0.7169, 0.0971)}
        tags |= {"bXYZ": fixed(0.1431, 0.0606, 0.7141)}
    else:
        tags["kTRC"] = curve
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += struct.pack(">4sII", name.encode(), start + len(data), len(tag))
        data += tag
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"lcms", 0x02400000, b"mntr", space.encode(), b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)[8:] + bytes(48)
    return header + table + data


LINEAR, GREY_LINEAR = icc_profile("RGB ", 1.0), icc_profile("GRAY", 1.0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_profile(image, profile):
    image = image.copy()
    image.info["icc_profile"] = profile
    return image


def to_linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("options", [{}, {"composite": False}, {"padding_mask_crop": 4}])
def test_a_result_has_its_persons_values_and_colour_profile(options, tmp_path):
    pipe = tiny_pipe(9)
    person = with_profile(picture(1), LINEAR)
    plain, other = (run(pipe, [picture(3), one], output_type="pil", **options) for one in (picture(1), person))
    assert "icc_profile" not in plain[1].info and "icc_profile" not in other[0].info
    other[1].save(tmp_path / "result.png")
    assert Image.open(tmp_path / "result.png").info["icc_profile"] == LINEAR
    if "composite" not in options:
        outside = np.asarray(box_mask()) == 0
        assert (np.asarray(other[1]) == np.asarray(picture(1)))[outside].all()
    copies = run(pipe, [person, picture(3)], output_type="pil", num_images_per_prompt=2)
    assert [copy.info.get("icc_profile") for copy in copies] == [LINEAR, LINEAR, None, None]


def cloths_of(persons, cloths):
    pipe = tiny_pipe(9)
    seen = pipe.check_inputs(persons, cloths, box_mask(), "upper", None, None, None).cloths
    return [as_floats(cloth) for cloth in seen]


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_a_cloth_of_which_no_line_would_be_left_is_refused(size):
    rule = rf"`cloth_image` of {size[1]}x{size[0]} \(height x width\) is too thin to be seen at 40x24"
    with pytest.raises(ValueError, match=rule):
        run(tiny_pipe(9), cloth=picture(2).resize(size))
    assert np.isfinite(run(tiny_pipe(9), cloth=picture(2).resize((40, 1)))).all()


def test_a_cloth_has_its_persons_colours():
    values = as_tensors(picture(2), "cloth")[0].numpy()
    (linear,) = cloths_of(with_profile(picture(1), LINEAR), picture(2))
    np.testing.assert_allclose(linear.numpy(), to_linear(values), atol=2 / 255)
    (back,) = cloths_of(picture(1), with_profile(Image.fromarray(np.uint8(to_linear(values) * 255 + 0.5).T.swapaxes(0, 1)), LINEAR))  # fmt: skip
    np.testing.assert_allclose(back.numpy()[values > 0.3], values[values > 0.3], atol=3 / 255)
    (array,) = cloths_of(with_profile(picture(1), LINEAR), np.asarray(picture(2)))
    assert torch.equal(array, linear)
    (same,) = cloths_of(with_profile(picture(1), LINEAR), with_profile(picture(2), LINEAR))
    assert torch.equal(same, as_tensors(picture(2), "cloth")[0])


@pytest.mark.parametrize("whose", ["person", "cloth"])
def test_a_profile_by_which_nothing_can_be_converted_is_named(whose):
    broken = LINEAR.replace(b"rTRC", b"xTRC")
    ImageCms.ImageCmsProfile(io.BytesIO(broken))  # it is a profile, but has no curve for red
    person, cloth = (with_profile(picture(i), broken) if whose == who else picture(i) for i, who in ((1, "person"), (2, "cloth")))  # fmt: skip
    with pytest.raises(ValueError, match="colours cannot be converted by its ICC profile"):
        cloths_of(person, cloth)


def test_one_cloth_has_the_colours_of_each_of_its_persons():
    one, two = cloths_of([picture(1), with_profile(picture(3), LINEAR)], picture(2))
    assert torch.equal(one, as_tensors(picture(2), "cloth")[0])
    assert torch.equal(two, cloths_of(with_profile(picture(1), LINEAR), picture(2))[0])
    assert len(cloths_of([with_profile(picture(i), LINEAR) for i in (1, 3)], picture(2))) == 1


def test_srgb_said_and_unsaid_are_the_same_colours():
    (cloth,) = cloths_of(with_profile(picture(1), SRGB), picture(2))
    torch.testing.assert_close(cloth, as_tensors(picture(2), "cloth")[0], atol=1.01 / 255, rtol=0)


def test_a_grey_profile_ends_in_srgb():
    grey = with_profile(picture(1).convert("L"), GREY_LINEAR)
    (person,) = as_tensors(grey, "person_image")
    np.testing.assert_allclose(to_linear(person.numpy()), as_tensors(picture(1).convert("L"), "p")[0], atol=2 / 255)
    (result,) = run(tiny_pipe(9), grey, output_type="pil")
    assert "icc_profile" not in result.info
    assert torch.equal(as_masks(with_profile(box_mask(), GREY_LINEAR), "m")[0], as_masks(box_mask(), "m")[0])


@pytest.mark.parametrize("profile", [b"", b"no profile", LINEAR[:200], GREY_LINEAR, None])
def test_a_profile_that_is_none_or_of_another_kind_is_left_out(profile):
    pipe = tiny_pipe(9)
    (result,) = run(pipe, with_profile(picture(1), profile), with_profile(picture(2), profile), output_type="pil")
    assert "icc_profile" not in result.info
    assert result.tobytes() == run(pipe, output_type="pil")[0].tobytes()


# ---- seams


def boxes(height, width, *sides):
    mask = torch.zeros(1, height, width)
    for left, top, right, bottom in sides:
        mask[:, top:bottom, left:right] = 1
    return mask


def seam(mask, region=None):
    """How much of the result each pixel takes, black laid into white at the region's size."""
    left, top, right, bottom = region or (0, 0, mask.shape[2], mask.shape[1])
    black, white = torch.zeros(3, bottom - top, right - left), torch.ones(3, *mask.shape[1:])
    return 1 - composite_result(black, white, mask, (left, top, right, bottom))[:1]


@pytest.mark.parametrize(
    "size, box",
    [
        ((3000, 4000), (120, 90)),
        ((3000, 4000), (60, 40)),
        ((3000, 4000), (1, 1)),
        ((1024, 768), (300, 5)),
        ((1024, 768), (5, 300)),
        ((1024, 768), (400, 500)),
        ((128, 96), (60, 30)),
    ],
)
def test_a_mask_is_nearly_all_new_and_its_core_entirely(size, box):
    width, height = box
    alpha = seam(boxes(*size, (40, 50, 40 + width, 50 + height)))
    part = alpha[0, 50 : 50 + height, 40 : 40 + width]
    assert (part < 0.5).float().mean() <= 0.12
    edge = min(box) // 8
    assert (part[edge : height - edge, edge : width - edge] == 1).all()
    alpha[0, 50 : 50 + height, 40 : 40 + width] = 0
    assert not alpha.any()


def test_a_thin_part_of_a_large_mask_is_repainted_too():
    mask = boxes(1024, 768, (100, 100, 600, 600), (300, 600, 305, 900))  # a body and a strap
    alpha = seam(mask)[0]
    assert (alpha[620:900, 300:305] == 1).all()
    assert alpha[300, 100] < 0.2 and alpha[300, 99] == 0 and alpha[300, 110] == 1


def test_a_seam_has_no_hard_places_along_a_round_and_ragged_outline():
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(768), indexing="ij")
    angle = torch.atan2(y - 500.0, x - 380.0)
    ragged = ((y - 500) ** 2 + (x - 380) ** 2).sqrt() < 300 + 1.5 * torch.sin(40 * angle)
    alpha = seam(ragged[None].float())[0]
    inner = torch.nn.functional.max_pool2d(1 - ragged[None].float(), 3, 1, 1)[0] == 0
    assert alpha[ragged & ~inner].max() < 0.5


def test_a_seam_is_the_widest_that_is_thick_enough_everywhere():
    """Though the finer ones are looked for in parts: against all of them over all of the mask."""
    width = 8
    mask = boxes(900, 700, (width, width, 420, 400), (100, 400, 112, 700), (500, 100, 540, 860), (600, 620, 660, 680))
    mask[:, 700:860, 60:200] = torch.rand(1, 160, 140, generator=torch.Generator().manual_seed(0)).round()
    expected = as_bytes(mask)
    for radius in (1, 2, 4, 8):
        thick, seam = _seam(as_bytes(mask), radius)
        expected = torch.where(thick, seam, expected)
    assert torch.equal(feather(mask, width), expected)


def test_a_photograph_of_eight_bits_stays_so_and_the_result_is_the_same():
    photograph, image = picture(1, 300, 200), torch.rand(3, 75, 50, generator=torch.Generator().manual_seed(0))
    (kept,), (floats,) = as_pictures(photograph, "person"), as_tensors(photograph, "person")
    mask = boxes(300, 200, (30, 40, 150, 250), (150, 60, 153, 200))
    for region in ((0, 0, 200, 300), (20, 30, 170, 255)):
        for shown in (image, resize(image, region[3] - region[1], region[2] - region[0]), as_bytes(image)):
            result = composite_result(shown, kept, mask, region)
            exact = composite_result(shown, floats, mask, region)
            assert result.dtype == torch.uint8 and torch.equal(result, as_bytes(exact))
            assert torch.equal(result[:, mask[0] == 0], kept[:, mask[0] == 0]) and not torch.equal(result, kept)
        fitting = torch.rand(
            3, region[3] - region[1], region[2] - region[0]
        )  # is rounded before it is mixed, not after
        pair = composite_result(fitting, kept, mask, region), composite_result(fitting, floats, mask, region)
        assert (pair[0].int() - as_bytes(pair[1]).int()).abs().max() <= 1
        assert torch.equal(kept, as_pictures(photograph, "person")[0])
    result = run(tiny_pipe(9), photograph, mask=photograph.convert("L").point(lambda value: 255 * (value > 128)))
    assert result.dtype == np.float32 and len(np.unique(result)) > 256  # arrays and tensors have more than eight bits


def test_what_was_read_is_not_the_callers_memory():
    given = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    for one in (given, given.movedim(0, -1).numpy()):
        (read,) = as_pictures(one, "person")
        before = read.clone()
        given.bitwise_not_()
        assert read.dtype == torch.uint8 and torch.equal(read, before)


def test_a_seam_follows_the_region_that_is_worked_on():
    mask = boxes(3000, 4000, (1000, 1000, 1600, 1600))
    whole, part = seam(mask), seam(mask, (950, 950, 1700, 1700))
    widths = [
        int((0 < alpha[0, 1300, 1000:1300]).sum() - (alpha[0, 1300, 1000:1300] == 1).sum()) for alpha in (whole, part)
    ]
    assert widths == [31, 5]


def test_a_mask_that_reaches_the_pictures_border_has_no_seam_there():
    alpha = seam(boxes(512, 384, (0, 0, 384, 300)))
    assert (alpha[0, :290] == 1).all()
    assert (feather(torch.ones(1, 512, 384), 4) == 255).all()


def test_a_thin_strip_of_a_photograph_shows_the_models_result():
    pipe, person = tiny_pipe(9), picture(1, 1024, 768)
    mask = Image.new("L", person.size)
    mask.paste(255, (200, 500, 600, 505))
    size = {"height": 32, "width": 24, "output_type": "pt"}
    result = run(pipe, person, mask=mask, **size)[0]
    decoded = run(pipe, person, mask=mask, composite=False, **size)[0]
    expected = composite_result(decoded, decoded, None, (0, 0, 768, 1024))
    inside = torch.from_numpy(np.array(mask) > 0)
    assert torch.equal(result[:, inside], expected[:, inside])


@pytest.mark.parametrize("own", [(64, 48), (200, 150), (37, 91)])
def test_only_the_part_that_is_needed_is_enlarged_and_to_the_same(own):
    decoded = as_tensors(picture(1, *own), "image")[0]
    whole = resize(decoded, 200, 150)
    for wanted in ((0, 200, 0, 150), (60, 90, 30, 120), (0, 5, 140, 150)):
        (top, bottom, left, right), part = enlarged_part(decoded, 200, 150, wanted)
        (part,) = as_pictures(part, "part")
        assert top <= wanted[0] and bottom >= wanted[1] and left <= wanted[2] and right >= wanted[3]
        inside = (..., slice(wanted[0], wanted[1]), slice(wanted[2], wanted[3]))
        placed = torch.zeros_like(whole)
        placed[:, top:bottom, left:right] = as_floats(part)
        assert (placed[inside] - whole[inside]).abs().max() <= 1.01 / 255
    assert part.shape[1] < 100 and part.shape[2] < 75


def test_a_large_photograph_is_read_as_bytes_and_only_its_masked_part_is_repainted(monkeypatch):
    person, mask = picture(1, 1200, 900), Image.new("L", (900, 1200))
    mask.paste(255, (300, 300, 420, 480))
    sizes = []
    resample = Image.Image.resize

    def watched(image, size, *args, **options):
        result = resample(image, size, *args, **options)
        sizes.append(result.size[0] * result.size[1])
        return result

    monkeypatch.setattr(Image.Image, "resize", watched)
    result = run(tiny_pipe(9), person, mask=mask, num_inference_steps=1, output_type="pil")[0]
    assert max(sizes) < 900 * 1200 / 4  # never a whole decode at the photograph's size
    changed = (np.asarray(result) != np.asarray(person)).any(axis=-1)
    assert changed[300:480, 300:420].mean() > 0.9 and not changed[:300].any() and not changed[480:].any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["EXIF", "XMP", "TIFF"])
def test_a_photograph_is_upright_once_and_for_all(tmp_path, orientation, kind):
    """As PIL's own `exif_transpose` has it."""
    exif, file = Image.Exif(), tmp_path / ("photo.tif" if kind == "TIFF" else "photo.webp")
    exif[ExifTags.Base.Orientation] = orientation
    xmp = f'<x:xmpmeta xmlns:tiff="T"><tiff:Orientation>{orientation}</tiff:Orientation></x:xmpmeta>'
    picture(1).save(file, **{"xmp": xmp.encode()} if kind == "XMP" else {"exif": exif})
    expected = ImageOps.exif_transpose(Image.open(file))
    assert expected.size == ((24, 32) if orientation < 5 else (32, 24))
    seen = upright(Image.open(file))
    assert np.array_equal(seen, expected) and np.array_equal(upright(seen), expected)
    assert picture_size(file, "here") == expected.size


@pytest.mark.parametrize("exif", [b"II*\0", b"junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_exif_that_cannot_be_read_turns_nothing(tmp_path, exif):
    picture(1).save(tmp_path / "photo.webp", lossless=True, exif=exif)
    assert np.array_equal(upright(Image.open(tmp_path / "photo.webp")), picture(1))
    assert picture_size(tmp_path / "photo.webp", "here") == (24, 32)
