"""Diffuser (Janner et al. 2022) on an EDM denoiser: planning by guided sampling, at every step.

    python -m reproduce.diffuser --env hopper-medium-replay [--data FILE] [--candidates 64]

What RACTD's paper argues against. A plan is H actions and states side by side, its first state
pinned. A value model, trained on noisy plans, guides the sampling: 20 ancestral steps, all but the
last two after two gradient steps on the value. The first action of the candidate of the highest
value is carried out, and the rest thrown away. Trains what is missing in <out> (default:
runs/<env>-diffuser), teacher.pt, the denoiser, and reward.pt, the value; keeps its score in
<out>/score_diffuser_*.json. The value is scaled to [-1, 1], so that --scale is in other units than
the published 0.1; 0.5 was chosen on Hopper. Defaults where `python ractd.py distill` has others:
"""

import copy
import functools
import itertools
import math
import sys

import numpy as np
import torch

import ractd
from reproduce.common import data_label, kept_score, make_parser, parse_planner, run_command

# gamma and H as published; the rest at the size of ractd.py's default
PRESET = "--horizon 32 --gamma 0.997 --candidates 64 --temperature 1 --reward-actions 1"
TASKS = {"halfcheetah": "--horizon 4 --patch 1"}
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
        starts = self.starts[torch.randint(len(self.starts), (batch,), device=self.obs.device)]
        chunk = starts[:, None] + self.chunk
        plans = torch.cat([self.actions[chunk], self.obs[chunk]], dim=2)
        return self.obs[starts], plans, self.returns_to_go[starts]


def make_net(config, dims):
    """The U-Net of the denoiser or the value, over actions and states; dims: (O, A)."""
    ractd.make_unet(config, dims)  # checks the sizes
    states, actions = dims
    size = (config.channels, config.kernel, config.blocks, config.patch)
    net = ractd.UNet1d(actions + states, states, *size)
    net.pinned = tuple((0, actions + i) for i in range(states))
    return net


def value_of(net, x, t, state, level=None):
    """The value V(x, t), the mean of the U-Net's output: (B,). Arguments as of `ractd.denoise`."""
    *_, c_in, embedding = level or ractd.precondition(net, t)
    return net(net.pin(c_in * x, state), embedding, state).mean((1, 2))


def diffuser_loss(stage, config, batches, dims, _):
    """(network, loss_fn(net, average)) of the denoiser and the value, as `ractd.stage_loss`."""
    device = batches.obs.device
    net = make_net(config, dims).to(device)
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
        return (value_of(net, x_t, t, state) - target).square().mean(), {}

    return net, value_loss if stage == "reward" else denoiser_loss


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
    """Denoiser and value, loaded, acting: raw observations in, raw actions out."""

    def __init__(self, denoiser, value, run):
        self.run, dims, self.nets = run, denoiser["dims"], []
        for model in (denoiser, value):
            net = make_net(run.config, dims).to(run.device)
            net.eval().requires_grad_(False).load_state_dict(model["ema"])
            level = functools.cache(functools.partial(ractd.precondition, net))  # for all states
            self.nets.append((net, level))
        self.tables = {name: x.to(run.device) for name, x in denoiser["normalizer"].items()}
        self.shape, self.actions = (run.config.horizon, sum(dims)), dims[1]
        self.sigmas, self.guides = cosine_sigmas(), run.guides if run.scale else 0
        self.calls = len(self.sigmas) - 1
        self.gradients = self.guides * (self.calls - run.stop)

    def act(self, observations, generators):
        """(B, O), B numpy Generators -> plans of one action (B, 1, A), for `ractd.evaluate`."""
        run, n = self.run, self.run.config.candidates

        def noise(_):
            shape = (n, *self.shape)
            rows = [g.standard_normal(shape, np.float32) for g in generators]
            return run.config.temperature * torch.from_numpy(np.concatenate(rows)).to(run.device)

        raw = torch.as_tensor(np.asarray(observations, np.float32), device=run.device)
        state = ractd.encode(raw, self.tables["obs"]).repeat_interleave(n, 0)
        (D, D_level), (V, V_level) = self.nets
        denoiser = lambda x, t: ractd.denoise(D, x, t, state, level=D_level(t))
        value = lambda x, t: value_of(V, x, t, state, V_level(t))
        x_T, how = ractd.SIGMA_MAX * noise(None), (run.scale, self.guides, run.stop)
        x = guided_sample(denoiser, value, x_T, self.sigmas, noise, *how)
        with torch.no_grad():
            best = value(x, self.sigmas[-1].item()).reshape(-1, n).argmax(1)
        first = x.reshape(-1, n, *self.shape)[torch.arange(len(best)), best, :1, : self.actions]
        return ractd.decode(first.clamp(-1, 1), self.tables["action"]).cpu().numpy()


def train(run):
    """The finished checkpoints of denoiser and value, from the run's folder or trained now."""
    batches, meta = ractd.load_data(run, JointBatches)
    how = (batches, meta | {"plan": "actions and states"}, {}, diffuser_loss)
    return [ractd.load_or_train(run, stage, *how) for stage in ("teacher", "reward")]


def diffuser(run):
    """Train what is missing, score, write the numbers, print the row."""
    config, models = run.config, train(run)
    planner, data = Planner(*models, run), models[0]["dataset"]
    about = {"method": "Diffuser", "seed": config.seed, "calls": planner.calls}
    about |= {"gradients": planner.gradients, "train_s": sum(x["seconds"] for x in models)}
    about |= {"weights": [ractd.weights_id(x) for x in models]}
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
    each = "".join(f"\n{task}: {flags}" for task, flags in TASKS.items())
    parser = make_parser("diffuser", f"{__doc__}{PRESET}{each}")
    add = parser.add_argument
    add("--scale", type=float, default=0.5, help="of the guidance; 0: none (default: 0.5)")
    add("--guides", type=int, default=2, help="gradient steps in a sampling step (default: 2)")
    add("--stop", type=int, default=2, help="last sampling steps without them (default: 2)")
    own, rest = parser.parse_known_args(argv)
    if not (0 <= own.scale <= 1000 and own.guides >= 0 and 0 <= own.stop <= 20):
        raise ractd.UserError("--scale must be 0 to 1000, --guides at least 0, --stop 0 to 20")
    return parse_planner(rest, PRESET.split(), UNUSED, own, TASKS, "-diffuser")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("diffuser.py", lambda: diffuser(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
