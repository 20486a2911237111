"""Table 4, time per action of teacher and student, and training speed: <out>/bench.json.

    python -m reproduce.bench --env hopper-medium-replay                 speed alone
    python -m reproduce.bench --env hopper-medium-replay --episodes 20   with the score of each row

What is not trained yet is trained first, as `python ractd.py distill` does.
"""

import copy
import dataclasses
import importlib.metadata
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ractd
from reproduce.common import (
    STAGES,
    Experiment,
    in_turns,
    make_parser,
    parse_run,
    points,
    run_command,
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
    "best_of_4": ("student", {"candidates": 4}),
    "best_of_16": ("student", {"candidates": 16}),
}
BATCH = 128  # of the second column of times


def network_passes(step):
    """Run step() and return a callable that repeats the network passes it made and nothing else.

    Forward passes on the same inputs; backward ones to the weights and inputs that needed them. The
    embedding of the noise levels, which is made outside of the network's forward, is an input.
    """
    passes = []

    def note(net, inputs):
        mlp = isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Flatten)  # ractd.mlp: R, V
        if mlp or isinstance(net, ractd.UNet1d):
            copies = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            needed = any(x.requires_grad for x in (*copies, *net.parameters()))
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


def training_speed(experiment, stage, built_on):
    """Steps per second of one stage, and the share of a step that its network passes take."""
    config = experiment.run.config
    dims = experiment.meta["dims"]
    batch = getattr(config, f"{'teacher' if stage == 'tilted' else stage}_batch")
    net, loss_fn = ractd.stage_loss(stage, config, experiment.batches, dims, built_on)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)

    def step():
        ractd.train_step(net, average, optimizer, loss_fn, 0.99)

    times = in_turns({"step": step, "passes": network_passes(step)})
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch": batch,
        "steps_per_s": 1000 / times["step"][0],
        "step_ms": times["step"],
        "passes_ms": times["passes"],
        "network_share": times["passes"][0] / times["step"][0],
    }


def action_times(policies, dims, device):
    """Times of `in_turns`, of {name: Policy} -> (of one action, of a batch of actions).

    The first has the bare networks, too, under "teacher" and "student".
    """
    observations = np.zeros((BATCH, dims[0]), np.float32)
    generators = [np.random.default_rng(i) for i in range(BATCH)]

    def act(policy, batch):
        return lambda: policy.act(observations[:batch], generators[:batch])

    def bare(policy, *levels):
        x, state = torch.zeros(1, *policy.shape), torch.zeros(1, dims[0])
        inputs = x.to(device), policy.net.embed(*levels), state.to(device)
        return lambda: policy.net(*inputs)

    with torch.inference_mode():  # as a Policy does
        one = {name: act(policy, 1) for name, policy in policies.items()}
        one["teacher"] = bare(policies["teacher_80"], 1.0)
        one["student"] = bare(policies["student_1"], 1.0, 0.02)
        many = {name: act(policy, BATCH) for name, policy in policies.items()}
        return in_turns(one), in_turns(many, turns=10)


def device_name(device):
    """The processor's or graphics card's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, info = platform.machine(), Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return f"{name}, threads: {torch.get_num_threads()}"


def peak_memory(device):
    """Peak memory in MiB so far: of the process, and on the CUDA device, None without one."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    cuda = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return kib / 1024, cuda


def bench(run):
    """Measure all of it, write bench.json, print the table."""
    experiment, config = Experiment(run), run.config
    tilts = config.tilted_steps and config.reward_weight
    stages = [stage for stage in STAGES if stage != "tilted" or tilts]
    models = {stage: experiment.model(stage) for stage in stages[:-1]}
    models["student"] = experiment.student()
    policies = {}
    for name, (stage, changes) in SAMPLERS.items():
        acting = dataclasses.replace(config, **changes)
        policies[name] = ractd.Policy(models[stage], acting, run.device, run.out)
    print("time per action", flush=True)
    one, many = action_times(policies, experiment.meta["dims"], run.device)
    train = {}
    for stage in stages:
        print(f"training steps: {stage}", flush=True)
        train[stage] = training_speed(experiment, stage, models)
    score = {}
    if run.episodes is not None:  # given on the command line
        for name, (stage, changes) in SAMPLERS.items():
            print(f"score of {name}", flush=True)
            returns = experiment.score(models[stage], changes)["returns"]
            score[name] = points(run.env, returns, experiment.meta["dataset"])
    print(f"{config.episodes} episodes, timed", flush=True)
    make_env = ractd.simulator(run.env, experiment.meta["dataset"])
    network_s = []

    def act(*inputs):
        began = time.perf_counter()
        plans = policies["student_1"].act(*inputs)
        network_s.append(time.perf_counter() - began)
        return plans

    began = time.perf_counter()
    ractd.evaluate(act, make_env, config.episodes, config.first_seed)
    simulator_s = time.perf_counter() - began - sum(network_s)
    memory, cuda_memory = peak_memory(run.device)
    result = {
        "env": run.env,
        "dataset": experiment.meta["dataset"],
        "episodes": config.episodes,
        "first_seed": config.first_seed,
        "calls": {name: policy.calls for name, policy in policies.items()},
        "action_ms": {name: one[name][0] for name in SAMPLERS},
        "action_ms_iqr": {name: one[name][1] for name in SAMPLERS},
        f"action_ms_of_batch_{BATCH}": {name: many[name][0] for name in SAMPLERS},
        "score": score,
        "forward_ms": {stage: one[stage][0] for stage in ("teacher", "student")},
        "policy_ms": one["student_1"][0],
        "train": train,
        "eval": {"simulator_s": simulator_s, "network_s": sum(network_s)},
        "peak_memory_mib": memory,
        "peak_cuda_mib": cuda_memory,
        "device": device_name(run.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "mujoco")},
    }
    write_json(run.out / "bench.json", result)
    print_table(result)
    print(f"All numbers: {run.out / 'bench.json'}")


def print_table(result):
    """What bench.json holds, to be read."""
    action_ms, forward_ms = result["action_ms"], result["forward_ms"]
    slowest = action_ms["teacher_80"]
    print(f"\n{result['env']}, {result['device']}")
    print(f"{'':12}calls  ms/action  +- IQR  of teacher_80  ms/action in {BATCH}  score")
    for name, ms in action_ms.items():
        iqr, of_many = result["action_ms_iqr"][name], result[f"action_ms_of_batch_{BATCH}"][name]
        row = f"{name:12}{result['calls'][name]:5}{ms:11.2f}{iqr:8.2f}"
        row += f"{slowest / ms:9.1f}x less{of_many / BATCH:18.3f}"
        if name in result["score"]:
            mean, sem, _ = result["score"][name]
            row += f"{mean:7.1f} +- {sem:.1f}"
        print(row)
    print(
        f"bare network call: teacher {forward_ms['teacher']:.2f} ms, "
        f"student {forward_ms['student']:.2f} ms; "
        f"policy call {result['policy_ms'] / forward_ms['student']:.2f} of the student's"
    )
    for stage, row in result["train"].items():
        print(
            f"{stage:8}{row['parameters']:12,} parameters, batch {row['batch']}: "
            f"{row['steps_per_s']:6.1f} steps/s, "
            f"{row['network_share']:.2f} of a step in network passes"
        )
    seconds, memory = result["eval"], result["peak_memory_mib"]
    print(
        f"{result['episodes']} episodes of student_1: simulator {seconds['simulator_s']:.1f} s, "
        f"network {seconds['network_s']:.1f} s; peak memory {memory:.0f} MiB"
    )


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("bench", __doc__)
    return run_command("bench.py", lambda: bench(parse_run(parser, argv)))


if __name__ == "__main__":
    sys.exit(main())
