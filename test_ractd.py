"""Tests of ractd.py in its own order, offline: python -m pytest -q test_ractd.py."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformAction
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
REWARD = ["--reward-batch=8", f"--reward-steps={STEPS}"]
TEACHER = [*REWARD, "--horizon=8", "--teacher-batch=8", f"--teacher-steps={STEPS}"]
STUDENT = ["--grid-points=6", "--student-batch=8", f"--student-steps={STEPS}"]
ACT = ["--episodes=3"]
FLAGS = {"reward": REWARD, "distill": [*TEACHER, *STUDENT, *ACT], "evaluate": ACT}


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """End to end, the program alone in a folder, from a file whose name cannot be printed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(SCRIPT, folder)
    data = write(folder / "lög.hdf5", logged())
    command = [sys.executable, "ractd.py", "distill", f"--env={ENV}", f"--data={data}"]
    command += FLAGS["distill"]
    how = {"cwd": folder, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    done = subprocess.run(command, **how, stdout=subprocess.PIPE, text=True, check=True)
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
    network = {"ema": saved["net"]}
    return ractd.weights_id(saved), ractd.weights_id(network), saved["step"]


def metrics(out):
    """Of the only score file in a folder."""
    (path,) = Path(out).glob("score_*.json")
    return json.loads(path.read_text())


def spy(monkeypatch, name):
    """A function of ractd as a Mock that notes its calls and passes them on."""
    mock = Mock(wraps=getattr(ractd, name))
    monkeypatch.setattr(ractd, name, mock)
    return mock


def at_step(monkeypatch, number, act):
    """Do something at the start of the `number`-th gradient step from now on."""
    step = spy(monkeypatch, "train_step")

    def first_act(*_):
        if step.call_count == number:
            act()
        return DEFAULT  # and then the step

    step.side_effect = first_act


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
    shapes = [(5, 16, 2), (5,), (5, 3), (5,)][: 3 + student]
    inputs = [torch.rand(shape, requires_grad=True) for shape in shapes]
    y = net(*inputs)
    assert y.shape == (5, 16, 2)
    y[0].square().sum().backward()
    for value in inputs:
        assert value.grad[0].any()
        assert not value.grad[1:].any()


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
    expected = denoise(teacher, x, 3.0, state)
    for k in (3.0, 1.5, 0.02):
        y = denoise(student, x, 3.0, state, k)
        assert allclose(y, expected, atol=1e-5)


SD = 0.3  # Gaussian data x0 ~ N(0, SD^2) have everything in closed form


def exact(x, t, sd=SD):
    return x * sd**2 / (expand(t) ** 2 + sd**2)


def exact_jump(x, t, k):
    variance = lambda level: expand(level) ** 2 + SD**2
    return x * (variance(k) / variance(t)) ** 0.5


def test_the_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root():
    grid = karras_sigmas(20)
    roots = np.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), 20)
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
    y = denoise(net, x, torch.full((20_000,), level), None)
    c_skip = 0.25 / ((level - 0.02) ** 2 + 0.25)
    c_out = 0.5 * (level - 0.02) / deviation
    assert allclose(y, c_skip * x + 7 * c_out, atol=1e-5)
    assert equal(y, x) == (level == 0.02)
    assert net.call_args.args[0].std() == approx(1, abs=0.02)


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
    scaled = lambda factor: lambda x, t: factor * exact(x, t)
    low, best, high = (ractd.edm_loss(scaled(f), x0, t, noise) for f in (0.95, 1, 1.05))
    assert best < min(low, high)
    error = SD**2 * t**2 / (SD**2 + t**2)  # of the exact denoiser
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    assert allclose(best, (weight * error).mean(), rtol=0.02)
    prediction = exact(x0 + expand(t) * noise, t)
    assert ractd.dsm_loss(prediction, x0, t) == best


def test_the_reward_model_is_a_mean_and_hears_the_state_and_the_first_actions():
    R = ractd.RewardModel(3, 2, actions=2, networks=3)
    state = randn(5, 3, requires_grad=True)
    plan = randn(5, 8, 2, requires_grad=True)
    mean = R(state, plan)
    assert allclose(mean, R.each(state, plan).sum(0) / 3)
    mean.sum().backward()
    assert state.grad.all()
    assert plan.grad[:, :2].all()
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
    i_t, i_u, i_k = (torch.searchsorted(-grid, -level) for level in jumps)
    assert equal(i_u, i_t + 1)
    found = torch.bincount(5 * i_t + i_k, minlength=25).view(5, 5) / 40_000
    expected = torch.zeros(5, 5)
    for t in range(4):
        expected[t, t + 1 :] = 1 / 4 / (4 - t)
    assert allclose(found, expected, atol=0.01)
    assert equal(found > 0, expected > 0)


def test_the_ctm_loss_of_the_exact_student_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)
    levels = ractd.draw_jumps(5000, karras_sigmas(40))
    t, u, _ = levels
    x_t = expand((SD**2 + t**2).sqrt()) * randn(5000, 4, 1)
    error = ractd.heun_step(exact, x_t, t, u) - exact_jump(x_t, t, u)

    def loss(factor=1.0, shift=0.0):
        jump = lambda x, t, k: factor * exact_jump(x, t, k) + shift
        functions = (jump, exact_jump, exact)
        return ractd.ctm_loss(*functions, x_t, *levels, distance=ractd.squared)

    assert allclose(loss(), exact_jump(error, u, 0.02).square().mean())
    assert loss() < min(loss(0.9), loss(shift=0.1))
    assert loss() < loss(1.1) < loss(1.3)


def test_the_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target():
    x_t = randn(4, 8, 2)
    t = tensor([2.0, 1.0, 0.5, 9.0])
    u = tensor([1.0, 0.6, 0.3, 8.0])
    k = u * tensor([0.5, 1.0, 0.1, 1.0])
    x_hat = randn(4, 8, 2, requires_grad=True)
    factor = tensor(0.5, requires_grad=True)
    student = lambda x, t, k: x_hat
    frozen_jump = lambda x, t, k: x * expand(1 + k / t)  # two are not one
    denoiser = lambda x, t: factor * x
    loss = ractd.ctm_loss(student, frozen_jump, denoiser, x_t, t, u, k)
    loss.backward()
    assert factor.grad is None

    x_u = ractd.heun_step(denoiser, x_t, t, u).detach()
    target = frozen_jump(frozen_jump(x_u, u, k), k, 0.02)
    copied = x_hat.detach().requires_grad_()
    expected = ractd.pseudo_huber(frozen_jump(copied, k, 0.02), target).mean()
    expected.backward()
    assert allclose(loss, expected)
    assert allclose(x_hat.grad, copied.grad)


def distil(teacher=1, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, networks)."""
    nets = SimpleNamespace(student=network(student=True), teacher=network(teacher))
    nets.target = frozen(network(2, student=True))
    torch.manual_seed(3)
    nets.R = frozen(ractd.RewardModel(3, 2, actions=2))
    nets.state = randn(16, 3)
    x0 = torch.rand(16, 8, 2) - 0.5
    config = Config(grid_points=10, **config)
    R = nets.R if config.reward_weight else None
    three = (nets.student, nets.target, nets.teacher)
    loss, info = ractd.distillation_loss(*three, R, nets.state, x0, config)
    return loss, info, nets


WEIGHTS = {"ctm_weight": 1.5, "dsm_weight": 3.0, "reward_weight": 2.0}


@pytest.mark.parametrize("alone", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"denoising": "paper"}, {"reward_input": "dsm"}])
def test_each_loss_alone_moves_every_student_parameter_and_nothing_else(alone, options):
    weights = dict.fromkeys(WEIGHTS, 0.0) | {alone: 1.0}
    loss, _, nets = distil(**weights, **options)
    loss.backward()
    for p in nets.student.parameters():
        assert p.grad.any()
    for net in (nets.teacher, nets.target, nets.R):  # the teacher is not even frozen here
        assert all(p.grad is None for p in net.parameters())


def test_the_total_is_eq_9_and_ctm_alone_depends_on_the_teacher():
    loss, info, _ = distil(**WEIGHTS)
    assert allclose(loss, 1.5 * info["ctm"] + 3 * info["dsm"] - 2 * info["R"])
    _, other, _ = distil(teacher=5, reward_weight=0.0)
    assert other.keys() == {"ctm", "dsm"}
    assert other["dsm"] == info["dsm"]
    assert other["ctm"] != info["ctm"]


@pytest.mark.parametrize("denoising, reward_input", [("mean", "plan"), ("paper", "dsm")])
def test_dsm_and_the_reward_see_what_they_are_told_to(denoising, reward_input, monkeypatch):
    denoised = spy(monkeypatch, "denoise")
    dsm = spy(monkeypatch, "dsm_loss")
    reward = spy(monkeypatch, "reward_loss")
    _, _, nets = distil(denoising=denoising, reward_input=reward_input)
    prediction, _, t, *distance = dsm.call_args.args
    _, state, plan = reward.call_args.args
    calls = [call.args for call in denoised.call_args_list if call.args[0] is nets.student]
    x_t = next(x for _, x, level, *_ in calls if level is t)
    if denoising == "paper":
        assert distance == [ractd.pseudo_huber]
        assert allclose(prediction, student_jump(nets.student, x_t, t, 0.02, state))
        assert plan is prediction
    else:
        assert distance == []
        assert allclose(prediction, denoise(nets.student, x_t, t, state, t))
        x_T = calls[-1][1]
        assert x_T.std() == approx(0.25 * 80, rel=0.2)  # where the policy acts
        assert allclose(plan, student_jump(nets.student, x_T, 80.0, 0.02, state))


@pytest.mark.parametrize("levels", [[80.0], [80.0, 12.015, 0.885]])
def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54(levels):
    jump = Mock(return_value=tensor(0.0))
    sigmas = karras_sigmas(80)
    ractd.student_sample(jump, tensor(5.0), sigmas, len(levels), torch.ones_like)
    calls = tensor([call.args for call in jump.call_args_list])
    starts, ts, ks = calls.T
    assert allclose(ts, tensor(levels), rtol=1e-3)
    assert (ks == 0.02).all()
    assert starts[0] == 5
    assert allclose(starts[1:], (ts[1:] ** 2 - 0.02**2).sqrt())


def test_the_average_follows_the_network_as_its_decay_says():
    net = nn.Linear(2, 1)
    average = frozen(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    old = average.weight.clone()
    loss_fn = lambda net, average: (net.weight.sum(), {})
    ractd.train_step(net, average, optimizer, loss_fn, decay=0.75)
    assert allclose(average.weight, 0.75 * old + 0.25 * net.weight)


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_v_is_the_log_of_the_mean_exponential(scale):
    """Of R ~ N(1, 0.5^2): 1 + scale 0.5^2 / 2, nearly the mean for a small scale."""
    torch.manual_seed(0)
    R = 1 + 0.5 * randn(400_000).double()
    best = 1 + scale * 0.5**2 / 2
    V = tensor([best - 0.1, best, best + 0.1, -1000, -2000]).double().requires_grad_()
    sum(ractd.value_loss(R, value, scale) for value in V).backward()
    below, at_best, above, far, farther = V.grad.tolist()
    assert abs(at_best) < 0.005
    assert below < -0.05
    assert above > 0.05
    assert -1e6 < far < 0  # rises still, and not faster for it
    assert far == approx(farther)


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


def test_the_teacher_and_its_student_learn_from_windows_that_R_weights(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(8), horizon=8)
    R = frozen(ractd.RewardModel(2, 2, actions=4, networks=2))
    windows = Mock(wraps=batches.windows)
    monkeypatch.setattr(batches, "windows", windows)
    config = Config(horizon=8, student_steps=1)
    teacher, loss_fn = ractd.teacher_stage(config, batches, R)
    loss_fn(teacher, teacher)
    student, loss_fn = ractd.student_stage(config, batches, frozen(teacher), R)
    loss_fn(student, student)
    state, plan = batches.rows(torch.arange(len(batches.obs)), 4)
    advantage = R(state, plan) - R.V(state)
    expected = (40 * advantage).clamp(max=5).exp().cumsum(0)
    assert windows.call_count == 3  # for the teacher, the trajectories and the student
    for call in windows.call_args_list:
        assert allclose(call.args[1].float(), expected, rtol=1e-3)
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
    """The network F of the exact denoiser, with a k of the exact jump, for N(state, SD^2)."""
    c_skip, c_out, c_in = map(expand, ractd.precondition(t))
    mean = expand(state[:, 0])
    x = x / c_in
    clean = mean + exact(x - mean, t)
    if k is not None:
        share = expand(k / t)
        clean = (mean + exact_jump(x - mean, t, k) - share * x) / (1 - share)
    return (clean - c_skip * x) / c_out


def test_trajectories_end_where_the_exact_jump_does_but_for_heuns_error():
    """From x_T, and from what a second call of the student starts from, at levels of its grid."""
    torch.manual_seed(0)
    x_T = 20 * randn(1500, 4, 1).double()
    state = randn(1500, 1)
    sigmas = karras_sigmas(80)
    x, t, end = ractd.teacher_trajectories(exact_network, state, x_T, sigmas, 0.25)
    mean = expand(torch.cat([state[:, 0]] * 2))
    truth = mean + exact_jump(x - mean, t, 0.02)
    error = (end - truth).square().mean().sqrt()
    assert error < 0.05 * SD
    assert equal(x[:1500], x_T)
    assert (t[:1500] == 80).all()
    assert equal(t[1500::512], sigmas[1:-1:26])
    scale = expand((t[1500:] ** 2 - 0.02**2).sqrt())
    noise = (x[1500:] - end[:1500]) / scale
    assert noise.std() == approx(0.25, rel=0.05)


def test_the_trajectory_loss_is_the_distance_of_the_jump_to_0_from_the_end():
    torch.manual_seed(0)
    t = tensor([80.0, 40.0] * 25, dtype=torch.float64)
    x_t = 20 * randn(50, 4, 1).double()
    state = torch.zeros(50, 1)
    end = exact_jump(x_t, t, 0.02)
    for shift in (0.0, 0.3):
        net = lambda *args, shift=shift: exact_network(*args) + 2 * shift  # c_out is nearly 1/2
        loss = ractd.trajectory_loss(net, state, x_t, t, end)
        assert loss.item() == approx(math.sqrt(4) * shift, rel=0.02, abs=1e-9)


def test_trajectories_start_where_the_policy_does_and_belong_to_the_ctm_loss(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(16))
    numbers = torch.arange(120) + 0.5
    column = randn(120, 16, 2)
    solve = Mock(return_value=[column, numbers, -column])
    monkeypatch.setattr(ractd, "teacher_trajectories", solve)
    path_loss = spy(monkeypatch, "trajectory_loss")
    config = Config(trajectories=12, student_steps=5, reward_teacher=False, ctm_weight=2.0)
    teacher = ractd.make_network("teacher", config, batches.dims)
    student, loss_fn = ractd.student_stage(config, batches, teacher)
    loss, info = loss_fn(student, student)
    assert allclose(loss, 2 * (info["ctm"] + info["path"]) + info["dsm"])
    _, states, x_T, sigmas, scale = solve.call_args.args
    assert len(states) == 60
    assert x_T.std() == approx(0.25 * 80, rel=0.1)
    assert equal(sigmas, karras_sigmas(20))
    assert scale == 0.25
    _, state, x_t, t, end = path_loss.call_args.args
    rows = t.long()
    assert rows[:8].max() < 60 <= rows[8:].min()
    assert equal(state, states[rows % 60])
    assert equal(x_t, column[rows])
    assert equal(end, -x_t)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Figure 3 in miniature: 30 % of the plans lie near +0.6, return 1; 70 % near -0.6, return -1.

    Equal modes could not tell a mean from a median or a collapse. -> a function that trains a
    student: plans of its teacher, plain or a reward teacher, by one call and by two.
    """
    path = tmp_path_factory.mktemp("toy") / "toy.pt"
    rng = np.random.default_rng(0)
    mode = np.where(rng.random(2048) < 0.3, 1.0, -1.0)
    actions = 0.6 * mode + 0.1 * rng.normal(size=2048)
    ones = np.ones(2048)
    columns = [ones[:, None], actions[:, None], mode, ones, 0 * ones]
    batches = ractd.Batches(ractd.Dataset("toy", "file", columns), horizon=4)
    ractd.NETWORKS["toy"] = {"channels": (32,), "kernel": 1, "patch": 4, "blocks": 1}

    def train(stage, *models, steps, lr=1e-3, target_decay=None, **config):
        torch.manual_seed(0)
        path.unlink(missing_ok=True)
        config = Config(network="toy", temperature=1.0, student_batch=128, **config)
        net, loss_fn = ractd.STAGES[stage](config, batches, *models)
        ractd.fit(stage, net, loss_fn, path, {}, steps, lr, target_decay=target_decay)
        net.load_state_dict(torch.load(path)["ema"])
        return frozen(net)

    R = train("reward", steps=200)
    teachers = {x: train("teacher", R, steps=400, reward_teacher=x) for x in (False, True)}
    how = {"steps": 200, "lr": 2e-3, "target_decay": 0.9, "student_steps": 11}
    sigmas = karras_sigmas(20)
    state = torch.zeros(1000, 1)

    def plans(weighted, **config):
        teacher = teachers[weighted]
        student = train("student", teacher, R, reward_teacher=weighted, **how, **config)
        denoiser = lambda x, t: denoise(teacher, x, t, state)
        jump = lambda x, t, k: student_jump(student, x, t, k, state)
        x_T = 80 * randn(1000, 4, 1)
        yield ractd.heun_sample(denoiser, x_T, sigmas)
        yield ractd.student_sample(jump, x_T, sigmas, 1)
        yield ractd.student_sample(jump, x_T, sigmas, 2)

    return plans


def shares(x):
    """Of plans in the good mode and between the two."""
    mean = x.mean((1, 2))
    return (mean > 0.4).float().mean(), (mean.abs() < 0.4).float().mean()


def test_a_teacher_and_ctd_keep_two_unequal_modes(toy):
    for x in toy(weighted=False, reward_weight=0.0):
        good, between = shares(x)
        assert 0.15 < good < 0.45
        assert between < 0.15


def test_a_reward_teacher_and_ractd_move_to_the_good_mode(toy):
    for x in toy(weighted=True, reward_weight=1.0):
        good, between = shares(x)
        assert good > 0.95
        assert between < 0.05
        assert 0.5 < x.mean() < 0.85  # where the data are


# on DSM's prediction trajectories would hold the one-call plan to the teacher's
EQ_8 = {"plan": {"reward_weight": 8.0}, "dsm": {"reward_weight": 32.0, "trajectories": 0}}


@pytest.mark.parametrize("reward_input", EQ_8)
def test_eq_8_alone_chooses_the_good_mode_of_a_plain_teacher(toy, reward_input):
    """R sees all four actions of these plans, and its slope ends at the box."""
    how = EQ_8[reward_input]
    _, one_call, _ = toy(weighted=False, reward_input=reward_input, **how)
    good, between = shares(one_call)
    assert good > 0.9
    assert between < 0.1
    assert 0.5 < one_call.mean() < 1


# ---- data: windows, simulators, Minari, D4RL's files ---------------------------------------------


def episodes(horizon):
    """Random episodes, one of `horizon` rows, one of 1; observations and actions: row, episode."""
    rng = np.random.default_rng(horizon)
    lengths = [horizon, 1, horizon + 1, 130, *rng.integers(1, 3 * horizon, 8)]
    episode = np.repeat(np.arange(12), lengths)
    n = len(episode)
    rows = np.stack([np.arange(n), episode], axis=1)
    at_end = np.diff(episode, append=12) > 0
    fell = at_end & (rng.random(n) < 0.5)
    rewards = rng.normal(size=n)
    return ractd.Dataset("d", "file", [rows, rows, rewards, fell, at_end & ~fell])


@pytest.mark.parametrize("horizon", [1, 16])
def test_every_row_starts_a_window_with_the_last_action_repeated_to_the_episodes_end(horizon):
    torch.manual_seed(0)
    data = episodes(horizon)
    batches = ractd.Batches(data, horizon)
    ends = np.repeat(data.ends, data.ends - data.begins + 1)[:, None]
    windows = np.arange(len(ends))[:, None] + np.arange(horizon)
    expected = batches.actions[np.minimum(windows, ends)]
    rows_of = lambda state: ractd.decode(state, batches.normalizer["obs"])[:, 0].round().long()
    state, plan = batches.windows(5000)
    rows = rows_of(state)
    assert len(rows.unique()) == len(ends)
    assert equal(plan, expected[rows])
    state, plan, go = batches.transitions(5000, min(horizon, 3))
    rows = rows_of(state)
    assert equal(plan, expected[rows, :3])
    assert equal(go, batches.returns_to_go[rows])


def test_returns_to_go_equal_brute_force():
    data = episodes(16)
    batches = ractd.Batches(data, gamma=0.9)
    go = ractd.decode(batches.returns_to_go[:, None], batches.normalizer["return"])
    assert set(data.terminated) == {True, False}
    for begin, end, fell in zip(data.begins, data.ends, data.terminated, strict=True):
        rewards = list(data.rewards[begin : end + 1])
        tail = 0.0 if fell else np.mean(rewards[-100:]) / (1 - 0.9)
        for i in range(len(rewards)):
            expected = np.polyval([tail, *rewards[i:][::-1]], 0.9)
            assert go[begin + i] == approx(expected, abs=1e-4)


def test_the_normaliser_maps_to_the_box_and_back_and_never_far_out_of_it():
    """A column constant at its own magnitude, a sensor at rest, is neither heard nor driven."""
    above = np.nextafter(np.float32(0.3), np.float32(1))
    x = tensor([[1, 0.3, -3e-9], [2, above, 2e-9], [3, 0.3, 7e-9]])
    table = ractd.fit_range(x)
    y = ractd.encode(x, table)
    assert allclose(y, tensor([[-1.0, 0, -1], [0, 0, 0], [1, 0, 1]]), atol=1e-6)
    assert allclose(ractd.decode(y, table), x, rtol=1e-5, atol=1e-15)
    assert ractd.encode(x[0] + 1000, table).tolist() == [3, 0, 3]
    assert ractd.decode(torch.ones(3), table)[1] == x[0, 1]


def test_actions_outside_the_box_are_clipped_and_counted(monkeypatch, capsys):
    """Also where the simulator's actions are a matrix of float64."""
    column = gymnasium.spaces.Box(-1, 1, (3, 1), np.float64)
    env = TransformAction(gymnasium.make("Hopper-v5"), np.ravel, column)
    monkeypatch.setattr(ractd, "simulator", lambda _: env)
    rows = logged()
    rows["actions"][:20, 1] = 1.5
    rows["actions"][-6] = -1e6
    data = write("outside.hdf5", rows)
    run = SimpleNamespace(env=ENV, data=data, config=Config(horizon=8), device="cpu")
    batches, _ = ractd.load_data(run)
    assert "15.79% of the actions leave" in capsys.readouterr().out  # 21 of 133
    learnt = ractd.decode(batches.actions, batches.normalizer["action"])
    assert np.allclose(learnt, rows["actions"].clip(-1, 1), atol=1e-6)


def test_observations_become_vectors_and_other_actions_are_refused():
    parts = {"observation": [1, 2], "desired_goal": [4]}
    parts = {name: np.float32(x) for name, x in parts.items()}
    boxes = {name: gymnasium.spaces.Box(-9, 9, x.shape) for name, x in parts.items()}

    class Goal(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(boxes)
        action_space = boxes["observation"]

        def reset(self, **_):
            return parts, {}

    gymnasium.register("Goal-v0", Goal, max_episode_steps=5)
    observation, _ = ractd.simulator("Goal-v0").reset(seed=0)
    assert observation.tolist() == [4, 1, 2]
    nested = {"b": np.arange(8).reshape(2, 2, 2), "a": (np.array([8, 9]), np.ones((2, 1)))}
    assert ractd.flat(nested, rows=2).tolist() == [[8, 1, 0, 1, 2, 3], [9, 1, 4, 5, 6, 7]]
    with pytest.raises(UserError, match="no vectors"):
        ractd.simulator("CartPole-v1")


def test_only_d4rls_names_mean_its_tasks():
    assert ractd.simulator(ENV).spec.id == "Hopper-v4"
    assert ractd.normalized_score(ENV, 3234.3) == 100
    assert math.isnan(ractd.normalized_score("hopper-v3", 3234.3))
    with pytest.raises(UserError, match="hopper-v3 cannot be made"):
        ractd.simulator("hopper-v3")


def test_without_a_time_limit_one_is_said_and_what_acts_stays_in_the_box():
    """The reward is -0.1 times the squared action, in a box of 1; -9 never gets up the hill."""
    entry_point = "gymnasium.envs.classic_control:Continuous_MountainCarEnv"
    gymnasium.register("Endless-v0", entry_point)
    make_env = lambda: ractd.simulator("Endless-v0")
    act = lambda observations, _: np.full((len(observations), 8, 1), -9.0)
    with pytest.warns(UserWarning, match="Endless-v0 has no time limit"):
        result = ractd.evaluate(act, make_env, 2)
    assert result["lengths"] == [1000, 1000]
    assert result["returns"] == approx([-100, -100])


def test_a_minari_dataset_is_the_same_data_and_its_environment_is_said(capsys):
    rows = logged()
    of_file = ractd.load_dataset(ENV, write("a.hdf5", rows))
    assert of_file.ends.tolist() == [39, 47, 52, 112, 132]
    assert of_file.terminated.tolist() == [True, False, True, False, False]
    buffers = []
    for begin, end in zip(of_file.begins, of_file.ends + 1, strict=True):
        observations, *columns = (x[begin:end] for x in rows.values())
        observations = np.pad(observations, [(0, 1), (0, 0)])
        columns[0] = columns[0][:, :, None]  # actions that are matrices
        columns[-1] = np.zeros(end - begin, bool)  # each was cut off, or fell
        buffers.append(EpisodeBuffer(None, None, None, observations, *columns))
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers("test/rows-v0", buffers, env="Hopper-v5")
    stored = ractd.load_dataset(ENV, "minari:test/rows-v0")
    assert stored.summary()["sha256"] == of_file.summary()["sha256"]
    assert cli("data", "--data=minari:test/rows-v0") == 0
    assert "rows-v0 (Minari, made in Hopper-v5): 133 transitions" in capsys.readouterr().out


CACHE = Path("D4RL_DATASET_DIR/hopper_medium_replay-v2.hdf5")


def test_d4rls_file_is_downloaded_once_and_its_version_said(monkeypatch, capsys):
    published = Path("gym_mujoco_v2", CACHE.name)
    published.parent.mkdir()
    write(published, logged())
    sha256 = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(ractd, "D4RL_URL", f"{Path.cwd().as_uri()}/")
    assert cli("data") == 0
    published.unlink()  # a second download would fail
    assert cli("data") == 0
    text = capsys.readouterr().out
    assert text.count(f"data: {CACHE.name} (D4RL, version {sha256[:8]}): 133") == 2


class Server(BaseHTTPRequestHandler):
    """Knows Walker2d's file alone, and sends a half of it."""

    def do_GET(self):
        self.send_response(200 if "walker2d" in self.path else 404)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"half")


@pytest.mark.parametrize("env, words", [("walker2d-medium", "4 more expected"), (ENV, "404")])
def test_a_failed_download_is_an_error_and_no_reason_for_other_data(
    env, words, monkeypatch, capsys
):
    with HTTPServer(("127.0.0.1", 0), Server) as server, ThreadPoolExecutor() as pool:
        monkeypatch.setattr(ractd, "D4RL_URL", f"http://127.0.0.1:{server.server_port}/")
        pool.submit(server.handle_request)
        code = cli("data", env=env)
    refused(capsys, code, "cannot be downloaded", words, "--data FILE")
    assert not list(CACHE.parent.iterdir())


def test_a_server_that_falls_silent_is_an_error_too(monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=TimeoutError("timed out")))
    refused(capsys, cli("data"), "cannot be downloaded", "timed out")


def test_without_a_network_one_task_has_data_and_the_others_name_ways_out(capsys):
    assert cli("data") == 0
    text = capsys.readouterr().out
    for words in ("cannot be downloaded", "200,000 transitions", "bundled, not D4RL's"):
        assert words in text
    ways_out = ["put the file", "--data FILE", "python -m reproduce.collect --env"]
    refused(capsys, cli("data", env="walker2d-medium"), *ways_out)


def test_a_real_file_of_d4rl_is_read_whole_with_its_time_limits():
    """door-human-v0: 25 demonstrations, each cut at a time limit of 200 steps and then ended."""
    data = ractd.load_dataset("door-human")
    assert data.source == "D4RL, version 9df6345e"
    lengths = data.ends - data.begins + 1
    assert lengths[~data.terminated].tolist() == [200] * 25
    assert data.terminated.sum() == 25


@pytest.mark.parametrize("preset", ["paper-losses", "paper"])
def test_a_preset_is_what_the_paper_says_and_a_flag_beats_it(preset, monkeypatch):
    train = Mock()
    monkeypatch.setattr(ractd, "train", train)
    flags = [f"--preset={preset}", "--temperature=2"]
    assert cli("distill", *flags, env="walker2d-medium") == 0
    losses = {"denoising": "paper", "reward_teacher": False, "trajectories": 0}
    losses |= {"reward_actions": 1, "reward_networks": 1, "reward_weight": 0.4}
    expected = Config(**ractd.PRESETS[preset] | losses | {"temperature": 2.0})
    assert train.call_args.args[0].config == expected
    with pytest.raises(UserError, match="--denoising papers: must be one of mean, paper"):
        Config(denoising="papers")


REFUSED = """\
    data --seed=1, reward --horizon=8, evaluate --preset=paper, distill --horizn=8,
    distill --network=large, distill --horizon=10, distill --reward-actions=17,
    distill --gamma=nan, distill --nfe=x, distill --nfe=81, distill --device=cuda:99,
    distill --env=hoper-medium, data --env=, evaluate --out=rnu"""


@pytest.mark.parametrize("command_line", re.split(r",\s+", REFUSED))
def test_a_bad_or_ignored_flag_is_refused_by_name(command_line, capsys):
    command, flag = command_line.split()
    refused(capsys, cli(command, flag), flag.split("=")[0])
    assert not Path("runs").exists()


# ---- training and end to end ---------------------------------------------------------------------


def test_fit_warms_up_then_follows_half_a_cosine_and_averages_as_released(monkeypatch):
    rates = []
    decays = []

    def step(net, average, optimizer, loss_fn, decay):
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append(decay)
        return {"loss": tensor(0.0)}

    monkeypatch.setattr(ractd, "train_step", step)
    net = nn.Linear(1, 1)
    ractd.fit("teacher", net, None, Path("a.pt"), {}, steps=80, lr=4.0)
    assert rates[:5] == approx([1, 2, 3, 4, 4])  # 5 % of the steps
    assert [rates[42], rates[61]] == approx([2, 2 - math.sqrt(2)])  # after 1/2 and 3/4 of them
    assert decays == approx([1 - n**-0.75 for n in range(1, 81)])
    ractd.fit("student", net, None, Path("b.pt"), {}, steps=3, lr=4.0, target_decay=0.7)
    assert decays[80:] == [0.7] * 3


def test_a_disk_that_is_slow_to_save_to_does_not_save_after_every_step(monkeypatch):
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0.1)
    save = Mock(side_effect=lambda *_: time.sleep(0.2))
    monkeypatch.setattr(torch, "save", save)
    net = nn.Linear(1, 1)
    loss_fn = lambda net, average: (time.sleep(0.01), (net.weight.sum(), {}))[1]
    ractd.fit("teacher", net, loss_fn, Path("a.pt"), {}, steps=40, lr=1e-3)
    assert 2 <= save.call_count <= 7


def test_end_to_end_leaves_every_promised_file_and_number(trained):
    found = metrics(trained.out)
    assert len(list(trained.out.iterdir())) == 4
    assert found["method"] == "RACTD"
    assert len(found["returns"]) == found["episodes"] == 3
    scores = (np.array(found["returns"]) + 20.272305) / (3234.3 + 20.272305) * 100  # D4RL's
    assert found["score_mean"] == approx(scores.mean())
    assert found["score_sem"] == approx(scores.std(ddof=1) / 3**0.5)
    log = torch.load(trained.out / "student.pt")["log"]
    assert [row["step"] for row in log] == [*range(1, STEPS + 1)]
    assert log[-1].keys() >= {"loss", "ctm", "dsm", "R", "path"}  # Eq. 9 whole
    assert "RACTD, 1 call(s)" in trained.text


def test_a_finished_run_is_not_trained_again(give, trained, monkeypatch):
    monkeypatch.setattr(ractd, "fit", None)
    assert give("distill", data=shutil.copy(trained.data, "renamed.hdf5")) == 0


OTHERS = {  # their flags, losses, and the teacher's distance
    "RACTD, plain teacher": (["--preset=paper-losses"], {"ctm", "dsm", "R"}, "pseudo_huber"),
    "CTD": (["--no-reward-teacher", "--reward-weight=0"], {"ctm", "dsm", "path"}, "squared"),
}


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_train_and_act_end_to_end(method, give, monkeypatch):
    flags, losses, distance = OTHERS[method]
    edm_loss = spy(monkeypatch, "edm_loss")
    assert give("distill", *flags, out="new") == 0
    assert give("evaluate", out="new") == 0  # as it was trained, so into the same file
    assert metrics("new")["method"] == method
    assert edm_loss.call_args.args[-1] is getattr(ractd, distance)
    log = torch.load("new/student.pt")["log"]
    assert log[-1].keys() & {"ctm", "dsm", "R", "path"} == losses
    assert Path("new/reward.pt").exists() == ("R" in losses)


def loaded(folder, stage="student"):
    return ractd.load_checkpoint(folder / f"{stage}.pt", stage)


def generators():
    return [np.random.default_rng(seed) for seed in range(5)]


@pytest.mark.parametrize("stage, nfe", [("student", 1), ("student", 3), ("teacher", 1)])
def test_a_policy_is_the_plain_calls_also_pickled_and_with_other_weights(trained, stage, nfe):
    """A generator for each row, the normaliser's units."""
    checkpoint = loaded(trained.out, stage)
    del checkpoint["net"]  # what acts is the average
    policy = ractd.Policy(checkpoint, nfe, teacher_points=5, temperature=0.5)
    policy = pickle.loads(pickle.dumps(policy))
    policy.net.load_state_dict({name: 1.1 * x for name, x in checkpoint["ema"].items()})
    tables = checkpoint["normalizer"]
    observations = np.random.default_rng(9).normal(size=(5, 11))  # float64
    state = ractd.encode(tensor(observations).float(), tables["obs"])
    rngs = generators()

    def noise(_=None):
        rows = [rng.standard_normal((8, 3), np.float32) for rng in rngs]
        return 0.5 * tensor(np.stack(rows))

    if stage == "student":
        jump = lambda x, t, k: student_jump(policy.net, x, t, k, state)
        x = ractd.student_sample(jump, 80 * noise(), karras_sigmas(6), nfe, noise)
    else:
        denoiser = lambda x, t: denoise(policy.net, x, t, state)
        x = ractd.heun_sample(denoiser, 80 * noise(), karras_sigmas(5))
    expected = ractd.decode(x.clamp(-1, 1), tables["action"])
    plans = policy.act(observations, generators())
    assert np.allclose(plans, expected, rtol=0, atol=1e-6)
    assert policy.calls == (nfe if stage == "student" else 7)
    assert np.array_equal(plans, policy.act(observations.astype(">f8"), generators()))
    with pytest.raises(UserError, match="shape"):
        policy.act(observations[:, :10], generators())


def test_returns_are_those_of_episodes_played_one_by_one(trained):
    checkpoint = loaded(trained.out)
    policy = ractd.Policy(checkpoint)

    def act(observations, generators):
        """Rows one by one, as a batch may round differently."""
        rows = zip(observations, generators, strict=True)
        return np.concatenate([policy.act(row[None], [noise]) for row, noise in rows])

    make_env = lambda: ractd.simulator(ENV)
    result = ractd.evaluate(act, make_env, 3, first_seed=4)
    for seed, total, length in zip((4, 5, 6), *result.values(), strict=True):
        env = make_env()
        observation, _ = env.reset(seed=seed)
        noise = [np.random.default_rng([seed, 1])]  # other numbers than the simulator's
        assert env.unwrapped.np_random.bit_generator.seed_seq.entropy == seed
        rewards = []
        ended = False
        while not ended:
            plans = policy.act(observation[None], noise)
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
    methods = [json.loads(path.read_text())["method"] for path in out.glob("score_*.json")]
    assert sorted(methods) == ["RACTD"] * 6 + ["reward teacher"]


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_stopped_run_goes_on_to_the_same_bits(stage, trained, out, give, monkeypatch):
    path = out / f"{stage}.pt"
    path.unlink()
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    at_step(monkeypatch, 8, Mock(side_effect=KeyboardInterrupt))
    assert give("distill") == 130
    assert torch.load(path)["step"] == 7
    assert give("evaluate", f"--model={stage}") == 0  # half trained
    assert give("distill") == 0
    assert bits(path) == bits(trained.out / path.name)
    assert len(torch.load(path)["log"]) == STEPS


FULL = OSError(errno.ENOSPC, "No space left on device")
BREAKS = {
    "dsm is not finite": ("ractd.dsm_loss", Mock(return_value=tensor(math.nan))),
    "No space left": ("pathlib.Path.write_bytes", Mock(side_effect=FULL)),
}


@pytest.mark.parametrize("words", BREAKS)
def test_a_step_that_fails_leaves_the_state_before(words, out, give, monkeypatch, capsys):
    (out / "student.pt").unlink()
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    at_step(monkeypatch, 7, lambda: monkeypatch.setattr(*BREAKS[words]))
    # a line every fifth step
    code = give("distill", "--student-steps=100", "--trajectories=0")
    refused(capsys, code, words)
    assert loaded(out)["step"] == 6
    assert not list(out.glob("*.part"))


def test_two_runs_of_one_command_in_one_folder_both_finish_with_the_same_bits(trained):
    where = [f"--env={ENV}", f"--data={trained.data}", "--out=both"]
    command = [sys.executable, SCRIPT, "reward", *where, *REWARD]
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert bits("both/reward.pt") == bits(trained.out / "reward.pt")


def test_a_log_without_its_simulator_can_be_learnt_from_but_not_evaluated(give, capsys):
    how = {"env": "no/such-v0", "out": "new"}
    refused(capsys, give("distill", **how), "no/such-v0")
    assert not Path("new").exists()
    assert give("distill", "--episodes=0", **how) == 0
    assert "no simulator" in capsys.readouterr().out
    refused(capsys, give("evaluate", **how), "no/such-v0")


# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

ZEROS = np.zeros(133)
LACKING = dict.fromkeys(ractd.Dataset.KEYS[1:], ZEROS)
BAD_FILES = {  # by what is said of them
    "with the arrays observations": LACKING | {"observations/agent": ZEROS},
    "can't open file": LACKING | {"observations": h5py.ExternalLink("no", "/")},
    "object 'observations' doesn't exist": LACKING,
    "observations, shape (133,)": logged() | {"observations": ZEROS},
    "timeouts, shape (9,)": logged() | {"timeouts": ZEROS[:9]},
    "rewards, shape (133,): not 133 finite": logged() | {"rewards": [0] * 7 + [math.nan] * 126},
    "not 133 finite": logged() | {"rewards": [0] * 7 + [1e39] * 126},  # float32 ends at 3e38
    "no episode ends": logged() | {"timeouts": ZEROS, "terminals": ZEROS},
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("words", BAD_FILES)
def test_a_file_of_another_layout_or_with_bad_rows_is_refused(words, capsys):
    data = write("bad.hdf5", BAD_FILES[words])
    refused(capsys, cli("data", f"--data={data}"), "bad.hdf5", words)


def test_what_cannot_be_read_or_written_is_refused(give, trained, monkeypatch, capsys):
    Path("junk.hdf5").write_bytes(b"junk")
    refused(capsys, give("distill", data="junk.hdf5"), "junk.hdf5 cannot be read as an HDF5")
    monkeypatch.setattr(ractd, "train_stage", None)  # the folder is looked at first
    refused(capsys, give("distill", out=trained.data), trained.data)


def test_what_does_not_fit_a_checkpoint_is_refused_and_listed(out, give, capsys):
    sentence = "temperature: 0.25 in the file, 1.0 asked"
    refused(capsys, give("distill", "--temperature=1"), sentence, "student.pt", "--out")
    rows = logged()
    rows["actions"][5] *= -1  # as many rows, the same returns and name
    refused(capsys, give("distill", data=write("log.hdf5", rows)), "data: ", "in the file")
    sentence = f"env: {ENV} in the file, hopper-medium asked"
    refused(capsys, give("evaluate", env="hopper-medium"), sentence)
    saved = loaded(out, "teacher")
    torch.save(saved | {"ema": saved["net"]}, out / "teacher.pt")
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
    bad = [b"junk", flipped, (out / "teacher.pt").read_bytes()]
    for change in ({"ema": Malicious()}, {"format": 99}):
        torch.save(good | change, path)
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


def test_the_examples_in_the_readme_run(out):
    """All of its Python blocks, one after the other, on the tiny run."""
    text = (SCRIPT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    Path("examples.py").write_text("\n".join(blocks).replace(f"runs/{ENV}", str(out)))
    runpy.run_path("examples.py")
