"""The paper's figures, drawn for one run: pictures in the run's folder.

    python -m reproduce.figures --env hopper-medium-replay --what returns --episodes 100
    python -m reproduce.figures --env hopper-medium-replay --what training | video

returns     Figure 3: returns of the data's episodes, the plain teacher's, CTD's and RACTD's; trains
            and scores what is missing of them
training    the logged losses of the stages that lie there
video       the students of two run folders in the same episode (--first-seed), side by side, as
            GIF in real time: CTD's of --ctd, RACTD's of --out; the latter alone if there is no CTD.
            CTD's folder: `ractd.py distill --env ENV --no-reward-teacher --reward-weight 0 --out X`
"""

import io
import sys
from pathlib import Path

import numpy as np

import ractd
from reproduce.common import (
    COLORS,
    CTD,
    PLAIN,
    REWARD,
    Experiment,
    canvas,
    check_reward_weight,
    data_label,
    make_parser,
    parse_run,
    run_command,
    save_picture,
)

GIF_BYTES = 2_000_000  # of a video at most
SIDE = 200  # pixels of a picture in it
BAR = 16  # pixels of the text above
LINK_ERRORS = (ImportError, AttributeError, RuntimeError)  # of OpenGL libraries that are missing


def draw_returns(run):
    """returns.png: a histogram for each, the mean dotted."""
    check_reward_weight(run.config)
    experiment = Experiment(run)
    dataset = ractd.load_dataset(run.env, run.data)
    returns = np.add.reduceat(dataset.rewards.astype(np.float64), dataset.begins)
    rows = [("data", f"data: {len(returns):,} episodes", returns)]
    models = {
        "teacher": experiment.model("teacher", PLAIN),
        "CTD": experiment.model("student", PLAIN | CTD),
        "RACTD": experiment.model("student", REWARD),
    }
    for name, checkpoint in models.items():
        metrics = experiment.score(checkpoint)
        title = f"{name}: {run.config.episodes} episodes, "
        title += f"{metrics['calls']} network call(s) per plan"
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


def draw_training(run):
    """training.png: the logs of the stages, as their checkpoints hold them."""
    paths = {stage: run.out / f"{stage}.pt" for stage in ractd.STAGE_FIELDS}
    logs = {
        stage: ractd.load_checkpoint(path, stage)["log"]
        for stage, path in paths.items()
        if path.exists() or stage == "student"
    }
    figure, axes = canvas(3.25 * len(logs), 3.8, run.out.name, ncols=len(logs), squeeze=False)
    for (stage, rows), axis in zip(logs.items(), axes[0], strict=True):
        steps = [row["step"] for row in rows]
        for name in rows[0]:
            if name not in ("step", "steps", "steps_per_s"):
                axis.plot(steps, [row[name] for row in rows], label=name)
        axis.set(title=stage, xlabel="gradient steps", ylabel="mean since the last point")
        axis.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    save_picture(figure, run.out / "training.png")


def record(run, out):
    """The student in folder `out` acting one episode: (its name, return, pictures, ms of each)."""
    import mujoco
    from gymnasium.error import Error
    from gymnasium.wrappers import RenderCollection

    path = out / "student.pt"
    saved = ractd.load_checkpoint(path, "student")
    ractd.check_compatible(path, saved, {"env": run.env})
    how = {"temperature": run.temperature, "device": run.device}
    policy = ractd.Policy(saved, run.config.nfe, **how)
    options = {"render_mode": "rgb_array"}
    if run.env in ractd.ENVS and run.env != "door-human":  # this camera goes along with the body
        options |= {"width": SIDE, "height": SIDE, "camera_name": "track"}
    try:
        env = RenderCollection(ractd.simulator(run.env, **options), pop_frames=False)
        result = ractd.evaluate(policy.act, lambda: env, 1, run.config.first_seed)
    except (mujoco.FatalError, Error, *LINK_ERRORS) as error:
        hint = "set MUJOCO_GL=egl with a graphics driver, or osmesa after `apt install libosmesa6`"
        raise ractd.UserError(f"the simulator cannot draw here ({error}); {hint}") from None
    ms = 1000 / env.metadata["render_fps"]
    return ractd.method_name(saved), result["returns"][0], env.render(), ms


def draw_video(run):
    """episode.gif: the episode of each student, the shorter one's last picture held."""
    from PIL import Image, ImageDraw

    path = Path(run.file or run.out / "episode.gif")
    ctd = Path(run.ctd or run.out.with_name(run.out.name + "-ctd"))
    folders = [ctd, run.out] if run.ctd or ctd.exists() else [run.out]
    columns = []
    for folder in folders:
        name, total, pictures, ms = record(run, folder)
        print(f"{name}: an episode of {len(pictures) - 1} steps, return {total:.0f}")
        columns.append((f"{name}, return {total:.0f}", pictures))

    frames = []
    for step in range(max(len(pictures) for _, pictures in columns)):
        shown = [pictures[min(step, len(pictures) - 1)] for _, pictures in columns]
        frame = Image.fromarray(np.pad(np.hstack(shown), ((BAR, 0), (0, 0), (0, 0))))
        draw = ImageDraw.Draw(frame)
        for i, (text, _) in enumerate(columns):
            draw.text((4 + i * shown[0].shape[1], 2), text, "white")
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    ractd.write_file(path, small_gif(frames, ms))
    print(f"video: {path}")


def small_gif(frames, ms, limit=GIF_BYTES):
    """A GIF of pictures `ms` apart, at most 30 a second, or fewer for at most `limit` bytes."""
    skip = max(1, round(1000 / 30 / ms))
    while True:
        first, *others = frames[::skip]
        buffer = io.BytesIO()
        how = {"duration": ms * skip, "loop": 0}
        first.save(buffer, "GIF", save_all=True, append_images=others, **how)
        if buffer.tell() <= limit or not others:
            return buffer.getvalue()
        skip += 1


FIGURES = {"returns": draw_returns, "training": draw_training, "video": draw_video}


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("figures", __doc__)
    parser.add_argument("--what", required=True, choices=FIGURES, help="the picture to draw")
    parser.add_argument("--file", help="of the video (default: <out>/episode.gif)")
    parser.add_argument("--ctd", help="CTD's run folder, for the video (default: <out>-ctd)")

    def draw():
        run = parse_run(parser, argv)
        FIGURES[run.what](run)

    return run_command("figures.py", draw)


if __name__ == "__main__":
    sys.exit(main())
