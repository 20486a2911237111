"""RACTD beside the planners it is compared with: the same data, simulator, episodes and machine.

    python -m reproduce.planners.compare --env hopper-medium-replay --episodes 100 [--data FILE]

Behaviour cloning (the mean of a plain teacher's actions), that teacher by Heun's method, CTD of it,
RACTD, Diffuser, and Trajectory Diffuser (draft alone, refined with noise and without, and from pure
noise in as many calls), each as its own program trains it, with the defaults of that program. For
each the score, network calls and time per action at batch 1, in turns, and the time of training.
Trains what is missing in <out>, keeps finished scores, writes <out>/compare.json and compare.png,
score against time per action. What calls a network for more than --slow plans per action is scored
by --slow-episodes, for more than --skip not at all.
"""

import dataclasses
import math
import sys

import numpy as np

import ractd
from reproduce.common import (
    COLORS,
    CTD,
    PLAIN,
    Experiment,
    canvas,
    data_label,
    device_name,
    file_label,
    in_turns,
    kept_score,
    make_parser,
    parse_own,
    parse_run,
    plus_minus,
    print_table,
    run_command,
    save_picture,
    write_json,
)
from reproduce.planners import diffuser, trajectory_diffuser

TEACHERS = (80, 20, 10)  # points of Heun


@dataclasses.dataclass
class Settings:
    """What all planners have in common."""

    seed: int = ractd.option(0, "seed of all training", 0, 2**63 - 1)
    episodes: int = ractd.option(20, "number of evaluation episodes", 1, 10**6)
    first_seed: int = ractd.option(0, "episode i has the seed first_seed + i", 0, 2**31)


@dataclasses.dataclass
class Row:
    """A way to act: act as in `ractd.evaluate`, network calls per action, the models called.

    how: settings of acting that calls do not tell; candidates: plans per state; built_on: models
    that were needed to train these.
    """

    label: str
    act: object
    calls: dict
    models: list
    how: dict = dataclasses.field(default_factory=dict)
    candidates: int = 1
    built_on: list = dataclasses.field(default_factory=list)


def ractd_rows(run):
    """Behaviour cloning, the plain teacher by Heun's method, CTD and RACTD."""
    experiment = Experiment(run)
    teacher = experiment.model("teacher", PLAIN)
    # one Euler step from no noise: D(0, 80), the mean of the logged plans in a state
    policy = ractd.Policy(teacher, teacher_points=2, temperature=0.0, device=run.device)
    yield Row("behaviour cloning", policy.act, {"denoiser": policy.calls}, [teacher])
    for n in TEACHERS:
        policy = ractd.Policy(teacher, teacher_points=n, device=run.device)
        yield Row(f"teacher, {n} points", policy.act, {"denoiser": policy.calls}, [teacher])
    built_on = {
        "CTD": [teacher],
        "RACTD": [experiment.model("reward"), experiment.model("teacher")],
    }
    for label, changes in (("CTD", PLAIN | CTD), ("RACTD", {})):
        student = experiment.model("student", changes)
        policy = ractd.Policy(student, device=run.device)
        calls = {"student": policy.calls}
        yield Row(label, policy.act, calls, [student], built_on=built_on[label])


def diffuser_rows(run, candidates):
    """Diffuser, guided, replanning at every step; candidates: plans per state, a row each."""
    models = diffuser.train(run)
    how = {name: getattr(run.config, name) for name in ("scale", "guides", "stop")}
    for n in candidates:
        settings = dataclasses.replace(run.config, candidates=n)
        planner = diffuser.Planner(*models, settings, run.device)
        calls = {"denoiser": planner.calls, "value gradient": planner.gradients}
        yield Row(f"Diffuser, {n} candidates", planner.act, calls, models, how, n)


def trajectory_diffuser_rows(run):
    """Trajectory Diffuser: the draft alone, refined with and without noise, and pure noise."""
    models, target = trajectory_diffuser.train(run)
    (small,) = run.sigma
    points = run.config.points
    # pure noise: in as many calls as draft and refinement together, or one fewer
    many = points + (run.config.horizon - 1) // 2
    ways = {
        "draft alone": (0.0, points, True),
        "refined": (small, points, True),
        "refined without noise": (small, points, False),
        "pure noise": (ractd.SIGMA_MAX, many, True),
    }
    for name, (sigma, n, noisy) in ways.items():
        planner = trajectory_diffuser.Planner(models, target, sigma, n, noisy, run.device)
        calls = {
            "draft": planner.draft_calls,
            "denoiser": planner.denoiser_calls,
            "inverse dynamics": 1,
        }
        used = [model for model, n in zip(models.values(), calls.values(), strict=True) if n]
        how = {"sigma": sigma, "noise": noisy, "target_quantile": run.config.target_quantile}
        yield Row(f"Trajectory Diffuser, {name}", planner.act, calls, used, how)


def measure(row, run, data, ms, episodes):
    """The row's numbers, its score kept in <out>/compare_<label>_*.json; 0 episodes: no score."""
    seconds = sum(model["seconds"] for model in (*row.built_on, *row.models))
    about = {"label": row.label, "calls": row.calls, "train_s": seconds}
    about |= {"episodes": episodes, "first_seed": run.config.first_seed}
    about |= {"weights": [ractd.weights_id(model) for model in row.models], "how": row.how}
    if episodes:
        print(f"\n== {row.label}", flush=True)
        about = kept_score(f"compare_{file_label(row.label)}", about, run, row.act, data)
    return about | {"ms": ms[0], "ms_iqr": ms[1]}


def compare(run):
    """Train what is missing, time, score, write compare.json, print the table, draw it."""
    rows = [
        *ractd_rows(run.ractd),
        *diffuser_rows(run.diffuser, run.diffuser_candidates),
        *trajectory_diffuser_rows(run.trajectory_diffuser),
    ]
    teacher = rows[0].models[0]
    data = teacher["dataset"]

    # the time of one action
    print("time per action", flush=True)
    observations = np.zeros((1, teacher["dims"][0]), np.float32)
    generators = [np.random.default_rng(0)]
    calls = {row.label: lambda act=row.act: act(observations, generators) for row in rows}
    times = in_turns(calls, turns=20)

    # the scores
    numbers = []
    for row in rows:
        plans = row.candidates * sum(row.calls.values())  # that a network sees for an action
        episodes = run.config.episodes
        if plans > run.skip:
            episodes = 0
        elif plans > run.slow:
            episodes = min(run.slow_episodes, episodes)
        numbers.append(measure(row, run, data, times[row.label], episodes))
    about = {"env": run.env, "dataset": data, "seed": run.config.seed}
    about["device"] = device_name(run.device)
    path = run.out / "compare.json"
    write_json(path, about | {"rows": numbers})

    # the table and the picture
    title = f"{data_label(run.env, data)}; {about['device']}"
    unit = numbers[0].get("unit", "score")
    print(f"\n{title}")
    header = ["", unit, "episodes", "ms/action", "training s", "calls per action"]
    print_table(header, [cells(row) for row in numbers])
    print(f"All numbers: {path}")
    if scored := [row for row in numbers if row["episodes"]]:
        draw(scored, title, unit, path.with_suffix(".png"))


def cells(row):
    """The numbers of `measure` as cells of the table."""
    score = plus_minus(row["score_mean"], row["score_sem"]) if row["episodes"] else None
    calls = ", ".join(f"{n} {name}" for name, n in row["calls"].items() if n)
    times = [f"{row['ms']:.2f}", f"{row['train_s']:.0f}"]
    return [row["label"], score, row["episodes"], *times, calls]


def draw(rows, title, unit, path):
    """Score against milliseconds per action, a point for every row, a colour for every planner."""
    figure, axis = canvas(6.5, 4.2, title)
    for row in rows:
        family, _, variant = row["label"].partition(", ")
        new = family not in axis.get_legend_handles_labels()[1]
        at = (row["ms"], row["score_mean"])
        how = {"color": COLORS[family], "label": family if new else None}
        axis.errorbar(*at, row["score_sem"], fmt="o", capsize=3, **how)
        axis.annotate(variant, at, (4, 4), textcoords="offset points", fontsize=7)
    axis.margins(0.2, 0.12)
    axis.set(xscale="log", xlabel="ms per action, one at a time", ylabel=unit)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, path)


def parse(argv=None):
    """The run that a command line describes, checked, and in it one of each program."""
    parser = make_parser("planners.compare", __doc__)
    add = parser.add_argument
    text = "plans per action, calls times candidates, of what is slow (default: 100)"
    add("--slow", type=float, default=100, help=text)
    add("--slow-episodes", type=int, default=20, help="episodes of what is slow (default: 20)")
    text = "plans per action of what is timed, but not scored (default: none is)"
    add("--skip", type=float, default=math.inf, help=text)
    text = "Diffuser's plans per state, a row each (default: 4 64)"
    add("--diffuser-candidates", type=int, nargs="+", default=[4, 64], help=text)
    run = parse_own(parser, Settings, argv, folder="-compare")
    if min(run.slow_episodes, *run.diffuser_candidates) < 1:
        raise ractd.UserError("--slow-episodes, --diffuser-candidates must be at least 1")

    flags = [f"--env={run.env}", f"--data={run.data}", f"--device={run.device}"]
    for name, value in vars(run.config).items():
        flags.append(f"--{name.replace('_', '-')}={value}")
    run.ractd = parse_run(make_parser("planners.compare", ""), [*flags, f"--out={run.out}"])
    run.diffuser = diffuser.parse([*flags, f"--out={run.out}/diffuser"])
    own = [*flags, f"--out={run.out}/trajectory_diffuser"]
    run.trajectory_diffuser = trajectory_diffuser.parse(own)
    return run


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("compare.py", lambda: compare(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
