import torch
from mine import model, x, y
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torchattacks.attack import Attack


class Ray(Attack):
    def __init__(self, model, eps, points=10):
        super().__init__("Ray", model)
        self.eps = eps
        self.points = points
        self.supported_mode = ["default"]

    def forward(self, images, labels):
        start = images.clone().detach().requires_grad_()
        loss = cross_entropy(self.get_logits(start), labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), start)
        best, highest = images.clone(), loss.detach()
        with torch.no_grad():
            for point in range(1, self.points + 1):
                z = (images + point / self.points * self.eps * gradient.sign()).clamp(0, 1)
                logits = self.get_logits(z)
                loss = cross_entropy(logits, labels, reduction="none")
                loss[logits.argmax(1) != labels] = torch.inf
                better = loss > highest
                best[better] = z[better]
                highest = torch.where(better, loss, highest)
        return best


class Mosaic(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(interpolate(avg_pool2d(x, 2), scale_factor=2))


EPS = 0.15
defended = Mosaic(model).eval()
adversarial = Ray(defended, EPS)(x, y)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = defended(x).argmax(1) == y
    robust = clean & (defended(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
