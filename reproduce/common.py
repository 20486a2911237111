"""What more than one of these programs needs: a run, its models and their scores, pictures."""

import argparse
import copy
import dataclasses
import json
import sys
import time

import numpy as np
import torch

import ractd

STAGES = ("teacher", "reward", "tilted", "student")
# Okabe and Ito's, for all eyes
COLORS = {"data": "#999999", "teacher": "#E69F00", "CTD": "#0072B2", "RACTD": "#D55E00"}
COLORS |= {"behaviour cloning": "#56B4E9", "Diffuser": "#009E73", "Trajectory Diffuser": "#CC79A7"}


def make_parser(name, text, others=True):
    """The parser of `python -m reproduce.<name>`; text: the module's docstring.

    others: it takes most flags of `ractd.py distill`, too; else --data, --device, --seed,
    --episodes and --first-seed.
    """
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if others:
        parser.epilog = (
            "Most flags of `python ractd.py distill` are taken too; its --help tells them."
        )
        return parser
    add = parser.add_argument
    add("--data", default="", help="FILE.hdf5 or minari:ID (default: D4RL's file of --env)")
    add("--device", default="cpu", help="cpu, cuda:0, ... (default: cpu)")
    add("--seed", type=int, default=0, help="of all training (default: 0)")
    add("--episodes", type=int, default=20, help="evaluation episodes (default: 20)")
    add("--first-seed", type=int, default=0, help="episode i has seed first_seed + i (default: 0)")
    return parser


def parse_run(parser, argv):
    """The run that the flags of `parser` and of `ractd.py distill` describe, checked."""
    own, rest = parser.parse_known_args(argv)
    run = ractd.build_parser().parse_args(["distill", *rest], own)
    ractd.resolve(run)
    return run


def parse_planner(flags, defaults, unused, own, tasks=None, folder=""):
    """The checked run of a planner's own defaults and the user's flags of `ractd.py distill`.

    unused: names of Config that mean nothing to it, UserError if one was given; own: the namespace
    that holds the planner's own flags already; tasks: {part of a task's name: more defaults};
    folder: what is added to the name of the default folder, runs/<env>.
    """
    given = ractd.build_parser().parse_args(["distill", *flags])
    given.preset = None if given.preset == "default" else given.preset
    for name in ("preset", *unused.split()):
        if getattr(given, name, None) is not None:
            flag = "--" + name.replace("_", "-")
            raise ractd.UserError(f"{flag} has no meaning for this planner; leave it out")
    for task, more in (tasks or {}).items():
        if task in str(given.env or given.data).lower():
            defaults = [*defaults, *more.split()]
    run = ractd.build_parser().parse_args(["distill", *defaults, *flags], own)
    ractd.resolve(run)
    if not given.out:
        run.out = run.out.with_name(run.out.name + folder)
    return run


def run_command(program, command):
    """Call command() -> exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    try:
        command()
    except (ractd.UserError, OSError, ImportError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class Experiment:
    """The data of a run and models trained on them, each once; finished ones are not repeated.

    run: of `parse_run`; batches, meta: of `ractd.load_data`; load, make: what takes the place of
    that function and of `ractd.stage_loss`, for other plans. A model with other hyperparameters
    than the run's has a folder of its own, <out>/variants/<name>; the others lie in <out>.
    """

    def __init__(self, run, load=None, make=None):
        self.run, self.make = run, make
        self.batches, self.meta = (load or ractd.load_data)(run)

    def variant(self, stages, changes, name=""):
        """The run with `changes` of Config, in the folder of those that matter to these stages.

        name: what else sets its models apart.
        """
        run = copy.copy(self.run)
        run.config = dataclasses.replace(self.run.config, **changes)
        names = [name] if name else []
        for field in dataclasses.fields(run.config):
            value = getattr(run.config, field.name)
            matters = any(stage in field.metadata["commands"] for stage in stages)
            if matters and value != getattr(self.run.config, field.name):
                names.append(f"{field.name}={value}")
        if names:
            run.out = self.run.out / "variants" / "-".join(names)
        return run

    def model(self, stage, changes=None):
        """The checkpoint of teacher, reward model or tilted teacher, with `changes` of Config."""
        built_on, config = {}, dataclasses.replace(self.run.config, **(changes or {}))
        if stage == "tilted":
            if not (config.tilted_steps and config.reward_weight):
                raise ractd.UserError("no tilted teacher without --tilted-steps, --reward-weight")
            built_on = {name: self.model(name, changes) for name in ("teacher", "reward")}
        run = self.variant([stage, *built_on], changes or {})
        return ractd.load_or_train(run, stage, self.batches, self.meta, built_on, self.make)

    def student(self, changes=None, teacher=None, name=""):
        """The checkpoint of the student with `changes` of Config.

        teacher: the checkpoint of another teacher than the run's, which is called `name`.
        """
        changes = changes or {}
        run = self.variant(STAGES, changes, name)
        built_on = {"teacher": teacher or self.model("teacher", changes)}
        if run.config.reward_weight:
            built_on["reward"] = self.model("reward", changes)
            if run.config.tilted_steps:
                built_on["tilted"] = teacher or self.model("tilted", changes)
        return ractd.load_or_train(run, "student", self.batches, self.meta, built_on, self.make)

    def score(self, checkpoint, changes=None):
        """The metrics of a model acting with `changes` of Config: from their file, or made now."""
        out, device = self.run.out, self.run.device
        config = dataclasses.replace(self.run.config, **(changes or {}))
        asked = {"weights": ractd.weights_id(checkpoint)}
        asked["calls"] = ractd.Policy(checkpoint, config, device, out).calls
        for field in dataclasses.fields(config):
            in_calls = field.name in ("nfe", "teacher_points")
            if "evaluate" in field.metadata["commands"] and not in_calls:
                asked[field.name] = getattr(config, field.name)
        for path in out.glob(f"score_*_{asked['weights']}_*.json"):
            metrics = read_json(path)
            if all(metrics.get(name) == value for name, value in asked.items()):
                print(f"{checkpoint['stage']}: score from {path}")
                return metrics
        return ractd.evaluate_and_report(checkpoint, config, out, device)


def in_turns(calls, turns=50, seconds=0.01):
    """{name: callable} -> {name: [median, interquartile range]} in ms, after warm-up.

    The calls take turns, each for about `seconds`: a machine that slows down slows them all alike.
    CUDA is waited for.
    """

    def once(call):
        began = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    repeats = {}
    for name, call in calls.items():
        shortest = min(once(call), once(call))
        repeats[name] = max(1, int(1000 * seconds / shortest))
    times = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name] += [once(call) for _ in range(repeats[name])]
    summary = {}
    for name, values in times.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        summary[name] = [float(median), float(high - low)]
    return summary


def mean_and_error(scores):
    """The mean of scores (n,) and its standard error, 0 for a single one."""
    sem = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return float(scores.mean()), float(sem)


def points(env, returns, data=None):
    """Returns of episodes -> (mean, standard error, unit): scores, or returns where there is none.

    data: what a checkpoint says of the data, for Minari's own scores.
    """
    results, unit = ractd.normalized_score(env, np.array(returns), data), "normalised score"
    if not np.isfinite(results).all():
        results, unit = np.array(returns), "return"
    return *mean_and_error(results), unit


def kept_score(name, about, run, act, data):
    """The numbers of acting: those kept in <out>/<name>_seeds<a>-<b>.json, or evaluated, and kept.

    about: all that decides or describes them, "episodes" and "first_seed" too; what is kept about
    anything else but "train_s" is made anew; act: as in `ractd.evaluate`; data: what a checkpoint
    says of the data.
    """
    about, first = {"env": run.env, "dataset": data} | about, about["first_seed"]
    path = run.out / f"{name}_seeds{first}-{first + about['episodes'] - 1}.json"
    kept = read_json(path)
    if all(kept.get(key) == value for key, value in about.items() if key != "train_s"):
        print(f"score from {path}")
        return kept | about
    print(f"evaluation: {about['episodes']} episodes, {path}", flush=True)
    began, make_env = time.perf_counter(), ractd.simulator(run.env, data)
    result = ractd.evaluate(act, make_env, about["episodes"], about["first_seed"])
    mean, sem, unit = points(run.env, result["returns"], data)
    result |= {"return_mean": float(np.mean(result["returns"])), "score_mean": mean}
    result |= {"score_sem": sem, "unit": unit, "evaluation_s": time.perf_counter() - began}
    write_json(path, about | result)
    return about | result


def file_label(label):
    """The label of a row of a table as a part of a file's name."""
    return label.replace(", ", "_").replace(" ", "_")


def data_label(env, dataset):
    """The title of a picture or table; dataset: what a checkpoint says of the data."""
    return f"{env} on\n{dataset['name']} ({dataset['source']})"


def read_json(path):
    """What `write_json` left there, {} if there is nothing; UserError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        what = "is damaged; delete it and give the same command again"
        raise ractd.UserError(f"{path} {what}") from None


def write_json(path, value):
    """Numbers as JSON, whole or not at all."""
    with ractd.replacing(path) as f:
        f.write(json.dumps(value, indent=2).encode())


def canvas(width, height, title, **options):
    """A figure of that many inches that needs no screen, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(**options)


def save_picture(figure, path):
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")
