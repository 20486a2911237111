"""RACTD: Reward-Aware Consistency Trajectory Distillation (arXiv 2506.07822v2, ICLR 2026).

A diffusion planner that needs one network call per action, learnt from logged data alone:

    data --> teacher  D(x, t)     EDM diffusion of the next H actions, given the state    Eq. 4
      `----> reward   R(s, a)     return-to-go of a state and actions, on clean data      Eq. 8
    teacher + reward --> tilted   D(x, t)     of p(x0 | s) exp(sigma R), in place of Eq. 8
      `----> student  G(x, t, k)    CTM + DSM losses (+ reward: paper-losses)         Eqs. 5-9
    student --> one call per action, closed loop in MuJoCo, D4RL normalised score

    python ractd.py distill --env hopper-medium-replay      all of it: minutes on two CPU cores
    python ractd.py distill --env hopper-medium-replay --preset paper-losses        Eqs. 4-9 alone
    python ractd.py data | teacher | reward | evaluate | export --env ...   --help tells all flags

Notation
    t > u >= k   noise levels, one per sample (B,) or one float for all; i_t < i_u <= i_k their
                 indices in the grid T = 80 = sigma_0 > ... > sigma_{N-1} = 0.02, the paper's "0"
    x0, x_t      a clean and a noisy plan: H actions, or states, (B, H, A), scaled to [-1, 1]
    state        an observation (B, O), scaled to [-1, 1]; s_n in the paper
    D, g         denoisers of teacher and student, F the network in them; G the student's jump

Sections 3 to 7, the method, need torch and the constants of section 1 alone. README.md says where
the default departs from the paper; reproduce/ measures it.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import pickle
import signal
import socket
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import torch
from torch import nn

# ---- 1. Configuration -----------------------------------------------------------------------

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.02, 80.0, 0.5  # Karras et al. 2022; sigma_min as released
# task -> simulator, and the returns that are D4RL's scores 0 (random) and 100 (expert)
TASKS = {
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
}
ENVS = [f"{task}-{kind}" for task in TASKS for kind in ("medium", "medium-replay", "medium-expert")]


class UserError(Exception):
    """Something that the user can put right: printed as one sentence, exit code 2."""


def option(default, commands, help, low=None, high=math.inf, choices=None):
    """A dataclass field that is a command-line flag of `commands`, with its help and range."""
    metadata = {"commands": commands.split(), "help": help, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata | {"choices": choices})


DISTANCES, DSM_TARGETS = ("squared", "pseudo-huber"), ("denoiser", "jump")
REWARD_TARGETS = ("return-to-go", "td")
TEACHER, REWARD, STUDENT = "teacher distill", "reward distill", "student distill"
ACTING, NETWORK = "distill evaluate export", f"{STUDENT} tilted teacher"


@dataclasses.dataclass
class Config:
    """Hyperparameters of training; [in brackets: --preset paper]."""

    seed: int = option(0, f"{NETWORK} reward", "seed of all training", 0, 2**63 - 1)
    horizon: int = option(16, f"{NETWORK} reward", "H (c in the paper): actions in a plan", 1, 1024)
    channels: tuple = option((64, 128), NETWORK, "U-Net channels per level [512 1024 2048]")
    kernel: int = option(3, NETWORK, "U-Net convolution width [5]", choices=(1, 3, 5, 7, 9))
    blocks: int = option(1, NETWORK, "residual blocks per U-Net level [2]", 1, 8)
    patch: int = option(4, NETWORK, "actions folded into one U-Net position [1]", 1, 64)
    distance: str = option("squared", NETWORK, "d of Eqs. 4, 7 [pseudo-huber]", choices=DISTANCES)
    teacher_steps: int = option(4000, TEACHER, "gradient steps [392_000]", 1, 1e9)
    teacher_batch: int = option(256, TEACHER, "plans per step [1024]", 1, 100_000)
    teacher_lr: float = option(1e-3, TEACHER, "peak learning rate of AdamW [1e-4]", 1e-9, 1)
    teacher_warmup: int = option(200, TEACHER, "steps of linear warm-up [2000]", 0)
    reward_target: str = option("return-to-go", REWARD, "td: n-step, on V", choices=REWARD_TARGETS)
    reward_actions: int = option(4, REWARD, "first actions of a plan that R sees [1]", 1, 1024)
    reward_networks: int = option(4, REWARD, "networks of which R is the mean [1]", 1, 64)
    gamma: float = option(0.99, REWARD, "discount of the return-to-go", 0, 0.9999)
    reward_steps: int = option(3000, REWARD, "gradient steps [314_000]", 1, 1e9)
    reward_batch: int = option(256, REWARD, "rows per step, twice for V [64]", 1, 100_000)
    reward_lr: float = option(1e-3, REWARD, "peak learning rate of AdamW [2e-4]", 1e-9, 1)
    reward_warmup: int = option(20, REWARD, "steps of linear warm-up", 0)
    tilted_steps: int = option(1000, "tilted distill", "steps; 0: Eq. 8 (lower sigma) [0]", 0, 1e9)
    student_steps: int = option(2000, STUDENT, "gradient steps [33_500]", 1, 1e9)
    student_batch: int = option(256, STUDENT, "plans per step [4800]", 1, 100_000)
    student_lr: float = option(5e-4, STUDENT, "peak learning rate of AdamW [1e-4]", 1e-9, 1)
    student_warmup: int = option(100, STUDENT, "steps of linear warm-up [500]", 0)
    grid_points: int = option(20, STUDENT, "N: levels in the grid of t, u, k [80]", 3, 9999)
    target_decay: float = option(0.99, STUDENT, "EMA decay of the frozen target [0]", 0, 1)
    path_batch: int = option(128, STUDENT, "whole teacher paths per step [0]", 0, 100_000)
    ctm_weight: float = option(1.0, STUDENT, "alpha of Eq. 9", 0, 1e6)
    dsm_weight: float = option(1.0, STUDENT, "beta of Eq. 9", 0, 1e6)
    reward_weight: float = option(40.0, f"{STUDENT} tilted reward", "sigma; 0: CTD [<= 1]", 0, 1e3)
    dsm_target: str = option("denoiser", STUDENT, "Eq. 7: of g, or G [jump]", choices=DSM_TARGETS)
    episodes: int = option(20, "distill evaluate", "evaluation episodes; 100 for a report", 1)
    first_seed: int = option(0, "distill evaluate", "episode i has seed first_seed + i", 0)
    nfe: int = option(1, ACTING, "student: network calls per plan", 1, 80)
    teacher_points: int = option(20, "evaluate export", "teacher: n of Heun, 2 n - 3 calls", 3)
    temperature: float = option(0.25, f"{ACTING} student", "scale of acting noise [1]", 0, 100)
    candidates: int = option(1, "distill evaluate", "plans per state, R's best acts", 1, 1024)


# Eqs. 4 to 9 as the paper writes them, at the size of the default
PAPER_LOSSES = {"distance": "pseudo-huber", "dsm_target": "jump", "tilted_steps": 0}
PAPER_LOSSES |= {"reward_actions": 1, "reward_networks": 1, "path_batch": 0, "temperature": 1.0}
# the published sizes, and schedules as for hopper-medium-replay (1000, 50 and 400 epochs)
PAPER = (
    PAPER_LOSSES
    | {"channels": (512, 1024, 2048), "kernel": 5, "blocks": 2, "patch": 1, "grid_points": 80}
    | {"teacher_steps": 392_000, "teacher_batch": 1024, "teacher_lr": 1e-4, "teacher_warmup": 2000}
    | {"reward_steps": 314_000, "reward_batch": 64, "reward_lr": 2e-4, "target_decay": 0.0}
    | {"student_steps": 33_500, "student_batch": 4800, "student_lr": 1e-4, "student_warmup": 500}
)
PRESETS = {"default": {}, "paper-losses": PAPER_LOSSES, "paper": PAPER}
# sigma of Eq. 9 under the paper's presets, as published; 1 for other data than these nine
PAPER_SIGMA = dict(zip(ENVS, (1.0, 1.0, 0.5, 0.4, 0.5, 0.2, 0.5, 1.0, 0.0), strict=True))

# ---- 2. Data ----------------------------------------------------------------------------------

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
D4RL_SHA256 = {  # of its files, version 2
    "halfcheetah-medium": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "halfcheetah-medium-replay": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",
    "halfcheetah-medium-expert": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",
    "hopper-medium": "828ab916d1ff570ac0655af7d29390b652a6f2f4bbd05b311ac91d57fe38576c",
    "hopper-medium-replay": "3ebbc1b9b0e98188923bd2cc0fb80541980e8c6a0ebdb8139910b0aa0bde1646",
    "hopper-medium-expert": "3c599b8c9576dd1df13fd36a48b9c7e9a0ec9ce4a2db4fe836f7712a640b1d00",
    "walker2d-medium": "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda",
    "walker2d-medium-replay": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "walker2d-medium-expert": "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04",
}
BUNDLED = Path(__file__).parent / "assets" / "hopper-medium-replay-sac.hdf5"


class Dataset:
    """Logged transitions, one row each, episode after episode: N rows, E episodes.

    observations (N, O), actions (N, A), rewards (N,): float32; begins, ends (E,): first and last
    rows; terminated (E,): ended by the task, not by a time limit or the file's end. source: "D4RL",
    "bundled", "file" or "minari". Raises UserError saying what is wrong with the data, and where.
    """

    KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")

    def __init__(self, name, source, columns):
        self.name, self.source, rows = name, source, len(columns[0])
        for i, (key, x) in enumerate(zip(self.KEYS, columns, strict=True)):
            numbers, dims = x.dtype.kind in "fiub", 2 if key in ("observations", "actions") else 1
            if not numbers or x.ndim != dims or len(x) != rows or not rows:
                want = f"not {rows or 'some'} rows of numbers, {dims}-D"
                raise UserError(f"{name}: {key} has shape {x.shape} and type {x.dtype}, {want}")
            columns[i] = x.astype(np.float32)
            if len(bad := np.argwhere(~np.isfinite(columns[i]))):
                raise UserError(f"{name}: {key} is NaN or infinite in row {bad[0][0]}")
        self.observations, self.actions, self.rewards, terminals, timeouts = columns
        if not len(ends := np.flatnonzero(terminals + timeouts)):
            raise UserError(f"{name}: no episode ends; terminals and timeouts are all false")
        self.ends = np.union1d(ends, rows - 1)  # the file's end is treated as a time limit
        self.begins = np.concatenate([[0], self.ends[:-1] + 1])
        self.terminated = terminals[self.ends] != 0

    def summary(self):
        """Name, undiscounted episode returns and a fingerprint, as plain values."""
        returns = np.add.reduceat(self.rewards.astype(np.float64), self.begins)
        arrays = (self.observations, self.actions, self.rewards, self.ends, self.terminated)
        label = self.source if self.source == "D4RL" else f"{self.source}, not D4RL's file"
        counts = {"transitions": len(self.rewards), "episodes": len(self.ends)}
        counts |= {"return_mean": float(returns.mean()), "return_best": float(returns.max())}
        sha256 = hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()
        return {"name": self.name, "source": label, **counts, "sha256": sha256}

    def __str__(self):
        text = "data: {name} ({source}): {transitions:,} transitions, {episodes:,} episodes,\n"
        text += "      return: mean {return_mean:.0f}, best {return_best:.0f}"
        return text.format(**self.summary())


def load_dataset(env, data=""):
    """The Dataset of --data, else D4RL's of `env`, else the bundled one, or UserError."""
    if data.startswith("minari:"):
        return read_minari(data.removeprefix("minari:"))
    if data:
        return read_hdf5(Path(data), Path(data).name, "file")
    if path := fetch_d4rl(env):
        return read_hdf5(path, f"{env}-v2", "D4RL")
    if env != "hopper-medium-replay" or not BUNDLED.exists():
        recipe = f"make it by D4RL's recipe, python -m reproduce.collect --env {env}"
        raise UserError(f"no data for {env}: put the file there, or give --data FILE, or {recipe}")
    print(f"In its place: {BUNDLED.name}, of one SAC run: not comparable with the paper's.")
    return read_hdf5(BUNDLED, BUNDLED.name, "bundled")


def fetch_d4rl(env):
    """Path of D4RL's file of `env`, downloaded if need be; None where there is no network."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    path, sha256 = folder / f"{env.replace('-', '_')}-v2.hdf5", D4RL_SHA256[env]
    if path.exists():
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise UserError(f"{path} is not the published file; delete it, or use --data")
        return path
    print(f"downloading {D4RL_URL}{path.name} to {folder}", flush=True)
    socket.setdefaulttimeout(20)  # seconds without an answer
    try:  # torch writes aside, and renames once the hash has matched
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(D4RL_URL + path.name, str(path), hash_prefix=sha256)
        return path
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if type(error) is urllib.error.URLError:  # no network, in all its forms
            print(f"{path.name} is not in {folder} and cannot be downloaded ({error.reason}).")
            return None
        what = f"{path.name} cannot be downloaded or is not the published file"
        raise UserError(f"{what} ({error}); try again, or give --data FILE") from None


def flat(observation):
    """An array as it is; of a goal dict `desired_goal` and `observation` side by side: (..., O)."""
    if not isinstance(observation, dict):
        return observation
    keys = sorted(observation.keys() - {"achieved_goal"})
    return np.concatenate([flat(observation[key]) for key in keys], axis=-1)


def read_minari(dataset_id):
    """A Minari dataset, observations by `flat`, Box actions: local, or by Minari's download."""
    import minari

    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    try:
        missing = dataset_id not in minari.list_local_datasets()
        episodes = list(minari.load_dataset(dataset_id, download=missing).iterate_episodes())
        # an episode has one observation more than actions: the last one, on which nobody acted
        rows = [np.concatenate([flat(getattr(e, key))[: len(e)] for e in episodes]) for key in keys]
    except Exception as error:  # whatever a network library raises, too
        hint = "Box spaces? network? pip install 'minari[hf,gcs]'?"
        raise UserError(f"minari:{dataset_id} cannot be read ({error!r}); {hint}") from error
    rows[4][np.cumsum([len(e) for e in episodes]) - 1] = True  # also where it was cut off
    return Dataset(dataset_id, "minari", rows)


def read_hdf5(path, name, source):
    """A file in D4RL's layout: Dataset.KEYS, one row a step."""
    import h5py

    try:
        with h5py.File(path) as f:
            if missing := [key for key in Dataset.KEYS if key not in f]:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(f) or '-'}")
            return Dataset(name, source, [np.asarray(f[key][()]) for key in Dataset.KEYS])
    except (OSError, TypeError) as error:
        raise UserError(f"{path} is missing, no HDF5 file or cut short ({error})") from None


def window_starts(begins, ends, horizon):
    """First rows of all windows of `horizon` rows inside one episode, the last one too: (W,)."""
    pairs = zip(begins, ends, strict=True)
    return np.concatenate([np.arange(begin, max(begin, end - horizon + 2)) for begin, end in pairs])


def returns_to_go(rewards, begins, ends, terminated, gamma=0.99):
    """Discounted sum of rewards (N,) from each row to its episode's end: (N,) float64.

    Nothing follows a termination. After a time limit the mean of the last 100 rewards goes on for
    ever, mean / (1 - gamma): to cut there, as released, makes states near step 1000 look bad.
    """
    result = rewards.astype(np.float64)
    for begin, end, fell in zip(begins, ends, terminated, strict=True):
        following = 0.0 if fell else result[max(begin, end - 99) : end + 1].mean() / (1 - gamma)
        for row in range(end, begin - 1, -1):
            result[row] += gamma * following
            following = result[row]
    return result


def fit_range(x):
    """Rows (N, D) -> the table (2, D), centre and half range, that maps them to [-1, 1]."""
    low, high = x.amin(0), x.amax(0)
    half = torch.where(high - low > 1e-6, (high - low) / 2, 1.0)  # a constant column maps to 0
    return torch.stack([(low + high) / 2, half])


def encode(x, table):
    """Raw (..., D) -> normalised (..., D), by a table of `fit_range`."""
    return (x - table[0]) / table[1]


def decode(x, table):
    """Normalised (..., D) -> raw (..., D)."""
    return x * table[1] + table[0]


class Batches:
    """A dataset as normalised tensors on the device, where batches are drawn."""

    def __init__(self, dataset, horizon=16, gamma=0.99, device="cpu"):
        begins, ends = dataset.begins, dataset.ends
        starts = window_starts(begins, ends, horizon)
        if not len(starts):
            longest = (ends - begins).max() + 1
            raise UserError(f"{dataset.name}: --horizon {horizon}, longest episode {longest} rows")
        go = returns_to_go(dataset.rewards, begins, ends, dataset.terminated, gamma)
        raw = {"obs": dataset.observations, "action": dataset.actions, "return": go[:, None]}
        raw = {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in raw.items()}
        self.normalizer = {name: fit_range(x) for name, x in raw.items()}
        self.obs, self.actions, go = (encode(x, self.normalizer[name]) for name, x in raw.items())
        self.returns_to_go, self.gamma = go.squeeze(1), gamma  # (N,)
        self.starts = torch.tensor(starts, device=device)  # (W,)
        self.lasts = torch.tensor(np.repeat(ends, ends - begins + 1), device=device)  # (N,)
        self.chunk = torch.arange(horizon, device=device)

    def windows(self, batch, weights=None):
        """Random windows, as likely as weights (W,), or alike: state (B, O), plan x0 (B, H, A)."""
        weights = torch.ones_like(self.returns_to_go[self.starts]) if weights is None else weights
        drawn = self.starts[torch.multinomial(weights, batch, replacement=True)]
        return self.rows(drawn, len(self.chunk))

    def rows(self, rows, actions):
        """States (B, O) of rows (B,), the actions (B, actions, A) from there, the last repeated."""
        chunk = torch.minimum(rows[:, None] + self.chunk[:actions], self.lasts[rows, None])
        return self.obs[rows], self.actions[chunk]

    def transitions(self, batch, actions=1, value=None):
        """Random rows t: state (B, O), actions (B, n, A) from there, R's target (B,).

        It is the return-to-go G_t; with `value`, V: state -> (B,), n-step TD: V(s_{t+n}) in place
        of what follows from row t + n on, if the episode gets there; else it stays G_t.
        """
        t = torch.randint(len(self.obs), (batch,), device=self.obs.device)
        target = self.returns_to_go[t]
        if value is not None:
            later = torch.minimum(t + actions, self.lasts[t])
            beyond = value(self.obs[later]) - self.returns_to_go[later]
            target = target + self.gamma**actions * beyond * (t + actions == later)
        return *self.rows(t, actions), target


# ---- 3. Network: a temporal U-Net, its blocks scaled and shifted by a condition (FiLM) ---------


def expand(t):
    """Noise levels (B,) -> (B, 1, 1), to multiply plans (B, H, A); a float stays a float."""
    return t[:, None, None] if torch.is_tensor(t) else t


class TemporalConv(nn.Linear):
    """Convolution over time (B, L, C_in) -> (B, L, C_out), LayerNorm, SiLU."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__(kernel * c_in, c_out)
        self.kernel, self.norm = kernel, nn.LayerNorm(c_out)

    def forward(self, x):
        # one matrix product over shifted copies: for short plans faster than the CPU's convolution
        padded = nn.functional.pad(x, (0, 0, self.kernel // 2, self.kernel // 2))
        shifted = torch.cat([padded[:, i : i + x.shape[1]] for i in range(self.kernel)], dim=2)
        return nn.functional.silu(self.norm(super().forward(shifted)))


class ResidualBlock(nn.Module):
    """Two temporal convolutions and a skip; the condition (B, C) scales and shifts in between."""

    def __init__(self, c_in, c_out, condition, kernel):
        super().__init__()
        self.first = TemporalConv(c_in, c_out, kernel)
        self.film = nn.Linear(condition, 2 * c_out)
        self.second = TemporalConv(c_out, c_out, kernel)
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()
        nn.init.ones_(self.film.bias[:c_out])  # a scale of about 1

    def forward(self, x, condition):
        scale, shift = self.film(condition)[:, None].chunk(2, dim=2)  # (B, 1, c_out) each
        y = torch.addcmul(shift, self.first(x), scale)
        return self.second(y) + self.skip(x)


class UNet1d(nn.Module):
    """The network F, a U-Net over a plan of actions or states: (x, embedding, state) -> (B, H, A).

    x (B, H, A); embedding: `embed(t)`, a student's `embed(t, k)`; state (B, S). H: a multiple of
    patch * 2^(levels - 1), as `patch` actions become one position, and each level halves those.
    pinned: places (h, a) of a plan that hold the state's first columns, clean at all noise levels.
    """

    def __init__(
        self, plan_dim, state_dim, channels=(64, 128), kernel=3, blocks=1, patch=4, student=False
    ):
        super().__init__()
        waves, widths = min(2 * channels[0], 256), (patch * plan_dim, *channels)
        self.patch, self.pinned, c = patch, (), 2 * waves
        frequencies = 250 * 10_000 ** -torch.linspace(0, 1, waves // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.level_in = nn.Linear(2 * waves if student else waves, c)  # of t; a student: t and k
        self.level = nn.Sequential(nn.SiLU(), nn.Linear(c, c))
        self.state = nn.Linear(state_dim, c)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(c, c), nn.SiLU())

        def stack(n, c_in, c_out):
            pairs = [(c_in, c_out)] + (n - 1) * [(c_out, c_out)]
            return nn.ModuleList(ResidualBlock(*pair, c, kernel) for pair in pairs)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for above, width in itertools.pairwise(widths[:-1]):
            halve = nn.Linear(2 * width, width)  # two positions -> one
            self.down.append(nn.ModuleList([stack(blocks, above, width), halve]))
        self.middle = stack(2 * blocks, *widths[-2:])
        for below, width in itertools.pairwise(reversed(channels)):
            double = nn.Linear(below, 2 * width)  # one position -> two
            self.up.append(nn.ModuleList([double, stack(blocks, 2 * width, width)]))
        self.out = nn.Linear(channels[0], widths[0])

    def pin(self, x, state):
        """x (B, H, A), at the pinned places the clean values of the state (B, S)."""
        if self.pinned:
            (h, a), x = zip(*self.pinned, strict=True), x.clone()
            x[:, h, a] = state[:, : len(h)]
        return x

    def embed(self, *levels):
        """Noise levels t (a student: t, k), floats or (B,) -> (1 or B, C), MLP of sinusoids."""
        like = self.frequencies
        columns = [torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in levels]
        angles = torch.stack(columns, dim=-1).log().reshape(-1, len(levels), 1) * like
        return self.level(self.level_in(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)))

    def forward(self, x, embedding, state):
        condition = self.condition(embedding + self.state(state))  # (B, C)
        y, skips = x.reshape(x.shape[0], -1, self.patch * x.shape[2]), []  # (B, H / patch, patch A)
        for blocks, halve in self.down:
            for block in blocks:
                y = block(y, condition)
            skips.append(y)
            y = halve(y.reshape(y.shape[0], y.shape[1] // 2, -1))
        for block in self.middle:
            y = block(y, condition)
        for double, blocks in self.up:
            y = double(y).reshape(y.shape[0], 2 * y.shape[1], -1)
            y = torch.cat([y, skips.pop()], dim=2)
            for block in blocks:
                y = block(y, condition)
        return self.out(y).reshape(x.shape)


def warm_start(student, teacher):
    """Give a student the teacher's weights; what reads k starts at 0: the teacher, whatever k."""
    weights, student.pinned, first = teacher.state_dict(), teacher.pinned, "level_in.weight"
    weights[first] = torch.cat([weights[first], torch.zeros_like(weights[first])], dim=1)
    student.load_state_dict(weights)


# ---- 4. EDM teacher (RACTD Eq. 4; Karras et al. 2022) --------------------------------------------


def karras_sigmas(n=80, smin=SIGMA_MIN, smax=SIGMA_MAX, rho=7.0, device="cpu"):
    """The noise grid, descending from smax to smin: (n,) float64 (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device=device)
    sigmas = (smax ** (1 / rho) + ramp * (smin ** (1 / rho) - smax ** (1 / rho))) ** rho
    return sigmas.round(decimals=12)  # no rounding error at the ends


def lognormal_levels(batch, device="cpu", mean=-1.2, std=1.2, smin=SIGMA_MIN, smax=SIGMA_MAX):
    """Teacher noise t (B,): ln t ~ N(mean, std^2), truncated (released: 1.2 % lie below smin)."""
    normal = torch.distributions.Normal(mean, std, validate_args=False)
    low, high = normal.cdf(torch.tensor([smin, smax]).log()).tolist()
    quantile = low + (high - low) * torch.rand(batch, device=device)
    return normal.icdf(quantile).exp().clamp(smin, smax)


def precondition(net, t, k=None, smin=SIGMA_MIN, sigma_data=SIGMA_DATA):
    """c_skip, c_out, c_in of Karras et al. 2022 and the network's embedding, at levels t and k.

    With the boundary condition of consistency models: c_skip = 1 and c_out = 0 at smin. t, k:
    floats or (B,) -> the factors are floats or (B, 1, 1), the embedding is (1 or B, embed).
    """
    root = (t**2 + sigma_data**2) ** 0.5
    c_skip = sigma_data**2 / ((t - smin) ** 2 + sigma_data**2)
    c_out = (t - smin) * sigma_data / root
    embedding = net.embed(t) if k is None else net.embed(t, k)
    return expand(c_skip), expand(c_out), expand(1 / root), embedding


def denoise(net, x, t, state, k=None, level=None):
    """The teacher's denoiser D(x, t), or the student's g(x, t, k), made of the network F.

    x (B, H, A), t and k floats or (B,), state (B, S) -> estimate of the clean plan (B, H, A); at
    smin x itself but for pins. level: what `precondition` gave, at fixed levels or other constants.
    """
    c_skip, c_out, c_in, embedding = level or precondition(net, t, k)
    return net.pin(c_skip * x + c_out * net(net.pin(c_in * x, state), embedding, state), state)


def heun_step(denoiser, x, t, u, smin=SIGMA_MIN):
    """Eq. 6's Solver, a step of Heun's method (Karras et al. 2022, Alg. 1) from t to u < t.

    denoiser: callable (x, t) -> x0; x (B, H, A); t, u floats or (B,). A step down to smin is
    Euler's: there D(x, smin) = x, so that the second slope would be 0 and halve the step.
    """
    slope = (x - denoiser(x, t)) / expand(t)  # dx/dt
    euler = x + expand(u - t) * slope
    slope_u = (euler - denoiser(euler, u)) / expand(u)
    return euler + expand(0.5 * (u - t) * (u > smin)) * (slope_u - slope)


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

    Its minimiser is the median. (Released: sqrt(e^4 + c^2) - c per element, nearly `squared`.)
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
    return (edm_weight(t) * distance(denoiser(x0 + expand(t) * noise, t), x0)).mean()


# ---- 5. Reward model (RACTD Eq. 8): the return-to-go of a state and the actions taken there ------


def mlp(c_in, width=256):
    """Two hidden layers, (B, c_in) -> (B,). (Released: three widths of residual blocks.)"""
    first = nn.Linear(c_in, width), nn.LayerNorm(width), nn.SiLU()
    second = nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
    return nn.Sequential(*first, *second, nn.Linear(width, 1), nn.Flatten(0))


class RewardModel(nn.Module):
    """R: state (B, S), plan (B, H, A), its first `actions` -> scaled return-to-go (B,); V(s)."""

    def __init__(self, state_dim, action_dim, actions=1, networks=1):
        super().__init__()
        self.actions, self.V = actions, mlp(state_dim)
        width = state_dim + actions * action_dim
        self.networks = nn.ModuleList(mlp(width) for _ in range(networks))

    def each(self, state, plan):
        """What each of the networks says: (networks, B)."""
        x = torch.cat([state, plan[:, : self.actions].flatten(1)], dim=1)
        return torch.stack([network(x) for network in self.networks])

    def forward(self, state, plan):
        return self.each(state, plan).mean(0)


# ---- 6. Not in the paper: the tilt, in place of Eq. 8's gradient, and whole paths in Eq. 5 -------


def tilt(reward, value, sigma, cap=5.0):
    """exp(sigma (R - V)), the weight of a plan x0 in state s, at most exp(cap).

    reward, value (B,): R(s, x0) and V(s) = log E[exp(sigma R) | s] / sigma -> (B,), mean 1 in each
    state. But for the cap, plans drawn so have the density p(x0 | s) exp(sigma R) / Z(s), that with
    the largest E[R] - KL(. || p) / sigma, Eq. 9's trade-off; Eqs. 4 to 7 learn it as they are.
    """
    return (sigma * (reward - value)).clamp(max=cap).exp()


def value_loss(reward, value, sigma, cap=5.0):
    """(exp(z) - z - 1) / sigma^2, z = sigma (R - V), mean over the batch; both (B,) -> scalar.

    Its minimiser is V(s) = log E[exp(sigma R) | s] / sigma (Garg et al. 2023); linear beyond cap.
    """
    z = sigma * (reward - value)
    inside = z.clamp(max=cap)
    return (inside.exp() * (1 + z - inside) - z - 1).mean() / sigma**2


def path_loss(plan, x_T, teacher, sigmas, distance=pseudo_huber):
    """d(G(x_T, T, 0), the end of the teacher's path from x_T), mean over the batch -> scalar.

    Eq. 5 for u = k = 0 (Kim et al. 2024 draw u freely): no chain of jumps for the one that acts.
    plan, x_T (B, H, A): the student's, with gradient, and its noise; the rest as in `heun_sample`.
    """
    return distance(plan, heun_sample(teacher, x_T, sigmas)).mean()


# ---- 7. CTM student and its losses (RACTD Eqs. 5-9; Kim et al. 2024) -----------------------------


def jump_from(x, g, t, k):
    """G = (k/t) x + (1 - k/t) g, x and g (B, H, A): x if k = t, g if k = 0 (Kim et al. 2024)."""
    return torch.lerp(g, x, expand(k / t))


def student_jump(net, x, t, k, state, level=None):
    """G(x, t, k) of Eq. 6: from noise level t straight to k <= t by one network call: (B, H, A)."""
    return jump_from(net.pin(x, state), denoise(net, x, t, state, k, level), t, k)


def draw_jumps(batch, sigmas):
    """Grid levels t > u >= k, (B,) each: i_u ~ U{1..N-1}, i_t = i_u - 1, i_k ~ U{i_u..N-1}."""
    n = len(sigmas)
    i_u = torch.randint(1, n, (batch,), device=sigmas.device)
    i_k = i_u + (torch.rand(batch, device=sigmas.device) * (n - i_u)).long()
    return sigmas[i_u - 1], sigmas[i_u], sigmas[i_k]


def ctm_loss(g, x_t, t, u, k, teacher, frozen_jump, smin=SIGMA_MIN, distance=pseudo_huber):
    """Eqs. 5 and 6: the student's jump t -> k against the teacher's step t -> u and a jump u -> k.

    g (B, H, A): the student's g(x_t, t, k), with gradient; t > u >= k, (B,) each. teacher: D,
    callable (x, t) -> x0, frozen. frozen_jump: G_sg, callable (x, t, k) -> x, whose weights are
    frozen while the gradient passes through it. -> scalar
    """
    zero = torch.full_like(k, smin)
    x_hat = jump_from(x_t, g, t, k)  # Eq. 6, left: G_theta(x_t, t, k)
    estimate = frozen_jump(x_hat, k, zero)  # Eq. 5, left: carried on to 0
    with torch.no_grad():
        x_u = heun_step(teacher, x_t, t, u, smin)  # Eq. 6, right: Solver(x_t, t, u; phi)
        x_ref = frozen_jump(x_u, u, k)  # Eq. 6, right: G_sg(x_u, u, k)
        target = frozen_jump(x_ref, k, zero)  # Eq. 5, right: carried on to 0
    return distance(estimate, target).mean()


def dsm_loss(prediction, x0, t, distance=squared):
    """Eq. 7: w(t) d(x0, prediction of x0 from x_t), mean over the batch -> scalar.

    prediction (B, H, A): g(x_t, t, t), the student as a denoiser (Kim et al. 2024; default), or
    G(x_t, t, 0), Eq. 7 to the letter, which asks an ODE path's end to be a mean or a median.
    """
    return (edm_weight(t) * distance(prediction, x0)).mean()


def reward_loss(reward_model, state, plan):
    """Eq. 8: -R(s_n, a_n), mean over the batch -> scalar.

    state (B, S); plan (B, H, A): the student's, by one call; here clipped to the action box, as R,
    callable (state, plan) -> (B,), has seen nothing outside it.
    """
    return -reward_model(state, plan.clamp(-1, 1)).mean()


def distillation_loss(student, target, teacher, reward_model, state, x0, config, d=pseudo_huber):
    """Eq. 9: alpha (L_CTM + paths) + beta L_DSM + sigma L_Reward, on one batch -> (loss, info).

    student, target, teacher: networks; reward_model: callable (state, plan) -> (B,), or None for
    no Eq. 8; all but the student frozen. state (B, S), x0 (B, H, A); config: Config; d of Eq. 5.
    """
    denoiser = lambda x, t: denoise(teacher, x, t, state[: len(x)])
    frozen_jump = lambda x, t, k: student_jump(target, x, t, k, state)
    distance = pseudo_huber if config.distance == "pseudo-huber" else squared
    t, u, k = draw_jumps(len(x0), karras_sigmas(config.grid_points, device=x0.device).to(x0))
    x_t = x0 + expand(t) * torch.randn_like(x0)
    zero, top = torch.full_like(t, SIGMA_MIN), torch.full_like(t, SIGMA_MAX)
    t_dsm = lognormal_levels(len(x0), x0.device)
    k_dsm = zero if config.dsm_target == "jump" else t_dsm
    x_dsm = x0 + expand(t_dsm) * torch.randn_like(x0)
    n = min(config.path_batch, len(x0))
    x_T = config.temperature * SIGMA_MAX * torch.randn_like(x0[:n])
    # one network call for Eqs. 5 and 7 and the paths, for several smaller ones take longer
    parts = (x_t, t, k, state), (x_dsm, t_dsm, k_dsm, state), (x_T, top[:n], zero[:n], state[:n])
    x, start, end, states = (torch.cat(column) for column in zip(*parts, strict=True))
    g_ctm, g_dsm, g_T = denoise(student, x, start, states, end).split([len(x0), len(x0), n])
    if config.dsm_target == "jump":
        g_dsm = jump_from(student.pin(x_dsm, state), g_dsm, t_dsm, zero)  # G(x_t, t, 0)

    ctm = ctm_loss(g_ctm, x_t, t, u, k, denoiser, frozen_jump, distance=d)
    dsm = dsm_loss(g_dsm, x0, t_dsm, distance)
    info = {"ctm": ctm.detach(), "dsm": dsm.detach()}
    if n:
        plan = jump_from(x_T, g_T, top[:n], zero[:n])
        path = path_loss(plan, x_T, denoiser, karras_sigmas(7), d)  # 11 calls a path
        ctm, info["path"] = ctm + path, path.detach()
    loss = config.ctm_weight * ctm + config.dsm_weight * dsm
    if reward_model is None:
        return loss, info
    x_T = config.temperature * SIGMA_MAX * torch.randn_like(x0)
    reward = reward_loss(reward_model, state, student_jump(student, x_T, top, zero, state))
    return loss + config.reward_weight * reward, info | {"R": -reward.detach()}


@torch.no_grad()
def student_sample(jump, x_T, sigmas, nfe=1, noise=torch.randn_like):
    """xhat_0 = G(x_T, T, 0), the policy's one network call; optionally nfe - 1 refinements.

    jump: callable (x, t, k) -> x, t and k floats; x_T (B, H, A): noise of scale T; sigmas (n,);
    noise: callable, x -> N(0, 1) like x, or cooler. Refinement i starts at sigmas[ceil(i n / nfe)].
    """
    *levels, smin = sigmas.tolist()
    x = jump(x_T, levels[0], smin)
    for i in range(1, nfe):
        t = levels[min(math.ceil(i * len(sigmas) / nfe), len(levels) - 1)]
        x = jump(x + math.sqrt(t**2 - smin**2) * noise(x), t, smin)
    return x


# ---- 8. Training --------------------------------------------------------------------------------

WEIGHT_DECAY = {"teacher": 1e-6, "tilted": 1e-6, "reward": 1e-3, "student": 1e-4}  # as released
FORMAT = 3  # of checkpoints
SAVE_EVERY = 30.0  # seconds between checkpoints


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is written whole, or never."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as f:
            yield f
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path, stage, device="cpu"):
    """A checkpoint of that stage, or UserError saying what is wrong with the file."""
    if not Path(path).is_file():
        raise UserError(f"no trained {stage} at {path}: train it first, see `ractd.py --help`")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        found, version = checkpoint["stage"], checkpoint.get("format", 1)
    except (OSError, EOFError, RuntimeError, pickle.PickleError, LookupError, TypeError) as error:
        what = f"damaged, or no checkpoint of this program ({type(error).__name__})"
        raise UserError(f"{path} is {what}; delete it and give the same command again") from None
    if version != FORMAT:
        raise UserError(f"{path} is of another version of this program; delete it or change --out")
    if found != stage:
        raise UserError(f"{path} holds a {found}, not a {stage}")
    return checkpoint


def train_step(net, average, optimizer, loss_fn, decay):
    """One gradient step, after which `average` follows -> {name: tensor} to log."""
    loss, info = loss_fn(net, average)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    optimizer.step()
    with torch.no_grad():  # decay 0 copies, decay 1 never moves
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    return {**info, "loss": loss.detach(), "grad": norm}


def log_progress(stage, step, steps, infos, seconds):
    """Print the means of the last steps' infos -> the same as a dict; UserError if not finite."""
    means = {name: float(sum(info[name] for info in infos)) / len(infos) for name in infos[0]}
    for name, mean in means.items():  # the only point that waits for CUDA is the line above
        if not math.isfinite(mean):
            where = f"between steps {step - len(infos):,} and {step:,}"
            raise UserError(f"{stage}: {name} is {mean} {where}; try a smaller learning rate")
    rate = len(infos) / seconds
    eta = datetime.timedelta(seconds=round((steps - step) / rate))
    numbers = "  ".join(f"{name} {mean:7.4f}" for name, mean in means.items())
    print(f"{stage:8}{step:8,}/{steps:,}  {numbers}  {rate:6.1f} steps/s  ETA {eta}", flush=True)
    return {"step": step, "steps": steps, **means, "steps_per_s": rate}


def fit(stage, net, loss_fn, config, path, meta):
    """Train `net` for config.<stage>_steps and leave a checkpoint at `path`; resumes by itself.

    loss_fn(net, average) draws a batch -> (loss, {name: tensor}); average: net's EMA, the result.
    meta: what else the checkpoint holds. Ctrl-C saves; on the CPU resuming is exact, bit by bit.
    """
    average, device = copy.deepcopy(net).eval().requires_grad_(False), next(net.parameters()).device
    steps, like = getattr(config, f"{stage}_steps"), "teacher" if stage == "tilted" else stage
    lr, warmup = (getattr(config, f"{like}_{name}") for name in ("lr", "warmup"))
    optimizer = torch.optim.AdamW(
        net.parameters(), lr, (0.95, 0.999), weight_decay=WEIGHT_DECAY[stage], fused=True
    )
    parts, step, log, trained = {"net": net, "ema": average, "optimizer": optimizer}, 0, [], 0.0
    if path.exists():
        saved = load_checkpoint(path, stage, device)
        step, log, trained = saved["step"], saved["log"], saved["seconds"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"].cpu())
        print(f"{stage}: goes on from step {step:,} of {steps:,}")
    interrupts, infos = [], []
    began = logged_at = saved_at = time.monotonic()
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # after the step
    try:
        while step < steps:
            done = max(0, step - warmup) / max(1, steps - warmup)
            factor = min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = lr * factor  # linear warm-up, then half a cosine
            decay = min(0.9999, 1 - (1 + step) ** -0.75)
            decay = config.target_decay if stage == "student" else decay
            infos.append(train_step(net, average, optimizer, loss_fn, decay))
            step += 1
            now = time.monotonic()
            save = step == steps or interrupts or now - saved_at > SAVE_EVERY
            if save or not log or step % max(1, steps // 20) == 0:
                log.append(log_progress(stage, step, steps, infos, now - logged_at))
                infos, logged_at = [], now
            if save:  # after log_progress: a broken state never replaces a good one
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"rng": torch.get_rng_state(), "seconds": trained + now - began}
                state |= {"step": step, "steps": steps, "log": log, "format": FORMAT}
                with replacing(path) as f:
                    torch.save({**meta, "stage": stage, **state}, f)
                with replacing(path.with_suffix(".jsonl")) as f:
                    f.writelines((json.dumps(row) + "\n").encode() for row in log)
                saved_at = time.monotonic()
                if interrupts:
                    print(f"{stage}: stopped at step {step:,}, saved; the same command goes on")
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, handler)


# ---- 9. Acting and evaluation -------------------------------------------------------------------


def make_unet(config, dims, student=False):
    """The U-Net of a Config; dims: sizes of an observation and an action. UserError if none."""
    multiple = config.patch * 2 ** (len(config.channels) - 1)
    if not all(0 < width <= 8192 for width in config.channels):
        raise UserError("--channels must be from 1 to 8192")
    if config.horizon % multiple:
        raise UserError(f"--horizon must be a multiple of patch * 2^(levels - 1), {multiple}")
    size = (config.channels, config.kernel, config.blocks, config.patch)
    return UNet1d(dims[1], dims[0], *size, student)


def make_reward_model(checkpoint, dims):
    """The reward model of a loaded reward.pt, frozen."""
    config = checkpoint["config"]
    net = RewardModel(*dims, config["reward_actions"], config["reward_networks"])
    net.load_state_dict(checkpoint["ema"])
    return net.eval().requires_grad_(False)


class Policy(nn.Module):
    """A loaded teacher.pt, tilted.pt or student.pt, acting: raw observations in, raw plans out.

    how: Config, of which nfe, teacher_points, temperature (default: as trained), candidates count;
    out: the folder of reward.pt, for more than one candidate. calls: network calls per plan.
    """

    def __init__(self, checkpoint, how=None, device="cpu", out="."):
        super().__init__()
        config, dims = Config(**checkpoint["config"]), checkpoint["dims"]
        how = how or Config(temperature=config.temperature)
        self.student = checkpoint["stage"] == "student"
        self.net = make_unet(config, dims, self.student).to(device)
        self.net.eval().requires_grad_(False).load_state_dict(checkpoint["ema"])
        if how.candidates > 1:
            reward = load_checkpoint(Path(out) / "reward.pt", "reward", device)
            self.reward_model = make_reward_model(reward, dims).to(device)
        self.tables = {name: tuple(x.to(device)) for name, x in checkpoint["normalizer"].items()}
        self.shape, self.device = (config.horizon, dims[1]), device  # (H, A)
        self.sigmas = karras_sigmas(config.grid_points if self.student else how.teacher_points)
        self.nfe, self.temperature, self.candidates = how.nfe, how.temperature, how.candidates
        self.calls = how.nfe if self.student else 2 * how.teacher_points - 3
        self.level = functools.cache(functools.partial(precondition, self.net))  # for all states
        with torch.no_grad():
            self(torch.zeros(1, dims[0], device=device), torch.zeros_like)

    @torch.inference_mode()  # a sixth faster at batch 1 than no_grad
    def act(self, observations, generators):
        """`forward` in numpy, the noise of each row from its own numpy Generator."""

        def noise(_):
            shape = self.candidates, *self.shape
            rows = [generator.standard_normal(shape, np.float32) for generator in generators]
            return torch.from_numpy(np.concatenate(rows)).to(self.device)

        observations = torch.from_numpy(np.asarray(observations, np.float32)).to(self.device)
        return self(observations, noise).cpu().numpy()

    def forward(self, observations, noise=torch.randn_like):
        """observations (B, O) -> plans (B, H, A); noise: callable, x -> fresh N(0, 1) like x."""
        net, level, state = self.net, self.level, encode(observations, self.tables["obs"])
        state = state.repeat_interleave(self.candidates, 0)
        cool = lambda x: self.temperature * noise(x)  # not in the paper, see the README
        x_T = SIGMA_MAX * cool(state.new_empty(state.shape[0], *self.shape))
        if self.student:
            jump = lambda x, t, k: student_jump(net, x, t, k, state, level(t, k))
            x = student_sample(jump, x_T, self.sigmas, self.nfe, cool)
        else:
            denoiser = lambda x, t: denoise(net, x, t, state, level=level(t))
            x = heun_sample(denoiser, x_T, self.sigmas)
        x = net.pin(x.clamp(-1, 1), state)  # in the range of the data
        if self.candidates > 1:
            best = self.reward_model(state, x).reshape(-1, self.candidates).argmax(1)
            x = x.reshape(-1, self.candidates, *self.shape)[torch.arange(len(best)), best]
        return decode(x, self.tables["action"])


def simulator(env, data):
    """A callable that makes the simulator of `env`, or Minari's of `data`, a `Dataset.summary`."""
    import gymnasium

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no advice to leave the -v4 tasks
    try:
        make = functools.partial(gymnasium.make, TASKS.get(env.split("-")[0], (env,))[0])
        if data["source"].startswith("minari"):
            import minari

            recover = minari.load_dataset(data["name"]).recover_environment
            make = lambda **options: recover(eval_env=True, **options)
        make().close()
    except (gymnasium.error.Error, ImportError, OSError, LookupError, ValueError) as error:
        raise UserError(f"the environment of {env} cannot be made ({error})") from None
    return lambda **options: gymnasium.wrappers.TransformObservation(make(**options), flat, None)


def evaluate(act, make_env, episodes=20, first_seed=0):
    """Closed-loop returns of `episodes` episodes in lockstep: one policy call for all that go on.

    act: (observations (B, O), B numpy Generators) -> plans (B, H, A), whose first action is carried
    out; B is a multiple of 16. Episode i, simulator, noise: seed first_seed + i. -> dict of lists
    """
    envs = [make_env() for _ in range(episodes)]
    observations = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    generators = [np.random.default_rng(first_seed + i) for i in range(episodes)]
    returns, lengths, running = [0.0] * episodes, [0] * episodes, list(range(episodes))
    told = time.monotonic()
    while running:
        if time.monotonic() > told + 10:
            told = time.monotonic()
            print(f"step {max(lengths)}: {len(running)} of {episodes} episodes go on", flush=True)
        spare = -len(running) % 16  # other batch sizes may round differently
        rows = running + running[:1] * spare
        used = [generators[i] for i in running] + [np.random.default_rng(0)] * spare
        plans = act(np.array([observations[i] for i in rows]), used)
        for i, plan in zip(running.copy(), plans, strict=False):
            observations[i], reward, terminated, truncated, _ = envs[i].step(plan[0])
            returns[i] += float(reward)
            lengths[i] += 1
            if terminated or truncated:
                running.remove(i)
    return {"returns": returns, "lengths": lengths}


def normalized_score(env, value, data=None):
    """Minari's or D4RL's score of a return or an array: 0 random, 100 expert; NaN: no reference."""
    if data and data["source"].startswith("minari"):
        import minari

        with contextlib.suppress(ValueError):
            return 100 * minari.get_normalized_score(minari.load_dataset(data["name"]), value)
    _, random, expert = TASKS.get(env.split("-")[0], (None, math.nan, math.nan))
    return 100 * (value - random) / (expert - random)


def evaluate_and_report(checkpoint, config, out, device="cpu"):
    """Score a checkpoint as config says -> metrics, also as a file named after both."""
    env, data = checkpoint["env"], checkpoint["dataset"]
    n, first = config.episodes, config.first_seed
    policy = Policy(checkpoint, config, device, out)
    student = "RACTD" if checkpoint["config"]["reward_weight"] else "CTD"
    method = student if policy.student else checkpoint["stage"]
    print(f"evaluation: {n} episodes, {policy.calls} network call(s) per plan", flush=True)
    result = evaluate(policy.act, simulator(env, data), n, first)
    mean = float(np.mean(result["returns"]))
    scores = normalized_score(env, np.array([mean, *result["returns"]]), data).tolist()
    sem = float(np.std(scores[1:], ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    metrics = {"env": env, "dataset": data, "method": method, "weights": weights_id(checkpoint)}
    how = ("episodes", "first_seed", "temperature", "candidates")
    metrics |= {"calls": policy.calls} | {name: getattr(config, name) for name in how}
    score = {"return_mean": mean, "score_mean": scores[0], "score_sem": sem}
    metrics |= result | {key: x if math.isfinite(x) else None for key, x in score.items()}  # no NaN
    name = "{method}_{weights}_calls{calls}_N{candidates}_T{temperature}_seeds{first_seed}-{n}"
    path = out / f"score_{name.format(n=first + n - 1, **metrics)}.json"
    with replacing(path) as f:
        f.write(json.dumps(metrics, indent=2).encode())
    print(f"\n{env} on {data['name']} ({data['source']}), {n} episodes from seed {first}")
    print(f"{'':<32}   return    score  std. err.")
    for label in ("best", "mean"):
        x = data[f"return_{label}"]
        print(f"{f'data, {label} episode':<32}{x:9.0f}{normalized_score(env, x, data):9.1f}")
    label = f"{method}, {policy.calls} call(s), N = {config.candidates}"
    print(f"{label:<32}{mean:9.0f}{scores[0]:9.1f}{sem:11.1f}")
    print(f"All numbers: {path}")
    return metrics


# ---- 10. The pipeline: data -> teacher, reward -> tilted -> student ------------------------------


def weights_id(checkpoint):
    """Short name of a checkpoint's averaged weights, a hash: equal weights, equal name."""
    weights = torch.cat([x.flatten() for x in checkpoint["ema"].values()])
    return hashlib.sha256(weights.cpu().numpy()).hexdigest()[:10]


def load_data(run, kind=Batches):
    """The data of a run -> (Batches, meta: what checkpoints record), or UserError if unfit."""
    dataset, horizon = load_dataset(run.env, run.data), run.config.horizon
    meta = {"env": run.env, "dataset": dataset.summary()}
    env = simulator(run.env, meta["dataset"])()
    dims = [dataset.observations.shape[1], dataset.actions.shape[1]]
    sizes = [np.size(env.reset(seed=0)[0]), math.prod(env.action_space.shape or (0,))]  # 0: no Box
    if dims != sizes:
        raise UserError(f"{dataset.name} has {dims} observations and actions, {run.env} {sizes}")
    batches = kind(dataset, horizon, run.config.gamma, run.device)
    print(f"{dataset}, {len(batches.starts):,} windows of {horizon} actions", flush=True)
    return batches, meta | {"dims": dims, "plan": "actions", "normalizer": batches.normalizer}


def stage_loss(stage, config, batches, dims, built_on):
    """(network, loss_fn(net, average)) of a stage; built_on: checkpoints of the stages before."""
    distance = pseudo_huber if config.distance == "pseudo-huber" else squared
    device, sigma = batches.obs.device, config.reward_weight

    def teacher_loss(net, _):
        state, x0 = batches.windows(config.teacher_batch, weights)
        t, noise = lognormal_levels(len(x0), device), torch.randn_like(x0)
        return edm_loss(lambda x, t: denoise(net, x, t, state), x0, t, noise, distance), {}

    def reward_model_loss(net, average):
        value = average.V if config.reward_target == "td" else None
        state, plan, target = batches.transitions(config.reward_batch, net.actions, value)
        errors = (net.each(state, plan) - target).square().mean(1)
        state, plan, _ = batches.transitions(2 * config.reward_batch, net.actions)
        v_loss = value_loss(average(state, plan), net.V(state), sigma or 1.0)  # 0: any V will do
        return errors.sum() + v_loss, {"error": errors.mean().detach(), "V": v_loss.detach()}

    def student_loss(net, average):
        state, x0 = batches.windows(config.student_batch, weights)
        gradient = R if weights is None else None  # tilted: without Eq. 8
        return distillation_loss(net, average, teacher, gradient, state, x0, config)

    if stage == "reward":
        size = (config.reward_actions, config.reward_networks)
        return RewardModel(*dims, *size).to(device), reward_model_loss
    teacher, weights, R = make_unet(config, dims).to(device), None, None
    if stage == "teacher":
        return teacher, teacher_loss
    teacher.load_state_dict(built_on["tilted" if "tilted" in built_on else "teacher"]["ema"])
    if sigma:
        R = make_reward_model(built_on["reward"], dims).to(device)
        if config.tilted_steps:
            pairs = (batches.rows(t, config.reward_actions) for t in batches.starts.split(4096))
            weights = torch.cat([tilt(R(*pair), R.V(pair[0]), sigma) for pair in pairs])
            worth = (weights.sum() ** 2 / weights.square().sum()).item()
            print(f"tilt: the {len(weights):,} weights are worth {worth:,.0f} equal ones")
    if stage == "tilted":
        return teacher, teacher_loss
    student = make_unet(config, dims, student=True).to(device)
    warm_start(student, teacher.eval().requires_grad_(False))
    return student, student_loss


def check_compatible(path, saved, asked):
    """Raise UserError listing the values of `asked` that `saved` has not."""
    if wrong := [name for name in asked if saved.get(name) != asked[name]]:
        lines = [f"  {name}: {saved.get(name)} in the file, {asked[name]} asked" for name in wrong]
        way_out = f"Give the same, or another --out, or delete {path}."
        raise UserError("\n".join([f"{path} was made otherwise:", *lines, way_out]))


def load_or_train(run, stage, batches, meta, built_on, make=None):
    """The finished checkpoint of a stage, from the run's folder or trained now.

    built_on: those of the stages before; make: `stage_loss` or another. May raise UserError.
    """
    path = run.out / f"{stage}.pt"
    fields = [f.name for f in dataclasses.fields(Config) if stage in f.metadata["commands"]]
    recipe = {"env": run.env, "data": "{name}, SHA-256 {sha256:.12}".format(**meta["dataset"])}
    recipe |= {"plan": meta["plan"]} | {name: getattr(run.config, name) for name in fields}
    if stage in ("tilted", "student"):  # the others are trained apart
        recipe |= {name: weights_id(checkpoint) for name, checkpoint in built_on.items()}
    if path.exists():
        saved = {"plan": "actions"} | load_checkpoint(path, stage, run.device)
        check_compatible(path, saved | saved["recipe"], dict.fromkeys(saved["recipe"]) | recipe)
        if saved["step"] == saved["steps"]:
            print(f"{stage}: {path}, {saved['step']:,} steps in {saved['seconds']:.0f} s")
            return saved
    torch.manual_seed(run.config.seed)
    net, loss_fn = (make or stage_loss)(stage, run.config, batches, meta["dims"], built_on)
    print(f"{stage}: {sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    meta = {**meta, "recipe": recipe, "config": dataclasses.asdict(run.config)}
    fit(stage, net, loss_fn, run.config, path, meta)
    return load_checkpoint(path, stage, run.device)


def train(run):
    """teacher, reward: that stage. distill: what is missing of all, the student, its score."""
    batches, meta = load_data(run)
    if run.command != "distill":
        load_or_train(run, run.command, batches, meta, {})
        return
    models, config = {}, run.config
    wanted = ("teacher", "reward", "tilted") if config.tilted_steps else ("teacher", "reward")
    for stage in wanted if config.reward_weight else ("teacher",):
        models[stage] = load_or_train(run, stage, batches, meta, models)
    student = load_or_train(run, "student", batches, meta, models)
    evaluate_and_report(student, config, run.out, run.device)


def export(run, saved):
    """Write the policy with its normaliser and sampler as one file; torch makes its noise."""
    policy = Policy(saved, run.config, run.device, run.out)
    example = (torch.zeros(2, saved["dims"][0], device=run.device),)
    program = torch.export.export(policy, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = Path(run.file or run.out / "policy.pt2")
    with replacing(path) as f:
        torch.export.save(program, f)
    print(f"{path}: observations (B, O) -> plans (B, H, A), {policy.calls} network call(s)")


# ---- 11. Command line ---------------------------------------------------------------------------

COMMANDS = {
    "data": "fetch the dataset and print what is in it",
    "teacher": "train the EDM diffusion teacher, Eq. 4",
    "reward": "train the reward model, a return-to-go",
    "distill": "train what is missing of the above, tilt it, then the student, Eq. 9, and score it",
    "evaluate": "score a saved student or teacher",
    "export": "write a saved policy as one file that torch loads without this program",
}


def build_parser():
    """One subparser per command, with the flags that it uses; most are generated from Config."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="ractd.py", description=summary, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, text in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        add, trains = sub.add_argument, command in ("teacher", "reward", "distill")
        add("--env", help=f"one of {', '.join(ENVS)}; with --data any gymnasium id")
        if trains or command == "data":
            text = "FILE.hdf5 in D4RL's layout, or minari:ID (default: D4RL's file of --env)"
            add("--data", default="", help=text)
        if command != "data":
            add("--out", help="folder for everything written (default: runs/<env>)")
            add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
        if trains:
            text = "paper-losses: Eqs. 4-9 to the letter; paper: the published sizes, too [values]"
            add("--preset", choices=PRESETS, default="default", help=text)
        if command in ("evaluate", "export"):
            text = "who acts (default: student)"
            add("--model", choices=("student", "tilted", "teacher"), default="student", help=text)
        if command == "export":
            add("file", nargs="?", help="file to write (default: <out>/policy.pt2)")
        for field in dataclasses.fields(Config):
            if command in field.metadata["commands"]:
                kind = {"type": int, "nargs": "+"} if field.type is tuple else {"type": field.type}
                text = f"{field.metadata['help']} (default: {field.default})"
                flag = "--" + field.name.replace("_", "-")
                add(flag, help=text, choices=field.metadata["choices"], **kind)
    return parser


def make_config(run):
    """The Config of flags, preset and defaults; UserError names a value that is out of range."""
    values = dict(PRESETS[getattr(run, "preset", "default")])
    if values:
        values["reward_weight"] = PAPER_SIGMA.get(run.env, 1.0)
    for field in dataclasses.fields(Config):
        value = getattr(run, field.name, None)
        if value is not None:  # else not given, or no flag of this command
            values[field.name] = tuple(value) if field.type is tuple else value
        value, low, high = values.get(field.name), field.metadata["low"], field.metadata["high"]
        if value is not None and low is not None and not low <= value <= high:
            raise UserError(f"--{field.name.replace('_', '-')} {value}: must be in {low} to {high}")
    if values.get("reward_actions", Config.reward_actions) > values.get("horizon", Config.horizon):
        raise UserError("--reward-actions must not be more than --horizon")
    return Config(**values)


def resolve(run):
    """Complete the parsed command line: env, out, device, config; UserError says what is wrong."""
    data = getattr(run, "data", "")
    if not run.env and data.startswith("minari:"):
        run.env = data.removeprefix("minari:")
    run.out = Path(getattr(run, "out", None) or "runs/" + str(run.env).replace("/", "-"))
    acts = run.command in ("evaluate", "export") and run.out.exists()
    if not run.env or run.env not in ENVS and not data and not acts:
        raise UserError(f"--env {run.env} is unknown; there are {', '.join(ENVS)}; with --data any")
    if run.command == "data":
        return
    try:
        run.device = torch.device(run.device)
        torch.zeros(1, device=run.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {run.device}: {str(error).splitlines()[0]}; try cpu") from None
    run.config = make_config(run)


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    run = build_parser().parse_args(argv)
    try:
        resolve(run)
        if run.command == "data":
            print(load_dataset(run.env, run.data))
        elif run.command in ("teacher", "reward", "distill"):
            train(run)
        else:
            path = run.out / f"{run.model}.pt"
            saved = load_checkpoint(path, run.model, run.device)
            check_compatible(path, {"plan": "actions"} | saved, {"env": run.env, "plan": "actions"})
            if run.temperature is None:  # not given: as its preset meant it
                run.config.temperature = saved["config"]["temperature"]
            if run.command == "export":
                export(run, saved)
            else:
                evaluate_and_report(saved, run.config, run.out, run.device)
    except (UserError, OSError, ImportError) as error:
        print(f"ractd.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
