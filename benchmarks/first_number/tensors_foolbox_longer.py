import foolbox
import torch
from mine import model, x, y

EPS = 0.15
fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
attack = foolbox.attacks.LinfPGD(steps=40, rel_stepsize=0.1)
_, adversarial, _ = attack(fmodel, x, y, epsilons=EPS)
assert (adversarial - x).abs().max() <= EPS + 1e-6
assert adversarial.min() >= 0
assert adversarial.max() <= 1
with torch.no_grad():
    clean = model(x).argmax(1) == y
    robust = clean & (model(adversarial).argmax(1) == y)
print(f"clean accuracy {clean.float().mean():.1%}")
print(f"robust accuracy {robust.float().mean():.1%}")
