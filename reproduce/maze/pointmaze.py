"""D4RL's Maze2d in gymnasium-robotics' PointMaze: mazes, task, data, who drives, faults of plans.

Physics, maps and time limits are D4RL's. What differs: the frame (x to the right, y up, the maze's
middle is 0); starts lie within 0.25 of a cell's centre, at rest and not at the goal; random goals
within 0.25 of a cell's centre. A goal counts within D4RL's radius of 0.5, PointMaze's own is 0.45.
"""

import shutil
import warnings
from collections import deque
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Dict

from ractd import UserError
from reproduce.common import progress

# name -> gymnasium id, fixed goal's cell (row, column), returns that are D4RL's scores 0 and 100
MAZES = {
    "umaze": ("PointMaze_UMaze-v3", (1, 1), 23.85, 161.86),
    "medium": ("PointMaze_Medium-v3", (6, 6), 13.13, 277.39),
    "large": ("PointMaze_Large-v3", (7, 9), 6.7, 273.99),
}
GOAL_RADIUS = 0.5  # D4RL's
WAYPOINT_RADIUS = 0.1  # D4RL's


def make_simulator(name):
    """PointMaze with a goal that stays, its episodes ended by their time limit, or UserError."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no advice on other environments
    try:
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
        env = gymnasium.make(MAZES[name][0], continuing_task=True, reset_target=False)
    except (ImportError, gymnasium.error.Error) as error:
        command = "pip install -r reproduce/requirements.txt"
        raise UserError(f"the mazes cannot be simulated ({error}): {command}") from None
    Path(env.unwrapped.tmp_xml_file_path).unlink(missing_ok=True)  # the library leaves it for ever
    return env


class Maze:
    """The map of a maze: cells (row, column), and positions x, y, a cell being 1 wide."""

    def __init__(self, name):
        if name not in MAZES:
            raise UserError(f"maze {name} is unknown; there are {', '.join(MAZES)}")
        self.name = name
        self.goal_cell = MAZES[name][1]
        simulator = make_simulator(name)
        self.steps = simulator.spec.max_episode_steps
        self.walls = np.array(simulator.unwrapped.maze.maze_map) == 1  # (rows, columns)
        self.cells = [tuple(cell) for cell in np.argwhere(~self.walls).tolist()]
        self.fixed_goal = self.center(self.goal_cell)
        self.routes = {goal: self.routes_to(goal) for goal in self.cells}

    def center(self, cell):
        """The middle of a cell: (2,)."""
        rows, columns = self.walls.shape
        return np.array([cell[1] + 0.5 - columns / 2, rows / 2 - cell[0] - 0.5])

    def cell(self, position):
        """The cell of a position (2,)."""
        rows, columns = self.walls.shape
        return int(rows / 2 - position[1]), int(position[0] + columns / 2)

    def in_wall(self, positions):
        """Whether positions (..., 2) lie in a wall, or beyond the outer ones: (...,)."""
        rows, columns = self.walls.shape
        row = np.clip(rows / 2 - positions[..., 1], 0, rows - 1).astype(int)
        column = np.clip(positions[..., 0] + columns / 2, 0, columns - 1).astype(int)
        return self.walls[row, column]

    def routes_to(self, goal):
        """{cell: the next one on a shortest path to the cell `goal`}, by breadth-first search."""
        following = {goal: goal}
        queue = deque([goal])
        while queue:
            here = queue.popleft()
            row, column = here
            for down, right in ((1, 0), (0, 1), (-1, 0), (0, -1)):
                cell = (row + down, column + right)
                if not self.walls[cell] and cell not in following:
                    following[cell] = here
                    queue.append(cell)
        return following

    def score(self, returns):
        """D4RL's normalised scores of returns."""
        _, _, random, expert = MAZES[self.name]
        return 100 * (np.asarray(returns) - random) / (expert - random)


class MazeTask(gymnasium.Wrapper):
    """D4RL's task: a reward of 1 for each step that ends within 0.5 of the goal, to the time limit.

    Observation (6,): x, y, their velocities, and the goal's x, y. The goal is D4RL's fixed one
    (single-task), or with random_goals one of the simulator's for each episode (multi-task).
    """

    def __init__(self, maze, random_goals=False):
        super().__init__(make_simulator(maze.name))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,))
        self.fixed = None if random_goals else maze.fixed_goal
        self.reset_options = {} if random_goals else {"goal_cell": np.array(maze.goal_cell)}

    def reset(self, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=self.reset_options)
        if self.fixed is not None:  # without the simulator's noise
            set_goal(self.unwrapped, self.fixed)
        return self.with_goal(observation), info

    def step(self, action):
        observation, _, _, truncated, info = self.env.step(action)
        distance = np.linalg.norm(observation["achieved_goal"] - self.unwrapped.goal)
        return self.with_goal(observation), float(distance <= GOAL_RADIUS), False, truncated, info

    def with_goal(self, observation):
        return np.concatenate([observation["observation"], self.unwrapped.goal])


def set_goal(simulator, goal):
    """Move the goal, and its mark in pictures."""
    simulator.goal = goal
    simulator.update_target_site_pos()


class Controller:
    """D4RL's: from cell to cell along a shortest path, by a PD rule towards the next centre."""

    def __init__(self, maze, position, goal):
        self.maze = maze
        self.goal = goal
        self.last = maze.cell(goal)
        self.next = maze.routes[self.last][maze.cell(position)]

    def __call__(self, observation):
        """Observation, x, y and velocities first -> action (2,)."""
        position = observation[:2]
        velocity = observation[2:4]
        waypoint = self.goal if self.next == self.last else self.maze.center(self.next)
        if self.next != self.last and np.linalg.norm(waypoint - position) < WAYPOINT_RADIUS:
            self.next = self.maze.routes[self.last][self.next]
        return np.clip(10 * (waypoint - position) - velocity, -1, 1)


class DataController:
    """The controller that made the data, in `ractd.evaluate`, as `OpenLoop`; it knows the map."""

    def __init__(self, maze):
        self.maze = maze
        self.controllers = None

    def __call__(self, observations, generators):
        if self.controllers is None:
            self.controllers = [Controller(self.maze, x[:2], x[4:]) for x in observations]
        pairs = zip(self.controllers, observations, strict=True)
        return np.stack([control(x) for control, x in pairs])[:, None]


class OpenLoop:
    """Carries out plans in `ractd.evaluate`: planned once, or again after every `replan` steps.

    For episodes that all end together, as a `MazeTask`'s do: row i is always the same episode.
    """

    def __init__(self, planner, replan=0):
        self.planner = planner
        self.replan = replan
        self.step = 0
        self.first = None  # plans, for the picture
        self.driven = []  # positions, for the picture

    def __call__(self, observations, generators):
        if self.step == 0 or self.replan and self.step % self.replan == 0:
            self.plans = self.planner(observations, generators)
            self.planned = self.step
            if self.first is None:
                self.first = self.plans
        self.driven.append(observations[:, :2])
        i = self.step + 1 - self.planned
        self.step += 1
        target = self.plans[:, min(i, self.plans.shape[1] - 1)]
        if i >= self.plans.shape[1]:  # hold the end
            target = np.concatenate([target[:, :2], np.zeros_like(target[:, 2:])], axis=1)
        error = target - observations[:, :4]
        action = error[:, :2] + error[:, 2:]  # the released rule: gains of 1
        return action.clip(-1, 1)[:, None]  # a plan of one action


def plan_faults(maze, plans):
    """Of plans (n, H, 4): the share that crosses a wall, and the longest step of each plan."""
    here = plans[:, :-1, None, :2]
    there = plans[:, 1:, None, :2]
    # also between the states, where a step may cut a corner
    between = here + (there - here) * np.linspace(0, 1, 6)[:, None]
    steps = np.linalg.norm(there - here, axis=3).max((1, 2))
    return {"wall": float(maze.in_wall(between).any((1, 2)).mean()), "longest_step": steps.tolist()}


def record(maze, steps, noise=0.0, seed=0):
    """D4RL's recipe: `steps` rows of one continuous drive from random goal to random goal.

    A new goal (a uniform cell, +- 0.1) is set within 0.1 of the old one, or after the time limit;
    nothing is reset. noise: standard deviation of what is added to an action (N, before it is
    clipped). -> the list of minari.EpisodeBuffer, cut at the goals. Says every 10 s how far it is.
    """
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(seed)
    simulator = make_simulator(maze.name).unwrapped
    observation, _ = simulator.reset(seed=seed)
    episodes = []
    done = 0
    tell = progress(maze.name, steps, "rows")
    while done < steps:
        goal = maze.center(maze.cells[rng.integers(len(maze.cells))]) + rng.uniform(-0.1, 0.1, 2)
        set_goal(simulator, goal)
        controller = Controller(maze, observation["achieved_goal"], goal)
        observation = observation | {"desired_goal": goal}
        observations = [observation]
        actions = []
        rewards = []
        while len(actions) < min(maze.steps, steps - done):
            action = controller(observation["observation"]) + noise * rng.normal(size=2)
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            observation, *_ = simulator.step(actions[-1])
            observations.append(observation)
            distance = np.linalg.norm(observation["achieved_goal"] - goal)
            rewards.append(float(distance <= GOAL_RADIUS))
            if distance < WAYPOINT_RADIUS:
                break
        done += len(actions)
        ends = np.arange(1, len(actions) + 1) == len(actions)
        episode = EpisodeBuffer(
            id=len(episodes),
            observations={key: np.stack([x[key] for x in observations]) for key in observation},
            actions=np.stack(actions),
            rewards=rewards,
            terminations=np.zeros_like(ends),
            truncations=ends,
        )
        episodes.append(episode)
        tell(done)
    return episodes


def local_id(name, noise=0.0):
    """The Minari id under which `collect` keeps a maze's data on this machine."""
    return f"maze2d/{name}{'-noisy' if noise else ''}-v0"


def exists(dataset_id):
    """Whether Minari has that set on this machine, and whole: its count of rows is written last."""
    import minari

    return minari.list_local_datasets().get(dataset_id, {}).get("total_steps", 0) > 0


def collect(maze, steps=1_000_000, noise=0.0, seed=0, dataset_id=None):
    """Record a maze's data as a local Minari set -> its id. UserError if the id is no good."""
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    dataset_id = dataset_id or local_id(maze.name, noise)
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise UserError(f"--out {dataset_id}: must be a Minari id like maze2d/mine-v0") from None
    if exists(dataset_id):
        raise UserError(f"{dataset_id} exists: `minari delete {dataset_id}`, or give another --out")
    episodes = record(maze, steps, noise, seed)
    folder = get_dataset_path(dataset_id)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    print(f"{maze.name}: writing {len(episodes):,} episodes to {folder}", flush=True)
    spec = make_simulator(maze.name).spec
    about = {
        "env": spec,
        "eval_env": spec,
        "algorithm_name": "shortest path and PD controller, after D4RL's Maze2d",
        "description": f"{steps:,} rows, action noise {noise}, seed {seed}",
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no author is needed: the set stays here
            minari.create_dataset_from_buffers(dataset_id, episodes, **about)
    except BaseException:  # half a set is no set
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return dataset_id


def read_trajectories(dataset_id):
    """The drives of a local or published Minari set: a list of states (T, 4), or UserError.

    An episode whose first observation is the last one of the episode before continues it.
    """
    import minari

    try:
        missing = dataset_id not in minari.list_local_datasets()
        dataset = minari.load_dataset(dataset_id, download=missing)
        observations = [episode.observations for episode in dataset.iterate_episodes()]
    except Exception as error:  # whatever a network library raises, too
        hint = "network? pip install 'minari[hf,gcs]'?"
        raise UserError(f"minari:{dataset_id} cannot be read ({error!r}); {hint}") from error
    space = dataset.observation_space
    shapes = {key: box.shape for key, box in space.items()} if isinstance(space, Dict) else {}
    if shapes.get("observation") != (4,) or shapes.get("desired_goal") != (2,):
        what = "has no goals in a plane: a PointMaze set is wanted"
        raise UserError(f"minari:{dataset_id} {what}; its observations are {space}")
    states = [np.float32(x["observation"]) for x in observations]
    if not states or not all(np.isfinite(x).all() for x in states):
        raise UserError(f"minari:{dataset_id} is damaged: no episodes, or NaN in them")
    drives = [[states[0]]]
    for state in states[1:]:
        if np.array_equal(drives[-1][-1][-1], state[0]):
            drives[-1].append(state[1:])
        else:
            drives.append([state])
    return [np.concatenate(drive) for drive in drives]
