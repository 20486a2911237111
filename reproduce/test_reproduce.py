"""Tests of what makes the tables and pictures: python -m pytest -q, from the repository root."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch

import ractd
from reproduce import ablate, baselines, bench, collect, common, figures, seeds

torch.set_num_threads(1)  # more would round differently
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
ENV, SCRIPT = "hopper-medium-replay", Path(ractd.__file__).resolve()
SIZES = {"horizon": 8, "channels": 8, "grid-points": 6, "episodes": 3}
SIZES |= {f"{stage}-batch": 8 for stage in ("teacher", "reward", "student")}
SIZES |= {f"{stage}-steps": 12 for stage in common.STAGES}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with random data, five short episodes, and what `ractd.py distill` made of them."""
    folder = tmp_path_factory.mktemp("trained")
    rng, n, ends = np.random.default_rng(0), 133, np.array([39, 47, 52, 112])
    with h5py.File(folder / "log.hdf5", "w") as f:
        f["observations"] = rng.normal(size=(n, 11))
        f["actions"] = rng.uniform(-0.9, 0.8, (n, 3))
        f["rewards"] = rng.normal(1, 1, n)
        f["terminals"] = np.isin(range(n), ends[::2])
        f["timeouts"] = np.isin(range(n), ends[1::2])
    flags = [f"--env={ENV}", "--data=log.hdf5", "--out=run", *FLAGS]
    subprocess.run([sys.executable, SCRIPT, "distill", *flags], check=True, cwd=folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run folder to work on, and the flags that made it."""
    out = shutil.copytree(trained / "run", tmp_path / "run")
    return out, [f"--env={ENV}", f"--data={trained / 'log.hdf5'}", f"--out={out}", *FLAGS]


def read(path):
    return json.loads(path.read_text())


def distilled(out):
    """The score file that `ractd.py distill` left."""
    (path,) = out.glob("score_RACTD_*_calls1_N1_T0.25_*.json")
    return read(path)


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert not [word for word in words if word not in error], error


def interrupted(*_, **__):
    raise KeyboardInterrupt


# ---- common.py ----------------------------------------------------------------------------------


def test_points_are_scores_or_returns_where_the_environment_has_no_reference():
    returns = [-20.272305, 3234.3]
    assert common.points(ENV, returns) == (pytest.approx(50), pytest.approx(50), "normalised score")
    assert common.points("mujoco/pusher/expert-v0", [1.0, 3.0]) == (2.0, 1.0, "return")
    assert common.points("mujoco/pusher/expert-v0", [1.0]) == (1.0, 0.0, "return")


def test_a_score_is_kept_for_the_same_models_and_made_anew_for_others(tmp_path, monkeypatch):
    evaluated, run = [], SimpleNamespace(env=ENV, out=tmp_path)
    monkeypatch.setattr(ractd, "simulator", lambda *_: None)

    def evaluate(*how):
        evaluated.append(how[2:])
        return {"returns": [1.0, 3.0], "lengths": [1, 3]}

    monkeypatch.setattr(ractd, "evaluate", evaluate)
    about = {"episodes": 2, "first_seed": 5, "weights": "a", "train_s": 10.0}
    first = common.kept_score("x", about, run, None, {})
    assert json.loads((tmp_path / "x_seeds5-6.json").read_text()) == first
    again = common.kept_score("x", about | {"train_s": 11.0}, run, None, {})
    assert again == first | {"train_s": 11.0} and evaluated == [(2, 5)]
    assert common.kept_score("x", about | {"weights": "b"}, run, None, {})["weights"] == "b"
    assert evaluated == [(2, 5)] * 2


def test_a_model_with_other_hyperparameters_has_a_folder_of_its_own(run):
    experiment = common.Experiment(common.parse_run(common.make_parser("x", ""), run[1]))

    def folder(stages, **changes):
        return str(experiment.variant(stages, changes).out.relative_to(run[0]))

    assert folder(["teacher"]) == folder(["teacher"], dsm_weight=0.5, nfe=2, episodes=7) == "."
    assert folder(common.STAGES, nfe=2, candidates=4) == "."
    assert folder(common.STAGES, dsm_weight=0.5, nfe=2) == "variants/dsm_weight=0.5"
    assert folder(["reward"], gamma=0.9) == "variants/gamma=0.9"
    assert folder(["tilted"], temperature=0.5) == "."  # a student's paths start from it
    assert folder(common.STAGES, temperature=0.5) == "variants/temperature=0.5"


def test_exit_codes_and_sentences(run, capsys, monkeypatch):
    out, flags = run
    for module, what in ((bench, []), (ablate, ["--what=nfe"]), (figures, ["--what=returns"])):
        refused(capsys, module.main([*flags, *what, "--nfe=99"]), "--nfe")
        refused(capsys, module.main([*flags, *what, "--teacher-lr=1e-4"]), "teacher_lr: 0.001")
        with pytest.raises(SystemExit, match="2"):
            module.main([*flags, *what, "--horizn=8"])
    (out / "student.jsonl").unlink()
    refused(capsys, figures.main([*flags, "--what=speed"]), "first give", "reproduce.bench")
    refused(capsys, figures.main([*flags, "--what=training"]), "student.jsonl")

    monkeypatch.setattr(ractd, "load_data", interrupted)
    assert bench.main(flags) == 130


# ---- bench.py -----------------------------------------------------------------------------------


def test_the_bound_of_a_student_step_is_the_passes_that_its_losses_need():
    size = {"channels": (8, 16), "patch": 2}  # plans (B, 8, 2), states (B, 3)
    teacher = ractd.UNet1d(2, 3, **size)
    target, student = (ractd.UNet1d(2, 3, **size, student=True) for _ in "12")
    reward_model, calls = ractd.RewardModel(3, 2, networks=2), []
    for net in (teacher, target, reward_model):
        net.requires_grad_(False)
    state, x0, config = torch.randn(4, 3), torch.randn(4, 8, 2), ractd.Config(path_batch=2)
    repeat = bench.network_passes(
        lambda: ractd.distillation_loss(student, target, teacher, reward_model, state, x0, config)
    )

    def note(net, inputs):
        calls.append((net, len(inputs[0]), inputs[0].requires_grad, torch.is_grad_enabled()))

    for net in (teacher, target, student, *reward_model.networks):
        net.register_forward_pre_hook(note)
    repeat()
    assert calls == [
        (student, 10, False, True),  # Eqs. 5, 7 and the jump that acts in one
        (target, 4, True, True),  # Eq. 5, the estimate's k -> 0
        (teacher, 4, False, False),  # Eq. 6, a step of Heun's method
        (teacher, 4, False, False),
        (target, 4, False, False),  # Eq. 6, u -> k
        (target, 4, False, False),  # Eq. 5, the target's k -> 0
        *11 * [(teacher, 2, False, False)],  # a whole path
        (student, 4, False, True),  # Eq. 8
        *((network, 4, True, True) for network in reward_model.networks),
    ]
    levels = ("level_in", "level.")  # embedded outside of the network's forward
    moved = {name for name, p in student.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in student.named_parameters() if not name.startswith(levels)}
    for net in (teacher, target, reward_model):
        assert all(p.grad is None for p in net.parameters())


def test_times_are_medians_of_calls_that_take_turns():
    order = []

    def sleeper(name, seconds):
        return lambda: order.append(name) or time.sleep(seconds)

    calls = {"slow": sleeper("slow", 0.03), "fast": sleeper("fast", 0.002)}
    times = bench.in_turns(calls, turns=4)
    assert times["slow"][0] >= 30 > times["fast"][0] >= 2 and times["slow"][1] >= 0
    assert order[4:].count("slow") == 4 < order[4:].count("fast")
    changes = [name for i, name in enumerate(order[4:]) if name != order[3 + i]]
    assert changes == ["slow", "fast"] * 4


def test_bench_writes_every_promised_number(run, monkeypatch, capsys):
    out, flags = run
    real = bench.in_turns
    monkeypatch.setattr(bench, "in_turns", lambda calls, turns=0: real(calls, 2, 0))
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(ractd, "fit", None)
    assert bench.main(flags) == 0
    result = read(out / "bench.json")
    teachers = {"teacher_80": 157, "teacher_20": 37, "teacher_10": 17}
    assert result["calls"] == teachers | {
        "student_1": 1,
        "student_2": 2,
        "student_4": 4,
        "best_of_4": 1,
        "best_of_16": 1,
    }
    assert result["score"].keys() == result["action_ms"].keys() == result["calls"].keys()
    assert result["score"]["student_1"][0] == pytest.approx(distilled(out)["score_mean"])
    assert result["action_ms"]["teacher_80"] > 10 * result["action_ms"]["student_1"]
    assert result["forward_ms"].keys() == {"teacher", "student"}
    for row in result["train"].values():
        assert 0 < row["network_share"] < 5 and row["steps_per_s"] > 0 and row["batch"] == 8
    assert min(result["eval"].values()) > 0 and result["peak_memory_mib"] > 50
    assert result["device"] and result["versions"]["torch"] == torch.__version__
    assert "of a step in network passes" in capsys.readouterr().out
    assert figures.main([*flags, "--what=speed"]) == 0
    assert (out / "speed.png").read_bytes()[:4] == PNG


# ---- ablate.py ----------------------------------------------------------------------------------


def test_an_ablation_trains_each_row_as_it_says_and_never_twice(run, monkeypatch, capsys):
    out, flags = run
    assert ablate.main([*flags, "--what=losses"]) == 0
    first = read(out / "ablate_losses.json")
    for row in first["rows"]:
        name = "-".join(f"{key}={value}" for key, value in row["changes"].items())
        path = (out / "variants" / name if name else out) / "student.pt"
        recipe = torch.load(path)["recipe"]
        assert all(recipe[key] == value for key, value in row["changes"].items())
        assert recipe["teacher"] == ractd.weights_id(torch.load(out / "teacher.pt"))
    students = {ractd.weights_id(torch.load(path)) for path in out.rglob("student.pt")}
    assert len(students) == len(first["rows"]) and len(list(out.rglob("teacher.pt"))) == 1
    table = capsys.readouterr().out
    assert "without DSM" in table and "109.5" in table
    monkeypatch.setattr(ractd, "fit", None)
    monkeypatch.setattr(ractd, "evaluate", None)
    assert ablate.main([*flags, "--what=losses"]) == 0
    assert read(out / "ablate_losses.json") == first
    assert (out / "ablate_losses.png").read_bytes()[:4] == PNG


def test_reward_weights_are_multiples_of_the_runs_own():
    rows = ablate.ablations(ractd.Config(reward_weight=2.0))["reward-weight"]
    weights = [row.changes.get("reward_weight", 2.0) for row in rows]
    assert weights == pytest.approx([0, 1, 2, 4])
    for what, rows in ablate.ablations(ractd.Config()).items():
        assert len({row.label for row in rows}) == len(rows), what
        for row in rows:
            dataclasses.replace(ractd.Config(), **row.changes)  # names of Config, all of them


def test_an_ablation_of_acting_trains_nothing(run, monkeypatch):
    out, flags = run
    rows = ablate.ablations(ractd.Config())["nfe"]
    rows.append(ablate.Row("teacher", {"teacher_points": 3, "temperature": 0.5}, actor="teacher"))
    monkeypatch.setattr(ablate, "ablations", lambda _=None: {"nfe": rows})
    monkeypatch.setattr(ractd, "fit", None)
    assert ablate.main([*flags, "--what=nfe"]) == 0
    rows = read(out / "ablate_nfe.json")["rows"]
    assert [row["calls"] for row in rows] == [1, 2, 4, 3]
    assert rows[0]["returns"] == distilled(out)["returns"]


def test_without_reference_scores_an_ablation_shows_returns(run, monkeypatch):
    out, flags = run
    monkeypatch.setattr(ractd, "normalized_score", lambda env, value, data: value * math.nan)
    assert ablate.main([*flags, "--what=nfe"]) == 0
    rows = read(out / "ablate_nfe.json")["rows"]
    assert {row["unit"] for row in rows} == {"return"}
    assert rows[0]["score"] == np.mean(distilled(out)["returns"])


def test_reward_stages_exchange_the_teacher_and_the_windows_of_the_student(run, monkeypatch):
    out, flags = run
    seen, loss = [], ractd.stage_loss

    def record(stage, config, batches, dims, built_on):
        if stage == "student":
            seen.append((config.reward_weight > 0, config.tilted_steps, built_on))
        return loss(stage, config, batches, dims, built_on)

    monkeypatch.setattr(ractd, "stage_loss", record)
    assert ablate.main([*flags, "--what=reward-stage"]) == 0
    teacher, tilted = (ractd.weights_id(torch.load(out / f"{x}.pt")) for x in ("teacher", "tilted"))
    names = [{key: ractd.weights_id(x) for key, x in built_on.items()} for *_, built_on in seen]
    assert names[0] == {"teacher": teacher} and not seen[0][0]  # CTD
    assert names[1] == {"teacher": tilted} and not seen[1][0]
    assert names[2]["tilted"] == names[2]["teacher"] == teacher and seen[2][0]
    assert names[3].keys() == {"teacher", "reward"} and seen[3][1] == 0  # Eq. 8
    assert names[3]["teacher"] == teacher and len(seen) == 4  # RACTD was there


# ---- seeds.py -----------------------------------------------------------------------------------


def test_without_a_tilt_no_teacher_is_called_tilted(run, capsys):
    _, flags = run
    for flag in ("--tilted-steps=0", "--reward-weight=0"):
        refused(capsys, seeds.main([*flags, flag, "--out=x"]), "tilted teacher", "--tilted-steps")


def test_every_seed_is_a_run_of_its_own_and_the_table_has_their_mean_and_worst(run, monkeypatch):
    out, flags = run
    flags = [flag for flag in flags if "--out" not in flag] + ["--out=all", "--seeds", "3", "0"]
    assert seeds.main(flags) == 0
    result = read(Path("all/seeds.json"))
    rows = {row["label"]: row for row in result["rows"]}
    assert result["seeds"] == [3, 0] and len(rows["RACTD"]["scores"]) == 2
    assert len(rows["CTD"]["scores"]) == len(rows["teacher"]["scores"]) == 1
    first, second = (mean for mean, _ in rows["RACTD"]["scores"])
    assert second == pytest.approx(distilled(out)["score_mean"])  # as `ractd.py distill` does
    assert rows["RACTD"]["mean"] == pytest.approx((first + second) / 2)
    assert rows["RACTD"]["worst"] == min(first, second) and first != second
    for seed in (3, 0):
        assert torch.load(f"all/seed{seed}/teacher.pt")["recipe"]["seed"] == seed
    assert Path("all/seeds.png").read_bytes()[:4] == PNG
    monkeypatch.setattr(ractd, "fit", None)
    monkeypatch.setattr(ractd, "evaluate", None)
    assert seeds.main(flags) == 0 and read(Path("all/seeds.json")) == result


# ---- baselines.py -------------------------------------------------------------------------------


def test_without_d3rlpy_a_baseline_says_what_is_missing(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    flags = [f"--env={ENV}", f"--data={trained / 'log.hdf5'}", "--algorithm=iql", "--out=b"]
    refused(capsys, baselines.main(flags), "d3rlpy")


@pytest.mark.parametrize("algorithm", baselines.ALGORITHMS)
def test_a_baseline_learns_from_the_data_and_acts_in_the_simulator(trained, monkeypatch, algorithm):
    """d3rlpy's part is played by a double that notes what it is given and never moves."""
    given = {}

    class Learner:
        def fit(self, dataset, n_steps, **_):
            given.update(dataset=dataset, steps=n_steps)

        def predict(self, observations):
            assert observations.dtype == np.float32
            return np.zeros((len(observations), 3), np.float32)

    def config(**options):
        given["options"] = options
        return SimpleNamespace(create=lambda device: Learner())

    algos = SimpleNamespace(TD3PlusBCConfig=config, IQLConfig=config)
    scalers = {"StandardObservationScaler": object, "ReturnBasedRewardScaler": SimpleNamespace}
    double = SimpleNamespace(
        seed=lambda seed: given.update(seed=seed),
        algos=algos,
        preprocessing=SimpleNamespace(**scalers),
        logging=SimpleNamespace(NoopAdapterFactory=object),
    )
    monkeypatch.setitem(sys.modules, "d3rlpy", double)
    monkeypatch.setitem(sys.modules, "d3rlpy.dataset", SimpleNamespace(MDPDataset=lambda *x: x))
    data = str(trained / "log.hdf5")
    flags = [f"--env={ENV}", f"--data={data}", f"--algorithm={algorithm}", "--out=b"]
    assert baselines.main([*flags, "--steps=7", "--seed=4", "--episodes=3"]) == 0
    result = read(Path(f"b/baseline_{algorithm}.json"))
    assert given["steps"] == result["steps"] == 7 and given["seed"] == 4
    assert given["options"]["batch_size"] == 256
    assert ("reward_scaler" in given["options"]) == (algorithm == "iql")
    _, _, _, terminals, timeouts = given["dataset"]
    assert np.flatnonzero(terminals).tolist() == [39, 52]
    assert np.flatnonzero(timeouts).tolist() == [47, 112, 132]  # the file's end is a time limit
    still = ractd.evaluate(
        lambda observations, _: np.zeros((len(observations), 1, 3)),
        ractd.simulator(ENV, {"source": "file"}),
        3,
    )
    assert result["returns"] == still["returns"]


# ---- figures.py ---------------------------------------------------------------------------------


def test_returns_and_training_are_drawn_from_one_more_student(run):
    out, flags = run
    for what in ("returns", "training"):
        assert figures.main([*flags, f"--what={what}"]) == 0
        assert (out / f"{what}.png").read_bytes()[:4] == PNG
    assert [path.name for path in (out / "variants").iterdir()] == ["reward_weight=0.0"]
    assert len(list(out.glob("score_*.json"))) == 3  # one is of `distill`


def test_a_video_is_the_first_episode_or_a_sentence(run, monkeypatch, capsys):
    from gymnasium.envs.mujoco import MujocoEnv
    from PIL import Image

    out, flags = run
    pictures = iter(np.uint8(np.ones((99, 24, 24, 3)) * np.arange(99)[:, None, None, None]))
    monkeypatch.setattr(MujocoEnv, "render", lambda _: next(pictures))
    assert figures.main([*flags, "--what=video"]) == 0
    length = distilled(out)["lengths"][0]
    with Image.open(out / "episode.gif") as gif:
        assert gif.n_frames == math.ceil((length + 1) / 4)  # 125 a second, every fourth

    monkeypatch.delattr(MujocoEnv, "render")  # an AttributeError, as without OpenGL
    refused(capsys, figures.main([*flags, "--what=video", "--file=b.gif"]), "MUJOCO_GL", "draw")
    assert not Path("b.gif").exists()


# ---- collect.py ---------------------------------------------------------------------------------


class Corridor(gymnasium.Env):
    """Observes (episode, step). Even episodes terminate after 3 steps, odd ones last up to the
    time limit of 5; the return is the mean action."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.step_number += 1
        following = np.array([self.episode, self.step_number], dtype=float)
        length = 5 if self.episode % 2 else 3
        terminated = length == 3 == self.step_number
        return following, float(action[0]) / length, terminated, False, {}


class FakeSAC:
    """As stable-baselines3's SAC: steps, calls back, and improves by 0.1 every 100 steps."""

    def __init__(self, policy, env, seed, **_):
        self.env, self.seed, self.num_timesteps = env, seed, 0
        self.actor = torch.nn.Linear(1, 1, bias=False)  # acts with its one weight
        self.actor.weight.data.zero_()
        self.actor.predict = self.predict

    def predict(self, _, deterministic):
        assert not deterministic
        return self.actor.weight.detach().numpy()[0].copy(), None

    def learn(self, steps, callback=None):
        self.env.reset(seed=self.seed)
        while self.num_timesteps < steps:
            action, _ = self.predict(None, deterministic=False)
            _, _, terminated, truncated, _ = self.env.step(action)
            self.num_timesteps += 1
            if callback:
                callback({}, {})
            if terminated or truncated:
                self.env.reset()
            self.actor.weight.data.fill_(0.1 * (self.num_timesteps // 100))


@pytest.fixture
def corridor(monkeypatch, tmp_path):
    """An environment and a SAC that need neither simulator nor package; an empty folder."""
    folder = tmp_path / "corridor"
    folder.mkdir()
    gymnasium.register("Corridor-v0", Corridor, max_episode_steps=5)
    monkeypatch.setitem(sys.modules, "stable_baselines3", types.SimpleNamespace(SAC=FakeSAC))
    monkeypatch.setattr(collect, "SNAPSHOT_EVERY", 100)
    monkeypatch.chdir(folder)
    yield folder
    del gymnasium.registry["Corridor-v0"]


def test_replay_is_the_training_history(corridor, capsys, monkeypatch):
    clock = iter(range(0, 100_000, 6))
    monkeypatch.setattr(collect.time, "monotonic", lambda: next(clock))
    assert collect.main(["--env=Corridor-v0", "--steps=250"]) == 0
    printed = capsys.readouterr().out
    for part in ("training:", "% of 250 steps", "/s  ETA", "--env Corridor-v0 --data Corridor-v0"):
        assert part in printed
    with h5py.File("Corridor-v0.hdf5") as f:
        types_found = [f[key].dtype.name for key in ractd.Dataset.KEYS]
    assert types_found == ["float32", "float32", "float32", "bool", "bool"]
    dataset = ractd.read_hdf5(corridor / "Corridor-v0.hdf5", "corridor", "file")
    # episodes of 3 and 5 steps by turns: 31 pairs are 248 steps, the last 2 steps are cut off
    assert (dataset.ends + 1).tolist() == np.cumsum([3, 5] * 31).tolist()
    assert dataset.terminated.tolist() == [True, False] * 31
    steps = np.concatenate([np.arange(3), np.arange(5)] * 31)
    np.testing.assert_array_equal(dataset.observations[:, 1], steps)
    np.testing.assert_array_equal(np.diff(dataset.observations[dataset.ends, 0]), 1)
    weights, lengths = 0.1 * (np.arange(248) // 100), np.repeat([3, 5] * 31, [3, 5] * 31)
    np.testing.assert_allclose(dataset.actions[:, 0], weights, rtol=1e-6)
    np.testing.assert_allclose(dataset.rewards, weights / lengths, rtol=1e-6)


def test_medium_is_a_third_of_the_experts_score():
    # D4RL's scores of Hopper: 33 is a return of about 1054
    assert collect.pick_medium("hopper", [20, 900, 1100, 1000, 3000]) == 2
    assert collect.pick_medium("hopper", [20, 900, 700]) == 1  # none reaches it: the best
    assert collect.pick_medium(None, [-300, -250, -150, -50]) == 2  # of the last policy's
    assert collect.pick_medium(None, [10, 5, 2]) == 0  # nothing learnt


def test_medium_and_medium_expert(corridor):
    # snapshots of weights 0, 0.1, 0.2, ... 1.0; a third of the last return is passed at 0.4
    flags = ["--env=Corridor-v0", "--steps=1000", "--transitions=400"]
    assert collect.main([*flags, "--kind=medium", "--out=m.hdf5"]) == 0
    assert collect.main([*flags, "--kind=medium-expert", "--out=me.hdf5"]) == 0
    medium = ractd.read_hdf5(corridor / "m.hdf5", "medium", "file")
    mixed = ractd.read_hdf5(corridor / "me.hdf5", "medium-expert", "file")
    assert len(medium.actions) == len(mixed.actions) == 400
    np.testing.assert_allclose(medium.actions, 0.4, rtol=1e-6)
    np.testing.assert_allclose(mixed.actions[:200], 0.4, rtol=1e-6)
    np.testing.assert_allclose(mixed.actions[200:], 1.0, rtol=1e-6)
    assert 199 in mixed.ends  # no episode holds both policies


def test_bad_input_gets_a_sentence_and_leaves_nothing(corridor, capsys, monkeypatch):
    def said(*flags, env="Corridor-v0", words):
        refused(capsys, collect.main([f"--env={env}", *flags]), "collect.py: ", *words)

    said(env="hoper-medium-replay", words=["hopper-medium-replay"])
    said(env="CartPole-v1", words=["Discrete"])
    said("--steps=0", words=["at least 200"])
    said("--seed=-1", words=["--seed"])
    said("--out=nowhere/x.hdf5", words=["nowhere is not a folder"])
    said("--kind=medium-replay", env="hopper-medium", words=["leave one out"])
    with pytest.raises(ractd.UserError, match="no episode ended"):
        collect.collect("Pendulum-v1", None, "medium-replay", 150, 200, 0)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    said("--steps=300", words=["pip install stable-baselines3"])
    assert list(corridor.iterdir()) == []
    (corridor / "Corridor-v0.hdf5").write_text("mine")
    said(words=["exists"])
    assert (corridor / "Corridor-v0.hdf5").read_text() == "mine"


def test_an_interrupt_leaves_nothing(corridor, monkeypatch):
    for target, name in ((os, "replace"), (FakeSAC, "learn")):
        monkeypatch.setattr(target, name, interrupted)
        assert collect.main(["--env=Corridor-v0", "--steps=250"]) == 130
    assert list(corridor.iterdir()) == []


def test_real_sac(tmp_path):
    pytest.importorskip("stable_baselines3")
    for name in ("a", "b"):
        flags = [f"--env={ENV}", "--steps=200", "--seed=3", f"--out={name}.hdf5"]
        assert collect.main(flags) == 0
    assert Path("a.hdf5").read_bytes() == Path("b.hdf5").read_bytes()
    dataset = ractd.read_hdf5(tmp_path / "a.hdf5", "hopper", "file")
    assert dataset.observations.shape[1] == 11 and 100 < len(dataset.rewards) <= 200
    assert np.abs(dataset.actions).max() <= 1
    arrays = collect.collect("Pendulum-v1", None, "medium-expert", 200, 400, 0)
    assert len(arrays["rewards"]) == 400 and arrays["timeouts"].sum() == 2
    assert 1 < np.abs(arrays["actions"]).max() <= 2  # its own units: a torque from -2 to 2
