"""Tests of the comparison: python -m pytest -q, from the repository root."""

import json

import numpy as np
import pytest
import torch

import ractd
from reproduce import compare, diffuser, trajectory_diffuser

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"
SIZES = ["--data=log.hdf5", "--horizon=8", "--channels=8", "--episodes=2", f"--env={ENV}"]
SIZES += [f"--{x}-{y}" for x in ("teacher", "reward", "student") for y in ("steps=6", "batch=8")]


@pytest.fixture
def runs(log):
    """The three runs on random rows, at tiny size."""
    run = ractd.build_parser().parse_args(["distill", *SIZES, "--tilted-steps=6", "--out=run"])
    ractd.resolve(run)
    sizes = [flag for flag in SIZES if "student" not in flag]
    guided = [*sizes, "--out=run/diffuser", "--candidates=2", "--guides=1", "--stop=15"]
    drafted = trajectory_diffuser.parse([*SIZES, "--out=run/trajectory_diffuser"])
    guiding = diffuser.parse(guided)
    guiding.diffuser_candidates = [2]
    return [run, guiding, drafted]


def test_every_planner_is_trained_timed_and_scored_once(runs, capsys, monkeypatch):
    monkeypatch.setattr(compare, "TEACHERS", (5, 3))
    compare.compare(runs, slow=0.0, slow_episodes=1)  # everything is slow
    text = capsys.readouterr().out
    with open("run/compare.json") as f:
        rows = {row["label"]: row for row in json.load(f)["rows"]}
    assert list(rows) == [
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
    assert all(label in text and len(row["returns"]) == 1 for label, row in rows.items())
    calls = {label: row["calls"] for label, row in rows.items()}
    assert calls["teacher, 5 points"] == {"denoiser": 7} and calls["RACTD"] == {"student": 1}
    assert calls["Diffuser, 2 candidates"] == {"denoiser": 20, "value gradient": 5}
    drafted, pure = (calls[f"Trajectory Diffuser, {x}"] for x in ("refined", "pure noise"))
    assert drafted == {"draft": 7, "denoiser": 3, "inverse dynamics": 1}
    assert pure == {"draft": 0, "denoiser": 9, "inverse dynamics": 1}
    stages = [torch.load(f"run/{x}.pt")["seconds"] for x in ("teacher", "reward", "tilted")]
    student = torch.load("run/student.pt")["seconds"]
    assert rows["RACTD"]["train_s"] == pytest.approx(sum(stages) + student)
    assert rows["behaviour cloning"]["train_s"] == stages[0]
    with open("run/compare.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    compare.compare(runs, slow=0.0, slow_episodes=1)
    text = capsys.readouterr().out
    assert "steps/s" not in text and "evaluation" not in text and text.count("score from") == 10
    compare.compare(runs, slow=1e9, slow_episodes=1)  # nothing is slow
    with open("run/compare.json") as f:
        assert {len(row["returns"]) for row in json.load(f)["rows"]} == {2}
    compare.compare(runs, slow=0.0, slow_episodes=1, skip=0.0)
    with open("run/compare.json") as f:
        assert all(row["ms"] > 0 and "score_mean" not in row for row in json.load(f)["rows"])


def test_behaviour_cloning_is_the_denoiser_at_the_highest_noise(runs):
    run = runs[0]
    teacher = compare.Experiment(run).model("teacher")
    observations = np.random.default_rng(0).normal(size=(3, 11))
    plans = compare.MeanAction(teacher, device=run.device).act(observations, None)
    policy = ractd.Policy(teacher)
    state = ractd.encode(torch.tensor(observations).float(), policy.tables["obs"])
    t = torch.full((3,), 80.0)
    x = torch.zeros(3, 8, 3)
    expected = ractd.denoise(policy.net, x, t, state).clamp(-1, 1)
    expected = ractd.decode(expected, policy.tables["action"]).detach().numpy()
    assert plans == pytest.approx(expected, abs=1e-5)


def test_bad_input_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--slow-episodes=0", "--episodes=0", "--seed=-1", "--env=nothing")
    for flag in (*flags, "--diffuser-candidates=0"):
        assert compare.main([f"--env={ENV}", flag]) == 2
        error = capsys.readouterr().err
        assert flag.split("=")[0] in error and "Traceback" not in error
