"""Tests of Trajectory Diffuser's parts against oracles: python -m pytest -q."""

import dataclasses
import json
import math
import signal

import h5py
import numpy as np
import pytest
import torch

import ractd
from reproduce import trajectory_diffuser as td

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"
TINY = ["--horizon=8", "--channels=8", "--episodes=3"]
TINY += [f"--{stage}-{size}" for stage in td.PARTS for size in ("batch=8", "steps=6")]


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def refused(capsys, code, *words):
    """Exit code 2 and one sentence that holds all the words."""
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert not [word for word in words if word not in error], error


def make_data(observations, actions, lengths):
    """`StateBatches` of rows in episodes of these lengths, with rewards of 1; H = 8."""
    ends = np.isin(range(len(observations)), np.cumsum(lengths) - 1)
    columns = [observations, actions, np.ones(len(ends)), np.zeros(len(ends)), ends]
    return td.StateBatches(ractd.Dataset("test", "file", columns), 8)


def trained(stage, batches, steps, causal=True, lr=3e-3):
    """A part after some steps of Adam on its own loss."""
    config = ractd.Config(horizon=8, channels=(32,), student_batch=64)
    dims = [batches.obs.shape[1], batches.actions.shape[1]]
    net, loss_fn = td.stage_loss(stage, config, batches, dims, {}, causal)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(net, None)[0].backward()
        optimizer.step()
    return net.eval()


# ---- Data ---------------------------------------------------------------------------------------


def test_windows_and_pairs_equal_brute_force_and_stay_in_one_episode():
    lengths, row = [20, 5, 8, 1, 30], np.arange(64)
    observations, actions = np.stack([row, row**2], axis=1), np.stack([row, -row], axis=1)
    batches = make_data(observations, actions, lengths)
    tables, ends = batches.normalizer, np.cumsum(lengths)
    spans = [range(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    starts = {i for span in spans for i in span if i + 8 <= span.stop}
    followed = {i for span in spans for i in span[:-1]}

    tokens = batches.windows(2000)
    assert tokens.shape == (2000, 8, 3)
    raw = ractd.decode(tokens[..., :2], tables["obs"]).round().int()
    rows = raw[..., 0]
    assert set(rows[:, 0].tolist()) == starts
    assert (rows == rows[:, :1] + torch.arange(8)).all() and (raw[..., 1] == rows**2).all()
    assert torch.equal(tokens[..., 2], batches.returns_to_go[rows])

    state, following, action = batches.pairs(2000)
    here, there = (ractd.decode(x, tables["obs"])[:, 0].round() for x in (state, following))
    assert set(here.int().tolist()) == followed and torch.equal(there, here + 1)
    assert torch.allclose(ractd.decode(action, tables["action"])[:, 0], here, atol=1e-3)

    changes = [batches.obs[i + 1] - batches.obs[i] for i in sorted(followed)]
    assert torch.allclose(batches.scale[1], torch.stack(changes)[:, 1].std(), rtol=1e-4)
    assert batches.scale[0] == 1  # the row grows by the same in all steps: nothing to scale


# ---- Draft --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_no_output_of_the_draft_depends_on_later_tokens_unless_it_has_no_mask(causal):
    net = td.Draft(3, 8, 16, causal)
    tokens = torch.randn(2, 8, 3, requires_grad=True)
    for i in range(8):
        (gradient,) = torch.autograd.grad(net(tokens)[:, i].square().sum(), tokens)
        assert (gradient[:, : i + 1] != 0).any(2).all()
        assert ((gradient[:, i + 1 :] != 0).any(2) != causal).all()
        assert not causal or not gradient[:, i + 1 :].any()


def test_acting_the_draft_is_the_same_as_in_training_and_as_causal():
    """torch has a kernel of its own for Transformers that are not trained."""
    net, tokens = td.Draft(3, 8, 16), torch.randn(5, 8, 3)
    expected = net(tokens).detach()
    net.eval().requires_grad_(False)
    with torch.inference_mode():
        assert torch.allclose(net(tokens), expected, atol=1e-5)
        for n in range(1, 8):
            assert torch.allclose(net(tokens[:, :n]), expected[:, :n], atol=1e-5)


def test_the_draft_starts_each_layer_from_other_weights_and_predicts_changes():
    net = td.Draft(3, 8, 16)
    assert not torch.equal(net.layers[0].linear1.weight, net.layers[1].linear1.weight)
    tokens = torch.randn(2, 8, 3)
    net.scale.zero_()
    assert torch.equal(net(tokens), tokens)


def test_noise_cannot_be_foretold_with_the_mask_and_is_copied_without():
    """A leak shows: on i.i.d. noise no honest error is below the variance."""
    rng = np.random.default_rng(0)
    batches = make_data(rng.uniform(-1, 1, (30_000, 2)), np.zeros((30_000, 1)), [1000] * 30)
    fresh = torch.rand(2000, 8, 3) * 2 - 1
    fresh[..., 2] = batches.returns_to_go.mean()

    def error(net):
        with torch.no_grad():
            return (net(fresh[:, :-1]) - fresh[:, 1:])[..., :2].square().mean().item()

    honest = error(trained("student", batches, 300))
    assert 0.98 / 3 < honest < 1.1 / 3  # the variance of U(-1, 1) is 1 / 3
    leaky = error(trained("student", batches, 300, causal=False))
    assert leaky < 0.5 * honest


def test_an_exact_model_of_a_linear_system_rolled_out_is_its_powers():
    A, start, seen = torch.randn(3, 3, dtype=torch.float64) / 2, torch.randn(4, 3).double(), []

    def model(tokens):
        seen.append(tokens.shape[1])
        return tokens @ A.T

    plan = td.rollout(model, start, 6)
    assert seen == [1, 2, 3, 4, 5]
    for k in range(6):
        assert torch.allclose(plan[:, k], start @ torch.linalg.matrix_power(A, k).T)


# ---- Refinement ---------------------------------------------------------------------------------

S = 0.5  # standard deviation of the plans that these tests refine


def gaussian_denoiser(x, t):
    """The exact denoiser of plans of N(0, S^2)."""
    return x * S**2 / (S**2 + t**2)


@pytest.mark.parametrize("sigma", [0.04, 0.25, 1.0, 80.0])
def test_refining_gaussian_plans_shrinks_bias_and_variance_as_in_closed_form(sigma):
    smin, bias, v = td.SMIN, 0.3, 0.0025
    r = math.sqrt((S**2 + smin**2) / (S**2 + sigma**2))
    draft = bias + math.sqrt(v) * torch.randn(100_000, 2, 1, dtype=torch.float64)
    refined = td.refine(gaussian_denoiser, draft, sigma, 200, torch.randn_like(draft))
    variance = r**2 * (v + sigma**2 - smin**2)
    assert refined.mean().item() == pytest.approx(r * bias, abs=5 * math.sqrt(variance / 2e5))
    assert refined.var().item() == pytest.approx(variance, rel=0.02)
    as_released = td.refine(gaussian_denoiser, draft, sigma, 200)
    assert torch.allclose(as_released, r * draft, rtol=0.005)


def test_from_sigma_80_nothing_is_left_of_the_draft():
    noise, draft = torch.randn(2, 50, 8, 3)
    far, near = (
        td.refine(gaussian_denoiser, x, 80.0, 20, noise) for x in (draft, torch.zeros_like(draft))
    )
    assert (far - near).abs().max() < 0.01 * draft.abs().max()
    assert near.std().item() == pytest.approx(S, rel=0.1)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_refinement_takes_2_n_minus_3_calls_down_from_its_level(n):
    levels = []

    def denoiser(x, t):
        levels.append(t)
        return x

    td.refine(denoiser, torch.zeros(1, 8, 3), 0.25, n)
    assert len(levels) == 2 * n - 3 and levels[0] == max(levels) == pytest.approx(0.25)


# ---- Inverse dynamics ---------------------------------------------------------------------------


def test_inverse_dynamics_recovers_the_actions_of_a_linear_system():
    """a = B^-1 (s' - A s), also in states that are not in the data."""
    rng, n = np.random.default_rng(0), 8000
    A, B = np.array([[0.9, 0.1], [-0.1, 0.8]]), np.array([[0.3, 0.0], [0.1, 0.2]])
    actions, states = rng.uniform(-1, 1, (n, 2)), np.zeros((n, 2))
    for i in range(n - 1):
        # what follows an episode's last row is another episode: no action leads there
        states[i + 1] = rng.normal(size=2) if i % 40 == 39 else A @ states[i] + B @ actions[i]
    batches = make_data(states, actions, [40] * (n // 40))
    net = trained("reward", batches, 400, lr=2e-3)
    obs_table, action_table = batches.normalizer["obs"], batches.normalizer["action"]
    state, action = 0.5 * rng.normal(size=(1000, 2)), rng.uniform(-1, 1, (1000, 2))
    pair = (torch.tensor(x, dtype=torch.float32) for x in (state, state @ A.T + action @ B.T))
    with torch.no_grad():
        found = ractd.decode(net(*(ractd.encode(x, obs_table) for x in pair)), action_table)
    assert np.square(found.numpy() - action).mean() < 0.01 * action.var()


# ---- Acting -------------------------------------------------------------------------------------


@pytest.fixture
def models():
    """Random parts by stage, as they are loaded, for 4 observations, 2 actions, H = 8."""
    config = ractd.Config(horizon=8, channels=(8,))
    about = {"config": dataclasses.asdict(config), "dims": [4, 2], "causal": True}
    about["normalizer"] = {
        "obs": torch.tensor([[1.0, 2, 3, 4], [1, 2, 1, 2]]),
        "action": torch.tensor([[0.5, -0.5], [0.5, 0.25]]),
    }
    nets = {stage: td.make_network(stage, config, [4, 2]) for stage in td.PARTS}
    return {stage: about | {"ema": net.state_dict()} for stage, net in nets.items()}


def generators(n):
    return [np.random.default_rng(i) for i in range(n)]


@pytest.mark.parametrize("sigma", [0.0, 0.04, 1.0, 80.0])
@pytest.mark.parametrize("noisy", [True, False])
def test_calls_that_are_told_are_those_made(models, sigma, noisy):
    planner, calls = td.Planner(models, 0.7, sigma, 4, noisy), {stage: 0 for stage in td.PARTS}
    for stage, net in planner.nets.items():

        def note(*_, stage=stage):
            calls[stage] += 1

        net.register_forward_hook(note)
    observations = np.random.default_rng(0).normal(size=(16, 4))
    plans = planner(observations, generators(16))
    assert plans.shape == (16, 1, 2) and np.isfinite(plans).all()
    assert calls["student"] == planner.draft_calls == (0 if sigma == 80 and noisy else 7)
    assert calls["teacher"] == planner.denoiser_calls == (5 if sigma else 0)
    assert calls["reward"] == 1
    assert np.array_equal(plans, planner(observations, generators(16)))


def test_the_draft_is_asked_for_the_target_and_its_second_state_acts_clipped(models):
    planner, seen = td.Planner(models, 0.7, 0.0), {}

    def draft(tokens):
        seen.setdefault("token", tokens[:, 0])
        return tokens + 1

    def inverse(state, following):
        seen["pair"] = state, following
        return torch.stack([following[:, 0], following[:, 1] - 9], dim=1)

    planner.nets |= {"student": draft, "reward": inverse}
    observations = np.array([[1.0, 2, 3, 4], [0.5, 3, 2, 6]])  # scaled: 0 0 0 0, -0.5 0.5 -1 1
    plans = planner(observations, generators(2))
    scaled = torch.tensor([[0.0, 0, 0, 0], [-0.5, 0.5, -1, 1]])
    assert torch.equal(seen["token"], torch.cat([scaled, torch.full((2, 1), 0.7)], dim=1))
    assert torch.equal(seen["pair"][0], scaled) and torch.equal(seen["pair"][1], scaled + 1)
    assert plans[:, 0] == pytest.approx(np.array([[1.0, -0.75], [0.75, -0.75]]))


def test_a_draft_acts_with_the_mask_that_it_was_trained_with(models):
    for causal in (True, False):
        models["student"]["causal"] = causal
        assert td.Planner(models, 0.7, 0.0).nets["student"].causal == causal


def test_parts_are_trained_on_the_states_given_the_first_token_and_know_their_scale(monkeypatch):
    rng, seen = np.random.default_rng(0), []
    batches = make_data(rng.normal(size=(100, 4)), np.zeros((100, 2)), [40, 60])
    config = ractd.Config(horizon=8, channels=(8,))
    monkeypatch.setattr(ractd, "denoise", lambda net, x, t, state, level: seen.append(state) or x)
    monkeypatch.setattr(ractd, "edm_loss", lambda denoiser, x0, t, noise: denoiser(x0, t))
    net, loss_fn = td.stage_loss("teacher", config, batches, [4, 2], {})
    x0, _ = loss_fn(net, None)
    (token,) = seen
    (rows,) = torch.where((x0[:, :1] == batches.obs).all(2))[1:]
    assert torch.equal(token[:, :4], x0[:, 0])
    assert torch.equal(token[:, 4], batches.returns_to_go[rows])
    for stage, part in (("student", batches.scale), ("reward", batches.scale[:4])):
        assert torch.equal(td.stage_loss(stage, config, batches, [4, 2], {})[0].scale, part)


def test_the_first_state_of_a_plan_is_pinned_in_training():
    """Whatever the noise in its place, the denoiser sees and says the state that is."""
    net = td.make_network("teacher", ractd.Config(horizon=8, channels=(8,)), [4, 2])
    x, token = torch.randn(5, 8, 4), torch.randn(5, 5)
    other = x.clone()
    other[:, 0] = torch.randn(5, 4)
    plans = [ractd.denoise(net, plan, 1.0, token) for plan in (x, other)]
    assert torch.equal(*plans) and torch.equal(plans[0][:, 0], token[:, :4])
    better = ractd.denoise(net, x, 1.0, torch.cat([token[:, :4], token[:, 4:] + 1], dim=1))
    assert not torch.allclose(better[:, 1:], plans[0][:, 1:])  # the return-to-go counts


# ---- End to end ---------------------------------------------------------------------------------


@pytest.fixture
def log():
    """A file of random rows in D4RL's layout."""
    rng, n = np.random.default_rng(0), 133
    with h5py.File("log.hdf5", "w") as f:
        f["observations"], f["actions"] = rng.normal(size=(n, 11)), rng.uniform(-0.9, 0.8, (n, 3))
        f["rewards"], f["terminals"] = rng.normal(1, 1, n), np.isin(range(n), [39, 52])
        f["timeouts"] = np.isin(range(n), [47, 112])
    return "--data=log.hdf5"


def test_end_to_end_trains_once_scores_once_and_keeps_variants_apart(log, tmp_path, capsys):
    command, out = [f"--env={ENV}", log, *TINY], tmp_path / "runs" / f"{ENV}-trajectory-diffuser"
    assert td.main(command) == 0
    assert "steps/s" in capsys.readouterr().out
    (path,) = out.glob("score_*.json")
    metrics = json.loads(path.read_text())
    assert len(metrics["returns"]) == len(metrics["lengths"]) == metrics["episodes"] == 3
    assert (metrics["draft_calls"], metrics["denoiser_calls"]) == (7, 3)
    score = ractd.normalized_score(ENV, np.mean(metrics["returns"]))
    assert metrics["score_mean"] == pytest.approx(score)
    assert metrics["train_s"].keys() == {"draft", "refinement", "inverse dynamics"}
    weights = {stage: (out / f"{stage}.pt").read_bytes() for stage in td.PARTS}

    assert td.main(command) == 0
    text = capsys.readouterr().out
    assert "steps/s" not in text and f"score from {path.relative_to(tmp_path)}" in text
    path.unlink()
    assert td.main(command) == 0
    again = json.loads(path.read_text()) | {"evaluation_s": metrics["evaluation_s"]}
    assert again == metrics  # a reloaded planner acts the same

    other = ["--points=2", "--no-mask", "--no-noise", "--sigma", "0", "0.04", "80"]
    assert td.main([*command, *other]) == 0
    text = capsys.readouterr().out
    assert text.count("goes on") == 0 and (out / "variants" / "no-mask" / "student.pt").exists()
    rows = [json.loads(path.read_text()) for path in out.glob("score_*no-noise*.json")]
    rows.sort(key=lambda row: row["sigma"])
    assert [row["sigma"] for row in rows] == [0, 0.04, 80]
    assert [row["denoiser_calls"] for row in rows] == [0, 1, 1]
    assert not any(row["mask"] or row["noise"] for row in rows)
    assert all(f"{row['score_mean']:.1f} +- {row['score_sem']:.1f}" in text for row in rows)
    assert rows[0]["weights"]["draft"] != metrics["weights"]["draft"]
    assert rows[0]["weights"]["refinement"] == metrics["weights"]["refinement"]
    assert weights == {stage: (out / f"{stage}.pt").read_bytes() for stage in td.PARTS}


def test_what_was_made_otherwise_is_refused_here_and_by_ractd(log, capsys):
    command = [f"--env={ENV}", log, "--out=run", *TINY]
    assert td.main(command) == 0
    capsys.readouterr()
    refused(capsys, td.main([*command, "--horizon=12"]), "made otherwise", "horizon: 8 in the file")
    refused(capsys, td.main([*command, "--student-steps=7"]), "student_steps: 6 in the file")
    flags = [f"--env={ENV}", "--out=run"]
    refused(capsys, ractd.main(["evaluate", *flags, "--model=teacher"]), "refinement")
    refused(capsys, ractd.main(["distill", log, *flags, *TINY]), "made otherwise", "refinement")


def test_ctrl_c_leaves_130_and_the_same_command_goes_on(log, capsys, monkeypatch):
    command, step = [f"--env={ENV}", log, "--out=run", *TINY], ractd.train_step

    def interrupted(net, *rest):
        if isinstance(net, td.InverseDynamics):
            signal.raise_signal(signal.SIGINT)
        return step(net, *rest)

    monkeypatch.setattr(ractd, "train_step", interrupted)
    assert td.main(command) == 130
    monkeypatch.setattr(ractd, "train_step", step)
    assert td.main(command) == 0
    assert "goes on from step 1 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("out", [[], ["--out="]])
def test_the_default_folder_is_not_that_of_ractd(out):
    assert td.parse(["--env=hopper-medium-replay", *out]).out.name.endswith("-trajectory-diffuser")


def test_bad_input_gets_a_sentence(log, capsys):
    for words in (
        "--sigma=0.001 0.002 80",
        "--sigma=nan --sigma",
        "--sigma=-1 --sigma",
        "--points=1 --points 2",
        "--target-quantile=1.5 --target-quantile 1",
        "--nfe=2 --nfe no meaning",
        "--gamma=0.9 --gamma no meaning",
        "--preset=paper --preset no meaning",
        "--horizon=1 --horizon 2 or more",
        "--horizon=0 --horizon",
        "--horizon=9 multiple of patch",
        "--channels=6 --channels multiple of 4",
        "--student-steps=0 --student-steps",
        "--data=none.hdf5 none.hdf5",
    ):
        flag, *rest = words.split()
        refused(capsys, td.main([f"--env={ENV}", log, "--out=run", *TINY, flag]), *rest)
    refused(capsys, td.main(["--env=hoper"]), "hoper", "unknown")
    refused(capsys, td.main([]), "--env")
    with pytest.raises(SystemExit, match="2"):
        td.main([f"--env={ENV}", "--sigmas=1"])


@pytest.mark.parametrize("env, horizon", [("halfcheetah", 8), ("hopper", 16), ("walker2d", 32)])
def test_horizons_are_the_tasks(env, horizon, monkeypatch):
    seen = []
    monkeypatch.setattr(td, "trajectory_diffuser", seen.append)
    assert td.main([f"--env={env}-medium"]) == 0
    assert seen[0].config.horizon == horizon
