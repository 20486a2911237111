"""Diffuser (Janner et al. 2022) on an EDM denoiser: planning by guided sampling, at every step.

    python -m reproduce.planners.diffuser --env hopper-medium-replay [--data FILE]

What RACTD's paper argues against. A plan is H actions and states side by side, its first state
pinned. A value model, trained on noisy plans, guides the sampling: 20 ancestral steps, all but the
last two after two gradient steps on the value. The first action of the candidate of the highest
value is carried out, and the rest thrown away. Trains what is missing of denoiser.pt and value.pt
in <out>, and keeps its score there, in score_diffuser_*.json. The value is scaled to [-1, 1], so
that --scale is in other units than the published 0.1; 0.5 was chosen on Hopper.
"""

import copy
import dataclasses
import functools
import itertools
import math
import sys

import numpy as np
import torch

import ractd
from reproduce.common import (
    acting_noise,
    data_label,
    kept_score,
    load_weights,
    make_parser,
    parse_own,
    plus_minus,
    run_command,
    window_starts,
)
from reproduce.pinned import PinnedUNet, denoise

TASKS = {"halfcheetah": {"horizon": 4, "patch": 1}}  # H as published
TERMINATION = -100.0  # added to the reward of a step that ends an episode, as published


@dataclasses.dataclass
class Settings:
    """Hyperparameters: gamma and H as published, the rest at the size of ractd.py's default."""

    seed: int = ractd.option(0, "seed of all training", 0, 2**63 - 1)
    horizon: int = ractd.option(32, "H: steps in a plan; on HalfCheetah 4", 1, 1024)
    patch: int = ractd.option(4, "steps in a position of the U-Net; on HalfCheetah 1", 1, 64)
    denoiser_steps: int = ractd.option(4000, "gradient steps of the denoiser", 1, 10**9)
    denoiser_batch: int = ractd.option(256, "plans in one of its steps", 1, 100_000)
    denoiser_lr: float = ractd.option(1e-3, "its peak learning rate", 1e-9, 1)
    value_steps: int = ractd.option(3000, "gradient steps of the value model", 1, 10**9)
    value_batch: int = ractd.option(256, "plans in one of its steps", 1, 100_000)
    value_lr: float = ractd.option(1e-3, "its peak learning rate", 1e-9, 1)
    gamma: float = ractd.option(0.997, "discount of the value", 0, 0.9999)
    scale: float = ractd.option(0.5, "scale of the guidance; 0: none", 0, 1000)
    guides: int = ractd.option(2, "gradient steps before a sampling step", 0, 1000)
    stop: int = ractd.option(2, "the number of last sampling steps without them", 0, 20)
    candidates: int = ractd.option(64, "plans per state, of which the best acts", 1, 1024)
    temperature: float = ractd.option(1.0, "scale of the noise that is sampled from", 0, 100)
    episodes: int = ractd.option(20, "number of evaluation episodes", 1, 10**6)
    first_seed: int = ractd.option(0, "episode i has the seed first_seed + i", 0, 2**31)


# the fields that decide what each stage learns
STAGE_FIELDS = {
    "denoiser": "seed horizon patch denoiser_steps denoiser_batch denoiser_lr",
    "value": "seed horizon patch value_steps value_batch value_lr gamma",
}
ACTING_FIELDS = "scale guides stop candidates temperature episodes first_seed"

# ---- What Trajectory Diffuser needs, too ---------------------------------------------------------


class InnerBatches(ractd.Batches):
    """A dataset as `ractd.Batches`, where windows inside one episode are drawn.

    starts (W,): the first rows of these.
    """

    def __init__(self, dataset, horizon, gamma=0.99, device="cpu"):
        super().__init__(dataset, horizon, gamma, device)
        starts = window_starts(dataset.begins, dataset.ends, horizon)
        if not len(starts):
            raise ractd.UserError(f"{dataset.name} has no episode of --horizon {horizon} steps")
        self.starts = torch.tensor(starts, device=device)
        print(f"      {len(starts):,} windows lie in one episode: no others are drawn here")

    def inner_rows(self, batch):
        """The rows of random windows: (B, H)."""
        device = self.starts.device
        starts = self.starts[torch.randint(len(self.starts), (batch,), device=device)]
        return starts[:, None] + torch.arange(self.horizon, device=device)


def make_unet(plan_dim, state_dim, horizon, patch, pinned):
    """A U-Net of the size of ractd.py's default; pinned: of `PinnedUNet`. May raise UserError."""
    size = ractd.NETWORKS["small"] | {"patch": patch}
    multiple = patch * 2 ** (len(size["channels"]) - 1)
    if horizon % multiple:
        raise ractd.UserError(f"--horizon {horizon}: must be a multiple of {multiple}")
    return PinnedUNet(plan_dim, state_dim, **size, pinned=pinned)


# ---- Training ------------------------------------------------------------------------------------


class JointBatches(InnerBatches):
    """A dataset where plans of actions and states are drawn; an episode's end costs."""

    def __init__(self, dataset, *how):
        dataset = copy.copy(dataset)
        dataset.rewards = dataset.rewards.copy()
        dataset.rewards[dataset.ends[dataset.terminated]] += TERMINATION
        super().__init__(dataset, *how)

    def windows(self, batch):
        """First states (B, O), plans (B, H, A + O), scaled return-to-go of their starts (B,)."""
        rows = self.inner_rows(batch)
        plans = torch.cat([self.actions[rows], self.obs[rows]], dim=2)
        return self.obs[rows[:, 0]], plans, self.returns_to_go[rows[:, 0]]


def make_network(settings, dims):
    """The untrained U-Net of denoiser or value, over actions and states; dims: [O, A]."""
    states, actions = dims
    pinned = [(0, actions + i) for i in range(states)]
    return make_unet(actions + states, states, settings.horizon, settings.patch, pinned)


def value_of(net, x, t, state):
    """The value V(x, t), the mean of the U-Net's output: (B,). Arguments as of `ractd.denoise`."""
    *_, c_in = ractd.precondition(t)
    return net(ractd.expand(c_in) * x, t, state).mean((1, 2))


def denoiser_stage(settings, batches):
    """The denoiser and loss_fn(net, average), Eq. 4, in which the first action weighs more."""
    net = make_network(settings, batches.dims).to(batches.obs.device)
    actions = batches.dims[1]
    importance = torch.ones(settings.horizon, sum(batches.dims), device=batches.obs.device)
    importance[0, :actions] = 10.0  # of the action that is carried out, as published

    def distance(a, b):
        return ((a - b).square() * importance).flatten(1).mean(1)

    def loss_fn(net, average):
        state, x0, _ = batches.windows(settings.denoiser_batch)
        t = ractd.lognormal_levels(len(x0), x0.device)
        denoiser = lambda x, t: denoise(net, x, t, state)
        return ractd.edm_loss(denoiser, x0, t, torch.randn_like(x0), distance), {}

    return net, loss_fn


def value_stage(settings, batches):
    """The value and loss_fn(net, average), its squared error at all levels of the sampling."""
    net = make_network(settings, batches.dims).to(batches.obs.device)
    levels = cosine_sigmas().to(batches.obs)  # the last one: where candidates are compared

    def loss_fn(net, average):
        state, x0, target = batches.windows(settings.value_batch)
        t = levels[torch.randint(len(levels), (len(x0),), device=x0.device)]
        x_t = x0 + ractd.expand(t) * torch.randn_like(x0)
        return (value_of(net, x_t, t, state) - target).square().mean(), {}

    return net, loss_fn


STAGES = {"denoiser": denoiser_stage, "value": value_stage}
WEIGHT_DECAY = {"denoiser": 1e-6, "value": 1e-3}


def train(run):
    """The finished checkpoints of denoiser and value, from the run's folder or trained now."""
    batches, meta = ractd.load_data(run, kind=JointBatches)
    models = []
    for stage, make_stage in STAGES.items():
        make = functools.partial(make_stage, run.config, batches)
        how = {"weight_decay": WEIGHT_DECAY[stage]}
        models.append(ractd.load_or_train(run, stage, STAGE_FIELDS[stage], meta, {}, make, **how))
    return models


# ---- Acting --------------------------------------------------------------------------------------


def cosine_sigmas(n=20, shift=0.008):
    """The noise levels of Diffuser's cosine schedule, descending, then smin: (n + 1,) float64.

    sigma = sqrt((1 - abar) / abar) (Nichol, Dhariwal 2021); 80 where abar = 0, the first one.
    """
    i = torch.arange(n, -1, -1, dtype=torch.float64)
    squares = torch.cos((i / n + shift) / (1 + shift) * math.pi / 2) ** 2
    abar = squares / squares[-1]
    return ((1 - abar) / abar.clamp(min=1e-12)).sqrt().clamp(ractd.SIGMA_MIN, ractd.SIGMA_MAX)


def ancestral_step(x, x0, t, u, noise):
    """A sample at level u < t of what x at t came from, were the clean plan x0: (B, H, D).

    Mean x0 + (u^2 / t^2) (x - x0), variance u^2 (t^2 - u^2) / t^2 (Ho et al. 2020).
    """
    return x0 + (u / t) ** 2 * (x - x0) + u * math.sqrt(1 - (u / t) ** 2) * noise


def guided_sample(denoiser, value, x, sigmas, noise, scale, guides, stop):
    """Diffuser's sampling: x (B, H, D) at sigmas[0] -> x at sigmas[-1].

    denoiser: callable (x, t) -> x0; value: callable (x, t) -> (B,); noise: callable, x -> N(0, 1)
    like x. Before each step but the last `stop` ones x climbs the value `guides` times, by scale
    times the step's variance. n - 1 calls of the denoiser, guides (n - 1 - stop) of the gradient.
    """
    steps = list(itertools.pairwise(sigmas.tolist()))
    for i, (t, u) in enumerate(steps):
        variance = u**2 * (1 - (u / t) ** 2)
        for _ in range(guides if i < len(steps) - stop else 0):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(value(leaf, t).sum(), leaf)
            x = x + scale * variance * slope
        last = i == len(steps) - 1  # without noise, as published
        with torch.no_grad():
            x0 = denoiser(x, t)
            x = ancestral_step(x, x0, t, u, torch.zeros_like(x) if last else noise(x))
    return x


class Planner:
    """Denoiser and value, loaded, acting: raw observations in, raw actions out.

    calls, gradients: calls of the denoiser and of the value's gradient per action, for all
    candidates at once.
    """

    def __init__(self, denoiser, value, settings, device="cpu"):
        dims = denoiser["dims"]
        self.settings = settings
        self.device = device
        self.denoiser = load_weights(make_network(settings, dims), denoiser, device)
        self.value = load_weights(make_network(settings, dims), value, device)
        self.obs_table = denoiser["normalizer"]["obs"].to(device)
        self.action_table = denoiser["normalizer"]["action"].to(device)
        self.shape = (settings.horizon, sum(dims))  # (H, A + O)
        self.actions = dims[1]
        self.sigmas = cosine_sigmas()
        self.guides = settings.guides if settings.scale else 0
        self.calls = len(self.sigmas) - 1
        self.gradients = self.guides * (self.calls - settings.stop)

    def act(self, observations, generators):
        """(B, O), B numpy Generators -> plans of one action (B, 1, A), for `ractd.evaluate`."""
        settings = self.settings
        n = settings.candidates
        observations = np.asarray(observations, np.float32)
        state = ractd.encode(torch.from_numpy(observations).to(self.device), self.obs_table)
        state = state.repeat_interleave(n, 0)

        def noise(_):
            fresh = acting_noise(generators, (n, *self.shape), self.device)
            return settings.temperature * fresh.flatten(0, 1)

        denoiser = lambda x, t: denoise(self.denoiser, x, t, state)
        value = lambda x, t: value_of(self.value, x, t, state)
        x_T = ractd.SIGMA_MAX * noise(None)
        how = (settings.scale, self.guides, settings.stop)
        x = guided_sample(denoiser, value, x_T, self.sigmas, noise, *how)
        with torch.no_grad():
            best = value(x, self.sigmas[-1].item()).reshape(-1, n).argmax(1)
        plans = x.reshape(-1, n, *self.shape)[torch.arange(len(best)), best]
        first = plans[:, :1, : self.actions].clamp(-1, 1)  # in the range of the data
        return ractd.decode(first, self.action_table).cpu().numpy()


# ---- Command line --------------------------------------------------------------------------------


def diffuser(run):
    """Train what is missing, score, write the numbers, print the row."""
    models = train(run)
    planner = Planner(*models, run.config, run.device)
    data = models[0]["dataset"]
    about = {"method": "Diffuser", "seed": run.config.seed}
    about |= {"calls": planner.calls, "gradients": planner.gradients}
    about["train_s"] = sum(model["seconds"] for model in models)
    about["weights"] = [ractd.weights_id(model) for model in models]
    about |= {name: getattr(run.config, name) for name in ACTING_FIELDS.split()}
    name = "N{candidates}_scale{scale:g}_guides{guides}_stop{stop}_T{temperature:g}".format(**about)
    result = kept_score(f"score_diffuser_{name}", about, run, planner.act, data)
    print(data_label(run.env, data))
    calls = f"{planner.calls} denoiser and {planner.gradients} value-gradient calls per action"
    score = f"{result['unit']} {plus_minus(result['score_mean'], result['score_sem'])}"
    print(f"Diffuser, {calls}, best of {run.config.candidates}: {score}")


def parse(argv=None):
    """The run that a command line describes, checked."""
    parser = make_parser("planners.diffuser", __doc__)
    return parse_own(parser, Settings, argv, TASKS, "-diffuser")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("diffuser.py", lambda: diffuser(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
