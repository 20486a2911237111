"""Tests of Trajectory Diffuser's parts against oracles: python -m pytest -q."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

import ractd
from reproduce import pinned
from reproduce.planners import trajectory_diffuser as td

torch.set_num_threads(1)  # more would round differently
ENV = "hopper-medium-replay"
TINY = ["--data=log.hdf5", "--horizon=8", "--episodes=3"]
for stage in ("draft", "optimiser", "inverse-dynamics"):
    TINY += [f"--{stage}-steps=6", f"--{stage}-batch=8"]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def make_data(observations, actions, lengths):
    """`StateBatches` of rows in episodes of these lengths, with rewards of 1; H = 8."""
    ends = np.isin(range(len(observations)), np.cumsum(lengths) - 1)
    columns = [observations, actions, np.ones(len(ends)), np.zeros(len(ends)), ends]
    return td.StateBatches(ractd.Dataset("test", "file", columns), 8)


def trained(stage, batches, steps, lr=3e-3, **settings):
    """A part after some steps of Adam on its own loss."""
    net, loss_fn = td.make_stage(stage, td.Settings(horizon=8, **settings), batches)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(net, None)[0].backward()
        optimizer.step()
    return net.eval()


# ---- Data ---------------------------------------------------------------------------------------


def test_windows_and_pairs_equal_brute_force_and_stay_in_one_episode():
    lengths = [20, 5, 8, 1, 30]
    row = np.arange(64)
    batches = make_data(np.stack([row, row**2], axis=1), np.stack([row, -row], axis=1), lengths)
    tables = batches.normalizer
    ends = np.cumsum(lengths)
    spans = [range(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    starts = {i for span in spans for i in span if i + 8 <= span.stop}
    followed = {i for span in spans for i in span[:-1]}

    tokens = batches.windows(2000)
    assert tokens.shape == (2000, 8, 3)
    raw = ractd.decode(tokens[..., :2], tables["obs"]).round().int()
    rows = raw[..., 0]
    assert set(rows[:, 0].tolist()) == starts
    assert (rows == rows[:, :1] + torch.arange(8)).all()
    assert (raw[..., 1] == rows**2).all()
    assert torch.equal(tokens[..., 2], batches.returns_to_go[rows])

    state, following, action = batches.pairs(2000)
    here, there = (ractd.decode(x, tables["obs"])[:, 0].round() for x in (state, following))
    assert set(here.int().tolist()) == followed
    assert torch.equal(there, here + 1)
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
    net = td.Draft(3, 8, 16)
    tokens = torch.randn(5, 8, 3)
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


def test_noise_cannot_be_foretold_with_the_mask_and_is_copied_without(monkeypatch):
    """A leak shows: on i.i.d. noise no honest error is below the variance."""
    monkeypatch.setattr(td, "Draft", functools.partial(td.Draft, width=32))
    rng = np.random.default_rng(0)
    batches = make_data(rng.uniform(-1, 1, (30_000, 2)), np.zeros((30_000, 1)), [1000] * 30)
    fresh = torch.rand(2000, 8, 3) * 2 - 1
    fresh[..., 2] = batches.returns_to_go.mean()

    def error(net):
        with torch.no_grad():
            return (net(fresh[:, :-1]) - fresh[:, 1:])[..., :2].square().mean().item()

    honest = error(trained("draft", batches, 300))
    assert 0.98 / 3 < honest < 1.1 / 3  # the variance of U(-1, 1) is 1 / 3
    leaky = error(trained("draft", batches, 300, mask=False))
    assert leaky < 0.5 * honest


def test_an_exact_model_of_a_linear_system_rolled_out_is_its_powers():
    A = torch.randn(3, 3, dtype=torch.float64) / 2
    start = torch.randn(4, 3).double()
    seen = []

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
    smin = td.SMIN
    bias = 0.3
    v = 0.0025
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
    far = td.refine(gaussian_denoiser, draft, 80.0, 20, noise)
    near = td.refine(gaussian_denoiser, torch.zeros_like(draft), 80.0, 20, noise)
    assert (far - near).abs().max() < 0.01 * draft.abs().max()
    assert near.std().item() == pytest.approx(S, rel=0.1)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_refinement_takes_2_n_minus_3_calls_down_from_its_level(n):
    levels = []

    def denoiser(x, t):
        levels.append(t)
        return x

    td.refine(denoiser, torch.zeros(1, 8, 3), 0.25, n)
    assert len(levels) == 2 * n - 3
    assert levels[0] == max(levels) == pytest.approx(0.25)


# ---- Inverse dynamics ---------------------------------------------------------------------------


def test_inverse_dynamics_recovers_the_actions_of_a_linear_system():
    """a = B^-1 (s' - A s), also in states that are not in the data."""
    rng = np.random.default_rng(0)
    n = 8000
    A = np.array([[0.9, 0.1], [-0.1, 0.8]])
    B = np.array([[0.3, 0.0], [0.1, 0.2]])
    actions = rng.uniform(-1, 1, (n, 2))
    states = np.zeros((n, 2))
    for i in range(n - 1):
        # what follows an episode's last row is another episode: no action leads there
        states[i + 1] = rng.normal(size=2) if i % 40 == 39 else A @ states[i] + B @ actions[i]
    batches = make_data(states, actions, [40] * (n // 40))
    net = trained("inverse_dynamics", batches, 400, lr=2e-3)
    obs_table = batches.normalizer["obs"]
    action_table = batches.normalizer["action"]
    state = 0.5 * rng.normal(size=(1000, 2))
    action = rng.uniform(-1, 1, (1000, 2))
    pair = (torch.tensor(x, dtype=torch.float32) for x in (state, state @ A.T + action @ B.T))
    with torch.no_grad():
        found = ractd.decode(net(*(ractd.encode(x, obs_table) for x in pair)), action_table)
    assert np.square(found.numpy() - action).mean() < 0.01 * action.var()


# ---- Acting -------------------------------------------------------------------------------------


@pytest.fixture
def models():
    """Random parts by stage, as they are loaded, for 4 observations, 2 actions, H = 8."""
    settings = td.Settings(horizon=8)
    tables = {
        "obs": torch.tensor([[1.0, 2, 3, 4], [1, 2, 1, 2]]),
        "action": torch.tensor([[0.5, -0.5], [0.5, 0.25]]),
    }
    about = {"config": dataclasses.asdict(settings), "dims": [4, 2], "normalizer": tables}
    nets = {stage: td.make_network(stage, settings, [4, 2]) for stage in td.STAGE_FIELDS}
    return {stage: about | {"ema": net.state_dict()} for stage, net in nets.items()}


def generators(n):
    return [np.random.default_rng(i) for i in range(n)]


@pytest.mark.parametrize("sigma", [0.0, 0.04, 80.0])
@pytest.mark.parametrize("noisy", [True, False])
def test_calls_that_are_told_are_those_made(models, sigma, noisy):
    planner = td.Planner(models, 0.7, sigma, 4, noisy)
    calls = dict.fromkeys(planner.nets, 0)
    for stage, net in planner.nets.items():

        def note(*_, stage=stage):
            calls[stage] += 1

        net.register_forward_hook(note)
    observations = np.random.default_rng(0).normal(size=(16, 4))
    plans = planner.act(observations, generators(16))
    assert plans.shape == (16, 1, 2)
    assert np.isfinite(plans).all()
    assert calls["draft"] == planner.draft_calls == (0 if sigma == 80 and noisy else 7)
    assert calls["optimiser"] == planner.denoiser_calls == (5 if sigma else 0)
    assert calls["inverse_dynamics"] == 1
    assert np.array_equal(plans, planner.act(observations, generators(16)))


def test_the_draft_is_asked_for_the_target_and_its_second_state_acts_clipped(models):
    planner = td.Planner(models, 0.7, 0.0)
    seen = {}

    def draft(tokens):
        seen.setdefault("token", tokens[:, 0])
        return tokens + 1

    def inverse(state, following):
        seen["pair"] = state, following
        return torch.stack([following[:, 0], following[:, 1] - 9], dim=1)

    planner.nets |= {"draft": draft, "inverse_dynamics": inverse}
    observations = np.array([[1.0, 2, 3, 4], [0.5, 3, 2, 6]])
    plans = planner.act(observations, generators(2))
    scaled = torch.tensor([[0.0, 0, 0, 0], [-0.5, 0.5, -1, 1]])
    assert torch.equal(seen["token"], torch.cat([scaled, torch.full((2, 1), 0.7)], dim=1))
    assert torch.equal(seen["pair"][0], scaled)
    assert torch.equal(seen["pair"][1], scaled + 1)
    assert plans[:, 0] == pytest.approx(np.array([[1.0, -0.75], [0.75, -0.75]]))


def test_a_draft_acts_with_the_mask_that_it_was_trained_with(models):
    for mask in (True, False):
        models["draft"]["config"]["mask"] = mask
        assert td.Planner(models, 0.7, 0.0).nets["draft"].causal == mask


def test_parts_are_trained_on_the_states_given_the_first_token_and_know_their_scale(monkeypatch):
    rng = np.random.default_rng(0)
    batches = make_data(rng.normal(size=(100, 4)), np.zeros((100, 2)), [40, 60])
    seen = []

    def denoise(net, x, t, state, smin):
        seen.append(state)
        assert smin == td.SMIN
        return x

    monkeypatch.setattr(td, "denoise", denoise)
    monkeypatch.setattr(ractd, "edm_loss", lambda denoiser, x0, t, noise: denoiser(x0, t))
    net, loss_fn = td.make_stage("optimiser", td.Settings(horizon=8), batches)
    x0, _ = loss_fn(net, None)
    (token,) = seen
    (rows,) = torch.where((x0[:, :1] == batches.obs).all(2))[1:]
    assert torch.equal(token[:, :4], x0[:, 0])
    assert torch.equal(token[:, 4], batches.returns_to_go[rows])
    for stage, part in (("draft", batches.scale), ("inverse_dynamics", batches.scale[:4])):
        assert torch.equal(td.make_stage(stage, td.Settings(horizon=8), batches)[0].scale, part)


def test_the_first_state_of_a_plan_is_pinned_in_training():
    """Whatever the noise in its place, the denoiser sees and says the state that is."""
    net = td.make_network("optimiser", td.Settings(horizon=8), [4, 2])
    x = torch.randn(5, 8, 4)
    token = torch.randn(5, 5)
    other = x.clone()
    other[:, 0] = torch.randn(5, 4)
    plans = [pinned.denoise(net, plan, 1.0, token) for plan in (x, other)]
    assert torch.equal(*plans)
    assert torch.equal(plans[0][:, 0], token[:, :4])
    token[:, 4] += 1
    better = pinned.denoise(net, x, 1.0, token)
    assert not torch.allclose(better[:, 1:], plans[0][:, 1:])  # the return-to-go counts


# ---- End to end ---------------------------------------------------------------------------------


def test_end_to_end_trains_once_scores_once_and_keeps_variants_apart(log, tmp_path, capsys):
    command = [f"--env={ENV}", *TINY]
    out = tmp_path / "runs" / f"{ENV}-trajectory-diffuser"
    assert td.main(command) == 0
    assert "steps/s" in capsys.readouterr().out
    (path,) = out.glob("score_*.json")
    metrics = json.loads(path.read_text())
    assert len(metrics["returns"]) == len(metrics["lengths"]) == metrics["episodes"] == 3
    assert (metrics["draft_calls"], metrics["denoiser_calls"]) == (7, 3)
    score = ractd.normalized_score(ENV, np.mean(metrics["returns"]))
    assert metrics["score_mean"] == pytest.approx(score)
    assert list(metrics["train_s"]) == ["draft", "optimiser", "inverse_dynamics"]
    weights = {path: path.read_bytes() for path in out.glob("*.pt")}
    assert len(weights) == 3

    # a reloaded planner acts the same
    path.unlink()
    assert td.main(command) == 0
    assert "steps/s" not in capsys.readouterr().out
    again = json.loads(path.read_text()) | {"evaluation_s": metrics["evaluation_s"]}
    assert again == metrics

    # variants have a folder or files of their own
    other = ["--points=2", "--no-mask", "--no-noise", "--sigma", "0", "0.04", "80"]
    assert td.main([*command, *other]) == 0
    text = capsys.readouterr().out
    assert "goes on" not in text
    assert (out / "variants" / "no-mask" / "draft.pt").exists()
    rows = [json.loads(path.read_text()) for path in out.glob("score_*no-noise*.json")]
    rows.sort(key=lambda row: row["sigma"])
    assert [row["sigma"] for row in rows] == [0, 0.04, 80]
    assert [row["denoiser_calls"] for row in rows] == [0, 1, 1]
    assert not any(row["mask"] or row["noise"] for row in rows)
    assert all(f"{row['score_mean']:.1f} +- {row['score_sem']:.1f}" in text for row in rows)
    assert rows[0]["weights"]["draft"] != metrics["weights"]["draft"]
    assert rows[0]["weights"]["optimiser"] == metrics["weights"]["optimiser"]
    assert weights == {path: path.read_bytes() for path in out.glob("*.pt")}

    # what was made otherwise is refused
    assert td.main([*command, "--draft-steps=7"]) == 2
    assert "draft_steps: 6 in the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sigma=0.001"], "--sigma must be 0, or more than 0.002"),
        (["--sigma=nan"], "--sigma must be"),
        (["--points=1"], "--points 1"),
        (["--horizon=12"], "multiple of 8"),
        (["--data=none.hdf5"], "No such file"),
    ],
)
def test_bad_input_gets_a_sentence(log, flags, words, capsys):
    assert td.main([f"--env={ENV}", *TINY, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("env", "horizon"), [("halfcheetah", 8), ("hopper", 16), ("walker2d", 32)])
def test_horizons_are_the_tasks(log, env, horizon):
    assert td.parse([f"--env={env}-medium"]).config.horizon == horizon
