import torch
from mine import model, x, y
from pyautoattack import AutoAttack

EPS = 0.15
adversary = AutoAttack(model, norm="Linf", eps=EPS, version="standard", seed=0)
adversarial, _ = adversary.run_standard_evaluation(x, y)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = model(x).argmax(1) == y
    robust = clean & (model(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
