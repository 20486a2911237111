"""TD3+BC and IQL on the same data, by d3rlpy: what RACTD's scores are compared with.

    python -m reproduce.baselines --env hopper-medium-replay --algorithm iql [--data FILE]

d3rlpy 2.8.1 needs an environment of its own: `pip install torch==2.13.0 d3rlpy==2.8.1`, then `pip
install -r requirements.txt`, where pip says that d3rlpy wants an older gymnasium: ours will do.
Its own hyperparameters but a batch of 256 and standardised observations; for IQL rewards scaled to
returns of a range of 1000, as its authors do on these tasks. Acts in the simulator of `ractd.py
evaluate`, deterministically, after the last step. Writes <out>/baseline_<algorithm>.json.
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import ractd
from reproduce.common import data_label, make_parser, points, run_command, write_json

ALGORITHMS = ("td3bc", "iql")


def make_algorithm(name, device):
    """d3rlpy's learner, untrained."""
    from d3rlpy import algos, preprocessing

    standardised = preprocessing.StandardObservationScaler()
    common = {"batch_size": 256, "observation_scaler": standardised}
    if name == "td3bc":
        return algos.TD3PlusBCConfig(**common).create(device)
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
    import d3rlpy

    dataset = ractd.load_dataset(run.env, run.data)
    meta = dataset.summary()
    make_env = ractd.simulator(run.env, meta)
    d3rlpy.seed(run.seed)
    algorithm = make_algorithm(run.algorithm, run.device)
    began = time.perf_counter()
    algorithm.fit(  # shows its own progress, with ETA
        episodes_of(dataset),
        n_steps=run.steps,
        n_steps_per_epoch=min(run.steps, 1000),
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    seconds = time.perf_counter() - began

    def act(observations, _):
        return algorithm.predict(observations.astype(np.float32))[:, None]  # plans of one action

    result = ractd.evaluate(act, make_env, run.episodes, run.first_seed)
    mean, sem, unit = points(run.env, result["returns"], meta)
    path = run.out / f"baseline_{run.algorithm}.json"
    about = {"env": run.env, "dataset": meta, "algorithm": run.algorithm, "steps": run.steps}
    about |= {"seed": run.seed, "episodes": run.episodes, "first_seed": run.first_seed}
    about |= {"train_s": seconds, "threads": torch.get_num_threads()}
    about |= {"score_mean": mean, "score_sem": sem}
    write_json(path, {**about, **result})
    print(data_label(run.env, meta))
    print(f"{run.algorithm}, {run.steps:,} steps: {unit} {mean:.1f} +- {sem:.1f}, {seconds:.0f} s")
    print(f"All numbers: {path}")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("baselines", __doc__, others=False)
    add = parser.add_argument
    add("--env", required=True, choices=ractd.ENVS, metavar="ENV", help=", ".join(ractd.ENVS))
    add("--algorithm", required=True, choices=ALGORITHMS)
    add("--out", type=Path, help="folder (default: runs/<env>)")
    add("--steps", type=int, default=50_000, help="gradient steps (default: 50000)")
    run = parser.parse_args(argv)
    run.out = run.out or Path("runs") / run.env
    warnings.filterwarnings("ignore", module="gym")
    return run_command("baselines.py", lambda: baseline(run))


if __name__ == "__main__":
    sys.exit(main())
