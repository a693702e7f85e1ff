import torch
import torchattacks
from mine import model, x, y

EPS = 0.15
attack = torchattacks.AutoAttack(model, norm="Linf", eps=EPS, n_classes=10, seed=0)
adversarial = attack(x, y)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = model(x).argmax(1) == y
    robust = clean & (model(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
