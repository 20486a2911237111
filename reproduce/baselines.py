"""TD3+BC, IQL and behaviour cloning by d3rlpy, on the same data: what RACTD is compared with.

    python -m reproduce.baselines --env hopper-medium-replay --algorithm iql [--data FILE]

d3rlpy 2.8.1 needs an environment of its own: `pip install torch==2.13.0 d3rlpy==2.8.1`, then `pip
install -r requirements.txt`, where pip says that d3rlpy wants an older gymnasium: ours will do.
Its own hyperparameters but a batch of 256 and standardised observations; for IQL rewards scaled to
returns of a range of 1000, as its authors do on these tasks. Acts in the simulator of `ractd.py
evaluate`, deterministically, after the last step. Writes <out>/<algorithm>_seed<s>.json.
"""

import dataclasses
import sys
import time
import warnings

import numpy as np
import torch

import ractd
from ractd import option
from reproduce.common import (
    data_label,
    make_parser,
    parse_own,
    plus_minus,
    points,
    run_command,
    write_json,
)

ALGORITHMS = ("td3bc", "iql", "bc")


@dataclasses.dataclass
class Settings:
    """Settings of training and acting."""

    algorithm: str = option("iql", "who learns", choices=ALGORITHMS)
    seed: int = option(0, "seed of all training", 0, 2**32 - 1)
    steps: int = option(50_000, "gradient steps", 1, 10**9)
    episodes: int = option(20, "number of evaluation episodes", 1, 10**6)
    first_seed: int = option(0, "episode i has the seed first_seed + i", 0, 2**31)


def make_algorithm(name, box, device):
    """d3rlpy's learner, untrained; box: the space of actions, as its policies act in [-1, 1]."""
    from d3rlpy import algos, preprocessing

    standardised = preprocessing.StandardObservationScaler()
    common = {"batch_size": 256, "observation_scaler": standardised}
    common["action_scaler"] = preprocessing.MinMaxActionScaler(box.low, box.high)
    if name == "td3bc":
        return algos.TD3PlusBCConfig(**common).create(device)
    if name == "bc":
        return algos.BCConfig(**common).create(device)
    scaler = preprocessing.ReturnBasedRewardScaler(multiplier=1000)
    return algos.IQLConfig(reward_scaler=scaler, **common).create(device)


def episodes_of(dataset):
    """A ractd.Dataset as d3rlpy's, its time limits as time limits."""
    from d3rlpy.dataset import MDPDataset

    terminals, timeouts = np.zeros((2, len(dataset.rewards)), np.float32)
    terminals[dataset.ends[dataset.terminated]] = 1
    timeouts[dataset.ends[~dataset.terminated]] = 1
    return MDPDataset(dataset.observations, dataset.actions, dataset.rewards, terminals, timeouts)


def baseline(run):
    """Train, score, write the JSON, print one line."""
    warnings.filterwarnings("ignore", module="gym")  # which d3rlpy imports
    try:
        import d3rlpy
    except ImportError as error:
        text = f"{error}: `python -m reproduce.baselines --help` tells what to install"
        raise ractd.UserError(text) from None

    settings = run.config
    dataset = ractd.load_dataset(run.env, run.data)
    meta = dataset.summary()
    make_env = lambda: ractd.simulator(run.env)
    box = make_env().action_space
    d3rlpy.seed(settings.seed)
    algorithm = make_algorithm(settings.algorithm, box, str(run.device))
    began = time.perf_counter()
    algorithm.fit(  # shows its own progress, with ETA
        episodes_of(dataset),
        n_steps=settings.steps,
        n_steps_per_epoch=min(settings.steps, 1000),
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    seconds = time.perf_counter() - began

    def act(observations, _):
        return algorithm.predict(observations.astype(np.float32))[:, None]  # plans of one action

    result = ractd.evaluate(act, make_env, settings.episodes, settings.first_seed)
    mean, error, unit = points(run.env, result["returns"])
    about = {"env": run.env, "dataset": meta, **dataclasses.asdict(settings)}
    about |= {"train_s": seconds, "threads": torch.get_num_threads()}
    about |= {"score_mean": mean, "score_sem": error, "unit": unit}
    path = run.out / f"{settings.algorithm}_seed{settings.seed}.json"
    write_json(path, about | result)
    print(data_label(run.env, meta))
    score = f"{unit} {plus_minus(mean, error)}"
    print(f"{settings.algorithm}, {settings.steps:,} steps: {score}, {seconds:.0f} s")
    print(f"All numbers: {path}")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("baselines", __doc__)
    return run_command("baselines.py", lambda: baseline(parse_own(parser, Settings, argv)))


if __name__ == "__main__":
    sys.exit(main())
