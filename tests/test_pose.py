"""The pose: painted into the hole that the mask leaves, in calls and in training alike, and read wherever pairs are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_evaluate import evaluate, fails
from test_train import flags, trainer_of
from tiny import box_mask, picture, run, seeded, tiny_pipe

import train_vton
import tryon
from demo.make_dataset import make_dataset
from demo.try_on import draw_lines, noises, try_on
from pipeline_vton import (
    ADAPTER_NAME,
    AdapterSettings,
    ClothBesideAttnProcessor,
    StableDiffusionVTONPipeline,
    vton_attention,
)
from train_vton import TRAINED_NAME, Preparation, TreePairs, draw_share, main, parse_args


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
KINDS = {
    "inpainting": {"in_channels": 9},
    "8 channels": {"in_channels": 8, "condition_latents": "unscaled"},
    "joint": {"in_channels": 9, "cloth_conditioning": "joint"},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipe(9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    make_dataset(root, train=5, test=2, seed=0, height=64)
    return root


@pytest.fixture
def own(drawn, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(drawn, tmp_path / "own"))


@pytest.fixture(scope="session")
def trained(base, drawn, tmp_path_factory) -> Path:
    """The output of a run with poses, validated on the way, its guidance chosen with them."""
    out = tmp_path_factory.mktemp("trained")
    with patch_environment(ACCELERATE_USE_CPU="true"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vton, "GUIDANCE_SCALES", (1, 3))
        patch.setattr(train_vton, "GUIDANCE_STEPS", 2)
        main(parse_args(flags(base, drawn, out, pose=True, num_validation_pairs=1, guidance_scale=None)))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return out


def conditioning_of(pipe, person, mask, pose=None, crop=None):
    return pipe.encode_pictures(
        pipe.check_inputs(person, picture(2), mask, "upper", None, None, crop, pose_image=pose)
    )


def by_hand(pipe, person, mask, pose):
    """The person's condition of a call on pictures that have its size."""
    with torch.no_grad():
        person, pose = (torch.from_numpy(np.float32(one) / 127.5 - 1).movedim(-1, 0)[None] for one in (person, pose))
        kept = torch.where(torch.from_numpy(np.array(mask)) > 127, pose, person)
        scale = pipe.vae.config.scaling_factor if pipe.config.condition_latents == "scaled" else 1
        return pipe.vae.encode(kept).latent_dist.mode() * scale


# ---- calls


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_pose_fills_the_hole_and_nothing_else(kind):
    pipe, plain = tiny_pipe(pose="painted", **kind), tiny_pipe(**kind)
    person, mask, pose = picture(1, 40, 24), box_mask(40, 24), picture(7, 40, 24)
    painted = conditioning_of(pipe, person, mask, pose).person
    torch.testing.assert_close(painted, by_hand(pipe, person, mask, pose), atol=1e-5, rtol=0)
    assert torch.equal(conditioning_of(pipe, person, mask).person, conditioning_of(plain, person, mask).person)
    grey = torch.full((3, 40, 24), 0.5)  # 0 of -1 to 1
    torch.testing.assert_close(
        conditioning_of(pipe, person, mask, grey).person, conditioning_of(pipe, person, mask).person, atol=2e-2, rtol=0
    )
    outside = Image.composite(picture(8, 40, 24), pose, Image.eval(mask, lambda value: 255 - value))
    assert torch.equal(conditioning_of(pipe, person, mask, outside).person, painted)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_result_follows_the_pose_and_without_one_is_that_of_an_adapter_without_poses(kind):
    pipe = tiny_pipe(pose="painted", **kind)
    results = [run(pipe, pose_image=pose) for pose in (None, picture(7), picture(8))]
    assert (results[0] == run(tiny_pipe(**kind))).all()
    assert all(abs(one - other).max() > 1e-3 for one, other in zip(results, results[1:]))


def test_poses_are_batched_broadcast_cropped_and_prepared():
    pipe, poses = tiny_pipe(9, pose="painted"), [picture(7), picture(8)]
    together = conditioning_of(pipe, picture(1), box_mask(), poses).person
    singly = [conditioning_of(pipe, picture(1), box_mask(), pose).person for pose in poses]
    torch.testing.assert_close(together, torch.cat(singly), atol=1e-5, rtol=0)
    shared = conditioning_of(pipe, [picture(1), picture(3)], box_mask(), poses[0]).person
    torch.testing.assert_close(shared[:1], singly[0], atol=1e-5, rtol=0)

    big, mask, pose = picture(1, 120, 100), box_mask(120, 100), picture(7, 120, 100)
    options = {"padding_mask_crop": 6, "height": 32, "width": 24}
    crop = pipe.check_inputs(big, picture(2), mask, "upper", 32, 24, 6, pose_image=pose).regions[0]
    cut = pipe.encode_pictures(
        pipe.check_inputs(
            big.crop(crop), picture(2), mask.crop(crop), "upper", 32, 24, None, pose_image=pose.crop(crop)
        )
    )
    whole = pipe.encode_pictures(pipe.check_inputs(big, picture(2), mask, "upper", 32, 24, 6, pose_image=pose))
    torch.testing.assert_close(whole.person, cut.person, atol=1e-5, rtol=0)

    person = pipe.prepare_person(big, mask, pose_image=pose, **options)
    call = {"num_inference_steps": 2, "output_type": "np"}
    prepared = pipe(person, picture(2), generator=seeded(), **call).images
    assert (prepared == pipe(big, picture(2), mask, pose, generator=seeded(), **options, **call).images).all()


def test_a_pose_at_another_scale_is_the_same_pose():
    """DressCode's are half as large as its photographs; the crop of a small person is the pose's as well."""
    pipe, person, mask = tiny_pipe(9, pose="painted"), picture(1, 128, 96), box_mask(128, 96)
    smooth = picture(7, 8, 6).resize((96, 128), Image.Resampling.BICUBIC)
    for padding in (None, 6):
        painted = [
            pipe.encode_pictures(
                pipe.check_inputs(person, picture(2), mask, "upper", 32, 24, padding, pose_image=pose)
            ).person
            for pose in (smooth, smooth.resize((48, 64), Image.Resampling.LANCZOS), None)
        ]
        torch.testing.assert_close(painted[0], painted[1], atol=0.05, rtol=0)
        assert (painted[0] - painted[2]).abs().max() > 0.2


def test_a_small_pose_is_cut_where_its_person_is():
    """At a scale at which the crop is less than a pixel of it."""
    pipe, pose, mask = tiny_pipe(9, pose="painted"), picture(3, 64, 48), Image.new("L", (960, 1280))
    mask.paste(255, (500, 500, 508, 508))
    painted = [
        pipe.encode_pictures(
            pipe.check_inputs(picture(1, 1280, 960), picture(2), mask, "upper", 32, 24, 0, pose_image=shown)
        ).person
        for shown in (pose, pose.resize((960, 1280), Image.Resampling.LANCZOS), None)
    ]
    torch.testing.assert_close(painted[0], painted[1], atol=0.02, rtol=0)
    assert abs(painted[0] - painted[2]).max() > 0.1


def test_half_size_poses_are_trained_with(base, own, tmp_path):
    for file in (own / "train/openpose_img").iterdir():
        Image.open(file).resize((24, 32)).save(file)
    pairs = TreePairs(own, "train", True, ("person", "cloth", "mask", "pose"))
    item = Preparation(64, 48)(pairs.pictures(0), 0, 0)
    assert item["pose"].shape == item["person"].shape and pairs.pictures(0)["pose"].size == (24, 32)
    Image.new("L", (48, 64), 17).save(own / "train/openpose_img/00001_00_rendered.png")
    with pytest.raises(ValueError, match="00001_00_rendered.png. must be a picture of a pose, .* brighter than 17"):
        TreePairs(own, "train", True, ("person", "cloth", "mask", "pose"))


def test_poses_that_do_not_fit_are_one_sentence():
    pipe, plain, pose = tiny_pipe(9, pose="painted"), tiny_pipe(9), picture(7)
    person = pipe.prepare_person(picture(1), box_mask(), pose_image=pose)
    for action, message in (
        (lambda: run(plain, pose_image=pose), "`pose_image` must be None with an adapter that has learnt without poses"),
        (lambda: plain.prepare_person(picture(1), box_mask(), pose_image=pose), "`pose_image` must be None with an adapter"),
        (lambda: run(pipe, pose_image=picture(7, 24, 32)), r"`pose_image` must have the aspect of `person_image` \(32, 24\)"),
        (lambda: run(pipe, pose_image=Image.new("L", (24, 32), 17)), "nowhere brighter than 17 of 255: give a map of labels colours first"),
        (lambda: run(pipe, [picture(1)] * 3, pose_image=[pose] * 2), "`pose_image` must number 1 or 3"),
        (lambda: pipe(person, picture(2), pose_image=pose), "`pose_image` must be None with a prepared person"),
        (lambda: tiny_pipe(8, mask_free=True, pose="painted"), "`pose` must be none where `mask_free` is true"),
        (lambda: AdapterSettings(pose="drawn"), "`pose` must be one of none, painted, got 'drawn'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as raised:
            action()
        assert "\n" not in str(raised.value)
    pipe.register_to_config(pose="none")
    with pytest.raises(ValueError, match="`person_image` was prepared with other weights, settings"):
        pipe(person, picture(2))


# ---- training


@torch.no_grad()
def test_training_paints_as_a_call_does(base, drawn, tmp_path):
    trainer = trainer_of(base, drawn, tmp_path, pose=True, pose_dropout=0)
    batch = next(trainer.batches())
    shown = {name: batch[name][:1] / 2 + 0.5 for name in ("person", "pose")}
    called = conditioning_of(trainer.pipe, shown["person"], batch["mask"][:1], shown["pose"]).person
    painted, bare = (trainer.latents(batch, torch.tensor([seen] * 2))[0].person for seen in (True, False))
    torch.testing.assert_close(painted[:1], called, atol=1e-4, rtol=0)
    half = trainer.latents(batch, torch.tensor([False, True]))[0].person
    torch.testing.assert_close(half, torch.cat([bare[:1], painted[1:]]), atol=1e-5, rtol=0)
    plain = trainer_of(base, drawn, tmp_path / "plain")
    torch.testing.assert_close(plain.latents(batch)[0].person, bare, atol=1e-5, rtol=0)
    losses = []
    for one, share in ((trainer, 0), (trainer, 1), (plain, 0)):
        one.args.pose_dropout = share
        with vton_attention(one.unet, ClothBesideAttnProcessor, "skip"):
            losses.append(one.train_step(batch).item())
    assert losses[1] == pytest.approx(losses[2], abs=1e-6) and abs(losses[0] - losses[1]) > 1e-5


def test_cached_poses_train_the_same(base, drawn, tmp_path):
    options = {"pose": True, "pose_dropout": 0.5, "max_train_steps": 4, "checkpointing_steps": 4}
    main(parse_args(flags(base, drawn, tmp_path / "plain", **options)))
    main(parse_args(flags(base, drawn, tmp_path / "cached", cache_latents=tmp_path / "latents", **options)))
    one, two = (load_file(tmp_path / name / f"checkpoint-4/{TRAINED_NAME}") for name in ("plain", "cached"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_the_adapter_says_that_it_reads_poses(trained, base, drawn, tmp_path):
    with safe_open(trained / ADAPTER_NAME, "pt") as file:
        assert file.metadata()["pose"] == "painted"
    assert (trained / "validation/step-000002.png").is_file()
    pipe = tiny_pipe(9)
    pipe.load_vton_adapter(trained)
    assert abs(run(pipe, pose_image=picture(7)) - run(pipe)).max() > 1e-3
    pipe.unload_vton_adapter()
    assert pipe.config.pose == "none"
    begun = trained / "checkpoint-2"
    with pytest.raises(ValueError, match="was trained with pose painted, not with pose none"):
        trainer_of(base, drawn, tmp_path, resume_from_checkpoint=begun)


def test_poses_are_found_where_datasets_have_them(own, tmp_path):
    def poses(root, **options):
        pairs = TreePairs(root, "train", True, ("person", "cloth", "pose"), **options)
        return [str(files["pose"].relative_to(root)) for _, _, files in pairs.pairs]

    assert poses(own)[0] == "train/openpose_img/00000_00_rendered.png"
    shutil.copytree(own / "train/image", own / "train/image-densepose")
    assert poses(own, pose_folder="image-densepose")[0] == "train/image-densepose/00000_00.png"
    assert poses(own, pose_folder="image-parse-v3")[0] == "train/image-parse-v3/00000_00.png"
    make_dataset(tmp_path / "dress_code", train=3, test=0, seed=0, height=64, category="all")
    assert poses(tmp_path / "dress_code")[0] == "upper_body/skeletons/000000_5.png"
    assert poses(tmp_path / "dress_code", pose_folder="label_maps")[1] == "lower_body/label_maps/000001_4.png"
    Image.new("RGB", (10, 10)).save(own / "train/openpose_img/00001_00_rendered.png")
    with pytest.raises(
        ValueError, match=r"train_pairs.txt, line 2: the pose has size \(10, 10\), its person \(48, 64\)"
    ):
        poses(own)
    (own / "train/openpose_img/00001_00_rendered.png").unlink()
    with pytest.raises(FileNotFoundError, match="line 2: there is no train/openpose_img/00001_00_rendered.png"):
        poses(own)


def test_a_pose_is_moved_with_its_person_and_keeps_its_values():
    person, mask = picture(1, 64, 48), box_mask(64, 48)
    pictures = {"person": person, "cloth": picture(2), "mask": mask, "pose": person}
    plain, moved = (Preparation(64, 48, 0, augment) for augment in ((), ("flip", "crop")))
    flipped = 0
    for i in range(8):
        item = moved(dict(pictures), 0, i)
        assert torch.equal(item["pose"], item["person"])
        flipped += torch.equal(moved({**pictures, "pose": mask}, 0, i)["pose"][:1] > 0, item["mask"] > 0.5)
    assert flipped == 8
    lit = Preparation(64, 48, 0, ("color",))(dict(pictures), 0, 0)
    assert torch.equal(lit["pose"], plain(dict(pictures), 0, 0)["pose"]) and not torch.equal(
        lit["person"], lit["pose"]
    )


def test_pose_dropout_takes_its_share_apart_from_the_cloths():
    seen, cloth = draw_share(range(2000), 0.1), train_vton.draw(range(2000), (1,))["dropout"] >= 0.1
    assert 0.08 < (~seen).float().mean() < 0.12 and 0 < (~seen & ~cloth).float().mean() < 0.03
    assert torch.equal(seen[:5], draw_share(range(5), 0.1)) and draw_share(range(9), 0).all()
    assert not draw_share(range(9), 1).any()


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"pose": True, "mask_free": True},
            "--pose paints into the hole that a mask leaves, and --mask_free has none",
        ),
        ({"pose_folder": "dense"}, "--pose_folder dense needs --pose"),
        ({"pose_column": "dense"}, "--pose_column dense needs --pose"),
        ({"pose": True, "pose_column": "dense"}, "--pose_column dense needs --dataset_name"),
        ({"pose_dropout": 0.5}, "--pose_dropout 0.5 needs --pose"),
        ({"mask_column": "holes"}, "--mask_column holes needs --dataset_name"),
        ({"dataset_config_name": "small"}, "--dataset_config_name small needs --dataset_name"),
        ({"condition_column": "other"}, "--condition_column other needs --mask_free"),
        (
            {"pose": True, "pose_folder": "dense", "dataset_root": None, "dataset_name": "me/pairs"},
            "--pose_folder dense needs --dataset_root",
        ),
    ],
)
def test_flags_that_do_not_go_together(capsys, changed, message):
    with pytest.raises(SystemExit):
        parse_args(flags(Path("base"), Path("data"), Path("out"), **changed))
    assert message in capsys.readouterr().err


# ---- wherever pairs are read


def test_figures_are_measured_with_the_poses(base, trained, own, tmp_path):
    options = {"setting": "paired", "metrics": ["psnr"], "height": 32, "width": 24}
    report = evaluate(tmp_path / "posed", own, base, adapter=trained, **options)
    assert report["made"]["poses"] == "the layout's own"
    shutil.copytree(own / "test/openpose_img", own / "test/others")
    for file in (own / "test/others").iterdir():
        picture(7, 64, 48).save(file)
    other = evaluate(tmp_path / "others", own, base, adapter=trained, pose_folder="others", **options)
    values = [[row["value"] for row in each["figures"]] for each in (report, other)]
    assert values[0] != values[1]
    (own / "test/openpose_img/00001_00_rendered.png").unlink()
    (failure,) = fails(tmp_path / "missing", own, base, "paired", adapter=trained, metrics=["psnr"])
    assert "openpose_img/00001_00_rendered.png" in failure["error"]
    assert "poses" not in evaluate(tmp_path / "plain", own, base, **options)["made"]  # nor are they missed


def test_the_command_line_reads_poses(base, trained, own, capsys):
    place = own / "test"
    line = [
        "--person",
        str(place / "image"),
        "--cloth",
        str(place / "cloth/00000_00.png"),
        "--mask",
        str(place / "agnostic-mask"),
    ]
    line += ["--pose", str(place / "openpose_img"), "--output", str(own / "out"), "--model", str(base), "--steps", "2"]
    line += ["--device", "cpu", "--height", "32", "--width", "24"]
    assert tryon.main(tryon.parse_args([*line, "--adapter", str(trained)])) == 0
    pipe = StableDiffusionVTONPipeline.from_pretrained(base)
    pipe.load_vton_adapter(trained)
    person, cloth, mask, pose = (
        Image.open(place / file)
        for file in (
            "image/00001_00.png", "cloth/00000_00.png", "agnostic-mask/00001_00_mask.png", "openpose_img/00001_00_rendered.png",
        )
    )  # fmt: skip
    size = {"height": 32, "width": 24, "num_inference_steps": 2, "generator": seeded()}
    expected = pipe(person, cloth, mask, pose, **size).images[0]
    assert (np.asarray(Image.open(own / "out/00001_00__00000_00.png")) == np.asarray(expected)).all()
    assert tryon.main(tryon.parse_args([*line, "--overwrite"])) == 2
    assert "has learnt without poses: leave out --pose" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tryon.parse_args([*line, "--pose", str(own / "nothing")])


def test_the_demo_shows_poses_to_adapters_that_read_them():
    lines = draw_lines(6, seed=1, height=64)[:2]
    pipe, plain = tiny_pipe(9, pose="painted"), tiny_pipe(9)
    shown = [[getattr(line, name) for line in lines] for name in ("person", "cloth", "mask", "pose")]
    results = pipe(*shown, num_inference_steps=2, generator=noises(1, 0, 2)).images
    for one, other in zip(try_on(pipe, lines, 2, 1), results):
        assert (np.asarray(one) == np.asarray(other)).all()
    bare = plain(*shown[:3], num_inference_steps=2, generator=noises(1, 0, 2)).images
    assert (np.asarray(try_on(plain, lines, 2, 1)[0]) == np.asarray(bare[0])).all()
