"""Pictures of plans in a maze: plans beside what was driven, and a drive as a GIF."""

import numpy as np

from reproduce.common import COLORS, canvas, save_picture

STEP_MS = 10  # simulated time of one step
STEPS_PER_PICTURE = 10  # of a GIF


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
    figure, axes = canvas(
        3 * len(rows), 3 * high / wide + 0.4, title, ncols=len(rows), squeeze=False
    )
    for axis, row in zip(axes[0], rows, strict=True):
        draw_walls(axis, maze)
        color = COLORS[row["label"].split(",")[0]]
        for plan, driven in zip(row["plans"], row["driven"], strict=True):
            axis.plot(*np.transpose(plan), color=color, linewidth=1)
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
    driven = np.array(row["driven"][0])
    (trail,) = axis.plot([], [], color="black", linewidth=1)
    (ball,) = axis.plot([], [], "o", color="black")

    def show(step):
        trail.set_data(*driven[: step + 1].T)
        ball.set_data(*driven[step : step + 1].T)

    animation = FuncAnimation(figure, show, range(0, len(driven), STEPS_PER_PICTURE))
    animation.save(path, PillowWriter(fps=1000 // (STEP_MS * STEPS_PER_PICTURE)))
    print(f"{path}: an episode of {len(driven)} steps")
