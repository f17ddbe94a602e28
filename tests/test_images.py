"""Image files as owners have them, read as people see them, and what preparing them may lose."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from client.data.private_data import PrivateData
from client.settings import Data
from common.agreement import Reading, Task
from common.data.images import ImageFile
from common.errors import DataError, ModelError
from common.models.folders import load_image_processor

CATS_AND_DOGS = Task(kind="image-classification", labels=("cat", "dog"))
CONFIG = ViTConfig(
    image_size=8, patch_size=4, num_channels=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1,
)  # fmt: skip
PROCESSOR: dict[str, object] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


FRAMED: dict[str, object] = {  # what is left of every image is next to nothing, in a frame of large contrast
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 4},
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "rescale_factor": 1e-9,
    "image_mean": [1.0, 1.0, 1.0],
    "image_std": [1.0, 0.1, 1.0],
}


def picture(seed: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def write_folder(folder: Path, count: int = 6) -> Path:
    """So many images of each label."""
    for label, first in (("cat", 0), ("dog", 100)):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            picture(first + number).save(folder / label / f"{number}.png")
    return folder


def data_of(path: Path, base: Path | None = None, **settings: object) -> PrivateData:
    return PrivateData(
        data=Data(train=path, test=path, **settings),  # type: ignore[arg-type]
        task=CATS_AND_DOGS,
        model=ViTForImageClassification(CONFIG),
        tokenizer=None,
        processor=None if base is None else load_image_processor(base),
        folder=Path(),
        seed=0,
        reading=Reading(),
    )


def base_with(folder: Path, **changes: object) -> Path:
    """A base whose preprocessor_config.json has these changes."""
    folder.mkdir()
    CONFIG.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    return folder


# --- a folder, or a table ---


def test_a_folder_holds_one_folder_for_each_label(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", count=2)
    deep = tmp_path / "photos" / "dog" / "2026" / "may"
    deep.mkdir(parents=True)
    picture(7).save(deep / "OLD.JPEG")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "more.txt"):
        (tmp_path / "photos" / "cat" / name).write_text("x")
    data = data_of(tmp_path / "photos")
    rows = data.test()
    assert rows.targets.tolist() == [0, 0, 1, 1, 1]
    assert rows.features.shape == (5, 3, 8, 8)  # type: ignore[union-attr]
    np.testing.assert_array_equal(rows.features[0], np.asarray(picture(0), np.float32).transpose(2, 0, 1) / 255)
    assert [line for line in data.oddities() if "left out" in line] == [
        f"{tmp_path / 'photos'}: files that are not images are left out: 2 .txt"
    ] * 2


def as_csv(folder: Path) -> Path:
    lines = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (folder / "table.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    return folder / "table.csv"


def as_parquet(folder: Path) -> Path:
    """As `datasets` saves images: their bytes within the table."""
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name}
        for path in sorted(folder.rglob("*.png"))
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return folder / "table.parquet"


@pytest.mark.parametrize("form", [as_csv, as_parquet])
def test_a_table_names_or_holds_the_same_images(form: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos")
    one, other = data_of(folder), data_of(form(folder))
    np.testing.assert_array_equal(one.test().features, other.test().features)
    np.testing.assert_array_equal(one.test().targets, other.test().targets)
    assert list(one.training_contents()) == list(other.training_contents())
    assert one.label_set().tolist() == other.label_set().tolist() == [0, 1]


def test_rows_are_drawn_from_the_whole_folder(tmp_path: Path) -> None:
    targets = data_of(write_folder(tmp_path / "photos", count=50), max_test_rows=20).test().targets.tolist()
    assert len(targets) == 20
    assert set(targets) == {0, 1}


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("../secret.png", "row 1: its image lies outside the table's folder"),
        ("link.png", "row 1: its image lies outside the table's folder"),
        ("/etc/passwd", "row 1: its image lies outside the table's folder"),
        ("missing.png", "row 1: there is no such image"),
        ("", "row 1: its image is str, not a path"),
    ],
)
def test_133_a_table_names_images_beside_it_alone(cell: str, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(0).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "table.csv").write_text(f"image,label\n{cell},cat\n")
    with pytest.raises(DataError, match=says):
        data_of(folder / "table.csv").test()


def test_an_image_without_a_label_s_folder_and_a_folder_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="empty: holds no images"):
        data_of(tmp_path / "empty").test()
    picture(0).save(write_folder(tmp_path / "photos") / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png: lies beside the folders of the labels"):
        data_of(tmp_path / "photos").test()


def test_a_folder_that_datasets_saved_with_several_splits_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="holds several splits: train"):
        data_of(tmp_path / "saved").test()


def test_a_folder_that_is_no_label_is_refused(tmp_path: Path) -> None:
    shutil.move(write_folder(tmp_path / "photos") / "dog", tmp_path / "photos" / "dogs")
    with pytest.raises(DataError, match=r"photos: its folder 'dogs' is none of cat, dog.*\nhint: did you mean dog\?"):
        data_of(tmp_path / "photos").test()
    (tmp_path / "photos" / "dogs").rename(tmp_path / "photos" / "drafts")
    with pytest.raises(
        DataError, match=r"its folder 'drafts' is none of .*\nhint: each folder holds the images of one"
    ):
        data_of(tmp_path / "photos").test()


# --- pixels ---


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


RED_AND_BLUE = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
ORIENTATION = 0x0112


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 3  # upside down
    return saved(RED_AND_BLUE, "TIFF", exif=exif)


@pytest.mark.parametrize(
    ("file", "pixels"),
    [
        (saved(RED_AND_BLUE, "PNG"), [[[255, 0, 0], [0, 0, 255]]]),
        (saved(RED_AND_BLUE, "WEBP", lossless=True), [[[255, 0, 0], [0, 0, 255]]]),
        (saved(RED_AND_BLUE, "BMP"), [[[255, 0, 0], [0, 0, 255]]]),
        (saved(RED_AND_BLUE.convert("P"), "GIF"), [[[255, 0, 0], [0, 0, 255]]]),
        (saved(RED_AND_BLUE.convert("RGBA"), "PNG"), [[[255, 0, 0], [0, 0, 255]]]),
        (saved(Image.fromarray(np.array([[0, 65535, 32768]], np.uint16)), "PNG"), [[0, 255, 128]]),
        (saved(Image.fromarray(np.array([[0, 65535, 32768]], np.uint16)), "TIFF"), [[0, 255, 128]]),
        (saved(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "PNG"), [[0, 255]]),
        (turned(), [[[0, 0, 255], [255, 0, 0]]]),
    ],
    ids=["png", "webp", "bmp", "gif", "transparent", "16-bit png", "16-bit tiff", "1-bit", "turned"],
)
def test_an_image_is_read_as_people_see_it(file: bytes, pixels: list[object]) -> None:
    assert np.asarray(ImageFile("it", file).pixels()).tolist() == pixels


@pytest.mark.filterwarnings("error")
def test_broken_exif_data_says_nothing_in_the_terminal() -> None:
    content = saved(RED_AND_BLUE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(content)).getexif()
    image = ImageFile("it", content)
    assert image.pixels().size == image.size() == (2, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a text\n",
        saved(picture(0, side=64), "PNG")[:-200],
        saved(picture(0), "PNG").replace(b"IHDR\x00\x00\x00\x08", b"IHDR\x00\x01\x00\x00"),
        b"P6 8 8 255\n" + bytes(192),  # one that Pillow reads, of a kind that nobody asked for
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # Pillow would start Ghostscript
    ],
    ids=["empty", "text", "cut short", "another size", "another kind", "a program"],
)
def test_133_what_is_no_image_is_named(content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png: cannot be read as an image"):
        data_of(tmp_path / "photos").test()


@pytest.mark.parametrize("side", [10_001, 20_000])
def test_133_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(side: int, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("1", (side, side)).save(tmp_path / "cat" / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png: has more than 100,000,000 pixels"):
        data_of(tmp_path).test()


def test_133_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with (tmp_path / "cat" / "huge.png").open("wb") as file:
        file.truncate(1_000_000_001)  # no room is taken
    with pytest.raises(DataError, match=r"huge\.png: has 1000000001 bytes, at most 1000000000 are allowed"):
        data_of(tmp_path).test()


# --- preparation ---


def test_the_base_s_own_processor_prepares_images(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base")
    folder = write_folder(tmp_path / "photos")
    prepared = np.asarray(picture(0), np.float32).transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(data_of(folder, base).test().features[0], prepared, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": {"height": 4, "width": 4}}, r"makes images of \(3, 4, 4\), and its model takes \(3, 8, 8\)"),
        ({"image_mean": [0.5]}, "the base's image processor cannot prepare an image"),
        ({"image_processor_type": "NoSuchProcessor"}, "its image processor cannot be loaded"),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_refused(
    changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    base = base_with(tmp_path / "base", **changes)
    with pytest.raises(ModelError, match=says):
        data_of(write_folder(tmp_path / "photos"), base).test()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rescale_factor": 0.0}, r"11 nearly equal to the image before \(91.7%, at most 5.0%\), 12 equal to another"),
        ({"rescale_factor": 1e-9}, "11 nearly equal to the image before"),
        ({"rescale_factor": 1e-9, "image_mean": [0, 1, -1]}, "11 nearly equal to the image before"),
        ({"image_std": [1e9, 1e9, 1e9]}, "11 nearly equal to the image before"),
        (FRAMED, "11 nearly equal to the image before"),
    ],
)
def test_132_an_image_processor_that_erases_every_image(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", **changes)
    with pytest.raises(DataError, match=says) as caught:
        data_of(write_folder(tmp_path / "photos"), base).test()
    assert "because its image processor loses what these rows say" in str(caught.value.hint)


def test_a_processor_s_configuration_names_no_code(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", auto_map={"AutoImageProcessor": "evil.Processor"})
    (base / "evil.py").write_text("raise SystemExit('code ran')")
    assert len(data_of(write_folder(tmp_path / "photos"), base).test()) == 12


def test_images_have_several_labels_or_numbers_from_arrays_or_from_a_table(tmp_path: Path) -> None:
    arrays, names = tmp_path / "rows.npz", ("cat", "dog", "bird")
    images = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    np.savez(arrays, image=images, label=np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]]), x=[1, 2, 3], y=[0.5, 1, 0])
    several = CATS_AND_DOGS.model_copy(update={"problem_type": "multi_label_classification", "labels": names})
    assert replace(data_of(arrays), task=several).test().targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    numbers = {"problem_type": "regression", "labels": ("x", "y"), "target_range": (0.0, 3.0)}
    of_numbers = CATS_AND_DOGS.model_copy(update=numbers)
    rows = replace(data_of(arrays, label=("x", "y")), task=of_numbers).test()
    assert rows.targets.tolist() == [[1, 0.5], [2, 1], [3, 0]]
    assert rows.batch(np.array([2, 0]))[1].tolist() == [[3, 0], [1, 0.5]]
    with pytest.raises(DataError, match=r"labels \(3, 3\); the model needs"):
        data_of(arrays).test()
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    table = tmp_path / "rows.csv"
    table.write_text("image,label\n0.png,dog;cat\n1.png,\n")
    assert replace(data_of(table), task=several).test().targets.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_images_are_decoded_once_for_all_candidates_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(write_folder(tmp_path / "photos"))
    decoded: list[str] = []
    pixels = ImageFile.pixels

    def counted(image: ImageFile) -> Image.Image:
        decoded.append(image.where)
        return pixels(image)

    monkeypatch.setattr(ImageFile, "pixels", counted)
    first, again = data.test(), data.test()
    assert again is first
    assert len(decoded) == len(first)
