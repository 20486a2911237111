"""Trajectory Diffuser (Huang et al., ECCV 2024, arXiv 2407.16142): a draft, refined by diffusion.

    python -m reproduce.trajectory_diffuser --env hopper-medium-replay [--data FILE]
    python -m reproduce.trajectory_diffuser --env hopper-medium-replay --sigma 0 0.04 0.25 1 80

Three parts are trained apart, as stages whose flags (--student-steps, ...) and files they have:

    student   draft               causal Transformer over (state, return-to-go), a call per step
    teacher   refinement          EDM denoiser of the next H states, the first one pinned
    reward    inverse dynamics    the action that leads from one state to the next

An action takes H - 1 draft calls and 2 n - 3 denoiser calls, but only the plan's second state gets
to it: unrefined, the first draft call alone would give the same action. At --sigma 80 noise would
leave nothing of a draft, and none is made: plain diffusion. The return-to-go asked for is a
quantile of the data's, always the same, as the return is discounted. (Released: undiscounted, and
what was earned is taken off.) Unlike the released code, the draft is trained without a look at what
it is to predict (--no-mask: as released), and before it is refined noise is added to it, as a
denoiser has seen nothing else (--no-noise: as released, there at a level of about 0.04 in units of
this one). The width of the draft is the last of --channels. Defaults where `python ractd.py
distill` has others:
"""

import copy
import functools
import math
import sys

import numpy as np
import torch
from torch import nn

import ractd
from reproduce.common import data_label, kept_score, make_parser, parse_planner, run_command

PARTS = {"teacher": "refinement", "reward": "inverse dynamics", "student": "draft"}  # by stage
DEFAULTS = "--student-steps 5000 --student-batch 64 --reward-steps 10000 --reward-actions 1"
TASKS = {"halfcheetah": "--horizon 8", "walker2d": "--horizon 32"}  # as released
UNUSED = """distance reward_target reward_actions reward_networks gamma tilted_steps grid_points
target_decay path_batch ctm_weight dsm_weight reward_weight dsm_target nfe temperature
candidates"""  # fields of Config
SMIN = 0.002  # lower than ractd.py's: actions are read off the small change of a state in one step


class StateBatches(ractd.Batches):
    """A dataset as `ractd.Batches`, where windows and pairs of states are drawn.

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
        starts = self.starts[torch.randint(len(self.starts), (batch,), device=self.obs.device)]
        return self.tokens[starts[:, None] + self.chunk]

    def pairs(self, batch):
        """Random steps inside one episode: state (B, O), next state (B, O), action (B, A)."""
        rows = self.followed[torch.randint(len(self.followed), (batch,), device=self.obs.device)]
        return self.obs[rows], self.obs[rows + 1], self.actions[rows]


class Draft(nn.Module):
    """Transformer over tokens x_0 .. x_{L-1}: output i predicts x_{i+1}, (B, L, D) -> (B, L, D).

    L is at most `horizon`. causal: output i sees x_0 .. x_i; else all, its own target among them,
    unless i = L - 1. It predicts the change from x_i to x_{i+1}, in units of `scale` (D,).
    """

    def __init__(self, dim, horizon, width, causal=True):
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
        n, mask = tokens.shape[1], None
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


def make_network(stage, config, dims, causal=True):
    """The untrained part of a stage; dims: sizes of an observation and an action, O and A."""
    states, actions = dims
    if stage == "student":
        return Draft(states + 1, config.horizon, config.channels[-1], causal)
    if stage == "reward":
        return InverseDynamics(states, actions)
    net = ractd.make_unet(config, [states + 1, states])  # a plan of states, given (s_0, g_0)
    net.pinned = tuple((0, i) for i in range(states))
    return net


def stage_loss(stage, config, batches, dims, _, causal=True):
    """(network, loss_fn(net, average)) of a part, in place of `ractd.stage_loss`."""
    device = batches.obs.device
    net = make_network(stage, config, dims, causal).to(device)

    def refinement_loss(net, _):
        tokens = batches.windows(config.teacher_batch)
        x0, condition = tokens[..., :-1], tokens[:, 0]  # (B, H, O), (B, O + 1)
        t, noise = ractd.lognormal_levels(len(x0), device, smin=SMIN), torch.randn_like(x0)
        level = ractd.precondition(net, t, smin=SMIN)
        denoiser = lambda x, t: ractd.denoise(net, x, t, condition, level=level)
        return ractd.edm_loss(denoiser, x0, t, noise), {}

    def inverse_dynamics_loss(net, _):
        state, following, action = batches.pairs(config.reward_batch)
        return (net(state, following) - action).square().mean(), {}

    def draft_loss(net, _):
        tokens = batches.windows(config.student_batch)
        error = (net(tokens[:, :-1]) - tokens[:, 1:]) / batches.scale  # 1: that of the mean change
        return error.square().mean(), {}

    if stage == "teacher":
        return net, refinement_loss
    net.scale.copy_(batches.scale[: len(net.scale)])
    return net, inverse_dynamics_loss if stage == "reward" else draft_loss


def train(run):
    """The finished checkpoints of the parts, by stage, and the scaled return-to-go to ask for."""
    batches, meta = ractd.load_data(run, StateBatches)
    models, make = {}, functools.partial(stage_loss, causal=not run.no_mask)
    for stage, part in PARTS.items():
        own = copy.copy(run)
        if stage == "student" and run.no_mask:
            part, own.out = "draft without mask", run.out / "variants" / "no-mask"
        own.env = f"{run.env}, Trajectory Diffuser's {part}"  # not to be taken for one of RACTD's
        about = meta | {"env": own.env, "plan": "states", "causal": not run.no_mask}
        print(f"\n== {part}", flush=True)
        models[stage] = ractd.load_or_train(own, stage, batches, about, {}, make)
    return models, float(np.quantile(batches.returns_to_go.cpu().numpy(), run.target_quantile))


class Planner:
    """The trained parts, acting in `ractd.evaluate`: raw observations in, one raw action out.

    models: checkpoints by stage; target: scaled return-to-go to ask for; sigma: noise level that
    the draft is refined from, 0: not at all; n: points of Heun's method; noisy: noise is added.
    draft_calls, denoiser_calls: network calls per action.
    """

    def __init__(self, models, target, sigma, n=3, noisy=True, device="cpu"):
        config, dims = ractd.Config(**models["teacher"]["config"]), models["teacher"]["dims"]
        self.nets, causal = {}, models["student"]["causal"]
        for stage, model in models.items():
            net = self.nets[stage] = make_network(stage, config, dims, causal).to(device)
            net.eval().requires_grad_(False).load_state_dict(model["ema"])
        self.tables = {x: table.to(device) for x, table in models["teacher"]["normalizer"].items()}
        self.target, self.sigma, self.n, self.noisy, self.device = target, sigma, n, noisy, device
        self.shape = (config.horizon, dims[0])  # (H, O)
        self.draft_calls = 0 if noisy and sigma == ractd.SIGMA_MAX else config.horizon - 1
        self.denoiser_calls = 2 * n - 3 if sigma else 0
        level = functools.partial(ractd.precondition, self.nets["teacher"], smin=SMIN)
        self.level = functools.cache(level)  # for all states

    @torch.inference_mode()
    def __call__(self, observations, generators):
        """observations (B, O), B numpy Generators for noise -> plans of one action (B, 1, A)."""
        observations = torch.tensor(observations, dtype=torch.float32, device=self.device)
        state = ractd.encode(observations, self.tables["obs"])
        token = nn.functional.pad(state, (0, 1), value=self.target)  # (s_0, g_0), (B, O + 1)
        plan, noise = state.new_zeros(len(state), *self.shape), 0.0
        if self.draft_calls:
            plan = rollout(self.nets["student"], token, self.shape[0])[..., :-1]
        if self.sigma:
            if self.noisy:
                rows = [g.standard_normal(self.shape, np.float32) for g in generators]
                noise = torch.from_numpy(np.stack(rows)).to(self.device)
            net = self.nets["teacher"]
            denoiser = lambda x, t: ractd.denoise(net, x, t, token, level=self.level(t))
            plan = refine(denoiser, plan, self.sigma, self.n, noise)
        action = self.nets["reward"](state, plan[:, 1]).clamp(-1, 1)  # in the action box
        return ractd.decode(action, self.tables["action"])[:, None].cpu().numpy()


def score(run, models, target, sigma):
    """The numbers of acting with a noise level, kept in its file."""
    act = Planner(models, target, sigma, run.points, not run.no_noise, run.device)
    about = {"method": "Trajectory Diffuser", "sigma": sigma, "noise": not run.no_noise}
    about |= {"mask": not run.no_mask, "points": run.points, "seed": run.config.seed}
    about |= {"target_quantile": run.target_quantile}
    about |= {"draft_calls": act.draft_calls, "denoiser_calls": act.denoiser_calls}
    about |= {"episodes": run.config.episodes, "first_seed": run.config.first_seed}
    of_parts = [(PARTS[stage], model) for stage, model in models.items()]
    about |= {"weights": {part: ractd.weights_id(model) for part, model in of_parts}}
    about |= {"train_s": {part: model["seconds"] for part, model in of_parts}}
    variant = "_no-noise" * run.no_noise + "_no-mask" * run.no_mask
    how = f"sigma-{sigma}{variant}_points{run.points}_q{run.target_quantile:g}"
    print(f"sigma {sigma:g}:")
    data = models["teacher"]["dataset"]
    return kept_score(f"score_trajectory-diffuser_{how}", about, run, act, data)


def trajectory_diffuser(run):
    """Train what is missing, score it at each noise level, print a table."""
    models, target = train(run)
    print(flush=True)
    rows = [score(run, models, target, sigma) for sigma in run.sigma]
    print(f"\n{data_label(run.env, rows[0]['dataset'])}, {run.config.episodes} episodes")
    print(f"sigma   draft calls   denoiser calls   {rows[0]['unit']}")
    for row in rows:
        numbers = f"{row['sigma']:<5g}{row['draft_calls']:14}{row['denoiser_calls']:17}"
        print(f"{numbers}   {row['score_mean']:.1f} +- {row['score_sem']:.1f}")


def parse(argv=None):
    """The run that a command line describes, checked."""
    each = "".join(f"\n{task}: {flags}" for task, flags in TASKS.items())
    parser = make_parser("trajectory_diffuser", f"{__doc__}{DEFAULTS}{each}")
    add = parser.add_argument
    text = "noise levels that the draft is refined from, each scored; 0: not at all (default: 0.04)"
    add("--sigma", type=float, nargs="+", default=[0.04], help=text)
    add("--points", type=int, default=3, help="n of Heun, 2 n - 3 denoiser calls (default: 3)")
    add("--no-noise", action="store_true", help="refine the draft as it is, as released")
    add("--no-mask", action="store_true", help="draft without causal mask, as released")
    text = "the return-to-go to ask for, as a quantile of the data's (default: 0.98)"
    add("--target-quantile", type=float, default=0.98, help=text)
    own, rest = parser.parse_known_args(argv)
    if not all(sigma == 0 or SMIN < sigma <= ractd.SIGMA_MAX for sigma in own.sigma):
        raise ractd.UserError(f"--sigma must be 0, or more than {SMIN}, up to {ractd.SIGMA_MAX}")
    if own.points < 2 or not 0 <= own.target_quantile <= 1:
        raise ractd.UserError("--points must be at least 2, --target-quantile from 0 to 1")
    run = parse_planner(rest, DEFAULTS.split(), UNUSED, own, TASKS, "-trajectory-diffuser")
    if run.config.horizon < 2 or run.config.channels[-1] % 4:
        raise ractd.UserError("--horizon must be 2 or more, --channels end in a multiple of 4")
    return run


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    return run_command("trajectory_diffuser.py", lambda: trajectory_diffuser(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
