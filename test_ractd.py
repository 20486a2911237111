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
from unittest.mock import Mock

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
    """Change entries of a checkpoint."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


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


# ---- network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [False, True])
def test_the_unet_keeps_the_shape_and_hears_the_plan_the_state_and_the_levels(student):
    torch.manual_seed(0)
    net = UNet1d(2, 3, channels=(8, 12, 16), blocks=2, student=student)
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


def test_the_convolution_is_one():
    conv = ractd.TemporalConv(2, 4, 5)
    x = torch.randn(5, 8, 2)
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


# ---- teacher and R: Gaussian data x0 ~ N(0, SD^2) have everything in closed form -----------------

SD = 0.3


def exact(x, t, sd=SD):
    return x * sd**2 / (expand(t) ** 2 + sd**2)


def exact_jump(x, t, k, sd=SD):
    return x * ((expand(k) ** 2 + sd**2) / (expand(t) ** 2 + sd**2)) ** 0.5


def test_the_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root():
    grid = karras_sigmas(20)
    assert grid.dtype == torch.float64 and grid.shape == (20,)
    assert (grid.diff() < 0).all()
    assert grid[0].item() == 80 and grid[-1].item() == 0.02  # an Euler step, not half of one
    assert torch.allclose(grid.pow(1 / 7).diff(n=2), torch.zeros(18, dtype=grid.dtype))


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
    """Where D(x, smin) = x the second slope is 0: to average over it adds a tenth of variance."""
    sd = 0.05
    calls = []

    def denoiser(x, t):
        calls.append(t)
        return exact(x, t, sd) if t > 0.02 else x

    x = torch.full((1, 1, 1), math.sqrt(80**2 + sd**2), dtype=torch.float64)  # one deviation
    y = ractd.heun_sample(denoiser, x, karras_sigmas(20))
    assert len(calls) == 37 and 0.02 not in calls
    assert y.item() ** 2 == pytest.approx(sd**2 + 0.02**2, rel=0.02)


def test_in_a_batch_only_the_steps_down_to_smin_are_eulers():
    t = torch.tensor([0.5, 0.04, 3.0])
    u = torch.tensor([0.3, 0.02, 0.02])
    x = torch.ones(3, 4, 1)
    batch = ractd.heun_step(exact, x, t, u)
    euler = x + expand((u - t) / t) * (x - exact(x, t))
    assert torch.allclose(batch[1:], euler[1:])
    assert torch.allclose(batch[0], ractd.heun_step(exact, x[:1], 0.5, 0.3)[0])
    assert not torch.allclose(batch[0], euler[0], rtol=0.01)


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

    def loss(factor=1.0, shift=0.0):
        return ractd.edm_loss(lambda x, t: factor * exact(x, t) + shift, x0, t, noise)

    best = loss()
    assert best < min(loss(0.95), loss(1.05), loss(shift=0.03))
    error = SD**2 * t**2 / (SD**2 + t**2)  # of the exact denoiser, weighted by 1 / c_out^2
    expected = (error * (t**2 + 0.25) / (0.5 * t) ** 2).mean()
    assert best.item() == pytest.approx(expected.item(), rel=0.02)
    assert ractd.dsm_loss(exact(x0 + expand(t) * noise, t), x0, t) == best


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
    jump = lambda x, t, k: student_jump(net, x, t, k, state)
    loss = ractd.ctm_loss(lambda *_: x_hat, jump, lambda x, t: factor * x, x_t, t, u, k)
    loss.backward()
    assert factor.grad is None

    target = ractd.heun_step(lambda x, t: 0.5 * x, x_t, t, u)
    if share < 1:
        target = jump(target, u, k)
    copy = x_hat.detach().requires_grad_()
    expected = ractd.pseudo_huber(jump(copy, k, smin), jump(target, k, smin)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(x_hat.grad, copy.grad, rtol=1e-4, atol=1e-7)
    assert x_hat.grad.flatten(1).norm(dim=1).min() > 0


def distil(student=None, teacher=1, **config):
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
    loss, info = ractd.distillation_loss(*three, R, nets.state, x0, config)
    return loss, info, nets


WEIGHTS = {"ctm_weight": 1.5, "dsm_weight": 3.0, "reward_weight": 2.0}
PAPER = {"denoising": "paper"}


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
            assert others.keys() == {"ctm", "dsm"}
        total = weights["ctm_weight"] * others["ctm"]
        total = total + weights["dsm_weight"] * others["dsm"]
        total = total - weights["reward_weight"] * others.get("R", 0)
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        for name, value in others.items():
            assert value.item() == pytest.approx(info[name].item(), rel=1e-4)


@pytest.mark.parametrize("denoising", ["mean", "paper"])
@pytest.mark.parametrize("reward_input", ["plan", "dsm"])
def test_dsm_and_the_reward_see_what_they_are_told_to(denoising, reward_input, monkeypatch):
    calls = record(monkeypatch, "denoise")
    dsm_calls = record(monkeypatch, "dsm_loss")
    reward_calls = record(monkeypatch, "reward_loss")
    _, _, nets = distil(denoising=denoising, reward_input=reward_input)
    _, dsm, *one_call = [args for args in calls if args[0] is nets.student]
    ((prediction, _, level, *distance),) = dsm_calls
    ((_, _, plan),) = reward_calls

    net, x_t, t, state, k = dsm
    assert torch.equal(level, t) and torch.equal(state, nets.state)
    if denoising == "paper":
        assert torch.equal(k, torch.full_like(t, 0.02)) and distance == [ractd.pseudo_huber]
        assert torch.allclose(prediction, student_jump(net, x_t, t, k, state))
    else:
        assert torch.equal(k, t)
        assert torch.allclose(prediction, denoise(net, x_t, t, state, t))

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


def test_the_average_follows_the_network_as_its_decay_says():
    net = nn.Linear(2, 1)
    average = frozen(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    old = average.weight.clone()
    loss = lambda net, average: (net(torch.ones(1, 2)).sum(), {"extra": torch.tensor(3.0)})
    info = ractd.train_step(net, average, optimizer, loss, decay=0.75)
    assert info["extra"] == 3 and info["grad"].item() == pytest.approx(math.sqrt(3))
    assert torch.allclose(average.weight, 0.75 * old + 0.25 * net.weight)


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
    """N(0, SD^2) exp(scale r x) is N(scale r SD^2, SD^2)."""
    torch.manual_seed(0)
    x = SD * torch.randn(200_000, 1, 1)
    slope = 2.0
    scale = 1.5
    V = torch.tensor(scale * slope**2 * SD**2 / 2)
    weights = ractd.advantage_weight(slope * x.flatten(), V, scale)
    assert weights.mean().item() == pytest.approx(1, rel=0.01)
    drawn = x[torch.multinomial(weights, 200_000, replacement=True)]
    assert drawn.mean().item() == pytest.approx(scale * slope * SD**2, abs=0.005)
    assert drawn.std().item() == pytest.approx(SD, rel=0.02)
    capped = ractd.advantage_weight(torch.tensor(9.0), torch.tensor(0.0))
    assert capped.item() == pytest.approx(math.exp(5))


def test_a_reward_teacher_and_its_student_learn_from_weighted_windows(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(8), horizon=8)
    R = frozen(ractd.RewardModel(2, 2, actions=4, networks=2))
    seen = []
    windows = batches.windows
    monkeypatch.setattr(batches, "windows", lambda *args: seen.append(args[1]) or windows(*args))
    for weighted in (True, False):
        config = Config(horizon=8, reward_teacher=weighted, student_steps=1)
        teacher, loss_fn = ractd.teacher_stage(config, batches, R)
        loss_fn(teacher, teacher)
        student, loss_fn = ractd.student_stage(config, batches, frozen(teacher), R)
        loss_fn(student, student)
    state, plan = batches.rows(torch.arange(len(batches.obs)), 4)
    weights = (40 * (R(state, plan) - R.V(state))).clamp(max=5).exp()
    assert weights.std() > 0.1 * weights.mean()
    for sums in seen[:3]:  # of the teacher, the trajectories and the student
        assert torch.allclose(sums, weights.double().cumsum(0), rtol=1e-4)
    assert seen[3:] == [None] * 3


def test_windows_are_drawn_by_their_weights_also_from_millions_of_rows():
    """Where float32 and torch.multinomial fail: R is half as large in the second half, V is 0."""
    n = 2**24 + 999

    class R:
        actions = 1
        V = staticmethod(lambda state: torch.zeros(len(state)))

        def __call__(self, state, plan):
            return torch.where(state < n // 2, 0.3, 0.15).log() / 40

    torch.manual_seed(0)
    batches = ractd.Batches.__new__(ractd.Batches)
    batches.obs = torch.zeros(1).expand(n)
    batches.horizon = 1
    batches.rows = lambda rows, actions: (rows, rows)
    drawn, _ = batches.windows(200_000, ractd.advantage_sums(batches, R()))
    assert (drawn >= n // 2).double().mean().item() == pytest.approx(1 / 3, abs=0.005)
    last = 0.9 * n  # evenly among those of the same weight, up to the last row
    assert (drawn > last).double().mean().item() == pytest.approx(1 / 15, abs=0.005)


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
    x_T = 20 * torch.randn(1500, 4, 1).double()
    state = torch.zeros(1500, 1)
    sigmas = torch.tensor([80.0, 9.0, 0.5, 0.02])
    x, t, end = ractd.teacher_trajectories(exact_network, state, x_T, sigmas, 0.25)
    truth = exact_jump(x, t, torch.full_like(t, 0.02))
    error = (end - truth).square().mean().sqrt()
    assert 0 < error < 0.1 * truth.std()
    assert torch.equal(x[:1500], x_T) and (t[:1500] == 80).all()
    assert t[1500:].tolist() == [9.0] * 512 + [0.5] * 512 + [9.0] * 476
    noise = (x[1500:] - end[:1500]) / expand((t[1500:] ** 2 - 0.02**2).sqrt())
    assert noise.std().item() == pytest.approx(0.25, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), x_T.flatten()]))[0, 1]) < 0.05

    # levels of the whole grid, also where it is fine
    _, t, _ = ractd.teacher_trajectories(exact_network, state, x_T, karras_sigmas(80), 0.25)
    assert len(set(t[1500:].tolist())) == 3 and t.min() < 1 and t[1500:].max() > 60

    # each in its own state, whatever the batch
    shift = torch.randn(1500, 1).double()
    net = lambda x, t, state, k: exact_network(x, t, state) + expand(state[:, 0])
    _, _, end = ractd.teacher_trajectories(net, shift, x_T, sigmas, 0.0)
    _, _, one = ractd.teacher_trajectories(net, shift[[700]], x_T[[700]], sigmas, 0.0)
    assert torch.allclose(end[700], one[0])


def test_the_trajectory_loss_is_the_distance_of_the_jump_to_0_from_the_end():
    torch.manual_seed(0)
    t = torch.tensor([80.0, 40.0] * 25, dtype=torch.float64)
    x_t = 20 * torch.randn(50, 4, 1).double()
    end = exact_jump(x_t, t, torch.full_like(t, 0.02))
    perfect = ractd.trajectory_loss(exact_network, None, x_t, t, end)
    assert perfect.item() == pytest.approx(0, abs=1e-9)
    shift = torch.tensor(0.3, requires_grad=True)
    net = lambda x, t, state, k: exact_network(x, t, state, k) + 2 * shift
    loss = ractd.trajectory_loss(net, None, x_t, t, end)  # c_out is nearly 1/2 there
    assert loss.item() == pytest.approx(0.3 * math.sqrt(4), rel=0.02)
    loss.backward()
    assert shift.grad.item() == pytest.approx(math.sqrt(4), rel=0.02)


def test_trajectories_start_where_the_policy_does_and_belong_to_the_ctm_loss(monkeypatch):
    torch.manual_seed(0)
    batches = ractd.Batches(episodes(8), horizon=8)
    teacher = frozen(ractd.make_network("teacher", Config(), batches.dims))
    solved = record(monkeypatch, "teacher_trajectories")
    calls = record(monkeypatch, "trajectory_loss")
    how = {"horizon": 8, "reward_teacher": False, "temperature": 0.5, "student_steps": 5}
    config = Config(**how, trajectories=12, ctm_weight=2.0, dsm_weight=0.0)
    student, loss_fn = ractd.student_stage(config, batches, teacher)
    loss, info = loss_fn(student, student)
    ((_, states, x_T, sigmas, scale),) = solved
    ((net, state, start, t, end),) = calls
    assert len(x_T) == 60 and x_T.std().item() == pytest.approx(40, rel=0.1)
    assert torch.equal(sigmas, karras_sigmas(20)) and scale == 0.5
    assert net is student and len(start) == len(end) == 12
    assert (t[:8] == 80).all() and set(t[8:].tolist()) <= set(sigmas[1:-1].float().tolist())
    drawn = [(x_T == x).flatten(1).all(1).nonzero().item() for x in start[:8]]
    assert len(set(drawn)) > 4 and torch.equal(states[drawn], state[:8])
    for s_n, x, level, x_0 in zip(state, start, t.tolist(), end, strict=True):
        n = 12 if level == 80 else 8
        denoiser = lambda x, t, s_n=s_n: denoise(teacher, x, t, s_n[None])
        expected = ractd.heun_sample(denoiser, x[None], karras_sigmas(n, smax=level))
        assert torch.allclose(x_0, expected[0], atol=1e-4)
    assert loss.item() == pytest.approx(2 * (info["ctm"] + info["path"]).item(), rel=1e-5)
    config.trajectories = 0
    student, loss_fn = ractd.student_stage(config, batches, teacher)
    assert len(solved) == 1 and "path" not in loss_fn(student, student)[1]


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

    def student(teacher, reward_model=None, weights=None, trajectories=True, **config):
        config = Config(temperature=1.0, **config)
        net = UNet1d(1, 1, **TOY, student=True)
        ractd.warm_start(net, teacher)
        x_T = 80 * torch.randn(2048, 4, 1)
        states = torch.zeros(2048, 1)
        solved = ractd.teacher_trajectories(teacher, states, x_T, karras_sigmas(20), 1.0)

        def loss_fn(net, average):
            x0, _ = draw(weights)
            nets = (net, average, teacher, reward_model)
            loss, info = ractd.distillation_loss(*nets, state, x0, config)
            if trajectories:
                drawn = torch.randint(4096, (128,))
                columns = [column[drawn] for column in solved]
                loss = loss + ractd.trajectory_loss(net, state, *columns)
            return loss, info

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


@pytest.mark.parametrize("reward_input, weight", [("plan", 8.0), ("dsm", 32.0)])
def test_eq_8_alone_chooses_the_good_mode_of_a_plain_teacher(toy, reward_input, weight):
    """R sees all four actions of these plans, and its slope ends at the box.

    Where it acts on DSM's prediction, trajectories would hold the one-call plan to the teacher's.
    """
    how = {"reward_input": reward_input, "reward_weight": weight}
    how["trajectories"] = reward_input == "plan"
    one_call, _ = toy.student(toy.plain, toy.R, **how)
    good, between, mean, _ = modes(one_call)
    assert good > 0.9 and between < 0.1, modes(one_call)
    assert 0.5 < mean < 1


# ---- data: windows, simulators, Minari, D4RL's files ---------------------------------------------


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


@pytest.mark.parametrize("horizon", [1, 16])
def test_every_row_starts_a_window_with_the_last_action_repeated_to_the_episodes_end(horizon):
    torch.manual_seed(0)
    data = episodes(horizon)
    n = len(data.rewards)
    ends = np.repeat(data.ends, data.ends - data.begins + 1)
    windows = np.arange(n)[:, None] + np.arange(horizon)
    expected = np.minimum(windows, ends[:, None])
    batches = ractd.Batches(data, horizon)
    assert batches.padded == (windows[:, -1] > ends).sum()
    tables = batches.normalizer

    def drawn(state, plan):  # rows, once their plans are compared
        rows = ractd.decode(state, tables["obs"])[:, 0].round().long().numpy()
        plan = ractd.decode(plan, tables["action"])[:, :, 0].round().int().numpy()
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
    """A column constant at its own magnitude, a sensor at rest, is neither heard nor driven."""
    above = np.nextafter(np.float32(0.3), np.float32(1))
    x = torch.tensor([[1, 0.002, 0.3, -3e-9], [3, 0.002, above, 0], [2, 0.002, 0.3, 7e-9]])
    table = ractd.fit_range(x)
    y = ractd.encode(x, table)
    assert y.amin(0).tolist() == pytest.approx([-1, 0, 0, -1])
    assert y.amax(0).tolist() == pytest.approx([1, 0, 0, 1])
    assert torch.allclose(ractd.decode(y, table), x, rtol=1e-5, atol=0)
    far = ractd.encode(x + 1000, table)
    assert not far[:, 1:3].any() and far.max() == 3
    driven = ractd.decode(torch.tensor([[-1.0] * 4, [0.7] * 4]), table)
    assert torch.equal(driven[:, 1:3], x[:2, 1:3].amin(0).expand(2, 2))


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


def room(name, actions=BOX, observations=BOX, steps=5):
    """The id of a registered Room of so many steps."""
    spaces = {"actions": actions, "observations": observations}
    gymnasium.register(name, Room, max_episode_steps=steps, kwargs=spaces)
    return name


def load(data, env=ENV):
    """load_data of a file or Minari set -> (Batches, meta)."""
    run = SimpleNamespace(env=env, data=data, config=Config(horizon=8), device="cpu")
    return ractd.load_data(run)


def test_the_data_line_says_what_is_clipped_and_padded(tmp_path, capsys):
    rows = logged()
    load(write(tmp_path / "inside.hdf5", rows))
    assert "clipped" not in capsys.readouterr().out
    rows["rewards"] = np.full(133, 0.0123)
    rows["actions"][:20, 1] = 1.5
    rows["actions"][-6, :] = -1e6
    batches, meta = load(write(tmp_path / "outside.hdf5", rows))
    text = capsys.readouterr().out
    assert "return: mean 0.32718, best 0.738" in text
    assert "15.79% of the actions leave the simulator's box" in text  # 21 of 133
    assert "133 windows of 8 actions, 33 of them padded" in text  # 7 + 7 + 5 + 7 + 7
    assert meta["box"].tolist() == [[-1.0] * 3, [1.0] * 3]
    learnt = ractd.decode(batches.actions, batches.normalizer["action"])
    assert torch.allclose(learnt, torch.tensor(rows["actions"]).clamp(-1, 1), atol=1e-6)


def test_what_acts_stays_inside_the_box():
    make_env = ractd.simulator(room("Box-v0"), {"source": "file", "longest": 5})
    for action in (-9.0, 0.25, 9.0):
        act = lambda observations, _, action=action: np.full((len(observations), 8, 2), action)
        result = ractd.evaluate(act, make_env, 2)
        assert result["returns"] == [10 * np.clip(action, -0.5, 0.5)] * 2


def test_spaces_that_are_no_vectors_are_refused_before_training(capsys):
    data = write("log.hdf5", logged(o=2, a=2))
    for name in ("actions", "observations"):
        for i, space in enumerate((Discrete(2), MultiBinary(2), MultiDiscrete([3, 2]))):
            env = room(f"{name}-v{i}", **{name: space})
            code = cli("distill", f"--data={data}", "--out=new", *FLAGS["distill"], env=env)
            refused(capsys, code, f"{name} {space}", "vectors")
    assert not list(Path("new").iterdir())


@pytest.mark.parametrize("longest, cap", [(7, 1000), (1500, 1500)])
def test_an_environment_without_a_time_limit_gets_one_that_is_said(longest, cap, capsys):
    name = room("Endless-v0", steps=None)
    env = ractd.simulator(name, {"source": "file", "longest": longest})()
    assert f"Endless-v0 has no time limit: an episode ends after {cap:,}" in capsys.readouterr().out
    env.reset(seed=0)
    ended = [env.step(np.zeros(2))[3] for _ in range(cap)]
    assert ended == [False] * (cap - 1) + [True]


def test_only_d4rls_names_mean_its_tasks():
    data = {"source": "file", "longest": 5}
    names = dict(ractd.ENVS)
    door, *_ = names.pop("door-human")  # of a package that is not required
    assert len(names) == 9 and door == "gymnasium_robotics:AdroitHandDoor-v1"
    for env, (gym_id, *_) in names.items():
        assert ractd.simulator(env, data)().spec.id == gym_id
    for env in ("hopper-v5", "hopper-v3", "hopper-tall-v0"):
        made = ractd.simulator(room(env), data)()
        assert made.spec.id == env and isinstance(made.unwrapped, Room)
        assert math.isnan(ractd.normalized_score(env, 1.0))


def make_minari(name, rows, **how):
    """A Minari set of rows in D4RL's layout, by default of Hopper-v4."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    buffers = []
    for begin, end in pairwise([0, *(ends + 1), len(rows["rewards"])]):
        observations, *columns = (x[begin:end] for x in rows.values())
        observations = np.concatenate([observations, np.ones((1, 11), np.float32)])
        buffers.append(EpisodeBuffer(None, None, None, observations, *columns))
    with warnings.catch_warnings(action="ignore"):
        return minari.create_dataset_from_buffers(name, buffers, **(how or {"env": "Hopper-v4"}))


def test_a_minari_dataset_is_the_same_data_and_acts_in_its_environment(capsys):
    rows = logged()
    one = ractd.load_dataset(ENV, write("a.hdf5", rows))
    assert one.ends.tolist() == [39, 47, 52, 112, 132]
    assert one.terminated.tolist() == [True, False, True, False, False]  # unfinished: a time limit
    short = gymnasium.make("Hopper-v4", max_episode_steps=7)
    reference = {"ref_min_score": 0.0, "ref_max_score": 4.0}
    make_minari("test/rows-v0", rows, env="Hopper-v4", eval_env=short, **reference)
    two = ractd.load_dataset(ENV, "minari:test/rows-v0")
    for key in ("observations", "actions", "rewards", "ends", "terminated"):
        assert np.array_equal(getattr(one, key), rows.get(key, getattr(one, key)))
        assert np.array_equal(getattr(one, key), getattr(two, key))
    assert ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]]) == 0
    distilled = metrics("runs/test-rows-v0")
    assert distilled["lengths"] == [7] * 3
    assert distilled["score_mean"] == pytest.approx(25 * distilled["return_mean"])
    assert ractd.main(["evaluate", "--env=test/rows-v0", "--episodes=3"]) == 0
    assert metrics("runs/test-rows-v0")["returns"] == distilled["returns"]
    assert "test/rows-v0 on test/rows-v0 (minari, not D4RL's)" in capsys.readouterr().out
    refused(capsys, ractd.main(["distill", "--env=test/rows-v0"]), "unknown")


def test_a_minari_set_that_names_no_environment_acts_in_that_of_the_command_line(capsys):
    spaces = gymnasium.make("Hopper-v4")
    how = {"observation_space": spaces.observation_space, "action_space": spaces.action_space}
    make_minari("test/rows-v0", logged(), **how)
    _, meta = load("minari:test/rows-v0", "hopper-medium")
    assert ractd.simulator("hopper-medium", meta["dataset"])().spec.id == "Hopper-v4"
    code = ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]])
    refused(capsys, code, "test/rows-v0 cannot be made")


def test_the_entry_point_that_a_minari_set_names_is_not_called(monkeypatch):
    stored = make_minari("test/rows-v0", logged())
    path = Path(stored.storage.data_path) / "metadata.json"
    text = path.read_text()
    path.write_text(text.replace("gymnasium.envs.mujoco.hopper_v4:HopperEnv", "os:system"))
    called = []
    monkeypatch.setattr(os, "system", lambda *args, **how: called.append(args))
    _, meta = load("minari:test/rows-v0", "hopper-medium")
    env = ractd.simulator("hopper-medium", meta["dataset"])()
    assert env.spec.entry_point == "gymnasium.envs.mujoco.hopper_v4:HopperEnv" and not called


def test_goals_a_scalar_and_a_matrix_become_one_vector():
    """In the order of the keys, without what is achieved."""
    name = room("Goal-v0", observations=PARTS)
    observation, _ = ractd.simulator(name, {"source": "file", "longest": 5})().reset(seed=0)
    PARTS.seed(0)
    row = PARTS.sample()
    goal = row["desired_goal"]
    expected = [goal["a"], *goal["b"], *row["observation"].flatten()]
    assert observation.tolist() == expected
    rows = {key: np.stack([row[key]] * 2) for key in ("observation", "achieved_goal")}
    rows["desired_goal"] = {key: np.stack([x, x]) for key, x in goal.items()}
    assert ractd.flat(rows, 2).tolist() == [expected] * 2


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on the loopback for a tiny "published" file; .mode says how it behaves."""
    content = Path(write(tmp_path / "published.hdf5", logged())).read_bytes()
    cache = tmp_path / "D4RL_DATASET_DIR" / "hopper_medium_replay-v2.hdf5"
    sha256 = hashlib.sha256(content).hexdigest()
    state = SimpleNamespace(mode="good", content=content, cache=cache, sha256=sha256)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.mode == "silent":
                time.sleep(2)
            found = self.path == f"/gym_mujoco_v2/{cache.name}" and state.mode != "404"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if state.mode == "good" else content[:2000])

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.handle_error = lambda *_: None  # a client that gave up
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
        assert f"data: {server.cache.name} ({expected})" in text
        assert ("downloading" in text) == (mode == "good")
        assert (f"does not know: SHA-256 {server.sha256}" in text) == (version is None)
    assert server.cache.read_bytes() == server.content
    assert ractd.load_dataset(ENV).summary()["source"] == expected  # and so in every score file


FAILURES = {"cut off": "cut off after 2,000 of", "silent": "timed out", "404": "404"}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_failed_download_is_an_error_and_no_reason_for_other_data(server, mode, capsys):
    server.mode = mode
    refused(capsys, cli("data"), "cannot be downloaded", FAILURES[mode], "--data FILE")
    assert not list(server.cache.parent.iterdir())


def test_without_a_network_the_other_tasks_name_three_ways_out(monkeypatch, capsys):
    ways_out = ["put the file", "--data FILE", "python -m reproduce.collect --env"]
    refused(capsys, cli("data", env="walker2d-medium"), *ways_out)
    monkeypatch.setattr(ractd, "BUNDLED", Path("missing"))
    refused(capsys, cli("data"), *ways_out)
    monkeypatch.setattr(ractd, "ASSETS", Path("missing"))
    refused(capsys, cli("data", env="door-human"), *ways_out[:2])  # SAC makes no people's data


def test_a_real_file_of_d4rl_is_read_whole_with_its_time_limits():
    """door-human-v0: 25 demonstrations, each cut at a time limit of 200 steps and then ended."""
    data = ractd.load_dataset("door-human")
    assert data.source == "D4RL, current version"
    assert data.observations.shape == (6729, 39) and data.actions.shape == (6729, 28)
    lengths = data.ends - data.begins + 1
    assert len(lengths) == 50 and lengths.max() == 200
    assert (lengths[~data.terminated] == 200).all() and data.terminated.sum() == 25
    summary = data.summary()
    assert summary["return_mean"] == pytest.approx(397.83, abs=0.01)
    assert ractd.normalized_score("door-human", 2880.5693) == pytest.approx(100)
    assert ractd.normalized_score("door-human", -56.512833) == pytest.approx(0)

    # what follows a time limit is guessed from the last rewards, nothing follows an end
    go = ractd.returns_to_go(data.rewards, data.begins, data.ends, data.terminated)
    last = data.rewards[data.ends].astype(float)
    tails = [data.rewards[end - 99 : end + 1].astype(float).mean() / 0.01 for end in data.ends]
    assert np.allclose(go[data.ends], last + np.where(data.terminated, 0, 0.99 * np.array(tails)))
    batches = ractd.Batches(data)
    assert batches.padded == 50 * 15
    state, plan = batches.windows(1000)
    assert plan.shape == (1000, 16, 28)
    assert max(state.abs().max(), plan.abs().max()) <= 1 + 1e-6


def test_without_a_network_or_a_home_one_task_has_data(tmp_path, monkeypatch, capsys):
    folder = os.environ["D4RL_DATASET_DIR"]
    monkeypatch.delenv("D4RL_DATASET_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # cannot be written to
    assert cli("data") == 0
    out = capsys.readouterr().out
    for words in ("cannot be downloaded", "200,000 transitions", "bundled, not D4RL's"):
        assert words in out
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
    done = python("-c", code, write(tmp_path / "million.hdf5", rows), cwd=SCRIPT.parent)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 20
    assert gigabytes < 1.5


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


def test_the_papers_presets_have_its_losses_and_its_sigma_and_a_flag_beats_them(monkeypatch):
    losses = {"denoising": "paper", "reward_teacher": False, "trajectories": 0}
    losses |= {"reward_actions": 1, "reward_networks": 1, "temperature": 1.0}
    paper = losses | {"network": "paper", "grid_points": 80}
    paper |= {"teacher_steps": 392_000, "teacher_batch": 1024, "teacher_lr": 1e-4}
    paper |= {"reward_steps": 314_000, "reward_batch": 64, "reward_lr": 2e-4}
    paper |= {"student_steps": 33_500, "student_batch": 4800, "student_lr": 1e-4}
    for task, sigmas in SIGMA.items():
        for kind, sigma in zip(ractd.KINDS, sigmas, strict=True):
            config = functools.partial(configured, monkeypatch, env=f"{task}-{kind}")
            assert config() == Config()
            assert config("--preset=paper-losses") == Config(**losses, reward_weight=sigma)
            assert config("--preset=paper") == Config(**paper, reward_weight=sigma)
    flags = ["--temperature=2", "--reward-teacher", "--reward-weight=3"]
    expected = losses | {"temperature": 2.0, "reward_teacher": True}
    assert config("--preset=paper-losses", *flags) == Config(**expected, reward_weight=3.0)


REFUSED = """\
    data --seed=1, data --out=x, reward --horizon=8, reward --network=small,
    teacher --student-steps=5, teacher --reward-weight=1, distill --model=teacher,
    distill --horizn=8, evaluate --horizon=8, evaluate --preset=paper,
    distill --network=large, distill --horizon=2, distill --horizon=10, distill --gamma=nan,
    distill --teacher-lr=-1, distill --nfe=x, distill --nfe=81, distill --reward-actions=17,
    distill --seed=99999999999999999999, distill --episodes=99999999999999999999,
    distill --reward-weight=1e999, distill --device=cuda:99, distill --device=x"""


@pytest.mark.parametrize("command_line", re.split(r",\s+", REFUSED))
def test_a_bad_or_ignored_flag_is_refused_by_name(command_line, monkeypatch, capsys):
    command, flag = command_line.split()
    monkeypatch.setattr(ractd, "train", None)
    monkeypatch.setattr(ractd, "act_again", None)
    refused(capsys, cli(command, flag), flag.split("=")[0])
    assert not Path("runs").exists()


def test_no_flag_is_compared_with_one_that_the_command_has_not(give, capsys):
    refused(capsys, give("teacher", "--horizon=2"), "--horizon 2: must")
    assert give("reward", "--reward-actions=20", out="new") == 0  # whatever --horizon will be


# ---- training and end to end ---------------------------------------------------------------------


def test_fit_warms_up_then_follows_half_a_cosine_and_averages_as_released(tmp_path, monkeypatch):
    seen = []

    def step(net, average, optimizer, loss_fn, decay):
        seen.append((optimizer.param_groups[0]["lr"], decay))
        return {"loss": torch.tensor(0.0)}

    monkeypatch.setattr(ractd, "train_step", step)
    fit = functools.partial(ractd.fit, "teacher", nn.Linear(1, 1), None)
    fit(tmp_path / "a.pt", {}, steps=80, lr=0.5)
    rates, decays = zip(*seen, strict=True)
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])  # 5 % of the steps
    assert rates[42] == pytest.approx(0.25) and 0 < rates[-1] < 0.001
    assert list(rates[4:]) == sorted(rates[4:], reverse=True)
    assert decays == pytest.approx([1 - (1 + n) ** -0.75 for n in range(80)])
    fit(tmp_path / "b.pt", {}, steps=3, lr=0.5, target_decay=0.7)
    assert [decay for _, decay in seen[80:]] == [0.7] * 3


def test_saving_prints_no_line_of_its_own(tmp_path, monkeypatch, capsys):
    def loss(net, _):
        return net(torch.ones(1, 1)).sum(), {}

    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    ractd.fit("teacher", nn.Linear(1, 1), loss, tmp_path / "a.pt", {}, steps=100, lr=0.5)
    steps = [1, *range(5, 101, 5)]
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == steps
    assert [row["step"] for row in torch.load("a.pt")["log"]] == steps


def test_a_loss_that_is_not_finite_is_said_and_not_saved(out, give, monkeypatch, capsys):
    (out / "student.pt").unlink()
    nan = Mock(return_value=torch.tensor(math.nan))
    broken = functools.partial(monkeypatch.setattr, ractd, "dsm_loss", nan)
    record(monkeypatch, "train_step", 5, broken)
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    refused(capsys, give("distill"), "dsm is nan", "learning rate")
    assert torch.load(out / "student.pt")["step"] == 4


def test_learning_rates_of_one_end_in_a_sentence(give, capsys):
    rates = [f"--{stage}-lr=1" for stage in STAGES]
    refused(capsys, give("distill", *rates, "--episodes=0", out="new"), "try a smaller")


def test_end_to_end_leaves_every_promised_file_and_number(trained):
    names = {f"{stage}.pt" for stage in STAGES}
    assert {path.name for path in trained.out.iterdir() if "score" not in path.name} == names
    found = metrics(trained.out)
    assert found["method"] == "RACTD" and found["calls"] == 1 and found["episodes"] == 3
    assert len(found["returns"]) == len(found["lengths"]) == 3
    assert found["return_mean"] == pytest.approx(np.mean(found["returns"]))
    score = (np.array(found["returns"]) + 20.272305) / (3234.3 + 20.272305) * 100
    assert found["score_mean"] == pytest.approx(score.mean())
    assert found["score_sem"] == pytest.approx(score.std(ddof=1) / 3**0.5)
    for stage in STAGES:
        rows = torch.load(trained.out / f"{stage}.pt")["log"]
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and steps[-1] == rows[-1]["steps"] == STEPS
    assert rows[-1].keys() >= {"loss", "ctm", "dsm", "R", "path", "grad"}  # Eq. 9 whole
    assert "RACTD, 1 call(s)" in trained.text and "not D4RL's" in trained.text


def test_a_finished_run_is_tidied_but_not_trained_again(out, give, trained, monkeypatch):
    """And what a process left that died long ago goes."""
    before = metrics(out)["returns"]
    leftover = out / "teacher.pt.1.part"
    others = [out / "teacher.pt.2.part", out / "film.part"]
    for path in (leftover, *others):
        path.touch()
    for path in (leftover, others[1]):
        os.utime(path, (0, time.time() - 4000))
    monkeypatch.setattr(ractd, "fit", None)
    assert give("distill", data=shutil.copy(trained.data, "renamed.hdf5")) == 0
    assert metrics(out)["returns"] == before
    assert all(path.exists() for path in others) and not leftover.exists()


def test_the_papers_losses_train_and_act_end_to_end(give):
    assert give("distill", "--preset=paper-losses", out="new") == 0
    assert metrics("new")["method"] == "RACTD, plain teacher" and metrics("new")["temperature"] == 1
    log = torch.load("new/student.pt")["log"][-1].keys()
    assert log >= {"ctm", "dsm", "R"} and "path" not in log  # Eqs. 5 to 9, and nothing else
    assert give("evaluate", out="new") == 0  # acts as its preset meant it
    assert len(list(Path("new").glob("score_*.json"))) == 1


def test_without_any_reward(give, trained):
    assert give("distill", "--no-reward-teacher", "--reward-weight=0", out="new") == 0
    assert metrics("new")["method"] == "CTD"
    assert {path.stem for path in Path("new").glob("*.pt")} == {"teacher", "student"}
    assert "R" not in torch.load("new/student.pt")["log"][-1]
    assert not same_weights("new/teacher.pt", trained.out / "teacher.pt")


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
    policy = ractd.Policy(checkpoint, nfe, teacher_points=5, temperature=0.5)
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


def test_a_policy_draws_each_rows_noise_from_its_generator_and_casts_observations(trained):
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


def test_returns_are_those_of_episodes_played_one_by_one(trained):
    """In batches of 16, as others may round differently."""
    checkpoint = loaded(trained.out)
    act = ractd.Policy(checkpoint).act
    make_env = ractd.simulator(ENV, checkpoint["dataset"])
    result = ractd.evaluate(act, make_env, 3, first_seed=4)
    others = [np.random.default_rng(0)] * 15
    for seed, total, length in zip((4, 5, 6), *result.values(), strict=True):
        env = make_env()
        observation, _ = env.reset(seed=seed)
        generator = np.random.default_rng(seed)
        rewards = []
        ended = False
        while not ended:
            plans = act(np.stack([observation] * 16), [generator, *others])
            observation, reward, fell, late, _ = env.step(plans[0, 0])
            rewards.append(reward)
            ended = fell or late
        assert total == sum(rewards) and length == len(rewards)
    assert len(set(result["returns"])) == 3


def test_two_different_evaluations_never_share_a_file_and_the_same_one_does(out, give):
    different = [[], ["--temperature=1"], ["--temperature=1.0000001"], ["--nfe=2"]]
    different += [["--first-seed=1"], ["--episodes=4"], ["--model=teacher"]]
    for how in different:
        assert give("evaluate", *how) == give("evaluate", *how) == 0
    rewrite(out / "teacher.pt", ema=loaded(out, "teacher")["net"])  # another one in its place
    assert give("evaluate", "--model=teacher") == 0
    methods = [json.loads(path.read_text())["method"] for path in out.glob("score_*.json")]
    assert sorted(methods) == ["RACTD"] * 6 + ["reward teacher"] * 2


def test_the_normalised_score_has_d4rls_reference_points():
    references = [("hopper", -20.272305, 3234.3), ("walker2d", 1.629008, 4592.3)]
    references += [("halfcheetah", -280.178953, 12135.0)]
    for task, *returns in references:
        scores = ractd.normalized_score(f"{task}-medium", np.array(returns))
        assert scores.tolist() == pytest.approx([0, 100])


# ---- interrupted, killed, twice at once ----------------------------------------------------------


def test_in_a_real_run_all_but_the_student_is_frozen_and_the_averages_are_used(
    out, give, monkeypatch
):
    (out / "student.pt").unlink()
    calls = record(monkeypatch, "distillation_loss")

    def is_frozen(net):
        return not net.training and not any(p.requires_grad for p in net.parameters())

    def holds(net, stage):
        average = torch.load(out / f"{stage}.pt")["ema"]
        same = all(torch.equal(x, average[name]) for name, x in net.state_dict().items())
        return same and is_frozen(net)

    assert give("distill", "--episodes=0") == 0
    student, target, teacher, reward_model = calls[0][:4]
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert is_frozen(target)
    assert holds(teacher, "teacher")
    assert holds(reward_model, "reward")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(give, trained):
    for seed in (0, 1):
        assert give("reward", f"--seed={seed}", out=f"new{seed}") == 0
        same = same_weights(f"new{seed}/reward.pt", trained.out / "reward.pt")
        assert same == (seed == 0)


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
    assert give("distill") == 0 and same_weights(path, trained.out / "student.pt")
    steps = [row["step"] for row in torch.load(out / "student.pt")["log"]]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


@pytest.mark.parametrize("stage, number", [("teacher", signal.SIGINT), ("student", signal.SIGTERM)])
def test_ctrl_c_and_sigterm_save(stage, number, trained, out, give, monkeypatch, capsys):
    path = out / f"{stage}.pt"
    path.unlink()
    handler = signal.getsignal(number)

    def press_twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    record(monkeypatch, "mean_of", 7, press_twice)  # while a line is printed
    assert give("distill") == 128 + number and "goes on" in capsys.readouterr().out
    assert torch.load(path)["step"] == 7
    assert signal.getsignal(number) is handler
    assert give("distill") == 0 and same_weights(path, trained.out / f"{stage}.pt")


def test_the_program_runs_in_a_worker_thread(out, give, trained):
    (out / "reward.pt").unlink()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(give("reward")))
    thread.start()
    thread.join()
    assert codes == [0] and same_weights(out / "reward.pt", trained.out / "reward.pt")


def test_two_runs_of_one_command_in_one_folder_both_finish_with_the_same_bits(trained):
    where = [f"--env={ENV}", f"--data={trained.data}", "--out=both"]
    command = [sys.executable, SCRIPT, "distill", *where, *FLAGS["distill"]]
    pair = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    for stage in STAGES:
        assert same_weights(f"both/{stage}.pt", trained.out / f"{stage}.pt")
    assert not list(Path("both").glob("*.part"))


@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_full_disk_is_a_sentence_and_loses_nothing(size, out, give, trained, monkeypatch, capsys):
    """No file grows beyond so many bytes, from the fifth step on."""
    path = out / "teacher.pt"
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, limits[1]))
    record(monkeypatch, "train_step", 5, full)
    with monkeypatch.context() as patch:
        patch.setattr(ractd, "SAVE_EVERY", 0)
        try:
            code = give("teacher")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code)
    assert torch.load(path)["step"] == 4 and not list(out.glob("*.part"))
    assert give("teacher") == 0 and same_weights(path, trained.out / "teacher.pt")


def test_a_score_is_printed_before_it_is_written(give, monkeypatch, capsys):
    monkeypatch.setattr(ractd, "make_folder", lambda out: None)
    monkeypatch.setattr(ractd.os, "replace", Mock(side_effect=OSError(28, "No space left")))
    assert give("evaluate") == 2
    assert "RACTD, 1 call(s)" in capsys.readouterr().out


def test_a_log_without_its_simulator_can_be_learnt_from_but_not_evaluated(give, trained, capsys):
    give = functools.partial(give, env="no/such-v0", out="new")
    assert cli("data", f"--data={trained.data}", env="no/such-v0") == 0
    assert "no simulator" in capsys.readouterr().out
    assert give("reward") == give("teacher") == give("distill", "--episodes=0") == 0
    assert Path("new/student.pt").exists() and not list(Path("new").glob("score_*"))
    capsys.readouterr()
    refused(capsys, give("evaluate"), "no/such-v0")
    refused(capsys, give("distill"), "no/such-v0")


def test_names_that_the_terminal_cannot_print_are_escaped(trained, tmp_path, monkeypatch):
    data = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.hdf5"
    shutil.copy(trained.data, data)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = python(SCRIPT, "reward", b"--data=" + data, b"--out=run\xff", *FLAGS["reward"])
    assert done.returncode == 0, done.stderr
    assert r"\udcff\xe9.hdf5" in done.stdout and os.path.exists(b"run\xff/reward.pt")


# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

LAYOUTS = {  # the observations of a file, and what is said of it
    "a group": (lambda f: f.create_group("observations/agent"), "lacks the arrays observations"),
    "robomimic": (lambda f: f.create_group("data/demo_0"), ", data"),
    "minari": (
        lambda f: [f.create_group(f"episode_{i}") for i in range(3000)],
        "episode_0, episode_1",
    ),
    "external link": (lambda f: f.update(observations=h5py.ExternalLink("no", "/")), "arrays"),
    "soft link": (lambda f: f.update(observations=h5py.SoftLink("/no")), "arrays"),
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


def test_rows_that_are_no_numbers_or_do_not_fit_are_refused_by_name(capsys):
    changes = {
        "actions is NaN or infinite in row 5": ("actions", lambda x: x.__setitem__((5, 1), np.nan)),
        "rewards is NaN or infinite in row 7": ("rewards", lambda x: x.__setitem__(7, np.inf)),
    }
    for words, (key, change) in changes.items():
        rows = logged()
        change(rows[key])
        refused(capsys, cli("data", f"--data={write('bad.hdf5', rows)}"), "bad.hdf5", words)
    for key, x in (("observations", np.zeros(133)), ("timeouts", np.zeros(9))):
        data = write("bad.hdf5", logged() | {key: x})
        refused(capsys, cli("data", f"--data={data}"), f"has shape {x.shape}")
    data = write("bad.hdf5", logged() | {"timeouts": np.zeros(133), "terminals": np.zeros(133)})
    refused(capsys, cli("data", f"--data={data}"), "no episode ends")


def test_a_mistyped_task_or_folder_is_called_so(give, tmp_path, capsys):
    sentence = "hopper-medium, hopper-medium-replay"
    refused(capsys, cli("data", env="hoper-medium"), "hoper-medium", sentence)
    refused(capsys, ractd.main(["data"]), "--env")
    # a folder that exists makes no task of it
    refused(capsys, cli("distill", f"--out={tmp_path}", env="hoper-medium"), "hoper-medium")
    refused(capsys, ractd.main(["evaluate", "--out=rnu"]), "no folder rnu")
    refused(capsys, give("distill", out="new", env=".:x"), ".:x")


def test_a_folder_that_cannot_be_written_is_refused_at_once(give, monkeypatch, capsys):
    Path("file").touch()
    monkeypatch.setattr(ractd, "load_dataset", None)
    monkeypatch.setattr(ractd, "evaluate", None)
    for command in ("distill", "evaluate"):
        refused(capsys, give(command, out="file/run"), "file/run")
        with monkeypatch.context() as patch:
            denied = Mock(side_effect=PermissionError(13, "Permission denied"))
            patch.setattr(ractd, "open", denied, raising=False)
            refused(capsys, give(command), "Permission denied")


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
    bad = [b"", b"junk", path.read_bytes()[:9999], (out / "teacher.pt").read_bytes()]
    for pickled in (torch.zeros(3), {"format": ractd.FORMAT, "ema": Malicious()}):
        for zipped in (True, False):
            torch.save(pickled, path, _use_new_zipfile_serialization=zipped)
            bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        for command in ("evaluate", "distill"):
            refused(capsys, give(command), str(path))
        assert path.read_bytes() == content
    assert not Path("executed").exists()
    path.unlink()
    refused(capsys, give("evaluate"), "no trained student")


def test_a_checkpoint_of_another_version_is_refused(out, give, capsys):
    for version in (1, 99):
        rewrite(out / "student.pt", format=version)
        refused(capsys, give("evaluate"), "is of another version", "student.pt")
        refused(capsys, give("distill"), "is of another version", "delete")


def test_a_student_of_another_program_does_not_act_here(out, give, capsys):
    rewrite(out / "student.pt", config={"horizon": 256, "temperature": 0.01})
    refused(capsys, give("evaluate"), "another program")


def test_a_flipped_byte_of_a_checkpoint_is_noticed_or_changes_nothing(out):
    path = out / "reward.pt"
    rewrite(path, net={}, optimizer={}, log=[], ema={"weight": torch.randn(99)})
    whole = path.read_bytes()
    before = loaded(out, "reward")
    rng = np.random.default_rng(0)
    noticed = 0
    for position in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        try:
            after = loaded(out, "reward")
        except ractd.UserError:
            noticed += 1
        else:
            assert ractd.weights_id(after) == ractd.weights_id(before)
            assert torch.equal(after["rng"], before["rng"]) and after["config"] == before["config"]
    assert noticed > 150


def test_a_good_checkpoint_that_cannot_be_read_is_never_to_be_deleted(give, monkeypatch, capsys):
    denied = PermissionError(13, "Permission denied")
    too_large = MemoryError("out of memory")
    for where, name, error in ((torch, "load", too_large), (Path, "read_bytes", denied)):
        monkeypatch.setattr(where, name, Mock(side_effect=error))
        code = give("evaluate")
        err = capsys.readouterr().err
        assert code == 2 and error.args[-1] in err and "delete" not in err


def test_the_examples_in_the_readme_run(out):
    """All of its Python blocks, one after the other, on the tiny run."""
    text = (SCRIPT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    Path("examples.py").write_text("\n".join(blocks).replace(f"runs/{ENV}", str(out)))
    runpy.run_path("examples.py")
