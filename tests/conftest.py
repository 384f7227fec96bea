"""The tests talk to a Hub on loopback alone, with a home of their own, and compute with one thread a process, since several run
at once and would wait for each other's: set before anything imports `huggingface_hub` or torch.
"""

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
HOME = tempfile.TemporaryDirectory()
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",
    "HF_HOME": HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.pop("HF_TOKEN", None)


@pytest.fixture(scope="session")
def hub():
    """The stand-in for the Hub, with two accounts: `me` (token `hf_me`) and `you` (`hf_you`)."""
    from hub_server import Hub

    server = Hub(HUB_PORT, {"hf_me": "me", "hf_you": "you"})
    yield server
    server.close()


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state a process: the test gets a new one, on the CPU."""
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import patch_environment

    with patch_environment(ACCELERATE_USE_CPU="true"):
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[int, Path]:
    """Bases with 4, 8 and 9 input channels, as diffusers folders."""
    from tiny import tiny_pipe

    root = tmp_path_factory.mktemp("bases")
    for channels in (4, 8, 9):
        for name, component in tiny_pipe(channels, text=True).components.items():
            if component is not None:
                component.save_pretrained(root / str(channels) / name)
    return {channels: root / str(channels) for channels in (4, 8, 9)}


@pytest.fixture(scope="session")
def tested(tmp_path_factory) -> Path:
    """Ten drawn training pairs and four test pairs of 64 x 48 pixels."""
    from demo.make_dataset import make_dataset

    root = tmp_path_factory.mktemp("tested")
    make_dataset(root, 10, 4, seed=0, height=64)
    return root


@pytest.fixture(scope="session")
def data(tested, tmp_path_factory) -> Path:
    """The same without a test list: there is nothing to validate with."""
    root = Path(shutil.copytree(tested, tmp_path_factory.mktemp("data") / "data"))
    (root / "test_pairs.txt").unlink()
    return root


@pytest.fixture
def own_data(tested, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tested, tmp_path / "own"))
