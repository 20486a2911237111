"""Table 4, time per action of teacher and student, and training speed: <out>/bench.json.

    python -m reproduce.bench --env hopper-medium-replay                 speed alone
    python -m reproduce.bench --env hopper-medium-replay --episodes 20   with the score of each row
    python -m reproduce.bench --env hopper-medium-replay --what growth   data of 0.2 to 10 M rows

What is not trained yet is trained first, as `python ractd.py distill` does. onnx_* are a Policy as
`python -m reproduce.export` writes it, where the packages of reproduce/requirements.txt are. growth
makes random data of Hopper's sizes and writes <out>/growth.json.
"""

import copy
import dataclasses
import importlib.metadata
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ractd
from reproduce import export
from reproduce.common import (
    Experiment,
    acting_noise,
    device_name,
    in_turns,
    make_parser,
    parse_run,
    plus_minus,
    points,
    print_table,
    run_command,
    stages_up_to,
    write_json,
)

# row of the table -> who acts, and changes of Config
SAMPLERS = {
    "teacher_80": ("teacher", {"teacher_points": 80}),
    "teacher_20": ("teacher", {"teacher_points": 20}),
    "teacher_10": ("teacher", {"teacher_points": 10}),
    "student_1": ("student", {"nfe": 1}),
    "student_2": ("student", {"nfe": 2}),
    "student_4": ("student", {"nfe": 4}),
}
SLOWEST = "teacher_80"  # whose time, by the same runtime, is divided by the others'
BATCH = 128  # of the second column of times
GROWTH = (200_000, 2_000_000, 10_000_000)  # rows


def network_passes(step):
    """Run step() and return a callable that repeats the network passes it made and nothing else.

    Forward passes on the same inputs; backward ones to the weights and inputs that needed them.
    """
    passes = []

    def copied(x):
        return x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

    def note(net, inputs):
        mlp = isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Flatten)  # ractd.mlp: R, V
        if mlp or isinstance(net, ractd.UNet1d):
            copies = [copied(x) for x in inputs]
            tensors = [x for x in copies if torch.is_tensor(x)]
            needed = any(x.requires_grad for x in (*tensors, *net.parameters()))
            passes.append((net, copies, needed and torch.is_grad_enabled()))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    step()
    hook.remove()

    def repeat():
        for net, inputs, grad in passes:
            with torch.set_grad_enabled(grad):
                output = net(*inputs)
            if grad:
                output.backward(torch.ones_like(output))

    return repeat


def training_speed(experiment, stage, models):
    """Steps per second of one stage, and the share of a step that its network passes take.

    models: the checkpoints of the stages before it.
    """
    # as many trajectories of the teacher as a step draws are enough to be timed
    config = dataclasses.replace(experiment.run.config, student_steps=1)
    device = experiment.run.device
    networks = {name: ractd.load_network(model, device) for name, model in models.items()}
    net, loss_fn = ractd.STAGES[stage](config, experiment.batches, **networks)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)

    def step():
        ractd.train_step(net, average, optimizer, loss_fn, 0.99)

    times = in_turns({"step": step, "passes": network_passes(step)})
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch": getattr(config, f"{stage}_batch"),
        "trajectories": config.trajectories if stage == "student" else 0,
        "steps_per_s": 1000 / times["step"][0],
        "step_ms": times["step"],
        "passes_ms": times["passes"],
        "network_share": times["passes"][0] / times["step"][0],
    }


def onnx_act(policy):
    """The policy's `act` by onnxruntime."""
    deployed = export.Deployed(policy)
    session = export.onnx_session(export.to_onnx(export.to_program(deployed)))

    def act(observations, generators):
        noise = acting_noise(generators, deployed.noise_shape).numpy()
        return export.call_onnx(session, np.float32(observations), noise)

    return act


def onnx_network_act(policy):
    """A teacher's `act`, its network by onnxruntime, the rest of Heun's method by torch."""
    policy = copy.deepcopy(policy).cpu()
    inputs = {
        "x": torch.zeros(2, *policy.shape),
        "t": torch.ones(2),
        "state": torch.zeros(2, policy.obs_table.shape[1]),
    }
    export.unroll(policy.net, *inputs.values())
    dims = {name: {0: torch.export.Dim("batch")} for name in inputs}
    program = torch.export.export(policy.net, (), inputs, dynamic_shapes=dims)
    session = export.onnx_session(export.to_onnx(program, list(inputs), "y"))

    def network(x, t, state, k=None):
        levels = np.full(len(x), t, np.float32)
        (y,) = session.run(None, {"x": x.numpy(), "t": levels, "state": state.numpy()})
        return torch.from_numpy(y)

    policy.network = network
    return policy.act


def action_times(policies, acts, dims, device):
    """Times of `in_turns`: of one action, and of a batch of actions, each {name: [ms, IQR]}.

    policies: {name: Policy}; acts: {name: what acts as `Policy.act` does}. The first has the bare
    networks, too, under "teacher" and "student".
    """
    observations = np.zeros((BATCH, dims[0]), np.float32)
    generators = [np.random.default_rng(i) for i in range(BATCH)]

    def call(act, batch):
        return lambda: act(observations[:batch], generators[:batch])

    def bare(policy, t, k=None):
        x = torch.zeros(1, *policy.shape, device=device)
        state = torch.zeros(1, dims[0], device=device)
        return lambda: policy.net(x, t, state, k)

    with torch.inference_mode():  # as a Policy does
        one = {name: call(act, 1) for name, act in acts.items()}
        one["teacher"] = bare(policies["teacher_80"], 1.0)
        one["student"] = bare(policies["student_1"], 1.0, 0.02)
        many = {name: call(act, BATCH) for name, act in acts.items()}
        return in_turns(one), in_turns(many, turns=10)


def evaluation_times(act, make_env, config):
    """Seconds that an evaluation spends in the simulator and in the policy's network."""
    network_s = []

    def timed(*inputs):
        began = time.perf_counter()
        plans = act(*inputs)
        network_s.append(time.perf_counter() - began)
        return plans

    began = time.perf_counter()
    ractd.evaluate(timed, make_env, config.episodes, config.first_seed)
    whole = time.perf_counter() - began
    return {"simulator_s": whole - sum(network_s), "network_s": sum(network_s)}


def slowest(name):
    """The row whose time is divided by that of the row `name`: of the same runtime."""
    return f"onnx_{SLOWEST}" if name.startswith("onnx") else SLOWEST


def peak_memory(device):
    """Peak memory in MiB so far: of the process, and on the CUDA device, None without one."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    cuda = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return kib / 1024, cuda


def write_rows(path, rows):
    """Random data of Hopper's sizes in D4RL's layout, an episode every 500 rows."""
    import h5py

    rng = np.random.default_rng(0)
    at = np.arange(rows)
    with h5py.File(path, "w") as f:
        f["observations"] = rng.random((rows, 11), np.float32)
        f["actions"] = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        f["rewards"] = rng.random(rows, np.float32)
        f["terminals"] = at % 1000 == 499
        f["timeouts"] = at % 1000 == 999


def load_and_draw(path, config):
    """In a process of its own: {what is measured of a file: number}."""
    torch.set_num_threads(1)
    before, _ = peak_memory(torch.device("cpu"))
    began = time.perf_counter()
    batches = ractd.Batches(ractd.load_dataset("", path), config.horizon, config.gamma)
    load_s = time.perf_counter() - began
    memory, _ = peak_memory(torch.device("cpu"))
    sums = torch.rand(len(batches.obs), dtype=torch.float64).cumsum(0)
    draws = {
        "plain": lambda: batches.windows(config.teacher_batch),
        "weighted": lambda: batches.windows(config.teacher_batch, sums),
    }
    times = in_turns(draws)
    result = {"load_s": load_s, "peak_memory_mib": memory, "before_mib": before}
    return result | {f"{name}_batch_ms": ms for name, (ms, _) in times.items()}


def growth(run):
    """Load data of more and more rows, each in a new process; write growth.json, print a table."""
    spawn = multiprocessing.get_context("spawn")
    result = {}
    for rows in GROWTH:
        print(f"{rows:,} rows", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "rows.hdf5")
            write_rows(path, rows)
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                result[rows] = pool.submit(load_and_draw, path, run.config).result()
    write_json(run.out / "growth.json", result)
    header = ["rows", "to load, s", "peak memory, MiB", "a batch, ms", "weighted, ms"]
    table = []
    for rows, row in result.items():
        times = [f"{row[f'{name}_batch_ms']:.3f}" for name in ("plain", "weighted")]
        table.append([f"{rows:,}", row["load_s"], f"{row['peak_memory_mib']:.0f}", *times])
    print_table(header, table)
    print(f"All numbers: {run.out / 'growth.json'}")


def bench(run):
    """Measure all of it, write bench.json, print the table."""
    experiment = Experiment(run)
    config = run.config
    dims = experiment.meta["dims"]
    data = experiment.meta["dataset"]
    stages = stages_up_to("student", config)
    models = {stage: experiment.model(stage) for stage in stages}

    print("time per action", flush=True)
    policies = {}
    for name, (stage, changes) in SAMPLERS.items():
        policies[name] = ractd.Policy(models[stage], **changes, device=run.device)
    acts = {name: policy.act for name, policy in policies.items()}
    calls = {name: policy.calls for name, policy in policies.items()}
    try:
        acts["onnx_teacher_80"] = onnx_network_act(policies["teacher_80"])
        acts["onnx_1"] = onnx_act(copy.deepcopy(policies["student_1"]).cpu())
        calls |= {"onnx_teacher_80": calls["teacher_80"], "onnx_1": 1}
    except ImportError as error:
        print(f"no rows for ONNX ({error})")
    one, many = action_times(policies, acts, dims, run.device)

    train = {}
    for stage in stages:
        print(f"training steps: {stage}", flush=True)
        before = {name: models[name] for name in stages_up_to(stage, config)[:-1]}
        train[stage] = training_speed(experiment, stage, before)

    score = {}
    if run.episodes is not None:  # given on the command line
        for name, (stage, changes) in SAMPLERS.items():
            print(f"score of {name}", flush=True)
            returns = experiment.score(models[stage], changes)["returns"]
            score[name] = points(run.env, returns)

    print(f"{config.episodes} episodes, timed", flush=True)
    seconds = evaluation_times(acts["student_1"], lambda: ractd.simulator(run.env), config)
    memory, cuda_memory = peak_memory(run.device)
    result = {
        "env": run.env,
        "dataset": data,
        "episodes": config.episodes,
        "first_seed": config.first_seed,
        "calls": calls,
        "action_ms": {name: one[name][0] for name in acts},
        "action_ms_iqr": {name: one[name][1] for name in acts},
        "ratio": {name: one[slowest(name)][0] / one[name][0] for name in acts},
        f"action_ms_of_batch_{BATCH}": {name: many[name][0] for name in acts},
        f"ratio_of_batch_{BATCH}": {name: many[slowest(name)][0] / many[name][0] for name in acts},
        "score": score,
        "forward_ms": {stage: one[stage][0] for stage in ("teacher", "student")},
        "train": train,
        "eval": seconds,
        "peak_memory_mib": memory,
        "peak_cuda_mib": cuda_memory,
        "device": device_name(run.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "mujoco")},
    }
    write_json(run.out / "bench.json", result)
    print_result(result)
    print(f"All numbers: {run.out / 'bench.json'}")


def print_result(result):
    """What bench.json holds, to be read."""
    print(f"\n{result['env']}, {result['device']}; ratio: {SLOWEST}'s time to this one's")
    rows = []
    for name, ms in result["action_ms"].items():
        of_many = result[f"action_ms_of_batch_{BATCH}"][name] / BATCH
        row = [name, result["calls"][name], f"{ms:.2f}", f"{result['action_ms_iqr'][name]:.2f}"]
        row += [result["ratio"][name], f"{of_many:.3f}", result[f"ratio_of_batch_{BATCH}"][name]]
        mean, error, _ = result["score"].get(name, (None, None, None))
        rows.append([*row, None if mean is None else plus_minus(mean, error)])
    header = ["", "calls", "ms/action", "IQR", "ratio", f"ms/action of {BATCH}", "ratio", "score"]
    print_table(header, rows)

    print("\ntraining")
    rows = []
    for stage, row in result["train"].items():
        share = f"{row['network_share']:.0%}"
        sizes = [f"{row['parameters']:,}", row["batch"], row["trajectories"]]
        rows.append([stage, *sizes, row["steps_per_s"], share])
    header = ["", "parameters", "batch", "trajectories", "steps/s", "of it in network passes"]
    print_table(header, rows)

    forward_ms = result["forward_ms"]
    seconds = result["eval"]
    print(
        f"\nbare network call: teacher {forward_ms['teacher']:.2f} ms, "
        f"student {forward_ms['student']:.2f} ms\n"
        f"{result['episodes']} episodes of student_1: simulator {seconds['simulator_s']:.1f} s, "
        f"network {seconds['network_s']:.1f} s; peak memory {result['peak_memory_mib']:.0f} MiB"
    )


WHAT = {"speed": bench, "growth": growth}


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("bench", __doc__)
    text = "speed of acting and training, or growth with the data (default: speed)"
    parser.add_argument("--what", choices=WHAT, default="speed", help=text)

    def measure():
        run = parse_run(parser, argv)
        WHAT[run.what](run)

    return run_command("bench.py", measure)


if __name__ == "__main__":
    sys.exit(main())
