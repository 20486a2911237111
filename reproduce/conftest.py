"""What more than one file of tests here needs."""

import h5py
import numpy as np
import pytest


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Random rows in D4RL's layout, in the folder where the test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng, n = np.random.default_rng(0), 133
    with h5py.File("log.hdf5", "w") as f:
        f["observations"] = rng.normal(size=(n, 11))
        f["actions"] = rng.uniform(-0.9, 0.8, (n, 3))
        f["rewards"] = rng.normal(1, 1, n)
        f["terminals"] = np.isin(range(n), [39, 52])
        f["timeouts"] = np.isin(range(n), [47, 112, 132])
