"""The paper's figures, drawn for one run: pictures in the run's folder.

    python -m reproduce.figures --env hopper-medium-replay --what returns --episodes 100
    python -m reproduce.figures --env hopper-medium-replay --what speed | training | video

returns     Figure 3: returns of the data's episodes, the teacher's, CTD's and RACTD's; trains and
            scores what is missing of them
speed       score against time per action, from the bench.json of `python -m reproduce.bench`
training    every logged value of the four stages
video       the first episode of the student (--first-seed) as GIF, in real time
"""

import json
import sys
from pathlib import Path

import numpy as np

import ractd
from reproduce.common import (
    COLORS,
    STAGES,
    Experiment,
    canvas,
    data_label,
    make_parser,
    parse_run,
    read_json,
    run_command,
    save_picture,
)


def draw_returns(run):
    """returns.png: a histogram for each, the mean dotted."""
    experiment, episodes = Experiment(run), run.config.episodes
    dataset = ractd.load_dataset(run.env, run.data)
    returns = np.add.reduceat(dataset.rewards.astype(np.float64), dataset.begins)
    rows = [("data", f"data: {len(returns):,} episodes", returns)]
    models = {
        "teacher": experiment.model("teacher"),
        "CTD": experiment.student({"reward_weight": 0.0}),
        "RACTD": experiment.student(),
    }
    for name, checkpoint in models.items():
        metrics = experiment.score(checkpoint)
        title = f"{name}: {episodes} episodes, {metrics['calls']} network call(s) per plan"
        rows.append((name, title, metrics["returns"]))
    bins = np.histogram_bin_edges(np.concatenate([values for *_, values in rows]), 40)
    title = data_label(run.env, experiment.meta["dataset"])
    figure, axes = canvas(4.5, 5, title, nrows=len(rows), sharex=True)
    for axis, (name, title, values) in zip(axes, rows, strict=True):
        percent = np.full(len(values), 100 / len(values))
        axis.hist(values, bins, weights=percent, color=COLORS[name])
        axis.axvline(np.mean(values), color="black", linestyle=":")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("% of them", fontsize=8)
    axes[-1].set_xlabel("return of an episode (dotted: mean)")
    save_picture(figure, run.out / "returns.png")


def draw_speed(run):
    """speed.png: score against milliseconds per action, a point for every row of bench.json."""
    path = run.out / "bench.json"
    measured = read_json(path)
    if not measured.get("score"):
        command = f"python -m reproduce.bench --env {run.env} --episodes 20"
        raise ractd.UserError(f"no scores in {path}; first give: {command}")
    title = data_label(run.env, measured["dataset"])
    title += f"\n{measured['episodes']} episodes; {measured['device']}"
    figure, axis = canvas(4.5, 3.4, title)
    labelled = set()
    for name, (mean, sem, _) in measured["score"].items():
        actor, ms = name.split("_")[0], measured["action_ms"][name]
        color = COLORS["teacher" if actor == "teacher" else "RACTD"]
        label = None if actor in labelled else actor
        labelled.add(actor)
        axis.errorbar(ms, mean, sem, fmt="o", capsize=3, color=color, label=label)
        calls = measured["calls"][name]
        axis.annotate(calls, (ms, mean), (5, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.12)
    axis.legend()
    axis.set(xscale="log", xlabel="ms per action, one at a time")
    _, _, unit = next(iter(measured["score"].values()))
    axis.set_ylabel(f"{unit} (number: network calls)", fontsize=9)
    save_picture(figure, run.out / "speed.png")


def draw_training(run):
    """training.png: what <out>/<stage>.jsonl has of the stages."""
    paths = {stage: run.out / f"{stage}.jsonl" for stage in STAGES}
    if not paths["student"].exists():
        raise ractd.UserError(f"no {paths['student']}: `ractd.py distill` trains what is missing")
    paths = {stage: path for stage, path in paths.items() if path.exists()}
    figure, axes = canvas(3.25 * len(paths), 3.8, run.out.name, ncols=len(paths), squeeze=False)
    for (stage, path), axis in zip(paths.items(), axes[0], strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [row["step"] for row in rows]
        for name in rows[0]:
            if name not in ("step", "steps", "grad", "steps_per_s"):
                axis.plot(steps, [row[name] for row in rows], label=name)
        axis.set(title=stage, xlabel="gradient steps", ylabel="mean since the last point")
        axis.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    save_picture(figure, run.out / "training.png")


def record(policy, make_env, config):
    """Act one episode -> (its pictures, seconds between two of them)."""
    import mujoco
    from gymnasium.error import Error
    from gymnasium.wrappers import RenderCollection

    try:  # each of OpenGL's ways to be missing has its own type
        env = RenderCollection(make_env(), pop_frames=False)
        ractd.evaluate(policy.act, lambda: env, 1, config.first_seed)
    except (mujoco.FatalError, Error, ImportError, AttributeError, RuntimeError) as error:
        hint = "set MUJOCO_GL=egl with a graphics driver, or osmesa after `apt install libosmesa6`"
        raise ractd.UserError(f"the simulator cannot draw here ({error}); {hint}") from None
    return env.render(), 1 / env.metadata["render_fps"]


def draw_video(run):
    """One episode of the saved student as a GIF of about 30 pictures a second."""
    from PIL import Image

    path = Path(run.file or run.out / "episode.gif")
    saved = ractd.load_checkpoint(run.out / "student.pt", "student", run.device)
    asked = {"env": run.env, "plan": "actions"}
    ractd.check_compatible(run.out / "student.pt", {"plan": "actions"} | saved, asked)
    if run.temperature is None:  # not given: as it was trained for
        run.config.temperature = saved["config"]["temperature"]
    policy = ractd.Policy(saved, run.config, run.device, run.out)
    make = ractd.simulator(run.env, saved["dataset"])
    options = {"render_mode": "rgb_array"}
    if run.env in ractd.ENVS:  # this camera goes along with the body
        options |= {"width": 240, "height": 240, "camera_name": "track"}
    frames, seconds = record(policy, lambda: make(**options), run.config)
    skip = max(1, round(1 / 30 / seconds))
    first, *others = [Image.fromarray(frame) for frame in frames[::skip]]
    with ractd.replacing(path) as f:
        duration = 1000 * skip * seconds  # ms
        first.save(f, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    print(f"{path}: an episode of {len(frames) - 1} steps")


def draw_walls(axis, maze):
    """The maze from above: walls, D4RL's goal."""
    height, width = maze.walls.shape
    extent = (-width / 2, width / 2, -height / 2, height / 2)
    axis.imshow(maze.walls, cmap="Greys", extent=extent, vmax=2)
    axis.plot(*maze.fixed_goal, "*", color="black", markersize=9)
    axis.set(xticks=[], yticks=[])


def draw_maze(result, maze, path):
    """Ten plans of each planner in the maze, and what was driven; result: that of maze2d.json."""
    rows = [row for row in result["rows"] if "plans" in row]  # not the data's controller
    title = f"{result['maze']}: plans of {result['horizon']} states (colour), driven (black)"
    high, wide = maze.walls.shape
    size = 3 * len(rows), 3 * high / wide + 0.4
    figure, axes = canvas(*size, title, ncols=len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        draw_walls(axis, maze)
        for plan, driven in zip(row["plans"], row["driven"], strict=True):
            axis.plot(*np.transpose(plan), color=COLORS[row["label"].split(",")[0]], linewidth=1)
            axis.plot(*np.transpose(driven), color="black", linewidth=0.5)
            axis.plot(*plan[0], "k.", markersize=4)
        text = f"{row['label']}: {row['calls']} call(s), score {row['single']['score_mean']:.0f}"
        axis.set_title(text, fontsize=8)
    save_picture(figure, path)


def animate_maze(row, maze, path):
    """The first episode of a row of maze2d.json as a GIF in real time: the plan, and the drive."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axis = canvas(3, 3.2, f"{maze.name}: {row['label']}, plan (colour) and drive")
    draw_walls(axis, maze)
    axis.plot(*np.transpose(row["plans"][0]), color=COLORS["RACTD"], linewidth=1)
    driven, skip = np.array(row["driven"][0]), 10  # steps of 10 ms in a picture
    (trail,) = axis.plot([], [], color="black", linewidth=1)
    (ball,) = axis.plot([], [], "o", color="black")

    def show(step):
        trail.set_data(*driven[: step + 1].T)
        ball.set_data(*driven[step : step + 1].T)

    animation = FuncAnimation(figure, show, range(0, len(driven), skip))
    animation.save(path, PillowWriter(fps=100 // skip))
    print(f"{path}: an episode of {len(driven)} steps")


FIGURES = {
    "returns": draw_returns,
    "speed": draw_speed,
    "training": draw_training,
    "video": draw_video,
}


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("figures", __doc__)
    parser.add_argument("--what", required=True, choices=FIGURES, help="the picture to draw")
    parser.add_argument("--file", help="of the video (default: <out>/episode.gif)")

    def draw():
        run = parse_run(parser, argv)
        FIGURES[run.what](run)

    return run_command("figures.py", draw)


if __name__ == "__main__":
    sys.exit(main())
