"""Tests of Diffuser against closed forms for Gaussian data: python -m pytest -q."""

import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ractd
from reproduce import diffuser

torch.set_num_threads(1)  # more would round differently
ENV, MEAN, SD, SLOPE = "hopper-medium-replay", 0.3, 0.4, 0.7
TINY = ["--horizon=8", "--channels=8", "--episodes=2", "--candidates=2", "--data=log.hdf5"]
TINY += ["--guides=1", "--stop=15"]
TINY += [f"--{stage}-{name}" for stage in ("teacher", "reward") for name in ("steps=6", "batch=8")]


def denoiser(x, t):
    """E[x0 | x] where x0 ~ N(MEAN, SD^2)."""
    return MEAN + SD**2 / (SD**2 + t**2) * (x - MEAN)


def value(x, t):
    """E[SLOPE x0 | x], summed over the plan: (B,)."""
    return SLOPE * denoiser(x, t).sum((1, 2))


def sample(scale=0.0, guides=2, stop=2, n=200_000):
    torch.manual_seed(0)
    sigmas = diffuser.cosine_sigmas()
    x = MEAN + math.sqrt(SD**2 + 80**2) * torch.randn(n, 1, 1)
    noise = torch.randn_like
    x = diffuser.guided_sample(denoiser, value, x, sigmas, noise, scale, guides, stop)
    return x, list(itertools.pairwise(sigmas.tolist()))


def test_the_levels_are_those_of_the_cosine_schedule():
    levels = "12.81 6.365 4.2 3.104 2.435 1.981 1.648 1.391 1.184 1.012 .866 .738 .624 .52 .425"
    levels = [80.0, *map(float, levels.split()), 0.336, 0.251, 0.169, 0.09, 0.02]
    assert diffuser.cosine_sigmas().tolist() == pytest.approx(levels, rel=0.01)


def test_an_ancestral_step_has_the_mean_and_variance_of_the_posterior():
    """Of x at u, given x at t and x0: a Brownian bridge in the variance, from 0 to t^2."""
    torch.manual_seed(0)
    x0, t, u, n = 0.4, 2.0, 0.7, 400_000
    at_u = x0 + u * torch.randn(n, 1, 1)
    at_t = at_u + math.sqrt(t**2 - u**2) * torch.randn(n, 1, 1)
    stepped = diffuser.ancestral_step(at_t, torch.tensor(x0), t, u, torch.randn(n, 1, 1))
    assert stepped.mean().item() == pytest.approx(x0, abs=0.005)
    assert stepped.std().item() == pytest.approx(u, rel=0.005)
    covariance = ((stepped - x0) * (at_t - x0)).mean().item()
    assert covariance == pytest.approx(u**2, rel=0.01)
    one = diffuser.ancestral_step(at_t[:9], torch.tensor(x0), t, u, torch.zeros(9, 1, 1))
    assert torch.allclose(one, x0 + (u / t) ** 2 * (at_t[:9] - x0))


def test_unguided_samples_have_the_mean_of_the_data_and_the_variance_of_the_recursion():
    x, steps = sample()
    variance = SD**2 + 80**2
    for i, (t, u) in enumerate(steps):  # the last step adds no noise
        shrink = (SD**2 + u**2) / (SD**2 + t**2)
        added = u**2 * (t**2 - u**2) / t**2 if i < len(steps) - 1 else 0.0
        variance = shrink**2 * variance + added
    assert x.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert x.var().item() == pytest.approx(variance, rel=0.02)
    assert variance < SD**2 + 0.02**2  # twenty steps leave the samples too narrow


@pytest.mark.parametrize(("guides", "stop"), [(2, 2), (1, 0), (3, 20)])
def test_a_linear_value_shifts_gaussian_samples_as_the_closed_form_says(guides, stop):
    scale = 0.05
    x, steps = sample(scale, guides, stop)
    plain, _ = sample()
    shift = 0.0
    for i, (t, u) in enumerate(steps):
        k = SD**2 / (SD**2 + t**2)
        if i < len(steps) - stop:
            shift += guides * scale * u**2 * (t**2 - u**2) / t**2 * SLOPE * k
        shift *= (SD**2 + u**2) / (SD**2 + t**2)
    assert (x - plain).mean().item() == pytest.approx(shift, rel=1e-3, abs=1e-6)
    assert (x - plain).std().item() == pytest.approx(0, abs=1e-4) and (shift > 0) == (stop < 20)


def test_windows_are_actions_and_states_of_one_episode_and_their_return():
    torch.manual_seed(0)
    lengths, rows = (12, 4, 30), np.arange(46.0)
    ends = np.cumsum(lengths) - 1
    columns = [np.stack([rows, -rows], 1), rows[:, None], np.ones(46)]
    columns += [np.isin(range(46), ends[:2]), np.isin(range(46), ends[2:])]
    data = ractd.Dataset("d", "file", columns)
    batches = diffuser.JointBatches(data, 8, 0.9)
    state, plan, target = batches.windows(2000)
    raw = ractd.decode(plan[..., :1], batches.normalizer["action"]).squeeze(2).round().numpy()
    states = ractd.decode(plan[..., 1:], batches.normalizer["obs"]).round().numpy()
    assert np.array_equal(raw, raw[:, :1] + np.arange(8))
    assert np.array_equal(states[..., 0], raw) and np.array_equal(states[..., 1], -raw)
    assert torch.equal(state, plan[:, 0, 1:])
    assert {*raw[:, 0]} == {*range(5), *range(16, 39)}
    assert np.array_equal(data.rewards, np.ones(46))  # as they were
    rewards = np.where(np.isin(range(46), ends[:2]), -99.0, 1.0)
    go = ractd.returns_to_go(rewards, data.begins, data.ends, data.terminated, 0.9)
    found = ractd.decode(target[:, None], batches.normalizer["return"]).squeeze(1).numpy()
    assert found == pytest.approx(go[raw[:, 0].astype(int)], abs=1e-4)


def test_the_first_state_is_pinned_and_the_value_hears_plan_state_and_level():
    torch.manual_seed(0)
    config = ractd.Config(horizon=8, channels=(8,), patch=1)
    net = diffuser.make_net(config, (4, 2))
    V = functools.partial(diffuser.value_of, net)
    x, state = 80 * torch.randn(5, 8, 6), torch.rand(5, 4)
    assert torch.equal(ractd.denoise(net, x, 80.0, state)[:, 0, 2:], state)
    base, moved = V(x, 3.0, state), x.clone()
    assert base.shape == (5,)
    moved[:, 0, 2:] = 9  # the value sees the clean state in its place
    assert torch.equal(V(moved, 3.0, state), base)
    for other in (V(x + 1, 3.0, state), V(x, 2.0, state), V(x, 3.0, state + 1)):
        assert not torch.allclose(other, base, atol=1e-6)


def test_the_value_is_trained_at_every_level_where_it_is_asked(monkeypatch):
    def value_of(net, x, t, state):
        seen.append((x, t))
        return x.mean((1, 2))

    class Constant:
        obs = torch.zeros(1)
        windows = staticmethod(lambda n: (torch.zeros(n, 2), torch.full((n, 8, 3), 0.3), 0.0))

    torch.manual_seed(0)
    seen, config = [], ractd.Config(horizon=8, channels=(8,), patch=1, reward_batch=2000)
    _, loss = diffuser.diffuser_loss("reward", config, Constant, (2, 1), None)
    monkeypatch.setattr(diffuser, "value_of", value_of)
    loss(None, None)
    ((x, t),) = seen
    levels = diffuser.cosine_sigmas().float()
    assert torch.isin(t, levels).all()
    spread = torch.stack([(x[t == level] - 0.3).std() / level for level in levels])
    assert spread.tolist() == pytest.approx([1] * 21, abs=0.1)  # NaN where there is none


def test_end_to_end_trains_once_and_writes_every_number(log, capsys, monkeypatch):
    command = [f"--env={ENV}", *TINY]
    assert diffuser.main(command) == 0
    folder = Path(f"runs/{ENV}-diffuser")
    (path,) = folder.glob("score_diffuser_N2_scale0.5_guides1_stop15_*_seeds0-1.json")
    result = json.loads(path.read_text())
    assert len(result["returns"]) == 2 and (result["calls"], result["gradients"]) == (20, 5)
    assert result["train_s"] > 0 and result["candidates"] == 2
    capsys.readouterr()
    assert diffuser.main(command) == 0
    text = capsys.readouterr().out
    assert "steps/s" not in text and "evaluation" not in text and f"score from {path}" in text
    path.write_text(json.dumps(result | {"weights": ["others"], "returns": []}))
    assert diffuser.main(command) == 0
    assert json.loads(path.read_text())["returns"] == result["returns"]
    assert diffuser.main([*command, "--gamma=0.9"]) == 2
    assert "gamma: 0.997 in the file, 0.9 asked" in capsys.readouterr().err
    best = diffuser.value_of
    monkeypatch.setattr(diffuser, "value_of", lambda *inputs: -best(*inputs))
    path.unlink()
    assert diffuser.main(command) == 0  # the worst candidate, guided downwards
    assert json.loads(path.read_text())["returns"] != result["returns"]


def test_other_plans_and_other_tasks_are_refused_before_training(log, capsys):
    command = [f"--env={ENV}", *TINY, "--out=run"]
    assert diffuser.main(command) == 0
    text = capsys.readouterr().out
    assert ractd.main(["data", f"--env={ENV}", "--data=log.hdf5"]) == 0
    described = capsys.readouterr().out.split("mean")[1].split()[0]
    assert described in text.split("mean")[1].split()[0]  # the returns, without TERMINATION
    flags = [flag for flag in TINY if flag[2:6] not in ("guid", "stop")]
    code = ractd.main(["teacher", f"--env={ENV}", *flags[:2], "--data=log.hdf5", "--out=run"])
    assert code == 2 and "plan: actions and states in the file" in capsys.readouterr().err
    assert diffuser.main(["--env=halfcheetah-medium", *TINY, "--patch=4", "--out=other"]) == 2
    assert "[11, 3] observations and actions" in capsys.readouterr().err


def test_temperature_scales_all_of_the_noise(log, capsys):
    run = diffuser.parse([f"--env={ENV}", *TINY, "--out=run"])
    cold = diffuser.parse([f"--env={ENV}", *TINY, "--out=run", "--temperature=0"])
    models = diffuser.train(run)
    act = [
        diffuser.Planner(*models, x).act(np.zeros((1, 11)), [np.random.default_rng(seed)])
        for x, seed in ((cold, 0), (cold, 1), (run, 0), (run, 1))
    ]
    assert np.array_equal(act[0], act[1]) and not np.allclose(act[2], act[3], atol=1e-3)


@pytest.mark.parametrize(
    "flag",
    [
        "--scale=-1",
        "--scale=nan",
        "--scale=1e38",
        "--guides=-1",
        "--stop=21",
        "--nfe=2",
        "--horizon=0",
    ],
)
def test_a_bad_flag_is_refused_by_name(log, flag, capsys):
    assert diffuser.main([f"--env={ENV}", *TINY, flag]) == 2
    error = capsys.readouterr().err
    assert flag.split("=")[0] in error and "Traceback" not in error


def test_halfcheetah_has_its_own_horizon(monkeypatch):
    seen = []
    monkeypatch.setattr(diffuser, "diffuser", lambda run: seen.append(run.config))
    short = ["--env=HalfCheetah-v5", "--data=minari:mujoco/halfcheetah/medium-v0"]
    assert diffuser.main(["--env=halfcheetah-medium-replay"]) == 0
    assert diffuser.main([f"--env={ENV}", "--data=halfcheetah.hdf5"]) == 0
    assert diffuser.main([short[0], "--data=log.hdf5"]) == diffuser.main(short[1:]) == 0
    own = ["--horizon=2", "--channels=8", "--patch=2"]
    assert diffuser.main(["--env=halfcheetah-medium", *own]) == 0
    found = [(config.horizon, config.patch) for config in seen]
    assert found == [(4, 1), (32, 4), (4, 1), (4, 1), (2, 2)]
