"""RACTD: Reward-Aware Consistency Trajectory Distillation (arXiv 2506.07822v2, ICLR 2026).

A diffusion planner that needs one network call per action, learnt from logged data alone:

    data --> reward   R(s, a)      return-to-go of a state and the actions taken there    Eq. 8
    data --> teacher  D(x, t)      EDM diffusion of the next H actions, given the state   Eq. 4
             (by default on windows that R weights: a "reward teacher")
    teacher, reward --> student  G(x, t, k)     CTM + DSM + reward losses              Eqs. 5-9
    student --> one call per action, closed loop in MuJoCo, D4RL's normalised score

    python ractd.py distill --env hopper-medium-replay     all of it: minutes on two CPU cores
    python ractd.py --help                                 its steps one by one

Notation
    t > u >= k   noise levels, one per sample (B,) or one float for all; i_t < i_u <= i_k their
                 indices in the grid T = 80 = sigma_0 > ... > sigma_{N-1} = 0.02, the paper's "0"
    x0, x_t      a clean and a noisy plan: H actions, (B, H, A), scaled to [-1, 1]
    state        s_n in the paper, an observation (B, S = O), scaled to [-1, 1]
    D, g         denoisers of teacher and student, F the network in them; G the student's jump

Sections 3 to 6 are the paper's method, in its order, and need little more than torch; section 7
holds what the default adds to it. README.md has a table of both.
"""

import argparse
import copy
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn, optim

# ---- 1. Configuration ----------------------------------------------------------------------------

SIGMA_MIN = 0.02  # the paper's "0"
SIGMA_MAX = 80.0  # T
SIGMA_DATA = 0.5  # Karras et al. 2022

# D4RL's tasks: simulator, the returns that are scores 0 (random) and 100 (expert), and the
# published sigma of Eq. 9 for each kind of data
KINDS = ("medium", "medium-replay", "medium-expert")
TASKS = {
    "hopper": ("Hopper-v4", -20.272305, 3234.3, (1.0, 1.0, 0.5)),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3, (0.4, 0.5, 0.2)),
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0, (0.5, 1.0, 0.0)),
}
ENVS = {
    f"{task}-{kind}": (*row, weight)
    for task, (*row, weights) in TASKS.items()
    for kind, weight in zip(KINDS, weights, strict=True)
}
ENVS["door-human"] = ("gymnasium_robotics:AdroitHandDoor-v1", -56.512833, 2880.5693, 1.0)

NETWORKS = {  # the U-Net's size; patch: actions folded into one of its positions
    "small": {"channels": (64, 128), "kernel": 3, "blocks": 1, "patch": 4},
    "paper": {"channels": (512, 1024, 2048), "kernel": 5, "blocks": 2, "patch": 1},
}


class UserError(Exception):
    """Something that the user can put right: printed as one sentence, exit code 2."""


def option(default, help, low=None, high=10**9, choices=None):
    """A field of Config, which is a command-line flag with this help and range, too."""
    metadata = {"help": help, "range": (low, high), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(config):
    """Raise UserError if one of these options is none of its choices or out of its range."""
    for field in dataclasses.fields(config):
        low, high = field.metadata["range"]
        choices = field.metadata["choices"]
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: must be one of {', '.join(choices)}")
        if low is not None and not low <= value <= high:
            raise UserError(f"{flag} {value}: must be in {low} to {high}")


@dataclasses.dataclass
class Config:
    """Hyperparameters of training and acting; presets change some of the defaults."""

    seed: int = option(0, "seed of all training", 0)
    horizon: int = option(16, "H, c in the paper: the number of actions in a plan", 1, 1024)
    network: str = option("small", "size of the U-Net", choices=NETWORKS)
    denoising: str = option(
        "mean",
        "mean: squared errors, Eq. 7 on g(x_t, t, t); paper: pseudo-Huber, on G(x_t, t, 0)",
        choices=("mean", "paper"),
    )
    teacher_steps: int = option(8000, "gradient steps of the teacher", 1)
    teacher_batch: int = option(128, "plans in a teacher step", 1)
    teacher_lr: float = option(1e-3, "peak learning rate of the teacher", 1e-9, 1)
    reward_teacher: bool = option(True, "weight the teacher's windows by their advantage under R")
    reward_steps: int = option(3000, "gradient steps of the reward model R", 1)
    reward_batch: int = option(256, "transitions in a step of R", 1)
    reward_lr: float = option(1e-3, "peak learning rate of R", 1e-9, 1)
    reward_actions: int = option(4, "how many of a plan's first actions R sees", 1)
    reward_networks: int = option(4, "the number of networks whose mean is R", 1, 64)
    gamma: float = option(0.99, "discount of the return-to-go", 0, 0.9999)
    student_steps: int = option(1000, "gradient steps of the student", 1)
    student_batch: int = option(64, "plans in a student step", 1)
    student_lr: float = option(1e-3, "peak learning rate of the student", 1e-9, 1)
    grid_points: int = option(20, "N: noise levels in the grid of t, u and k", 3)
    ctm_weight: float = option(1.0, "alpha of Eq. 9", 0)
    dsm_weight: float = option(1.0, "beta of Eq. 9", 0)
    reward_weight: float = option(0.3, "sigma of Eq. 9; 0: CTD; presets: as published", 0)
    reward_input: str = option(
        "plan",
        "what R sees in Eq. 8: the one-call plan, or DSM's prediction at every noise level",
        choices=("plan", "dsm"),
    )
    trajectories: int = option(192, "teacher trajectories in a student step; 0: none", 0)
    temperature: float = option(0.25, "scale of the acting noise; evaluate: as trained", 0)
    nfe: int = option(1, "network calls of the student per plan", 1, 80)
    teacher_points: int = option(20, "n: points of Heun's method, 2 n - 3 calls", 3)
    episodes: int = option(20, "number of evaluation episodes; distill: 0 for none", 0)
    first_seed: int = option(0, "episode i has the seed first_seed + i", 0)

    def __post_init__(self):
        check_options(self)
        size = NETWORKS[self.network]
        multiple = size["patch"] * 2 ** (len(size["channels"]) - 1)
        if self.horizon % multiple:
            raise UserError(f"--horizon {self.horizon}: must be a multiple of {multiple}")
        if self.reward_actions > self.horizon:
            raise UserError(f"--reward-actions {self.reward_actions}: more than --horizon")


# the fields that decide what each stage learns; its checkpoint records them
BOTH = "seed horizon network denoising reward_teacher"
STAGE_FIELDS = {
    "reward": "seed reward_steps reward_batch reward_lr reward_actions reward_networks gamma",
    "teacher": f"{BOTH} teacher_steps teacher_batch teacher_lr",
    "student": f"{BOTH} student_steps student_batch student_lr grid_points ctm_weight dsm_weight "
    "reward_weight reward_input trajectories temperature",
}

# Eqs. 4 to 9 as the paper writes them, but for README.md's "where paper and code differ"
PAPER_LOSSES = {"denoising": "paper", "reward_teacher": False, "trajectories": 0}
PAPER_LOSSES |= {"reward_actions": 1, "reward_networks": 1, "temperature": 1.0}
# the published sizes, and as many steps as on hopper-medium-replay
PAPER = PAPER_LOSSES | {"network": "paper", "grid_points": 80}
PAPER |= {"teacher_steps": 392_000, "teacher_batch": 1024, "teacher_lr": 1e-4}
PAPER |= {"reward_steps": 314_000, "reward_batch": 64, "reward_lr": 2e-4}
PAPER |= {"student_steps": 33_500, "student_batch": 4800, "student_lr": 1e-4}
PRESETS = {"default": {}, "paper-losses": PAPER_LOSSES, "paper": PAPER}

# ---- 2. Data: logged episodes -> windows of H actions, and returns-to-go -------------------------

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ASSETS = Path(__file__).parent / "assets"
DOOR = "hand_dapg/door-v0_demos_clipped.hdf5"  # D4RL's own, also among ASSETS, CC BY 4.0
BUNDLED = ASSETS / "hopper-medium-replay-sac.hdf5"  # where D4RL's cannot be downloaded


class Dataset:
    """Logged transitions, one row each, episode after episode: N rows, E episodes; or UserError.

    observations (N, O), actions (N, A), rewards (N,): float32; begins, ends (E,): first and last
    rows; terminated (E,): ended by the task, not by a time limit or the file's end.
    """

    KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")

    def __init__(self, name, source, columns):
        self.name = name
        self.source = source
        columns = [np.asarray(x, np.float32) for x in columns]
        rows = columns[2].size
        for key, x in zip(self.KEYS, columns, strict=True):
            dims = 2 if key in ("observations", "actions") else 1
            if x.ndim != dims or len(x) != rows or not np.isfinite(x).all():
                raise UserError(f"{name}: {key}, shape {x.shape}: not {rows} finite rows, {dims}-D")
        self.observations, self.actions, self.rewards, terminals, timeouts = columns
        self.dims = [self.observations.shape[1], self.actions.shape[1]]
        ends = np.flatnonzero(terminals + timeouts)
        if not len(ends):
            raise UserError(f"{name}: no episode ends; terminals and timeouts are all false")
        self.ends = np.union1d(ends, rows - 1)  # the file's end is treated as a time limit
        self.begins = np.concatenate([[0], self.ends[:-1] + 1])
        self.terminated = terminals[self.ends] != 0

    def summary(self):
        """Name, counts, mean and best return and a fingerprint, as plain values."""
        returns = np.add.reduceat(self.rewards.astype(np.float64), self.begins)
        columns = (self.observations, self.actions, self.rewards, self.ends, self.terminated)
        return {
            "name": self.name,
            "source": self.source,
            "sha256": hashlib.sha256(b"".join(x.tobytes() for x in columns)).hexdigest(),
            "transitions": len(self.rewards),
            "episodes": len(self.ends),
            "return_mean": float(returns.mean()),
            "return_best": float(returns.max()),
        }


def load_dataset(env, data=""):
    """The Dataset of --data, else D4RL's of `env`, else the bundled one, or UserError."""
    if data.startswith("minari:"):
        return read_minari(data.removeprefix("minari:"))
    if data:
        return read_hdf5(Path(data), "from --data")
    if env not in ENVS:
        raise UserError(f"--env {env} is none of {', '.join(ENVS)}: give --data FILE, too")
    where = DOOR if env == "door-human" else f"gym_mujoco_v2/{env.replace('-', '_')}-v2.hdf5"
    path = ASSETS / Path(where).name
    if not path.exists():
        folder = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
        path = Path(os.path.expanduser(folder)) / path.name
    if path.exists() or download(D4RL_URL + where, path):
        # files there have been replaced once: a score is printed with its file's version
        version = hashlib.sha256(path.read_bytes()).hexdigest()
        return read_hdf5(path, f"D4RL, version {version[:8]}")
    if env != "hopper-medium-replay" or not BUNDLED.exists():
        recipe = f"make it by D4RL's recipe, python -m reproduce.collect --env {env}"
        raise UserError(f"no data for {env}: put the file at {path}, give --data FILE, or {recipe}")
    print(f"In its place: {BUNDLED.name}, of one SAC run: not comparable with the paper's.")
    return read_hdf5(BUNDLED, "bundled, not D4RL's")


def download(url, path):
    """Fetch a file -> True, or False without a network; UserError if the server fails."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            size = int(answer.headers["Content-Length"] or 0) / 1e6
            print(f"{path} is missing; downloading {size:.0f} MB from {url}", flush=True)
            write_file(path, answer.read())  # which raises if the answer is cut off
    except Exception as error:  # of the network, HTTP or the file system
        if type(error) is not urllib.error.URLError:  # no network, in all its forms
            raise UserError(f"{url} cannot be downloaded ({error}); give --data FILE") from None
        print(f"{path} is missing and cannot be downloaded ({error.reason}).")
        return False
    return True


def read_hdf5(path, source):
    """A file in D4RL's layout: Dataset.KEYS, one row a step."""
    import h5py

    try:
        with h5py.File(path) as f:
            columns = [np.asarray(f[key][()], np.float32) for key in Dataset.KEYS]
    except Exception as error:  # of h5py, numpy or the file system
        layout = f"an HDF5 file with the arrays {', '.join(Dataset.KEYS)}"
        raise UserError(f"{path} cannot be read as {layout} ({error})") from None
    return Dataset(path.name, source, columns)


def read_minari(dataset_id):
    """A Minari dataset with Box actions: local, or by Minari's download."""
    import minari

    rows = []
    try:
        stored = minari.load_dataset(dataset_id, download=True)
        for e in stored.iterate_episodes():
            # there is one observation more than actions: the last one, on which nobody acted
            observations = flat(e.observations, len(e) + 1)[:-1]
            last = np.arange(len(e)) == len(e) - 1
            actions = flat(e.actions, len(e))
            rows.append((observations, actions, e.rewards, e.terminations, last))
        columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    except Exception as error:  # whatever a network library raises, too
        hint = "Box spaces? network? pip install 'minari[hf,gcs]'?"
        raise UserError(f"minari:{dataset_id} cannot be read ({error!r}); {hint}") from error
    made_in = stored.env_spec.id if stored.env_spec else "no environment that it names"
    return Dataset(dataset_id, f"Minari, made in {made_in}", columns)


def flat(observation, rows):
    """An array, or a dict or tuple of them side by side, a dict's by their names: (rows, O)."""
    if isinstance(observation, dict):
        observation = tuple(observation[key] for key in sorted(observation))
    if isinstance(observation, tuple):
        return np.concatenate([flat(x, rows) for x in observation], axis=1)
    return np.reshape(observation, (rows, -1))


def returns_to_go(rewards, begins, ends, terminated, gamma=0.99):
    """Discounted sum of rewards (N,) from each row to its episode's end: (N,) float64.

    Nothing follows a termination. After a time limit the mean of the last 100 rewards goes on for
    ever, mean / (1 - gamma): to cut there, as released, makes states near step 1000 look bad.
    """
    result = rewards.astype(np.float64)
    for begin, end, fell in zip(begins, ends, terminated, strict=True):
        last = result[max(begin, end - 99) : end + 1]
        following = 0.0 if fell else last.mean() / (1 - gamma)
        for row in range(end, begin - 1, -1):
            result[row] += gamma * following
            following = result[row]
    return result


def fit_range(x):
    """Rows (N, D) -> the table (2, D), centre and half range, that maps them to [-1, 1]."""
    low = x.amin(0)
    high = x.amax(0)
    # a column that varies by less than float32 can tell is constant: its half range is 0
    varies = high - low > 1e-6 * torch.maximum(low.abs(), high.abs())
    half = torch.where(varies, (high - low) / 2, 0.0)
    return torch.stack([torch.where(varies, low + half, x[0]), half])


def encode(x, table):
    """Raw (..., D) -> normalised (..., D), clamped to three times the range of the data."""
    centre, half = table
    return torch.where(half > 0, (x - centre) / half, 0.0).clamp(-3, 3)


def decode(x, table):
    """Normalised (..., D) -> raw (..., D)."""
    centre, half = table
    return x * half + centre


class Batches:
    """A dataset as normalised tensors on the device, where batches are drawn."""

    def __init__(self, dataset, horizon=16, gamma=0.99, device="cpu"):
        go = returns_to_go(dataset.rewards, dataset.begins, dataset.ends, dataset.terminated, gamma)
        raw = {"obs": dataset.observations, "action": dataset.actions, "return": go[:, None]}
        raw = {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in raw.items()}
        self.normalizer = {name: fit_range(x) for name, x in raw.items()}
        self.obs = encode(raw["obs"], self.normalizer["obs"])  # (N, O)
        self.actions = encode(raw["action"], self.normalizer["action"])  # (N, A)
        self.returns_to_go = encode(raw["return"], self.normalizer["return"]).squeeze(1)  # (N,)
        lengths = dataset.ends - dataset.begins + 1
        # the last row of each row's episode, (N,)
        self.lasts = torch.tensor(np.repeat(dataset.ends, lengths), device=device)
        self.horizon = horizon
        self.dims = dataset.dims

    def rows(self, rows, count):
        """States (B, O) of rows (B,), the `count` actions from there (B, count, A)."""
        # an episode's last action is repeated, so that states before a fall start windows, too
        chunk = rows[:, None] + torch.arange(count, device=rows.device)
        return self.obs[rows], self.actions[torch.minimum(chunk, self.lasts[rows, None])]

    def windows(self, batch, sums=None):
        """Windows: state (B, O), plan x0 (B, H, A); sums (N,): rows' cumulative weights or None."""
        if sums is None:
            drawn = torch.randint(len(self.obs), (batch,), device=self.obs.device)
        else:
            quantiles = sums[-1] * torch.rand(batch, dtype=sums.dtype, device=sums.device)
            drawn = torch.searchsorted(sums, quantiles, right=True).clamp(max=len(sums) - 1)
        return self.rows(drawn, self.horizon)

    def transitions(self, batch, count):
        """Random rows: state (B, O), the next actions (B, count, A), return-to-go (B,)."""
        drawn = torch.randint(len(self.obs), (batch,), device=self.obs.device)
        return *self.rows(drawn, count), self.returns_to_go[drawn]


# ---- 3. Network: a temporal U-Net, its blocks scaled and shifted by a condition (FiLM) -----------


def expand(t):
    """Noise levels (B,) -> (B, 1, 1), to multiply plans (B, H, A); a float stays a float."""
    return t[:, None, None] if torch.is_tensor(t) else t


class TemporalConv(nn.Linear):
    """Convolution over time (B, L, C_in) -> (B, L, C_out), LayerNorm, SiLU."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__(kernel * c_in, c_out)
        self.kernel = kernel
        self.norm = nn.LayerNorm(c_out)

    def forward(self, x):
        # one matrix product over shifted copies: for short plans faster than the CPU's convolution
        padded = nn.functional.pad(x, (0, 0, self.kernel // 2, self.kernel // 2))
        shifted = torch.cat([padded[:, i : i + x.shape[1]] for i in range(self.kernel)], dim=2)
        return nn.functional.silu(self.norm(super().forward(shifted)))


class ResidualBlock(nn.Module):
    """Two temporal convolutions and a skip; in between a scale and a shift (FiLM)."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.first = TemporalConv(c_in, c_out, kernel)
        self.second = TemporalConv(c_out, c_out, kernel)
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, scale, shift):
        """x (B, L, C_in); scale, shift (B, 1, C_out) -> (B, L, C_out)."""
        y = torch.addcmul(shift, self.first(x), 1 + scale)
        return self.second(y) + self.skip(x)


class UNet1d(nn.Module):
    """The network F, a U-Net over a plan: x (B, H, A), t, state (B, S), k -> (B, H, A).

    t, and for a student k: noise levels, floats or (B,). H must be a multiple of
    patch * 2^(levels - 1): `patch` actions become one position, and each level halves those.
    """

    def __init__(
        self, plan_dim, state_dim, channels=(64, 128), kernel=3, blocks=1, patch=4, student=False
    ):
        super().__init__()
        self.patch = patch
        waves = min(2 * channels[0], 256)
        condition = 2 * waves
        frequencies = 250 * 10_000 ** -torch.linspace(0, 1, waves // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.level_in = nn.Linear(2 * waves if student else waves, condition)  # t; a student: t, k
        self.level = nn.Sequential(nn.SiLU(), nn.Linear(condition, condition))
        self.state = nn.Linear(state_dim, condition)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(condition, condition), nn.SiLU())
        self.film_sizes = []  # a scale and a shift for each block, in the order of forward

        def stack(count, c_in, c_out):
            self.film_sizes.extend(2 * count * [c_out])
            sizes = [(c_in, c_out)] + (count - 1) * [(c_out, c_out)]
            return nn.ModuleList(ResidualBlock(*size, kernel) for size in sizes)

        widths = (patch * plan_dim, *channels)
        self.down = nn.ModuleList()
        for above, width in itertools.pairwise(widths[:-1]):
            halve = nn.Linear(2 * width, width)  # two positions -> one
            self.down.append(nn.ModuleList([stack(blocks, above, width), halve]))
        self.middle = stack(2 * blocks, *widths[-2:])
        self.up = nn.ModuleList()
        for below, width in itertools.pairwise(reversed(channels)):
            double = nn.Linear(below, 2 * width)  # one position -> two
            self.up.append(nn.ModuleList([double, stack(blocks, 2 * width, width)]))
        self.film = nn.Linear(condition, sum(self.film_sizes))
        self.out = nn.Linear(channels[0], widths[0])

    def embed(self, *levels):
        """Noise levels t, for a student t and k, floats or (B,) -> (1 or B, condition)."""
        like = self.frequencies
        levels = [torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in levels]
        levels = torch.broadcast_tensors(*levels)
        angles = [x.log().reshape(-1, 1) * like for x in levels]
        waves = [wave(x) for x in angles for wave in (torch.sin, torch.cos)]
        return self.level(self.level_in(torch.cat(waves, dim=1)))

    def forward(self, x, t, state, k=None, embedding=None):
        if embedding is None:  # a Policy, whose levels are few, keeps theirs
            embedding = self.embed(t) if k is None else self.embed(t, k)
        condition = self.condition(embedding + self.state(state))
        films = iter(self.film(condition)[:, None].split(self.film_sizes, dim=2))

        y = x.reshape(x.shape[0], -1, self.patch * x.shape[2])  # (B, H / patch, patch A)
        skips = []
        for blocks, halve in self.down:
            for block in blocks:
                y = block(y, next(films), next(films))
            skips.append(y)
            y = halve(y.reshape(y.shape[0], y.shape[1] // 2, -1))
        for block in self.middle:
            y = block(y, next(films), next(films))
        for double, blocks in self.up:
            y = double(y).reshape(y.shape[0], 2 * y.shape[1], -1)
            y = torch.cat([y, skips.pop()], dim=2)
            for block in blocks:
                y = block(y, next(films), next(films))
        return self.out(y).reshape(x.shape)


def warm_start(student, teacher):
    """Give a student the teacher's weights; what reads k starts at 0: the teacher, whatever k."""
    weights = teacher.state_dict()
    of_t = weights["level_in.weight"]
    weights["level_in.weight"] = torch.cat([of_t, torch.zeros_like(of_t)], dim=1)
    student.load_state_dict(weights)


# ---- 4. EDM teacher (RACTD Eq. 4; Karras et al. 2022) --------------------------------------------


def karras_sigmas(n=80, smin=SIGMA_MIN, smax=SIGMA_MAX, rho=7.0):
    """The noise grid, descending from smax to smin: (n,) float64 (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (smax ** (1 / rho) + ramp * (smin ** (1 / rho) - smax ** (1 / rho))) ** rho
    return sigmas.round(decimals=12)  # no rounding error at the ends


def lognormal_levels(batch, device="cpu", mean=-1.2, std=1.2, smin=SIGMA_MIN, smax=SIGMA_MAX):
    """Teacher noise t (B,): ln t ~ N(mean, std^2), truncated (released: 1.2 % lie below smin)."""
    normal = torch.distributions.Normal(mean, std, validate_args=False)
    low, high = normal.cdf(torch.tensor([smin, smax]).log()).tolist()
    quantile = low + (high - low) * torch.rand(batch, device=device)
    return normal.icdf(quantile).exp().clamp(smin, smax)


def precondition(t, smin=SIGMA_MIN, sigma_data=SIGMA_DATA):
    """c_skip, c_out, c_in of Karras et al. 2022 at levels t, like t: floats or (B,)."""
    # shifted by smin, as consistency models want it: c_skip = 1 and c_out = 0 there
    root = (t**2 + sigma_data**2) ** 0.5
    c_skip = sigma_data**2 / ((t - smin) ** 2 + sigma_data**2)
    c_out = (t - smin) * sigma_data / root
    return c_skip, c_out, 1 / root


def denoise(net, x, t, state, k=None, smin=SIGMA_MIN):
    """The teacher's denoiser D(x, t), or the student's g(x, t, k), made of the network F.

    x (B, H, A), t, k floats or (B,), state (B, S) -> the clean plan (B, H, A); at smin x itself.
    """
    c_skip, c_out, c_in = precondition(t, smin)
    return expand(c_skip) * x + expand(c_out) * net(expand(c_in) * x, t, state, k)


def heun_step(denoiser, x, t, u, smin=SIGMA_MIN):
    """Eq. 6's Solver, a step of Heun's method (Karras et al. 2022, Alg. 1) from t to u < t.

    denoiser: callable (x, t) -> x0; x (B, H, A); t, u floats or (B,). A step down to smin is
    Euler's: there D(x, smin) = x, so that the second slope would be 0 and halve the step.
    """
    slope = (x - denoiser(x, t)) / expand(t)  # dx/dt
    euler = x + expand(u - t) * slope
    slope_u = (euler - denoiser(euler, u)) / expand(u)
    second_order = u > smin
    return euler + expand(0.5 * (u - t) * second_order) * (slope_u - slope)


@torch.no_grad()
def heun_sample(denoiser, x, sigmas):
    """Solve the ODE: x (B, H, A) at sigmas[0] -> x at smin, by 2 n - 3 calls of the denoiser.

    denoiser: callable (x, t) -> x0, t a float; sigmas (n,): descending, the last one smin.
    """
    *levels, smin = sigmas.tolist()
    for t, u in itertools.pairwise(levels):
        x = heun_step(denoiser, x, t, u, smin)
    slope = (x - denoiser(x, levels[-1])) / levels[-1]
    return x + (smin - levels[-1]) * slope


def squared(a, b):
    """Mean over the elements of the squared error: (B, ...) -> (B,). Its minimiser is the mean."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a, b, c=0.00054):
    """sqrt(||a - b||^2 + dim c^2) - sqrt(dim) c: (B, ...) -> (B,) (Song, Dhariwal 2023).

    Its minimiser is the geometric median. (Released: sqrt(e^4 + c^2) - c per element, about e^2.)
    """
    error = (a - b).flatten(1)
    c = c * math.sqrt(error.shape[1])
    return (error.square().sum(1) + c**2).sqrt() - c


def edm_weight(t, sigma_data=SIGMA_DATA):
    """Loss weight of Karras et al. 2022, about 1 / c_out^2: (B,) -> (B,)."""
    return (t**2 + sigma_data**2) / (t * sigma_data) ** 2


def edm_loss(denoiser, x0, t, noise, distance=squared):
    """Eq. 4: w(t) d(x0, D(x0 + t noise, t)), mean over the batch -> scalar.

    denoiser: callable (x, t) -> x0; x0, noise (B, H, A); t (B,). The ODE needs the mean, `squared`.
    """
    x_t = x0 + expand(t) * noise
    return (edm_weight(t) * distance(denoiser(x_t, t), x0)).mean()


# ---- 5. Reward model (RACTD Eq. 8): the return-to-go of a state and the actions taken there ------


def mlp(c_in, width=256):
    """Two hidden layers, (B, c_in) -> (B,). (Released: three widths of residual blocks.)"""
    first = nn.Linear(c_in, width), nn.LayerNorm(width), nn.SiLU()
    second = nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
    return nn.Sequential(*first, *second, nn.Linear(width, 1), nn.Flatten(0))


class RewardModel(nn.Module):
    """R: state (B, S), plan (B, H, A) -> the return-to-go (B,), scaled to [-1, 1].

    The mean of `networks` networks that see a plan's first `actions`; the paper has one of each.
    V: state (B, S) -> its soft value (B,), which section 7 alone uses.
    """

    def __init__(self, state_dim, action_dim, actions=1, networks=1):
        super().__init__()
        self.actions = actions
        width = state_dim + actions * action_dim
        self.networks = nn.ModuleList(mlp(width) for _ in range(networks))
        self.V = mlp(state_dim)

    def each(self, state, plan):
        """What each of the networks says: (networks, B)."""
        x = torch.cat([state, plan[:, : self.actions].flatten(1)], dim=1)
        return torch.stack([network(x) for network in self.networks])

    def forward(self, state, plan):
        return self.each(state, plan).mean(0)


# ---- 6. CTM student and its losses (RACTD Eqs. 5-9; Kim et al. 2024) -----------------------------


def student_jump(net, x, t, k, state):
    """G(x, t, k) = (k/t) x + (1 - k/t) g(x, t, k), Eq. 6's jump from t to k <= t in one call.

    x (B, H, A); t, k floats or (B,); state (B, S) -> (B, H, A): x if k = t, nearly g if k is small.
    """
    g = denoise(net, x, t, state, k)
    return torch.lerp(g, x, expand(k / t))


def draw_jumps(batch, sigmas):
    """Grid levels t > u >= k, (B,) each: i_u ~ U{1..N-1}, i_t = i_u - 1, i_k ~ U{i_u..N-1}."""
    n = len(sigmas)
    i_u = torch.randint(1, n, (batch,), device=sigmas.device)
    i_k = i_u + (torch.rand(batch, device=sigmas.device) * (n - i_u)).long()
    return sigmas[i_u - 1], sigmas[i_u], sigmas[i_k]


def ctm_loss(jump, frozen_jump, denoiser, x_t, t, u, k, smin=SIGMA_MIN, distance=pseudo_huber):
    """Eqs. 5 and 6: the student's jump t -> k against the teacher's step t -> u and a jump u -> k.

    jump, frozen_jump: G_theta and G_sg(theta), callables (x, t, k) -> x; the weights of the second
    are frozen, while the gradient passes through it. denoiser: the teacher's D, callable
    (x, t) -> x0. x_t (B, H, A); t > u >= k, (B,) each. -> scalar
    """
    zero = torch.full_like(k, smin)
    x_hat = jump(x_t, t, k)  # Eq. 6, left: G_theta(x_t, t, k)
    estimate = frozen_jump(x_hat, k, zero)  # Eq. 5, left: carried on to 0
    with torch.no_grad():
        x_u = heun_step(denoiser, x_t, t, u, smin)  # Eq. 6, right: Solver(x_t, t, u; phi)
        x_k = frozen_jump(x_u, u, k)  # Eq. 6, right: G_sg(x_u, u, k)
        target = frozen_jump(x_k, k, zero)  # Eq. 5, right: carried on to 0
    return distance(estimate, target).mean()


def dsm_loss(prediction, x0, t, distance=squared):
    """Eq. 7: w(t) d(x0, prediction of x0 from x_t), mean over the batch -> scalar.

    prediction (B, H, A). --denoising mean: g(x_t, t, t), the student as a denoiser (Kim et al.
    2024), with the squared error; paper: G(x_t, t, 0), Eq. 7 to the letter, with pseudo-Huber: its
    minimiser is a median of all plans, where Eq. 5 asks for the end of one ODE path.
    """
    return (edm_weight(t) * distance(prediction, x0)).mean()


def reward_loss(reward_model, state, plan):
    """Eq. 8: -R(s_n, a_n), mean over the batch -> scalar.

    reward_model: callable, state (B, S), plan (B, H, A) -> (B,). The plan is clipped to the range
    of the data, as R has seen no other.
    """
    return -reward_model(state, plan.clamp(-1, 1)).mean()


def distillation_loss(student, target, teacher, reward_model, state, x0, config):
    """Eq. 9: alpha L_CTM + beta L_DSM + sigma L_Reward, on one batch -> (loss, {name: tensor}).

    student, target, teacher: networks, the last two frozen; reward_model: callable
    (state, plan) -> (B,), None for CTD. state (B, S), x0 (B, H, A); config: Config.
    """
    jump = lambda x, t, k: student_jump(student, x, t, k, state)
    frozen_jump = lambda x, t, k: student_jump(target, x, t, k, state)
    denoiser = lambda x, t: denoise(teacher, x, t, state)

    # Eqs. 5 and 6: CTM
    sigmas = karras_sigmas(config.grid_points).to(x0)
    t, u, k = draw_jumps(len(x0), sigmas)
    x_t = x0 + expand(t) * torch.randn_like(x0)
    ctm = ctm_loss(jump, frozen_jump, denoiser, x_t, t, u, k)

    # Eq. 7: DSM
    t = lognormal_levels(len(x0), x0.device)
    x_t = x0 + expand(t) * torch.randn_like(x0)
    if config.denoising == "paper":
        prediction = jump(x_t, t, torch.full_like(t, SIGMA_MIN))  # G(x_t, t, 0)
        dsm = dsm_loss(prediction, x0, t, pseudo_huber)
    else:
        prediction = denoise(student, x_t, t, state, k=t)  # g(x_t, t, t)
        dsm = dsm_loss(prediction, x0, t)

    # Eq. 8: reward, of Eq. 7's prediction (released), or of the one-call plan (the paper's text)
    info = {"ctm": ctm.detach(), "dsm": dsm.detach()}
    reward = 0.0
    if reward_model is not None:
        plan = prediction
        if config.reward_input == "plan":
            x_T = config.temperature * SIGMA_MAX * torch.randn_like(x0)
            plan = jump(x_T, SIGMA_MAX, SIGMA_MIN)
        reward = reward_loss(reward_model, state, plan)
        info["R"] = -reward.detach()

    # Eq. 9
    loss = config.ctm_weight * ctm + config.dsm_weight * dsm + config.reward_weight * reward
    return loss, info


@torch.no_grad()
def student_sample(jump, x_T, sigmas, nfe=1, noise=torch.randn_like):
    """xhat_0 = G(x_T, T, 0), the policy's one network call; optionally nfe - 1 refinements.

    jump: callable (x, t, k) -> x, t and k floats; x_T (B, H, A): noise of scale T, or cooler;
    sigmas (n,); noise: callable, x -> N(0, 1) like x, or cooler. Refinement i starts at
    sigmas[ceil(i n / nfe)].
    """
    *levels, smin = sigmas.tolist()
    x = jump(x_T, levels[0], smin)
    for i in range(1, nfe):
        t = levels[min(math.ceil(i * len(sigmas) / nfe), len(levels) - 1)]
        x = jump(x + math.sqrt(t**2 - smin**2) * noise(x), t, smin)
    return x


# ---- 7. Beyond the paper: advantage weights for the teacher, trajectories for the student --------
# Undone by --no-reward-teacher and --trajectories 0. What else the default adds are settings:
# --reward-networks, --reward-actions, --temperature, --denoising; README.md says why.

ADVANTAGE_SCALE = 40.0  # of returns-to-go that are scaled to [-1, 1]; one for all data
TRAJECTORIES = 16_384  # of the teacher, solved before the student's training


def advantage_weight(reward, value, scale=ADVANTAGE_SCALE, cap=5.0):
    """exp(scale (R - V)), at most exp(cap): the weight of a plan x0 in state s (AWR; IQL).

    reward, value (B,): R(s, x0) and V(s) = log E[exp(scale R) | s] / scale -> (B,), mean 1 in each
    state. But for the cap, plans drawn so have the density p(x0 | s) exp(scale R) / Z(s), the q of
    the largest E_q[R] - KL(q || p) / scale, and Eqs. 4 to 7 learn that as they are.
    """
    return (scale * (reward - value)).clamp(max=cap).exp()


def value_loss(reward, value, scale=ADVANTAGE_SCALE, cap=5.0):
    """(exp(z) - z - 1) / scale^2, z = scale (R - V), mean over the batch; both (B,) -> scalar.

    Its minimiser is the soft value V(s) = log E[exp(scale R) | s] / scale (extreme Q-learning,
    Garg et al. 2023); linear beyond the cap.
    """
    z = scale * (reward - value)
    inside = z.clamp(max=cap)
    return (inside.exp() * (1 + z - inside) - z - 1).mean() / scale**2


@torch.no_grad()
def advantage_sums(batches, reward_model):
    """Cumulative sum of the advantage weights of all rows (N,) float64, for `Batches.windows`."""
    weights = []
    for rows in torch.arange(len(batches.obs), device=batches.obs.device).split(4096):
        state, plan = batches.rows(rows, reward_model.actions)
        weights.append(advantage_weight(reward_model(state, plan), reward_model.V(state)))
    weights = torch.cat(weights).double()
    total = weights.sum().item()
    if not 0 < total < math.inf:
        raise UserError(f"the advantage weights add up to {total}; try a smaller --reward-lr")
    worth = total**2 / weights.square().sum().item()
    print(f"advantage: the {len(weights):,} weighted windows are worth {worth:,.0f} equal ones")
    return weights.cumsum(0)


@torch.no_grad()
def teacher_trajectories(teacher, state, x_T, sigmas, temperature, batch=512):
    """Solved trajectories of the teacher: x_t (2 N, H, A), t (2 N,), end (2 N, H, A).

    The first N start at x_T (N, H, A), states (N, S), and end in plans. The others start at those
    plans, noised anew to a level of the student's grid sigmas (n,), as its second call does; the
    levels take turns, `batch` plans each. Heun's method has 12 points for the first, 8 for these.
    Solved once, before the student's training.
    """
    first = []
    second = []
    inner = sigmas[1:-1].tolist()
    blocks = math.ceil(len(x_T) / batch)
    levels = itertools.cycle(inner[:: math.ceil(len(inner) / blocks)])
    for s_n, x, t in zip(state.split(batch), x_T.split(batch), levels, strict=False):
        denoiser = lambda x, t, s_n=s_n: denoise(teacher, x, t, s_n)
        end = heun_sample(denoiser, x, karras_sigmas(12))
        first.append((x, x.new_full((len(x),), SIGMA_MAX), end))
        x_t = end + math.sqrt(t**2 - SIGMA_MIN**2) * temperature * torch.randn_like(end)
        end_t = heun_sample(denoiser, x_t, karras_sigmas(8, smax=t))
        second.append((x_t, x.new_full((len(x),), t), end_t))
    return [torch.cat(column) for column in zip(*first, *second, strict=True)]


def trajectory_loss(student, state, x_t, t, end):
    """d(G(x_t, t, 0), the end of the teacher's trajectory from x_t), mean over the batch -> scalar.

    Eq. 5 for u = k = 0 (Kim et al. 2024 draw u freely): the jumps that act are not taught by chains
    of small ones alone. state (B, S); x_t, end (B, H, A); t (B,): of `teacher_trajectories`.
    """
    plan = student_jump(student, x_t, t, torch.full_like(t, SIGMA_MIN), state)
    return pseudo_huber(plan, end).mean()


# ---- 8. Training: each stage is a network and its loss -------------------------------------------

FORMAT = 4  # of checkpoints
SAVE_EVERY = 30.0  # seconds between checkpoints: what a killed run loses at most
WEIGHT_DECAY = {"reward": 1e-3, "teacher": 1e-6, "student": 1e-4}  # as released
TARGET_DECAY = 0.99  # of the student's average, G_sg in Eqs. 5 and 6; released: 0, a copy


def make_network(stage, config, dims):
    """The untrained network of a stage; dims: sizes of an observation and an action."""
    if stage == "reward":
        return RewardModel(*dims, config.reward_actions, config.reward_networks)
    size = NETWORKS[config.network]
    return UNet1d(dims[1], dims[0], **size, student=stage == "student")


def load_network(checkpoint, device="cpu"):
    """The network of a checkpoint with its averaged weights, frozen."""
    net = make_network(checkpoint["stage"], Config(**checkpoint["config"]), checkpoint["dims"])
    net.load_state_dict(checkpoint["ema"])
    return net.to(device).eval().requires_grad_(False)


def reward_stage(config, batches):
    """The reward model and loss_fn(net, average): the squared error of returns-to-go, and V's."""

    def loss_fn(net, average):
        state, plan, go = batches.transitions(config.reward_batch, net.actions)
        errors = (net.each(state, plan) - go).square().mean(1)  # (networks,)
        v_loss = value_loss(average(state, plan), net.V(state))  # for section 7
        return errors.sum() + v_loss, {"error": errors.mean().detach(), "V": v_loss.detach()}

    return make_network("reward", config, batches.dims).to(batches.obs.device), loss_fn


def teacher_stage(config, batches, reward=None):
    """The teacher and loss_fn(net, average), Eq. 4; with a reward model a reward teacher's."""
    distance = pseudo_huber if config.denoising == "paper" else squared
    sums = advantage_sums(batches, reward) if config.reward_teacher else None

    def loss_fn(net, average):
        state, x0 = batches.windows(config.teacher_batch, sums)
        t = lognormal_levels(len(x0), x0.device)
        denoiser = lambda x, t: denoise(net, x, t, state)
        return edm_loss(denoiser, x0, t, torch.randn_like(x0), distance), {}

    return make_network("teacher", config, batches.dims).to(batches.obs.device), loss_fn


def student_stage(config, batches, teacher, reward=None):
    """The student and loss_fn(net, average): Eq. 9, and section 7's trajectories."""
    student = make_network("student", config, batches.dims).to(batches.obs.device)
    warm_start(student, teacher)
    sums = advantage_sums(batches, reward) if config.reward_teacher else None
    reward_in_loss = reward if config.reward_weight else None  # Eq. 8
    if config.trajectories:
        count = min(TRAJECTORIES, config.trajectories * config.student_steps)
        print(f"student: solves {2 * count:,} trajectories of the teacher", flush=True)
        states, x0 = batches.windows(count, sums)
        x_T = config.temperature * SIGMA_MAX * torch.randn_like(x0)
        sigmas = karras_sigmas(config.grid_points)
        solved = teacher_trajectories(teacher, states, x_T, sigmas, config.temperature)

    def loss_fn(net, average):
        state, x0 = batches.windows(config.student_batch, sums)
        loss, info = distillation_loss(net, average, teacher, reward_in_loss, state, x0, config)
        if config.trajectories:
            rows = torch.randint(count, (config.trajectories,), device=x0.device)
            state = states[rows]
            rows[config.trajectories * 2 // 3 :] += count  # the last third are of second calls
            path = trajectory_loss(net, state, *(column[rows] for column in solved))
            loss = loss + config.ctm_weight * path
            info["path"] = path.detach()
        return loss, info

    return student, loss_fn


STAGES = {"reward": reward_stage, "teacher": teacher_stage, "student": student_stage}


def write_file(path, content):
    """Bytes that take the place of the file `path` once they are written whole, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # two may work in one folder
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path, stage):
    """A checkpoint of that stage, on the CPU, or UserError saying what is wrong with the file."""
    if not Path(path).is_file():
        raise UserError(f"no trained {stage} at {path}: train it first, or give another --out")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load checks no checksums
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        fits = checkpoint["format"] == FORMAT and checkpoint["stage"] == stage
    except Exception as error:  # damaged, no checkpoint, no memory, ...
        raise UserError(f"{path} cannot be loaded as a checkpoint ({error!r:.200})") from None
    if not fits:
        raise UserError(f"{path} is no {stage} of this version of the program; change --out")
    return checkpoint


def train_step(net, average, optimizer, loss_fn, decay):
    """One gradient step, after which `average` follows -> {name: tensor} to log."""
    loss, info = loss_fn(net, average)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():  # decay 0 copies, decay 1 never moves
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    return {**info, "loss": loss.detach()}


def fit(stage, net, loss_fn, path, meta, steps, lr, weight_decay=1e-6, target_decay=None):
    """Train `net` for some steps and leave a checkpoint at `path`; resumes by itself.

    loss_fn(net, average) draws a batch -> (loss, {name: tensor}). average, the result: net's EMA
    with target_decay, or if None the teacher's released rule. meta: what else the checkpoint holds.
    It may be killed at any time; on the CPU resuming is exact, bit by bit.
    """
    average = copy.deepcopy(net).eval().requires_grad_(False)
    betas = (0.95, 0.999)
    optimizer = optim.AdamW(net.parameters(), lr, betas, weight_decay=weight_decay, fused=True)
    parts = {"net": net, "ema": average, "optimizer": optimizer}
    done = {"stage": stage, "format": FORMAT, "step": 0, "steps": steps, "log": [], "seconds": 0.0}

    # go on where a checkpoint stops
    if path.exists():
        saved = load_checkpoint(path, stage)
        done = {name: saved[name] for name in done}
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
        print(f"{stage}: goes on from step {done['step']:,} of {steps:,}")

    step = done["step"]
    twentieth = max(1, steps // 20)  # steps of the warm-up, and between two lines
    infos = []  # since the last line
    logged_at = time.monotonic()
    began = logged_at - done["seconds"]
    save_at = logged_at + SAVE_EVERY
    while step < steps:
        # linear warm-up, then half a cosine; the released rule of the average
        angle = math.pi * max(0, step - twentieth) / max(1, steps - twentieth)
        cosine = 0.5 + 0.5 * math.cos(angle)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / twentieth, cosine)
        decay = min(0.9999, 1 - (1 + step) ** -0.75) if target_decay is None else target_decay
        infos.append(train_step(net, average, optimizer, loss_fn, decay))
        step += 1
        now = time.monotonic()
        tells = step == steps or not done["log"] or step % twentieth == 0
        saves = step == steps or now > save_at

        # what is not finite never replaces a good state
        if tells or saves:
            means = {x: float(sum(info[x] for info in infos)) / len(infos) for x in infos[0]}
            if wrong := [name for name, mean in means.items() if not math.isfinite(mean)]:
                raise UserError(f"{stage}: {wrong[0]} is not finite at step {step:,}; lower its lr")
        if tells:
            speed = len(infos) / (now - logged_at)
            eta = datetime.timedelta(seconds=round((steps - step) / speed))
            numbers = "  ".join(f"{name} {mean:7.4f}" for name, mean in means.items())
            line = f"{stage:8}{step:8,}/{steps:,}  {numbers}  {speed:6.1f} steps/s  ETA {eta}"
            print(line, flush=True)
            done["log"].append({"step": step, "steps": steps, **means, "steps_per_s": speed})
            infos = []
            logged_at = now
        if saves:
            done |= {"step": step, "seconds": now - began}
            done |= {name: part.state_dict() for name, part in parts.items()}
            done |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
            content = io.BytesIO()
            torch.save(meta | done, content)
            write_file(path, content.getbuffer())
            save_at = time.monotonic() + SAVE_EVERY  # this one may have taken long


# ---- 9. Acting and evaluation --------------------------------------------------------------------


class Policy(nn.Module):
    """A loaded teacher.pt or student.pt, acting: raw observations in, raw plans out.

    nfe: calls of a student; teacher_points: of a teacher's Heun; temperature: None as in training.
    self.calls: network calls per plan.
    """

    def __init__(self, checkpoint, nfe=1, teacher_points=20, temperature=None, device="cpu"):
        super().__init__()
        if checkpoint["config"].keys() != dataclasses.asdict(Config()).keys():
            raise UserError(f"a {checkpoint['stage']} that another program made cannot act here")
        config = Config(**checkpoint["config"])
        self.student = checkpoint["stage"] == "student"
        self.net = load_network(checkpoint)
        self.register_buffer("obs_table", checkpoint["normalizer"]["obs"])
        self.register_buffer("action_table", checkpoint["normalizer"]["action"])
        self.shape = (config.horizon, checkpoint["dims"][1])  # (H, A)
        self.sigmas = karras_sigmas(config.grid_points if self.student else teacher_points)
        self.rows = {t: row for row, t in enumerate(self.sigmas.tolist())}
        self.embed_levels()
        self.net.register_load_state_dict_post_hook(self.embed_levels)
        self.nfe = nfe
        self.temperature = config.temperature if temperature is None else temperature
        self.calls = nfe if self.student else 2 * teacher_points - 3
        self.to(device)

    def embed_levels(self, *_):
        """Embed all levels t, for a student with k = 0: once, and again with other weights."""
        levels = [self.sigmas, SIGMA_MIN] if self.student else [self.sigmas]
        self.register_buffer("embeddings", self.net.embed(*levels), persistent=False)

    def network(self, x, t, state, k=None):
        """The network, t a level of the grid, k = 0: (B, H, A) -> (B, H, A)."""
        return self.net(x, t, state, k, self.embeddings[self.rows[t]])

    def forward(self, observations, noise=torch.randn_like):
        """observations (B, O) -> plans (B, H, A); noise: callable, x -> fresh N(0, 1) like x."""
        state = encode(observations.float(), self.obs_table)
        cool = lambda x: self.temperature * noise(x)
        x_T = SIGMA_MAX * cool(state.new_empty(state.shape[0], *self.shape))
        if self.student:
            jump = lambda x, t, k: student_jump(self.network, x, t, k, state)
            x = student_sample(jump, x_T, self.sigmas, self.nfe, cool)
        else:
            denoiser = lambda x, t: denoise(self.network, x, t, state)
            x = heun_sample(denoiser, x_T, self.sigmas)
        return decode(x.clamp(-1, 1), self.action_table)  # in the range of the data

    @torch.inference_mode()  # a sixth faster at batch 1 than no_grad
    def act(self, observations, generators):
        """`forward` in numpy, the noise of each row from its own numpy Generator."""
        device = self.obs_table.device
        observations = torch.from_numpy(np.array(observations, np.float32)).to(device)
        sizes = (len(generators), self.obs_table.shape[1])
        if observations.shape != sizes:
            raise UserError(f"observations have shape {tuple(observations.shape)}, not {sizes}")

        def noise(_):
            rows = [generator.standard_normal(self.shape, np.float32) for generator in generators]
            return torch.from_numpy(np.stack(rows)).to(device)

        return self(observations, noise).cpu().numpy()


def simulator(env, **options):
    """The simulator of `env`, its observations flat, or UserError; options of gymnasium.make.

    One without a time limit gets that of D4RL's tasks, 1000 steps.
    """
    import gymnasium

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no advice to leave the -v4 tasks
    try:
        made = gymnasium.make(ENVS.get(env, (env,))[0], **options)
    except Exception as error:  # of whatever package the environment is from
        hint = "if another package has it, install that and give --env PACKAGE:ID"
        raise UserError(f"the environment {env} cannot be made ({error}); {hint}") from None
    if not isinstance(made.action_space, gymnasium.spaces.Box):
        raise UserError(f"{env}: actions {made.action_space} are no vectors of numbers (Box)")
    if not made.spec.max_episode_steps:
        warnings.warn(f"{env} has no time limit: an episode ends after 1000 steps", stacklevel=2)
        made = gymnasium.wrappers.TimeLimit(made, 1000)
    return gymnasium.wrappers.TransformObservation(made, lambda x: flat(x, 1)[0], None)


def evaluate(act, make_env, episodes=20, first_seed=0):
    """Closed-loop returns of `episodes` episodes in lockstep: one policy call for all that go on.

    act: (observations (B, O), B numpy Generators) -> plans (B, H, A), whose first action is carried
    out. Episode i: simulator of seed first_seed + i. -> dict of lists
    """
    envs = [make_env() for _ in range(episodes)]
    observations = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    # not seeded as the simulators are: both would draw the same numbers
    generators = [np.random.default_rng([first_seed + i, 1]) for i in range(episodes)]
    space = envs[0].action_space
    returns = [0.0] * episodes
    lengths = [0] * episodes
    running = list(range(episodes))
    while running:
        states = np.array([observations[i] for i in running])
        plans = act(states, [generators[i] for i in running])
        for i, plan in zip(running.copy(), plans, strict=True):
            action = np.clip(plan[0].reshape(space.shape), space.low, space.high)
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += float(reward)
            lengths[i] += 1
            if terminated or truncated:
                running.remove(i)
        if max(lengths) % 250 == 0:
            print(f"step {max(lengths)}: {len(running)} of {episodes} episodes go on", flush=True)
    return {"returns": returns, "lengths": lengths}


def normalized_score(env, value):
    """D4RL's score of a return or an array of them: 0 random, 100 expert; NaN for other tasks."""
    _, random, expert, _ = ENVS.get(env, (env, math.nan, math.nan, None))
    return 100 * (value - random) / (expert - random)


def method_name(checkpoint):
    """What acts, in the terms of the paper's Table 5; RACTD has the reward in both stages."""
    config = checkpoint["config"]
    if checkpoint["stage"] == "teacher":
        return "reward teacher" if config["reward_teacher"] else "teacher"
    if config["reward_weight"]:
        return "RACTD" if config["reward_teacher"] else "RACTD, plain teacher"
    return "CTD of a reward teacher" if config["reward_teacher"] else "CTD"


def evaluate_and_report(checkpoint, config, out, device="cpu"):
    """Score a checkpoint as config says -> metrics, also as a file named after both."""
    env = checkpoint["env"]
    data = checkpoint["dataset"]
    n = config.episodes
    first = config.first_seed
    policy = Policy(checkpoint, config.nfe, config.teacher_points, config.temperature, device)
    method = method_name(checkpoint)
    print(f"evaluation: {n} episodes, {policy.calls} network call(s) per plan", flush=True)
    result = evaluate(policy.act, lambda: simulator(env), n, first)

    returns = np.array(result["returns"])
    scores = normalized_score(env, returns)
    scored = np.isfinite(scores).all()
    error = (scores if scored else returns).std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    print(f"\n{env} on {data['name']} ({data['source']})")
    print(f"{f'{n} episodes from seed {first}':<36}   return    score  std. err.")
    rows = {"data, best episode": data["return_best"], "data, mean episode": data["return_mean"]}
    for label, value in rows.items():
        print(f"{label:<36}{value:9.5g}{normalized_score(env, value):9.1f}")
    label = f"{method}, {policy.calls} call(s)"
    print(f"{label:<36}{returns.mean():9.5g}{scores.mean():9.1f}{error:11.1f}")

    metrics = {
        "env": env,
        "dataset": data,
        "method": method,
        "weights": weights_id(checkpoint),
        "calls": policy.calls,
        "temperature": policy.temperature,
        "episodes": n,
        "first_seed": first,
        "return_mean": float(returns.mean()),
        "score_mean": float(scores.mean()) if scored else None,
        "score_sem": float(error) if scored and n > 1 else None,
        **result,
    }
    who = f"{method.replace(', ', '-').replace(' ', '-')}_{metrics['weights']}"
    how = f"calls{policy.calls}_T{policy.temperature}_seeds{first}-{first + n - 1}"
    path = out / f"score_{who}_{how}.json"
    write_file(path, json.dumps(metrics, indent=2).encode())
    print(f"All numbers: {path}")
    return metrics


# ---- 10. The pipeline: data -> reward -> teacher -> student --------------------------------------


def weights_id(checkpoint):
    """Short name of a checkpoint's averaged weights, a hash: equal weights, equal name."""
    weights = torch.cat([x.flatten() for x in checkpoint["ema"].values()])
    return hashlib.sha256(weights.cpu().numpy()).hexdigest()[:10]


def load_data(run, needs_simulator=True, kind=Batches):
    """The data of a run -> (batches of a kind, meta: what checkpoints record), or UserError."""
    dataset = load_dataset(run.env, run.data)
    about = dataset.summary()
    text = "data: {name} ({source}): {transitions:,} transitions, {episodes:,} episodes,\n"
    text += "      return: mean {return_mean:.5g}, best {return_best:.5g}"
    print(text.format(**about), flush=True)
    try:
        env = simulator(run.env)
    except (UserError, ImportError) as error:
        if needs_simulator:
            raise
        print(f"      no simulator: {error}")
    else:
        box = np.float32([env.action_space.low, env.action_space.high]).reshape(2, -1)
        sizes = [env.reset(seed=0)[0].size, box.shape[1]]
        if dataset.dims != sizes:
            dims = f"{dataset.dims} observations and actions"
            raise UserError(f"{dataset.name} has {dims}, {run.env} {sizes}")
        clipped = np.clip(dataset.actions, *box)  # as it would do itself
        if outside := (clipped != dataset.actions).any(1).mean():
            print(f"      {outside:.2%} of the actions leave the simulator's box: clipped")
        dataset.actions = clipped
    batches = kind(dataset, run.config.horizon, run.config.gamma, run.device)
    meta = {"env": run.env, "dataset": dataset.summary(), "dims": dataset.dims}
    return batches, meta | {"normalizer": batches.normalizer}


def check_compatible(path, saved, asked):
    """Raise UserError listing the values of `asked` that `saved` has not."""
    if wrong := [name for name in asked if saved.get(name) != asked[name]]:
        lines = [f"  {name}: {saved.get(name)} in the file, {asked[name]} asked" for name in wrong]
        raise UserError("\n".join([f"{path} was made otherwise, give another --out:", *lines]))


def load_or_train(run, stage, fields, meta, built_on, make, **how):
    """The finished checkpoint of a stage, from the run's folder or trained now; or UserError.

    fields: of run.config, in one string; built_on: {stage: checkpoint}; make() -> (net, loss_fn).
    """
    path = run.out / f"{stage}.pt"
    recipe = {"env": run.env, "data": meta["dataset"]["sha256"][:12]}
    recipe |= {name: getattr(run.config, name) for name in fields.split()}
    recipe |= {name: weights_id(checkpoint) for name, checkpoint in built_on.items()}
    meta = {**meta, "recipe": recipe, "config": dataclasses.asdict(run.config)}
    saved = load_checkpoint(path, stage) if path.exists() else None
    if saved:
        check_compatible(path, saved["recipe"], recipe)
    # again if another process has saved an earlier step over the last one
    while not saved or saved["step"] < saved["steps"]:
        torch.manual_seed(run.config.seed)
        net, loss_fn = make()
        print(f"{stage}: {sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
        steps = getattr(run.config, f"{stage}_steps")
        lr = getattr(run.config, f"{stage}_lr")
        fit(stage, net, loss_fn, path, meta, steps, lr, **how)
        saved = load_checkpoint(path, stage)
    print(f"{stage}: {path}, {saved['step']:,} steps in {saved['seconds']:.0f} s")
    return saved


def stages_of(command, config):
    """The stages that a command trains, in their order."""
    stages = {"reward": [], "teacher": ["teacher"], "distill": ["teacher", "student"]}[command]
    if command == "reward" or config.reward_teacher:
        return ["reward", *stages]
    if command == "distill" and config.reward_weight:
        return ["teacher", "reward", "student"]
    return stages


def train_stage(run, stage, batches, meta, models):
    """The finished checkpoint of reward, teacher or student; models: of the stages before it."""
    built_on = {} if stage == "reward" else models

    def make():
        networks = {name: load_network(model, run.device) for name, model in built_on.items()}
        return STAGES[stage](run.config, batches, **networks)

    target_decay = TARGET_DECAY if stage == "student" else None
    how = {"weight_decay": WEIGHT_DECAY[stage], "target_decay": target_decay}
    return load_or_train(run, stage, STAGE_FIELDS[stage], meta, built_on, make, **how)


def train(run):
    """Train what is missing of the stages of a command; distill scores its student, too."""
    evaluates = run.command == "distill" and run.config.episodes > 0
    batches, meta = load_data(run, needs_simulator=evaluates)
    run.out.mkdir(parents=True, exist_ok=True)  # an error now, not after the training
    models = {}
    for stage in stages_of(run.command, run.config):
        models[stage] = train_stage(run, stage, batches, meta, models)
    if evaluates:
        evaluate_and_report(models["student"], run.config, run.out, run.device)


def score_saved(run):
    """Score the student or teacher that lies in the run's folder."""
    if run.config.episodes < 1:
        raise UserError("--episodes must be at least 1 to evaluate")
    path = run.out / f"{run.model}.pt"
    saved = load_checkpoint(path, run.model)
    check_compatible(path, saved, {"env": run.env})
    if saved["step"] < saved["steps"]:
        print(f"{path} is half trained: {saved['step']:,} of {saved['steps']:,} steps")
    run.config.temperature = run.temperature  # None, if not given: as it was trained
    evaluate_and_report(saved, run.config, run.out, run.device)


# ---- 11. Command line ----------------------------------------------------------------------------

REWARD = STAGE_FIELDS["reward"].split()
TEACHER = REWARD + STAGE_FIELDS["teacher"].split()
DISTILL = TEACHER + STAGE_FIELDS["student"].split() + ["nfe", "episodes", "first_seed"]
EVALUATE = ["nfe", "teacher_points", "temperature", "episodes", "first_seed"]
COMMANDS = {  # what each does, and the fields of Config that are its flags
    "data": ("fetch the dataset and print what is in it", []),
    "reward": ("train the reward model R, a return-to-go", REWARD),
    "teacher": ("train the EDM teacher, Eq. 4, and first the R that weights its windows", TEACHER),
    "distill": ("train R and teacher if missing, then the student, Eq. 9; score it", DISTILL),
    "evaluate": ("score a saved student or teacher", EVALUATE),
}
RUN_FLAGS = {
    "--env": {"required": True, "help": f"one of {', '.join(ENVS)}; else a gymnasium id"},
    "--data": {"default": "", "help": "FILE.hdf5, minari:ID (default: D4RL's file of --env)"},
    "--out": {"help": "folder for all that is written (default: runs/<env>)"},
    "--device": {"default": "cpu", "help": "cpu, cuda, cuda:1, ... (default: cpu)"},
}


def build_parser():
    """One subparser per command; most flags are generated from Config."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="ractd.py", description=summary, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, (text, fields) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for flag, how in RUN_FLAGS.items():
            if flag != "--data" or command != "evaluate":
                sub.add_argument(flag, **how)
        if command == "evaluate":
            who = ("student", "teacher")
            sub.add_argument("--model", choices=who, default="student", help="who acts")
        elif fields:
            text = "paper-losses: Eqs. 4 to 9; paper: its sizes, too"
            sub.add_argument("--preset", choices=PRESETS, default="default", help=text)
        for field in dataclasses.fields(Config):
            if field.name in fields:
                add_flag(sub, field)
    return parser


def add_flag(parser, field):
    """The flag of a field of Config; its help tells the default."""
    how = {"type": field.type, "choices": field.metadata["choices"]}
    if field.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    text = f"{field.metadata['help']} (default: {field.default})"
    parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)


def prepare(run):
    """Complete the parsed command line: out, device, config; UserError says what is wrong."""
    run.out = Path(run.out or "runs/" + run.env.replace("/", "-"))
    try:
        run.device = torch.device(run.device)
        torch.zeros(1, device=run.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {run.device}: {str(error).splitlines()[0]}; try cpu") from None

    # flags, else the preset, else the default
    values = dict(PRESETS[getattr(run, "preset", "default")])
    if values:
        values["reward_weight"] = ENVS[run.env][3] if run.env in ENVS else 1.0
    for field in dataclasses.fields(Config):
        value = getattr(run, field.name, None)
        if value is not None:  # given, and a flag of this command
            values[field.name] = value
    run.config = Config(**values)


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    run = build_parser().parse_args(argv)
    try:
        prepare(run)
        if run.command == "data":
            load_data(run, needs_simulator=False)
        elif run.command == "evaluate":
            score_saved(run)
        else:
            train(run)
    except (UserError, OSError, ImportError) as error:
        print(f"ractd.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ractd.py: stopped; the same command goes on from what is saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    sys.exit(main())
