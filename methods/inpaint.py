"""Inpainting by LADD (arXiv 2403.12015, its section on applications): fills a part of a picture.

The network is told more than text, c* = (c, x_0·(1 - M), M): the known pixels, and the mask M that
is 1 where pixels are to be made. They enter by new inputs of the patch embedding, whose weights
start at zero, so that the teacher starts as it was. Two trainings:

    1  the teacher is tuned:  E‖v_φ(x_t, t, c*) - (ε - x_0)‖²      c dropped at times, for guidance
    2  LADD, its update unchanged, with c* in place of c for student and teacher, and real x_0: no
       samples of the teacher are filled the same way. So the distillation loss is needed, too

The paper's: the condition on channels, a tuned teacher, real targets with a distillation loss.
Ours: what that loss is (LADD's own), the masks (lib/conditions.py), sizes, budgets.
Pixels only, of one size; a sample's known ones are put back at the end: M·x̂_0 + (1 - M)·x_0. In
the run's folder teacher.pt is the tuned teacher.

    python -m methods.inpaint --preset nano --from runs/nano
    python sample.py runs/nano-inpaint --init-image a.png --mask m.png --prompt "a red circle"
"""

import copy
import dataclasses
from functools import partial

import data
import ladd
import sample
from lib.conditions import hide, random_masks, tell
from lib.parallel import leave
from lib.settings import refuse, setting
from mmdit import MMDiT


@dataclasses.dataclass(frozen=True)
class Settings(ladd.Settings):
    tune_iterations: int = setting(600, "updates of the teacher", low=1, scales=True, smoke=2)
    tune_lr: float = setting(2e-3, "AdamW, for what Muon does not train", above=0)
    tune_muon_lr: float = setting(0.02, "Muon, for the blocks' matrices; 0: AdamW for all", low=0)
    targets: str = setting("real", "what is real to the heads", choices=("real",))
    cfg: float = setting(2.0, "guidance scale w of the teacher's samples", low=-1e3, high=1e3)

    def __post_init__(self):
        super().__post_init__()
        if self.is_latent or self.aspects:
            name = "aspects" if self.aspects else "downscale"
            refuse(self, name, "a condition is given to pixels alone, of one size")
        if min(self.size) < 4:
            refuse(self, "size", "too small to cover 10 to 60 % of it")

    @property
    def condition_channels(self):
        return self.channels + 1

    def conditioned(self, dataset):
        """The data set, whose images bring their known pixels and a mask."""
        more = copy.copy(dataset)

        def region(index, held_out=False):
            seed, stream = (0, "masks, held out") if held_out else (self.seed, "masks")
            return random_masks(seed, stream, index, dataset.size)

        def condition(index, held_out=False):
            x0 = data.to_float(dataset.batch(index, held_out)[0])
            return hide(x0, region(index, held_out).to(x0.device))

        more.region, more.condition, more.told = region, condition, partial(tell, more)
        return more


def tune(run):
    """Training 1: the teacher, tuned to what it is told, takes the plain one's place."""
    s, checkpoint = run.settings, sample.read_checkpoint(run.path("teacher"))
    run.dataset = s.conditioned(run.dataset)
    if "condition_channels" in checkpoint["model"]:  # done before, or by the run of --from
        return
    more = dict(condition_channels=s.condition_channels)
    model = run.make(MMDiT, **checkpoint["model"], **more)
    model.load_state_dict(checkpoint["weights"], strict=False)  # with the same output at first
    ema = copy.deepcopy(model).requires_grad_(False)
    ladd.teach(run, "tuning", model, ema, s.tune_iterations, s.tune_lr, s.tune_muon_lr)


def distil(run):
    tune(run)
    ladd.distil(run)


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="inpaint", kind=Settings))
