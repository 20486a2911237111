"""Around ractd.py, which is the method: D4RL's files or stand-ins for them, the paper's tables and figures.

    python ractd.py data    --env hopper-medium-replay --data standin      a stand-in for D4RL's file
    python ractd.py distill --env hopper-medium-replay --dry-run           how long that would take
    python ractd.py bench   --env hopper-medium-replay [--episodes 20]     Table 4 and training speed
    python ractd.py ablate  --env hopper-medium-replay --what losses       Table 5 and the appendix
    python ractd.py plot    --env hopper-medium-replay --episodes 100      Figure 3
    python ractd.py export  --env hopper-medium-replay policy.pt2          a policy without this program
    python ractd.py evaluate --env hopper-medium-replay --video hop.gif    one episode to look at

bench, ablate and plot first train what is missing, as `distill` does; what is finished is not repeated.
"""

import copy, dataclasses, hashlib, http.client, importlib.metadata, json, os, platform, resource  # noqa: E401
import socket, tempfile, time, unittest.mock, urllib.error, warnings  # noqa: E401
from pathlib import Path
import numpy as np
import torch
from torch import nn
from ractd import (
    DISTANCES, ENVS, STAGES, TASKS, Pipeline, Policy, RewardModel, UNet1d, UserError, assemble, assess,
    deferred_interrupt, denoise, edm_loss, episode_begins, evaluate, fit, frozen, load_checkpoint,
    load_reward_model, lognormal_levels, make_unet, normalized_score, read_log, recall, replacing,
    reward_loss, simulator, train_step)

# ---- 1. Data: D4RL's files, or where there is no network the same simulator, searched by linear policies --
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
# env -> bytes and SHA-256 of its file, version 2
D4RL_FILES = {env: (int(size), sha256) for env, size, sha256 in map(str.split, """
halfcheetah-medium        237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
halfcheetah-medium-replay  59448533 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
halfcheetah-medium-expert 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
hopper-medium             141484200 828ab916d1ff570ac0655af7d29390b652a6f2f4bbd05b311ac91d57fe38576c
hopper-medium-replay       77251678 3ebbc1b9b0e98188923bd2cc0fb80541980e8c6a0ebdb8139910b0aa0bde1646
hopper-medium-expert      281841200 3c599b8c9576dd1df13fd36a48b9c7e9a0ec9ce4a2db4fe836f7712a640b1d00
walker2d-medium           232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
walker2d-medium-replay     86323963 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
walker2d-medium-expert    462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
""".strip().splitlines())}

def fetch_d4rl(env):
    """Path of env's file in D4RL's own cache, downloaded if need be; None where there is no network."""
    size, sha256 = D4RL_FILES[env]
    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    path = folder / (env.replace("-", "_") + "-v2.hdf5")
    if path.exists():
        with open(path, "rb") as f:
            if path.stat().st_size == size and hashlib.file_digest(f, "sha256").hexdigest() == sha256:
                return path
        raise UserError(f"{path} is not the published file (SHA-256 {sha256[:12]}...); delete it, "
                        "or pass it as --data")
    socket.setdefaulttimeout(20)         # seconds without an answer
    print(f"downloading {D4RL_URL}{path.name} ({size / 1e6:.0f} MB) to {folder}", flush=True)
    try:                                 # writes aside, and renames once the hash has matched
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(D4RL_URL + path.name, str(path), hash_prefix=sha256)
        return path
    # RuntimeError: wrong hash
    except (RuntimeError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise UserError(f"the download of {path.name} broke off or is not the published file ({error}); give "
                        "the same command again, or pass --data standin") from None
    except urllib.error.URLError as error:           # no network, in all its forms
        print(f"{path.name} is not in {folder} and cannot be downloaded ({error}).\nA stand-in is made or "
              "reused: Augmented Random Search in the same simulator. Scores on it are NOT\ncomparable with "
              "the paper's. For the real data, put the file into that folder.")

def read_minari(dataset_id, source):
    """A Minari dataset of Box observations and actions: a local one, or through minari's download."""
    import minari
    try:
        missing = dataset_id not in minari.list_local_datasets()
        episodes = list(minari.load_dataset(dataset_id, download=missing).iterate_episodes())
        # an episode holds one observation more than actions: the last one, on which nobody acted
        arrays = [np.concatenate([getattr(e, key)[:len(e.rewards)] for e in episodes])
                  for key in ("observations", "actions", "rewards", "terminations", "truncations")]
    except Exception as error:           # many types: bad id, no network, missing extra, spaces of dicts
        raise UserError(
            f"{dataset_id!r} cannot be read ({type(error).__name__}: {error}); observations and actions must "
            "be Box, and a remote dataset needs a network and `pip install 'minari[hf,gcs]'`") from None
    arrays[4][np.cumsum([len(e.rewards) for e in episodes]) - 1] = True      # also where it was cut off
    return assemble(dataset_id, source, *arrays)

# task -> directions tried and used, step, noise and survival bonus of the search, search steps per kept step
SEARCH = {"hopper": (8, 4, 0.02, 0.025, 1.0, 1), "walker2d": (20, 10, 0.03, 0.025, 1.0, 3),
          "halfcheetah": (8, 4, 0.02, 0.03, 0.0, 4)}

def collect_standin(env, transitions=200_000, seed=0):
    """Episodes of about `transitions` steps by Augmented Random Search V2-t (Mania, Guy, Recht 2018).

    Of linear policies M (s - mean) / std. medium-replay: all that it tries; medium: its policy half way
    in return; medium-expert: half that, half its best. Each a dict of arrays as Minari buffers them.
    """
    task, kind = env.split("-", 1)
    directions, top, alpha, nu, bonus, factor = SEARCH[task]
    rng, world, began = np.random.default_rng(seed), simulator(task)(), time.time()
    world.reset(seed=seed)               # later resets go on from here
    def play(M, mean, std, noise=0.0):
        states, actions, rewards, end = [world.reset()[0]], [], [], [False]
        while not any(end):              # end = [terminated, truncated]
            action = M @ ((states[-1] - mean) / std) + (noise and noise * rng.normal(size=len(M)))
            actions.append(np.clip(action, -1, 1).astype(np.float32))    # the one that acts is logged
            state, reward, *end, _ = world.step(actions[-1])
            states.append(state)
            rewards.append(reward)
        last = np.arange(len(rewards)) == len(rewards) - 1
        return dict(observations=np.float32(states), actions=np.float32(actions), rewards=np.float32(rewards),
                    terminations=last & end[0], truncations=last & (not end[0]))

    M = np.zeros(world.action_space.shape + world.observation_space.shape)
    mean, std, count, first, second, tried, updates = 0.0, 1.0, 0, 0.0, 0.0, [], []
    while count < factor * transitions:
        delta = rng.normal(size=(directions, *M.shape))
        new = [play(M + nu * d, mean, std) for pair in delta for d in (pair, -pair)]
        returns = np.array([e["rewards"].sum() for e in new])
        tried, updates = tried + new, updates + [(returns.mean(), (M, mean, std))]
        # standing still earns the survival bonus too: a search that counted it would learn to stand
        gain = (returns - [bonus * len(e["rewards"]) for e in new]).reshape(-1, 2)      # r+, r-
        used = np.argsort(gain.max(1))[-top:]
        slope = np.tensordot(gain[used, 0] - gain[used, 1], delta[used], 1)
        M = M + alpha / (top * gain[used].std()) * slope
        s = np.concatenate([e["observations"] for e in new], dtype=float)
        count, first, second = count + len(s), first + s.sum(0), second + (s * s).sum(0)
        mean = first / count
        std = np.sqrt(np.maximum(second / count - mean**2, 1e-8))
        done = min(count / (factor * transitions), 1)
        print(f"\rstand-in for {env}: {done:4.0%} of {factor * transitions:,} search steps, mean return "
              f"{returns.mean():5.0f}, ETA {(1 / done - 1) * (time.time() - began):3.0f} s ",
              end="\n" * (done == 1), flush=True)
    if kind == "medium-replay":          # evenly spaced whole episodes where the search took longer
        kept = round(len(tried) * min(transitions / sum(len(e["rewards"]) for e in tried), 1))
        return [tried[i] for i in np.linspace(0, len(tried) - 1, kept, dtype=int)]
    top, expert = max(updates, key=lambda update: update[0])
    _, medium = min(updates, key=lambda update: abs(update[0] - (updates[0][0] + top) / 2))
    episodes, steps = [], 0
    while steps < transitions:           # action noise, or all episodes would be nearly the same
        late = kind == "medium-expert" and steps >= transitions / 2
        episodes.append(play(*(expert if late else medium), noise=0.1))
        steps += len(episodes[-1]["rewards"])
    return episodes

def make_standin(env, transitions=200_000):
    """Id of the local Minari dataset that stands in for env's D4RL file, collected if it is missing."""
    import minari
    dataset_id, root = f"ractd/{env}-standin-v0", minari.storage.get_dataset_path()
    if not (root / dataset_id).exists():
        buffers = [minari.data_collector.EpisodeBuffer(**e) for e in collect_standin(env, transitions)]
        # Minari writes in place, and half a dataset would pass for one: write aside, then rename
        with tempfile.TemporaryDirectory(prefix=".ractd-", dir=root) as folder, \
                warnings.catch_warnings(), unittest.mock.patch.dict(os.environ, MINARI_DATASETS_PATH=folder):
            warnings.simplefilter("ignore")      # no author, no link: it stays local
            minari.create_dataset_from_buffers(dataset_id, buffers, env=TASKS[env.split("-")[0]][0],
                                               algorithm_name="ARS V2-t")
            os.renames(f"{folder}/{dataset_id}", root / dataset_id)
    return dataset_id

# ---- 2. Trained models and their scores, made once -----------------------------------------------------
def values(config, stage):
    """The hyperparameters of one part of the program: name -> value."""
    fields = [f.name for f in dataclasses.fields(config) if f.metadata["stage"] == stage]
    return {name: getattr(config, name) for name in fields}

def variant(pipeline, saved, changes):
    """The student with `changes` of Config -> (its run, checkpoints); trained if it is not there.

    saved: stage -> checkpoint of the teacher and the reward model, which all variants share. A change of how
    to act alone needs no training; others have a folder of their own, named after them, under <out>/variants.
    """
    pipeline = copy.copy(pipeline)
    base = pipeline.run
    run = pipeline.run = copy.copy(base)
    run.config = dataclasses.replace(base.config, **changes)
    trained = [f"{name}={value}" for name, value in values(run.config, "student").items()
               if value != getattr(base.config, name)]
    if trained:
        run.out = base.out / "variants" / "-".join(trained)
    used = {stage: c for stage, c in saved.items() if stage == "teacher" or run.config.reward_weight}
    done = vars(base).setdefault("retrained", set())     # folders: once each, however many rows act there
    run.retrain = [] if run.out in done else base.retrain
    done.add(run.out)
    return run, dict(used, student=pipeline.obtain("student", used))

def score(run, saved, actor="student"):
    """The metrics of one saved model acting as run.config says: from their file, or measured now."""
    how = "-".join(f"{name}={value}" for name, value in values(run.config, "acting").items())
    name = f"scores/{actor}-{saved[actor]['id']}-{how}.json"
    if not (run.out / name).exists():
        assess(run, saved, actor, name)
    return json.loads((run.out / name).read_text())

def points(env, returns):
    """Returns of episodes -> (mean, standard error, unit): D4RL scores; returns, if env has no reference."""
    results, unit = normalized_score(env, np.array(returns)), "normalised score"
    if not np.isfinite(results).all():
        results, unit = np.array(returns), "return"
    sem = results.std(ddof=1) / len(results) ** 0.5 if len(results) > 1 else 0.0
    return float(results.mean()), float(sem), unit

def write_json(path, value):
    """Numbers as JSON, whole or not at all."""
    with replacing(path) as f:
        f.write(json.dumps(value, indent=2, default=float).encode())

# Okabe and Ito's, for all eyes
COLORS = dict(data="#999999", teacher="#E69F00", CTD="#0072B2", RACTD="#D55E00")

def canvas(width, height, title, **options):
    """A figure that needs no screen, and its axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(**options)

# ---- 3. How long it takes: --dry-run, and bench (Table 4) -----------------------------------------------
def dry_run(run):
    """`--dry-run`: five steps of every stage in a folder that is thrown away, and the time of the whole."""
    pipeline, config, saved, total = Pipeline(run), run.config, {}, 0.0
    run.teacher = run.reward = None
    print(json.dumps(dataclasses.asdict(config), indent=2))
    with tempfile.TemporaryDirectory() as folder:
        run.out = Path(folder)
        for stage in STAGES if config.reward_weight else ("teacher", "student"):
            steps = getattr(config, f"{stage}_steps")
            setattr(config, f"{stage}_steps", 5)
            saved[stage] = pipeline.obtain(stage, dict(saved) if stage == "student" else None)
            rate = 60 * np.median([row["steps_per_s"] for row in read_log(run.out)[-4:]])    # not the first
            total += steps / rate
            print(f"{stage}: {60 / rate:.3f} s a step, {steps:,} steps: {steps / rate:.1f} min")
    print(f"estimated total: {total:.1f} min of training, then {config.episodes} episodes")

SAMPLERS = {f"teacher_{n}": ("teacher", dict(teacher_points=n)) for n in (80, 20, 10)} | {
    f"student_{n}": ("student", dict(nfe=n)) for n in (1, 2, 4)}      # name -> (who acts, changes of Config)

def in_turns(calls, turns=50, seconds=0.01):
    """{name: callable} -> {name: [median, interquartile range]} in ms, after warm-up, CUDA synchronised.

    The calls take turns, each for about `seconds`: a machine that slows down slows them all alike.
    """
    def once(call):
        began = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - began
    repeats = {name: max(1, int(seconds / min(once(call) for _ in range(2)))) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name] += [1000 * once(call) for _ in range(repeats[name])]
    return {name: [float(np.median(v)), float(np.subtract(*np.percentile(v, (75, 25))))]
            for name, v in times.items()}

def network_passes(step):
    """Run step() and return a callable that repeats the network passes it made and nothing else.

    Forward passes on the same inputs; backward ones to the weights and inputs that needed them.
    """
    passes = []
    def note(net, inputs):
        if isinstance(net, (UNet1d, RewardModel)):
            copies = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
            passes.append((net, copies, torch.is_grad_enabled()))
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

def training_speed(pipeline, saved, stage):
    """Steps per second of one stage, and the share of a step that its network passes take."""
    config = pipeline.run.config
    net, loss_fn = pipeline.build(stage, saved)
    half = torch.autocast(pipeline.run.device.type, torch.bfloat16, config.precision == "bfloat16")
    average = frozen(copy.deepcopy(net))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=True)
    def step():
        train_step(net, average, optimizer, half(loss_fn), 0.99)
    times = in_turns({"step": step, "passes": half(network_passes(step))})
    return dict(steps_per_s=1000 / times["step"][0], step_ms=times["step"], passes_ms=times["passes"],
                network_share=times["passes"][0] / times["step"][0], batch=getattr(config, f"{stage}_batch"),
                parameters=sum(p.numel() for p in net.parameters()))

def device_name(device):
    """The processor's or graphics card's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, threads: {torch.get_num_threads()}"

def bench(run):
    """`bench`: time per action of every sampler, training speed, evaluation split, memory -> bench.json."""
    pipeline, config = Pipeline(run), run.config
    run, saved = variant(pipeline, {stage: pipeline.obtain(stage) for stage in ("teacher", "reward")}, {})
    policies = {name: Policy(saved[actor], dataclasses.replace(config, **how), run.device)
                for name, (actor, how) in SAMPLERS.items()}
    first = pipeline.dataset.observations[0]
    observations = np.tile(first, (128, config.history, 1))
    generators = [np.random.default_rng(i) for i in range(128)]
    x, level = torch.zeros(1, *policies["student_1"].shape).to(run.device), torch.ones(1).to(run.device)
    state = torch.tensor(observations[:1], device=run.device).flatten(1)
    print("time per action", flush=True)
    def act(policy, batch):
        return lambda: policy(observations[:batch], generators[:batch])
    with torch.inference_mode():         # as a Policy does
        one = in_turns({name: act(policy, 1) for name, policy in policies.items()} | {
            "teacher": lambda: policies["teacher_80"].net(x, level, state),
            "student": lambda: policies["student_1"].net(x, level, state, level)})
    many = in_turns({name: act(policy, 128) for name, policy in policies.items()}, turns=10)
    print("training steps", flush=True)
    train = {stage: training_speed(pipeline, saved, stage) for stage in STAGES}
    results = {}
    for name in SAMPLERS if "episodes" in run.given else ["student_1"]:
        print(f"{config.episodes} episodes of {name}", flush=True)
        results[name] = evaluate(policies[name], simulator(run.env, run.data), config.episodes,
                                 config.first_seed, config.history, config.execute)
    scores = {name: points(run.env, result["returns"]) for name, result in results.items()}
    result = dict(
        env=run.env, dataset=saved["student"]["dataset"],
        episodes=config.episodes, first_seed=config.first_seed,
        action_ms={name: one[name][0] for name in SAMPLERS},
        action_ms_iqr={name: one[name][1] for name in SAMPLERS},
        action_ms_of_batch_128={name: many[name][0] for name in SAMPLERS},
        calls={name: policy.nfe for name, policy in policies.items()}, score=scores,
        forward_ms={name: one[name][0] for name in ("teacher", "student")}, policy_ms=one["student_1"][0],
        train=train, eval={key: results["student_1"][key] for key in ("simulator_s", "network_s")},
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,      # Linux counts in KiB
        peak_cuda_mb=torch.cuda.max_memory_allocated() / 2**20 if run.device.type == "cuda" else None,
        device=device_name(run.device),
        versions={name: importlib.metadata.version(name) for name in ("torch", "numpy", "mujoco")})
    write_json(run.out / "bench.json", result)

    print(f"\n{run.env}, {result['device']}\n"
          f"{'':12}calls  ms/action  +- IQR  of teacher_80  ms/action in 128  score")
    for name, policy in policies.items():
        told = "{:7.1f} +- {:.1f}".format(*scores[name]) if name in scores else ""
        print(f"{name:12}{policy.nfe:5}{one[name][0]:11.2f}{one[name][1]:8.2f}"
              f"{one['teacher_80'][0] / one[name][0]:9.1f}x less{many[name][0] / 128:18.3f}{told}")
    teacher, student = result["forward_ms"].values()
    print(f"bare network call: teacher {teacher:.2f} ms, student {student:.2f} ms, ratio "
          f"{student / teacher:.2f}, {one['teacher_80'][0] / student:.0f}x less than teacher_80; "
          f"policy call {result['policy_ms'] / student:.2f} of the student's")
    for stage, t in train.items():
        print(f"{stage:8}{t['parameters']:12,} parameters, batch {t['batch']}: {t['steps_per_s']:6.1f} "
              f"steps/s, {t['network_share']:.2f} of a step in network passes")
    print(f"{config.episodes} episodes of student_1: simulator {result['eval']['simulator_s']:.1f} s, "
          f"network {result['eval']['network_s']:.1f} s; peak memory {result['peak_memory_mb']:.0f} MB")
    print(f"All numbers: {run.out / 'bench.json'}")

# ---- 4. ablate: Table 5 and the appendix ---------------------------------------------------------------
PAPER = "paper, on D4RL's hopper-medium-replay"
# what -> rows: label, changes of Config, the paper's score if it has one. Two of the changes are none of
# Config: actor, who acts if not the student, and teacher="reward", which stands for `reward_teacher`. The
# reward weights are multiples of the task's own, as the paper's are of 1
ABLATIONS = {
    "reward-stage": [("teacher plain, student plain (CTD)", dict(reward_weight=0.0), 50.8),
                     ("teacher with reward, student plain", dict(reward_weight=0.0, teacher="reward"), 109.5),
                     ("teacher with reward, student with reward", dict(teacher="reward"), 96.0),
                     ("teacher plain, student with reward (RACTD)", {}, 109.5)],
    "reward-weight": [(f"{w} of the default sigma", dict(reward_weight=w), paper) for w, paper in (
        (0.0, 50.8), (0.1, None), (0.3, None), (0.5, None),
        (0.7, 108.4), (1.0, 109.5), (1.5, 50.5), (2.0, 17.0))],
    "losses": [("all three", {}, 109.5), ("without CTM", dict(ctm_weight=0.0), None),
               ("without DSM", dict(dsm_weight=0.0), 1.5),
               ("without reward (CTD)", dict(reward_weight=0.0), 50.8),
               ("without the anchor", dict(anchor_weight=0.0), None),
               ("DSM of G(x_t, t, 0), Eq. 7", dict(dsm_target="jump"), None),
               ("DSM at the released noise", dict(dsm_noise="mixed"), None)],
    "nfe": [(f"{n} network call(s)", dict(nfe=n), paper)
            for n, paper in ((1, 109.5), (2, 109.8), (4, 107.9))],
    "init-noise": [(f"{actor}, noise {s:g}", dict(actor=actor, init_noise=s), None)
                   for actor in ("teacher", "student") for s in (1.0, 5.0, 20.0, 80.0)]}

def reward_teacher(pipeline, saved):
    """The "reward teacher": the teacher fine-tuned on Eq. 4 + sigma Eq. 8, as many steps as a student has.

    R sees the first action of D(x_t, t), the one-step estimate that Eq. 4 makes anyway. -> (the run of what
    is built on it, checkpoints)
    """
    run, batches = copy.copy(pipeline.run), pipeline.batches
    schedule = {name: getattr(run.config, f"student_{name}") for name in ("steps", "lr", "warmup", "decay")}
    config = run.config = dataclasses.replace(
        run.config, **{f"teacher_{name}": value for name, value in schedule.items()})
    depends = pipeline.depends("teacher", saved) | values(config, "student")
    key = hashlib.sha256(repr(sorted(depends.items())).encode()).hexdigest()[:16]
    run.out = run.out / "variants" / f"reward-teacher-{key}"
    reward_model = load_reward_model(saved["reward"], batches.normalizer, run.device)
    net = make_unet(config, pipeline.dims).to(run.device)
    net.load_state_dict(saved["teacher"]["ema"])
    def loss_fn(net, _):
        state, x0 = batches.windows(config.teacher_batch)
        estimates = []
        def denoiser(x, t):
            estimates.append(denoise(net, x, t, state))
            return estimates[0]
        loss, info = edm_loss(denoiser, x0, lognormal_levels(len(x0), run.device), torch.randn_like(x0),
                              DISTANCES[config.teacher_distance])
        reward, more = reward_loss(reward_model, state, estimates[0][:, 0])
        return loss + config.reward_weight * reward, info | more
    torch.manual_seed(config.seed)
    meta = dict(pipeline.meta, depends=depends)
    with deferred_interrupt() as stop:
        fit("teacher", net, loss_fn, run, meta, stop)
    run.config = pipeline.run.config
    return run, dict(saved, teacher=load_checkpoint(run.out / "teacher.pt", "teacher", run.device))

def ablate(run):
    """`ablate`: the rows of one ablation, on one teacher and one reward model -> JSON, PNG, table."""
    pipeline, config, rows = Pipeline(run), run.config, []
    shared = {stage: pipeline.obtain(stage) for stage in ("teacher", "reward")}
    for i, (label, changes, paper) in enumerate(ABLATIONS[run.what]):
        print(f"\n== {run.what}, row {i + 1} of {len(ABLATIONS[run.what])}: {label}", flush=True)
        changes, here, saved = dict(changes), copy.copy(pipeline), shared
        if run.what == "reward-weight":
            changes["reward_weight"] *= config.reward_weight
        if changes.pop("teacher", None):
            here.run, saved = reward_teacher(pipeline, shared)
        if changes.pop("actor", None) == "teacher":
            acting = copy.copy(run)
            acting.config = dataclasses.replace(config, **changes)
            metrics = score(acting, saved, "teacher")
        else:
            metrics = score(*variant(here, saved, changes))
        mean, sem, unit = points(run.env, metrics["returns"])
        rows.append(dict(label=label, changes=changes, nfe=metrics["nfe"], score=mean, sem=sem, unit=unit,
                         paper=paper, returns=metrics["returns"]))
    data, path = shared["teacher"]["dataset"], run.out / f"ablate_{run.what}.json"
    title = (f"{run.what}: {run.env} on {data['name']} ({data['source']})\n"
             f"{config.episodes} episodes from seed {config.first_seed}, training seed {config.seed}")
    write_json(path, dict(what=run.what, env=run.env, dataset=data, seed=config.seed,
                          episodes=config.episodes, first_seed=config.first_seed, rows=rows))
    print(f"\n{title}\n{'':44}calls  {unit}  std. err.   {PAPER}")
    for row in rows:
        print(f"{row['label']:44}{row['nfe']:5}{row['score']:13.1f}{row['sem']:15.1f}{row['paper'] or '':>9}")
    figure, axis = canvas(6, 1.5 + 0.32 * len(rows), title)
    labels, scores, sems = zip(*((row["label"], row["score"], row["sem"]) for row in rows))
    axis.barh(labels, scores, xerr=sems, color=COLORS["RACTD"], height=0.6)
    if given := [(row["paper"], row["label"]) for row in rows if row["paper"] and unit != "return"]:
        axis.scatter(*zip(*given), marker="D", color=COLORS["CTD"], zorder=3, label=PAPER)
    axis.axvline(points(run.env, [data["return_mean"]])[0], color=COLORS["data"], linestyle="--",
                 label="mean of the data")
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    print(f"All numbers: {path}; picture: {path.with_suffix('.png')}")

# ---- 5. Pictures: training curves; plot (Figure 3, score against time) ----------------------------------
def plot_curves(out):
    """training.png: every logged loss of the three stages."""
    figure, axes = canvas(13, 3.8, out.name, ncols=3)
    for stage, axis in zip(STAGES, axes):
        rows = [row for row in read_log(out) if row["stage"] == stage]
        other = ("stage", "step", "steps", "grad", "steps_per_s")
        for name in [name for row in rows[:1] for name in row if name not in other]:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set(title=stage, xlabel="gradient steps", ylabel="mean since the last point")
        if rows:
            axis.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
        else:
            axis.text(0.1, 0.5, "not trained here")
    figure.savefig(out / "training.png", dpi=110)

def plot(run):
    """`plot`: returns.png (Figure 3), speed.png (if bench.json has scores) and training.png."""
    pipeline = Pipeline(run)
    shared = {stage: pipeline.obtain(stage) for stage in ("teacher", "reward")}
    data, n = pipeline.dataset, run.config.episodes
    results = {"teacher": score(run, shared, "teacher"),
               "CTD": score(*variant(pipeline, shared, dict(reward_weight=0.0))),
               "RACTD": score(*variant(pipeline, shared, {}))}
    returns = np.add.reduceat(data.rewards, episode_begins(data.ends))
    rows = [("data", f"data: {len(data.ends):,} episodes", returns)]
    rows += [(name, f"{name}: {n} episodes, {m['nfe']} network call(s) per action", m["returns"])
             for name, m in results.items()]
    bins = np.histogram_bin_edges(np.concatenate([returns for *_, returns in rows]), 40)
    figure, axes = canvas(4.5, 5, f"{run.env}, {data.source}", nrows=len(rows), sharex=True)
    for axis, (name, title, returns) in zip(axes, rows):
        axis.hist(returns, bins, weights=np.full(len(returns), 100 / len(returns)), color=COLORS[name])
        axis.axvline(np.mean(returns), color="black", linestyle=":")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("% of them", fontsize=8)
    axes[-1].set_xlabel("return of an episode (dotted: mean)")
    figure.savefig(run.out / "returns.png", dpi=150)
    plot_curves(run.out)
    print(f"pictures: {run.out / 'returns.png'}, {run.out / 'training.png'}")
    path = run.out / "bench.json"
    measured = json.loads(path.read_text()) if path.exists() else {"score": {}}
    if len(measured["score"]) < 2:
        return print("for speed.png, score against time, first give: bench --episodes 20")
    figure, axis = canvas(4.5, 3.2, f"{run.env}, {data.source}, {measured['episodes']} episodes")
    for name, (mean, sem, unit) in measured["score"].items():
        actor, ms = name.split("_")[0], measured["action_ms"][name]
        axis.errorbar(ms, mean, sem, fmt="o", capsize=3,
                      color=COLORS["teacher" if actor == "teacher" else "RACTD"],
                      label=actor if name in ("teacher_80", "student_1") else None)
        axis.annotate(measured["calls"][name], (ms, mean), (5, 4), textcoords="offset points", fontsize=8)
    axis.margins(0.12)
    axis.legend()
    axis.set(xscale="log", xlabel=f"ms per action, {measured['device']}")
    axis.set_ylabel(f"{unit} (number: network calls)", fontsize=9)
    figure.savefig(run.out / "speed.png", dpi=150)
    print(f"picture: {run.out / 'speed.png'}")

# ---- 6. export and video -------------------------------------------------------------------------------
class Acting(nn.Module):
    """A Policy as a module: observations (B, h, O) -> first actions (B, A), chunks (B, H, A); raw units."""
    def __init__(self, policy):
        super().__init__()
        self.net, self.policy = policy.net, policy

    def forward(self, observations):
        chunk = self.policy.plan(observations, lambda _: torch.randn(
            observations.shape[0], *self.policy.shape, device=observations.device))
        return chunk[:, 0], chunk

def export(run):
    """`export`: the policy with its normaliser and sampler in one file; noise is torch's, inside."""
    policy = Policy(recall(run), run.config, run.device)
    path = Path(run.file or run.out / "policy.pt2")
    size = len(policy.normalizer.tables["obs"][0])
    example = torch.zeros(2, run.config.history, size, device=run.device)
    program = torch.export.export(Acting(policy), (example,),
                                  dynamic_shapes=({0: torch.export.Dim("batch")},))
    with replacing(path) as f:
        torch.export.save(program, f)
    print(f"{path}: observations (B, {run.config.history}, {size}) -> first action (B, {policy.shape[1]}), "
          f"chunk (B, {policy.shape[0]}, {policy.shape[1]}), {policy.nfe} network call(s)")

def video(run, saved):
    """`evaluate --video`: the first episode as a GIF in real time."""
    from gymnasium.wrappers import RenderCollection
    from PIL import Image
    policy, make_env = Policy(saved, run.config, run.device), simulator(run.env, run.data)
    camera = dict(camera_name="track") if run.env in ENVS else {}        # goes along with the body
    try:
        env = RenderCollection(make_env(render_mode="rgb_array", width=240, height=240, **camera),
                               pop_frames=False)
        evaluate(policy, lambda: env, 1, run.config.first_seed, run.config.history, run.config.execute)
        frames = env.render()
    except Exception as error:           # many types, according to what of OpenGL is missing
        raise UserError(
            f"MuJoCo cannot draw here ({type(error).__name__}: {error}); set MUJOCO_GL=egl where there is a "
            "graphics driver, MUJOCO_GL=osmesa after `apt install libosmesa6`") from None
    fps = env.metadata["render_fps"]
    skip = max(1, round(fps / 30))
    first, *others = [Image.fromarray(frame) for frame in frames[::skip]]
    first.save(run.video, save_all=True, append_images=others, duration=1000 * skip / fps, loop=0)
    print(f"{run.video}: an episode of {len(frames) - 1} steps")
