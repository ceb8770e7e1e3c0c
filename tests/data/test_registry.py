"""Sources by name: which there are, what each needs, and that importing them costs nothing."""

import dataclasses
import subprocess
import sys

import pytest
from PIL import Image

from medvdm import data
from medvdm.data import DataConfig, medmnist
from medvdm.errors import InputError, MissingFileError


def refused(*words, **settings):
    with pytest.raises(InputError) as error:
        data.load(DataConfig(**settings))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_names():
    assert data.names() == ("phantom", "nih", "folder", *medmnist.FLAGS)


@pytest.mark.parametrize(
    ("patient", "remainder"),
    [("2", 1), ("13", 2), ("61", 4), ("patient-0001", 2)],  # by sha256sum and a calculator
)
def test_the_fixed_split_is_the_sha256_of_the_whole_id(patient, remainder):
    assert data.split_of_patient(patient) == {0: "test", 1: "test", 2: "val"}.get(remainder, "train")


def test_the_fixed_split_has_its_shares():
    splits = [data.split_of_patient(f"patient {i}") for i in range(4000)]
    for split, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert abs(splits.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_unknown_name_gives_the_nearest():
    refused("data: 'phantm'", "did you mean 'phantom'", "pneumoniamnist", data="phantm")


@pytest.mark.parametrize("name", ["nih", "folder"])
def test_sources_that_need_a_folder_say_so(name):
    refused("data_dir", "--data-dir", data=name)


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    refused("data_dir", "phantom", data_dir=str(tmp_path))
    refused("data_dir: ''", data="folder", data_dir="")
    refused("image_size: 0", data="nih", image_size=0)
    refused("did you mean 'stretch'", data="nih", fit="strech")
    refused("patient_pattern", "folder", data="nih", data_dir=str(tmp_path), patient_pattern="(a)")


def test_settings_reach_the_source(tmp_path):
    (tmp_path / "N").mkdir()
    Image.new("L", (8, 4), 255).save(tmp_path / "N" / "p7.png")
    config = DataConfig(data="folder", data_dir=str(tmp_path), image_size=4, fit="crop", patient_pattern=r"p(\d)")
    loaded = data.load(config)
    assert loaded.name == "folder" and list(loaded.patients) == ["7"]
    assert loaded.read([0]).shape == (1, 4, 4, 1) and loaded.read([0]).min() == 1.0
    assert data.load(dataclasses.replace(config, fit="pad")).read([0]).min() == 0.0


def test_phantom_settings_reach_the_phantom():
    loaded = data.load(DataConfig(num_images=12, image_size=16, data_seed=3))
    assert loaded.name == "phantom" and len(loaded) == 12 and loaded.image_shape == (16, 16, 1)
    assert loaded.fingerprint() != data.load(DataConfig(num_images=12, image_size=16, data_seed=4)).fingerprint()


@pytest.mark.parametrize("name", ["nih", *medmnist.FLAGS])
def test_each_name_reaches_its_source(name, tmp_path):
    from medvdm.errors import MissingFileError

    with pytest.raises(MissingFileError, match="Data_Entry_2017" if name == "nih" else name):
        data.load(DataConfig(data=name, data_dir=str(tmp_path)))


def test_every_option_is_explained():
    """tyro takes the string below a field as its help."""
    import inspect

    source = inspect.getsource(DataConfig)
    for field in dataclasses.fields(DataConfig):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n")[1]
        assert after.strip().startswith('"""'), field.name


def test_importing_is_cheap():
    code = (
        "import sys, medvdm.data; medvdm.data.names(); "
        "print([m for m in ('PIL', 'pooch', 'pydicom', 'jax', 'grain', 'matplotlib', 'requests') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_example_images_are_phantoms_unless_a_folder_is_named(monkeypatch):
    monkeypatch.delenv("MEDVDM_DATA_DIR", raising=False)
    images = data.example_images(image_size=16, num_images=20)
    assert images.name == "phantom" and len(images) == 20 and images.image_shape == (16, 16, 1)


def test_example_images_are_real_where_a_folder_is_named(real_data, monkeypatch):
    for folder in (real_data, real_data / "nih-chestxray8-256"):
        monkeypatch.setenv("MEDVDM_DATA_DIR", str(folder))
        images = data.example_images(image_size=16)
        assert images.name == "nih" and images.image_shape == (16, 16, 1)


def test_example_images_says_which_folder_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVDM_DATA_DIR", str(tmp_path))
    with pytest.raises(MissingFileError, match=str(tmp_path)):
        data.example_images()
