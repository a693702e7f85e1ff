import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import FixedEpsilonAttack, get_criterion
from foolbox.distances import linf
from mine import model, x, y
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate


class Ray(FixedEpsilonAttack):
    distance = linf

    def __init__(self, points=10):
        self.points = points

    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        x, restore = ep.astensor_(inputs)
        labels = get_criterion(criterion).labels
        _, gradient = ep.value_and_grad(lambda z: ep.crossentropy(model(z), labels).sum(), x)
        best, highest = x, ep.crossentropy(model(x), labels)
        for point in range(1, self.points + 1):
            z = (x + point / self.points * epsilon * gradient.sign()).clip(*model.bounds)
            logits = model(z)
            loss = ep.where(logits.argmax(1) != labels, ep.inf, ep.crossentropy(logits, labels))
            better = loss > highest
            best = ep.where(better.reshape((-1, 1, 1, 1)), z, best)
            highest = ep.where(better, loss, highest)
        return restore(best)


class Mosaic(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(interpolate(avg_pool2d(x, 2), scale_factor=2))


EPS = 0.15
defended = Mosaic(model).eval()
fmodel = foolbox.PyTorchModel(defended, bounds=(0, 1), device="cpu")
_, adversarial, _ = Ray()(fmodel, x, y, epsilons=EPS)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = defended(x).argmax(1) == y
    robust = clean & (defended(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
