import torch
from mine import model, x, y
from pyautoattack import AutoAttack
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate


class Mosaic(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(interpolate(avg_pool2d(x, 2), scale_factor=2))


EPS = 0.15
defended = Mosaic(model).eval()
adversary = AutoAttack(defended, norm="Linf", eps=EPS, version="standard", seed=0)
adversarial, _ = adversary.run_standard_evaluation(x, y)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = defended(x).argmax(1) == y
    robust = clean & (defended(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
