"""Table 5 and the appendix: rows of students that differ in one thing, scored side by side.

    python -m reproduce.ablate --env hopper-medium-replay --what losses --episodes 100

Teacher and reward model are shared, students lie in <out>/variants; what is finished is not
repeated. Writes <out>/ablate_<what>.json and .png and prints the table.
"""

import dataclasses
import sys

import torch

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

    actor: "student" or "teacher", who acts; teacher: "plain", or "reward" for `reward_teacher`.
    """

    label: str
    changes: dict = dataclasses.field(default_factory=dict)
    paper: float | None = None
    actor: str = "student"
    teacher: str = "plain"


def ablations(config):
    """The rows of every ablation -> {what: [Row]}.

    The reward weights are multiples of the Config's own, as the paper's are of 1.
    """
    sigma, ctd = config.reward_weight, {"reward_weight": 0.0}
    return {
        "reward-stage": [
            Row("teacher plain, student plain (CTD)", ctd, 50.8),
            Row("teacher with reward, student plain", ctd, 109.5, teacher="reward"),
            Row("teacher with reward, student with reward", {}, 96.0, teacher="reward"),
            Row("teacher plain, student with reward (RACTD)", {}, 109.5),
        ],
        "reward-weight": [
            Row("no reward (CTD)", ctd, 50.8),
            Row("0.1 of the default sigma", {"reward_weight": 0.1 * sigma}),
            Row("0.3 of the default sigma", {"reward_weight": 0.3 * sigma}),
            Row("0.5 of the default sigma", {"reward_weight": 0.5 * sigma}),
            Row("0.7 of the default sigma", {"reward_weight": 0.7 * sigma}, 108.4),
            Row("the default sigma", {}, 109.5),
            Row("1.5 of the default sigma", {"reward_weight": 1.5 * sigma}, 50.5),
            Row("2 of the default sigma", {"reward_weight": 2.0 * sigma}, 17.0),
        ],
        "losses": [
            Row("all three", {}, 109.5),
            Row("without CTM", {"ctm_weight": 0.0}),
            Row("without DSM", {"dsm_weight": 0.0}, 1.5),
            Row("without reward (CTD)", ctd, 50.8),
            Row("without the anchor", {"anchor_weight": 0.0}),
            Row("DSM of G(x_t, t, 0), Eq. 7", {"dsm_target": "jump"}),
        ],
        "nfe": [
            Row("1 network call", {"nfe": 1}, 109.5),
            Row("2 network calls", {"nfe": 2}, 109.8),
            Row("4 network calls", {"nfe": 4}, 107.9),
        ],
        "init-noise": [
            Row(f"{actor}, noise {scale:g}", {"init_noise": scale}, actor=actor)
            for actor in ("teacher", "student")
            for scale in (1.0, 5.0, 20.0, 80.0)
        ],
    }


def reward_teacher(experiment):
    """The teacher's checkpoint, fine-tuned on Eq. 4 + sigma Eq. 8 for as long as a student is.

    R sees the first action of D(x_t, t), the estimate of the clean plan that Eq. 4 makes anyway.
    """
    run, batches, meta = experiment.run, experiment.batches, experiment.meta
    teacher, reward = (experiment.model(stage) for stage in ("teacher", "reward"))
    schedule = ("steps", "lr", "warmup")
    tuned = {f"teacher_{name}": getattr(run.config, f"student_{name}") for name in schedule}
    config = dataclasses.replace(run.config, **tuned)
    distance = ractd.pseudo_huber if config.distance == "pseudo-huber" else ractd.squared
    net = ractd.make_unet(config, meta["dims"]).to(run.device)
    net.load_state_dict(teacher["ema"])
    reward_model = ractd.RewardModel(*meta["dims"]).to(run.device)
    reward_model.load_state_dict(reward["ema"])
    reward_model.eval().requires_grad_(False)

    def loss_fn(net, _):
        state, x0 = batches.windows(config.teacher_batch)
        estimates = []

        def denoiser(x, t):
            estimates.append(ractd.denoise(net, x, t, state))
            return estimates[0]

        t, noise = ractd.lognormal_levels(len(x0), run.device), torch.randn_like(x0)
        plain = ractd.edm_loss(denoiser, x0, t, noise, distance)
        reward = ractd.reward_loss(reward_model, state, estimates[0][:, 0])
        info = {"edm": plain.detach(), "R": -reward.detach()}
        return plain + config.reward_weight * reward, info

    built_on = {"teacher": ractd.weights_id(teacher), "reward": ractd.weights_id(reward)}
    recipe = tuned | built_on | {"batch": config.teacher_batch, "seed": config.seed}
    recipe |= {"reward_weight": config.reward_weight}
    path = run.out / "variants" / "reward-teacher" / "teacher.pt"
    if path.exists():
        saved = ractd.load_checkpoint(path, "teacher", run.device)
        ractd.check_compatible(path, saved["recipe"], recipe)
    torch.manual_seed(config.seed)
    meta = {**meta, "recipe": recipe, "config": dataclasses.asdict(config)}
    ractd.fit("teacher", net, loss_fn, config, path, meta)
    return ractd.load_checkpoint(path, "teacher", run.device)


def measure(experiment, row):
    """The metrics of one row, its models trained if they are not there."""
    if row.actor == "teacher":
        return experiment.score(experiment.model("teacher", row.changes), row.changes)
    if row.teacher == "reward":
        teacher = reward_teacher(experiment)
        student = experiment.student(row.changes, teacher, "reward-teacher")
    else:
        student = experiment.student(row.changes)
    return experiment.score(student, row.changes)


def ablate(run):
    """The rows of run.what, measured -> JSON, table, picture."""
    experiment, config = Experiment(run), run.config
    todo, rows = ablations(config)[run.what], []
    for i, row in enumerate(todo):
        print(f"\n== {run.what}, row {i + 1} of {len(todo)}: {row.label}", flush=True)
        metrics = measure(experiment, row)
        mean, sem, unit = points(run.env, metrics["returns"])
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
    draw(rows, title, points(run.env, [data["return_mean"]])[0], path.with_suffix(".png"))


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
