"""What more than one file of tests here needs."""

import shutil

import h5py
import numpy as np
import pytest

for package in ("matplotlib", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -r reproduce/requirements.txt")


@pytest.fixture(scope="session")
def log_file(tmp_path_factory):
    """Random rows in D4RL's layout: five short episodes, as hopper's in size."""
    path = tmp_path_factory.mktemp("data") / "log.hdf5"
    rng = np.random.default_rng(0)
    n = 133
    with h5py.File(path, "w") as f:
        f["observations"] = rng.normal(size=(n, 11))
        f["actions"] = rng.uniform(-0.9, 0.8, (n, 3))
        f["rewards"] = rng.normal(1, 1, n)
        f["terminals"] = np.isin(range(n), [39, 52])
        f["timeouts"] = np.isin(range(n), [47, 112, 132])
    return path


@pytest.fixture
def log(log_file, tmp_path, monkeypatch):
    """The same rows, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(log_file, tmp_path)
