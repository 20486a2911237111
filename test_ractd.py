"""Tests of ractd.py against oracles: python -m pytest -q test_ractd.py. Offline, about two minutes."""

import hashlib
import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer

import ractd
from ractd import Batches, Config, Dataset, Normalizer, UNet1d, UserError, denoise, expand

torch.set_num_threads(1)
ENV, SCRIPT = "hopper-medium-replay", Path(ractd.__file__).resolve()
STEPS = 30
FLAGS = ["--threads=1", "--horizon=8", "--channels=8", "--embed=8", "--grid-points=6",
         "--teacher-points=3", "--episodes=3", "--teacher-batch=8", "--reward-batch=8",
         "--student-batch=8", f"--teacher-steps={STEPS}", f"--reward-steps={STEPS}",
         f"--student-steps={STEPS}"]


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no network is used."""
    for name in ("HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(ractd, "D4RL_URL", "http://127.0.0.1:9/")     # a closed port
    monkeypatch.chdir(tmp_path)


def logged(lengths=(40, 8, 5, 60, 20), o=11, a=3, seed=0):
    """Random rows in D4RL's layout: falls and time limits in turn, the last episode unfinished."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    ends = np.cumsum(lengths)[:-1] - 1
    rows = dict(observations=rng.normal(size=(n, o)), actions=rng.uniform(-0.9, 0.8, size=(n, a)),
                rewards=rng.normal(size=n) + 1, terminals=np.zeros(n, bool),
                timeouts=np.zeros(n, bool))
    rows["terminals"][ends[::2]], rows["timeouts"][ends[1::2]] = True, True
    return {key: np.float32(x) if x.dtype == float else x for key, x in rows.items()}


def write(path, rows):
    with h5py.File(path, "w") as f:
        for key, x in rows.items():
            f[key] = x
    return str(path)


def cli(*args, env=ENV):
    """main() in this process -> exit code; argparse leaves through SystemExit."""
    command, *rest = map(str, args)
    try:
        return ractd.main([command, f"--env={env}", *rest])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Everything end to end at tiny size in a process of its own: (run folder, data file, output)."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "log.hdf5", logged())
    done = subprocess.run(
        [sys.executable, SCRIPT, "distill", f"--env={ENV}", f"--data={data}",
         f"--out={folder / 'run'}", *FLAGS], capture_output=True, text=True, cwd=folder,
        env=dict(os.environ, HOME=str(folder)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", data, done.stdout


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run folder to work on, and the flags that made it."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run", [f"--data={trained[1]}", f"--out={tmp_path / 'run'}", *FLAGS]


def same_weights(one, two):
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    assert one["step"] == two["step"]
    return all(torch.equal(one[key][name], two[key][name])
               for key in ("net", "ema") for name in one[key])


def network(seed=0, two_levels=False, noise=0.2):
    """A small U-Net for chunks (B, 8, 2) and states (B, 3) in which no weight is zero."""
    torch.manual_seed(seed)
    net = UNet1d(2, 3, channels=(8, 16), patch=2, embed=8, two_levels=two_levels)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(noise * torch.randn_like(p))
    return net


# ---- teacher: Gaussian data x0 ~ N(0, SD^2) has everything in closed form -------------------------

SD = 0.3


def exact(x, t):
    return x * SD**2 / (expand(t) ** 2 + SD**2)


def exact_jump(x, t, k):
    return x * ((expand(k) ** 2 + SD**2) / (expand(t) ** 2 + SD**2)).sqrt()


def test_heun_is_of_order_two_and_calls_the_network_twice_a_step():
    torch.manual_seed(0)
    x, calls, errors = 80 * torch.randn(4, 3, 2, dtype=torch.float64), [], []

    def euler_step(x, t, u):
        return x + (u - t) * (x - exact(x, t.expand(4))) / t
    for n in (80, 160):
        grid = ractd.karras_sigmas(n)
        truth = exact_jump(x, grid[:1].expand(4), grid[-1:].expand(4))
        heun, nfe = ractd.heun_sample(lambda x, t: calls.append(t) or exact(x, t), x, grid)
        euler = x
        for t, u in zip(grid, grid[1:]):
            euler = euler_step(euler, t, u)
        errors.append([(y - truth).norm().item() for y in (heun, euler)])
        assert nfe == len(calls) == 2 * (n - 1)
        calls.clear()
    (heun, euler), (heun2, euler2) = errors
    assert 3.6 < heun / heun2 < 4.6 and 1.8 < euler / euler2 < 2.2


@pytest.mark.parametrize("n", [2, 20, 80])
def test_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root(n):
    grid = ractd.karras_sigmas(n)
    assert grid.dtype == torch.float64 and grid.shape == (n,) and (grid.diff() < 0).all()
    assert grid[0].item() == pytest.approx(80) and grid[-1].item() == pytest.approx(0.02)
    assert torch.allclose(grid.pow(1 / 7).diff(n=2), torch.zeros(n - 2, dtype=grid.dtype))


def test_teacher_noise_is_the_truncated_lognormal():
    torch.manual_seed(0)
    t = ractd.lognormal_levels(100_000, "cpu")
    assert t.min() >= 0.02 and t.max() <= 80 and (t == 0.02).float().mean() < 1e-3
    normal = NormalDist(-1.2, 1.2)
    low, high = normal.cdf(math.log(0.02)), normal.cdf(math.log(80))
    for q in (0.01, 0.25, 0.5, 0.9, 0.99):
        quantile = math.exp(normal.inv_cdf(low + q * (high - low)))
        assert (t < quantile).float().mean().item() == pytest.approx(q, abs=0.006)


@pytest.mark.parametrize("level", [0.02, 0.5, 3.0, 80.0])
def test_network_input_has_unit_variance_and_the_denoiser_is_the_identity_at_smin(level):
    torch.manual_seed(0)
    t, seen = torch.full((20_000,), level), []
    x = 0.5 * torch.randn(20_000, 4, 1) + level * torch.randn(20_000, 4, 1)
    D = denoise(lambda x, t, state, k: seen.append(x) or 7 * torch.ones_like(x), x, t, None)
    assert seen[0].std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(D, x) == (level == 0.02)


def test_edm_loss_is_least_at_the_exact_denoiser():
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(50_000, 4, 1), torch.randn(50_000, 4, 1)
    t = ractd.lognormal_levels(50_000, "cpu")
    loss = [ractd.edm_loss(f, x0, t, noise)[0] for f in (
        exact, lambda x, t: 0.95 * exact(x, t), lambda x, t: 1.05 * exact(x, t),
        lambda x, t: exact(x, t) + 0.03, lambda x, t: exact(x, 1.1 * t))]
    assert loss[0] < min(loss[1:])


def test_squared_error_asks_for_the_mean_and_pseudo_huber_for_the_median():
    data = torch.tensor([1.0] * 3 + [-1.0] * 7).view(10, 1, 1)
    grid = torch.linspace(-1.5, 1.5, 301)
    for distance, best in ((ractd.squared, -0.4), (ractd.pseudo_huber, -1.0)):
        total = [distance(data, torch.full_like(data, v)).mean() for v in grid]
        assert grid[int(torch.stack(total).argmin())].item() == pytest.approx(best, abs=0.011)
    a, c = torch.full((1, 2, 3), 2.0), 0.00054 * math.sqrt(6)
    expected = math.sqrt(4 * 6 + c**2) - c
    assert ractd.pseudo_huber(a, 0 * a).item() == pytest.approx(expected)


# ---- student --------------------------------------------------------------------------------------


def test_a_jump_to_where_it_starts_is_the_identity_and_a_jump_to_zero_is_the_network():
    net, x, state = network(two_levels=True), torch.randn(5, 8, 2), torch.randn(5, 3)
    t, zero = ractd.lognormal_levels(5, "cpu"), torch.full((5,), 1e-30)
    assert torch.equal(ractd.student_jump(net, x, t, t, state), x)
    g = denoise(net, x, t, state, zero)
    assert torch.allclose(ractd.student_jump(net, x, t, zero, state), g)
    assert not torch.allclose(g, denoise(net, x, t, state, t))


def test_jumps_are_drawn_with_the_documented_frequencies():
    torch.manual_seed(0)
    n, count = 5, 40_000
    grid = ractd.karras_sigmas(n)
    t, u, k = ractd.draw_jumps(count, grid)
    i_t, i_u, i_k = ((v[:, None] == grid).float().argmax(1) for v in (t, u, k))
    assert (t > u).all() and (u >= k).all() and torch.equal(i_u, i_t + 1)
    table = torch.zeros(n, n).index_put_((i_t, i_k), torch.tensor(1 / count), accumulate=True)
    expected = torch.tensor([[(k > t) / (n - 1) / (n - 1 - t) if t < n - 1 else 0.0
                              for k in range(n)] for t in range(n)])
    assert (table - expected).abs().max() < 0.01 and torch.equal(table > 0, expected > 0)


def test_ctm_loss_of_the_exact_jump_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(5000, 4, 1).double(), torch.randn(5000, 4, 1).double()

    def losses(n, factor):
        t, u, k = ractd.draw_jumps(5000, ractd.karras_sigmas(n))
        x_t = x0 + expand(t) * noise
        x_u, zero = ractd.heun_step(exact, x_t, t, u), torch.full_like(t, 0.02)
        loss, _ = ractd.ctm_loss(factor * exact_jump(x_t, t, k), exact_jump(x_u, u, k),
                                 lambda x: exact_jump(x, k, zero), ractd.squared)
        return loss.item(), ractd.squared(x_u, exact_jump(x_t, t, u)).mean().item()
    coarse, fine = losses(20, 1.0), losses(40, 1.0)
    assert 0 < coarse[0] <= coarse[1] and 0 < fine[0] <= fine[1] and fine[0] < coarse[0] / 8
    assert fine[0] < losses(40, 1.1)[0] < losses(40, 1.3)[0]


def test_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target():
    x_hat, x_ref = (torch.randn(4, 8, 2, requires_grad=True) for _ in range(2))
    ractd.ctm_loss(x_hat, x_ref, lambda x: 3 * x, ractd.squared)[0].backward()
    assert torch.allclose(x_hat.grad, 9 * 2 * (x_hat - x_ref).detach() / x_hat.numel())
    assert x_ref.grad is None


def distil(student=None, teacher=1, seed=0, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, nets)."""
    nets = SimpleNamespace(student=student or network(0, True), teacher=network(teacher),
                           target=ractd.frozen(network(2, True)))
    torch.manual_seed(3)
    nets.R = ractd.frozen(ractd.RewardModel(3, 2, (8, 8)))
    state, x0 = torch.randn(16, 3), torch.rand(16, 8, 2) - 0.5
    torch.manual_seed(seed)
    loss, info = ractd.distillation_loss(nets.student, nets.target, nets.teacher, nets.R, state,
                                         x0, Config(grid_points=10, **config))
    return loss, info, nets


@pytest.mark.parametrize("alone", ["ctm", "dsm", "reward"])
@pytest.mark.parametrize("options", [{}, dict(dsm_target="jump", dsm_noise="mixed",
                                              reward_scale="none", ctm_distance="squared",
                                              dsm_distance="pseudo-huber", init_noise=80.0)])
def test_each_loss_alone_moves_every_student_parameter_and_nothing_else(alone, options):
    weights = {f"{name}_weight": float(name == alone) for name in ("ctm", "dsm", "reward")}
    loss, _, nets = distil(**weights, **options)
    loss.backward()
    still = [name for name, p in nets.student.named_parameters()
             if p.grad is None or not p.grad.abs().max() > 0]
    assert not still
    for net in (nets.teacher, nets.target, nets.R):          # the teacher is not even frozen here
        assert all(p.grad is None for p in net.parameters())


def test_frozen_networks_are_in_eval_mode_without_gradient_in_a_real_run(run, monkeypatch):
    seen, loss = [], ractd.distillation_loss
    monkeypatch.setattr(ractd, "distillation_loss", lambda *a: seen.append(a) or loss(*a))
    out, flags = run
    (out / "student.pt").unlink()
    assert cli("distill", *flags) == 0
    student, target, teacher, R = seen[0][:4]
    R, = (c.cell_contents for c in R.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    for net in (target, teacher, R):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())


def test_the_teacher_matters_and_losses_do_not_depend_on_each_others_weights():
    _, info, _ = distil(reward_weight=2.0)
    assert info["ctm"] != distil(teacher=5, reward_weight=2.0)[1]["ctm"]
    for off in ("ctm", "dsm", "reward"):
        weights = dict(ctm_weight=1.0, dsm_weight=3.0, reward_weight=2.0, reward_scale="none")
        weights[f"{off}_weight"] = 0.0
        loss, others, _ = distil(**weights)
        total = sum(weights[f"{name}_weight"] * sign * others.get(key, 0.0) for name, key, sign in (
            ("ctm", "ctm", 1), ("dsm", "dsm", 1), ("reward", "R", -1)))
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        kept = {"ctm": ("dsm", "R"), "dsm": ("ctm",), "reward": ("ctm", "dsm")}[off]
        for name in kept:
            assert others[name].item() == pytest.approx(info[name].item(), rel=1e-4)


def test_reward_pull_is_the_scale_whatever_the_range_of_R_and_none_outside_the_box():
    torch.manual_seed(0)
    R, state = ractd.RewardModel(3, 2, (8, 8)), torch.randn(6, 3)
    grads = []
    for factor in (1, 100):
        action = (torch.rand(6, 2) - 0.5).requires_grad_()
        action.data[0] = torch.tensor([0.3, -0.4])
        torch.manual_seed(1)
        action.data[1:] = torch.rand(5, 2) - 0.5
        ractd.reward_loss(lambda s, a: factor * R(s, a), state, action, 0.03)[0].backward()
        grads.append(action.grad)
    assert grads[0].norm(dim=1).sum().item() == pytest.approx(0.03, rel=1e-4)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4)
    outside = torch.tensor([[0.5, -2.0]], requires_grad=True)
    loss, info = ractd.reward_loss(lambda s, a: 5 * a.sum(1), None, outside)
    loss.backward()
    assert outside.grad.tolist() == [[-5.0, 0.0]] and loss == -info["R"] == 2.5


def test_a_few_steps_on_the_reward_loss_raise_the_predicted_return():
    student, values = network(0, True), []
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for seed in range(12):
        loss, info, _ = distil(student, seed=seed, ctm_weight=0.0, dsm_weight=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        values.append(info["R"].item())
    assert np.mean(values[-3:]) > np.mean(values[:3]) + 0.01


def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54():
    grid, calls = ractd.karras_sigmas(80), []

    def jump(x, t, k):
        calls.append((x, t, k))
        return 0 * x
    for nfe, indices in ((1, [0]), (3, [0, 27, 54])):
        calls.clear()
        x, used = ractd.student_sample(jump, torch.ones(2, 4, 1), grid, nfe, 5.0, torch.ones_like)
        assert used == len(calls) == nfe and x.shape == (2, 4, 1)
        for (x, t, k), i in zip(calls, indices):
            assert t.tolist() == pytest.approx([grid[i].item()] * 2) and k[0].item() == pytest.approx(0.02)
            scale = math.sqrt(grid[i] ** 2 - 0.02**2) if i else 5.0
            assert x.flatten().tolist() == pytest.approx([scale] * 8)
    assert [round(grid[i].item(), 3) for i in (27, 54)] == [12.01, 0.885]


def test_a_student_with_the_teachers_weights_is_the_teacher_for_every_k():
    teacher, x, state = network(1), torch.randn(6, 8, 2), torch.randn(6, 3)
    student = UNet1d(2, 3, channels=(8, 16), patch=2, embed=8, two_levels=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    t = ractd.lognormal_levels(6, "cpu")
    for k in (t, t / 2, torch.full((6,), 0.02)):
        assert torch.equal(denoise(student, x, t, state, k), denoise(teacher, x, t, state))


def toy_chunks(n):
    """30 % of the chunks near +0.6 with return +1, 70 % near -0.6 with return -1."""
    mode = torch.where(torch.rand(n) < 0.3, 1.0, -1.0)
    return 0.6 * mode[:, None, None] + 0.1 * torch.randn(n, 16, 1), mode


def toy_fit(net, loss_fn, steps, lr, decay=lambda n: 1 - (1 + n) ** -0.75):
    average, optimizer = ractd.frozen(deepcopy(net)), torch.optim.AdamW(net.parameters(), lr)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * ractd.cosine(i, steps, 50)
        loss, _ = loss_fn(average)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        ractd.ema_update(average, net, decay(i))
    return average


def test_teacher_and_ctd_keep_two_unequal_modes_and_ractd_moves_to_the_good_one():
    """Figure 3 in miniature. Equal modes could not tell a mean from a median or a collapse."""
    torch.manual_seed(0)
    size, state, many = dict(channels=(64,), kernel=1, patch=16, embed=32), torch.zeros(128, 1), 1000
    net, R = UNet1d(1, 1, **size), ractd.RewardModel(1, 1, (32, 32))

    def teacher_loss(_):
        x0, _ = toy_chunks(128)
        return ractd.edm_loss(lambda x, t: denoise(net, x, t, state), x0,
                              ractd.lognormal_levels(128, "cpu"), torch.randn_like(x0))

    def R_loss(_):
        x0, returns = toy_chunks(128)
        return ractd.reward_model_loss(R(state, x0[:, 0]), returns)
    teacher, R = toy_fit(net, teacher_loss, 1000, 1e-3), toy_fit(R, R_loss, 300, 1e-3)
    z, states, grid = torch.randn(many, 16, 1), torch.zeros(many, 1), ractd.karras_sigmas(20)
    samples = [ractd.heun_sample(lambda x, t: denoise(teacher, x, t, states), 80 * z, grid)[0]]
    for weight in (0.0, 1.0):
        config = Config(grid_points=20, init_noise=80.0, reward_weight=weight)
        student = UNet1d(1, 1, **size, two_levels=True)
        student.load_state_dict(teacher.state_dict(), strict=False)

        def loss_fn(target):
            x0, _ = toy_chunks(128)
            return ractd.distillation_loss(student, target, teacher, R, state, x0, config)
        net = toy_fit(student, loss_fn, 1000, 2e-3, lambda _: 0.9)
        samples.append(ractd.student_sample(
            lambda x, t, k: ractd.student_jump(net, x, t, k, states), z, grid, 1, 80.0)[0])
    good, between = ([test(x.mean((1, 2))).float().mean().item() for x in samples] for test in (
        lambda m: m > 0.4, lambda m: m.abs() < 0.4))
    first = [(x[:, 0] > 0.3).float().mean().item() for x in samples]
    assert 0.2 < good[0] < 0.4 and between[0] < 0.05, (good, between)
    assert 0.15 < good[1] < 0.45 and between[1] < 0.15, (good, between)
    assert first[1] < 0.5 and first[2] > 0.9, first
