"""Maze2d: plans of states, a whole drive in one network call, carried out open loop.

    python -m reproduce.maze2d --maze umaze                     data, training, scores, picture
    python -m reproduce.maze2d --data minari:D4RL/pointmaze/umaze-v2 --maze umaze
    python -m reproduce.maze2d --maze umaze --video             the first episode as GIF

A plan is H states (x, y and their velocities); the first one and the last one's position, the goal,
are pinned: they hold clean values at every noise level, in the denoiser and in the jump. R is the
return-to-go of one state and a goal, low where no one goes, so that it knows the walls. Eq. 8 takes
its mean over the student's one-call plan, where the paper has the sum, H times that. A PD rule
drives from the true state to the next planned one; after the plan its end is held. Data that are
not there are made first by D4RL's recipe. Trained models and rows of numbers are kept in <out>, and
not made again.

Training differs from `python ractd.py distill` in four more points: the teacher's whole paths are
solved once, before a student's training; half of them lead to goals of other windows; Eq. 5's
distance is one that plans of many states need (`plan_distance`); and large's teacher learns from
more noise, at which the way of so long a plan is decided. Defaults where it has others:
"""

import dataclasses
import functools
import hashlib
import math
import sys
import time

import numpy as np
import torch
from torch import nn

import ractd
from reproduce import figures, pointmaze
from reproduce.common import (
    Experiment,
    file_label,
    in_turns,
    make_parser,
    mean_and_error,
    parse_planner,
    read_json,
    run_command,
    write_json,
)
from reproduce.pointmaze import DataController, OpenLoop

# the small preset; H as in the paper
PRESET = """--channels 32 64 128 --kernel 5 --patch 8 --teacher-batch 128 --student-batch 32
--path-batch 128 --teacher-steps 6000 --reward-steps 10000 --student-steps 1500 --tilted-steps 0
--student-lr 0.002 --dsm-weight 0.1 --temperature 0.01 --episodes 100"""
UNUSED = "env reward_target reward_actions reward_networks candidates distance tilted_steps"
FLAGS = {  # of each maze; sigma smaller for the largest, as in the paper
    "umaze": "--horizon 128 --reward-weight 1",
    "medium": "--horizon 256 --reward-weight 1 --student-steps 3000",
    "large": "--horizon 384 --reward-weight 0.5 --student-steps 6000 --teacher-lr 0.004 "
    "--student-lr 0.004",
}
OWN = {  # of each maze, for `maze_loss`: how many of the teacher's paths, its noise if not EDM's
    "umaze": {"paths": 32_768},
    "medium": {"paths": 32_768},
    "large": {"paths": 131_072, "levels": (0.0, 1.5)},
}
ANYWHERE = 0.1  # the share of R's states that are moved there
LEAP = 0.25  # of a cell: a step so long is no noise; the simulator's longest one is 0.05
PINNED = ((0, 0), (0, 1), (0, 2), (0, 3), (-1, 0), (-1, 1))  # first state, last position
PAPER = {  # single-task D4RL scores with D4RL's data
    "CTD": {"umaze": 123.4, "medium": 119.8, "large": 127.1},
    "RACTD": {"umaze": 125.7, "medium": 130.8, "large": 143.8},
}
ROWS = (  # label, who acts, changes of Config
    ("teacher, 20 points", "teacher", {"teacher_points": 20}),
    ("teacher, 80 points", "teacher", {"teacher_points": 80}),
    ("CTD", "student", {"reward_weight": 0.0}),
    ("RACTD", "student", {}),
)


class StateBatches:
    """Drives as normalised tensors on the device, where batches of plans of states are drawn."""

    def __init__(self, drives, horizon, gamma, device):
        lengths = np.array([len(drive) for drive in drives])
        ends = np.cumsum(lengths) - 1
        starts = ractd.window_starts(ends - lengths + 1, ends, horizon)
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

    def windows(self, batch):
        """Random windows: condition (B, 6), the first state and the goal, and plan x0 (B, H, 4)."""
        starts = self.starts[torch.randint(len(self.starts), (batch,), device=self.obs.device)]
        x0 = self.obs[starts[:, None] + self.chunk]
        return torch.cat([x0[:, 0], x0[:, -1, :2]], dim=1), x0

    def returns(self, batch):
        """One state of each of random windows beside its goal (B, 6), R's target there (B,).

        The goal is the window's end, as in `windows`: rewards are relabelled to it, so that one R
        serves all goals, D4RL's fixed one too. The target is the share of the discounted future
        within 0.5 of it, 0 to 1; a drive's last state is held. Some states are moved to anywhere
        and worth 0 there: else R would rise through walls, and Eq. 8 would bend plans into them.
        """
        starts = self.starts[torch.randint(len(self.starts), (batch,), device=self.obs.device)]
        goals = starts + len(self.chunk) - 1
        rows = starts + torch.randint_like(starts, len(self.chunk))
        later = rows[:, None] + torch.arange(len(self.discounts), device=rows.device)
        later = torch.minimum(later, self.lasts[rows, None])
        distances = (self.raw[later, :2] - self.raw[goals, None, :2]).norm(dim=2)
        target = (self.discounts * (distances <= pointmaze.GOAL_RADIUS)).sum(1)
        inputs = torch.cat([self.obs[rows], self.obs[goals, :2]], dim=1)
        moved = slice(int(ANYWHERE * batch))
        inputs[moved, :2], target[moved] = 2 * torch.rand_like(inputs[moved, :2]) - 1, 0.0
        return inputs, target / self.discounts.sum()


def load_maze(run):
    """The data of a run -> (StateBatches, meta), as `ractd.load_data`."""
    dataset_id = run.data.removeprefix("minari:")
    drives = pointmaze.read_trajectories(dataset_id)
    states = np.concatenate(drives)
    if run.maze.in_wall(states[:, :2]).any():
        raise ractd.UserError(f"{run.data} is of another maze than --maze {run.maze.name}")
    print(f"data: {dataset_id}: {len(states):,} states, {len(drives)} drive(s)", flush=True)
    batches = StateBatches(drives, run.config.horizon, run.config.gamma, run.device)
    moves = len(states) - len(drives)
    sha256 = hashlib.sha256(states.tobytes()).hexdigest()
    dataset = {"name": dataset_id, "source": "minari", "sha256": sha256, "transitions": moves}
    meta = {"env": run.env, "dataset": dataset, "dims": [6, 4], "plan": "states"}
    return batches, meta | {"normalizer": batches.normalizer}


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


def plan_distance(a, b, c=0.1):
    """`ractd.pseudo_huber` in the root mean square of the difference: (B, H, 4) -> (B,).

    Quadratic below c, so that Eq. 8 bends a plan in proportion to sigma; linear above, so that
    starts and goals between which there are many ways do not outweigh the others.
    """
    return ractd.pseudo_huber(a, b, c) / math.sqrt(a[0].numel())


def teacher_paths(teacher, batches, temperature, count, batch=256):
    """`count` whole paths of the teacher: conditions (N, 6), starts at T and ends (N, H, 4) each.

    Half of them lead to goals of other windows, as a task's starts and goals may lie farther apart
    than those of any window. `ractd.path_loss` solves new paths in every step; a long plan needs
    larger batches than that leaves time for, and they are drawn from these again and again.
    """
    paths, began = [], time.monotonic()
    for done in range(batch, count + batch, batch):
        state, x0 = batches.windows(batch)
        state[: batch // 2, 4:] = state[-(batch // 2) :, 4:]  # goals of other windows
        x_T = teacher.pin(temperature * ractd.SIGMA_MAX * torch.randn_like(x0), state)
        denoiser = functools.partial(ractd.denoise, teacher, state=state)
        paths.append((state, x_T, ractd.heun_sample(denoiser, x_T, ractd.karras_sigmas(7))))
        if done % (count // 8) == 0:
            spent = time.monotonic() - began
            left = spent * (count / done - 1)
            print(f"teacher paths {done:8,}/{count:,}  {spent:.0f} s  ETA {left:.0f} s", flush=True)
    return [torch.cat(column) for column in zip(*paths, strict=True)]


def maze_loss(stage, config, batches, dims, built_on, paths, levels=()):
    """(network, loss_fn(net, average)) of teacher, R or student, as `ractd.stage_loss`.

    paths: how many of the teacher's a student learns from; levels: mean and standard deviation of
    ln t, the teacher's noise, (): those of EDM.
    """
    device = batches.obs.device

    def teacher_loss(net, _):
        state, x0 = batches.windows(config.teacher_batch)
        t, noise = ractd.lognormal_levels(len(x0), device, *levels), torch.randn_like(x0)
        denoiser = functools.partial(ractd.denoise, net, state=state)
        return ractd.edm_loss(denoiser, x0, t, noise), {}

    def reward_model_loss(net, _):
        state, target = batches.returns(config.reward_batch)
        return (net(state, state[:, None, :4]) - target).square().mean(), {}

    def student_loss(net, average):
        state, x0 = batches.windows(config.student_batch)
        nets = (net, average, teacher, reward)
        loss, info = ractd.distillation_loss(*nets, state, x0, pathless, plan_distance)
        if not config.path_batch:
            return loss, info
        rows = torch.randint(paths, (config.path_batch,), device=device)
        state, x_T, end = (column[rows] for column in solved)
        plan = ractd.student_jump(net, x_T, ractd.SIGMA_MAX, ractd.SIGMA_MIN, state)
        path = plan_distance(plan, end).mean()
        return loss + config.ctm_weight * path, info | {"path": path.detach()}

    if stage == "reward":
        return GoalReward().to(device), reward_model_loss
    teacher = ractd.make_unet(config, dims).to(device)
    teacher.pinned, reward = PINNED, None
    if stage == "teacher":
        return teacher, teacher_loss
    teacher.load_state_dict(built_on["teacher"]["ema"])
    if config.reward_weight:
        reward = GoalReward().to(device).eval().requires_grad_(False)
        reward.load_state_dict(built_on["reward"]["ema"])
    student = ractd.make_unet(config, dims, student=True).to(device)
    ractd.warm_start(student, teacher.eval().requires_grad_(False))
    pathless = dataclasses.replace(config, path_batch=0)
    if config.path_batch:
        solved = teacher_paths(teacher, batches, config.temperature, paths)
    return student, student_loss


class Planner(ractd.Policy):
    """`ractd.Policy` from observations (B, 6) to plans of states (B, H, 4)."""

    def __init__(self, checkpoint, how, device):
        states = checkpoint["normalizer"]["obs"]
        tables = {"obs": torch.cat([states, states[:, :2]], dim=1), "action": states}
        super().__init__(checkpoint | {"normalizer": tables}, how, device)
        self.net.pinned = PINNED


def paired_gain(maze, a, b):
    """The scores of row b minus those of row a in the same episodes: {task: (mean, error)}."""
    gain = {}
    for task in ("single", "multi"):
        scores = [maze.score(row[task]["returns"]) for row in (a, b)]
        gain[task] = mean_and_error(scores[1] - scores[0])
    return gain


def measure(run, label, planner, asked):
    """One row: both tasks, faults of the single-task plans; asked: what makes it this row.

    It is kept in <out>, in a file named after label and `asked`, and not made again.
    """
    how = "_".join(f"{name}-{value}" for name, value in asked.items() if name != "maze")
    path = run.out / f"maze2d_{file_label(label)}_{how}.json"
    if (row := read_json(path)).get("asked") == asked:
        print(f"{label}: numbers from {path}")
        return row
    config, calls = run.config, planner.calls if planner else 0
    row = {"label": label, "calls": calls, "asked": asked}
    for task, random_goals in (("single", False), ("multi", True)):
        print(f"\n== {label}: {task}-task", flush=True)
        act = OpenLoop(planner.act, run.replan) if planner else DataController(run.maze)
        make_env = functools.partial(pointmaze.MazeTask, run.maze, random_goals)
        returns = ractd.evaluate(act, make_env, config.episodes, config.first_seed)["returns"]
        mean, sem = mean_and_error(run.maze.score(returns))
        reached = float(np.mean(np.array(returns) > 0))
        row[task] = {"score_mean": mean, "score_sem": sem, "returns": returns, "reached": reached}
        if planner and not random_goals:
            plans = act.first[: config.episodes]
            row |= pointmaze.plan_faults(run.maze, plans) | {"plans": plans[:10, :, :2].tolist()}
            row["driven"] = np.stack(act.driven, axis=1)[: len(row["plans"])].tolist()
    write_json(path, row)
    return row


def maze2d(run):
    """Train what is missing, measure all rows, write maze2d.json, print the table, draw it."""
    maze, config = run.maze, run.config
    loss = functools.partial(maze_loss, **OWN[maze.name])
    experiment = Experiment(run, load_maze, loss)
    about = {"maze": maze.name, "episodes": config.episodes, "first_seed": config.first_seed}
    acting = {"replan": run.replan, "temperature": config.temperature, "nfe": config.nfe}
    rows, planners = [measure(run, "controller of the data", None, about)], {}
    for label, actor, changes in ROWS:
        model = experiment.student(changes) if actor == "student" else experiment.model(actor)
        how = dataclasses.replace(config, **changes)
        planners[label] = Planner(model, how, run.device)
        asked = about | acting | {"weights": ractd.weights_id(model)}
        rows.append(measure(run, label, planners[label], asked) | {"own_train_s": model["seconds"]})
    example, generators = np.zeros((1, 6)), [np.random.default_rng(0)]
    calls = {label: lambda p=p: p.act(example, generators) for label, p in planners.items()}
    for row, (ms, iqr) in zip(rows[1:], in_turns(calls, turns=10).values(), strict=True):
        row |= {"ms": ms, "ms_iqr": iqr}
    path = run.out / "maze2d.json"
    gain = paired_gain(maze, *rows[-2:])  # CTD, RACTD
    result = about | acting | {"dataset": experiment.meta["dataset"], "seed": config.seed}
    result |= {"horizon": config.horizon, "gain": gain, "rows": rows}
    write_json(path, result)
    print_table(result)
    print(f"All numbers: {path}")
    figures.draw_maze(result, maze, path.with_suffix(".png"))
    if run.video:
        figures.animate_maze(rows[-1], maze, path.with_suffix(".gif"))


def print_table(result):
    """What maze2d.json holds, to be read."""
    title = f"{result['maze']} on {result['dataset']['name']}: plans of {result['horizon']} states"
    print(f"\n{title}, {result['episodes']} episodes from seed {result['first_seed']}, D4RL scores")
    print(f"{'':24}calls   ms/plan   single-task  there    multi-task  there   wall  leap   paper")
    for row in result["rows"]:
        ms = f"{row['ms']:10.1f}" if "ms" in row else f"{'':10}"
        line = f"{row['label']:24}{row['calls']:5}{ms}"
        for task in ("single", "multi"):
            one = row[task]
            line += f"{one['score_mean']:8.1f} +- {one['score_sem']:.1f}{one['reached']:6.0%}"
        leaps = np.mean(np.array(row.get("longest_step", 0)) > LEAP)
        line += f"{row['wall']:8.0%}{leaps:6.0%}" if "wall" in row else f"{'':14}"
        paper = PAPER.get(row["label"])
        print(line + (f"{paper[result['maze']]:8.1f}" if paper else ""))
    gain = "".join(f"{mean:8.1f} +- {sem:.1f}      " for mean, sem in result["gain"].values())
    print(f"{'RACTD - CTD, paired':39}{gain}")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    each = "\n".join(f"{maze}: {flags}" for maze, flags in FLAGS.items())
    parser = make_parser("maze2d", f"{__doc__}{PRESET}\n{each}")
    add = parser.add_argument
    add("--maze", required=True, metavar="MAZE", help=", ".join(FLAGS))
    add("--data", help="minari:ID of a PointMaze set (default: D4RL's recipe, made here)")
    add("--video", action="store_true", help="RACTD's first episode as a GIF, too")
    text = "steps between plans; below H it puts off the goal (default: 0, one plan)"
    add("--replan", type=int, default=0, help=text)

    def command():
        own, rest = parser.parse_known_args(argv)
        maze = own.maze = pointmaze.Maze(own.maze)
        made_here = f"minari:{pointmaze.local_id(maze.name)}"
        data = own.data or made_here
        if own.replan < 0 or not data.startswith("minari:"):
            raise ractd.UserError("--replan must be at least 0, --data minari:ID, a PointMaze set")
        defaults = f"{PRESET} {FLAGS[maze.name]} --env maze2d-{maze.name}".split()
        run = parse_planner(rest, [*defaults, f"--data={data}"], UNUSED, own)
        if not run.config.reward_weight:
            raise ractd.UserError("--reward-weight must be more than 0; CTD is a row of its own")
        ractd.make_unet(run.config, [6, 4])  # a wrong size is found before data are made
        if data == made_here and not pointmaze.exists(data.removeprefix("minari:")):
            pointmaze.collect(maze)
        maze2d(run)

    return run_command("maze2d.py", command)


if __name__ == "__main__":
    sys.exit(main())
