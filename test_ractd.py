"""Tests of ractd.py in its own order, offline: python -m pytest -q test_ractd.py."""

import copy
import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from minari.data_collector import EpisodeBuffer
from torch import nn

import ractd
from ractd import Config, UNet1d, denoise, expand, karras_sigmas, student_jump

torch.set_num_threads(1)  # more would round differently
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
ENV = "hopper-medium-replay"
SCRIPT = Path(ractd.__file__).resolve()
CLOSED_PORT = "http://127.0.0.1:9/"
STEPS = 12
STAGES = ("reward", "teacher", "student")
REWARD = ["--reward-batch=8", f"--reward-steps={STEPS}"]
TEACHER = [*REWARD, "--horizon=8", "--teacher-batch=8", f"--teacher-steps={STEPS}"]
STUDENT = ["--grid-points=6", "--student-batch=8", f"--student-steps={STEPS}", "--episodes=3"]
FLAGS = {"reward": REWARD, "teacher": TEACHER, "distill": [*TEACHER, *STUDENT]}


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no network is used."""
    for name in ("HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ractd, "D4RL_URL", CLOSED_PORT)
    monkeypatch.chdir(tmp_path)


def logged(lengths=(40, 8, 5, 60, 20), o=11, a=3):
    """Random rows in D4RL's layout: falls and time limits in turn, the last episode unfinished."""
    rng = np.random.default_rng(0)
    n = sum(lengths)
    ends = np.cumsum(lengths)[:-1] - 1
    return {
        "observations": np.float32(rng.normal(size=(n, o))),
        "actions": np.float32(rng.uniform(-0.9, 0.8, (n, a))),
        "rewards": np.float32(rng.normal(1, 1, n)),
        "terminals": np.isin(range(n), ends[::2]),
        "timeouts": np.isin(range(n), ends[1::2]),
    }


def write(path, rows):
    """An HDF5 file of these arrays -> its path."""
    with h5py.File(path, "w") as f:
        for key, x in rows.items():
            f[key] = x
    return str(path)


def cli(command, *args, env=ENV):
    """main() in this process -> exit code; argparse leaves through SystemExit."""
    try:
        return ractd.main([command, f"--env={env}", *args])
    except SystemExit as error:
        return error.code


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err, err
    assert len(re.findall("^ractd.py", err, re.MULTILINE)) == 1, err
    assert not [word for word in words if word not in err], err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """End to end at tiny size in a process of its own -> run folder, data file, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "log.hdf5", logged())
    command = [sys.executable, SCRIPT, "distill", f"--env={ENV}", f"--data={data}", "--out=run"]
    command += FLAGS["distill"]
    done = subprocess.run(command, text=True, capture_output=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(out=folder / "run", data=data, text=done.stdout)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run folder, and a function that gives a command the same flags."""
    out = shutil.copytree(trained.out, tmp_path / "run")

    def give(command, *more, data=trained.data, out=out):
        return cli(command, f"--data={data}", f"--out={out}", *FLAGS[command], *more)

    return out, give


def same_weights(one, two):
    """Whether two checkpoints hold the same networks, averages and steps."""
    one = torch.load(one, weights_only=True)
    two = torch.load(two, weights_only=True)
    names = [(key, name) for key in ("net", "ema") for name in one[key]]
    same = all(torch.equal(one[key][name], two[key][name]) for key, name in names)
    return same and one["step"] == two["step"]


def metrics(out):
    """Of the only score file in a folder."""
    (path,) = Path(out).glob("score_*.json")
    return json.loads(path.read_text())


def rewrite(path, **changes):
    """Change entries of a checkpoint; None takes one away."""
    saved = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in saved.items() if value is not None}, path)


def network(seed=0, student=False):
    """A small U-Net for plans (B, 8, 2) and states (B, 3) in which no weight is zero."""
    torch.manual_seed(seed)
    net = UNet1d(2, 3, channels=(8, 16), patch=2, student=student)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def frozen(net):
    return net.eval().requires_grad_(False)


class World:
    """Episodes of 3 + seed steps, the last a fall or a time limit; rewards 2, 4, 8, ..."""

    action_space = Box(-99, 99, (1,))

    def __init__(self, log):
        self.log = log

    def reset(self, seed):
        self.seed = seed
        self.count = 0
        return np.array([seed, 0.0]), {}

    def step(self, action):
        self.log.append((self.seed, *action))
        self.count += 1
        observation = np.array([self.seed, self.count])
        ended = self.count == 3 + self.seed
        odd = self.seed % 2 == 1
        return observation, 2.0**self.count, ended and not odd, ended and odd, {}


# ---- network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize(
    "channels, kernel, blocks, patch",
    [((8,), 5, 2, 1), ((8, 12), 1, 1, 2), ((8, 12, 16), 3, 2, 4)],
)
def test_every_size_of_the_unet_keeps_the_shape_and_hears_the_plan_the_state_and_the_levels(
    channels, kernel, blocks, patch, student
):
    torch.manual_seed(0)
    net = UNet1d(2, 3, channels, kernel, blocks, patch, student)
    x = torch.randn(5, 16, 2)
    state = torch.randn(5, 3)
    levels = list(torch.rand(1 + student, 5) + 0.1)
    inputs = [value.requires_grad_() for value in (x, state, *levels)]
    t, *k = levels
    y = net(x, t, state, *k)
    assert y.shape == x.shape
    y[0].square().sum().backward()
    for value in inputs:
        assert value.grad[0].abs().max() > 0
        assert not value.grad[1:].any()
    assert all(p.grad is not None for p in net.parameters())


def test_a_level_is_a_float_or_one_for_each_sample_and_the_convolution_is_one():
    net = network(0, student=True)
    x = torch.randn(5, 8, 2)
    state = torch.randn(5, 3)
    t = torch.full((5,), 3.0)
    k = torch.full((5,), 0.5)
    assert len(net.embed(3.0, 0.5)) == 1 and len(net.embed(t, k)) == 5
    assert torch.allclose(net(x, 3.0, state, 0.5), net(x, t, state, k), atol=1e-5)
    assert torch.allclose(net(x, t, state, 0.5), net(x, t, state, k), atol=1e-5)
    conv = ractd.TemporalConv(2, 4, 5)
    weight = conv.weight.view(4, 5, 2).transpose(1, 2)
    y = nn.functional.conv1d(x.transpose(1, 2), weight, conv.bias, padding=2)
    y = nn.functional.silu(nn.functional.layer_norm(y.transpose(1, 2), (4,)))
    assert torch.allclose(conv(x), y, atol=1e-5)


def test_a_student_with_the_teachers_weights_is_the_teacher_for_every_k():
    teacher = network(1)
    student = network(2, student=True)
    ractd.warm_start(student, teacher)
    x = torch.randn(6, 8, 2)
    state = torch.randn(6, 3)
    t = ractd.lognormal_levels(6)
    expected = denoise(teacher, x, t, state)
    for k in (t, t / 2, torch.full((6,), 0.02), 0.02):
        assert torch.allclose(denoise(student, x, t, state, k), expected, rtol=1e-5, atol=1e-5)


# ---- teacher: Gaussian data x0 ~ N(0, SD^2) have everything in closed form -----------------------

SD = 0.3


def exact(x, t, sd=SD):
    return x * sd**2 / (expand(t) ** 2 + sd**2)


def exact_jump(x, t, k, sd=SD):
    return x * ((expand(k) ** 2 + sd**2) / (expand(t) ** 2 + sd**2)) ** 0.5


@pytest.mark.parametrize("n", [3, 20, 80])
def test_the_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root(n):
    grid = karras_sigmas(n)
    assert grid.dtype == torch.float64 and grid.shape == (n,)
    assert (grid.diff() < 0).all()
    assert grid[0].item() == 80 and grid[-1].item() == 0.02  # an Euler step, not half of one
    assert torch.allclose(grid.pow(1 / 7).diff(n=2), torch.zeros(n - 2, dtype=grid.dtype))


def test_the_teachers_noise_is_the_truncated_lognormal():
    torch.manual_seed(0)
    t = ractd.lognormal_levels(100_000)
    assert t.min() >= 0.02 and t.max() <= 80
    assert (t == 0.02).float().mean() < 1e-3
    normal = NormalDist(-1.2, 1.2)
    low = normal.cdf(math.log(0.02))
    high = normal.cdf(math.log(80))
    for q in (0.01, 0.25, 0.5, 0.9, 0.99):
        quantile = math.exp(normal.inv_cdf(low + q * (high - low)))
        assert (t < quantile).float().mean().item() == pytest.approx(q, abs=0.006)


@pytest.mark.parametrize("level", [0.02, 0.5, 3.0, 80.0])
def test_the_networks_input_has_unit_variance_and_the_denoiser_is_the_identity_at_smin(level):
    torch.manual_seed(0)
    seen = []

    def net(x, t, state, k):
        seen.append(x)
        return 7 * torch.ones_like(x)

    x = 0.5 * torch.randn(20_000, 4, 1) + level * torch.randn(20_000, 4, 1)
    c_skip = 0.25 / ((level - 0.02) ** 2 + 0.25)
    c_out = 0.5 * (level - 0.02) / math.sqrt(level**2 + 0.25)
    for t in (level, torch.full((20_000,), level)):
        y = denoise(net, x, t, None)
        assert torch.allclose(y, c_skip * x + 7 * c_out, atol=1e-5)
        assert torch.equal(y, x) == (level == 0.02)
        assert seen[-1].std().item() == pytest.approx(1, abs=0.02)


def test_heun_is_of_order_two_and_euler_of_order_one_away_from_the_smallest_level():
    errors = []
    for n in (80, 160):
        heun = euler = x = torch.ones(1, 1, 1, dtype=torch.float64)
        grid = karras_sigmas(n, smin=0.1).tolist()
        for t, u in pairwise(grid):
            heun = ractd.heun_step(exact, heun, t, u)
            euler = euler + (u - t) * (euler - exact(euler, t)) / t
        truth = exact_jump(x, grid[0], grid[-1])
        errors.append([(y - truth).abs().item() for y in (heun, euler)])
    heun, euler = (a / b for a, b in zip(*errors, strict=True))
    assert 3.6 < heun < 4.4 and 1.8 < euler < 2.2


def test_the_last_step_is_eulers_so_that_samples_have_the_variance_of_the_data():
    """Where D(x, smin) = x the second slope is 0: to average over it halves the step."""
    sd = 0.05
    calls = []

    def denoiser(x, t):
        calls.append(t)
        return exact(x, t, sd) if t > 0.02 else x

    x = torch.full((1, 1, 1), math.sqrt(80**2 + sd**2), dtype=torch.float64)  # one deviation
    y = ractd.heun_sample(denoiser, x, karras_sigmas(20))
    assert len(calls) == 37 and 0.02 not in calls
    naive = x
    for t, u in pairwise(karras_sigmas(20).tolist()):
        slope = (naive - denoiser(naive, t)) / t
        euler = naive + (u - t) * slope
        naive = naive + (u - t) * (slope + (euler - denoiser(euler, u)) / u) / 2
    variance = sd**2 + 0.02**2
    assert y.item() ** 2 == pytest.approx(variance, rel=0.02)
    assert naive.item() ** 2 > 1.1 * variance


def test_in_a_batch_only_the_steps_down_to_smin_are_eulers():
    t = torch.tensor([0.5, 0.04, 3.0])
    u = torch.tensor([0.3, 0.02, 0.02])
    x = torch.ones(3, 4, 1)
    batch = ractd.heun_step(exact, x, t, u)
    euler = x + expand((u - t) / t) * (x - exact(x, t))
    assert torch.allclose(batch[1:], euler[1:])
    assert not torch.allclose(batch[0], euler[0], rtol=0.01)
    levels = zip(t.tolist(), u.tolist(), strict=True)
    alone = [ractd.heun_step(exact, x[:1], *pair) for pair in levels]
    assert torch.allclose(batch, torch.cat(alone))
    assert torch.allclose(ractd.heun_step(exact, x, t, u, smin=0.3)[0], euler[0])


def test_squared_error_asks_for_the_mean_and_pseudo_huber_for_the_median():
    data = torch.tensor([1.0] * 3 + [-1.0] * 7).view(10, 1, 1)
    grid = torch.linspace(-1.5, 1.5, 301)
    for distance, best in ((ractd.squared, -0.4), (ractd.pseudo_huber, -1.0)):
        total = torch.stack([distance(data, torch.full_like(data, v)).mean() for v in grid])
        assert grid[total.argmin()].item() == pytest.approx(best, abs=0.011)
    a = torch.full((1, 2, 3), 2.0)
    c = 0.00054 * math.sqrt(6)
    assert ractd.pseudo_huber(a, 0 * a).item() == pytest.approx(math.sqrt(4 * 6 + c**2) - c)


def test_the_edm_loss_is_least_at_the_exact_denoiser_and_dsms_is_the_same_of_a_prediction():
    torch.manual_seed(0)
    x0 = SD * torch.randn(50_000, 4, 1)
    noise = torch.randn(50_000, 4, 1)
    t = ractd.lognormal_levels(50_000)
    denoisers = (
        exact,
        lambda x, t: 0.95 * exact(x, t),
        lambda x, t: 1.05 * exact(x, t),
        lambda x, t: exact(x, t) + 0.03,
        lambda x, t: exact(x, 1.1 * t),
    )
    best, *others = (ractd.edm_loss(denoiser, x0, t, noise) for denoiser in denoisers)
    assert best < min(others)
    error = SD**2 * t**2 / (SD**2 + t**2)  # of the exact denoiser, weighted by 1 / c_out^2
    expected = (error * (t**2 + 0.25) / (0.5 * t) ** 2).mean()
    assert best.item() == pytest.approx(expected.item(), rel=0.02)
    assert ractd.dsm_loss(exact(x0 + expand(t) * noise, t), x0, t) == best


# ---- reward model --------------------------------------------------------------------------------


def test_the_reward_model_hears_the_state_and_its_first_actions_and_v_the_state_alone():
    R = ractd.RewardModel(3, 2, actions=2, networks=3)
    state = torch.randn(5, 3, requires_grad=True)
    plan = torch.randn(5, 8, 2, requires_grad=True)
    assert R(state, plan).shape == R.V(state).shape == (5,)
    each = R.each(state, plan)
    assert each.shape == (3, 5) and each.std(0).min() > 0
    assert torch.allclose(each.sum(0) / 3, R(state, plan))
    R(state, plan).sum().backward()
    heard = plan.grad.abs().amax((0, 2)) > 0
    assert heard.tolist() == [True] * 2 + [False] * 6
    assert state.grad.abs().min() > 0


def test_the_reward_loss_is_minus_the_mean_return_and_has_no_slope_outside_the_box():
    plan = torch.tensor([[[0.5, -2.0]], [[0.1, 0.2]]], requires_grad=True)
    loss = ractd.reward_loss(lambda s, x: 5 * x.sum((1, 2)), None, plan)
    loss.backward()
    assert loss == 0.5
    assert plan.grad.tolist() == [[[-2.5, 0.0]], [[-2.5, -2.5]]]


# ---- student -------------------------------------------------------------------------------------


def test_a_jump_to_where_it_starts_is_the_identity_and_a_jump_to_zero_is_the_network():
    net = network(0, student=True)
    x = torch.randn(5, 8, 2)
    state = torch.randn(5, 3)
    t = ractd.lognormal_levels(5)
    assert torch.equal(student_jump(net, x, t, t, state), x)
    zero = torch.full((5,), 1e-30)
    g = denoise(net, x, t, state, zero)
    assert torch.allclose(student_jump(net, x, t, zero, state), g)
    assert not torch.allclose(g, denoise(net, x, t, state, t))
    k = t / 4
    quarter = 0.25 * x + 0.75 * denoise(net, x, t, state, k)
    assert torch.allclose(student_jump(net, x, t, k, state), quarter, atol=1e-6)


def test_jumps_are_drawn_with_the_documented_frequencies():
    torch.manual_seed(0)
    n = 5
    count = 40_000
    grid = karras_sigmas(n)
    jumps = ractd.draw_jumps(count, grid)
    i_t, i_u, i_k = ((v[:, None] == grid).float().argmax(1) for v in jumps)
    assert torch.equal(i_u, i_t + 1) and (i_k >= i_u).all()
    table = torch.zeros(n, n).index_put_((i_t, i_k), torch.tensor(1 / count), accumulate=True)
    expected = torch.zeros(n, n)
    for t in range(n - 1):
        expected[t, t + 1 :] = 1 / (n - 1) / (n - 1 - t)
    assert (table - expected).abs().max() < 0.01
    assert torch.equal(table > 0, expected > 0)


def test_the_ctm_loss_of_the_exact_student_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)
    x0 = SD * torch.randn(5000, 4, 1).double()
    noise = torch.randn(5000, 4, 1).double()

    def losses(n, factor=1.0, shift=0.0):
        t, u, k = ractd.draw_jumps(5000, karras_sigmas(n))
        x_t = x0 + expand(t) * noise
        jump = lambda x, t, k: factor * exact_jump(x, t, k) + shift
        loss = ractd.ctm_loss(jump, exact_jump, exact, x_t, t, u, k, distance=ractd.squared)
        error = ractd.heun_step(exact, x_t, t, u) - exact_jump(x_t, t, u)
        error = exact_jump(error, u, torch.full_like(u, 0.02))
        return loss.item(), error.square().mean().item()

    coarse, coarse_error = losses(20)
    fine, fine_error = losses(40)
    assert coarse == pytest.approx(coarse_error) and fine == pytest.approx(fine_error)
    assert 0 < fine < coarse / 8
    assert fine < losses(40, 1.1)[0] < losses(40, 1.3)[0]
    assert fine < losses(40, 0.9)[0] and fine < losses(40, shift=0.1)[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target(share):
    """k = share u; at k = u the student is compared with the teacher's step itself."""
    net = frozen(network(2, student=True))
    state = torch.randn(4, 3)
    x_t = torch.randn(4, 8, 2)
    t = torch.tensor([2.0, 1.0, 0.5, 9.0])
    u = torch.tensor([1.0, 0.6, 0.3, 8.0])
    k = share * u
    smin = torch.full((4,), 0.02)
    x_hat = torch.randn(4, 8, 2, requires_grad=True)
    factor = torch.tensor(0.5, requires_grad=True)
    asked = []
    graded = []

    def jump(*args):
        asked.append(args)
        return x_hat

    def frozen_jump(x, t, k):
        graded.append(torch.is_grad_enabled())
        return student_jump(net, x, t, k, state)

    loss = ractd.ctm_loss(jump, frozen_jump, lambda x, t: factor * x, x_t, t, u, k)
    loss.backward()
    assert asked == [(x_t, t, k)]
    assert factor.grad is None and sorted(graded) == [False, False, True]

    target = ractd.heun_step(lambda x, t: 0.5 * x, x_t, t, u)
    if share < 1:
        target = student_jump(net, target, u, k, state)
    target = student_jump(net, target, k, smin, state)
    copy = x_hat.detach().requires_grad_()
    estimate = student_jump(net, copy, k, smin, state)
    expected = ractd.pseudo_huber(estimate, target).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(x_hat.grad, copy.grad, rtol=1e-4, atol=1e-7)
    assert x_hat.grad.flatten(1).norm(dim=1).min() > 0


def distil(student=None, teacher=1, distance=ractd.pseudo_huber, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, networks)."""
    nets = SimpleNamespace(student=student or network(0, student=True), teacher=network(teacher))
    nets.target = frozen(network(2, student=True))
    torch.manual_seed(3)
    nets.R = frozen(ractd.RewardModel(3, 2, actions=2))
    nets.state = torch.randn(16, 3)
    x0 = torch.rand(16, 8, 2) - 0.5
    config = Config(**{"grid_points": 10, "reward_weight": 1.0, **config})
    R = nets.R if config.reward_weight else None
    three = (nets.student, nets.target, nets.teacher)
    loss, info = ractd.distillation_loss(*three, R, nets.state, x0, config, distance)
    return loss, info, nets


WEIGHTS = {"ctm_weight": 1.5, "dsm_weight": 3.0, "reward_weight": 2.0}
PAPER = {"denoising": "paper", "trajectories": 0}


@pytest.mark.parametrize("alone", WEIGHTS)
@pytest.mark.parametrize("options", [{}, PAPER, {"reward_input": "dsm"}])
def test_each_loss_alone_moves_every_student_parameter_and_nothing_else(alone, options):
    weights = dict.fromkeys(WEIGHTS, 0.0) | {"reward_weight": 1e-9} | {alone: 1.0}
    loss, _, nets = distil(**weights, **options)
    loss.backward()
    student = nets.student.named_parameters()
    assert not [name for name, p in student if p.grad is None or not p.grad.abs().max() > 0]
    for net in (nets.teacher, nets.target, nets.R):  # the teacher is not even frozen here
        assert all(p.grad is None for p in net.parameters())


def test_the_total_is_eq_9_and_no_loss_depends_on_anothers_weight_but_all_matter():
    _, info, _ = distil(**WEIGHTS)
    assert info["ctm"] != distil(teacher=5)[1]["ctm"]
    assert info["dsm"] != distil(denoising="paper")[1]["dsm"]
    assert info["R"] != distil(reward_input="dsm")[1]["R"]
    for off in (*WEIGHTS, None):
        weights = WEIGHTS | ({off: 0.0} if off else {})
        loss, others, _ = distil(**weights)
        if off == "reward_weight":  # CTD
            assert others.keys() == {"ctm", "path", "dsm"}
        total = weights["ctm_weight"] * (others["ctm"] + others["path"])
        total = total + weights["dsm_weight"] * others["dsm"]
        total = total - weights["reward_weight"] * others.get("R", 0)
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        for name, value in others.items():
            assert value.item() == pytest.approx(info[name].item(), rel=1e-4)


def test_the_distance_of_eq_5_is_that_of_its_trajectories_and_of_no_other_loss():
    _, usual, _ = distil()
    _, other, _ = distil(distance=lambda a, b: 3 + 0 * ractd.squared(a, b))
    assert other["ctm"] == other["path"] == 3 and usual["ctm"] != 3
    assert other["dsm"] == usual["dsm"] and other["R"] == usual["R"]


@pytest.mark.parametrize("denoising", ["mean", "paper"])
@pytest.mark.parametrize("reward_input", ["plan", "dsm"])
def test_dsm_compares_the_denoiser_or_the_jump_to_zero_and_the_reward_sees_what_it_is_told_to(
    denoising, reward_input, monkeypatch
):
    calls = []
    seen = {}

    def record(name):
        loss = getattr(ractd, name)
        monkeypatch.setattr(ractd, name, lambda *args: seen.update({name: args}) or loss(*args))

    original = ractd.denoise
    monkeypatch.setattr(ractd, "denoise", lambda *args: calls.append(args) or original(*args))
    record("dsm_loss")
    record("reward_loss")
    _, _, nets = distil(denoising=denoising, reward_input=reward_input, trajectories=0)
    _, dsm, *one_call = [args for args in calls if args[0] is nets.student]
    prediction, _, level, *distance = seen["dsm_loss"]
    plan = seen["reward_loss"][2]

    net, x_t, t, state, k = dsm
    assert torch.equal(level, t) and torch.equal(state, nets.state)
    if denoising == "paper":
        assert torch.equal(k, torch.full_like(t, 0.02)) and distance == [ractd.pseudo_huber]
        expected = student_jump(net, x_t, t, k, state)
    else:
        assert torch.equal(k, t)
        expected = original(net, x_t, t, state, t)
    assert torch.allclose(prediction, expected)

    if reward_input == "dsm":
        assert plan is prediction and not one_call
    else:
        ((_, x_T, top, _, zero),) = one_call
        assert top == 80 and zero == 0.02
        assert x_T.std().item() == pytest.approx(0.25 * 80, rel=0.2)  # where the policy acts
        assert torch.allclose(plan, student_jump(net, x_T, 80.0, 0.02, state))


def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54():
    for nfe, levels in ((1, [80.0]), (3, [80.0, 12.015, 0.885])):
        calls = []

        def jump(x, t, k, calls=calls):
            calls.append((x, t, k))
            return 0 * x

        x_T = torch.full((2, 4, 1), 5.0)
        x = ractd.student_sample(jump, x_T, karras_sigmas(80), nfe, torch.ones_like)
        assert len(calls) == nfe and x.shape == (2, 4, 1)
        for (x, t, k), level in zip(calls, levels, strict=True):
            assert t == pytest.approx(level, 1e-3) and k == pytest.approx(0.02)
            scale = math.sqrt(t**2 - 0.02**2) if level < 80 else 5.0
            assert x.flatten().tolist() == pytest.approx([scale] * 8)


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_follows_the_network_as_its_decay_says(decay):
    net = nn.Linear(2, 1)
    average = frozen(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    old = average.weight.clone()

    def loss(net, given):
        assert given is average
        return net(torch.ones(1, 2)).sum(), {"extra": torch.tensor(3.0)}

    info = ractd.train_step(net, average, optimizer, loss, decay)
    assert info["extra"] == 3 and info["grad"].item() == pytest.approx(math.sqrt(3))
    assert torch.allclose(average.weight, decay * old + (1 - decay) * net.weight)


# ---- beyond the paper ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_v_is_the_log_of_the_mean_exponential(scale):
    """Of R ~ N(1, 0.5^2): 1 + scale 0.5^2 / 2, nearly the mean for a small scale."""
    torch.manual_seed(0)
    R = 1 + 0.5 * torch.randn(400_000).double()
    best = 1 + scale * 0.5**2 / 2

    def slope(value):
        value = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        ractd.value_loss(R, value, scale).backward()
        return value.grad.item()

    assert abs(slope(best)) < 0.005
    assert slope(best - 0.1) < -0.05 and slope(best + 0.1) > 0.05
    # far off V still rises, and not faster for it
    assert slope(-1000.0) == pytest.approx(slope(-2000.0))
    assert -1e6 < slope(-1000.0) < 0


def test_gaussian_plans_weighted_by_a_linear_reward_are_shifted_and_as_wide_as_before():
    """N(0, SD^2) exp(scale r x) is N(scale r SD^2, SD^2), and Eq. 4 asks for its denoiser."""
    torch.manual_seed(0)
    x = SD * torch.randn(200_000, 1, 1)
    slope = 2.0
    scale = 1.5
    V = torch.tensor(scale * slope**2 * SD**2 / 2)
    weights = ractd.advantage_weight(slope * x.flatten(), V, scale)
    assert weights.mean().item() == pytest.approx(1, rel=0.01)
    drawn = x[torch.multinomial(weights, 200_000, replacement=True)]
    mean = scale * slope * SD**2
    assert drawn.mean().item() == pytest.approx(mean, abs=0.005)
    assert drawn.std().item() == pytest.approx(SD, rel=0.02)
    t = torch.full((200_000,), 0.4)
    noise = torch.randn_like(drawn)

    def loss(mean):
        return ractd.edm_loss(lambda x, t: mean + exact(x - mean, t), drawn, t, noise)

    assert loss(mean) < loss(mean + 0.05)
    assert loss(mean) < loss(mean - 0.05) < loss(0.0)
    capped = ractd.advantage_weight(torch.tensor(9.0), torch.tensor(0.0))
    assert capped.item() == pytest.approx(math.exp(5))


@pytest.mark.parametrize("reward_teacher", [True, False])
def test_a_reward_teacher_and_its_student_learn_from_windows_weighted_by_their_advantage(
    reward_teacher, monkeypatch
):
    torch.manual_seed(0)
    config = Config(horizon=8, reward_teacher=reward_teacher)
    batches = ractd.Batches(episodes(8), horizon=8)
    R = frozen(ractd.RewardModel(2, 2, actions=4, networks=2))
    seen = []
    windows = batches.windows
    monkeypatch.setattr(batches, "windows", lambda *args: seen.append(args[1]) or windows(*args))
    teacher, loss_fn = ractd.teacher_stage(config, batches, R)
    loss_fn(teacher, teacher)
    student, loss_fn = ractd.student_stage(config, batches, frozen(teacher), R)
    loss_fn(student, student)
    if not reward_teacher:
        assert seen == [None, None]
        return
    state, plan = batches.rows(torch.arange(len(batches.obs)), 4)
    weights = (40 * (R(state, plan) - R.V(state))).clamp(max=5).exp()
    assert weights.std() > 0.1 * weights.mean()
    for sums in seen:
        assert sums.dtype == torch.float64
        assert torch.allclose(sums, weights.double().cumsum(0), rtol=1e-4)


@pytest.mark.parametrize("n, small", [(4_000_000, 0.15), (4_000_000, 0.3), (2**24 + 999, 0.3)])
def test_windows_are_drawn_by_their_weights_also_from_millions_of_rows(n, small):
    """Where float32 does it wrongly: torch.multinomial draws the second half 0.29 of the time.

    Its weight is `small`, that of the first half 0.3; R says so, V is 0.
    """

    class R:
        actions = 1
        V = staticmethod(lambda state: torch.zeros(len(state)))

        def __call__(self, state, plan):
            return torch.where(state < n // 2, 0.3, small).log() / 40

    torch.manual_seed(0)
    batches = ractd.Batches.__new__(ractd.Batches)
    batches.obs = torch.zeros(1).expand(n)
    batches.horizon = 1
    batches.rows = lambda rows, actions: (rows, rows)
    sums = ractd.advantage_sums(batches, R())
    drawn, _ = batches.windows(200_000, sums)
    share = (drawn >= n // 2).double().mean().item()
    assert share == pytest.approx(small / (small + 0.3), abs=0.005)
    last = 0.9 * n  # evenly among those of the same weight, up to the last row
    assert (drawn > last).double().mean().item() == pytest.approx(share / 5, abs=0.005)


def test_the_trajectory_loss_of_the_exact_jump_is_heuns_error_and_else_the_distance():
    torch.manual_seed(0)
    x_T = 20 * torch.randn(2000, 4, 1).double()
    plan = exact_jump(x_T, 80.0, 0.02)
    coarse, fine = (ractd.trajectory_loss(plan, x_T, exact, n).item() for n in (7, 40))
    assert 0 < fine < coarse / 10 < 0.01  # sqrt(4) times that of an action
    shifted = (plan + 0.3).requires_grad_()
    loss = ractd.trajectory_loss(shifted, x_T, exact, 80, ractd.squared)
    assert loss.item() == pytest.approx(0.09, rel=0.02)
    loss.backward()
    slope = torch.full_like(plan, 0.6 / plan.numel())
    assert torch.allclose(shifted.grad, slope, rtol=0.1)


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_trajectories_start_where_the_policy_does_and_belong_to_the_ctm_loss(
    temperature, monkeypatch
):
    seen = []
    original = ractd.trajectory_loss

    def record(*args, **how):
        seen.append(args)
        return original(*args, **how)

    monkeypatch.setattr(ractd, "trajectory_loss", record)
    config = {"dsm_weight": 0.0, "reward_weight": 0.0, "ctm_weight": 2.0}
    loss, info, nets = distil(trajectories=12, temperature=temperature, **config)
    ((plan, x_T, _),) = seen
    state = nets.state[:12]
    assert len(plan) == 12 and x_T.std().item() == pytest.approx(80 * temperature, rel=0.2)
    assert torch.allclose(plan, student_jump(nets.student, x_T, 80.0, 0.02, state), atol=1e-5)
    denoiser = lambda x, t: denoise(nets.teacher, x, t, state)
    end = ractd.heun_sample(denoiser, x_T, karras_sigmas(7))
    expected = ractd.pseudo_huber(plan, end).mean()
    assert info["path"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(2 * (info["ctm"] + info["path"]).item(), rel=1e-5)
    assert "path" not in distil(trajectories=0)[1]


# ---- two modes: Figure 3 in miniature ------------------------------------------------------------

TOY = {"channels": (32,), "kernel": 1, "patch": 4}  # plans (B, 4, 1) and states (B, 1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """30 % of the plans lie near +0.6 and have return 1, 70 % near -0.6 with return -1.

    Equal modes could not tell a mean from a median or a collapse. -> teacher, reward teacher, R
    and a function that trains a student and samples from it.
    """
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    state = torch.zeros(128, 1)

    def draw(weights=None):
        mode = torch.where(torch.rand(2048) < 0.3, 1.0, -1.0)
        x0 = 0.6 * expand(mode) + 0.1 * torch.randn(2048, 4, 1)
        drawn = torch.arange(128)
        if weights:
            drawn = torch.multinomial(weights(x0), 128, replacement=True)
        return x0[drawn], mode[drawn]

    def train(net, loss_fn, steps, lr=1e-3, **how):
        torch.manual_seed(0)
        path.unlink(missing_ok=True)
        ractd.fit("toy", net, loss_fn, path, {}, steps, lr, **how)
        net.load_state_dict(torch.load(path)["ema"])
        return frozen(net)

    def reward_loss(net, average):
        x0, go = draw()
        reward = net(state, x0)
        value_loss = ractd.value_loss(reward.detach(), net.V(state), 4.0)
        return (reward - go).square().mean() + value_loss, {}

    def weights(x0):
        states = torch.zeros(len(x0), 1)
        return ractd.advantage_weight(R(states, x0), R.V(states), 4.0)

    def teacher(weights=None):
        def loss_fn(net, average):
            x0, _ = draw(weights)
            denoiser = lambda x, t: denoise(net, x, t, state)
            t = ractd.lognormal_levels(128)
            return ractd.edm_loss(denoiser, x0, t, torch.randn_like(x0)), {}

        return train(UNet1d(1, 1, **TOY), loss_fn, 400)

    def student(teacher, reward_model=None, weights=None, **config):
        config = Config(temperature=1.0, **config)
        net = UNet1d(1, 1, **TOY, student=True)
        ractd.warm_start(net, teacher)

        def loss_fn(net, average):
            x0, _ = draw(weights)
            return ractd.distillation_loss(net, average, teacher, reward_model, state, x0, config)

        net = train(net, loss_fn, 200, lr=2e-3, target_decay=0.9)
        jump = lambda x, t, k: student_jump(net, x, t, k, torch.zeros(len(x), 1))
        x_T = 80 * torch.randn(1000, 4, 1)
        return [ractd.student_sample(jump, x_T, karras_sigmas(20), calls) for calls in (1, 2)]

    R = train(ractd.RewardModel(1, 1, actions=4), reward_loss, 200)
    good = teacher(weights)
    return SimpleNamespace(R=R, plain=teacher(), good=good, weights=weights, student=student)


def modes(x):
    """Shares of plans in the good mode and between the two, mean and deviation."""
    mean = x.mean((1, 2))
    good = (mean > 0.4).float().mean().item()
    between = (mean.abs() < 0.4).float().mean().item()
    return good, between, x.mean().item(), x.std().item()


def of_teacher(net):
    denoiser = lambda x, t: denoise(net, x, t, torch.zeros(1000, 1))
    return ractd.heun_sample(denoiser, 80 * torch.randn(1000, 4, 1), karras_sigmas(20))


def test_a_teacher_and_ctd_keep_two_unequal_modes(toy):
    one_call, two_calls = toy.student(toy.plain)
    for x in (of_teacher(toy.plain), one_call, two_calls):
        good, between, _, _ = modes(x)
        assert 0.15 < good < 0.45 and between < 0.15, modes(x)


def test_a_reward_teacher_and_ractd_move_to_the_good_mode(toy):
    one_call, two_calls = toy.student(toy.good, toy.R, toy.weights)
    for x in (of_teacher(toy.good), one_call, two_calls):
        good, between, mean, deviation = modes(x)
        assert good > 0.95 and between < 0.05, modes(x)
        assert 0.5 < mean < 0.75 and deviation < 0.25  # where the data are


@pytest.mark.parametrize(
    "how",
    [
        {"reward_input": "plan", "reward_weight": 8.0},
        {"reward_input": "dsm", "reward_weight": 32.0, "trajectories": 0},
    ],
)
def test_eq_8_alone_chooses_the_good_mode_of_a_plain_teacher(toy, how):
    """R sees all four actions of these plans, and its slope ends at the box."""
    one_call, _ = toy.student(toy.plain, toy.R, **how)
    good, between, mean, _ = modes(one_call)
    assert good > 0.9 and between < 0.1, modes(one_call)
    assert 0.5 < mean < 1


# ---- data: windows, returns-to-go, normaliser ----------------------------------------------------


def episodes(horizon):
    """Random episodes, one of `horizon` rows, one of 1; observations and actions: row, episode."""
    rng = np.random.default_rng(horizon)
    lengths = np.array([horizon, 1, horizon + 1, 130, *rng.integers(1, 3 * horizon, 8)])
    n = lengths.sum()
    ends = lengths.cumsum() - 1
    at_end = np.isin(np.arange(n), ends)
    fell = at_end & (rng.random(n) < 0.5)
    rows = np.stack([np.arange(n), np.repeat(np.arange(12), lengths)], axis=1)
    return ractd.Dataset("d", "file", [rows, rows, rng.normal(size=n), fell, at_end & ~fell])


@pytest.mark.parametrize("horizon", [1, 4, 16])
def test_every_row_starts_a_window_with_the_last_action_repeated_to_the_episodes_end(horizon):
    torch.manual_seed(0)
    data = episodes(horizon)
    n = len(data.rewards)
    expected = np.zeros((n, horizon, 2), int)
    padded = 0
    for episode, (begin, end) in enumerate(zip(data.begins, data.ends, strict=True)):
        for row in range(begin, end + 1):
            expected[row, :, 0] = [min(row + i, end) for i in range(horizon)]
            expected[row, :, 1] = episode
            padded += row + horizon - 1 > end
    batches = ractd.Batches(data, horizon)
    assert batches.padded == padded
    tables = batches.normalizer

    def drawn(state, plan):  # rows, once their plans are compared
        rows = ractd.decode(state, tables["obs"])[:, 0].round().long().numpy()
        plan = ractd.decode(plan, tables["action"]).round().int().numpy()
        assert (plan == expected[rows, : plan.shape[1]]).all()
        return rows

    assert drawn(*batches.rows(torch.arange(n), horizon)).tolist() == list(range(n))
    assert set(drawn(*batches.windows(5000))) == set(range(n))
    state, plan, go = batches.transitions(5000, min(horizon, 3))
    rows = drawn(state, plan)
    assert set(rows) == set(range(n))
    truth = ractd.returns_to_go(data.rewards, data.begins, data.ends, data.terminated)[rows]
    assert np.allclose(ractd.decode(go[:, None], tables["return"])[:, 0], truth, atol=1e-3)


def test_returns_to_go_equal_brute_force():
    data = episodes(16)
    spans = list(zip(data.begins, data.ends, data.terminated, strict=True))
    rewards = data.rewards.astype(float)
    go = ractd.returns_to_go(data.rewards, data.begins, data.ends, data.terminated, 0.9)
    assert len({fell for _, _, fell in spans}) == 2
    for begin, end, fell in spans:
        tail = 0.0 if fell else rewards[begin : end + 1][-100:].mean() / (1 - 0.9)
        for i in range(begin, end + 1):
            value = sum(0.9 ** (j - i) * rewards[j] for j in range(i, end + 1))
            assert go[i] == pytest.approx(value + 0.9 ** (end + 1 - i) * tail)


def test_the_normaliser_maps_to_the_box_and_back_and_never_far_out_of_it():
    x = torch.tensor([[1, 5, -3e-9], [3, 5, 0], [2, 5, 7e-9]])
    table = ractd.fit_range(x)
    y = ractd.encode(x, table)
    assert y.amin(0).tolist() == pytest.approx([-1, 0, -1])
    assert y.amax(0).tolist() == pytest.approx([1, 0, 1])
    assert torch.allclose(ractd.decode(y, table), x, rtol=1e-5, atol=0)
    assert ractd.encode(1e6 * x, table).abs().max() == 3


def test_a_column_that_is_constant_at_its_own_magnitude_is_neither_heard_nor_driven():
    """A sensor at rest, whose values differ in the last float32 bit, may move later."""
    above = np.nextafter(np.float32(0.3), np.float32(1))
    x = torch.tensor([[0.002, 0.0, 0.3, -1e4], [0.002, 0.0, above, -1e4]])
    table = ractd.fit_range(x)
    for values in (x, x + 1):
        assert not ractd.encode(values, table).any()
    driven = ractd.decode(torch.tensor([[-1.0] * 4, [0.7] * 4]), table)
    assert torch.equal(driven, x[:1].expand(2, 4))


# ---- data: the simulator's box -------------------------------------------------------------------


class Room(gymnasium.Env):
    """Episodes without an end whose rewards are the sums of the actions."""

    def __init__(self, actions, observations):
        self.action_space = actions
        self.observation_space = observations

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


BOX = Box(-0.5, 0.5, (2,))
GOAL = Dict({"b": BOX, "a": Box(-1, 1, ())})
PARTS = Dict({"observation": Box(-1, 1, (2, 2)), "achieved_goal": BOX, "desired_goal": GOAL})


def room(name, actions=BOX, observations=BOX):
    """The id of a registered Room of five steps."""
    spaces = {"actions": actions, "observations": observations}
    gymnasium.register(name, Room, max_episode_steps=5, kwargs=spaces)
    return name


def load(data, env=ENV):
    """load_data of a file or Minari set -> (Batches, meta)."""
    run = SimpleNamespace(env=env, data=data, config=Config(horizon=8), device="cpu")
    return ractd.load_data(run)


def test_the_data_line_says_what_is_clipped_and_padded(tmp_path, capsys):
    rows = logged()
    batches, meta = load(write(tmp_path / "inside.hdf5", rows))
    assert "clipped" not in capsys.readouterr().out
    rows["actions"][:20, 1] = 1.5
    rows["actions"][-6, :] = -1e6
    batches, meta = load(write(tmp_path / "outside.hdf5", rows))
    text = capsys.readouterr().out
    assert "15.79% of the actions leave the simulator's box" in text  # 21 of 133
    assert "133 windows of 8 actions, 33 of them padded" in text  # 7 + 7 + 5 + 7 + 7
    assert meta["box"].tolist() == [[-1.0] * 3, [1.0] * 3]
    learnt = ractd.decode(batches.actions, batches.normalizer["action"])
    assert torch.allclose(learnt, torch.tensor(rows["actions"]).clamp(-1, 1), atol=1e-6)


def test_what_acts_stays_inside_the_box(trained):
    checkpoint = ractd.load_checkpoint(trained.out / "student.pt", "student")
    box = torch.tensor([[-0.1, -0.2, 0.0], [0.1, 0.0, 0.3]])
    observations = torch.randn(64, 11)
    noise = lambda x: torch.ones_like(x)
    free, bound = (
        ractd.Policy(x)(observations, noise) for x in (checkpoint, {**checkpoint, "box": box})
    )
    assert torch.equal(bound, free.clamp(*box)) and not torch.equal(bound, free)
    make_env = ractd.simulator(room("Box-v0"), {"source": "file", "longest": 5})
    for action in (-9.0, 0.25, 9.0):
        act = lambda observations, _, action=action: np.full((len(observations), 8, 2), action)
        result = ractd.evaluate(act, make_env, 2)
        assert result["returns"] == [10 * np.clip(action, -0.5, 0.5)] * 2


SPACES = {
    "actions are Discrete(3)": (Discrete(3), BOX),
    "actions are MultiDiscrete([3 2])": (MultiDiscrete([3, 2]), BOX),
    "actions are MultiBinary(2)": (MultiBinary(2), BOX),
    "observations are Discrete(2)": (BOX, Discrete(2)),
}


@pytest.mark.parametrize("sentence", SPACES)
def test_spaces_that_are_no_vectors_are_refused_before_training(sentence, tmp_path, capsys):
    data = write(tmp_path / "log.hdf5", logged(o=2, a=2))
    env = room("Other-v0", *SPACES[sentence])
    code = cli("distill", f"--data={data}", "--out=new", *FLAGS["distill"], env=env)
    refused(capsys, code, sentence, "no vector")
    assert not list(Path("new").iterdir())


def test_only_the_nine_names_mean_d4rls_tasks():
    data = {"source": "file", "longest": 5}
    assert len(ractd.ENVS) == 9
    for env, (gym_id, *_) in ractd.ENVS.items():
        assert ractd.simulator(env, data)().spec.id == gym_id
    for env in ("hopper-v5", "hopper-v3", "hopper-tall-v0"):
        made = ractd.simulator(room(env), data)()
        assert made.spec.id == env and isinstance(made.unwrapped, Room)
        assert math.isnan(ractd.normalized_score(env, 1.0))


# ---- data: Minari --------------------------------------------------------------------------------


def make_minari(name, rows, **how):
    """A Minari set of rows in D4RL's layout, by default of Hopper-v4."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    buffers = []
    for begin, end in pairwise([0, *(ends + 1), len(rows["rewards"])]):
        cut = {key: x[begin:end] for key, x in rows.items()}
        last = np.ones((1, cut["observations"].shape[1]), np.float32)
        buffers.append(
            EpisodeBuffer(
                observations=np.concatenate([cut["observations"], last]),
                actions=cut["actions"],
                rewards=cut["rewards"],
                terminations=cut["terminals"],
                truncations=cut["timeouts"],
            )
        )
    with warnings.catch_warnings(action="ignore"):
        return minari.create_dataset_from_buffers(name, buffers, **(how or {"env": "Hopper-v4"}))


def test_a_minari_dataset_is_the_same_data_and_acts_in_the_environment_that_it_recovers(
    tmp_path, monkeypatch, capsys
):
    rows = logged()
    one = ractd.load_dataset(ENV, write(tmp_path / "a.hdf5", rows))
    assert one.ends.tolist() == [39, 47, 52, 112, 132]
    assert one.terminated.tolist() == [True, False, True, False, False]  # unfinished: a time limit
    make_minari("test/rows-v0", rows)
    two = ractd.load_dataset(ENV, "minari:test/rows-v0")
    for key in ("observations", "actions", "rewards", "ends", "terminated"):
        assert np.array_equal(getattr(one, key), rows.get(key, getattr(one, key)))
        assert np.array_equal(getattr(one, key), getattr(two, key))
    assert ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]]) == 0
    distilled = metrics("runs/test-rows-v0")
    assert ractd.main(["evaluate", "--env=test/rows-v0", "--episodes=3"]) == 0
    assert metrics("runs/test-rows-v0")["returns"] == distilled["returns"]
    assert "test/rows-v0 on test/rows-v0 (minari, not D4RL's)" in capsys.readouterr().out
    refused(capsys, ractd.main(["distill", "--env=test/rows-v0"]), "unknown")


def test_acting_is_in_the_environment_and_scored_by_the_reference_that_a_minari_set_means():
    short = gymnasium.make("Hopper-v4", max_episode_steps=7)
    how = {"env": "Hopper-v4", "eval_env": short, "ref_min_score": 0.0, "ref_max_score": 4.0}
    make_minari("test/short-v0", logged(), **how)
    data = ractd.load_dataset("", "minari:test/short-v0").summary()
    assert ractd.simulator("test/short-v0", data)().spec.max_episode_steps == 7
    score = ractd.normalized_score("test/short-v0", np.array([0.0, 1.0, 4.0]), data)
    assert np.array_equal(score, [0, 25, 100])


def test_a_minari_set_that_names_no_environment_acts_in_that_of_the_command_line(capsys):
    spaces = gymnasium.make("Hopper-v4")
    how = {"observation_space": spaces.observation_space, "action_space": spaces.action_space}
    make_minari("test/rows-v0", logged(), **how)
    _, meta = load("minari:test/rows-v0", "hopper-medium")
    assert ractd.simulator("hopper-medium", meta["dataset"])().spec.id == "Hopper-v4"
    code = ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]])
    refused(capsys, code, "test/rows-v0 cannot be made")


def test_an_entry_point_that_is_no_environment_is_refused_before_it_is_called(monkeypatch, capsys):
    stored = make_minari("test/rows-v0", logged())
    path = Path(stored.storage.data_path) / "metadata.json"
    text = path.read_text()
    path.write_text(text.replace("gymnasium.envs.mujoco.hopper_v4:HopperEnv", "os:system"))
    assert path.read_text() != text
    called = []
    monkeypatch.setattr(os, "system", lambda *args, **how: called.append(args))
    code = cli("distill", "--data=minari:test/rows-v0", *FLAGS["distill"])
    refused(capsys, code, "os:system", "no Env of gymnasium")
    assert not called


def test_goals_a_scalar_and_a_matrix_become_one_vector():
    def column(x):  # 13 rows alike
        if isinstance(x, dict):
            return {key: column(part) for key, part in x.items()}
        return np.stack(13 * [x])

    def vector(row):  # in the order of the keys, without what is achieved
        goal = row["desired_goal"]
        return pytest.approx([float(goal["a"]), *goal["b"], *row["observation"].flatten()])

    first = PARTS.sample()
    ends = {"terminations": np.zeros(12, bool), "truncations": np.arange(12) == 11}
    steps = {"actions": column(BOX.sample())[:12], "rewards": np.arange(12.0)}
    episode = EpisodeBuffer(observations=column(first), **steps, **ends)
    how = {"observation_space": PARTS, "action_space": BOX}
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers("test/goal-v0", [episode], **how)
    batches, meta = load("minari:test/goal-v0", room("Goal-v0", BOX, PARTS))
    learnt = ractd.decode(batches.obs, batches.normalizer["obs"])
    assert learnt.shape == (12, 7) and learnt[11].tolist() == vector(first)
    observation, _ = ractd.simulator("Goal-v0", meta["dataset"])().reset(seed=0)
    PARTS.seed(0)
    assert observation.tolist() == vector(PARTS.sample())


# ---- data: D4RL's files --------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on the loopback for a tiny "published" file; .mode says how it behaves."""
    content = Path(write(tmp_path / "published.hdf5", logged())).read_bytes()
    cache = tmp_path / "D4RL_DATASET_DIR" / "hopper_medium_replay-v2.hdf5"
    sha256 = hashlib.sha256(content).hexdigest()
    state = SimpleNamespace(mode="good", content=content, cache=cache, sha256=sha256)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.mode == "garbled":
                self.wfile.write(b"no HTTP\r\n\r\n")
                return
            if state.mode == "silent":
                time.sleep(2)
            status = 200 if self.path == f"/{cache.name}" else 404
            self.send_response(int(state.mode) if state.mode.isdigit() else status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if state.mode == "good" else content[:2000])
            if state.mode == "stalls":
                time.sleep(2)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(ractd, "D4RL_URL", f"http://127.0.0.1:{web.server_port}/")
    original = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: original(url, timeout=0.5))
    yield state
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("version", ["current", "earlier", None])
def test_d4rls_file_is_downloaded_once_and_its_version_said(server, version, monkeypatch, capsys):
    known = {version: f"01234567 {server.sha256[:8]}"} if version else {}
    monkeypatch.setattr(ractd, "D4RL_VERSIONS", {"other": "89abcdef", **known})
    expected = f"D4RL, {version} version" if version else f"D4RL, version {server.sha256[:8]}"
    for mode in ("good", "404"):  # a second download would fail
        server.mode = mode
        assert cli("data") == 0
        text = capsys.readouterr().out
        assert f"data: {ENV}-v2 ({expected})" in text
        assert ("downloading" in text) == (mode == "good")
        assert (f"does not know: SHA-256 {server.sha256}" in text) == (version is None)
    assert server.cache.read_bytes() == server.content
    assert ractd.load_dataset(ENV).summary()["source"] == expected  # and so in every score file


FAILURES = {
    "cut off": "cut off after 2,000 of",
    "stalls": "timed out",
    "silent": "timed out",
    "garbled": "no HTTP",
    "404": "404",
    "503": "503",
}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failed_download_is_an_error_and_no_reason_for_other_data(server, mode, capsys):
    server.mode = mode
    refused(capsys, cli("data"), "cannot be downloaded", FAILURES[mode], "--data FILE")
    assert not list(server.cache.parent.iterdir())


def test_without_a_network_one_task_has_data_beside_the_program_and_every_score_says_so(
    tmp_path, capsys
):
    plain = ["--no-reward-teacher", "--reward-weight=0"]
    assert cli("distill", "--out=new", *FLAGS["distill"], *plain) == 0
    out = capsys.readouterr().out
    name = "hopper-medium-replay-sac.hdf5"
    folder = str(tmp_path / "D4RL_DATASET_DIR")
    for words in ("cannot be downloaded", folder, "200,000 transitions", "200,000 windows of 8"):
        assert words in out
    assert f"{ENV} on {name} (bundled, not D4RL's)" in out
    dataset = metrics("new")["dataset"]
    assert dataset["name"] == name and dataset["source"] == "bundled, not D4RL's"
    assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("env", [env for env in ractd.ENVS if env != ENV])
def test_without_a_network_the_other_tasks_name_three_ways_out(env, tmp_path, capsys):
    code = cli("data", env=env)
    out = capsys.readouterr()
    assert code == 2 and out.err.count("ractd.py: ") == 1
    assert f"{env.replace('-', '_')}-v2.hdf5" in out.out
    assert str(tmp_path / "D4RL_DATASET_DIR") in out.out
    for way_out in ("put the file", "--data FILE", f"python -m reproduce.collect --env {env}"):
        assert way_out in out.err


def test_a_home_that_cannot_be_written_or_is_not_there_is_no_obstacle(
    tmp_path, monkeypatch, capsys
):
    folder = os.environ["D4RL_DATASET_DIR"]
    monkeypatch.delenv("D4RL_DATASET_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert ractd.load_dataset(ENV).source == "bundled, not D4RL's"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nor in the list of users
    refused(capsys, cli("data"), "no home folder", "D4RL_DATASET_DIR", "--data")
    monkeypatch.setenv("D4RL_DATASET_DIR", folder)
    write(Path(folder) / "hopper_medium_replay-v2.hdf5", logged())
    assert ractd.load_dataset(ENV).source.startswith("D4RL, version")


def test_a_million_transitions_load_in_seconds_and_in_little_memory(tmp_path):
    n = 1_000_000
    rows = {
        "observations": np.random.default_rng(0).random((n, 17), np.float32),
        "actions": np.zeros((n, 6), np.float32),
        "rewards": np.ones(n, np.float32),
        "terminals": np.arange(n) % 333 == 0,
        "timeouts": np.arange(n) % 1000 == 999,
    }
    code = """import resource, sys, time, ractd
began = time.process_time()
ractd.Batches(ractd.load_dataset("", sys.argv[1]))
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""
    command = [sys.executable, "-c", code, write(tmp_path / "million.hdf5", rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SCRIPT.parent)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 20 and gigabytes < 1.5, (seconds, gigabytes)


# ---- presets and flags ---------------------------------------------------------------------------


def configured(monkeypatch, *args, env=ENV):
    """The Config that `distill` would run with."""
    runs = []
    monkeypatch.setattr(ractd, "train", runs.append)
    assert cli("distill", *args, env=env) == 0
    return runs[0].config


SIGMA = {  # medium, medium-replay, medium-expert
    "halfcheetah": (0.5, 1.0, 0.0),
    "hopper": (1.0, 1.0, 0.5),
    "walker2d": (0.4, 0.5, 0.2),
}


@pytest.mark.parametrize("task", SIGMA)
def test_the_papers_presets_have_its_losses_and_its_sigma_for_each_task(task, monkeypatch):
    losses = {"denoising": "paper", "reward_teacher": False, "trajectories": 0}
    losses |= {"reward_actions": 1, "reward_networks": 1, "temperature": 1.0}
    paper = losses | {"network": "paper", "grid_points": 80}
    paper |= {"teacher_steps": 392_000, "teacher_batch": 1024, "teacher_lr": 1e-4}
    paper |= {"reward_steps": 314_000, "reward_batch": 64, "reward_lr": 2e-4}
    paper |= {"student_steps": 33_500, "student_batch": 4800, "student_lr": 1e-4}
    for kind, sigma in zip(ractd.KINDS, SIGMA[task], strict=True):
        config = functools.partial(configured, monkeypatch, env=f"{task}-{kind}")
        assert config() == Config()
        assert config("--preset=paper-losses") == Config(**losses, reward_weight=sigma)
        assert config("--preset=paper") == Config(**paper, reward_weight=sigma)
    network = {"channels": (512, 1024, 2048), "kernel": 5, "blocks": 2, "patch": 1}
    assert ractd.NETWORKS["paper"] == network


def test_an_explicit_flag_beats_the_preset_and_the_rest_stays(monkeypatch):
    flags = ["--denoising=mean", "--reward-weight=3", "--temperature=2", "--reward-teacher"]
    expected = {"denoising": "mean", "reward_weight": 3.0, "temperature": 2.0}
    expected = ractd.PAPER_LOSSES | expected | {"reward_teacher": True}
    assert configured(monkeypatch, "--preset=paper-losses", *flags) == Config(**expected)


IGNORED = """\
    data --student-lr=3, data --seed=1, data --out=x, data --device=cpu, data --preset=paper,
    teacher --student-steps=5, teacher --episodes=3, teacher --nfe=2, teacher --reward-weight=1,
    reward --horizon=8, reward --network=small, reward --student-lr=1, reward --temperature=1,
    distill --model=teacher, distill --teacher-points=5, evaluate --teacher-lr=1,
    evaluate --horizon=8, evaluate --data=x, evaluate --seed=1, evaluate --preset=paper"""


@pytest.mark.parametrize("command_line", re.split(r",\s+", IGNORED))
def test_a_flag_that_a_command_would_ignore_is_not_accepted(command_line, monkeypatch, capsys):
    command, flag = command_line.split()
    monkeypatch.setattr(ractd, "train", None)
    refused(capsys, cli(command, flag), f"unrecognized arguments: {flag}")


BAD_FLAGS = """--network=large --horizon=2 --horizon=10 --horizon=-8 --gamma=1 --gamma=nan
    --teacher-steps=0 --teacher-lr=-1 --reward-batch=0 --grid-points=2 --episodes=-1 --nfe=0
    --nfe=x --nfe=81 --seed=-1 --seed=99999999999999999999 --episodes=99999999999999999999
    --student-steps=99999999999999999999 --temperature=nan --reward-actions=0 --reward-actions=9
    --reward-weight=-2 --reward-weight=1e999 --trajectories=-1 --denoising=x --reward-input=x
    --first-seed=-1 --device=cuda:99 --device=meta --device=x --horizn=8 --preset=x"""


@pytest.mark.parametrize("flag", BAD_FLAGS.split())
def test_a_bad_flag_is_refused_by_name_before_training(flag, trained, monkeypatch, capsys):
    monkeypatch.setattr(ractd, "fit", None)
    code = cli("distill", f"--data={trained.data}", *FLAGS["distill"], "--out=never", flag)
    refused(capsys, code, flag.split("=")[0])
    assert not Path("never").exists()


def test_no_flag_is_compared_with_one_that_the_command_has_not(trained, capsys):
    refused(capsys, cli("teacher", f"--data={trained.data}", "--horizon=2"), "--horizon 2: must")
    where = [f"--data={trained.data}", "--out=new", "--reward-actions=20"]
    assert cli("reward", *where, *FLAGS["reward"]) == 0  # whatever --horizon will be


# ---- training ------------------------------------------------------------------------------------


def test_fit_warms_up_then_follows_half_a_cosine_and_averages_as_released(tmp_path, monkeypatch):
    seen = []

    def step(net, average, optimizer, loss_fn, decay):
        seen.append((optimizer.param_groups[0]["lr"], decay))
        return {"loss": torch.tensor(0.0)}

    monkeypatch.setattr(ractd, "train_step", step)
    ractd.fit("teacher", nn.Linear(1, 1), None, tmp_path / "a.pt", {}, steps=80, lr=0.5)
    rates, decays = zip(*seen, strict=True)
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])  # 5 % of the steps
    assert rates[42] == pytest.approx(0.25) and 0 < rates[-1] < 0.001
    assert list(rates[4:]) == sorted(rates[4:], reverse=True)
    assert decays == pytest.approx([1 - (1 + n) ** -0.75 for n in range(80)])
    seen.clear()
    path = tmp_path / "b.pt"
    ractd.fit("student", nn.Linear(1, 1), None, path, {}, steps=3, lr=0.5, target_decay=0.7)
    assert [decay for _, decay in seen] == [0.7] * 3 and seen[0][0] == 0.5


def test_saving_prints_no_line_of_its_own(tmp_path, monkeypatch, capsys):
    def loss(net, _):
        return net(torch.ones(1, 1)).sum(), {}

    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    ractd.fit("teacher", nn.Linear(1, 1), loss, tmp_path / "a.pt", {}, steps=100, lr=0.5)
    steps = [1, *range(5, 101, 5)]
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == steps
    assert [row["step"] for row in map(json.loads, open("a.jsonl"))] == steps


@pytest.mark.parametrize("name", ["ctm", "dsm"])
def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_checkpoint(
    run, monkeypatch, capsys, name
):
    out, give = run
    (out / "student.pt").unlink()
    loss = getattr(ractd, f"{name}_loss")
    calls = []

    def broken(*args, **options):
        calls.append(1)
        return loss(*args, **options) * (1.0 if len(calls) < 5 else math.nan)

    monkeypatch.setattr(ractd, f"{name}_loss", broken)
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    refused(capsys, give("distill"), f"{name} is nan", "learning rate")
    assert 0 < torch.load(out / "student.pt")["step"] < 5


def test_learning_rates_of_one_end_in_a_sentence(trained, capsys):
    rates = [f"--{stage}-lr=1" for stage in STAGES]
    code = cli("distill", f"--data={trained.data}", *FLAGS["distill"], *rates, "--episodes=0")
    refused(capsys, code, "try a smaller")


def test_in_a_real_run_all_but_the_student_is_frozen_and_the_averages_are_used(run, monkeypatch):
    out, give = run
    (out / "student.pt").unlink()
    seen = []
    loss = ractd.distillation_loss

    def record(*args):
        seen.append(args)
        return loss(*args)

    monkeypatch.setattr(ractd, "distillation_loss", record)

    def is_frozen(net):
        return not net.training and not any(p.requires_grad for p in net.parameters())

    def holds(net, stage):
        average = torch.load(out / f"{stage}.pt")["ema"]
        same = all(torch.equal(x, average[name]) for name, x in net.state_dict().items())
        return same and is_frozen(net)

    assert give("distill", "--episodes=0") == 0
    student, target, teacher, reward_model = seen[0][:4]
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert is_frozen(target) and holds(teacher, "teacher") and holds(reward_model, "reward")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, trained):
    _, give = run
    for seed in (0, 1):
        assert give("reward", f"--seed={seed}", out=f"new{seed}") == 0
        assert same_weights(f"new{seed}/reward.pt", trained.out / "reward.pt") == (seed == 0)


# ---- end to end ----------------------------------------------------------------------------------


def test_end_to_end_leaves_every_promised_file_and_number(trained):
    names = {f"{stage}.{kind}" for stage in STAGES for kind in ("pt", "jsonl")}
    assert {path.name for path in trained.out.iterdir() if "score" not in path.name} == names
    found = metrics(trained.out)
    assert found["method"] == "RACTD" and found["calls"] == 1 and found["episodes"] == 3
    assert len(found["returns"]) == len(found["lengths"]) == 3
    assert found["return_mean"] == pytest.approx(np.mean(found["returns"]))
    score = (np.array(found["returns"]) + 20.272305) / (3234.3 + 20.272305) * 100
    assert found["score_mean"] == pytest.approx(score.mean())
    assert found["score_sem"] == pytest.approx(score.std(ddof=1) / 3**0.5)
    for stage in STAGES:
        rows = list(map(json.loads, open(trained.out / f"{stage}.jsonl")))
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and steps[-1] == rows[-1]["steps"] == STEPS
    assert rows[-1].keys() >= {"loss", "ctm", "dsm", "R", "path", "grad"}  # Eq. 9 whole
    assert "RACTD, 1 call(s)" in trained.text and "not D4RL's" in trained.text


def test_a_finished_run_is_not_trained_again_wherever_its_data_lie(run, trained, monkeypatch):
    out, give = run
    before = metrics(out)["returns"]
    monkeypatch.setattr(ractd, "fit", None)
    assert give("distill") == 0 and metrics(out)["returns"] == before
    moved = shutil.copy(trained.data, "renamed.hdf5")
    assert give("distill", data=moved) == 0 and metrics(out)["returns"] == before


def test_the_papers_losses_train_and_act_end_to_end(trained):
    where = [f"--data={trained.data}", "--out=new", "--preset=paper-losses"]
    assert cli("distill", *where, *FLAGS["distill"]) == 0
    assert metrics("new")["method"] == "RACTD, plain teacher" and metrics("new")["temperature"] == 1
    saved = torch.load("new/student.pt")
    assert saved["config"]["denoising"] == "paper" and saved["config"]["reward_weight"] == 1.0
    log = saved["log"][-1].keys()
    assert log >= {"ctm", "dsm", "R"} and "path" not in log  # Eqs. 5 to 9, and nothing else
    assert cli("evaluate", "--out=new", "--episodes=3") == 0  # acts as its preset meant it
    assert len(list(Path("new").glob("score_*.json"))) == 1
    assert cli("evaluate", "--out=new", "--episodes=3", "--temperature=0.5") == 0
    assert len(list(Path("new").glob("score_*.json"))) == 2


@pytest.mark.parametrize(
    "weight, method, stages",
    [("4", "RACTD, plain teacher", STAGES), ("0", "CTD", ("teacher", "student"))],
)
def test_without_a_reward_teacher_and_without_any_reward(weight, method, stages, trained):
    flags = [*FLAGS["distill"], "--no-reward-teacher", f"--reward-weight={weight}"]
    assert cli("distill", f"--data={trained.data}", "--out=new", *flags) == 0
    assert metrics("new")["method"] == method
    assert {path.stem for path in Path("new").glob("*.pt")} == set(stages)
    assert ("R" in torch.load("new/student.pt")["log"][-1]) == ("reward" in stages)
    assert not same_weights("new/teacher.pt", trained.out / "teacher.pt")
    if "reward" in stages:
        assert same_weights("new/reward.pt", trained.out / "reward.pt")


@pytest.mark.parametrize(
    "name, stage, reward_teacher, weight",
    [
        ("teacher", "teacher", False, 4.0),
        ("reward teacher", "teacher", True, 4.0),
        ("RACTD", "student", True, 4.0),
        ("RACTD, plain teacher", "student", False, 4.0),
        ("CTD", "student", False, 0.0),
        ("CTD of a reward teacher", "student", True, 0.0),
    ],
)
def test_what_acts_has_the_names_of_the_papers_table(name, stage, reward_teacher, weight):
    config = {"reward_teacher": reward_teacher, "reward_weight": weight}
    assert ractd.method_name({"stage": stage, "config": config}) == name


# ---- acting and evaluation -----------------------------------------------------------------------


def loaded(folder, stage="student"):
    return ractd.load_checkpoint(folder / f"{stage}.pt", stage)


def generators(count=5):
    return [np.random.default_rng(seed) for seed in range(count)]


@pytest.mark.parametrize("stage", ["student", "teacher"])
@pytest.mark.parametrize("nfe", [1, 3])
def test_a_policy_is_the_plain_calls_with_the_averaged_weights(trained, stage, nfe):
    """A level for each sample, in the normaliser's units, clipped to the simulator's box."""
    checkpoint = loaded(trained.out, stage)
    del checkpoint["net"]
    checkpoint["box"] = torch.tensor([[-0.5] * 3, [0.4] * 3])
    policy = ractd.Policy(checkpoint, Config(nfe=nfe, teacher_points=5, temperature=0.5))
    observations = torch.randn(5, 11)
    z = torch.randn(5, 8, 3)
    state = ractd.encode(observations, checkpoint["normalizer"]["obs"])

    def many(t):
        return torch.full((5,), t)

    if stage == "student":
        jump = lambda x, t, k: student_jump(policy.net, x, many(t), many(k), state)
        x = ractd.student_sample(jump, 40 * z, ractd.karras_sigmas(6), nfe, lambda _: z / 2)
    else:
        denoiser = lambda x, t: denoise(policy.net, x, many(t), state)
        x = ractd.heun_sample(denoiser, 40 * z, ractd.karras_sigmas(5))
    expected = ractd.decode(x.clamp(-1, 1), checkpoint["normalizer"]["action"]).clamp(-0.5, 0.4)
    plans = policy(observations, lambda _: z)
    assert policy.calls == (nfe if stage == "student" else 7)
    assert plans.shape == (5, 8, 3) and (plans - expected).abs().max() < 1e-6


def test_a_policy_draws_each_rows_noise_from_its_own_generator_and_casts_observations(
    trained,
):
    policy = ractd.Policy(loaded(trained.out))
    observations = np.random.default_rng(9).normal(size=(5, 11))  # float64
    rows = [generator.standard_normal((8, 3), np.float32) for generator in generators()]
    z = torch.from_numpy(np.stack(rows))
    plans = policy(torch.from_numpy(observations), lambda _: z).numpy()
    assert np.abs(plans - policy.act(observations, generators())).max() < 1e-6
    for shape in ((11,), (5, 10), (4, 11)):
        with pytest.raises(ractd.UserError, match=re.escape(str(shape))):
            policy.act(np.zeros(shape), generators())


def test_a_policy_can_be_copied_pickled_and_given_other_weights(trained):
    checkpoint = loaded(trained.out)
    policy = ractd.Policy(checkpoint)
    observations = np.ones((5, 11))
    plans = policy.act(observations, generators())
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert np.array_equal(other.act(observations, generators()), plans)
    weights = {name: 1.1 * x for name, x in checkpoint["ema"].items()}
    policy.net.load_state_dict(weights)
    expected = ractd.Policy(checkpoint | {"ema": weights}).act(observations, generators())
    assert np.array_equal(policy.act(observations, generators()), expected)
    assert np.abs(expected - plans).max() > 0.01


def test_a_policy_acts_from_the_noise_it_was_trained_for_unless_told_otherwise(trained):
    checkpoint = loaded(trained.out)
    checkpoint["config"]["temperature"] = 0.7
    assert ractd.Policy(checkpoint).temperature == 0.7
    assert ractd.Policy(checkpoint, Config(temperature=0.1)).temperature == 0.1


def test_returns_count_the_last_reward_and_the_first_action_of_a_plan_is_executed():
    log = []
    seen = []

    def act(observations, generators):
        seen.append((observations, [generator.random() for generator in generators]))
        return observations[:, None, 1:] + np.arange(4)[:, None]  # the step number goes on

    result = ractd.evaluate(act, lambda: World(log), 2, first_seed=4)
    assert result["returns"] == [2.0**8 - 2, 2.0**9 - 2] and result["lengths"] == [7, 8]
    assert [action for seed, action in log if seed == 4] == list(range(7)) and len(seen) == 8
    assert seen[0][0][:2].tolist() == [[4, 0], [5, 0]] and seen[1][0][0].tolist() == [4, 1]
    assert seen[0][1][:2] == [np.random.default_rng(seed).random() for seed in (4, 5)]


def test_a_return_does_not_depend_on_how_many_episodes_run_beside_it(trained):
    checkpoint = loaded(trained.out)
    act = ractd.Policy(checkpoint).act
    make = ractd.simulator(ENV, checkpoint["dataset"])
    together = ractd.evaluate(act, make, 4)["returns"]
    alone = [ractd.evaluate(act, make, 1, first_seed=seed)["returns"][0] for seed in range(4)]
    assert alone == together and len(set(together)) == 4


def test_two_different_evaluations_never_share_a_file_and_the_same_one_does(run, monkeypatch):
    out, _ = run
    noise = "--temperature=1"
    teacher = ["--model=teacher", "--teacher-points=3"]
    different = [[], [noise], [f"{noise}.0000001"], ["--nfe=2"], ["--nfe=3"], ["--first-seed=1"]]
    different += [["--episodes=4"], teacher, [*teacher, noise], [teacher[0], "--teacher-points=4"]]
    config = torch.load(out / "student.pt")["config"]  # those are the command line's
    rewrite(out / "student.pt", config=config | {"first_seed": 50, "episodes": 7, "nfe": 3})

    def evaluate(*how):
        assert cli("evaluate", f"--out={out}", "--episodes=2", *how) == 0
        return {path.name: json.loads(path.read_text()) for path in out.glob("score_*.json")}

    with monkeypatch.context() as patch:
        patch.setattr(ractd, "load_dataset", None)  # acting needs no data
        for how in different:
            found = evaluate(*how)
        assert len(found) == 1 + len(different), list(found)
        again = evaluate()
    assert again == found
    weights = torch.load(out / "teacher.pt")["ema"]  # another teacher in the same folder
    rewrite(out / "teacher.pt", ema={name: 1.1 * x for name, x in weights.items()})
    assert len(evaluate(*teacher)) == len(found) + 1


@pytest.mark.parametrize(
    "env, value, score",
    [
        ("hopper-medium", 3234.3, 100),
        ("hopper-medium", -20.272305, 0),
        ("walker2d-medium", 1.629008, 0),
        ("walker2d-medium-expert", 4592.3, 100),
        ("halfcheetah-medium", 12135.0, 100),
        ("halfcheetah-medium", -280.178953, 0),
        ("mujoco/pusher/expert-v0", 1.0, math.nan),
        ("hopper-v5", 1.0, math.nan),
    ],
)
def test_the_normalised_score_has_d4rls_reference_points(env, value, score):
    assert ractd.normalized_score(env, value) == pytest.approx(score, nan_ok=True)


class Endless(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (3,))

    def reset(self, **_):
        return np.zeros(11, np.float32), {}

    def step(self, action):
        return np.zeros(11, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("longest, cap", [(7, 1000), (1500, 1500)])
def test_an_environment_without_a_time_limit_gets_one_that_is_said(longest, cap, capsys):
    gymnasium.register("Endless-v0", Endless)
    env = ractd.simulator("Endless-v0", {"source": "file", "longest": longest})()
    assert f"Endless-v0 has no time limit: an episode ends after {cap:,}" in capsys.readouterr().out
    env.reset(seed=0)
    ended = [env.step(np.zeros(3))[3] for _ in range(cap)]
    assert ended == [False] * (cap - 1) + [True]


# ---- interrupted, killed, twice at once ----------------------------------------------------------


def test_a_killed_run_is_half_trained_and_goes_on_to_the_same_bits(
    run, trained, monkeypatch, capsys
):
    out, give = run
    path = out / "student.pt"
    path.unlink()
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    where = [f"--env={ENV}", f"--data={trained.data}", f"--out={out}"]
    code = """import os, signal, sys, ractd
calls, step, ractd.SAVE_EVERY = [], ractd.train_step, 0
def killed(*args):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
ractd.train_step = killed
ractd.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, "distill", *where, *FLAGS["distill"]]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    step = torch.load(path)["step"]
    assert 0 < step < 8
    assert cli("evaluate", f"--out={out}", "--episodes=1") == 0
    assert f"half trained: {step} of {STEPS} steps" in capsys.readouterr().out
    assert give("distill") == 0 and same_weights(path, trained.out / "student.pt")
    steps = [json.loads(line)["step"] for line in (out / "student.jsonl").open()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


@pytest.mark.parametrize(
    "stage, number, place, call",
    [
        ("reward", signal.SIGINT, "train_step", 7),
        ("teacher", signal.SIGTERM, "train_step", STEPS),
        ("teacher", signal.SIGINT, "mean_of", 3),  # while a line is printed
        ("student", signal.SIGTERM, "train_step", 7),
    ],
)
def test_ctrl_c_and_sigterm_save_and_the_command_goes_on_to_the_same_bits(
    stage, number, place, call, trained, run, monkeypatch, capsys
):
    out, give = run
    path = out / f"{stage}.pt"
    command = stage if stage in FLAGS else "distill"
    path.unlink()
    calls = []
    original = getattr(ractd, place)
    handler = signal.getsignal(number)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the impatient press twice
        return original(*args)

    monkeypatch.setattr(ractd, place, interrupted)
    assert give(command) == 128 + number and "goes on" in capsys.readouterr().out
    assert torch.load(path)["step"] == call
    assert signal.getsignal(number) is handler
    assert give(command) == 0 and len(calls) == STEPS
    assert same_weights(path, trained.out / f"{stage}.pt")


def test_the_program_runs_in_a_worker_thread(run, trained):
    out, give = run
    (out / "reward.pt").unlink()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(give("reward")))
    thread.start()
    thread.join()
    assert codes == [0] and same_weights(out / "reward.pt", trained.out / "reward.pt")


def test_two_runs_of_one_command_in_one_folder_both_finish_with_the_same_bits(
    run, trained, monkeypatch
):
    where = [f"--env={ENV}", f"--data={trained.data}", "--out=both"]
    command = [sys.executable, SCRIPT, "distill", *where, *FLAGS["distill"]]
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    for stage in STAGES:
        assert same_weights(f"both/{stage}.pt", trained.out / f"{stage}.pt")
    assert not list(Path("both").glob("*.part"))
    replace = os.replace

    def raced(source, path):  # the other run has just removed what it probed the folder with
        replace(source, path)
        if Path(path).suffix not in (".pt", ".jsonl", ".json"):
            Path(path).unlink()

    monkeypatch.setattr(ractd.os, "replace", raced)
    assert run[1]("reward") == 0


def test_logs_are_made_from_checkpoints_and_leftovers_of_dead_processes_go(run):
    out, give = run
    logs = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    (out / "reward.jsonl").unlink()
    (out / "teacher.jsonl").write_text("stale")
    dead = subprocess.Popen(["true"])
    dead.wait()
    leftover = out / f"teacher.pt.{dead.pid}.part"
    others = [out / f"teacher.pt.{os.getppid()}.part", out / "film.part"]
    for path in (leftover, *others):
        path.touch()
    assert give("distill") == 0
    assert {path: path.read_bytes() for path in out.glob("*.jsonl")} == logs and len(logs) == 3
    assert all(path.exists() for path in others) and not leftover.exists()


def test_a_file_is_replaced_whole_or_not_at_all_also_by_two_processes_at_once(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.pt"
    with ractd.replacing(path) as one:
        one.write(b"one")
        monkeypatch.setattr(ractd.os, "getpid", lambda: 1)
        with ractd.replacing(path) as two:
            two.write(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), ractd.replacing(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and list(tmp_path.glob("a*")) == [path]


@pytest.mark.parametrize("room", [0, 20_000, 3_000_000, 9_000_000])
def test_a_full_disk_is_a_sentence_and_loses_nothing(room, run, trained, monkeypatch, capsys):
    """No file grows beyond so many bytes, from the fifth step on."""
    out, give = run
    path = out / "teacher.pt"
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []
    train_step = ractd.train_step

    def filling(*args):
        calls.append(1)
        if len(calls) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return train_step(*args)

    monkeypatch.setattr(ractd, "train_step", filling)
    with monkeypatch.context() as patch:
        patch.setattr(ractd, "SAVE_EVERY", 0)
        try:
            code = give("teacher")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code)
    assert torch.load(path)["step"] == 4 and not list(out.glob("*.part"))
    assert give("teacher") == 0 and same_weights(path, trained.out / "teacher.pt")


def test_a_score_is_printed_before_it_is_written(run, monkeypatch, capsys):
    out, _ = run

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ractd, "make_folder", lambda out: None)
    monkeypatch.setattr(ractd.os, "replace", full)
    assert cli("evaluate", f"--out={out}", "--episodes=2") == 2
    assert "RACTD, 1 call(s)" in capsys.readouterr().out


# ---- with less than everything -------------------------------------------------------------------


def test_a_log_without_its_simulator_can_be_learnt_from_but_not_evaluated(trained, capsys):
    where = [f"--data={trained.data}", "--out=new"]
    env = "no/such-v0"
    assert cli("data", f"--data={trained.data}", env=env) == 0
    assert "no simulator" in capsys.readouterr().out
    for command in ("reward", "teacher"):
        assert cli(command, *where, *FLAGS[command], env=env) == 0
    assert cli("distill", *where, *FLAGS["distill"], "--episodes=0", env=env) == 0
    assert Path("new/student.pt").exists() and not list(Path("new").glob("score_*"))
    capsys.readouterr()
    refused(capsys, cli("evaluate", "--out=new", env=env), env)
    refused(capsys, cli("distill", *where, *FLAGS["distill"], env=env), env)


def test_ractd_alone_in_an_empty_folder_does_everything_but_the_offline_data(trained, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    code = f"""import sys, ractd
ractd.D4RL_URL = {CLOSED_PORT!r}
def give(*args):
    return ractd.main([args[0], "--env={ENV}", *args[1:]])
assert not give("distill", "--data={trained.data}", *sys.argv[1:])
assert not give("evaluate", "--episodes=3")
assert give("data") == 2
"""
    command = [sys.executable, "-c", code, *FLAGS["distill"]]
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("ractd.py: ") == 1 and "--data FILE" in done.stderr
    out = folder / "runs" / ENV
    assert same_weights(out / "student.pt", trained.out / "student.pt")
    assert metrics(out)["returns"] == metrics(trained.out)["returns"]


def test_names_that_the_terminal_cannot_print_are_escaped(trained, tmp_path):
    data = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.hdf5"
    shutil.copy(trained.data, data)
    where = [b"--data=" + data, b"--out=run\xff"]
    command = [sys.executable, SCRIPT, "reward", *where, *FLAGS["reward"]]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert r"\udcff\xe9.hdf5" in done.stdout and os.path.exists(b"run\xff/reward.pt")


# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

LAYOUTS = {  # the observations of a file, and what is said of it
    "a group": (lambda f: f.create_group("observations/agent"), "lacks the arrays observations"),
    "robomimic": (lambda f: f.create_group("data/demo_0"), "the layout is robomimic's"),
    "minari": (lambda f: [f.create_group(f"episode_{i}") for i in range(3000)], "is Minari's"),
    "soft link": (lambda f: f.update(observations=h5py.SoftLink("/no")), "arrays"),
    "external link": (lambda f: f.update(observations=h5py.ExternalLink("no", "/")), "arrays"),
    "petabytes": (lambda f: f.create_dataset("observations", (10**15, 11), "f4", chunks=True), ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_hdf5_file_of_another_layout_or_with_nothing_behind_a_name_is_refused(layout, capsys):
    make, words = LAYOUTS[layout]
    rows = logged()
    del rows["observations"]
    write("other.hdf5", rows)
    with h5py.File("other.hdf5", "a") as f:
        make(f)
    code = cli("data", "--data=other.hdf5")
    err = capsys.readouterr().err
    assert code == 2 and err.count("ractd.py: ") == 1 and len(err.splitlines()) == 1
    assert "other.hdf5" in err and words in err and len(err) < 400


def test_returns_that_are_fractions_are_printed_with_their_digits(capsys):
    rows = logged()
    rows["rewards"] = np.full(133, 0.0123)
    assert ractd.main(["data", f"--data={write('small.hdf5', rows)}"]) == 0  # the name is its task
    assert "return: mean 0.32718, best 0.738" in capsys.readouterr().out


def test_a_mistyped_task_or_folder_is_called_so(trained, tmp_path, capsys):
    sentence = "hopper-medium, hopper-medium-replay"
    refused(capsys, cli("data", env="hoper-medium-repaly"), sentence)
    refused(capsys, ractd.main(["data"]), "--env")
    for command in ("teacher", "distill"):  # a folder that exists makes no task of it
        code = cli(command, f"--out={tmp_path}", env="hoper-medium-repaly")
        refused(capsys, code, "hoper-medium-repaly")
    refused(capsys, ractd.main(["evaluate", "--out=rnu"]), "no folder rnu")
    where = [f"--data={trained.data}", "--out=new"]
    refused(capsys, cli("distill", *where, *FLAGS["distill"], env=".:x"), ".:x")


def test_a_folder_that_cannot_be_written_is_refused_before_training_or_playing(
    run, trained, monkeypatch, capsys
):
    out, give = run
    Path("file").touch()
    monkeypatch.setattr(ractd, "fit", None)
    monkeypatch.setattr(ractd, "evaluate", None)
    for bad in ("file", "file/run"):
        refused(capsys, give("distill", out=bad), bad)
        refused(capsys, cli("evaluate", f"--out={bad}"), bad)

    def read_only(path, mode="r"):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(ractd, "open", read_only, raising=False)
    refused(capsys, give("distill"), "Permission denied")
    refused(capsys, cli("evaluate", f"--out={out}"), "Permission denied")


MISFITS = {
    "--teacher-lr=1e-4": ("teacher_lr: 0.001 in the file, 0.0001 asked", "teacher.pt"),
    "--no-reward-teacher": ("reward_teacher: True in the file, False asked", "teacher.pt"),
    "--gamma=0.9": ("gamma: 0.99 in the file, 0.9 asked", "reward.pt"),
    "--temperature=1": ("temperature: 0.25 in the file, 1.0 asked", "student.pt"),
    "--env=hopper-medium": (f"env: {ENV} in the file, hopper-medium asked", "reward.pt"),
}


@pytest.mark.parametrize("flag", MISFITS)
def test_what_does_not_fit_a_checkpoint_is_refused_and_listed(flag, run, capsys):
    _, give = run
    refused(capsys, give("distill", "--ctm-weight=2", flag), *MISFITS[flag], "delete", "--out")


def test_a_checkpoint_of_another_task_is_not_evaluated(run, capsys):
    code = cli("evaluate", f"--out={run[0]}", env="walker2d-medium")
    refused(capsys, code, f"env: {ENV} in the file, walker2d-medium asked", "student.pt")


@pytest.mark.parametrize("stage, built_on_it", [("reward", "teacher"), ("teacher", "student")])
def test_a_stage_built_on_other_weights_is_refused(run, stage, built_on_it, capsys):
    out, give = run
    saved = loaded(out, stage)
    rewrite(out / f"{stage}.pt", ema={name: x + 1 for name, x in saved["ema"].items()})
    sentence = f"{stage}: {ractd.weights_id(saved)} in the file"
    refused(capsys, give("distill"), sentence, f"{built_on_it}.pt", "delete")


def test_data_that_were_edited_are_not_the_same_data(run, capsys):
    rows = logged()
    rows["actions"][5] *= -1  # as many rows, the same returns and name
    code = run[1]("distill", data=write("log.hdf5", rows))
    refused(capsys, code, "data: ", "in the file", "delete")


def test_a_checkpoint_of_another_version_is_called_so_and_not_damaged(run, capsys):
    out, give = run
    for stage, command in (("student", "evaluate"), ("teacher", "distill"), ("reward", "reward")):
        for version in (None, 99):
            rewrite(out / f"{stage}.pt", format=version)
            code = cli(command, f"--out={out}") if command == "evaluate" else give(command)
            err = capsys.readouterr().err
            assert code == 2 and "another version" in err and str(out / f"{stage}.pt") in err
            assert "damaged" not in err and "delete" in err
        rewrite(out / f"{stage}.pt", format=ractd.FORMAT)


def test_a_missing_damaged_or_wrong_checkpoint_is_refused(run, capsys):
    out, give = run
    path = out / "student.pt"
    whole = path.read_bytes()
    torch.save(torch.zeros(3), path)
    others = [path.read_bytes(), (out / "teacher.pt").read_bytes()]
    for bad in (b"", b"junk", b"garbage", whole[: len(whole) // 2], *others):
        path.write_bytes(bad)
        refused(capsys, cli("evaluate", f"--out={out}"), str(path))
        refused(capsys, give("distill"), str(path))
        assert path.read_bytes() == bad
    path.unlink()
    refused(capsys, cli("evaluate", f"--out={out}"), "no trained student")


def test_a_checkpoint_without_one_of_its_entries_is_refused(run, capsys):
    out, _ = run
    path = out / "student.pt"
    saved = torch.load(path)
    assert saved.keys() == set(ractd.CONTENTS.split())
    for key in saved:
        torch.save({name: x for name, x in saved.items() if name != key}, path)
        word = "another version" if key == "format" else f"lacks {key}"
        refused(capsys, cli("evaluate", f"--out={out}"), word, str(path))


def test_a_flipped_byte_of_a_checkpoint_is_noticed_or_changes_nothing(run):
    out, _ = run
    path = out / "reward.pt"
    rewrite(path, net={}, optimizer={}, log=[], ema={"weight": torch.randn(99)})
    whole = path.read_bytes()
    before = loaded(out, "reward")
    rng = np.random.default_rng(0)
    noticed = 0
    positions = rng.choice(len(whole), 300, replace=False)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        try:
            after = loaded(out, "reward")
        except ractd.UserError:
            noticed += 1
        else:
            assert torch.equal(after["ema"]["weight"], before["ema"]["weight"])
            assert torch.equal(after["rng"], before["rng"]) and after["config"] == before["config"]
    assert noticed > len(positions) / 2


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_cannot_execute_code(run, capsys):
    out, give = run
    for save in (torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False)):
        save({"format": ractd.FORMAT, "stage": "student", "ema": Malicious()}, out / "student.pt")
        refused(capsys, cli("evaluate", f"--out={out}"), "student.pt")
        refused(capsys, give("distill"), "student.pt")
    assert not Path("executed").exists()


UNREADABLE = {
    "read_bytes": (Path, PermissionError(13, "Permission denied")),
    "load": (torch, MemoryError("out of memory")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_good_checkpoint_that_cannot_be_read_is_never_to_be_deleted(
    name, run, monkeypatch, capsys
):
    out, _ = run
    where, error = UNREADABLE[name]

    def unreadable(*_, **__):
        raise error

    monkeypatch.setattr(where, name, unreadable)
    code = cli("evaluate", f"--out={out}")
    err = capsys.readouterr().err
    assert code == 2 and error.args[-1] in err and "delete" not in err and "Traceback" not in err


# ---- README --------------------------------------------------------------------------------------


def test_the_examples_in_the_readme_run(run):
    """All of its Python blocks, one after the other, on the tiny run."""
    out, _ = run
    text = (SCRIPT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    Path("examples.py").write_text("\n".join(blocks).replace(f"runs/{ENV}", str(out)))
    runpy.run_path("examples.py")
