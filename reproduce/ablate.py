"""Table 5 and the appendix: rows of students that differ in one thing, scored side by side.

    python -m reproduce.ablate --env hopper-medium-replay --what losses --episodes 100

What rows have in common is trained once; the rest lies in <out>/variants. What is finished is not
repeated. Writes <out>/ablate_<what>.json and .png and prints the table.
"""

import dataclasses
import sys

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
    points,
    print_table,
    run_command,
    save_picture,
    write_json,
)

PAPER = "paper: hopper-medium-replay of D4RL, a plain teacher if not said otherwise"


@dataclasses.dataclass
class Row:
    """One row: label, changes of Config, the paper's score if it has one, the stage that acts."""

    label: str
    changes: dict
    paper: float | None = None
    actor: str = "student"


def ablations(config, env=""):
    """The rows of every ablation -> {what: [Row]}.

    The reward weights are multiples of the Config's own, as the paper's are of 1.
    """
    sigma = config.reward_weight
    published = ractd.ENVS[env][3] if env in ractd.ENVS else 1.0
    to_the_letter = ractd.PAPER_LOSSES | {"reward_weight": published}
    temperatures = []
    for label, teacher in (("teacher", PLAIN), ("reward teacher", REWARD)):
        for scale in (0.1, 0.25, 0.5, 1.0):
            changes = teacher | {"teacher_points": 10, "temperature": scale}
            row = Row(f"{label}, temperature {scale:g}", changes, actor="teacher")
            temperatures.append(row)
    for scale in (0.25, 1.0):
        changes = {"temperature": scale}
        temperatures.append(Row(f"RACTD, temperature {scale:g} (in training, too)", changes))
    return {
        "reward-stage": [
            Row("in neither (CTD)", PLAIN | CTD, 50.8),
            Row("in the teacher (CTD of a reward teacher)", REWARD | CTD, 109.5),
            Row("in the student (RACTD, plain teacher)", PLAIN, 109.5),
            Row("in both (RACTD)", REWARD, 96.0),
        ],
        "reward-weight": [
            Row("0", CTD, 50.8),
            Row("0.5 sigma", {"reward_weight": 0.5 * sigma}),
            Row("sigma", {}, 109.5),
            Row("2 sigma", {"reward_weight": 2.0 * sigma}, 17.0),
        ],
        "losses": [
            Row("all of them", {}, 109.5),
            Row("without CTM and trajectories", {"ctm_weight": 0.0}),
            Row("CTM without trajectories", {"trajectories": 0}),
            Row("without DSM", {"dsm_weight": 0.0}, 1.5),
            Row("without reward", CTD, 50.8),
            Row("Eqs. 4 and 7 to the letter", {"denoising": "paper"}),
        ],
        "reward-input": [
            Row("R of the one-call plan", to_the_letter | {"reward_input": "plan"}),
            Row("R of DSM's prediction", to_the_letter | {"reward_input": "dsm"}, 109.5),
        ],
        "nfe": [
            Row("1 network call", {"nfe": 1}, 109.5),
            Row("2 network calls", {"nfe": 2}, 109.8),
            Row("4 network calls", {"nfe": 4}, 107.9),
        ],
        "temperature": temperatures,
    }


def ablate(run):
    """The rows of run.what, measured -> JSON, table, picture."""
    if run.what != "reward-input":  # which has the published weight
        check_reward_weight(run.config)
    experiment = Experiment(run)
    config = run.config
    data = experiment.meta["dataset"]
    todo = ablations(config, run.env)[run.what]
    rows = []
    for i, row in enumerate(todo):
        print(f"\n== {run.what}, row {i + 1} of {len(todo)}: {row.label}", flush=True)
        model = experiment.model(row.actor, row.changes)
        metrics = experiment.score(model, row.changes)
        mean, error, unit = points(run.env, metrics["returns"])
        result = {"calls": metrics["calls"], "score": mean, "sem": error, "unit": unit}
        rows.append(dataclasses.asdict(row) | result | {"returns": metrics["returns"]})

    about = {"what": run.what, "env": run.env, "dataset": data, "seed": config.seed}
    about |= {"episodes": config.episodes, "first_seed": config.first_seed}
    path = run.out / f"ablate_{run.what}.json"
    write_json(path, about | {"rows": rows})
    title = (
        f"{run.what}: {data_label(run.env, data)}\n"
        f"{config.episodes} episodes from seed {config.first_seed}, training seed {config.seed}"
    )
    print(f"\n{title}")
    cells = [[row[key] for key in ("label", "calls", "score", "sem", "paper")] for row in rows]
    print_table(["", "calls", unit, "std. err.", PAPER], cells)
    print(f"All numbers: {path}")
    data_mean, _, _ = points(run.env, [data["return_mean"]])
    draw(rows, title, unit, data_mean, path.with_suffix(".png"))


def draw(rows, title, unit, data_mean, path):
    """A bar for every row, beside the paper's score and the mean of the data."""
    labels = [row["label"] for row in rows]
    scores = [row["score"] for row in rows]
    errors = [row["sem"] for row in rows]
    figure, axis = bar_chart(title, labels, scores, COLORS["RACTD"], unit, data_mean)
    axis.errorbar(scores, range(len(rows)), xerr=errors, fmt="none", color="black")
    if unit != "return":
        given = [i for i, row in enumerate(rows) if row["paper"] is not None]
        papers = [rows[i]["paper"] for i in given]
        axis.scatter(papers, given, marker="D", color=COLORS["CTD"], zorder=3, label=PAPER)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    save_picture(figure, path)


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("ablate", __doc__)
    choices = tuple(ablations(ractd.Config()))
    parser.add_argument("--what", required=True, choices=choices, help="the rows to measure")
    return run_command("ablate.py", lambda: ablate(parse_run(parser, argv)))


if __name__ == "__main__":
    sys.exit(main())
