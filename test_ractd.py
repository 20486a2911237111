"""Tests of ractd.py and reproduce.py against oracles: python -m pytest -q test_ractd.py. Offline."""

import hashlib
import http.server
import json
import math
import os
import re
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
import reproduce
from ractd import Config, UNet1d, denoise, expand

torch.set_num_threads(1)
ENV, SCRIPT, STEPS = "hopper-medium-replay", Path(ractd.__file__).resolve(), 30
FLAGS = f"""--threads=1 --horizon=8 --channels=8 --embed=8 --grid-points=6 --teacher-points=3
    --episodes=3 --teacher-batch=8 --reward-batch=8 --student-batch=8 --teacher-steps={STEPS}
    --reward-steps={STEPS} --student-steps={STEPS}""".split()

@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and no network is used."""
    for name in ("HOME", "D4RL_DATASET_DIR", "MINARI_DATASETS_PATH"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(reproduce, "D4RL_URL", "http://127.0.0.1:9/")            # a closed port
    monkeypatch.chdir(tmp_path)

def logged(lengths=(40, 8, 5, 60, 20), o=11, a=3):
    """Random rows in D4RL's layout: falls and time limits in turn, the last episode unfinished."""
    rng, n, ends = np.random.default_rng(0), sum(lengths), np.cumsum(lengths)[:-1] - 1
    rows = dict(observations=rng.normal(size=(n, o)), actions=rng.uniform(-0.9, 0.8, (n, a)),
                rewards=rng.normal(1, 1, n))
    return {key: np.float32(x) for key, x in rows.items()} | dict(
        terminals=np.isin(range(n), ends[::2]), timeouts=np.isin(range(n), ends[1::2]))

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

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """End to end at tiny size in a process of its own -> (run folder, data file, output)."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "log.hdf5", logged())
    where = [f"--env={ENV}", f"--data={data}", "--out=run"]
    done = subprocess.run([sys.executable, SCRIPT, "distill", *where, *FLAGS], text=True,
                          capture_output=True, cwd=folder, env=dict(os.environ, HOME=str(folder)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", data, done.stdout

@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run folder to work on, and the flags that made it."""
    out = shutil.copytree(trained[0], tmp_path / "run")
    return out, [f"--data={trained[1]}", f"--out={out}", *FLAGS]

def same_weights(one, two):
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    return one["step"] == two["step"] and all(
        torch.equal(one[key][name], two[key][name]) for key in ("net", "ema") for name in one[key])

def returns(out, name="metrics.json"):
    return json.loads((out / name).read_text())["returns"]

def network(seed=0, two_levels=False):
    """A small U-Net for chunks (B, 8, 2) and states (B, 3) in which no weight is zero."""
    torch.manual_seed(seed)
    net = UNet1d(2, 3, channels=(8, 16), patch=2, embed=8, two_levels=two_levels)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net

# ---- teacher: Gaussian data x0 ~ N(0, SD^2) has everything in closed form ------------------------

SD = 0.3

def exact(x, t):
    return x * SD**2 / (expand(t) ** 2 + SD**2)

def exact_jump(x, t, k):
    return x * ((expand(k) ** 2 + SD**2) / (expand(t) ** 2 + SD**2)).sqrt()

def test_heun_is_of_order_two_and_calls_the_network_twice_a_step():
    torch.manual_seed(0)
    x, errors = 80 * torch.randn(4, 3, 2, dtype=torch.float64), []
    for n in (80, 160):
        grid, calls, euler = ractd.karras_sigmas(n), [], x
        truth = exact_jump(x, grid[:1].expand(4), grid[-1:].expand(4))
        heun, nfe = ractd.heun_sample(lambda x, t: calls.append(t) or exact(x, t), x, grid)
        for t, u in zip(grid, grid[1:]):
            euler = euler + (u - t) * (euler - exact(euler, t.expand(4))) / t
        errors.append([(y - truth).norm().item() for y in (heun, euler)])
        assert nfe == len(calls) == 2 * (n - 1)
    heun, euler = (a / b for a, b in zip(*errors))
    assert 3.6 < heun < 4.6 and 1.8 < euler < 2.2

@pytest.mark.parametrize("n", [3, 20, 80])
def test_noise_grid_falls_from_80_to_002_in_equal_steps_of_its_seventh_root(n):
    grid = ractd.karras_sigmas(n)
    assert grid.dtype == torch.float64 and grid.shape == (n,) and (grid.diff() < 0).all()
    assert grid[0].item() == pytest.approx(80) and grid[-1].item() == pytest.approx(0.02)
    assert torch.allclose(grid.pow(1 / 7).diff(n=2), torch.zeros(n - 2, dtype=grid.dtype))

def test_teacher_noise_is_the_truncated_lognormal():
    torch.manual_seed(0)
    t, normal = ractd.lognormal_levels(100_000, "cpu"), NormalDist(-1.2, 1.2)
    assert t.min() >= 0.02 and t.max() <= 80 and (t == 0.02).float().mean() < 1e-3
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
    best, *others = (ractd.edm_loss(f, x0, t, noise)[0] for f in (
        exact, lambda x, t: 0.95 * exact(x, t), lambda x, t: 1.05 * exact(x, t),
        lambda x, t: exact(x, t) + 0.03, lambda x, t: exact(x, 1.1 * t)))
    assert best < min(others)

def test_squared_error_asks_for_the_mean_and_pseudo_huber_for_the_median():
    data = torch.tensor([1.0] * 3 + [-1.0] * 7).view(10, 1, 1)
    grid = torch.linspace(-1.5, 1.5, 301)
    for distance, best in ((ractd.squared, -0.4), (ractd.pseudo_huber, -1.0)):
        total = torch.stack([distance(data, torch.full_like(data, v)).mean() for v in grid])
        assert grid[total.argmin()].item() == pytest.approx(best, abs=0.011)
    a, c = torch.full((1, 2, 3), 2.0), 0.00054 * math.sqrt(6)
    assert ractd.pseudo_huber(a, 0 * a).item() == pytest.approx(math.sqrt(4 * 6 + c**2) - c)

# ---- student -------------------------------------------------------------------------------------

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
    i_t, i_u, i_k = ((v[:, None] == grid).float().argmax(1) for v in ractd.draw_jumps(count, grid))
    assert torch.equal(i_u, i_t + 1) and (i_k >= i_u).all()
    table = torch.zeros(n, n).index_put_((i_t, i_k), torch.tensor(1 / count), accumulate=True)
    expected = torch.tensor([[(k > t) / (n - 1) / max(1, n - 1 - t) for k in range(n)]
                             for t in range(n)])
    assert (table - expected).abs().max() < 0.01 and torch.equal(table > 0, expected > 0)

def test_ctm_loss_of_the_exact_jump_is_the_solvers_error_and_grows_with_a_perturbation():
    torch.manual_seed(0)
    x0, noise = SD * torch.randn(5000, 4, 1).double(), torch.randn(5000, 4, 1).double()

    def losses(n, factor):
        t, u, k = ractd.draw_jumps(5000, ractd.karras_sigmas(n))
        x_t, zero = x0 + expand(t) * noise, torch.full_like(t, 0.02)
        x_u = ractd.heun_step(exact, x_t, t, u)
        loss, _ = ractd.ctm_loss(factor * exact_jump(x_t, t, k), exact_jump(x_u, u, k),
                                 lambda x: exact_jump(x, k, zero), ractd.squared)
        return loss.item(), ractd.squared(x_u, exact_jump(x_t, t, u)).mean().item()
    coarse, fine = losses(20, 1.0), losses(40, 1.0)
    assert 0 < coarse[0] <= coarse[1] and 0 < fine[0] <= fine[1] and fine[0] < coarse[0] / 8
    assert fine[0] < losses(40, 1.1)[0] < losses(40, 1.3)[0]

def test_ctm_gradient_passes_through_the_outer_frozen_jump_but_not_to_the_target():
    x_hat, x_ref = (torch.randn(4, 8, 2, requires_grad=True) for _ in range(2))
    ractd.ctm_loss(x_hat, x_ref, lambda x: 3 * x, ractd.squared)[0].backward()
    slope = 3**2 * 2 * (x_hat - x_ref).detach() / x_hat.numel()
    assert torch.allclose(x_hat.grad, slope, atol=1e-6)
    assert x_ref.grad is None

def distil(student=None, teacher=1, **config):
    """distillation_loss on fixed random networks and data -> (loss, info, networks)."""
    nets = SimpleNamespace(student=student or network(0, True), teacher=network(teacher),
                           target=ractd.frozen(network(2, True)))
    torch.manual_seed(3)
    nets.R = ractd.frozen(ractd.RewardModel(3, 2, (8, 8)))
    state, x0 = torch.randn(16, 3), torch.rand(16, 8, 2) - 0.5
    loss, info = ractd.distillation_loss(nets.student, nets.target, nets.teacher, nets.R, state, x0,
                                         Config(grid_points=10, **dict(reward_weight=1.0) | config))
    return loss, info, nets

@pytest.mark.parametrize("alone", ["ctm", "dsm", "reward", "anchor"])
@pytest.mark.parametrize("options", [{}, dict(
    dsm_target="jump", dsm_noise="mixed", ctm_distance="squared",
    dsm_distance="pseudo-huber", reward_noise=80.0)])
def test_each_loss_alone_moves_every_student_parameter_and_nothing_else(alone, options):
    weights = {f"{name}_weight": float(name == alone) for name in ("ctm", "dsm", "reward", "anchor")}
    weights["reward_weight"] += 1e-9 * weights["anchor_weight"]    # the anchor goes with the reward
    loss, _, nets = distil(**weights, **options)
    loss.backward()
    assert not [name for name, p in nets.student.named_parameters()
                if p.grad is None or not p.grad.abs().max() > 0]
    for net in (nets.teacher, nets.target, nets.R):          # the teacher is not even frozen here
        assert all(p.grad is None for p in net.parameters())

def test_in_a_real_run_all_but_the_student_is_frozen_and_in_eval_mode(run, monkeypatch):
    out, flags = run
    (out / "student.pt").unlink()
    seen, loss = [], ractd.distillation_loss
    monkeypatch.setattr(ractd, "distillation_loss", lambda *a: seen.append(a) or loss(*a))
    assert cli("distill", *flags) == 0
    student, target, teacher, R = seen[0][:4]
    R, = (c.cell_contents for c in R.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    for net in (target, teacher, R):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())
    average = torch.load(out / "teacher.pt")["ema"]
    assert all(torch.equal(x, average[name]) for name, x in teacher.state_dict().items())

def test_the_teacher_matters_and_no_loss_depends_on_anothers_weight():
    _, info, _ = distil()
    assert info["ctm"] != distil(teacher=5)[1]["ctm"]
    for off, kept in (("ctm", ("dsm", "R")), ("dsm", ("ctm",)), ("reward", ("ctm", "dsm")),
                      ("anchor", ("ctm", "dsm", "R"))):
        weights = dict(ctm_weight=1.0, dsm_weight=3.0, reward_weight=2.0, anchor_weight=5.0)
        weights[f"{off}_weight"] = 0.0
        loss, others, _ = distil(**weights)
        total = sum(weights[f"{name}_weight"] * others.get(key, 0) * sign for name, key, sign in (
            ("ctm", "ctm", 1), ("dsm", "dsm", 1), ("reward", "R", -1), ("anchor", "anchor", 1)))
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        for name in kept:
            assert others[name].item() == pytest.approx(info[name].item(), rel=1e-4)

def test_reward_loss_is_minus_the_mean_return_and_has_no_slope_outside_the_box():
    action = torch.tensor([[0.5, -2.0], [0.1, 0.2]], requires_grad=True)
    loss, info = ractd.reward_loss(lambda s, a: 5 * a.sum(1), None, action)
    loss.backward()
    assert action.grad.tolist() == [[-2.5, 0.0], [-2.5, -2.5]] and loss == -info["R"] == 0.5

def test_the_anchor_of_gaussian_data_is_a_spring_stiff_where_they_are_narrow():
    """D(x + s n, s) = c (x + s n), c = sd^2 / (sd^2 + s^2): mean gradient (1 - c) x, none through D."""
    torch.manual_seed(0)
    for sd, s in ((0.05, 0.2), (0.5, 0.2)):
        x = torch.ones(20_000, 1, 1, requires_grad=True)
        c = sd**2 / (sd**2 + s**2)
        loss, info = ractd.anchor_loss(x, c * (x + s * torch.randn_like(x)))
        loss.backward()
        assert x.grad.sum().item() == pytest.approx(1 - c, rel=0.02) and loss == info["anchor"]
        assert loss.item() == pytest.approx(((1 - c) ** 2 + (c * s) ** 2) / 2, rel=0.02)

def test_a_few_steps_on_the_reward_loss_raise_the_predicted_return():
    student, values = network(0, True), []
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    for _ in range(10):
        loss, info, _ = distil(student, ctm_weight=0.0, dsm_weight=0.0, anchor_weight=0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        values.append(info["R"].item())
    assert values[-1] > values[0] + 0.01

def test_sampling_takes_nfe_calls_and_restarts_at_grid_indices_27_and_54():
    for nfe, levels in ((1, [80.0]), (3, [80.0, 12.015, 0.885])):
        calls, grid = [], ractd.karras_sigmas(80)
        x, used = ractd.student_sample(lambda *jump: calls.append(jump) or 0 * jump[0],
                                       torch.ones(2, 4, 1), grid, nfe, 5.0, torch.ones_like)
        assert used == len(calls) == nfe and x.shape == (2, 4, 1)
        for (x, t, k), level in zip(calls, levels):
            assert t.tolist() == pytest.approx([level] * 2, 1e-3)
            assert k.tolist() == pytest.approx([0.02] * 2)
            scale = math.sqrt(t[0] ** 2 - 0.02**2) if level < 80 else 5.0
            assert x.flatten().tolist() == pytest.approx([scale] * 8)

def test_a_student_with_the_teachers_weights_is_the_teacher_for_every_k():
    teacher, x, state = network(1), torch.randn(6, 8, 2), torch.randn(6, 3)
    student = UNet1d(2, 3, channels=(8, 16), patch=2, embed=8, two_levels=True)
    ractd.warm_start(student, teacher)
    t = ractd.lognormal_levels(6, "cpu")
    for k in (t, t / 2, torch.full((6,), 0.02)):
        assert torch.equal(denoise(student, x, t, state, k), denoise(teacher, x, t, state))

def test_teacher_and_ctd_keep_two_unequal_modes_and_ractd_moves_to_the_good_one():
    """Figure 3 in miniature. Equal modes could not tell a mean from a median or a collapse.

    30 % of the chunks lie near +0.6 and have return +1, 70 % near -0.6 with return -1.
    """
    torch.manual_seed(0)
    size, grid = dict(channels=(64,), kernel=1, patch=16, embed=32), ractd.karras_sigmas(20)
    B, n = 128, 1000
    state, states, z = torch.zeros(B, 1), torch.zeros(n, 1), torch.randn(n, 16, 1)

    def draw():
        mode = torch.where(torch.rand(B) < 0.3, 1.0, -1.0)
        return 0.6 * expand(mode) + 0.1 * torch.randn(B, 16, 1), mode

    def train(net, loss_fn, steps, lr, decay):
        average, optimizer = ractd.frozen(deepcopy(net)), torch.optim.AdamW(net.parameters(), lr)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = lr * ractd.cosine(i, steps, 50)
            loss, _ = loss_fn(*draw(), average)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            ractd.ema_update(average, net, decay)
        return average
    net, R_net = UNet1d(1, 1, **size), ractd.RewardModel(1, 1, (32, 32))
    teacher = train(net, lambda x0, _, __: ractd.edm_loss(
        lambda x, t: denoise(net, x, t, state), x0, ractd.lognormal_levels(B, "cpu"),
        torch.randn_like(x0)), 1000, 1e-3, 0.99)
    R = train(R_net, lambda x0, returns, _: ractd.reward_model_loss(
        R_net(state, x0[:, 0]), returns), 300, 1e-3, 0.95)
    samples = [ractd.heun_sample(lambda x, t: denoise(teacher, x, t, states), 80 * z, grid)[0]]
    for weight in (0.0, 2.0):
        config = Config(grid_points=20, reward_noise=80.0, reward_weight=weight)
        student = UNet1d(1, 1, **size, two_levels=True)
        ractd.warm_start(student, teacher)
        actor = train(student, lambda x0, _, target: ractd.distillation_loss(
            student, target, teacher, R, state, x0, config), 1000, 2e-3, 0.9)
        samples.append(ractd.student_sample(
            lambda x, t, k: ractd.student_jump(actor, x, t, k, states), z, grid, 1, 80.0)[0])
    mean = torch.stack([x.mean((1, 2)) for x in samples])
    good, between = ((m.float().mean(1).tolist()) for m in (mean > 0.4, mean.abs() < 0.4))
    first = [((x[:, 0] > 0.3) & (x[:, 0] < 1.1)).float().mean().item() for x in samples]
    assert 0.2 < good[0] < 0.4 and between[0] < 0.05, (good, between)
    assert 0.15 < good[1] < 0.45 and between[1] < 0.15, (good, between)
    assert first[1] < 0.5 and first[2] > 0.9, first

# ---- data ----------------------------------------------------------------------------------------

def episodes(horizon):
    """Random episodes, one of `horizon` rows, one of 1 -> (begins, ends, terminated, rewards)."""
    rng = np.random.default_rng(horizon)
    lengths = np.array([horizon, 1, horizon + 1, 130, *rng.integers(1, 3 * horizon, 8)])
    ends = lengths.cumsum() - 1
    return ends - lengths + 1, ends, rng.random(12) < 0.5, rng.normal(size=lengths.sum())

@pytest.mark.parametrize("horizon", [1, 4, 16])
def test_windows_and_returns_to_go_equal_brute_force(horizon):
    begins, ends, terminated, rewards = episodes(horizon)
    windows = [i for i in range(len(rewards))
               if any(b <= i <= e + 1 - horizon for b, e in zip(begins, ends))]
    assert ractd.window_starts(ends, horizon).tolist() == windows
    for timeout in ("extend", "cut"):
        go = ractd.returns_to_go(rewards, ends, terminated, 0.9, timeout)
        for b, e, t in zip(begins, ends, terminated):
            tail = rewards[b:e + 1][-100:].mean() if timeout == "extend" and not t else 0.0
            for i in range(b, e + 1):
                value = sum(0.9 ** (j - i) * rewards[j] for j in range(i, e + 1))
                assert go[i] == pytest.approx(value + 0.9 ** (e + 1 - i) * tail / (1 - 0.9))

def test_normalizer_maps_to_the_box_and_back_also_a_constant_column():
    x = np.float32([[1, 5, -3], [3, 5, 0], [2, 5, 7]])
    normalizer, x = ractd.Normalizer.fit(obs=x), torch.tensor(x)
    y = normalizer.encode("obs", x)
    assert y.amin(0).tolist() == [-1, 0, -1] and y.amax(0).tolist() == [1, 0, 1]
    assert torch.allclose(normalizer.decode("obs", y), x)

def test_batches_stay_inside_an_episode_pad_with_its_first_state_and_reach_every_row():
    torch.manual_seed(0)
    begins, ends, terminated, rewards = episodes(4)
    n, episode = len(rewards), np.searchsorted(ends, np.arange(len(rewards)))
    rows = np.float32(np.stack([np.arange(n), episode], 1))      # observation = action = where
    data = ractd.Dataset("d", "file", rows, rows, np.float32(rewards), ends, terminated)
    batches = ractd.Batches(data, Config(horizon=4, history=3), "cpu")
    decode = batches.normalizer.decode
    state, x0 = batches.windows(5000)
    state = decode("obs", state.unflatten(1, (3, 2))).round().int().numpy()
    x0, row = decode("action", x0).round().int().numpy(), state[:, -1, 0]
    assert set(row) == set(ractd.window_starts(ends, 4))
    assert (x0[:, :, 0] == row[:, None] + range(4)).all()
    assert (x0[:, :, 1] == episode[row][:, None]).all()
    past = np.maximum(row[:, None] + range(-2, 1), begins[episode[row]][:, None])
    assert (state[:, :, 0] == past).all() and (past[:, 0] == past[:, 2]).any()
    state, action, go = batches.transitions(5000)
    row = decode("action", action)[:, 0].round().long().numpy()
    assert set(row) == set(range(n))
    assert (decode("obs", state[:, -2:])[:, 0].round().numpy() == row).all()
    truth = ractd.returns_to_go(data.rewards, ends, terminated)[row]
    assert np.allclose(decode("return", go[:, None])[:, 0], truth, atol=1e-3)

def test_a_d4rl_file_and_a_minari_dataset_of_the_same_rows_are_the_same_dataset(tmp_path):
    rows = logged(o=4, a=2)
    one = ractd.load_dataset(ENV, write(tmp_path / "a.hdf5", rows))
    assert one.ends.tolist() == [39, 47, 52, 112, 132]
    assert one.terminated.tolist() == [True, False, True, False, False]  # unfinished: a time limit
    buffers = []
    for b, e in zip([0, *(one.ends[:-1] + 1)], one.ends + 1):
        cut = {key: x[b:e] for key, x in rows.items()}
        buffers.append(EpisodeBuffer(
            observations=np.r_[cut["observations"], np.ones((1, 4), np.float32)],
            actions=cut["actions"], rewards=cut["rewards"], terminations=cut["terminals"],
            truncations=cut["timeouts"]))
    spaces = dict(observation_space=Box(-9, 9, (4,)), action_space=Box(-1, 1, (2,)))
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers("test/rows-v0", buffers, **spaces)
    two = ractd.load_dataset(ENV, "minari:test/rows-v0")
    for key in ("observations", "actions", "rewards", "ends", "terminated"):
        assert np.array_equal(getattr(one, key), rows.get(key, getattr(one, key)))
        assert np.array_equal(getattr(one, key), getattr(two, key))

def test_a_million_transitions_load_in_seconds_and_in_little_memory(tmp_path):
    n = 1_000_000
    rows = dict(observations=np.random.default_rng(0).random((n, 17), np.float32),
                actions=np.zeros((n, 6), np.float32), rewards=np.ones(n, np.float32),
                terminals=np.arange(n) % 333 == 0, timeouts=np.arange(n) % 1000 == 999)
    code = """import resource, sys, time, torch, ractd; began = time.time()
data = ractd.Batches(ractd.load_dataset("", sys.argv[1]), ractd.Config(), torch.device("cpu"))
print(time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""
    seconds, gigabytes = map(float, subprocess.run(
        [sys.executable, "-c", code, write(tmp_path / "million.hdf5", rows)], check=True,
        capture_output=True, text=True, cwd=Path(SCRIPT).parent).stdout.split())
    assert seconds < 20 and gigabytes < 1.5, (seconds, gigabytes)

@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on the loopback for a tiny "published" file; .mode says how it behaves."""
    content = Path(write(tmp_path / "published.hdf5", logged())).read_bytes()
    cache = tmp_path / "D4RL_DATASET_DIR" / "hopper_medium_replay-v2.hdf5"
    state = SimpleNamespace(mode="good", content=content, cache=cache)
    timeout = socket.getdefaulttimeout()
    answers = {"good": content, "wrong": content[::-1]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if state.mode == "garbled":
                return self.wfile.write(b"no HTTP\r\n\r\n")
            self.send_response(200 if self.path == f"/{cache.name}" else 404)
            self.send_header("Content-Length", str(len(content) + 999 * (state.mode in ("broken", "silent"))))
            self.end_headers()
            self.wfile.write(answers.get(state.mode, content[:2000]))
            state.mode == "silent" and time.sleep(2)

        def log_message(self, *_):
            pass
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(reproduce, "D4RL_URL", f"http://127.0.0.1:{web.server_port}/")
    monkeypatch.setitem(reproduce.D4RL_FILES, ENV, (len(content), hashlib.sha256(content).hexdigest()))
    yield state
    socket.setdefaulttimeout(timeout)
    web.shutdown(), web.server_close()

def test_the_default_data_are_downloaded_checked_and_cached(server, capsys):
    assert cli("data") == 0 and server.cache.read_bytes() == server.content
    server.mode = "wrong"                                    # a second download would fail
    assert cli("data") == 0 and "(D4RL)" in capsys.readouterr().out

@pytest.mark.parametrize("mode", ["broken", "silent", "wrong", "garbled"])
def test_a_failed_download_says_so_and_leaves_nothing_behind(server, mode, monkeypatch, capsys):
    server.mode, wait = mode, socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda _: wait(0.5))    # not 20 seconds
    refused(capsys, cli("data"), "not the published file")
    assert not list(server.cache.parent.iterdir())

def test_a_cached_file_that_is_not_the_published_one_is_refused_and_left_alone(server, capsys):
    for content in (server.content[::-1], server.content[:-1]):
        server.cache.write_bytes(content)
        refused(capsys, cli("data"), "not the published file", str(server.cache))
        assert server.cache.read_bytes() == content

@pytest.mark.parametrize("env, o, a", [
    (ENV, 11, 3), ("hopper-medium", 11, 3), ("hopper-medium-expert", 11, 3),
    ("walker2d-medium-replay", 17, 6), ("halfcheetah-medium-expert", 17, 6)])
def test_the_stand_in_is_deterministic_and_well_formed(env, o, a):
    one, two, other = (reproduce.collect_standin(env, 2000, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(x[key], y[key]) for x, y in zip(one, two, strict=True) for key in x)
    assert not np.array_equal(one[0]["actions"], other[0]["actions"])
    assert 1500 < sum(len(e["rewards"]) for e in one) < 4500
    for e in one:
        n = len(e["rewards"])
        assert e["observations"].shape == (n + 1, o) and e["actions"].shape == (n, a)
        assert np.abs(e["actions"]).max() <= 1 and not (e["terminations"] & e["truncations"]).any()
        assert np.flatnonzero(e["terminations"] | e["truncations"]).tolist() == [n - 1]

def test_without_a_network_a_stand_in_is_made_once_and_an_interrupt_leaves_nothing(
        monkeypatch, tmp_path, capsys):
    create = minari.create_dataset_from_buffers
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minari, "create_dataset_from_buffers", lambda *args, **kwargs: (
            create(*args, **kwargs), signal.default_int_handler(signal.SIGINT, None)))
        reproduce.make_standin(ENV, 2000)
    assert not list((tmp_path / "MINARI_DATASETS_PATH").rglob("*.hdf5"))
    reproduce.make_standin(ENV, 2000)
    monkeypatch.setattr(reproduce, "collect_standin", None)
    assert cli("data") == 0
    assert "cannot be downloaded" in (out := capsys.readouterr().out) and "(stand-in: NOT" in out
    assert not list((tmp_path / "D4RL_DATASET_DIR").iterdir())

def test_a_minari_dataset_is_distilled_and_acts_in_the_environment_that_it_recovers(
        monkeypatch, capsys):
    data = "--data=minari:" + reproduce.make_standin(ENV, 2000)
    assert ractd.main(["distill", data, *FLAGS]) == 0
    monkeypatch.setattr(ractd, "TASKS", {})                  # no other way to the environment
    out = next(Path("runs").glob("ractd*"))
    assert ractd.main(["evaluate", data, "--episodes=3"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["returns"] == returns(out, "evaluate_RACTD_nfe1_noise20_from0_n3.json")
    assert metrics["dataset"]["source"] == "minari" and metrics["normalized_score_mean"] is None
    for command in (["ablate", "--what=nfe"], ["plot"]):
        assert ractd.main([*command, data, *FLAGS]) == 0     # returns, where there is no score
    rows = json.loads((out / "ablate_nfe.json").read_text())["rows"]
    assert {row["unit"] for row in rows} == {"return"} and np.mean(metrics["returns"]) == rows[0]["score"]
    assert "ractd/hopper" in capsys.readouterr().out and (out / "returns.png").exists()

# ---- running -------------------------------------------------------------------------------------

def test_end_to_end_leaves_every_promised_file_and_number(trained):
    out, _, text = trained
    assert {path.name for path in out.iterdir()} == set(
        "teacher.pt reward.pt student.pt config.json log.jsonl training.png metrics.json".split())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() >= set(
        "env dataset method nfe init_noise episodes seeds returns lengths return_mean "
        "normalized_score_mean normalized_score_sem ms_per_action train_seconds seed device "
        "git_commit versions".split())
    assert metrics["method"] == "RACTD" and metrics["nfe"] == 1 and metrics["seeds"] == [0, 1, 2]
    assert metrics["return_mean"] == pytest.approx(np.mean(metrics["returns"]))
    score = (np.array(metrics["returns"]) + 20.272305) / (3234.3 + 20.272305) * 100
    assert metrics["normalized_score_mean"] == pytest.approx(score.mean())
    assert metrics["normalized_score_sem"] == pytest.approx(score.std(ddof=1) / 3**0.5)
    assert json.loads((out / "config.json").read_text())["horizon"] == 8
    rows = [(row["stage"], row["step"]) for row in map(json.loads, (out / "log.jsonl").open())]
    assert len(rows) == len(set(rows)) and ("student", STEPS) in rows and "NOT comparable" in text

def test_a_saved_policy_acts_identically_without_the_dataset(run, monkeypatch):
    out, flags = run
    monkeypatch.setattr(ractd, "load_dataset", None)
    for _ in range(2):
        assert cli("evaluate", f"--out={out}", "--episodes=3") == 0
        assert returns(out, "evaluate_RACTD_nfe1_noise20_from0_n3.json") == returns(out)
    for how in (["--model=teacher"], ["--nfe=2"]):
        assert cli("evaluate", f"--out={out}", "--episodes=1", *how) == 0

def test_episodes_and_seeds_are_the_command_lines_not_the_checkpoints(run):
    out, _ = run
    saved = torch.load(out / "student.pt")
    saved["config"].update(first_seed=50, episodes=7)
    torch.save(saved, out / "student.pt")
    assert cli("evaluate", f"--out={out}", "--episodes=2") == 0
    assert returns(out, "evaluate_RACTD_nfe1_noise20_from0_n2.json") == returns(out)[:2]

def test_more_calls_than_grid_points_act_too(run):
    assert cli("evaluate", f"--out={run[0]}", "--episodes=1", "--nfe=20") == 0
    assert len(returns(run[0], "evaluate_RACTD_nfe20_noise20_from0_n1.json")) == 1

def test_older_observations_and_several_actions_of_a_plan_go_through_all_commands(trained):
    flags = [f"--data={trained[1]}", *FLAGS, "--history=2", "--execute=3", "--out=new"]
    assert cli("distill", *flags) == 0 == cli("evaluate", "--out=new", "--episodes=3")
    assert returns(Path("new")) == returns(Path("new"), "evaluate_RACTD_nfe1_noise20_from0_n3.json")
    assert cli("export", "--out=new", "p.pt2") == 0
    action, chunk = torch.export.load("p.pt2").module()(torch.zeros(5, 2, 11))
    assert action.shape == (5, 3) and chunk.shape == (5, 8, 3)

def test_bfloat16_trains_float32_weights_that_are_nearly_the_same(trained):
    assert cli("distill", f"--data={trained[1]}", *FLAGS, "--precision=bfloat16", "--out=new") == 0
    for stage in ractd.STAGES:
        half, full = (torch.load(folder / f"{stage}.pt")["ema"] for folder in (Path("new"), trained[0]))
        assert {x.dtype for x in half.values()} == {torch.float32}
        assert 0 < max((half[name] - full[name]).abs().max() for name in full) < 0.1

def test_a_finished_run_is_not_trained_again_and_repeats_its_returns(run, monkeypatch):
    out, flags = run
    before = returns(out)
    monkeypatch.setattr(ractd, "fit", None)
    assert cli("distill", *flags) == 0 and returns(out) == before

@pytest.mark.parametrize("command, stage", [("teacher", "teacher"), ("distill", "student")])
def test_a_killed_run_goes_on_to_the_same_bits(trained, run, command, stage):
    out, flags = run
    path = out / f"{stage}.pt"
    path.unlink()
    process = subprocess.Popen([sys.executable, SCRIPT, command, f"--env={ENV}", *flags,
                                "--save-every=0"], stdout=subprocess.DEVNULL)
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill(), process.wait()
    assert 0 < torch.load(path)["step"] < STEPS
    assert cli(command, *flags) == 0 and same_weights(path, trained[0] / f"{stage}.pt")
    rows = [json.loads(line) for line in (out / "log.jsonl").open()]
    steps = [row["step"] for row in rows if row["stage"] == stage]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS

@pytest.mark.parametrize("module, name, call, step", [      # in a step, in the last one, while it logs
    (ractd, "edm_loss", 7, 7), (ractd, "edm_loss", STEPS, STEPS), (json, "dump", 7, 8)])
def test_ctrl_c_saves_and_exits_with_130_and_the_command_goes_on(
        trained, run, monkeypatch, capsys, module, name, call, step):
    out, flags = run
    (out / "teacher.pt").unlink()
    calls, original, handler = [], getattr(module, name), signal.getsignal(signal.SIGINT)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(module, name, interrupted)
    assert cli("teacher", *flags) == 130 and "goes on" in capsys.readouterr().out
    assert torch.load(out / "teacher.pt")["step"] == step
    assert signal.getsignal(signal.SIGINT) is handler
    assert cli("teacher", *flags) == 0 and len(calls) == STEPS
    assert same_weights(out / "teacher.pt", trained[0] / "teacher.pt")
    assert cli("distill", *flags) == 0               # the student knows the same teacher again

@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(trained, seed):
    assert cli("reward", f"--data={trained[1]}", *FLAGS, "--out=new", f"--seed={seed}") == 0
    assert same_weights("new/reward.pt", trained[0] / "reward.pt") == (seed == 0)

def test_retrain_keeps_the_old_file_and_a_student_of_another_teacher_is_refused(run, capsys):
    out, flags = run
    old = (out / "teacher.pt").read_bytes()
    assert cli("teacher", *flags, "--retrain=teacher", "--teacher-lr=1e-4") == 0
    kept, = out.glob("teacher.*.old.pt")
    assert kept.read_bytes() == old != (out / "teacher.pt").read_bytes()
    refused(capsys, cli("distill", *flags, "--teacher-lr=1e-4"), "teacher_id", "--retrain student")
    assert cli("distill", *flags, "--retrain=teacher") == 0          # and the student that stands on it
    assert same_weights(out / "teacher.pt", kept)
    assert [len(list(out.glob(f"{stage}.*.old.pt"))) for stage in ("teacher", "student")] == [2, 1]

def test_teacher_and_reward_model_can_come_from_elsewhere(trained):
    files = [f"--{stage}={trained[0] / stage}.pt" for stage in ("teacher", "reward")]
    assert cli("distill", f"--data={trained[1]}", *FLAGS, *files, "--out=new") == 0
    assert not Path("new/teacher.pt").exists()
    assert same_weights("new/student.pt", trained[0] / "student.pt")

def test_a_file_that_is_replaced_stays_whole_when_the_writing_is_interrupted(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), ractd.replacing(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with ractd.replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new"

def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_checkpoint(
        run, monkeypatch, capsys):
    out, flags = run
    (out / "student.pt").unlink()
    loss, calls = ractd.dsm_loss, []
    monkeypatch.setattr(ractd, "dsm_loss", lambda *args: calls.append(1) or (
        loss(*args)[0], {"dsm": torch.tensor(1.0 if len(calls) < 5 else math.nan)}))
    refused(capsys, cli("distill", *flags, "--save-every=0"), "dsm is nan")
    assert torch.load(out / "student.pt")["step"] == 4

# ---- acting and evaluation -----------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_a_batch_of_observations_is_acted_on_like_each_alone(trained, stage):
    checkpoint = ractd.load_checkpoint(trained[0] / f"{stage}.pt", stage, "cpu")
    del checkpoint["net"]                                    # it is the averaged weights that act
    policy = ractd.Policy(checkpoint, Config(teacher_points=4, nfe=2, init_noise=80.0))
    observations = np.random.default_rng(0).normal(size=(5, 1, 11))
    batch, other = (policy(observations, list(map(np.random.default_rng, seeds)))
                    for seeds in (range(5), range(5, 10)))
    alone = [policy(observations[i:i + 1], [np.random.default_rng(i)])[0] for i in range(5)]
    assert batch.shape == (5, 8, 3) and np.abs(batch - alone).max() < 1e-5
    assert np.abs(batch - other).max() > 1e-3

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

def test_returns_count_the_last_reward_and_plans_are_executed_in_order():
    log, seen = [], []

    def policy(observations, generators):
        seen.append((observations, [g.random() for g in generators]))
        return observations[:, -1:, 1:] + np.arange(4)[:, None]          # the step number goes on
    result = ractd.evaluate(policy, lambda: World(log), 2, first_seed=4, history=2, execute=2)
    assert result["returns"] == [2.0**8 - 2, 2.0**9 - 2] and result["lengths"] == [7, 8]
    assert [action for seed, action in log if seed == 4] == list(range(7)) and len(seen) == 4
    assert seen[0][0][:2].tolist() == [[[4, 0], [4, 0]], [[5, 0], [5, 0]]]
    assert seen[1][0][0].tolist() == [[4, 1], [4, 2]]
    assert seen[0][1][:2] == [np.random.default_rng(seed).random() for seed in (4, 5)]

def test_a_return_does_not_depend_on_how_many_episodes_run_beside_it(trained):
    checkpoint = ractd.load_checkpoint(trained[0] / "student.pt", "student", "cpu")
    policy, make = ractd.Policy(checkpoint, Config()), ractd.simulator(ENV)
    together = ractd.evaluate(policy, make, 4)["returns"]
    alone = [ractd.evaluate(policy, make, 1, first_seed=seed)["returns"][0] for seed in range(4)]
    assert alone == together and len(set(together)) == 4

@pytest.mark.parametrize("env, value, score", [
    ("hopper-medium", 3234.3, 100), ("hopper-medium", -20.272305, 0),
    ("walker2d-medium", 1.629008, 0), ("walker2d-medium-expert", 4592.3, 100),
    ("halfcheetah-medium", 12135.0, 100), ("halfcheetah-medium", -280.178953, 0),
    ("mujoco/pusher/expert-v0", 1.0, math.nan)])
def test_normalized_score_has_d4rls_reference_points(env, value, score):
    assert ractd.normalized_score(env, value) == pytest.approx(score, nan_ok=True)

# ---- reproduce.py: tables, figures, export ---------------------------------------------------------

def test_the_bound_of_a_student_step_is_the_eight_passes_that_its_losses_need():
    teacher, target = (ractd.frozen(network(i, two_levels=i > 0)) for i in range(2))
    student, R, calls = network(2, True), ractd.frozen(ractd.RewardModel(3, 2)), []
    state, x0 = torch.randn(4, 3), torch.randn(4, 8, 2)
    repeat = reproduce.network_passes(lambda: ractd.distillation_loss(
        student, target, teacher, R, state, x0, Config(grid_points=6)))
    for net in (teacher, target, student, R):
        net.register_forward_pre_hook(lambda net, inputs: calls.append(
            (net, len(inputs[0]), inputs[0].requires_grad, torch.is_grad_enabled())))
    repeat()
    assert calls == [
        (teacher, 4, False, False), (teacher, 4, False, False),  # Eq. 6: one Heun step
        (target, 4, False, False),                               # Eq. 6: u -> k
        (student, 12, False, True),                              # Eqs. 5, 7, 8 in one
        (target, 4, False, False), (target, 4, True, True),      # Eq. 5: k -> 0, both sides
        (R, 4, False, True), (teacher, 4, False, False)]         # Eq. 8 (state first), the anchor
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert not [p for net in (teacher, target, R) for p in net.parameters() if p.grad is not None]

def test_times_are_medians_of_calls_that_take_turns():
    order, calls = [], {"slow": lambda: order.append("slow") or time.sleep(0.03),
                        "fast": lambda: order.append("fast") or time.sleep(0.002)}
    times = reproduce.in_turns(calls, turns=4)
    assert 30 <= times["slow"][0] < 90 and 2 <= times["fast"][0] < 15
    assert times["slow"][1] >= 0 and order[4:].count("slow") == 4 < order[4:].count("fast")
    assert [x for i, x in enumerate(order[4:]) if x != order[3 + i]] == ["slow", "fast"] * 4

def test_bench_writes_every_promised_number(run, monkeypatch):
    out, flags = run
    monkeypatch.setattr(reproduce, "in_turns",
                        lambda calls, turns=1, real=reproduce.in_turns: real(calls, 2, 0))
    assert cli("bench", *flags) == 0
    bench = json.loads((out / "bench.json").read_text())
    samplers = dict(teacher_80=158, teacher_20=38, teacher_10=18, student_1=1, student_2=2, student_4=4)
    assert bench["calls"] == samplers
    assert bench["score"].keys() == bench["action_ms"].keys() == samplers.keys()
    assert bench["score"]["student_1"][0] == pytest.approx(
        json.loads((out / "metrics.json").read_text())["normalized_score_mean"])
    assert bench["action_ms"]["teacher_80"] > 10 * bench["action_ms"]["student_1"] == 10 * bench["policy_ms"]
    assert bench["forward_ms"].keys() == {"teacher", "student"}
    assert bench["forward_ms"]["student"] < bench["policy_ms"]
    for stage in ractd.STAGES:
        assert 0 < bench["train"][stage]["network_share"] < 1.2 and bench["train"][stage]["steps_per_s"] > 0
    assert min(bench["eval"]["simulator_s"], bench["eval"]["network_s"]) > 0 and bench["peak_memory_mb"] > 50
    assert bench["device"] and bench["versions"]["torch"] == torch.__version__

@pytest.mark.parametrize("what, students, words", [
    ("losses", 7, ["without DSM", "1.5", "109.5"]), ("reward-weight", 8, ["0.7 of the default", "108.4"])])
def test_an_ablation_trains_each_row_as_it_says_and_never_twice(
        run, monkeypatch, capsys, what, students, words):
    out, flags = run
    assert cli("ablate", *flags, f"--what={what}") == 0
    first = json.loads((out / f"ablate_{what}.json").read_text())
    default = {"reward_weight": 2.0}                         # Hopper's; the others are multiples of it
    if what == "reward-weight":
        weights = [row["changes"]["reward_weight"] for row in first["rows"]]
        assert weights == pytest.approx([0, 0.2, 0.6, 1, 1.4, 2, 3, 4])
    for row in first["rows"]:
        name = "-".join(f"{key}={value}" for key, value in row["changes"].items())
        folder = out / "variants" / name if name and row["changes"] != default else out
        saved = torch.load(folder / "student.pt")
        assert all(saved["config"][key] == value for key, value in row["changes"].items())
        assert saved["depends"]["teacher_id"] == torch.load(out / "teacher.pt")["id"]
    assert len({torch.load(path)["id"] for path in out.rglob("student.pt")}) == students
    table = capsys.readouterr().out
    assert all(word in table for word in words)
    monkeypatch.setattr(ractd, "fit", None)
    monkeypatch.setattr(ractd, "evaluate", None)
    assert cli("ablate", *flags, f"--what={what}") == 0
    assert json.loads((out / f"ablate_{what}.json").read_text()) == first
    assert (out / f"ablate_{what}.png").read_bytes()[:4] == b"\x89PNG"

@pytest.mark.parametrize("what, calls", [("nfe", [1, 2, 4]), ("init-noise", [4] * 4 + [1] * 4)])
def test_an_ablation_of_acting_trains_nothing(run, monkeypatch, what, calls):
    out, flags = run
    monkeypatch.setattr(ractd, "fit", None)
    assert cli("ablate", *flags, f"--what={what}") == 0
    rows = json.loads((out / f"ablate_{what}.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == calls
    default = Config().init_noise
    same, = [row for row in rows if row["nfe"] == 1 and row["changes"].get("init_noise", default) == default]
    assert same["returns"] == returns(out)

def test_an_ablation_retrains_every_student_once(run, monkeypatch):
    out, flags = run
    stages, fit = [], ractd.fit
    monkeypatch.setattr(ractd, "fit", lambda stage, *args: stages.append(stage) or fit(stage, *args))
    assert cli("ablate", *flags, "--what=nfe", "--retrain=student") == 0 and stages == ["student"]
    stages.clear()
    for _ in range(2):                   # seven students, the run's own among them
        assert cli("ablate", *flags, "--what=losses", "--retrain=student", "--student-lr=1e-4") == 0
    assert stages == ["student"] * 14

def test_the_reward_teacher_plans_what_the_reward_model_likes_better(run):
    out, flags = run
    flags = [*flags, "--student-lr=0.01", "--student-warmup=1", "--reward-weight=5", "--retrain=student"]
    assert cli("ablate", *flags, "--what=reward-stage") == 0
    tuned, = (out / "variants").glob("reward-teacher-*")
    assert len(list(tuned.rglob("student.pt"))) == 2 and len(list(out.rglob("student.pt"))) == 4
    checkpoints = [ractd.load_checkpoint(folder / "teacher.pt", "teacher", "cpu") for folder in (out, tuned)]
    R = ractd.load_reward_model(ractd.load_checkpoint(out / "reward.pt", "reward", "cpu"),
                                ractd.Normalizer(checkpoints[0]["normalizer"]), "cpu")
    state, noise = torch.rand(64, 11) - 0.5, torch.randn(64, 8, 3)
    plans = [denoise(ractd.Policy(c, Config()).net, noise, torch.ones(64), state) for c in checkpoints]
    plain, better = (R(state, plan[:, 0].clamp(-1, 1)).mean() for plan in plans)
    assert better > plain + 0.01
    assert cli("ablate", *flags, "--what=reward-stage", "--reward-weight=6") == 0    # another one
    assert len(list((out / "variants").glob("reward-teacher-*"))) == 2

def test_plot_draws_three_pictures_once_bench_has_scores(run, capsys):
    out, flags = run
    assert cli("plot", *flags) == 0 and "first give: bench" in capsys.readouterr().out
    (out / "bench.json").write_text(json.dumps(dict(
        score={"teacher_80": [5.0, 1.0, "return"], "student_1": [7.0, 1.0, "return"]}, episodes=3, device="d",
        action_ms={"teacher_80": 100.0, "student_1": 1.0}, calls={"teacher_80": 158, "student_1": 1})))
    assert cli("plot", *flags) == 0
    for name in ("returns", "speed", "training"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

@pytest.mark.parametrize("how", [[], ["--nfe=2", "--init-noise=80"], ["--model=teacher"]])
def test_an_exported_policy_acts_the_same_without_this_program(run, tmp_path, how):
    out, _ = run
    assert cli("export", f"--out={out}", *how, "policy.pt2") == 0
    observations = torch.randn(5, 1, 11)
    torch.save(observations, "observations.pt")
    blocks = (SCRIPT.parent / "README.md").read_text().split("```")
    code = next(block for block in blocks if "torch.export.load" in block)
    code = code.removeprefix("python") + """torch.manual_seed(3)
torch.save(policy(torch.load("observations.pt")), "actions.pt")"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True)         # -I: no ractd.py on its path
    first, chunk = torch.load("actions.pt")
    stage = "teacher" if "--model=teacher" in how else "student"
    policy = ractd.Policy(ractd.load_checkpoint(out / f"{stage}.pt", stage, "cpu"), Config(
        teacher_points=3, **dict(nfe=2, init_noise=80.0) if "--nfe=2" in how else {}))
    torch.manual_seed(3)
    expected = policy.plan(observations, lambda _: torch.randn(5, 8, 3))
    assert torch.allclose(chunk, expected, atol=1e-5) and torch.equal(first, chunk[:, 0])

def test_a_video_is_the_first_episode_or_a_sentence(run, monkeypatch, capsys):
    from gymnasium.envs.mujoco import MujocoEnv
    from PIL import Image
    frames = []
    monkeypatch.setattr(MujocoEnv, "render", lambda self: (
        frames.append(1) or np.full((240, 240, 3), len(frames), np.uint8)))
    assert cli("evaluate", f"--out={run[0]}", "--episodes=2", "--video=a.gif") == 0
    length = json.loads((run[0] / "metrics.json").read_text())["lengths"][0]
    with Image.open("a.gif") as gif:
        assert gif.n_frames == math.ceil((length + 1) / 4)               # 125 frames a second, every fourth
    monkeypatch.setattr(MujocoEnv, "render", lambda self: 1 / 0)
    capsys.readouterr()
    refused(capsys, cli("evaluate", f"--out={run[0]}", "--episodes=2", "--video=b.gif"), "MUJOCO_GL")

def test_ractd_needs_no_other_file_to_train_and_act(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = shutil.copy(SCRIPT, tmp_path / "ractd.py")

    def run(command):
        return subprocess.run([sys.executable, script, command, f"--env={ENV}", f"--data={trained[1]}",
                               "--out=alone", *FLAGS], text=True, capture_output=True)
    assert run("distill").returncode == 0 and same_weights("alone/student.pt", trained[0] / "student.pt")
    failed = run("bench")
    assert failed.returncode == 2 and "reproduce" in failed.stderr and "Traceback" not in failed.stderr

# ---- every bad input is one sentence and exit code 2 ---------------------------------------------

def refused(capsys, code, *words):
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err, err
    assert len(re.findall("^ractd.py", err, re.M)) == 1, err
    assert not [word for word in words if word not in err], err

BAD_ROWS = {
    "lacks timeouts": lambda rows: rows.pop("timeouts"),
    "rewards has shape (100,)": lambda rows: rows.update(rewards=rows["rewards"][:100]),
    "observations has shape (133,)": lambda rows: rows.update(observations=rows["rewards"]),
    "actions has type": lambda rows: rows.update(actions=np.full((133, 3), b"x")),
    "rewards is NaN or infinite in row 7": lambda rows: rows["rewards"].put(7, math.nan),
    "observations of 9": lambda rows: rows.update(observations=rows["observations"][:, :9]),
    "actions of 2 numbers": lambda rows: rows.update(actions=rows["actions"][:, :2]),
    "--horizon 8": lambda rows: rows.update(
        terminals=np.arange(133) % 5 == 4),
    "no episode ends": lambda rows: rows.update(terminals=np.zeros(133), timeouts=np.zeros(133)),
    "has shape (0,": lambda rows: rows.update({key: x[:0] for key, x in rows.items()})}

@pytest.mark.parametrize("sentence", BAD_ROWS)
def test_a_bad_dataset_is_refused(sentence, tmp_path, capsys):
    BAD_ROWS[sentence](rows := logged())
    data = write(tmp_path / "bad.hdf5", rows)
    refused(capsys, cli("distill", *FLAGS, f"--data={data}"), "bad.hdf5", sentence)

def test_a_missing_or_damaged_file_is_refused(tmp_path, capsys):
    path, whole = tmp_path / "bad.hdf5", Path(write(tmp_path / "good.hdf5", logged())).read_bytes()
    refused(capsys, cli("data", f"--data={path}"), str(path))
    for content in (b"no HDF5", whole[:len(whole) // 2]):
        path.write_bytes(content)
        refused(capsys, cli("data", f"--data={path}"), str(path))
    refused(capsys, cli("data", "--data=minari:no/such-v0"), "no/such-v0")

@pytest.mark.parametrize("flag", """--channels=0 --channels=a --kernel=4 --embed=9 --horizon=10
    --horizon=-8 --history=0 --gamma=1 --gamma=nan --teacher-steps=0 --teacher-lr=-1 --patch=0
    --reward-batch=0 --grid-points=2 --episodes=0 --nfe=0 --nfe=x --execute=0 --execute=9
    --dropout=2 --seed=-1 --seed=99999999999999999999 --target-decay=2 --init-noise=nan
    --reward-weight=-2 --dsm-target=x --device=cuda:99 --device=x --horizn=8 --preset=x""".split())
def test_a_bad_flag_is_refused_by_name(flag, trained, capsys):
    code = cli("teacher", f"--data={trained[1]}", *FLAGS, "--out=never", flag)
    refused(capsys, code, "steps" if "steps" in flag else flag.split("=")[0])
    assert not Path("never").exists()

def test_an_unknown_env_is_answered_with_the_nearest_names(capsys):
    refused(capsys, cli("data", env="hoper-medium-repaly"), "nearest first: hopper-medium-replay")

def test_what_does_not_fit_a_checkpoint_is_refused_with_a_list(run, capsys):
    out, flags = run
    code = cli("distill", *flags, "--teacher-lr=1e-4", "--teacher-batch=9")
    refused(capsys, code, "teacher_lr: 0.001 in the file, 0.0001", "teacher_batch: 8")
    code = cli("evaluate", f"--out={out}", "--horizon=16", env="walker2d-medium")
    refused(capsys, code, "horizon: 8", f"env: {ENV}")
    code = cli("distill", *flags, "--out=new", f"--teacher={out / 'teacher.pt'}", "--horizon=16")
    refused(capsys, code, "horizon: 8")
    torch.save(dict(torch.load(out / "teacher.pt"), step=3), "unfinished.pt")
    code = cli("distill", *flags, "--out=new", "--teacher=unfinished.pt")
    refused(capsys, code, f"steps: 3 in the file, {STEPS} asked for")

def test_data_that_were_edited_are_not_the_same_data(run, trained, tmp_path, capsys):
    rows = logged()
    rows["actions"][5] *= -1                                 # as many rows, the same returns and name
    data = write(tmp_path / Path(trained[1]).name, rows)
    refused(capsys, cli("distill", *run[1], f"--data={data}"), "dataset", "another --data")

def test_a_missing_damaged_or_wrong_checkpoint_is_refused(run, capsys):
    out, flags = run
    refused(capsys, cli("evaluate", "--out=empty"), "no trained student")
    path, whole = out / "student.pt", (out / "student.pt").read_bytes()
    torch.save({"stage": "student"}, path)
    for bad in (path.read_bytes(), b"", b"garbage", whole[:len(whole) // 2],
                (out / "teacher.pt").read_bytes()):
        path.write_bytes(bad)
        refused(capsys, cli("evaluate", f"--out={out}"), str(path))
        refused(capsys, cli("distill", *flags), str(path))

def test_a_folder_that_cannot_be_written_is_refused(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    code = cli("teacher", *FLAGS, f"--data={trained[1]}", f"--out={tmp_path / 'file' / 'run'}")
    refused(capsys, code, "cannot", str(tmp_path / "file"))

def test_dry_run_estimates_the_time_and_leaves_nothing(trained, capsys):
    assert cli("distill", *FLAGS, f"--data={trained[1]}", "--out=never", "--dry-run") == 0
    out = capsys.readouterr().out
    stages = re.findall(r"(\w+): ([0-9.]+) s a step, (\d+) steps", out)
    assert [(name, int(steps)) for name, _, steps in stages] == [(name, STEPS) for name in ractd.STAGES]
    total = sum(float(seconds) * STEPS for _, seconds, _ in stages) / 60
    assert float(re.search(r"estimated total: ([0-9.]+) min", out)[1]) == pytest.approx(total, abs=0.06)
    assert not Path("never").exists()

def test_a_teacher_of_another_task_is_refused_although_its_sizes_could_fit(run, tmp_path, capsys):
    """Walker2d and HalfCheetah have the same sizes; Hopper and Walker2d have not."""
    out, flags = run
    saved = torch.load(out / "teacher.pt")
    walker = write(tmp_path / "walker.hdf5", logged(o=17, a=6))
    shape = [flag for flag in FLAGS if "steps" not in flag]
    for env, sizes, name in (("walker2d-medium", [11, 3], "sizes"),
                             ("halfcheetah-medium", [17, 6], "task")):
        columns = {"obs": np.eye(sizes[0]), "action": np.eye(sizes[1]), "return": np.eye(2)[:, :1]}
        torch.save(dict(saved, dims=sizes, normalizer=ractd.Normalizer.fit(**columns).tables),
                   tmp_path / "t.pt")
        refused(capsys, cli("distill", f"--data={walker}", f"--teacher={tmp_path / 't.pt'}",
                            "--out=other", *shape, env=env), name)

def test_a_full_disk_and_a_machine_without_git_lose_nothing(run, monkeypatch, capsys):
    out, flags = run
    before = (out / "student.pt").read_bytes()
    (out / "metrics.json").unlink()
    monkeypatch.setenv("PATH", "")
    assert cli("evaluate", flags[0], f"--out={out / 'new' / 'folder'}",
               f"--teacher={out / 'teacher.pt'}", "--episodes=2") == 0       # so it acts
    metrics = json.loads((out / "new/folder/evaluate_teacher_nfe4_noise20_from0_n2.json").read_text())
    assert metrics["git_commit"] is None

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ractd.os, "fsync", full)
    refused(capsys, cli("distill", *flags), "No space left")
    assert (out / "student.pt").read_bytes() == before and not (out / "metrics.json").exists()
    assert not list(out.glob("*.part"))

def test_the_examples_in_the_readme_run(run):
    text, scope = (SCRIPT.parent / "README.md").read_text(), {}
    alone, policy = (block.split("```")[0] for block in text.split("```python\n")[1:3])
    exec(alone, scope)
    assert scope["x"].shape == (5, 16, 2) and scope["calls"] == 38 and scope["loss"] < 0.9
    exec(policy.replace("runs/hopper-medium-replay", str(run[0])), scope)
    assert scope["actions"].shape == (1, 8, 3)
