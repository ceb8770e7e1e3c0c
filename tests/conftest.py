"""Shared by all tests: shapes and types of the mathematical modules are checked at run time."""

import os
import shutil
from pathlib import Path

import jaxtyping
import pytest

# Before anything imports the package: every call of these modules is checked against its annotations.
jaxtyping.install_import_hook(["medvdm.theory", "medvdm.models", "medvdm.training.step"], "beartype.beartype")

# Compiling takes most of the time of a small run. Compiled code is kept beside pytest's own cache, also for the
# processes that tests start, and also for the next test run: every program, as there are thousands of small ones.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# Tests compute little, so what LLVM and the fusion emitters optimise costs more than it saves; and two tests run at a
# time, so to compile the parts of one program at once does not pay. Chapters and recorded runs have all of it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")  # no broadcast between arrays of different rank by accident


@pytest.fixture
def real_data() -> Path:
    """The folder of real data named by MEDVDM_DATA_DIR (nih-chestxray8-256 and medmnist inside), or skip."""
    folder = os.environ.get("MEDVDM_DATA_DIR")
    if not folder:
        pytest.skip("MEDVDM_DATA_DIR is not set: it names the folder with nih-chestxray8-256/ and medmnist/")
    folder = Path(folder)
    missing = [name for name in ("nih-chestxray8-256", "medmnist") if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"MEDVDM_DATA_DIR={folder} has no folder {' and no '.join(missing)}")
    return folder


@pytest.fixture
def unchecked():
    """Switch the run-time type check off, to meet the library's own refusals as a user does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def small():
    """A tiny class-conditional VDM with random weights everywhere (zero-initialised layers too): config, graph, params.

    The image has three different sides, so a mixed-up axis shows.
    """
    import tiny

    from medvdm.models import vdm

    config = vdm.VDMConfig(
        image_shape=(3, 4, 2),
        classes=3,
        latent=4,
        embedding_dim=8,
        encoder_width=8,
        decoder_width=8,
        inner_width=16,
        encoder_layers=1,
        decoder_layers=1,
        score_layers=2,
    )
    return config, vdm.graph_of(config), tiny.weights(config, 0.4)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run that ``medvdm train`` left, made once a session. Tests that write take ``run``."""
    import helpers

    return helpers.train(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def trained_pixels(tmp_path_factory) -> Path:
    """A class-conditional run of a diffusion on pixels, trained on shifted crops; for tests that only read it."""
    import tiny

    import medvdm

    out = tmp_path_factory.mktemp("trained-pixels") / "run"
    medvdm.fit(tiny.pixels(**tiny.CROPS), out, progress=False)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to write into or to damage."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))
