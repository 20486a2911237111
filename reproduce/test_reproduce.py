"""Tests of what makes the tables and pictures: python -m pytest -q, from the repository root."""

import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ractd
from reproduce import ablate, baselines, bench, collect, common, export, figures, seeds, tables

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"
FLAGS = ["--horizon=8", "--grid-points=6", "--trajectories=4", "--episodes=3"]
FLAGS += [f"--{stage}-steps=6" for stage in ractd.STAGE_FIELDS]
FLAGS += [f"--{stage}-batch=8" for stage in ractd.STAGE_FIELDS]
TINY = {"channels": (8, 16), "kernel": 3, "blocks": 1, "patch": 4}
CTD_FLAGS = ["--no-reward-teacher", "--reward-weight=0"]
PNG = b"\x89PNG"


def make_small(patch, make=gymnasium.make):
    """Tiny networks, and episodes of Hopper of at most 20 steps."""

    def short(name, **options):
        return make(name, max_episode_steps=20 if name == "Hopper-v4" else None, **options)

    patch.setitem(ractd.NETWORKS, "small", TINY)
    patch.setattr(gymnasium, "make", short)


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written, and all is small."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, log_file):
    """A folder with what `ractd.py distill` made of the random data: run (RACTD), run-ctd."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [f"--env={ENV}", f"--data={log_file}", *FLAGS]
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert ractd.main(["distill", *flags, f"--out={folder / 'run'}"]) == 0
        assert ractd.main(["distill", *flags, *CTD_FLAGS, f"--out={folder / 'run-ctd'}"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, log_file):
    """A copy of RACTD's run folder to work on, and the flags that made it."""
    out = shutil.copytree(trained / "run", tmp_path / "run")
    return out, [f"--env={ENV}", f"--data={log_file}", f"--out={out}", *FLAGS]


def read(path):
    return json.loads(path.read_text())


def distilled(out):
    """The score file that `ractd.py distill` left."""
    (path,) = out.glob("score_RACTD_*_calls1_T0.25_*.json")
    return read(path)


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert not [word for word in words if word not in error], error


def interrupted(*_, **__):
    raise KeyboardInterrupt


def forbid_training(monkeypatch):
    monkeypatch.setattr(ractd, "fit", None)


def forbid_acting(monkeypatch):
    monkeypatch.setattr(ractd, "evaluate", None)


# ---- common.py -----------------------------------------------------------------------------------


def test_points_are_scores_or_returns_where_the_environment_has_no_reference():
    returns = [-20.272305, 3234.3]
    assert common.points(ENV, returns) == (pytest.approx(50), pytest.approx(50), "normalised score")
    assert common.points("mujoco/pusher/expert-v0", [1.0, 3.0]) == (2.0, 1.0, "return")
    assert common.points("mujoco/pusher/expert-v0", [1.0]) == (1.0, 0.0, "return")


def test_a_score_is_kept_for_the_same_models_and_made_anew_for_others(tmp_path, monkeypatch):
    evaluated = []
    run = SimpleNamespace(env=ENV, out=tmp_path)
    monkeypatch.setattr(ractd, "simulator", lambda *_: None)

    def evaluate(*how):
        evaluated.append(how[2:])
        return {"returns": [1.0, 3.0], "lengths": [1, 3]}

    monkeypatch.setattr(ractd, "evaluate", evaluate)
    about = {"episodes": 2, "first_seed": 5, "weights": "a", "train_s": 10.0}
    first = common.kept_score("x", about, run, None, {"source": "file"})
    assert read(tmp_path / "x_seeds5-6.json") == first
    again = common.kept_score("x", about | {"train_s": 11.0}, run, None, {"source": "file"})
    assert again == first | {"train_s": 11.0} and evaluated == [(2, 5)]
    other = common.kept_score("x", about | {"weights": "b"}, run, None, {"source": "file"})
    assert other["weights"] == "b" and evaluated == [(2, 5)] * 2
    (tmp_path / "x_seeds5-6.json").write_text("{")
    with pytest.raises(ractd.UserError, match="is damaged"):
        common.kept_score("x", about, run, None, {"source": "file"})


@dataclasses.dataclass
class Own:
    """Settings of a program with two of its own."""

    horizon: int = ractd.option(2, "plan", 1, 9)
    scale: float = ractd.option(0.5, "guidance", 0, 1)


def test_a_program_with_settings_of_its_own_has_no_others(tmp_path):
    def parse(*argv, **how):
        parser = common.make_parser("x", "")
        parser.add_argument("--sigma", type=float, default=0.1)
        return common.parse_own(parser, Own, argv, **how)

    run = parse("--env=hopper-medium", "--scale=1", "--sigma=2", folder="-x")
    assert run.config == Own(2, 1.0) and run.sigma == 2
    assert run.out == Path("runs/hopper-medium-x") and run.out.is_dir()
    assert (run.env, run.data, run.device.type) == ("hopper-medium", "", "cpu")
    tasks = {"hopper": {"horizon": 7, "scale": 0.25}, "ant": {"horizon": 8}}
    run = parse(
        "--env=Hopper", "--data=a.hdf5", "--scale=1", f"--out={tmp_path / 'y'}", tasks=tasks
    )
    assert run.config == Own(7, 1.0) and run.env == "Hopper" and run.out == tmp_path / "y"
    with pytest.raises(ractd.UserError, match="--scale 2.0: must be in 0 to 1"):
        parse("--env=hopper-medium", "--scale=2")
    with pytest.raises(SystemExit, match="2"):
        parse("--env=hopper-medium", "--gamma=0.9")

    parser = common.make_parser("x", "")
    parser.set_defaults(env="maze2d-umaze", data="minari:a/b-v0")  # are no flags then
    assert common.parse_own(parser, Own, []).out == Path("runs/maze2d-umaze")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--env=hopper-medium"])


def test_a_model_with_other_hyperparameters_has_a_folder_of_its_own(run):
    experiment = common.Experiment(common.parse_run(common.make_parser("x", ""), run[1]))

    def folder(*stages, **changes):
        return str(experiment.variant(stages, changes).out.relative_to(run[0]))

    assert folder("teacher") == folder("teacher", dsm_weight=0.5, nfe=2, temperature=1) == "."
    assert folder("student", nfe=2, episodes=7, teacher_points=10) == "."
    assert folder("student", dsm_weight=0.5, nfe=2) == "variants/dsm_weight=0.5"
    assert folder("student", dsm_weight=1.0) == "."  # as it is
    assert folder("reward", gamma=0.9, reward_teacher=False) == "variants/gamma=0.9"
    assert folder("reward", "teacher", gamma=0.9) == "variants/gamma=0.9"


def test_windows_inside_an_episode_and_noise_of_each_row():
    begins = np.array([0, 4, 6])
    ends = np.array([3, 5, 11])
    assert common.window_starts(begins, ends, 3).tolist() == [0, 1, 6, 7, 8, 9]
    assert common.window_starts(begins, ends, 7).tolist() == []
    generators = [np.random.default_rng(i) for i in range(2)]
    noise = common.acting_noise(generators, (5, 2))
    alone = np.random.default_rng(1).standard_normal((5, 2), np.float32)
    assert noise.dtype == torch.float32 and (noise[1].numpy() == alone).all()
    assert (noise[0] != noise[1]).all()


def test_a_table_has_aligned_columns(capsys):
    rows = [["RACTD", 1, 2.345], ["x", None, common.plus_minus(10, 0.25)]]
    common.print_table(["", "calls", "score"], rows)
    expected = ["       calls        score", "RACTD      1          2.3"]
    expected += ["x          -  10.0 +- 0.2"]
    assert capsys.readouterr().out.splitlines() == expected


def test_exit_codes_and_sentences(run, capsys, monkeypatch):
    out, flags = run
    for module, what in ((bench, []), (ablate, ["--what=nfe"]), (figures, ["--what=returns"])):
        refused(capsys, module.main([*flags, *what, "--nfe=99"]), "--nfe")
        refused(capsys, module.main([*flags, *what, "--teacher-lr=1e-4"]), "teacher_lr: 0.001")
        with pytest.raises(SystemExit, match="2"):
            module.main([*flags, *what, "--horizn=8"])
    for numbers in (["-1"], ["3", "3"]):
        refused(capsys, seeds.main([*flags, "--seeds", *numbers]), "--seeds must be different")
    refused(capsys, seeds.main([*flags, "--reward-weight=0"]), "--reward-weight")
    refused(capsys, seeds.main([*flags, "--seed=5"]), "--seeds")
    (out / "student.pt").unlink()
    refused(capsys, figures.main([*flags, "--what=training"]), "no trained student")

    monkeypatch.setattr(ractd, "load_data", interrupted)
    assert bench.main(flags) == 130


# ---- bench.py ------------------------------------------------------------------------------------


def test_the_bound_of_a_student_step_is_the_passes_that_its_losses_need():
    size = {"channels": (8, 16), "patch": 2}  # plans (B, 8, 2), states (B, 3)
    teacher = ractd.UNet1d(2, 3, **size)
    target = ractd.UNet1d(2, 3, **size, student=True)
    student = ractd.UNet1d(2, 3, **size, student=True)
    reward_model = ractd.RewardModel(3, 2, networks=2)
    for net in (teacher, target, reward_model):
        net.requires_grad_(False)
    state = torch.randn(4, 3)
    x0 = torch.randn(4, 8, 2)
    config = ractd.Config()
    repeat = bench.network_passes(
        lambda: ractd.distillation_loss(student, target, teacher, reward_model, state, x0, config)
    )
    calls = []

    def note(net, inputs):
        calls.append((net, len(inputs[0]), inputs[0].requires_grad, torch.is_grad_enabled()))

    for net in (teacher, target, student, *reward_model.networks):
        net.register_forward_pre_hook(note)
    repeat()
    assert calls == [
        (student, 4, False, True),  # Eq. 6, the jump t -> k
        (target, 4, True, True),  # Eq. 5, the estimate's k -> 0
        (teacher, 4, False, False),  # Eq. 6, a step of Heun's method
        (teacher, 4, False, False),
        (target, 4, False, False),  # Eq. 6, u -> k
        (target, 4, False, False),  # Eq. 5, the target's k -> 0
        (student, 4, False, True),  # Eq. 7
        (student, 4, False, True),  # the one-call plan
        *((network, 4, True, True) for network in reward_model.networks),  # Eq. 8
    ]
    assert all(p.grad is not None for p in student.parameters())
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
    forbid_training(monkeypatch)
    assert bench.main(flags) == 0
    result = read(out / "bench.json")
    teachers = {"teacher_80": 157, "teacher_20": 37, "teacher_10": 17}
    students = {"student_1": 1, "student_2": 2, "student_4": 4}
    by_onnx = {"onnx_teacher_80": 157, "onnx_1": 1}
    assert result["calls"] == teachers | students | by_onnx
    assert result["score"].keys() == bench.SAMPLERS.keys()
    assert result["score"]["student_1"][0] == pytest.approx(distilled(out)["score_mean"])
    ms = result["action_ms"]
    assert ms.keys() == result["ratio"].keys() == result["calls"].keys()
    assert result["ratio"]["student_1"] == pytest.approx(ms["teacher_80"] / ms["student_1"])
    assert result["ratio"]["onnx_1"] == pytest.approx(ms["onnx_teacher_80"] / ms["onnx_1"])
    assert min(result["ratio"][name] for name in ("student_1", "onnx_1")) > 10
    assert result["forward_ms"].keys() == {"teacher", "student"}
    for row in result["train"].values():
        assert 0 < row["network_share"] < 5 and row["steps_per_s"] > 0 and row["batch"] == 8
    assert min(result["eval"].values()) > 0 and result["peak_memory_mib"] > 50
    assert result["device"] and result["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for part in ("onnx_1", "of it in network passes", "bare network call"):
        assert part in printed


def test_growth_measures_each_size_in_a_process_of_its_own(run, monkeypatch, capsys):
    out, flags = run
    monkeypatch.setattr(bench, "GROWTH", (700, 2100))
    assert bench.main([*flags, "--what=growth"]) == 0
    result = read(out / "growth.json")
    assert list(result) == ["700", "2100"]
    for row in result.values():
        assert row["peak_memory_mib"] >= row["before_mib"] > 50 and row["load_s"] > 0
        assert 0 < row["plain_batch_ms"] < 50 and 0 < row["weighted_batch_ms"] < 50
    assert "2,100" in capsys.readouterr().out


def test_a_teacher_acts_the_same_with_its_network_by_onnx(run):
    out, _ = run
    policy = ractd.Policy(ractd.load_checkpoint(out / "teacher.pt", "teacher"))
    observations = np.ones((3, 11))
    plans = []
    for act in (policy.act, bench.onnx_network_act(policy)):
        plans.append(act(observations, [np.random.default_rng(i) for i in range(3)]))
    np.testing.assert_allclose(*plans, atol=1e-4)


# ---- export.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_convolution_of_few_positions_is_one_matrix(kernel):
    net = nn.Sequential(ractd.TemporalConv(2, 4, kernel), ractd.TemporalConv(4, 3, kernel))
    net.double()  # as a LayerNorm of few numbers can make much of their rounding
    for length in range(1, 8):
        x = torch.randn(5, length, 2, dtype=torch.float64)
        unrolled = copy.deepcopy(net)
        export.unroll(unrolled, x)
        matrices = [isinstance(m, export.Unrolled) for m in unrolled]
        assert matrices == 2 * [length <= kernel + 1]
        assert torch.allclose(unrolled(x), net(x), rtol=0, atol=1e-9)


def test_exported_files_act_as_the_policy_does(run, capsys, monkeypatch):
    import onnxruntime

    out, _ = run
    assert export.main([f"--env={ENV}", f"--out={out}", "--nfe=2"]) == 0
    assert "noise (B, 16, 3) -> plan (B, 8, 3), 2 network call(s)" in capsys.readouterr().out
    saved = ractd.load_checkpoint(out / "student.pt", "student")
    policy = ractd.Policy(saved, nfe=2)
    observations = np.random.default_rng(9).normal(size=(5, 11))  # float64
    plans = policy.act(observations, [np.random.default_rng(i) for i in range(5)])
    noise = common.acting_noise([np.random.default_rng(i) for i in range(5)], (16, 3))
    session = onnxruntime.InferenceSession(out / "policy.onnx")
    inputs = {"observation": np.float32(observations), "noise": noise.numpy()}
    np.testing.assert_allclose(session.run(["plan"], inputs)[0], plans, atol=1e-5)
    program = torch.export.load(out / "policy.pt2").module()
    for n in (1, 5):
        found = program(torch.tensor(observations[:n]), noise[:n])
        np.testing.assert_allclose(found.numpy(), plans[:n], atol=1e-5)

    # where it differs, or a package is missing
    (out / "policy.onnx").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(export, "to_onnx", lambda _: b"")
        patch.setattr(export, "onnx_session", lambda _: None)
        patch.setattr(export, "call_onnx", lambda _, observation, noise: noise[:, :8] + 1)
        refused(
            capsys, export.main([f"--env={ENV}", f"--out={out}"]), "differ from the policy's by"
        )
        patch.undo()
        patch.setitem(sys.modules, "onnxscript", None)
        refused(capsys, export.main([f"--env={ENV}", f"--out={out}"]), "onnxscript", "pip install")
    assert not (out / "policy.onnx").exists() and (out / "policy.pt2").exists()
    refused(capsys, export.main(["--env=hopper-medium"]), "no trained student")
    refused(capsys, export.main([f"--out={out}", "--env=hopper-medium"]), "made otherwise")


# ---- ablate.py -----------------------------------------------------------------------------------


def test_an_ablation_trains_each_row_as_it_says_and_never_twice(run, monkeypatch, capsys):
    out, flags = run
    assert ablate.main([*flags, "--what=losses"]) == 0
    first = read(out / "ablate_losses.json")
    for row in first["rows"]:
        name = "-".join(f"{key}={value}" for key, value in row["changes"].items())
        folder = out / "variants" / name if name else out
        recipe = torch.load(folder / "student.pt")["recipe"]
        assert all(recipe[key] == value for key, value in row["changes"].items())
        letter = folder if "denoising" in row["changes"] else out
        assert recipe["teacher"] == ractd.weights_id(torch.load(letter / "teacher.pt"))
    students = {ractd.weights_id(torch.load(path)) for path in out.rglob("student.pt")}
    assert len(students) == len(first["rows"]) and len(list(out.rglob("teacher.pt"))) == 2
    table = capsys.readouterr().out
    assert "without DSM" in table and "109.5" in table
    forbid_training(monkeypatch)
    forbid_acting(monkeypatch)
    assert ablate.main([*flags, "--what=losses"]) == 0
    assert read(out / "ablate_losses.json") == first
    assert (out / "ablate_losses.png").read_bytes()[:4] == PNG


def test_rows_change_what_their_labels_say():
    rows = ablate.ablations(ractd.Config(reward_weight=2.0))["reward-weight"]
    weights = [row.changes.get("reward_weight", 2.0) for row in rows]
    assert weights == pytest.approx([0, 1, 2, 4])
    rows = ablate.ablations(ractd.Config(), "walker2d-medium")["reward-input"]
    for row, acts in zip(rows, ("plan", "dsm"), strict=True):
        assert row.changes == ractd.PAPER_LOSSES | {"reward_weight": 0.4, "reward_input": acts}
    for what, rows in ablate.ablations(ractd.Config()).items():
        assert len({row.label for row in rows}) == len(rows), what
        for row in rows:
            dataclasses.replace(ractd.Config(), **row.changes)  # names of Config, all of them


def test_table_5_has_the_reward_in_neither_stage_one_of_them_and_both(run, capsys):
    out, flags = run
    assert ablate.main([*flags, "--what=reward-stage"]) == 0
    rows = read(out / "ablate_reward-stage.json")["rows"]
    scores = {tuple(row["returns"]): row["label"] for row in rows}
    assert len(scores) == 4
    for path in out.glob("score_*.json"):
        metrics = read(path)
        assert f"({metrics['method']})" in scores[tuple(metrics["returns"])]
    assert rows[3]["returns"] == distilled(out)["returns"]
    plain = ractd.weights_id(torch.load(out / "variants/reward_teacher=False/teacher.pt"))
    for path in out.rglob("student.pt"):
        recipe = torch.load(path)["recipe"]
        assert (recipe["teacher"] == plain) == (not recipe["reward_teacher"])
    assert {path.parent for path in out.rglob("reward.pt")} == {out}  # one for all


def test_an_ablation_of_acting_trains_nothing(run, monkeypatch):
    out, flags = run
    rows = ablate.ablations(ractd.Config())["nfe"]
    rows.append(ablate.Row("teacher", {"teacher_points": 3, "temperature": 0.5}, actor="teacher"))
    monkeypatch.setattr(ablate, "ablations", lambda *_: {"nfe": rows})
    forbid_training(monkeypatch)
    assert ablate.main([*flags, "--what=nfe"]) == 0
    rows = read(out / "ablate_nfe.json")["rows"]
    assert [row["calls"] for row in rows] == [1, 2, 4, 3]
    assert rows[0]["returns"] == distilled(out)["returns"]


def test_without_reference_scores_an_ablation_shows_returns(run, monkeypatch):
    out, flags = run
    monkeypatch.setattr(ractd, "normalized_score", lambda env, value: value * math.nan)
    assert ablate.main([*flags, "--what=nfe"]) == 0
    rows = read(out / "ablate_nfe.json")["rows"]
    assert {row["unit"] for row in rows} == {"return"}
    assert rows[0]["score"] == np.mean(distilled(out)["returns"])


# ---- seeds.py ------------------------------------------------------------------------------------


def test_every_seed_is_a_run_of_its_own_and_the_table_has_their_mean_and_worst(run, monkeypatch):
    out, flags = run
    flags = [flag for flag in flags if "--out" not in flag] + ["--out=all", "--seeds", "3", "0"]
    assert seeds.main(flags) == 0
    result = read(Path("all/seeds.json"))
    rows = {row["label"]: row for row in result["rows"]}
    assert result["seeds"] == [3, 0] and rows.keys() == seeds.ROWS.keys()
    first, second = (mean for mean, _ in rows["RACTD"]["scores"])
    assert second == pytest.approx(distilled(out)["score_mean"])  # as `ractd.py distill` does
    assert rows["RACTD"]["mean"] == pytest.approx((first + second) / 2)
    assert rows["RACTD"]["worst"] == min(first, second) and first != second
    methods = {"teacher", "reward teacher", "CTD", "CTD of a reward teacher"}
    methods |= {"RACTD", "RACTD, plain teacher"}
    for seed, column in ((3, 0), (0, 1)):
        folder = Path(f"all/seed{seed}")
        assert torch.load(folder / "teacher.pt")["recipe"]["seed"] == seed
        scores = [read(path) for path in folder.glob("score_*.json")]
        assert {metrics["method"] for metrics in scores} == methods
        for metrics in scores:
            row = rows[
                metrics["method"] + f", {metrics['calls']} calls" * (1 < metrics["calls"] < 9)
            ]
            assert row["returns"][column] == metrics["returns"]
            assert row["calls"] == metrics["calls"]
    assert Path("all/seeds.png").read_bytes()[:4] == PNG
    forbid_training(monkeypatch)
    forbid_acting(monkeypatch)
    assert seeds.main(flags) == 0 and read(Path("all/seeds.json")) == result


def test_the_table_has_means_over_training_seeds_and_the_runs_names(tmp_path, capsys):
    def score(run, mean, calls=1):
        path = tmp_path / "a-task" / run / f"score_{calls}.json"
        metrics = {"method": "RACTD", "calls": calls, "score_mean": mean, "score_sem": 0.5}
        common.write_json(path, metrics)

    score("seed0", 10.0)
    score("seed1", 20.0)
    score("seed0", 30.0, calls=2)
    score("paper-losses_seed0", 5.0)
    iql = {"algorithm": "iql", "seed": 1, "score_mean": 7.0, "score_sem": 0.5}
    common.write_json(tmp_path / "a-task/baselines/iql_seed1.json", iql)
    tables.print_scores(tables.read_scores(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | calls | a-task |"
    assert lines[2:] == [
        "| RACTD | 1 | **15.0**: 10.0 ± 0.5, 20.0 ± 0.5 |",
        "| RACTD | 2 | 30.0 ± 0.5 |",
        "| iql of d3rlpy | 1 | 7.0 ± 0.5 |",
        "| paper-losses | 1 | 5.0 ± 0.5 |",
    ]
    common.write_json(tmp_path / "a-task/seed0/score_old.json", {"method": "RACTD", "calls": 2})
    with pytest.raises(SystemExit, match="a second score of RACTD, 2 call"):
        tables.read_scores(tmp_path)


def test_the_door_is_learnt_and_opened_offline_from_d4rls_own_file(capsys):
    assert ractd.main(["distill", "--env=door-human", *FLAGS, "--episodes=1"]) == 0
    out = capsys.readouterr().out
    assert "door-v0_demos_clipped.hdf5 (D4RL, version 9df6345e): 6,729 transitions" in out
    (path,) = Path("runs/door-human").glob("score_*.json")
    metrics = read(path)
    assert metrics["lengths"] == [200]
    score = 100 * (metrics["returns"][0] + 56.512833) / (2880.5693 + 56.512833)
    assert metrics["score_mean"] == pytest.approx(score)


# ---- baselines.py --------------------------------------------------------------------------------


def test_without_d3rlpy_a_baseline_says_what_is_missing(log_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    flags = [f"--env={ENV}", f"--data={log_file}", "--out=b"]
    refused(capsys, baselines.main(flags), "d3rlpy")


@pytest.mark.parametrize("algorithm", baselines.ALGORITHMS)
def test_a_baseline_learns_from_the_data_and_acts_in_the_simulator(
    log_file, monkeypatch, algorithm
):
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

    algos = SimpleNamespace(TD3PlusBCConfig=config, IQLConfig=config, BCConfig=config)
    scalers = {
        "StandardObservationScaler": object,
        "MinMaxActionScaler": lambda low, high: (low.tolist(), high.tolist()),
        "ReturnBasedRewardScaler": SimpleNamespace,
    }
    double = SimpleNamespace(
        seed=lambda seed: given.update(seed=seed),
        algos=algos,
        preprocessing=SimpleNamespace(**scalers),
        logging=SimpleNamespace(NoopAdapterFactory=object),
    )
    monkeypatch.setitem(sys.modules, "d3rlpy", double)
    monkeypatch.setitem(sys.modules, "d3rlpy.dataset", SimpleNamespace(MDPDataset=lambda *x: x))
    flags = [f"--env={ENV}", f"--data={log_file}", f"--algorithm={algorithm}", "--out=b"]
    assert baselines.main([*flags, "--steps=7", "--seed=4", "--episodes=3"]) == 0
    result = read(Path(f"b/{algorithm}_seed4.json"))
    assert given["steps"] == result["steps"] == 7 and given["seed"] == 4
    assert given["options"]["batch_size"] == 256
    assert given["options"]["action_scaler"] == ([-1.0] * 3, [1.0] * 3)
    assert ("reward_scaler" in given["options"]) == (algorithm == "iql")
    _, _, _, terminals, timeouts = given["dataset"]
    assert np.flatnonzero(terminals).tolist() == [39, 52]
    assert np.flatnonzero(timeouts).tolist() == [47, 112, 132]  # the file's end is a time limit
    still = ractd.evaluate(
        lambda observations, _: np.zeros((len(observations), 1, 3)),
        lambda: ractd.simulator(ENV),
        3,
    )
    assert result["returns"] == still["returns"]


# ---- figures.py ----------------------------------------------------------------------------------


def test_returns_and_training_are_drawn_from_two_more_models(run):
    out, flags = run
    for what in ("returns", "training"):
        assert figures.main([*flags, f"--what={what}"]) == 0
        assert (out / f"{what}.png").read_bytes()[:4] == PNG
    scores = [read(path) for path in out.glob("score_*.json")]
    assert {metrics["method"] for metrics in scores} == {"RACTD", "CTD", "teacher"}


def test_a_video_has_both_students_in_the_same_episode_or_a_sentence(
    run, trained, monkeypatch, capsys
):
    from gymnasium.envs.mujoco import MujocoEnv

    out, flags = run
    monkeypatch.setattr(MujocoEnv, "render", lambda _: np.zeros((24, 80, 3), np.uint8))
    length = distilled(out)["lengths"][0]
    assert figures.main([*flags, "--what=video"]) == 0
    printed = capsys.readouterr().out
    assert f"RACTD: an episode of {length} steps, return" in printed and "CTD: an" in printed
    with Image.open(out / "episode.gif") as gif:
        assert gif.size == (80, 24 + figures.BAR)

    (path,) = (trained / "run-ctd").glob("score_CTD_*.json")
    shutil.copytree(trained / "run-ctd", "run-ctd")
    assert figures.main([*flags, "--what=video", "--file=both.gif"]) == 0
    printed = capsys.readouterr().out
    for name, about in (("CTD", read(path)), ("RACTD", distilled(out))):
        steps = f"an episode of {about['lengths'][0]} steps"
        assert f"{name}: {steps}, return {about['returns'][0]:.0f}" in printed
    with Image.open("both.gif") as gif:
        assert gif.size == (160, 24 + figures.BAR)

    monkeypatch.delattr(MujocoEnv, "render")  # an AttributeError, as without OpenGL
    refused(capsys, figures.main([*flags, "--what=video", "--file=b.gif"]), "MUJOCO_GL", "draw")
    assert not Path("b.gif").exists()
    missing = figures.main([*flags, "--what=video", "--ctd=nowhere"])
    refused(capsys, missing, "no trained student at nowhere/student.pt")


def test_a_gif_has_30_pictures_a_second_or_as_many_as_its_size_allows(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 30, 3), np.uint8)
    frames = [Image.fromarray(picture).quantize(64) for picture in noise]
    for limit, skip in ((10**6, 4), (12_000, 5)):
        (tmp_path / "x.gif").write_bytes(figures.small_gif(frames, 8, limit))
        assert (tmp_path / "x.gif").stat().st_size <= limit
        with Image.open(tmp_path / "x.gif") as gif:
            assert gif.n_frames == math.ceil(40 / skip)
            assert gif.info["duration"] == 10 * (8 * skip // 10)


# ---- collect.py ----------------------------------------------------------------------------------


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
    monkeypatch.setitem(sys.modules, "stable_baselines3", SimpleNamespace(SAC=FakeSAC))
    monkeypatch.setattr(collect, "SNAPSHOT_EVERY", 100)
    monkeypatch.chdir(folder)
    yield folder
    del gymnasium.registry["Corridor-v0"]


def test_replay_is_the_training_history(corridor, capsys, monkeypatch):
    clock = iter(range(0, 100_000, 6))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    assert collect.main(["--env=Corridor-v0", "--steps=250"]) == 0
    printed = capsys.readouterr().out
    for part in ("training:", "% of 250 steps", "/s  ETA", "--env Corridor-v0 --data Corridor-v0"):
        assert part in printed
    with h5py.File("Corridor-v0.hdf5") as f:
        types_found = [f[key].dtype.name for key in ractd.Dataset.KEYS]
    assert types_found == ["float32", "float32", "float32", "bool", "bool"]
    dataset = ractd.read_hdf5(corridor / "Corridor-v0.hdf5", "file")
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
    medium = ractd.read_hdf5(corridor / "m.hdf5", "file")
    mixed = ractd.read_hdf5(corridor / "me.hdf5", "file")
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
    dataset = ractd.read_hdf5(tmp_path / "a.hdf5", "file")
    assert dataset.observations.shape[1] == 11 and 100 < len(dataset.rewards) <= 200
    assert np.abs(dataset.actions).max() <= 1
    arrays = collect.collect("Pendulum-v1", None, "medium-expert", 200, 400, 0)
    assert len(arrays["rewards"]) == 400 and arrays["timeouts"].sum() == 2
    assert 1 < np.abs(arrays["actions"]).max() <= 2  # its own units: a torque from -2 to 2
