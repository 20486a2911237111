"""Tests of Diffuser against closed forms for Gaussian data: python -m pytest -q."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ractd
from reproduce import pinned
from reproduce.planners import diffuser

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"
MEAN = 0.3
SD = 0.4
SLOPE = 0.7
TINY = ["--data=log.hdf5", "--horizon=8", "--episodes=2", "--candidates=2", "--guides=1"]
TINY += ["--stop=15", "--denoiser-steps=6", "--denoiser-batch=8", "--value-steps=6"]
TINY += ["--value-batch=8"]


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
    x0 = 0.4
    t = 2.0
    u = 0.7
    n = 400_000
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
    rows = np.arange(46.0)
    ends = np.cumsum([12, 4, 30]) - 1
    fallen = np.isin(rows, ends[:2])
    columns = [np.stack([rows, -rows], 1), rows[:, None], np.ones(46), fallen, rows == ends[2]]
    data = ractd.Dataset("d", "file", columns)
    batches = diffuser.JointBatches(data, 8, 0.9)
    state, plan, target = batches.windows(2000)
    raw = ractd.decode(plan[..., :1], batches.normalizer["action"]).squeeze(2).round().numpy()
    states = ractd.decode(plan[..., 1:], batches.normalizer["obs"]).round().numpy()
    assert np.array_equal(raw, raw[:, :1] + np.arange(8))
    assert np.array_equal(states[..., 0], raw)
    assert np.array_equal(states[..., 1], -raw)
    assert torch.equal(state, plan[:, 0, 1:])
    assert {*raw[:, 0]} == {*range(5), *range(16, 39)}

    rewards = np.where(fallen, -99.0, 1.0)
    go = ractd.returns_to_go(rewards, data.begins, data.ends, data.terminated, 0.9)
    found = ractd.decode(target[:, None], batches.normalizer["return"]).squeeze(1).numpy()
    assert found == pytest.approx(go[raw[:, 0].astype(int)], abs=1e-4)
    assert np.array_equal(data.rewards, np.ones(46))  # as they were


def test_the_first_state_is_pinned_and_the_value_hears_plan_state_and_level():
    torch.manual_seed(0)
    net = diffuser.make_network(diffuser.Settings(horizon=8), [4, 2])
    V = functools.partial(diffuser.value_of, net)
    x = 80 * torch.randn(5, 8, 6)
    state = torch.rand(5, 4)
    assert torch.equal(pinned.denoise(net, x, 80.0, state)[:, 0, 2:], state)
    base = V(x, 3.0, state)
    assert base.shape == (5,)
    moved = x.clone()
    moved[:, 0, 2:] = 9  # the value sees the clean state in its place
    assert torch.equal(V(moved, 3.0, state), base)
    for other in (V(x + 1, 3.0, state), V(x, 2.0, state), V(x, 3.0, state + 1)):
        assert not torch.allclose(other, base, atol=1e-6)


class ConstantPlans:
    """Batches whose plans, of one action and two states, are all 0.3 and worth 0."""

    dims = [2, 1]
    obs = torch.zeros(1)

    @staticmethod
    def windows(batch):
        return torch.zeros(batch, 2), torch.full((batch, 8, 3), 0.3), torch.zeros(batch)


def test_the_value_is_trained_at_every_level_where_it_is_asked(monkeypatch):
    seen = []

    def value_of(net, x, t, state):
        seen.append((x, t))
        return x.mean((1, 2))

    torch.manual_seed(0)
    settings = diffuser.Settings(horizon=8, value_batch=2000)
    _, loss_fn = diffuser.value_stage(settings, ConstantPlans)
    monkeypatch.setattr(diffuser, "value_of", value_of)
    loss_fn(None, None)
    ((x, t),) = seen
    levels = diffuser.cosine_sigmas().float()
    assert torch.isin(t, levels).all()
    spread = torch.stack([(x[t == level] - 0.3).std() / level for level in levels])
    assert spread.tolist() == pytest.approx([1] * 21, abs=0.1)  # NaN where there is none


def test_an_error_in_the_first_action_weighs_ten_times_as_much(monkeypatch):
    settings = diffuser.Settings(horizon=8, denoiser_batch=4)
    _, loss_fn = diffuser.denoiser_stage(settings, ConstantPlans)
    monkeypatch.setattr(ractd, "lognormal_levels", lambda n, device: torch.full((n,), 0.5))
    losses = []
    for column in range(3):
        wrong = torch.full((4, 8, 3), 0.3)
        wrong[:, 0, column] += 1
        monkeypatch.setattr(diffuser, "denoise", lambda *_, wrong=wrong: wrong)
        losses.append(loss_fn(None, None)[0].item())
    weight = 8.0 / 24  # of EDM at 0.5, over 24 elements
    assert losses == pytest.approx([10 * weight, weight, weight])


def test_end_to_end_trains_once_and_writes_every_number(log, capsys):
    command = [f"--env={ENV}", *TINY]
    assert diffuser.main(command) == 0
    described = capsys.readouterr().out
    folder = Path(f"runs/{ENV}-diffuser")
    (path,) = folder.glob("score_diffuser_N2_scale0.5_guides1_stop15_*_seeds0-1.json")
    result = json.loads(path.read_text())
    assert len(result["returns"]) == 2
    assert (result["calls"], result["gradients"], result["candidates"]) == (20, 5, 2)
    assert result["train_s"] > 0

    # nothing again, but what is of others or otherwise
    assert diffuser.main(command) == 0
    text = capsys.readouterr().out
    assert "steps/s" not in text
    assert "evaluation" not in text
    assert f"score from {path}" in text
    path.write_text(json.dumps(result | {"weights": ["others"], "returns": []}))
    assert diffuser.main(command) == 0
    assert json.loads(path.read_text())["returns"] == result["returns"]
    assert diffuser.main([*command, "--gamma=0.9"]) == 2
    assert "gamma: 0.997 in the file, 0.9 asked" in capsys.readouterr().err

    # the data are told as they are, without TERMINATION
    assert ractd.main(["data", f"--env={ENV}", "--data=log.hdf5"]) == 0
    mean = capsys.readouterr().out.split("mean")[1].split(",")[0]
    assert described.split("mean")[1].split(",")[0] == mean


@pytest.fixture
def planner():
    """Untrained networks over 4 observations and 2 actions, 2 candidates."""
    torch.manual_seed(0)
    settings = diffuser.Settings(horizon=8, candidates=2, guides=1, stop=15)
    action_table = torch.tensor([[0.5, -0.5], [0.5, 0.25]])
    tables = {"obs": torch.ones(2, 4), "action": action_table}
    net = diffuser.make_network(settings, [4, 2])
    model = {"dims": [4, 2], "normalizer": tables, "ema": net.state_dict()}
    return diffuser.Planner(model, model, settings)


def test_temperature_scales_all_of_the_noise(planner):
    def act(temperature, seed):
        planner.settings = dataclasses.replace(planner.settings, temperature=temperature)
        return planner.act(np.zeros((1, 4)), [np.random.default_rng(seed)])

    assert np.array_equal(act(0.0, 0), act(0.0, 1))
    assert not np.allclose(act(1.0, 0), act(1.0, 1), atol=1e-3)


def test_the_first_action_of_the_best_candidate_acts_in_raw_units(planner, monkeypatch):
    plans = torch.zeros(4, 8, 6)  # two of each state
    plans[:, 0, 0] = torch.tensor([0.1, 0.2, 0.6, 0.4])
    plans[:, 0, 1] = 7.0  # outside the data
    monkeypatch.setattr(diffuser, "guided_sample", lambda *_: plans)
    monkeypatch.setattr(diffuser, "value_of", lambda net, x, t, state: x[:, 0, 0])
    found = planner.act(np.zeros((2, 4)), [np.random.default_rng(i) for i in range(2)])
    expected = np.array([[[0.6, -0.25]], [[0.8, -0.25]]])
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("flag", ["--scale=nan", "--stop=21", "--horizon=0", "--horizon=12"])
def test_a_bad_flag_is_refused_by_name(log, flag, capsys):
    assert diffuser.main([f"--env={ENV}", *TINY, flag]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_data_without_one_whole_window_are_refused(log, capsys):
    assert diffuser.main([f"--env={ENV}", *TINY, "--horizon=1024"]) == 2
    assert "--horizon 1024" in capsys.readouterr().err


def test_halfcheetah_has_its_own_horizon(log):
    for env, own, found in (
        ("halfcheetah-medium-replay", [], (4, 1)),
        (ENV, [], (32, 4)),
        ("HalfCheetah-v5", ["--data=log.hdf5"], (4, 1)),
        ("halfcheetah-medium", ["--horizon=2", "--patch=2"], (2, 2)),
    ):
        settings = diffuser.parse([f"--env={env}", *own]).config
        assert (settings.horizon, settings.patch) == found
