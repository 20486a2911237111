"""A trained student as one file that acts without this repository: ONNX, and torch's own format.

    python -m reproduce.export --env hopper-medium-replay [--out FOLDER] [--nfe N]

Reads <out>/student.pt (default: runs/<env>) and writes

    <out>/policy.pt2    for torch:        torch.export.load("policy.pt2").module()
    <out>/policy.onnx   for onnxruntime:  onnxruntime.InferenceSession("policy.onnx")

Both are the function (observation, noise) -> plan, with the normaliser, the network calls and the
clipping to the range of the data inside:

    observation   (B, O) float32, in the environment's units
    noise         (B, H, A) float32, standard normal; with N calls (B, N H, A)
    plan          (B, H, A) float32, in the environment's units; plan[:, 0] is the action to take

The batch size B is free. Neither takes a single observation (O,): give it as
np.float32(observation)[None]. The ONNX file is checked against the policy before it is written.
"""

import copy
import io
import itertools
import logging
import sys
import warnings

import numpy as np
import torch
from torch import nn

import ractd
from reproduce.common import make_parser, run_command

TOLERANCE = 1e-5  # of a plan in raw units, or of its largest value where that is more than 1
BATCH_SIZES = (1, 2, 5, 64)  # of the check


class Deployed(nn.Module):
    """A Policy as a function of observations and noise alone, without callables or randomness."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy.eval()
        horizon, action_dim = policy.shape
        self.noise_shape = (policy.calls * horizon, action_dim)

    def forward(self, observation, noise):
        """observation (B, O), noise (B, calls * H, A), N(0, 1) -> plan (B, H, A), raw units."""
        # a copy, so that a program of torch.export takes float64, too
        observation = noise.new_empty(observation.shape).copy_(observation)
        of_calls = iter(noise.split(self.policy.shape[0], dim=1))
        return self.policy(observation, lambda x: next(of_calls))

    def inputs(self, batch):
        """Random inputs (observation, noise) in the range of the data."""
        table = self.policy.obs_table
        observation = ractd.decode(2 * torch.rand(batch, table.shape[1]) - 1, table)
        return observation, torch.randn(batch, *self.noise_shape)


class Unrolled(nn.Module):
    """A TemporalConv over `length` positions as one matrix: faster, where there are few."""

    def __init__(self, conv, length):
        super().__init__()
        taps = conv.weight.detach().unflatten(1, (conv.kernel, -1))  # (C_out, kernel, C_in)
        c_out, _, c_in = taps.shape
        matrix = taps.new_zeros(length, c_out, length, c_in)
        for to, of in itertools.product(range(length), repeat=2):
            tap = of - to + conv.kernel // 2
            if 0 <= tap < conv.kernel:
                matrix[to, :, of] = taps[:, tap]
        self.register_buffer("matrix", matrix.reshape(length * c_out, length * c_in))
        self.register_buffer("bias", conv.bias.detach().repeat(length))
        self.norm = conv.norm

    def forward(self, x):
        """x (B, length, C_in) -> (B, length, C_out)."""
        y = nn.functional.linear(x.flatten(1), self.matrix, self.bias)
        return nn.functional.silu(self.norm(y.unflatten(1, (x.shape[1], -1))))


def unroll(module, *inputs):
    """Replace each TemporalConv that has few positions when the module is called with inputs."""
    lengths = {}
    hooks = []
    for name, conv in module.named_modules():
        if isinstance(conv, ractd.TemporalConv):
            note = lambda _, x, name=name: lengths.update({name: x[0].shape[1]})
            hooks.append(conv.register_forward_pre_hook(note))
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    for name, length in lengths.items():
        conv = module.get_submodule(name)
        if length <= conv.kernel + 1:  # else too much of the matrix is zeros
            module.set_submodule(name, Unrolled(conv, length))


def to_program(deployed):
    """A Deployed as torch.export's program with a free batch size."""
    inputs = deployed.inputs(2)
    fast = copy.deepcopy(deployed)
    unroll(fast, *inputs)
    batch = torch.export.Dim("batch")
    return torch.export.export(fast, inputs, dynamic_shapes=({0: batch}, {0: batch}))


def to_onnx(program, inputs=("observation", "noise"), output="plan"):
    """A program of torch.export as the bytes of an ONNX file; ImportError without the packages."""
    import onnxscript  # noqa: F401  torch's exporter needs it and would say so at length

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no word on torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    return made.model_proto.SerializeToString()


def onnx_session(onnx):
    """onnxruntime's session of an ONNX file's bytes, in as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(onnx, options)


def call_onnx(session, observation, noise):
    """Arrays observation (B, O), noise (B, calls * H, A), both float32 -> plan (B, H, A)."""
    (plan,) = session.run(None, {"observation": observation, "noise": noise})
    return plan


def check_onnx(session, deployed):
    """Raise UserError if the ONNX file's plans are not the policy's."""
    for batch in BATCH_SIZES:
        inputs = deployed.inputs(batch)
        with torch.no_grad():
            right = deployed(*inputs).numpy()
        found = call_onnx(session, *(x.numpy() for x in inputs))
        error = np.abs(found - right).max()
        if not error <= TOLERANCE * max(1, np.abs(right).max()):
            text = f"the plans of the ONNX file differ from the policy's by {error:.1e}"
            raise ractd.UserError(f"{text} in a batch of {batch}; it is not written")


def export(run):
    """Write both files of the run's student."""
    saved = ractd.load_checkpoint(run.out / "student.pt", "student")
    ractd.check_compatible(run.out / "student.pt", saved, {"env": run.env})
    if saved["step"] < saved["steps"]:
        print(f"the student is half trained: {saved['step']:,} of {saved['steps']:,} steps")
    policy = ractd.Policy(saved, run.config.nfe)
    deployed = Deployed(policy)
    program = to_program(deployed)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write(run.out / "policy.pt2", buffer.getvalue())
    try:
        onnx = to_onnx(program)
        check_onnx(onnx_session(onnx), deployed)
    except ImportError as error:
        command = "pip install -r reproduce/requirements.txt"
        raise ractd.UserError(f"ONNX needs more packages ({error}): {command}") from None
    write(run.out / "policy.onnx", onnx)
    noise_shape = ", ".join(map(str, deployed.noise_shape))
    print(
        f"observation (B, {saved['dims'][0]}), noise (B, {noise_shape})"
        f" -> plan (B, {policy.shape[0]}, {policy.shape[1]}), {policy.calls} network call(s)"
    )


def write(path, content):
    """A file of these bytes, whole or not at all."""
    ractd.write_file(path, content)
    print(f"{path}: {len(content) / 1e6:.1f} MB")


def main(argv=None):
    """The command line -> exit code, see `run_command`."""
    parser = make_parser("export", __doc__)
    parser.add_argument("--env", required=True, help="the run's")
    parser.add_argument("--out", help="the run's folder (default: runs/<env>)")
    parser.add_argument("--nfe", type=int, help="network calls per plan (default: 1)")
    parser.set_defaults(device="cpu")  # where it is written
    run = parser.parse_args(argv)

    def command():
        ractd.prepare(run)
        export(run)

    return run_command("export.py", command)


if __name__ == "__main__":
    sys.exit(main())
