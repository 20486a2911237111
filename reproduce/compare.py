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


class MeanAction(ractd.Policy):
    """Behaviour cloning: the mean of the logged plans in a state, D(x, 80) of the teacher."""

    def forward(self, observations, noise):
        t, state = ractd.SIGMA_MAX, ractd.encode(observations, self.tables["obs"])
        x = state.new_zeros(len(state), *self.shape)
        plan = ractd.denoise(self.net, x, t, state, level=self.level(t)).clamp(-1, 1)
        return ractd.decode(plan, self.tables["action"])


def ractd_rows(run):
    """Behaviour cloning, the teacher by Heun's method, CTD and RACTD."""
    experiment = Experiment(run)
    teacher = experiment.model("teacher")
    act = MeanAction(teacher, device=run.device).act
    yield Row("behaviour cloning", act, {"denoiser": 1}, [teacher])
    for n in TEACHERS:
        how = dataclasses.replace(run.config, teacher_points=n)
        policy = ractd.Policy(teacher, how, run.device)
        yield Row(f"teacher, {n} points", policy.act, {"denoiser": policy.calls}, [teacher])
    for label, changes in (("CTD", {"reward_weight": 0.0}), ("RACTD", {})):
        student, stages = experiment.student(changes), () if changes else ("reward", "tilted")
        built_on = [teacher, *(experiment.model(stage) for stage in stages)]
        act = ractd.Policy(student, run.config, run.device).act
        yield Row(label, act, {"student": 1}, [student], built_on=built_on)


def diffuser_rows(run):
    """Diffuser, guided, replanning at every step, with few candidates and with 64 as published."""
    models = diffuser.train(run)
    for n in run.diffuser_candidates:
        own = copy.copy(run)
        own.config = dataclasses.replace(run.config, candidates=n)
        planner = diffuser.Planner(*models, own)
        calls = {"denoiser": planner.calls, "value gradient": planner.gradients}
        how = {name: getattr(run, name) for name in ("scale", "guides", "stop")}
        yield Row(f"Diffuser, {n} candidates", planner.act, calls, models, how, n)


def trajectory_diffuser_rows(run):
    """Trajectory Diffuser: the draft alone, refined with and without noise, and pure noise."""
    models, target = trajectory_diffuser.train(run)
    (small,), many = run.sigma, run.points + (run.config.horizon - 1) // 2
    ways = {  # pure noise: in as many calls as draft and refinement together, or one fewer
        "draft alone": (0.0, run.points, True),
        "refined": (small, run.points, True),
        "refined without noise": (small, run.points, False),
        "pure noise": (ractd.SIGMA_MAX, many, True),
    }
    for name, (sigma, n, noisy) in ways.items():
        act = trajectory_diffuser.Planner(models, target, sigma, n, noisy, run.device)
        calls = {"draft": act.draft_calls, "denoiser": act.denoiser_calls, "inverse dynamics": 1}
        stages = zip(("student", "teacher", "reward"), calls.values(), strict=True)
        used = [models[stage] for stage, n in stages if n]
        how = {"sigma": sigma, "noise": noisy, "target_quantile": run.target_quantile}
        yield Row(f"Trajectory Diffuser, {name}", act, calls, used, how)


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


def compare(runs, slow, slow_episodes, skip=math.inf):
    """Train what is missing, time, score, write compare.json, print the table, draw it.

    runs: of ractd, diffuser and trajectory_diffuser, as their own command lines make them.
    """
    makers = (ractd_rows, diffuser_rows, trajectory_diffuser_rows)
    rows = [row for maker, run in zip(makers, runs, strict=True) for row in maker(run)]
    run, teacher = runs[0], rows[0].models[0]
    data, observations = teacher["dataset"], np.zeros((1, teacher["dims"][0]), np.float32)
    generators = [np.random.default_rng(0)]
    print("time per action", flush=True)
    calls = {row.label: lambda act=row.act: act(observations, generators) for row in rows}
    times, few = in_turns(calls, turns=20), min(slow_episodes, run.config.episodes)
    numbers = []
    for row in rows:
        plans = row.candidates * sum(row.calls.values())  # that a network sees for an action
        episodes = 0 if plans > skip else few if plans > slow else run.config.episodes
        numbers.append(measure(row, run, data, times[row.label], episodes))
    about = {"env": run.env, "dataset": data, "seed": run.config.seed}
    about |= {"device": device_name(run.device)}
    path = run.out / "compare.json"
    write_json(path, about | {"rows": numbers})
    title = f"{data_label(run.env, data)}; {about['device']}"
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
        names = ("env", "data", "device", "seed", "episodes", "first_seed")
        common = [f"--{name.replace('_', '-')}={getattr(own, name)}" for name in names]
        run = ractd.build_parser().parse_args(["distill", *common, f"--out={out}"])
        ractd.resolve(run)
        runs = [run, diffuser.parse([*common, f"--out={out / 'diffuser'}"])]
        runs += [trajectory_diffuser.parse([*common, f"--out={out / 'trajectory_diffuser'}"])]
        runs[1].diffuser_candidates = own.diffuser_candidates
        compare(runs, own.slow, own.slow_episodes, own.skip)

    return run_command("compare.py", command)


if __name__ == "__main__":
    sys.exit(main())
