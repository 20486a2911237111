"""RACTD beside the planners it is compared with: the same data, simulator, episodes and machine.

    python -m reproduce.compare --env hopper-medium-replay --episodes 100 [--data FILE]

Behaviour cloning (the mean of the teacher's actions), Diffuser, Trajectory Diffuser (draft alone,
refined with noise and without, and from pure noise in as many calls), EDM teacher, CTD and RACTD,
each as its own program trains it, with the defaults of that program. For each the score, network
calls and time per action at batch 1, in turns, and the time of training. Trains what is missing in
<out> (default: runs/<env>-compare), keeps finished scores, writes <out>/compare.json and
compare.png, score against time per action. What calls a network for more than --slow plans per
action is scored by --slow-episodes, for more than --skip not at all.
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch

import ractd
from reproduce import diffuser, trajectory_diffuser
from reproduce.bench import device_name
from reproduce.common import (
    COLORS,
    Experiment,
    canvas,
    data_label,
    file_label,
    in_turns,
    kept_score,
    make_parser,
    run_command,
    save_picture,
    write_json,
)

TEACHERS = (80, 20, 10)  # points of Heun


@dataclasses.dataclass
class Row:
    """A way to act: act as in `ractd.evaluate`, network calls per action, seconds of training.

    weights: what tells its models from others; how: settings of acting that calls do not tell;
    plans: network calls per action times candidates.
    """

    label: str
    act: object
    calls: dict
    train_s: float
    weights: list
    how: dict = dataclasses.field(default_factory=dict)
    candidates: int = 1

    @property
    def plans(self):
        return self.candidates * sum(self.calls.values())


class MeanAction:
    """Behaviour cloning: the mean of the logged plans in a state, D(x, 80) of the teacher."""

    def __init__(self, teacher, device):
        self.policy = ractd.Policy(teacher, device=device)

    @torch.inference_mode()
    def __call__(self, observations, generators):
        policy = self.policy
        raw = torch.as_tensor(np.asarray(observations, np.float32), device=policy.device)
        state = ractd.encode(raw, policy.tables["obs"])
        noise = state.new_zeros(len(state), *policy.shape)
        level = policy.level(ractd.SIGMA_MAX)  # made once, as in the other rows
        plan = ractd.denoise(policy.net, noise, ractd.SIGMA_MAX, state, level=level).clamp(-1, 1)
        return ractd.decode(plan, policy.tables["action"]).cpu().numpy()


def ractd_rows(run):
    """Behaviour cloning, the teacher by Heun's method, CTD and RACTD."""
    experiment = Experiment(run)
    teacher = experiment.model("teacher")
    seconds, weights = teacher["seconds"], [ractd.weights_id(teacher)]
    act = MeanAction(teacher, run.device)
    yield Row("behaviour cloning", act, {"denoiser": 1}, seconds, weights)
    for n in TEACHERS:
        how = dataclasses.replace(run.config, teacher_points=n)
        policy = ractd.Policy(teacher, how, run.device)
        yield Row(f"teacher, {n} points", policy.act, {"denoiser": policy.calls}, seconds, weights)
    for label, changes in (("CTD", {"reward_weight": 0.0}), ("RACTD", {})):
        student = experiment.student(changes)
        stages = [] if changes else [experiment.model(stage) for stage in ("reward", "tilted")]
        total = seconds + sum(model["seconds"] for model in (*stages, student))
        act = ractd.Policy(student, run.config, run.device).act
        yield Row(label, act, {"student": 1}, total, [ractd.weights_id(student)])


def diffuser_rows(run):
    """Diffuser, guided, replanning at every step, with few candidates and with 64 as published."""
    models = diffuser.train(run)
    seconds, weights = sum(x["seconds"] for x in models), [ractd.weights_id(x) for x in models]
    for n in run.diffuser_candidates:
        own = copy.copy(run)
        own.config = dataclasses.replace(run.config, candidates=n)
        planner = diffuser.Planner(*models, own)
        calls = {"denoiser": planner.calls, "value gradient": planner.gradients}
        how = {name: getattr(run, name) for name in ("scale", "guides", "stop")}
        yield Row(f"Diffuser, {n} candidates", planner.act, calls, seconds, weights, how, n)


def trajectory_diffuser_rows(run):
    """Trajectory Diffuser: the draft alone, refined with and without noise, and pure noise."""
    batches, meta = ractd.load_data(run)
    models = trajectory_diffuser.train(run, batches, meta)
    target = float(np.quantile(batches.returns_to_go.cpu().numpy(), run.target_quantile))
    (small,) = run.sigma
    parts = {
        "draft alone": (0.0, True, ("student", "reward")),
        "refined": (small, True, ("student", "teacher", "reward")),
        "refined without noise": (small, False, ("student", "teacher", "reward")),
        "pure noise": (ractd.SIGMA_MAX, True, ("teacher", "reward")),
    }
    for name, (sigma, noisy, used) in parts.items():
        # from pure noise in as many calls as draft and refinement together, or one fewer
        n = run.points + (0 if sigma < ractd.SIGMA_MAX else (run.config.horizon - 1) // 2)
        act = trajectory_diffuser.Planner(models, target, sigma, n, noisy, run.device)
        calls = {"draft": act.draft_calls, "denoiser": act.denoiser_calls, "inverse dynamics": 1}
        seconds = sum(models[stage]["seconds"] for stage in used)
        weights = [ractd.weights_id(models[stage]) for stage in used]
        how = {"sigma": sigma, "noise": noisy, "target_quantile": run.target_quantile}
        yield Row(f"Trajectory Diffuser, {name}", act, calls, seconds, weights, how)


def measure(row, run, meta, ms, episodes):
    """The row's numbers, its score kept in <out>/compare_<label>_*.json; 0 episodes: no score."""
    about = {"label": row.label, "calls": row.calls, "train_s": row.train_s}
    about |= {"episodes": episodes, "first_seed": run.config.first_seed}
    about |= {"weights": row.weights, "how": row.how}
    if episodes:
        print(f"\n== {row.label}", flush=True)
        name = f"compare_{file_label(row.label)}"
        about = kept_score(name, about, run, row.act, meta["dataset"])
    return about | {"ms": ms[0], "ms_iqr": ms[1]}


def compare(runs, slow, slow_episodes, skip=math.inf):
    """Train what is missing, time, score, write compare.json, print the table, draw it.

    runs: of ractd, diffuser and trajectory_diffuser, as their own command lines make them.
    """
    makers = (ractd_rows, diffuser_rows, trajectory_diffuser_rows)
    rows = [row for maker, run in zip(makers, runs, strict=True) for row in maker(run)]
    run = runs[0]
    meta = ractd.load_checkpoint(run.out / "teacher.pt", "teacher")
    observations = np.zeros((1, meta["dims"][0]), np.float32)
    generators = [np.random.default_rng(0)]
    print("time per action", flush=True)
    calls = {row.label: lambda act=row.act: act(observations, generators) for row in rows}
    times, few = in_turns(calls, turns=20), min(slow_episodes, run.config.episodes)
    numbers = []
    for row in rows:
        episodes = 0 if row.plans > skip else few if row.plans > slow else run.config.episodes
        numbers.append(measure(row, run, meta, times[row.label], episodes))
    about = {"env": run.env, "dataset": meta["dataset"], "seed": run.config.seed}
    result = about | {"device": device_name(run.device), "rows": numbers}
    path = run.out / "compare.json"
    write_json(path, result)
    title = f"{data_label(run.env, meta['dataset'])}; {result['device']}"
    unit = numbers[0].get("unit", "score")
    print(f"\n{title}\n{'':44}{unit:>18}  episodes  ms/action  training s   calls per action")
    for row in numbers:
        score = f"{row['score_mean']:.1f} +- {row['score_sem']:.1f}" if row["episodes"] else "-"
        each = ", ".join(f"{n} {name}" for name, n in row["calls"].items() if n)
        line = f"{row['label']:44}{score:>18}{row['episodes']:10}{row['ms']:11.2f}"
        print(f"{line}{row['train_s']:12.0f}   {each}")
    print(f"All numbers: {path}")
    if scored := [row for row in numbers if row["episodes"]]:
        draw(scored, title, unit, path.with_suffix(".png"))


def draw(rows, title, unit, path):
    """Score against milliseconds per action, a point for every row, a colour for every planner."""
    figure, axis = canvas(6.5, 4.2, title)
    for row in rows:
        family, _, variant = row["label"].partition(", ")
        new = family not in axis.get_legend_handles_labels()[1]
        at, label = (row["ms"], row["score_mean"]), family if new else None
        axis.errorbar(*at, row["score_sem"], fmt="o", capsize=3, color=COLORS[family], label=label)
        axis.annotate(variant, at, (4, 4), textcoords="offset points", fontsize=7)
    axis.margins(0.2, 0.12)
    axis.set(xscale="log", xlabel="ms per action, one at a time", ylabel=unit)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, path)


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("compare", __doc__, others=False)
    add = parser.add_argument
    add("--env", required=True, help="as in `python ractd.py distill`")
    add("--out", type=Path, help="folder, in it one of each method (default: runs/<env>-compare)")
    text = "plans per action, calls times candidates, of what is slow (default: 100)"
    add("--slow", type=int, default=100, help=text)
    add("--slow-episodes", type=int, default=20, help="episodes of what is slow (default: 20)")
    text = "plans per action of what is timed, but not scored (default: none is)"
    add("--skip", type=int, default=math.inf, help=text)
    text = "Diffuser's plans per state, a row each (default: 4 64)"
    add("--diffuser-candidates", type=int, nargs="+", default=[4, 64], help=text)
    own = parser.parse_args(argv)

    def command():
        if min(own.slow_episodes, *own.diffuser_candidates) < 1:
            raise ractd.UserError("--slow-episodes, --diffuser-candidates must be at least 1")
        out = own.out or Path("runs") / f"{own.env.replace('/', '-')}-compare"
        common = [f"--env={own.env}", f"--data={own.data}", f"--device={own.device}"]
        common += [f"--seed={own.seed}", f"--first-seed={own.first_seed}"]
        common += [f"--episodes={own.episodes}"]
        run = ractd.build_parser().parse_args(["distill", *common, f"--out={out}"])
        ractd.resolve(run)
        runs = [run, diffuser.parse([*common, f"--out={out / 'diffuser'}"])]
        runs += [trajectory_diffuser.parse([*common, f"--out={out / 'trajectory_diffuser'}"])]
        runs[1].diffuser_candidates = own.diffuser_candidates
        compare(runs, own.slow, own.slow_episodes, own.skip)

    return run_command("compare.py", command)


if __name__ == "__main__":
    sys.exit(main())
