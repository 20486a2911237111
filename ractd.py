"""RACTD: Reward-Aware Consistency Trajectory Distillation (arXiv 2506.07822v2, ICLR 2026), one file.

DOCSTRING
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

# ---- 1. Configuration -----------------------------------------------------------------------------

VERSION = "0.1.0"
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.02, 80.0, 0.5       # noise range ("0" in the equations is smin)

# Simulator, return of a random policy and of an expert: D4RL normalised score 0 and 100.
TASKS = {"hopper": ("Hopper-v4", -20.272305, 3234.3),
         "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
         "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0)}

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
# env -> (released reward weight sigma, bytes and SHA-256 of the D4RL v2 file)
ENVS = {name: (float(sigma), int(size), sha256) for name, sigma, size, sha256 in map(str.split, """
halfcheetah-medium 0.5 237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
halfcheetah-medium-replay 1.0 59448533 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
halfcheetah-medium-expert 0.0 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
hopper-medium 1.0 141484200 828ab916d1ff570ac0655af7d29390b652a6f2f4bbd05b311ac91d57fe38576c
hopper-medium-replay 1.0 77251678 3ebbc1b9b0e98188923bd2cc0fb80541980e8c6a0ebdb8139910b0aa0bde1646
hopper-medium-expert 0.5 281841200 3c599b8c9576dd1df13fd36a48b9c7e9a0ec9ce4a2db4fe836f7712a640b1d00
walker2d-medium 0.4 232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
walker2d-medium-replay 0.5 86323963 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
walker2d-medium-expert 0.2 462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
""".strip().splitlines())}


class UserError(Exception):
    """Something the user can put right: printed as a sentence, exit code 2."""


def opt(default, stage, help, low=None, high=None, choices=None):
    """A hyperparameter: default, the first stage that depends on it, help text, valid range."""
    return dataclasses.field(default=default, metadata=dict(
        stage=stage, help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    """Every hyperparameter, each a command-line flag (`ractd.py distill --help`)."""

    seed: int = opt(0, "data", "seed of everything but evaluation", 0)
    horizon: int = opt(16, "data", "c: actions in a planned chunk", 1, 1024)
    history: int = opt(1, "data", "h: past states the plan is conditioned on", 1, 64)

    channels: tuple = opt((64, 128), "network", "U-Net channels per level (released: 512,1024,2048)")
    kernel: int = opt(3, "network", "U-Net convolution width, odd (released: 5)", 1, 31)
    blocks: int = opt(1, "network", "residual blocks per U-Net level (released: 2)", 1, 8)
    patch: int = opt(4, "network", "actions folded into one U-Net position (released: 1)", 1, 64)
    embed: int = opt(128, "network", "width of the noise-level embedding (released: 256)", 8, 4096)

    teacher_steps: int = opt(4000, "teacher", "gradient steps; -n = n epochs (released: -1000)")
    teacher_batch: int = opt(256, "teacher", "windows per step (released: 1024)", 1)
    teacher_lr: float = opt(1e-3, "teacher", "peak AdamW learning rate (released: 1e-4)", 1e-9, 1)
    teacher_warmup: int = opt(200, "teacher", "linear warm-up, steps (released: 2000)", 0)
    teacher_decay: float = opt(1e-6, "teacher", "AdamW weight decay", 0, 10)
    teacher_distance: str = opt("squared", "teacher", "d of Eq. 4: the ODE needs the mean (paper: "
                                "pseudo-huber, a median)", choices=("squared", "pseudo-huber"))

    gamma: float = opt(0.99, "reward", "discount of the return-to-go", 0, 0.99999)
    timeout: str = opt("extend", "reward", "return-to-go at a time limit: extend = the last 100 rewards' "
                       "mean for ever; cut = nothing (released)", choices=("extend", "cut"))
    reward_steps: int = opt(4000, "reward", "gradient steps; -n = n epochs (released: -50)")
    reward_batch: int = opt(256, "reward", "transitions per step (released: 64)", 1)
    reward_lr: float = opt(1e-3, "reward", "peak AdamW learning rate (released: 2e-4)", 1e-9, 1)
    reward_warmup: int = opt(20, "reward", "linear warm-up, steps", 0)
    reward_decay: float = opt(1e-3, "reward", "AdamW weight decay", 0, 10)
    reward_members: int = opt(1, "reward", "networks averaged in R (released: 1)", 1, 64)
    reward_expectile: float = opt(0.5, "reward", "expectile of the return-to-go that R fits (paper: 0.5, "
                                  "the mean)", 0.01, 0.99)

    student_steps: int = opt(1500, "student", "gradient steps; -n = n epochs (released: -400)")
    student_batch: int = opt(256, "student", "windows per step (released: 4800)", 1)
    student_lr: float = opt(5e-4, "student", "peak AdamW learning rate (released: 1e-4)", 1e-9, 1)
    student_warmup: int = opt(100, "student", "linear warm-up, steps (released: 500)", 0)
    student_decay: float = opt(1e-4, "student", "AdamW weight decay", 0, 10)
    dropout: float = opt(0.0, "student", "dropout in the student while it trains (released: 0.2)", 0, 0.9)
    grid_points: int = opt(80, "student", "N: levels of the Karras grid that t, u, k are drawn from", 3, 10_000)
    target_decay: float = opt(0.99, "student", "EMA decay of sg(theta), which is also the network that "
                              "acts (released: 0, a copy)", 0, 1)
    ctm_weight: float = opt(1.0, "student", "alpha of Eq. 9", 0, 1e6)
    dsm_weight: float = opt(1.0, "student", "beta of Eq. 9", 0, 1e6)
    reward_weight: float = opt(-1.0, "student", "sigma of Eq. 9; 0 = CTD, no reward; -1 = the released "
                               "weight of --env", -1, 1e6)
    reward_scale: str = opt("slope", "student", "slope = R over its batch mean |dR/da|, so that sigma is a "
                            "pull on the action in the CTM loss's units; none = Eq. 8", choices=("slope", "none"))
    ctm_distance: str = opt("pseudo-huber", "student", "d of Eq. 5", choices=("squared", "pseudo-huber"))
    dsm_target: str = opt("denoiser", "student", "what Eq. 7 compares with x0: denoiser = g(x_t, t, t), "
                          "keeps unequal modes; jump = G(x_t, t, 0) (paper)", choices=("denoiser", "jump"))
    dsm_noise: str = opt("lognormal", "student", "noise of Eq. 7: the teacher's, or mixed = half of it at "
                         "0.76..80 (released)", choices=("lognormal", "mixed"))
    dsm_distance: str = opt("squared", "student", "d of Eq. 7 (paper: pseudo-huber)",
                            choices=("squared", "pseudo-huber"))
    init_noise: float = opt(80.0, "student", "scale of the noise a sample starts from; may be changed when "
                            "acting (model: 80; released: 1)", 0, 1e4)

    episodes: int = opt(20, "acting", "evaluation episodes (100 for a report)", 1, 100_000)
    first_seed: int = opt(0, "acting", "episode i has seed first_seed + i", 0)
    nfe: int = opt(1, "acting", "network calls per student sample", 1, 80)
    teacher_points: int = opt(20, "acting", "levels n of the teacher's Heun sampler, 2 (n - 1) calls "
                              "(paper: 80)", 2, 10_000)
    candidates: int = opt(1, "acting", "best of N samples by R, in one call (beyond the paper)", 1, 10_000)
    execute: int = opt(1, "acting", "actions of a plan executed before the next plan", 1)


PRESETS = {"default": {}, "paper": dict(
    channels=(512, 1024, 2048), kernel=5, blocks=2, patch=1, embed=256,
    teacher_steps=-1000, teacher_batch=1024, teacher_lr=1e-4, teacher_warmup=2000,
    reward_steps=-50, reward_batch=64, reward_lr=2e-4,
    student_steps=-400, student_batch=4800, student_lr=1e-4, student_warmup=500, dropout=0.2,
    target_decay=0.0, teacher_points=80, episodes=100)}

# ---- 2. Data --------------------------------------------------------------------------------------


@dataclass
class Dataset:
    """Logged transitions, one row each, in the order of their episodes."""

    name: str
    source: str                 # "D4RL", "file", "minari" or "stand-in"
    observations: np.ndarray    # (T, O) float32
    actions: np.ndarray         # (T, A) float32
    rewards: np.ndarray         # (T,) float32
    ends: np.ndarray            # (E,) last row of each episode; the last one is T - 1
    terminated: np.ndarray      # (E,) bool: ended by the task, not by a time limit or the file's end

    def summary(self):
        """Counts and undiscounted episode returns, as plain numbers."""
        begins = np.concatenate([[0], self.ends[:-1] + 1])
        returns = np.add.reduceat(self.rewards.astype(np.float64), begins)
        return dict(name=self.name, source=self.source, transitions=len(self.rewards),
                    episodes=len(self.ends), return_best=float(returns.max()),
                    return_mean=float(returns.mean()), return_worst=float(returns.min()))


def load_dataset(env, data=None):
    """--data: FILE.hdf5 in D4RL's layout, minari:ID, "standin", or None for the D4RL file of env."""
    if data is None and (path := fetch_d4rl(env)):
        return read_hdf5(path, f"{env}-v2", "D4RL")
    if data in (None, "standin"):
        return read_minari(make_standin(env), "stand-in")
    if data.startswith("minari:"):
        return read_minari(data.removeprefix("minari:"), "minari")
    return read_hdf5(Path(data), Path(data).name, "file")


def fetch_d4rl(env):
    """Path of env's file in D4RL's own cache, downloaded if need be; None where there is no network."""
    _, size, sha256 = ENVS[env]
    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    path = folder / (env.replace("-", "_") + "-v2.hdf5")
    partial = path.with_suffix(f".{os.getpid()}.part")

    def check(file, advice):
        with open(file, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != sha256:
            raise UserError(f"{path}: not the published file (SHA-256 {found[:12]}... instead of "
                            f"{sha256[:12]}...); {advice}")
        return path

    if path.exists():
        return check(path, f"delete it, or pass --data {path} to use it under its own name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(D4RL_URL + path.name, timeout=15) as reply, open(partial, "wb") as f:
            done = 0
            while block := reply.read(1 << 20):
                done += f.write(block)
                print(f"\r{path.name} [{'#' * (30 * done // size):<30}] {done / 1e6:.0f} of "
                      f"{size / 1e6:.0f} MB", end="", flush=True)
            print()
        if done != size:
            raise UserError(f"the download of {path.name} broke off after {done:,} of {size:,} bytes; "
                            "give the same command again, or pass --data standin")
        check(partial, "give the same command again, or pass --data standin")
        os.replace(partial, path)
        return path
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        print(f"{path.name} is not in {folder} and cannot be downloaded ({error}).\nInstead, a stand-in is "
              "made or reused: every step that Augmented Random Search takes in the same simulator. Scores\n"
              "on it are NOT comparable with the paper's. For the real data, put the file into that folder.")
        return None
    finally:
        partial.unlink(missing_ok=True)


# Per task: directions tried and used, step, noise and survival bonus of the search; search steps per step
# that the dataset keeps.
SEARCH = {"hopper": (8, 4, 0.02, 0.025, 1.0, 1.0), "walker2d": (20, 10, 0.03, 0.025, 1.0, 3.0),
          "halfcheetah": (8, 4, 0.02, 0.03, 0.0, 4.0)}


def random_search(play, shape, rng, steps, directions, top, alpha, nu, bonus):
    """Augmented Random Search V2-t (Mania, Guy, Recht 2018) for linear policies M (s - mean) / std.

    play((M, mean, std)) -> an episode. Returns every episode tried, in order, and for each update
    (mean return of its episodes, unperturbed policy).
    """
    M, mean, std, seen, tried, updates = np.zeros(shape), 0.0, 1.0, [0, 0.0, 0.0], [], []
    while seen[0] < steps:
        delta = rng.normal(size=(directions, *shape))
        new = [play((M + nu * d, mean, std)) for pair in delta for d in (pair, -pair)]
        returns = np.array([e["rewards"].sum() for e in new])
        tried, updates = tried + new, updates + [(returns.mean(), (M, mean, std))]
        # standing still earns the survival bonus too: a search that counted it would learn to stand
        gain = (returns - [bonus * len(e["rewards"]) for e in new]).reshape(-1, 2)      # r+, r-
        used = np.argsort(gain.max(1))[-top:]
        slope = np.tensordot(gain[used, 0] - gain[used, 1], delta[used], 1)
        M = M + alpha / (top * gain[used].std()) * slope
        s = np.concatenate([e["observations"] for e in new], dtype=float)
        seen = [a + b for a, b in zip(seen, (len(s), s.sum(0), (s * s).sum(0)))]
        mean = seen[1] / seen[0]
        std = np.sqrt(np.maximum(seen[2] / seen[0] - mean**2, 1e-8))
    return tried, updates


def collect_standin(env, transitions=200_000, seed=0):
    """Episodes of about `transitions` steps in the simulator of a D4RL name, from a seeded search.

    medium-replay: all that the search tried; medium: its policy half way in return; medium-expert:
    half that, half its best. Each episode: observations (L+1, O), actions (L, A), rewards (L,), all
    float32, and whether it terminated. Same seed and libraries, same arrays.
    """
    import gymnasium
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    task, kind = env.split("-", 1)
    world = gymnasium.make(TASKS[task][0], disable_env_checker=True)
    world.reset(seed=seed)               # later resets go on from here
    *settings, factor = SEARCH[task]
    rng, total = np.random.default_rng(seed), (factor + (kind != "medium-replay")) * transitions
    began = said = time.time()
    done, best = 0, -math.inf

    def play(policy, noise=0.0):
        nonlocal said, done, best
        (M, mean, std), states, actions, rewards, end = policy, [world.reset()[0]], [], [], [False]
        while not any(end):              # end = terminated, truncated
            action = M @ ((states[-1] - mean) / std) + (noise and noise * rng.normal(size=len(M)))
            actions.append(np.clip(action, -1, 1).astype(np.float32))    # the one that acts is logged
            state, reward, *end, _ = world.step(actions[-1])
            states.append(state)
            rewards.append(reward)
        done, best = done + len(rewards), max(best, sum(rewards))
        if time.time() - said > 5:
            said, left = time.time(), max(0, total / done - 1) * (time.time() - began)
            print(f"stand-in for {env}: {min(done / total, 1):4.0%} of {total:,.0f} steps, best return "
                  f"{best:.0f}, ETA {left:.0f} s", flush=True)
        return dict(observations=np.float32(states), actions=np.float32(actions),
                    rewards=np.float32(rewards), terminated=bool(end[0]))

    shape = world.action_space.shape + world.observation_space.shape
    tried, updates = random_search(play, shape, rng, factor * transitions, *settings)
    if kind == "medium-replay":          # evenly spaced whole episodes where the search took longer
        count = round(len(tried) * min(transitions / done, 1))
        return [tried[i] for i in np.linspace(0, len(tried) - 1, count, dtype=int)]
    top, expert = max(updates, key=lambda update: update[0])
    _, medium = min(updates, key=lambda update: abs(update[0] - (updates[0][0] + top) / 2))
    episodes, begin = [], done
    while done < begin + transitions:    # action noise, or all episodes would be nearly the same
        late = kind == "medium-expert" and done >= begin + transitions / 2
        episodes.append(play(expert if late else medium, noise=0.1))
    return episodes


def make_standin(env, transitions=200_000):
    """Id of the local Minari dataset that stands in for env's D4RL file; collected if it is not there."""
    import minari
    dataset_id = f"ractd/{env}-standin-v0"
    root = minari.storage.get_dataset_path()
    if (root / dataset_id).exists():
        return dataset_id
    buffers = []
    for e in collect_standin(env, transitions):
        last = np.arange(len(e["rewards"])) == len(e["rewards"]) - 1
        buffers.append(minari.data_collector.EpisodeBuffer(
            observations=e["observations"], actions=e["actions"], rewards=e["rewards"],
            terminations=last & e["terminated"], truncations=last & (not e["terminated"])))
    # Minari writes in place, and half a dataset would pass for one: write aside, then rename
    with tempfile.TemporaryDirectory(prefix=".ractd-", dir=root) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no author, no link: it stays local
        os.environ["MINARI_DATASETS_PATH"], before = folder, os.environ.get("MINARI_DATASETS_PATH")
        try:
            minari.create_dataset_from_buffers(dataset_id, buffers, env=TASKS[env.split("-")[0]][0],
                                               algorithm_name="ARS V2-t")
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before
        os.renames(f"{folder}/{dataset_id}", root / dataset_id)
    return dataset_id


def read_hdf5(path, name, source):
    """A file in D4RL's layout: observations, actions, rewards, terminals, timeouts, one row a step."""
    import h5py
    if not path.is_file():
        raise UserError(f"--data {path}: there is no such file")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path) as f:
            if missing := [key for key in keys if key not in f]:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(f) or 'nothing'}")
            arrays = [np.asarray(f[key][()]) for key in keys]
    except (OSError, TypeError) as error:
        raise UserError(f"{path} is no HDF5 file, or is cut short ({error})") from None
    return assemble(name, source, *arrays)


def read_minari(dataset_id, source):
    """A Minari dataset of Box observations and actions: a local one, or through minari's download."""
    import minari
    try:
        local = dataset_id in minari.list_local_datasets()
        dataset = minari.load_dataset(dataset_id, download=not local)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:           # minari raises many types: bad id, no network, missing extra
        raise UserError(f"minari cannot load {dataset_id!r} ({type(error).__name__}: {error}); a remote "
                        "dataset needs a network and `pip install 'minari[hf,gcs]'`") from None
    if not episodes or any(isinstance(x, (dict, tuple)) for e in episodes[:1] for x in (e.observations, e.actions)):
        raise UserError(f"minari dataset {dataset_id} is empty or its spaces are not Box")
    ends = np.cumsum([len(e.rewards) for e in episodes]) - 1
    terminals, timeouts = np.zeros((2, ends[-1] + 1), bool)
    terminals[ends], timeouts[ends] = [bool(e.terminations[-1]) for e in episodes], True
    # an episode holds one observation more than actions: the last one, on which nobody acted
    return assemble(dataset_id, source, *(np.concatenate([x(e) for e in episodes]) for x in (
        lambda e: e.observations[:-1], lambda e: e.actions, lambda e: e.rewards)), terminals, timeouts)


def assemble(name, source, observations, actions, rewards, terminals, timeouts):
    """Check the arrays, saying what is wrong and where, and find the episodes."""
    for key, array, dims in (("observations", observations, 2), ("actions", actions, 2),
                             ("rewards", rewards, 1), ("terminals", terminals, 1), ("timeouts", timeouts, 1)):
        if array.dtype.kind not in "fiub":
            raise UserError(f"{name}: {key} has type {array.dtype}, not numbers")
        if array.ndim != dims or 0 in array.shape or len(array) != len(observations):
            raise UserError(f"{name}: {key} has shape {array.shape}, expected ({len(observations)},"
                            f"{' D)' if dims == 2 else ')'} as for {len(observations)} observations")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise UserError(f"{name}: {key} is NaN or infinite in row {row}")
    terminals, timeouts = terminals.astype(bool), timeouts.astype(bool)
    ends = np.flatnonzero(terminals | timeouts)
    if not len(ends):
        raise UserError(f"{name}: no episode ends; terminals and timeouts are all false")
    if ends[-1] != len(rewards) - 1:     # cut off by the file's end: kept, and treated as a time limit
        ends = np.append(ends, len(rewards) - 1)
    return Dataset(name, source, observations.astype(np.float32), actions.astype(np.float32),
                   rewards.astype(np.float32), ends, terminals[ends])


def window_starts(ends, horizon):
    """First rows of all windows of `horizon` rows inside one episode, the last window included: (W,)."""
    begins = np.concatenate([[0], ends[:-1] + 1])
    return np.concatenate([np.arange(b, max(b, e - horizon + 2)) for b, e in zip(begins, ends)])


def returns_to_go(rewards, ends, terminated, gamma=0.99, timeout="extend"):
    """Discounted sum of rewards from each row to its episode's end: (T,) float64.

    Nothing follows a termination. After a time limit "extend" adds what the episode's last 100
    rewards would give for ever, mean / (1 - gamma); "cut" adds nothing (released), so that states
    near step 1000 look bad.
    """
    begins = np.concatenate([[0], ends[:-1] + 1])
    after = np.array([rewards[max(b, e - 99):e + 1].mean() / (1 - gamma) if timeout == "extend" and not t
                      else 0.0 for b, e, t in zip(begins, ends, terminated)])
    result, lengths = np.empty(len(rewards)), ends - begins + 1
    for back in range(lengths.max()):    # from the last rows backwards, all episodes at once
        alive = lengths > back
        rows = ends[alive] - back
        result[rows] = after[alive] = rewards[rows] + gamma * after[alive]
    return result


class Normalizer:
    """Min-max maps to [-1, 1] per dimension, by name ("obs", "action", "return"); saved with every model.

    A constant dimension is encoded as 0 and decoded to itself.
    """

    def __init__(self, tables):
        self.tables = tables             # name -> [centre (D,), scale (D,)], float32 tensors

    @classmethod
    def fit(cls, **arrays):
        """From training data: name=array (T, D)."""
        bounds = {name: (torch.as_tensor(x.min(0)), torch.as_tensor(x.max(0))) for name, x in arrays.items()}
        return cls({name: [((high + low) / 2).float(),
                           torch.where(high - low > 1e-6, (high - low) / 2, 1.0).float()]
                    for name, (low, high) in bounds.items()})

    def to(self, device):
        """The same maps on a device."""
        return Normalizer({name: [x.to(device) for x in pair] for name, pair in self.tables.items()})

    def encode(self, name, x):
        """Raw (..., D) -> normalised (..., D)."""
        centre, scale = self.tables[name]
        return (x - centre) / scale

    def decode(self, name, x):
        """Normalised (..., D) -> raw (..., D)."""
        centre, scale = self.tables[name]
        return x * scale + centre


class Batches:
    """A dataset as normalised tensors on the device; batches are drawn by indexing alone."""

    def __init__(self, dataset, config, device, normalizer=None):
        go = returns_to_go(dataset.rewards, dataset.ends, dataset.terminated, config.gamma, config.timeout)
        self.normalizer = (normalizer or Normalizer.fit(**{
            "obs": dataset.observations, "action": dataset.actions, "return": go[:, None]})).to(device)

        def encoded(name, x):
            return self.normalizer.encode(name, torch.as_tensor(x, dtype=torch.float32, device=device))

        self.obs = encoded("obs", dataset.observations)                                  # (T, O)
        self.actions = encoded("action", dataset.actions)                                # (T, A)
        self.returns_to_go = encoded("return", go[:, None]).squeeze(-1)                  # (T,)
        lengths = np.diff(dataset.ends, prepend=-1)
        self.begins = torch.as_tensor(np.repeat(dataset.ends - lengths + 1, lengths), device=device)  # (T,)
        self.starts = torch.as_tensor(window_starts(dataset.ends, config.horizon), device=device)    # (W,)
        if not len(self.starts):
            raise UserError(f"{dataset.name}: no episode is as long as --horizon {config.horizon}; the "
                            f"longest has {lengths.max()} steps")
        self.chunk = torch.arange(config.horizon, device=device)
        self.past = torch.arange(1 - config.history, 1, device=device)
        short = int((lengths < config.horizon).sum())
        self.counts = (f"{len(dataset.ends):,} episodes, {len(go):,} transitions, {len(self.starts):,} windows "
                       f"of {config.horizon}; no windows in {short:,} short episodes, none starts in the last "
                       f"{config.horizon - 1} rows of the others; R trains on all")

    def states(self, rows):
        """(B,) rows -> (B, h * O): the last h states, an episode's first one repeated backwards."""
        rows = torch.maximum(rows[:, None] + self.past, self.begins[rows][:, None])
        return self.obs[rows].flatten(1)

    def windows(self, batch):
        """Random windows: state (B, h * O) and the actions x0 (B, H, A) taken from there."""
        rows = self.starts[torch.randint(len(self.starts), (batch,), device=self.starts.device)]
        return self.states(rows), self.actions[rows[:, None] + self.chunk]

    def transitions(self, batch):
        """Random transitions, any row: state (B, h * O), action (B, A), return-to-go (B,)."""
        rows = torch.randint(len(self.obs), (batch,), device=self.obs.device)
        return self.states(rows), self.actions[rows], self.returns_to_go[rows]


# ---- 3. Network (released code: 1-D temporal U-Net, its blocks scaled and shifted by a condition) --


def expand(t):
    """(B,) -> (B, 1, 1), so that one noise level per sample multiplies a whole chunk (B, H, A)."""
    return t[:, None, None]


class LevelEmbedding(nn.Module):
    """Noise level (B,) -> (B, width): sinusoids of 250 ln(level), then a two-layer MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, level):
        angles = 250 * level.log()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class TemporalConv(nn.Module):
    """Convolution over time (B, L, C_in) -> (B, L, C_out), norm and SiLU.

    One matrix product over the `kernel` shifted copies of the input: for chunks this short that is
    about as fast on a CPU as the library's convolutions at large batches, and faster at batch 1.
    """

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.kernel = kernel
        self.linear, self.norm = nn.Linear(kernel * c_in, c_out), nn.LayerNorm(c_out)

    def forward(self, x):
        length, half = x.shape[1], self.kernel // 2
        x = nn.functional.pad(x, (0, 0, half, half))
        x = torch.cat([x[:, i:i + length] for i in range(self.kernel)], dim=-1)  # (B, L, kernel * C)
        return nn.functional.silu(self.norm(self.linear(x)))


class ResidualBlock(nn.Module):
    """Two temporal convolutions with a skip; the condition scales and shifts between them (FiLM)."""

    def __init__(self, c_in, c_out, kernel, dropout):
        super().__init__()
        self.first, self.second = TemporalConv(c_in, c_out, kernel), TemporalConv(c_out, c_out, kernel)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x, film):
        scale, shift = film[:, None].chunk(2, dim=-1)                            # (B, 1, C)
        return self.second(self.dropout(self.first(x) * (1 + scale) + shift)) + self.skip(x)


class UNet1d(nn.Module):
    """F(x, t, state[, k]): a temporal U-Net over a chunk of H actions; teacher and student share it.

    x (B, H, A), t (B,) > 0, state (B, S), and for the student k (B,) > 0  ->  (B, H, A). `patch`
    actions are folded into one position first, and each level down halves the positions: H must be
    divisible by patch * 2^(levels - 1). The embedding of k starts at zero output, so that a student
    loaded with the teacher's weights is the teacher (warm start).
    """

    def __init__(self, action_dim, state_dim, channels=(64, 128), kernel=3, blocks=1, patch=4,
                 embed=128, dropout=0.0, two_levels=False):
        super().__init__()
        self.patch, folded = patch, patch * action_dim
        self.embed_t = LevelEmbedding(embed)
        if two_levels:
            self.embed_k = LevelEmbedding(embed)
            nn.init.zeros_(self.embed_k.mlp[-1].weight), nn.init.zeros_(self.embed_k.mlp[-1].bias)
        self.condition = nn.Sequential(nn.Linear(embed + state_dim, 2 * embed), nn.SiLU(),
                                       nn.Linear(2 * embed, 2 * embed), nn.SiLU())

        def stack(c_in, c_out):
            return nn.ModuleList(ResidualBlock(c_out if i else c_in, c_out, kernel, dropout)
                                 for i in range(blocks))

        pairs = list(zip(channels, channels[1:]))
        self.down = nn.ModuleList(stack(a, b) for a, b in zip((folded, *channels), channels))
        self.shrink = nn.ModuleList(nn.Linear(2 * a, a) for a, _ in pairs)       # two positions -> one
        self.middle = stack(channels[-1], channels[-1])
        self.grow = nn.ModuleList(nn.Linear(b, 2 * a) for a, b in reversed(pairs))  # one -> two
        self.up = nn.ModuleList(stack(2 * a, a) for a, _ in reversed(pairs))
        self.out = nn.Linear(channels[0], folded)
        self.film_sizes = [2 * block.first.linear.out_features for part in (*self.down, self.middle, *self.up)
                           for block in part]
        self.film = nn.Linear(2 * embed, sum(self.film_sizes))                   # all blocks at once

    def forward(self, x, t, state, k=None):
        shape = x.shape
        embedding = self.embed_t(t) if k is None else self.embed_t(t) + self.embed_k(k)
        cond = self.condition(torch.cat([embedding, state], dim=-1))
        films = iter(self.film(cond).split(self.film_sizes, dim=-1))
        x, skips = x.reshape(len(x), -1, self.patch * shape[2]), []              # (B, H/patch, patch*A)
        for level, part in enumerate(self.down):
            for block in part:
                x = block(x, next(films))
            if level < len(self.shrink):
                skips.append(x)
                x = self.shrink[level](x.reshape(len(x), x.shape[1] // 2, -1))
        for block in self.middle:
            x = block(x, next(films))
        for grow, part in zip(self.grow, self.up):
            x = torch.cat([grow(x).reshape(len(x), 2 * x.shape[1], -1), skips.pop()], dim=-1)
            for block in part:
                x = block(x, next(films))
        return self.out(x).reshape(shape)


# ---- 4. EDM teacher (RACTD Eq. 4; Karras et al. 2022) ---------------------------------------------


def karras_sigmas(n=80, smin=SIGMA_MIN, smax=SIGMA_MAX, rho=7.0):
    """The noise grid, descending from smax to smin: (n,) float64 (Karras et al. 2022, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return (smax ** (1 / rho) + ramp * (smin ** (1 / rho) - smax ** (1 / rho))) ** rho


def lognormal_levels(batch, device, mean=-1.2, std=1.2, smin=SIGMA_MIN, smax=SIGMA_MAX):
    """Teacher noise t (B,): ln t ~ N(mean, std^2) truncated to [smin, smax], by inverse CDF.

    The released code does not truncate: 1.2 % of its draws lie below smin, where k/t exceeds 1 and
    the boundary condition of the preconditioning turns round.
    """
    low, high = (0.5 * (1 + math.erf((math.log(s) - mean) / std / math.sqrt(2))) for s in (smin, smax))
    quantile = low + (high - low) * torch.rand(batch, device=device)
    t = torch.exp(mean + std * math.sqrt(2) * torch.erfinv(2 * quantile - 1))
    return t.clamp(smin, smax)


def denoise(net, x, t, state, k=None):
    """The denoiser D(x, t) of the teacher, or g(x, t, k) of the student, from the raw network F.

    x (B, H, A), t (B,), state (B, S), k (B,) or None -> estimate of the clean chunk (B, H, A).
    Preconditioning of Karras et al. 2022 with the boundary condition of consistency models at smin:
    c_skip(smin) = 1 and c_out(smin) = 0, so that D(x, smin) = x.
    """
    sd, s = SIGMA_DATA, expand(t)
    c_skip = sd**2 / ((s - SIGMA_MIN) ** 2 + sd**2)
    c_out = (s - SIGMA_MIN) * sd / (s**2 + sd**2).sqrt()
    c_in = 1 / (s**2 + sd**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t, state, k)


def heun_step(denoiser, x, t, u):
    """One second-order step of the ODE dx/dt = (x - D(x, t)) / t from t down to u < t. 2 calls.

    denoiser: any callable (x (B, H, A), t (B,)) -> (B, H, A); t, u (B,), u > 0.
    """
    slope = (x - denoiser(x, t)) / expand(t)
    euler = x + expand(u - t) * slope
    slope_u = (euler - denoiser(euler, u)) / expand(u)
    return x + expand(u - t) * (slope + slope_u) / 2


@torch.no_grad()
def heun_sample(denoiser, x, sigmas):
    """Solve the probability-flow ODE over the grid: x (B, H, A) at sigmas[0] -> (x at sigmas[-1], NFE).

    n grid points are n - 1 Heun steps are 2 (n - 1) network calls: 158 for the paper's 80 points.
    """
    levels = sigmas.to(x.device, x.dtype)[:, None].expand(-1, len(x))            # (n, B)
    for t, u in zip(levels, levels[1:]):
        x = heun_step(denoiser, x, t, u)
    return x, 2 * (len(sigmas) - 1)


def squared(a, b):
    """Mean over the elements of the squared error: (B, ...) -> (B,). Its minimiser is the mean."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a, b):
    """sqrt(||a - b||^2 + c^2) - c over the whole chunk, c = 0.00054 sqrt(dim) (Song & Dhariwal 2023).

    (B, ...) -> (B,). For so small a c this is the Euclidean norm, whose minimiser is the median.
    """
    error = (a - b).flatten(1)
    c = 0.00054 * math.sqrt(error.shape[1])
    return (error.square().sum(1) + c**2).sqrt() - c


DISTANCES = {"squared": squared, "pseudo-huber": pseudo_huber}


def edm_weight(t):
    """Loss weight of Karras et al. 2022, about 1 / c_out^2: (B,) -> (B,)."""
    return (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2


def edm_loss(denoiser, x0, t, noise, distance=squared):
    """Eq. 4: w(t) d(x0, D(x0 + t noise, t)), mean over the batch -> (loss, info).

    The distance must be the squared error if the ODE is to be right: it needs the posterior mean
    E[x0 | x_t], and the paper's pseudo-Huber would give a median. info: loss at low/mid/high noise.
    """
    loss = edm_weight(t) * distance(denoiser(x0 + expand(t) * noise, t), x0)     # (B,)
    with torch.no_grad():
        bands = {"low": t < 0.2, "mid": (t >= 0.2) & (t < 1), "high": t >= 1}
        info = {name: (loss * m).sum() / m.sum().clamp(min=1) for name, m in bands.items()}
    return loss.mean(), info


# ---- 5. Reward model (RACTD Eq. 8): predicts the return-to-go of one state and action -------------


class ResidualMLP(nn.Module):
    """x + Linear(SiLU(Linear(LayerNorm(x))))."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width))

    def forward(self, x):
        return x + self.net(x)


class RewardModel(nn.Module):
    """R(s_n, a_n): normalised state (B, S) and current action (B, A) -> return-to-go (B,).

    The released residual MLP: 3 stages of 2 blocks, 64-128-256 wide, 0.34 M parameters; `members` of
    them, trained on the same targets, are averaged.
    """

    def __init__(self, state_dim, action_dim, widths=(64, 128, 256), members=1):
        super().__init__()
        sizes = (state_dim + action_dim,) + tuple(widths)
        self.members = nn.ModuleList(nn.Sequential(
            *[layer for a, b in zip(sizes, sizes[1:])
              for layer in (nn.Linear(a, b), ResidualMLP(b), ResidualMLP(b))],
            nn.SiLU(), nn.Linear(sizes[-1], 1)) for _ in range(members))

    def each(self, state, action):
        """The members' own predictions: (members, B)."""
        x = torch.cat([state, action], dim=-1)
        return torch.stack([member(x).squeeze(-1) for member in self.members])

    def forward(self, state, action):
        return self.each(state, action).mean(0)


def reward_model_loss(predictions, target, expectile=0.5):
    """Regression of the return-to-go: predictions (M, B), target (B,) -> (loss, info).

    expectile 0.5 is the plain squared error of the paper; above it, the better of the returns that
    were seen after an action weigh more.
    """
    error = target - predictions
    weight = torch.where(error > 0, 2 * expectile, 2 * (1 - expectile))
    return (weight * error.square()).mean(), {"rmse": error.detach().square().mean().sqrt()}


# ---- 6. CTM student and its three losses (RACTD Eqs. 5-9; Kim et al. 2024) ------------------------


def mix(x, g, t, k):
    """G = (k/t) x + (1 - k/t) g: exactly x at k = t, exactly g at k = 0 (Kim et al. 2024)."""
    ratio = expand(k / t)
    return ratio * x + (1 - ratio) * g


def student_jump(net, x, t, k, state):
    """G(x, t, k) of Eq. 6: from noise level t straight to k <= t, one network call. (B, H, A)."""
    return mix(x, denoise(net, x, t, state, k), t, k)


def draw_jumps(batch, sigmas):
    """Grid levels t > u >= k, each (B,), of one CTM sample; u is one grid step below t.

    i_t ~ U{0..n-2}, i_u = i_t + 1, i_k ~ U{i_t+1..n-1}: k = u, the direct anchor on the teacher, is
    among them; u = t, which would teach nothing, is not (15 % of the released code's draws).
    """
    n = len(sigmas)
    i_t = torch.randint(n - 1, (batch,), device=sigmas.device)
    i_u = i_t + 1
    i_k = i_u + (torch.rand(batch, device=sigmas.device) * (n - i_u)).long()
    return sigmas[i_t], sigmas[i_u], sigmas[i_k]


def mixed_levels(batch, device, rho=7.0):
    """Released noise of Eq. 7 (B,): half the teacher's, half uniform over the grid's 80 .. 0.76."""
    high, low = SIGMA_MAX ** (1 / rho), SIGMA_MIN ** (1 / rho)
    warped = (high + 0.7 * torch.rand(batch, device=device) * (low - high)) ** rho
    return torch.where(torch.rand(batch, device=device) < 0.5, warped, lognormal_levels(batch, device))


def ctm_loss(x_hat, x_ref, jump_to_zero, distance=pseudo_huber):
    """Eq. 5: compare the student's jump with the teacher's, both carried on to 0 -> (loss, info).

    x_hat (B, H, A) = G(x_t, t, k), the student's own, with gradient; x_ref = G_sg(Solver(x_t, t, u),
    u, k), without (both Eq. 6). jump_to_zero: callable (x at k) -> x at 0, frozen in its weights
    but not in its input, through which the student's gradient must pass.
    """
    with torch.no_grad():
        target = jump_to_zero(x_ref)
    loss = distance(jump_to_zero(x_hat), target).mean()
    return loss, {"ctm": loss.detach()}


def dsm_loss(prediction, x0, t, distance=squared):
    """Eq. 7: w(t) d(x0, prediction of x0 from x_t), mean over the batch -> (loss, info).

    prediction (B, H, A) = g(x_t, t, t), the student as a denoiser (Kim et al. 2024; the default here),
    or G(x_t, t, 0), Eq. 7 to the letter, which asks the end point of the ODE to be a mean or median.
    """
    loss = (edm_weight(t) * distance(prediction, x0)).mean()
    return loss, {"dsm": loss.detach()}


def reward_loss(reward_model, state, action, unit_slope=True):
    """Eq. 8: -R(s_n, a_n), mean over the batch -> (loss, info).

    state (B, S), action (B, A): the current action of the student's one-step sample, normalised. It is
    clipped to the action box first: outside the data R extrapolates, and its gradient runs away.
    unit_slope divides by the batch mean of ||dR/da||, so that the pull on the action is 1 whatever
    the scale of R; the distillation losses pull with a norm of order 1 too, hence one weight for all
    tasks. False is Eq. 8 to the letter.
    """
    action = action.clamp(-1, 1)
    value = reward_model(state, action)
    scale = 1.0
    if unit_slope:
        slope, = torch.autograd.grad(value.sum(), action, retain_graph=True)     # (B, A)
        scale = slope.norm(dim=-1).mean().clamp(min=1e-8)
    loss = -(value / scale).mean()
    return loss, {"R": value.detach().mean()}


def distillation_loss(student, target, teacher, reward_model, state, x0, config):
    """Eq. 9: alpha L_CTM + beta L_DSM + sigma L_Reward on one batch -> (loss, info).

    student: the network that trains; target, teacher: frozen networks; reward_model: frozen callable
    (state, action) -> (B,); state (B, S), x0 (B, H, A), all normalised. config: a Config, of which
    the student's fields are used. The student is called once, on the inputs of all three losses.
    """
    sigmas = karras_sigmas(config.grid_points).to(x0)
    t, u, k = draw_jumps(len(x0), sigmas)
    zero = torch.full_like(t, SIGMA_MIN)
    x_t = x0 + expand(t) * torch.randn_like(x0)
    with torch.no_grad():                # Eq. 6, right: the teacher's step, then the frozen jump
        x_u = heun_step(lambda x, t: denoise(teacher, x, t, state), x_t, t, u)
        x_ref = student_jump(target, x_u, u, k, state)

    jumps = {"ctm": (x_t, t, k)}         # name -> where the student starts, from which level to which
    if config.dsm_weight:
        levels = lognormal_levels if config.dsm_noise == "lognormal" else mixed_levels
        s = levels(len(x0), x0.device)
        jumps["dsm"] = (x0 + expand(s) * torch.randn_like(x0), s, s if config.dsm_target == "denoiser" else zero)
    if config.reward_weight:             # the policy's own sample: G(x_T, T, 0)
        jumps["reward"] = (config.init_noise * torch.randn_like(x0), torch.full_like(t, SIGMA_MAX), zero)
    x, start, end = (torch.cat(parts) for parts in zip(*jumps.values()))
    g = denoise(student, x, start, state.repeat(len(jumps), 1), end)
    jumped = dict(zip(jumps, mix(x, g, start, end).split(len(x0))))

    losses = {"ctm": ctm_loss(jumped["ctm"], x_ref, lambda x: student_jump(target, x, k, zero, state),
                              DISTANCES[config.ctm_distance])}
    if "dsm" in jumps:
        guess = g[len(x0):2 * len(x0)] if config.dsm_target == "denoiser" else jumped["dsm"]
        losses["dsm"] = dsm_loss(guess, x0, s, DISTANCES[config.dsm_distance])
    if "reward" in jumps:
        losses["reward"] = reward_loss(reward_model, state, jumped["reward"][:, 0],
                                       config.reward_scale == "slope")
    weights = dict(ctm=config.ctm_weight, dsm=config.dsm_weight, reward=config.reward_weight)
    loss = sum(weights[name] * term for name, (term, _) in losses.items())
    return loss, {key: value for _, info in losses.values() for key, value in info.items()}


@torch.no_grad()
def student_sample(jump, noise, sigmas, nfe=1, init_noise=SIGMA_MAX, renoise=torch.randn_like):
    """xhat_0 = G(x_T, T, 0), the policy's single network call; optionally nfe - 1 refinements.

    jump: callable (x, t, k) -> x; noise (B, H, A) ~ N(0, 1); init_noise: its scale (SIGMA_MAX is the
    model's own prior). Later calls restart from fresh noise at grid indices ceil(i n / nfe): 27 and
    54 of 80 for nfe = 3, sigma 12.0 and 0.885. Returns (x (B, H, A), nfe).
    """
    levels = sigmas.to(noise.device, noise.dtype)[:, None].expand(-1, len(noise))
    x = jump(init_noise * noise, levels[0], levels[-1])
    for i in range(1, nfe):
        t = levels[-(-i * len(sigmas) // nfe)]
        x = jump(x + expand((t**2 - SIGMA_MIN**2).sqrt()) * renoise(x), t, levels[-1])
    return x, nfe


# ---- 7. Training ----------------------------------------------------------------------------------


@dataclass
class Run:
    """What a command works with: the resolved arguments."""

    env: str                    # D4RL name, or the Minari id
    data: str | None            # --data as given
    out: Path
    device: torch.device
    config: Config
    given: set                  # hyperparameters named on the command line
    save_every: float           # seconds between checkpoints


def cosine(step, steps, warmup):
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def ema_decay(step):
    """Released schedule of the EMA decay: min(0.9999, 1 - (1 + n)^-0.75)."""
    return min(0.9999, 1 - (1 + step) ** -0.75)


@torch.no_grad()
def ema_update(target, online, decay):
    """target <- decay target + (1 - decay) online: decay 0 copies, decay 1 never moves."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - decay)


def frozen(net):
    """The network in eval mode with no gradient to its weights, once and for all."""
    return net.eval().requires_grad_(False)


def save_checkpoint(path, checkpoint):
    """Plain tensors and Python values, to a temporary name and then renamed: whole or not at all."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def load_checkpoint(path, stage, device):
    """A checkpoint of that stage, or UserError saying what is wrong with the file."""
    if not Path(path).is_file():
        raise UserError(f"no trained {stage} at {path}; `python ractd.py distill` trains all that is missing")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        found = checkpoint["stage"]
    except Exception as error:           # torch and pickle raise many types for a damaged file
        raise UserError(f"{path} is damaged or is not a checkpoint of this program "
                        f"({type(error).__name__}); move it away and give the same command again") from None
    if found != stage:
        raise UserError(f"{path} holds a {found}, not a {stage}")
    return checkpoint


def fit(stage, net, average, decay, loss_fn, run, meta):
    """Train `net` for config.<stage>_steps, leaving <stage>.pt and lines in log.jsonl; resumes by itself.

    loss_fn() draws a batch and returns (loss, {name: tensor}). average: frozen copy of net that
    follows it as an EMA with decay(step), and is what is used afterwards. All randomness is torch's
    global generator, and its state is in the checkpoint: a run killed at any moment and started
    again ends, on the CPU, in the same bits. meta: what else the checkpoint holds.
    """
    config, path, log = run.config, run.out / f"{stage}.pt", run.out / "log.jsonl"
    steps, lr, warmup, weight_decay = (getattr(config, f"{stage}_{x}") for x in ("steps", "lr", "warmup", "decay"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=weight_decay,
                                  fused=True)
    step, before, cuda = 0, 0.0, run.device.type == "cuda"
    if path.exists():
        saved = load_checkpoint(path, stage, run.device)
        step, before = saved["step"], saved["seconds"]
        net.load_state_dict(saved["net"]), average.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        if cuda:
            torch.cuda.set_rng_state(saved["rng_cuda"].cpu())
        print(f"{stage}: goes on from step {step:,} of {steps:,}")
    lines = log.read_text().splitlines() if log.exists() else []    # less what comes again
    lines = [x for x in lines if x.endswith("}") and (f'"{stage}"' not in x or json.loads(x)["step"] <= step)]
    log.write_text("".join(line + "\n" for line in lines))
    began, stop, sums, mark = time.time(), [], {}, (time.time(), step)

    def report():
        """One line of progress; stops the run if a number is not finite."""
        nonlocal sums, mark
        values = {name: float(v) / (step - mark[1]) for name, v in sums.items()}
        if bad := [name for name, v in values.items() if not math.isfinite(v)]:
            raise UserError(f"{stage}: {bad[0]} is {values[bad[0]]} between steps {mark[1]:,} and {step:,}; "
                            f"last checkpoint: {path if path.exists() else 'none'}; try a smaller --{stage}-lr")
        rate = (step - mark[1]) / (time.time() - mark[0])
        eta = (steps - step) / rate
        print(f"{stage:8}{step:8,}/{steps:,} {step / steps:5.0%}  "
              + "  ".join(f"{name} {v:7.4f}" for name, v in values.items())
              + f"  {rate:6.1f} steps/s  ETA {eta // 60:.0f}:{eta % 60:02.0f}", flush=True)
        with open(log, "a") as f:
            f.write(json.dumps(dict(stage=stage, step=step, steps=steps, **values, steps_per_s=rate)) + "\n")
        sums, mark = {}, (time.time(), step)

    def save():
        extra = dict(rng_cuda=torch.cuda.get_rng_state()) if cuda else {}
        save_checkpoint(path, dict(
            meta, stage=stage, version=VERSION, git_commit=git_commit(), config=dataclasses.asdict(config),
            step=step, steps=steps, seconds=before + time.time() - began, net=net.state_dict(),
            ema=average.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), **extra))

    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))     # a step is never left half done
    saved_at, every = time.time(), max(1, steps // 20)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        loss, info = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        optimizer.step()
        ema_update(average, net, decay(step))
        step += 1
        for name, value in {"loss": loss.detach(), **info, "grad": norm}.items():
            sums[name] = sums.get(name, 0) + value
        save_now = step == steps or stop or time.time() - saved_at > run.save_every
        if step % every == 0 or save_now:
            report()                     # before saving: a broken state never replaces a good one
        if save_now:
            save()
            saved_at = time.time()
        if stop and step < steps:
            print(f"{stage}: stopped at step {step:,} of {steps:,}, saved in {path}. The same command goes on.")
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, handler)


# ---- 8. Evaluation --------------------------------------------------------------------------------


class Policy:
    """A trained teacher or student that acts: raw observations in, raw chunks of actions out.

    checkpoint: as loaded from teacher.pt or student.pt; config: the acting fields are used;
    reward_checkpoint: of reward.pt, if config.candidates > 1.
    """

    def __init__(self, checkpoint, config, device="cpu", reward_checkpoint=None):
        saved, self.config, self.device = Config(**checkpoint["config"]), config, device
        self.student = checkpoint["stage"] == "student"
        self.net = frozen(make_unet(saved, checkpoint["dims"], two_levels=self.student)).to(device)
        self.net.load_state_dict(checkpoint["ema"])
        self.normalizer = Normalizer(checkpoint["normalizer"]).to(device)
        self.shape = (saved.horizon, checkpoint["dims"][1])                      # (H, A)
        self.sigmas = karras_sigmas(saved.grid_points if self.student else config.teacher_points)
        self.nfe = config.nfe if self.student else 2 * (config.teacher_points - 1)
        if config.candidates > 1:
            self.reward_model = load_reward_model(reward_checkpoint, self.normalizer, device)

    @torch.no_grad()
    def __call__(self, observations, generators):
        """observations (B, h, O) and one numpy Generator per row -> actions (B, H, A)."""
        n = self.config.candidates
        obs = torch.as_tensor(observations, dtype=torch.float32, device=self.device)
        state = self.normalizer.encode("obs", obs).flatten(1).repeat_interleave(n, dim=0)  # (B n, h O)

        def noise(_=None):
            draws = [g.standard_normal((n, *self.shape), np.float32) for g in generators]
            return torch.as_tensor(np.concatenate(draws), device=self.device)

        if self.student:
            x, _ = student_sample(lambda x, t, k: student_jump(self.net, x, t, k, state), noise(),
                                  self.sigmas, self.nfe, self.config.init_noise, noise)
        else:
            x, _ = heun_sample(lambda x, t: denoise(self.net, x, t, state),
                               self.config.init_noise * noise(), self.sigmas)
        x = x.clamp(-1, 1).view(-1, n, *self.shape)                              # the action box
        if n > 1:
            best = self.reward_model(state, x[:, :, 0].flatten(0, 1)).view(-1, n).argmax(1)
            x = x[torch.arange(len(x)), best][:, None]
        return self.normalizer.decode("action", x[:, 0]).cpu().numpy()


def evaluate(policy, make_env, episodes=20, first_seed=0, history=1, execute=1):
    """Closed-loop returns of `episodes` episodes in lockstep, one policy call for all still running.

    policy: (observations (B, h, O), B numpy Generators) -> actions (B, H, A). Episode i is seeded
    first_seed + i, in the simulator and for its noise. Returns dict(returns, lengths, simulator_s,
    network_s); a return sums the raw rewards of env.step, the last one included.
    """
    envs = [make_env() for _ in range(episodes)]
    pasts = [[env.reset(seed=first_seed + i)[0]] * history for i, env in enumerate(envs)]
    generators = [np.random.default_rng(first_seed + i) for i in range(episodes)]
    returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, int), list(range(episodes))
    spent = dict(simulator_s=0.0, network_s=0.0)
    while alive:
        began = time.perf_counter()
        plans = policy(np.array([pasts[i] for i in alive]), [generators[i] for i in alive])
        planned = time.perf_counter()
        running = []
        for i, plan in zip(alive, plans):
            for action in plan[:execute]:
                observation, reward, terminated, truncated, _ = envs[i].step(action)
                returns[i] += reward
                lengths[i] += 1
                pasts[i] = pasts[i][1:] + [observation]
                if terminated or truncated:
                    break
            else:
                running.append(i)
        alive = running
        spent["network_s"] += planned - began
        spent["simulator_s"] += time.perf_counter() - planned
    for env in envs:
        env.close()
    return dict(returns=returns.tolist(), lengths=lengths.tolist(), **spent)


def normalized_score(env, value):
    """D4RL score, 0 = random policy, 100 = expert, of a return or an array; None without reference."""
    task = env.split("-")[0].lower()
    if task not in TASKS:
        return None
    _, random, expert = TASKS[task]
    return 100 * (value - random) / (expert - random)


# ---- 9. The pipeline: data -> teacher, reward model -> student -> score ---------------------------

STAGES = ("teacher", "reward", "student")


def make_unet(config, dims, two_levels=False, dropout=0.0):
    """The U-Net of a configuration; dims = sizes of an observation and an action."""
    return UNet1d(dims[1], config.history * dims[0], config.channels, config.kernel, config.blocks,
                  config.patch, config.embed, dropout, two_levels)


def make_reward_model(config, dims):
    """The reward model of a configuration."""
    return RewardModel(config.history * dims[0], dims[1], members=config.reward_members)


def load_reward_model(checkpoint, normalizer, device):
    """R, frozen, as a callable of states and actions in the coordinates of `normalizer`."""
    net = frozen(make_reward_model(Config(**checkpoint["config"]), checkpoint["dims"])).to(device)
    net.load_state_dict(checkpoint["ema"])
    own = Normalizer(checkpoint["normalizer"]).to(device)

    def change(name, x):                 # R may have been trained on other data than the student
        x = normalizer.decode(name, x.unflatten(-1, (-1, len(own.tables[name][0]))))
        return own.encode(name, x).flatten(-2)
    return lambda state, action: net(change("obs", state), change("action", action))


def simulator(run):
    """A callable that makes the environment this run's policies act in."""
    import gymnasium
    gymnasium.logger.min_level = gymnasium.logger.ERROR      # no advice to leave the -v4 tasks
    if (run.data or "").startswith("minari:"):
        import minari
        return minari.load_dataset(run.data.removeprefix("minari:")).recover_environment
    return lambda: gymnasium.make(TASKS[run.env.split("-")[0]][0])


class Pipeline:
    """Each stage is loaded if it is there and trained if it is not."""

    def __init__(self, run, args):
        self.run, self.args, config = run, args, run.config
        teacher = load_checkpoint(args.teacher, "teacher", run.device) if args.teacher else None
        for f in dataclasses.fields(Config) if teacher else ():     # it brings its own shape
            value = teacher["config"][f.name]
            if f.metadata["stage"] == "network" or f.name in ("horizon", "history"):
                if f.name in run.given and getattr(config, f.name) != value:
                    raise UserError(f"--{f.name} {getattr(config, f.name)}: {args.teacher} was trained with "
                                    f"{value}; leave the flag out, or train another teacher")
                setattr(config, f.name, value)
        dataset = load_dataset(run.env, run.data)
        describe(dataset)
        env = simulator(run)()
        sizes = [math.prod(space.shape) for space in (env.observation_space, env.action_space)]
        env.close()
        self.dims = [dataset.observations.shape[1], dataset.actions.shape[1]]
        if self.dims != sizes:
            raise UserError(f"{dataset.name} has observations of {self.dims[0]} and actions of {self.dims[1]} "
                            f"numbers, but {run.env} has {sizes[0]} and {sizes[1]}; is --env right?")
        normalizer = Normalizer(teacher["normalizer"]) if teacher else None
        self.batches = Batches(dataset, config, run.device, normalizer)
        print("      " + self.batches.counts)
        for stage in STAGES:             # epochs -> steps
            steps, batch = getattr(config, f"{stage}_steps"), getattr(config, f"{stage}_batch")
            rows = len(self.batches.obs if stage == "reward" else self.batches.starts)
            setattr(config, f"{stage}_steps", steps if steps > 0 else math.ceil(-steps * rows / batch))
        self.meta = dict(env=run.env, dims=self.dims, dataset=dataset.summary(),
                         normalizer=self.batches.normalizer.tables)

    def build(self, stage, saved):
        """(network, its frozen average, loss_fn, EMA decay) of a stage; saved: earlier checkpoints."""
        config, batches, device = self.run.config, self.batches, self.run.device
        if stage == "reward":
            net = make_reward_model(config, self.dims)
        else:
            net = make_unet(config, self.dims, stage == "student", config.dropout * (stage == "student"))
        if stage == "student":
            net.load_state_dict(saved["teacher"]["ema"], strict=False)           # warm start
            teacher = frozen(make_unet(config, self.dims)).to(device)
            teacher.load_state_dict(saved["teacher"]["ema"])
            reward_model = load_reward_model(saved["reward"], batches.normalizer, device) \
                if config.reward_weight else None
        net = net.to(device)
        average = frozen(deepcopy(net))

        def teacher_loss():
            state, x0 = batches.windows(config.teacher_batch)
            return edm_loss(lambda x, t: denoise(net, x, t, state), x0, lognormal_levels(len(x0), device),
                            torch.randn_like(x0), DISTANCES[config.teacher_distance])

        def reward_model_step():
            state, action, target = batches.transitions(config.reward_batch)
            return reward_model_loss(net.each(state, action), target, config.reward_expectile)

        def student_loss():
            return distillation_loss(net, average, teacher, reward_model,
                                     *batches.windows(config.student_batch), config)

        loss_fn = dict(teacher=teacher_loss, reward=reward_model_step, student=student_loss)[stage]
        return net, average, loss_fn, (lambda _: config.target_decay) if stage == "student" else ema_decay

    def obtain(self, stage, saved=None):
        """The finished checkpoint of a stage: --teacher/--reward FILE, the run folder's, or trained now."""
        run, file = self.run, getattr(self.args, stage, None)
        path = Path(file) if file else run.out / f"{stage}.pt"
        meta = dict(self.meta, **{f"{s}_id": fingerprint(c["ema"]) for s, c in (saved or {}).items()})
        if stage in self.args.retrain and path.exists() and not file:
            os.replace(path, path.with_suffix(".old.pt"))
        if file or path.exists():
            checkpoint = load_checkpoint(path, stage, run.device)
            check_fits(checkpoint, path, stage, run.config, meta, elsewhere=bool(file))
            if file or checkpoint["step"] == checkpoint["steps"]:
                print(f"{stage}: {path}, {checkpoint['step']:,} steps in {checkpoint['seconds']:.0f} s")
                return checkpoint
        run.out.mkdir(parents=True, exist_ok=True)
        write_json(run.out / "config.json", dataclasses.asdict(run.config))
        torch.manual_seed(run.config.seed)
        net, average, loss_fn, decay = self.build(stage, saved)
        print(f"{stage}: {sum(p.numel() for p in net.parameters()):,} parameters")
        fit(stage, net, average, decay, loss_fn, run, meta)
        plot_curves(run.out)
        return load_checkpoint(path, stage, run.device)

    def dry_run(self):
        """One forward and backward of every loss, timed: what `distill` would do, and for how long."""
        config, saved, total = self.run.config, {}, 0.0
        print(json.dumps(dataclasses.asdict(config), indent=2))
        for stage in STAGES:
            net, _, loss_fn, _ = self.build(stage, saved)
            saved[stage] = dict(self.meta, ema=net.state_dict(), config=dataclasses.asdict(config))
            marks = []
            for _ in range(4):           # the first one warms up
                loss, info = loss_fn()
                loss.backward()
                values = "  ".join(f"{name} {float(v):.4f}" for name, v in info.items())   # waits for CUDA
                marks.append(time.perf_counter())
            seconds, steps = (marks[-1] - marks[0]) / 3, getattr(config, f"{stage}_steps")
            total += steps * seconds
            print(f"{stage:8} {sum(p.numel() for p in net.parameters()):,} parameters  {values}  "
                  f"{seconds:.4f} s a step, {steps:,} steps: {steps * seconds / 60:.1f} min")
        print(f"estimated total: {total / 60:.1f} min of training, then {config.episodes} episodes")


def describe(dataset):
    """Print what is in a dataset."""
    s = dataset.summary()
    note = {"D4RL": "", "stand-in": ": NOT comparable with the paper"}.get(s["source"], ": not D4RL's own data")
    print(f"data: {s['name']} ({s['source']}{note}), {s['transitions']:,} transitions, {s['episodes']:,} "
          f"episodes\n      return best {s['return_best']:.0f}, mean {s['return_mean']:.0f}, worst "
          f"{s['return_worst']:.0f}")


def check_fits(saved, path, stage, config, meta, elsewhere=False):
    """Raise UserError listing whatever of a checkpoint does not fit this run, and the way out."""
    uses = {"teacher": ("data", "network", "teacher"), "reward": ("data", "reward"),
            "student": ("data", "network", "student")}[stage]
    fields = ("horizon", "history") if elsewhere else [
        f.name for f in dataclasses.fields(Config) if f.metadata["stage"] in uses]
    keys = ("env", "dims") if elsewhere else sorted(meta.keys() - {"normalizer"})
    pairs = [(name, saved["config"][name], getattr(config, name)) for name in fields]
    pairs += [(key, saved.get(key), meta[key]) for key in keys]
    if wrong := [f"{name}: {a} in the file, {b} now" for name, a, b in pairs if a != b]:
        raise UserError(f"{path} does not fit this run:\n  " + "\n  ".join(wrong) + "\nGive the same values, "
                        + ("or another file" if elsewhere else f"another --out, or --retrain {stage} "
                           f"(which keeps the old file as {stage}.old.pt)"))


def fingerprint(state):
    """Short hash of a state dict: a student is tied to the teacher and reward model it was made from."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def git_commit():
    """Commit of this file's checkout, or None."""
    result = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                            capture_output=True, text=True)
    return result.stdout.strip() or None


def write_json(path, value):
    """Indented JSON, to a temporary name and then renamed."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def plot_curves(out):
    """training.png: every logged loss of the three stages."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for stage, axis in zip(STAGES, axes):
        mine = [row for row in rows if row["stage"] == stage]
        for name in [n for n in (mine[0] if mine else ()) if n not in ("stage", "step", "steps", "grad", "steps_per_s")]:
            axis.plot([row["step"] for row in mine], [row[name] for row in mine], label=name)
        axis.set(title=stage, xlabel="gradient steps", ylabel="loss")
        axis.legend(fontsize=8) if mine else None
    figure.savefig(out / "training.png", dpi=110)
    pyplot.close(figure)


def assess(run, checkpoint, train_seconds, name, reward_checkpoint=None):
    """Score a checkpoint in the simulator; write out/<name>, print and return the metrics."""
    import gymnasium
    import mujoco
    config = run.config
    policy = Policy(checkpoint, config, run.device, reward_checkpoint)
    print(f"evaluation: {config.episodes} episodes, {policy.nfe} network call(s) per action", flush=True)
    result = evaluate(policy, simulator(run), config.episodes, config.first_seed, config.history, config.execute)
    returns, milliseconds = np.array(result["returns"]), []
    for _ in range(220):                 # the policy's .cpu() waits for the device
        began = time.perf_counter()
        policy(np.zeros((1, config.history, checkpoint["dims"][0])), [np.random.default_rng(0)])
        milliseconds.append(1000 * (time.perf_counter() - began))
    data, scale = checkpoint["dataset"], (lambda x: normalized_score(run.env, x))
    sem = float(returns.std(ddof=1) / len(returns) ** 0.5) if len(returns) > 1 else None
    mean, one = scale(float(returns.mean())), scale(1.0)
    metrics = dict(
        env=run.env, dataset=data, nfe=policy.nfe, candidates=config.candidates, init_noise=config.init_noise,
        method="teacher" if not policy.student else "RACTD" if checkpoint["config"]["reward_weight"] else "CTD",
        episodes=config.episodes, seeds=list(range(config.first_seed, config.first_seed + config.episodes)),
        **result, return_mean=float(returns.mean()), normalized_score_mean=mean,
        normalized_score_sem=sem and one and sem * (one - scale(0.0)),
        ms_per_action=float(np.median(milliseconds[20:])), train_seconds=train_seconds,
        seed=checkpoint["config"]["seed"], device=str(run.device), git_commit=git_commit(), versions=dict(
            ractd=VERSION, python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
            gymnasium=gymnasium.__version__, mujoco=mujoco.__version__))
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(run.out / name, metrics)
    comparable = data["source"] == "D4RL"

    def row(label, value, rest=""):
        score = "" if mean is None else f"{scale(value):8.1f}"
        print(f"{label:<34}{value:9.0f}{score}{rest}")
    print(f"\n{run.env} on {data['name']} ({data['source']})\n{'':<34}   return   score   std. err.  ms/action")
    row("data, best episode", data["return_best"])
    row("data, mean episode", data["return_mean"])
    row(f"{metrics['method']}, {policy.nfe} network call(s)", metrics["return_mean"],
        f"{metrics['normalized_score_sem'] or math.nan:12.1f}{metrics['ms_per_action']:11.2f}")
    if not comparable:
        print("The data are not D4RL's: these scores are NOT comparable with the paper's.")
    print(f"All numbers: {run.out / name}; training curves: {run.out / 'training.png'}")
    return metrics


# ---- 10. Command line -----------------------------------------------------------------------------

COMMANDS = {"data": "fetch or make the dataset and print what is in it",
            "teacher": "train the EDM diffusion teacher",
            "reward": "train the reward model (return-to-go)",
            "distill": "whatever of the above is missing, then the student, then its score",
            "evaluate": "act with a saved student or teacher"}


def build_parser():
    """One subparser per command; the hyperparameter flags are generated from Config."""
    parser = argparse.ArgumentParser(prog="ractd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, text in COMMANDS.items():
        p = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        p.add_argument("--env", help="one of " + ", ".join(ENVS) + "; optional with minari:ID")
        p.add_argument("--data", help="FILE.hdf5 in D4RL's layout, minari:ID, or standin (default: the D4RL "
                       "file of --env, downloaded if need be; without a network a stand-in)")
        p.add_argument("--out", help="folder for everything written (default: runs/<env>)")
        p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
        p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
        p.add_argument("--preset", choices=PRESETS, default="default",
                       help="default: minutes on two cores; paper: the published sizes and schedule")
        p.add_argument("--save-every", type=float, default=30.0, help="seconds between checkpoints (default: 30)")
        p.add_argument("--teacher", metavar="FILE", help="use a teacher trained elsewhere")
        p.add_argument("--reward", metavar="FILE", help="use a reward model trained elsewhere")
        p.add_argument("--retrain", choices=STAGES, action="append", default=[], help="train this stage anew; "
                       "its checkpoint is kept as <stage>.old.pt")
        p.add_argument("--dry-run", action="store_true", help="print the configuration, one step of each loss "
                       "and the estimated time, and exit")
        p.add_argument("--model", choices=("student", "teacher"), default="student",
                       help="evaluate: who acts (default: student)")
        for f in dataclasses.fields(Config):
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            p.add_argument("--" + f.name.replace("_", "-"), dest="config_" + f.name, default=None,
                           type=integers if f.type is tuple else f.type, choices=f.metadata["choices"],
                           metavar=None if f.metadata["choices"] else f.type.__name__.upper(),
                           help=f"[{f.metadata['stage']}] {f.metadata['help']} (default: {shown})")
    return parser


def integers(text):
    """'64,128' -> (64, 128), for argparse."""
    return tuple(int(part) for part in text.split(","))


def resolve(args):
    """Checked command-line arguments -> Run."""
    given = {key.removeprefix("config_"): value for key, value in vars(args).items()
             if key.startswith("config_") and value is not None}
    config = Config(**{**PRESETS[args.preset], **given})
    for f in dataclasses.fields(Config):
        flag, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        low, high = f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= value <= (math.inf if high is None else high):
            raise UserError(f"{flag} {value} must be at least {low}" + (f", at most {high}" if high else ""))
        if f.name.endswith("_steps") and value == 0:
            raise UserError(f"{flag} must not be 0: n > 0 steps, or -n for n epochs")
    positions = 2 ** (len(config.channels) - 1) * config.patch
    for bad, sentence in (
            (not all(0 < c <= 8192 for c in config.channels), f"--channels {config.channels}: 1 to 8192 each"),
            (config.kernel % 2 == 0, f"--kernel {config.kernel} must be odd"),
            (config.embed % 2, f"--embed {config.embed} must be even"),
            (config.horizon % positions, f"--horizon {config.horizon} must be a multiple of {positions}: --patch "
             f"{config.patch}, halved {len(config.channels) - 1} times by the U-Net"),
            (config.execute > config.horizon, f"--execute {config.execute} is more than --horizon {config.horizon}"),
            (not args.save_every >= 0, f"--save-every {args.save_every} must not be negative")):
        if bad:
            raise UserError(sentence)
    minari_id = args.data.removeprefix("minari:") if (args.data or "").startswith("minari:") else None
    env = args.env or minari_id
    if env not in ENVS and (args.env or not minari_id):
        near = sorted(ENVS, key=lambda name: -difflib.SequenceMatcher(None, name, env or "").ratio())
        raise UserError(f"--env {env} is unknown; known, nearest first: " + ", ".join(near))
    if config.reward_weight < 0:
        config.reward_weight = ENVS[env][0] if env in ENVS else 1.0
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used ({str(error).splitlines()[0]}); try cpu") from None
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    out = Path(args.out) if args.out else Path("runs") / env.replace("/", "-")
    return Run(env, args.data, out, device, config, set(given), args.save_every)


def run_evaluate(run, args):
    """`evaluate`: the saved model brings its configuration; acting flags are the command line's."""
    path = (args.teacher if args.model == "teacher" else None) or run.out / f"{args.model}.pt"
    checkpoint = load_checkpoint(path, args.model, run.device)
    saved = checkpoint["config"]
    if checkpoint["env"] != run.env:
        raise UserError(f"{path} was trained for {checkpoint['env']}, not {run.env}")
    for f in dataclasses.fields(Config):
        if f.metadata["stage"] == "acting" or f.name == "init_noise" and f.name in run.given:
            continue
        if f.name in run.given and getattr(run.config, f.name) != saved[f.name]:
            raise UserError(f"{path} was trained with {f.name} {saved[f.name]}, not "
                            f"{getattr(run.config, f.name)}; leave the flag out, or retrain")
        setattr(run.config, f.name, saved[f.name])
    reward = None
    if run.config.candidates > 1:
        reward = load_checkpoint(args.reward or run.out / "reward.pt", "reward", run.device)
    assess(run, checkpoint, checkpoint.get("train_seconds"), f"evaluate_{args.model}_{run.config.nfe}.json", reward)


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 for something to put right, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        run = resolve(args)
        if args.command == "data":
            describe(load_dataset(run.env, run.data))
        elif args.command == "evaluate":
            run_evaluate(run, args)
        elif args.dry_run:
            Pipeline(run, args).dry_run()
        else:
            pipeline, saved = Pipeline(run, args), {}
            for stage in ("teacher", "reward") if args.command == "distill" else (args.command,):
                if stage == "teacher" or args.command == "reward" or run.config.reward_weight or run.config.candidates > 1:
                    saved[stage] = pipeline.obtain(stage)
            if args.command == "distill":
                student = pipeline.obtain("student", saved)
                seconds = {stage: c["seconds"] for stage, c in (*saved.items(), ("student", student))}
                assess(run, student, seconds, "metrics.json", saved.get("reward"))
    except UserError as error:
        print(f"ractd.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"ractd.py: cannot read or write {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
