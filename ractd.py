"""RACTD: Reward-Aware Consistency Trajectory Distillation (arXiv 2506.07822v2, ICLR 2026), one file.

A diffusion planner that needs one network call per action, learnt from logged data alone:

    data ──> teacher   D(x, t)     EDM diffusion of the next H actions given the state      Eq. 4
      └────> reward    R(s, a)     return-to-go of a state and an action, on clean data     Eq. 8
    teacher + reward ──> student   G(x, t, k)  CTM + DSM + reward losses                    Eqs. 5-9
    student ──> one call per action, closed loop in MuJoCo, D4RL normalised score

    python ractd.py distill --env hopper-medium-replay      all of it, minutes on two cores
    python ractd.py evaluate --env hopper-medium-replay --episodes 100 [--nfe 2 | --model teacher]
    python ractd.py data | teacher | reward --env ...       one stage; --help lists all flags

Notation                                      | shapes, all normalised to [-1, 1]
    t > u >= k   noise levels of a CTM sample |     x0, x_t   (B, H, A)  clean, noisy chunk of H actions
    i_t < i_u <= i_k   their grid indices     |     state     (B, h O)   last h observations, flattened
    T = 80, "0" = SIGMA_MIN = 0.02            |     t, u, k   (B,)       one noise level per sample
    D, g   denoisers of teacher and student   |     Eq. n     equation n of the paper, version 2
    G      the student's jump t -> k          |     sg        frozen: no gradient to these weights

Sections 3-6 are the method: torch and the constants at the top. README.md: where paper and code differ.
reproduce.py: D4RL's files, Minari, stand-ins; the paper's tables and figures. Without it: --data FILE.hdf5
"""

import argparse, contextlib, copy, dataclasses, datetime, difflib, functools, hashlib  # noqa: E401
import importlib.metadata, io, json, math, os, signal, subprocess, sys, time  # noqa: E401
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

# ---- 1. Configuration -----------------------------------------------------------------------------
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.02, 80.0, 0.5
VERSION, NORMS = "0.1.0", ("squared", "pseudo-huber")    # NORMS: the choices of d
# task -> simulator; returns that are D4RL's scores 0 (random) and 100 (expert); reward weight sigma
TASKS = {"hopper": ("Hopper-v4", -20.272305, 3234.3, 2.0), "walker2d": ("Walker2d-v4", 1.629008, 4592.3, 0.5),
         "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0, 2.0)}
ENVS = [f"{task}-{kind}" for task in TASKS for kind in ("medium", "medium-replay", "medium-expert")]

class UserError(Exception):
    """Something the user can put right: printed as a sentence, exit code 2."""

def opt(default, stage, help, low=None, high=math.inf, choices=None):
    """A hyperparameter: default, the part of the program it belongs to, help, valid range."""
    return dataclasses.field(default=default, metadata=locals())

@dataclasses.dataclass
class Config:
    """Every hyperparameter, each a command-line flag; [in brackets: paper or released code]."""
    seed: int = opt(0, "common", "seed of everything but evaluation", 0, 2**63 - 1)
    horizon: int = opt(16, "common", "c or H: actions in a planned chunk [16]", 1, 1024)
    history: int = opt(1, "common", "h: last observations that a plan is conditioned on [1]", 1, 64)
    precision: str = opt("float32", "common", "bfloat16 may train faster", choices=("float32", "bfloat16"))
    channels: tuple = opt((64, 128), "network", "U-Net channels per level [512 1024 2048]")
    kernel: int = opt(3, "network", "U-Net convolution width, odd [5]", 1, 31)
    blocks: int = opt(1, "network", "residual blocks per U-Net level [2]", 1, 8)
    patch: int = opt(4, "network", "actions folded into one U-Net position [1]", 1, 64)
    embed: int = opt(128, "network", "width of the noise-level embedding, even", 8, 4096)
    teacher_steps: int = opt(4000, "teacher", "gradient steps; -n = n epochs [-1000]", -1e6, 1e9)
    teacher_batch: int = opt(256, "teacher", "windows per step [1024]", 1, 100_000)
    teacher_lr: float = opt(1e-3, "teacher", "peak AdamW learning rate [1e-4]", 1e-9, 1)
    teacher_warmup: int = opt(200, "teacher", "linear warm-up, steps [2000]", 0)
    teacher_decay: float = opt(1e-6, "teacher", "AdamW weight decay [1e-6]", 0, 10)
    teacher_distance: str = opt("squared", "teacher", "d of Eq. 4 [paper: pseudo-huber]", choices=NORMS)
    gamma: float = opt(0.99, "reward", "discount of the return-to-go [0.99]", 0, 0.9999)
    timeout: str = opt("extend", "reward", "after a time limit the mean of the last 100 rewards goes on "
                       "for ever, or nothing does [cut]", choices=("extend", "cut"))
    reward_steps: int = opt(4000, "reward", "gradient steps; -n = n epochs [-50]", -1e6, 1e9)
    reward_batch: int = opt(256, "reward", "transitions per step [64]", 1, 100_000)
    reward_lr: float = opt(1e-3, "reward", "peak AdamW learning rate [2e-4]", 1e-9, 1)
    reward_warmup: int = opt(20, "reward", "linear warm-up, steps [20]", 0)
    reward_decay: float = opt(1e-3, "reward", "AdamW weight decay [1e-3]", 0, 10)
    student_steps: int = opt(2000, "student", "gradient steps; -n = n epochs [-400]", -1e6, 1e9)
    student_batch: int = opt(256, "student", "windows per step [4800]", 1, 100_000)
    student_lr: float = opt(5e-4, "student", "peak AdamW learning rate [1e-4]", 1e-9, 1)
    student_warmup: int = opt(100, "student", "linear warm-up, steps [500]", 0)
    student_decay: float = opt(1e-4, "student", "AdamW weight decay [1e-4]", 0, 10)
    dropout: float = opt(0.0, "student", "dropout in the student while it trains [0.2]", 0, 0.9)
    grid_points: int = opt(20, "student", "N: levels of the grid of t, u, k [80]", 3, 10_000)
    target_decay: float = opt(0.99, "student", "EMA decay of the frozen target, which also acts [0]", 0, 1)
    ctm_weight: float = opt(1.0, "student", "alpha of Eq. 9 [1]", 0, 1e6)
    dsm_weight: float = opt(1.0, "student", "beta of Eq. 9 [1]", 0, 1e6)
    reward_weight: float = opt(1.0, "student", "sigma of Eq. 9, with --env 2 or 0.5; 0 = CTD [0..1]", 0, 1e6)
    ctm_distance: str = opt("pseudo-huber", "student", "d of Eq. 5 [about squared]", choices=NORMS)
    dsm_target: str = opt("denoiser", "student", "x0 of Eq. 7 is for g(x_t, t, t), which keeps unequal "
                          "modes, or for G(x_t, t, 0) [jump]", choices=("denoiser", "jump"))
    dsm_noise: str = opt("lognormal", "student", "levels of Eq. 7 [mixed]", choices=("lognormal", "mixed"))
    dsm_distance: str = opt("squared", "student", "d of Eq. 7 [paper: pseudo-huber]", choices=NORMS)
    reward_noise: float = opt(1.0, "student", "scale of the initial noise of Eq. 8's sample", 0, 1e4)
    anchor_weight: float = opt(1.0, "student", "anchor of Eq. 8's sample on the data [0: none]", 0, 1e6)
    anchor_noise: float = opt(0.2, "student", "noise level s of the anchor", SIGMA_MIN, SIGMA_MAX)
    episodes: int = opt(20, "acting", "evaluation episodes; 100 for a report", 1, 100_000)
    first_seed: int = opt(0, "acting", "episode i has seed first_seed + i", 0)
    nfe: int = opt(1, "acting", "network calls per student sample [1]", 1, 80)
    init_noise: float = opt(20.0, "acting", "scale of the initial noise; 80 = the model's own [1]", 0, 1e4)
    teacher_points: int = opt(20, "acting", "levels n of the Heun sampler: 2 (n - 1) calls [80]", 2)
    execute: int = opt(1, "acting", "actions of a plan executed before the next plan [1]", 1)

    def check(self):
        """Raise UserError naming the first value that cannot be."""
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if low is not None and not low <= value <= high:
                raise UserError(f"--{f.name.replace('_', '-')} {value} must be from {low} to {high}")
        multiple = self.patch * 2 ** (len(self.channels) - 1)
        for bad, sentence in (
                (not all(0 < c <= 8192 for c in self.channels), "--channels must be from 1 to 8192"),
                (self.kernel % 2 == 0 or self.embed % 2, "--kernel must be odd, --embed even"),
                (self.horizon % multiple, f"--horizon: not a multiple of patch 2^(levels - 1), {multiple}"),
                (self.execute > self.horizon, f"--execute must be at most --horizon, {self.horizon}"),
                (0 in (self.teacher_steps, self.reward_steps, self.student_steps), "--<stage>-steps is 0")):
            if bad:
                raise UserError(sentence)

PRESETS = {"default": {}, "paper": dict(
    channels=(512, 1024, 2048), kernel=5, blocks=2, patch=1, embed=256, grid_points=80, teacher_points=80,
    teacher_steps=-1000, teacher_batch=1024, teacher_lr=1e-4, teacher_warmup=2000, target_decay=0.0,
    student_steps=-400, student_batch=4800, student_lr=1e-4, student_warmup=500, dropout=0.2,
    reward_steps=-50, reward_batch=64, reward_lr=2e-4, episodes=100)}

# ---- 2. Data --------------------------------------------------------------------------------------
@dataclasses.dataclass
class Dataset:
    """Logged transitions, one row each, episode after episode."""
    name: str
    source: str                 # "D4RL", "file", "minari" or "stand-in"
    observations: np.ndarray    # (T, O) float32
    actions: np.ndarray         # (T, A) float32
    rewards: np.ndarray         # (T,) float32
    ends: np.ndarray            # (E,) last row of each episode
    terminated: np.ndarray      # (E,) bool: ended by the task, not by a time limit or the file's end

    def summary(self):
        """Counts and undiscounted episode returns, as plain numbers."""
        returns = np.add.reduceat(self.rewards.astype(np.float64), episode_begins(self.ends))
        arrays = self.observations, self.actions, self.rewards, self.ends, self.terminated
        return dict(name=self.name, source=self.source, transitions=len(self.rewards),
                    note="" if self.source == "D4RL" else ": NOT comparable with the paper",
                    return_best=float(returns.max()), return_mean=float(returns.mean()),
                    return_worst=float(returns.min()), episodes=len(self.ends),
                    sha256=hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest())

    def __str__(self):
        text = ("data: {name} ({source}{note})\n      {transitions:,} transitions, {episodes:,} episodes, "
                "return {return_worst:.0f} to {return_best:.0f}, mean {return_mean:.0f}")
        return text.format(**self.summary())

def load_dataset(env, data=None):
    """--data: FILE.hdf5 in D4RL's layout, minari:ID, "standin", or None for the D4RL file of env."""
    if data and data != "standin" and not data.startswith("minari:"):
        return read_hdf5(Path(data), Path(data).name, "file")
    from reproduce import fetch_d4rl, make_standin, read_minari
    if data and data.startswith("minari:"):
        return read_minari(data.removeprefix("minari:"), "minari")
    if not data and (path := fetch_d4rl(env)):
        return read_hdf5(path, f"{env}-v2", "D4RL")
    return read_minari(make_standin(env), "stand-in")

def simulator(env, data=None):
    """A callable that makes the environment of a D4RL name, or the one that --data minari:ID recovers."""
    import gymnasium
    gymnasium.logger.min_level = gymnasium.logger.ERROR      # no advice to leave the -v4 tasks
    try:
        if data and data.startswith("minari:"):
            import minari
            make = minari.load_dataset(data.removeprefix("minari:")).recover_environment
        else:
            make = functools.partial(gymnasium.make, TASKS[env.split("-")[0]][0])
        make().close()
        return make
    except Exception as error:           # many types: dataset gone, no environment in it, package missing
        raise UserError(f"the environment of {data or env} cannot be made ({error})") from None

def read_hdf5(path, name, source):
    """A file in D4RL's layout: observations, actions, rewards, terminals, timeouts, one row a step."""
    import h5py
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path) as f:
            if missing := [key for key in keys if key not in f]:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(f) or 'nothing'}")
            arrays = [np.asarray(f[key][()]) for key in keys]
    except (OSError, TypeError) as error:
        raise UserError(f"{path} is missing, no HDF5 file or cut short ({error})") from None
    return assemble(name, source, *arrays)

def assemble(name, source, observations, actions, rewards, terminals, timeouts):
    """Check the arrays, saying what is wrong and where, and find the episodes."""
    for key, array, dims in (("observations", observations, 2), ("actions", actions, 2),
                             ("rewards", rewards, 1), ("terminals", terminals, 1), ("timeouts", timeouts, 1)):
        if array.dtype.kind not in "fiub":
            raise UserError(f"{name}: {key} has type {array.dtype}, not numbers")
        if array.ndim != dims or 0 in array.shape or array.shape[:1] != observations.shape[:1]:
            raise UserError(f"{name}: {key} has shape {array.shape}, not {len(observations)} rows {dims}-D")
        if not (finite := np.isfinite(array.astype(np.float32))).all():
            raise UserError(f"{name}: {key} is NaN or infinite in row {np.argwhere(~finite)[0][0]}")
    ends = np.flatnonzero((terminals != 0) | (timeouts != 0))
    if not len(ends):
        raise UserError(f"{name}: no episode ends; terminals and timeouts are all false")
    ends = np.union1d(ends, len(rewards) - 1)    # what the file's end cuts off is treated as a time limit
    return Dataset(name, source, *(x.astype(np.float32) for x in (observations, actions, rewards)),
                   ends, terminals[ends] != 0)

def episode_begins(ends):
    """Last rows of the episodes (E,) -> their first rows (E,)."""
    return np.concatenate([[0], ends[:-1] + 1])

def window_starts(ends, horizon):
    """First rows of all windows of `horizon` rows inside one episode, the last window included: (W,)."""
    return np.concatenate([np.arange(b, max(b, e - horizon + 2)) for b, e in zip(episode_begins(ends), ends)])

def returns_to_go(rewards, ends, terminated, gamma=0.99, timeout="extend"):
    """Discounted sum of rewards from each row to its episode's end: (T,) float64.

    Nothing follows a termination. After a time limit "extend" adds the mean of the last 100 rewards
    for ever, mean / (1 - gamma); "cut" (released) nothing, so that states near step 1000 look bad.
    """
    begins = episode_begins(ends)
    after = np.array([rewards[max(b, e - 99):e + 1].mean() / (1 - gamma) if timeout == "extend" and not t
                      else 0.0 for b, e, t in zip(begins, ends, terminated)])
    result, lengths = np.empty(len(rewards)), ends - begins + 1
    for back in range(lengths.max()):    # from the last rows backwards, all episodes at once
        alive = lengths > back
        rows = ends[alive] - back
        result[rows] = after[alive] = rewards[rows] + gamma * after[alive]
    return result

@dataclasses.dataclass
class Normalizer:
    """Min-max maps to [-1, 1]; tables: "obs", "action", "return" -> [centre (D,), half range (D,)]."""
    tables: dict

    @classmethod
    def fit(cls, device="cpu", **arrays):
        """From training data: name=array (T, D)."""
        bounds = {name: torch.tensor(np.stack([x.min(0), x.max(0)]), dtype=torch.float32, device=device)
                  for name, x in arrays.items()}
        return cls({name: [(low + high) / 2, torch.where(high - low > 1e-6, (high - low) / 2, 1.0)]
                    for name, (low, high) in bounds.items()})

    def encode(self, name, x):
        """Raw (..., D) -> normalised (..., D)."""
        return (x - self.tables[name][0]) / self.tables[name][1]

    def decode(self, name, x):
        """Normalised (..., D) -> raw (..., D)."""
        return x * self.tables[name][1] + self.tables[name][0]

class Batches:
    """A dataset as normalised tensors on the device; batches are drawn by indexing alone."""
    def __init__(self, dataset, config, device, normalizer=None):
        begins, starts = episode_begins(dataset.ends), window_starts(dataset.ends, config.horizon)
        lengths = dataset.ends - begins + 1
        if not len(starts):
            raise UserError(f"{dataset.name}: --horizon {config.horizon}, longest episode {lengths.max()}")
        go = returns_to_go(dataset.rewards, dataset.ends, dataset.terminated, config.gamma, config.timeout)
        raw = {"obs": dataset.observations, "action": dataset.actions, "return": go[:, None]}
        self.normalizer = normalizer or Normalizer.fit(device, **raw)
        self.obs, self.actions, returns = (                                      # (T, O), (T, A), (T, 1)
            self.normalizer.encode(name, torch.tensor(x, dtype=torch.float32, device=device))
            for name, x in raw.items())
        self.returns_to_go = returns.squeeze(1)                                  # (T,)
        self.begins = torch.tensor(np.repeat(begins, lengths), device=device)    # (T,)
        self.starts = torch.tensor(starts, device=device)                        # (W,)
        self.chunk, self.past = (torch.arange(a, b, device=device)
                                 for a, b in ((0, config.horizon), (1 - config.history, 1)))
        late, short = len(go) - len(starts), (lengths < config.horizon).sum()
        self.counts = (f"{len(starts):,} windows of {config.horizon} actions; dropped starts: {late:,} rows "
                       f"near episodes' ends ({short:,} whole episodes); R trains on all")

    def states(self, rows):
        """(B,) rows -> (B, h O): the last h observations, an episode's first one repeated backwards."""
        return self.obs[torch.maximum(rows[:, None] + self.past, self.begins[rows][:, None])].flatten(1)

    def windows(self, batch):
        """Random windows: state (B, h O) and the actions x0 (B, H, A) taken from there."""
        rows = self.starts[torch.randint(len(self.starts), (batch,), device=self.starts.device)]
        return self.states(rows), self.actions[rows[:, None] + self.chunk]

    def transitions(self, batch):
        """Random transitions, any row: state (B, h O), action (B, A), return-to-go (B,)."""
        rows = torch.randint(len(self.obs), (batch,), device=self.obs.device)
        return self.states(rows), self.actions[rows], self.returns_to_go[rows]

# ---- 3. Network (released: a 1-D temporal U-Net whose blocks are scaled and shifted by a condition) --
def expand(t):
    """(B,) -> (B, 1, 1), so that one noise level per sample multiplies a whole chunk (B, H, A)."""
    return t[:, None, None]

class LevelEmbedding(nn.Module):
    """n noise levels (B, n) -> (B, width): sinusoids of 250 ln(level), then a two-layer MLP."""
    def __init__(self, n, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(n * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        frequencies = 250 * torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, levels):
        angles = levels.log()[:, :, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1))

class TemporalConv(nn.Module):
    """Convolution over time (B, L, C_in) -> (B, L, C_out), LayerNorm, SiLU (released: GroupNorm, Mish)."""
    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.kernel, self.linear, self.norm = kernel, nn.Linear(kernel * c_in, c_out), nn.LayerNorm(c_out)

    def forward(self, x):
        # one matrix product over the shifted copies: for short chunks faster than the CPU's convolution
        padded = nn.functional.pad(x, (0, 0, self.kernel // 2, self.kernel // 2))
        shifted = [padded[:, i:i + x.shape[1]] for i in range(self.kernel)]
        return nn.functional.silu(self.norm(self.linear(torch.cat(shifted, dim=2))))

class ResidualBlock(nn.Module):
    """Two temporal convolutions and a skip; the condition scales and shifts between them (FiLM)."""
    def __init__(self, c_in, c_out, kernel, dropout):
        super().__init__()
        self.first, self.second = TemporalConv(c_in, c_out, kernel), TemporalConv(c_out, c_out, kernel)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, film):
        scale, shift = film[:, None].chunk(2, dim=2)                             # (B, 1, C)
        return self.second(self.dropout(self.first(x) * (1 + scale) + shift)) + self.skip(x)

class UNet1d(nn.Module):
    """F(x, t, state[, k]): a temporal U-Net over a chunk of H actions; teacher and student share it.

    x (B, H, A), t (B,) > 0, state (B, S), for the student k (B,) > 0 -> (B, H, A); H a multiple of
    patch 2^(levels - 1), since `patch` actions become one position and each level halves those. A student
    that starts with the teacher's weights (`warm_start`) is the teacher, whatever k.
    """
    def __init__(self, action_dim, state_dim, channels=(64, 128), kernel=3, blocks=1, patch=4, embed=128,
                 dropout=0.0, two_levels=False):
        super().__init__()
        self.patch, folded = patch, patch * action_dim
        self.embed = LevelEmbedding(2 if two_levels else 1, embed)               # of t, or of t and k
        self.condition = nn.Sequential(nn.Linear(embed + state_dim, 2 * embed), nn.SiLU(),
                                       nn.Linear(2 * embed, 2 * embed), nn.SiLU())
        def stack(a, b, n=blocks):
            return nn.ModuleList(ResidualBlock(b if i else a, b, kernel, dropout) for i in range(n))
        pairs = list(zip(channels, channels[1:]))
        self.down = nn.ModuleList(stack(a, b) for a, b in zip((folded, *channels), channels[:-1]))
        self.down.append(stack((folded, *channels)[-2], channels[-1], 2 * blocks))
        self.shrink = nn.ModuleList(nn.Linear(2 * a, a) for a, _ in pairs)       # two positions -> one
        self.grow = nn.ModuleList(nn.Linear(b, 2 * a) for a, b in reversed(pairs))     # one -> two
        self.up = nn.ModuleList(stack(2 * a, a) for a, _ in reversed(pairs))
        self.out = nn.Linear(channels[0], folded)
        self.sizes = [2 * len(block.first.norm.bias) for part in (*self.down, *self.up) for block in part]
        self.film = nn.Linear(2 * embed, sum(self.sizes))                        # of all blocks at once

    def forward(self, x, t, state, k=None):
        embedding = self.embed(t[:, None] if k is None else torch.stack([t, k], dim=1))
        condition = self.condition(torch.cat([embedding, state], dim=1))
        films = iter(self.film(condition).split(self.sizes, dim=1))
        h, skips = x.reshape(x.shape[0], -1, self.patch * x.shape[2]), []        # (B, H / patch, patch A)
        for level, part in enumerate(self.down):
            for block in part:
                h = block(h, next(films))
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h.reshape(h.shape[0], h.shape[1] // 2, -1))
        for grow, part in zip(self.grow, self.up):
            h = torch.cat([grow(h).reshape(h.shape[0], 2 * h.shape[1], -1), skips.pop()], dim=2)
            for block in part:
                h = block(h, next(films))
        return self.out(h).reshape(x.shape)

def warm_start(student, teacher):
    """Give a student the teacher's weights; the columns that read k start at zero."""
    weights, first = teacher.state_dict(), "embed.mlp.0.weight"
    weights[first] = torch.cat([weights[first], torch.zeros_like(weights[first])], dim=1)
    student.load_state_dict(weights)

# ---- 4. EDM teacher (RACTD Eq. 4; Karras et al. 2022) ---------------------------------------------
def karras_sigmas(n=80, smin=SIGMA_MIN, smax=SIGMA_MAX, rho=7.0, device="cpu"):
    """The noise grid, descending from smax to smin: (n,) float64 (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64, device=device)
    return (smax ** (1 / rho) + ramp * (smin ** (1 / rho) - smax ** (1 / rho))) ** rho

def lognormal_levels(batch, device="cpu", mean=-1.2, std=1.2, smin=SIGMA_MIN, smax=SIGMA_MAX):
    """Teacher noise t (B,): ln t ~ N(mean, std^2), truncated (released: not; 1.2 % lie below smin)."""
    low, high = (0.5 * (1 + math.erf((math.log(s) - mean) / std / math.sqrt(2))) for s in (smin, smax))
    quantile = low + (high - low) * torch.rand(batch, device=device)
    return torch.exp(mean + std * math.sqrt(2) * torch.erfinv(2 * quantile - 1)).clamp(smin, smax)

def denoise(net, x, t, state, k=None):
    """The teacher's denoiser D(x, t), or the student's g(x, t, k), from the raw network F.

    x (B, H, A), t (B,), state (B, S), k (B,) or None -> estimate of the clean chunk (B, H, A).
    Preconditioning of Karras et al. 2022 with the boundary condition of consistency models:
    c_skip = 1 and c_out = 0 at smin, so that D(x, smin) = x.
    """
    s, sd, above = expand(t), SIGMA_DATA, expand(t - SIGMA_MIN)
    root = (s**2 + sd**2).sqrt()
    c_skip, c_out, c_in = sd**2 / (above**2 + sd**2), above * sd / root, 1 / root
    return c_skip * x + c_out * net(c_in * x, t, state, k)

def heun_step(denoiser, x, t, u):
    """Eq. 6's Solver: Heun (Karras et al. 2022); x (B, H, A) at t (B,) -> u < t; denoiser: (x, t) -> x0."""
    slope = (x - denoiser(x, t)) / expand(t)     # dx/dt
    euler = x + expand(u - t) * slope
    slope_u = (euler - denoiser(euler, u)) / expand(u)
    return x + expand(u - t) * (slope + slope_u) / 2

@torch.no_grad()
def heun_sample(denoiser, x, sigmas):
    """Solve the ODE: x (B, H, A) at sigmas[0] -> (x at sigmas[-1], NFE = 2 (n - 1), 158 for 80 levels)."""
    levels = sigmas.to(x)[:, None].expand(-1, x.shape[0])                        # (n, B)
    for t, u in zip(levels, levels[1:]):
        x = heun_step(denoiser, x, t, u)
    return x, 2 * (len(sigmas) - 1)

def squared(a, b):
    """Mean over the elements of the squared error: (B, ...) -> (B,). Its minimiser is the mean."""
    return (a - b).square().flatten(1).mean(1)

def pseudo_huber(a, b):
    """sqrt(||a - b||^2 + c^2) - c, c = 0.00054 sqrt(dim): (B, ...) -> (B,) (Song & Dhariwal 2023).

    Its minimiser is the median. (Released: sqrt(e^4 + c^2) - c per element, `squared` in all but name.)
    """
    error = (a - b).flatten(1)
    c = 0.00054 * math.sqrt(error.shape[1])
    return (error.square().sum(1) + c**2).sqrt() - c

DISTANCES = {"squared": squared, "pseudo-huber": pseudo_huber}

def edm_weight(t):
    """Loss weight of Karras et al. 2022, about 1 / c_out^2: (B,) -> (B,)."""
    return (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2

def edm_loss(denoiser, x0, t, noise, distance=squared):
    """Eq. 4: w(t) d(x0, D(x0 + t noise, t)), mean over the batch -> (loss, info: by noise level).

    Squared, because the ODE needs the mean E[x0 | x_t]; the paper's pseudo-Huber gives a median.
    """
    loss = edm_weight(t) * distance(denoiser(x0 + expand(t) * noise, t), x0)     # (B,)
    bands = {"low": t < 0.2, "mid": (t >= 0.2) & (t < 1), "high": t >= 1}
    return loss.mean(), {name: (loss.detach() * m).sum() / m.sum().clamp(min=1) for name, m in bands.items()}

# ---- 5. Reward model (RACTD Eq. 8): the return-to-go of one state and action ----------------------
class RewardModel(nn.Module):
    """R(s_n, a_n): state (B, S), action (B, A) -> return-to-go (B,), normalised; after the released MLP."""
    def __init__(self, state_dim, action_dim, widths=(64, 128, 256)):
        super().__init__()
        self.layers = nn.ModuleList()
        for a, b in zip((state_dim + action_dim, *widths), widths):
            self.layers += [nn.Linear(a, b)] + [nn.Sequential(
                nn.LayerNorm(b), nn.Linear(b, b), nn.SiLU(), nn.Linear(b, b)) for _ in range(2)]
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(widths[-1], 1))

    def forward(self, state, action):
        x = torch.cat([state, action], dim=1)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else x + layer(x)
        return self.out(x).squeeze(1).float()    # under autocast, too

def reward_model_loss(prediction, returns_to_go):
    """Squared error of R, both (B,) -> (loss, info)."""
    loss = (prediction - returns_to_go).square().mean()
    return loss, {"rmse": loss.detach().sqrt()}

# ---- 6. CTM student and its three losses (RACTD Eqs. 5-9; Kim et al. 2024) ------------------------
def mix(x, g, t, k):
    """G = (k/t) x + (1 - k/t) g, x, g (B, H, A), t, k (B,): x at k = t, g at k = 0 (Kim et al. 2024)."""
    return torch.lerp(g, x, expand(k / t))

def student_jump(net, x, t, k, state):
    """G(x, t, k) of Eq. 6: from noise level t straight to k <= t in one network call; (B, H, A)."""
    return mix(x, denoise(net, x, t, state, k), t, k)

def draw_jumps(batch, sigmas):
    """Grid levels t > u >= k, each (B,): i_u ~ U{1..n-1}, i_t = i_u - 1, i_k ~ U{i_u..n-1}.

    k = u, the direct comparison with the teacher, is among them; u = t, 15 % of the released draws, is not.
    """
    n = len(sigmas)
    i_u = torch.randint(1, n, (batch,), device=sigmas.device)
    i_k = i_u + (torch.rand(batch, device=sigmas.device) * (n - i_u)).long()
    return sigmas[i_u - 1], sigmas[i_u], sigmas[i_k]

def mixed_levels(batch, device="cpu", rho=7.0):
    """Released noise of Eq. 7 (B,): half the teacher's, half uniform over the grid's 80 .. 0.76."""
    high, low = SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho)
    warped = (high + 0.7 * torch.rand(batch, device=device) * (low - high)) ** rho
    return torch.where(torch.rand(batch, device=device) < 0.5, warped, lognormal_levels(batch, device))

def ctm_loss(x_hat, x_ref, jump_to_zero, distance=pseudo_huber):
    """Eq. 5: the student's jump against the teacher's, both carried on to 0 -> (loss, info).

    x_hat (B, H, A) = G(x_t, t, k), with gradient; x_ref = G_sg(Solver(x_t, t, u), u, k), without (Eq. 6).
    jump_to_zero: callable, x at k -> x at 0; its weights are frozen, but the gradient passes through it.
    """
    with torch.no_grad():
        target = jump_to_zero(x_ref)
    loss = distance(jump_to_zero(x_hat), target).mean()
    return loss, {"ctm": loss.detach()}

def dsm_loss(prediction, x0, t, distance=squared):
    """Eq. 7: w(t) d(x0, prediction of x0 from x_t), mean over the batch -> (loss, info).

    prediction (B, H, A): g(x_t, t, t), the student as a denoiser (Kim et al. 2024; default), or
    G(x_t, t, 0), Eq. 7 to the letter, which asks the end point of an ODE path to be a mean or median.
    """
    loss = (edm_weight(t) * distance(prediction, x0)).mean()
    return loss, {"dsm": loss.detach()}

def reward_loss(reward_model, state, action):
    """Eq. 8: -R(s_n, a_n), mean over the batch -> (loss, info).

    state (B, S); action (B, A): the first of the student's one-step sample, clipped to the action box,
    outside which R extrapolates and its gradient runs away.
    """
    value = reward_model(state, action.clamp(-1, 1)).mean()
    return -value, {"R": value.detach()}

def anchor_loss(x_hat, denoised):
    """Not in the paper: |x_hat - denoised|^2 / 2, both (B, H, A), mean over the batch -> (loss, info).

    denoised = D(x_hat + s noise, s) of the frozen teacher. Eq. 8 alone leaves the data, where R is wrong;
    this leads back to their nearest mode, firmly if it is narrow (score distillation: Poole et al. 2022).
    """
    loss = (x_hat - denoised.detach()).square().flatten(1).sum(1).mean() / 2
    return loss, {"anchor": loss.detach()}

def distillation_loss(student, target, teacher, reward_model, state, x0, config):
    """Eq. 9: alpha L_CTM + beta L_DSM + sigma L_Reward (+ anchor) on one batch -> (loss, info).

    target, teacher, reward_model (any callable (state, action) -> (B,)): frozen; state (B, S), x0
    (B, H, A); config: the student's fields of Config. One student call serves all three losses.
    """
    sigmas = karras_sigmas(config.grid_points, device=x0.device).to(x0)
    t, u, k = draw_jumps(len(x0), sigmas)
    zero = torch.full_like(t, SIGMA_MIN)
    x_t = x0 + expand(t) * torch.randn_like(x0)
    with torch.no_grad():                # Eq. 6, right: the teacher's step, then the frozen jump
        x_u = heun_step(lambda x, t: denoise(teacher, x, t, state), x_t, t, u)
        x_ref = student_jump(target, x_u, u, k, state)
    jumps = {"ctm": (x_t, t, k)}         # loss -> where the student starts, from which level, to which
    if config.dsm_weight:
        s = (lognormal_levels if config.dsm_noise == "lognormal" else mixed_levels)(len(x0), x0.device)
        end = s if config.dsm_target == "denoiser" else zero
        jumps["dsm"] = (x0 + expand(s) * torch.randn_like(x0), s, end)
    if config.reward_weight:             # G(x_T, T, 0), from little noise: the middle of its plans
        jumps["reward"] = (config.reward_noise * torch.randn_like(x0), torch.full_like(t, SIGMA_MAX), zero)
    x, start, end = (torch.cat(parts) for parts in zip(*jumps.values()))
    outputs = denoise(student, x, start, state.repeat(len(jumps), 1), end).split(len(x0))
    g = dict(zip(jumps, outputs))                                                # loss -> (B, H, A)
    losses = {"ctm": ctm_loss(mix(x_t, g["ctm"], t, k), x_ref,
                              lambda x: student_jump(target, x, k, zero, state),
                              DISTANCES[config.ctm_distance])}
    if config.dsm_weight:
        x_s, s, end = jumps["dsm"]
        x_hat = g["dsm"] if config.dsm_target == "denoiser" else mix(x_s, g["dsm"], s, end)
        losses["dsm"] = dsm_loss(x_hat, x0, s, DISTANCES[config.dsm_distance])
    if config.reward_weight:
        x_T, T, end = jumps["reward"]
        x_hat = mix(x_T, g["reward"], T, end)
        losses["reward"] = reward_loss(reward_model, state, x_hat[:, 0])
        if config.anchor_weight:
            s = torch.full_like(t, config.anchor_noise)
            with torch.no_grad():
                denoised = denoise(teacher, x_hat + expand(s) * torch.randn_like(x0), s, state)
            losses["anchor"] = anchor_loss(x_hat, denoised)
    loss = sum(getattr(config, f"{name}_weight") * term for name, (term, _) in losses.items())
    return loss, {key: value for _, info in losses.values() for key, value in info.items()}

@torch.no_grad()
def student_sample(jump, noise, sigmas, nfe=1, init_noise=SIGMA_MAX, renoise=torch.randn_like):
    """xhat_0 = G(x_T, T, 0), the policy's one network call; optionally nfe - 1 refinements.

    jump: callable (x, t, k) -> x; noise (B, H, A) ~ N(0, 1). A refinement restarts from fresh noise at
    grid index ceil(i n / nfe): for nfe = 3 and n = 80 at 27 and 54, sigma 12.0 and 0.885. -> (x, nfe)
    """
    levels = sigmas.to(noise)[:, None].expand(-1, noise.shape[0])                # (n, B)
    x = jump(init_noise * noise, levels[0], levels[-1])
    for i in range(1, nfe):
        t = levels[min(-(-i * len(sigmas) // nfe), len(sigmas) - 1)]
        x = jump(x + expand((t**2 - SIGMA_MIN**2).sqrt()) * renoise(x), t, levels[-1])
    return x, nfe

# ---- 7. Training ----------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is written whole, or never."""
    partial = Path(path).with_suffix(".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def load_checkpoint(path, stage, device):
    """A checkpoint of that stage, or UserError saying what is wrong with the file."""
    if not Path(path).is_file():
        raise UserError(f"no trained {stage} at {path}: `ractd.py distill` trains whatever is missing")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        found, checkpoint["config"] = checkpoint["stage"], dataclasses.asdict(Config(**checkpoint["config"]))
    except Exception as error:           # torch and pickle raise many types for a damaged file
        raise UserError(f"{path} is damaged, or is not a checkpoint of this program "
                        f"({type(error).__name__}); move it away and give the same command again") from None
    if found != stage:
        raise UserError(f"{path} holds a {found}, not a {stage}")
    return checkpoint

def frozen(net):
    """The network in eval mode, with no gradient to its weights."""
    return net.eval().requires_grad_(False)

@torch.no_grad()
def ema_update(target, online, decay):
    """target <- decay target + (1 - decay) online: decay 0 copies, decay 1 never moves."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - decay)

def cosine(step, steps, warmup):
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * done))

@contextlib.contextmanager
def deferred_interrupt():
    """A list that Ctrl-C fills, so that no training step is left half done."""
    stop = []
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, handler)

def train_step(net, average, optimizer, loss_fn, decay):
    """One gradient step; `average` follows with that decay. -> {name: tensor}: losses, gradient norm."""
    loss, info = loss_fn(net, average)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    optimizer.step()
    ema_update(average, net, decay)
    return {"loss": loss.detach(), **info, "grad": norm}

def fit(stage, net, loss_fn, run, meta, stop=()):
    """Train `net` for config.<stage>_steps, leaving <stage>.pt and lines in log.jsonl; resumes by itself.

    loss_fn(net, average) draws a batch -> (loss, {name: tensor}); average: net's EMA, frozen, the result;
    meta: what else the checkpoint holds; stop: once true, save and end. All randomness is torch's generator,
    saved too: a run killed at any moment and given again ends in the same bits (on the CPU).
    """
    average = frozen(copy.deepcopy(net))
    config, path, log = run.config, run.out / f"{stage}.pt", run.out / "log.jsonl"
    loss_fn = torch.autocast(run.device.type, torch.bfloat16, config.precision == "bfloat16")(loss_fn)
    steps, lr, warmup, decay = (getattr(config, f"{stage}_{x}") for x in ("steps", "lr", "warmup", "decay"))
    optimizer = torch.optim.AdamW(net.parameters(), lr, (0.95, 0.999), weight_decay=decay, fused=True)
    parts, step, before = dict(net=net, ema=average, optimizer=optimizer), 0, 0.0
    meta = dict(meta, stage=stage, version=VERSION, config=dataclasses.asdict(config))
    if path.exists():
        saved = load_checkpoint(path, stage, run.device)
        step, before = saved["step"], saved["seconds"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"][0].cpu())
        torch.cuda.set_rng_state_all([state.cpu() for state in saved["rng"][1:]])    # none on the CPU
        print(f"{stage}: goes on from step {step:,} of {steps:,}")
    rows = [row for row in read_log(run.out) if row["stage"] != stage or row["step"] <= step]
    with replacing(log) as f:            # without what will be logged again
        f.writelines((json.dumps(row) + "\n").encode() for row in rows)
    sums, mark, began, saved_at = {}, (time.time(), step), time.time(), time.time()
    while step < steps:
        optimizer.param_groups[0]["lr"] = lr * cosine(step, steps, warmup)
        ema_decay = config.target_decay if stage == "student" else min(0.9999, 1 - (1 + step) ** -0.75)
        info = train_step(net, average, optimizer, loss_fn, ema_decay)
        step += 1
        for name, value in info.items():
            sums[name] = sums.get(name, 0) + value
        save = step == steps or stop or time.time() - saved_at > run.save_every
        if save or step % max(1, steps // 20) == 0:
            means = {name: float(v) / (step - mark[1]) for name, v in sums.items()}  # the only wait for CUDA
            if bad := [name for name, v in means.items() if not math.isfinite(v)]:
                raise UserError(f"{stage}: {bad[0]} is {means[bad[0]]} between steps {mark[1]:,} and "
                                f"{step:,}; what was saved before is in {path}; try a smaller --{stage}-lr")
            rate = (step - mark[1]) / (time.time() - mark[0])
            eta = f"{rate:6.1f} steps/s  ETA {datetime.timedelta(seconds=round((steps - step) / rate))}"
            numbers = "  ".join(f"{name} {v:7.4f}" for name, v in means.items())
            print(f"{stage:8}{step:8,}/{steps:,} {step / steps:5.0%}  {numbers}  {eta}", flush=True)
            with open(log, "a") as f:
                json.dump(dict(stage=stage, step=step, steps=steps, **means, steps_per_s=rate), f)
                f.write("\n")
            sums, mark = {}, (time.time(), step)
        if save:                         # after the check: a broken state never replaces a good one
            saved_at = time.time()
            state = {name: part.state_dict() for name, part in parts.items()}
            cuda = torch.cuda.get_rng_state_all() if run.device.type == "cuda" else ()
            weights = torch.cat([x.flatten() for x in state["ema"].values()]).cpu().numpy()
            torch.save(dict(meta, step=step, steps=steps, seconds=before + saved_at - began, **state,
                            id=hashlib.sha256(weights).hexdigest()[:16], rng=[torch.get_rng_state(), *cuda]),
                       buffer := io.BytesIO())           # torch has no clear error for a full disk
            with replacing(path) as f:
                f.write(buffer.getbuffer())
            if stop:
                print(f"{stage}: stopped at step {step:,}, saved; the same command less --retrain goes on")
                raise KeyboardInterrupt

def read_log(out):
    """The rows of log.jsonl, less a last one that was cut short."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else ()
    return [json.loads(line) for line in lines if line.endswith("}")]

# ---- 8. Acting and evaluation ---------------------------------------------------------------------
def make_unet(config, dims, two_levels=False, dropout=0.0):
    """The U-Net of a configuration; dims = sizes of an observation and an action."""
    return UNet1d(dims[1], config.history * dims[0], config.channels, config.kernel, config.blocks,
                  config.patch, config.embed, dropout, two_levels)

def load_reward_model(checkpoint, normalizer, device):
    """R, frozen, as a callable of states and actions in the coordinates of `normalizer`."""
    dims, own = checkpoint["dims"], Normalizer(checkpoint["normalizer"])
    net = frozen(RewardModel(checkpoint["config"]["history"] * dims[0], dims[1])).to(device)
    net.load_state_dict(checkpoint["ema"])
    def change(name, x):                 # R may have been trained on other data than the student
        x = normalizer.decode(name, x.unflatten(1, (-1, len(own.tables[name][0]))))
        return own.encode(name, x).flatten(1)
    return lambda state, action: net(change("obs", state), change("action", action))

class Policy:
    """A teacher.pt or student.pt as loaded, acting: raw observations in, raw chunks of actions out."""
    def __init__(self, checkpoint, config, device="cpu"):
        saved, self.config, self.device = Config(**checkpoint["config"]), config, device
        self.student = checkpoint["stage"] == "student"
        self.net = frozen(make_unet(saved, checkpoint["dims"], two_levels=self.student)).to(device)
        self.net.load_state_dict(checkpoint["ema"])
        self.normalizer = Normalizer(checkpoint["normalizer"])
        self.shape = (saved.horizon, checkpoint["dims"][1])                      # (H, A)
        points = saved.grid_points if self.student else config.teacher_points
        self.sigmas = karras_sigmas(points, device=device).float()
        self.nfe = config.nfe if self.student else 2 * (config.teacher_points - 1)

    @torch.inference_mode()              # a sixth faster at batch 1 than no_grad
    def __call__(self, observations, generators):
        """observations (B, h, O) and one numpy Generator per row -> actions (B, H, A)."""
        def noise(_):
            draws = np.empty((len(generators), *self.shape), np.float32)
            for generator, row in zip(generators, draws):
                generator.standard_normal(dtype=np.float32, out=row)
            return torch.from_numpy(draws).to(self.device)
        observations = torch.from_numpy(np.asarray(observations, np.float32)).to(self.device)
        return self.plan(observations, noise).cpu().numpy()

    def plan(self, observations, noise):
        """The same in torch: observations (B, h, O); noise: anything -> fresh (B, H, A) ~ N(0, 1)."""
        state = self.normalizer.encode("obs", observations).flatten(1)           # (B, h O)
        if self.student:
            x, _ = student_sample(lambda x, t, k: student_jump(self.net, x, t, k, state), noise(None),
                                  self.sigmas, self.nfe, self.config.init_noise, noise)
        else:
            x, _ = heun_sample(lambda x, t: denoise(self.net, x, t, state),
                               self.config.init_noise * noise(None), self.sigmas)
        return self.normalizer.decode("action", x.clamp(-1, 1))                  # in the action box

def evaluate(policy, make_env, episodes=20, first_seed=0, history=1, execute=1):
    """Closed-loop returns of `episodes` episodes in lockstep, one policy call for all still running.

    policy: (observations (B, h, O), B numpy Generators) -> actions (B, H, A), of which `execute` are carried
    out; B is filled up to a multiple of 16. Episode i has seed first_seed + i, simulator and noise. Returns
    sum env.step's rewards (released: running maxima). -> dict(returns, lengths, simulator_s, network_s)
    """
    envs = [make_env() for _ in range(episodes)]
    pasts = [[env.reset(seed=first_seed + i)[0]] * history for i, env in enumerate(envs)]
    generators = [np.random.default_rng(first_seed + i) for i in range(episodes)]
    returns, lengths, running = np.zeros(episodes), np.zeros(episodes, int), list(range(episodes))
    network_s, began, told = 0.0, time.perf_counter(), time.perf_counter()
    while running:
        if time.perf_counter() > told + 10:
            told = time.perf_counter()
            print(f"step {lengths.max()}: {len(running)} of {episodes} episodes go on", flush=True)
        asked, spare = time.perf_counter(), -len(running) % 16   # other batch sizes may round differently
        plans = policy(np.array([pasts[i] for i in running + running[:1] * spare]),
                       [generators[i] for i in running] + [np.random.default_rng(0)] * spare)
        network_s += time.perf_counter() - asked
        for i, plan in zip(running, plans):
            for action in plan[:execute]:
                observation, reward, terminated, truncated, _ = envs[i].step(action)
                pasts[i] = pasts[i][1:] + [observation]
                returns[i] += reward
                lengths[i] += 1
                if terminated or truncated:
                    running = [j for j in running if j != i]     # the loop goes on over the old list
                    break
    return dict(returns=returns.tolist(), lengths=lengths.tolist(), network_s=network_s,
                simulator_s=time.perf_counter() - began - network_s)

def normalized_score(env, value):
    """D4RL score of a return or an array: 0 = random policy, 100 = expert. NaN if env has no reference."""
    _, random, expert, _ = TASKS.get(env.split("-")[0], (None, math.nan, math.nan, None))
    return 100 * (value - random) / (expert - random)

# ---- 9. The pipeline: data -> teacher, reward model -> student -> score ---------------------------
STAGES = {"teacher": ("common", "network", "teacher"), "reward": ("common", "reward"),
          "student": ("common", "network", "student")}   # stage -> parts of Config its checkpoint depends on

def refuse(path, pairs, way_out):
    """Raise UserError if a checkpoint differs from what is asked; pairs: (name, saved, asked)."""
    if wrong := [f"  {name}: {a} in the file, {b} asked for" for name, a, b in pairs if a != b]:
        raise UserError("\n".join([f"{path} was made otherwise:", *wrong, f"Give the same, {way_out}."]))

class Pipeline:
    """The dataset and the three stages: each is loaded if it is there and trained if it is not."""
    def __init__(self, run):
        self.run, config, normalizer = run, run.config, None
        dataset = self.dataset = load_dataset(run.env, run.data)
        self.dims = [dataset.observations.shape[1], dataset.actions.shape[1]]
        env = simulator(run.env, run.data)()
        sizes = [math.prod(space.shape) for space in (env.observation_space, env.action_space)]
        if self.dims != sizes:
            raise UserError(f"{dataset.name} has observations of {self.dims[0]} and actions of {self.dims[1]}"
                            f" numbers, {run.env} has {sizes[0]} and {sizes[1]}; is --env right?")
        if run.teacher:                  # its coordinates are the student's too
            saved = load_checkpoint(run.teacher, "teacher", run.device)
            refuse(run.teacher, [("sizes", saved["dims"], self.dims)], "another file")
            normalizer = Normalizer(saved["normalizer"])
        self.batches = Batches(dataset, config, run.device, normalizer)
        print(dataset, self.batches.counts, sep="\n      ")
        for stage in STAGES:             # epochs -> steps
            steps, batch = getattr(config, f"{stage}_steps"), getattr(config, f"{stage}_batch")
            rows = len(self.batches.obs if stage == "reward" else self.batches.starts)
            setattr(config, f"{stage}_steps", steps if steps > 0 else math.ceil(-steps * rows / batch))
        self.meta = dict(env=run.env, dims=self.dims, dataset=dataset.summary(),
                         normalizer=self.batches.normalizer.tables)

    def build(self, stage, saved):
        """(network, loss_fn of it and its average) of a stage; saved: the checkpoints it builds on."""
        config, batches, device, dims = self.run.config, self.batches, self.run.device, self.dims
        if stage == "teacher":
            def loss_fn(net, _):
                state, x0 = batches.windows(config.teacher_batch)
                return edm_loss(lambda x, t: denoise(net, x, t, state), x0, lognormal_levels(len(x0), device),
                                torch.randn_like(x0), DISTANCES[config.teacher_distance])
            return make_unet(config, dims).to(device), loss_fn
        if stage == "reward":
            def loss_fn(net, _):
                state, action, target = batches.transitions(config.reward_batch)
                return reward_model_loss(net(state, action), target)
            return RewardModel(config.history * dims[0], dims[1]).to(device), loss_fn
        teacher, student = frozen(make_unet(config, dims)), make_unet(config, dims, True, config.dropout)
        teacher.load_state_dict(saved["teacher"]["ema"])
        warm_start(student, teacher.to(device))
        R = load_reward_model(saved["reward"], batches.normalizer, device) if config.reward_weight else None
        return student.to(device), lambda net, average: distillation_loss(
            net, average, teacher, R, *batches.windows(config.student_batch), config)

    def depends(self, stage, saved):
        """Everything that a stage's checkpoint depends on, name -> value."""
        text = "{name} ({source}, {transitions:,} rows, mean return {return_mean:.6g}, SHA-256 {sha256:.16})"
        fields = [f.name for f in dataclasses.fields(Config) if f.metadata["stage"] in STAGES[stage]]
        return dict(env=self.run.env, task=self.run.env.split("-")[0], dims=self.dims,
                    dataset=text.format(**self.meta["dataset"]),
                    **{name: getattr(self.run.config, name) for name in fields},
                    **{f"{name}_id": checkpoint["id"] for name, checkpoint in (saved or {}).items()})

    def obtain(self, stage, saved=None):
        """The finished checkpoint of a stage: --teacher/--reward FILE, the run folder's, or trained now."""
        run, elsewhere = self.run, getattr(self.run, stage, None)
        path = Path(elsewhere or run.out / f"{stage}.pt")
        depends = self.depends(stage, saved)
        if stage in run.retrain and path.exists() and not elsewhere:
            os.replace(path, path.with_suffix(f".{time.time_ns()}.old.pt"))
        if elsewhere or path.exists():
            checkpoint = load_checkpoint(path, stage, run.device)
            net = ("horizon", "channels", "kernel", "blocks", "patch", "embed") if stage == "teacher" else ()
            same = ("task", "dims", "history", "steps", *net) if elsewhere else depends   # any data
            was = checkpoint["config"] | checkpoint["depends"] | {"steps": checkpoint["step"]}
            asked = depends | {"steps": checkpoint["steps"]}         # a file from elsewhere is finished
            refuse(path, [(name, was.get(name), asked[name]) for name in same],
                   "another file" if elsewhere else f"another --data or --out, or --retrain {stage}")
            if elsewhere or checkpoint["step"] == checkpoint["steps"]:
                print(f"{stage}: {path}, {checkpoint['step']:,} steps in {checkpoint['seconds']:.0f} s")
                return checkpoint
        with replacing(run.out / "config.json") as f:
            f.write(json.dumps(dataclasses.asdict(run.config), indent=2).encode())
        torch.manual_seed(run.config.seed)
        net, loss_fn = self.build(stage, saved)
        print(f"{stage}: {sum(p.numel() for p in net.parameters()):,} parameters")
        with deferred_interrupt() as stop:
            fit(stage, net, loss_fn, run, dict(self.meta, depends=depends), stop)
        with contextlib.suppress(ImportError):      # ractd.py alone, or no matplotlib: no picture
            from reproduce import plot_curves
            plot_curves(run.out)
        return load_checkpoint(path, stage, run.device)

def assess(run, saved, actor, name):
    """Score saved[actor] in the simulator; write <out>/<name>, print a table."""
    config, checkpoint = run.config, saved[actor]
    run.out.mkdir(parents=True, exist_ok=True)
    policy = Policy(checkpoint, config, run.device)
    print(f"evaluation: {config.episodes} episodes, {policy.nfe} network call(s) per action", flush=True)
    result = evaluate(policy, simulator(run.env, run.data), config.episodes, config.first_seed,
                      config.history, config.execute)
    states, generators = np.zeros((1, config.history, checkpoint["dims"][0])), [np.random.default_rng(0)]
    timer = Timer("policy(states, generators)", globals=locals(), num_threads=torch.get_num_threads())
    data, returns, n = checkpoint["dataset"], np.array(result["returns"]), len(result["returns"])
    method = "teacher" if not policy.student else "RACTD" if checkpoint["config"]["reward_weight"] else "CTD"
    scores, ms = normalized_score(run.env, returns), 1000 * timer.blocked_autorange().median
    sem = scores.std(ddof=1) / n ** 0.5 if n > 1 else math.nan
    git = subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty 2>{os.devnull}")
    metrics = dict(
        env=run.env, dataset=data, method=method, nfe=policy.nfe, init_noise=config.init_noise,
        episodes=n, seeds=list(range(config.first_seed, config.first_seed + n)), **result,
        return_mean=returns.mean(), normalized_score_mean=scores.mean(), normalized_score_sem=sem,
        seed=checkpoint["config"]["seed"], train_seconds={stage: c["seconds"] for stage, c in saved.items()},
        ms_per_action=ms, device=str(run.device), git_commit=git or None,
        versions=dict(ractd=VERSION, python=sys.version.split()[0], **{
            name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}))
    path = run.out / name.format(**metrics)
    metrics = {key: None if value != value else value for key, value in metrics.items()}     # JSON has no NaN
    with replacing(path) as f:
        f.write(json.dumps(metrics, indent=2, default=float).encode())
    print(f"\n{run.env} on {data['name']} ({data['source']}{data['note']}), {n} episodes from seed "
          f"{config.first_seed}\n{'':<32}   return    score  std. err.  ms/action")
    for label, value, more in (
            ("data, best episode", data["return_best"], ""), ("data, mean episode", data["return_mean"], ""),
            (f"{method}, {policy.nfe} network call(s)", returns.mean(), f"{sem:11.1f}{ms:11.2f}")):
        print(f"{label:<32}{value:9.0f}{normalized_score(run.env, value):9.1f}{more}")
    print(f"All numbers: {path}; everything: {run.out}")

# ---- 10. Command line -----------------------------------------------------------------------------
COMMANDS = {"data": "fetch or make the dataset and print what is in it",
            "teacher": "train the EDM diffusion teacher", "reward": "train the reward model (return-to-go)",
            "distill": "whatever of the above is missing, then the student, then its score",
            "evaluate": "act with a saved student or teacher",      # the others are in reproduce.py
            "bench": "time per action and per training step (Table 4), into bench.json",
            "ablate": "one of the paper's ablations (Table 5), into ablate_<what>.json and .png",
            "plot": "returns of data, teacher, CTD and RACTD (Figure 3), score against time, training curves",
            "export": "a saved policy as one file that torch loads without this program"}

def build_parser():
    """One subparser per command; the hyperparameter flags are generated from Config."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--env", help="one of " + ", ".join(ENVS) + "; optional with minari:ID")
    add("--data", default="", help="FILE.hdf5 in D4RL's layout, minari:ID, or standin (default: the D4RL "
        "file of --env, downloaded if need be; without a network a stand-in)")
    add("--out", help="folder for everything written (default: runs/<env>)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    add("--preset", choices=PRESETS, default="default", help="default: for two cores; paper: published sizes")
    add("--save-every", type=float, default=30.0, help="seconds between checkpoints (default: 30)")
    add("--teacher", metavar="FILE", help="a teacher trained elsewhere; flags of its training are ignored")
    add("--reward", metavar="FILE", help="a reward model trained elsewhere, likewise")
    add("--retrain", choices=STAGES, action="append", default=[], help="train it anew, and the student")
    for f in dataclasses.fields(Config):
        kind, many, choices = (int, "+", None) if f.type is tuple else (f.type, None, f.metadata["choices"])
        add("--" + f.name.replace("_", "-"), dest="config_" + f.name, type=kind, nargs=many, choices=choices,
            metavar=None if choices else kind.__name__.upper(),
            help=f"{f.metadata['stage']}: {f.metadata['help']} (default: {f.default})")
    parser = argparse.ArgumentParser(prog="ractd.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add = {name: commands.add_parser(
        name, help=text, description=f"{text} [in brackets: the released value]", parents=[common],
        allow_abbrev=False).add_argument for name, text in COMMANDS.items()}
    for name in ("teacher", "reward", "distill"):
        add[name]("--dry-run", action="store_const", const="dry_run", dest="command",
                  default=argparse.SUPPRESS, help="five steps of each stage, and the time of all")
    for name in ("evaluate", "export"):
        add[name]("--model", choices=("student", "teacher"), help="default: student; with --teacher: teacher")
    add["evaluate"]("--video", metavar="FILE.gif", help="draw the first episode, where MuJoCo can draw")
    add["ablate"]("--what", required=True, choices="reward-stage reward-weight losses nfe init-noise".split())
    add["export"]("file", nargs="?", help="file to write (default: <out>/policy.pt2)")
    return parser

def resolve(run):
    """Check the parsed command line and put what it means in its place: config, given, env, out, device."""
    run.given = {key.removeprefix("config_"): tuple(value) if isinstance(value, list) else value
                 for key, value in vars(run).items() if key.startswith("config_") and value is not None}
    sigma = TASKS[run.env.split("-")[0]][-1] if run.env in ENVS else Config.reward_weight
    config = run.config = Config(**PRESETS[run.preset] | {"reward_weight": sigma} | run.given)
    if run.command not in ("evaluate", "export"):        # there the saved model brings its own
        config.check()
    if not run.env and run.data.startswith("minari:"):
        run.env = run.data.removeprefix("minari:")
    elif run.env not in ENVS:
        near = difflib.get_close_matches(run.env or "", ENVS, len(ENVS), 0)
        raise UserError(f"--env {run.env or '(missing)'} is unknown; nearest first: " + ", ".join(near))
    try:
        run.device = torch.device(run.device)
        torch.zeros(1, device=run.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {run.device}: {str(error).splitlines()[0]}; try cpu") from None
    torch.set_num_threads(min(run.threads, 1024) if run.threads > 0 else torch.get_num_threads())
    run.out = Path(run.out or Path("runs") / run.env.replace("/", "-"))
    run.retrain += ["student"] * bool(run.retrain)       # which depends on both others

def train(run):
    """`teacher`, `reward`; `distill`: whatever is missing of both, the student, its score."""
    pipeline, saved = Pipeline(run), {}
    if run.command != "distill":
        return pipeline.obtain(run.command)
    for stage in ("teacher", "reward") if run.config.reward_weight else ("teacher",):
        saved[stage] = pipeline.obtain(stage)
    saved["student"] = pipeline.obtain("student", dict(saved))
    assess(run, saved, "student", "metrics.json")

def recall(run):
    """The checkpoint that --model names: it brings its configuration, the command line how to act with it."""
    run.model = run.model or ("teacher" if run.teacher else "student")
    path = getattr(run, run.model, None) or run.out / f"{run.model}.pt"
    saved, asked = load_checkpoint(path, run.model, run.device), run.config
    if saved["dataset"]["source"] == "minari":       # acts where its data came from
        run.data = run.data or "minari:" + saved["dataset"]["name"]
    acting = ["episodes", "first_seed"] + [
        name for name in run.given if Config.__dataclass_fields__[name].metadata["stage"] == "acting"]
    run.config = dataclasses.replace(Config(**saved["config"]), **{x: getattr(asked, x) for x in acting})
    pairs = [(name, getattr(run.config, name), value) for name, value in run.given.items()]
    refuse(path, [("env", saved["env"], run.env), *pairs], "no such flag, or another --out")
    run.config.check()
    return saved

def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    run = build_parser().parse_args(argv)
    try:
        resolve(run)
        if run.command == "data":
            print(load_dataset(run.env, run.data))
        elif run.command == "evaluate":
            saved = recall(run)
            assess(run, {run.model: saved}, run.model,
                   "evaluate_{method}_nfe{nfe}_noise{init_noise:g}_from{seeds[0]}_n{episodes}.json")
            if run.video:
                import reproduce
                reproduce.video(run, saved)
        elif run.command in ("teacher", "reward", "distill"):
            train(run)
        else:
            import reproduce
            getattr(reproduce, run.command)(run)
    except (UserError, OSError, ImportError) as error:
        print("ractd.py:", error, "(nothing saved is lost)" * isinstance(error, OSError),
              "(needs requirements.txt and reproduce.py)" * isinstance(error, ImportError), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.modules["ractd"] = sys.modules["__main__"]       # reproduce.py imports this very module
    sys.exit(main())
