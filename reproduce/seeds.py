"""Several training seeds of the default on one data set, and what RACTD is made of beside them.

    python -m reproduce.seeds --env hopper-medium-replay --seeds 0 1 2 --episodes 100

Each seed has a run folder of its own, <out>/seed<s>; what is finished is not repeated. RACTD by
one, two and four calls and as the best of 4 and 16 candidates for every seed; teacher, tilted
teacher (both by Heun's method, 10 points) and CTD for the first one. Writes <out>/seeds.json and
.png and prints the table.
"""

import copy
import dataclasses
import sys

import numpy as np

from reproduce.common import (
    COLORS,
    Experiment,
    canvas,
    data_label,
    make_parser,
    parse_run,
    points,
    run_command,
    save_picture,
    write_json,
)

CTD, HEUN = {"reward_weight": 0.0}, {"teacher_points": 10}
ROWS = (  # label, who acts, changes of Config, for all seeds
    ("teacher", "teacher", HEUN, False),
    ("tilted teacher", "tilted", HEUN, False),
    ("CTD", "student", CTD, False),
    ("RACTD", "student", {}, True),
    ("RACTD, 2 calls", "student", {"nfe": 2}, True),
    ("RACTD, 4 calls", "student", {"nfe": 4}, True),
    ("RACTD, best of 4", "student", {"candidates": 4}, True),
    ("RACTD, best of 16", "student", {"candidates": 16}, True),
)


def measure(run):
    """{label: [metrics of each seed]}, and what the checkpoints say of the data."""
    found = {label: [] for label, *_ in ROWS}
    for seed in run.seeds:
        one = copy.copy(run)
        one.config, one.out = dataclasses.replace(run.config, seed=seed), run.out / f"seed{seed}"
        experiment = Experiment(one)
        for label, actor, changes, all_seeds in ROWS:
            if all_seeds or seed == run.seeds[0]:
                print(f"\n== seed {seed}: {label}", flush=True)
                student = actor == "student"
                model = experiment.student(changes) if student else experiment.model(actor)
                found[label].append(experiment.score(model, changes))
    return found, experiment.meta["dataset"]


def seeds(run):
    """Measure, write the JSON, print the table, draw it."""
    found, data = measure(run)
    rows, unit = [], ""
    for label, metrics in found.items():
        scores = []
        for one in metrics:
            mean, sem, unit = points(run.env, one["returns"], data)
            scores.append((mean, sem))
        means = [mean for mean, _ in scores]
        row = {"label": label, "calls": metrics[0]["calls"], "scores": scores}
        row |= {"mean": float(np.mean(means)), "worst": min(means)}
        rows.append(row | {"returns": [one["returns"] for one in metrics]})
    path, config = run.out / "seeds.json", run.config
    about = {"env": run.env, "dataset": data, "unit": unit, "seeds": run.seeds}
    about |= {"episodes": config.episodes, "first_seed": config.first_seed}
    write_json(path, {**about, "rows": rows})
    title = f"{data_label(run.env, data)}\n{config.episodes} episodes from seed {config.first_seed}"
    print(f"\n{title}\n{'':20}calls   mean  worst   {unit} of each training seed, +- std. err.")
    for row in rows:
        each = ", ".join(f"{mean:.1f} +- {sem:.1f}" for mean, sem in row["scores"])
        print(f"{row['label']:20}{row['calls']:5}{row['mean']:7.1f}{row['worst']:7.1f}   {each}")
    print(f"All numbers: {path}")
    figure, axis = canvas(5, 3, title)
    for i, row in enumerate(rows):
        color = COLORS.get(row["label"].split(",")[0], COLORS["teacher"])
        axis.barh(i, row["mean"], color=color, height=0.6)
        axis.plot([mean for mean, _ in row["scores"]], [i] * len(row["scores"]), "k.")
    mean = points(run.env, [data["return_mean"]], data)[0]
    axis.axvline(mean, color=COLORS["data"], linestyle="--", label="mean of the data")
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"{unit}; bar: mean, dots: training seeds")
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
