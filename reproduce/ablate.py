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

PAPER = "paper, on D4RL's hopper-medium-replay"


@dataclasses.dataclass
class Row:
    """One row: label, changes of Config, the paper's score if it has one.

    actor: who acts, "student", "teacher" or "tilted"; teacher: the student's, "" for the usual one.
    """

    label: str
    changes: dict = dataclasses.field(default_factory=dict)
    paper: float | None = None
    actor: str = "student"
    teacher: str = ""


def ablations(config):
    """The rows of every ablation -> {what: [Row]}.

    The reward weights are multiples of the Config's own, as the paper's are of 1.
    """
    sigma, ctd, heun = config.reward_weight, {"reward_weight": 0.0}, {"teacher_points": 10}
    gradient = {"tilted_steps": 0, "reward_actions": 1, "reward_weight": 0.5}
    return {
        "reward-stage": [
            Row("teacher plain, student plain (CTD)", ctd, 50.8),
            Row("teacher tilted, student plain", ctd, 109.5, teacher="tilted"),
            Row("teacher tilted, student tilted (RACTD)", {}, 96.0),
            Row("teacher plain, student tilted", {}, 109.5, teacher="teacher"),
            Row("Eq. 8 in place of the tilt, its sigma 0.5", gradient),
        ],
        "reward-weight": [
            Row("no reward (CTD)", ctd, 50.8),
            Row("0.5 of the default sigma", {"reward_weight": 0.5 * sigma}),
            Row("the default sigma", {}, 109.5),
            Row("2 of the default sigma", {"reward_weight": 2.0 * sigma}, 17.0),
        ],
        "losses": [
            Row("all three", {}, 109.5),
            Row("without CTM and whole paths", {"ctm_weight": 0.0}),
            Row("CTM without whole paths", {"path_batch": 0}),
            Row("without DSM", {"dsm_weight": 0.0}, 1.5),
            Row("without reward (CTD)", ctd, 50.8),
            Row("DSM of G(x_t, t, 0), Eq. 7", {"dsm_target": "jump"}),
        ],
        "reward-target": [
            Row("return-to-go, of 4 actions", {}),
            Row("return-to-go, of 1 action (paper)", {"reward_actions": 1}),
            Row("td, of 4 actions", {"reward_target": "td"}),
        ],
        "nfe": [
            Row("1 network call", {"nfe": 1}, 109.5),
            Row("2 network calls", {"nfe": 2}, 109.8),
            Row("4 network calls", {"nfe": 4}, 107.9),
        ],
        "candidates": [
            Row(f"{label}, best of {n} by R", changes | {"candidates": n})
            for label, changes in (("CTD", ctd), ("RACTD", {}))
            for n in (1, 4, 16)
        ],
        "temperature": [
            Row(f"{actor}, temperature {scale:g}", heun | {"temperature": scale}, actor=actor)
            for actor in ("teacher", "tilted")
            for scale in (0.1, 0.25, 0.5, 1.0)
        ]
        + [
            Row(f"RACTD, temperature {scale:g} (in training, too)", {"temperature": scale})
            for scale in (0.25, 1.0)
        ],
    }


def measure(experiment, row):
    """The metrics of one row, its models trained if they are not there."""
    if row.actor != "student":
        return experiment.score(experiment.model(row.actor, row.changes), row.changes)
    teacher = experiment.model(row.teacher) if row.teacher else None
    name = f"teacher={row.teacher}" if row.teacher else ""
    return experiment.score(experiment.student(row.changes, teacher, name), row.changes)


def ablate(run):
    """The rows of run.what, measured -> JSON, table, picture."""
    experiment, config = Experiment(run), run.config
    todo, rows = ablations(config)[run.what], []
    for i, row in enumerate(todo):
        print(f"\n== {run.what}, row {i + 1} of {len(todo)}: {row.label}", flush=True)
        metrics = measure(experiment, row)
        mean, sem, unit = points(run.env, metrics["returns"], experiment.meta["dataset"])
        result = {"calls": metrics["calls"], "score": mean, "sem": sem, "unit": unit}
        rows.append(dataclasses.asdict(row) | result | {"returns": metrics["returns"]})
    data, path = experiment.meta["dataset"], run.out / f"ablate_{run.what}.json"
    about = {"what": run.what, "env": run.env, "dataset": data, "seed": config.seed}
    about |= {"episodes": config.episodes, "first_seed": config.first_seed}
    write_json(path, {**about, "rows": rows})
    title = (
        f"{run.what}: {data_label(run.env, data)}\n"
        f"{config.episodes} episodes from seed {config.first_seed}, training seed {config.seed}"
    )
    print(f"\n{title}\n{'':44}calls{rows[0]['unit']:>18}  std. err.   {PAPER}")
    for row in rows:
        paper = "" if row["paper"] is None else row["paper"]
        print(f"{row['label']:44}{row['calls']:5}{row['score']:18.1f}{row['sem']:11.1f}{paper:>8}")
    print(f"All numbers: {path}")
    draw(rows, title, points(run.env, [data["return_mean"]], data)[0], path.with_suffix(".png"))


def draw(rows, title, data_mean, path):
    """A bar for every row, beside the paper's score and the mean of the data."""
    figure, axis = canvas(6, 1.5 + 0.32 * len(rows), title)
    unit, labels = rows[0]["unit"], [row["label"] for row in rows]
    scores, sems = [row["score"] for row in rows], [row["sem"] for row in rows]
    axis.barh(labels, scores, xerr=sems, color=COLORS["RACTD"], height=0.6)
    given = [row for row in rows if row["paper"] is not None and unit != "return"]
    if given:
        x, y = [row["paper"] for row in given], [row["label"] for row in given]
        axis.scatter(x, y, marker="D", color=COLORS["CTD"], zorder=3, label=PAPER)
    axis.axvline(data_mean, color=COLORS["data"], linestyle="--", label="mean of the data")
    axis.invert_yaxis()
    axis.set_xlabel(unit)
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
