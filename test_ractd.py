"""Tests of ractd.py against oracles, offline: python -m pytest -q test_ractd.py."""

import contextlib
import functools
import hashlib
import http.server
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import gymnasium
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from torch import nn

import ractd
from ractd import Config, UNet1d, denoise, expand, jump_from, student_jump

torch.set_num_threads(1)  # more would round differently
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
ENV, SCRIPT, STEPS = "hopper-medium-replay", Path(ractd.__file__).resolve(), 30
CLOSED_PORT = "http://127.0.0.1:9/"
TEACHER = f"--horizon=8 --channels=8 --teacher-batch=8 --teacher-steps={STEPS}".split()
REWARD = f"--horizon=8 --reward-batch=8 --reward-steps={STEPS}".split()
STUDENT = f"--grid-points=6 --student-batch=8 --student-steps={STEPS} --episodes=3".split()
STUDENT += [f"--tilted-steps={STEPS}"]
FLAGS = {"teacher": TEACHER, "reward": REWARD, "distill": [*TEACHER, *REWARD, *STUDENT]}
STAGES = ("teacher", "reward", "tilted", "student")


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no network is used."""
    for name in ("HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ractd, "D4RL_URL", CLOSED_PORT)
    monkeypatch.chdir(tmp_path)
    timeout = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(timeout)


def logged(lengths=(40, 8, 5, 60, 20), o=11, a=3):
    """Random rows in D4RL's layout: falls and time limits in turn, the last episode unfinished."""
    rng, n, ends = np.random.default_rng(0), sum(lengths), np.cumsum(lengths)[:-1] - 1
    return {
        "observations": np.float32(rng.normal(size=(n, o))),
        "actions": np.float32(rng.uniform(-0.9, 0.8, (n, a))),
        "rewards": np.float32(rng.normal(1, 1, n)),
        "terminals": np.isin(range(n), ends[::2]),
        "timeouts": np.isin(range(n), ends[1::2]),
    }


def write(path, rows):
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
    done = subprocess.run(
        [*command, *FLAGS["distill"]], text=True, capture_output=True, cwd=folder, check=False
    )
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
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
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


# ---- teacher: Gaussian data x0 ~ N(0, SD^2) have everything in closed form -----------------------

SD = 0.3


def exact(x, t, sd=SD):
    return x * sd**2 / (expand(t) ** 2 + sd**2)


def exact_jump(x, t, k, sd=SD):
    return x * ((expand(k) ** 2 + sd**2) / (expand(t) ** 2 + sd**2)) ** 0.5


def test_heun_is_of_order_two_and_euler_of_order_one_away_from_the_smallest_level():
    errors = []
    for n in (80, 160):
        heun = euler = x = torch.ones(1, 1, 1, dtype=torch.float64)
        grid = ractd.karras_sigmas(n, smin=0.1).tolist()
        for t, u in pairwise(grid):
            heun = ractd.heun_step(exact, heun, t, u)
            euler = euler + (u - t) * (euler - exact(euler, t)) / t
        truth = exact_jump(x, grid[0], grid[-1])
        errors.append([(y - truth).abs().item() for y in (heun, euler)])
    heun, euler = (a / b for a, b in zip(*errors, strict=True))
    assert 3.6 < heun < 4.4 and 1.8 < euler < 2.2


def test_the_last_step_is_eulers_so_that_samples_have_the_variance_of_the_data():
    """Where D(x, smin) = x the second slope is 0: to average over it halves the step."""
    n, sd, calls = 20, 0.05, []

    class ExactNetwork:  # F with which `denoise` is the exact denoiser, and at smin the identity
        def embed(self, t):
            return t

        def pin(self, x, state):
            return x

        def __call__(self, scaled, t, state):
            x = scaled * math.sqrt(t**2 + 0.25)
            skip, out = 0.25 / ((t - 0.02) ** 2 + 0.25), 0.5 * (t - 0.02) / math.sqrt(t**2 + 0.25)
            return (exact(x, t, sd) - skip * x) / out if t > 0.02 else torch.ones_like(x)

    def denoiser(x, t):
        calls.append(t)
        return denoise(ExactNetwork(), x, t, None)

    x = torch.full((1, 1, 1), math.sqrt(80**2 + sd**2), dtype=torch.float64)  # one deviation
    assert torch.equal(denoiser(x, 0.02), x)
    calls.clear()
    y = ractd.heun_sample(denoiser, x, ractd.karras_sigmas(n))
    assert len(calls) == 2 * n - 3 and 0.02 not in calls
    naive = x
    for t, u in pairwise(ractd.karras_sigmas(n).tolist()):
        slope = (naive - denoiser(naive, t)) / t
        euler = naive + (u - t) * slope
        naive = naive + (u - t) * (slope + (euler - denoiser(euler, u)) / u) / 2
    variance = sd**2 + 0.02**2
    assert y.item() ** 2 == pytest.approx(variance, rel=0.02)
    assert naive.item() ** 2 > 1.1 * variance


def test_in_a_batch_only_the_steps_down_to_smin_are_eulers():
    t, u = torch.tensor([0.5, 0.04, 3.0]), torch.tensor([0.3, 0.02, 0.02])
    x = torch.ones(3, 4, 1)
    batch = ractd.heun_step(exact, x, t, u)
    euler = x + expand((u - t) / t) * (x - exact(x, t))
    assert torch.allclose(batch[1:], euler[1:]) and not torch.allclose(
        batch[0], euler[0], rtol=0.01
    )
    alone = [ractd.heun_step(exact, x[:1], *pair) for pair in zip(t.tolist(), u.tolist())]
    assert torch.allclose(batch, torch.cat(alone))
    assert torch.allclose(ractd.heun_step(exact, x, t, u, smin=0.3)[0], euler[0])


@pytest.mark.parametrize("n", [3, 20, 80])
def test_the_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root(n):
    grid = ractd.karras_sigmas(n)
    assert grid.dtype == torch.float64 and grid.shape == (n,) and (grid.diff() < 0).all()
    assert grid[0].item() == 80 and grid[-1].item() == 0.02  # an Euler step, not half of one
    assert torch.allclose(grid.pow(1 / 7).diff(n=2), torch.zeros(n - 2, dtype=grid.dtype))


def test_the_teachers_noise_is_the_truncated_lognormal():
    torch.manual_seed(0)
    t, normal = ractd.lognormal_levels(100_000), NormalDist(-1.2, 1.2)
    assert t.min() >= 0.02 and t.max() <= 80 and (t == 0.02).float().mean() < 1e-3
    low, high = normal.cdf(math.log(0.02)), normal.cdf(math.log(80))
    for q in (0.01, 0.25, 0.5, 0.9, 0.99):
        quantile = math.exp(normal.inv_cdf(low + q * (high - low)))
        assert (t < quantile).float().mean().item() == pytest.approx(q, abs=0.006)


@pytest.mark.parametrize("level", [0.02, 0.5, 3.0, 80.0])
def test_the_networks_input_has_unit_variance_and_the_denoiser_is_the_identity_at_smin(level):
    torch.manual_seed(0)
    seen = []

    class Net:
        def embed(self, t):
            return None

        def pin(self, x, state):
            return x

        def __call__(self, x, embedding, state):
            seen.append(x)
            return 7 * torch.ones_like(x)

    x = 0.5 * torch.randn(20_000, 4, 1) + level * torch.randn(20_000, 4, 1)
    for t in (level, torch.full((20_000,), level)):
        assert torch.equal(denoise(Net(), x, t, None), x) == (level == 0.02)
        assert seen[-1].std().item() == pytest.approx(1, abs=0.02)


def test_the_edm_loss_is_least_at_the_exact_denoiser():
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(50_000, 4, 1), torch.randn(50_000, 4, 1)
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


def test_squared_error_asks_for_the_mean_and_pseudo_huber_for_the_median():
    data = torch.tensor([1.0] * 3 + [-1.0] * 7).view(10, 1, 1)
    grid = torch.linspace(-1.5, 1.5, 301)
    for distance, best in ((ractd.squared, -0.4), (ractd.pseudo_huber, -1.0)):
        total = torch.stack([distance(data, torch.full_like(data, v)).mean() for v in grid])
        assert grid[total.argmin()].item() == pytest.approx(best, abs=0.011)
    a, c = torch.full((1, 2, 3), 2.0), 0.00054 * math.sqrt(6)
    assert ractd.pseudo_huber(a, 0 * a).item() == pytest.approx(math.sqrt(4 * 6 + c**2) - c)


# ---- network -----------------------------------------------------------------------------------


def test_every_size_of_the_unet_keeps_the_shape_and_hears_the_plan_the_state_and_the_levels():
    for channels in ((8,), (8, 12), (8, 12, 16)):
        for patch, blocks, kernel, student in ((1, 2, 5, True), (2, 1, 1, False), (4, 2, 3, True)):
            torch.manual_seed(0)
            net = UNet1d(2, 3, channels, kernel, blocks, patch, student)
            x, state = torch.randn(5, 16, 2, requires_grad=True), torch.randn(5, 3)
            levels = [torch.rand(5).add(0.1).requires_grad_() for _ in range(1 + student)]
            state.requires_grad_()
            y = net(x, net.embed(*levels), state)
            assert y.shape == x.shape
            y[0].square().sum().backward()
            for value in (x, state, *levels):
                assert value.grad[0].abs().max() > 0 and not value.grad[1:].any()
            assert all(p.grad is not None for p in net.parameters())


def test_a_level_is_a_float_or_one_for_each_sample_and_the_convolution_is_one():
    net, x, state = network(0, True), torch.randn(5, 8, 2), torch.randn(5, 3)
    one, many = net.embed(3.0, 0.5), net.embed(torch.full((5,), 3.0), torch.full((5,), 0.5))
    assert len(one) == 1 and len(many) == 5 and torch.allclose(one.expand_as(many), many, atol=1e-6)
    assert torch.allclose(net(x, one, state), net(x, many, state), atol=1e-5)
    conv = ractd.TemporalConv(2, 4, 5)
    weight = conv.weight.view(4, 5, 2).transpose(1, 2)
    y = nn.functional.conv1d(x.transpose(1, 2), weight, conv.bias, padding=2)
    y = nn.functional.silu(nn.functional.layer_norm(y.transpose(1, 2), (4,)))
    assert torch.allclose(conv(x), y, atol=1e-5)


def test_a_student_with_the_teachers_weights_is_the_teacher_for_every_k():
    teacher, x, state = network(1), torch.randn(6, 8, 2), torch.randn(6, 3)
    student = UNet1d(2, 3, channels=(8, 16), patch=2, student=True)
    teacher.pinned = ((0, 1), (-1, 0))
    ractd.warm_start(student, teacher)
    assert student.pinned == teacher.pinned
    t = ractd.lognormal_levels(6)
    for k in (t, t / 2, torch.full((6,), 0.02)):
        expected = denoise(teacher, x, t, state)
        assert torch.allclose(denoise(student, x, t, state, k), expected, rtol=1e-5, atol=1e-5)


# ---- student -----------------------------------------------------------------------------------


def test_a_jump_to_where_it_starts_is_the_identity_and_a_jump_to_zero_is_the_network():
    net, x, state = network(0, True), torch.randn(5, 8, 2), torch.randn(5, 3)
    t, zero = ractd.lognormal_levels(5), torch.full((5,), 1e-30)
    assert torch.equal(student_jump(net, x, t, t, state), x)
    g = denoise(net, x, t, state, zero)
    assert torch.allclose(student_jump(net, x, t, zero, state), g)
    assert not torch.allclose(g, denoise(net, x, t, state, t))
    k = t / 4
    half = 0.25 * x + 0.75 * denoise(net, x, t, state, k)
    assert torch.allclose(student_jump(net, x, t, k, state), half, atol=1e-6)


@pytest.mark.parametrize("student", [False, True])
def test_pinned_places_are_clean_at_every_level_and_the_network_sees_them(student):
    """Also at noise 80, where c_in x would hide them; what is free is as without pins."""
    torch.manual_seed(0)
    net, seen = UNet1d(3, 4, channels=(8, 8), patch=1, student=student), []
    net.register_forward_hook(lambda net, inputs, output: seen.append(inputs[0]))
    net.pinned = ((0, 0), (0, 2), (-1, 1))
    free = torch.ones(8, 3, dtype=torch.bool)
    free[0, 0] = free[0, 2] = free[-1, 1] = False
    state, x = torch.rand(5, 4), 80 * torch.randn(5, 8, 3)

    def clean(x):
        places = torch.stack([x[:, 0, 0], x[:, 0, 2], x[:, -1, 1]], dim=1)
        return torch.allclose(places, state[:, :3], atol=1e-6)

    kept = x.clone()
    for level in (0.02, 1.0, 80.0):
        for t in (level, torch.full((5,), level)):
            k = (torch.full((5,), 0.02) if torch.is_tensor(t) else 0.02) if student else None
            y = denoise(net, x, t, state, k)
            assert clean(y) and clean(seen[-1]) and torch.equal(x, kept) and not clean(x)
            c_skip, c_out, c_in, embedding = ractd.precondition(net, t, k)
            assert torch.equal(seen[-1][:, free], (c_in * x)[:, free])
            bare = c_skip * x + c_out * net(seen[-1], embedding, state)
            assert torch.equal(y[:, free], bare[:, free])
            if student:
                assert clean(student_jump(net, x, t, k, state))
    if student:
        jump = lambda x, t, k: student_jump(net, x, t, k, state)
        assert clean(ractd.student_sample(jump, x, ractd.karras_sigmas(5), nfe=3))
    else:
        denoiser = lambda x, t: denoise(net, x, t, state)
        assert clean(ractd.heun_sample(denoiser, net.pin(x, state), ractd.karras_sigmas(5)))


def test_jumps_are_drawn_with_the_documented_frequencies():
    torch.manual_seed(0)
    n, count = 5, 40_000
    grid = ractd.karras_sigmas(n)
    jumps = ractd.draw_jumps(count, grid)
    i_t, i_u, i_k = ((v[:, None] == grid).float().argmax(1) for v in jumps)
    assert torch.equal(i_u, i_t + 1) and (i_k >= i_u).all()
    table = torch.zeros(n, n).index_put_((i_t, i_k), torch.tensor(1 / count), accumulate=True)
    expected = torch.tensor(
        [[(k > t) / (n - 1) / max(1, n - 1 - t) for k in range(n)] for t in range(n)]
    )
    assert (table - expected).abs().max() < 0.01 and torch.equal(table > 0, expected > 0)


def test_the_ctm_loss_of_the_exact_student_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(5000, 4, 1).double(), torch.randn(5000, 4, 1).double()

    def losses(n, factor=1.0, shift=0.0):
        t, u, k = ractd.draw_jumps(5000, ractd.karras_sigmas(n))
        x_t, zero = x0 + expand(t) * noise, torch.full_like(t, 0.02)
        share = expand(k / t)
        g = (factor * exact_jump(x_t, t, k) + shift - share * x_t) / (1 - share)
        loss = ractd.ctm_loss(g, x_t, t, u, k, exact, exact_jump, distance=ractd.squared)
        error = ractd.heun_step(exact, x_t, t, u) - exact_jump(x_t, t, u)
        return loss.item(), exact_jump(error, u, zero).square().mean().item()

    (coarse, coarse_error), (fine, fine_error) = losses(20), losses(40)
    assert coarse == pytest.approx(coarse_error) and fine == pytest.approx(fine_error)
    assert 0 < fine < coarse / 8
    assert fine < losses(40, 1.1)[0] < losses(40, 1.3)[0]
    assert fine < losses(40, shift=0.1)[0] and fine < losses(40, 0.9)[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target(share):
    """k = share u; at k = u the student is compared with the teacher's step itself."""
    net, state = frozen(network(2, True)), torch.randn(4, 3)
    x_t, factor = torch.randn(4, 8, 2), torch.tensor(0.5, requires_grad=True)
    t, u = torch.tensor([2.0, 1.0, 0.5, 9.0]), torch.tensor([1.0, 0.6, 0.3, 8.0])
    k, smin = share * u, torch.full((4,), 0.02)
    g = torch.randn(4, 8, 2, requires_grad=True)
    jumps = []

    def frozen_jump(x, t, k):
        jumps.append(torch.is_grad_enabled())
        return student_jump(net, x, t, k, state)

    loss = ractd.ctm_loss(g, x_t, t, u, k, lambda x, t: factor * x, frozen_jump)
    loss.backward()
    assert factor.grad is None and sorted(jumps) == [False, False, True]
    x_u = ractd.heun_step(lambda x, t: 0.5 * x, x_t, t, u)
    target = x_u if share == 1 else student_jump(net, x_u, u, k, state)
    target = student_jump(net, target, k, smin, state)
    copy = g.detach().requires_grad_()
    estimate = student_jump(net, jump_from(x_t, copy, t, k), k, smin, state)
    expected = ractd.pseudo_huber(estimate, target).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(g.grad, copy.grad, rtol=1e-4, atol=1e-7)
    assert g.grad.flatten(1).norm(dim=1).min() > 0


def distil(student=None, teacher=1, d=ractd.pseudo_huber, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, networks)."""
    nets = SimpleNamespace(student=student or network(0, True), teacher=network(teacher))
    nets.target = frozen(network(2, True))
    torch.manual_seed(3)
    nets.R = frozen(ractd.RewardModel(3, 2, actions=2))
    state, x0 = torch.randn(16, 3), torch.rand(16, 8, 2) - 0.5
    config = Config(**{"grid_points": 10, "reward_weight": 1.0, **config})
    reward_model = nets.R if config.reward_weight else None
    loss, info = ractd.distillation_loss(
        nets.student, nets.target, nets.teacher, reward_model, state, x0, config, d
    )
    return loss, info, nets


def test_the_distance_of_eq_5_is_that_of_its_whole_paths_and_of_no_other_loss():
    (_, usual, _), (_, other, _) = distil(), distil(d=lambda a, b: 3 + 0 * ractd.squared(a, b))
    assert other["ctm"] == other["path"] == 3 and usual["ctm"] != 3
    assert other["dsm"] == usual["dsm"] and other["R"] == usual["R"]


WEIGHTS = {"ctm_weight": 1.5, "dsm_weight": 3.0, "reward_weight": 2.0}
PAPER_LOSSES = {"dsm_target": "jump", "distance": "pseudo-huber"}


@pytest.mark.parametrize("alone", WEIGHTS)
@pytest.mark.parametrize("options", [{}, PAPER_LOSSES])
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
    for name, value in PAPER_LOSSES.items():
        changed = distil(**{name: value})[1]
        assert [key for key in info if changed[key] != info[key]], name
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


def test_the_path_loss_of_the_exact_jump_is_heuns_error_and_else_the_distance():
    torch.manual_seed(0)
    x_T = 20 * torch.randn(2000, 4, 1).double()
    smin, grid = torch.full((2000,), 0.02), ractd.karras_sigmas
    plan = exact_jump(x_T, torch.full((2000,), 80.0), smin)
    coarse, fine = (ractd.path_loss(plan, x_T, exact, grid(n)).item() for n in (7, 40))
    assert 0 < fine < coarse / 10 < 0.01  # sqrt(4) times that of an action
    shifted = (plan + 0.3).requires_grad_()
    loss = ractd.path_loss(shifted, x_T, exact, grid(80), distance=ractd.squared)
    assert loss.item() == pytest.approx(0.09, rel=0.02)
    loss.backward()
    assert torch.allclose(
        shifted.grad, torch.full_like(plan, 0.6 / plan.numel()).double(), rtol=0.1
    )


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_whole_paths_start_where_the_policy_does_and_belong_to_the_ctm_loss(
    temperature, monkeypatch
):
    seen, original = [], ractd.path_loss
    monkeypatch.setattr(ractd, "path_loss", lambda *a: seen.append(a) or original(*a))
    loss, info, nets = distil(
        path_batch=12, temperature=temperature, dsm_weight=0.0, reward_weight=0.0, ctm_weight=2.0
    )
    ((plan, x_T, _, sigmas, _),) = seen
    assert len(plan) == 12 and x_T.std().item() == pytest.approx(80 * temperature, rel=0.2)
    torch.manual_seed(3)
    frozen(ractd.RewardModel(3, 2, actions=2))  # draws as `distil` does before the states
    state = torch.randn(16, 3)[:12]
    assert torch.allclose(plan, student_jump(nets.student, x_T, 80.0, 0.02, state), atol=1e-5)
    end = ractd.heun_sample(lambda x, t: denoise(nets.teacher, x, t, state), x_T, sigmas)
    assert info["path"] == ractd.pseudo_huber(plan, end).mean()
    assert loss.item() == pytest.approx(2 * (info["ctm"] + info["path"]).item(), rel=1e-5)
    assert "path" not in distil(path_batch=0)[1]


@pytest.mark.parametrize("target", ["denoiser", "jump"])
def test_dsm_compares_the_denoiser_or_the_jump_to_zero_and_the_reward_sees_the_one_call_plan(
    target, monkeypatch
):
    calls, seen, original = [], {}, ractd.denoise
    losses = {name: getattr(ractd, name) for name in ("dsm_loss", "reward_loss")}

    def record(name, *args):
        seen[name] = args
        return losses[name](*args)

    monkeypatch.setattr(ractd, "denoise", lambda *a: calls.append(a) or original(*a))
    for name in losses:
        monkeypatch.setattr(ractd, name, functools.partial(record, name))
    _, _, nets = distil(dsm_target=target, path_batch=0)
    both, reward = ([*args] for args in calls if args[0] is nets.student)
    _, (x, t, state, k) = zip(*(q.chunk(2) for q in both[1:]), strict=True)
    assert torch.equal(k, t if target == "denoiser" else torch.full_like(t, 0.02))
    g = original(nets.student, x, t, state, k)
    prediction, _, level, _ = seen["dsm_loss"]
    expected = g if target == "denoiser" else jump_from(x, g, t, k)
    assert torch.allclose(prediction, expected, atol=1e-5) and torch.equal(level, t)
    _, x_T, top, state, zero, _ = reward
    assert (zero == torch.tensor(0.02)).all() and (top == 80).all()
    plan = student_jump(nets.student, x_T, top, zero, state)
    assert torch.allclose(seen["reward_loss"][2], plan, atol=1e-5)
    assert x_T.std().item() == pytest.approx(0.25 * 80, rel=0.2)  # where the policy acts


def test_the_reward_loss_is_minus_the_mean_return_and_has_no_slope_outside_the_box():
    plan = torch.tensor([[[0.5, -2.0]], [[0.1, 0.2]]], requires_grad=True)
    loss = ractd.reward_loss(lambda s, x: 5 * x.sum((1, 2)), None, plan)
    loss.backward()
    assert plan.grad.tolist() == [[[-2.5, 0.0]], [[-2.5, -2.5]]] and loss == 0.5


def test_the_reward_model_hears_the_state_and_its_first_actions_and_v_the_state_alone():
    R = ractd.RewardModel(3, 2, actions=2, networks=3)
    state, plan = torch.randn(5, 3, requires_grad=True), torch.randn(5, 8, 2, requires_grad=True)
    assert R(state, plan).shape == R.V(state).shape == (5,)
    each = R.each(state, plan)
    assert each.shape == (3, 5) and each.std(0).min() > 0
    assert torch.allclose(each.sum(0) / 3, R(state, plan))
    R(state, plan).sum().backward()
    heard = plan.grad.abs().amax((0, 2)) > 0
    assert heard.tolist() == [True] * 2 + [False] * 6 and state.grad.abs().min() > 0


# ---- the tilt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.01, 2.0])
def test_v_is_the_log_of_the_mean_exponential(sigma):
    """Of R ~ N(1, 0.5^2): 1 + sigma 0.5^2 / 2, nearly the mean for a small sigma."""
    torch.manual_seed(0)
    R = 1 + 0.5 * torch.randn(400_000)
    exact = torch.tensor(1 + sigma * 0.5**2 / 2)

    def slope(value):
        value = value.clone().requires_grad_()
        ractd.value_loss(R.double(), value.double(), sigma).backward()
        return value.grad.item()

    assert abs(slope(exact)) < 0.005
    assert slope(exact - 0.1) < -0.05 and slope(exact + 0.1) > 0.05
    below = torch.tensor(-1000.0)  # far off V still rises, and not faster for it
    assert slope(below) == pytest.approx(slope(below - 1000)) and -1e6 < slope(below) < 0


def test_weights_are_one_on_average_and_capped():
    torch.manual_seed(0)
    R, sigma = 0.3 * torch.randn(400_000), 2.0
    weights = ractd.tilt(R, torch.tensor(sigma * 0.3**2 / 2), sigma)
    assert weights.mean().item() == pytest.approx(1, rel=0.01)
    assert ractd.tilt(torch.tensor(9.0), torch.tensor(0.0), 40.0).item() == pytest.approx(
        math.exp(5)
    )


def test_gaussian_plans_tilted_by_a_linear_reward_are_shifted_and_as_wide_as_before():
    """N(0, SD^2) exp(sigma r x) is N(sigma r SD^2, SD^2), and Eq. 4 asks for its denoiser."""
    torch.manual_seed(0)
    x, slope, sigma = SD * torch.randn(200_000, 1, 1), 2.0, 1.5
    R, V = slope * x.flatten(), sigma * slope**2 * SD**2 / 2
    weights = ractd.tilt(R, torch.tensor(V), sigma)
    drawn = x[torch.multinomial(weights, 200_000, replacement=True)]
    mean = sigma * slope * SD**2
    assert drawn.mean().item() == pytest.approx(mean, abs=0.005)
    assert drawn.std().item() == pytest.approx(SD, rel=0.02)
    t, noise = torch.full((200_000,), 0.4), torch.randn_like(drawn)

    def loss(mean):
        return ractd.edm_loss(lambda x, t: mean + exact(x - mean, t), drawn, t, noise)

    assert loss(mean) < loss(mean + 0.05) and loss(mean) < loss(mean - 0.05) < loss(0.0)


def test_windows_are_drawn_by_their_weights():
    torch.manual_seed(0)
    _, ends, _, rewards = episodes(4)
    rows, at_end = np.arange(len(rewards))[:, None], np.isin(range(len(rewards)), ends)
    data = ractd.Dataset("d", "file", [rows, rows, rewards, 0 * at_end, at_end])
    batches = ractd.Batches(data, horizon=4)
    weights = torch.zeros(len(batches.starts))
    weights[3], weights[7] = 1.0, 3.0
    state, _ = batches.windows(4000, weights)
    row = ractd.decode(state, batches.normalizer["obs"])[:, 0].round().long()
    share = (row == batches.starts[7]).float().mean().item()
    assert share == pytest.approx(0.75, abs=0.03)
    assert ((row == batches.starts[7]) | (row == batches.starts[3])).all()


def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54():
    grid = ractd.karras_sigmas(80)
    for nfe, levels in ((1, [80.0]), (3, [80.0, 12.015, 0.885])):
        calls = []

        def jump(x, t, k, calls=calls):
            calls.append((x, t, k))
            return 0 * x

        x = ractd.student_sample(jump, torch.full((2, 4, 1), 5.0), grid, nfe, torch.ones_like)
        assert len(calls) == nfe and x.shape == (2, 4, 1)
        for (x, t, k), level in zip(calls, levels, strict=True):
            assert t == pytest.approx(level, 1e-3) and k == pytest.approx(0.02)
            scale = math.sqrt(t**2 - 0.02**2) if level < 80 else 5.0
            assert x.flatten().tolist() == pytest.approx([scale] * 8)


def test_teacher_and_ctd_keep_two_unequal_modes_and_ractd_moves_to_the_good_one(tmp_path):
    """Figure 3 in miniature. Equal modes could not tell a mean from a median or a collapse.

    30 % of the plans lie near +0.6 and have return +1, 70 % near -0.6 with return -1.
    """
    torch.manual_seed(0)
    size = {"channels": (32,), "kernel": 1, "patch": 16, "teacher_warmup": 50, "student_warmup": 50}
    size |= {"teacher_steps": 600, "student_steps": 600, "student_lr": 2e-3, "tilted_steps": 300}
    size |= {"reward_steps": 300, "target_decay": 0.9, "temperature": 1.0}
    config, batch, n, grid = Config(**size), 128, 1000, ractd.karras_sigmas(20)
    state, states, z = torch.zeros(batch, 1), torch.zeros(n, 1), torch.randn(n, 16, 1)

    def draw(weights=None):
        mode = torch.where(torch.rand(16 * batch) < 0.3, 1.0, -1.0)
        x0 = 0.6 * expand(mode) + 0.1 * torch.randn(16 * batch, 16, 1)
        if weights is None:
            return x0[:batch], mode[:batch]
        drawn = torch.multinomial(weights(x0), batch, replacement=True)
        return x0[drawn], mode[drawn]

    def train(name, stage, net, loss_fn):
        ractd.fit(stage, net, loss_fn, config, tmp_path / f"{name}.pt", {})
        net.load_state_dict(torch.load(tmp_path / f"{name}.pt")["ema"])
        return frozen(net)

    def teacher_loss(net, _, weights=None):
        x0, _ = draw(weights)
        t, noise = ractd.lognormal_levels(batch), torch.randn_like(x0)
        return ractd.edm_loss(lambda x, t: denoise(net, x, t, state), x0, t, noise), {}

    def reward_model_loss(net, _):
        x0, go = draw()
        reward = net(state, x0)
        log_mean = ractd.value_loss(reward.detach(), net.V(state), config.reward_weight)
        return (reward - go).square().mean() + log_mean, {}

    def weights(x0):
        state = torch.zeros(len(x0), 1)
        return ractd.tilt(R(state, x0), R.V(state), config.reward_weight)

    teacher = train("teacher", "teacher", ractd.make_unet(config, (1, 1)), teacher_loss)
    R = train("reward", "reward", ractd.RewardModel(1, 1, actions=4), reward_model_loss)
    tilted = ractd.make_unet(config, (1, 1))
    tilted.load_state_dict(teacher.state_dict())
    tilted = train("tilted", "tilted", tilted, functools.partial(teacher_loss, weights=weights))
    samples = [
        ractd.heun_sample(lambda x, t, net=net: denoise(net, x, t, states), 80 * z, grid)
        for net in (teacher, tilted)
    ]
    for name, solver, how in (("CTD", teacher, None), ("RACTD", tilted, weights)):
        student = ractd.make_unet(config, (1, 1), student=True)
        ractd.warm_start(student, solver)

        def student_loss(net, target, solver=solver, how=how):
            x0, _ = draw(how)
            return ractd.distillation_loss(net, target, solver, None, state, x0, config)

        actor = train(name, "student", student, student_loss)
        for nfe in (1, 2):
            x = ractd.student_sample(
                lambda x, t, k, net=actor: student_jump(net, x, t, k, states), 80 * z, grid, nfe
            )
            samples.append(x)
    mean = torch.stack([x.mean((1, 2)) for x in samples])
    good, between = ((m.float().mean(1).tolist()) for m in (mean > 0.4, mean.abs() < 0.4))
    for i in (0, 2, 3):  # teacher, CTD by one call and two
        assert 0.15 < good[i] < 0.45 and between[i] < 0.15, (good, between)
    for i in (1, 4, 5):  # tilted teacher, RACTD by one call and two
        assert good[i] > 0.95 and between[i] < 0.05, (good, between)
        assert 0.5 < mean[i].mean() < 0.7 and samples[i].std() < 0.25  # where the data are


# ---- data --------------------------------------------------------------------------------------


def episodes(horizon):
    """Random episodes, one of `horizon` rows, one of 1 -> (begins, ends, terminated, rewards)."""
    rng = np.random.default_rng(horizon)
    lengths = np.array([horizon, 1, horizon + 1, 130, *rng.integers(1, 3 * horizon, 8)])
    ends = lengths.cumsum() - 1
    return ends - lengths + 1, ends, rng.random(12) < 0.5, rng.normal(size=lengths.sum())


@pytest.mark.parametrize("horizon", [1, 4, 16])
def test_windows_and_returns_to_go_equal_brute_force(horizon):
    begins, ends, terminated, rewards = episodes(horizon)
    spans = list(zip(begins, ends, strict=True))
    inside = [any(b <= i <= e + 1 - horizon for b, e in spans) for i in range(len(rewards))]
    assert ractd.window_starts(begins, ends, horizon).tolist() == np.flatnonzero(inside).tolist()
    go = ractd.returns_to_go(rewards, begins, ends, terminated, 0.9)
    for (b, e), fell in zip(spans, terminated, strict=True):
        tail = 0.0 if fell else rewards[b : e + 1][-100:].mean() / (1 - 0.9)
        for i in range(b, e + 1):
            value = sum(0.9 ** (j - i) * rewards[j] for j in range(i, e + 1))
            assert go[i] == pytest.approx(value + 0.9 ** (e + 1 - i) * tail)


def test_the_normaliser_maps_to_the_box_and_back_also_a_constant_column():
    x = np.float32([[1, 5, -3], [3, 5, 0], [2, 5, 7]])
    table = ractd.fit_range(torch.tensor(x))
    y = ractd.encode(torch.tensor(x), table)
    assert y.amin(0).tolist() == [-1, 0, -1] and y.amax(0).tolist() == [1, 0, 1]
    assert torch.allclose(ractd.decode(y, table), torch.tensor(x))


def test_batches_stay_inside_an_episode_and_reach_every_row():
    torch.manual_seed(0)
    _, ends, terminated, rewards = episodes(4)
    n, episode = len(rewards), np.searchsorted(ends, np.arange(len(rewards)))
    rows = np.stack([np.arange(n), episode], 1)  # observation = action = where
    at_end = np.isin(range(n), ends)
    fell = np.isin(range(n), ends[terminated])
    data = ractd.Dataset("d", "file", [rows, rows, rewards, fell, at_end & ~fell])
    batches = ractd.Batches(data, horizon=4)
    where = {name: batches.normalizer[name] for name in ("obs", "action", "return")}
    state, x0 = batches.windows(5000)
    row = ractd.decode(state, where["obs"])[:, 0].round().int().numpy()
    x0 = ractd.decode(x0, where["action"]).round().int().numpy()
    assert set(row) == set(ractd.window_starts(data.begins, data.ends, 4))
    assert (x0[:, :, 0] == row[:, None] + range(4)).all()
    assert (x0[:, :, 1] == episode[row][:, None]).all()
    state, plan, go = batches.transitions(5000, 3)
    plan = ractd.decode(plan, where["action"])[:, :, 0].round().long().numpy()
    row = plan[:, 0]
    assert set(row) == set(range(n))
    last = ends[episode[row]][:, None]
    assert (plan == np.minimum(row[:, None] + range(3), last)).all()  # the last action repeated
    assert (ractd.decode(state, where["obs"])[:, 0].round().numpy() == row).all()
    truth = ractd.returns_to_go(data.rewards, data.begins, data.ends, data.terminated)[row]
    assert np.allclose(ractd.decode(go[:, None], where["return"])[:, 0], truth, atol=1e-3)


@pytest.mark.parametrize("n", [1, 4])
def test_td_targets_equal_brute_force_and_no_episode_is_followed_by_the_next(n):
    """n rewards and V of the row after them; within n of the end the return-to-go stays."""
    torch.manual_seed(0)
    begins, ends, terminated, rewards = episodes(4)
    rows, last = np.arange(len(rewards)), np.repeat(ends, ends - begins + 1)
    at_end, fell = np.isin(rows, ends), np.isin(rows, ends[terminated])
    rewards = rewards.astype(np.float32)
    data = ractd.Dataset("d", "file", [rows[:, None], rows[:, None], rewards, fell, at_end & ~fell])
    batches = ractd.Batches(data, horizon=4, gamma=0.9)
    where = batches.normalizer

    def value(state):  # of row i, in the rewards' unit: 5 + i
        row = ractd.decode(state, where["obs"])
        return ractd.encode(5 + row, where["return"]).squeeze(1)

    state, _, target = batches.transitions(3000, n, value)
    row = ractd.decode(state, where["obs"])[:, 0].round().long().numpy()
    found = ractd.decode(target[:, None], where["return"])[:, 0].numpy()
    go = ractd.returns_to_go(rewards, begins, ends, terminated, 0.9)
    for t, target in zip(row, found, strict=True):
        if t + n > last[t]:
            expected = go[t]
        else:
            steps = sum(0.9**i * rewards[t + i] for i in range(n))
            expected = steps + 0.9**n * (5 + t + n)
        assert target == pytest.approx(expected, abs=2e-3)
    assert set(row) == set(rows)


def make_minari(name, rows, ends, env="Hopper-v4", eval_env=None):
    buffers = []
    for begin, end in pairwise([0, *(ends + 1)]):
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
    options = {"env": gymnasium.make(env), "eval_env": eval_env}
    with contextlib.nullcontext() if eval_env else pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(name, buffers, **options)


def test_a_minari_dataset_is_the_same_data_and_acts_in_the_environment_that_it_recovers(
    tmp_path, monkeypatch, capsys
):
    rows = logged()
    one = ractd.load_dataset(ENV, write(tmp_path / "a.hdf5", rows))
    assert one.ends.tolist() == [39, 47, 52, 112, 132]
    assert one.terminated.tolist() == [True, False, True, False, False]  # unfinished: a time limit
    make_minari("test/rows-v0", rows, one.ends)
    two = ractd.load_dataset(ENV, "minari:test/rows-v0")
    for key in ("observations", "actions", "rewards", "ends", "terminated"):
        assert np.array_equal(getattr(one, key), rows.get(key, getattr(one, key)))
        assert np.array_equal(getattr(one, key), getattr(two, key))
    monkeypatch.setattr(ractd, "TASKS", {})  # no other way to the environment
    assert ractd.main(["distill", "--data=minari:test/rows-v0", *FLAGS["distill"]]) == 0
    trained = metrics("runs/test-rows-v0")
    assert ractd.main(["evaluate", "--env=test/rows-v0", "--episodes=3"]) == 0
    assert metrics("runs/test-rows-v0")["returns"] == trained["returns"]
    assert "test/rows-v0 on test/rows-v0 (minari, not D4RL's file)" in capsys.readouterr().out
    refused(capsys, ractd.main(["distill", "--env=test/rows-v0"]), "unknown")


def test_a_goal_dict_becomes_its_goal_and_its_observation_side_by_side():
    goal, observation = {"b": np.ones((5, 2)), "a": np.zeros((5, 1))}, np.full((5, 3), 7)
    dicts = {"observation": observation, "achieved_goal": goal, "desired_goal": goal}
    assert np.array_equal(ractd.flat(dicts)[4], [0, 1, 1, 7, 7, 7])
    assert ractd.flat(observation) is observation
    rows = {"observation": observation[0], "desired_goal": np.zeros(2)}
    assert np.array_equal(ractd.flat(rows), [0, 0, 7, 7, 7])


KITCHEN = ["microwave", "kettle", "light switch", "slide cabinet"]


def make_kitchen(name, lengths=(30, 24)):
    """A Minari set of random actions in the real FrankaKitchen, with D4RL's reference scores."""
    gymnasium.register_envs(gymnasium_robotics)
    env, buffers = gymnasium.make("FrankaKitchen-v1", tasks_to_complete=KITCHEN), []
    env.action_space.seed(0)
    for seed, n in enumerate(lengths):
        observations, rewards = [env.reset(seed=seed)[0]], []
        actions = [env.action_space.sample() for _ in range(n)]
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(float(reward))

        def column(*keys, rows=tuple(observations)):
            return np.stack([functools.reduce(dict.__getitem__, keys, row) for row in rows])

        goals = ("achieved_goal", "desired_goal")
        dicts = {key: {task: column(key, task) for task in KITCHEN} for key in goals}
        dicts |= {"observation": column("observation")}
        ends = {"terminations": [False] * n, "truncations": [False] * (n - 1) + [True]}
        steps = {"observations": dicts, "actions": np.stack(actions), "rewards": rewards}
        buffers.append(EpisodeBuffer(**steps, **ends))
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            name, buffers, env=env.spec, ref_min_score=0.0, ref_max_score=4.0
        )


def test_franka_kitchen_is_read_planned_in_and_scored_by_minaris_own_reference(capsys):
    make_kitchen("test/kitchen-v0")
    data = ractd.load_dataset("", "minari:test/kitchen-v0")
    assert data.observations.shape == (54, 11 + 59) and data.actions.shape == (54, 9)
    assert data.ends.tolist() == [29, 53] and not data.terminated.any()
    env = ractd.simulator("test/kitchen-v0", data.summary())()
    assert env.unwrapped.tasks_to_complete == set(KITCHEN) and env.spec.max_episode_steps == 280
    first, _ = env.reset(seed=0)
    assert first[:11] == pytest.approx(data.observations[0, :11])  # the goal: constant
    assert first[11:] == pytest.approx(data.observations[0, 11:], abs=0.1)  # noise of sensors
    stored = minari.load_dataset("test/kitchen-v0")
    for value in (3.0, np.array([0.0, 1.0, 4.0])):
        score = ractd.normalized_score("test/kitchen-v0", value, data.summary())
        assert np.array_equal(score, 25 * value)
        assert np.array_equal(score, 100 * minari.get_normalized_score(stored, value))
    flags = [*FLAGS["distill"], "--episodes=1"]
    assert ractd.main(["distill", "--data=minari:test/kitchen-v0", *flags]) == 0
    result = metrics("runs/test-kitchen-v0")
    assert result["lengths"] == [280] and result["score_mean"] == 25 * result["return_mean"]
    refused(capsys, ractd.main(["distill", "--env=test/kitchen-v0"]), "unknown")


def test_acting_is_in_the_environment_that_a_minari_set_means_for_it():
    rows = logged()
    ends = ractd.load_dataset(ENV, write("a.hdf5", rows)).ends
    make_minari(
        "test/rows-v0", rows, ends, eval_env=gymnasium.make("Hopper-v4", max_episode_steps=7)
    )
    data = ractd.load_dataset("", "minari:test/rows-v0").summary()
    assert ractd.simulator("test/rows-v0", data)().spec.max_episode_steps == 7
    assert math.isnan(ractd.normalized_score("test/rows-v0", 1.0, data))  # no reference scores


def test_a_million_transitions_load_in_seconds_and_in_little_memory(tmp_path):
    n = 1_000_000
    rows = {
        "observations": np.random.default_rng(0).random((n, 17), np.float32),
        "actions": np.zeros((n, 6), np.float32),
        "rewards": np.ones(n, np.float32),
        "terminals": np.arange(n) % 333 == 0,
        "timeouts": np.arange(n) % 1000 == 999,
    }
    code = """import resource, sys, time, ractd; began = time.time()
ractd.Batches(ractd.load_dataset("", sys.argv[1]))
print(time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""
    command = [sys.executable, "-c", code, write(tmp_path / "million.hdf5", rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SCRIPT.parent)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 20 and gigabytes < 1.5, (seconds, gigabytes)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on the loopback for a tiny "published" file; .mode says how it behaves."""
    content = Path(write(tmp_path / "published.hdf5", logged())).read_bytes()
    cache = tmp_path / "D4RL_DATASET_DIR" / "hopper_medium_replay-v2.hdf5"
    state = SimpleNamespace(mode="good", content=content, cache=cache)
    answers = {"good": content, "wrong": content[::-1]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.mode == "garbled":
                self.wfile.write(b"no HTTP\r\n\r\n")
                return
            status = 200 if self.path == f"/{cache.name}" else 404
            self.send_response(int(state.mode) if state.mode.isdigit() else status)
            missing = 999 if state.mode in ("broken", "silent") else 0
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            self.wfile.write(answers.get(state.mode, content[:2000]))
            if state.mode == "silent":
                time.sleep(2)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(ractd, "D4RL_URL", f"http://127.0.0.1:{web.server_port}/")
    monkeypatch.setitem(ractd.D4RL_SHA256, ENV, hashlib.sha256(content).hexdigest())
    yield state
    web.shutdown()
    web.server_close()


def test_the_default_data_are_downloaded_checked_and_cached(server, capsys):
    assert cli("data") == 0 and server.cache.read_bytes() == server.content
    server.mode = "wrong"  # a second download would fail
    assert cli("data") == 0 and "(D4RL)" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["broken", "silent", "wrong", "garbled", "404", "503"])
def test_a_failed_download_is_an_error_and_no_reason_for_other_data(
    server, mode, monkeypatch, capsys
):
    server.mode, wait = mode, socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda _: wait(0.5))  # not 20 seconds
    number = mode if mode.isdigit() else ""
    refused(capsys, cli("data"), "not the published file", "--data", number)
    assert not list(server.cache.parent.iterdir())


def test_a_cached_file_that_is_not_the_published_one_is_refused_and_left_alone(server, capsys):
    for content in (server.content[::-1], server.content[:-1]):
        server.cache.write_bytes(content)
        refused(capsys, cli("data"), "not the published file", str(server.cache))
        assert server.cache.read_bytes() == content


def test_without_a_network_one_task_has_data_beside_the_program_and_every_score_says_so(
    tmp_path, capsys
):
    assert cli("distill", "--out=new", *FLAGS["distill"]) == 0
    out = capsys.readouterr().out
    name = "hopper-medium-replay-sac.hdf5"
    for words in (
        "cannot be downloaded",
        str(tmp_path / "D4RL_DATASET_DIR"),
        "200,000 transitions",
    ):
        assert words in out
    assert f"{ENV} on {name} (bundled, not D4RL's file)" in out
    dataset = metrics("new")["dataset"]
    assert dataset["name"] == name and "not D4RL's file" in dataset["source"]
    assert not list((tmp_path / "D4RL_DATASET_DIR").iterdir())


@pytest.mark.parametrize("env", [env for env in ractd.ENVS if env != ENV])
def test_without_a_network_the_other_tasks_name_three_ways_out(env, tmp_path, capsys):
    code = cli("data", env=env)
    out, err = capsys.readouterr()
    assert code == 2 and err.count("ractd.py: ") == 1
    assert f"{env.replace('-', '_')}-v2.hdf5" in out and str(tmp_path / "D4RL_DATASET_DIR") in out
    for way_out in ("put the file", "--data FILE", f"python -m reproduce.collect --env {env}"):
        assert way_out in err


# ---- presets and flags ---------------------------------------------------------------------------


def configured(monkeypatch, *args, env=ENV):
    """The Config that `distill` would run with."""
    runs = []
    monkeypatch.setattr(ractd, "train", runs.append)
    monkeypatch.setattr(ractd, "make_unet", lambda *_: None)  # 240 M parameters
    assert cli("distill", *args, env=env) == 0
    return runs[0].config


SIGMA = {
    "halfcheetah-medium": 0.5,
    "halfcheetah-medium-replay": 1.0,
    "halfcheetah-medium-expert": 0.0,
    "hopper-medium": 1.0,
    "hopper-medium-replay": 1.0,
    "hopper-medium-expert": 0.5,
    "walker2d-medium": 0.4,
    "walker2d-medium-replay": 0.5,
    "walker2d-medium-expert": 0.2,
}


@pytest.mark.parametrize("env", SIGMA)
def test_the_papers_presets_have_its_losses_and_its_sigma_for_each_task(env, monkeypatch):
    losses = {"distance": "pseudo-huber", "dsm_target": "jump", "tilted_steps": 0}
    losses |= {"reward_actions": 1, "reward_networks": 1, "path_batch": 0}
    losses |= {"temperature": 1.0, "reward_weight": SIGMA[env]}
    assert sorted(ractd.ENVS) == sorted(SIGMA)
    assert configured(monkeypatch, env=env) == Config()
    assert configured(monkeypatch, "--preset=paper-losses", env=env) == Config(**losses)
    paper = Config(
        **losses,
        channels=(512, 1024, 2048),
        kernel=5,
        blocks=2,
        patch=1,
        grid_points=80,
        teacher_steps=392_000,
        teacher_batch=1024,
        teacher_lr=1e-4,
        teacher_warmup=2000,
        reward_steps=314_000,
        reward_batch=64,
        reward_lr=2e-4,
        reward_warmup=20,
        student_steps=33_500,
        student_batch=4800,
        student_lr=1e-4,
        student_warmup=500,
        target_decay=0.0,
    )
    assert configured(monkeypatch, "--preset=paper", env=env) == paper


def test_an_explicit_flag_beats_the_preset_and_the_rest_stays(monkeypatch):
    flags = ["--distance=squared", "--reward-weight=3", "--temperature=2", "--channels", "8", "16"]
    expected = ractd.PAPER_LOSSES | {"distance": "squared", "reward_weight": 3.0}
    expected |= {"temperature": 2.0, "channels": (8, 16)}
    assert configured(monkeypatch, "--preset=paper-losses", *flags) == Config(**expected)


def test_the_papers_losses_train_and_act_end_to_end(trained):
    where = [f"--data={trained.data}", "--out=new", "--preset=paper-losses"]
    flags = [flag for flag in FLAGS["distill"] if "tilted" not in flag]
    assert cli("distill", *where, *flags) == 0
    assert metrics("new")["temperature"] == 1 and not Path("new/tilted.pt").exists()
    saved = torch.load("new/student.pt")
    assert saved["config"]["distance"] == "pseudo-huber" and saved["config"]["reward_weight"] == 1.0
    log = saved["log"][-1].keys()
    assert log >= {"ctm", "dsm", "R"} and "path" not in log  # Eqs. 5 to 9, and nothing else
    assert cli("evaluate", "--out=new", "--episodes=3") == 0  # acts as its preset meant it
    assert len(list(Path("new").glob("score_*.json"))) == 1
    assert cli("evaluate", "--out=new", "--episodes=3", "--temperature=0.5") == 0
    assert len(list(Path("new").glob("score_*.json"))) == 2


def test_without_reward_weight_there_is_neither_reward_model_nor_tilt(trained):
    where = [f"--data={trained.data}", "--out=new", "--reward-weight=0"]
    assert cli("distill", *where, *FLAGS["distill"]) == 0
    assert metrics("new")["method"] == "CTD"
    assert sorted(path.stem for path in Path("new").glob("*.pt")) == ["student", "teacher"]


@pytest.mark.parametrize("target", ["return-to-go", "td"])
def test_the_reward_target_changes_the_reward_model_and_is_part_of_its_recipe(
    target, run, trained, capsys
):
    _, give = run
    assert give("reward", f"--reward-target={target}", out="new") == 0
    same = same_weights("new/reward.pt", trained.out / "reward.pt")
    assert same == (target == "return-to-go")
    if not same:
        refused(capsys, give("reward", f"--reward-target={target}"), "reward_target", "reward.pt")


IGNORED = """\
    data --student-lr=3, data --seed=1, data --out=x, data --device=cpu, data --preset=paper,
    teacher --reward-steps=5, teacher --episodes=3, teacher --nfe=2, teacher --reward-weight=1,
    reward --channels=8, reward --distance=squared, reward --student-lr=1, reward --temperature=1,
    reward --tilted-steps=1, teacher --tilted-steps=1, export --candidates=4,
    distill --model=teacher, distill --teacher-points=5,
    evaluate --teacher-lr=1, evaluate --horizon=8, evaluate --data=x, evaluate --seed=1,
    evaluate --preset=paper, export --episodes=3, export --first-seed=1,
    export --gamma=0.9, export --data=x"""


@pytest.mark.parametrize("command_line", re.split(r",\s+", IGNORED))
def test_a_flag_that_a_command_would_ignore_is_not_accepted(command_line, monkeypatch, capsys):
    command, flag = command_line.split()
    monkeypatch.setattr(ractd, "train", None)
    refused(capsys, cli(command, flag), f"unrecognized arguments: {flag}")


BAD_FLAGS = """--channels=0 --channels=9999 --channels=a --kernel=4 --horizon=10 --horizon=-8
    --patch=0 --gamma=1 --gamma=nan --blocks=0 --teacher-steps=0 --teacher-lr=-1
    --teacher-warmup=-1 --reward-batch=0 --grid-points=2 --episodes=0 --nfe=0 --nfe=x --nfe=81
    --seed=-1 --seed=99999999999999999999 --target-decay=2
    --temperature=nan --reward-actions=0 --reward-weight=-2 --tilted-steps=-1 --dsm-target=x
    --candidates=0 --reward-target=x --reward-networks=0 --path-batch=-1
    --distance=x --first-seed=-1 --device=cuda:99 --device=meta --device=x --horizn=8 --preset=x"""


@pytest.mark.parametrize("flag", BAD_FLAGS.split())
def test_a_bad_flag_is_refused_by_name(flag, trained, capsys):
    code = cli("distill", f"--data={trained.data}", *FLAGS["distill"], "--out=never", flag)
    refused(capsys, code, flag.split("=")[0])
    assert not Path("never").exists()


# ---- running -------------------------------------------------------------------------------------


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
        rows = list(map(json.loads, (trained.out / f"{stage}.jsonl").open()))
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and steps[-1] == rows[-1]["steps"] == STEPS
    assert rows[-1].keys() >= {"loss", "ctm", "path", "dsm", "grad"} and "R" not in rows[-1]
    assert "not D4RL's file" in trained.text


def test_a_finished_run_is_not_trained_again_and_repeats_its_returns(run, monkeypatch):
    out, give = run
    before = metrics(out)["returns"]
    monkeypatch.setattr(ractd, "fit", None)
    assert give("distill") == 0 and metrics(out)["returns"] == before


def test_two_different_evaluations_never_share_a_file_and_the_same_one_does(run, monkeypatch):
    out, give = run
    noise, teacher = "--temperature=1", "--model=teacher"
    different = [[], [noise], [f"{noise}.0000001"], ["--nfe=2"], ["--nfe=20"]]
    different += [["--first-seed=1"], ["--episodes=4"], ["--candidates=3"], ["--model=tilted"]]
    different += [[teacher], [teacher, "--teacher-points=5"], [teacher, noise]]
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
        again = [evaluate(*how) for how in different][-1]
    assert {name: score["returns"] for name, score in again.items()} == {
        name: score["returns"] for name, score in found.items()
    }
    (out / "student.pt").unlink()
    assert give("distill", "--student-lr=0.01") == 0  # another student in the same folder
    assert len(evaluate()) == len(found) + 2


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(run, trained):
    _, give = run
    for seed in (0, 1):
        assert give("reward", f"--seed={seed}", out=f"new{seed}") == 0
        assert same_weights(f"new{seed}/reward.pt", trained.out / "reward.pt") == (seed == 0)


def test_a_killed_run_goes_on_to_the_same_bits(run, trained, monkeypatch):
    out, give = run
    path = out / "student.pt"
    path.unlink()
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    where = [f"--env={ENV}", f"--data={trained.data}", f"--out={out}"]
    code = """import os, signal, sys, ractd
calls, step, ractd.SAVE_EVERY = [], ractd.train_step, 0
def killed(*args):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
ractd.train_step = killed
ractd.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, "distill", *where, *FLAGS["distill"]]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert 0 < torch.load(path)["step"] < 20
    assert give("distill") == 0 and same_weights(path, trained.out / "student.pt")
    steps = [json.loads(line)["step"] for line in (out / "student.jsonl").open()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", [7, STEPS])
def test_ctrl_c_saves_and_exits_with_130_and_the_command_goes_on_to_the_same_bits(
    trained, run, monkeypatch, capsys, stage, call
):
    out, give = run
    path, command = out / f"{stage}.pt", stage if stage in FLAGS else "distill"
    path.unlink()
    calls, train_step, handler = [], ractd.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(ractd, "train_step", interrupted)
    assert give(command) == 130 and "goes on" in capsys.readouterr().out
    assert torch.load(path)["step"] == call
    assert signal.getsignal(signal.SIGINT) is handler
    assert give(command) == 0 and len(calls) == STEPS
    assert same_weights(path, trained.out / f"{stage}.pt")
    assert give("distill") == 0  # the student knows the same teacher and reward model again


def test_ctrl_c_while_a_line_is_printed_does_not_say_saved_before_it_is(run, monkeypatch):
    out, give = run
    path, calls, log = out / "teacher.pt", [], ractd.log_progress
    path.unlink()

    def interrupted(*args):
        calls.append(args[1])
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return log(*args)

    monkeypatch.setattr(ractd, "log_progress", interrupted)
    assert give("teacher") == 130 and torch.load(path)["step"] >= calls[2]


def test_fit_warms_up_then_follows_half_a_cosine_and_averages_as_released(tmp_path, monkeypatch):
    seen = []

    def step(net, average, optimizer, loss_fn, decay):
        seen.append((optimizer.param_groups[0]["lr"], decay))
        return {"loss": torch.tensor(0.0)}

    monkeypatch.setattr(ractd, "train_step", step)
    config = Config(teacher_steps=14, teacher_warmup=4, teacher_lr=0.5, target_decay=0.7)
    ractd.fit("teacher", nn.Linear(1, 1), None, config, tmp_path / "a.pt", {})
    rates, decays = zip(*seen, strict=True)
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5]) and rates[9] == 0.25
    assert list(rates[4:]) == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02
    assert decays == pytest.approx([1 - (1 + n) ** -0.75 for n in range(14)])
    seen.clear()
    config = Config(student_steps=3, student_warmup=0, target_decay=0.7)
    ractd.fit("student", nn.Linear(1, 1), None, config, tmp_path / "b.pt", {})
    assert [decay for _, decay in seen] == [0.7] * 3 and seen[0][0] == config.student_lr


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_follows_the_network_as_its_decay_says(decay):
    net, average = nn.Linear(2, 1), frozen(nn.Linear(2, 1))
    optimizer, old = torch.optim.SGD(net.parameters(), 0.1), average.weight.clone()

    def loss(net, given):
        assert given is average
        return net(torch.ones(1, 2)).sum(), {"extra": torch.tensor(3.0)}

    info = ractd.train_step(net, average, optimizer, loss, decay)
    assert info["extra"] == 3 and info["grad"].item() == pytest.approx(math.sqrt(3))
    assert torch.allclose(average.weight, decay * old + (1 - decay) * net.weight)


@pytest.mark.parametrize("name", ["ctm", "dsm"])
def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_checkpoint(
    run, monkeypatch, capsys, name
):
    out, give = run
    (out / "student.pt").unlink()
    loss, calls = getattr(ractd, f"{name}_loss"), []

    def broken(*args, **options):
        calls.append(1)
        return loss(*args, **options) * (1.0 if len(calls) < 5 else math.nan)

    monkeypatch.setattr(ractd, f"{name}_loss", broken)
    monkeypatch.setattr(ractd, "SAVE_EVERY", 0)
    refused(capsys, give("distill"), f"{name} is nan", "learning rate")
    assert 0 < torch.load(out / "student.pt")["step"] < 5


def test_in_a_real_run_all_but_the_student_is_frozen_and_the_averages_are_used(
    run, monkeypatch, capsys
):
    out, give = run
    refused(capsys, give("distill", "--tilted-steps=0"), "tilted: ", "student.pt")
    (out / "student.pt").unlink()
    seen, loss = [], ractd.distillation_loss

    def record(student, target, teacher, *others):
        if not seen:  # it starts as the teacher
            x, state = torch.randn(4, 8, 3), torch.randn(4, 11)
            pair = denoise(student, x, 3.0, state, 0.5), denoise(teacher, x, 3.0, state)
            assert torch.allclose(*pair, atol=1e-5)
        seen.append((student, target, teacher, *others))
        return loss(student, target, teacher, *others)

    monkeypatch.setattr(ractd, "distillation_loss", record)

    def holds(net, stage):
        average = torch.load(out / f"{stage}.pt")["ema"]
        same = all(torch.equal(x, average[name]) for name, x in net.state_dict().items())
        frozen = not net.training and not any(p.requires_grad for p in net.parameters())
        return same and frozen

    assert give("distill") == 0
    student, target, teacher, reward_model = seen[0][:4]
    assert not target.training and not any(p.requires_grad for p in target.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert holds(teacher, "tilted") and reward_model is None  # the tilt takes Eq. 8's place
    seen.clear()
    (out / "student.pt").unlink()
    assert give("distill", "--tilted-steps=0") == 0
    assert holds(seen[0][2], "teacher") and holds(seen[0][3], "reward")
    (out / "student.pt").unlink()
    assert give("distill", "--reward-weight=0") == 0 and seen[-1][3] is None  # CTD
    assert {json.loads(path.read_text())["method"] for path in out.glob("score_*")} == {
        "RACTD",
        "CTD",
    }


def test_tilted_teacher_and_student_learn_from_tilted_windows_and_the_teacher_from_all(
    run, monkeypatch
):
    out, give = run
    saved = ractd.load_checkpoint(out / "reward.pt", "reward")
    R = ractd.make_reward_model(saved, saved["dims"])
    seen, windows = {}, ractd.Batches.windows

    def record(batches, batch, weights=None):
        state, plan = batches.rows(batches.starts, 4)
        exponent = (40 * (R(state, plan) - R.V(state))).clamp(-60, 5)
        seen[stage] = (weights, exponent)
        return windows(batches, batch, weights)

    monkeypatch.setattr(ractd.Batches, "windows", record)
    for stage in ("teacher", "tilted", "student"):
        (out / f"{stage}.pt").unlink()
        assert give("teacher" if stage == "teacher" else "distill") == 0
    assert seen["teacher"][0] is None
    for stage in ("tilted", "student"):
        weights, exponent = seen[stage]  # R and V know little yet: far from 1
        assert torch.allclose(weights.clamp(min=math.exp(-60)).log(), exponent, atol=1e-3)
        assert exponent.std() > 0.1


def test_a_file_that_is_replaced_stays_whole_when_the_writing_is_interrupted(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), ractd.replacing(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with ractd.replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.glob("a*")) == [path]


def test_a_full_disk_loses_nothing(run, monkeypatch, capsys):
    out, give = run
    before = (out / "student.pt").read_bytes()
    next(out.glob("score_*")).unlink()
    (out / "teacher.pt").rename(out / "kept.pt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ractd.os, "replace", full)
    refused(capsys, give("teacher"), "No space left")
    (out / "kept.pt").rename(out / "teacher.pt")
    refused(capsys, give("distill"), "No space left")
    assert (out / "student.pt").read_bytes() == before
    assert not list(out.glob("score_*")) and not list(out.glob("*.part"))


def test_ractd_alone_in_an_empty_folder_does_everything_but_the_offline_data(trained, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    code = f"""import sys, ractd
ractd.D4RL_URL = {CLOSED_PORT!r}
def give(*args):
    return ractd.main([args[0], "--env={ENV}", *args[1:]])
assert not give("distill", "--data={trained.data}", *sys.argv[1:])
assert not give("evaluate", "--episodes=3") and not give("export")
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
    assert (out / "policy.pt2").exists()


# ---- acting and evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_what_a_policy_keeps_between_calls_changes_no_action(trained, stage):
    """The plain calls of section 6, a level for each sample, against the levels made once."""
    checkpoint = ractd.load_checkpoint(trained.out / f"{stage}.pt", stage)
    del checkpoint["net"]  # it is the averaged weights that act
    for nfe in (1, 3):
        policy = ractd.Policy(checkpoint, Config(nfe=nfe, teacher_points=5, temperature=0.5))
        net, tables = policy.net, checkpoint["normalizer"]
        observations, z = torch.randn(5, 11), torch.randn(5, 8, 3)
        state = ractd.encode(observations, tables["obs"])

        def many(t):
            return torch.full((5,), t)

        if stage == "student":
            assert policy.calls == nfe

            def jump(x, t, k, net=net, state=state, many=many):
                return student_jump(net, x, many(t), many(k), state)

            grid = ractd.karras_sigmas(6)
            x = ractd.student_sample(jump, 40 * z, grid, nfe, lambda _, z=z: z / 2)
        else:
            assert policy.calls == 7

            def denoiser(x, t, net=net, state=state, many=many):
                return denoise(net, x, many(t), state)

            x = ractd.heun_sample(denoiser, 40 * z, ractd.karras_sigmas(5))
        expected = ractd.decode(x.clamp(-1, 1), tables["action"])
        for _ in range(2):
            with torch.no_grad():
                plans = policy(observations, lambda _, z=z: z)
            assert plans.shape == (5, 8, 3) and (plans - expected).abs().max() < 1e-6

        def generators():
            return [np.random.default_rng(seed) for seed in range(5)]

        rows = np.stack([g.standard_normal((8, 3), np.float32) for g in generators()])
        if nfe == 1:
            with torch.no_grad():
                plans = policy(observations, lambda _, rows=rows: torch.from_numpy(rows))
            acted = policy.act(observations.numpy(), generators())
            assert np.abs(plans.numpy() - acted).max() < 1e-6


@pytest.mark.parametrize("stage", ["student", "tilted"])
def test_of_several_candidates_the_one_that_r_likes_best_acts(trained, stage):
    checkpoint = ractd.load_checkpoint(trained.out / f"{stage}.pt", stage)
    R = torch.load(trained.out / "reward.pt")
    net = ractd.RewardModel(11, 3, R["config"]["reward_actions"], R["config"]["reward_networks"])
    net.load_state_dict(R["ema"])
    how = {"teacher_points": 5, "temperature": 1.0}
    one = ractd.Policy(checkpoint, Config(**how))
    four = ractd.Policy(checkpoint, Config(**how, candidates=4), out=trained.out)
    observations, z = torch.randn(6, 11), torch.randn(6, 4, 8, 3)
    with torch.no_grad():
        chosen = four(observations, lambda _: z.flatten(0, 1))
        plans = torch.stack([one(observations, lambda _, i=i: z[:, i]) for i in range(4)], 1)
        tables = checkpoint["normalizer"]
        state = ractd.encode(observations, tables["obs"]).repeat_interleave(4, 0)
        values = net(state, ractd.encode(plans, tables["action"]).flatten(0, 1)).reshape(6, 4)
    assert len(set(values.argmax(1).tolist())) > 1  # else the test could not fail
    best = plans[torch.arange(6), values.argmax(1)]
    assert torch.allclose(chosen, best, atol=1e-5)
    acted = four.act(observations.numpy(), [np.random.default_rng(i) for i in range(6)])
    assert acted.shape == (6, 8, 3)


def test_candidates_without_a_reward_model_are_refused(run, capsys):
    out, _ = run
    (out / "reward.pt").unlink()
    refused(capsys, cli("evaluate", f"--out={out}", "--candidates=2"), "reward.pt")


class World:
    """Episodes of 3 + seed steps, the last a fall or a time limit; rewards 2, 4, 8, ..."""

    def __init__(self, log):
        self.log = log

    def reset(self, seed):
        self.seed, self.count = seed, 0
        return np.array([seed, 0.0]), {}

    def step(self, action):
        self.log.append((self.seed, *action))
        self.count += 1
        ended, odd = self.count == 3 + self.seed, self.seed % 2 == 1
        observation = np.array([self.seed, self.count])
        return observation, 2.0**self.count, ended and not odd, ended and odd, {}


def test_returns_count_the_last_reward_and_the_first_action_of_a_plan_is_executed():
    log, seen = [], []

    def act(observations, generators):
        seen.append((observations, [generator.random() for generator in generators]))
        return observations[:, None, 1:] + np.arange(4)[:, None]  # the step number goes on

    result = ractd.evaluate(act, lambda: World(log), 2, first_seed=4)
    assert result["returns"] == [2.0**8 - 2, 2.0**9 - 2] and result["lengths"] == [7, 8]
    assert [action for seed, action in log if seed == 4] == list(range(7)) and len(seen) == 8
    assert seen[0][0][:2].tolist() == [[4, 0], [5, 0]] and seen[1][0][0].tolist() == [4, 1]
    assert seen[0][1][:2] == [np.random.default_rng(seed).random() for seed in (4, 5)]


def test_a_return_does_not_depend_on_how_many_episodes_run_beside_it(trained):
    checkpoint = ractd.load_checkpoint(trained.out / "student.pt", "student")
    act, make = ractd.Policy(checkpoint).act, ractd.simulator(ENV, checkpoint["dataset"])
    together = ractd.evaluate(act, make, 4)["returns"]
    alone = [ractd.evaluate(act, make, 1, first_seed=seed)["returns"][0] for seed in range(4)]
    assert alone == together and len(set(together)) == 4


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
    ],
)
def test_the_normalised_score_has_d4rls_reference_points(env, value, score):
    assert ractd.normalized_score(env, value) == pytest.approx(score, nan_ok=True)


def test_an_exported_policy_acts_the_same_without_this_program(run):
    out, _ = run
    options = {
        "student": {"nfe": 2, "temperature": 1.0},
        "teacher": {"teacher_points": 3, "temperature": 0.1},
    }
    torch.save(torch.randn(5, 11), "observations.pt")
    for model, how in options.items():
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
        assert cli("export", f"--out={out}", f"--model={model}", *flags, f"{model}.pt2") == 0
    code = """import torch
for model in ("student", "teacher"):
    policy = torch.export.load(f"{model}.pt2").module()
    torch.manual_seed(3)
    torch.save(policy(torch.load("observations.pt")), f"{model}.pt")"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True)  # -I: no ractd.py on its path
    for model, how in options.items():
        policy = ractd.Policy(ractd.load_checkpoint(out / f"{model}.pt", model), Config(**how))
        torch.manual_seed(3)
        with torch.no_grad():
            expected = policy(torch.load("observations.pt"))
        assert torch.allclose(torch.load(f"{model}.pt"), expected, atol=1e-5)


def test_a_policy_acts_from_the_noise_it_was_trained_for_unless_told_otherwise(trained):
    checkpoint = ractd.load_checkpoint(trained.out / "student.pt", "student")
    checkpoint["config"]["temperature"] = 0.7
    assert ractd.Policy(checkpoint).temperature == 0.7
    assert ractd.Policy(checkpoint, Config(temperature=0.1)).temperature == 0.1


def test_a_policy_can_act_before_and_after_its_export(trained):
    policy = ractd.Policy(ractd.load_checkpoint(trained.out / "student.pt", "student"))
    observations = torch.randn(4, 11)

    def export():
        program = torch.export.export(policy, (observations,))
        torch.manual_seed(1)
        return program.module()(observations)

    def act():
        torch.manual_seed(1)
        return policy(observations)

    first, plans, second = export(), act(), export()
    policy.act(observations.numpy(), [np.random.default_rng(0)] * 4)
    for other in (first, second, act(), export()):
        assert torch.allclose(other, plans, atol=1e-5)


# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

BAD_ROWS = {
    "lacks timeouts": lambda rows: rows.pop("timeouts"),
    "rewards has shape (100,)": lambda rows: rows.update(rewards=rows["rewards"][:100]),
    "observations has shape (133,)": lambda rows: rows.update(observations=rows["rewards"]),
    "actions has shape (133, 3) and type |S1": lambda rows: rows.update(
        actions=np.full((133, 3), b"x")
    ),
    "rewards is NaN or infinite in row 7": lambda rows: rows["rewards"].put(7, math.nan),
    "[9, 3] observations": lambda rows: rows.update(observations=rows["observations"][:, :9]),
    "[11, 2] observations and actions": lambda rows: rows.update(actions=rows["actions"][:, :2]),
    "--horizon 8": lambda rows: rows.update(terminals=np.arange(133) % 5 == 4),
    "no episode ends": lambda rows: rows.update(terminals=np.zeros(133), timeouts=np.zeros(133)),
    "has shape (0,": lambda rows: rows.update({key: x[:0] for key, x in rows.items()}),
}


@pytest.mark.parametrize("sentence", BAD_ROWS)
def test_a_bad_dataset_is_refused(sentence, tmp_path, capsys):
    rows = logged()
    BAD_ROWS[sentence](rows)
    data = write(tmp_path / "bad.hdf5", rows)
    refused(capsys, cli("distill", *FLAGS["distill"], f"--data={data}"), "bad.hdf5", sentence)


def test_a_task_whose_actions_are_no_vector_is_refused(tmp_path, capsys):
    data = write(tmp_path / "cart.hdf5", logged(o=4, a=1))
    code = cli("distill", *FLAGS["distill"], f"--data={data}", env="CartPole-v1")
    refused(capsys, code, "[4, 1] observations and actions, CartPole-v1 [4, 0]")


def test_a_missing_or_damaged_file_is_refused(tmp_path, capsys, monkeypatch):
    path, whole = tmp_path / "bad.hdf5", Path(write(tmp_path / "good.hdf5", logged())).read_bytes()
    refused(capsys, cli("data", f"--data={path}"), str(path))
    for content in (b"no HDF5", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(capsys, cli("data", f"--data={path}"), str(path))
    refused(capsys, cli("data", "--data=minari:no/such-v0"), "no/such-v0")
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: 1 / 0)  # as a network may fail
    refused(capsys, cli("data", "--data=minari:no/such-v0"), "no/such-v0", "ZeroDivision")


def test_an_unknown_env_is_answered_with_the_names(tmp_path, capsys):
    sentence = "hopper-medium, hopper-medium-replay"
    refused(capsys, cli("data", env="hoper-medium-repaly"), sentence)
    refused(capsys, ractd.main(["data"]), "--env")
    for command in ("teacher", "distill"):  # a folder that exists makes no task of it
        code = cli(command, f"--out={tmp_path}", env="hoper-medium-repaly")
        refused(capsys, code, "hoper-medium-repaly")


def test_what_does_not_fit_a_checkpoint_is_refused_with_a_list(run, capsys):
    out, give = run
    code = give("distill", "--teacher-lr=1e-4", "--teacher-batch=9")
    path = str(out / "teacher.pt")
    refused(
        capsys, code, "teacher_lr: 0.001 in the file, 0.0001", "teacher_batch: 8", "delete", path
    )
    refused(capsys, give("distill", "--gamma=0.9"), "gamma: 0.99", "reward.pt")
    refused(capsys, give("distill", "--reward-actions=9"), "--reward-actions", "--horizon")
    code = cli("evaluate", f"--out={out}", env="walker2d-medium")
    refused(capsys, code, f"env: {ENV} in the file, walker2d-medium asked", "--out")
    with h5py.File(Path("walker.hdf5"), "w") as f:
        f.update(logged(o=17, a=6))
    code = cli(
        "distill", "--data=walker.hdf5", f"--out={out}", *FLAGS["distill"], env="walker2d-medium"
    )
    refused(capsys, code, f"env: {ENV}", "teacher.pt")


@pytest.mark.parametrize("stage", ["teacher", "reward"])
def test_a_student_of_another_teacher_or_reward_model_is_refused(run, stage, capsys):
    out, give = run
    weights = ractd.weights_id(torch.load(out / f"{stage}.pt"))
    (out / f"{stage}.pt").unlink()
    other = [f"--{stage}-lr=1e-4"]
    assert give(stage, *other) == 0
    refused(
        capsys, give("distill", *other), f"{stage}: {weights} in the file", "tilted.pt", "delete"
    )
    (out / "tilted.pt").unlink()
    refused(capsys, give("distill", *other), "tilted: ", "student.pt", "delete")
    (out / "student.pt").unlink()
    assert give("distill", *other) == 0


def test_data_that_were_edited_are_not_the_same_data(run, tmp_path, trained, capsys):
    _, give = run
    rows = logged()
    rows["actions"][5] *= -1  # as many rows, the same returns and name
    data = write(tmp_path / Path(trained.data).name, rows)
    refused(capsys, give("distill", data=data), "data: log.hdf5", "delete")


def test_a_checkpoint_of_another_version_is_called_so_and_not_damaged(run, capsys):
    out, give = run
    for stage, command in (("student", "evaluate"), ("teacher", "distill"), ("reward", "reward")):
        for version in (None, 1, 99):
            rewrite(out / f"{stage}.pt", format=version)
            code = cli(command, f"--out={out}") if command == "evaluate" else give(command)
            err = capsys.readouterr().err
            assert code == 2 and "another version" in err and str(out / f"{stage}.pt") in err
            assert "damaged" not in err and "delete" in err
        rewrite(out / f"{stage}.pt", format=ractd.FORMAT)
    assert give("distill") == 0


def test_a_missing_damaged_or_wrong_checkpoint_is_refused(run, capsys):
    out, give = run
    refused(capsys, cli("evaluate", "--out=empty"), "no trained student")
    path, whole = out / "student.pt", (out / "student.pt").read_bytes()
    torch.save(torch.zeros(3), path)
    other = path.read_bytes(), (out / "teacher.pt").read_bytes()
    for bad in (b"", b"garbage", whole[: len(whole) // 2], *other):
        path.write_bytes(bad)
        refused(capsys, cli("evaluate", f"--out={out}"), str(path))
        refused(capsys, give("distill"), str(path))
        assert path.read_bytes() == bad


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(capsys, run[1]("teacher", out=tmp_path / "file" / "run"), str(tmp_path / "file"))


# ---- README --------------------------------------------------------------------------------------


def test_the_examples_in_the_readme_run(run):
    """All of its Python blocks, one after the other, on the tiny run."""
    out, _ = run
    assert cli("export", f"--out={out}") == 0
    text = (SCRIPT.parent / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    Path("examples.py").write_text("\n".join(blocks).replace(f"runs/{ENV}", str(out)))
    runpy.run_path("examples.py")
