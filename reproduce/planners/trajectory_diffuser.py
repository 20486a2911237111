"""Trajectory Diffuser (Huang et al., ECCV 2024, arXiv 2407.16142): a draft, refined by diffusion.

    python -m reproduce.planners.trajectory_diffuser --env hopper-medium-replay [--data FILE]
    python -m reproduce.planners.trajectory_diffuser --env ... --sigma 0 0.04 0.25 1 80

Three parts are trained apart:

    draft               causal Transformer over (state, return-to-go), a call per step
    optimiser           EDM denoiser of the next H states, the first one pinned, which refines it
    inverse_dynamics    the action that leads from one state to the next

An action takes H - 1 draft calls and 2 n - 3 denoiser calls, but only the plan's second state gets
to it: unrefined, the first draft call alone would give the same action. At --sigma 80 noise would
leave nothing of a draft, and none is made: plain diffusion. The return-to-go asked for is a
quantile of the data's, always the same, as the return is discounted. (Released: undiscounted, and
what was earned is taken off.) Unlike the released code, the draft is trained without a look at what
it is to predict (--no-mask: as released), and before it is refined noise is added to it, as a
denoiser has seen nothing else (--no-noise: as released, there at a level of about 0.04 in units of
this one).
"""

import copy
import dataclasses
import functools
import math
import sys

import numpy as np
import torch
from torch import nn

import ractd
from reproduce.common import (
    acting_noise,
    data_label,
    kept_score,
    load_weights,
    make_parser,
    parse_own,
    plus_minus,
    print_table,
    run_command,
)
from reproduce.pinned import denoise
from reproduce.planners.diffuser import InnerBatches, make_unet

TASKS = {"halfcheetah": {"horizon": 8}, "walker2d": {"horizon": 32}}  # as released
SMIN = 0.002  # lower than ractd.py's: actions are read off the small change of a state in one step
DRAFT_WIDTH = 128  # that of the U-Net's lowest level
PATCH = 4  # states folded into one position of the U-Net


@dataclasses.dataclass
class Settings:
    """Hyperparameters: H as released, the rest at the size of ractd.py's default."""

    seed: int = ractd.option(0, "seed of all training", 0, 2**63 - 1)
    horizon: int = ractd.option(16, "H: states in a plan; HalfCheetah 8, Walker2d 32", 2, 1024)
    gamma: float = ractd.option(0.99, "discount of the return-to-go", 0, 0.9999)
    draft_steps: int = ractd.option(5000, "gradient steps of the draft", 1, 10**9)
    draft_batch: int = ractd.option(64, "plans in one of its steps", 1, 100_000)
    draft_lr: float = ractd.option(5e-4, "its peak learning rate", 1e-9, 1)
    mask: bool = ractd.option(True, "hide from the draft what it is to predict; released: no")
    optimiser_steps: int = ractd.option(4000, "gradient steps of the optimiser", 1, 10**9)
    optimiser_batch: int = ractd.option(256, "plans in one of its steps", 1, 100_000)
    optimiser_lr: float = ractd.option(1e-3, "its peak learning rate", 1e-9, 1)
    inverse_dynamics_steps: int = ractd.option(10_000, "steps of the inverse dynamics", 1, 10**9)
    inverse_dynamics_batch: int = ractd.option(256, "transitions in one of them", 1, 100_000)
    inverse_dynamics_lr: float = ractd.option(1e-3, "its peak learning rate", 1e-9, 1)
    points: int = ractd.option(3, "n of Heun's method, 2 n - 3 denoiser calls", 2, 9999)
    noise: bool = ractd.option(True, "add noise to the draft before refining it; released: no")
    target_quantile: float = ractd.option(
        0.98, "the return-to-go to ask for, as a quantile of the data's", 0, 1
    )
    episodes: int = ractd.option(20, "number of evaluation episodes", 1, 10**6)
    first_seed: int = ractd.option(0, "episode i has the seed first_seed + i", 0, 2**31)


# the fields that decide what each stage learns
STAGE_FIELDS = {
    "draft": "seed horizon gamma draft_steps draft_batch draft_lr mask",
    "optimiser": "seed horizon gamma optimiser_steps optimiser_batch optimiser_lr",
    "inverse_dynamics": "seed inverse_dynamics_steps inverse_dynamics_batch inverse_dynamics_lr",
}

# ---- Data ----------------------------------------------------------------------------------------


class StateBatches(InnerBatches):
    """A dataset where windows and pairs of states are drawn.

    tokens (N, O + 1): states and returns-to-go; scale (O + 1,): how much a token changes in one
    step, the standard deviation.
    """

    def __init__(self, *how):
        super().__init__(*how)
        self.tokens = torch.cat([self.obs, self.returns_to_go[:, None]], dim=1)
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        self.followed = rows[rows < self.lasts]  # by a row of the same episode
        std = (self.tokens[self.followed + 1] - self.tokens[self.followed]).std(0)
        self.scale = torch.where(std > 1e-6, std, 1.0)  # a constant column stays

    def windows(self, batch):
        """Tokens of random windows inside one episode: (B, H, O + 1)."""
        return self.tokens[self.inner_rows(batch)]

    def pairs(self, batch):
        """Random steps inside one episode: state (B, O), next state (B, O), action (B, A)."""
        rows = self.followed[torch.randint(len(self.followed), (batch,), device=self.obs.device)]
        return self.obs[rows], self.obs[rows + 1], self.actions[rows]


# ---- The three parts -----------------------------------------------------------------------------


class Draft(nn.Module):
    """Transformer over tokens x_0 .. x_{L-1}: output i predicts x_{i+1}, (B, L, D) -> (B, L, D).

    L is at most `horizon`. causal: output i sees x_0 .. x_i; else all, its own target among them,
    unless i = L - 1. It predicts the change from x_i to x_{i+1}, in units of `scale` (D,).
    """

    def __init__(self, dim, horizon, width=DRAFT_WIDTH, causal=True):
        super().__init__()
        self.causal = causal
        self.register_buffer("scale", torch.ones(dim))
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(horizon, width))
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = (nn.TransformerEncoderLayer(width, 4, 4 * width, **how) for _ in range(4))
        self.layers = nn.ModuleList(layers)  # nn.TransformerEncoder: all with the same weights
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, tokens):
        n = tokens.shape[1]
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(n, device=tokens.device)
        y = self.embed(tokens) + self.positions[:n]
        for layer in self.layers:
            y = layer(y, mask, is_causal=self.causal)
        return tokens + self.scale * self.out(y)


def rollout(model, token, horizon):
    """Tokens (B, D) at step 0 -> (B, H, D), each following one by a call of the model: H - 1.

    model: callable, tokens (B, L, D) -> those one step later (B, L, D), of which the last counts.
    """
    tokens = token[:, None]
    for _ in range(horizon - 1):
        tokens = torch.cat([tokens, model(tokens)[:, -1:]], dim=1)
    return tokens


def refine(denoiser, draft, sigma, n, noise=0.0):
    """A draft (B, H, O), taken for a plan at noise level sigma, brought to smin in 2 n - 3 calls.

    denoiser: callable (x, t) -> x0; noise: N(0, 1) like the draft, or 0. For plans of N(0, s^2)
    with r^2 = (s^2 + smin^2) / (s^2 + sigma^2) a bias b of the draft becomes r b, its variance v
    with noise r^2 (v + sigma^2 - smin^2): s^2 + smin^2 for v = s^2 + smin^2, as in data at smin.
    """
    x = draft + math.sqrt(sigma**2 - SMIN**2) * noise
    return ractd.heun_sample(denoiser, x, ractd.karras_sigmas(n, SMIN, sigma))


class InverseDynamics(nn.Module):
    """The action that leads from one state to the next: (B, O), (B, O) -> (B, A), not clipped.

    It reads the change between them in units of `scale` (O,): states of one step are much alike.
    """

    def __init__(self, state_dim, action_dim):
        super().__init__()
        self.register_buffer("scale", torch.ones(state_dim))
        hidden = ractd.mlp(2 * state_dim, 256)[:-2]  # without its output, a single number
        self.net = nn.Sequential(*hidden, nn.Linear(256, action_dim))

    def forward(self, state, following):
        return self.net(torch.cat([state, (following - state) / self.scale], dim=1))


# ---- Training ------------------------------------------------------------------------------------


def make_network(stage, settings, dims):
    """The untrained network of a stage; dims: sizes of an observation and an action, [O, A]."""
    states, actions = dims
    if stage == "draft":
        return Draft(states + 1, settings.horizon, causal=settings.mask)
    if stage == "inverse_dynamics":
        return InverseDynamics(states, actions)
    pinned = [(0, i) for i in range(states)]  # a plan of states, given (s_0, g_0)
    return make_unet(states, states + 1, settings.horizon, PATCH, pinned)


def draft_loss(net, settings, batches):
    """The squared error of all next tokens; 1 is that of the mean change."""
    tokens = batches.windows(settings.draft_batch)
    return ((net(tokens[:, :-1]) - tokens[:, 1:]) / batches.scale).square().mean()


def optimiser_loss(net, settings, batches):
    """Eq. 4 for plans of states, given the first token."""
    tokens = batches.windows(settings.optimiser_batch)
    x0 = tokens[..., :-1]  # (B, H, O)
    t = ractd.lognormal_levels(len(x0), x0.device, smin=SMIN)
    denoiser = lambda x, t: denoise(net, x, t, tokens[:, 0], smin=SMIN)
    return ractd.edm_loss(denoiser, x0, t, torch.randn_like(x0))


def inverse_dynamics_loss(net, settings, batches):
    """The squared error of the action."""
    state, following, action = batches.pairs(settings.inverse_dynamics_batch)
    return (net(state, following) - action).square().mean()


LOSSES = {
    "draft": draft_loss,
    "optimiser": optimiser_loss,
    "inverse_dynamics": inverse_dynamics_loss,
}
HOW = {  # of `ractd.fit`
    "draft": {"weight_decay": 1e-4, "target_decay": 0.99},
    "optimiser": {"weight_decay": 1e-6},
    "inverse_dynamics": {"weight_decay": 1e-3},
}


def make_stage(stage, settings, batches):
    """The network of a stage and loss_fn(net, average)."""
    net = make_network(stage, settings, batches.dims).to(batches.obs.device)
    if stage != "optimiser":
        net.scale.copy_(batches.scale[: len(net.scale)])
    return net, lambda net, average: (LOSSES[stage](net, settings, batches), {})


def train(run):
    """The finished checkpoints of the stages, by name, and the scaled return-to-go to ask for."""
    batches, meta = ractd.load_data(run, kind=StateBatches)
    models = {}
    for stage, fields in STAGE_FIELDS.items():
        own = copy.copy(run)
        if stage == "draft" and not run.config.mask:
            own.out = run.out / "variants" / "no-mask"
        make = functools.partial(make_stage, stage, run.config, batches)
        models[stage] = ractd.load_or_train(own, stage, fields, meta, {}, make, **HOW[stage])
    returns_to_go = batches.returns_to_go.cpu().numpy()
    return models, float(np.quantile(returns_to_go, run.config.target_quantile))


# ---- Acting --------------------------------------------------------------------------------------


class Planner:
    """The trained parts, acting in `ractd.evaluate`: raw observations in, one raw action out.

    models: checkpoints by stage; target: scaled return-to-go to ask for; sigma: noise level that
    the draft is refined from, 0: not at all; n: points of Heun's method; noisy: noise is added.
    draft_calls, denoiser_calls: network calls per action.
    """

    def __init__(self, models, target, sigma, n=3, noisy=True, device="cpu"):
        dims = models["draft"]["dims"]
        settings = Settings(**models["draft"]["config"])
        self.nets = {}
        for stage, model in models.items():
            self.nets[stage] = load_weights(make_network(stage, settings, dims), model, device)
        self.obs_table = models["draft"]["normalizer"]["obs"].to(device)
        self.action_table = models["draft"]["normalizer"]["action"].to(device)
        self.target = target
        self.sigma = sigma
        self.n = n
        self.noisy = noisy
        self.device = device
        self.shape = (settings.horizon, dims[0])  # (H, O)
        self.draft_calls = 0 if noisy and sigma == ractd.SIGMA_MAX else settings.horizon - 1
        self.denoiser_calls = 2 * n - 3 if sigma else 0

    @torch.inference_mode()
    def act(self, observations, generators):
        """observations (B, O), B numpy Generators for noise -> plans of one action (B, 1, A)."""
        observations = np.asarray(observations, np.float32)
        state = ractd.encode(torch.from_numpy(observations).to(self.device), self.obs_table)
        token = nn.functional.pad(state, (0, 1), value=self.target)  # (s_0, g_0), (B, O + 1)
        plan = state.new_zeros(len(state), *self.shape)
        if self.draft_calls:
            plan = rollout(self.nets["draft"], token, self.shape[0])[..., :-1]
        if self.sigma:
            noise = acting_noise(generators, self.shape, self.device) if self.noisy else 0.0
            denoiser = lambda x, t: denoise(self.nets["optimiser"], x, t, token, smin=SMIN)
            plan = refine(denoiser, plan, self.sigma, self.n, noise)
        action = self.nets["inverse_dynamics"](state, plan[:, 1])
        action = action.clamp(-1, 1)  # in the range of the data
        return ractd.decode(action, self.action_table)[:, None].cpu().numpy()


def score(run, models, target, sigma):
    """The numbers of acting with a noise level, kept in its file."""
    config = run.config
    planner = Planner(models, target, sigma, config.points, config.noise, run.device)
    about = {"method": "Trajectory Diffuser", "sigma": sigma}
    about |= {"draft_calls": planner.draft_calls, "denoiser_calls": planner.denoiser_calls}
    for name in ("noise", "mask", "points", "seed", "target_quantile", "episodes", "first_seed"):
        about[name] = getattr(config, name)
    about["weights"] = {stage: ractd.weights_id(model) for stage, model in models.items()}
    about["train_s"] = {stage: model["seconds"] for stage, model in models.items()}
    variant = "_no-noise" * (not config.noise) + "_no-mask" * (not config.mask)
    how = f"sigma-{sigma}{variant}_points{config.points}_q{config.target_quantile:g}"
    print(f"sigma {sigma:g}:")
    data = models["draft"]["dataset"]
    return kept_score(f"score_trajectory-diffuser_{how}", about, run, planner.act, data)


# ---- Command line --------------------------------------------------------------------------------


def trajectory_diffuser(run):
    """Train what is missing, score it at each noise level, print a table."""
    models, target = train(run)
    rows = [score(run, models, target, sigma) for sigma in run.sigma]
    print(f"\n{data_label(run.env, rows[0]['dataset'])}, {run.config.episodes} episodes")
    cells = []
    for row in rows:
        points = plus_minus(row["score_mean"], row["score_sem"])
        cells.append([f"{row['sigma']:g}", row["draft_calls"], row["denoiser_calls"], points])
    print_table(["sigma", "draft calls", "denoiser calls", rows[0]["unit"]], cells)


def parse(argv=None):
    """The run that a command line describes, checked."""
    parser = make_parser("planners.trajectory_diffuser", __doc__)
    text = "noise levels that the draft is refined from, each scored; 0: not at all (default: 0.04)"
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.04], help=text)
    run = parse_own(parser, Settings, argv, TASKS, "-trajectory-diffuser")
    if not all(sigma == 0 or SMIN < sigma <= ractd.SIGMA_MAX for sigma in run.sigma):
        raise ractd.UserError(f"--sigma must be 0, or more than {SMIN}, up to {ractd.SIGMA_MAX}")
    make_network(
        "optimiser", run.config, [1, 1]
    )  # a wrong size is found before anything is trained
    return run


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("trajectory_diffuser.py", lambda: trajectory_diffuser(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
