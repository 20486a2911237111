"""Several training seeds on one data set: RACTD, and what it is made of beside it.

    python -m reproduce.seeds --env hopper-medium-replay --seeds 0 1 2 --episodes 100

Each seed has a run folder of its own, <out>/seed<s>; what is finished is not repeated. Teachers act
by Heun's method with 10 points. Writes <out>/seeds.json and .png and prints the table.
"""

import copy
import dataclasses
import sys

import numpy as np

import ractd
from reproduce.common import (
    COLORS,
    CTD,
    PLAIN,
    REWARD,
    Experiment,
    bar_chart,
    check_reward_weight,
    data_label,
    make_parser,
    parse_run,
    plus_minus,
    points,
    print_table,
    run_command,
    save_picture,
    write_json,
)

HEUN = {"teacher_points": 10}
ROWS = {  # label -> who acts, changes of Config
    "teacher": ("teacher", PLAIN | HEUN),
    "reward teacher": ("teacher", REWARD | HEUN),
    "CTD": ("student", PLAIN | CTD),
    "CTD of a reward teacher": ("student", REWARD | CTD),
    "RACTD": ("student", REWARD),
    "RACTD, 2 calls": ("student", REWARD | {"nfe": 2}),
    "RACTD, 4 calls": ("student", REWARD | {"nfe": 4}),
    "RACTD, plain teacher": ("student", PLAIN),
}
FAMILIES = ("RACTD", "CTD", "teacher")  # each with a colour


def measure(run):
    """{label: [metrics of each seed]}, and what the checkpoints say of the data."""
    found = {label: [] for label in ROWS}
    for seed in run.seeds:
        one = copy.copy(run)
        one.config = dataclasses.replace(run.config, seed=seed)
        one.out = run.out / f"seed{seed}"
        experiment = Experiment(one)
        for label, (actor, changes) in ROWS.items():
            print(f"\n== seed {seed}: {label}", flush=True)
            model = experiment.model(actor, changes)
            found[label].append(experiment.score(model, changes))
    return found, experiment.meta["dataset"]


def seeds(run):
    """Measure, write the JSON, print the table, draw it."""
    config = run.config
    if len(set(run.seeds)) < len(run.seeds) or not 0 <= min(run.seeds) <= max(run.seeds) < 2**63:
        raise ractd.UserError("--seeds must be different numbers from 0 to 2^63 - 1")
    if run.seed is not None:
        raise ractd.UserError("--seed: give --seeds, which may be one")
    check_reward_weight(config)
    found, data = measure(run)
    rows = []
    for label, metrics in found.items():
        results = [points(run.env, one["returns"]) for one in metrics]
        means = [mean for mean, _, _ in results]
        row = {"label": label, "calls": metrics[0]["calls"]}
        row["scores"] = [(mean, error) for mean, error, _ in results]
        row["mean"] = float(np.mean(means))
        row["worst"] = min(means)
        row["returns"] = [one["returns"] for one in metrics]
        rows.append(row)

    unit = results[0][2]
    about = {"env": run.env, "dataset": data, "unit": unit, "seeds": run.seeds}
    about |= {"episodes": config.episodes, "first_seed": config.first_seed}
    path = run.out / "seeds.json"
    write_json(path, about | {"rows": rows})
    title = f"{data_label(run.env, data)}\n{config.episodes} episodes from seed {config.first_seed}"
    print(f"\n{title}; {unit}")
    header = ["", "calls", "mean", "worst", *(f"seed {seed}" for seed in run.seeds)]
    table = []
    for row in rows:
        each = [plus_minus(*score) for score in row["scores"]]
        table.append([row["label"], row["calls"], row["mean"], row["worst"], *each])
    print_table(header, table)
    print(f"All numbers: {path}")
    data_mean, _, _ = points(run.env, [data["return_mean"]])
    draw(rows, title, f"{unit}; bar: mean, dots: training seeds", data_mean, path)


def draw(rows, title, unit, data_mean, path):
    """A bar for every row, a dot for every seed."""
    labels = [row["label"] for row in rows]
    families = [next(name for name in FAMILIES if name in label) for label in labels]
    colors = [COLORS[name] for name in families]
    means = [row["mean"] for row in rows]
    figure, axis = bar_chart(title, labels, means, colors, unit, data_mean)
    for i, row in enumerate(rows):
        axis.plot([mean for mean, _ in row["scores"]], [i] * len(row["scores"]), "k.")
    axis.legend(fontsize=7)
    save_picture(figure, path.with_suffix(".png"))


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("seeds", __doc__)
    text = "training seeds, a run each, in place of --seed (default: 0 1 2)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help=text)
    return run_command("seeds.py", lambda: seeds(parse_run(parser, argv)))


if __name__ == "__main__":
    sys.exit(main())
