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
from reproduce import collect, maze2d, pointmaze

torch.set_num_threads(1)  # more would round differently
LAYOUTS = {  # D4RL's: # a wall, G the fixed goal
    "umaze": "##### #GOO# ###O# #OOO# #####",
    "medium": "######## #OO##OO# #OO#OOO# ##OOO### #OO#OOO# #O#OO#O# #OOO#OG# ########",
    "large": "############ #OOOO#OOOOO# #O##O#O#O#O# #OOOOOO#OOO# #O####O###O# "
    "#OO#O#OOOOO# ##O#O#O#O### #OO#OOO#OGO# ############",
}
TINY = [
    "--horizon=32",
    "--channels",
    "8",
    "8",
    "--patch=4",
    "--episodes=3",
    "--grid-points=5",
    "--path-batch=4",
]
TINY += [f"--{name}-batch=8" for name in ("teacher", "reward", "student")]
TINY += [f"--{name}-steps=6" for name in ("teacher", "reward", "student")]


def pinned_net(config, student=False):
    """A network whose plans are of states, their ends pinned."""
    net = ractd.make_unet(config, [6, 4], student)
    net.pinned = maze2d.PINNED
    return net


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(maze2d.OWN["umaze"], "paths", 256)


@pytest.fixture(scope="module")
def umaze():
    return pointmaze.Maze("umaze")


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert not [word for word in words if word not in error], error


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mazes_are_d4rls_and_routes_are_shortest(name):
    maze, rows = pointmaze.Maze(name), LAYOUTS[name].split()
    assert maze.walls.tolist() == [[letter == "#" for letter in row] for row in rows]
    row, column = maze.goal_cell
    assert rows[row][column] == "G"
    assert maze.steps == {"umaze": 300, "medium": 600, "large": 800}[name]
    n = len(maze.cells)
    near = np.abs(np.array(maze.cells)[:, None] - np.array(maze.cells)).sum(2) == 1
    reach, distance = np.eye(n, dtype=bool), np.zeros((n, n), int)
    while not reach.all():  # powers of the adjacency matrix
        distance += ~reach
        reach |= reach @ near
    for i, cell in enumerate(maze.cells):
        assert maze.cell(maze.center(cell)) == cell and not maze.in_wall(maze.center(cell))
        for j, goal in enumerate(maze.cells):
            steps, here = 0, cell
            while here != goal:
                here, steps = maze.routes[goal][here], steps + 1
            assert steps == distance[i, j]


def test_positions_in_walls_and_outside_are_told(umaze):
    inside = np.array([umaze.center((1, 1)), umaze.center((1, 1)) + [0.49, -0.49]])
    outside = np.array([umaze.center((2, 1)), umaze.center((1, 1)) - [0.51, 0], [99, 0], [0, -99]])
    assert not umaze.in_wall(inside).any() and umaze.in_wall(outside).all()
    assert umaze.in_wall(np.stack([inside, outside[:2]])).shape == (2, 2)


def test_scores_have_d4rls_reference_points(umaze):
    assert umaze.score([23.85, 161.86]) == pytest.approx([0, 100])


@pytest.mark.parametrize("random_goals", [False, True])
def test_the_task_pays_one_within_half_a_cell_of_the_goal_until_its_time_is_up(umaze, random_goals):
    task, goals = pointmaze.MazeTask(umaze, random_goals), set()
    for seed in range(5):
        observation, _ = task.reset(seed=seed)
        assert np.linalg.norm(observation[:2] - observation[4:]) > 0.45
        assert np.array_equal(observation[2:4], [0, 0])
        goals.add(tuple(observation[4:]))
    assert (goals == {tuple(umaze.fixed_goal)}) != random_goals
    control, truncated, steps = pointmaze.Controller(umaze, observation[:2], observation[4:]), 0, 0
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
        goals, positions = (one.observations[key] for key in ("desired_goal", "achieved_goal"))
        distances = np.linalg.norm(goals - positions, axis=1)
        assert distances[-1] < 0.1 and (distances[1:-1] >= 0.1).all()
        assert len(np.unique(goals, axis=0)) == 1
        states = one.observations["observation"]
        assert np.array_equal(states[-1], following.observations["observation"][0])
        assert np.array_equal(one.rewards, distances[1:] <= 0.5)
        # PointMaze integrates: the position moves by 10 ms of the new velocity
        assert np.diff(states[:, :2], axis=0) == pytest.approx(0.01 * states[1:, 2:], abs=1e-3)
        assert one.truncations.tolist() == [False] * (len(one) - 1) + [True]
        assert not one.terminations.any() and np.abs(one.actions).max() <= 1
    quiet = pointmaze.record(umaze, 300, noise=0.0, seed=3)
    control = pointmaze.Controller(
        umaze,
        quiet[0].observations["achieved_goal"][0],
        quiet[0].observations["desired_goal"][0],
    )
    states = quiet[0].observations["observation"]
    assert quiet[0].actions == pytest.approx(np.array([control(x) for x in states[:-1]]), abs=1e-6)


def make_set(name, drives, observations=None):
    """A Minari set of random actions whose episodes have these states."""
    buffers = []
    for states in drives:
        n = len(states) - 1
        goal_dict = {"observation": states, "achieved_goal": states[:, :2]}
        goal_dict["desired_goal"] = np.zeros((n + 1, 2))
        columns = {"observations": goal_dict if observations is None else observations[: n + 1]}
        columns |= {"actions": np.zeros((n, 2), np.float32), "rewards": [0.0] * n}
        columns |= {"terminations": [False] * n, "truncations": [False] * (n - 1) + [True]}
        buffers.append(EpisodeBuffer(**columns))
    env = pointmaze.make_simulator("umaze").spec if observations is None else "Hopper-v4"
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(name, buffers, env=env)


def test_episodes_that_continue_each_other_are_joined_and_no_others():
    walk = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    make_set("maze/joined-v0", [walk[:11], walk[10:16], walk[17:], walk[:5]])
    first, second, third = pointmaze.read_trajectories("maze/joined-v0")
    assert np.array_equal(first, walk[:16])
    assert np.array_equal(second, walk[17:]) and np.array_equal(third, walk[:5])


def test_batches_equal_brute_force_and_stay_in_one_drive():
    torch.manual_seed(0)
    rng, gamma, horizon = np.random.default_rng(0), 0.9, 8
    drives = [0.1 * rng.normal(size=(n, 4)).cumsum(0).astype(np.float32) for n in (40, 5, 90, 8)]
    batches = maze2d.StateBatches(drives, horizon, gamma, torch.device("cpu"))
    windows = {x[i : i + horizon].tobytes() for x in drives for i in range(len(x) - horizon + 1)}
    state, x0 = batches.windows(3000)
    raw = ractd.decode(x0, batches.normalizer["obs"]).numpy()
    assert torch.equal(state, torch.cat([x0[:, 0], x0[:, -1, :2]], dim=1))
    everything = np.concatenate(drives)
    index = np.abs(everything[None] - raw[:, :1]).max(2).argmin(1)  # row of a window's first state
    found = {everything[i : i + horizon].tobytes() for i in index}
    assert found == windows
    assert raw == pytest.approx(everything[index[:, None] + np.arange(horizon)], abs=1e-4)
    inputs, target = batches.returns(500)
    moved = 50  # to anywhere, where nothing is earned
    assert not target[:moved].any() and inputs[:moved, :2].abs().max() <= 1
    assert inputs[:moved, :2].std(0) == pytest.approx([3**-0.5] * 2, rel=0.1)
    inputs, target = inputs[moved:], target[moved:]
    last = np.repeat(np.cumsum([len(x) for x in drives]) - 1, [len(x) for x in drives])
    steps, hits = len(batches.discounts), 0
    for x, y in zip(inputs.numpy(), target.numpy(), strict=True):
        row = np.abs(batches.obs.numpy() - x[:4]).max(1).argmin()
        goal = np.abs(batches.obs.numpy()[:, :2] - x[4:]).max(1).argmin()
        assert 0 <= goal - row < horizon
        later = np.minimum(row + np.arange(steps), last[row])  # a drive's end is held
        near = np.linalg.norm(everything[later, :2] - everything[goal, :2], axis=1) <= 0.5
        expected = (gamma ** np.arange(steps) * near).sum() / (gamma ** np.arange(steps)).sum()
        assert y == pytest.approx(expected, abs=1e-5)
        hits += 0 < y < 1
    assert hits > 50 and gamma**steps < 0.01


def test_r_learns_that_there_is_nothing_where_no_one_goes():
    """A drive to and fro along a line: R rises along it to the goal, and is 0 beside it."""
    torch.manual_seed(0)
    x = np.abs(np.arange(4000) % 200 - 100) / 50 - 1  # -1 to 1 and back
    drive = np.stack([x, 0 * x, 0 * x, 0 * x], axis=1).astype(np.float32)
    drive = np.concatenate([drive, [[0, -1, 0, 0], [0, 1, 0, 0]]]).astype(np.float32)
    batches = maze2d.StateBatches([drive], 64, 0.97, torch.device("cpu"))
    config = ractd.Config(horizon=64, reward_batch=256)
    R, loss_fn = maze2d.maze_loss("reward", config, batches, [6, 4], {}, 0)
    optimizer = torch.optim.AdamW(R.parameters(), 2e-3)
    for _ in range(400):
        ractd.train_step(R, R, optimizer, loss_fn, 0.0)
    state = torch.tensor([0, 0, 0, 0, 1.0, 0]).expand(3, 6)  # the goal is (1, 0)
    along = torch.tensor([[-0.6, 0, 0, 0], [0.2, 0, 0, 0], [0.9, 0, 0, 0]])
    beside = along + torch.tensor([0, 0.6, 0, 0])
    with torch.no_grad():
        on, off = (R(state, places[:, None]) for places in (along, beside))
    assert on[0] < on[1] < on[2] and on[2] > 0.3
    assert off.abs().max() < 0.1


def test_the_return_of_a_plan_is_the_mean_over_its_states_and_sees_only_the_goal_beside():
    torch.manual_seed(0)
    R, plan, state = maze2d.GoalReward(), torch.randn(3, 5, 4), torch.randn(3, 6)
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


def test_paths_of_the_teacher_go_from_cool_noise_to_where_heuns_method_ends():
    torch.manual_seed(0)
    walk = 0.1 * np.random.default_rng(0).normal(size=(60, 4)).cumsum(0).astype(np.float32)
    batches = maze2d.StateBatches([walk], 16, 0.9, torch.device("cpu"))
    config = ractd.Config(horizon=16, channels=(8,))
    teacher = pinned_net(config).requires_grad_(False)
    state, x_T, end = maze2d.teacher_paths(teacher, batches, 0.5, 256, batch=64)
    assert len(state) == len(x_T) == len(end) == 256
    assert x_T[:, 1:-1].std().item() == pytest.approx(40, rel=0.05)
    denoiser = lambda x, t: ractd.denoise(teacher, x, t, state)
    expected = ractd.heun_sample(denoiser, x_T, ractd.karras_sigmas(7))
    assert torch.allclose(end, expected, atol=1e-4)
    assert torch.allclose(end[:, 0], state[:, :4]) and torch.allclose(end[:, -1, :2], state[:, 4:])


class Straight:
    """A planner of straight plans (n steps) at constant velocity from the state it sees."""

    def __init__(self, n):
        self.n, self.seen = n, []

    def __call__(self, observations, generators):
        self.seen.append(observations.copy())
        time = 0.01 * np.arange(self.n)[:, None]
        velocity = np.broadcast_to([1.0, 0.5], (len(observations), 1, 2))
        positions = observations[:, None, :2] + time * velocity
        return np.concatenate([positions, np.broadcast_to(velocity, positions.shape)], axis=2)


@pytest.mark.parametrize("replan", [0, 4])
def test_a_plan_is_driven_by_the_pd_rule_from_the_true_state_and_its_end_is_held(replan):
    planner, observations = Straight(6), np.zeros((2, 6))
    act = pointmaze.OpenLoop(planner, replan)
    for step in range(10):
        observations = observations + 0.01 * (step + 1)
        action = act(observations, None)
        assert action.shape == (2, 1, 2)
        begun = step // replan * replan if replan else 0
        start, i = planner.seen[-1][0, :2], step + 1 - begun
        position = start + 0.01 * min(i, 5) * np.array([1.0, 0.5])
        velocity = np.array([1.0, 0.5]) if i <= 5 else np.zeros(2)
        expected = position - observations[0, :2] + velocity - observations[0, 2:4]
        assert action[0, 0] == pytest.approx(np.clip(expected, -1, 1))
    assert len(planner.seen) == (3 if replan else 1)


@pytest.mark.parametrize("levels, mean, std", [((), -1.2, 1.2), ((0.0, 1.5), 0.0, 1.5)])
def test_the_teacher_learns_windows_with_pinned_ends_at_the_levels(levels, mean, std, monkeypatch):
    torch.manual_seed(0)
    config = ractd.Config(horizon=16, channels=(8,), teacher_batch=4000)
    drives = [np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)]
    batches = maze2d.StateBatches(drives, 16, 0.9, torch.device("cpu"))
    teacher, loss_fn = maze2d.maze_loss("teacher", config, batches, [6, 4], {}, 0, levels)
    edm_loss, seen = ractd.edm_loss, []

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


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_students_loss_adds_weighted_whole_paths_and_hears_r(sigma, monkeypatch):
    torch.manual_seed(0)
    config = ractd.Config(horizon=16, channels=(8,), path_batch=6, ctm_weight=2.0)
    config = dataclasses.replace(config, reward_weight=sigma, student_batch=4)
    drives = [np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)]
    batches = maze2d.StateBatches(drives, 16, 0.9, torch.device("cpu"))
    teacher, R, seen = pinned_net(config), maze2d.GoalReward(), []
    built_on = {"teacher": {"ema": teacher.state_dict()}, "reward": {"ema": R.state_dict()}}

    def others(net, average, teacher, reward, state, x0, config, distance):
        assert distance is maze2d.plan_distance and config.path_batch == 0
        seen.append((reward, state, x0))
        return torch.tensor(0.25), {}

    monkeypatch.setattr(ractd, "distillation_loss", others)
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.arange(*shape) % high)
    net, loss_fn = maze2d.maze_loss("student", config, batches, [6, 4], built_on, 256)
    paths = maze2d.teacher_paths(teacher.eval(), batches, config.temperature, 256)
    with torch.no_grad():
        loss, info = loss_fn(net, net)
    first = [column[:6] for column in paths]
    assert (first[1].std() / 80).item() == pytest.approx(config.temperature, rel=0.2)
    assert loss.item() == pytest.approx(0.25 + 2 * info["path"].item())
    ((reward, state, x0),) = seen
    assert torch.equal(state[:, :4], x0[:, 0]) and len(x0) == 4
    if sigma:
        assert torch.allclose(reward(state, x0), R.eval()(state, x0))
    else:
        assert reward is None


def test_half_of_the_paths_lead_to_goals_of_other_windows():
    torch.manual_seed(0)
    config = ractd.Config(horizon=16, channels=(8,))
    drives = [np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)]
    batches = maze2d.StateBatches(drives, 16, 0.9, torch.device("cpu"))
    teacher = pinned_net(config).eval().requires_grad_(False)
    state = maze2d.teacher_paths(teacher, batches, 0.5, 256)[0]
    rows = (batches.obs[:, None] == state[:, :4]).all(2).float().argmax(0)
    own = (state[:, 4:] == batches.obs[rows + 15, :2]).all(1)  # the goal of the same window
    assert own[128:].all() and own[:128].float().mean() < 0.2  # of 45 windows


def test_r_sees_the_students_clamped_plan_with_pinned_ends():
    """Eq. 8 on the student's own one-call plan, whose ends are the condition's."""
    torch.manual_seed(0)
    config = ractd.Config(horizon=16, channels=(8,), path_batch=0, grid_points=5, tilted_steps=0)
    net = pinned_net(config, student=True)
    teacher = pinned_net(config).requires_grad_(False)
    state, x0, seen = torch.rand(8, 6) - 0.5, torch.rand(8, 16, 4) - 0.5, []

    def reward(state, plan):
        seen.append(plan)
        return plan.sum((1, 2))

    net.out.weight.data *= 20  # a plan that leaves the range
    ractd.distillation_loss(net, net, teacher, reward, state, x0, config)
    (plan,) = seen
    assert plan.abs().max() == 1
    assert torch.allclose(plan[:, 0], state[:, :4]) and torch.allclose(
        plan[:, -1, :2], state[:, 4:]
    )


def test_end_to_end_trains_once_and_leaves_every_number_and_picture(capsys):
    assert collect.main(["--env=maze2d-umaze", "--steps=3000", "--out=maze2d/tiny-v0"]) == 0
    command = ["--maze=umaze", "--data=minari:maze2d/tiny-v0", "--out=run", "--video", *TINY]
    assert maze2d.main(command) == 0
    text = capsys.readouterr().out
    with open("run/maze2d.json") as f:
        result = json.load(f)
    labels = [row["label"] for row in result["rows"]]
    assert labels == ["controller of the data", *(label for label, *_ in maze2d.ROWS)]
    for row in result["rows"]:
        assert row["label"] in text
        for task in ("single", "multi"):
            assert len(row[task]["returns"]) == 3 and 0 <= row[task]["reached"] <= 1
    assert result["rows"][0]["single"]["reached"] == 1
    assert [row["calls"] for row in result["rows"]] == [0, 37, 157, 1, 1]
    for row in result["rows"][1:]:
        plans, driven = np.array(row["plans"]), np.array(row["driven"])
        assert plans.shape == (3, 32, 2) and driven.shape == (3, 300, 2) and row["ms"] > 0
        assert plans[:, 0] == pytest.approx(driven[:, 0], abs=1e-5)  # the ends are pinned
        goal = pointmaze.Maze("umaze").fixed_goal
        assert np.abs(plans[:, -1] - goal).max() < 1e-5
    for name, head in (("maze2d.png", b"\x89PNG"), ("maze2d.gif", b"GIF8")):
        with open(f"run/{name}", "rb") as f:
            assert f.read(4) == head
    assert maze2d.main(command) == 0
    text = capsys.readouterr().out
    assert "steps/s" not in text and text.count("numbers from") == 5
    with open("run/maze2d.json") as f:
        assert [row["single"] for row in json.load(f)["rows"]] == [
            row["single"] for row in result["rows"]
        ]
    assert maze2d.main([*command, "--replan=8"]) == 0  # the controller knows no plan
    assert capsys.readouterr().out.count("numbers from") == 1
    (kept,) = glob.glob("run/maze2d_RACTD_*_replan-8_*.json")
    with open(kept, "r+") as f:
        f.truncate(100)
    refused(capsys, maze2d.main([*command, "--replan=8"]), kept, "is damaged")
    data, flags = "--data=minari:maze2d/tiny-v0", ["--env=maze2d-umaze", "--out=run"]
    refused(capsys, ractd.main(["evaluate", *flags]), "plan: states in the file, actions asked")
    refused(capsys, ractd.main(["distill", *flags, data, *TINY]), "made otherwise", "data")


def test_a_plan_through_a_wall_and_one_with_a_leap_are_told(umaze):
    def line(*corners, n=60):
        pairs = itertools.pairwise(np.array([umaze.center(cell) for cell in corners]))
        return np.concatenate([np.linspace(*pair, n, endpoint=False) for pair in pairs])

    around = ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3))
    good, leap = line(*around), line(*around)
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


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_plan_depends_on_its_own_generator_alone_and_on_the_temperature(stage):
    torch.manual_seed(0)
    config = ractd.Config(horizon=16, channels=(8,), nfe=3, grid_points=5, teacher_points=4)
    net = pinned_net(config, stage == "student")
    table = {"obs": torch.tensor([[0.0] * 4, [2.0] * 4])}
    saved = {"stage": stage, "dims": [6, 4], "ema": net.state_dict(), "normalizer": table}
    saved["config"] = dataclasses.asdict(config)
    observations = np.random.default_rng(0).uniform(-1, 1, (3, 6))

    def plans(rows, temperature=1.0):
        torch.manual_seed(len(rows))
        how = dataclasses.replace(config, temperature=temperature)
        generators = [np.random.default_rng(row) for row in rows]
        return maze2d.Planner(saved, how, torch.device("cpu")).act(observations[rows], generators)

    assert plans([1]) == pytest.approx(plans([0, 1, 2])[1:2], abs=1e-5)
    assert np.abs(plans([1]) - plans([1], 0.5)).max() > 1e-3
    assert plans([0, 1, 2])[:, 0] == pytest.approx(observations[:, :4], abs=1e-6)
    assert plans([0, 1, 2])[:, -1, :2] == pytest.approx(observations[:, 4:], abs=1e-6)


def test_the_gain_is_of_the_same_episodes(umaze):
    before = {"single": {"returns": [10.0, 100.0, 200.0]}, "multi": {"returns": [1.0, 2.0, 3.0]}}
    after = {"single": {"returns": [12.0, 104.0, 206.0]}, "multi": {"returns": [1.0, 2.0, 3.0]}}
    gain = maze2d.paired_gain(umaze, before, after)
    points = 100 / (161.86 - 23.85)  # of a step at the goal
    assert gain["single"] == pytest.approx((4 * points, 2 * points / 3**0.5))
    assert gain["multi"] == (0, 0)


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


def test_without_data_they_are_made_by_the_recipe(monkeypatch):
    made = []
    monkeypatch.setattr(pointmaze, "collect", lambda maze: made.append(maze.name))
    monkeypatch.setattr(maze2d, "maze2d", lambda run: made.append((run.data, run.config.horizon)))
    assert maze2d.main(["--maze=large"]) == 0
    assert made == ["large", ("minari:maze2d/large-v0", 384)]


def test_bad_input_gets_a_sentence(capsys, monkeypatch):
    walk = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32) / 9
    make_set("maze/short-v0", [walk[:20], walk[21:]])
    make_set("maze/box-v0", [walk[:20]], np.random.default_rng(0).normal(size=(40, 11)))
    drive = ["--maze=umaze", "--out=run", *TINY]
    refused(capsys, maze2d.main(["--maze=tiny"]), "tiny", "umaze, medium, large")
    refused(capsys, maze2d.main([*drive, "--data=minari:maze/box-v0"]), "no goals in a plane")
    for name in ("maze/none-v0", "maze/none", "none"):
        refused(capsys, maze2d.main([*drive, f"--data=minari:{name}"]), "cannot be read")
    with monkeypatch.context() as patch:  # as a network library may fail
        patch.setattr(minari, "load_dataset", lambda *_, **__: 1 / 0)
        refused(capsys, maze2d.main([*drive, "--data=minari:a/b-v0"]), "cannot be read", "ZeroDiv")
    refused(capsys, maze2d.main([*drive, "--data=a.hdf5"]), "minari:ID")
    outside = walk + [9, 0, 0, 0]
    make_set("maze/outside-v0", [np.float32(outside)])
    refused(capsys, maze2d.main([*drive, "--data=minari:maze/outside-v0"]), "another maze")
    make_set("maze/nan-v0", [np.float32(np.r_[walk, np.full((1, 4), np.nan)])])
    refused(capsys, maze2d.main([*drive, "--data=minari:maze/nan-v0"]), "damaged", "NaN")
    pointmaze.collect(pointmaze.Maze("umaze"), 20, dataset_id="maze/twenty-v0")
    refused(capsys, maze2d.main([*drive, "--data=minari:maze/twenty-v0"]), "horizon", "21 states")
    code = collect.main(["--env=maze2d-umaze", "--out=maze/twenty-v0", "--steps=9"])
    refused(capsys, code, "exists", "delete")
    refused(capsys, collect.main(["--env=maze2d-umaze", "--steps=0"]), "--steps")
    refused(capsys, collect.main(["--env=maze2d-umaze", "--kind=medium"]), "--kind")
    refused(capsys, collect.main(["--env=Hopper-v4", "--noise=0.5"]), "--noise")
    refused(capsys, maze2d.main([*drive, "--replan=-1"]), "--replan")
    for flag in ["--tilted-steps=5", "--preset=paper", "--candidates=2", "--reward-weight=0"]:
        refused(capsys, maze2d.main([*drive, flag]), flag.split("=")[0])
    refused(capsys, maze2d.main([*drive, "--horizon=33"]), "--horizon")
    for name in ("umaze.hdf5", "umaze"):
        code = collect.main(["--env=maze2d-umaze", "--steps=9", f"--out={name}"])
        refused(capsys, code, name, "Minari id")
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    refused(capsys, maze2d.main(["--maze=umaze"]), "pip install gymnasium-robotics")
