"""The agnostic mask: what it covers, what it spares, what it tells of the worn cloth, and the human parser that it comes from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image, ImageDraw
from tiny import picture, seeded, tiny_parser, tiny_pipe
from transformers import ViTConfig

from pipeline_vton import LOOSENESS, agnostic_mask, convex_hull, grow, parser_roles


ATR = (
    "Background Hat Hair Sunglasses Upper-clothes Skirt Pants Dress Belt Left-shoe Right-shoe Face Left-leg Right-leg "
    "Left-arm Right-arm Bag Scarf"
).split()
FASHN = (
    "background face hair top dress skirt pants belt bag hat scarf glasses arms hands legs feet torso jewelry".split()
)
PARSE_24 = (
    "background hat hair glove glasses upper_only_torso_region dresses_only_torso_region coat_only_torso_region socks "
    "left_pants right_patns skin_around_neck_region scarf skirts face left_arm right_arm left_leg right_leg left_shoe "
    "right_shoe left_sleeve_for_upper right_sleeve_for_upper bag"
).split()
LIP = (
    "Background Hat Hair Glove Sunglasses Upper-clothes Dress Coat Socks Pants Jumpsuits Scarf Skirt Face Left-arm "
    "Right-arm Left-leg Right-leg Left-shoe Right-shoe"
).split()
CIHP = ["Torso-skin" if label == "Jumpsuits" else label for label in LIP]
LABEL_SETS = {"atr": ATR, "fashn": FASHN, "24": PARSE_24, "lip": LIP, "cihp": CIHP}
COVERED = {  # what every set calls what each kind of cloth repaints
    "upper": "top upper-clothes upper_only_torso_region coat_only_torso_region left_sleeve_for_upper right_sleeve_for_upper coat dress jumpsuits "
    "dresses_only_torso_region torso torso-skin skin_around_neck_region arms left-arm right-arm scarf",
    "lower": "skirt skirts pants left_pants right_patns dress dresses_only_torso_region jumpsuits belt legs left-leg right-leg",
}
COVERED = {cloth_type: set(names.replace("_", "-").split()) for cloth_type, names in COVERED.items()}
COVERED["dress"] = COVERED["upper"] | COVERED["lower"]


def test_a_region_is_grown_along_both_axes_and_its_hull_spans_its_corners():
    region = torch.zeros(64, 48, dtype=torch.bool)
    region[20:40, 10:16] = region[34:40, 10:36] = True  # an L
    hull = torch.from_numpy(np.array(convex_hull(region))) > 0
    assert (
        (hull >= region).all() and hull[34, 22] and not hull[21, 34] and not hull[:20].any() and not hull[:, :10].any()
    )
    point = torch.zeros(9, 9, dtype=torch.bool)
    point[4, 4] = True
    assert torch.equal(grow(point, 2).nonzero(), torch.cartesian_prod(torch.arange(2, 7), torch.arange(2, 7)))
    assert torch.equal(grow(point, 0), point)


def parser_pipe(labels, only=None, size=(64, 64), in_channels=9):
    pipe = tiny_pipe(in_channels)
    parser, processor = tiny_parser(labels, only, size)
    pipe.register_modules(human_parser=parser, human_parser_processor=processor)
    return pipe


def as_array(mask):
    return np.asarray(mask) > 0


def standing(sleeve=20, hem=70, trousers=160, kind="top", hands="hands"):
    """Label numbers of `FASHN` for somebody who stands, 200x120: sleeves' length, the cloth's hem and the trousers' in pixels."""
    drawing = Image.new("L", (120, 200))
    paint = ImageDraw.Draw(drawing)

    def box(label, *corners):
        paint.rectangle(corners, fill=FASHN.index(label))

    box("legs", 45, 80, 57, 175), box("legs", 63, 80, 75, 175)
    box("feet", 42, 170, 57, 182), box("feet", 63, 170, 78, 182)
    box("pants", 43, 62, 58, trousers), box("pants", 62, 62, 77, trousers), box("pants", 43, 62, 77, 85)
    box("torso", 45, 30, 75, 80 if trousers < 62 else 62)
    box(kind, 43, 34, 77, hem)
    box("arms", 32, 36, 42, 85), box("arms", 78, 36, 88, 85)
    if sleeve:
        box(kind, 32, 36, 42, 36 + sleeve), box(kind, 78, 36, 88, 36 + sleeve)
    box(hands, 32, 86, 42, 96), box(hands, 78, 86, 88, 96)
    box("face", 52, 12, 68, 30), box("hair", 50, 8, 70, 14)
    return torch.from_numpy(np.array(drawing)).long()


def masked(parsed, cloth_types, looseness):
    cloth_types = [cloth_types] if isinstance(cloth_types, str) else cloth_types
    return agnostic_mask(parsed, parser_roles(dict(enumerate(FASHN))), cloth_types, looseness).numpy()


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def where(parsed, *labels):
    return np.isin(parsed, [FASHN.index(label) for label in labels])


# ---- labels


@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
@pytest.mark.parametrize("cloth_type", COVERED)
def test_every_label_of_the_known_sets_is_repainted_by_its_cloth_types_alone(labels, cloth_type):
    roles = parser_roles(dict(enumerate(labels)))
    for i, label in enumerate(labels):
        mask = agnostic_mask(torch.full((8, 6), i), roles, [cloth_type], "tight")
        covered = label.lower().replace("_", "-") in COVERED[cloth_type]
        assert mask.all() if covered else not mask.any(), label


def test_unknown_labels_are_named_beside_what_was_found():
    pipe = parser_pipe([*ATR[:-1], "Wings"])
    with pytest.raises(ValueError, match="`human_parser`.*got wings among Background, Hat, .*Bag, Wings"):
        pipe.predict_mask(picture(1))


# ---- what is covered and what is spared


@pytest.mark.parametrize("looseness", LOOSENESS)
@pytest.mark.parametrize("cloth_type", COVERED)
def test_the_worn_cloth_and_skin_are_covered_and_head_feet_and_hands_stay(cloth_type, looseness):
    parsed = standing()
    mask = masked(parsed, cloth_type, looseness)
    covered = {"upper": ("top", "torso", "arms"), "lower": ("pants", "legs")}
    covered["dress"] = covered["upper"] + covered["lower"]
    assert mask[where(parsed, *covered[cloth_type])].all()
    assert not mask[where(parsed, "face", "hair", "feet")].any()
    hands = where(parsed, "hands")
    rim = hands & mask
    assert rim.sum() < 0.5 * hands.sum()
    assert rim.any() or cloth_type == "lower"  # a hand is spared without its rim


@pytest.mark.parametrize("looseness", LOOSENESS)
@pytest.mark.parametrize("cloth_type", COVERED)
def test_a_bag_before_the_cloth_stays(cloth_type, looseness):
    parsed = standing()
    parsed[50:110, 50:64] = FASHN.index("bag")
    assert not masked(parsed, cloth_type, looseness)[where(parsed, "bag")].any()


def test_loose_contains_tight_and_box_contains_loose_hull():
    for cloth_type in COVERED:
        tight, loose, box = (masked(standing(), cloth_type, looseness) for looseness in LOOSENESS)
        assert not (tight & ~loose).any() and tight.sum() < loose.sum() < box.sum()


@pytest.mark.parametrize(
    "change", [{"sleeve": 0}, {"sleeve": 45}, {"hem": 50}, {"hem": 78}, {"sleeve": 45, "hem": 50}]
)
def test_a_loose_mask_tells_neither_sleeve_nor_hem_of_the_worn_top(change):
    worn, other = standing(), standing(**change)
    assert overlap(masked(worn, "upper", "loose"), masked(other, "upper", "loose")) > 0.99
    if "hem" in change:
        assert overlap(masked(worn, "upper", "tight"), masked(other, "upper", "tight")) < 0.96


@pytest.mark.parametrize("trousers", [95, 110])
def test_a_loose_mask_does_not_tell_the_length_of_trousers(trousers):
    tight, loose = (
        overlap(*(masked(standing(trousers=length), "lower", looseness) for length in (160, trousers)))
        for looseness in ("tight", "loose")
    )
    assert tight < 0.96 < loose


def test_a_loose_mask_has_room_for_a_flared_hem():
    parsed = standing()
    tight, loose = (masked(parsed, "lower", looseness) for looseness in ("tight", "loose"))
    assert loose[165].sum() > tight[165].sum() + 20 and loose[70].sum() < tight[70].sum() + 20


def test_a_dress_over_top_and_trousers_frees_the_legs():
    mask = masked(standing(trousers=100), "dress", "loose")
    assert mask[45:165, 45:75].all()


def test_a_top_over_a_dress_frees_its_skirt_and_spares_the_legs():
    parsed = standing(kind="dress", hem=130, trousers=62)
    mask = masked(parsed, "upper", "loose")
    assert mask[where(parsed, "dress")].all() and not mask[150:170].any()


def test_an_arm_beside_trousers_stays():
    parsed = standing()
    assert not masked(parsed, "lower", "box")[where(parsed, "arms", "hands")].any()


def test_specks_do_not_stretch_the_hull():
    parsed = standing()
    speckled = parsed.clone()
    speckled[195, 5] = speckled[190, 115] = FASHN.index("top")
    mask, with_specks = masked(parsed, "upper", "loose"), masked(speckled, "upper", "loose")
    assert overlap(mask, with_specks) > 0.95 and with_specks[195, 5]


def test_cloth_types_of_a_list_are_united():
    both = masked(standing(), ["upper", "lower"], "tight")
    assert (both == masked(standing(), "dress", "tight")).all()


def test_margins_follow_the_person_not_the_picture():
    small = torch.zeros(400, 240, dtype=torch.long)
    small[100:300, 60:180] = standing()
    assert (masked(small, "upper", "loose")[100:300, 60:180] == masked(standing(), "upper", "loose")).all()


@pytest.mark.parametrize("cut", ["out of sight", "by the edge"])
def test_without_a_whole_head_the_hips_are_a_third_of_the_cloth_below_it(cut):
    parsed = standing()
    parsed[:31] = 0
    mask = masked(parsed if cut == "out of sight" else standing()[20:], "upper", "loose")
    top = 0 if cut == "out of sight" else 20
    assert mask[100 - top, 50] and not mask[115 - top, 50]


# ---- predict_mask


def test_the_mask_has_the_persons_size_and_the_form_of_what_was_given():
    pipe = parser_pipe(FASHN)
    persons = [picture(1, 50, 30), picture(2, 300, 400)]
    single = pipe.predict_mask(persons[0], "dress")
    assert isinstance(single, Image.Image) and single.mode == "L" and set(np.unique(single)) == {0, 255}
    masks = pipe.predict_mask(persons, "dress")
    assert [mask.size for mask in masks] == [(30, 50), (400, 300)] and (as_array(masks[0]) == as_array(single)).all()
    batch = np.stack([np.asarray(persons[0])] * 2)
    assert [(as_array(mask) == as_array(single)).all() for mask in pipe.predict_mask(batch, "dress")] == [True, True]
    assert isinstance(pipe.predict_mask([persons[0]], "dress"), list)


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_small_pictures_are_parsed_at_their_own_size(size):
    pipe, person = parser_pipe(FASHN, size=size), picture(1, 60, 45)
    inputs = pipe.human_parser_processor(images=person, return_tensors="pt")
    with torch.no_grad():
        outputs = pipe.human_parser(**inputs)
    parsed = pipe.human_parser_processor.post_process_semantic_segmentation(outputs, target_sizes=[(60, 45)])[0]
    expected = agnostic_mask(parsed, parser_roles(dict(enumerate(FASHN))), ["dress"], "loose").numpy()
    assert 0 < expected.mean() < 1 and (as_array(pipe.predict_mask(person, "dress")) == expected).all()


def test_large_pictures_are_parsed_at_the_parsers_size_and_smooth_when_enlarged():
    pipe, person = parser_pipe(FASHN), picture(1, 60, 45)
    large = person.resize((480, 640), Image.Resampling.BICUBIC)
    seen = []
    pipe.human_parser.decode_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2:]))
    mask = pipe.predict_mask(large, "dress", "tight")
    assert seen == [(16, 16)] and mask.size == (480, 640)
    small = pipe.predict_mask(person, "dress", "tight").resize(mask.size, Image.Resampling.NEAREST)
    assert overlap(as_array(mask), as_array(small)) > 0.85
    edges = np.diff(as_array(mask).astype(int), axis=1) != 0
    at_multiples = edges[:, 9::10].sum() / max(1, edges.sum())
    assert at_multiples < 0.8  # enlarged blocks have all their edges there


def test_a_parser_in_another_dtype_serves():
    pipe = parser_pipe(FASHN)
    mask = pipe.predict_mask(picture(1, 60, 45), "dress")
    pipe.human_parser.to(torch.bfloat16)
    assert overlap(as_array(mask), as_array(pipe.predict_mask(picture(1, 60, 45), "dress"))) > 0.9


def test_without_a_mask_a_call_draws_it_for_all_its_cloth_types():
    pipe, person, options = parser_pipe(FASHN), picture(1, 100, 75), {"num_inference_steps": 2, "output_type": "np"}
    mask = pipe.predict_mask(person, ["upper", "lower"])
    drawn = pipe(person, picture(2), cloth_type=["upper", "lower"], generator=seeded(), **options).images
    assert (drawn == pipe(person, picture(2), mask, generator=seeded(), **options).images).all()
    assert (drawn != pipe(person, picture(2), cloth_type="lower", generator=seeded(), **options).images).any()


@pytest.mark.parametrize("cloth_type", ["hat", [], ["upper", "hat"], None, 3])
def test_a_cloth_type_that_is_none_is_named(cloth_type):
    pipe = parser_pipe(FASHN)
    for ask in (pipe.predict_mask, lambda person, kind: pipe(person, picture(2), cloth_type=kind)):
        with pytest.raises(ValueError, match="`cloth_type` must be one of upper, lower, dress"):
            ask(picture(1), cloth_type)


def test_what_cannot_be_drawn_is_one_sentence():
    with pytest.raises(ValueError, match="`person_image` shows the human parser nothing .*`cloth_type`='upper'"):
        parser_pipe(ATR, only="Bag").predict_mask(picture(1))
    with pytest.raises(ValueError, match="`looseness` must be one of tight, loose, box, got 'wide'"):
        parser_pipe(ATR).predict_mask(picture(1), looseness="wide")
    with pytest.raises(ValueError, match="load_human_parser"):
        tiny_pipe(9).predict_mask(picture(1))


# ---- loading, saving and publishing a parser


def save_parser(folder, labels=FASHN, processor=True):
    parser, its_processor = tiny_parser(labels)
    parser.save_pretrained(folder)
    if processor:
        its_processor.save_pretrained(folder)
    return parser


def test_a_parser_loads_into_a_pipeline_and_draws(tmp_path):
    save_parser(tmp_path / "parser")
    pipe = tiny_pipe(9)
    pipe.load_human_parser(tmp_path, subfolder="parser")
    assert not pipe.human_parser.training
    drawn = pipe.predict_mask(picture(1, 60, 45), "dress")
    assert (as_array(drawn) == as_array(parser_pipe(FASHN).predict_mask(picture(1, 60, 45), "dress"))).all()
    pipe.load_human_parser(tmp_path / "parser", dtype=torch.bfloat16)
    assert pipe.human_parser.dtype == torch.bfloat16


def test_a_parser_loads_from_the_hub(hub, tmp_path):
    save_parser(tmp_path)
    name = HfApi(token="hf_me").create_repo("me/parser").repo_id
    HfApi(token="hf_me").upload_folder(repo_id=name, folder_path=tmp_path)
    pipe = tiny_pipe(9)
    pipe.load_human_parser("me/parser", token="hf_me")
    assert pipe.human_parser.name_or_path == "me/parser"


def test_what_is_no_human_parser_is_refused_and_the_old_one_stays(tmp_path):
    pipe = parser_pipe(ATR)
    before = pipe.human_parser
    save_parser(tmp_path / "labels", ["wall", "sky"])
    ViTConfig().save_pretrained(tmp_path / "kind")
    backbone = save_parser(tmp_path / "headless").segformer
    backbone.save_pretrained(tmp_path / "headless")
    save_parser(tmp_path / "bare", processor=False)
    for folder, error, words in (
        ("labels", ValueError, "got sky, wall among wall, sky"),
        ("kind", ValueError, "must be a Segformer, got a vit"),
        ("headless", ValueError, "no trained parser"),
        ("bare", OSError, "preprocessor_config"),
        ("nowhere", OSError, "nowhere"),
    ):
        with pytest.raises(error, match=words):
            pipe.load_human_parser(tmp_path / folder)
        assert pipe.human_parser is before


def test_a_parser_is_saved_only_with_its_licence(tmp_path):
    pipe = parser_pipe(FASHN)
    pipe.human_parser.name_or_path = "someone/parser"
    pipe.save_pretrained(tmp_path / "without")
    assert pipe.human_parser is not None and pipe.human_parser_processor is not None
    assert not list((tmp_path / "without").glob("human_parser*"))
    card = (tmp_path / "without/README.md").read_text()
    assert 'pipe.load_human_parser("someone/parser")' in card and "licence of its own and is not in here" in card
    pipe.save_pretrained(tmp_path / "with", human_parser_license="cc-by-nc-4.0")
    card = (tmp_path / "with/README.md").read_text()
    assert "`human_parser/`, `someone/parser`, has a licence of its own: `cc-by-nc-4.0`" in card
    loaded = type(pipe).from_pretrained(tmp_path / "with")
    person = picture(1, 60, 45)
    assert (as_array(loaded.predict_mask(person, "dress")) == as_array(pipe.predict_mask(person, "dress"))).all()
    assert type(pipe).from_pretrained(tmp_path / "without").human_parser is None


def test_a_parser_is_pushed_only_with_its_licence(hub):
    pipe = parser_pipe(FASHN)
    for options, pushed in (({}, False), ({"human_parser_license": "mit"}, True)):
        pipe.push_to_hub("me/with-parser", token="hf_me", **options)
        files = HfApi(token="hf_me").list_repo_files("me/with-parser")
        assert ("human_parser/config.json" in files) == pushed
        card = hf_hub_download("me/with-parser", "README.md", token="hf_me")
        assert ("`human_parser/` has a licence of its own: `mit`" in Path(card).read_text()) == pushed


def test_a_pipeline_may_be_given_its_parser(tmp_path):
    pipe, other = tiny_pipe(9), parser_pipe(ATR)
    pipe.save_pretrained(tmp_path)
    parts = {"human_parser": other.human_parser, "human_parser_processor": other.human_parser_processor}
    loaded = type(pipe).from_pretrained(tmp_path, **parts)
    assert loaded.predict_mask(picture(1), "dress").size == picture(1).size
