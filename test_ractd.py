"""Tests of ractd.py in its own order, offline: python -m pytest -q test_ractd.py."""

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
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from minari.data_collector import EpisodeBuffer
from pytest import approx
from torch import allclose, equal, nn, randn, tensor
from torch.nn import functional as F

import ractd
from ractd import Config, UNet1d, UserError, denoise, expand, karras_sigmas, student_jump

torch.set_num_threads(1)  # more would round differently
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
ENV = "hopper-medium-replay"
SCRIPT = Path(ractd.__file__).resolve()
STEPS = 12
STAGES = ("reward", "teacher", "student")
REWARD = ["--reward-batch=8", f"--reward-steps={STEPS}"]
TEACHER = [*REWARD, "--horizon=8", "--teacher-batch=8", f"--teacher-steps={STEPS}"]
STUDENT = ["--grid-points=6", "--student-batch=8", f"--student-steps={STEPS}"]
ACT = ["--episodes=3"]
FLAGS = {"reward": REWARD, "teacher": TEACHER, "distill": [*TEACHER, *STUDENT, *ACT]}
FLAGS["evaluate"] = ACT


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no network is used."""
    for name in ("HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ractd, "D4RL_URL", "http://127.0.0.1:9/")
    monkeypatch.chdir(tmp_path)


def logged():
    """Random rows in D4RL's layout: falls and time limits in turn, the last episode unfinished."""
    rng = np.random.default_rng(0)
    rows = np.arange(133)
    return {
        "observations": rng.normal(size=(133, 11)).astype("f4"),
        "actions": rng.uniform(-0.9, 0.8, (133, 3)).astype("f4"),
        "rewards": rng.normal(1, 1, 133).astype("f4"),
        "terminals": np.isin(rows, [39, 52]),
        "timeouts": np.isin(rows, [47, 112]),
    }


def write(path, rows):
    """An HDF5 file of these arrays -> its path."""
    with h5py.File(path, "w") as f:
        f.update(rows)
    return str(path)


def cli(command, *args, env=ENV):
    """main() in this process -> exit code; argparse leaves through SystemExit."""
    try:
        return ractd.main([command, f"--env={env}", *args])
    except SystemExit as error:
        return error.code


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words -> what was said."""
    err = capsys.readouterr().err
    assert code == 2
    assert len(re.findall("^ractd.py", err, re.MULTILINE)) == 1, err
    assert not [word for word in words if word not in err], err
    return err


def python(*args, **how):
    """This Python in a process of its own -> its exit code and what it printed."""
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """End to end, the program alone in a folder -> run folder, data file, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(SCRIPT, folder)
    data = write(folder / "log.hdf5", logged())
    where = [f"--env={ENV}", f"--data={data}"]
    done = python("ractd.py", "distill", *where, *FLAGS["distill"], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(out=folder / "runs" / ENV, data=data, text=done.stdout)


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the trained run folder."""
    return shutil.copytree(trained.out, tmp_path / "run")


@pytest.fixture
def give(trained, out):
    """A function that gives a command the flags of the trained run, by default in its copy."""

    def give(command, *more, data=trained.data, out=out, env=ENV):
        where = [f"--out={out}"]
        if command != "evaluate":
            where.append(f"--data={data}")
        return cli(command, *where, *FLAGS[command], *more, env=env)

    return give


def bits(path):
    """Names of a checkpoint's average and network, and its step: equal bits, equal names."""
    saved = torch.load(path)
    networks = [{"ema": saved[name]} for name in ("ema", "net")]
    return *map(ractd.weights_id, networks), saved["step"]


def metrics(out):
    """Of the only score file in a folder."""
    (path,) = Path(out).glob("score_*.json")
    return json.loads(path.read_text())


def rewrite(path, **changes):
    """Change entries of a checkpoint."""
    torch.save(torch.load(path) | changes, path)


def record(monkeypatch, name, number=0, act=None):
    """The list of the arguments of a function of ractd in each call; act in the `number`-th."""
    calls = []
    original = getattr(ractd, name)

    def recorded(*args, **how):
        calls.append((*args, *how.values()))
        if len(calls) == number:
            act()
        return original(*args, **how)

    monkeypatch.setattr(ractd, name, recorded)
    return calls


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


# ---- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [False, True])
def test_the_unet_keeps_the_shape_and_hears_the_plan_the_state_and_the_levels(student):
    torch.manual_seed(0)
    net = UNet1d(2, 3, channels=(8, 12, 16), blocks=2, student=student)
    shapes = [(5, 16, 2), (5,), (5, 3), (5,)]
    inputs = [torch.rand(shape, requires_grad=True) for shape in shapes[: 3 + student]]
    y = net(*inputs)
    assert y.shape == (5, 16, 2)
    y[0].square().sum().backward()
    for value in inputs:
        assert value.grad[0].abs().max() > 0
        assert not value.grad[1:].any()
    assert all(p.grad is not None for p in net.parameters())


def test_the_convolution_is_one():
    conv = ractd.TemporalConv(2, 4, 5)
    x = randn(5, 8, 2)
    weight = conv.weight.view(4, 5, 2).mT
    y = F.conv1d(x.mT, weight, conv.bias, padding=2)
    y = F.silu(F.layer_norm(y.mT, (4,)))
    assert allclose(conv(x), y, atol=1e-5)


def test_a_student_with_the_teachers_weights_is_the_teacher_for_every_k():
    teacher = network(1)
    student = network(2, student=True)
    ractd.warm_start(student, teacher)
    x = randn(6, 8, 2)
    state = randn(6, 3)
    t = ractd.lognormal_levels(6)
    expected = denoise(teacher, x, t, state)
    for k in (t, t / 2, 0.02):
        y = denoise(student, x, t, state, k)
        assert allclose(y, expected, rtol=1e-5, atol=1e-5)


SD = 0.3  # Gaussian data x0 ~ N(0, SD^2) have everything in closed form


def exact(x, t, sd=SD):
    return x * sd**2 / (expand(t) ** 2 + sd**2)


def exact_jump(x, t, k):
    variances = [expand(level) ** 2 + SD**2 for level in (t, k)]
    return x * (variances[1] / variances[0]) ** 0.5


def test_the_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root():
    grid = karras_sigmas(20)
    roots = np.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), 20)
    assert grid.dtype == torch.float64
    assert grid.tolist() == approx(roots**7)
    # not a bit off: an Euler step down to smin, not half of one
    assert grid[0].item() == 80
    assert grid[-1].item() == 0.02


def test_the_teachers_noise_is_the_truncated_lognormal():
    torch.manual_seed(0)
    t = ractd.lognormal_levels(100_000)
    assert t.min() >= 0.02
    assert t.max() <= 80
    normal = NormalDist(-1.2, 1.2)
    below = normal.cdf(math.log(0.02))
    for level in (0.025, 0.1, 0.3, 2.0, 5.0):
        share = (normal.cdf(math.log(level)) - below) / (1 - below)
        assert (t < level).float().mean() == approx(share, abs=0.006)


@pytest.mark.parametrize("level", [0.02, 0.5, 80.0])
def test_the_networks_input_has_unit_variance_and_the_denoiser_is_the_identity_at_smin(level):
    torch.manual_seed(0)
    net = Mock(return_value=7)
    deviation = math.sqrt(level**2 + 0.25)
    x = deviation * randn(20_000, 4, 1)
    c_skip = 0.25 / ((level - 0.02) ** 2 + 0.25)
    c_out = 0.5 * (level - 0.02) / deviation
    y = denoise(net, x, level, None)
    assert allclose(y, c_skip * x + 7 * c_out, atol=1e-5)
    assert equal(y, x) == (level == 0.02)
    assert net.call_args.args[0].std() == approx(1, abs=0.02)
    each = denoise(net, x, torch.full((20_000,), level), None)
    assert allclose(each, y, atol=1e-5)


def test_heun_is_of_order_two_away_from_the_smallest_level():
    errors = []
    for n in (80, 160):
        x = torch.ones(1, 1, 1, dtype=torch.float64)
        grid = karras_sigmas(n, smin=0.1).tolist()
        truth = exact_jump(x, grid[0], grid[-1])
        for t, u in pairwise(grid):
            x = ractd.heun_step(exact, x, t, u)
        errors.append((x - truth).item())
    assert 3.6 < errors[0] / errors[1] < 4.4


def test_the_last_step_is_eulers_so_that_samples_have_the_variance_of_the_data():
    """Where D(x, smin) = x the second slope is 0: to average over it adds a tenth of variance."""
    sd = 0.05
    denoiser = Mock(side_effect=lambda x, t: exact(x, t, sd) if t > 0.02 else x)
    x = tensor([[[80**2 + sd**2]]]).double().sqrt()
    y = ractd.heun_sample(denoiser, x, karras_sigmas(20))
    assert denoiser.call_count == 37
    assert y.square() == approx(sd**2 + 0.02**2, rel=0.02)


def test_in_a_batch_only_the_steps_down_to_smin_are_eulers():
    t = tensor([0.5, 0.04, 3.0])
    u = tensor([0.3, 0.02, 0.02])
    x = torch.ones(3, 4, 1)
    y = ractd.heun_step(exact, x, t, u)
    euler = x + expand((u - t) / t) * (x - exact(x, t))
    assert allclose(y[1:], euler[1:])
    alone = ractd.heun_step(exact, x[:1], 0.5, 0.3)
    assert allclose(y[:1], alone)


def test_squared_error_asks_for_the_mean_and_pseudo_huber_for_the_median():
    data = tensor([[1.0]] * 3 + [[-1.0]] * 7)
    grid = torch.linspace(-1.5, 1.5, 301)
    for distance, best in ((ractd.squared, -0.4), (ractd.pseudo_huber, -1.0)):
        total = [distance(data, value).mean() for value in grid]
        assert grid[np.argmin(total)] == approx(best, abs=0.011)
    a = torch.full((1, 2, 3), 2.0)
    c = 0.00054 * math.sqrt(6)
    assert ractd.pseudo_huber(a, 0 * a) == approx(math.sqrt(24 + c**2) - c)


def test_the_edm_loss_is_least_at_the_exact_denoiser_and_dsms_is_the_same_of_a_prediction():
    torch.manual_seed(0)
    x0 = SD * randn(50_000, 4, 1)
    noise = randn(50_000, 4, 1)
    t = ractd.lognormal_levels(50_000)

    def loss(factor=1.0, shift=0.0):
        denoiser = lambda x, t: factor * exact(x, t) + shift
        return ractd.edm_loss(denoiser, x0, t, noise)

    best = loss()
    assert best < min(loss(0.95), loss(1.05), loss(shift=0.03))
    error = SD**2 * t**2 / (SD**2 + t**2)  # of the exact denoiser
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    assert best == approx((weight * error).mean().item(), rel=0.02)
    prediction = exact(x0 + expand(t) * noise, t)
    assert ractd.dsm_loss(prediction, x0, t) == best


def test_the_reward_model_hears_the_state_and_its_first_actions_and_v_the_state_alone():
    R = ractd.RewardModel(3, 2, actions=2, networks=3)
    state = randn(5, 3, requires_grad=True)
    plan = randn(5, 8, 2, requires_grad=True)
    assert R.V(state).shape == (5,)
    each = R.each(state, plan)
    assert each.shape == (3, 5)
    assert each.std(0).min() > 0
    mean = R(state, plan)
    assert allclose(each.sum(0) / 3, mean)
    mean.sum().backward()
    assert state.grad.abs().min() > 0
    assert plan.grad[:, :2].abs().min() > 0
    assert not plan.grad[:, 2:].any()


def test_the_reward_loss_is_minus_the_mean_return_and_has_no_slope_outside_the_box():
    plan = tensor([[[0.5, -2.0]], [[0.1, 0.2]]], requires_grad=True)
    R = lambda state, plan: 5 * plan.sum((1, 2))
    loss = ractd.reward_loss(R, None, plan)
    loss.backward()
    assert loss == 0.5
    assert plan.grad.tolist() == [[[-2.5, 0.0]], [[-2.5, -2.5]]]


def test_a_jump_to_where_it_starts_is_the_identity_and_a_jump_to_zero_is_the_network():
    net = network(student=True)
    x = randn(5, 8, 2)
    state = randn(5, 3)
    t = ractd.lognormal_levels(5)
    assert equal(student_jump(net, x, t, t, state), x)
    for share in (1e-30, 0.25):
        k = share * t
        expected = share * x + (1 - share) * denoise(net, x, t, state, k)
        assert allclose(student_jump(net, x, t, k, state), expected, atol=1e-6)


def test_jumps_are_drawn_with_the_documented_frequencies():
    torch.manual_seed(0)
    grid = karras_sigmas(5)
    jumps = ractd.draw_jumps(40_000, grid)
    i_t, i_u, i_k = ((level[:, None] == grid).nonzero()[:, 1] for level in jumps)
    assert equal(i_u, i_t + 1)
    found = torch.bincount(5 * i_t + i_k, minlength=25).view(5, 5) / 40_000
    expected = torch.zeros(5, 5)
    for t in range(4):
        expected[t, t + 1 :] = 1 / 4 / (4 - t)
    assert (found - expected).abs().max() < 0.01
    assert equal(found > 0, expected > 0)


def test_the_ctm_loss_of_the_exact_student_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)

    def loss_of(n):
        t, u, k = ractd.draw_jumps(5000, karras_sigmas(n))
        x_t = expand((SD**2 + t**2).sqrt()) * randn(5000, 4, 1)
        error = ractd.heun_step(exact, x_t, t, u) - exact_jump(x_t, t, u)
        error = exact_jump(error, u, torch.full_like(u, 0.02))

        def loss(factor=1.0, shift=0.0):
            jump = lambda x, t, k: factor * exact_jump(x, t, k) + shift
            both = (jump, exact_jump)
            return ractd.ctm_loss(*both, exact, x_t, t, u, k, distance=ractd.squared)

        assert loss() == approx(error.square().mean().item())
        return loss

    coarse = loss_of(20)
    fine = loss_of(40)
    assert 0 < fine() < coarse() / 8
    assert fine() < fine(1.1) < fine(1.3)
    assert fine() < min(fine(0.9), fine(shift=0.1))


def test_the_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target():
    x_t = randn(4, 8, 2)
    t = tensor([2.0, 1.0, 0.5, 9.0])
    u = tensor([1.0, 0.6, 0.3, 8.0])
    k = u * tensor([0.5, 1.0, 0.1, 1.0])
    smin = torch.full((4,), 0.02)
    x_hat = randn(4, 8, 2, requires_grad=True)
    factor = tensor(0.5, requires_grad=True)
    student = lambda x, t, k: x_hat
    frozen_jump = lambda x, t, k: x * expand(1 + k / t)  # two are not one
    denoiser = lambda x, t: factor * x
    loss = ractd.ctm_loss(student, frozen_jump, denoiser, x_t, t, u, k)
    loss.backward()
    assert factor.grad is None

    x_u = ractd.heun_step(denoiser, x_t, t, u).detach()
    target = frozen_jump(frozen_jump(x_u, u, k), k, smin)
    copied = x_hat.detach().requires_grad_()
    expected = ractd.pseudo_huber(frozen_jump(copied, k, smin), target).mean()
    expected.backward()
    assert loss.item() == approx(expected.item(), rel=1e-5)
    assert allclose(x_hat.grad, copied.grad)


def distil(teacher=1, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, networks)."""
    nets = SimpleNamespace(student=network(student=True), teacher=network(teacher))
    nets.target = frozen(network(2, student=True))
    torch.manual_seed(3)
    nets.R = frozen(ractd.RewardModel(3, 2, actions=2))
    nets.state = randn(16, 3)
    x0 = torch.rand(16, 8, 2) - 0.5
    config = Config(**{"grid_points": 10, "reward_weight": 1.0, **config})
    R = nets.R if config.reward_weight else None
    three = (nets.student, nets.target, nets.teacher)
    loss, info = ractd.distillation_loss(*three, R, nets.state, x0, config)
    return loss, info, nets


WEIGHTS = {"ctm_weight": 1.5, "dsm_weight": 3.0, "reward_weight": 2.0}


@pytest.mark.parametrize("alone", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"denoising": "paper"}, {"reward_input": "dsm"}])
def test_each_loss_alone_moves_every_student_parameter_and_nothing_else(alone, options):
    weights = dict.fromkeys(WEIGHTS, 0.0) | {"reward_weight": 1e-9, alone: 1.0}
    loss, _, nets = distil(**weights, **options)
    loss.backward()
    for p in nets.student.parameters():
        assert p.grad.abs().max() > 0
    for net in (nets.teacher, nets.target, nets.R):  # the teacher is not even frozen here
        assert all(p.grad is None for p in net.parameters())


def test_the_total_is_eq_9_and_no_loss_depends_on_anothers_weight_but_ctm_on_the_teacher():
    _, info, _ = distil()
    assert info["ctm"] != distil(teacher=5)[1]["ctm"]
    for off in WEIGHTS:
        weights = WEIGHTS | {off: 0.0}
        loss, others, _ = distil(**weights)
        ctm, dsm, reward = weights.values()
        total = ctm * others["ctm"] + dsm * others["dsm"]
        total = total - reward * others.get("R", 0)
        assert loss.item() == approx(total.item(), rel=1e-5)
        for name, value in others.items():
            assert value == approx(info[name].item(), rel=1e-4)


@pytest.mark.parametrize("denoising", ["mean", "paper"])
@pytest.mark.parametrize("reward_input", ["plan", "dsm"])
def test_dsm_and_the_reward_see_what_they_are_told_to(denoising, reward_input, monkeypatch):
    calls = record(monkeypatch, "denoise")
    dsm_calls = record(monkeypatch, "dsm_loss")
    reward_calls = record(monkeypatch, "reward_loss")
    _, _, nets = distil(denoising=denoising, reward_input=reward_input)
    _, dsm, *one_call = [args[1:] for args in calls if args[0] is nets.student]
    ((prediction, _, level, *distance),) = dsm_calls
    ((_, _, plan),) = reward_calls
    x_t, t, state, k = dsm
    assert equal(level, t)
    assert state is nets.state
    if denoising == "paper":
        assert (k == 0.02).all()
        assert distance == [ractd.pseudo_huber]
        expected = student_jump(nets.student, x_t, t, k, state)
    else:
        assert equal(k, t)
        assert distance == []
        expected = denoise(nets.student, x_t, t, state, t)
    assert allclose(prediction, expected)
    if reward_input == "dsm":
        assert plan is prediction
        assert not one_call
        return
    ((x_T, top, _, zero),) = one_call
    assert (top, zero) == (80, 0.02)
    assert x_T.std() == approx(0.25 * 80, rel=0.2)  # where the policy acts
    assert allclose(plan, student_jump(nets.student, x_T, 80.0, 0.02, state))


@pytest.mark.parametrize("levels", [[80.0], [80.0, 12.015, 0.885]])
def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54(levels):
    calls = []

    def jump(x, t, k):
        calls.append((x.item(), t, k))
        return 0 * x

    x_T = tensor(5.0)
    ractd.student_sample(jump, x_T, karras_sigmas(80), len(levels), torch.ones_like)
    starts, ts, ks = zip(*calls, strict=True)
    assert ts == approx(levels, rel=1e-3)
    assert set(ks) == {0.02}
    noises = [math.sqrt(t**2 - 0.02**2) for t in ts[1:]]
    assert starts == approx([5.0, *noises])


def test_the_average_follows_the_network_as_its_decay_says():
    net = nn.Linear(2, 1)
    average = frozen(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    old = average.weight.clone()

    loss_fn = lambda net, average: (net.weight.sum(), {"extra": tensor(3.0)})
    info = ractd.train_step(net, average, optimizer, loss_fn, decay=0.75)
    assert info["extra"] == 3
    assert allclose(average.weight, 0.75 * old + 0.25 * net.weight)


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_v_is_the_log_of_the_mean_exponential(scale):
    """Of R ~ N(1, 0.5^2): 1 + scale 0.5^2 / 2, nearly the mean for a small scale."""
    torch.manual_seed(0)
    R = 1 + 0.5 * randn(400_000).double()
    best = 1 + scale * 0.5**2 / 2

    def slope(value):
        value = tensor(value, dtype=torch.float64, requires_grad=True)
        ractd.value_loss(R, value, scale).backward()
        return value.grad.item()

    assert abs(slope(best)) < 0.005
    assert slope(best - 0.1) < -0.05
    assert slope(best + 0.1) > 0.05
    # far off V still rises, and not faster for it
    assert slope(-1000.0) == approx(slope(-2000.0))
    assert -1e6 < slope(-1000.0) < 0


def test_gaussian_plans_weighted_by_a_linear_reward_are_shifted_and_as_wide_as_before():
    """N(0, SD^2) exp(scale r x) is N(scale r SD^2, SD^2)."""
    torch.manual_seed(0)
    x = SD * randn(200_000)
    slope = 2.0
    scale = 1.5
    V = scale * slope**2 * SD**2 / 2
    weights = ractd.advantage_weight(slope * x, V, scale)
    assert weights.mean() == approx(1, rel=0.01)
    drawn = x[torch.multinomial(weights, 200_000, replacement=True)]
    assert drawn.mean() == approx(scale * slope * SD**2, abs=0.005)
    assert drawn.std() == approx(SD, rel=0.02)
    assert ractd.advantage_weight(tensor(9.0), 0) == approx(math.exp(5))


@pytest.mark.parametrize("denoising, distance", [("mean", "squared"), ("paper", "pseudo_huber")])
def test_the_teachers_distance_is_what_denoising_says(denoising, distance, monkeypatch):
    calls = record(monkeypatch, "edm_loss")
    config = Config(horizon=8, reward_teacher=False, denoising=denoising)
    teacher, loss_fn = ractd.teacher_stage(config, ractd.Batches(episodes(8), horizon=8))
    loss_fn(teacher, teacher)
    assert calls[0][-1] is getattr(ractd, distance)


def test_a_reward_teacher_and_its_student_learn_from_weighted_windows(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(8), horizon=8)
    R = frozen(ractd.RewardModel(2, 2, actions=4, networks=2))
    seen = []
    windows = batches.windows
    monkeypatch.setattr(batches, "windows", lambda *args: seen.append(args[1]) or windows(*args))
    for weighted in (True, False):
        config = Config(horizon=8, reward_teacher=weighted, trajectories=1)
        teacher, loss_fn = ractd.teacher_stage(config, batches, R)
        loss_fn(teacher, teacher)
        student, loss_fn = ractd.student_stage(config, batches, frozen(teacher), R)
        loss_fn(student, student)
    state, plan = batches.rows(torch.arange(len(batches.obs)), 4)
    advantage = R(state, plan) - R.V(state)
    weights = (40 * advantage).clamp(max=5).exp()
    for sums in seen[:3]:  # of the teacher, the trajectories and the student
        assert allclose(sums, weights.double().cumsum(0), rtol=1e-4)
    assert seen[3:] == [None] * 3
    batches.obs[0] = math.nan  # as from an R that a large learning rate has broken
    with pytest.raises(UserError, match="try a smaller"):
        ractd.advantage_sums(batches, R)


def test_windows_are_drawn_by_their_weights_also_from_millions_of_rows():
    """Where float32 and torch.multinomial fail: weights 0.3, in the second half 0.15."""
    torch.manual_seed(0)
    n = 2**24 + 999
    weights = lambda rows, _: torch.where(rows < n // 2, 0.3, 0.15)
    R = Mock(side_effect=lambda *args: weights(*args).log() / 40)
    R.V = lambda rows: 0 * rows
    batches = SimpleNamespace(obs=torch.zeros(1).expand(n), horizon=1)
    batches.rows = lambda rows, _: (rows, rows)
    sums = ractd.advantage_sums(batches, R)
    assert sums.diff().min() > 0.14  # no row is lost
    drawn, _ = ractd.Batches.windows(batches, 200_000, sums)
    # evenly among those of the same weight, up to the last row
    for first, share in ((n // 2, 1 / 3), (0.9 * n, 1 / 15)):
        assert (drawn >= first).double().mean() == approx(share, abs=0.005)


def exact_network(x, t, state, k=None):
    """The network F of the exact denoiser and, with a k, of the exact jump for N(0, SD^2)."""
    c_skip, c_out, c_in = ractd.precondition(t)
    x = x / expand(c_in)
    clean = exact(x, t)
    if k is not None:
        share = expand(k / t)
        clean = (exact_jump(x, t, k) - share * x) / (1 - share)
    return (clean - expand(c_skip) * x) / expand(c_out)


def test_trajectories_end_where_the_exact_jump_does_but_for_heuns_error():
    """From x_T, and from what a second call of the student starts from."""
    torch.manual_seed(0)
    x_T = 20 * randn(1500, 4, 1).double()
    state = randn(1500, 1)
    solve = ractd.teacher_trajectories
    sigmas = tensor([80.0, 9.0, 0.5, 0.02])
    x, t, end = solve(exact_network, state, x_T, sigmas, 0.25)
    truth = exact_jump(x, t, torch.full_like(t, 0.02))
    error = (end - truth).square().mean().sqrt()
    assert error < 0.1 * truth.std()
    assert equal(x[:1500], x_T)
    assert (t[:1500] == 80).all()
    assert t[1500:].tolist() == [9.0] * 512 + [0.5] * 512 + [9.0] * 476
    scale = expand((t[1500:] ** 2 - 0.02**2).sqrt())
    noise = (x[1500:] - end[:1500]) / scale
    assert noise.std() == approx(0.25, rel=0.05)
    both = torch.stack([noise.flatten(), x_T.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05

    # levels of the whole grid, also where it is fine
    sigmas = karras_sigmas(80)
    _, t, _ = solve(exact_network, state, x_T, sigmas, 0.25)
    assert equal(t[1500::512], sigmas[1:-1:26])

    # each in its own state, whatever the batch
    net = lambda x, t, state, k: exact_network(x, t, state) + expand(state[:, 0])
    _, _, end = solve(net, state, x_T, sigmas, 0.0)
    _, _, one = solve(net, state[[700]], x_T[[700]], sigmas, 0.0)
    assert allclose(end[700], one[0])


def test_the_trajectory_loss_is_the_distance_of_the_jump_to_0_from_the_end():
    torch.manual_seed(0)
    t = tensor([80.0, 40.0] * 25, dtype=torch.float64)
    x_t = 20 * randn(50, 4, 1).double()
    end = exact_jump(x_t, t, torch.full_like(t, 0.02))
    perfect = ractd.trajectory_loss(exact_network, None, x_t, t, end)
    assert perfect == approx(0, abs=1e-9)
    shift = tensor(0.3, requires_grad=True)
    net = lambda *args: exact_network(*args) + 2 * shift  # c_out is nearly 1/2 there
    loss = ractd.trajectory_loss(net, None, x_t, t, end)
    assert loss.item() == approx(0.3 * math.sqrt(4), rel=0.02)
    loss.backward()
    assert shift.grad == approx(math.sqrt(4), rel=0.02)


def test_trajectories_start_where_the_policy_does_and_belong_to_the_ctm_loss(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(8), horizon=8)
    levels = torch.arange(120) + 0.5
    columns = [randn(120, 8, 2), levels, randn(120, 8, 2)]
    solve = Mock(return_value=columns)
    monkeypatch.setattr(ractd, "teacher_trajectories", solve)
    calls = record(monkeypatch, "trajectory_loss")
    how = {"horizon": 8, "reward_teacher": False, "temperature": 0.5, "student_steps": 5}
    config = Config(**how, trajectories=12, ctm_weight=2.0, dsm_weight=0.0)
    teacher = ractd.make_network("teacher", config, batches.dims)
    student, loss_fn = ractd.student_stage(config, batches, teacher)
    loss, info = loss_fn(student, student)
    total = 2 * (info["ctm"] + info["path"])
    assert loss.item() == approx(total.item(), rel=1e-5)

    solver, states, x_T, sigmas, scale = solve.call_args.args
    assert solver is teacher
    assert len(states) == len(x_T) == 60
    assert x_T.std() == approx(40, rel=0.1)
    assert equal(sigmas, karras_sigmas(20))
    assert scale == 0.5

    ((net, state, *drawn),) = calls
    assert net is student
    rows = drawn[1].long()
    assert rows[:8].max() < 60 <= rows[8:].min()
    assert len(rows.unique()) > 6
    assert equal(state, states[rows % 60])
    for column, x in zip(columns, drawn, strict=True):
        assert equal(column[rows], x)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Figure 3 in miniature: 30 % of the plans lie near +0.6, return 1; 70 % near -0.6, return -1.

    Equal modes could not tell a mean from a median or a collapse. -> R, a teacher and a reward
    teacher, and a function that trains a student and samples by one and by two calls.
    """
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    rng = np.random.default_rng(0)
    mode = np.where(rng.random(2048) < 0.3, 1.0, -1.0)
    actions = 0.6 * mode + 0.1 * rng.normal(size=2048)
    ones = np.ones(2048)
    columns = [ones[:, None], actions[:, None], mode, ones, 0 * ones]
    batches = ractd.Batches(ractd.Dataset("toy", "file", columns), horizon=4)

    def train(stage, *models, steps=400, lr=1e-3, target_decay=None, **config):
        torch.manual_seed(0)
        path.unlink(missing_ok=True)
        config = Config(**{"temperature": 1.0, "student_batch": 128, **config})
        with pytest.MonkeyPatch.context() as patch:
            size = {"channels": (32,), "kernel": 1, "patch": 4, "blocks": 1}
            patch.setitem(ractd.NETWORKS, "small", size)
            patch.setattr(ractd, "TRAJECTORIES", 2048)
            net, loss_fn = ractd.STAGES[stage](config, batches, *models)
        ractd.fit(stage, net, loss_fn, path, {}, steps, lr, target_decay=target_decay)
        net.load_state_dict(torch.load(path)["ema"])
        return frozen(net)

    def student(*models, **config):
        net = train("student", *models, steps=200, lr=2e-3, target_decay=0.9, **config)
        jump = lambda x, t, k: student_jump(net, x, t, k, torch.zeros(len(x), 1))
        x_T = 80 * randn(1000, 4, 1)
        return [ractd.student_sample(jump, x_T, karras_sigmas(20), calls) for calls in (1, 2)]

    R = train("reward", steps=200)
    plain = train("teacher", reward_teacher=False)
    return SimpleNamespace(R=R, plain=plain, good=train("teacher", R), student=student)


def modes(x):
    """Shares of plans in the good mode and between the two, mean and deviation."""
    mean = x.mean((1, 2))
    good = (mean > 0.4).float().mean()
    between = (mean.abs() < 0.4).float().mean()
    return good, between, x.mean(), x.std()


def of_teacher(net):
    denoiser = lambda x, t: denoise(net, x, t, torch.zeros(1000, 1))
    return ractd.heun_sample(denoiser, 80 * randn(1000, 4, 1), karras_sigmas(20))


def test_a_teacher_and_ctd_keep_two_unequal_modes(toy):
    ctd = toy.student(toy.plain, reward_teacher=False)
    for x in (of_teacher(toy.plain), *ctd):
        good, between, _, _ = modes(x)
        assert 0.15 < good < 0.45
        assert between < 0.15


def test_a_reward_teacher_and_ractd_move_to_the_good_mode(toy):
    students = toy.student(toy.good, toy.R, reward_weight=1.0)
    for x in (of_teacher(toy.good), *students):
        good, between, mean, deviation = modes(x)
        assert good > 0.95
        assert between < 0.05
        assert 0.5 < mean < 0.85  # where the data are
        assert deviation < 0.25


@pytest.mark.parametrize(
    "reward_input, weight, trajectories",
    [("plan", 8.0, 128), ("dsm", 32.0, 0)],
)
def test_eq_8_alone_chooses_the_good_mode_of_a_plain_teacher(
    toy, reward_input, weight, trajectories
):
    """R sees all four actions of these plans, and its slope ends at the box.

    Where it acts on DSM's prediction, trajectories would hold the one-call plan to the teacher's.
    """
    how = {"reward_input": reward_input, "reward_weight": weight, "trajectories": trajectories}
    one_call, _ = toy.student(toy.plain, toy.R, reward_teacher=False, **how)
    good, between, mean, _ = modes(one_call)
    assert good > 0.9
    assert between < 0.1
    assert 0.5 < mean < 1


# ---- data: windows, simulators, Minari, D4RL's files ---------------------------------------------


def episodes(horizon):
    """Random episodes, one of `horizon` rows, one of 1; observations and actions: row, episode."""
    rng = np.random.default_rng(horizon)
    others = rng.integers(1, 3 * horizon, 8)
    lengths = np.array([horizon, 1, horizon + 1, 130, *others])
    n = lengths.sum()
    at_end = np.isin(np.arange(n), lengths.cumsum() - 1)
    fell = at_end & (rng.random(n) < 0.5)
    episode = np.repeat(np.arange(12), lengths)
    rows = np.stack([np.arange(n), episode], axis=1)
    rewards = rng.normal(size=n)
    return ractd.Dataset("d", "file", [rows, rows, rewards, fell, at_end & ~fell])


@pytest.mark.parametrize("horizon", [1, 16])
def test_every_row_starts_a_window_with_the_last_action_repeated_to_the_episodes_end(horizon):
    torch.manual_seed(0)
    data = episodes(horizon)
    n = len(data.rewards)
    ends = np.repeat(data.ends, data.ends - data.begins + 1)
    windows = np.arange(n)[:, None] + np.arange(horizon)
    batches = ractd.Batches(data, horizon)
    assert batches.padded == (windows[:, -1] > ends).sum()
    tables = batches.normalizer
    obs = ractd.decode(batches.obs, tables["obs"])
    assert np.allclose(obs, data.observations, atol=1e-3)
    expected = batches.actions[np.minimum(windows, ends[:, None])]

    def rows_of(state):
        rows = (state[:, :1] == batches.obs[:, 0]).nonzero()[:, 1]
        assert len(rows.unique()) == n
        return rows

    state, plan = batches.windows(5000)
    assert equal(plan, expected[rows_of(state)])
    state, plan, go = batches.transitions(5000, min(horizon, 3))
    rows = rows_of(state)
    assert equal(plan, expected[rows, :3])
    truth = ractd.returns_to_go(data.rewards, data.begins, data.ends, data.terminated)
    go = ractd.decode(go[:, None], tables["return"])[:, 0]
    assert np.allclose(go, truth[rows], atol=1e-3)


def test_returns_to_go_equal_brute_force():
    data = episodes(16)
    spans = (data.begins, data.ends, data.terminated)
    go = ractd.returns_to_go(data.rewards, *spans, gamma=0.9)
    assert set(data.terminated) == {True, False}
    for begin, end, fell in zip(*spans, strict=True):
        rewards = data.rewards[begin : end + 1].astype(float)
        tail = 0.0 if fell else rewards[-100:].mean() / (1 - 0.9)
        for i in range(len(rewards)):
            expected = sum(0.9**j * x for j, x in enumerate([*rewards[i:], tail]))
            assert go[begin + i] == approx(expected)


def test_the_normaliser_maps_to_the_box_and_back_and_never_far_out_of_it():
    """A column constant at its own magnitude, a sensor at rest, is neither heard nor driven."""
    above = np.nextafter(np.float32(0.3), np.float32(1))
    rows = [[1, 0.002, 0.3, -3e-9], [3, 0.002, above, 0], [2, 0.002, 0.3, 7e-9]]
    x = tensor(rows)
    table = ractd.fit_range(x)
    y = ractd.encode(x, table)
    assert y.amin(0).tolist() == approx([-1, 0, 0, -1])
    assert y.amax(0).tolist() == approx([1, 0, 0, 1])
    assert allclose(ractd.decode(y, table), x, rtol=1e-5, atol=0)
    far = ractd.encode(x + 1000, table)
    assert far.amax(0).tolist() == [3, 0, 0, 3]
    driven = ractd.decode(torch.ones(4), table)
    assert equal(driven[1:3], x[0, 1:3])


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
FILE = {"source": "file", "longest": 5}


def room(name, actions=BOX, observations=BOX, steps=5, data=FILE):
    """The simulator of a Room of so many steps."""
    spaces = {"actions": actions, "observations": observations}
    gymnasium.register(name, Room, max_episode_steps=steps, kwargs=spaces)
    return ractd.simulator(name, data)


def test_actions_outside_the_box_are_clipped_and_counted(capsys):
    run = SimpleNamespace(env=ENV, config=Config(horizon=8), device="cpu")
    rows = logged()
    run.data = write("inside.hdf5", rows)
    ractd.load_data(run)
    assert "clipped" not in capsys.readouterr().out
    rows["actions"][:20, 1] = 1.5
    rows["actions"][-6] = -1e6
    run.data = write("outside.hdf5", rows)
    batches, meta = ractd.load_data(run)
    assert "15.79% of the actions leave" in capsys.readouterr().out  # 21 of 133
    assert meta["box"].tolist() == [[-1] * 3, [1] * 3]
    learnt = ractd.decode(batches.actions, batches.normalizer["action"])
    assert np.allclose(learnt, rows["actions"].clip(-1, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["actions", "observations"])
def test_spaces_that_are_no_vectors_are_refused(name):
    with pytest.raises(UserError, match="not both vectors"):
        room("Discrete-v0", **{name: Discrete(2)})


@pytest.mark.parametrize("longest, limit", [(7, 1000), (1500, 1500)])
def test_without_a_time_limit_one_is_said_and_what_acts_stays_in_the_box(longest, limit, capsys):
    make_env = room("Endless-v0", steps=None, data=FILE | {"longest": longest})
    sentence = f"Endless-v0 has no time limit: an episode ends after {limit:,}"
    assert sentence in capsys.readouterr().out
    act = lambda observations, _: np.full((len(observations), 8, 2), [-9.0, 0.25])
    result = ractd.evaluate(act, make_env, 2)
    assert result["lengths"] == [limit] * 2
    assert result["returns"] == [(-0.5 + 0.25) * limit] * 2


def test_a_goal_a_scalar_and_a_matrix_become_one_vector():
    """In the order of the keys, without what is achieved."""
    parts = {"b": Box(-1, 1, (2, 2)), "achieved_goal": BOX, "a": Dict({"x": Box(-1, 1, ())})}
    space = Dict(parts)
    observation, _ = room("Goal-v0", observations=space)().reset(seed=0)
    space.seed(0)
    row = space.sample()
    assert observation.tolist() == [row["a"]["x"], *row["b"].flatten()]


TASKS = {  # D4RL's returns of a random policy and an expert; sigma for each of ractd.KINDS
    "hopper": ("Hopper-v4", [-20.272305, 3234.3], (1.0, 1.0, 0.5)),
    "walker2d": ("Walker2d-v4", [1.629008, 4592.3], (0.4, 0.5, 0.2)),
    "halfcheetah": ("HalfCheetah-v4", [-280.178953, 12135.0], (0.5, 1.0, 0.0)),
}


@pytest.mark.parametrize("task", TASKS)
def test_only_d4rls_names_mean_its_tasks_and_have_its_reference_points(task):
    gym_id, returns, _ = TASKS[task]
    assert ractd.simulator(f"{task}-medium", FILE)().spec.id == gym_id
    scores = ractd.normalized_score(f"{task}-medium", np.array(returns))
    assert scores.tolist() == approx([0, 100])
    assert isinstance(room(f"{task}-v3")().unwrapped, Room)
    assert math.isnan(ractd.normalized_score(f"{task}-v3", 1.0))


def make_minari(rows, env="Hopper-v4", **how):
    """A Minari set of rows in D4RL's layout."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    buffers = []
    for begin, end in pairwise([0, *(ends + 1), 133]):
        observations, *columns = (x[begin:end] for x in rows.values())
        observations = np.pad(observations, [(0, 1), (0, 0)])
        buffers.append(EpisodeBuffer(None, None, None, observations, *columns))
    with warnings.catch_warnings(action="ignore"):
        return minari.create_dataset_from_buffers("test/rows-v0", buffers, env=env, **how)


def test_a_minari_dataset_is_the_same_data_and_acts_in_its_environment(capsys):
    rows = logged()
    short = gymnasium.make("Hopper-v4", max_episode_steps=7)
    make_minari(rows, eval_env=short, ref_min_score=0.0, ref_max_score=4.0)
    for source in (write("a.hdf5", rows), "minari:test/rows-v0"):
        data = ractd.load_dataset(ENV, source)
        assert data.ends.tolist() == [39, 47, 52, 112, 132]
        # unfinished: a time limit
        assert data.terminated.tolist() == [True, False, True, False, False]
        for key in ("observations", "actions", "rewards"):
            assert np.array_equal(getattr(data, key), rows[key])

    assert ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]]) == 0
    distilled = metrics("runs/test-rows-v0")
    assert distilled["lengths"] == [7] * 3
    assert distilled["score_mean"] == approx(25 * distilled["return_mean"])
    assert cli("evaluate", *ACT, env="test/rows-v0") == 0
    assert metrics("runs/test-rows-v0")["returns"] == distilled["returns"]
    assert "test/rows-v0 on test/rows-v0 (minari, not D4RL's)" in capsys.readouterr().out


def test_a_minari_set_that_names_no_environment_acts_in_that_of_the_command_line(capsys):
    spaces = gymnasium.make("Hopper-v4")
    how = {"observation_space": spaces.observation_space, "action_space": spaces.action_space}
    make_minari(logged(), env=None, **how)
    data = ractd.load_dataset(ENV, "minari:test/rows-v0").summary()
    assert ractd.simulator("hopper-medium", data)().spec.id == "Hopper-v4"
    code = ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]])
    refused(capsys, code, "test/rows-v0 cannot be made")


def test_the_entry_point_that_a_minari_set_names_is_not_called(monkeypatch):
    stored = make_minari(logged())
    path = Path(stored.storage.data_path) / "metadata.json"
    text = path.read_text()
    path.write_text(text.replace("gymnasium.envs.mujoco.hopper_v4:HopperEnv", "os:system"))
    system = Mock()
    monkeypatch.setattr(os, "system", system)
    data = ractd.load_dataset(ENV, "minari:test/rows-v0")
    env = ractd.simulator(ENV, data.summary())()
    assert env.spec.entry_point == "gymnasium.envs.mujoco.hopper_v4:HopperEnv"
    assert not system.called


CACHE = Path("D4RL_DATASET_DIR/hopper_medium_replay-v2.hdf5")


@pytest.fixture
def server(monkeypatch):
    """A web server on the loopback for a tiny "published" file; .mode says how it behaves."""
    content = Path(write("published.hdf5", logged())).read_bytes()
    state = SimpleNamespace(mode="good", content=content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.mode == "silent":
                time.sleep(2)
            found = self.path == f"/gym_mujoco_v2/{CACHE.name}" and state.mode != "404"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if state.mode == "good" else content[:2000])

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(ractd, "D4RL_URL", f"http://127.0.0.1:{web.server_port}/")
    original = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: original(url, timeout=0.5))
    yield state
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("known", [True, False])
def test_d4rls_file_is_downloaded_once_and_its_version_said(server, known, monkeypatch, capsys):
    sha256 = hashlib.sha256(server.content).hexdigest()
    beginnings = f"01234567 {sha256[:8]}" if known else "01234567"
    monkeypatch.setattr(ractd, "D4RL_VERSIONS", {"other": "89abcdef", "current": beginnings})
    expected = "D4RL, current version" if known else f"D4RL, version {sha256[:8]}"
    assert cli("data") == 0
    assert CACHE.read_bytes() == server.content
    server.mode = "404"  # a second download would fail
    assert cli("data") == 0
    text = capsys.readouterr().out
    assert text.count("downloading") == 1
    assert text.count(f"data: {CACHE.name} ({expected})") == 2
    assert text.count(f"does not know: SHA-256 {sha256}") == (0 if known else 2)


FAILURES = {"cut off": "cut off after 2,000 of", "silent": "timed out", "404": "404"}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failed_download_is_an_error_and_no_reason_for_other_data(server, mode, capsys):
    server.mode = mode
    refused(capsys, cli("data"), "cannot be downloaded", FAILURES[mode], "--data FILE")
    assert not list(CACHE.parent.iterdir())


def test_without_a_network_one_task_has_data_and_the_others_name_ways_out(monkeypatch, capsys):
    assert cli("data") == 0
    text = capsys.readouterr().out
    for words in ("cannot be downloaded", "200,000 transitions", "bundled, not D4RL's"):
        assert words in text
    ways_out = ["put the file", "--data FILE", "python -m reproduce.collect --env"]
    refused(capsys, cli("data", env="walker2d-medium"), *ways_out)
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", "~")  # which leaves it as it is, as for a user without one
    refused(capsys, cli("data"), "no home folder", "D4RL_DATASET_DIR", "--data")


def test_a_real_file_of_d4rl_is_read_whole_with_its_time_limits():
    """door-human-v0: 25 demonstrations, each cut at a time limit of 200 steps and then ended."""
    data = ractd.load_dataset("door-human")
    assert data.source == "D4RL, current version"
    assert data.observations.shape == (6729, 39)
    lengths = data.ends - data.begins + 1
    assert lengths[~data.terminated].tolist() == [200] * 25
    assert data.terminated.sum() == 25
    assert data.summary()["return_mean"] == approx(397.83, abs=0.01)
    references = np.array([-56.512833, 2880.5693])
    assert list(ractd.normalized_score("door-human", references)) == approx([0, 100])


def test_a_million_transitions_load_in_seconds_and_in_little_memory():
    code = """import numpy as np, resource, time, ractd
n = 1_000_000
ends = np.arange(n) % 999 == 998
columns = [np.ones((n, 17), "f4"), np.ones((n, 6), "f4"), np.ones(n, "f4"), ends, ends]
ractd.Batches(ractd.Dataset("million", "file", columns))
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""
    done = python("-c", code, cwd=SCRIPT.parent)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 30
    assert gigabytes < 1.5


def test_the_papers_presets_have_its_losses_and_its_sigma_and_a_flag_beats_them(monkeypatch):
    losses = {"denoising": "paper", "reward_teacher": False, "trajectories": 0}
    losses |= {"reward_actions": 1, "reward_networks": 1, "temperature": 1.0}
    paper = losses | {"network": "paper", "grid_points": 80}
    paper |= {"teacher_steps": 392_000, "teacher_batch": 1024, "teacher_lr": 1e-4}
    paper |= {"reward_steps": 314_000, "reward_batch": 64, "reward_lr": 2e-4}
    paper |= {"student_steps": 33_500, "student_batch": 4800, "student_lr": 1e-4}
    train = Mock()
    monkeypatch.setattr(ractd, "train", train)

    def config(*flags, env=ENV):
        assert cli("distill", *flags, env=env) == 0
        return train.call_args.args[0].config

    assert config() == Config()
    assert config("--preset=paper") == Config(**paper, reward_weight=1.0)
    for task, (_, _, sigmas) in TASKS.items():
        for kind, sigma in zip(ractd.KINDS, sigmas, strict=True):
            expected = Config(**losses, reward_weight=sigma)
            assert config("--preset=paper-losses", env=f"{task}-{kind}") == expected
    flags = ["--temperature=2", "--reward-teacher", "--reward-weight=3"]
    changes = {"temperature": 2.0, "reward_teacher": True, "reward_weight": 3.0}
    assert config("--preset=paper-losses", *flags) == Config(**losses | changes)


REFUSED = """\
    data --seed=1, reward --horizon=8, teacher --student-steps=5, distill --model=teacher,
    evaluate --horizon=8, evaluate --preset=paper, distill --horizn=8, distill --network=large,
    distill --horizon=10, distill --reward-actions=17, distill --gamma=nan, distill --nfe=x,
    distill --nfe=81, distill --seed=99999999999999999999, distill --device=cuda:99,
    distill --env=hoper-medium, data --env=, evaluate --out=rnu"""


@pytest.mark.parametrize("command_line", re.split(r",\s+", REFUSED))
def test_a_bad_or_ignored_flag_is_refused_by_name(command_line, capsys):
    command, flag = command_line.split()
    refused(capsys, cli(command, flag), flag.split("=")[0])
    assert not Path("runs").exists()


# ---- training and end to end ---------------------------------------------------------------------


def test_fit_warms_up_then_follows_half_a_cosine_and_averages_as_released(tmp_path, monkeypatch):
    rates = []
    decays = []

    def step(net, average, optimizer, loss_fn, decay):
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append(decay)
        return {"loss": tensor(0.0)}

    monkeypatch.setattr(ractd, "train_step", step)
    net = nn.Linear(1, 1)
    ractd.fit("teacher", net, None, tmp_path / "a.pt", {}, steps=80, lr=0.5)
    assert rates[:4] == approx([0.125, 0.25, 0.375, 0.5])  # 5 % of the steps
    cosine = [0.25 + 0.25 * math.cos(math.pi * n / 76) for n in range(76)]
    assert rates[4:] == approx(cosine)
    assert decays == approx([1 - (1 + n) ** -0.75 for n in range(80)])
    ractd.fit("student", net, None, tmp_path / "b.pt", {}, steps=3, lr=0.5, target_decay=0.7)
    assert decays[80:] == [0.7] * 3


def test_a_loss_that_is_not_finite_is_said_and_not_saved(out, give, monkeypatch, capsys):
    (out / "student.pt").unlink()
    nan = Mock(return_value=tensor(math.nan))
    record(monkeypatch, "train_step", 7, lambda: monkeypatch.setattr(ractd, "dsm_loss", nan))
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    code = give("distill", "--student-steps=100")  # a line every fifth step
    refused(capsys, code, "dsm is nan", "learning rate")
    assert torch.load(out / "student.pt")["step"] == 6


def test_end_to_end_leaves_every_promised_file_and_number(trained):
    found = metrics(trained.out)
    names = [path.name for path in trained.out.iterdir()]
    assert len(names) == 4 and {f"{stage}.pt" for stage in STAGES} < set(names)
    assert found["method"] == "RACTD"
    assert len(found["returns"]) == found["episodes"] == 3
    scores = ractd.normalized_score(ENV, np.array(found["returns"]))
    assert found["score_mean"] == approx(scores.mean())
    assert found["score_sem"] == approx(scores.std(ddof=1) / 3**0.5)
    log = torch.load(trained.out / "student.pt")["log"]
    assert [row["step"] for row in log] == [*range(1, STEPS + 1)]
    assert log[-1].keys() >= {"loss", "ctm", "dsm", "R", "path", "grad"}  # Eq. 9 whole
    assert "RACTD, 1 call(s)" in trained.text
    assert "not D4RL's" in trained.text


def test_a_finished_run_is_tidied_but_not_trained_again(out, give, trained, monkeypatch):
    """And what a process left that died long ago goes."""
    leftover = out / "teacher.pt.1.part"
    recent = out / "teacher.pt.2.part"
    for path in (leftover, recent):
        path.touch()
    os.utime(leftover, (0, time.time() - 4000))
    monkeypatch.setattr(ractd, "fit", None)
    assert give("distill", data=shutil.copy(trained.data, "renamed.hdf5")) == 0
    assert recent.exists() and not leftover.exists()


def test_the_papers_losses_train_and_act_end_to_end(give):
    assert give("distill", "--preset=paper-losses", out="new") == 0
    assert metrics("new")["method"] == "RACTD, plain teacher"
    log = torch.load("new/student.pt")["log"][-1].keys()
    assert log >= {"ctm", "dsm", "R"} and "path" not in log  # Eqs. 5 to 9, and nothing else
    assert give("evaluate", out="new") == 0  # acts as its preset meant it, into the same file
    assert metrics("new")["temperature"] == 1


def test_without_any_reward(give, trained):
    assert give("distill", "--no-reward-teacher", "--reward-weight=0", out="new") == 0
    assert metrics("new")["method"] == "CTD"
    assert not Path("new/reward.pt").exists()
    assert "R" not in torch.load("new/student.pt")["log"][-1]
    assert bits("new/teacher.pt") != bits(trained.out / "teacher.pt")


def loaded(folder, stage="student"):
    return ractd.load_checkpoint(folder / f"{stage}.pt", stage)


def generators():
    return [np.random.default_rng(seed) for seed in range(5)]


@pytest.mark.parametrize("stage, nfe", [("student", 1), ("student", 3), ("teacher", 1)])
def test_a_policy_is_the_plain_calls_with_the_averaged_weights(trained, stage, nfe):
    """A level and a generator for each row, the normaliser's units, the simulator's box."""
    checkpoint = loaded(trained.out, stage)
    del checkpoint["net"]
    checkpoint["box"] = tensor([[-0.5] * 3, [0.4] * 3])
    policy = ractd.Policy(checkpoint, nfe, teacher_points=5, temperature=0.5)
    tables = checkpoint["normalizer"]
    observations = np.random.default_rng(9).normal(size=(5, 11))  # float64
    state = ractd.encode(tensor(observations).float(), tables["obs"])
    rngs = generators()

    def noise(_=None):
        rows = [rng.standard_normal((8, 3), np.float32) for rng in rngs]
        return 0.5 * torch.from_numpy(np.stack(rows))

    many = lambda t: torch.full((5,), t)
    if stage == "student":
        jump = lambda x, t, k: student_jump(policy.net, x, many(t), many(k), state)
        x = ractd.student_sample(jump, 80 * noise(), karras_sigmas(6), nfe, noise)
    else:
        denoiser = lambda x, t: denoise(policy.net, x, many(t), state)
        x = ractd.heun_sample(denoiser, 80 * noise(), karras_sigmas(5))
    expected = ractd.decode(x.clamp(-1, 1), tables["action"]).clamp(-0.5, 0.4)
    plans = policy.act(observations, generators())
    assert plans.shape == (5, 8, 3)
    assert np.allclose(plans, expected, rtol=0, atol=1e-6)
    assert policy.calls == (nfe if stage == "student" else 7)
    with pytest.raises(UserError, match="shape"):
        policy.act(observations[:, :10], generators())


def test_a_policy_can_be_pickled_and_given_other_weights(trained):
    checkpoint = loaded(trained.out)
    policy = ractd.Policy(checkpoint)
    observations = np.ones((5, 11))
    plans = policy.act(observations, generators())
    other = pickle.loads(pickle.dumps(policy))
    assert np.array_equal(other.act(observations, generators()), plans)
    weights = {name: 1.1 * x for name, x in checkpoint["ema"].items()}
    other.net.load_state_dict(weights)
    expected = ractd.Policy(checkpoint | {"ema": weights}).act(observations, generators())
    assert np.array_equal(other.act(observations, generators()), expected)
    assert np.abs(expected - plans).max() > 0.01


def test_returns_are_those_of_episodes_played_one_by_one(trained):
    """In batches of 16, as others may round differently."""
    checkpoint = loaded(trained.out)
    act = ractd.Policy(checkpoint).act
    make_env = ractd.simulator(ENV, checkpoint["dataset"])
    result = ractd.evaluate(act, make_env, 3, first_seed=4)
    assert len(set(result["returns"])) == 3
    for seed, total, length in zip((4, 5, 6), *result.values(), strict=True):
        env = make_env()
        observation, _ = env.reset(seed=seed)
        noise = [np.random.default_rng(seed) for _ in range(16)]
        rewards = []
        ended = False
        while not ended:
            plans = act(np.stack([observation] * 16), noise)
            observation, reward, fell, late, _ = env.step(plans[0, 0])
            rewards.append(reward)
            ended = fell or late
        assert total == sum(rewards)
        assert length == len(rewards)


def test_two_different_evaluations_never_share_a_file_and_the_same_one_does(out, give):
    different = ["--temperature=1", "--temperature=1.0000001", "--nfe=2", "--first-seed=1"]
    different += ["--episodes=4", "--model=student", "--model=teacher"]
    for how in different:
        assert give("evaluate", how) == give("evaluate", how) == 0
    rewrite(out / "teacher.pt", ema=loaded(out, "teacher")["net"])  # another one in its place
    assert give("evaluate", "--model=teacher") == 0
    methods = [json.loads(path.read_text())["method"] for path in out.glob("score_*.json")]
    assert sorted(methods) == ["RACTD"] * 6 + ["reward teacher"] * 2


@pytest.mark.parametrize(
    "name, stage, reward_teacher, weight",
    [
        ("RACTD", "student", True, 1.0),
        ("RACTD, plain teacher", "student", False, 1.0),
        ("CTD", "student", False, 0.0),
        ("CTD of a reward teacher", "student", True, 0.0),
        ("reward teacher", "teacher", True, 1.0),
        ("teacher", "teacher", False, 0.0),
    ],
)
def test_what_acts_has_the_names_of_the_papers_table(name, stage, reward_teacher, weight):
    config = {"reward_teacher": reward_teacher, "reward_weight": weight}
    assert ractd.method_name({"stage": stage, "config": config}) == name


def test_in_a_real_run_all_but_the_student_is_frozen_and_the_averages_are_used(
    out, give, monkeypatch
):
    (out / "student.pt").unlink()
    calls = record(monkeypatch, "distillation_loss")

    def is_frozen(net):
        return not net.training and not any(p.requires_grad for p in net.parameters())

    def holds(net, stage):
        average = torch.load(out / f"{stage}.pt")["ema"]
        same = all(equal(x, average[name]) for name, x in net.state_dict().items())
        return same and is_frozen(net)

    assert give("distill", "--episodes=0") == 0
    student, target, teacher, reward_model = calls[0][:4]
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert is_frozen(target)
    assert holds(teacher, "teacher")
    assert holds(reward_model, "reward")


def test_the_same_seed_gives_the_same_weights_in_a_worker_thread_too(give, trained):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(give, "reward", out="same").result() == 0
    assert give("reward", "--seed=1", out="other") == 0
    expected = bits(trained.out / "reward.pt")
    assert bits("same/reward.pt") == expected != bits("other/reward.pt")


def test_a_killed_run_is_half_trained_and_goes_on_to_the_same_bits(out, give, trained, capsys):
    path = out / "student.pt"
    path.unlink()
    where = [f"--env={ENV}", f"--data={trained.data}", f"--out={out}"]
    code = """import os, signal, sys, ractd
step = ractd.train_step
ractd.SAVE_EVERY = 0
def killed(*args):
    if os.path.exists(sys.argv[-1]) and ractd.torch.load(sys.argv[-1])["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
ractd.train_step = killed
ractd.main(sys.argv[1:-1])"""
    done = python("-c", code, "distill", *where, *FLAGS["distill"], path, cwd=SCRIPT.parent)
    assert done.returncode == -signal.SIGKILL
    assert give("evaluate") == 0
    assert f"half trained: 7 of {STEPS} steps" in capsys.readouterr().out
    assert give("distill") == 0
    assert bits(path) == bits(trained.out / "student.pt")
    assert len(torch.load(path)["log"]) == STEPS


@pytest.mark.parametrize("stage, number", [("teacher", signal.SIGINT), ("student", signal.SIGTERM)])
def test_ctrl_c_and_sigterm_save(stage, number, trained, out, give, monkeypatch, capsys):
    path = out / f"{stage}.pt"
    path.unlink()
    handler = signal.getsignal(number)
    press_twice = lambda: [signal.raise_signal(number) for _ in range(2)]
    record(monkeypatch, "mean_of", 7, press_twice)  # while a line is printed
    assert give("distill") == 128 + number
    assert "goes on" in capsys.readouterr().out
    assert torch.load(path)["step"] == 7
    assert signal.getsignal(number) is handler
    assert give("distill") == 0
    assert bits(path) == bits(trained.out / path.name)


def test_two_runs_of_one_command_in_one_folder_both_finish_with_the_same_bits(trained):
    where = [f"--env={ENV}", f"--data={trained.data}", "--out=both"]
    command = [sys.executable, SCRIPT, "distill", *where, *FLAGS["distill"]]
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    for stage in STAGES:
        assert bits(f"both/{stage}.pt") == bits(trained.out / f"{stage}.pt")
    assert not list(Path("both").glob("*.part"))


def test_a_full_disk_is_a_sentence_and_loses_nothing(out, give, trained, monkeypatch, capsys):
    """No file grows beyond 3 MB, from the fifth step on."""
    path = out / "teacher.pt"
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (3_000_000, limits[1])
    record(monkeypatch, "train_step", 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full))
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    try:
        code = give("teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code, "teacher.pt", "is the disk full?")
    assert torch.load(path)["step"] == 4
    assert not list(out.glob("*.part"))
    assert give("teacher") == 0
    assert bits(path) == bits(trained.out / "teacher.pt")


def test_a_score_is_printed_before_it_is_written(give, monkeypatch, capsys):
    monkeypatch.setattr(ractd, "make_folder", lambda out: None)
    monkeypatch.setattr(ractd.os, "replace", Mock(side_effect=OSError(28, "No space left")))
    assert give("evaluate") == 2
    assert "RACTD, 1 call(s)" in capsys.readouterr().out


def test_a_log_without_its_simulator_can_be_learnt_from_but_not_evaluated(give, capsys):
    give = functools.partial(give, env="no/such-v0", out="new")
    refused(capsys, give("distill"), "no/such-v0")
    assert not list(Path("new").iterdir())
    assert give("distill", "--episodes=0") == 0
    assert "no simulator" in capsys.readouterr().out
    assert not list(Path("new").glob("score*"))
    refused(capsys, give("evaluate"), "no/such-v0")


def test_names_that_the_terminal_cannot_print_are_escaped(trained, tmp_path, monkeypatch):
    data = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.hdf5"
    shutil.copy(trained.data, data)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = python(SCRIPT, "reward", b"--data=" + data, b"--out=run\xff", *REWARD)
    assert done.returncode == 0, done.stderr
    assert r"\udcff\xe9.hdf5" in done.stdout
    assert os.path.exists(b"run\xff/reward.pt")


# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

ZEROS = np.zeros(133)
LACKING = dict.fromkeys(ractd.Dataset.KEYS[1:], ZEROS)
BAD_FILES = {  # by what is said of them
    "lacks the arrays observations": LACKING | {"observations/agent": ZEROS},
    "it has actions, observations": LACKING | {"observations": h5py.ExternalLink("no", "/")},
    "episode_0, episode_1": {f"episode_{i}/actions": ZEROS for i in range(3000)},
    "observations has shape (133,)": logged() | {"observations": ZEROS},
    "timeouts has shape (9,)": logged() | {"timeouts": ZEROS[:9]},
    "rewards is NaN or infinite in row 7": logged() | {"rewards": [0] * 7 + [math.nan] * 126},
    "no episode ends": logged() | {"timeouts": ZEROS, "terminals": ZEROS},
}


@pytest.mark.parametrize("words", BAD_FILES)
def test_a_file_of_another_layout_or_with_bad_rows_is_refused(words, capsys):
    data = write("bad.hdf5", BAD_FILES[words])
    err = refused(capsys, cli("data", f"--data={data}"), "bad.hdf5", words)
    assert len(err) < 400


def test_a_file_that_cannot_be_read_is_refused(capsys):
    Path("junk.hdf5").write_bytes(b"junk")
    with h5py.File("petabytes.hdf5", "w") as f:
        for key in ractd.Dataset.KEYS:
            f.create_dataset(key, (10**15, 11), "f4", chunks=True)
    for name in ("junk.hdf5", "petabytes.hdf5"):
        refused(capsys, cli("data", f"--data={name}"), name, "cannot be read as HDF5")


def test_a_folder_that_cannot_be_written_is_refused_at_once(give, monkeypatch, capsys):
    monkeypatch.setattr(ractd, "load_dataset", None)
    denied = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(ractd, "open", denied, raising=False)
    refused(capsys, give("distill"), "Permission denied")


def test_what_does_not_fit_a_checkpoint_is_refused_and_listed(out, give, capsys):
    sentence = "temperature: 0.25 in the file, 1.0 asked"
    refused(capsys, give("distill", "--temperature=1"), sentence, "student.pt", "delete", "--out")
    sentence = f"env: {ENV} in the file, hopper-medium asked"
    for command in ("distill", "evaluate"):
        refused(capsys, give(command, env="hopper-medium"), sentence)
    rows = logged()
    rows["actions"][5] *= -1  # as many rows, the same returns and name
    refused(capsys, give("distill", data=write("log.hdf5", rows)), "data: ", "in the file")
    saved = loaded(out, "teacher")
    rewrite(out / "teacher.pt", ema={name: x + 1 for name, x in saved["ema"].items()})
    sentence = f"teacher: {ractd.weights_id(saved)} in the file"
    refused(capsys, give("distill"), sentence, "student.pt")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_missing_damaged_wrong_or_malicious_checkpoint_is_refused(out, give, capsys):
    path = out / "student.pt"
    good = torch.load(path)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    bad = [b"junk", flipped[:9999], flipped, (out / "teacher.pt").read_bytes()]
    for change in (None, {"ema": Malicious()}, {"format": 99}):
        torch.save(change and good | change, path)
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        for command in ("evaluate", "distill"):
            refused(capsys, give(command), str(path))
        assert path.read_bytes() == content
    assert not Path("executed").exists()
    torch.save(good | {"config": {"horizon": 256, "temperature": 0.01}}, path)
    refused(capsys, give("evaluate"), "another program")
    path.unlink()
    refused(capsys, give("evaluate"), "no trained student")


def test_a_good_checkpoint_that_cannot_be_read_is_never_to_be_deleted(give, monkeypatch, capsys):
    errors = {"torch.load": MemoryError, "pathlib.Path.read_bytes": PermissionError}
    for name, error in errors.items():
        monkeypatch.setattr(name, Mock(side_effect=error("no way")))
        assert give("evaluate") == 2
        err = capsys.readouterr().err
        assert "no way" in err
        assert "delete" not in err


def test_the_examples_in_the_readme_run(out):
    """All of its Python blocks, one after the other, on the tiny run."""
    text = (SCRIPT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    Path("examples.py").write_text("\n".join(blocks).replace(f"runs/{ENV}", str(out)))
    runpy.run_path("examples.py")
