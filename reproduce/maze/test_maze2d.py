"""Tests of the mazes, their data and their planner against oracles: python -m pytest -q."""

import dataclasses
import glob
import itertools
import json
import sys

import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import ractd
from reproduce import pinned
from reproduce.maze import maze2d, pointmaze
from reproduce.maze.maze2d import MazeConfig

torch.set_num_threads(1)  # more would round differently
CPU = torch.device("cpu")
LAYOUTS = {  # D4RL's: # a wall, G the fixed goal
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# "
    "#OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# ############",
}
TINY = [
    *("--horizon=32", "--width=8", "--episodes=3", "--grid-points=5", "--trajectories=300"),
    *("--trajectory-batch=4", "--teacher-batch=8", "--reward-batch=8", "--student-batch=8"),
    *("--teacher-steps=6", "--reward-steps=6", "--student-steps=6"),
]


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def umaze():
    return pointmaze.Maze("umaze")


@pytest.fixture
def batches():
    """Windows of 32 states of a random drive."""
    drive = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    return maze2d.StateBatches([drive], 32, 0.9, CPU)


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert not [word for word in words if word not in error], error


# ---- Pinned places -------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [False, True])
def test_pinned_places_are_clean_at_every_level_and_the_network_sees_them(student):
    """Also at noise 80, where c_in x would hide them; what is free is as without pins."""
    places = ((0, 0), (0, 2), (-1, 1))
    net = pinned.PinnedUNet(3, 4, (8, 8), patch=1, student=student, pinned=places)
    seen = []
    net.down[0][0][0].register_forward_hook(lambda net, inputs, output: seen.append(inputs[0]))
    free = torch.ones(8, 3, dtype=torch.bool)
    for place in places:
        free[place] = False
    state = torch.rand(5, 4)
    x = 80 * torch.randn(5, 8, 3)
    kept = x.clone()

    def clean(x):
        values = torch.stack([x[:, h, a] for h, a in places], dim=1)
        return torch.allclose(values, state[:, :3], atol=1e-6)

    for t in (0.02, 1.0, 80.0, torch.full((5,), 0.02), torch.full((5,), 80.0)):
        k = t / 2 if student else None
        y = pinned.denoise(net, x, t, state, k)
        assert clean(y) and clean(seen[-1]) and torch.equal(x, kept) and not clean(x)
        c_skip, c_out, c_in = map(ractd.expand, ractd.precondition(t))
        assert torch.equal(seen[-1][:, free], (c_in * x)[:, free])
        bare = c_skip * x + c_out * net(seen[-1], t, state, k)
        assert torch.equal(y[:, free], bare[:, free])
        if student:
            z = pinned.student_jump(net, x, t, k, state)
            assert clean(z) and torch.allclose(z[:, free], (x + y)[:, free] / 2)


def test_a_student_with_a_pinned_teachers_weights_is_that_teacher():
    pins = {"patch": 2, "pinned": ((0, 1), (-1, 0))}
    teacher = pinned.PinnedUNet(2, 3, (8,), **pins)
    student = pinned.PinnedUNet(2, 3, (8,), **pins, student=True)
    ractd.warm_start(student, teacher)
    x = torch.randn(4, 8, 2)
    state = torch.randn(4, 3)
    expected = pinned.denoise(teacher, x, 3.0, state)
    assert torch.allclose(pinned.denoise(student, x, 3.0, state, 1.0), expected, atol=1e-5)
    assert torch.equal(expected[:, 0, 1], state[:, 0])


# ---- The mazes and their data --------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mazes_are_d4rls_and_routes_are_shortest(name):
    maze = pointmaze.Maze(name)
    rows = LAYOUTS[name].split()
    assert maze.walls.tolist() == [[letter == "#" for letter in row] for row in rows]
    row, column = maze.goal_cell
    assert rows[row][column] == "G"
    assert maze.steps == {"umaze": 300, "medium": 600, "large": 800}[name]
    n = len(maze.cells)
    near = np.abs(np.array(maze.cells)[:, None] - np.array(maze.cells)).sum(2) == 1
    reach = np.eye(n, dtype=bool)
    distance = np.zeros((n, n), int)
    while not reach.all():  # powers of the adjacency matrix
        distance += ~reach
        reach |= reach @ near
    for i, cell in enumerate(maze.cells):
        assert maze.cell(maze.center(cell)) == cell and not maze.in_wall(maze.center(cell))
        for j, goal in enumerate(maze.cells):
            here = cell
            for _ in range(distance[i, j]):
                assert here != goal
                here = maze.routes[goal][here]
            assert here == goal


def test_positions_in_walls_and_outside_are_told(umaze):
    center = umaze.center((1, 1))
    inside = np.array([center, center + [0.49, -0.49]])
    outside = np.array([umaze.center((2, 1)), center - [0.51, 0], [99, 0], [0, -99]])
    assert not umaze.in_wall(inside).any() and umaze.in_wall(outside).all()
    assert umaze.in_wall(np.stack([inside, outside[:2]])).shape == (2, 2)


def test_scores_have_d4rls_reference_points(umaze):
    assert umaze.score([23.85, 161.86]) == pytest.approx([0, 100])


@pytest.mark.parametrize("random_goals", [False, True])
def test_the_task_pays_one_within_half_a_cell_of_the_goal_until_its_time_is_up(umaze, random_goals):
    task = pointmaze.MazeTask(umaze, random_goals)
    goals = set()
    for seed in range(5):
        observation, _ = task.reset(seed=seed)
        assert np.linalg.norm(observation[:2] - observation[4:]) > 0.45
        assert np.array_equal(observation[2:4], [0, 0])
        goals.add(tuple(observation[4:]))
    assert (goals == {tuple(umaze.fixed_goal)}) != random_goals
    control = pointmaze.Controller(umaze, observation[:2], observation[4:])
    truncated = False
    steps = 0
    while not truncated:
        observation, reward, terminated, truncated, _ = task.step(control(observation))
        distance = np.linalg.norm(observation[:2] - observation[4:])
        assert reward == (distance <= 0.5) and not terminated
        steps += 1
    assert steps == 300 and reward == 1 and distance < 0.11


def test_the_recipe_is_one_drive_cut_where_a_goal_is_reached(umaze):
    episodes = pointmaze.record(umaze, 3000, noise=0.5, seed=3)
    again = pointmaze.record(umaze, 3000, noise=0.5, seed=3)
    assert sum(len(e) for e in episodes) == 3000
    for one, other in zip(episodes, again, strict=True):
        assert np.array_equal(one.actions, other.actions)
    for one, following in itertools.pairwise(episodes):
        goals = one.observations["desired_goal"]
        states = one.observations["observation"]
        distances = np.linalg.norm(goals - one.observations["achieved_goal"], axis=1)
        assert distances[-1] < 0.1 and (distances[1:-1] >= 0.1).all()
        assert len(np.unique(goals, axis=0)) == 1
        assert np.array_equal(states[-1], following.observations["observation"][0])
        assert np.array_equal(one.rewards, distances[1:] <= 0.5)
        # PointMaze integrates: the position moves by 10 ms of the new velocity
        assert np.diff(states[:, :2], axis=0) == pytest.approx(0.01 * states[1:, 2:], abs=1e-3)
        assert one.truncations.tolist() == [False] * (len(one) - 1) + [True]
        assert not one.terminations.any() and np.abs(one.actions).max() <= 1
    quiet = pointmaze.record(umaze, 300, noise=0.0, seed=3)[0]
    begin = quiet.observations["achieved_goal"][0]
    control = pointmaze.Controller(umaze, begin, quiet.observations["desired_goal"][0])
    actions = [control(x) for x in quiet.observations["observation"][:-1]]
    assert quiet.actions == pytest.approx(np.array(actions), abs=1e-6)


def make_set(name, drives, observations=None):
    """A Minari set of actions of 0 whose episodes have these states."""
    buffers = []
    for states in drives:
        n = len(states) - 1
        goal_dict = {"observation": states, "achieved_goal": states[:, :2]}
        goal_dict["desired_goal"] = np.zeros((n + 1, 2))
        episode = EpisodeBuffer(
            observations=goal_dict if observations is None else observations[: n + 1],
            actions=np.zeros((n, 2), np.float32),
            rewards=[0.0] * n,
            terminations=[False] * n,
            truncations=[False] * (n - 1) + [True],
        )
        buffers.append(episode)
    env = pointmaze.make_simulator("umaze").spec if observations is None else "Hopper-v4"
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(name, buffers, env=env)


def test_episodes_that_continue_each_other_are_joined_and_no_others():
    walk = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    make_set("maze/joined-v0", [walk[:11], walk[10:16], walk[17:], walk[:5]])
    drives = pointmaze.read_trajectories("maze/joined-v0")
    for drive, expected in zip(drives, [walk[:16], walk[17:], walk[:5]], strict=True):
        assert np.array_equal(drive, expected)


def test_half_a_set_is_no_set(umaze, monkeypatch):
    def broken(dataset_id, *_, **__):
        folder = minari.storage.get_dataset_path(dataset_id)
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minari, "create_dataset_from_buffers", broken)
        with pytest.raises(KeyboardInterrupt):
            pointmaze.collect(umaze, 30, dataset_id="maze/half-v0")
    assert not pointmaze.exists("maze/half-v0")
    minari.storage.get_dataset_path("maze/half-v0").mkdir(parents=True)  # as after a kill
    assert pointmaze.collect(umaze, 30, dataset_id="maze/half-v0") == "maze/half-v0"
    assert pointmaze.exists("maze/half-v0")


def test_batches_equal_brute_force_and_stay_in_one_drive():
    rng = np.random.default_rng(0)
    gamma = 0.9
    horizon = 8
    drives = [0.1 * rng.normal(size=(n, 4)).cumsum(0).astype(np.float32) for n in (40, 5, 90, 8)]
    batches = maze2d.StateBatches(drives, horizon, gamma, CPU)
    windows = {x[i : i + horizon].tobytes() for x in drives for i in range(len(x) - horizon + 1)}
    state, x0 = batches.windows(3000)
    raw = ractd.decode(x0, batches.normalizer["obs"]).numpy()
    assert torch.equal(state, torch.cat([x0[:, 0], x0[:, -1, :2]], dim=1))
    everything = np.concatenate(drives)
    index = np.abs(everything[None] - raw[:, :1]).max(2).argmin(1)  # row of a window's first state
    assert {everything[i : i + horizon].tobytes() for i in index} == windows
    assert raw == pytest.approx(everything[index[:, None] + np.arange(horizon)], abs=1e-4)

    inputs, target = batches.returns(500)
    moved = 50  # to anywhere, where nothing is earned
    assert not target[:moved].any() and inputs[:moved, :2].abs().max() <= 1
    assert inputs[:moved, :2].std(0) == pytest.approx([3**-0.5] * 2, rel=0.1)
    last = np.repeat(np.cumsum([len(x) for x in drives]) - 1, [len(x) for x in drives])
    discounts = gamma ** np.arange(len(batches.discounts))
    hits = 0
    for x, y in zip(inputs[moved:].numpy(), target[moved:].numpy(), strict=True):
        row = np.abs(batches.obs.numpy() - x[:4]).max(1).argmin()
        goal = np.abs(batches.obs.numpy()[:, :2] - x[4:]).max(1).argmin()
        assert 0 <= goal - row < horizon
        later = np.minimum(row + np.arange(len(discounts)), last[row])  # a drive's end is held
        near = np.linalg.norm(everything[later, :2] - everything[goal, :2], axis=1) <= 0.5
        assert y == pytest.approx((discounts * near).sum() / discounts.sum(), abs=1e-5)
        hits += 0 < y < 1
    assert hits > 50 and gamma ** len(discounts) < 0.01


# ---- Reward model and losses ---------------------------------------------------------------------


def test_r_learns_that_there_is_nothing_where_no_one_goes():
    """A drive to and fro along a line: R rises along it to the goal, and is 0 beside it."""
    x = np.abs(np.arange(4000) % 200 - 100) / 50 - 1  # -1 to 1 and back
    drive = np.stack([x, 0 * x, 0 * x, 0 * x], axis=1)
    drive = np.concatenate([drive, [[0, -1, 0, 0], [0, 1, 0, 0]]]).astype(np.float32)
    batches = maze2d.StateBatches([drive], 64, 0.97, CPU)
    R, loss_fn = maze2d.reward_stage(MazeConfig(horizon=64), batches)
    optimizer = torch.optim.AdamW(R.parameters(), 2e-3)
    for _ in range(400):
        ractd.train_step(R, R, optimizer, loss_fn, 0.0)
    state = torch.tensor([0, 0, 0, 0, 1.0, 0]).expand(3, 6)  # the goal is (1, 0)
    along = torch.tensor([[-0.6, 0, 0, 0], [0.2, 0, 0, 0], [0.9, 0, 0, 0]])
    beside = along + torch.tensor([0, 0.6, 0, 0])
    with torch.no_grad():
        on = R(state, along[:, None])
        off = R(state, beside[:, None])
    assert on[0] < on[1] < on[2] and on[2] > 0.3
    assert off.abs().max() < 0.1


def test_the_return_of_a_plan_is_the_mean_over_its_states_and_sees_only_the_goal_beside():
    R = maze2d.GoalReward()
    plan = torch.randn(3, 5, 4)
    state = torch.randn(3, 6)
    value = R(state, plan)
    each = torch.stack([R(state, plan[:, i : i + 1]) for i in range(5)], dim=1)
    assert torch.allclose(value, each.mean(1), atol=1e-6) and each.std() > 0.01
    elsewhere = torch.cat([torch.randn(3, 4), state[:, 4:]], dim=1)
    assert torch.equal(R(elsewhere, plan), value)
    assert not torch.allclose(R(state + torch.tensor([0, 0, 0, 0, 0, 0.1]), plan), value)


def test_plans_that_differ_little_are_apart_by_their_squares_and_others_by_their_difference():
    a = torch.zeros(2, 3, 4)
    b = torch.tensor([0.01, 10.0])[:, None, None] * torch.ones(2, 3, 4)
    near, far = maze2d.plan_distance(a, b).tolist()
    assert near == pytest.approx(0.01**2 / 0.2, rel=0.01)
    assert far == pytest.approx(10 - 0.1, rel=0.01)
    assert maze2d.plan_distance(b, b).tolist() == [0, 0]


def test_trajectories_go_from_cool_noise_to_where_heuns_method_ends_half_to_other_goals(batches):
    teacher = maze2d.make_net(MazeConfig(horizon=32, width=4)).requires_grad_(False)
    state, x_T, end = maze2d.teacher_trajectories(teacher, batches, 0.5, 256)
    assert len(state) == len(x_T) == len(end) == 256
    assert x_T[:, 1:-1].std().item() == pytest.approx(40, rel=0.05)
    denoiser = lambda x, t: pinned.denoise(teacher, x, t, state)
    expected = ractd.heun_sample(denoiser, x_T, ractd.karras_sigmas(7))
    assert torch.allclose(end, expected, atol=1e-4)
    assert torch.allclose(end[:, 0], state[:, :4]) and torch.allclose(end[:, -1, :2], state[:, 4:])
    rows = (batches.obs[:, None] == state[:, :4]).all(2).float().argmax(0)
    own = (state[:, 4:] == batches.obs[rows + 31, :2]).all(1)  # the goal of the same window
    assert own[128:].all() and own[:128].float().mean() < 0.2  # of 59 windows


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.0, 1.5)])
def test_the_teacher_learns_windows_with_pinned_ends_at_the_levels(batches, mean, std, monkeypatch):
    config = MazeConfig(horizon=32, width=4, teacher_batch=4000, level_mean=mean, level_std=std)
    teacher, loss_fn = maze2d.teacher_stage(config, batches)
    edm_loss = ractd.edm_loss
    seen = []

    def spy(denoiser, x0, t, noise):
        seen.append((x0, t, denoiser(x0 + t[:, None, None] * noise, t)))
        return edm_loss(denoiser, x0, t, noise)

    monkeypatch.setattr(ractd, "edm_loss", spy)
    with torch.no_grad():
        loss, _ = loss_fn(teacher, None)
    ((x0, t, denoised),) = seen
    # weights 1 / c_out^2 make the loss of an untrained network about that of c_skip x, at most 1
    assert 0.1 < loss.item() < 1.5
    assert t.log().mean().item() == pytest.approx(mean, abs=0.1)
    assert t.log().std().item() == pytest.approx(std, abs=0.1)
    assert torch.equal(denoised[:, 0], x0[:, 0]) and torch.equal(denoised[:, -1, :2], x0[:, -1, :2])
    assert not torch.allclose(denoised[:, 1:-1], x0[:, 1:-1], atol=0.1)


def in_order(*limits_and_shape, **_):
    """What takes the place of `torch.randint`: no chance."""
    *low, high, shape = limits_and_shape
    low = sum(low)
    return low + torch.arange(*shape) % (high - low)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_students_loss_adds_eq_9_and_whole_trajectories(sigma, batches, monkeypatch):
    config = MazeConfig(horizon=32, width=4, student_batch=4, temperature=0.25)
    config = dataclasses.replace(config, ctm_weight=2.0, reward_weight=sigma)
    config = dataclasses.replace(config, trajectories=256, trajectory_batch=6)
    teacher = maze2d.make_net(config).requires_grad_(False)
    monkeypatch.setattr(torch, "randint", in_order)
    state, x_T, end = maze2d.teacher_trajectories(teacher, batches, 0.25, 256)
    monkeypatch.setattr(maze2d, "teacher_trajectories", lambda *_: (state, x_T, end))
    x0 = batches.windows(4)[1]
    plans = []

    def reward(state, plan):
        plans.append(plan)
        return plan.sum((1, 2))

    def ctm(jump, frozen_jump, denoiser, x_t, t, u, k, distance):
        assert distance is maze2d.plan_distance
        for x in (jump(x_t, t, k), frozen_jump(x_t, t, k), denoiser(x_t, t)):
            assert torch.equal(x[:, 0], x0[:, 0]) and torch.equal(x[:, -1, :2], x0[:, -1, :2])
        assert not torch.allclose(x_t[:, 0], x0[:, 0])
        assert (t > u).all() and (u >= k).all()
        return torch.tensor(0.25)

    def dsm(prediction, clean, t):
        assert torch.equal(clean, x0) and torch.equal(prediction[:, 0], x0[:, 0])
        return torch.tensor(0.5)

    monkeypatch.setattr(ractd, "ctm_loss", ctm)
    monkeypatch.setattr(ractd, "dsm_loss", dsm)
    net, loss_fn = maze2d.student_stage(config, batches, teacher, reward if sigma else None)
    net.out.weight.data *= 20  # plans that leave the range
    with torch.no_grad():
        loss, info = loss_fn(net, net)
        ends = pinned.student_jump(net, x_T[:6], 80.0, 0.02, state[:6])
    assert info["path"].item() == pytest.approx(maze2d.plan_distance(ends, end[:6]).mean().item())
    expected = 2 * (0.25 + info["path"]) + 0.1 * 0.5
    if sigma:
        (plan,) = plans
        assert plan.abs().max() == 1 and torch.allclose(plan[:, 0], x0[:, 0])
        expected = expected - sigma * plan.sum((1, 2)).mean()
    assert loss.item() == pytest.approx(expected.item())


# ---- Acting --------------------------------------------------------------------------------------


class Straight:
    """A planner of straight plans (n steps) at constant velocity from the state it sees."""

    def __init__(self, n):
        self.n = n
        self.seen = []

    def __call__(self, observations, generators):
        self.seen.append(observations.copy())
        time = 0.01 * np.arange(self.n)[:, None]
        velocity = np.broadcast_to([1.0, 0.5], (len(observations), 1, 2))
        positions = observations[:, None, :2] + time * velocity
        return np.concatenate([positions, np.broadcast_to(velocity, positions.shape)], axis=2)


@pytest.mark.parametrize("replan", [0, 4])
def test_a_plan_is_driven_by_the_pd_rule_from_the_true_state_and_its_end_is_held(replan):
    planner = Straight(6)
    act = pointmaze.OpenLoop(planner, replan)
    observations = np.zeros((2, 6))
    for step in range(10):
        observations = observations + 0.01 * (step + 1)
        action = act(observations, None)
        assert action.shape == (2, 1, 2)
        begun = step // replan * replan if replan else 0
        i = step + 1 - begun
        position = planner.seen[-1][0, :2] + 0.01 * min(i, 5) * np.array([1.0, 0.5])
        velocity = np.array([1.0, 0.5]) if i <= 5 else np.zeros(2)
        expected = position - observations[0, :2] + velocity - observations[0, 2:4]
        assert action[0, 0] == pytest.approx(np.clip(expected, -1, 1))
    assert len(planner.seen) == (3 if replan else 1)


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_plan_depends_on_its_own_generator_alone_and_on_the_temperature(stage):
    config = MazeConfig(horizon=32, width=4, nfe=3, grid_points=5)
    net = maze2d.make_net(config, stage == "student")
    table = {"obs": torch.tensor([[0.0] * 4, [2.0] * 4])}
    saved = {"stage": stage, "ema": net.state_dict(), "normalizer": table}
    saved["config"] = dataclasses.asdict(config)
    observations = np.random.default_rng(0).uniform(-1, 1, (3, 6))

    def plans(rows, temperature=1.0):
        torch.manual_seed(len(rows))
        how = dataclasses.replace(config, temperature=temperature)
        generators = [np.random.default_rng(row) for row in rows]
        return maze2d.Planner(saved, how, 4, CPU).act(observations[rows], generators)

    assert plans([1]) == pytest.approx(plans([0, 1, 2])[1:2], abs=1e-5)
    assert np.abs(plans([1]) - plans([1], 0.5)).max() > 1e-3
    assert plans([0, 1, 2])[:, 0] == pytest.approx(observations[:, :4], abs=1e-6)
    assert plans([0, 1, 2])[:, -1, :2] == pytest.approx(observations[:, 4:], abs=1e-6)


def test_a_plan_through_a_wall_and_one_with_a_leap_are_told(umaze):
    def line(*corners, n=60):
        pairs = itertools.pairwise(np.array([umaze.center(cell) for cell in corners]))
        return np.concatenate([np.linspace(*pair, n, endpoint=False) for pair in pairs])

    good = line((1, 1), (1, 2), (1, 3), (2, 3), (3, 3))
    leap = good.copy()
    leap[30:] += [0.0, 0.32]
    through = line((1, 1), (3, 1), n=240)
    corner = line((1, 3), (3, 3), n=240)
    corner[120:] = umaze.center((3, 1))  # one step from a free place to another, over walls
    plans = np.concatenate([[good, leap, through, corner], np.zeros((4, 240, 2))], axis=2)
    alone = [pointmaze.plan_faults(umaze, plan[None]) for plan in plans]
    assert [one["wall"] for one in alone] == [0, 0, 1, 1]
    together = pointmaze.plan_faults(umaze, plans)
    assert together["wall"] == 0.5
    longest = [1 / 60, np.hypot(0.32, 1 / 60), 1 / 120, np.hypot(2, 1)]
    assert together["longest_step"] == pytest.approx(longest, rel=0.02)


def test_the_gain_is_of_the_same_episodes(umaze):
    before = {"single": {"returns": [10.0, 100.0, 200.0]}, "multi": {"returns": [1.0, 2.0, 3.0]}}
    after = {"single": {"returns": [12.0, 104.0, 206.0]}, "multi": {"returns": [1.0, 2.0, 3.0]}}
    gain = maze2d.paired_gain(umaze, before, after)
    points = 100 / (161.86 - 23.85)  # of a step at the goal
    assert gain["single"] == pytest.approx((4 * points, 2 * points / 3**0.5))
    assert gain["multi"] == (0, 0)


# ---- The command ---------------------------------------------------------------------------------


def read_result():
    with open("run/maze2d.json") as f:
        return json.load(f)


def test_end_to_end_trains_once_and_leaves_every_number_and_picture(umaze, capsys):
    pointmaze.collect(umaze, 3000, dataset_id="maze2d/tiny-v0")
    command = ["--maze=umaze", "--data=minari:maze2d/tiny-v0", "--out=run", *TINY]
    assert maze2d.main([*command, "--video"]) == 0
    text = capsys.readouterr().out
    result = read_result()
    labels = [row["label"] for row in result["rows"]]
    assert labels == ["controller of the data", *maze2d.ROWS]
    for row in result["rows"]:
        assert row["label"] in text
        for task in ("single", "multi"):
            assert len(row[task]["returns"]) == 3 and 0 <= row[task]["reached"] <= 1
    assert result["rows"][0]["single"]["reached"] == 1
    assert [row["calls"] for row in result["rows"]] == [0, 37, 157, 1, 1]
    for row in result["rows"][1:]:
        plans = np.array(row["plans"])
        driven = np.array(row["driven"])
        assert plans.shape == (3, 32, 2) and driven.shape == (3, 300, 2) and row["ms"] > 0
        assert plans[:, 0] == pytest.approx(driven[:, 0], abs=1e-5)  # the ends are pinned
        assert np.abs(plans[:, -1] - umaze.fixed_goal).max() < 1e-5
    for name, head in (("maze2d.png", b"\x89PNG"), ("maze2d.gif", b"GIF8")):
        with open(f"run/{name}", "rb") as f:
            assert f.read(4) == head

    # again: nothing is trained or driven; another way of acting is driven anew
    assert maze2d.main(command) == 0
    text = capsys.readouterr().out
    assert "steps/s" not in text and text.count("numbers from") == 5
    for row, before in zip(read_result()["rows"], result["rows"], strict=True):
        assert row["single"] == before["single"]
    assert maze2d.main([*command, "--replan=100"]) == 0  # the controller knows no plan
    assert capsys.readouterr().out.count("numbers from") == 1

    (kept,) = glob.glob("run/maze2d_RACTD_*_replan-100_*.json")
    with open(kept, "r+") as f:
        f.truncate(100)
    refused(capsys, maze2d.main([*command, "--replan=100"]), kept, "is damaged")
    refused(capsys, maze2d.main([*command, "--level-mean=0"]), "made otherwise", "level_mean")


def test_without_data_they_are_made_by_the_recipe(monkeypatch):
    made = []
    monkeypatch.setattr(pointmaze, "collect", lambda maze: made.append(maze.name))
    monkeypatch.setattr(maze2d, "maze2d", lambda run: made.append((run.data, run.config)))
    assert maze2d.main(["--maze=large", "--reward-weight=0.3"]) == 0
    name, (data, config) = made
    assert (name, data) == ("large", "minari:maze2d/large-v0")
    assert (config.horizon, config.teacher_lr, config.reward_weight) == (384, 0.004, 0.3)


def test_bad_data_get_a_sentence(umaze, capsys, monkeypatch):
    walk = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32) / 9
    make_set("maze/box-v0", [walk[:20]], np.random.default_rng(0).normal(size=(40, 11)))
    make_set("maze/outside-v0", [walk + np.float32([9, 0, 0, 0])])
    make_set("maze/nan-v0", [np.concatenate([walk, np.full((1, 4), np.nan, np.float32)])])
    pointmaze.collect(umaze, 20, dataset_id="maze/twenty-v0")
    cases = {
        "minari:maze/box-v0": "no goals in a plane",
        "minari:maze/outside-v0": "another maze",
        "minari:maze/nan-v0": "NaN",
        "minari:maze/twenty-v0": "the longest drive has 21 states",
        "minari:maze/none-v0": "cannot be read",
        "minari:none": "cannot be read",
        "a.hdf5": "minari:ID",
    }
    drive = ["--maze=umaze", "--out=run", *TINY]
    for data, words in cases.items():
        refused(capsys, maze2d.main([*drive, f"--data={data}"]), words)
    with pytest.raises(ractd.UserError, match="exists: `minari delete"):
        pointmaze.collect(umaze, 20, dataset_id="maze/twenty-v0")
    with pytest.raises(ractd.UserError, match="Minari id"):
        pointmaze.collect(umaze, 20, dataset_id="umaze.hdf5")
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: 1 / 0)  # as a network may fail
    refused(capsys, maze2d.main([*drive, "--data=minari:a/b-v0"]), "cannot be read", "ZeroDiv")


def test_bad_flags_get_a_sentence(capsys, monkeypatch):
    drive = ["--maze=umaze", "--out=run", *TINY]
    for flag in ("--replan=-1", "--reward-weight=0", "--horizon=33"):
        refused(capsys, maze2d.main([*drive, flag]), flag.split("=")[0])
    with pytest.raises(SystemExit) as stop:
        maze2d.main(["--maze=tiny"])
    refused(capsys, stop.value.code, "tiny", "umaze", "medium", "large")
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    refused(capsys, maze2d.main(["--maze=umaze"]), "pip install", "requirements.txt")
