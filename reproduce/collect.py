"""A data set by D4RL's recipe: SAC is trained in the simulator, and what it did is kept.

    python -m reproduce.collect --env walker2d-medium-replay [--steps N] [--seed S] [--out FILE]
    python -m reproduce.collect --env Hopper-v5 --kind medium      any gymnasium id, Box spaces
    python -m reproduce.collect --env maze2d-umaze [--noise 0.5]   a drive through a maze, no SAC

After Fu et al. 2020 (D4RL, arXiv 2004.07219), with stable-baselines3's SAC and its own defaults:
    medium-replay   every transition of one training run of --steps steps, from the first one on
    medium          rollouts of the first snapshot with a score of 33 or more, else of the best;
                    the score is D4RL's (0: random policy, 100: expert), or where D4RL has none
                    0 for the untrained policy and 100 for the last one
    medium-expert   half rollouts of that snapshot, half of the last policy, in this order
Policies act stochastically. Scores on such data cannot be compared with those on D4RL's files.
100,000 training steps take from twenty minutes to an hour on one core; nothing is resumed. The
default of --steps is about what one run took to become medium, for medium-expert 1,000,000.

maze2d-umaze, -medium, -large: a controller that knows the map drives from random goal to random
goal in gymnasium-robotics' PointMaze, 1,000,000 steps without a reset in two minutes, and the
drive becomes a Minari set of this machine. D4RL's maze2d files and Minari's D4RL/pointmaze sets
are made in this way, too. D4RL's have another frame and 1, 2 and 4 million rows; Minari's have an
action noise of 0.5 (--noise 0.5) and rewards within 0.45 of the goal, in place of D4RL's 0.5.
"""

import io
import math
import os
import shlex
import sys
from pathlib import Path

import gymnasium
import numpy as np

from ractd import KINDS, TASKS, UserError, read_hdf5, write_file
from reproduce.common import make_parser, progress, run_command
from reproduce.maze import pointmaze

SAC_TASKS = [f"{task}-{kind}" for task in TASKS for kind in KINDS]
# training steps after which the mean return of one run passed MEDIUM_SCORE
MEDIUM_STEPS = {"hopper": 170_000, "halfcheetah": 100_000, "walker2d": 250_000}
SNAPSHOT_EVERY = 10_000  # training steps
MEDIUM_SCORE = 33


class Recorder(gymnasium.Wrapper):
    """Keeps every transition of an environment, in its own units; total: steps that are planned."""

    def __init__(self, env, label, total):
        super().__init__(env)
        self.rows = []
        self.tell = progress(label, total)

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        self.observation = np.array(observation)  # a copy: some environments write into their own
        return observation, info

    def step(self, action):
        result = self.env.step(action)
        following, reward, terminated, truncated, _ = result
        row = [self.observation, action, [reward, terminated, truncated]]
        self.rows.append(np.concatenate(row, dtype=np.float32))
        self.observation = np.array(following)
        self.tell(len(self.rows))
        return result

    def arrays(self):
        """{D4RL's name: array of T rows}, the unfinished episode cut off; UserError if empty."""
        table = np.stack(self.rows)
        ends = np.flatnonzero(table[:, -2:].any(axis=1))
        if len(ends) == 0:
            raise UserError(f"no episode ended within {len(table):,} steps; give more --steps")
        table = table[: ends[-1] + 1]
        width = len(self.observation)
        return {
            "observations": table[:, :width],
            "actions": table[:, width:-3],
            "rewards": table[:, -3],
            "terminals": table[:, -2] != 0,
            "timeouts": table[:, -1] != 0,
        }


def make_env(name):
    """The environment of a gymnasium id; UserError if there is none or SAC cannot act in it."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no advice to leave the -v4 tasks
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        known = ", ".join(SAC_TASKS)
        raise UserError(f"--env {name} is no gymnasium id ({error}), nor of {known}") from None
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"{name}: {space} is not a Box with one axis")
    if not env.action_space.is_bounded():
        raise UserError(f"{name}: the actions have no bounds, which SAC needs")
    return env


def load_sac():
    """stable-baselines3's SAC; UserError that names the command where it is not installed."""
    try:
        from stable_baselines3 import SAC
    except ImportError as error:
        command = "pip install stable-baselines3==2.9.2"
        raise UserError(f"SAC comes from an optional package ({error}): {command}") from None
    return SAC


def play(actor, env, seed=None):
    """One episode of the stochastic policy -> its undiscounted return."""
    observation, _ = env.reset(seed=seed)
    total = 0.0
    ended = False
    while not ended:
        action, _ = actor.predict(observation, deterministic=False)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        ended = terminated or truncated
    return total


def pick_medium(task, returns):
    """Index of the first snapshot that is medium or better, or of the best one if none is.

    returns (n,): those of the snapshots, from the untrained policy to the last one.
    """
    random = returns[0]
    expert = max(returns[0], returns[-1])
    if task:
        _, random, expert, _ = TASKS[task]
    enough = random + MEDIUM_SCORE / 100 * (expert - random)
    reached = np.flatnonzero(np.asarray(returns) >= enough)
    return int(reached[0]) if len(reached) else int(np.argmax(returns))


def train_with_snapshots(agent, env, steps, seed):
    """Train -> (mean returns of five episodes, actor weights) of all snapshots, untrained first."""
    returns = []
    weights = []

    def snapshot():
        returns.append(float(np.mean([play(agent.actor, env, seed + i) for i in range(5)])))
        weights.append({key: value.clone() for key, value in agent.actor.state_dict().items()})
        print(f"step {agent.num_timesteps:,}: evaluated return {returns[-1]:.1f}", flush=True)

    def go_on(*_):  # called after each step in the environment, before the gradient step
        if agent.num_timesteps % SNAPSHOT_EVERY == 1:
            snapshot()
        return True

    agent.learn(steps, callback=go_on)
    snapshot()
    return returns, weights


def collect(env_id, task, kind, steps, transitions, seed):
    """The data set of that kind as {D4RL's name: array of T rows}; the same seed, the same data."""
    recorder = Recorder(make_env(env_id), "training", steps)
    buffer = min(steps, 1_000_000)
    agent = load_sac()("MlpPolicy", recorder, buffer_size=buffer, seed=seed, device="cpu")
    if kind == "medium-replay":
        agent.learn(steps)
        return recorder.arrays()
    returns, weights = train_with_snapshots(agent, make_env(env_id), steps, seed)
    chosen = [pick_medium(task, returns)]
    if kind == "medium-expert":
        chosen.append(len(returns) - 1)
    parts = []
    size = transitions // len(chosen)
    for number, index in enumerate(chosen, start=1):
        agent.actor.load_state_dict(weights[index])
        label = f"rollouts {number} of {len(chosen)}, policy of return {returns[index]:.1f}"
        recorder = Recorder(make_env(env_id), label, size)
        play(agent.actor, recorder, seed + 1000 * number)
        while len(recorder.rows) < size:
            play(agent.actor, recorder)
        parts.append(recorder.arrays())
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def write_hdf5(path, arrays):
    """A file in D4RL's layout, each array under its name; half a file never exists."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, array in arrays.items():
            f.create_dataset(key, data=array, compression="gzip")
    write_file(path, buffer.getbuffer())


def run_maze(args):
    """The same for a maze, whose data are a local Minari set."""
    maze = pointmaze.Maze(args.env.removeprefix("maze2d-"))
    steps = 1_000_000 if args.steps is None else args.steps
    if steps < 1 or not 0 <= args.noise < math.inf:
        raise UserError("--steps must be at least 1, --noise at least 0")
    if args.kind:
        raise UserError("--kind is for SAC's data: leave it out")
    if not args.out and (args.seed, steps) != (0, 1_000_000):
        raise UserError("--out ID is needed with another --steps or --seed than the recipe's")
    dataset_id = pointmaze.collect(maze, steps, args.noise, args.seed, args.out)
    print(f"minari:{dataset_id}: {steps:,} steps")
    print(f"next: python -m reproduce.maze.maze2d --maze {maze.name} --data minari:{dataset_id}")


def run(args):
    """What the command line asks for: check, collect, write, say what came out and what is next."""
    if not 0 <= args.seed < 2**31:
        raise UserError("--seed must be from 0 to 2^31 - 1")
    if args.env.startswith("maze2d-"):
        return run_maze(args)
    if args.noise:
        raise UserError("--noise is for the mazes' data: leave it out")
    if args.env in SAC_TASKS:
        task, kind = args.env.split("-", 1)
        env_id = TASKS[task][0]
        if args.kind not in (None, kind):
            raise UserError(f"--env {args.env} is {kind}, --kind says {args.kind}: leave one out")
    else:
        task = None
        kind = args.kind or "medium-replay"
        env_id = args.env
    path = Path(args.out or f"{args.env.replace('/', '-')}.hdf5")
    default = 1_000_000 if kind == "medium-expert" else MEDIUM_STEPS.get(task, 200_000)
    steps = default if args.steps is None else args.steps
    if path.exists():
        raise UserError(f"{path} exists: delete it or give another --out")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} is not a folder that can be written to")
    if min(steps, args.transitions) < 200:  # SAC acts at random for its first 100 steps
        raise UserError("--steps and --transitions must be at least 200")
    write_hdf5(path, collect(env_id, task, kind, steps, args.transitions, args.seed))
    text = "{transitions:,} transitions, {episodes:,} episodes, return: mean {return_mean:.5g}, "
    text += "best {return_best:.5g}"
    print(f"{path}: {text.format(**read_hdf5(path, 'file').summary())}")
    print(f"next: python ractd.py distill --env {args.env} --data {shlex.quote(str(path))}")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("collect", __doc__)
    add = parser.add_argument
    mazes = ", ".join(f"maze2d-{name}" for name in pointmaze.MAZES)
    add("--env", required=True, help=f"{', '.join(SAC_TASKS)}, {mazes} or any gymnasium id")
    add("--kind", choices=KINDS, help="with a gymnasium id (default: medium-replay)")
    each = ", ".join(f"{task} {steps:,}" for task, steps in MEDIUM_STEPS.items())
    text = f"of training (default: {each}, others 200,000; medium-expert, maze2d 1,000,000)"
    add("--steps", type=int, help=text)
    add("--noise", type=float, default=0.0, help="maze2d: std of action noise, N (default: 0)")
    add("--transitions", type=int, default=200_000, help="rows of rollouts (default: %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same file (default: %(default)s)")
    add("--out", help="file to write (default: ENV.hdf5); maze2d: Minari id (maze2d/<maze>-v0)")
    return run_command("collect.py", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
