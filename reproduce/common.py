"""What more than one of these programs needs: a run, its models and scores, tables, pictures."""

import argparse
import copy
import dataclasses
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import ractd

# Okabe and Ito's, for all eyes
COLORS = {
    "data": "#999999",
    "teacher": "#E69F00",
    "CTD": "#0072B2",
    "RACTD": "#D55E00",
    "behaviour cloning": "#56B4E9",
    "Diffuser": "#009E73",
    "Trajectory Diffuser": "#CC79A7",
}
# changes of Config that make the rows of the paper's Table 5
PLAIN = {"reward_teacher": False}
REWARD = {"reward_teacher": True}
CTD = {"reward_weight": 0.0}


# ---- Command lines -------------------------------------------------------------------------------


def make_parser(name, text):
    """The parser of `python -m reproduce.<name>`; text: the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m reproduce.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_run(parser, argv):
    """The checked run that the flags of `parser` and of `ractd.py distill` describe."""
    parser.epilog = "--env, and most other flags of `python ractd.py distill`, are taken, too."
    own, rest = parser.parse_known_args(argv)
    run = ractd.build_parser().parse_args(["distill", *rest], own)
    ractd.prepare(run)
    if run.config.episodes < 1:
        raise ractd.UserError("--episodes must be at least 1")
    run.out.mkdir(parents=True, exist_ok=True)
    return run


def parse_own(parser, config_class, argv, tasks=None, folder=""):
    """The checked run of a program whose settings are a dataclass of its own.

    Gives run.env, data, out, device, config and what else `parser` has. config_class: a dataclass
    of `ractd.option` fields, each a flag; tasks: {part of a task's name, in small letters: {field:
    its default there}}; folder: what is added to the default folder, runs/<env>. What `parser` has
    a default for already, --data for example, becomes no flag here.
    """
    for flag, how in ractd.RUN_FLAGS.items():
        if parser.get_default(flag.removeprefix("--")) is None:
            text = how["help"].replace("<env>", f"<env>{folder}")
            parser.add_argument(flag, **how | {"help": text})
    fields = dataclasses.fields(config_class)
    for field in fields:
        ractd.add_flag(parser, field)
    run = parser.parse_args(argv)
    default_folder = run.out is None

    # taken out of the run, where `ractd.prepare` would take them for Config's
    given = {field.name: vars(run).pop(field.name) for field in fields}
    ractd.prepare(run)
    if default_folder:
        run.out = run.out.with_name(run.out.name + folder)
    values = {}
    for task, defaults in (tasks or {}).items():
        if task in run.env.lower():
            values |= defaults
    for field in fields:
        value = given[field.name]
        if value is not None:
            values[field.name] = value
    run.config = config_class(**values)
    ractd.check_options(run.config)
    run.out.mkdir(parents=True, exist_ok=True)
    return run


def run_command(program, command):
    """Call command() -> exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    try:
        command()
    except (ractd.UserError, OSError, ImportError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from what is saved", file=sys.stderr)
        return 130
    return 0


def check_reward_weight(config):
    """UserError where what is called RACTD would be CTD."""
    if not config.reward_weight:
        raise ractd.UserError("--reward-weight must be more than 0; CTD is a row of its own")


# ---- Models and scores ---------------------------------------------------------------------------


def stages_up_to(stage, config):
    """A stage and those that it is built on, in the order of training."""
    return ractd.stages_of("distill" if stage == "student" else stage, config)


class Experiment:
    """The data of a run and models trained on them, each once; finished ones are not repeated.

    run: of `parse_run` or `parse_own`; batches, meta: of `ractd.load_data`. load, train, fields:
    what takes the place of that function, of `ractd.train_stage` and of `ractd.STAGE_FIELDS`. A
    model with other hyperparameters than the run's has a folder of its own, <out>/variants/<name>;
    the others lie in <out>.
    """

    def __init__(self, run, load=None, train=None, fields=None):
        self.run = run
        self.train = train or ractd.train_stage
        self.fields = fields or ractd.STAGE_FIELDS
        self.batches, self.meta = (load or ractd.load_data)(run)

    def variant(self, stages, changes):
        """The run with `changes` of its settings, in the folder of those that these stages read."""
        run = copy.copy(self.run)
        run.config = dataclasses.replace(self.run.config, **changes)
        names = []
        for name, value in changes.items():
            matters = any(name in self.fields[stage].split() for stage in stages)
            if matters and value != getattr(self.run.config, name):
                names.append(f"{name}={value}")
        if names:
            run.out = self.run.out / "variants" / "-".join(sorted(names))
        return run

    def model(self, stage, changes=None):
        """The checkpoint of reward, teacher or student with `changes` of the settings."""
        changes = changes or {}
        stages = stages_up_to(stage, dataclasses.replace(self.run.config, **changes))
        before = {name: self.model(name, changes) for name in stages[:-1]}
        run = self.variant(stages, changes)
        return self.train(run, stage, self.batches, self.meta, before)

    def score(self, checkpoint, changes=None):
        """The metrics of a model acting with `changes` of Config: from their file, or made now."""
        config = dataclasses.replace(self.run.config, **(changes or {}))
        student = checkpoint["stage"] == "student"
        asked = {"weights": ractd.weights_id(checkpoint)}
        asked["calls"] = config.nfe if student else 2 * config.teacher_points - 3
        for name in ("temperature", "episodes", "first_seed"):
            asked[name] = getattr(config, name)
        for path in self.run.out.glob(f"score_*_{asked['weights']}_*.json"):
            metrics = read_json(path)
            if all(metrics.get(name) == value for name, value in asked.items()):
                print(f"{metrics['method']}: score from {path}")
                return metrics
        return ractd.evaluate_and_report(checkpoint, config, self.run.out, self.run.device)


def load_weights(net, checkpoint, device):
    """`net` on the device with the averaged weights of a checkpoint, frozen."""
    net.load_state_dict(checkpoint["ema"])
    return net.to(device).eval().requires_grad_(False)


def window_starts(begins, ends, horizon):
    """First rows of all windows of `horizon` rows inside one episode, the last one too: (W,).

    begins, ends (E,): the episodes' first and last rows. For plans of states, where nothing can
    take the place of the states that follow an episode's end.
    """
    starts = [np.arange(0)]
    for begin, end in zip(begins, ends, strict=True):
        starts.append(np.arange(begin, max(begin, end - horizon + 2)))
    return np.concatenate(starts)


def acting_noise(generators, shape, device="cpu"):
    """N(0, 1) float32, each row from its own numpy Generator: (len(generators), *shape)."""
    rows = [generator.standard_normal(shape, np.float32) for generator in generators]
    return torch.from_numpy(np.stack(rows)).to(device)


def mean_and_error(scores):
    """The mean of scores (n,) and its standard error, 0 for a single one."""
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return float(scores.mean()), float(error)


def points(env, returns):
    """Returns of episodes -> (mean, standard error, unit): of scores, or of returns without one."""
    results = ractd.normalized_score(env, np.array(returns))
    unit = "normalised score"
    if not np.isfinite(results).all():
        results = np.array(returns)
        unit = "return"
    return *mean_and_error(results), unit


def kept_score(name, about, run, act, data):
    """The numbers of acting: those kept in <out>/<name>_seeds<a>-<b>.json, or evaluated, and kept.

    about: all that decides or describes them, "episodes" and "first_seed" too; what is kept about
    anything else but "train_s" is made anew; act: as in `ractd.evaluate`; data: what a checkpoint
    says of the data.
    """
    about = {"env": run.env, "dataset": data} | about
    episodes = about["episodes"]
    first = about["first_seed"]
    path = run.out / f"{name}_seeds{first}-{first + episodes - 1}.json"
    kept = read_json(path)
    if all(kept.get(key) == value for key, value in about.items() if key != "train_s"):
        print(f"score from {path}")
        return kept | about
    print(f"evaluation: {episodes} episodes, {path}", flush=True)
    began = time.perf_counter()
    result = ractd.evaluate(act, lambda: ractd.simulator(run.env), episodes, first)
    mean, error, unit = points(run.env, result["returns"])
    result["return_mean"] = float(np.mean(result["returns"]))
    result |= {"score_mean": mean, "score_sem": error, "unit": unit}
    result["evaluation_s"] = time.perf_counter() - began
    write_json(path, about | result)
    return about | result


def read_json(path):
    """What `write_json` left there, {} if there is nothing; UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        what = "is damaged; delete it and give the same command again"
        raise ractd.UserError(f"{path} {what}") from None


def write_json(path, value):
    """Numbers as JSON, whole or not at all."""
    ractd.write_file(path, json.dumps(value, indent=2).encode())


# ---- Time ----------------------------------------------------------------------------------------


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


def progress(label, total, unit="steps", seconds=10.0):
    """A callable tell(done), done >= 1, that prints every ten seconds how far a slow loop is."""
    began = time.monotonic()
    told = began

    def tell(done):
        nonlocal told
        now = time.monotonic()
        if now - told < seconds:
            return
        told = now
        speed = done / (now - began)
        left = datetime.timedelta(seconds=round(max(0, total - done) / speed))
        share = f"{done / total:4.0%} of {total:,} {unit}"
        print(f"{label}: {share}  {speed:.0f}/s  ETA {left}", flush=True)

    return tell


def device_name(device):
    """The processor's or graphics card's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return f"{name}, threads: {torch.get_num_threads()}"


# ---- Tables and pictures -------------------------------------------------------------------------


def plus_minus(mean, error):
    """A score and its standard error as a cell of a table."""
    return f"{mean:.1f} +- {error:.1f}"


def print_table(header, rows):
    """Print a table: header, a text for each column; rows of cells: texts, numbers, None for none.

    The first column is flush left, the others right; a float has one digit after the point.
    """

    def text(cell):
        if cell is None:
            return "-"
        return f"{cell:.1f}" if isinstance(cell, float) else str(cell)

    table = [header]
    for row in rows:
        table.append([text(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        print("  ".join(cells).rstrip())


def file_label(label):
    """The label of a row of a table as a part of a file's name."""
    return label.replace(", ", "_").replace(" ", "_")


def data_label(env, dataset):
    """The title of a picture or table; dataset: what a checkpoint says of the data."""
    return f"{env} on\n{dataset['name']} ({dataset['source']})"


def canvas(width, height, title, **options):
    """A figure of that many inches that needs no screen, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(**options)


def bar_chart(title, labels, values, colors, unit, data_mean):
    """A figure of a flat bar for each label, the mean of the data dashed, and its axis."""
    figure, axis = canvas(6, 1.5 + 0.32 * len(labels), title)
    axis.barh(range(len(labels)), values, color=colors, height=0.6)
    axis.axvline(data_mean, color=COLORS["data"], linestyle="--", label="mean of the data")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    return figure, axis


def save_picture(figure, path):
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")
