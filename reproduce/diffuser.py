"""Diffuser (Janner et al. 2022) on an EDM denoiser: planning by guided sampling, at every step.

    python -m reproduce.diffuser --env hopper-medium-replay [--data FILE] [--candidates 64]

What RACTD's paper argues against. A plan is H actions and states side by side, its first state
pinned. A value model, trained on noisy plans, guides the sampling: 20 ancestral steps, each after
two gradient steps on the value, for all candidates; the first action of the one with the best value
is carried out, and the rest thrown away. Trains what is missing in <out> (default:
runs/<env>-diffuser), teacher.pt, the denoiser, and reward.pt, the value; keeps its score in
<out>/score_diffuser_*.json. The value is scaled to [-1, 1], so that --scale is in other units than
the published 0.1; 0.5 was chosen on Hopper. Flags of `python ractd.py distill` that mean something
here are taken too, with these defaults:
"""

import copy
import functools
import itertools
import math
import sys

import numpy as np
import torch

import ractd
from reproduce.common import (
    Experiment,
    data_label,
    kept_score,
    make_parser,
    parse_planner,
    run_command,
)

# gamma as published, H 32 but 4 for halfcheetah; the rest at the size of ractd.py's default
PRESET = "--gamma 0.997 --candidates 64 --temperature 1 --reward-actions 1"
UNUSED = """distance reward_target reward_actions reward_networks tilted_steps student_steps
student_batch student_lr student_warmup grid_points target_decay path_batch ctm_weight dsm_weight
reward_weight dsm_target nfe"""  # fields of Config
TERMINATION = -100.0  # added to the reward of a step that ends an episode, as published


class JointBatches(ractd.Batches):
    """A dataset as `ractd.Batches`, where plans of actions and states are drawn."""

    def __init__(self, dataset, *how):
        dataset = copy.copy(dataset)
        dataset.rewards = dataset.rewards.copy()
        dataset.rewards[dataset.ends[dataset.terminated]] += TERMINATION
        super().__init__(dataset, *how)

    def windows(self, batch):
        """First states (B, O), plans (B, H, A + O), scaled return-to-go of their starts (B,)."""
        draw = torch.randint(len(self.starts), (batch,), device=self.starts.device)
        starts = self.starts[draw]
        chunk = starts[:, None] + self.chunk
        plans = torch.cat([self.actions[chunk], self.obs[chunk]], dim=2)
        return self.obs[starts], plans, self.returns_to_go[starts]


def load_joint(run):
    """The data of a run -> (JointBatches, meta), as `ractd.load_data`."""
    batches, meta = ractd.load_data(run, JointBatches)
    return batches, meta | {"plan": "actions and states"}


class Value(ractd.UNet1d):
    """V(x, t): the mean over the output of a U-Net, which sees the first state clean: (B,)."""

    def forward(self, x, t, state, level=None):
        *_, c_in, embedding = level or ractd.precondition(self, t)
        return super().forward(self.pin(c_in * x, state), embedding, state).mean((1, 2))


def make_net(config, dims, kind=ractd.UNet1d):
    """The denoiser's network, or a Value, of a plan of actions and states; dims: (O, A)."""
    ractd.make_unet(config, dims)  # checks the sizes
    state, action = dims
    size = (config.channels, config.kernel, config.blocks, config.patch)
    net = kind(action + state, state, *size)
    net.pinned = tuple((0, action + i) for i in range(state))
    return net


def diffuser_loss(stage, config, batches, dims, _):
    """(network, loss_fn(net, average)) of the denoiser and the value, as `ractd.stage_loss`."""
    device = batches.obs.device
    importance = torch.ones(config.horizon, sum(dims), device=device)
    importance[0, : dims[1]] = 10.0  # of the action that is carried out, as published
    levels = cosine_sigmas().to(importance)  # the last one: where candidates are compared

    def distance(a, b):
        return ((a - b).square() * importance).flatten(1).mean(1)

    def denoiser_loss(net, _):
        state, x0, _ = batches.windows(config.teacher_batch)
        t, noise = ractd.lognormal_levels(len(x0), device), torch.randn_like(x0)
        denoiser = lambda x, t: ractd.denoise(net, x, t, state)
        return ractd.edm_loss(denoiser, x0, t, noise, distance), {}

    def value_loss(net, _):
        state, x0, target = batches.windows(config.reward_batch)
        t = levels[torch.randint(len(levels), (len(x0),), device=device)]
        x_t = x0 + ractd.expand(t) * torch.randn_like(x0)
        return (net(x_t, t, state) - target).square().mean(), {}

    if stage == "reward":
        return make_net(config, dims, Value).to(device), value_loss
    return make_net(config, dims).to(device), denoiser_loss


def cosine_sigmas(n=20, smin=ractd.SIGMA_MIN, smax=ractd.SIGMA_MAX, shift=0.008):
    """The noise levels of Diffuser's cosine schedule, descending, then smin: (n + 1,) float64.

    sigma = sqrt((1 - abar) / abar) (Nichol, Dhariwal 2021); the first one, where abar = 0, is smax.
    """
    i = torch.arange(n, 0, -1, dtype=torch.float64)
    abar = torch.cos((i / n + shift) / (1 + shift) * math.pi / 2) ** 2
    abar = abar / math.cos(shift / (1 + shift) * math.pi / 2) ** 2
    sigmas = ((1 - abar) / abar.clamp(min=1e-12)).sqrt().clamp(smin, smax)
    return torch.cat([sigmas, sigmas.new_tensor([smin])])


def ancestral_step(x, x0, t, u, noise):
    """A sample at level u < t of what x at t came from, were the clean plan x0: (B, H, D).

    Mean x0 + (u^2 / t^2) (x - x0), variance u^2 (t^2 - u^2) / t^2 (Ho et al. 2020).
    """
    return x0 + (u / t) ** 2 * (x - x0) + u * math.sqrt(1 - (u / t) ** 2) * noise


def guided_sample(denoiser, value, x, sigmas, noise, scale=0.5, guides=2, stop=2):
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
    """Denoiser and value, loaded, acting: raw observations in, raw actions out."""

    def __init__(self, denoiser, value, run):
        self.run, config, dims = run, run.config, denoiser["dims"]
        self.net, self.value = (
            make_net(config, dims, kind).to(run.device).eval().requires_grad_(False)
            for kind in (ractd.UNet1d, Value)
        )
        self.net.load_state_dict(denoiser["ema"])
        self.value.load_state_dict(value["ema"])
        self.tables = {name: x.to(run.device) for name, x in denoiser["normalizer"].items()}
        self.shape, self.actions = (config.horizon, sum(dims)), dims[1]
        self.sigmas = cosine_sigmas()
        self.calls = len(self.sigmas) - 1
        # the same for all states, so made once
        self.levels = [
            functools.cache(functools.partial(ractd.precondition, net))
            for net in (self.net, self.value)
        ]
        self.gradients = run.guides * (self.calls - run.stop) if run.scale else 0

    def act(self, observations, generators):
        """(B, O), B numpy Generators -> plans of one action (B, 1, A), for `ractd.evaluate`."""
        run, n = self.run, self.run.config.candidates

        def noise(_):
            shape = (n, *self.shape)
            rows = [g.standard_normal(shape, np.float32) for g in generators]
            return run.config.temperature * torch.from_numpy(np.concatenate(rows)).to(run.device)

        raw = torch.as_tensor(np.asarray(observations, np.float32), device=run.device)
        state = ractd.encode(raw, self.tables["obs"]).repeat_interleave(n, 0)
        of_denoiser, of_value = self.levels
        denoiser = lambda x, t: ractd.denoise(self.net, x, t, state, level=of_denoiser(t))
        value = lambda x, t: self.value(x, t, state, of_value(t))
        x_T = ractd.SIGMA_MAX * noise(None)
        guides = run.guides if run.scale else 0
        x = guided_sample(denoiser, value, x_T, self.sigmas, noise, run.scale, guides, run.stop)
        with torch.no_grad():
            best = value(x, self.sigmas[-1].item()).reshape(-1, n).argmax(1)
        first = x.reshape(-1, n, *self.shape)[torch.arange(len(best)), best, :1, : self.actions]
        return ractd.decode(first.clamp(-1, 1), self.tables["action"]).cpu().numpy()


def train(run):
    """The finished checkpoints of denoiser and value, from the run's folder or trained now."""
    experiment = Experiment(run, load_joint, diffuser_loss)
    return experiment.model("teacher"), experiment.model("reward")


def diffuser(run):
    """Train what is missing, score, write the numbers, print the row."""
    config, (denoiser, value) = run.config, train(run)
    planner, data = Planner(denoiser, value, run), denoiser["dataset"]
    about = {"method": "Diffuser", "seed": config.seed, "calls": planner.calls}
    about |= {"gradients": planner.gradients, "train_s": denoiser["seconds"] + value["seconds"]}
    about |= {"weights": [ractd.weights_id(denoiser), ractd.weights_id(value)]}
    about |= {name: getattr(run, name) for name in ("scale", "guides", "stop")}
    how = ("candidates", "episodes", "first_seed", "temperature")
    about |= {name: getattr(config, name) for name in how}
    name = "N{candidates}_scale{scale:g}_guides{guides}_stop{stop}_T{temperature:g}".format(**about)
    result = kept_score(f"score_diffuser_{name}", about, run, planner.act, data)
    print(data_label(run.env, data))
    calls = f"{planner.calls} denoiser and {planner.gradients} value-gradient calls per action"
    score = f"{result['unit']} {result['score_mean']:.1f} +- {result['score_sem']:.1f}"
    print(f"Diffuser, {calls}, best of {config.candidates}: {score}")


def parse(argv=None):
    """The run that a command line describes, checked."""
    parser = make_parser("diffuser", f"{__doc__}{PRESET}\n--horizon 32 (halfcheetah: 4, --patch 1)")
    add = parser.add_argument
    add("--scale", type=float, default=0.5, help="of the guidance; 0: none (default: 0.5)")
    add("--guides", type=int, default=2, help="gradient steps in a sampling step (default: 2)")
    add("--stop", type=int, default=2, help="last sampling steps without them (default: 2)")
    own, rest = parser.parse_known_args(argv)
    if not (0 <= own.scale < math.inf and own.guides >= 0 and 0 <= own.stop <= 20):
        raise ractd.UserError("--scale and --guides must be at least 0, --stop from 0 to 20")
    run = parse_planner(rest, PRESET.split(), UNUSED, own)
    short, out_given = "halfcheetah" in str(run.env or run.data).lower(), run.out
    if run.horizon is None:
        run.horizon = 4 if short else 32
    if run.patch is None and short:
        run.patch = 1
    ractd.resolve(run)
    if not out_given:
        run.out = run.out.with_name(f"{run.out.name}-diffuser")
    return run


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("diffuser.py", lambda: diffuser(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
