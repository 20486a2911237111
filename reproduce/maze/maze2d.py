"""Maze2d: plans of states, a whole drive in one network call, carried out open loop.

    python -m reproduce.maze.maze2d --maze umaze                 data, training, scores, picture
    python -m reproduce.maze.maze2d --maze umaze --data minari:D4RL/pointmaze/umaze-v2
    python -m reproduce.maze.maze2d --maze umaze --video         the first episode as GIF

A plan is H states (x, y and their velocities); the first one and the last one's position, the goal,
are pinned: they hold clean values at every noise level, in the denoiser and in the jump. R is the
return-to-go of one state and a goal, low where no one goes, so that it knows the walls. Eq. 8 takes
its mean over the student's one-call plan, where the paper has the sum, H times that. A PD rule
drives from the true state to the next planned one; after the plan its end is held. Data that are
not there are made first by D4RL's recipe. Trained models and rows of numbers are kept in <out>, and
not made again.

The teacher is plain, as in the paper. Training differs from `python ractd.py distill` in three more
points: half of the teacher's trajectories lead to goals of other windows, and none starts where a
second call does; Eq. 5's distance is one that plans of many states need (`plan_distance`); and
large's teacher learns from more noise, at which the way of so long a plan is decided.
"""

import dataclasses
import functools
import hashlib
import math
import sys

import numpy as np
import torch
from torch import nn

import ractd
from ractd import option
from reproduce.common import (
    Experiment,
    acting_noise,
    file_label,
    in_turns,
    load_weights,
    make_parser,
    mean_and_error,
    parse_own,
    plus_minus,
    print_table,
    progress,
    read_json,
    run_command,
    window_starts,
    write_json,
)
from reproduce.maze import pictures, pointmaze
from reproduce.maze.pointmaze import DataController, OpenLoop
from reproduce.pinned import PinnedUNet, denoise, student_jump


@dataclasses.dataclass
class MazeConfig:
    """Hyperparameters of training and acting; umaze's defaults, `DEFAULTS` has the others'."""

    reward_teacher = False  # no setting: the teacher is plain

    seed: int = option(0, "seed of all training", 0, 2**63 - 1)
    horizon: int = option(128, "H: the number of states in a plan, as in the paper", 1, 4096)
    width: int = option(32, "channels of the U-Net's first of three levels, then doubled", 1, 4096)
    teacher_steps: int = option(6000, "gradient steps of the teacher", 1, 10**9)
    teacher_batch: int = option(128, "plans in one of its steps", 1, 100_000)
    teacher_lr: float = option(1e-3, "its peak learning rate", 1e-9, 1)
    level_mean: float = option(-1.2, "mean of ln t, its noise levels", -10, 10)
    level_std: float = option(1.2, "standard deviation of ln t", 1e-3, 10)
    reward_steps: int = option(10_000, "gradient steps of the reward model R", 1, 10**9)
    reward_batch: int = option(256, "states in one of its steps", 1, 100_000)
    reward_lr: float = option(1e-3, "its peak learning rate", 1e-9, 1)
    gamma: float = option(0.99, "discount of the return-to-go", 0, 0.9999)
    student_steps: int = option(1500, "gradient steps of the student", 1, 10**9)
    student_batch: int = option(32, "windows in one of its steps", 1, 100_000)
    student_lr: float = option(2e-3, "its peak learning rate", 1e-9, 1)
    grid_points: int = option(20, "N: noise levels in the grid of t, u and k", 3, 9999)
    ctm_weight: float = option(1.0, "alpha of Eq. 9", 0, 1e6)
    dsm_weight: float = option(0.1, "beta of Eq. 9", 0, 1e6)
    reward_weight: float = option(1.0, "sigma of Eq. 9; CTD is a row of its own", 1e-9, 1e6)
    trajectories: int = option(32_768, "teacher trajectories to learn from, 0: none", 0, 10**8)
    trajectory_batch: int = option(128, "of these in one of the student's steps", 1, 100_000)
    temperature: float = option(0.01, "scale of the noise that plans start from", 0, 100)
    nfe: int = option(1, "network calls of the student per plan", 1, 80)
    replan: int = option(0, "steps between plans, 0: one plan; below H it puts off the goal", 0)
    episodes: int = option(100, "evaluation episodes of each task", 1, 10**6)
    first_seed: int = option(0, "episode i has the seed first_seed + i", 0, 2**31)


# sigma is smaller for the largest maze, as in the paper
DEFAULTS = {
    "umaze": {},
    "medium": {"horizon": 256, "student_steps": 3000},
    "large": {
        "horizon": 384,
        "teacher_lr": 0.004,
        "level_mean": 0.0,
        "level_std": 1.5,
        "student_steps": 6000,
        "student_lr": 0.004,
        "reward_weight": 0.5,
        "trajectories": 131_072,
    },
}
# the settings that decide what each stage learns
FIELDS = {
    "reward": "seed horizon gamma reward_steps reward_batch reward_lr",
    "teacher": "seed horizon width teacher_steps teacher_batch teacher_lr level_mean level_std",
    "student": "seed horizon width student_steps student_batch student_lr grid_points ctm_weight "
    "dsm_weight reward_weight trajectories trajectory_batch temperature",
}
NETWORK = {"kernel": 5, "patch": 8}
PINNED = ((0, 0), (0, 1), (0, 2), (0, 3), (-1, 0), (-1, 1))  # first state, last position
ANYWHERE = 0.1  # the share of R's states that are moved there
LEAP = 0.25  # of a cell: a step so long is no noise; the simulator's longest one is 0.05
TASKS = {"single": False, "multi": True}  # whether goals are random
# label: who acts, changes of MazeConfig, a teacher's points of Heun's method
ROWS = {
    "teacher, 20 points": ("teacher", {}, 20),
    "teacher, 80 points": ("teacher", {}, 80),
    "CTD": ("student", {"reward_weight": 0.0}, None),
    "RACTD": ("student", {}, None),
}
PAPER = {  # single-task D4RL scores with D4RL's data
    "CTD": {"umaze": 123.4, "medium": 119.8, "large": 127.1},
    "RACTD": {"umaze": 125.7, "medium": 130.8, "large": 143.8},
}

# ---- Data ----------------------------------------------------------------------------------------


class StateBatches:
    """Drives as normalised tensors on the device, where batches of plans of states are drawn."""

    def __init__(self, drives, horizon, gamma, device):
        lengths = np.array([len(drive) for drive in drives])
        ends = np.cumsum(lengths) - 1
        starts = window_starts(ends - lengths + 1, ends, horizon)
        if not len(starts):
            longest = lengths.max()
            raise ractd.UserError(f"--horizon {horizon}: the longest drive has {longest} states")
        self.raw = torch.tensor(np.concatenate(drives), device=device)  # (N, 4)
        self.normalizer = {"obs": ractd.fit_range(self.raw)}
        self.obs = ractd.encode(self.raw, self.normalizer["obs"])
        self.starts = torch.tensor(starts, device=device)
        self.lasts = torch.tensor(np.repeat(ends, lengths), device=device)
        self.chunk = torch.arange(horizon, device=device)
        steps = 1 + int(math.log(0.01) / math.log(max(gamma, 1e-9)))  # later ones count for < 1 %
        self.discounts = gamma ** torch.arange(steps, device=device)

    def draw(self, batch):
        """First rows of random windows: (B,)."""
        return self.starts[torch.randint(len(self.starts), (batch,), device=self.obs.device)]

    def windows(self, batch):
        """Random windows: condition (B, 6), the first state and the goal, and plan x0 (B, H, 4)."""
        x0 = self.obs[self.draw(batch)[:, None] + self.chunk]
        return torch.cat([x0[:, 0], x0[:, -1, :2]], dim=1), x0

    def returns(self, batch):
        """One state of each of random windows beside its goal (B, 6), R's target there (B,).

        The goal is the window's end, as in `windows`: rewards are relabelled to it, so that one R
        serves all goals, D4RL's fixed one too. The target is the share of the discounted future
        within 0.5 of it, 0 to 1; a drive's last state is held. Some states are moved to anywhere
        and worth 0 there: else R would rise through walls, and Eq. 8 would bend plans into them.
        """
        starts = self.draw(batch)
        goals = starts + len(self.chunk) - 1
        rows = starts + torch.randint_like(starts, len(self.chunk))
        later = rows[:, None] + torch.arange(len(self.discounts), device=rows.device)
        later = torch.minimum(later, self.lasts[rows, None])
        distances = (self.raw[later, :2] - self.raw[goals, None, :2]).norm(dim=2)
        near = distances <= pointmaze.GOAL_RADIUS
        target = (self.discounts * near).sum(1) / self.discounts.sum()
        inputs = torch.cat([self.obs[rows], self.obs[goals, :2]], dim=1)
        moved = int(ANYWHERE * batch)
        inputs[:moved, :2] = 2 * torch.rand_like(inputs[:moved, :2]) - 1
        target[:moved] = 0.0
        return inputs, target


def load_maze(run):
    """The data of a run -> (StateBatches, meta), as `ractd.load_data`."""
    dataset_id = run.data.removeprefix("minari:")
    drives = pointmaze.read_trajectories(dataset_id)
    states = np.concatenate(drives)
    if run.maze.in_wall(states[:, :2]).any():
        raise ractd.UserError(f"{run.data} is of another maze than --maze {run.maze.name}")
    print(f"data: {dataset_id}: {len(states):,} states, {len(drives)} drive(s)", flush=True)
    batches = StateBatches(drives, run.config.horizon, run.config.gamma, run.device)
    dataset = {
        "name": dataset_id,
        "source": "minari",
        "sha256": hashlib.sha256(states.tobytes()).hexdigest(),
        "transitions": len(states) - len(drives),
    }
    return batches, {"env": run.env, "dataset": dataset, "normalizer": batches.normalizer}


# ---- The three stages ----------------------------------------------------------------------------


class GoalReward(nn.Module):
    """R of conditions (B, 6) and plans (B, H, 4): the mean over a plan's states, (B,).

    The paper has the sum, H times that; `plan_distance` is a mean over the plan, too. R sees
    positions also as waves, as walls are thin and a plain network is smooth.
    """

    def __init__(self):
        super().__init__()
        self.mlp = ractd.mlp(6 + 16, 128)

    def forward(self, state, plan):
        goals = state[:, None, 4:].expand(-1, plan.shape[1], -1)
        angles = math.pi * torch.cat([plan[..., :2], goals], dim=2)
        waves = [wave(n * angles) for n in (1, 2) for wave in (torch.sin, torch.cos)]
        each = self.mlp(torch.cat([plan, goals, *waves], dim=2))
        return each.reshape(plan.shape[:2]).mean(1)


def make_net(config, student=False):
    """The U-Net of plans of states whose ends are pinned; UserError if the horizon is no good."""
    channels = (config.width, 2 * config.width, 4 * config.width)
    multiple = NETWORK["patch"] * 2 ** (len(channels) - 1)
    if config.horizon % multiple:
        raise ractd.UserError(f"--horizon {config.horizon}: must be a multiple of {multiple}")
    return PinnedUNet(4, 6, channels, pinned=PINNED, student=student, **NETWORK)


def load_network(checkpoint, device):
    """The network of a checkpoint with its averaged weights, frozen."""
    if checkpoint["stage"] == "reward":
        net = GoalReward()
    else:
        net = make_net(MazeConfig(**checkpoint["config"]), checkpoint["stage"] == "student")
    return load_weights(net, checkpoint, device)


def plan_distance(a, b, c=0.1):
    """`ractd.pseudo_huber` in the root mean square of the difference: (B, H, 4) -> (B,).

    Quadratic below c, so that Eq. 8 bends a plan in proportion to sigma; linear above, so that
    starts and goals between which there are many ways do not outweigh the others.
    """
    return ractd.pseudo_huber(a, b, c) / math.sqrt(a[0].numel())


def teacher_trajectories(teacher, batches, temperature, count, batch=256):
    """At least `count` of them: conditions (N, 6), starts at T and ends (N, H, 4) each.

    Half of them lead to goals of other windows, as a task's starts and goals may lie farther apart
    than those of any window. Long plans need more of them from T than `ractd.TRAJECTORIES`.
    """
    sigmas = ractd.karras_sigmas(7)
    tell = progress("teacher trajectories", count, "of them")
    solved = []
    for done in range(0, count, batch):
        state, x0 = batches.windows(batch)
        half = batch // 2
        state[:half, 4:] = state[-half:, 4:]  # goals of other windows
        x_T = teacher.pin(temperature * ractd.SIGMA_MAX * torch.randn_like(x0), state)
        denoiser = functools.partial(denoise, teacher, state=state)
        solved.append((state, x_T, ractd.heun_sample(denoiser, x_T, sigmas)))
        tell(done + batch)
    return [torch.cat(column) for column in zip(*solved, strict=True)]


def reward_stage(config, batches):
    """R and loss_fn(net, average): the squared error of returns-to-go."""

    def loss_fn(net, average):
        state, target = batches.returns(config.reward_batch)
        return (net(state, state[:, None, :4]) - target).square().mean(), {}

    return GoalReward().to(batches.obs.device), loss_fn


def teacher_stage(config, batches):
    """The teacher and loss_fn(net, average): Eq. 4."""

    def loss_fn(net, average):
        state, x0 = batches.windows(config.teacher_batch)
        t = ractd.lognormal_levels(len(x0), x0.device, config.level_mean, config.level_std)
        denoiser = functools.partial(denoise, net, state=state)
        return ractd.edm_loss(denoiser, x0, t, torch.randn_like(x0)), {}

    return make_net(config).to(batches.obs.device), loss_fn


def student_stage(config, batches, teacher, reward=None):
    """The student and loss_fn(net, average): Eq. 9 and the teacher's trajectories."""
    device = batches.obs.device
    student = make_net(config, student=True).to(device)
    ractd.warm_start(student, teacher)
    sigmas = ractd.karras_sigmas(config.grid_points).to(batches.obs)
    solved = None
    if config.trajectories:
        solved = teacher_trajectories(teacher, batches, config.temperature, config.trajectories)

    def loss_fn(net, average):
        state, x0 = batches.windows(config.student_batch)
        jump = functools.partial(student_jump, net, state=state)
        frozen_jump = functools.partial(student_jump, average, state=state)
        denoiser = functools.partial(denoise, teacher, state=state)

        # Eqs. 5 and 6: CTM
        t, u, k = ractd.draw_jumps(len(x0), sigmas)
        x_t = x0 + ractd.expand(t) * torch.randn_like(x0)
        ctm = ractd.ctm_loss(jump, frozen_jump, denoiser, x_t, t, u, k, distance=plan_distance)

        # Eq. 7: DSM
        t = ractd.lognormal_levels(len(x0), device)
        x_t = x0 + ractd.expand(t) * torch.randn_like(x0)
        dsm = ractd.dsm_loss(denoise(net, x_t, t, state, t), x0, t)

        loss = config.ctm_weight * ctm + config.dsm_weight * dsm
        info = {"ctm": ctm.detach(), "dsm": dsm.detach()}

        # Eq. 8: reward
        if reward is not None:
            x_T = config.temperature * ractd.SIGMA_MAX * torch.randn_like(x0)
            plan = jump(x_T, ractd.SIGMA_MAX, ractd.SIGMA_MIN)
            minus_R = ractd.reward_loss(reward, state, plan)
            loss = loss + config.reward_weight * minus_R
            info["R"] = -minus_R.detach()

        # Eq. 5 for u = k = 0
        if solved is not None:
            rows = torch.randint(len(solved[0]), (config.trajectory_batch,), device=device)
            state, x_T, end = (column[rows] for column in solved)
            plan = student_jump(net, x_T, ractd.SIGMA_MAX, ractd.SIGMA_MIN, state)
            trajectory = plan_distance(plan, end).mean()
            loss = loss + config.ctm_weight * trajectory
            info["path"] = trajectory.detach()
        return loss, info

    return student, loss_fn


STAGES = {"reward": reward_stage, "teacher": teacher_stage, "student": student_stage}


def train_stage(run, stage, batches, meta, models):
    """The finished checkpoint of a stage, as `ractd.train_stage`; models: of those before it."""

    def make():
        networks = {name: load_network(model, run.device) for name, model in models.items()}
        return STAGES[stage](run.config, batches, **networks)

    how = {"weight_decay": ractd.WEIGHT_DECAY[stage]}
    if stage == "student":
        how["target_decay"] = ractd.TARGET_DECAY
    return ractd.load_or_train(run, stage, FIELDS[stage], meta, models, make, **how)


# ---- Acting and evaluation -----------------------------------------------------------------------


class Planner:
    """A loaded teacher or student, acting: raw observations in, raw plans of states out.

    config: MazeConfig, of which nfe and temperature count; points: of a teacher's Heun's method.
    calls: network calls per plan.
    """

    def __init__(self, checkpoint, config, points, device):
        trained = MazeConfig(**checkpoint["config"])
        self.net = load_network(checkpoint, device)
        self.device = device
        self.student = checkpoint["stage"] == "student"
        self.table = checkpoint["normalizer"]["obs"].to(device)
        self.shape = (trained.horizon, 4)
        self.sigmas = ractd.karras_sigmas(trained.grid_points if self.student else points)
        self.nfe = config.nfe
        self.temperature = config.temperature
        self.calls = config.nfe if self.student else 2 * points - 3

    @torch.inference_mode()
    def act(self, observations, generators):
        """observations (B, 6), a numpy Generator for each -> plans (B, H, 4), in numpy."""
        observations = torch.tensor(observations, dtype=torch.float32, device=self.device)
        goal_table = torch.cat([self.table, self.table[:, :2]], dim=1)
        state = ractd.encode(observations, goal_table)

        def cool(_):
            return self.temperature * acting_noise(generators, self.shape, self.device)

        x_T = ractd.SIGMA_MAX * cool(None)
        if self.student:
            jump = functools.partial(student_jump, self.net, state=state)
            x = ractd.student_sample(jump, x_T, self.sigmas, self.nfe, cool)
        else:
            denoiser = functools.partial(denoise, self.net, state=state)
            x = ractd.heun_sample(denoiser, x_T, self.sigmas)
        x = self.net.pin(x.clamp(-1, 1), state)  # in the range of the data
        return ractd.decode(x, self.table).cpu().numpy()


def paired_gain(maze, a, b):
    """The scores of row b minus those of row a in the same episodes: {task: (mean, error)}."""
    gain = {}
    for task in TASKS:
        before = maze.score(a[task]["returns"])
        after = maze.score(b[task]["returns"])
        gain[task] = mean_and_error(after - before)
    return gain


def measure(run, label, planner, asked):
    """One row: both tasks, faults of the single-task plans; asked: what makes it this row.

    It is kept in <out>, in a file named after label and `asked`, and not made again.
    """
    how = "_".join(f"{name}-{value}" for name, value in asked.items() if name != "maze")
    path = run.out / f"maze2d_{file_label(label)}_{how}.json"
    kept = read_json(path)
    if kept.get("asked") == asked:
        print(f"{label}: numbers from {path}")
        return kept
    row = {"label": label, "calls": planner.calls if planner else 0, "asked": asked}
    for task, random_goals in TASKS.items():
        print(f"\n== {label}: {task}-task", flush=True)
        act = OpenLoop(planner.act, run.config.replan) if planner else DataController(run.maze)
        make_env = functools.partial(pointmaze.MazeTask, run.maze, random_goals)
        result = ractd.evaluate(act, make_env, run.config.episodes, run.config.first_seed)
        returns = result["returns"]
        mean, error = mean_and_error(run.maze.score(returns))
        row[task] = {"score_mean": mean, "score_sem": error, "returns": returns}
        row[task]["reached"] = float(np.mean(np.array(returns) > 0))
        if planner and not random_goals:
            plans = act.first[: run.config.episodes]
            row |= pointmaze.plan_faults(run.maze, plans)
            row["plans"] = plans[:10, :, :2].tolist()
            row["driven"] = np.stack(act.driven, axis=1)[: len(row["plans"])].tolist()
    write_json(path, row)
    return row


def maze2d(run):
    """Train what is missing, measure all rows, write maze2d.json, print the table, draw it."""
    config = run.config
    experiment = Experiment(run, load_maze, train_stage, FIELDS)
    about = {"maze": run.maze.name, "episodes": config.episodes, "first_seed": config.first_seed}
    acting = {"replan": config.replan, "temperature": config.temperature, "nfe": config.nfe}

    rows = [measure(run, "controller of the data", None, about)]
    planners = {}
    for label, (stage, changes, points) in ROWS.items():
        model = experiment.model(stage, changes)
        planners[label] = Planner(model, config, points, run.device)
        asked = about | acting | {"weights": ractd.weights_id(model)}
        row = measure(run, label, planners[label], asked)
        rows.append(row | {"own_train_s": model["seconds"]})

    example = np.zeros((1, 6))
    generators = [np.random.default_rng(0)]
    calls = {label: functools.partial(p.act, example, generators) for label, p in planners.items()}
    for row, (ms, iqr) in zip(rows[1:], in_turns(calls, turns=10).values(), strict=True):
        row |= {"ms": ms, "ms_iqr": iqr}

    result = about | acting | {"dataset": experiment.meta["dataset"], "seed": config.seed}
    result["horizon"] = config.horizon
    result["gain"] = paired_gain(run.maze, *rows[-2:])  # CTD, RACTD
    result["rows"] = rows
    path = run.out / "maze2d.json"
    write_json(path, result)
    print_result(result)
    print(f"All numbers: {path}")
    pictures.draw_maze(result, run.maze, path.with_suffix(".png"))
    if run.video:
        pictures.animate_maze(rows[-1], run.maze, path.with_suffix(".gif"))


def print_result(result):
    """What maze2d.json holds, to be read."""
    title = f"{result['maze']} on {result['dataset']['name']}: plans of {result['horizon']} states"
    print(f"\n{title}, {result['episodes']} episodes from seed {result['first_seed']}, D4RL scores")
    header = ["", "calls", "ms/plan"]
    header += ["single-task", "there", "multi-task", "there", "wall", "leap", "paper"]
    table = []
    for row in result["rows"]:
        cells = [row["label"], row["calls"], row.get("ms")]
        for task in TASKS:
            cells.append(plus_minus(row[task]["score_mean"], row[task]["score_sem"]))
            cells.append(f"{row[task]['reached']:.0%}")
        if "wall" in row:
            leaps = np.mean(np.array(row["longest_step"]) > LEAP)
            cells += [f"{row['wall']:.0%}", f"{leaps:.0%}"]
        else:
            cells += [None, None]
        cells.append(PAPER.get(row["label"], {}).get(result["maze"]))
        table.append(cells)
    gains = {task: plus_minus(*gain) for task, gain in result["gain"].items()}
    others = [None, None, gains["single"], None, gains["multi"], None, None, None, None]
    table.append(["RACTD - CTD, paired", *others])
    print_table(header, table)


# ---- Command line --------------------------------------------------------------------------------


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("maze.maze2d", __doc__)
    lines = ["Other defaults of the larger mazes:"]
    for maze, defaults in DEFAULTS.items():
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in defaults.items()]
        lines.append(f"{maze}: {' '.join(flags) or 'none'}")
    parser.epilog = "\n".join(lines)
    parser.add_argument(
        "--maze",
        dest="env",
        type=lambda name: f"maze2d-{name.removeprefix('maze2d-')}",
        choices=[f"maze2d-{maze}" for maze in DEFAULTS],
        default="maze2d-umaze",
        metavar="MAZE",
        help=f"{', '.join(DEFAULTS)} (default: umaze)",
    )
    text = "minari:ID of a PointMaze set (default: recipe, D4RL's, made here)"
    parser.add_argument("--data", default="recipe", help=text)
    parser.add_argument("--video", action="store_true", help="RACTD's first episode as a GIF, too")

    def command():
        run = parse_own(parser, MazeConfig, argv, DEFAULTS)
        make_net(run.config)  # a wrong size is found before data are made
        run.maze = pointmaze.Maze(run.env.removeprefix("maze2d-"))
        if run.data == "recipe":
            dataset_id = pointmaze.local_id(run.maze.name)
            if not pointmaze.exists(dataset_id):
                pointmaze.collect(run.maze)
            run.data = f"minari:{dataset_id}"
        if not run.data.startswith("minari:"):
            raise ractd.UserError(f"--data {run.data}: must be minari:ID, a PointMaze set")
        maze2d(run)

    return run_command("maze2d.py", command)


if __name__ == "__main__":
    sys.exit(main())
