"""Tests of the comparison: python -m pytest -q, from the repository root."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import ractd
from reproduce.common import in_turns
from reproduce.planners import compare

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"


@pytest.fixture
def run(log):
    """The run of a command line, on random rows and at tiny size."""
    sizes = ["--episodes=2", "--slow=10", "--slow-episodes=1", "--diffuser-candidates=2"]
    run = compare.parse([f"--env={ENV}", "--data=log.hdf5", "--out=run", *sizes])
    for one in (run.ractd, run.diffuser, run.trajectory_diffuser):
        small = {"horizon": 8}
        for field in dataclasses.fields(one.config):
            if field.name.endswith(("_steps", "_batch")):
                small[field.name] = 6
        one.config = dataclasses.replace(one.config, **small)
    run.diffuser.config.guides = 1
    run.diffuser.config.stop = 15
    return run


def rows():
    with open("run/compare.json") as f:
        return {row["label"]: row for row in json.load(f)["rows"]}


def test_every_planner_is_trained_timed_and_scored_once(run, capsys, monkeypatch):
    monkeypatch.setattr(compare, "TEACHERS", (5, 3))
    monkeypatch.setattr(compare, "in_turns", lambda calls, turns: in_turns(calls, turns=1))
    compare.compare(run)
    text = capsys.readouterr().out
    assert list(rows()) == [
        "behaviour cloning",
        "teacher, 5 points",
        "teacher, 3 points",
        "CTD",
        "RACTD",
        "Diffuser, 2 candidates",
        "Trajectory Diffuser, draft alone",
        "Trajectory Diffuser, refined",
        "Trajectory Diffuser, refined without noise",
        "Trajectory Diffuser, pure noise",
    ]
    assert all(label in text for label in rows())
    slow = {"Diffuser, 2 candidates", "Trajectory Diffuser, refined"}
    slow.add("Trajectory Diffuser, refined without noise")
    for label, row in rows().items():
        assert len(row["returns"]) == (1 if label in slow else 2)
    calls = {label: row["calls"] for label, row in rows().items()}
    assert calls["teacher, 5 points"] == {"denoiser": 7}
    assert calls["RACTD"] == {"student": 1}
    assert calls["Diffuser, 2 candidates"] == {"denoiser": 20, "value gradient": 5}
    drafted = {"draft": 7, "denoiser": 3, "inverse dynamics": 1}
    assert calls["Trajectory Diffuser, refined"] == drafted
    pure = {"draft": 0, "denoiser": 9, "inverse dynamics": 1}
    assert calls["Trajectory Diffuser, pure noise"] == pure

    # each with its own time of training, and RACTD's with that of its reward teacher
    seconds = [torch.load(f"run/{x}.pt")["seconds"] for x in ("reward", "teacher", "student")]
    assert rows()["RACTD"]["train_s"] == pytest.approx(sum(seconds))
    plain = torch.load("run/variants/reward_teacher=False/teacher.pt")
    assert rows()["behaviour cloning"]["train_s"] == plain["seconds"]
    assert rows()["behaviour cloning"]["weights"] == [ractd.weights_id(plain)]
    with open("run/compare.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"

    # nothing again
    compare.compare(run)
    text = capsys.readouterr().out
    assert "steps/s" not in text
    assert "evaluation" not in text
    assert text.count("score from") == 10

    # all is skipped
    run.skip = 0.0
    compare.compare(run)
    assert all(row["ms"] > 0 and "score_mean" not in row for row in rows().values())


def test_behaviour_cloning_is_the_denoiser_at_the_highest_noise(run):
    row = next(compare.ractd_rows(run.ractd))
    assert row.label == "behaviour cloning" and row.calls == {"denoiser": 1}
    observations = np.random.default_rng(0).normal(size=(3, 11))
    plans = row.act(observations, [np.random.default_rng(i) for i in range(3)])
    policy = ractd.Policy(row.models[0])
    state = ractd.encode(torch.tensor(observations).float(), policy.obs_table)
    x = torch.zeros(3, 8, 3)
    expected = ractd.denoise(policy.net, x, torch.full((3,), 80.0), state).clamp(-1, 1)
    expected = ractd.decode(expected, policy.action_table).numpy()
    assert plans == pytest.approx(expected, abs=1e-3)


def test_planners_run_with_their_own_defaults_and_the_seeds_of_the_comparison(log):
    how = ["--seed=3", "--episodes=4", "--first-seed=5", "--out=run"]
    run = compare.parse(["--env=halfcheetah-medium", "--data=log.hdf5", *how])
    configs = [run.ractd.config, run.diffuser.config, run.trajectory_diffuser.config]
    assert [config.horizon for config in configs] == [16, 4, 8]
    for config in configs:
        assert (config.seed, config.episodes, config.first_seed) == (3, 4, 5)
    outs = [run.ractd.out, run.diffuser.out, run.trajectory_diffuser.out]
    assert [str(out) for out in outs] == ["run", "run/diffuser", "run/trajectory_diffuser"]


@pytest.mark.parametrize(
    "flag", ["--slow-episodes=0", "--episodes=0", "--env=nothing", "--diffuser-candidates=0"]
)
def test_bad_input_is_refused(log, flag, capsys):
    assert compare.main([f"--env={ENV}", flag]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err
