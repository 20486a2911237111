"""Plans in which some places are known: they hold clean values of the state at every noise level.

Diffuser's first state and Maze2d's ends are such places. `denoise` and `student_jump` stand where
`ractd.denoise` and `ractd.student_jump` do for plans whose places are all to be found.
"""

import ractd


class PinnedUNet(ractd.UNet1d):
    """`ractd.UNet1d` that sees clean values at the pinned places, which c_in x would hide.

    pinned: places (h, a) of a plan (B, H, A) that hold the state's first columns, one each.
    """

    def __init__(self, *size, pinned, **more):
        super().__init__(*size, **more)
        self.pinned = tuple(pinned)

    def pin(self, x, state):
        """x (B, H, A) with the values of the state (B, S) at the pinned places."""
        h, a = zip(*self.pinned, strict=True)
        x = x.clone()
        x[:, h, a] = state[:, : len(h)]
        return x

    def forward(self, x, t, state, k=None):
        return super().forward(self.pin(x, state), t, state, k)


def denoise(net, x, t, state, k=None, smin=ractd.SIGMA_MIN):
    """`ractd.denoise` of a `PinnedUNet`: (B, H, A), whose pinned places are the state's."""
    return net.pin(ractd.denoise(net, x, t, state, k, smin), state)


def student_jump(net, x, t, k, state):
    """`ractd.student_jump` of a `PinnedUNet`: (B, H, A), whose pinned places are the state's."""
    return net.pin(ractd.student_jump(net, x, t, k, state), state)
